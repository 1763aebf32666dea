"""Level 4: who waits for memory? One warp does nothing else, and the warpgroups that compute find their operands there.

A program is a producer warp and two consumer warpgroups of 64 queries each, which share its keys and values. Blocks go
through a ring of two slots with two barriers each: the producer waits until a slot is `empty` and starts a copy that
completes on `full`; a consumer waits for `full`, multiplies, and arrives on `empty`. The producer needs few registers,
and gives the rest to the consumers. While one consumer takes its softmax, the other one multiplies.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from harness import HEAD_DIM, LOG2_E, main
from level3_wgmma import rows_of
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_attention._compat import copy_to_shared

SLOTS = gl.constexpr(2)


class Channel(NamedTuple):
    """Tiles on their way from the producer to the consumers."""

    tiles: object  # (slots, rows, head_dim) in shared memory
    full: object  # (slots, 1) barriers
    empty: object  # (slots, 1) barriers


@gluon.jit
def new_channel(descriptor, COUNT: gl.constexpr):
    tiles = gl.allocate_shared_memory(descriptor.dtype, [COUNT] + descriptor.block_type.shape, descriptor.layout)
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(COUNT):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)  # both consumers
    return Channel(tiles, full, empty)


@gluon.jit
def send(channel, descriptor, row, step):
    """Producer: the tile of a step, as soon as its slot is free."""
    slot = step % SLOTS
    mbarrier.wait(channel.empty.index(slot), (step // SLOTS & 1) ^ 1)
    mbarrier.expect(channel.full.index(slot), descriptor.block_type.nbytes)
    copy_to_shared(descriptor, [row, 0], channel.full.index(slot), channel.tiles.index(slot))


@gluon.jit
def receive(channel, step):
    """Consumer: the tile of a step, once it is there."""
    slot = step % SLOTS
    mbarrier.wait(channel.full.index(slot), step // SLOTS & 1)
    return channel.tiles.index(slot)


@gluon.jit
def release(channel, step):
    """Consumer: the slot of a step may be filled again."""
    mbarrier.arrive(channel.empty.index(step % SLOTS), count=1)


@gluon.jit
def produce(q, k, v, q_channel, k_channel, v_channel, seqlen, BLOCK_N: gl.constexpr):
    """The producer warp: the queries of both consumers, then keys and values block by block."""
    origin = gl.program_id(1) * seqlen
    for consumer in gl.static_range(2):
        mbarrier.expect(q_channel.full.index(consumer), q.block_type.nbytes)
        row = origin + gl.program_id(0) * 128 + consumer * 64
        copy_to_shared(q, [row, 0], q_channel.full.index(consumer), q_channel.tiles.index(consumer))
    for step in range(seqlen // BLOCK_N):
        send(k_channel, k, origin + step * BLOCK_N, step)
        send(v_channel, v, origin + step * BLOCK_N, step)


@gluon.jit
def store(out, acc, total, seqlen, HEAD_DIM: gl.constexpr, OUT: gl.constexpr, INDEX: gl.constexpr):
    """A consumer's 64 rows of `out`."""
    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
    start_m = gl.program_id(1) * seqlen + gl.program_id(0) * 128 + INDEX * 64
    rows = start_m + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
    gl.store(out + rows[:, None].to(gl.int64) * HEAD_DIM + dims[None, :], acc.to(out.dtype.element_ty))


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
    maximum = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.full([64, HEAD_DIM], 0.0, gl.float32, OUT)
    nothing = gl.full([64, BLOCK_N], 0.0, gl.float32, SCORES)
    mbarrier.wait(q_channel.full.index(INDEX), 0)
    q_tile = q_channel.tiles.index(INDEX)
    for step in range(seqlen // BLOCK_N):
        k_tile = receive(k_channel, step)
        scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores]) * scale_log2
        release(k_channel, step)
        new_maximum = gl.maximum(maximum, gl.max(scores, 1))
        weights = gl.exp2(scores - new_maximum[:, None])
        correction = gl.exp2(maximum - new_maximum)
        total = total * correction + gl.sum(weights, 1)
        maximum = new_maximum
        acc = acc * gl.convert_layout(correction, gl.SliceLayout(1, OUT))[:, None]
        operand = gl.convert_layout(weights.to(v_channel.tiles.dtype), WEIGHTS)
        acc = warpgroup_mma(operand, receive(v_channel, step), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        release(v_channel, step)
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
        [4, 1],  # warps of the second and third; the first has those that the launch names
        [240, 24],  # registers of their threads
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
