"""A user's mistakes: each ends in one sentence and exit status 2, leaves nothing half-written, and once it is mended
the same command goes on. Bad images are counted, named and skipped."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.data import label_files, parquet_files
from pipeline.storage.lock import lock
from tests import small, tiny
from tests.data import tars
from tests.small import STAGES, Ran, World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return small.make(tmp_path)


@pytest.fixture
def teacher(tmp_path: Path) -> World:
    """A job without generations: quicker, for mistakes that are met before any."""
    return small.make(tmp_path, generations=[])


@pytest.fixture
def finished(worlds: small.Store) -> World:
    """A job that is done, to be read."""
    return worlds.original()


def refused(ran: Ran, *words: str) -> None:
    """The one sentence, on standard error, with these words in it."""
    assert ran.status == 2, ran
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1, ran.err
    assert "Traceback" not in ran.out + ran.err
    for word in words:
        assert word in ran.err, (word, ran.err)


def stopped(world: World, *done: str) -> None:
    """Only these stages are done, and no temporary file is left."""
    assert world.done() == list(done)
    assert not world.temporary()


def goes_on(world: World, *settings: str) -> Ran:
    ran = world.run(*settings)
    assert (ran.status, ran.err) == (0, ""), ran
    assert world.done() == world.stages
    assert not world.temporary()
    assert not list(world.output.rglob("*.failed.json"))
    return ran


# ---- where the shards are ----------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing(world: World) -> None:
    """All four are looked at before anything is trained."""
    for source in ("labelled", "unlabelled", "validation", "test"):
        missing = world.run(f"data.{source}=nothing-*.tar")
        refused(missing, f"source '{source}'", "no shard matches nothing-*.tar", "holds 6 entries such as classes.json")
        stopped(world)
    goes_on(world)


def test_a_root_that_is_not_there(teacher: World) -> None:
    refused(teacher.run("data.root=/not/there"), "source 'labelled'", "there is nothing at /not/there")
    stopped(teacher)
    goes_on(teacher)


def test_a_gap_in_a_range(world: World) -> None:
    refused(world.run("data.unlabelled=unlabelled-{000..002}.tar"), "1 shard", "is missing", "unlabelled-002.tar")
    stopped(world)
    goes_on(world, "data.unlabelled=unlabelled-{000..001}.tar")


def test_an_empty_shard(world: World) -> None:
    shard = world.shards / "unlabelled-001.tar"
    content = shard.read_bytes()
    shard.write_bytes(b"")
    refused(world.run(), "source 'unlabelled'", f"shard {shard} is empty (0 bytes)")
    stopped(world)
    shard.write_bytes(content)
    goes_on(world)


@pytest.mark.parametrize("setting", ["labelled", "unlabelled", "validation", "test", "root"])
def test_a_pipe_url_runs_nothing(world: World, tmp_path: Path, setting: str) -> None:
    mark = tmp_path / "ran"
    refused(
        world.run(f"data.{setting}=pipe:touch {mark}"), "'pipe:' is refused", "it would run a command", "give local"
    )
    stopped(world)
    assert not mark.exists()


def test_no_unlabelled_pattern_for_a_generation(world: World) -> None:
    refused(world.run("data.unlabelled=null"), "data.unlabelled is not set", "the job has 1 generations")
    stopped(world)
    goes_on(world)


def test_no_class_list(teacher: World) -> None:
    (teacher.shards / "classes.json").unlink()
    refused(teacher.run(), f"there is no {teacher.shards}/classes.json", "JSON list of class names")
    stopped(teacher)
    (teacher.shards / "classes.json").write_text(json.dumps(small.CLASSES))
    goes_on(teacher)


# ---- what is in them ---------------------------------------------------------------------------------------


def text_file(content: bytes) -> bytes:
    return (b"this is no tar\n" * len(content))[: len(content)]


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    "source, damage, words",
    [
        ("labelled", text_file, ("is not an uncompressed tar", "no tar header at byte 0")),
        ("labelled", gzip.compress, ("is not an uncompressed tar", "without gzip")),
        ("labelled", cut_short, ("is damaged (the file ends", "must be whole")),
        ("test", text_file, ("is not an uncompressed tar",)),
    ],
)
def test_an_unreadable_labelled_tar(
    teacher: World, source: str, damage: Callable[[bytes], bytes], words: tuple[str, ...]
) -> None:
    shard = teacher.shards / f"{source}-000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(damage(whole))
    refused(teacher.run(), f"{source}-000.tar", *words)
    stopped(teacher)
    shard.write_bytes(whole)
    if len(damage(whole)) != len(whole):  # another size: not the file that the run began with
        refused(teacher.run(), f"{source}-000.tar has {len(whole)} bytes instead of", "--refreeze")
        assert teacher.run("--refreeze").status == 0
    goes_on(teacher)


def test_an_unreadable_unlabelled_tar_above_and_below_max_bad_shards(world: World) -> None:
    shard = world.shards / "unlabelled-001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(text_file(whole))  # which is seen before anything is trained
    for name in ("run", "plan"):
        refused(world.call(name), "unlabelled-001.tar is not an uncompressed tar", "without gzip or zstd")
        stopped(world)
    tars.make(shard, {"readme.txt": b"a tar until here"})
    broken = shard.read_bytes()[:1024] + text_file(whole)[1024:]
    shard.write_bytes(broken)
    refused(world.run(), "1 of 2 unlabelled shards failed, data.max_bad_shards allows 0", "unlabelled-001.tar")
    stopped(world, "index", "gen0-teacher", "gen1-audit")
    folder = world.folder("gen1-label")
    failed = json.loads((folder / "unlabelled-001.failed.json").read_text())
    assert failed["shard"] == "unlabelled-001.tar" and "damaged before its first image" in failed["error"]
    good = (folder / "unlabelled-000.parquet").stat().st_mtime_ns

    # It is tried again at the next start, and what is labelled stays.
    shutil.copytree(world.output, world.output.with_name("mended"), copy_function=shutil.copy2)
    shard.write_bytes(whole)
    mended = dataclasses.replace(world, output=world.output.with_name("mended"))
    goes_on(mended)
    assert (mended.folder("gen1-label") / "unlabelled-000.parquet").stat().st_mtime_ns == good

    shard.write_bytes(broken)
    tolerated = world.run("data.max_bad_shards=1")
    assert tolerated.status == 0 and world.done() == STAGES
    assert "! shard unlabelled-001.tar failed: " in tolerated.out
    assert "4 images of 1 shard labelled" in tolerated.out
    assert sorted(path.name for path in folder.glob("unlabelled-*")) == [
        "unlabelled-000.parquet",
        "unlabelled-001.failed.json",
    ]


def test_an_unlabelled_tar_that_ends_early(world: World) -> None:
    """Its samples up to the damage are good; whether that is enough is max_bad_shards' to say."""
    shard = world.shards / "unlabelled-001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2048] + text_file(whole[2048:]))  # two members, and then no header
    refused(world.run(), "1 unlabelled shards are damaged, data.max_bad_shards allows 0", "unlabelled-001.tar")
    stopped(world, "index", "gen0-teacher", "gen1-audit")
    shard.write_bytes(whole)
    assert "8 images of 2 shards labelled" in goes_on(world).out

    shard.write_bytes(whole[:2048] + text_file(whole[2048:]))
    again = dataclasses.replace(world, output=world.output.with_name("tolerant"))
    assert "6 images of 2 shards labelled" in goes_on(again, "data.max_bad_shards=1").out


@pytest.mark.parametrize(
    "source, label, words",
    [
        ("labelled", b"3", ("the class index 3", "classes.json has 3 classes (0 to 2)")),
        ("val", b"255", ("the class index 255",)),
        ("labelled", b"-1", ("the label '-1'", "a class index from 0 to 2")),
        ("labelled", b"owls", ("the label 'owls'", "a class index from 0 to 2", "a class name", "such as 'owl'")),
        ("test", None, ("has no label", "needs a .cls member")),
    ],
)
def test_a_wrong_or_missing_label(teacher: World, source: str, label: bytes | None, words: tuple[str, ...]) -> None:
    shard = teacher.shards / f"{source}-000.tar"
    whole = shard.read_bytes()
    members = [("a.png", tars.picture(1)), ("a.cls", b"0"), ("b.png", tars.picture(2))]
    tars.make(shard, members if label is None else [*members, ("b.cls", label)])
    refused(teacher.run(), f"sample 1 ('b') of shard {source}-000.tar", *words)
    stopped(teacher)
    shard.write_bytes(whole)
    assert teacher.run("--refreeze").status == 0
    goes_on(teacher)


def corrupt(world: World, name: str, members: list[tuple[str, bytes]]) -> None:
    """Add an image that is cut short, one that is text, and a good one."""
    bad = [
        ("bad.png", tars.picture(7)[:60]),
        ("no.jpg", b"<html>not found</html>"),
        ("good.png", tars.picture(zlib.crc32(name.encode()))),
    ]
    labels = [] if name.startswith("unlabelled") else [(f"{key}.cls", b"1") for key in ("bad", "no", "good")]
    tars.make(world.shards / name, sorted([*members, *bad, *labels], key=lambda member: member[0].split(".")[0]))


def test_bad_images_are_counted_named_and_skipped(world: World) -> None:
    corrupt(world, "labelled-001.tar", [])
    corrupt(world, "val-001.tar", [])
    corrupt(world, "test-001.tar", [])
    corrupt(world, "unlabelled-002.tar", [])
    refused(world.run(), "2 of 9 labelled images cannot be used, more than data.max_bad_fraction 0.01 allows")
    stopped(world)
    ran = goes_on(world, "data.max_bad_fraction=1")
    assert "7 labelled, 4 validation, 4 test, 6 bad" in ran.out
    assert "9 images of 3 shards labelled, 2 bad" in ran.out
    for source, shard in [("labelled", "labelled"), ("validation", "val"), ("test", "test")]:
        assert f"! image 'bad' of shard {source}/{shard}-001.tar is left out: truncated" in ran.out
        assert f"! image 'no' of shard {source}/{shard}-001.tar is left out: not_an_image" in ran.out
        rows = pq.read_table(world.folder("index") / source / f"{shard}-001.parquet").to_pydict()
        assert rows["key"] == ["good"] and rows["index"] == [1] and rows["label"] == [1]
    rows = pq.read_table(world.folder("gen1-label") / "unlabelled-002.parquet").to_pydict()
    assert dict(zip(rows["key"], rows["status"], strict=True)) == {
        "bad": "truncated",
        "good": "ok",
        "no": "not_an_image",
    }
    status = small.command("status", world.job, f"output={world.output}").out
    for reason in ("labelled: truncated", "validation: not_an_image", "test: truncated"):
        assert f"bad samples: {reason}" in status
    assert "bad samples: not_an_image" in status


def test_a_shard_that_is_tested_on_and_trained_on(teacher: World) -> None:
    for source in ("validation", "test"):
        ran = teacher.run(f"data.{source}=labelled-*.tar")
        refused(ran, f"data.{source} and data.labelled both match 1 shard,", "must not be trained on")
    goes_on(teacher)


# ---- models and checkpoints --------------------------------------------------------------------------------


IMPOSSIBLE_MODELS = [
    (["teacher.model=lambda_resnet_tin"], ["'lambda_resnet_tin'", "nearest are lambda_resnet_tiny"]),
    (["teacher.model=resnet18"], ["there is no model 'resnet18'", "timm's is written timm/resnet18"]),
    (["teacher.model=timm/resnet10"], ["timm has no model 'resnet10'", "did you mean", "resnet10t"]),
    (["student.model=lambda_resnet_smal"], ["'lambda_resnet_smal'", "nearest are lambda_resnet_small"]),
    (["student.model=timm/vit_tin"], ["timm has no model 'vit_tin'", "vit_tiny"]),
    (["student.overrides={wide: 2}"], ["there is no model setting 'wide'", "the settings are"]),
    (
        ["student.model=timm/vit_tiny_patch16_224", "student.overrides={}"],
        ["does not take images of 8 pixels", "(224)"],
    ),
]


def test_a_model_that_cannot_be_is_met_before_the_teacher_is_trained(world: World) -> None:
    for settings, words in IMPOSSIBLE_MODELS:
        refused(world.run(*settings), *words)
        stopped(world, "index")
    goes_on(world)


def test_a_teacher_for_other_classes(teacher: World, finished: World) -> None:
    world, checkpoint = teacher, finished.folder("gen0-teacher")
    (world.shards / "classes.json").write_text(json.dumps(["cat", "owl", "dog"]))
    words = ("was trained for other classes (3: cat, dog, owl)", "this job's (3: cat, owl, dog)")
    refused(world.run(f"teacher.checkpoint={checkpoint}"), str(checkpoint), *words)
    refused(world.run(f"teacher.checkpoint={checkpoint}/model.safetensors"), *words)  # its card lies beside it
    stopped(world, "index")
    (world.shards / "classes.json").write_text(json.dumps(small.CLASSES))
    ran = world.run(f"teacher.checkpoint={checkpoint}")
    assert (ran.status, ran.err) == (0, "")
    assert f"lambda_resnet_tiny from {checkpoint}" in ran.out


def test_weights_that_are_not_the_teachers(teacher: World, finished: World, tmp_path: Path) -> None:
    world = teacher
    weights = finished.folder("gen0-teacher") / "model.safetensors"
    loose = tmp_path / "loose.safetensors"
    shutil.copy(weights, loose)
    other = world.run(f"teacher.checkpoint={loose}", "teacher.overrides.widths=[8,8,8]")
    refused(other, f"{loose}: the weights do not fit", "of another shape", "name the architecture")
    stopped(world, "index")
    loose.write_bytes(weights.read_bytes()[:1000])
    refused(world.run(f"teacher.checkpoint={loose}"), f"{loose} is not a safetensors file")
    loose.unlink()
    refused(world.run(f"teacher.checkpoint={loose}"), f"there is nothing at {loose}", "name a stage folder")
    refused(world.run(f"teacher.checkpoint={tmp_path}"), f"there is nothing at {tmp_path}/model.safetensors")
    stopped(world, "index")
    shutil.copy(weights, loose)
    goes_on(world, f"teacher.checkpoint={loose}")


def test_a_selection_that_keeps_nothing(world: World) -> None:
    nothing = world.run("select.threshold=1.0")
    refused(nothing, "the selection keeps no image", "select.threshold is 1", "lower it")
    stopped(world, "index", "gen0-teacher", "gen1-audit", "gen1-label")
    ran = world.run("select.threshold=0.0")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.count("done before") == 3


# ---- labels that are not this run's, and training that cannot go on ----------------------------------------


def test_a_step_that_needs_more_pseudo_labelled_images_than_were_selected(world: World) -> None:
    words = (
        "each step takes 12 pseudo-labelled images (unlabelled_ratio 3 × batch 4)",
        "the selection holds 8,",
        "lower",
    )
    refused(world.run("student.unlabelled_ratio=3"), *words)
    stopped(world, "index", "gen0-teacher", "gen1-audit", "gen1-label", "gen1-select")
    assert goes_on(world).out.count("done before") == 5


def rewritten(path: Path, **changes: object) -> bytes:
    """The label file as it was; it says other things of itself now."""
    before = path.read_bytes()
    table, metadata = parquet_files.read_table(str(path)), parquet_files.read_metadata(str(path))
    path.unlink()
    label_files.write_labels(str(path), table, metadata | changes)
    return before


@pytest.fixture
def labelled(worlds: small.Store, tmp_path: Path) -> World:
    """A job that is done but for its student and what follows, to be spoilt."""
    return worlds.finished(tmp_path, until="gen1-select")


def test_label_files_of_another_class_list_or_teacher(labelled: World) -> None:
    """Whoever reads them next refuses them: labelling that goes on, selection, training."""
    folder = labelled.folder("gen1-label")
    file, done = folder / "unlabelled-001.parquet", folder / "done.json"
    classes = {"class_list": label_files.class_list_hash(["cat", "owl", "dog"])}
    finished = done.read_bytes()
    select, train = "select.threshold=0.01", "generations[0].student.lr=0.02"
    for setting, change, words in (
        ("", classes, "the class list (hash) is"),
        (select, classes, "the class list (hash) is"),
        (select, {"teacher": "0" * 64}, f"the teacher (sha256 of its weights) is '{'0' * 64}' instead of"),
        (train, {"teacher": "0" * 64}, f"the teacher (sha256 of its weights) is '{'0' * 64}' instead of"),
    ):
        if not setting:
            done.unlink()
        before = rewritten(file, **change)
        ran = labelled.run(*[setting] * bool(setting))
        refused(ran, f"the label file {file} does not fit this run", words, "label these shards again")
        file.write_bytes(before)
        done.write_bytes(finished)
    before = rewritten(file, shard="a.tar")
    ran = labelled.run(train)
    assert ran.status == 2 and f"{file} is the file of another shard, 'a.tar'" in ran.err
    file.write_bytes(before)
    assert goes_on(labelled, train).out.count("done before") == 5


def test_an_image_that_is_no_longer_what_was_labelled(labelled: World) -> None:
    shard = labelled.shards / "unlabelled-000.tar"
    whole, times = shard.read_bytes(), (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    rows = pq.read_table(labelled.folder("gen1-label") / "unlabelled-000.parquet").to_pylist()
    with shard.open("rb+") as file:
        for row in rows:
            file.seek(row["offset"])
            file.write(bytes(row["size"]))
    os.utime(shard, ns=times)  # as a disk that rots would leave it
    words = (f"of {shard} has other bytes than when it was indexed or labelled", "bring the old shard back")
    refused(labelled.run(), *words)
    shard.write_bytes(whole)
    os.utime(shard, ns=times)
    assert goes_on(labelled).out.count("done before") == 5


def test_a_learning_rate_that_diverges(teacher: World) -> None:
    words = ("the loss became nan at step 2, near learning rate 1e+30", "lower `lr`", "there is no checkpoint yet")
    refused(teacher.run("teacher.lr=1e30"), *words)
    stopped(teacher, "index")
    goes_on(teacher)


# ---- where the output goes ---------------------------------------------------------------------------------


def test_an_output_that_cannot_be_written(teacher: World, tmp_path: Path) -> None:
    for output in (Path("/dev/null/out"), teacher.job, teacher.job / "out"):
        ran = small.command("run", teacher.job, f"output={output}")
        refused(ran, str(output), "choose another `output`")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "small.yaml"]
    goes_on(teacher)


def test_a_second_run_on_the_same_output(teacher: World) -> None:
    with lock(str(teacher.output)):
        refused(teacher.run(), f"output {teacher.output} is in use by process {os.getpid()}", "choose another `output`")
    stopped(teacher)
    goes_on(teacher)


def test_a_relative_output_where_ray_unpacked_the_job(
    teacher: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    cache.mkdir(parents=True)
    monkeypatch.chdir(cache)
    refused(small.command("run", teacher.job), "output 'runs/tiny' is relative", "a cache", "output=/shared/runs/NAME")
    assert not list(cache.iterdir())
    goes_on(teacher)


# ---- in a process of its own -------------------------------------------------------------------------------


@pytest.mark.slow
def test_with_ray_and_mlflow_it_is_one_sentence_too(world: World) -> None:
    """What is on by default, and a mistake that only a worker meets."""
    shard = world.shards / "unlabelled-001.tar"
    tars.make(shard, {"readme.txt": b"a tar until here"})
    shard.write_bytes(shard.read_bytes()[:1024] + text_file(shard.read_bytes())[1024:])
    done = tiny.run(world.job, f"output={world.output}", "cluster=embedded", "tracking.enabled=true")
    words = ("1 of 2 unlabelled shards failed", "shard unlabelled-001.tar is damaged before its first image")
    refused(Ran(done.returncode, done.stdout, done.stderr), *words)
    stopped(world, "index", "gen0-teacher", "gen1-audit")
    assert (world.folder("gen1-label") / "unlabelled-000.parquet").is_file()
