"""Which numbers a device multiplies fast."""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU with arithmetic for bfloat16 (NVIDIA's from Ampere on); torch emulates it on older ones."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def is_bfloat16_fast(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 faster than float32: such GPUs, and x86 CPUs with avx512_bf16 (those with AMX have that too).

    Other CPUs emulate it, many times slower.
    """
    return has_bfloat16(device) or (device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False))
