"""Folds batch norms into the convolutions before them, so that inference passes over memory fewer times."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeVar

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from models.batch_norm import is_foldable

Module = TypeVar("Module", bound=nn.Module)


def fold_batch_norms(model: Module) -> Module:
    """Returns a copy of `model`, in eval mode, that gives the same outputs to rounding.

    Every batch norm (SyncBatchNorm too) that follows a Conv2d in an nn.Sequential becomes part of the convolution,
    which gets a bias; an identity replaces it. Subclasses that compute more stay as they are: they hold an activation,
    or standardise weights. Modules with a method `fold()` fold their own norms. The copy is for inference only: its
    weights contain the running statistics, and its parameter names differ from those of `model`.
    """
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        if isinstance(module, nn.Sequential):
            _fold_pairs(module)
        elif callable(fold := getattr(module, "fold", None)):
            fold()
    return folded


def _fold_pairs(sequence: nn.Sequential) -> None:
    for i, (conv, norm) in enumerate(pairwise(sequence)):
        if type(conv) is nn.Conv2d and is_foldable(norm):
            sequence[i] = fuse_conv_bn_eval(conv, norm)
            sequence[i + 1] = nn.Identity()
