"""The backward kernel that owns queries: dQ, summed over the keys in a fixed order, and the gradient of a bias that
nothing shares.

It computes scores and dP once more. So dQ is the same bit for bit in every run, and needs no sums in memory; see
backward.py for the equations. Scores are not transposed here: dS, in registers, is the left operand of the product
with K.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma_wait

from triton_attention._compat import copy_to_global
from triton_attention.hopper.backward_call import block_of_number, call_of_block
from triton_attention.hopper.backward_scores import exponents_of, load_key_bias, load_query_numbers
from triton_attention.hopper.channel import coordinates, new_channel, new_tiles, release, send, tile_of, wait_full
from triton_attention.hopper.columns import (
    Columns,
    accumulate,
    columns_of,
    leave_columns,
    multiply_transposed,
    new_sums,
    products,
    scaled,
    store_columns,
    wait_sums,
)
from triton_attention.hopper.dropout import draw, drop
from triton_attention.hopper.forward_producer import PRODUCER_REGISTERS
from triton_attention.hopper.heads import load_seed, load_slope
from triton_attention.hopper.layouts import (
    WARPGROUP_ROWS,
    accumulator_layout,
    columns_layout,
    operand_layout,
    rows_layout,
)
from triton_attention.hopper.mask import mask_queries
from triton_attention.hopper.narrow import multiply_narrow, narrow
from triton_attention.hopper.schedule import place_of_keys, place_of_queries, visible_range
from triton_attention.hopper.softmax import INFINITY, LOG2_E, add_bias


class Inputs(NamedTuple):
    """Tensor descriptors, those of matrices as `Columns`, and a pointer."""

    q: object
    k: object
    v: object
    dout: object
    bias: object  # or a `BiasTensor` of one number a key, or None
    rows: object  # a pointer to the numbers of the queries: see `attention_bwd_rows`


class Channels(NamedTuple):
    """What the producer sends: queries once, keys block by block."""

    q: object
    dout: object
    k: object
    v: object
    bias: object


class Block(NamedTuple):
    """The queries of a program, and the blocks [first, last) of keys that some of them see; those in
    [full_first, full_last) all of them see, so that they need no mask."""

    start_m: object
    head: object
    batch: object
    first: object
    full_first: object
    full_last: object
    last: object
    sequence: object  # a schedule.Sequence where they are packed, else 0


@gluon.jit
def block_of_program(call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The `Block` that a program owns."""
    BLOCK_M: gl.constexpr = TILE.CONSUMERS * WARPGROUP_ROWS
    BLOCK_N: gl.constexpr = TILE.BLOCK_N
    start_m, head, batch, sequence = block_of_number(gl.program_id(0), call, False, BLOCK_M, SPEC)
    begin, full_begin, full_end, end = visible_range(
        start_m, call.seqlen_q, call.seqlen_k, call.lower, call.upper, SPEC.HAS_LOWER, SPEC.HAS_UPPER, BLOCK_M, BLOCK_N
    )
    return Block(
        start_m, head, batch, begin // BLOCK_N, gl.cdiv(full_begin, BLOCK_N), full_end // BLOCK_N,
        gl.cdiv(end, BLOCK_N), sequence,
    )  # fmt: skip


@gluon.jit
def produce(channels, inputs, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The producer warp."""
    CONSUMERS: gl.constexpr = TILE.CONSUMERS
    block = block_of_program(call, SPEC, TILE)
    batch = block.batch
    head_kv = block.head // call.group
    batch_q, row_q = place_of_queries(block.start_m, batch, block.sequence, SPEC)
    send(channels.q, inputs.q.block, inputs.q.tail, 0, batch_q, block.head, row_q, 0, CONSUMERS)
    step = 0
    for n in range(block.first, block.last):
        start_n = n * TILE.BLOCK_N
        batch_kv, row_kv = place_of_keys(start_n, batch, block.sequence, SPEC)
        send(channels.k, inputs.k.block, inputs.k.tail, step, batch_kv, head_kv, row_kv, 0, 1)
        if SPEC.BIAS_ROWS:
            send(channels.bias, inputs.bias, None, step, batch, block.head, block.start_m, start_n, CONSUMERS)
        if step == 0:
            send(channels.dout, inputs.dout.block, inputs.dout.tail, 0, batch_q, block.head, row_q, 0, CONSUMERS)
        send(channels.v, inputs.v.block, inputs.v.tail, step, batch_kv, head_kv, row_kv, 0, 1)
        step += 1


@gluon.jit
def add_block_bias(exponents, key_bias, channels, step, SPEC: gl.constexpr, INDEX: gl.constexpr):
    """Exponents with the bias of a step, whose place is free then, or that of the keys."""
    if SPEC.BIAS_ROWS:
        wait_full(channels.bias, step)
        values = tile_of(channels.bias.tiles, channels.bias, step, INDEX).load(accumulator_layout(exponents.shape[1]))
        release(channels.bias, step)
        exponents = add_bias(exponents, values, SPEC)
    elif SPEC.BIAS != "none":
        exponents += key_bias[None, :]
    return exponents


@gluon.jit
def consume(
    channels, inputs, dq, dbias, staging, call, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr
):  # fmt: skip
    """A consumer warpgroup: the queries [64 INDEX, 64 INDEX + 64) of the block."""
    BLOCK_N: gl.constexpr = TILE.BLOCK_N
    block = block_of_program(call, SPEC, TILE)
    start_m = block.start_m + INDEX * WARPGROUP_ROWS
    sums = new_sums(SPEC.BLOCK_D, SPEC.TAIL_D)
    zero = gl.full([WARPGROUP_ROWS, BLOCK_N], 0.0, gl.float32, accumulator_layout(BLOCK_N))
    numbers = start_m + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(BLOCK_N))
    lse, negative_delta = load_query_numbers(inputs.rows, block.batch, block.head, numbers, call, SPEC)
    slope = load_slope(block.batch, block.head, call, SPEC) * LOG2_E
    seed = load_seed(call, SPEC)
    matrix = block.batch * call.heads_q + block.head
    q = columns_of(channels.q, 0, INDEX, SPEC.TAIL_D)
    dout = columns_of(channels.dout, 0, INDEX, SPEC.TAIL_DV)
    wait_full(channels.q, 0)
    wait_full(channels.dout, 0, block.last > block.first)
    step = 0
    for n in range(block.first, block.last):
        start_n = n * BLOCK_N
        k = columns_of(channels.k, step, 0, SPEC.TAIL_D)
        v = columns_of(channels.v, step, 0, SPEC.TAIL_DV)
        wait_full(channels.k, step)
        scores = multiply_transposed(q, k, zero, False, SPEC.TAIL_D)
        keys = start_n + gl.arange(0, BLOCK_N, layout=columns_layout(BLOCK_N))
        key_bias = load_key_bias(inputs.bias, block.batch, block.head, keys, call, SPEC)
        wait_full(channels.v, step)
        # dP - delta: the product is added to -delta, or with dropout, which comes between, the other way round.
        if SPEC.DROPOUT:
            dweights = zero
        else:
            _, dweights = gl.broadcast(zero, negative_delta[:, None])
        dweights = multiply_transposed(dout, v, dweights, not SPEC.DROPOUT, SPEC.TAIL_DV)
        bits = draw(seed, matrix, start_m, start_n, call, SPEC, BLOCK_N, False)
        scores = warpgroup_mma_wait(products(SPEC.TAIL_DV), deps=[scores])
        exponents, derivative = exponents_of(scores, lse[:, None], slope, start_m, start_n, call, SPEC, False)
        exponents = add_block_bias(exponents, key_bias, channels, step, SPEC, INDEX)
        if n < block.full_first or n >= block.full_last:
            exponents = mask_queries(exponents, start_m, start_n, call, SPEC, -INFINITY)
        weights = narrow(gl.exp2(exponents) * derivative, q.block.dtype)
        dweights = warpgroup_mma_wait(0, deps=[dweights])
        release(channels.v, step)
        if SPEC.DROPOUT:
            dweights = drop(dweights, bits, SPEC) + negative_delta[:, None]
        dscores = multiply_narrow(weights, dweights)
        operand = gl.convert_layout(dscores, operand_layout(SPEC.BLOCK_D))
        sums = accumulate(operand, k, sums, SPEC.TAIL_D)
        if SPEC.DBIAS == "tile":
            tma.store_wait(0)
            tile = staging.index(INDEX)
            tile.reshape([WARPGROUP_ROWS, BLOCK_N]).store(dscores)
            fence_async_shared()
            copy_to_global(dbias, [block.batch, block.head, start_m, start_n], tile)
        sums = wait_sums(sums, SPEC.TAIL_D)
        release(channels.k, step)
        step += 1
    leave_columns(channels.q, 0, INDEX, scaled(sums, call.softmax_scale, SPEC.TAIL_D), SPEC.TAIL_D)
    fence_async_shared()
    batch, row = place_of_queries(start_m, block.batch, block.sequence, SPEC)
    store_columns(dq, coordinates(dq.block, batch, block.head, row, 0), channels.q, 0, INDEX)
    tma.store_wait(0)


@gluon.jit
def attention_bwd_queries(
    q, q_tail, k, k_tail, v, v_tail, dout, dout_tail, rows, bias, dq, dq_tail, dbias, call, SPEC: gl.constexpr,
    TILE: gl.constexpr,
):  # fmt: skip
    """dQ = softmax_scale dS K.

    Grid: one program for each block of 64 CONSUMERS queries of each head of each batch entry. It owns these rows of
    `dq`, and with SPEC.DBIAS == "tile" of `dbias` (batch, heads_q, seqlen_q, seqlen_k), which it writes where a query
    sees a key. Of packed sequences the grid has a program for each block that they may have, see `call_of_block`.
    """
    if SPEC.VARLEN:
        call = call_of_block(gl.program_id(0), call, False, TILE.CONSUMERS * WARPGROUP_ROWS, SPEC)
    STAGES: gl.constexpr = TILE.STAGES
    CONSUMERS: gl.constexpr = TILE.CONSUMERS
    inputs = Inputs(Columns(q, q_tail), Columns(k, k_tail), Columns(v, v_tail), Columns(dout, dout_tail), bias, rows)
    dq = Columns(dq, dq_tail)
    if SPEC.BIAS_ROWS:
        bias_channel = new_channel(bias, None, STAGES, CONSUMERS, CONSUMERS)
    else:
        bias_channel = 0
    channels = Channels(
        new_channel(q, q_tail, 1, CONSUMERS, 1),
        new_channel(dout, dout_tail, 1, CONSUMERS, 1),
        new_channel(k, k_tail, STAGES, 1, CONSUMERS),
        new_channel(v, v_tail, STAGES, 1, CONSUMERS),
        bias_channel,
    )
    if SPEC.DBIAS == "tile":
        staging = new_tiles(dbias, CONSUMERS)
    else:
        staging = 0
    fence_async_shared()
    C0: gl.constexpr = 0
    C1: gl.constexpr = 1
    C2: gl.constexpr = 2
    REGISTERS: gl.constexpr = TILE.REGISTERS
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (channels, inputs, dq, dbias, staging, call, SPEC, TILE, C0)),
                (consume, (channels, inputs, dq, dbias, staging, call, SPEC, TILE, C1)),
                (produce, (channels, inputs, call, SPEC, TILE)),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (channels, inputs, dq, dbias, staging, call, SPEC, TILE, C0)),
                (consume, (channels, inputs, dq, dbias, staging, call, SPEC, TILE, C1)),
                (consume, (channels, inputs, dq, dbias, staging, call, SPEC, TILE, C2)),
                (produce, (channels, inputs, call, SPEC, TILE)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )
