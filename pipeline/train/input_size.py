"""Checks whether a network takes images of a size: on a blank image, before time is spent on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.errors import ConfigError


def check_size(model: nn.Module, name: str, size: int) -> None:
    """ConfigError where the architecture does not take images of the `resolution` of its settings."""
    reason = _why_not(model, size)
    if reason:
        raise ConfigError(
            f"model '{name}' does not take images of {size} pixels: {reason}; change its `resolution` or `overrides`"
        )


def check_further_sizes(model: nn.Module, name: str, sizes: Sequence[int]) -> None:
    """The same of `evaluate.sizes`."""
    for size in sizes:
        reason = _why_not(model, size)
        if reason:
            raise ConfigError(
                f"evaluate.sizes holds {size}, and model '{name}' does not take images of {size} pixels: {reason}; "
                "drop that size, or use an architecture that takes any"
            )


def _why_not(model: nn.Module, size: int) -> str | None:
    training, device = model.training, next(model.parameters()).device
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        return (str(error).splitlines() or ["it fails an assertion"])[0]
    finally:
        model.train(training)
    return None
