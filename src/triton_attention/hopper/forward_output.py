"""How does the forward accumulate out, and how does it leave?"""

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

from triton_attention._compat import copy_to_global
from triton_attention.hopper.channel import coordinates, tile_of
from triton_attention.hopper.correction import correct
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout, operand_layout, rows_layout
from triton_attention.hopper.schedule import place_of_queries
from triton_attention.hopper.softmax import finish


class Results(NamedTuple):
    """Shared memory through which each consumer's rows of out leave."""

    tiles: object
    tails: object


class Output(NamedTuple):
    """The accumulators of out, and which rows they are."""

    acc: object  # (64, BLOCK_DV)
    tail: object  # (64, TAIL_DV)
    start_m: object
    head: object
    batch: object
    sequence: object  # a `Sequence` where they are packed, else 0


@gluon.jit
def multiply_values(channels, weights, output, step, SPEC: gl.constexpr):
    """Issue the product of the weights with the block of values of a step."""
    acc = warpgroup_mma(weights, tile_of(channels.v.tiles, channels.v, step, 0), output.acc, is_async=True)
    tail = output.tail
    if SPEC.TAIL_DV > 0:
        weights = gl.convert_layout(weights, operand_layout(SPEC.TAIL_DV))
        tail = warpgroup_mma(weights, tile_of(channels.v.tails, channels.v, step, 0), tail, is_async=True)
    return Output(acc, tail, output.start_m, output.head, output.batch, output.sequence)


@gluon.jit
def wait_values(output, SPEC: gl.constexpr):
    """Wait until nothing is under way."""
    acc = output.acc
    tail = output.tail
    if SPEC.TAIL_DV > 0:
        acc, tail = warpgroup_mma_wait(0, deps=[acc, tail])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
    return Output(acc, tail, output.start_m, output.head, output.batch, output.sequence)


@gluon.jit
def new_output(work, SPEC: gl.constexpr):
    acc = gl.full([WARPGROUP_ROWS, SPEC.BLOCK_DV], 0.0, gl.float32, accumulator_layout(SPEC.BLOCK_DV))
    if SPEC.TAIL_DV > 0:
        tail = gl.full([WARPGROUP_ROWS, SPEC.TAIL_DV], 0.0, gl.float32, accumulator_layout(SPEC.TAIL_DV))
    else:
        tail = 0
    return Output(acc, tail, work.start_m, work.head, work.batch, work.sequence)


@gluon.jit
def scaled(output, factor, SPEC: gl.constexpr):
    """The output with each row times a factor."""
    acc_factor = gl.convert_layout(factor, rows_layout(SPEC.BLOCK_DV))
    acc = output.acc * acc_factor[:, None]
    tail = output.tail
    if SPEC.TAIL_DV > 0:
        tail = tail * gl.convert_layout(factor, rows_layout(SPEC.TAIL_DV))[:, None]
    return Output(acc, tail, output.start_m, output.head, output.batch, output.sequence)


@gluon.jit
def corrected(output, correction, SPEC: gl.constexpr):
    """The output of rows whose maximum has risen."""
    tail = output.tail
    if SPEC.TAIL_DV > 0:
        tail = correct(tail, correction, SPEC.TAIL_DV)
    acc = correct(output.acc, correction, SPEC.BLOCK_DV)
    return Output(acc, tail, output.start_m, output.head, output.batch, output.sequence)


@gluon.jit
def store(operands, lse, results, output, rows, call, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """Write 64 rows of out and lse; the copies of out are under way at return."""
    factor, lse_rows = finish(rows, call, SPEC)
    numbers = output.start_m + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(TILE.BLOCK_N))
    seqlen_q = call.seqlen_q
    if SPEC.VARLEN:
        seqlen_q = output.sequence.seqlen_q
        origin = output.head.to(gl.int64) * call.packing.total_q + (output.sequence.end_q - seqlen_q)
    else:
        origin = (output.batch * call.heads_q + output.head).to(gl.int64) * seqlen_q
    gl.store(lse + origin + numbers, lse_rows, mask=numbers < seqlen_q)
    output = scaled(output, factor, SPEC)
    batch, start_m = place_of_queries(output.start_m, output.batch, output.sequence, SPEC)
    place = coordinates(operands.out, batch, output.head, start_m, 0)
    tma.store_wait(0)
    tile = results.tiles.index(INDEX)
    tile.reshape([WARPGROUP_ROWS, SPEC.BLOCK_DV]).store(output.acc.to(operands.out.dtype))
    fence_async_shared()
    copy_to_global(operands.out, place, tile)
    if SPEC.TAIL_DV > 0:
        if SPEC.TAIL_DV == SPEC.BLOCK_DV:  # the tail takes the same place
            tma.store_wait(0)
        else:
            tile = results.tails.index(INDEX)
        tile.reshape([WARPGROUP_ROWS, SPEC.TAIL_DV]).store(output.tail.to(operands.out.dtype))
        fence_async_shared()
        copy_to_global(operands.out_tail, place, tile)
