"""Settings of processes: how many there are, and what each needs of its machine."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.fields import execution


@dataclass
class Needs:
    cpus: float | None = execution(None, "cores; null: `workers.cpus`", low=0.1)
    gpus: float | None = execution(None, "accelerators; null: `workers.gpus`", low=0.0)
    memory: float | None = execution(
        None, "gigabytes (10^9 bytes) that Ray sets aside for each; null: none in particular", low=0.0
    )
    selector: dict[str, str] = execution(
        {},
        "labels that Ray knows its machine by, such as {ray.io/accelerator-type: H100}; also !H100, in(A100, H100)",
    )


@dataclass
class Workers:
    train: int = execution(1, "training processes", low=1)
    train_least: int | None = execution(
        None,
        "on a running cluster: train with as few processes as this while it has no room for `train`, and with more as "
        "it grows; null: always `train`",
        low=1,
    )
    preemption: bool = execution(
        False, "on a running cluster: save a checkpoint when it says that it will take a machine away (spot machines)"
    )
    label: int | None = execution(None, "labelling processes; null: as many as fit", low=1)
    label_most: int | None = execution(
        None,
        "on a running cluster that scales by itself, where `label` is null: ask it for places for so many labelling "
        "processes; null: only use what there is, and what is added",
        low=1,
    )
    patience: float = execution(
        180.0, "seconds that work waits for room on a running cluster before it is given up", low=0.0
    )
    labelling: Needs = execution(Needs, "what each labelling process needs, and every other one that does not train")
    training: Needs = execution(Needs, "what each training process needs")
    cpus: float = execution(1.0, "cores of a worker", low=0.1)
    gpus: float = execution(0.0, "accelerators of a worker", low=0.0)
    loader: int | None = execution(
        None,
        "image loading processes of a training worker; 0: in the worker itself; null: with a GPU, its share of the "
        "machine's cores but one, at most 8, and 0 without",
        low=0,
    )
    threads: int = execution(0, "compute threads of a training worker; 0: torch's choice", low=0)

    @property
    def label_gpus(self) -> float:
        """Accelerators of a process that labels, or does anything else but train."""
        return self.gpus if self.labelling.gpus is None else self.labelling.gpus

    @property
    def train_gpus(self) -> float:
        return self.gpus if self.training.gpus is None else self.training.gpus
