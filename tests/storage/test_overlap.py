"""Requests for many remote files overlap; local files are read as ever."""

from __future__ import annotations

import threading

import pytest

from pipeline.storage.overlap import AT_ONCE, overlapped

URLS = [f"s3://bucket/{number}" for number in range(4 * AT_ONCE)]


def test_results_come_in_order_and_so_many_are_asked_for_at_once() -> None:
    together = threading.Barrier(AT_ONCE)  # nobody passes it alone

    def work(path: str) -> str:
        together.wait(60)
        return path

    assert list(overlapped(work, URLS)) == URLS
    assert list(overlapped(str, [])) == []


def test_not_more_than_that_are_ahead() -> None:
    begun = []
    results = overlapped(lambda path: begun.append(path) or path, URLS)
    for number, _ in enumerate(results):
        assert len(begun) <= number + AT_ONCE


def test_an_error_comes_in_its_turn_and_nothing_goes_on_behind_it() -> None:
    begun = []

    def work(path: str) -> str:
        begun.append(path)
        if path == URLS[40]:
            raise ValueError(path)
        return path

    results, got = overlapped(work, URLS), []
    with pytest.raises(ValueError, match=r"/40$"):
        got.extend(results)
    known = len(begun)
    assert got == URLS[:40] and known <= 40 + AT_ONCE
    assert list(overlapped(str, URLS[:3])) == URLS[:3] and len(begun) == known


def test_local_files_are_read_here_one_by_one() -> None:
    here = threading.get_ident()
    assert list(overlapped(lambda path: threading.get_ident(), ["/a", "/b"])) == [here, here]


def test_selection_from_a_store_far_away_keeps_to_its_budget() -> None:
    """At 40 ms a request: three passes over 100,000 label files, the last of which writes as many."""
    assert (3 + 1) * 100_000 * 0.04 / AT_ONCE < 15 * 60
