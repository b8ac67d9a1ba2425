"""Which numbers a device multiplies fast."""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU with arithmetic for bfloat16 (NVIDIA's from Ampere on); torch emulates it on older ones."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
