"""What is particular to one query head of one batch entry? Its place, its ALiBi slope, its sink, and dropout's seed."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from triton_attention.portable.softmax import LOG2_E


class Slopes(NamedTuple):
    """ALiBi's slopes (batch, heads_q): their pointer and strides, 0 where the batch shares them."""

    ptr: object
    batch: object
    head: object


class Extras(NamedTuple):
    """What few calls have; each is None where SPEC says that it is absent."""

    softcap: object  # in units of log 2
    slopes: object
    diagonal: object  # the j - i where ALiBi adds nothing
    sink: object  # (heads_q,)
    seed: object  # of dropout: one number
    drop_below: object  # dropout keeps a probability iff its byte is at least this
    kept_factor: object  # see `philox.kept_factor`
    cu_seqlens_q: object  # (batch + 1,): where packed sequences begin, and the last one ends
    cu_seqlens_k: object


class Head(NamedTuple):
    """One query head of one batch entry, and what changes its scores and probabilities; what is absent is 0."""

    batch: object  # the entry: see `schedule.Entry`
    rows_q: object
    rows_k: object
    index: object
    softcap: object
    slope: object  # of ALiBi, in units of log 2
    diagonal: object
    seed: object
    drop_below: object


@triton.jit
def query_head(extras, entry, index, call, SPEC: tl.constexpr):
    softcap, slope, diagonal, seed, drop_below = 0.0, 0.0, 0, 0, 0
    if SPEC.SOFTCAP:
        softcap = extras.softcap
    if SPEC.ALIBI:
        batch = entry.batch
        diagonal = extras.diagonal
        if SPEC.VARLEN:
            batch = tl.minimum(batch, call.packing.batch - 1)  # rows that no sequence has
            diagonal = (call.seqlen_k - call.seqlen_q) * call.packing.bottom_right
        slope = tl.load(extras.slopes.ptr + batch * extras.slopes.batch + index * extras.slopes.head) * LOG2_E
    if SPEC.DROPOUT:
        seed = tl.load(extras.seed)
        drop_below = extras.drop_below
    return Head(entry.batch, entry.rows_q, entry.rows_k, index, softcap, slope, diagonal, seed, drop_below)


@triton.jit
def load_sink(extras, head, call, SPEC: tl.constexpr):
    """The logit that joins the softmax's denominator, in units of log 2; -inf without one."""
    sink = -float("inf")
    if SPEC.SINK:
        sink = tl.load(extras.sink + head.index).to(tl.float32) * LOG2_E
        if SPEC.VARLEN:
            sink = tl.where(head.batch < call.packing.batch, sink, -float("inf"))  # rows that no sequence has
    return sink
