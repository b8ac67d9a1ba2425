"""Job files: what they may hold, what they say when they are wrong, and what is part of a fingerprint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from pipeline.config import durations, fields, job_file, settings, settings_train, settings_workers
from pipeline.config.fields import identity_of
from pipeline.config.load import RAY_CACHE, load_job, resolve_output
from pipeline.errors import ConfigError

JOB = """
name: tiny
prepare: {dataset: digits}
teacher: {model: lambda_resnet_tiny, duration: 30ep}
student: {model: lambda_resnet_tiny, batch: 10, affine: {degrees: 5.0}}
generations: [{student: {lr: 1.0}}, {student: {lr: 2.0, affine: {shear: 1.0}}, select: {per_class: 5}}]
"""


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(JOB)
    return str(path)


def test_shared_student_settings_lie_below_each_generation(job: str) -> None:
    loaded = load_job(job, ["generations[1].student.duration=20st", "teacher.lr=1e-3"])
    first, second = loaded.generations
    assert (first.student.batch, first.student.lr, first.student.affine.degrees) == (10, 1.0, 5.0)
    assert (second.student.batch, second.student.lr, second.student.duration) == (10, 2.0, "20st")
    assert (second.student.affine.degrees, second.student.affine.shear) == (5.0, 1.0)
    assert (first.select.per_class, second.select.per_class) == (None, 5)
    assert loaded.teacher.lr == 0.001


def test_the_command_line_has_the_last_word_on_every_generation(job: str) -> None:
    loaded = load_job(
        job, ["student.lr=3", "student.affine.shear=4", "generations[1].student.lr=5", "select.per_class=6"]
    )
    first, second = loaded.generations
    assert [(g.student.lr, g.student.affine.shear, g.select.per_class) for g in (first, second)] == [
        (3, 4, 6),
        (5, 4, 6),
    ]
    assert (first.student.affine.degrees, second.student.batch) == (5.0, 10)
    assert load_job(job, ["student.lr=3", "generations=[{}]"]).generations[0].student.lr == 3


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("student.unlabelled_ratio=1:3", ["unlabelled_ratio is '1:3'", "a number"]),  # YAML 1.1 has it as 63
        ("teacher.batch=64.5", ["teacher.batch is '64.5'", "a whole number"]),
        ("teacher.lr=.inf", ["teacher.lr is inf", "a finite number"]),
        ("seed=null", ["seed is null", "drop it"]),
        ("evaluate.sizes=224", ["evaluate.sizes", "takes a list"]),
        ("data.labelled=[a, b]", ["data.labelled is a list", "takes text"]),
        ("labels=hard", ["unknown key 'labels'", "student.labels"]),
        ("teacher.base=recipe/digits.yaml", ["cannot set 'teacher.base'", "in the job file"]),
        ("teacher.init=teacher", ["teacher.init", "only students"]),
        ("teacher.mean=[0.5]", ["teacher.mean is [0.5]", "three numbers in 0..1"]),
        ("student.std=[0, 1, 1]", ["generations[0].student.std is [0.0, 1.0, 1.0]", "above 0"]),
        ("teacher.mean=[125, 122, 114]", ["teacher.mean is [125.0", "divided by 255"]),
        ("teacher.crop_scale=[1.0, 0.08]", ["teacher.crop_scale is [1.0, 0.08]", "the least and the greatest"]),
        ("teacher.affine.scale=[1.0]", ["teacher.affine.scale is [1.0]", "two numbers"]),
        ("teacher.evaluate_every=0", ["teacher.evaluate_every", "0st for the end only"]),
        ("sed=1", ["'sed'", "'seed'"]),
        ("teacher.modle=x", ["'teacher.modle'", "'model'"]),
        ("generations[0].student.epochs=3", ["generations[0].student.epochs"]),
        ("teacher.lr=fast", ["teacher.lr", "fast"]),
        ("teacher.flip=3", ["teacher.flip is 3", "between 0.0 and 1.0"]),
        ("teacher.optimizer=adam", ["teacher.optimizer", "adamw", "sgd"]),
        ("teacher.test_views=[flop]", ["teacher.test_views names 'flop'", "flip and shift"]),
        ("teacher={model: m, alternate_flip: true, flip: 0.2}", ["teacher.flip is 0.2", "leave flip at 0.5"]),
        ("teacher={model: m, optimizer: muon, parallel: fsdp}", ["teacher.optimizer is muon", "fsdp", "use ddp"]),
        ("teacher={model: m, shift: 0.1, crop_ratio: [0.9, 1.1]}", ["teacher.crop_ratio", "no random resized crop"]),
        ("student={model: m, init: teacher, first_layer: whitening}", ["first_layer", "the first weights are given"]),
        ("select.max_noise=0", ["select.max_noise is 0.0", "between 0.001 and 1.0"]),
        ("teacher.duration=30", ["teacher.duration", "30ep", "2000st"]),
        ("generations[7].student.lr=3", ["generations[7]"]),
        ("generations=3", ["generations", "list"]),
        ("batch", ["key=value"]),
        ("output=${nowhere}/x", ["nowhere"]),
        ("prepare.dataset=mnist", ["prepare.dataset", "digits"]),
        ("prepare.dataset=null", ["data.root"]),
        ("workers.train_least=2", ["workers.train_least is 2", "workers.train is 1"]),
        ("teacher.parallel=zero", ["teacher.parallel is 'zero'", "ddp, fsdp"]),
        ("label.corpus=selected", ["generations[0].label.corpus", "before the first", "later generations only"]),
        ("generations[1].label={corpus: kept}", ["generations[1].label.corpus is 'kept'", "all, selected"]),
        (
            "finetune.resolution=100",
            ["finetune.resolution is 100", "generations[1].student.resolution, 224", "raise it"],
        ),
        ("finetune.duration=1", ["finetune.duration is '1'", "30ep"]),
    ],
)
def test_a_wrong_setting_is_one_clear_sentence(job: str, setting: str, wanted: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(job, [setting])
    assert all(text in str(caught.value) for text in wanted), caught.value


def test_an_error_says_whether_the_command_line_brought_it(job: str) -> None:
    def error(*settings: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_job(job, settings)
        return str(caught.value)

    said = error("seed=1", "student.flip=3")
    assert said.startswith(f"{job}, with student.flip from the command line: generations[0].student.flip is 3")
    assert error("teacher={flip: 3}").startswith(f"{job}, with teacher from the command line: teacher.")
    Path(job).write_text(JOB.replace("30ep", "30"))
    assert error("teacher.lr=0.2", "teacher.dur=5").startswith(
        f"{job}, with teacher.dur from the command line: unknown key"
    )
    assert error("teacher.lr=0.2").startswith(f"{job}: teacher.duration is '30'")


def test_bases_are_merged_at_any_depth_and_named_when_missing(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("lr: 0.5\nbatch: 7\naffine: {degrees: 3.0}\n")
    path = tmp_path / "job.yaml"
    path.write_text(
        "name: x\nprepare: {dataset: digits}\nteacher: {base: recipe, model: m, batch: 8, affine: {shear: 2.0}}\n"
    )
    teacher = load_job(str(path)).teacher
    assert (teacher.lr, teacher.batch, teacher.affine.degrees, teacher.affine.shear) == (0.5, 8, 3.0, 2.0)
    path.write_text("base: recipe/digit.yaml\nname: x\n")
    with pytest.raises(ConfigError, match=r"recipe/digits\.yaml"):
        load_job(str(path))
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_job(str(tmp_path / "a.yaml"))


def test_a_file_that_is_not_what_it_seems_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB + "teacher: {model: other}\n")
    with pytest.raises(ConfigError, match=r"line \d+: 'teacher' is there twice$"):
        load_job(str(path))
    path.write_text(JOB, encoding="utf-16")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        load_job(str(path))


def test_numbers_are_those_of_yaml_1_2() -> None:
    written = "[1, -2, 1e-3, 1E5, .5, 3., 1_000, 1:30, 2026-11-23, 0x10, 1.2.3, true, null, .inf]"
    read = [1, -2, 0.001, 1e5, 0.5, 3.0, 1000, "1:30", "2026-11-23", "0x10", "1.2.3", True, None, float("inf")]
    found = job_file.parse(written)
    assert found == read and [type(value) for value in found] == [type(value) for value in read]
    assert job_file.parse("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}") == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("010", "10"),
        ("-007", "-7"),
        ("+08", "+8"),
        ("0_1", "1"),
        ("00", "0"),
        ("00.5", "0.5"),
        ("-01.50", "-1.50"),
        ("01e3", "1e3"),
        ("00e3", "0e3"),
    ],
)
def test_a_number_with_a_leading_zero_is_refused(tmp_path: Path, job: str, written: str, meant: str) -> None:
    """It would be octal to YAML 1.1, decimal to YAML 1.2, and text to whoever meant a name."""
    sentence = f"{written} is a number with a leading zero (write {meant}, or '{written}' in quotes for text)"
    path = tmp_path / "zero.yaml"
    path.write_text(f"{JOB}seed: 1\nsummary: [1, {{lr: {written}}}]\n")
    line = path.read_text().count("\n")
    with pytest.raises(ConfigError) as caught:
        load_job(str(path))
    assert str(caught.value) == f"{path} is not YAML: line {line}: {sentence}"
    with pytest.raises(ConfigError) as caught:
        load_job(job, [f"seed={written}"])
    assert f"cannot set 'seed' to '{written}': {sentence}; docs/" in str(caught.value)
    path.write_text(JOB.replace("name: tiny", f"name: '{written}'"))
    assert load_job(str(path)).name == written
    assert load_job(job, [f"name='{written}'"]).name == written
    assert job_file.parse(f'"{written}"') == written


def test_a_zero_that_leads_nothing_is_a_number() -> None:
    written = "[0, -0, 0.5, 0e3, 0., 10, 1_000, -0.05, 100.0]"
    assert job_file.parse(written) == [0, 0, 0.5, 0.0, 0.0, 10, 1000, -0.05, 100.0]
    written = "[0x10, 0o17, 0-1, 00:30, 01.02.2026, 08-15, 0.0.0.0, 0a, _0, 01x]"
    assert job_file.parse(written) == written[1:-1].split(", ")


def test_what_is_written_is_read_as_it_was() -> None:
    text = [
        "010",
        "008",
        "-09_1",
        "1e3",
        "1:30",
        "2026-01-02",
        "0",
        "12",
        ".inf",
        "true",
        "null",
        "~",
        "",
        "a: b",
        "0x10",
    ]
    plain = {"text": text, "numbers": [0, -7, 10**20, 0.5, 1e-7, 1e20, float("inf")], "rest": [True, None], "008": 1}
    found = job_file.parse(job_file.dump(plain))
    assert found == plain and [type(one) for one in found["numbers"]] == [type(one) for one in plain["numbers"]]


def test_a_relative_output_inside_rays_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "session" / RAY_CACHE / "_ray_pkg_1"
    cache.mkdir(parents=True)
    monkeypatch.chdir(cache)
    with pytest.raises(ConfigError, match="absolute path"):
        resolve_output("runs/x")
    assert resolve_output(str(tmp_path)) == str(tmp_path)
    assert resolve_output("s3://bucket/run/") == "s3://bucket/run"


def test_every_field_is_declared_and_explained() -> None:
    for cls in [*vars(settings).values(), *vars(settings_train).values()]:
        if dataclasses.is_dataclass(cls) and isinstance(cls, type):
            for item in dataclasses.fields(cls):
                assert item.metadata["kind"] in ("identity", "execution"), f"{cls.__name__}.{item.name}"
                assert item.metadata["help"]


def test_identity_fields_are_pinned() -> None:
    """A field that moves between the two kinds silently redoes, or silently keeps, everybody's stages."""
    names = {f.name for f in dataclasses.fields(settings_train.Teacher) if f.metadata["kind"] == "execution"}
    assert names == {
        "evaluate_every",
        "evaluate_raw",
        "checkpoint_every",
        "keep",
        "compile",
        "parallel",
        "static_graph",
    }
    assert {f.name for f in dataclasses.fields(settings.Label) if f.metadata["kind"] == "execution"} == {"compile"}
    for cls in (settings.Select, settings_train.Affine, settings.Generation, settings.Measured):
        assert all(f.metadata["kind"] == "identity" for f in dataclasses.fields(cls))
    names = {f.name for f in dataclasses.fields(settings.Measure) if f.metadata["kind"] == "execution"}
    assert names == {"accuracy_from"}  # the file's content is part of the fingerprint
    names = {f.name for f in dataclasses.fields(settings_train.Finetune) if f.metadata["kind"] == "execution"}
    assert names == {"evaluate_every", "checkpoint_every"}
    for cls in (settings.Data, settings_workers.Workers, settings.Tracking):
        assert all(f.metadata["kind"] == "execution" for f in dataclasses.fields(cls))
    execution = {f.name for f in dataclasses.fields(settings.Job) if f.metadata["kind"] == "execution"}
    assert execution == {"name", "output", "cluster", "workers", "data", "corrections", "tracking"}


def test_a_field_at_its_neutral_value_is_left_out_of_the_identity() -> None:
    @dataclasses.dataclass
    class Settings:
        old: int = fields.identity(1, "there from the start")
        new: str = fields.identity("b", "added later, before it all was 'a'", neutral="a")
        speed: int = fields.execution(1, "no part of it")

    assert fields.identity_of(Settings()) == {"old": 1, "new": "b"}
    assert fields.identity_of(Settings(new="a")) == {"old": 1}


@pytest.mark.parametrize(("text", "expected"), [("30ep", 300), ("2000st", 2000), ("1.5ep", 15), ("0st", 0)])
def test_durations(text: str, expected: int) -> None:
    assert durations.steps(text, steps_per_epoch=10.0) == expected


IDLE = """
name: idle
prepare: {dataset: digits}
teacher: {model: m, optimizer: adamw}
student: {model: m, labels: hard}
generations: [{}, {}]
"""


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("teacher.unlabelled_ratio=2", "a teacher has no pseudo-labels"),
        ("teacher.labels=hard", "a teacher has no pseudo-labels"),
        ("teacher.momentum=0.5", "only sgd has it, and the optimizer is adamw"),
        ("teacher.rollback_factor=0.1", "no run goes back"),
        ("student.temperature=2.0", "these are hard"),
        ("generations[1].student.temperature=2.0", "these are hard"),
        ("select.max_copies=3", "nothing is copied"),
        ("finetune.lr=0.5", "there is no fine-tune"),
        ("finetune={resolution: 256, optimizer: lamb, momentum: 0.1}", "only sgd has it, and the optimizer is lamb"),
        ("measure.batch=4", "names no model"),
        ("data.cache_gb=5", "there are no copies"),
    ],
)
def test_a_setting_without_effect_is_refused(tmp_path: Path, setting: str, why: str) -> None:
    path = tmp_path / "idle.yaml"
    path.write_text(IDLE)
    with pytest.raises(ConfigError, match=f"which has no effect: .*{why}; drop it"):
        load_job(str(path), [setting])


def test_settings_of_students_that_there_are_none_of_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(IDLE)
    assert load_job(str(path), ["generations=[]"]).generations == []  # the file may go on speaking of students
    assert not caplog.text
    for name in ("student.lr=0.1", "select.threshold=0.5", "label={flip: true}"):
        with pytest.raises(ConfigError, match=r"(student|select|label)\.\w+ has no effect: `generations` is empty"):
            load_job(str(path), ["generations=[]", name])
    path.write_text(yaml.safe_dump({**yaml.safe_load(IDLE), "generations": []}))
    load_job(str(path))
    assert "student.labels, student.model: no effect, for `generations` is empty" in caplog.text


def test_a_setting_that_has_an_effect_somewhere_is_taken(tmp_path: Path) -> None:
    """What is said of all students is for those that it is for; defaults may be spelled out anywhere."""
    path = tmp_path / "idle.yaml"
    path.write_text(IDLE)
    loaded = load_job(str(path), ["student.temperature=2.0", "generations[1].student.labels=soft"])
    assert loaded.generations[1].student.temperature == 2.0
    load_job(
        str(path), ["teacher.momentum=0.9", "teacher.labels=soft", "finetune.lr=0.01", "prepare.labels_per_class=7"]
    )


@pytest.mark.parametrize(
    ("switch", "settings"),
    [
        ("finetune.resolution=null", "finetune: {resolution: 256, lr: 0.5}"),
        (
            "data.cache=null",
            "data: {root: /d, labelled: l, unlabelled: u, validation: v, test: t, cache: /c, cache_gb: 5}",
        ),
        ("teacher.optimizer=adamw", "teacher: {model: m, optimizer: sgd, momentum: 0.5}"),
        ("student.labels=hard", "student: {model: m, temperature: 2.0}"),
    ],
)
def test_what_the_command_line_switches_off_may_stand_in_the_file(tmp_path: Path, switch: str, settings: str) -> None:
    job = {**yaml.safe_load(IDLE), **yaml.safe_load(settings)}
    job["generations"] = [{}]
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    load_job(str(path), [switch])
    [(section, values)] = yaml.safe_load(settings).items()
    idle = next(f"{section}.{name}={value}" for name, value in reversed(values.items()))
    with pytest.raises(ConfigError, match="which has no effect"):
        load_job(str(path), [switch, idle])


def test_a_base_is_only_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "recipe.yaml").write_text("momentum: 0.5\noptimizer: sgd\n")
    path = tmp_path / "job.yaml"
    path.write_text(IDLE.replace("model: m, optimizer", "base: recipe, model: m, optimizer"))
    loaded = load_job(str(path))
    assert loaded.teacher.momentum == 0.5
    assert "teacher.momentum is 0.5, which has no effect" in caplog.text and "a base of the job sets it" in caplog.text
    # job.yaml of the run spells it out, and can be run again.
    written = tmp_path / "written.yaml"
    written.write_text(yaml.safe_dump(settings.to_plain(loaded)))
    assert load_job(str(written)) == loaded
    with pytest.raises(ConfigError, match=r"teacher\.rollback_factor is 0\.1"):
        load_job(str(written), ["teacher.rollback_factor=0.1"])


def test_settings_without_effect_stay_part_of_a_folders_name(tmp_path: Path) -> None:
    changed = settings_train.Train(model="m", optimizer="adamw", momentum=0.5)
    assert fields.identity_of(changed)["momentum"] == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "name: a\nteacher: {model: x\n  lr: 1\n",
            "line 3: expected ',' or '}', but got ':' (while parsing a flow mapping",
        ),
        (
            "name: [a\n",
            "line 2: expected ',' or ']', but the text ends (while parsing a flow sequence that begins in line 1)",
        ),
        ("name: a\n\tseed: 1\n", "line 2: found character '\\t' that cannot start any token"),
        ("name: a: b\n", "line 1: a second ': ' in a value; put the value in quotes"),
    ],
)
def test_a_text_that_is_no_yaml_is_told_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_job(str(path))
    assert str(caught.value).startswith(f"{path} is not YAML: {words}") and "unicode string" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "generations[2].select.per_class=1",
            "generations has 2 entries, numbered from 0 to 1, and none is '2'; docs/",
        ),
        (
            "generations[-3].select.per_class=1",
            "generations has 2 entries, numbered from 0 to 1, and none is '-3'; docs/",
        ),
        (
            "generations[x].select.per_class=1",
            "generations has 2 entries, numbered from 0 to 1, and none is 'x'; docs/",
        ),
        ("teacher.lr=[1", "cannot set 'teacher.lr' to '[1': expected ',' or ']', but the text ends; docs/"),
        ("teacher=lambda_resnet_tiny", "it takes a mapping of settings, such as {model: lambda_resnet_tiny}"),
    ],
)
def test_what_cannot_be_set_is_told_in_our_words(job: str, setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(job, [setting])
    assert words in str(caught.value) and "unicode string" not in str(caught.value)


def test_an_adopted_teacher_says_itself_what_it_is(tmp_path: Path) -> None:
    """With the fingerprints of a job that names the model."""
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "model.yaml").write_text("architecture: lambda_resnet_small\n")
    path = tmp_path / "job.yaml"
    path.write_text(f"name: a\ndata: {{root: .}}\nteacher: {{checkpoint: {stage}}}\ngenerations: []\n")
    found = load_job(str(path))
    named = load_job(str(path), ["teacher.model=lambda_resnet_small"])
    assert found.teacher.model == "lambda_resnet_small" and identity_of(found.teacher) == identity_of(named.teacher)
    assert load_job(str(path), [f"teacher.checkpoint={stage}/model.safetensors"]).teacher.model == "lambda_resnet_small"
    assert load_job(str(path), [f"teacher.checkpoint=[{stage}]"]).teacher.model == "lambda_resnet_small"
    assert load_job(str(path), ["teacher.model=lambda_resnet_tiny"]).teacher.model == "lambda_resnet_tiny"
    for other in (tmp_path / "none", stage / "weights.safetensors"):
        with pytest.raises(ConfigError, match=r"teacher\.model is not set, and no model\.yaml beside"):
            load_job(str(path), [f"teacher.checkpoint={other}"])
