"""Is a level right, and how fast is it? What every level is run with.

A level computes softmax(q k^T / sqrt(head_dim)) v for q, k, v (heads, seqlen, 128), contiguous, float16 or bfloat16,
where the sequence length is a multiple of 128. It masks nothing, and has no backward pass: what it shows is one idea.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from triton_attention import attention

HEAD_DIM = 128
LOG2_E = 1.4426950408889634

Level = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> out


def errors(level: Level, heads: int, seqlen: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(largest error of the level, what is allowed): twice that of PyTorch in the same dtype, and rounding."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, seqlen, HEAD_DIM, device=device, dtype=dtype) for _ in range(3))

    def in_pytorch(to: torch.dtype) -> Tensor:
        wide_q, wide_k, wide_v = (tensor.to(to) for tensor in (q, k, v))
        return (wide_q @ wide_k.mT * HEAD_DIM**-0.5).softmax(-1) @ wide_v

    exact = in_pytorch(torch.float64)
    error, baseline = ((out.double() - exact).abs().max().item() for out in (level(q, k, v), in_pytorch(dtype)))
    return error, 2 * baseline + torch.finfo(dtype).eps * exact.abs().max().item()


def teraflops(level: Level, heads: int, seqlen: int) -> float:
    """Of a forward pass, in bfloat16: 4 heads seqlen seqlen head_dim operations over the median of its time."""
    q, k, v = (torch.randn(heads, seqlen, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    milliseconds = triton.testing.do_bench(lambda: level(q, k, v), quantiles=[0.5])
    return 4 * heads * seqlen**2 * HEAD_DIM / milliseconds / 1e9


def the_package(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Where the levels lead."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))  # (1, seqlen, heads, head_dim)
    out: Tensor = attention(q, k, v)[0].transpose(0, 1)
    return out


def main(level: Level, needs_hopper: bool) -> int:
    """Check a level on this machine's GPU, time it, and print both; the exit code is 0 if it is right."""
    if not torch.cuda.is_available() or (needs_hopper and torch.cuda.get_device_capability() != (9, 0)):
        print(f"This needs a GPU{' of compute capability 9.0: H100, H200' if needs_hopper else ''}.", file=sys.stderr)
        return 2
    error, allowed = errors(level, 8, 1024, torch.device("cuda"), torch.bfloat16)
    print(f"Largest error against float64: {error:.1e}, allowed {allowed:.1e}")
    if not error <= allowed:
        return 1
    print(f"{'seqlen':>8}{'this level':>12}{'the package':>13}   TFLOP/s")
    for seqlen in (1024, 4096, 16384):
        heads = 16 * 16384 // seqlen
        print(f"{seqlen:8}{teraflops(level, heads, seqlen):12.0f}{teraflops(the_package, heads, seqlen):13.0f}")
    return 0
