"""The audit stage in a whole small run: its figures against the files, calibration, and what it keeps apart."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import graph, storage
from pipeline.config.load import load_job
from pipeline.data import label_files, parquet_files
from pipeline.errors import DataError
from pipeline.labelling import audit, calibration
from pipeline.plan.corpora import Corpora
from pipeline.plan.inputs import training_of
from tests import small
from tests.data import tars
from tests.small import World


def audit_of(world: World) -> dict[str, Any]:
    return storage.read_json(str(world.folder("gen1-audit") / "audit.json"))


def metadata(path: Path) -> dict[str, Any]:
    return parquet_files.read_metadata(str(path))


@pytest.fixture(scope="module")
def plain(worlds: small.Store) -> World:
    """A finished run without calibration. Tests must not change it."""
    return worlds.original()


def test_figures_are_those_of_the_files(plain: World) -> None:
    found = audit_of(plain)
    rows = pq.read_table(plain.folder("gen1-audit") / "validation" / "val-000.parquet").to_pydict()
    truth = np.array([0, 1, 2])
    right = np.array(rows["label"]) == truth
    assert found["images"] == 3 and found["bad"] == {} and found["exact"]
    assert found["accuracy"] == pytest.approx(right.mean())
    probs = np.array(
        [[p for _, p in sorted(zip(c, q, strict=True))] for c, q in zip(rows["classes"], rows["probs"], strict=True)]
    )
    assert found["nll"] == pytest.approx(-np.log(probs[np.arange(3), truth]).mean(), rel=2e-3)
    assert found["calibrated_nll"] <= found["nll"] + 1e-6
    assert found["confident"] == 3 and found["noise"] == pytest.approx(1 - right.mean())  # the threshold is 0
    assert sum(found["kept"]) == 3 and sum(found["steps"]["count"]) == 3 and sum(found["steps"]["right"]) == right.sum()
    assert found["sources"] == {"validation": {"images": 3, "accuracy": found["accuracy"], "ece": found["ece"]}}
    done = json.loads((plain.folder("gen1-audit") / "done.json").read_text())
    assert done["metrics"]["accuracy"] == found["accuracy"] and done["metrics"]["temperature"] == found["temperature"]
    validation = json.loads((plain.folder("gen0-teacher") / "done.json").read_text())["metrics"]["best_validation_top1"]
    assert found["accuracy"] == pytest.approx(validation)  # measured by training's own evaluation


def test_cluster_or_not_is_the_same(worlds: small.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = worlds.finished(tmp_path)
    before = audit_of(world)
    shutil.rmtree(world.folder("gen1-audit"))
    monkeypatch.setattr("pipeline.stages.audit.SMALL_BYTES", 0)
    assert world.run().status == 0
    assert audit_of(world) == before


def test_calibration_divides_the_logits_by_the_temperature(plain: World, worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path, until="gen0-teacher")
    assert world.run("label.calibrate=true").status == 0
    temperature = audit_of(world)["temperature"]
    assert temperature != 1.0 and temperature == audit_of(plain)["temperature"]
    assert world.folder("gen0-teacher").name == plain.folder("gen0-teacher").name
    assert world.folder("gen1-label").name != plain.folder("gen1-label").name
    for name in ("unlabelled-000.parquet", "unlabelled-001.parquet"):
        path = world.folder("gen1-label") / name
        assert metadata(path)["temperature"] == temperature
        raw = pq.read_table(plain.folder("gen1-label") / name)
        honest = pq.read_table(path)
        assert honest["label"].equals(raw["label"])
        probs = np.array(raw["probs"].to_pylist(), np.float64) ** (1 / temperature)
        expected = probs / probs.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(np.array(honest["probs"].to_pylist()), expected, rtol=0.02, atol=2e-3)
        np.testing.assert_allclose(honest["confidence"].to_numpy(), expected[:, 0], rtol=0.02, atol=2e-3)
    done = json.loads((world.folder("gen1-audit") / "done.json").read_text())
    assert "(applied)" in done["info"]["line"]


def test_labels_wait_for_the_audit_only_where_they_need_it(plain: World) -> None:
    def needs(*settings: str) -> dict[str, tuple[str, ...]]:
        job = load_job(str(plain.job), [f"output={plain.output}", *settings])
        return {stage.name: stage.needs for stage in graph.stages_of(job)}

    assert needs()["gen1-audit"] == ("index", "gen0-teacher")
    assert needs()["gen1-label"] == ("gen0-teacher",)
    assert needs("label.calibrate=true")["gen1-label"] == ("gen1-audit", "gen0-teacher")


def test_another_threshold_redoes_the_audit_and_no_labels(plain: World) -> None:
    job = load_job(str(plain.job), [f"output={plain.output}", "select.threshold=0.5"])
    states = {look.stage.name: look.done is not None for look in graph.look(job)}
    assert not states["gen1-audit"] and not states["gen1-select"] and states["gen1-label"]


def test_a_killed_audit_goes_on_with_the_files_that_are_there(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path)
    folder = world.folder("gen1-audit")
    before = audit_of(world)
    (folder / "done.json").unlink()
    (folder / "audit.json").unlink()
    written = (folder / "validation" / "val-000.parquet").stat().st_mtime_ns
    ran = world.run()
    assert ran.status == 0 and audit_of(world) == before
    assert (folder / "validation" / "val-000.parquet").stat().st_mtime_ns == written


def test_bad_validation_images_are_no_part_of_it(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    members = [("a.png", b"no image"), ("a.cls", b"0"), ("b.png", tars.picture(5)), ("b.cls", b"2")]
    tars.make(world.shards / "val-001.tar", members)
    ran = world.run("data.max_bad_fraction=1")
    assert ran.status == 0, ran
    found = audit_of(world)
    assert found["images"] == 4 and found["bad"] == {}


# ---- shards that only the audit sees -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run with data.audit_only, one of whose images also lies among the unlabelled ones, byte for byte, as does the
    whole validation shard."""
    world = small.make(tmp_path_factory.mktemp("audited"))
    tars.shard(world.shards / "checked-000.tar", 5, labels=[0, 1, 2, 0, 1], start=500)
    tars.make(world.shards / "unlabelled-002.tar", {"copy.png": tars.picture(502), "own.png": tars.picture(600)})
    shutil.copy(world.shards / "val-000.tar", world.shards / "unlabelled-003.tar")
    ran = world.run("data.audit_only=checked-*.tar")
    assert ran.status == 0, ran
    return world


def test_it_is_the_labelling_path(audited: World) -> None:
    """What the audit says of an image is what labelling says of its copy, bit for bit."""
    one = audited.folder("gen1-audit") / "validation" / "val-000.parquet"
    other = audited.folder("gen1-label") / "unlabelled-003.parquet"
    assert pq.read_table(one).replace_schema_metadata().equals(pq.read_table(other).replace_schema_metadata())
    assert pq.read_schema(one).equals(label_files.SCHEMA)
    for name in ("teacher", "class_list", "transform", "dtype", "device", "batch", "temperature", "versions"):
        assert metadata(one)[name] == metadata(other)[name]
    assert metadata(one)["temperature"] == 1.0


def test_shards_for_the_audit_only_are_audited(audited: World) -> None:
    found = audit_of(audited)
    assert found["images"] == 8 and {name: s["images"] for name, s in found["sources"].items()} == {
        "validation": 3,
        "audit_only": 5,
    }
    files = {
        path.relative_to(audited.folder("gen1-audit")).as_posix()
        for path in audited.folder("gen1-audit").rglob("*.parquet")
    }
    assert files == {"validation/val-000.parquet", "audit_only/checked-000.parquet"}


def test_plan_shows_the_audit_and_its_shards(audited: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # however long the path of the output is
    words = (audited.job, "data.audit_only=checked-*.tar")
    ran = small.command("plan", *words, f"output={audited.output}")
    assert any(line.split()[:3] == ["audit_only", "checked-*.tar", "1"] for line in ran.out.splitlines()), ran.out
    ran = small.command("plan", *words, f"output={tmp_path / 'new'}")
    assert "gen1-audit" in ran.out and "labelled by gen0-teacher" in ran.out


def test_training_never_sees_them(audited: World, plain: World) -> None:
    from pipeline.cluster.inline import Inline
    from pipeline.graph import stages_of
    from pipeline.loading.training_rows import load_rows
    from pipeline.plan.context import Context
    from pipeline.plan.corpora import Corpora
    from pipeline.stages import train

    settings = [f"output={audited.output}", "data.audit_only=checked-*.tar"]
    job = load_job(str(audited.job), settings)
    done = {look.stage.name: look.done for look in graph.look(job)}
    assert all(done.values())
    sources = Corpora(job, {})
    assert not {shard.path for shard in sources["audit_only"].shards} & {
        shard.path for name in ("labelled", "unlabelled") for shard in sources[name].shards
    }
    hidden = {label_files.image_hash(tars.picture(seed)) for seed in range(500, 505)}
    for stage in stages_of(job):
        if stage.kind != "train":
            continue
        needs = {name: found for name in stage.needs if (found := done[name])}
        context = Context(job, stage, stages_of(job), "", "", needs, sources, Inline(), pytest.fail, "")
        spec = train.make_spec(context, training_of(job, stage))
        seen: set[int] = set()
        for source in spec.sources:
            for shard in source.shards:
                assert "checked" not in shard.path
                rows = load_rows(shard, soft=False)
                seen |= {
                    label_files.image_hash(Path(shard.path).read_bytes()[o : o + s])
                    for o, s in zip(rows.offset, rows.size, strict=True)
                }
        assert not seen & hidden
        if stage.generation:
            assert label_files.image_hash(tars.picture(600)) in seen  # its neighbour in the shard is used
    assert json.loads((audited.folder("gen1-select") / "summary.json").read_text())["excluded"] == 4
    assert audited.folder("gen0-teacher").name == plain.folder("gen0-teacher").name  # it does not depend on them


@pytest.mark.parametrize(("pattern", "source", "name"), [
    ("unlabelled-001.tar", "unlabelled", "unlabelled-001.tar"),
    ("u*-000.tar", "unlabelled", "unlabelled-000.tar"),
    ("labelled-*.tar", "labelled", "labelled-000.tar"),
    ("val-*.tar", "validation", "val-000.tar"),
])  # fmt: skip
def test_overlapping_patterns_are_refused(tmp_path: Path, pattern: str, source: str, name: str) -> None:
    world = small.make(tmp_path)
    ran = world.run(f"data.audit_only={pattern}")
    assert ran.status == 2 and not world.done()
    assert ran.err == (
        f"error: data.audit_only and data.{source} both match 1 shard, the first is {name}; what is audited must be "
        "used for nothing else: narrow one of the patterns\n"
    )


def test_an_unlabelled_image_for_the_audit_is_named(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    tars.shard(world.shards / "checked-000.tar", 2)
    ran = world.run("data.audit_only=checked-*.tar")
    assert ran.status == 2 and "sample 0 ('000') of shard checked-000.tar has no label" in ran.err
    assert len(ran.err.splitlines()) == 1


# ---- what is computed --------------------------------------------------------------------------------------


def test_classes_may_have_thresholds_of_their_own() -> None:
    probs = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6], [0.7, 0.2, 0.1]], np.float32)
    rows = label_files.rows_from_probs(probs)
    truth = np.array([0, 1, 2, 1], np.int32)
    answers = calibration.answers(rows.classes, rows.probs, rows.confidence, truth, 3)
    found = audit.compare({"validation": (answers, Counter())}, 3, 0.65, {0: 0.75, 2: 0.5}, calibrate=False)
    assert found["kept"] == [1, 1, 1] and found["precision"] == [1, 1, 1] and found["recall"] == [1, 0.5, 1]
    assert (found["confident"], found["noise"], found["accuracy"]) == (3, 0, 0.75)
    honest = audit.compare({"validation": (answers, Counter())}, 3, 0.65, {}, calibrate=True)
    sure = calibration.confidence_at(answers, honest["temperature"])
    assert honest["confident"] == (sure >= np.float32(0.65)).sum() and honest["nll"] == found["nll"]


def test_nothing_to_judge_is_one_sentence() -> None:
    nothing = calibration.joined([])
    with pytest.raises(DataError, match="no image that could be labelled"):
        audit.compare({"validation": (nothing, Counter({"not_finite": 3}))}, 3, 0.3, {}, calibrate=False)


def test_what_was_made_before_there_were_audits_stays(plain: World) -> None:
    """Without calibration and audit_only, nothing new is part of what labelling and selection depend on."""
    job = load_job(str(plain.job), [f"output={plain.output}"])
    done = {look.stage.name: look.done for look in graph.look(job) if look.done}
    sources = Corpora(job, {}, write=False)
    # Nor did a model's stage record how it looks at images.
    teacher = done["gen0-teacher"]
    done["gen0-teacher"] = dataclasses.replace(teacher, info={k: v for k, v in teacher.info.items() if k != "view"})
    inputs = {stage.kind: graph.inputs_of(job, stage, done, sources) for stage in graph.stages_of(job)}
    assert inputs["label"] == {
        "settings": {"batch": 128},
        "teacher": done["gen0-teacher"].output,
        "corpus": sources["unlabelled"].fingerprint,
        "origin": None,
        "classes": small.CLASSES,
    }
    assert len(inputs["select"]["held_out"]) == 2 and set(inputs["index"]["corpora"]) == {
        "labelled",
        "validation",
        "test",
    }
    assert set(inputs["select"]) == {"settings", "labels", "held_out"}
