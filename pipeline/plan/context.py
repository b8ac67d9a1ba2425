"""Gives a stage what it works with: its settings, its folder, what was made before it, and workers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline import storage
from pipeline.cluster.contract import Cluster, Outcome, Resources
from pipeline.cluster.inline import Inline
from pipeline.config.settings import MAX_IMAGE_GB, Job
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import Done, Stage
from pipeline.storage.node_cache import Cache
from pipeline.tracking.journal import Journal

Unit = TypeVar("Unit")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Context:
    """`stages`: all of the job, in order; `needs`: those that must be done before this one; `warn` shows a person a
    sentence; `token`: what workers must find in the output (storage.require_token)."""

    job: Job
    stage: Stage
    stages: Sequence[Stage]
    folder: str
    fingerprint: str
    needs: Mapping[str, Done]
    corpora: Corpora
    cluster: Cluster
    warn: Callable[[str], None]
    token: str

    @property
    def cache(self) -> Cache | None:
        """The nodes' cache of remote shards, if the job has one."""
        data = self.job.data
        return Cache(str(Path(data.cache).expanduser().absolute()), int(data.cache_gb * 1e9)) if data.cache else None

    @property
    def max_image_bytes(self) -> int | None:
        """Memory that decoding one image may take, where Pillow's own limit is not enough."""
        limit = self.job.data.max_image_gb
        return None if limit == MAX_IMAGE_GB else int(limit * 1e9)

    def map(
        self,
        make_worker: Callable[[], Callable[[Unit], Value]],
        units: Sequence[tuple[str, Unit]],
        workers: int | None = None,
        *,
        small: bool = False,
        overlap: int = 1,
    ) -> Iterator[Outcome[Value]]:
        """`Cluster.map`, with the check that every worker sees the output folder. `small`: the work is over sooner
        than workers would have started, so it is done in this process."""
        if small:
            yield from Inline().map(make_worker, units, resources=self.resources(1), overlap=overlap)
            return
        checked = functools.partial(_checked_worker, make_worker, self.job.output, self.token)
        yield from self.cluster.map(checked, units, resources=self.resources(workers), overlap=overlap)

    def fit(self, loop: Callable[..., dict[str, Any]], spec: Any) -> dict[str, Any]:
        """`Cluster.fit`, with the check that every worker sees the output folder."""
        checked = functools.partial(_checked_loop, loop, self.job.output, self.token)
        workers = self.job.workers
        resources = dataclasses.replace(
            self.resources(workers.train), least=workers.train_least, notice=workers.preemption
        )
        return self.cluster.fit(checked, spec, resources=resources, folder=self.folder)

    def resources(self, workers: int | None) -> Resources:
        return Resources(workers, self.job.workers.cpus, self.job.workers.gpus)

    @contextlib.contextmanager
    def journal(self) -> Iterator[Journal]:
        log = Journal(self.folder)
        try:
            yield log
        finally:
            log.close()


def _checked_worker(make_worker: Callable[[], Callable[[Any], Any]], output: str, token: str) -> Callable[[Any], Any]:
    storage.require_token(output, token)
    return make_worker()


def _checked_loop(loop: Callable[..., dict[str, Any]], output: str, token: str, *arguments: Any) -> dict[str, Any]:
    storage.require_token(output, token)
    return loop(*arguments)
