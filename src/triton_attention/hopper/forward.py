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

from triton_attention._compat import copy_to_global
from triton_attention.hopper.bias import load_bias, load_row_bias
from triton_attention.hopper.channel import coordinates, new_channel, new_tiles, release, send, tile_of, wait_full
from triton_attention.hopper.correction import correct
from triton_attention.hopper.dropout import draw, drop, new_bits, no_bits, receive_bits, send_bits
from triton_attention.hopper.heads import load_seed, load_sink, query_head
from triton_attention.hopper.layouts import (
    WARPGROUP_ROWS,
    accumulator_layout,
    operand_layout,
    rows_layout,
)
from triton_attention.hopper.mask import mask_queries
from triton_attention.hopper.schedule import (
    announce,
    hear,
    new_ticker,
    next_tile,
    place_of_keys,
    place_of_queries,
    tile_range,
)
from triton_attention.hopper.softmax import INFINITY, finish, new_rows, scale_scores, weigh

PRODUCER_REGISTERS = gl.constexpr(24)  # of a thread: it holds addresses alone


class Operands(NamedTuple):
    """Tensor descriptors; those of the tail of the head dimension are None where there is none."""

    q: object
    q_tail: object
    k: object
    k_tail: object
    v: object
    v_tail: object
    bias: object  # or a `BiasTensor`, or None
    out: object
    out_tail: object


class Channels(NamedTuple):
    """What the producer sends, and a drawer."""

    q: object
    k: object
    v: object
    bias: object
    ticker: object
    bits: object  # from a drawer; 0 where there is none


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
def send_queries(channels, operands, i, work, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    batch, start_m = place_of_queries(work.start_m, work.batch, work.sequence, SPEC)
    send(channels.q, operands.q, operands.q_tail, i, batch, work.head, start_m, 0, TILE.CONSUMERS)


@gluon.jit
def produce(channels, operands, counter, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The producer warp: the operands of one tile after the other, from the last block of keys to the first."""
    BIAS_PARTS: gl.constexpr = TILE.CONSUMERS if SPEC.BIAS_ROWS else 1
    tile, end = tile_range(call, SPEC, TILE)
    i = 0
    step = 0
    bias_step = 0
    slab_changes = True
    tile, work = announce(channels.ticker, 0, tile, end, counter, call, SPEC, TILE)
    if TILE.Q_STAGES > 1:
        send_queries(channels, operands, 0, work, call, SPEC, TILE)
    while work.tile_last > 0:
        if TILE.Q_STAGES == 1:
            send_queries(channels, operands, i, work, call, SPEC, TILE)
        head_kv = work.head // call.group
        following = work
        for n in range(work.tile_last - 1, work.first - 1, -1):
            start_n = n * TILE.BLOCK_N
            batch_kv, row_kv = place_of_keys(start_n, work.batch, work.sequence, SPEC)
            send(channels.k, operands.k, operands.k_tail, step, batch_kv, head_kv, row_kv, 0, 1)
            if SPEC.BIAS_COLS:
                bias_m = work.start_m if SPEC.BIAS_ROWS else 0
                if TILE.BIAS_STAYS:
                    if slab_changes:
                        send(
                            channels.bias, operands.bias, None, bias_step, work.batch, work.head, bias_m, start_n,
                            BIAS_PARTS,
                        )  # fmt: skip
                        bias_step += 1
                else:
                    send(channels.bias, operands.bias, None, step, work.batch, work.head, bias_m, start_n, BIAS_PARTS)
            send(channels.v, operands.v, operands.v_tail, step, batch_kv, head_kv, row_kv, 0, 1)
            step += 1
            # The next tile is chosen early, so that its queries are there in time, but not before the consumers have
            # begun with this one: they still need the queries of the last.
            if n == max(work.tile_last - 1 - TILE.STAGES, work.first):
                tile = next_tile(tile, end, counter, SPEC, TILE)
                tile, following = announce(channels.ticker, i + 1, tile, end, counter, call, SPEC, TILE)
                if TILE.Q_STAGES > 1 and following.tile_last > 0:
                    send_queries(channels, operands, i + 1, following, call, SPEC, TILE)
        slab_changes = following.head != work.head or following.start_m != work.start_m
        work = following
        i += 1


@gluon.jit
def draw_ahead(channels, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The drawer, a warpgroup: what dropout keeps of the blocks of keys of one tile after the other, the last block
    first, for each consumer. Those that a consumer lets pass too, so that both sides count alike."""
    CONSUMERS: gl.constexpr = TILE.CONSUMERS
    i = 0
    message = 0
    seed = load_seed(call, SPEC)
    work = hear(channels.ticker, 0, SPEC, TILE, 0)
    while work.tile_last > 0:
        number = work.batch * call.heads_q + work.head
        for n in range(work.tile_last - 1, work.first - 1, -1):
            for consumer in gl.static_range(CONSUMERS):
                start_m = work.start_m + consumer * WARPGROUP_ROWS
                bits = draw(seed, number, start_m, n * TILE.BLOCK_N, call, SPEC, TILE.BLOCK_N, False, False)
                send_bits(channels.bits, message + consumer, bits)
            message += CONSUMERS
        i += 1
        work = hear(channels.ticker, i, SPEC, TILE, 0)


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
def as_operand(weights, bits, channels, SPEC: gl.constexpr):
    """The weights that dropout keeps as the left operand of a product. They travel from block to block as float32:
    pairs of 16-bit numbers that cross a loop are taken apart and put together again."""
    weights = drop(weights.to(channels.v.tiles.dtype), bits, SPEC)
    return gl.convert_layout(weights, operand_layout(SPEC.BLOCK_DV))


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


@gluon.jit
def visit(
    rows, weights, bits, output, channels, head, row_bias, kept_end, i, step, n, call, SPEC: gl.constexpr,
    TILE: gl.constexpr, INDEX: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Take in block n of the keys: its softmax runs under the product of the weights of the block before with v."""
    operand = as_operand(weights, bits, channels, SPEC)
    wait_full(channels.v, step - 1)
    wait_full(channels.k, step)
    scores = multiply_keys(channels, i, step, SPEC, TILE, INDEX)
    output = multiply_values(channels, operand, output, step - 1, SPEC)
    values = load_bias(channels.bias, row_bias, step, kept_end - n, SPEC, TILE, INDEX)
    bits = kept_bits(channels, head, output.start_m, step, n, call, SPEC, TILE, INDEX)
    scores = warpgroup_mma_wait(2 if SPEC.TAIL_DV > 0 else 1, deps=[scores])
    release(channels.k, step)
    scores, scale = scale_scores(scores, values, head, output.start_m, n * TILE.BLOCK_N, call, SPEC)
    if MASKED:
        scores = mask_queries(scores, output.start_m, n * TILE.BLOCK_N, head.limits, SPEC, -INFINITY)
    rows, weights, correction = weigh(rows, scores, scale, SPEC)
    output = wait_values(output, SPEC)
    release(channels.v, step - 1)
    return rows, weights, bits, corrected(output, correction, SPEC)


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
    rows = new_rows(-INFINITY, SPEC, TILE.BLOCK_N)
    weights = gl.full([WARPGROUP_ROWS, TILE.BLOCK_N], 0.0, gl.float32, accumulator_layout(TILE.BLOCK_N))
    bits = no_bits(SPEC, TILE.BLOCK_N)
    output = new_output(work, SPEC)
    while work.tile_last > 0:
        # The first block of keys, while the last values of the tile before are under way.
        pending = max(step - 1, 0)
        if SPEC.HAS_UPPER:
            for _ in range(work.last, work.tile_last):
                skip(channels, step, SPEC, TILE, INDEX)
                step += 1
        operand = as_operand(weights, bits, channels, SPEC)
        wait_full(channels.q, i)
        wait_full(channels.v, pending, i > 0)
        wait_full(channels.k, step)
        scores = multiply_keys(channels, i, step, SPEC, TILE, INDEX)
        output = multiply_values(channels, operand, output, pending, SPEC)
        head = query_head(work, call, SPEC)
        sink = load_sink(work, call, SPEC)
        row_bias = load_row_bias(operands.bias, work, call, SPEC, TILE)
        n = work.last - 1
        kept_end = bias_step + work.tile_last - 1  # with BIAS_STAYS, less n: where block n of the bias is
        values = load_bias(channels.bias, row_bias, step, kept_end - n, SPEC, TILE, INDEX)
        output = wait_values(output, SPEC)
        scores = warpgroup_mma_wait(0, deps=[scores])
        release(channels.k, step)
        if i > 0:
            release(channels.v, pending)
            store(operands, lse, results, output, rows, call, SPEC, TILE, INDEX)
        output = new_output(work, SPEC)
        scores, scale = scale_scores(scores, values, head, output.start_m, n * TILE.BLOCK_N, call, SPEC)
        if n >= work.full_last or n < work.full_first:
            scores = mask_queries(scores, output.start_m, n * TILE.BLOCK_N, head.limits, SPEC, -INFINITY)
        rows, weights, _ = weigh(new_rows(sink, SPEC, TILE.BLOCK_N), scores, scale, SPEC)
        bits = kept_bits(channels, head, output.start_m, step, n, call, SPEC, TILE, INDEX)
        step += 1

        if SPEC.HAS_UPPER:
            for n in range(work.last - 2, max(work.full_last, work.first) - 1, -1):
                rows, weights, bits, output = visit(
                    rows, weights, bits, output, channels, head, row_bias, kept_end, i, step, n, call, SPEC, TILE,
                    INDEX, True,
                )  # fmt: skip
                step += 1
        for n in range(min(work.last - 1, work.full_last) - 1, max(work.full_first, work.first) - 1, -1):
            rows, weights, bits, output = visit(
                rows, weights, bits, output, channels, head, row_bias, kept_end, i, step, n, call, SPEC, TILE,
                INDEX, False,
            )  # fmt: skip
            step += 1
        if SPEC.HAS_LOWER:
            for n in range(min(work.last - 1, work.full_first) - 1, work.first - 1, -1):
                rows, weights, bits, output = visit(
                    rows, weights, bits, output, channels, head, row_bias, kept_end, i, step, n, call, SPEC, TILE,
                    INDEX, True,
                )  # fmt: skip
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
    output = multiply_values(channels, as_operand(weights, bits, channels, SPEC), output, pending, SPEC)
    output = wait_values(output, SPEC)
    store(operands, lse, results, output, rows, call, SPEC, TILE, INDEX)
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
