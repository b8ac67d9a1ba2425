"""Which stages a job has, what each depends on, and where each lives: `<output>/<stage>-<fingerprint8>/`.

    prepare? ─ index ─ gen0-teacher ─ gen1-audit ─ gen1-label ─ gen1-select ─ gen1-student ─ gen2-audit ─ …
      … ─ gen2-student ─ gen2-finetune? ─ evaluate ─ report
    measure      (all that a job with `measure.models` has)

A stage's fingerprint hashes its identity settings and what goes into it: the frozen corpora, the class list, the
sha256 of the weights it uses, the fingerprints of the folders it reads. It is known once its inputs are done.
This module imports neither torch nor ray: a rerun of a finished job reads a few JSON files and ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.config.settings import Job
from pipeline.config.settings_train import Train
from pipeline.errors import ConfigError, WeightsError
from pipeline.plan import early_stop
from pipeline.plan.corpora import Sources

FORMAT = 1  # raise when a stage's files change their meaning
DONE = "done.json"
WEIGHTS, CARD = "model.safetensors", "model.yaml"  # those of pipeline.weights, which imports torch
EVALUATION = "evaluate.json"  # what `evaluate` leaves


@dataclass(frozen=True)
class Stage:
    """One step of a job. `kind` is its module in pipeline.stages; `generation` counts from 0, the teacher."""

    name: str
    kind: str
    needs: tuple[str, ...]
    generation: int = 0


@dataclass(frozen=True)
class Done:
    """A finished stage, as its done.json has it. `output` is the identity of what it made for those after it, `info`
    small facts, `metrics`, `artifacts` (names in the folder) and `model` (whether it holds weights) what trackers want."""

    name: str
    folder: str
    fingerprint: str
    output: str
    info: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: Sequence[str] = ()
    model: bool = False


def stages_of(job: Job, done: Mapping[str, Done] | None = None) -> list[Stage]:
    """The stages of a job in the order in which they run, without generations after an early stop that `done` tells of;
    the last one leaves summary.json."""
    if job.measure.models:
        return [Stage("measure", "measure", ())]
    stages = [Stage("prepare", "prepare", ())] if job.prepare.dataset else []
    data = tuple(stage.name for stage in stages)
    stages.append(Stage("index", "index", data))
    stages.append(Stage("gen0-teacher", "adopt" if job.teacher.checkpoint else "train", ("index",)))
    trained = ["gen0-teacher"]
    stop = early_stop.find(job, done or {})
    last = stop.generation if stop else len(job.generations)
    for number, generation in enumerate(job.generations[:last], 1):
        audit, label, select, student = (f"gen{number}-{kind}" for kind in ("audit", "label", "select", "student"))
        calibrating = (audit,) if generation.label.calibrate else ()
        before = (f"gen{number - 1}-label", f"gen{number - 1}-select") if generation.label.corpus == "selected" else ()
        stages.append(Stage(audit, "audit", ("index", trained[-1]), number))
        stages.append(Stage(label, "label", (*data, *calibrating, *before, trained[-1]), number))
        stages.append(Stage(select, "select", ("index", label), number))
        stages.append(Stage(student, "train", ("index", label, select, trained[-1]), number))
        trained.append(student)
    if job.finetune.resolution:
        tuned = f"gen{last}-finetune"
        stages.append(Stage(tuned, "finetune", ("index", trained[-1]), last))
        trained.append(tuned)
    stages.append(Stage("evaluate", "evaluate", ("index", *trained)))
    stages.append(Stage("report", "report", tuple(stage.name for stage in stages if stage.kind != "prepare")))
    return stages


def in_order(job: Job, done: Mapping[str, Done]) -> Iterator[Stage]:
    """The stages, one after the other; which one is next is decided by what is in `done` by then."""
    place = 0
    while place < len(stages := stages_of(job, done)):
        yield stages[place]
        place += 1


def indexed_of(job: Job) -> tuple[str, ...]:
    """The sources whose labels are known, which `index` reads."""
    return ("labelled", *held_out_of(job))


def held_out_of(job: Job) -> tuple[str, ...]:
    """Those of them that nothing may be trained on."""
    return ("validation", "test", "audit_only") if job.generations and job.data.audit_only else ("validation", "test")


def training_of(job: Job, stage: Stage) -> Train:
    """The settings of the training of a stage's generation: the teacher's or its student's."""
    return job.generations[stage.generation - 1].student if stage.generation else job.teacher


def inputs_of(job: Job, stage: Stage, done: Mapping[str, Done], sources: Sources) -> dict[str, Any]:
    """Everything that decides what a stage computes; its needs must be done."""
    made = {name: done[name].output for name in stage.needs}
    content = done["index"].info["content"] if "index" in stage.needs else {}
    match stage.kind:
        case "measure":
            return {"settings": identity_of(job.measure), "evaluation": _evaluation_sha256(job)}
        case "prepare":
            return {"settings": identity_of(job.prepare), "seed": job.seed}
        case "index":
            # Time stamps count here and nowhere else: shards that were touched are read again, and what depends on them
            # is done again only if what was read differs. What `prepare` wrote is known by its own fingerprint.
            corpora = {name: sources[name] for name in indexed_of(job)}
            stamps = [shard.stamp for name in corpora for shard in corpora[name].shards]
            return {
                "corpora": {name: found.fingerprint for name, found in corpora.items()},
                "origin": made.get("prepare") or stamps,
                "classes": sources.classes,
            }
        case "adopt":
            return {
                "weights": _checkpoint_sha256(job),
                "settings": identity_of(job.teacher),
                "classes": sources.classes,
            }
        case "train":
            training = training_of(job, stage)
            settings = identity_of(training)
            given: dict[str, Any] = {
                "settings": settings,
                "seed": job.seed,
                "generation": stage.generation,
                "labelled": content["labelled"],
                "classes": sources.classes,
            }
            if stage.generation:
                given["selection"] = done[f"gen{stage.generation}-select"].output
            if settings["init"] == "teacher":
                given["initial"] = done[stage.needs[-1]].output
            if training.weights == "best":  # the best of those that are looked at
                given["evaluate_every"] = training.evaluate_every
            if training.rollbacks:  # which go back to a checkpoint
                given["checkpoint_every"] = training.checkpoint_every
            return given
        case "finetune":
            trained, usual = identity_of(training_of(job, stage)), identity_of(Train(model=""))
            carried = ("segments", "window", "precision")  # what it takes from the training before it
            return {
                "settings": identity_of(job.finetune),
                "seed": job.seed,
                "model": _model(done[stage.needs[-1]]),
                "labelled": content["labelled"],
                "classes": sources.classes,
                **{name: trained[name] for name in carried if trained.get(name) != usual.get(name)},
            }
        case "audit":
            generation = job.generations[stage.generation - 1]
            settings = identity_of(generation.label)
            settings.pop("corpus", None)  # what is labelled later changes nothing here
            return {
                "settings": settings,
                "threshold": generation.select.threshold,
                "thresholds": generation.select.thresholds,
                "teacher": _model(done[stage.needs[-1]]),
                "audited": {name: content[name] for name in held_out_of(job) if name != "test"},
                "classes": sources.classes,
            }
        case "label":
            settings = identity_of(job.generations[stage.generation - 1].label)
            if settings.get("calibrate"):
                settings["temperature"] = done[f"gen{stage.generation}-audit"].info["temperature"]
            if settings.get("corpus") == "selected":
                settings["selection"] = made[f"gen{stage.generation - 1}-select"]
            return {
                "settings": settings,
                "teacher": _model(done[stage.needs[-1]]),
                "corpus": sources["unlabelled"].fingerprint,
                "origin": made.get("prepare"),
                "classes": sources.classes,
            }
        case "select":
            # Copies of held-out images are dropped, so these corpora decide too.
            held_out = [content[name] for name in held_out_of(job)]
            settings = identity_of(job.generations[stage.generation - 1].select)
            return {"settings": settings, "labels": made[stage.needs[-1]], "held_out": held_out}
        case "evaluate":
            return {
                "settings": identity_of(job.evaluate),
                "models": [_model(done[name]) for name in stage.needs if name != "index"],
                "test": content["test"],
                "classes": sources.classes,
            }
        case _:
            stop = early_stop.find(job, done)
            return {"made": made, "name": job.name, **({"stop": stop.plain()} if stop else {})}


def fingerprint(kind: str, inputs: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of a stage's kind, inputs and format version."""
    text = json.dumps({"format": FORMAT, "kind": kind, "inputs": inputs}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def folder_of(job: Job, stage: Stage, print_: str) -> str:
    return storage.join(job.output, f"{stage.name}-{print_[:8]}")


def read_done(folder: str) -> Done | None:
    """What a finished stage left, or None where it has not finished."""
    try:
        record = storage.read_json(storage.join(folder, DONE))
    except (FileNotFoundError, NotADirectoryError):  # `run` says what is wrong with such an output
        return None
    return Done(folder=folder, **record)


def write_done(done: Done) -> None:
    """Mark a stage as finished: the last file that it writes."""
    record = {key: value for key, value in asdict(done).items() if key != "folder"}
    storage.write_json(storage.join(done.folder, DONE), record)


def _model(made: Done) -> Any:
    """What a model answers depends on: its weights, and how it looks at images (which stages did not always record)."""
    return {"weights": made.output, "view": made.info["view"]} if "view" in made.info else made.output


def data_root(job: Job, done: Mapping[str, Done]) -> str:
    return job.data.root or done["prepare"].folder


def _evaluation_sha256(job: Job) -> str | None:
    folder = job.measure.accuracy_from
    if folder is None:
        return None
    path = storage.join(folder, EVALUATION)
    if not storage.exists(path):
        raise ConfigError(
            f"measure.accuracy_from: there is no {EVALUATION} in {storage.redact(folder)}; "
            "name the evaluate-… folder of a finished run"
        )
    return storage.sha256(path)


def _checkpoint_sha256(job: Job) -> Any:
    named = job.teacher.checkpoint
    return _sha256_of(named) if isinstance(named, str) else [_sha256_of(path) for path in named]


def _sha256_of(source: str) -> str | dict[str, str]:
    path, card = adopted_files(source)
    if not storage.exists(path):
        raise WeightsError(
            f"teacher.checkpoint: there is nothing at {storage.redact(path)}; name a stage folder with model.safetensors "
            "and model.yaml, or a .safetensors file"
        )
    found = storage.sha256(path)
    return {"weights": found, "card": storage.sha256(card)} if card and storage.exists(card) else found


def adopted_files(source: str) -> tuple[str, str | None]:
    """The weights that an entry of `teacher.checkpoint` names, and where the model.yaml would be that says what they are:
    weights of another name than a stage gives them have none."""
    path = source if source.endswith(".safetensors") else storage.join(source, WEIGHTS)
    folder = path.removesuffix(WEIGHTS)
    return path, f"{folder}{CARD}" if storage.name(path) == WEIGHTS else None
