"""Lists all architectures with the cost of one image: `python -m models`.

Every network has 1,000 classes and reads images at the resolution that it is meant for.
"""

from __future__ import annotations

import torch

from models import create_model, list_models
from models.cost import costs
from models.family import resolution

HEADER = f"{'name':<24} {'resolution':>10} {'parameters M':>12} {'FLOPs G':>8} {'activations M':>13}"


def row(name: str) -> str:
    with torch.device("meta"):
        cost = costs(create_model(name), resolution(name))
    millions, billions, numbers = cost.parameters / 1e6, cost.flops / 1e9, cost.activations / 1e6
    return f"{name:<24} {resolution(name):>10} {millions:>12.2f} {billions:>8.2f} {numbers:>13.2f}"


if __name__ == "__main__":
    print(HEADER)
    for name in list_models():
        print(row(name), flush=True)
