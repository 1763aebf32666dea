"""Which blocks of keys does a program visit, in which order, and which queries see a block?

Blocks are numbered, see `backward_call.place`. A program begins with the block of its own number. Then, where it takes
turns, it has the next block that nobody has taken, by counting up a number in global memory. The partition that copies
operands decides, since it is ahead of the others, and announces each number to all. It asks for a number some steps
before it needs it, since memory takes its time, and not earlier: who takes a long block early keeps others from it.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from triton_attention.hopper import configs
from triton_attention.hopper.backward_call import block_of_number, call_of_block
from triton_attention.hopper.channel import new_barriers
from triton_attention.hopper.layouts import WARPGROUP_ROWS
from triton_attention.hopper.schedule import first_tile, visible_range

NOTICE = gl.constexpr(3)  # steps

takes_turns = gluon.constexpr_function(configs.takes_turns)


class Block(NamedTuple):
    """A block of keys, and the blocks [first, last) of queries that see some of them. Where none sees any there is one
    all the same, so that programs that take block after block find steps in each."""

    start_n: object
    head_kv: object
    batch: object
    first: object
    last: object
    sequence: object  # a schedule.Sequence where they are packed, else 0
    numbers: object  # where those of its queries begin, see `attention_bwd_rows`; else 0


class Seen(NamedTuple):
    """The blocks of queries [first, last), of those of a block of keys, that see some of a consumer's 64 keys; those in
    [full_first, full_last) see all, so that they need no mask."""

    first: object
    full_first: object
    full_last: object
    last: object


class Turns(NamedTuple):
    """How the partitions of a program learn which block comes next; nothing of it is there where each has one."""

    counter: object  # how many blocks were taken beyond the first of each program
    numbers: object  # (slots, threads) in shared memory; the first counts: the others come along
    told: object  # (slots, 1) barriers: a number is there


class Step(NamedTuple):
    """A block of queries of a head, and the block of keys that it is for."""

    head: object
    m: object
    block: object
    number: object  # of that block of keys
    i: object  # how many blocks the program had before
    ticket: object  # for the next one, see `ticket_with`


@gluon.jit
def new_turns(counter, SPEC: gl.constexpr, TILE: gl.constexpr, WARPS: gl.constexpr):
    """WARPS: of the partition that decides. It is at most TILE.STAGES steps ahead of the others, and a block has at
    least one step: with more slots than stages none is written that is still to be read."""
    if takes_turns(SPEC):
        SLOTS: gl.constexpr = 4 if TILE.STAGES < 4 else 8
        LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        numbers = gl.allocate_shared_memory(gl.int32, [SLOTS, 32 * WARPS], LAYOUT)
        turns = Turns(counter, numbers, new_barriers(SLOTS, 1))
    else:
        turns = Turns(0, 0, 0)
    return turns


@gluon.jit
def no_ticket(turns, SPEC: gl.constexpr):
    if takes_turns(SPEC):
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        ticket = gl.full([turns.numbers.shape[1]], 0, gl.int32, LAYOUT)
    else:
        ticket = 0
    return ticket


@gluon.jit
def ticket_with(step, turns, call, SPEC: gl.constexpr):
    """A ticket for the next block, in the first thread: drawn with the step of a block that is NOTICE before its end,
    or its first, else as it was. It comes while other things are done; what is computed of it waits for it."""
    ticket = step.ticket
    if takes_turns(SPEC):
        block = step.block
        is_late = step.m == gl.maximum(block.last - NOTICE, block.first)
        if is_late and step.head + 1 == (block.head_kv + 1) * call.group:
            THREADS: gl.constexpr = turns.numbers.shape[1]
            LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
            thread = gl.arange(0, THREADS, layout=LAYOUT)
            one = gl.full([THREADS], 1, gl.int32, LAYOUT)
            ticket = gl.atomic_add(turns.counter + thread, one, mask=thread == 0, sem="relaxed")
    return ticket


@gluon.jit
def announce(turns, i, ticket, SPEC: gl.constexpr):
    """The i-th block of this program is that of a ticket; that of i = 0 is not told."""
    if takes_turns(SPEC):
        slot = (i - 1) % turns.numbers.shape[0]
        turns.numbers.index(slot).store(gl.num_programs(0) + ticket)
        mbarrier.arrive(turns.told.index(slot), count=1)


@gluon.jit
def first_number(call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Of the first block of this program."""
    number = gl.program_id(0)
    if SPEC.DQ == "kept":
        number = number * blocks_of_matrix(call, TILE)
    return number


@gluon.jit
def number_of(turns, i, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Of the i-th block of this program, i > 0; not below `num_blocks` if it has no more."""
    if takes_turns(SPEC):
        SLOTS: gl.constexpr = turns.numbers.shape[0]
        slot = (i - 1) % SLOTS
        mbarrier.wait(turns.told.index(slot), (i - 1) // SLOTS & 1)
        first = turns.numbers.index(slot).slice(0, 1)
        number = gl.sum(first.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    elif SPEC.DQ == "kept":
        blocks = blocks_of_matrix(call, TILE)
        matrix = i // blocks
        number = (gl.program_id(0) + matrix * gl.num_programs(0)) * blocks + i - matrix * blocks
    else:
        number = num_blocks(call, SPEC, TILE)
    return number


@gluon.jit
def blocks_of_matrix(call, TILE: gl.constexpr):
    """Blocks of keys of a head of a batch entry."""
    return gl.cdiv(call.seqlen_k, TILE.CONSUMERS * WARPGROUP_ROWS)


@gluon.jit
def num_blocks(call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Of keys."""
    if SPEC.VARLEN:  # as many as there can be
        BLOCK_N: gl.constexpr = TILE.CONSUMERS * WARPGROUP_ROWS
        blocks = (first_tile(call.packing.total_k, call.batch, BLOCK_N) + 1) * (call.heads_q // call.group)
    else:
        blocks = blocks_of_matrix(call, TILE) * (call.heads_q // call.group) * call.batch
    return blocks


@gluon.jit
def block_of(number, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The `Block` of a number."""
    if SPEC.VARLEN:
        call = call_of_block(number, call, True, TILE.CONSUMERS * WARPGROUP_ROWS, SPEC)
    return block_in(number, call, SPEC, TILE)


@gluon.jit
def block_in(number, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The same, of packed sequences from the call of its own."""
    BLOCK_N: gl.constexpr = TILE.CONSUMERS * WARPGROUP_ROWS
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    start_n, head_kv, batch, sequence = block_of_number(number, call, True, BLOCK_N, SPEC)
    begin, _, _, end = queries_of(start_n, BLOCK_N, call, SPEC, TILE)
    first = begin // BLOCK_M
    last = gl.cdiv(end, BLOCK_M)
    if takes_turns(SPEC) if SPEC.VARLEN else SPEC.HAS_UPPER or SPEC.HAS_LOWER:
        unseen = last <= first
        first = gl.where(unseen, 0, first)
        last = gl.where(unseen, 1, last)
    numbers = 0
    if SPEC.VARLEN:
        numbers = call.own.numbers
    return Block(start_n, head_kv, batch, first, last, sequence, numbers)


@gluon.jit
def queries_of(start_n, KEYS: gl.constexpr, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """(begin, full_begin, full_end, end) of the queries that see KEYS keys from `start_n` on."""
    return visible_range(
        start_n, call.seqlen_k, call.seqlen_q, -call.upper, -call.lower, SPEC.HAS_UPPER, SPEC.HAS_LOWER, KEYS,
        TILE.BLOCK_M,
    )  # fmt: skip


@gluon.jit
def seen_by(block, start_n, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Which queries see the keys [start_n, start_n + 64) of a block."""
    begin, full_begin, full_end, end = queries_of(start_n, WARPGROUP_ROWS, call, SPEC, TILE)
    # Where some of the keys do not exist, a mask keeps them out of dQ.
    full_end = gl.where(start_n + WARPGROUP_ROWS > call.seqlen_k, full_begin, full_end)
    first = block.first
    last = block.last
    if SPEC.HAS_UPPER:
        first = gl.minimum(gl.maximum(begin // TILE.BLOCK_M, first), last)
    if SPEC.HAS_LOWER or SPEC.VARLEN:  # a packed sequence may have no queries
        last = gl.minimum(gl.maximum(gl.cdiv(end, TILE.BLOCK_M), first), last)
    return Seen(first, full_begin // TILE.BLOCK_M, full_end // TILE.BLOCK_M, last)


@gluon.jit
def first_step(turns, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    number = first_number(call, SPEC, TILE)
    block = block_of(number, call, SPEC, TILE)
    return Step(block.head_kv * call.group, block.first, block, number, 0, no_ticket(turns, SPEC))


@gluon.jit
def following(step, turns, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The step after one: a group's heads one after the other, then the program's next block of keys."""
    head = step.head
    m = step.m + 1
    block = step.block
    number = step.number
    i = step.i
    ticket = ticket_with(step, turns, call, SPEC)
    if m == block.last:
        head += 1
        if head == (block.head_kv + 1) * call.group:
            i += 1
            announce(turns, i, ticket, SPEC)
            number = number_of(turns, i, call, SPEC, TILE)
            block = block_of(gl.minimum(number, num_blocks(call, SPEC, TILE) - 1), call, SPEC, TILE)
            head = block.head_kv * call.group
        m = block.first
    return Step(head, m, block, number, i, ticket)
