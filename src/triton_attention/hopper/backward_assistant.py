"""What runs beside the consumers of the kernels that own keys? What copies their operands, and may make dQ."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
)

from triton_attention._compat import copy_to_global, copy_to_shared
from triton_attention.hopper.backward_dq import add_dq, begin_dq, end_dq
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
    send,
    wait_empty,
    wait_full,
    whole_tile,
)
from triton_attention.hopper.columns import copy_columns
from triton_attention.hopper.layouts import WARPGROUP_ROWS
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
def assist(channels, inputs, gradients, dq_sums, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The warpgroup that serves the consumers: it copies their operands, and adds the dS K of the dS that they leave to
    the sum over all keys."""
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    STAGES: gl.constexpr = TILE.STAGES
    PARTS: gl.constexpr = TILE.CONSUMERS
    EARLY_KEYS: gl.constexpr = TILE.KEYS_STAGES > 1
    turns = channels.turns
    last_block = num_blocks(call, SPEC, TILE)
    begin_dq(dq_sums, SPEC)
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
                add_dq(gradients.dq, channels, dq_sums, step, i, block, head, m, call, SPEC, TILE)
                step += 1
        end_dq(gradients.dq, dq_sums, block, call, SPEC, TILE)
        i += 1
        number = number_of(turns, i, call, SPEC, TILE)
    tma.store_wait(0)


@gluon.jit
def serve(channels, inputs, gradients, dq_sums, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """What runs beside the consumers."""
    if SPEC.DQ != "apart":
        assist(channels, inputs, gradients, dq_sums, call, SPEC, TILE)
    else:
        produce(channels, inputs, call, SPEC, TILE)
