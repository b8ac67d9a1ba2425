"""What stops one worker before the training stops all of them."""

from __future__ import annotations

from pipeline.cluster.world import gathered
from pipeline.errors import OutputError


def failing(rank: int, guilty: int, bug: bool) -> tuple[str, str] | None:
    def check() -> None:
        if rank == guilty:
            raise OSError("broken disk") if bug else OutputError("a worker does not see the output")

    return gathered(check)


def test_all_workers_hear_what_one_of_them_misses(gloo_pair):
    assert gloo_pair.call(failing, 2, False) == [None, None]
    for guilty in (0, 1):
        found = gloo_pair.call(failing, guilty, False)
        assert found == [("OutputError", "a worker does not see the output")] * 2
    [(kind, text), other] = gloo_pair.call(failing, 1, True)
    assert (kind, text) == other and kind == "ClusterError"
    assert text.endswith("cannot begin to train: OSError: broken disk")


def test_one_worker_alone_asks_nobody():
    assert failing(0, 0, False) == ("OutputError", "a worker does not see the output")
    assert failing(0, 1, False) is None
