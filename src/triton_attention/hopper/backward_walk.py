"""In which order do the kernels that own keys visit blocks of them, and which queries see a block?"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.layouts import WARPGROUP_ROWS
from triton_attention.hopper.schedule import place_in_section, visible_range


class Block(NamedTuple):
    """A block of keys, and the blocks [first, last) of queries that see some of them; those in
    [full_first, full_last) see all, so that they need no mask. Where none sees any there is one, masked out, so that
    programs that take block after block find steps in each; packed sequences, of which a program takes one, have none.
    """

    start_n: object
    head_kv: object
    batch: object
    first: object
    full_first: object
    full_last: object
    last: object
    sequence: object  # a schedule.Sequence where they are packed, else 0


class Step(NamedTuple):
    """A block of queries of a head, and the block of keys that it is for."""

    head: object
    m: object
    block: object
    number: object  # of that block of keys


@gluon.jit
def num_blocks(call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Of keys: a program takes every `num_programs`-th, from that of its own number on."""
    if SPEC.VARLEN:
        blocks = gl.num_programs(0)  # each has one
    else:
        blocks = gl.cdiv(call.seqlen_k, TILE.CONSUMERS * WARPGROUP_ROWS) * (call.heads_q // call.group) * call.batch
    return blocks


@gluon.jit
def block_of(number, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Blocks are ordered by sections of `call.section` matrices, whose queries fit in L2 together; within a section by
    keys, those that most queries see under a causal mask first; and then by matrix."""
    BLOCK_N: gl.constexpr = TILE.CONSUMERS * WARPGROUP_ROWS
    BLOCK_M: gl.constexpr = TILE.BLOCK_M
    sequence = 0
    if SPEC.VARLEN:
        start_n, head_kv, batch, sequence = call.own.start, call.own.head, call.own.batch, call.own.sequence
    else:
        heads_kv = call.heads_q // call.group
        matrices = heads_kv * call.batch
        block, matrix = place_in_section(number, gl.cdiv(call.seqlen_k, BLOCK_N), matrices, call.section)
        batch = matrix // heads_kv
        head_kv = matrix - batch * heads_kv
        start_n = block * BLOCK_N
    begin, full_begin, full_end, end = visible_range(
        start_n, call.seqlen_k, call.seqlen_q, -call.upper, -call.lower, SPEC.HAS_UPPER, SPEC.HAS_LOWER, BLOCK_N,
        BLOCK_M,
    )  # fmt: skip
    # Where some of the keys do not exist, a mask keeps them out of dQ.
    full_end = gl.where(start_n + BLOCK_N > call.seqlen_k, full_begin, full_end)
    first = begin // BLOCK_M
    last = gl.cdiv(end, BLOCK_M)
    if (SPEC.HAS_UPPER or SPEC.HAS_LOWER) and not SPEC.VARLEN:
        unseen = last <= first
        first = gl.where(unseen, 0, first)
        last = gl.where(unseen, 1, last)
        full_end = gl.where(unseen, 0, full_end)
    return Block(start_n, head_kv, batch, first, full_begin // BLOCK_M, full_end // BLOCK_M, last, sequence)


@gluon.jit
def first_step(call, SPEC: gl.constexpr, TILE: gl.constexpr):
    number = gl.program_id(0)
    block = block_of(number, call, SPEC, TILE)
    return Step(block.head_kv * call.group, block.first, block, number)


@gluon.jit
def following(step, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The step after one: a group's heads one after the other, then the program's next block of keys."""
    head = step.head
    m = step.m + 1
    block = step.block
    number = step.number
    if m == block.last:
        head += 1
        if head == (block.head_kv + 1) * call.group:
            number += gl.num_programs(0)
            block = block_of(gl.minimum(number, num_blocks(call, SPEC, TILE) - 1), call, SPEC, TILE)
            head = block.head_kv * call.group
        m = block.first
    return Step(head, m, block, number)
