"""How does a bias or mask reach the scores of a tile?

One that varies along the keys arrives through a channel, block by block of keys: a tile for each consumer, or a row of
numbers for all where it does not vary along the queries. Any other is read once a tile of queries.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.channel import release, tile_of, wait_full
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout, columns_layout, rows_layout


class BiasTensor(NamedTuple):
    """A (batch, heads, seqlen_q, seqlen_k) tensor: its pointer and strides, 0 along an axis that is broadcast."""

    ptr: object
    batch: object
    head: object
    row: object


@gluon.jit
def load_row_bias(bias, work, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """(64,) of a bias that does not vary along the keys; nothing of any other."""
    if SPEC.BIAS != "none" and not SPEC.BIAS_COLS:
        rows = work.start_m + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(TILE.BLOCK_N))
        pointers = bias.ptr + work.batch * bias.batch + work.head * bias.head + rows.to(gl.int64) * bias.row
        length = call.seqlen_q
        if SPEC.VARLEN:  # a sequence may claim to be longer than the longest, and rows that none has have no bias
            length = gl.where(work.batch < call.batch, gl.minimum(work.sequence.seqlen_q, length), 0)
        values = gl.load(pointers, mask=rows < length, other=0)
    else:
        values = 0
    return values


@gluon.jit
def load_bias(channel, row_bias, step, kept_step, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """The bias of a block of scores, in a shape that broadcasts to them."""
    if SPEC.BIAS == "none":
        values = 0
    elif SPEC.BIAS_COLS:
        bias_step = kept_step if TILE.BIAS_STAYS else step
        wait_full(channel, bias_step)
        if SPEC.BIAS_ROWS:
            tile = tile_of(channel.tiles, channel, bias_step, INDEX)
            values = tile.load(accumulator_layout(TILE.BLOCK_N))
        else:
            tile = tile_of(channel.tiles, channel, bias_step, 0)
            row = tile.reshape([tile.shape[1]]).slice(0, TILE.BLOCK_N)  # a row of numbers may be longer than the block
            values = row.load(columns_layout(TILE.BLOCK_N))[None, :]
        if not TILE.BIAS_STAYS:
            release(channel, bias_step)
    else:
        values = row_bias[:, None]
    return values
