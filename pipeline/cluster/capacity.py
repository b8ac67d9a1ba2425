"""Finds out whether workers find a place on the cluster's nodes."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
    wanted, has = {"CPU": resources.cpus, "GPU": resources.gpus}, node["Resources"]
    if not node["Alive"]:
        return 0
    fits = [has.get(kind, 0.0) / amount for kind, amount in wanted.items() if amount > 0]
    return int(min(fits, default=has.get("CPU", 1.0)) + 1e-6)


def accelerators() -> int:
    """GPUs of the cluster's nodes, whoever uses them now."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def wait_for_room(resources: Resources, workers: int, patience: float) -> None:
    """Until the cluster's nodes can hold so many workers; ClusterError after `patience` seconds."""
    end = time.monotonic() + patience
    while room(resources) < workers:
        if time.monotonic() > end:
            raise nothing_fits(resources, workers, patience)
        time.sleep(1.0)


def nothing_fits(resources: Resources, workers: int, waited: float) -> ClusterError:
    """The error for workers that found no place."""
    import ray

    has = ray.cluster_resources()
    many = f"{workers} workers with" if workers > 1 else "a worker with"
    after = f" in {waited:.0f} s" if waited else ""
    return ClusterError(
        f"no room{after} for {many} {resources.cpus:g} CPU and {resources.gpus:g} GPU each: the cluster has "
        f"{has.get('CPU', 0):g} CPU and {has.get('GPU', 0):g} GPU in all on {len(ray.nodes())} node(s); "
        "ask for fewer workers or less for each, or wait until others have left"
    )
