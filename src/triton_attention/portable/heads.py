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
    """The tensors that few calls have; each is None where SPEC says that it is absent."""

    slopes: object
    sink: object  # (heads_q,)
    seed: object  # one number
    cu_seqlens_q: object  # (batch + 1,): where packed sequences begin, and the last one ends
    cu_seqlens_k: object


class Head(NamedTuple):
    """One query head of one batch entry, whose fields come first: see `schedule.Entry`."""

    batch: object
    rows_q: object
    rows_k: object
    index: object
    slope: object  # of ALiBi, in units of log 2
    seed: object  # of dropout


@triton.jit
def query_head(extras, entry, index, call, SPEC: tl.constexpr):
    slope = 0.0
    if SPEC.ALIBI:
        batch = entry.batch
        if SPEC.VARLEN:
            batch = tl.minimum(batch, call.packing.batch - 1)  # rows that no sequence has
        slope = tl.load(extras.slopes.ptr + batch * extras.slopes.batch + index * extras.slopes.head) * LOG2_E
    seed = 0
    if SPEC.DROPOUT:
        seed = tl.load(extras.seed)
    return Head(entry.batch, entry.rows_q, entry.rows_k, index, slope, seed)


@triton.jit
def load_sink(extras, head, SPEC: tl.constexpr):
    """The logit that joins the softmax's denominator, in units of log 2; -inf without one."""
    sink = -float("inf")
    if SPEC.SINK:
        sink = tl.load(extras.sink + head.index).to(tl.float32) * LOG2_E
    return sink
