"""Computes what is known of a model without running it: family, parameters, FLOPs, memory of its maps."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import cost
from models.lambda_resnet import LambdaResNet
from models.layer_memory import layer_memory, stage_layers
from pipeline import weights
from pipeline.config.settings import Measured
from pipeline.errors import ConfigError

FAMILIES = {
    r"lambda_resnet_\d+_c4": "LambdaResNet-C4",
    r"lambda_resnet_.*": "LambdaResNet",
    r"hybrid_resnet_50_.*": "ResNet-50 hybrids",
    r"resnet_\d+_se": "ResNet-D + SE",
    r"resnet_\d+": "ResNet-D",
    r"timm/resnetrs.*": "ResNet-RS",
    r"timm/(tf_)?efficientnet_.*": "EfficientNet",
    r"timm/vit_.*": "ViT",
}


def family(model: str) -> str:
    """The curve of the plot that a model belongs to; of an unlisted one, its name up to the first digit."""
    for pattern, name in FAMILIES.items():
        if re.fullmatch(pattern, model):
            return name
    return re.split(r"_?\d", model.removeprefix("timm/"), maxsplit=1)[0]


def on_paper(where: str, measured: Measured, map_batch: int | None) -> dict[str, Any]:
    """Columns of a row, by name; ConfigError, beginning with `where`, if the model cannot be built or fed."""
    with torch.device("meta"):
        try:
            model = weights.build_model(measured.model, 1000, measured.overrides)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        try:
            operations = flops(model, measured.size)
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{where}: {measured.model} does not take images of {measured.size} × {measured.size} pixels "
                f"({reason}); give another size, or the override that makes it take this one"
            ) from error
        columns = {"family": family(measured.model), "parameters": cost.parameters(model), "flops": operations}
        return columns | ({} if map_batch is None else {"map_bytes": map_bytes(model, measured.size, map_batch)})


def flops(model: nn.Module, size: int) -> int:
    """Two per multiply-add for one image: of our models as the paper counts, of others all products that torch sees."""
    if isinstance(model, weights.Ensemble):
        return sum(flops(member, size) for member in model.members)
    if isinstance(model, LambdaResNet):
        return cost.flops(model, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, size, size, device=next(model.parameters()).device))
    return int(counter.get_total_flops())


def map_bytes(model: nn.Module, size: int, batch: int) -> int | None:
    """fp32 attention maps or position embeddings of all layers at a batch (table 4); None for a model that is not ours
    or has none. A scope that is set counts as the lambda convolution, the default one as the paper's dense layer."""
    if not isinstance(model, LambdaResNet):
        return None
    a = model.architecture
    stages = stage_layers(a, size)
    if not stages or not a.position:
        return None
    if a.layer != "lambda":
        return layer_memory(a.layer, stages, batch=batch, heads=a.heads)
    kind, window = ("lambda", 1) if a.r is None else ("lambda_convolution", a.r)
    return layer_memory(kind, stages, batch=batch, k=a.k, window=window, shared=a.share_embeddings)
