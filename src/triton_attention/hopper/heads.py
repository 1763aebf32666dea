"""What is particular to one query head of one batch entry? Its ALiBi slope, its sink, and dropout's seed."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.schedule import limits_of
from triton_attention.hopper.softmax import INFINITY, LOG2_E


class Slopes(NamedTuple):
    """ALiBi's slopes (batch, heads_q): their pointer and strides, 0 where the batch shares them."""

    ptr: object
    batch: object
    head: object


class Extras(NamedTuple):
    """What few calls have; each is None where SPEC says that it is absent."""

    softcap: object
    slopes: object
    diagonal: object  # the j - i where ALiBi adds nothing
    sink: object  # (heads_q,)
    seed: object  # of dropout: one number
    drop_below: object  # dropout keeps a probability iff its byte is at least this
    kept_factor: object  # see `philox.kept_factor`


class Head(NamedTuple):
    """One query head of one batch entry, and what changes its scores and weights; what is absent is 0."""

    limits: object  # of the entry, a schedule.Limits
    slope: object  # of ALiBi, in units of the scores
    diagonal: object
    seed: object
    number: object  # among the query heads of all batch entries


@gluon.jit
def load_slope(batch, head, call, SPEC: gl.constexpr):
    """The slope of ALiBi; 0 without one."""
    slope = 0.0
    if SPEC.ALIBI:
        slopes = call.extras.slopes
        if SPEC.VARLEN:
            batch = gl.minimum(batch, call.batch - 1)  # rows that no sequence has
        slope = gl.load(slopes.ptr + batch * slopes.batch + head * slopes.head)
    return slope


@gluon.jit
def load_seed(call, SPEC: gl.constexpr):
    """The seed of dropout; 0 without it."""
    seed = 0
    if SPEC.DROPOUT:
        seed = gl.load(call.extras.seed)
    return seed


@gluon.jit
def query_head(work, call, SPEC: gl.constexpr):
    limits = limits_of(work.sequence, call, SPEC)
    diagonal = 0
    if SPEC.ALIBI:
        diagonal = call.extras.diagonal
        if SPEC.VARLEN:
            diagonal = (limits.seqlen_k - limits.seqlen_q) * call.packing.bottom_right
    seed, number = load_seed(call, SPEC), 0
    if SPEC.DROPOUT:
        number = work.batch * call.heads_q + work.head
    slope = load_slope(work.batch, work.head, call, SPEC)
    if SPEC.ALIBI and SPEC.RAW_SCORES:
        slope *= LOG2_E / call.scale
    return Head(limits, slope, diagonal, seed, number)


@gluon.jit
def load_sink(work, call, SPEC: gl.constexpr):
    """The logit that joins the softmax's denominator, in units of log 2; -inf without one."""
    sink = -INFINITY
    if SPEC.SINK:
        sink = gl.load(call.extras.sink + work.head).to(gl.float32) * LOG2_E
        if SPEC.VARLEN:
            sink = gl.where(work.batch < call.batch, sink, -INFINITY)  # rows that no sequence has
    return sink
