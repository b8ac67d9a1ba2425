"""Gives a stage what it works with: its settings, its folder, what was made before it, and workers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline import secrets_file, storage
from pipeline.cluster.contract import Cluster, Outcome, Resources
from pipeline.cluster.inline import Inline
from pipeline.config.settings import MAX_IMAGE_GB, Job
from pipeline.config.settings_workers import Needs
from pipeline.errors import DataError
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
        checked = functools.partial(_checked_worker, make_worker, self._check)
        yield from self.cluster.map(
            checked, units, resources=self.resources(workers), overlap=overlap, check=self._check
        )

    def fit(self, loop: Callable[..., dict[str, Any]], spec: Any) -> dict[str, Any]:
        """`Cluster.fit`, with the check that every worker sees the output folder."""
        workers = self.job.workers
        resources = dataclasses.replace(
            self._needs(workers.training), workers=workers.train, least=workers.train_least, notice=workers.preemption
        )
        return self.cluster.fit(loop, spec, resources=resources, folder=self.folder, check=self._check)

    @property
    def _check(self) -> Callable[[], None]:
        root = self.corpora.root
        shards = Path(root).absolute() if root and not storage.is_url(root) and Path(root).is_dir() else ""
        return functools.partial(check_machine, self.job.output, self.token, str(shards), self.cache)

    def resources(self, workers: int | None) -> Resources:
        """Of workers that do not train."""
        settings = self.job.workers
        return dataclasses.replace(self._needs(settings.labelling), workers=workers, most=settings.label_most)

    def _needs(self, own: Needs) -> Resources:
        cpus, gpus = self.job.workers.cpus, self.job.workers.gpus
        return Resources(
            cpus=cpus if own.cpus is None else own.cpus,
            gpus=gpus if own.gpus is None else own.gpus,
            memory=(own.memory or 0.0) * 1e9,
            selector=own.selector,
        )

    @contextlib.contextmanager
    def journal(self) -> Iterator[Journal]:
        log = Journal(self.folder)
        try:
            yield log
        finally:
            log.close()


def check_machine(output: str, token: str, shards: str, cache: Cache | None) -> None:
    """What every machine with workers must see: the file of secrets, the run's output, the folder of the shards, and
    room for copies of remote ones. UserError."""
    secrets_file.load()
    storage.require_token(output, token)
    if shards and not Path(shards).is_dir():
        raise DataError(
            f"a worker on {os.uname().nodename} does not see {shards}, where the shards are; mount it on every "
            "machine, or set `data.root` to a folder on shared storage or to a URL"
        )
    if cache:
        cache.check()


def _checked_worker(make_worker: Callable[[], Callable[[Any], Any]], check: Callable[[], None]) -> Callable[[Any], Any]:
    check()
    return make_worker()
