"""Level 5: what do the tensor cores do during the softmax? The other product of the block before.

The producer is that of level 4. A consumer issues q k^T of a block of keys, and behind it, without waiting, the weights
of the block before times its values. When the first is done, the softmax of the new block runs under the second. Then
the accumulator is rescaled. So two products are always under way together.
"""

from __future__ import annotations

import sys

import torch
from harness import HEAD_DIM, LOG2_E, main
from level3_wgmma import rows_of
from level4_producer import SLOTS, new_channel, produce, receive, release, store
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def consume(
    q_channel, k_channel, v_channel, out, seqlen, scale_log2,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, INDEX: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: the queries [64 INDEX, 64 INDEX + 64) of the program's 128."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    acc = gl.full([64, HEAD_DIM], 0.0, gl.float32, OUT)
    nothing = gl.full([64, BLOCK_N], 0.0, gl.float32, SCORES)
    mbarrier.wait(q_channel.full.index(INDEX), 0)
    q_tile = q_channel.tiles.index(INDEX)

    # The first block has none before it.
    k_tile = receive(k_channel, 0)
    scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores]) * scale_log2
    release(k_channel, 0)
    maximum = gl.max(scores, 1)
    weights = gl.exp2(scores - maximum[:, None])
    total = gl.sum(weights, 1)

    for step in range(1, seqlen // BLOCK_N):
        operand = gl.convert_layout(weights.to(v_channel.tiles.dtype), WEIGHTS)
        v_tile = receive(v_channel, step - 1)
        k_tile = receive(k_channel, step)
        scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        acc = warpgroup_mma(operand, v_tile, acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores]) * scale_log2  # all but the last one issued
        release(k_channel, step)
        new_maximum = gl.maximum(maximum, gl.max(scores, 1))
        weights = gl.exp2(scores - new_maximum[:, None])
        correction = gl.exp2(maximum - new_maximum)
        total = total * correction + gl.sum(weights, 1)
        maximum = new_maximum
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(v_channel, step - 1)
        acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, OUT))[:, None]

    last = seqlen // BLOCK_N - 1
    operand = gl.convert_layout(weights.to(v_channel.tiles.dtype), WEIGHTS)
    acc = warpgroup_mma(operand, receive(v_channel, last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    store(out, acc, total, seqlen, HEAD_DIM, OUT, INDEX)


@gluon.jit
def attention_fwd(q, k, v, out, seqlen, scale_log2, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):
    """out = softmax(scale q k^T) v. Grid: (blocks of 128 queries, heads); a program owns its rows of `out`."""
    q_channel = new_channel(q, 2)
    k_channel = new_channel(k, SLOTS)
    v_channel = new_channel(v, SLOTS)
    fence_async_shared()
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    gl.warp_specialize(
        [
            (consume, (q_channel, k_channel, v_channel, out, seqlen, scale_log2, HEAD_DIM, BLOCK_N, FIRST)),
            (consume, (q_channel, k_channel, v_channel, out, seqlen, scale_log2, HEAD_DIM, BLOCK_N, SECOND)),
            (produce, (q, k, v, q_channel, k_channel, v_channel, seqlen, BLOCK_N)),
        ],
        [4, 1],
        [240, 24],
    )


def level(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v; see harness.py for what q, k and v are."""
    heads, seqlen, _ = q.shape
    out = torch.empty_like(q)
    scale = LOG2_E * HEAD_DIM**-0.5
    operands = rows_of(q, 64), rows_of(k, 128), rows_of(v, 128)
    attention_fwd[(seqlen // 128, heads)](*operands, out, seqlen, scale, HEAD_DIM, 128, num_warps=4, maxnreg=168)
    return out


if __name__ == "__main__":
    sys.exit(main(level, needs_hopper=True))
