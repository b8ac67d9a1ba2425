"""What a job imports, sooner or later; see `tests.tiny.FORKS`."""

import sklearn.datasets
import timm
import torchvision.transforms.v2

from pipeline import cli, graph, runner
from pipeline.labelling import audit, labeller
from pipeline.prepare import digits as prepare_digits
from pipeline.report import assemble
from pipeline.selection import select
from pipeline.train import loop, trials

__all__ = ["assemble", "audit", "cli", "graph", "labeller", "loop", "prepare_digits", "runner", "select", "sklearn",
           "timm", "torchvision", "trials"]  # fmt: skip
