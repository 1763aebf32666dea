"""Which problems does the Hopper backend run, and why not the others? Needs no Triton to answer."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from triton_attention.problem import MAX_HEAD_DIM, Problem

DTYPES = (torch.float16, torch.bfloat16)

_TRITON_IS_INSTALLED = find_spec("triton") is not None  # not asked in a call: Dynamo does not trace find_spec


def why_not(problem: Problem) -> list[str]:
    """Every reason for which the Hopper backend does not run this problem; none means that it does."""
    reasons = []
    if not _TRITON_IS_INSTALLED:
        reasons.append("triton is not installed")
    gpu = _other_than_hopper(problem.device)
    if gpu is not None:
        reasons.append(f"runs on NVIDIA GPUs of compute capability 9.0, and {gpu}")
    if problem.dtype not in DTYPES:
        reasons.append(f"computes in float16 and bfloat16, and the tensors are {problem.dtype}")
    if problem.head_dim % 8 != 0 or problem.head_dim_v % 8 != 0:
        reasons.append(
            f"takes head dims from 8 to {MAX_HEAD_DIM} that are multiples of 8, and they are {problem.head_dim} and "
            f"{problem.head_dim_v}"
        )
    if not problem.aligned:
        reasons.append(
            "reads tiles whose rows start at multiples of 16 bytes, and in q, k, v or the bias some do not; "
            "contiguous tensors with a row length that is a multiple of 8 do"
        )
    return reasons


def _other_than_hopper(device: torch.device) -> str | None:
    """What the device is, in words, or None where it is a Hopper GPU."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if torch.version.hip is not None:  # AMD's GPUs have numbers of the same form
        return "this PyTorch is for AMD GPUs"
    properties = torch.cuda.get_device_properties(device)  # a constant to Dynamo, which get_device_capability is not
    capability = (properties.major, properties.minor)
    return None if capability == (9, 0) else f"{properties.name} has {properties.major}.{properties.minor}"
