"""Makes a Ray Dataset of blocks that a function reads, each in a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa


def of_blocks(read: Callable[[int], pa.Table], units: Sequence[int]) -> Any:
    """A ray.data.Dataset of `read(unit)` for every unit, lazily."""
    import ray

    def rows(batch: pa.Table) -> Iterator[pa.Table]:
        for unit in batch["item"].to_pylist():
            yield read(unit)

    numbers = ray.data.from_items(list(units), override_num_blocks=max(1, len(units)))
    return numbers.map_batches(rows, batch_size=1, batch_format="pyarrow")
