"""Tells whether a device multiplies bfloat16 fast."""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device is a GPU with bfloat16 arithmetic (NVIDIA from Ampere on); torch emulates it on older GPUs."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def is_bfloat16_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 faster than float32.

    GPUs with bfloat16 arithmetic do, and x86 CPUs with avx512_bf16, which all CPUs with AMX have. Other CPUs emulate
    it, many times slower.
    """
    return has_bfloat16(device) or (device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False))
