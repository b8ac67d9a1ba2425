"""Checks what a single value cannot show: settings that exclude each other, list entries that must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.checks_evaluate import check_robustness, check_sets
from pipeline.config.settings import THRESHOLD, Job, Select
from pipeline.config.settings_train import Train
from pipeline.errors import ConfigError


def spell_out_measured(raw: Mapping[str, Any], path: str) -> None:
    """`lambda_resnet_50@160` in measure.models becomes {model: lambda_resnet_50, size: 160}."""
    measure = raw.get("measure")
    entries = measure.get("models") if isinstance(measure, dict) else None
    if not isinstance(entries, list):
        return
    for number, entry in enumerate(entries):
        if isinstance(entry, str):
            model, _, size = entry.rpartition("@")
            if not model or not size.isdigit():
                raise ConfigError(
                    f"{path}: measure.models[{number}] is '{entry}'; write model@size, such as lambda_resnet_50@160"
                )
            entries[number] = {"model": model, "size": int(size)}


def detects_only(raw: Mapping[str, Any]) -> bool:
    """Whether a job as its file has it names detectors, and no teacher."""
    teacher, found = raw.get("teacher") or {}, raw.get("detection") or {}
    trains = isinstance(teacher, Mapping) and (teacher.get("model") or teacher.get("checkpoint"))
    return bool(isinstance(found, Mapping) and found.get("detectors")) and not trains and not raw.get("generations")


def check_trains_nothing(raw: Mapping[str, Any], path: str) -> None:
    teacher = raw.get("teacher")
    also = "teacher.model" if isinstance(teacher, Mapping) and teacher.get("model") else "generations"
    if also == "teacher.model" or raw.get("generations"):
        raise ConfigError(
            f"{path}: measure.models and {also} are both set; a job measures or trains, so drop one of them"
        )


def spell_out_labelling(raw: dict[str, Any], shared: dict[str, Any], path: str) -> None:
    """A job of one generation and given weights that says nothing of a student only labels: it has no student, no
    architecture beside the weights' own, and no validation shards unless it names them. `shared`: what is said of all
    generations. ConfigError: a student was forgotten."""
    generations = raw.get("generations") or []
    if not generations or shared["student"] or any(generation.get("student") for generation in generations):
        return
    if len(generations) > 1:
        raise ConfigError(
            f"{path}: none of the {len(generations)} generations has a student; name their model (student.model), or "
            "leave one generation where given weights (teacher.checkpoint) shall only label"
        )
    if not (raw.get("teacher") or {}).get("checkpoint"):
        raise ConfigError(
            f"{path}: generations[0] has no student; name its model (student.model), or, for a job that only labels, "
            "the weights that do it (teacher.checkpoint)"
        )
    shared["student"] = {"model": ""}
    raw["teacher"] = {"model": "", **raw["teacher"]}
    raw["data"] = {"validation": None, **(raw.get("data") or {})}


def check_labels_only(job: Job, path: str) -> None:
    """Who speaks of what only students have has forgotten one."""
    select = job.generations[0].select
    usual = vars(Select(threshold=select.threshold if select.threshold == THRESHOLD else None))  # as job.yaml has it
    said = [f"select.{name}" for name, value in vars(select).items() if value != usual[name]]
    said += ["min_gain"] if job.min_gain is not None else []
    said += ["finetune.resolution"] if job.finetune.resolution else []
    if said:
        raise ConfigError(
            f"{path}: generations[0] has no student, but {said[0]} is set, which is for students; name its model "
            f"(student.model), or drop {said[0]} for a job that only labels"
        )


def check_sources(job: Job, path: str) -> None:
    """Jobs that train have labelled, validation and test shards."""
    for name in ("labelled", "validation", "test"):
        if getattr(job.data, name) is None:
            raise ConfigError(f"{path}: data.{name} is null; it takes a value, or drop it for its default")


def check_generations(job: Job, path: str) -> None:
    for number, generation in enumerate(job.generations):
        check_select(generation.select, f"generations[{number}].select", path)
    if job.generations and job.generations[0].label.corpus == "selected":
        raise ConfigError(
            f"{path}: generations[0].label.corpus is 'selected', but before the first generation nothing was selected; "
            "set it in the `label` of later generations only"
        )


HOW_SURE = "each says how sure a label must be"


def check_select(select: Select, where: str, path: str) -> None:
    weighted = select.weight == "confidence"
    by_noise = select.max_noise is not None
    for one, other, both, why in (
        ("max_noise", "threshold", by_noise and select.threshold is not None, HOW_SURE),
        ("max_noise", "thresholds", by_noise and select.thresholds, HOW_SURE),
        ("per_class", "top_fraction", select.per_class and select.top_fraction, "each says how many images to keep"),
        ("weight", "max_copies", weighted and select.max_copies, "what is weighted by confidence is not copied"),
    ):
        if both:
            null = f", or write {other}: null where a base sets it" if other == "threshold" else ""
            raise ConfigError(
                f"{path}: {where}.{one} and {where}.{other} are both set, but {why}; drop one of them{null}"
            )


def check_job(job: Job, path: str) -> None:
    """All that is about the whole of a job."""
    check_generations(job, path)
    if job.labels_only:
        check_labels_only(job, path)
    elif job.classifies:
        check_sources(job, path)
    for check in (
        check_names, check_prepare, check_checkpoint, check_workers, check_sets, check_robustness, check_finetune,
    ):  # fmt: skip
        check(job, path)


def check_names(job: Job, path: str) -> None:
    """Rows of a table are told apart by name."""
    names = [measured.name for measured in job.measure.models]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ConfigError(
                f"{path}: measure.models[{names.index(name)}] and [{number}] are both called '{name}'; give one a label"
            )


SOURCES = ("labelled", "unlabelled", "validation", "test")


def check_prepare(job: Job, path: str) -> None:
    """`prepare.source` and `split_off` give each kind of images that the job needs once."""
    prepare = job.prepare
    if prepare.dataset != "folder":
        return
    found = prepare.source
    named = found if isinstance(found, dict) else {"labelled": found}
    if not all(name in SOURCES and isinstance(folder, str) and folder for name, folder in named.items()):
        raise ConfigError(
            f"{path}: prepare.source is {found!r}; it takes the folder whose sub-folders are the classes, or folders "
            f"by what they are for: {', '.join(SOURCES)}"
        )
    if wrong := [name for name in prepare.split_off if name not in ("validation", "test")]:
        raise ConfigError(f"{path}: prepare.split_off names '{wrong[0]}'; what can be split off is validation and test")
    if twice := [name for name in prepare.split_off if name in named]:
        raise ConfigError(f"{path}: prepare.source and prepare.split_off both give {twice[0]} images; drop one of them")
    if sum(prepare.split_off.values()) >= 1:
        raise ConfigError(f"{path}: prepare.split_off leaves no images to learn from; its shares add up to 1 or more")
    wanted = () if job.labels_only else ("labelled", "validation", "test")
    for name in (*wanted, *(("unlabelled",) if job.generations else ())):
        if name not in named and name not in prepare.split_off:
            share = f", or give them a share of the labelled ones: split_off: {{{name}: 0.15}}"
            raise ConfigError(
                f"{path}: prepare.source names no {name} images, which this job needs; write "
                f"source: {{{name}: FOLDER, …}}"
                f"{share if name in ('validation', 'test') else ''}"
            )


def check_checkpoint(job: Job, path: str) -> None:
    named = job.teacher.checkpoint
    several = named if isinstance(named, list) else [named]
    if named is not None and not (several and all(isinstance(one, str) and one for one in several)):
        raise ConfigError(
            f"{path}: teacher.checkpoint is {named!r}; it takes a stage folder "
            "or a .safetensors file, or a list of them"
        )


def check_workers(job: Job, path: str) -> None:
    least, most = job.workers.train_least, job.workers.train
    if least is not None and least > most:
        raise ConfigError(
            f"{path}: workers.train_least is {least}, but workers.train is {most}; the first is the fewest training "
            "processes to go on with, the second the most"
        )
    if job.teacher.freeze and job.evaluate.raw:
        raise ConfigError(
            f"{path}: evaluate.raw is true, but with teacher.freeze only the averaged classifier is kept"
            "; drop one of them"
        )
    if job.teacher.freeze and most > 1:
        raise ConfigError(
            f"{path}: workers.train is {most}, but teacher.freeze trains in one process; set workers.train to 1"
        )


def check_training(settings: Train, where: str, path: str) -> None:
    """Numbers that belong together, and what only students have."""
    for name, least in (("mean", 0.0), ("std", 1e-6)):
        values = getattr(settings, name)
        if len(values) != 3 or not all(least <= value <= 1 for value in values):
            span = "in 0..1" if name == "mean" else "above 0, at most 1"
            raise ConfigError(
                f"{path}: {where}.{name} is {values}; it takes three numbers {span}, one for each channel: those of "
                "pixel values from 0 to 255 divided by 255"
            )
    for name, values in (
        ("crop_scale", settings.crop_scale), ("crop_ratio", settings.crop_ratio),
        ("affine.scale", settings.affine.scale),
    ):  # fmt: skip
        if len(values) != 2 or values[0] > values[1] or values[0] <= 0:
            raise ConfigError(
                f"{path}: {where}.{name} is {values}; it takes two numbers above 0, the least and the greatest"
            )
    if unknown := [name for name in settings.test_views if name not in ("flip", "shift")]:
        raise ConfigError(f"{path}: {where}.test_views names '{unknown[0]}'; allowed are flip and shift")
    if settings.alternate_flip and settings.flip != 0.5:
        raise ConfigError(
            f"{path}: {where}.flip is {settings.flip}, but alternate_flip mirrors every image in half of its epochs; "
            "leave flip at 0.5, or drop alternate_flip"
        )
    if settings.optimizer == "muon" and settings.parallel == "fsdp":
        raise ConfigError(
            f"{path}: {where}.optimizer is muon, whose updates need whole matrices, and parallel is fsdp, which splits "
            "them; use ddp, or another optimizer"
        )
    if not isinstance(settings.pretrained, bool) and not (isinstance(settings.pretrained, str) and settings.pretrained):
        raise ConfigError(
            f"{path}: {where}.pretrained is {settings.pretrained!r}; it takes true, false, a stage folder or a "
            ".safetensors file"
        )
    if settings.freeze and (where != "teacher" or not settings.pretrained):
        why = "but only a teacher can be" if where != "teacher" else f"and {where}.pretrained names no weights to keep"
        raise ConfigError(
            f"{path}: {where}.freeze is true, {why}; set `pretrained` of the teacher too, or drop `freeze`"
        )
    if where == "teacher" and settings.init == "teacher":
        raise ConfigError(
            f"{path}: teacher.init is 'teacher', but only students have a "
            "teacher; `teacher.checkpoint` takes weights over"
        )


def check_finetune(job: Job, path: str) -> None:
    """A fine-tune is for a higher resolution. Of a checkpoint only its model.yaml knows; that is looked at later."""
    size = job.finetune.resolution
    if size is None or (job.teacher.checkpoint and not job.generations):
        return
    number = len(job.generations) - 1
    where, trained = (
        (f"generations[{number}].student", job.generations[-1].student) if job.generations else ("teacher", job.teacher)
    )
    if size < trained.resolution:
        raise ConfigError(
            f"{path}: finetune.resolution is {size}, less than {where}.resolution, {trained.resolution}; raise it, or "
            "drop `finetune`"
        )
