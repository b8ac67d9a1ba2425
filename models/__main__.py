"""`python -m models`: the architectures, with their parameters at 1,000 classes."""

from __future__ import annotations

import torch

from models import create_model, list_models
from models.cost import parameters

for name in list_models():
    with torch.device("meta"):
        print(f"{name:<26} {parameters(create_model(name)) / 1e6:8.2f} M parameters")
