"""What do the tests of the PyTorch integration start from? The Triton kernels on the CPU, in Triton's interpreter."""

import os
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's decorators read it while they are imported

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from triton_attention import dispatch

if not isinstance(triton.language.cdiv, InterpretedFunction):
    raise pytest.UsageError(
        "tests/torch needs Triton's interpreter, and in this process Triton was imported without it: "
        "run tests/torch in a process of its own, with TRITON_INTERPRET=1 or unset"
    )


@pytest.fixture(autouse=True)
def _same_numbers_on_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _portable_runs_on_the_cpu(monkeypatch):
    """The public functions refuse it there, since they do not know of the interpreter; here "auto" chooses it."""
    backends = tuple(
        backend._replace(why_not=lambda problem: []) if backend.name == "portable" else backend
        for backend in dispatch.BACKENDS
    )
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
