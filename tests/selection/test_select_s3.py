"""Selection from an object store: the files of a local one, by one request for each file and pass."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from pipeline import storage
from pipeline.selection.select import Settings, select_all
from tests.conftest import S3
from tests.selection.test_select import inline, paths_of, write_shard

FILES = 40


def test_selection_on_s3(tmp_path: Path, s3: S3) -> None:
    rng, names = np.random.default_rng(0), [f"{number:03d}.tar" for number in range(FILES)]
    for name in names:
        write_shard(tmp_path / "labels", name, rng.integers(0, 3, 20), rng.random(20, np.float32))
    local = paths_of(tmp_path / "labels", names)
    urls = [s3.upload(path, f"chosen/labels/{Path(path).name}") for path in local]
    settings, out = Settings(3, threshold=0.2, per_class=100), f"{s3.bucket}/chosen/gen1-select"
    here = select_all(local, settings, inline, str(tmp_path / "gen1-select"), groups=2)
    passes = 0

    def counting(function, groups):
        nonlocal passes
        passes += 1
        return inline(function, groups)

    with s3.proxy.faults() as seen:
        assert select_all(urls, settings, counting, out, groups=2) == here
    assert Counter(request.method for request in seen) == {"GET": passes * FILES, "PUT": FILES}
    for name in storage.walk(out):
        assert storage.read_bytes(f"{out}/{name}") == (tmp_path / "gen1-select" / name).read_bytes()
