"""How many workers a machine can hold, and what is said of those that find no place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pipeline.cluster.capacity import bundle, has_label, places, waiting
from pipeline.cluster.contract import Resources
from pipeline.config.load import load_job
from pipeline.plan.context import Context

NODE = {
    "Alive": True,
    "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 30e9},
    "Labels": {"ray.io/accelerator-type": "H100", "zone": "a"},
}


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        (Resources(), 8),
        (Resources(cpus=3), 2),
        (Resources(cpus=0.1), 80),  # 8 / 0.1 is a little less in floating point
        (Resources(gpus=0.5), 4),
        (Resources(cpus=0, gpus=0), 8),
        (Resources(memory=8e9), 3),
        (Resources(selector={"zone": "a"}), 8),
        (Resources(selector={"zone": "b"}), 0),
        (Resources(selector={"zone": "!b", "ray.io/accelerator-type": "in(A100, H100)"}), 8),
        (Resources(selector={"rack": "7"}), 0),
    ],
)
def test_how_many_workers_a_machine_holds(resources: Resources, expected: int) -> None:
    assert places(NODE, resources) == expected
    assert places({**NODE, "Alive": False}, resources) == 0


@pytest.mark.parametrize(
    ("value", "wanted", "expected"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", "!a", False),
        ("a", "!b", True),
        ("a", "in(b,a)", True),
        ("a", "!in(b, a)", False),
        ("in", "in", True),
        (None, "a", False),
        (None, "!a", True),
        (None, "!in(a)", True),
    ],
)
def test_labels_are_compared_as_ray_does(value: str | None, wanted: str, expected: bool) -> None:
    assert has_label(value, wanted) is expected


def test_only_what_is_wanted_is_asked_of_ray() -> None:
    assert bundle(Resources(cpus=2)) == {"CPU": 2}
    assert bundle(Resources(cpus=2, gpus=1, memory=1e9)) == {"CPU": 2, "GPU": 1, "memory": 1e9}


def test_what_is_waited_for_is_said() -> None:
    wanted = Resources(cpus=4, gpus=1, memory=16e9, selector={"zone": "a"})
    assert waiting(wanted, 3, 600) == (
        "waiting for room for 3 workers with 4 CPU, 1 GPU, 16 GB of memory and zone=a each, "
        "600 s at most (workers.patience)"
    )


def test_labelling_and_training_ask_for_what_each_needs() -> None:
    unused: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Context))

    def needs(*settings: str) -> tuple[Resources, Resources]:
        context = Context(**unused | {"job": load_job("smoke", ["workers.cpus=2", "workers.gpus=1", *settings])})
        return context.resources(None), context._needs(context.job.workers.training)

    assert needs() == (Resources(cpus=2, gpus=1), Resources(cpus=2, gpus=1))
    labelling = ("workers.labelling={gpus: 0, memory: 4}", "workers.label_most=9", "workers.training.cpus=8")
    assert needs(*labelling) == (Resources(cpus=2, memory=4e9, most=9), Resources(cpus=8, gpus=1))
    chosen = 'workers.training.selector={"ray.io/accelerator-type": H100}'
    assert needs(chosen)[1].selector == {"ray.io/accelerator-type": "H100"}
