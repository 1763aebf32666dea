"""How does a bias or mask reach the scores of a tile?

One that varies along queries and keys arrives tile by tile through a channel. One that varies along the queries only,
or not within a matrix, is read once a tile of queries; one that varies along the keys only, once a block of keys.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.layouts import WARPGROUP_ROWS, rows_layout
from triton_attention.hopper.softmax import INFINITY


class BiasTensor(NamedTuple):
    """A (batch, heads, seqlen_q, seqlen_k) tensor: its pointer and strides, 0 along an axis that is broadcast."""

    ptr: object
    batch: object
    head: object
    row: object


@gluon.jit
def load_row_bias(bias, batch, head, start_m, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """(64,) of a bias that does not vary along the keys; nothing of any other."""
    if SPEC.BIAS != "none" and not SPEC.BIAS_COLS:
        rows = start_m + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(TILE.BLOCK_N))
        pointers = bias.ptr + batch * bias.batch + head * bias.head + rows.to(gl.int64) * bias.row
        values = gl.load(pointers, mask=rows < call.seqlen_q, other=0)
    else:
        values = 0
    return values


@gluon.jit
def add_bias(scores, values, call, SPEC: gl.constexpr):
    """The scores with the scale and the bias, `values` of which broadcast to them."""
    if SPEC.BIAS == "mask":
        scores = gl.where(values != 0, scores * call.scale, -INFINITY)
    else:
        scores = scores * call.scale + values.to(gl.float32)
    return scores
