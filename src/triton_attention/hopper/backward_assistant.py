"""What runs beside the consumers of the kernels that own keys? What copies their operands, and may make dQ."""

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
from triton_attention.hopper.backward_walk import (
    Step,
    announce,
    block_of,
    first_number,
    first_step,
    following,
    no_ticket,
    num_blocks,
    number_of,
    takes_turns,
    ticket_with,
)
from triton_attention.hopper.channel import (
    bytes_of,
    coordinates,
    new_tiles,
    release,
    send,
    tile_of,
    wait_empty,
    wait_full,
    whole_tile,
)
from triton_attention.hopper.columns import copy_columns, new_sums
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout
from triton_attention.hopper.rows import PANEL
from triton_attention.hopper.schedule import place_of_keys, place_of_queries


@gluon.jit
def send_keys(channels, inputs, i, block, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Copy the i-th block of keys and values of this program, when what was in their place has been left."""
    batch, row = place_of_keys(block.start_n, block.batch, block.sequence, SPEC)
    send(channels.k, inputs.k.block, inputs.k.tail, i, batch, block.head_kv, row, 0, TILE.CONSUMERS)
    send(channels.v, inputs.v.block, inputs.v.tail, i, batch, block.head_kv, row, 0, TILE.CONSUMERS)


@gluon.jit
def send_queries(channels, inputs, number, step, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Copy the operands of a `Step`, the one of this number, when consumers are done with what was in their place."""
    PARTS: gl.constexpr = TILE.CONSUMERS
    slot = number % TILE.STAGES
    head, block = step.head, step.block
    batch = block.batch
    start_m = step.m * TILE.BLOCK_M
    BYTES_OF_Q: gl.constexpr = bytes_of(inputs.q.block) + bytes_of(inputs.q.tail)
    wait_empty(channels.q, number)
    full = channels.q.full.index(slot)
    if SPEC.BIAS_ROWS:
        mbarrier.expect(full, BYTES_OF_Q + 2 * bytes_of(inputs.rows) + PARTS * bytes_of(inputs.bias))
        for part in gl.static_range(PARTS):
            place = [batch, head, start_m, block.start_n + part * WARPGROUP_ROWS]
            copy_to_shared(inputs.bias, place, full, channels.bias.index(slot * PARTS + part))
    else:
        mbarrier.expect(full, BYTES_OF_Q + 2 * bytes_of(inputs.rows))
    if SPEC.VARLEN:
        first_number = block.numbers + start_m
        numbers_batch = 0
    else:
        first_number = start_m
        numbers_batch = batch
    for row in gl.static_range(2):
        place = [numbers_batch, head, row, first_number]
        copy_to_shared(inputs.rows, place, full, channels.rows.index(slot * 2 + row))
    batch, start_m = place_of_queries(start_m, batch, block.sequence, SPEC)
    place = coordinates(inputs.q.block, batch, head, start_m, 0)
    copy_columns(inputs.q, place, full, channels.q, slot)
    full = channels.dout.full.index(slot)
    mbarrier.expect(full, bytes_of(inputs.dout.block) + bytes_of(inputs.dout.tail))
    copy_columns(inputs.dout, place, full, channels.dout, slot)


@gluon.jit
def produce(channels, inputs, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """A producer warp: it copies the operands of one step after the other."""
    step = 0
    i = 0
    ticket = no_ticket(channels.turns, SPEC)
    number = first_number(call, SPEC, TILE)
    while number < num_blocks(call, SPEC, TILE):
        block = block_of(number, call, SPEC, TILE)
        if SPEC.VARLEN and not takes_turns(SPEC):  # perhaps no query sees them
            send_keys(channels, inputs, i, block, SPEC, TILE)
        for member in range(call.group):
            head = block.head_kv * call.group + member
            for m in range(block.first, block.last):
                sent = Step(head, m, block, number, i, ticket)
                send_queries(channels, inputs, step, sent, call, SPEC, TILE)
                if takes_turns(SPEC) or not SPEC.VARLEN:
                    if member == 0 and m == block.first:  # after the queries, whose place is free before that of keys
                        send_keys(channels, inputs, i, block, SPEC, TILE)
                ticket = ticket_with(sent, channels.turns, call, SPEC)
                step += 1
        i += 1
        announce(channels.turns, i, ticket, SPEC)
        number = number_of(channels.turns, i, call, SPEC, TILE)


@gluon.jit
def dscores_of(channels, step, PART: gl.constexpr, HALF: gl.constexpr):
    """The HALF-th 64 queries of dS that a consumer left."""
    START: gl.constexpr = HALF * WARPGROUP_ROWS
    return tile_of(channels.dscores.tiles, channels.dscores, step, PART).slice(START, WARPGROUP_ROWS)


@gluon.jit
def leave_piece(tile, dq, HALF: gl.constexpr):
    """Store some columns of dS K of the HALF-th 64 queries in the order in which the threads of a warpgroup hold them,
    so that none waits for another's bank of shared memory: `attention_bwd_dq` puts them in order."""
    COLUMNS: gl.constexpr = dq.shape[1]
    ROWS: gl.constexpr = WARPGROUP_ROWS * COLUMNS // PANEL
    START: gl.constexpr = HALF * ROWS
    dq = dq.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([ROWS, PANEL])
    tile.reshape([tile.shape[2], PANEL]).slice(START, ROWS).store(dq)


@gluon.jit
def multiply_keys(channels, staging, step, i, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Leave dS K of a step and of the i-th block of keys in `staging`: pieces with some of its columns each."""
    PARTS: gl.constexpr = TILE.CONSUMERS
    HALVES: gl.constexpr = TILE.BLOCK_M // WARPGROUP_ROWS
    PIECES: gl.constexpr = staging.block.shape[0]
    COLUMNS: gl.constexpr = SPEC.BLOCK_D // PIECES
    K_PIECES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WARPGROUP_ROWS, COLUMNS], channels.k.tiles.dtype)
    zero = new_sums(COLUMNS, SPEC.TAIL_D)
    for piece in range(PIECES):
        for half in gl.static_range(HALVES):
            dq = zero.block
            for part in gl.static_range(PARTS):
                k = tile_of(channels.k.tiles, channels.k, i, part)
                k = reinterpret(k, k.dtype, [PIECES, WARPGROUP_ROWS, COLUMNS], K_PIECES).index(piece)
                dq = warpgroup_mma(dscores_of(channels, step, part, half), k, dq, use_acc=part > 0, is_async=True)
            dq = warpgroup_mma_wait(0, deps=[dq])
            if half == 0:
                if piece == 0:
                    tma.store_wait(0)  # the copies of the step before, and of dbias, have read
            leave_piece(staging.block.index(piece), dq, half)
    if SPEC.TAIL_D > 0:
        for half in gl.static_range(HALVES):
            dq = zero.tail
            for part in gl.static_range(PARTS):
                k = tile_of(channels.k.tails, channels.k, i, part)
                dq = warpgroup_mma(dscores_of(channels, step, part, half), k, dq, use_acc=part > 0, is_async=True)
            leave_piece(staging.tail.index(0), warpgroup_mma_wait(0, deps=[dq]), half)


@gluon.jit
def add_pieces(descriptors, staging, number):
    """Add what was left in `staging` to the sums of a block of queries."""
    PIECES: gl.constexpr = staging.block.shape[0]
    ROWS: gl.constexpr = staging.block.shape[3]
    if descriptors.tail is None:
        TAIL_ROWS: gl.constexpr = 0
    else:
        TAIL_ROWS: gl.constexpr = staging.tail.shape[3]
    first_row = number * (PIECES * ROWS + TAIL_ROWS)
    for piece in gl.static_range(PIECES):
        add_to_global(descriptors.block, [0, 0, first_row + piece * ROWS, 0], staging.block.index(piece))
    if descriptors.tail is not None:
        add_to_global(descriptors.tail, [0, 0, first_row + PIECES * ROWS, 0], staging.tail.index(0))


@gluon.jit
def tile_of_sums(block, head, m, call, SPEC: gl.constexpr, BLOCK_M: gl.constexpr):
    """The number of the tile where dQ of a block of queries is summed; it is that of the program of
    `attention_bwd_rows` that zeroes it."""
    if SPEC.VARLEN:
        first = head * (call.padded_q // BLOCK_M) + block.numbers // BLOCK_M
    else:
        first = (block.batch * call.heads_q + head) * (call.padded_q // BLOCK_M)
    return first + m


class Kept(NamedTuple):
    """dQ of a matrix in shared memory, and the way by which it leaves."""

    sums: object  # (tiles, 64 BLOCK_D / PANEL, PANEL) float32, in the order in which threads hold them
    staging: object  # (slots, 1, 1, 64, BLOCK_D)


@gluon.jit
def new_kept(dq, SPEC: gl.constexpr, TILE: gl.constexpr):
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    SHAPE: gl.constexpr = [TILE.DQ_TILES, WARPGROUP_ROWS * SPEC.BLOCK_D // PANEL, PANEL]
    return Kept(gl.allocate_shared_memory(gl.float32, SHAPE, LAYOUT), new_tiles(dq, 2))


@gluon.jit
def as_panels(dq):
    """Numbers of (64, COLUMNS) in the order in which the threads of a warpgroup hold them, PANEL in a row."""
    COLUMNS: gl.constexpr = dq.shape[1]
    dq = dq.reshape([4, 2, 8, COLUMNS // 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))
    return dq.reshape([WARPGROUP_ROWS * COLUMNS // PANEL, PANEL])


@gluon.jit
def load_kept(tile, COLUMNS: gl.constexpr):
    """(64, COLUMNS) of what was stored in that order."""
    LAYOUT: gl.constexpr = accumulator_layout(COLUMNS)
    order = as_panels(gl.full([WARPGROUP_ROWS, COLUMNS], 0.0, gl.float32, LAYOUT))
    dq = tile.load(order.type.layout).reshape([COLUMNS // 8, 4, 8, 4, 2, 2])
    return gl.convert_layout(dq.permute((1, 4, 2, 0, 3, 5)).reshape([WARPGROUP_ROWS, COLUMNS]), LAYOUT)


@gluon.jit
def clear_kept(kept, COLUMNS: gl.constexpr):
    zero = as_panels(gl.full([WARPGROUP_ROWS, COLUMNS], 0.0, gl.float32, accumulator_layout(COLUMNS)))
    TILES: gl.constexpr = kept.sums.shape[0]
    for tile in gl.static_range(TILES):
        kept.sums.index(tile).store(zero)


@gluon.jit
def accumulate_kept(channels, kept, step, i, m, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Add dS K of a step and of the i-th block of keys to the sums of the m-th block of queries."""
    PARTS: gl.constexpr = TILE.CONSUMERS
    HALVES: gl.constexpr = TILE.BLOCK_M // WARPGROUP_ROWS
    for half in gl.static_range(HALVES):
        tile = kept.sums.index(m * HALVES + half)
        dq = load_kept(tile, SPEC.BLOCK_D)
        for part in gl.static_range(PARTS):
            k = tile_of(channels.k.tiles, channels.k, i, part)
            dq = warpgroup_mma(dscores_of(channels, step, part, half), k, dq, is_async=True)
        tile.store(as_panels(warpgroup_mma_wait(0, deps=[dq])))
    if SPEC.DBIAS == "tile":
        tma.store_wait(0)  # the copies of dbias have read


@gluon.jit
def store_kept(descriptors, kept, block, call, SPEC: gl.constexpr):
    """Round dQ of a matrix and copy it to global memory; its sums begin with 0 again."""
    zero = as_panels(gl.full([WARPGROUP_ROWS, SPEC.BLOCK_D], 0.0, gl.float32, accumulator_layout(SPEC.BLOCK_D)))
    SLOTS: gl.constexpr = kept.staging.shape[0]
    tma.store_wait(0)  # those of the matrix before
    for tile in range(gl.cdiv(call.seqlen_q, WARPGROUP_ROWS)):
        dq = load_kept(kept.sums.index(tile), SPEC.BLOCK_D) * call.softmax_scale
        kept.sums.index(tile).store(zero)
        tma.store_wait(SLOTS - 1)
        staging = kept.staging.index(tile % SLOTS)
        staging.reshape([WARPGROUP_ROWS, SPEC.BLOCK_D]).store(dq.to(kept.staging.dtype))
        fence_async_shared()
        copy_to_global(descriptors.block, [block.batch, block.head_kv, tile * WARPGROUP_ROWS, 0], staging)


@gluon.jit
def assist(channels, inputs, gradients, staging, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The warpgroup that serves the consumers: it copies their operands, and adds the dS K of the dS that they leave to
    the sum over all keys."""
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    STAGES: gl.constexpr = TILE.STAGES
    PARTS: gl.constexpr = TILE.CONSUMERS
    EARLY_KEYS: gl.constexpr = TILE.KEYS_STAGES > 1
    turns = channels.turns
    last_block = num_blocks(call, SPEC, TILE)
    if SPEC.DQ == "kept":
        clear_kept(staging, SPEC.BLOCK_D)
    to_send = first_step(turns, call, SPEC, TILE)
    if EARLY_KEYS:
        send_keys(channels, inputs, 0, to_send.block, SPEC, TILE)
    for step in gl.static_range(STAGES):
        if to_send.number < last_block:
            send_queries(channels, inputs, step, to_send, call, SPEC, TILE)
            to_send = following(to_send, turns, call, SPEC, TILE)
    step = 0
    i = 0
    number = first_number(call, SPEC, TILE)
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
                    send_queries(channels, inputs, step - 1 + STAGES, to_send, call, SPEC, TILE)
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
                if SPEC.DQ == "kept":
                    accumulate_kept(channels, staging, step, i, m, SPEC, TILE)
                    release(channels.dscores, step)
                else:
                    multiply_keys(channels, staging, step, i, SPEC, TILE)
                    release(channels.dscores, step)
                    fence_async_shared()
                    add_pieces(gradients.dq, staging, tile_of_sums(block, head, m, call, SPEC, BLOCK_M))
                step += 1
        if SPEC.DQ == "kept":
            if block.start_n + PARTS * WARPGROUP_ROWS >= call.seqlen_k:  # it was the last one of its matrix
                store_kept(gradients.dq, staging, block, call, SPEC)
        i += 1
        number = number_of(turns, i, call, SPEC, TILE)
    tma.store_wait(0)


@gluon.jit
def serve(channels, inputs, gradients, staging, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """What runs beside the consumers."""
    if SPEC.DQ != "apart":
        assist(channels, inputs, gradients, staging, call, SPEC, TILE)
    else:
        produce(channels, inputs, call, SPEC, TILE)
