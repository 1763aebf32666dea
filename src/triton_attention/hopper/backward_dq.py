"""How does the assistant make dQ of the dS that consumers leave? By adding up dS K, at one of two places.

Sums in global memory, to which all blocks of keys of a head add by TMA in no fixed order: `attention_bwd_dq` rounds
them. Or, where dQ of a head fits, sums in shared memory, by a program that has all of the head's keys, and rounds them.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_attention._compat import add_to_global, copy_to_global, reinterpret
from triton_attention.hopper.channel import new_tiles, release, tile_of
from triton_attention.hopper.columns import Columns, new_sums
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout
from triton_attention.hopper.rows import PANEL


class Kept(NamedTuple):
    """Sums of a head in shared memory, and the way by which they leave."""

    sums: object  # (tiles, 64 BLOCK_D / PANEL, PANEL) float32: see `as_panels`
    staging: object  # (slots, 1, 1, 64, BLOCK_D)


@gluon.jit
def new_dq_sums(descriptors, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Shared memory for it: what is `Kept`, or the `Columns` of a block of queries on their way; 0 where dQ is made
    apart."""
    if SPEC.DQ == "kept":
        LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
        SHAPE: gl.constexpr = [TILE.DQ_TILES, WARPGROUP_ROWS * SPEC.BLOCK_D // PANEL, PANEL]
        dq_sums = Kept(gl.allocate_shared_memory(gl.float32, SHAPE, LAYOUT), new_tiles(descriptors.block, 2))
    elif SPEC.DQ == "added":
        PIECES: gl.constexpr = TILE.BLOCK_M * SPEC.BLOCK_D // (descriptors.block.block_type.shape[2] * PANEL)
        dq_sums = Columns(new_tiles(descriptors.block, PIECES), new_tiles(descriptors.tail, 1))
    else:
        dq_sums = 0
    return dq_sums


@gluon.jit
def as_panels(dq):
    """(64, COLUMNS) in the order in which the threads of a warpgroup hold it, PANEL numbers in a row: so none waits for
    another's bank of shared memory."""
    COLUMNS: gl.constexpr = dq.shape[1]
    dq = dq.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))
    return dq.reshape([WARPGROUP_ROWS * COLUMNS // PANEL, PANEL])


@gluon.jit
def from_panels(tile, COLUMNS: gl.constexpr):
    """Load (64, COLUMNS) that was stored in that order."""
    LAYOUT: gl.constexpr = accumulator_layout(COLUMNS)
    order = as_panels(gl.full([WARPGROUP_ROWS, COLUMNS], 0.0, gl.float32, LAYOUT))
    dq = tile.load(order.type.layout).reshape([COLUMNS // 8, 4, 8, 4, 2, 2])
    return gl.convert_layout(dq.permute((1, 4, 2, 0, 3, 5)).reshape([WARPGROUP_ROWS, COLUMNS]), LAYOUT)


@gluon.jit
def dscores_of(channels, step, PART: gl.constexpr, HALF: gl.constexpr):
    """The HALF-th 64 queries of dS that a consumer left."""
    START: gl.constexpr = HALF * WARPGROUP_ROWS
    return tile_of(channels.dscores.tiles, channels.dscores, step, PART).slice(START, WARPGROUP_ROWS)


@gluon.jit
def leave_piece(tile, dq, HALF: gl.constexpr):
    """Store some columns of dQ of the HALF-th 64 queries."""
    ROWS: gl.constexpr = WARPGROUP_ROWS * dq.shape[1] // PANEL
    START: gl.constexpr = HALF * ROWS
    tile.reshape([tile.shape[2], PANEL]).slice(START, ROWS).store(as_panels(dq))


@gluon.jit
def multiply_keys(channels, staging, step, i, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Leave dS K of a step and of the i-th block of keys in `staging`: pieces with some of its columns each."""
    PARTS: gl.constexpr = TILE.CONSUMERS
    HALVES: gl.constexpr = TILE.BLOCK_M // WARPGROUP_ROWS
    PIECES: gl.constexpr = staging.block.shape[0]
    COLUMNS: gl.constexpr = SPEC.BLOCK_D // PIECES
    K_PIECES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WARPGROUP_ROWS, COLUMNS], channels.k.tiles.dtype)
    zero = new_sums(COLUMNS, SPEC.TAIL_D)
    for piece in range(PIECES):
        for half in gl.static_range(HALVES):
            dq = zero.block
            for part in gl.static_range(PARTS):
                k = tile_of(channels.k.tiles, channels.k, i, part)
                k = reinterpret(k, k.dtype, [PIECES, WARPGROUP_ROWS, COLUMNS], K_PIECES).index(piece)
                dq = warpgroup_mma(dscores_of(channels, step, part, half), k, dq, use_acc=part > 0, is_async=True)
            dq = warpgroup_mma_wait(0, deps=[dq])
            if half == 0:
                if piece == 0:
                    tma.store_wait(0)  # the copies of the step before, and of dbias, have read
            leave_piece(staging.block.index(piece), dq, half)
    if SPEC.TAIL_D > 0:
        for half in gl.static_range(HALVES):
            dq = zero.tail
            for part in gl.static_range(PARTS):
                k = tile_of(channels.k.tails, channels.k, i, part)
                dq = warpgroup_mma(dscores_of(channels, step, part, half), k, dq, use_acc=part > 0, is_async=True)
            leave_piece(staging.tail.index(0), warpgroup_mma_wait(0, deps=[dq]), half)


@gluon.jit
def tile_of_sums(block, head, m, call, SPEC: gl.constexpr, BLOCK_M: gl.constexpr):
    """The number of the tile where dQ of a block of queries is summed; it is that of the program of
    `attention_bwd_rows` that zeroes it."""
    if SPEC.VARLEN:
        first = head * (call.padded_q // BLOCK_M) + block.numbers // BLOCK_M
    else:
        first = (block.batch * call.heads_q + head) * (call.padded_q // BLOCK_M)
    return first + m


@gluon.jit
def add_pieces(descriptors, staging, number):
    """Add what was left in `staging` to the sums of a tile."""
    PIECES: gl.constexpr = staging.block.shape[0]
    ROWS: gl.constexpr = staging.block.shape[3]
    if descriptors.tail is None:
        TAIL_ROWS: gl.constexpr = 0
    else:
        TAIL_ROWS: gl.constexpr = staging.tail.shape[3]
    first_row = number * (PIECES * ROWS + TAIL_ROWS)
    for piece in gl.static_range(PIECES):
        add_to_global(descriptors.block, [0, 0, first_row + piece * ROWS, 0], staging.block.index(piece))
    if descriptors.tail is not None:
        add_to_global(descriptors.tail, [0, 0, first_row + PIECES * ROWS, 0], staging.tail.index(0))


@gluon.jit
def add_to_kept(channels, kept, step, i, m, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Add dS K of a step and of the i-th block of keys to the sums of the m-th block of queries."""
    PARTS: gl.constexpr = TILE.CONSUMERS
    HALVES: gl.constexpr = TILE.BLOCK_M // WARPGROUP_ROWS
    for half in gl.static_range(HALVES):
        tile = kept.sums.index(m * HALVES + half)
        dq = from_panels(tile, SPEC.BLOCK_D)
        for part in gl.static_range(PARTS):
            k = tile_of(channels.k.tiles, channels.k, i, part)
            dq = warpgroup_mma(dscores_of(channels, step, part, half), k, dq, is_async=True)
        tile.store(as_panels(warpgroup_mma_wait(0, deps=[dq])))
    if SPEC.DBIAS == "tile":
        tma.store_wait(0)  # the copies of dbias have read


@gluon.jit
def begin_dq(dq_sums, SPEC: gl.constexpr):
    """Before the first block of keys."""
    if SPEC.DQ == "kept":
        TILES: gl.constexpr = dq_sums.sums.shape[0]
        zero = gl.full([WARPGROUP_ROWS, SPEC.BLOCK_D], 0.0, gl.float32, accumulator_layout(SPEC.BLOCK_D))
        for tile in gl.static_range(TILES):
            dq_sums.sums.index(tile).store(as_panels(zero))


@gluon.jit
def add_dq(
    descriptors, channels, dq_sums, step, i, block, head, m, call, SPEC: gl.constexpr, TILE: gl.constexpr
):  # fmt: skip
    """Take in the dS of a step: of the m-th block of queries of a head, and the i-th block of keys of this program."""
    if SPEC.DQ == "kept":
        add_to_kept(channels, dq_sums, step, i, m, SPEC, TILE)
        release(channels.dscores, step)
    else:
        multiply_keys(channels, dq_sums, step, i, SPEC, TILE)
        release(channels.dscores, step)
        fence_async_shared()
        add_pieces(descriptors, dq_sums, tile_of_sums(block, head, m, call, SPEC, TILE.BLOCK_M))


@gluon.jit
def end_dq(descriptors, dq_sums, block, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """After a block of keys. If it was the last one of its head, what was kept is rounded and copied to global memory,
    and begins with 0 again."""
    if SPEC.DQ == "kept":
        if block.start_n + TILE.CONSUMERS * WARPGROUP_ROWS >= call.seqlen_k:
            zero = gl.full([WARPGROUP_ROWS, SPEC.BLOCK_D], 0.0, gl.float32, accumulator_layout(SPEC.BLOCK_D))
            SLOTS: gl.constexpr = dq_sums.staging.shape[0]
            tma.store_wait(0)  # those of the head before
            for tile in range(gl.cdiv(call.seqlen_q, WARPGROUP_ROWS)):
                dq = from_panels(dq_sums.sums.index(tile), SPEC.BLOCK_D) * call.softmax_scale
                dq_sums.sums.index(tile).store(as_panels(zero))
                tma.store_wait(SLOTS - 1)
                staging = dq_sums.staging.index(tile % SLOTS)
                staging.reshape([WARPGROUP_ROWS, SPEC.BLOCK_D]).store(dq.to(dq_sums.staging.dtype))
                fence_async_shared()
                copy_to_global(descriptors.block, [block.batch, block.head_kv, tile * WARPGROUP_ROWS, 0], staging)
