"""How do the scores of a block become P and dS, and what of its queries and keys do they need?"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.backward_channels import NEGATIVE_DELTA, load_numbers
from triton_attention.hopper.channel import wait_full
from triton_attention.hopper.columns import multiply_transposed
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout
from triton_attention.hopper.narrow import multiply_marked, multiply_narrow, widen
from triton_attention.hopper.softmax import INFINITY, LOG2_E, add_bias, cap_scores, distances


@gluon.jit
def rows_origin(batch, head, call, SPEC: gl.constexpr):
    """Where the two numbers of each of a head's queries begin."""
    if SPEC.VARLEN:
        origin = head.to(gl.int64) * 2 * call.padded_q + call.own.numbers
    else:
        origin = (batch * call.heads_q + head).to(gl.int64) * 2 * call.padded_q
    return origin


@gluon.jit
def load_query_numbers(rows, batch, head, queries, call, SPEC: gl.constexpr):
    """(lse, -delta) of the queries of these numbers: those that do not exist get probabilities of 0."""
    pointers = rows + rows_origin(batch, head, call, SPEC) + queries
    lse = gl.load(pointers, mask=queries < call.seqlen_q, other=INFINITY)
    return lse, gl.load(pointers + call.padded_q, mask=queries < call.seqlen_q, other=0.0)


@gluon.jit
def load_key_bias(bias, batch, head, keys, call, SPEC: gl.constexpr):
    """A bias that does not vary along the queries, of some keys, in units of log 2; 0 of any other."""
    if SPEC.BIAS == "none" or SPEC.BIAS_ROWS:
        values = 0.0
    else:
        values = gl.load(bias.ptr + batch * bias.batch + head * bias.head + keys, mask=keys < call.seqlen_k, other=0)
        if SPEC.BIAS == "mask":
            values = gl.where(values != 0, 0.0, -INFINITY)
        else:
            values = values.to(gl.float32) * LOG2_E
    return values


@gluon.jit
def exponents_of(scores, lse, slope, start_m, start_n, call, SPEC: gl.constexpr, TRANSPOSED: gl.constexpr):
    """(scores - lse of a block, without a bias, in units of log 2; the derivative of a softcap).

    Scores are (queries, keys), or if TRANSPOSED (keys, queries), and lse, which has one axis of size 1, too.
    """
    exponents, derivative = cap_scores(scores, call, SPEC)
    exponents -= lse
    if SPEC.ALIBI:
        start_m += call.extras.diagonal
        if TRANSPOSED:
            exponents -= slope * distances(start_n, start_m, scores.shape[1])
        else:
            exponents -= slope * distances(start_m, start_n, scores.shape[1])
    return exponents, derivative


@gluon.jit
def add_transposed_bias(
    exponents, key_bias, channels, step, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr
):
    """Exponents of (keys, queries) with the bias of a step, or that of the keys."""
    if SPEC.BIAS_ROWS:
        tile = channels.bias.index(step % TILE.STAGES * TILE.CONSUMERS + INDEX)
        tile = tile.reshape([TILE.BLOCK_M, WARPGROUP_ROWS]).permute((1, 0))
        values = tile.load(accumulator_layout(TILE.BLOCK_M))
        exponents = add_bias(exponents, values, SPEC)
    elif SPEC.BIAS != "none":
        exponents += key_bias[:, None]
    return exponents


@gluon.jit
def multiply_values(channels, v, dout, zero, step, SPEC: gl.constexpr):
    """Issue dP - delta of a block, transposed: the product V dO^T is added to -delta. With dropout dP alone."""
    wait_full(channels.dout, step)
    if SPEC.DROPOUT:
        dweights = zero
    else:
        dweights, _ = gl.broadcast(load_numbers(channels, step, NEGATIVE_DELTA), zero)
    return multiply_transposed(v, dout, dweights, not SPEC.DROPOUT, SPEC.TAIL_DV)


@gluon.jit
def score_gradients(weights, dweights, channels, step, SPEC: gl.constexpr):
    """dS in 16 bits, of the weights in 16 bits and what `multiply_values` made."""
    if SPEC.DROPOUT:
        dscores = multiply_marked(weights, dweights, load_numbers(channels, step, NEGATIVE_DELTA))
    else:
        dscores = multiply_narrow(weights, dweights)
    return dscores


@gluon.jit
def bias_gradients(weights, dweights, channels, step, SPEC: gl.constexpr):
    """The same in float32."""
    weights = widen(weights, SPEC)
    if SPEC.DROPOUT:
        negative_delta = load_numbers(channels, step, NEGATIVE_DELTA)
        dscores = gl.maximum(weights, 0.0) * dweights + gl.abs(weights) * negative_delta
    else:
        dscores = weights * dweights
    return dscores
