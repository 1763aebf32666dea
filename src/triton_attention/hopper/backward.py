"""The backward kernel: the gradients of k, v and of a bias that nothing shares, in one pass over the queries; and of q.

With P the probabilities and dP = dO V^T, the gradient of the scores is dS = P (dP - delta), where
delta = rowsum(dO O) - dLSE. Then dQ = softmax_scale dS K, dK = softmax_scale dS^T Q, dV = P^T dO.

A program takes one block of keys, or one after the other. Its two or three consumer warpgroups, 64 keys each, hold dK
and dV in registers and compute transposed scores, so that P^T and dS^T are operands in registers of the products that
make dV and dK. One more warpgroup assists: it copies the operands into shared memory, makes dQ of the dS that the
consumers leave there, and adds it to the sum over all keys in global memory. So three or four streams of matrix
products are under way, and wait for each other through barriers alone. Where dQ is made apart, in a fixed order (see
backward_queries.py), a producer warp that copies takes the place of that warpgroup.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_attention._compat import add_to_global, copy_to_global, copy_to_shared, reinterpret
from triton_attention.hopper.backward_call import call_of_own_block
from triton_attention.hopper.backward_walk import (
    announce,
    block_of,
    first_step,
    following,
    new_turns,
    no_ticket,
    num_blocks,
    number_of,
    seen_by,
    ticket_with,
)
from triton_attention.hopper.channel import (
    Channel,
    bytes_of,
    coordinates,
    new_barriers,
    new_channel,
    new_tiles,
    release,
    send,
    tile_of,
    wait_empty,
    wait_full,
    whole_tile,
)
from triton_attention.hopper.dropout import draw, mark
from triton_attention.hopper.heads import load_seed, load_slope
from triton_attention.hopper.layouts import (
    WARPGROUP_ROWS,
    accumulator_layout,
    columns_layout,
    operand_layout,
    rows_layout,
)
from triton_attention.hopper.narrow import multiply_marked, multiply_narrow, narrow, unmarked, widen
from triton_attention.hopper.rows import PANEL
from triton_attention.hopper.schedule import first_tile, place_of_keys, place_of_queries
from triton_attention.hopper.softmax import INFINITY, LOG2_E, add_bias, allowed, cap_scores, distances, opaque_zero


class Inputs(NamedTuple):
    """Tensor descriptors; `rows` has two numbers a query, see `attention_bwd_rows`."""

    q: object
    k: object
    v: object
    dout: object
    rows: object
    bias: object  # or a `BiasTensor` of one number a key, or None


class Gradients(NamedTuple):
    """Tensor descriptors."""

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
def rows_origin(batch, head, call, SPEC: gl.constexpr):
    """(where the two numbers of each of a head's queries begin, how many rows there are with the padding)."""
    if SPEC.VARLEN:
        padded = (first_tile(call.packing.total_q, call.batch, WARPGROUP_ROWS) + 1) * WARPGROUP_ROWS
        origin = head.to(gl.int64) * 2 * padded + call.own.numbers
    else:
        padded = gl.cdiv(call.seqlen_q, WARPGROUP_ROWS) * WARPGROUP_ROWS
        origin = (batch * call.heads_q + head).to(gl.int64) * 2 * padded
    return origin, padded


@gluon.jit
def load_query_numbers(rows, batch, head, queries, call, SPEC: gl.constexpr):
    """(lse, -delta) of the queries of these numbers: those that do not exist get probabilities of 0."""
    origin, padded = rows_origin(batch, head, call, SPEC)
    pointers = rows + origin + queries
    lse = gl.load(pointers, mask=queries < call.seqlen_q, other=INFINITY)
    return lse, gl.load(pointers + padded, mask=queries < call.seqlen_q, other=0.0)


@gluon.jit
def send_keys(channels, inputs, i, block, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Copy the i-th block of keys and values of this program, when what was in their place has been left."""
    batch, row = place_of_keys(block.start_n, block.batch, block.sequence, SPEC)
    send(channels.k, inputs.k, None, i, batch, block.head_kv, row, 0, TILE.CONSUMERS)
    send(channels.v, inputs.v, None, i, batch, block.head_kv, row, 0, TILE.CONSUMERS)


@gluon.jit
def send_queries(channels, inputs, step, head, m, block, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Copy the operands of a step, block m of the queries of a head, when consumers are done with what was there."""
    SLOTS: gl.constexpr = TILE.STAGES
    PARTS: gl.constexpr = TILE.CONSUMERS
    slot = step % SLOTS
    batch = block.batch
    start_m = m * TILE.BLOCK_M
    wait_empty(channels.q, step)
    full = channels.q.full.index(slot)
    if SPEC.BIAS_ROWS:
        mbarrier.expect(full, bytes_of(inputs.q) + 2 * bytes_of(inputs.rows) + PARTS * bytes_of(inputs.bias))
        for part in gl.static_range(PARTS):
            place = [batch, head, start_m, block.start_n + part * WARPGROUP_ROWS]
            copy_to_shared(inputs.bias, place, full, channels.bias.index(slot * PARTS + part))
    else:
        mbarrier.expect(full, bytes_of(inputs.q) + 2 * bytes_of(inputs.rows))
    if SPEC.VARLEN:
        first_number = call.own.numbers + start_m
        numbers_batch = 0
    else:
        first_number = start_m
        numbers_batch = batch
    for number in gl.static_range(2):
        place = [numbers_batch, head, number, first_number]
        copy_to_shared(inputs.rows, place, full, channels.rows.index(slot * 2 + number))
    batch, start_m = place_of_queries(start_m, batch, block.sequence, SPEC)
    place = coordinates(inputs.q, batch, head, start_m, 0)
    copy_to_shared(inputs.q, place, full, channels.q.tiles.index(slot))
    full = channels.dout.full.index(slot)
    mbarrier.expect(full, bytes_of(inputs.dout))
    copy_to_shared(inputs.dout, place, full, channels.dout.tiles.index(slot))


@gluon.jit
def load_numbers(tiles, index):
    """(BLOCK_M,) numbers of the queries, one for each column of transposed scores."""
    SHAPE: gl.constexpr = tiles.shape
    return tiles.index(index).reshape([SHAPE[4]]).load(columns_layout(SHAPE[4]))


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
def weigh(
    scores, lse, key_bias, slope, start_m, start_n, channels, step, call, SPEC: gl.constexpr, TILE: gl.constexpr,
    INDEX: gl.constexpr,
):  # fmt: skip
    """(exp(scores - lse) of a block, transposed: (64, BLOCK_M), float32; the derivative of a softcap)."""
    scores, derivative = cap_scores(scores, call, SPEC)
    exponents = scores - lse[None, :]
    if SPEC.ALIBI:
        exponents -= slope * distances(start_n, start_m + call.extras.diagonal, TILE.BLOCK_M)
    if SPEC.BIAS_ROWS:
        tile = channels.bias.index(step % TILE.STAGES * TILE.CONSUMERS + INDEX)
        tile = tile.reshape([TILE.BLOCK_M, WARPGROUP_ROWS]).permute((1, 0))
        values = tile.load(accumulator_layout(TILE.BLOCK_M))
        exponents = add_bias(exponents, values, SPEC)
    elif SPEC.BIAS != "none":
        exponents += key_bias[:, None]
    return gl.exp2(exponents), derivative


@gluon.jit
def mask_weights(weights, start_m, start_n, call, SPEC: gl.constexpr):
    """0 where a query may not see a key of [start_n, start_n + 64)."""
    BLOCK_M: gl.constexpr = weights.shape[1]
    queries = start_m - start_n + gl.arange(0, BLOCK_M, layout=columns_layout(BLOCK_M)) + opaque_zero()
    keys = gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(BLOCK_M))
    visible = allowed(
        queries[None, :], keys[:, None], call.seqlen_k - start_n, call.lower, call.upper, SPEC.HAS_LOWER, SPEC.HAS_UPPER
    )
    return gl.where(visible, weights, 0.0)


@gluon.jit
def multiply_values(channels, v, dout, zero, step, slot, SPEC: gl.constexpr):
    """Issue dP - delta of a block, transposed: the product V dO^T is added to -delta. With dropout dP alone."""
    wait_full(channels.dout, step)
    if SPEC.DROPOUT:
        dweights = zero
    else:
        dweights, _ = gl.broadcast(load_numbers(channels.rows, slot * 2 + 1)[None, :], zero)
    return warpgroup_mma(v, dout.permute((1, 0)), dweights, use_acc=not SPEC.DROPOUT, is_async=True)


@gluon.jit
def score_gradients(weights, dweights, channels, slot, SPEC: gl.constexpr):
    """dS in 16 bits, of the weights in 16 bits and what `multiply_values` made."""
    if SPEC.DROPOUT:
        dscores = multiply_marked(weights, dweights, load_numbers(channels.rows, slot * 2 + 1)[None, :])
    else:
        dscores = multiply_narrow(weights, dweights)
    return dscores


@gluon.jit
def bias_gradients(weights, dweights, channels, slot, SPEC: gl.constexpr):
    """The same in float32."""
    weights = widen(weights, SPEC)
    if SPEC.DROPOUT:
        negative_delta = load_numbers(channels.rows, slot * 2 + 1)[None, :]
        dscores = gl.maximum(weights, 0.0) * dweights + gl.abs(weights) * negative_delta
    else:
        dscores = weights * dweights
    return dscores


@gluon.jit
def store_key_dbias(pointer, dbias, batch, head, keys, call):
    """Write the gradient of a bias of one number a key."""
    origin = (batch * call.heads_q + head).to(gl.int64) * call.seqlen_k
    gl.store(pointer + origin + keys, dbias, mask=keys < call.seqlen_k)


@gluon.jit
def store_rows(descriptor, channel, i, values, block, start_n, SPEC: gl.constexpr, INDEX: gl.constexpr):
    """Write 64 rows of dK or dV, through the shared memory of this consumer's rows of the i-th K or V; at return the
    copy is under way."""
    SHAPE: gl.constexpr = values.shape
    tile = whole_tile(channel.tiles, channel, i, INDEX)
    tile.reshape([SHAPE[0], SHAPE[1]]).store(values.to(descriptor.dtype))
    fence_async_shared()
    batch, row = place_of_keys(start_n, block.batch, block.sequence, SPEC)
    copy_to_global(descriptor, coordinates(descriptor, batch, block.head_kv, row, 0), tile)


@gluon.jit
def skip(channels, step, steps, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """Let steps pass whose queries do not see this consumer's keys; their dS is 0. Returns the step after them."""
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    for _ in range(steps):
        wait_full(channels.q, step)
        wait_full(channels.dout, step)
        if SPEC.DQ == "added":
            tiles = channels.dscores.tiles
            zero = gl.full([WARPGROUP_ROWS, BLOCK_M], 0.0, tiles.dtype, accumulator_layout(BLOCK_M))
            wait_empty(channels.dscores, step)
            tile_of(tiles, channels.dscores, step, INDEX).permute((1, 0)).store(zero)
            fence_async_shared()
            mbarrier.arrive(channels.dscores.full.index(step % TILE.DSCORES_STAGES), count=1)
        release(channels.q, step)
        step += 1
    return step


@gluon.jit
def consume(channels, inputs, gradients, call, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """A consumer warpgroup: the keys [64 INDEX, 64 INDEX + 64) of each block."""
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    zero = gl.full([WARPGROUP_ROWS, BLOCK_M], 0.0, gl.float32, accumulator_layout(BLOCK_M))
    seed = load_seed(call, SPEC)
    step = 0
    i = 0
    number = gl.program_id(0)
    while number < num_blocks(call, SPEC, TILE):
        block = block_of(number, call, SPEC, TILE)
        start_n = block.start_n + INDEX * WARPGROUP_ROWS
        seen = seen_by(block, start_n, call, SPEC, TILE)
        dk = gl.full([WARPGROUP_ROWS, SPEC.BLOCK_D], 0.0, gl.float32, accumulator_layout(SPEC.BLOCK_D))
        dv = gl.full([WARPGROUP_ROWS, SPEC.BLOCK_DV], 0.0, gl.float32, accumulator_layout(SPEC.BLOCK_DV))
        keys = start_n + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(BLOCK_M))
        k = tile_of(channels.k.tiles, channels.k, i, INDEX)
        v = tile_of(channels.v.tiles, channels.v, i, INDEX)
        wait_full(channels.k, i)
        wait_full(channels.v, i)
        for member in range(call.group):
            head = block.head_kv * call.group + member
            matrix = block.batch * call.heads_q + head
            key_bias = load_key_bias(inputs.bias, block.batch, head, keys, call, SPEC)
            slope = load_slope(block.batch, head, call, SPEC) * LOG2_E
            dbias = gl.full([WARPGROUP_ROWS], 0.0, gl.float32, rows_layout(BLOCK_M))
            if SPEC.HAS_UPPER:
                step = skip(channels, step, seen.first - block.first, SPEC, TILE, INDEX)
            for m in range(seen.first, seen.last):
                start_m = m * BLOCK_M
                slot = step % TILE.STAGES
                bits = draw(seed, matrix, start_m, start_n, call, SPEC, BLOCK_M, True)
                q = tile_of(channels.q.tiles, channels.q, step, 0)
                dout = tile_of(channels.dout.tiles, channels.dout, step, 0)
                wait_full(channels.q, step)
                scores = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                lse = load_numbers(channels.rows, slot * 2)
                if TILE.EARLY:
                    dweights = multiply_values(channels, v, dout, zero, step, slot, SPEC)
                    scores = warpgroup_mma_wait(1, deps=[scores])
                else:
                    scores = warpgroup_mma_wait(0, deps=[scores])
                weights, derivative = weigh(
                    scores, lse, key_bias, slope, start_m, start_n, channels, step, call, SPEC, TILE, INDEX
                )
                if m < seen.full_first or m >= seen.full_last:
                    weights = mask_weights(weights, start_m, start_n, call, SPEC)
                weights = mark(weights, bits, SPEC)
                factors = narrow(weights * derivative, q.dtype)
                weights = narrow(weights, q.dtype)
                operand = gl.convert_layout(unmarked(weights, SPEC), operand_layout(SPEC.BLOCK_DV))
                if not TILE.EARLY:
                    dweights = multiply_values(channels, v, dout, zero, step, slot, SPEC)
                dv = warpgroup_mma(operand, dout, dv, is_async=True)
                dweights = warpgroup_mma_wait(1, deps=[dweights])
                if SPEC.DBIAS == "keys":
                    dbias += gl.sum(bias_gradients(weights, dweights, channels, slot, SPEC), 1)
                dscores = score_gradients(factors, dweights, channels, slot, SPEC)
                if SPEC.DQ == "added":
                    wait_empty(channels.dscores, step)
                    tile_of(channels.dscores.tiles, channels.dscores, step, INDEX).permute((1, 0)).store(dscores)
                    fence_async_shared()
                    mbarrier.arrive(channels.dscores.full.index(step % TILE.DSCORES_STAGES), count=1)
                operand = gl.convert_layout(dscores, operand_layout(SPEC.BLOCK_D))
                dk = warpgroup_mma(operand, q, dk, is_async=True)
                dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
                release(channels.q, step)
                step += 1
            if SPEC.HAS_LOWER:
                step = skip(channels, step, block.last - seen.last, SPEC, TILE, INDEX)
            if SPEC.DBIAS == "keys":
                store_key_dbias(gradients.dbias, dbias, block.batch, head, keys, call)

        # Where the assistant still reads K, dK takes the way of dV, after it, and K's place is free for the next keys.
        place_of_dk = channels.k
        if SPEC.DQ == "added":
            place_of_dk = channels.v
            release(channels.k, i)
        store_rows(gradients.dv, channels.v, i, dv, block, start_n, SPEC, INDEX)
        if SPEC.DQ == "added":
            tma.store_wait(0)
        store_rows(gradients.dk, place_of_dk, i, dk * call.softmax_scale, block, start_n, SPEC, INDEX)
        tma.store_wait(0)
        if SPEC.DQ != "added":
            release(channels.k, i)
        release(channels.v, i)
        i += 1
        number = number_of(channels.turns, i, call, SPEC, TILE)


@gluon.jit
def produce(channels, inputs, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """A producer warp: it copies the operands of one step after the other."""
    step = 0
    i = 0
    ticket = no_ticket(channels.turns, SPEC)
    number = gl.program_id(0)
    while number < num_blocks(call, SPEC, TILE):
        block = block_of(number, call, SPEC, TILE)
        if SPEC.VARLEN:  # perhaps no query sees them
            send_keys(channels, inputs, i, block, SPEC, TILE)
        for member in range(call.group):
            head = block.head_kv * call.group + member
            for m in range(block.first, block.last):
                send_queries(channels, inputs, step, head, m, block, call, SPEC, TILE)
                if not SPEC.VARLEN:
                    if member == 0 and m == block.first:  # after the queries, whose place is free before that of keys
                        send_keys(channels, inputs, i, block, SPEC, TILE)
                ticket = ticket_with(head, m, block, ticket, channels.turns, call, SPEC)
                step += 1
        i += 1
        announce(channels.turns, i, ticket, SPEC)
        number = number_of(channels.turns, i, call, SPEC, TILE)


@gluon.jit
def serve(channels, inputs, gradients, staging, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """What runs beside the consumers."""
    if SPEC.DQ == "added":
        assist(channels, inputs, gradients, staging, call, SPEC, TILE)
    else:
        produce(channels, inputs, call, SPEC, TILE)


@gluon.jit
def assist(channels, inputs, gradients, staging, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The warpgroup that serves the consumers: it copies their operands, and makes dQ of the dS that they leave.

    dS K of a block of queries is added to the sum over all keys, PIECES pieces of 64 columns. A piece lies in memory in
    the order in which the threads of a warpgroup hold it, so that none waits for another's bank of shared memory:
    `attention_bwd_dq` puts it in order.
    """
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    STAGES: gl.constexpr = TILE.STAGES
    PARTS: gl.constexpr = TILE.CONSUMERS
    COLUMNS: gl.constexpr = gradients.dq.block_type.shape[2] * PANEL // BLOCK_M
    PIECES: gl.constexpr = SPEC.BLOCK_D // COLUMNS
    ROWS: gl.constexpr = BLOCK_M * COLUMNS // PANEL
    K_PIECES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WARPGROUP_ROWS, COLUMNS], channels.k.tiles.dtype)
    EARLY_KEYS: gl.constexpr = TILE.KEYS_STAGES > 1
    turns = channels.turns
    last_block = num_blocks(call, SPEC, TILE)
    zero = gl.full([BLOCK_M, COLUMNS], 0.0, gl.float32, accumulator_layout(COLUMNS))
    blocks_m = gl.cdiv(call.seqlen_q, BLOCK_M)
    to_send = first_step(turns, call, SPEC, TILE)
    if EARLY_KEYS:
        send_keys(channels, inputs, 0, to_send.block, SPEC, TILE)
    for step in gl.static_range(STAGES):
        if to_send.number < last_block:
            send_queries(channels, inputs, step, to_send.head, to_send.m, to_send.block, call, SPEC, TILE)
            to_send = following(to_send, turns, call, SPEC, TILE)
    step = 0
    i = 0
    number = gl.program_id(0)
    while number < last_block:
        block = block_of(number, call, SPEC, TILE)
        if not EARLY_KEYS:
            send_keys(channels, inputs, i, block, SPEC, TILE)
        keys_are_due = True  # those of the next block, when its first queries have been sent
        wait_full(channels.k, i)
        for member in range(call.group):
            head = block.head_kv * call.group + member
            for m in range(block.first, block.last):
                if step > 0 and to_send.number < last_block:  # the consumers are about done with the step before
                    send_queries(
                        channels, inputs, step - 1 + STAGES, to_send.head, to_send.m, to_send.block, call, SPEC, TILE
                    )
                    to_send = following(to_send, turns, call, SPEC, TILE)
                if EARLY_KEYS:
                    if keys_are_due and to_send.i > i:
                        next_number = number_of(turns, i + 1, call, SPEC, TILE)
                        if next_number < last_block:
                            send_keys(channels, inputs, i + 1, block_of(next_number, call, SPEC, TILE), SPEC, TILE)
                        keys_are_due = False
                wait_full(channels.dscores, step)
                if SPEC.DBIAS == "tile":
                    for part in gl.static_range(PARTS):
                        place = [block.batch, head, m * BLOCK_M, block.start_n + part * WARPGROUP_ROWS]
                        tile = whole_tile(channels.dscores.tiles, channels.dscores, step, part)
                        copy_to_global(gradients.dbias, place, tile)
                for piece in range(PIECES):
                    dq = zero
                    for part in gl.static_range(PARTS):
                        dscores = tile_of(channels.dscores.tiles, channels.dscores, step, part)
                        k = tile_of(channels.k.tiles, channels.k, i, part)
                        k = reinterpret(k, k.dtype, [PIECES, WARPGROUP_ROWS, COLUMNS], K_PIECES).index(piece)
                        dq = warpgroup_mma(dscores, k, dq, use_acc=part > 0, is_async=True)
                    dq = warpgroup_mma_wait(0, deps=[dq])
                    if piece == 0:
                        tma.store_wait(0)  # the copies of the step before, and of dbias, have read
                    dq = dq.reshape([BLOCK_M // 64, 4, 2, 8, COLUMNS // 8, 4, 2])
                    dq = dq.permute((0, 4, 1, 3, 5, 2, 6)).reshape([ROWS, PANEL])
                    staging.index(piece).reshape([ROWS, PANEL]).store(dq)
                release(channels.dscores, step)
                fence_async_shared()
                first_row = ((block.batch * call.heads_q + head) * blocks_m + m) * PIECES * ROWS
                for piece in gl.static_range(PIECES):
                    add_to_global(gradients.dq, [0, 0, first_row + piece * ROWS, 0], staging.index(piece))
                step += 1
        i += 1
        number = number_of(turns, i, call, SPEC, TILE)
    tma.store_wait(0)


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
    q = new_channel(inputs.q, None, STAGES, 1, READERS)
    rows = new_tiles(inputs.rows, STAGES * 2)
    dout = Channel(new_tiles(inputs.dout, STAGES), 0, new_barriers(STAGES, 1), 0)  # emptied with q
    k = new_channel(inputs.k, None, TILE.KEYS_STAGES, CONSUMERS, CONSUMERS)
    v = new_channel(inputs.v, None, TILE.KEYS_STAGES, CONSUMERS, CONSUMERS)
    if EXCHANGES > 0:
        dscores = new_exchange(inputs.q.dtype, TILE.BLOCK_M, TILE.DSCORES_STAGES, EXCHANGES, CONSUMERS)
    else:
        dscores = 0
    turns = new_turns(counter, SPEC, TILE, 4 if SPEC.DQ == "added" else 1)
    return Channels(q, rows, bias_tiles, dout, k, v, dscores, turns)


@gluon.jit
def attention_bwd(q, k, v, dout, rows, bias, dq, dk, dv, dbias, counter, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """dK = softmax_scale dS^T Q and dV = P^T dO, summed over the query heads that share a key head; and sums of dS K.

    Grid: any number of programs, and a `counter` of 0. Together they visit each block of 64 CONSUMERS keys of each key
    head of each batch entry once, and who visits it owns these rows of `dk` and `dv`. With SPEC.DBIAS == "tile" also
    these columns of `dbias` (batch, heads_q, seqlen_q, seqlen_k), written where a key is visible; with "keys" the sums
    of dS over the queries, `dbias` (batch, heads_q, seqlen_k). With SPEC.DQ == "added" a program adds its share to
    `dq`, in no fixed order; everything else is the same bit for bit in every run. Of packed sequences, which have no
    counter, the grid has a program for each block that they may have, see `call_of_own_block`.
    """
    if SPEC.VARLEN:
        call = call_of_own_block(call, True, TILE.CONSUMERS * WARPGROUP_ROWS, SPEC)
    inputs = Inputs(q, k, v, dout, rows, bias)
    gradients = Gradients(dq, dk, dv, dbias)
    ADDS_DQ: gl.constexpr = SPEC.DQ == "added"
    channels = new_channels(inputs, counter, SPEC, TILE, TILE.CONSUMERS, TILE.CONSUMERS if ADDS_DQ else 0)
    if ADDS_DQ:
        staging = new_tiles(dq, TILE.BLOCK_M * SPEC.BLOCK_D // (dq.block_type.shape[2] * PANEL))
    else:
        staging = 0
    fence_async_shared()
    C0: gl.constexpr = 0
    C1: gl.constexpr = 1
    C2: gl.constexpr = 2
    REGISTERS: gl.constexpr = TILE.REGISTERS
    SERVING_WARPS: gl.constexpr = 4 if ADDS_DQ else 1
    if TILE.CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (channels, inputs, gradients, call, SPEC, TILE, C0)),
                (consume, (channels, inputs, gradients, call, SPEC, TILE, C1)),
                (serve, (channels, inputs, gradients, staging, call, SPEC, TILE)),
            ],
            [4, SERVING_WARPS],
            [REGISTERS, TILE.SERVING_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (channels, inputs, gradients, call, SPEC, TILE, C0)),
                (consume, (channels, inputs, gradients, call, SPEC, TILE, C1)),
                (consume, (channels, inputs, gradients, call, SPEC, TILE, C2)),
                (serve, (channels, inputs, gradients, staging, call, SPEC, TILE)),
            ],
            [4, 4, SERVING_WARPS],
            [REGISTERS, REGISTERS, TILE.SERVING_REGISTERS],
        )
