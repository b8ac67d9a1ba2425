"""Labels as a Ray Dataset: workers read the blocks, and the rows are those that Arrow reads here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from tests.test_labels import write


@pytest.mark.slow
def test_its_rows_are_those_of_arrow(embedded_ray: Any, tmp_path: Path) -> None:
    embedded_ray._session.start()  # Ray alone would begin one that leaves a token behind
    labels = write(tmp_path, 3, 40)
    where = (pc.field("confidence") > 0.5) & (pc.field("shard") != "u-0.tar")
    columns = ["shard", "index", "label", "probs"]
    found = labels.filter(where).select(*columns).to_ray().take_all()
    wanted = labels.filter(where).select(*columns).to_arrow().to_pylist()

    def plain(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["shard"], row["index"], row["label"], list(row["probs"])

    assert sorted(map(plain, found)) == list(map(plain, wanted))
    assert labels.select("label").to_ray().count() == 120
