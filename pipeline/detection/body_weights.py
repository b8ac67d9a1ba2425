"""Loads a classifier's weights into the body of a detector."""

from __future__ import annotations

from torch import nn

from pipeline import storage, weights
from pipeline.config.pretrained import weights_file
from pipeline.errors import WeightsError


def load_body(body: nn.Module, source: str, name: str) -> None:
    """`source`: a stage folder or a .safetensors file of a classifier of the same architecture, whose tensors that are
    not the body's (its classifier) are left out. WeightsError: it is of another architecture."""
    path = weights_file(source)
    state, _ = weights.without_prefix(weights.read_state(path))
    own = body.state_dict()
    for tensor, value in own.items():
        if tensor not in state or state[tensor].shape != value.shape:
            found = f"has the shape {list(state[tensor].shape)}" if tensor in state else "is missing"
            raise WeightsError(
                f"init: {storage.redact(path)} is of another architecture than the body '{name}': {tensor} {found}, "
                f"and {list(value.shape)} is expected; name weights of that model with the same overrides, or none"
            )
    body.load_state_dict({tensor: state[tensor] for tensor in own})
