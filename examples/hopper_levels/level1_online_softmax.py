"""Level 1: how does attention need no matrix of scores? A running maximum and a running sum (Triton, any GPU).

A program owns 64 queries and visits the keys block by block. Of the keys seen so far it keeps, for each query, the
largest score, the sum of exponentials and the weighted sum of values; when the maximum grows, both sums are rescaled.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from harness import HEAD_DIM, LOG2_E, main
from torch import Tensor


@triton.jit
def attention_fwd(
    q, k, v, out, seqlen, scale_log2, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out = softmax(scale q k^T) v. Grid: (blocks of BLOCK_M queries, heads); a program owns its rows of `out`."""
    origin = tl.program_id(1).to(tl.int64) * seqlen * HEAD_DIM
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    places = origin + rows[:, None] * HEAD_DIM + dims
    q_tile = tl.load(q + places)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start_n in range(0, seqlen, BLOCK_N):
        keys = origin + (start_n + tl.arange(0, BLOCK_N))[:, None] * HEAD_DIM + dims
        scores = tl.dot(q_tile, tl.load(k + keys).T) * scale_log2  # in units of log 2: the hardware has exp2
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        correction = tl.exp2(maximum - new_maximum)
        total = total * correction + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q_tile.dtype), tl.load(v + keys), acc * correction[:, None])
        maximum = new_maximum
    tl.store(out + places, (acc / total[:, None]).to(q_tile.dtype))


def level(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v; see harness.py for what q, k and v are."""
    heads, seqlen, _ = q.shape
    out = torch.empty_like(q)
    scale = LOG2_E * HEAD_DIM**-0.5
    attention_fwd[(seqlen // 64, heads)](q, k, v, out, seqlen, scale, HEAD_DIM, 64, 64, num_warps=4)
    return out


if __name__ == "__main__":
    sys.exit(main(level, needs_hopper=False))
