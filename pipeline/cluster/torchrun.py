"""The cluster contract under torchrun: `torchrun --nproc-per-node 8 --no-python noisy-lambda run JOB`.

`-m noisy_lambda run JOB` in place of `--no-python noisy-lambda` is the same; `-m pipeline run JOB` too, unless a folder
`models` or `pipeline` lies in the working directory.

The first process runs the job as `inline` does. The others wait until it trains, run the same training loop beside it,
and wait again. All that is said between them goes over a gloo group of its own, whose patience has no end: hours may
pass between two trainings.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from pipeline import errors
from pipeline.cluster.contract import Resources, Spec
from pipeline.cluster.inline import Inline
from pipeline.errors import ClusterError

FOREVER = timedelta(days=365)


def launched() -> bool:
    """Whether torchrun started this process, and others beside it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def follows() -> bool:
    """Whether this is a process that waits for the first one's orders."""
    return launched() and os.environ["RANK"] != "0"


class Torchrun(Inline):
    """For the first process; every process calls `follow` or makes one of these at once, as all wait for all."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._orders = self._open.enter_context(_orders())
        self._in_step = True  # the others listen

    def fit(
        self,
        loop: Callable[..., dict[str, Any]],
        spec: Spec,
        *,
        resources: Resources,
        folder: str,
        check: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """As many workers as torchrun started, whatever `resources` asks for."""
        self._in_step = False
        self._orders((loop, spec, check))
        result = _train(loop, spec, check)
        self._in_step = True
        return result

    def describe(self) -> str:
        return f"{os.environ['WORLD_SIZE']} processes of torchrun"

    def close(self) -> None:
        if self._in_step:  # after a failure in training they do not listen, and torchrun ends them
            self._orders(None)
            self._open.close()


def follow() -> None:
    """Take part in every training of the first process, until that has done its job."""
    with _orders() as orders:
        while (order := orders(None)) is not None:
            _train(*order)


def _train(loop: Callable[..., dict[str, Any]], spec: Any, check: Callable[[], None] | None) -> dict[str, Any]:
    from pipeline.cluster.world import gathered

    if check and (problem := gathered(check)):
        kind, text = problem
        raise getattr(errors, kind)(text)
    return loop(spec)


@contextlib.contextmanager
def _orders() -> Iterator[Callable[[Any], Any]]:
    """A function that every process calls: with what the first one says, it returns that in all of them."""
    import torch.distributed

    from pipeline.cluster.world import process_group

    with process_group():
        group: Any = torch.distributed.new_group(backend="gloo", timeout=FOREVER)

        def orders(said: Any) -> Any:
            message = [said]
            try:
                torch.distributed.broadcast_object_list(message, 0, group=group, device=torch.device("cpu"))
            except RuntimeError as error:
                raise ClusterError("a process that torchrun started is gone; what it said stands above") from error
            return message[0]

        _compare_software(orders)
        yield orders


def _compare_software(orders: Callable[[Any], Any]) -> None:
    """ClusterError in every process where one of them runs on another Python or torch than the first."""
    from pipeline.cluster.node_check import differs, software
    from pipeline.cluster.world import gathered

    theirs = orders(software() if os.environ["RANK"] == "0" else None)

    def check() -> None:
        if problem := differs(theirs):
            raise ClusterError(f"the machine {os.uname().nodename}: {problem}")

    if problem := gathered(check):
        raise ClusterError(problem[1])
