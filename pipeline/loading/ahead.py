"""Makes batches ahead of training, in worker processes: `ahead`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import ConfigError, RemoteError, UserError
from pipeline.loading import prefetch, worker_process
from pipeline.loading.packed_batch import Packed


def ahead(
    pack: Callable[[int], Packed],
    filling: prefetch.Fill,
    start_step: int,
    stop_step: int,
    *,
    workers: int = 0,
    pin_memory: bool = False,
    nice: int = 0,
    start_method: str | None = None,
) -> Iterator[Packed]:
    """pack(start_step) … pack(stop_step - 1), in order; `workers` processes do it ahead (0: none), with their niceness
    raised by `nice`; `start_method`: fork, spawn or forkserver (None: the platform's). `filling` is told of every step,
    and closed."""
    loader = DataLoader(
        _Reporting(pack, filling),
        batch_size=None,
        sampler=range(start_step, stop_step),
        num_workers=workers,
        collate_fn=_same,
        worker_init_fn=partial(worker_process.begin, nice, os.getpid()),
        generator=torch.Generator(),  # or the loader would draw its workers' seed from torch's global one
        pin_memory=pin_memory,
        multiprocessing_context=start_method if workers else None,
    )
    return _raising(loader, filling)


class _Reporting(Dataset):
    """Gives what has a sentence for the user as an item: raised in a worker, it would come back as a traceback."""

    def __init__(self, pack: Callable[[int], Packed], filling: prefetch.Fill) -> None:
        self.pack, self.filling = pack, filling

    def __getitem__(self, step: int) -> Packed | UserError | RemoteError:
        try:
            self.filling.at(step)
            return self.pack(step)
        except (UserError, RemoteError) as error:
            return error


def _same(item: Any) -> Any:
    return item


def _raising(loader: DataLoader, filling: prefetch.Fill) -> Iterator[Packed]:
    try:
        for item in worker_process.started(loader):  # no name for it: an exception would keep the processes
            if isinstance(item, UserError | RemoteError):
                raise item
            yield item
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise ConfigError(
            "a loading process found no room in shared memory (/dev/shm) for its batch; lower `workers.loader` or "
            "`batch`, or give the container more (docker run --shm-size)"
        ) from error
    finally:
        filling.close()
