"""Loads pretrained weights into a network, all but the classifier, which stays new."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models import load_weights
from pipeline import storage, weights
from pipeline.config.pretrained import weights_file
from pipeline.errors import ConfigError
from pipeline.train.freeze import roles_of

log = logging.getLogger(__name__)


def load_backbone(model: nn.Module, source: str) -> None:
    """`source`: a stage folder or a .safetensors file. WeightsError: it is another network's."""
    path = weights_file(source)
    state, prefix = weights.without_prefix(weights.read_state(path))
    if prefix:
        log.warning("all names in %s begin with '%s', which is left out", storage.redact(path), prefix)
    weights.load_state(model, _with_own_head(model, state), path)


def check_backbone(model: nn.Module, source: str) -> None:
    """WeightsError where the weights do not fit a network on the meta device; their values are not read."""
    path = weights_file(source)
    shapes, _ = weights.without_prefix(
        {name: torch.empty(shape, device="meta") for name, shape in weights.shapes_of(path).items()}
    )
    weights.load_state(model, _with_own_head(model, shapes), path)


def classifier_of(model: nn.Module, name: str) -> nn.Linear:
    """The last layer of a network, whose inputs are the features. ConfigError: it is not one linear layer."""
    modules = {parameter.rpartition(".")[0] for parameter in roles_of(model)["head"]}
    found = model.get_submodule(next(iter(modules))) if len(modules) == 1 else None
    if not isinstance(found, nn.Linear):
        raise ConfigError(f"freeze: the classifier of model '{name}' is not one linear layer; train the whole network")
    return found


def differing_head(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """The classifier's tensors that differ, with both shapes; "" where they do not, or where more differs."""
    own = model.state_dict()
    try:
        head = roles_of(model)["head"]
        load_weights(model, _with_own_head(model, state))
    except (ConfigError, ValueError):
        return ""
    shapes = {name: list(state[name].shape) if name in state else "none" for name in head}
    return ", ".join(
        f"{name} (expected {list(own[name].shape)}, found {found})"
        for name, found in shapes.items()
        if found != list(own[name].shape)
    )


def _with_own_head(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own, head = model.state_dict(), roles_of(model)["head"]
    return {name: value for name, value in state.items() if name not in head} | {name: own[name] for name in head}
