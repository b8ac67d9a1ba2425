"""Freezes a network but for a few parameters: fine-tuning at another resolution.

Objects appear in another size, which shifts the statistics of the last feature maps; training the classifier and the
last norm before it makes up for that (Touvron et al. 2019, "Fixing the train-test resolution discrepancy", section
4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from pipeline.errors import ConfigError
from pipeline.train.optim import NORMS

ROLES = ("head", "last_norm")


def roles_of(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters of each of ROLES: the classifier, and the last normalisation outside it.

    Our models say which these are. Of timm's, the classifier is what `get_classifier` gives, and the last norm the one
    that is defined last: at the end of the last block, or after it. ConfigError for a network of several models.
    """
    network = cast(Any, model)
    if hasattr(model, "roles"):
        return cast(dict[str, list[str]], network.roles())
    if not hasattr(model, "get_classifier"):
        raise ConfigError(
            f"a network of the type {type(model).__name__} has no single head and last norm that could be fine-tuned; "
            "drop `finetune`, or name one model as `teacher.checkpoint`"
        )
    heads = network.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    inside = {module for head in heads for module in head.modules()}
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module not in inside]
    modules = {"head": heads, "last_norm": norms[-1:]}
    found = {}
    for role in ROLES:
        own = {id(parameter) for module in modules[role] for parameter in module.parameters()}
        found[role] = [name for name, parameter in model.named_parameters() if id(parameter) in own]
    return found


def train_only(model: nn.Module, roles: Sequence[str]) -> None:
    """Leave nothing to train but the parameters of `roles`, and nothing in training mode but the modules that hold
    them.

    So all other running statistics stay, there is no dropout and no stochastic depth, and no gradient goes further
    back.
    """
    names = roles_of(model)
    trained = {name for role in roles for name in names[role]}
    model.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for name in trained:
        model.get_submodule(name.rpartition(".")[0]).train()
