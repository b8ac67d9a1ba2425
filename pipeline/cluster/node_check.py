"""Finds out what a machine lacks before work begins on it: our code, its libraries, what its workers must see.

The task that looks needs nothing of ours on the machine: Ray starts a worker that cannot import our code again and
again, and says nothing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline import errors
from pipeline.cluster.inline import last_line

SECONDS = 30.0  # for all machines together; a new process on each takes a few
SAME = ("Python", "torch")  # of these every machine needs the driver's version
NEEDED = ("torchvision", "timm", "pyarrow", "fsspec", "numpy", "pillow", "safetensors")


def software() -> dict[str, str]:
    """What the job runs on here, by name: the version that other machines need too, or "" where any will do. What no
    package manager has a record of is left out."""
    found = {"Python": platform.python_version()}
    for name in ("torch", *NEEDED):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            # A head may have torch for CPUs, and workers the same one for GPUs: 2.13.0+cpu, 2.13.0+cu130.
            version = importlib.metadata.version(name).partition("+")[0]
            found[name] = version if name in SAME else ""
    return found


def differs(theirs: Mapping[str, str]) -> str:
    """What is not here as another machine's `software()` wants it, or "". Sent by value: it imports all that it
    uses."""
    import importlib.metadata
    import platform

    for name, wanted in theirs.items():
        try:
            found = platform.python_version() if name == "Python" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        if not found:  # or what is left of it says no version
            return f"{name} is missing there; install this project there too (pip install -e .)"
        if wanted and found.partition("+")[0] != wanted:
            return f"it has {name} {found}, and this job runs with {wanted}; install the same on all machines"
    return ""


def _look(theirs: Mapping[str, str], check: bytes) -> tuple[str, str] | None:
    """On another machine, by value: what is wrong there as (class name of the error, text)."""
    import importlib.util
    import pickle

    if problem := differs(theirs):
        return "ClusterError", problem
    if importlib.util.find_spec("noisy_lambda") is None:
        return "ClusterError", (
            "noisy_lambda is missing there; install this project there too (pip install -e .), or submit the job with "
            "--working-dir"
        )
    import noisy_lambda

    noisy_lambda.claim()
    from pipeline.errors import UserError

    try:
        pickle.loads(check)()  # noqa: S301  # what the driver itself sent
    except UserError as error:
        return type(error).__name__, str(error)
    return None


def check_nodes(
    nodes: Sequence[Mapping[str, Any]], check: Callable[[], None] | None, warn: Callable[[str], None]
) -> None:
    """Look at these of `ray.nodes()`, all at once. `check` raises on a machine where something is missing; UserError
    for the first machine of which that is known, and it names it. A machine that does not answer in time is only
    warned of."""
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from pipeline.cluster.ray_session import SETUP_HOOK

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        look, without_hook = ray.remote(_look), {"env_vars": {SETUP_HOOK: ""}}
        send = cloudpickle.dumps(check or _nothing)
        waiting = {}
        for node in nodes:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            there = look.options(num_cpus=0, max_retries=0, runtime_env=without_hook, scheduling_strategy=where)
            waiting[there.remote(software(), send)] = node
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    end = time.monotonic() + SECONDS
    while waiting and (left := end - time.monotonic()) > 0:
        answered, _ = ray.wait(list(waiting), timeout=left)
        for ref in answered:
            node = waiting.pop(ref)
            try:
                problem = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                problem = "ClusterError", f"workers cannot begin there: {last_line(error.cause or error)}"
            except ray.exceptions.RayError as error:
                problem = "ClusterError", f"no worker starts there: {last_line(error)[:300]}"
            if problem:
                kind, text = problem
                name = node["NodeManagerHostname"]
                raise getattr(errors, kind)(f"the machine {name} ({node['NodeManagerAddress']}): {text}")
    for node in waiting.values():
        warn(
            f"the machine {node['NodeManagerHostname']} ({node['NodeManagerAddress']}) has not answered in "
            f"{SECONDS:.0f} s, so nobody knows whether it has what its workers need"
        )


def _nothing() -> None:
    pass
