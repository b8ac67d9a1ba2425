"""Which numbers a device multiplies fast."""

from pathlib import Path

import pytest
import torch

from models.precision import has_bfloat16, is_bfloat16_fast

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists(), reason="only Linux says what its CPU can do")
def test_bfloat16_is_fast_on_the_cpus_that_linux_says_have_it():
    assert is_bfloat16_fast(torch.device("cpu")) == ("avx512_bf16" in CPUINFO.read_text().split())
    assert not has_bfloat16(torch.device("cpu"))  # `auto` stays float32 on all of them, and its results alike
