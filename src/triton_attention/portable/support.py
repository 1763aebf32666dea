"""Which problems does the portable backend run, and why not the others? Needs no Triton to answer."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from triton_attention.problem import Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


_TRITON_IS_INSTALLED = find_spec("triton") is not None  # not asked in a call: Dynamo does not trace find_spec


def why_not(problem: Problem) -> list[str]:
    """Every reason for which the portable backend does not run this problem; none means that it does."""
    reasons = []
    if not _TRITON_IS_INSTALLED:
        reasons.append("triton is not installed")
    if problem.device.type != "cuda":
        reasons.append(f"runs on CUDA and ROCm GPUs, and the tensors are on {problem.device.type}")
    if problem.dtype not in DTYPES:
        reasons.append(f"computes in float16, bfloat16 and float32, and the tensors are {problem.dtype}")
    return reasons
