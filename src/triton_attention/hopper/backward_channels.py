"""What travels between the warpgroups of the kernels that own keys?"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.backward_walk import new_turns
from triton_attention.hopper.channel import Channel, new_barriers, new_channel, new_tiles
from triton_attention.hopper.layouts import WARPGROUP_ROWS, columns_layout

LSE, NEGATIVE_DELTA = gl.constexpr(0), gl.constexpr(1)  # of the two numbers of a query


class Inputs(NamedTuple):
    """Tensor descriptors, those of matrices as `Columns`; `rows` has two numbers a query, see `attention_bwd_rows`."""

    q: object
    k: object
    v: object
    dout: object
    rows: object
    bias: object  # or a `BiasTensor` of one number a key, or None


class Gradients(NamedTuple):
    """Tensor descriptors, as `Columns` but for the last."""

    dq: object  # of sums: see `assist`
    dk: object
    dv: object
    dbias: object  # or a pointer to (batch, heads_q, seqlen_k), or None


class Channels(NamedTuple):
    """What the assistant sends the consumers, and what they send it: dS."""

    q: object  # with it come `rows` and `bias`, in slots of the same number
    rows: object
    bias: object
    dout: object
    k: object
    v: object
    dscores: object
    turns: object  # which blocks of keys: see `backward_walk.Turns`


@gluon.jit
def new_exchange(dtype, BLOCK_M: gl.constexpr, SLOTS: gl.constexpr, PARTS: gl.constexpr, WRITERS: gl.constexpr):
    """The channel of dS: WRITERS consumers fill the parts of a slot, and each arrives itself."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 1, BLOCK_M, WARPGROUP_ROWS], dtype)
    tiles = gl.allocate_shared_memory(dtype, [SLOTS * PARTS, 1, 1, BLOCK_M, WARPGROUP_ROWS], LAYOUT)
    return Channel(tiles, 0, new_barriers(SLOTS, WRITERS), new_barriers(SLOTS, 1))


@gluon.jit
def new_channels(
    inputs, counter, SPEC: gl.constexpr, TILE: gl.constexpr, READERS: gl.constexpr, EXCHANGES: gl.constexpr
):  # fmt: skip
    """READERS consumers read each block of queries; a warpgroup finds EXCHANGES tiles that others leave for it."""
    STAGES: gl.constexpr = TILE.STAGES
    CONSUMERS: gl.constexpr = TILE.CONSUMERS
    if SPEC.BIAS_ROWS:
        bias_tiles = new_tiles(inputs.bias, STAGES * CONSUMERS)
    else:
        bias_tiles = 0
    q = new_channel(inputs.q.block, inputs.q.tail, STAGES, 1, READERS)
    rows = new_tiles(inputs.rows, STAGES * 2)
    dout_tiles, dout_tails = new_tiles(inputs.dout.block, STAGES), new_tiles(inputs.dout.tail, STAGES)
    dout = Channel(dout_tiles, dout_tails, new_barriers(STAGES, 1), 0)  # emptied with q
    k = new_channel(inputs.k.block, inputs.k.tail, TILE.KEYS_STAGES, CONSUMERS, CONSUMERS)
    v = new_channel(inputs.v.block, inputs.v.tail, TILE.KEYS_STAGES, CONSUMERS, CONSUMERS)
    if EXCHANGES > 0:
        dscores = new_exchange(inputs.q.block.dtype, TILE.BLOCK_M, TILE.DSCORES_STAGES, EXCHANGES, CONSUMERS)
    else:
        dscores = 0
    turns = new_turns(counter, SPEC, TILE, 4 if SPEC.DQ != "apart" else 1)
    return Channels(q, rows, bias_tiles, dout, k, v, dscores, turns)


@gluon.jit
def load_numbers(channels, step, NUMBER: gl.constexpr):
    """(1, BLOCK_M): LSE or NEGATIVE_DELTA of the queries of a step, one for each column of transposed scores."""
    SLOTS: gl.constexpr = channels.q.full.shape[0]
    BLOCK_M: gl.constexpr = channels.rows.shape[4]
    tile = channels.rows.index(step % SLOTS * 2 + NUMBER).reshape([BLOCK_M])
    return tile.load(columns_layout(BLOCK_M))[None, :]
