"""When a training stage is another one: what is carried out differently only counts where it changes the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import graph
from pipeline.config.settings import Data, Generation, Job
from pipeline.config.settings_train import Teacher, Train
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import Done, fingerprint


def inputs(folder: Path, **settings: Any) -> dict[str, Any]:
    """Of gen0-teacher."""
    (folder / "classes.json").write_text('["cat", "dog"]')
    job = Job(name="job", data=Data(root=str(folder)), teacher=Teacher(model="timm/test_resnet", **settings))
    [stage] = [stage for stage in graph.stages_of(job) if stage.kind == "train"]
    done = {"index": Done("index", "", "", "", info={"content": {"labelled": "abc"}})}
    return graph.inputs_of(job, stage, done, Corpora(job, done, write=False))


def test_how_often_a_run_is_validated_counts_where_the_best_weights_are_chosen(tmp_path: Path) -> None:
    assert inputs(tmp_path, evaluate_every="1ep") == inputs(tmp_path)
    best = inputs(tmp_path, weights="best")
    assert best != inputs(tmp_path) and best != inputs(tmp_path, weights="best", evaluate_every="1ep")


def test_how_often_a_run_is_saved_counts_where_it_may_go_back(tmp_path: Path) -> None:
    assert inputs(tmp_path, checkpoint_every="1ep", keep=5) == inputs(tmp_path)
    back = inputs(tmp_path, rollbacks=1)
    assert back != inputs(tmp_path) and back != inputs(tmp_path, rollbacks=1, checkpoint_every="1ep")
    assert back == inputs(tmp_path, rollbacks=1, keep=5)


def test_new_settings_at_their_old_meaning_are_no_part_of_it(tmp_path: Path) -> None:
    new = {"clip", "accumulate", "rollbacks", "rollback_factor", "weights"}
    found = inputs(tmp_path)
    assert not new & set(found["settings"]) and not {"evaluate_every", "checkpoint_every"} & set(found)


def test_a_teacher_of_equal_weights_that_looks_at_images_otherwise_labels_anew(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    teacher, student = Teacher(model="timm/test_resnet"), Train(model="timm/test_resnet")
    job = Job(name="job", data=Data(root=str(tmp_path)), teacher=teacher, generations=[Generation(student=student)])
    (tmp_path / "unlabelled-0.tar").write_bytes(bytes(1024))
    sources = Corpora(job, {}, write=False)
    content = {name: name for name in ("labelled", "validation", "test")}

    def labels(view: dict[str, Any]) -> list[str]:
        done = {
            "index": Done("index", "", "", "", info={"content": content}),
            "gen0-teacher": Done("gen0-teacher", "", "", "the same weights", info={"view": view}),
        }
        stages = [stage for stage in graph.stages_of(job) if stage.name in ("gen1-audit", "gen1-label")]
        assert len(stages) == 2
        return [fingerprint(stage.kind, graph.inputs_of(job, stage, done, sources)) for stage in stages]

    audit, label = labels({"size": 32, "crop": 1.0})
    assert [audit, label] == labels({"crop": 1.0, "size": 32})
    again = labels({"size": 32, "crop": 0.875})
    assert audit != again[0] and label != again[1]
