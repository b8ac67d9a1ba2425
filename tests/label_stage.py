"""The label stage alone, in this process or one of its own: `python -m tests.label_stage SHARDS TEACHER OUTPUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pipeline import storage, weights
from pipeline.cluster.inline import Inline
from pipeline.config.load import load_job
from pipeline.data import parquet_files
from pipeline.plan.context import Context
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import WEIGHTS, Done, Result, Stage
from pipeline.stages import label
from pipeline.storage.lock import lock
from tests import small

FOLDER = "gen1-label-0123abcd"


def make_teacher(folder: Path) -> Path:
    """A tiny network of random weights."""
    torch.manual_seed(0)
    shape = {"depths": [1, 1, 1], "widths": [8, 8, 16]}
    model = weights.build_model("lambda_resnet_tiny", len(small.CLASSES), shape)
    folder.mkdir()
    weights.save_state(str(folder / WEIGHTS), model.state_dict())
    card = weights.Card("lambda_resnet_tiny", small.CLASSES, 8, 1.0, "bicubic", [0.5] * 3, [0.5] * 3, shape)
    weights.write_card(str(folder), card)
    return folder


def run(root: str, teacher: Path, output: str, *settings: str) -> Result:
    """Label `unlabelled-*.tar` of `root` into FOLDER of `output`."""
    job = load_job(str(teacher.parent / "small.yaml"), [f"data.root={root}", f"output={output}", *settings])
    stage = Stage("gen1-label", "label", ("gen0-teacher",), 1)
    made = storage.sha256(str(teacher / WEIGHTS))
    needs = {"gen0-teacher": Done("gen0-teacher", str(teacher), made, made)}
    with lock(job.output):
        token = storage.write_token(job.output)
        sources = Corpora(job, needs)
        context = Context(job, stage, (stage,), files(output), "0123abcd", needs, sources, Inline(), print, token)
        storage.make_folder(context.folder)
        return label.run(context)


def files(output: str) -> str:
    return storage.join(output, FOLDER)


def rows(output: str) -> dict[str, list]:
    """{label file: its rows} of what the stage left."""
    folder = files(output)
    names = [name for name in storage.walk(folder) if name.endswith(".parquet")]
    return {name: parquet_files.read_table(storage.join(folder, name)).to_pylist() for name in names}


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
