"""Level 2: who computes addresses? Nobody: descriptors say what a tensor is, and the hardware copies its tiles (TMA).

The kernel is that of level 1, with `load` of a descriptor instead of pointers. A thread starts a copy of a whole tile
into shared memory; no thread spends registers on addresses, and the compiler keeps copies of later blocks under way.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from harness import HEAD_DIM, LOG2_E, main
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def attention_fwd(
    q, k, v, out, seqlen, scale_log2, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out = softmax(scale q k^T) v. Grid: (blocks of BLOCK_M queries, heads); a program owns its rows of `out`."""
    origin = tl.program_id(1) * seqlen
    start_m = origin + tl.program_id(0) * BLOCK_M
    q_tile = q.load([start_m, 0])
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start_n in range(0, seqlen, BLOCK_N):
        scores = tl.dot(q_tile, k.load([origin + start_n, 0]).T) * scale_log2
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        correction = tl.exp2(maximum - new_maximum)
        total = total * correction + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q_tile.dtype), v.load([origin + start_n, 0]), acc * correction[:, None])
        maximum = new_maximum
    out.store([start_m, 0], (acc / total[:, None]).to(q_tile.dtype))


def level(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v; see harness.py for what q, k and v are."""
    heads, seqlen, _ = q.shape
    out = torch.empty_like(q)

    def rows_of(tensor: Tensor, block: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor.view(heads * seqlen, HEAD_DIM), [block, HEAD_DIM])

    operands = rows_of(q, 128), rows_of(k, 128), rows_of(v, 128), rows_of(out, 128)
    scale = LOG2_E * HEAD_DIM**-0.5
    attention_fwd[(seqlen // 128, heads)](*operands, seqlen, scale, HEAD_DIM, 128, 128, num_warps=8, num_stages=2)
    return out


if __name__ == "__main__":
    sys.exit(main(level, needs_hopper=False))
