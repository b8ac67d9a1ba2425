"""Two training workers that form a gloo group, and do in step what tests ask of them."""

from __future__ import annotations

import multiprocessing.connection
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed

from pipeline.train import classification
from tests import tiny


class Pair:
    """Two processes, started once: what takes time is their imports and finding each other."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ends = [tiny.FORKS.Pipe() for _ in range(2)]
        self.pipes = [ours for ours, _ in ends]
        self.processes = [tiny.FORKS.Process(target=_serve, args=(rank, port, ends[rank][1])) for rank in range(2)]
        for process in self.processes:
            process.start()
        for _, theirs in ends:
            theirs.close()  # so that a worker that dies is the end of its pipe

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(rank, *args)` returned in each of the two."""
        found: dict[int, Any] = {}
        for pipe in self.pipes:
            pipe.send((function, args))
        while len(found) < 2:
            open_ends = [pipe for rank, pipe in enumerate(self.pipes) if rank not in found]
            for pipe in multiprocessing.connection.wait(open_ends):
                assert isinstance(pipe, Connection)
                value, error = pipe.recv()
                if error:  # the other one waits for it
                    self.close()
                    raise AssertionError(error)
                found[self.pipes.index(pipe)] = value
        return [found[0], found[1]]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    batches = classification.batches
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((function(rank, *args), ""))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
        classification.batches = batches  # `die_at` replaces it
