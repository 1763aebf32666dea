"""What do the kernels' tests on the CPU start from? Triton's interpreter, which must be chosen before Triton loads."""

import os
import sys

if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
    raise RuntimeError("Triton was imported without its interpreter: run tests/kernels in a process of its own")
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every torch.empty is full of NaN, so that an output that no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
