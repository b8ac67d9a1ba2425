"""Finds out whether workers find a place on the cluster's nodes."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipeline.cluster.contract import Resources
from pipeline.errors import ClusterError


def room(resources: Resources, workers: int | None = None) -> int:
    """How many such workers the cluster's nodes can hold, whoever uses them now; at most `workers`."""
    import ray

    held = sum(places(node, resources) for node in ray.nodes())
    return held if workers is None else min(held, workers)


def places(node: Mapping[str, Any], resources: Resources) -> int:
    """How many such workers one of `ray.nodes()` can hold, whoever uses it now."""
    has = node["Resources"]
    labels = node.get("Labels") or {}
    if not node["Alive"] or not all(has_label(labels.get(key), wanted) for key, wanted in resources.selector.items()):
        return 0
    fits = [has.get(kind, 0.0) / amount for kind, amount in bundle(resources).items()]
    return int(min(fits, default=has.get("CPU", 1.0)) + 1e-6)


def bundle(resources: Resources) -> dict[str, float]:
    """What one worker takes of Ray's resources, by their names."""
    wanted = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory}
    return {kind: amount for kind, amount in wanted.items() if amount > 0}


def has_label(value: str | None, wanted: str) -> bool:
    """Whether a machine's label is as one of Ray's selectors wants it; None: it has none of that name."""
    listed = re.fullmatch(r"!?in\((.*)\)", wanted)
    allowed = [one.strip() for one in listed[1].split(",")] if listed else [wanted.removeprefix("!")]
    return (value in allowed) is not wanted.startswith("!")


def accelerators() -> int:
    """GPUs of the cluster's nodes, whoever uses them now."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def wait_for_room(resources: Resources, least: int, most: int, patience: float, say: Callable[[str], None]) -> None:
    """Until the cluster's nodes can hold `least` workers; ClusterError after `patience` seconds. Meanwhile places for
    `most` are asked for, which a cluster that scales by itself answers with machines."""
    end = time.monotonic() + patience
    if room(resources) >= least:
        return
    say(waiting(resources, least, patience))
    with asked_for(resources, most):
        while room(resources) < least:
            if time.monotonic() > end:
                raise nothing_fits(resources, least, patience)
            time.sleep(1.0)
    say("")


@contextlib.contextmanager
def asked_for(resources: Resources, workers: int) -> Iterator[None]:
    """Requests for so many places for a while, each of its own: all together may be more than the cluster ever gets.
    What is granted nobody else has meanwhile."""
    from ray.util.placement_group import placement_group, remove_placement_group

    selector = [dict(resources.selector)] if resources.selector else None
    requests = [placement_group([bundle(resources)], bundle_label_selector=selector) for _ in range(workers)]
    try:
        yield
    finally:
        for request in requests:
            remove_placement_group(request)


def wants(resources: Resources, workers: int) -> str:
    """In words, for people: 'a worker with 1 CPU and 8 GPU', or '4 workers with … each'."""
    each = [f"{resources.cpus:g} CPU", f"{resources.gpus:g} GPU"]
    each += [f"{resources.memory / 1e9:g} GB of memory"] if resources.memory else []
    each += [f"{key}={value}" for key, value in resources.selector.items()]
    many = f"{workers} workers" if workers > 1 else "a worker"
    return f"{many} with {', '.join(each[:-1])} and {each[-1]} each"


def waiting(resources: Resources, workers: int, patience: float) -> str:
    return f"waiting for room for {wants(resources, workers)}, {patience:.0f} s at most (workers.patience)"


def nothing_fits(resources: Resources, workers: int, waited: float) -> ClusterError:
    """The error for workers that found no place."""
    import ray

    has = ray.cluster_resources()
    after = f" in {waited:.0f} s" if waited else ""
    longer = ", set `workers.patience` higher" if waited else ""
    return ClusterError(
        f"no room{after} for {wants(resources, workers)}: the cluster has "
        f"{has.get('CPU', 0):g} CPU and {has.get('GPU', 0):g} GPU in all on {len(ray.nodes())} node(s); "
        f"ask for fewer workers or less for each{longer}, or wait until others have left"
    )
