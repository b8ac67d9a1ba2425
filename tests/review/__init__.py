"""Index and label files of made-up images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.data import label_files, parquet_files


def written(
    folder: Path, given: npt.NDArray[np.int64], probs: npt.NDArray[np.float32], files: int = 1
) -> list[tuple[str, str]]:
    """(index file, label file)s of images with these labels and probabilities [n, classes]."""
    found = []
    for number, part in enumerate(np.array_split(np.arange(len(given)), files)):
        paths = [str(folder / kind / f"{number:03d}.parquet") for kind in ("index", "label")]
        rows, hashes = np.arange(len(part)), pa.array(part.astype(np.uint64))
        known = {"index": pa.array(rows, pa.int32()), "label": pa.array(given[part], pa.int32()), "image_hash": hashes}
        parquet_files.write_table(paths[0], pa.table(known))
        columns = {
            "index": rows.tolist(),
            "key": [str(image) for image in part],
            "offset": [0] * len(part),
            "size": [1] * len(part),
            "status": ["ok"] * len(part),
            "image_hash": hashes.to_pylist(),
        }
        table = label_files.make_table(columns, rows, label_files.rows_from_probs(probs[part]))
        label_files.write_labels(paths[1], table, {})
        found.append((paths[0], paths[1]))
    return found
