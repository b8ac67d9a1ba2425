"""What `plan` says of time, room and the length of training."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline import outlook
from pipeline.config.settings_train import Train
from pipeline.prepare import folders
from tests import small, tiny
from tests.data.tars import picture
from tests.small import command


def train(**settings: object) -> Train:
    return Train(model="lambda_resnet_tiny", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "labelled", "pseudo", "said"),
    [
        (
            {"duration": "350ep", "batch": 4096},
            1_281_167,
            0,
            "350ep = 109,475 steps (313 an epoch, 448,409,600 images)",
        ),
        ({"duration": "2000st", "batch": 32}, 140, 96, "2000st (4.4 an epoch, 256,000 images)"),
        ({"duration": "2000st", "batch": 32}, None, 0, "2000st (64,000 images)"),
        ({"duration": "5ep", "batch": 32}, None, 0, "5ep"),
        ({"duration": "0.1ep", "batch": 100}, 100, 0, "0.1ep = 0 steps (too few: lengthen it or lower batch)"),
    ],
)
def test_the_length_of_training(settings: dict[str, object], labelled: int | None, pseudo: int, said: str) -> None:
    assert outlook.length(train(**settings), labelled, pseudo) == said


@pytest.mark.parametrize(
    ("settings", "labelled", "said"),
    [
        ({"duration": "350ep", "batch": 4096}, 1_281_167, []),  # the papers'
        ({"duration": "9000st", "batch": 64}, 4000, []),  # jobs/cifar10.yaml
        ({"duration": "300st", "batch": 50}, 50, []),  # the demo
        (
            {"duration": "350ep", "batch": 4096},
            600,
            ["takes 4,096 labelled images, and there are 600", "51 steps (350ep"],
        ),
        ({"duration": "20000st", "batch": 256}, 600, ["600 labelled images 8,533 times", "to 2300st or less"]),
        ({"duration": "20000st", "batch": 256, "freeze": True}, 600, []),
    ],
)
def test_recipes_that_do_not_fit_the_data_are_warned_of(
    settings: dict[str, object], labelled: int, said: list[str]
) -> None:
    found = outlook.advice("gen0-teacher", train(**settings), labelled)
    assert all(words in " ".join(found) for words in said) and bool(found) == bool(said), found


def test_time_and_room_of_a_finished_run_and_of_what_is_to_come(worlds: small.Store, tmp_path) -> None:
    world = worlds.finished(tmp_path, until="gen1-select")
    planned = world.call("plan")
    assert planned.status == 0, planned
    [student] = [line for line in planned.out.splitlines() if line.startswith("gen1-student")]
    assert student.split()[3].startswith("~") and student.split()[4] in ("s", "min")  # as fast as the teacher was
    said = " ".join(planned.out.split())  # whatever the width
    assert "to come: about" in said and "without evaluate, report" in said
    again = world.call("plan", "generations=[]", "teacher.dropout=0.1")
    assert again.status == 0


def test_a_measurement_here(worlds: small.Store, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlook, "MEASURED_SECONDS", 0.2)
    world = small.make(tmp_path)
    before = world.call("plan")
    assert "plan --measure times training here" in before.out
    planned = world.call("plan", "--measure")
    assert planned.status == 0 and "to come: about" in planned.out, planned
    assert not world.output.exists()


def test_labelled_images_are_counted_by_the_manifest_before_there_is_an_index(tmp_path) -> None:
    for number in range(24):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    folders.folder(str(tmp_path / "photos"), str(tmp_path / "out"), split_off={"validation": 0.2, "test": 0.2})
    job = tiny.write_job(tmp_path)
    words = ("plan", job, "prepare.dataset=null", f"data.root={tmp_path / 'out'}", "generations=[]", "teacher.batch=20")
    planned = command(*words)
    assert planned.status == 0, planned
    assert "takes 20 labelled images, and there are 16: lower batch" in " ".join(planned.out.split())
    (tmp_path / "out" / "manifest-labelled.parquet").unlink()
    assert "lower batch" not in command(*words).out


def test_the_rows_of_a_plan_need_no_torch() -> None:
    program = (
        "import sys, noisy_lambda; noisy_lambda.plan('noisy_student', 'output=nowhere'); "
        "print([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
