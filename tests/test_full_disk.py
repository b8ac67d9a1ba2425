"""An output whose disk is full at any moment: one sentence, and with room again the same run ends as it would have."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import small

SHARES = (0.02, 0.2, 0.5, 0.8)  # of what the run writes
MORE = tuple(round(0.02 + 0.04 * number, 3) for number in range(26))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty folder that becomes a disk of its own with `size`."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", folder], check=False, capture_output=True)


def size(folder: Path, number: int, *options: str) -> None:
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={number}"]), "tmpfs", folder], capture_output=True
    )
    if made.returncode:
        pytest.skip("needs the right to mount a tmpfs")


@pytest.mark.parametrize("share", [*SHARES, *(pytest.param(share, marks=pytest.mark.slow) for share in MORE)])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    worlds: small.Store, tmp_path: Path, disk: Path, share: float
) -> None:
    whole = worlds.finished(tmp_path)
    written = sum(path.stat().st_size for path in whole.output.rglob("*") if path.is_file())
    size(disk, int(share * written))
    world = dataclasses.replace(whole, output=disk / "out")
    ran = world.run()
    assert "Traceback" not in ran.out + ran.err
    assert ran.status == 2 and ran.err.count("\n") == 1 and "no space left on device" in ran.err, ran
    assert "make room there and run again" in ran.err
    size(disk, 10 * written, "remount")
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran
    assert not world.temporary()
    for name in ("gen0-teacher", "gen1-student"):
        assert (world.folder(name) / "model.safetensors").read_bytes() == (
            whole.folder(name) / "model.safetensors"
        ).read_bytes()
