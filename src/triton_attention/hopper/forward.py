"""The forward kernel: softmax(scores) v and the log-sum-exp, in one pass over the keys.

A program is a producer warp, which copies tiles of q, k, v and the bias into shared memory, two to four consumer
warpgroups of 64 queries each, and for dropout a drawer, a warpgroup that decides ahead of them what is kept. It is
persistent: while the consumers finish one tile, the producer fetches the next. Within a consumer two matrix products
are under way together: q k^T of a block of keys, and the weights of the block before with v, which the softmax of the
new block hides. At the end of a tile the new block is the next tile's first.
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

from triton_attention.hopper.bias import load_bias, load_row_bias
from triton_attention.hopper.channel import new_channel, new_tiles, release, tile_of, wait_full
from triton_attention.hopper.dropout import draw, drop, new_bits, no_bits, receive_bits
from triton_attention.hopper.forward_output import (
    Results,
    corrected,
    multiply_values,
    new_output,
    store,
    wait_values,
)
from triton_attention.hopper.forward_producer import PRODUCER_REGISTERS, Channels, Operands, draw_ahead, produce
from triton_attention.hopper.heads import load_sink, query_head
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout, operand_layout
from triton_attention.hopper.mask import mask_queries
from triton_attention.hopper.schedule import hear, new_ticker
from triton_attention.hopper.softmax import INFINITY, new_rows, scale_scores, weigh


class Progress(NamedTuple):
    """What a consumer has of the keys seen so far. The last block's weights have not met their values yet."""

    rows: object  # see `softmax.Rows`
    weights: object  # (64, BLOCK_N) of the last block
    bits: object  # which of them dropout keeps
    output: object  # see `forward_output.Output`


class Queries(NamedTuple):
    """The queries of a consumer in a tile."""

    i: object  # number of the tile among the program's
    head: object
    row_bias: object
    kept_end: object  # with BIAS_STAYS, less n: where block n of the bias is


@gluon.jit
def kept_bits(channels, head, start_m, step, n, call, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """What dropout keeps of block n of the keys, from the drawer or drawn here."""
    if TILE.BITS_STAGES > 0:
        bits = receive_bits(channels.bits, step * TILE.CONSUMERS + INDEX)
    else:
        bits = draw(head.seed, head.number, start_m, n * TILE.BLOCK_N, call, SPEC, TILE.BLOCK_N, False)
    return bits


@gluon.jit
def multiply_keys(channels, i, step, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """Issue q k^T of the i-th tile and the block of keys of a step: (64, BLOCK_N)."""
    scores = gl.full([WARPGROUP_ROWS, TILE.BLOCK_N], 0.0, gl.float32, accumulator_layout(TILE.BLOCK_N))
    q = tile_of(channels.q.tiles, channels.q, i, INDEX)
    k = tile_of(channels.k.tiles, channels.k, step, 0)
    scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
    if SPEC.TAIL_D > 0:
        q = tile_of(channels.q.tails, channels.q, i, INDEX)
        k = tile_of(channels.k.tails, channels.k, step, 0)
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def as_operand(weights, bits, channels, SPEC: gl.constexpr):
    """The weights that dropout keeps as the left operand of a product. They travel from block to block as float32:
    pairs of 16-bit numbers that cross a loop are taken apart and put together again."""
    weights = drop(weights.to(channels.v.tiles.dtype), bits, SPEC)
    return gl.convert_layout(weights, operand_layout(SPEC.BLOCK_DV))


@gluon.jit
def visit(
    progress, queries, channels, step, n, call, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Take in block n of the keys: its softmax runs under the product of the weights of the block before with v."""
    head = queries.head
    output = progress.output
    operand = as_operand(progress.weights, progress.bits, channels, SPEC)
    wait_full(channels.v, step - 1)
    wait_full(channels.k, step)
    scores = multiply_keys(channels, queries.i, step, SPEC, TILE, INDEX)
    output = multiply_values(channels, operand, output, step - 1, SPEC)
    values = load_bias(channels.bias, queries.row_bias, step, queries.kept_end - n, SPEC, TILE, INDEX)
    bits = kept_bits(channels, head, output.start_m, step, n, call, SPEC, TILE, INDEX)
    scores = warpgroup_mma_wait(2 if SPEC.TAIL_DV > 0 else 1, deps=[scores])
    release(channels.k, step)
    scores, scale = scale_scores(scores, values, head, output.start_m, n * TILE.BLOCK_N, call, SPEC)
    if MASKED:
        scores = mask_queries(scores, output.start_m, n * TILE.BLOCK_N, head.limits, SPEC, -INFINITY)
    rows, weights, correction = weigh(progress.rows, scores, scale, SPEC)
    output = wait_values(output, SPEC)
    release(channels.v, step - 1)
    return Progress(rows, weights, bits, corrected(output, correction, SPEC))


@gluon.jit
def skip(channels, step, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """Let a block of keys pass that only other consumers need."""
    wait_full(channels.k, step)
    release(channels.k, step)
    if SPEC.BIAS_COLS and not TILE.BIAS_STAYS:
        wait_full(channels.bias, step)
        release(channels.bias, step)
    if TILE.BITS_STAGES > 0:
        receive_bits(channels.bits, step * TILE.CONSUMERS + INDEX)
    wait_full(channels.v, step)
    release(channels.v, step)


@gluon.jit
def consume(channels, operands, lse, results, call, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """A consumer warpgroup: the queries [64 INDEX, 64 INDEX + 64) of every tile."""
    i = 0
    step = 0
    bias_step = 0  # with BIAS_STAYS, of the last block of keys of the slab at hand
    work = hear(channels.ticker, 0, SPEC, TILE, INDEX)
    weights = gl.full([WARPGROUP_ROWS, TILE.BLOCK_N], 0.0, gl.float32, accumulator_layout(TILE.BLOCK_N))
    progress = Progress(
        new_rows(-INFINITY, SPEC, TILE.BLOCK_N), weights, no_bits(SPEC, TILE.BLOCK_N), new_output(work, SPEC)
    )
    while work.tile_last > 0:
        # The first block of keys, while the last values of the tile before are under way.
        pending = max(step - 1, 0)
        if SPEC.HAS_UPPER:
            for _ in range(work.last, work.tile_last):
                skip(channels, step, SPEC, TILE, INDEX)
                step += 1
        operand = as_operand(progress.weights, progress.bits, channels, SPEC)
        wait_full(channels.q, i)
        wait_full(channels.v, pending, i > 0)
        wait_full(channels.k, step)
        scores = multiply_keys(channels, i, step, SPEC, TILE, INDEX)
        output = multiply_values(channels, operand, progress.output, pending, SPEC)
        head = query_head(work, call, SPEC)
        sink = load_sink(work, call, SPEC)
        n = work.last - 1
        row_bias = load_row_bias(operands.bias, work, call, SPEC, TILE)
        queries = Queries(i, head, row_bias, bias_step + work.tile_last - 1)
        values = load_bias(channels.bias, row_bias, step, queries.kept_end - n, SPEC, TILE, INDEX)
        output = wait_values(output, SPEC)
        scores = warpgroup_mma_wait(0, deps=[scores])
        release(channels.k, step)
        if i > 0:
            release(channels.v, pending)
            store(operands, lse, results, output, progress.rows, call, SPEC, TILE, INDEX)
        output = new_output(work, SPEC)
        scores, scale = scale_scores(scores, values, head, output.start_m, n * TILE.BLOCK_N, call, SPEC)
        if n >= work.full_last or n < work.full_first:
            scores = mask_queries(scores, output.start_m, n * TILE.BLOCK_N, head.limits, SPEC, -INFINITY)
        rows, weights, _ = weigh(new_rows(sink, SPEC, TILE.BLOCK_N), scores, scale, SPEC)
        bits = kept_bits(channels, head, output.start_m, step, n, call, SPEC, TILE, INDEX)
        progress = Progress(rows, weights, bits, output)
        step += 1

        if SPEC.HAS_UPPER:
            for n in range(work.last - 2, max(work.full_last, work.first) - 1, -1):
                progress = visit(progress, queries, channels, step, n, call, SPEC, TILE, INDEX, True)
                step += 1
        for n in range(min(work.last - 1, work.full_last) - 1, max(work.full_first, work.first) - 1, -1):
            progress = visit(progress, queries, channels, step, n, call, SPEC, TILE, INDEX, False)
            step += 1
        if SPEC.HAS_LOWER:
            for n in range(min(work.last - 1, work.full_first) - 1, work.first - 1, -1):
                progress = visit(progress, queries, channels, step, n, call, SPEC, TILE, INDEX, True)
                step += 1
        release(channels.q, i)
        i += 1
        following = hear(channels.ticker, i, SPEC, TILE, INDEX)
        if TILE.BIAS_STAYS:
            if following.head != work.head or following.start_m != work.start_m:
                for k in range(work.tile_last - work.first):
                    release(channels.bias, bias_step + k)
                bias_step += work.tile_last - work.first
        work = following

    if SPEC.VARLEN:  # a program may have found no tile: then nothing waits for it, and it stores none of its rows
        pending = max(step - 1, 0)
        wait_full(channels.v, pending, i > 0)
    else:
        pending = step - 1
        wait_full(channels.v, pending)
    operand = as_operand(progress.weights, progress.bits, channels, SPEC)
    output = wait_values(multiply_values(channels, operand, progress.output, pending, SPEC), SPEC)
    store(operands, lse, results, output, progress.rows, call, SPEC, TILE, INDEX)
    tma.store_wait(0)


@gluon.jit
def attention_fwd(
    q, q_tail, k, k_tail, v, v_tail, bias, out, out_tail, lse, counter, call, SPEC: gl.constexpr, TILE: gl.constexpr
):  # fmt: skip
    """out = softmax(softmax_scale q k^T + bias + mask) v and lse = log sum exp of the scores.

    Grid: at most one program for each multiprocessor. Each computes tile after tile: 64 CONSUMERS rows of `out`
    (batch, heads_q, seqlen_q, head_dim_v) and `lse` (batch, heads_q, seqlen_q), or of packed sequences (1, heads_q,
    total_q, head_dim_v) and (heads_q, total_q); see schedule.py for which.
    """
    operands = Operands(q, q_tail, k, k_tail, v, v_tail, bias, out, out_tail)
    q_channel = new_channel(q, q_tail, TILE.Q_STAGES, TILE.CONSUMERS, TILE.CONSUMERS)
    k_channel = new_channel(k, k_tail, TILE.STAGES, 1, TILE.CONSUMERS)
    v_channel = new_channel(v, v_tail, TILE.STAGES, 1, TILE.CONSUMERS)
    if SPEC.BIAS_COLS:
        BIAS_PARTS: gl.constexpr = TILE.CONSUMERS if SPEC.BIAS_ROWS else 1
        bias_channel = new_channel(bias, None, TILE.BIAS_STAGES, BIAS_PARTS, TILE.CONSUMERS)
    else:
        bias_channel = 0
    if SPEC.TAIL_DV == 0 or SPEC.TAIL_DV == SPEC.BLOCK_DV:
        results = Results(new_tiles(out, TILE.CONSUMERS), 0)
    else:
        results = Results(new_tiles(out, TILE.CONSUMERS), new_tiles(out_tail, TILE.CONSUMERS))
    if TILE.BITS_STAGES > 0:
        bits_channel = new_bits(TILE.BITS_STAGES * TILE.CONSUMERS, TILE.BLOCK_N)
    else:
        bits_channel = 0
    channels = Channels(q_channel, k_channel, v_channel, bias_channel, new_ticker(SPEC, TILE), bits_channel)
    fence_async_shared()
    C0: gl.constexpr = 0
    C1: gl.constexpr = 1
    C2: gl.constexpr = 2
    C3: gl.constexpr = 3
    REGISTERS: gl.constexpr = TILE.REGISTERS
    if TILE.BITS_STAGES > 0:
        gl.static_assert(TILE.CONSUMERS == 2, "a drawer leaves registers for two consumers")
        gl.warp_specialize(
            [
                (consume, (channels, operands, lse, results, call, SPEC, TILE, C0)),
                (consume, (channels, operands, lse, results, call, SPEC, TILE, C1)),
                (draw_ahead, (channels, call, SPEC, TILE)),
                (produce, (channels, operands, counter, call, SPEC, TILE)),
            ],
            [4, 4, 1],
            [REGISTERS, TILE.DRAWER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif TILE.CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (channels, operands, lse, results, call, SPEC, TILE, C0)),
                (consume, (channels, operands, lse, results, call, SPEC, TILE, C1)),
                (produce, (channels, operands, counter, call, SPEC, TILE)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    elif TILE.CONSUMERS == 3:
        gl.warp_specialize(
            [
                (consume, (channels, operands, lse, results, call, SPEC, TILE, C0)),
                (consume, (channels, operands, lse, results, call, SPEC, TILE, C1)),
                (consume, (channels, operands, lse, results, call, SPEC, TILE, C2)),
                (produce, (channels, operands, counter, call, SPEC, TILE)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (channels, operands, lse, results, call, SPEC, TILE, C0)),
                (consume, (channels, operands, lse, results, call, SPEC, TILE, C1)),
                (consume, (channels, operands, lse, results, call, SPEC, TILE, C2)),
                (consume, (channels, operands, lse, results, call, SPEC, TILE, C3)),
                (produce, (channels, operands, counter, call, SPEC, TILE)),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )
