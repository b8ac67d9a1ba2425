"""The checksum of a file that something else reads in its own way."""

import hashlib
import io

import pytest

from pipeline.storage.hashed_file import Hashed

DATA = bytes(range(256)) * 5000


@pytest.mark.parametrize(
    "reads",
    [
        [],
        [(0, 512), (512, 100), (1024, 700_000)],
        [(300_000, 10), (300_010, 10), (1_279_990, 10)],
        [(0, 1000), (500, 1000), (0, 10), (1_000_000, 5)],  # back, over the border of what was read
        [(1_279_990, 100), (2_000_000, 5)],
    ],
)
def test_the_checksum_is_of_every_byte_once(reads: list[tuple[int, int]]) -> None:
    file = Hashed(io.BytesIO(DATA))
    assert file.seek(0, 2) == len(DATA)
    for offset, size in reads:
        file.seek(offset)
        assert file.read(size) == DATA[offset : offset + size]
    assert file.sha256() == hashlib.sha256(DATA).hexdigest()
