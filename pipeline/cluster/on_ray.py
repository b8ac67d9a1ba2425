"""Fulfils the cluster contract on Ray: embedded in this process's session, or on a running cluster."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipeline.cluster import ray_session
from pipeline.cluster.capacity import accelerators, nothing_fits, places, room
from pipeline.cluster.contract import Outcome, Resources, Spec, Unit, Value
from pipeline.errors import ConfigError

log = logging.getLogger(__name__)


class OnRay:
    """`address`: 'auto' (RAY_ADDRESS where it is set, else embedded), 'embedded', 'HOST:PORT' or 'ray://HOST:PORT'.

    `cpus` and `gpus` size an embedded Ray (default: what the machine has). `patience`: how long, in seconds, work
    that finds no place on a running cluster waits before it ends in a ClusterError.
    """

    def __init__(
        self,
        address: str = "auto",
        *,
        cpus: int | None = None,
        gpus: int | None = None,
        patience: float = 180.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.patience, self.say = patience, say
        self._session = ray_session.Session(ray_session.resolve(address), cpus, gpus, say)
        self._told = False
        self._checked: set[str] = set()

    def map(
        self,
        make_worker: Callable[[], Callable[[Unit], Value]],
        units: Sequence[tuple[str, Unit]],
        *,
        resources: Resources,
        attempts: int = 3,
        overlap: int = 1,
        check: Callable[[], None] | None = None,
    ) -> Iterator[Outcome[Value]]:
        if not units:
            return
        from pipeline.cluster import actor_pool

        self._start(resources, check)
        fit = room(resources)
        if fit == 0 and self._session.embedded:
            raise nothing_fits(resources, 1, 0)
        # A running cluster may grow: what does not fit yet may wait, as long as one worker has found a place.
        workers = resources.workers or max(fit, resources.most or 1)
        if self._session.embedded:
            workers = min(workers, fit)
        grows = resources.workers is None and not self._session.embedded
        yield from actor_pool.Pool(
            make_worker, units, resources, attempts, workers, self.patience, overlap=overlap, grows=grows, say=self.say
        ).outcomes()

    def fit(
        self,
        loop: Callable[..., dict[str, Any]],
        spec: Spec,
        *,
        resources: Resources,
        folder: str,
        check: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        from pipeline.cluster import ray_train

        if self._session.embedded and resources.workers in (None, 1) and not resources.gpus:
            self._session.prepare()
            return ray_train.fit_here(loop, spec)
        self._start(resources, check)
        workers = resources.workers or max(room(resources), 1)
        if workers > 1 and resources.gpus % 1:
            raise ConfigError(
                f"workers.gpus is {resources.gpus:g}, which would put several training processes on one GPU, and NCCL "
                "refuses that; set workers.gpus: 1, or workers.train: 1 to train on a part of one"
            )
        least = min(resources.least or workers, workers)
        if self._session.embedded and room(resources) < least:
            raise nothing_fits(resources, least, 0)
        resources = dataclasses.replace(resources, workers=workers, least=least)
        return ray_train.fit_on_workers(loop, spec, resources, folder, self.patience, check or _no_check, self.say)

    def _start(self, resources: Resources, check: Callable[[], None] | None) -> None:
        self._session.start()
        if not self._session.embedded:
            self._check_nodes(resources, check)
        if not (resources.gpus or self._told) and (unused := accelerators()):
            self._told = True
            log.warning(
                "workers.gpus is 0 for what runs now, so it runs on CPUs, and the cluster has %d GPUs; set "
                "workers.gpus: 1 to give one to each", unused,
            )  # fmt: skip

    def _check_nodes(self, resources: Resources, check: Callable[[], None] | None) -> None:
        """Once for each machine on which such a worker has room."""
        import ray

        from pipeline.cluster import node_check

        nodes = [n for n in ray.nodes() if n["NodeID"] not in self._checked and places(n, resources)]
        node_check.check_nodes(nodes, check, log.warning)
        self._checked |= {node["NodeID"] for node in nodes}

    def describe(self) -> str:
        return "embedded Ray" if self._session.embedded else f"Ray at {self._session.address}"

    def close(self) -> None:
        self._session.close()


def _no_check() -> None:
    pass
