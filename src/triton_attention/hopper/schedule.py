"""Which tiles does a persistent program compute, in which order, and which blocks of keys does a tile visit?

A tile is CONSUMERS * 64 queries of one head of one batch entry; tiles are numbered, see `place`. Where all are about as
long, program p of P computes the tiles p, p + P, p + 2P, ... Under a causal mask they are not, nor where sequences are
packed, and after its first tile a program takes the next one that nobody has taken, by counting up a number in global
memory. With BIAS_STAYS it takes neighbours, which share a bias. The producer decides, and announces each tile to the
consumers.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from triton_attention import blocks
from triton_attention.hopper.channel import Channel, new_barriers
from triton_attention.hopper.layouts import WARPGROUP_ROWS

visible_range = gluon.jit(blocks.visible_range)


class Call(NamedTuple):
    """The numbers of one call. The mask's band: key j is visible to query i iff lower <= j - i <= upper."""

    seqlen_q: object
    seqlen_k: object
    heads_q: object
    group: object  # query heads per key head
    batch: object
    section: object  # matrices (a head of a batch entry) whose tiles are interleaved: see `place`
    lower: object
    upper: object
    scale: object  # of q k^T: softmax_scale, but times log2(e) if SPEC.RAW_SCORES, and / softcap if SPEC.SOFTCAP
    extras: object = None  # what few calls have, a heads.Extras


@gluon.jit
def num_tiles(call, TILE: gl.constexpr):
    return gl.cdiv(call.seqlen_q, TILE.CONSUMERS * WARPGROUP_ROWS) * call.heads_q * call.batch


class Work(NamedTuple):
    """The rows of a tile that the producer or a consumer works on, and the blocks of keys that they visit.

    A consumer works on 64 rows, the producer on all of them. There is at least one block, so that a row that sees no
    key is like any other.
    """

    start_m: object
    head: object
    batch: object
    first: object  # the tile visits the blocks [first, tile_last); tile_last is 0 where there is no tile
    full_first: object  # these rows need no mask in the blocks [full_first, full_last)
    full_last: object
    last: object  # these rows see nothing in the blocks [last, tile_last)
    tile_last: object


@gluon.jit
def tile_range(call, TILE: gl.constexpr):
    """(first, end): this program's first tile, and the number at which its tiles end."""
    total = num_tiles(call, TILE)
    first = gl.program_id(0)
    if TILE.BIAS_STAYS:
        end = total * (first + 1) // gl.num_programs(0)
        first = total * first // gl.num_programs(0)
    else:
        end = total
    return first, end


@gluon.jit
def next_tile(tile, end, counter, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The number of this program's tile after `tile`."""
    if TILE.BIAS_STAYS:
        tile += 1
    elif SPEC.UNEVEN:
        tile = end
        if end > gl.num_programs(0):
            tile = gl.num_programs(0) + gl.atomic_add(counter, 1)
    else:
        tile += gl.num_programs(0)
    return tile


@gluon.jit
def place_in_section(tile, num_blocks, matrices, section_size):
    """(block, matrix) of a tile: by sections of `section_size` matrices, within one by block, and then by matrix."""
    section = tile // (num_blocks * section_size)
    within = tile - section * num_blocks * section_size
    width = gl.minimum(section_size, matrices - section * section_size)
    block = within // width
    return block, section * section_size + within - block * width


@gluon.jit
def place(tile, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """(first query, head, batch) of a tile.

    Tiles are ordered by sections of `call.section` matrices, whose keys fit in L2 together; within a section by
    block, under a causal mask the longest first; and then by matrix. Matrices that share a bias are neighbours.
    """
    BLOCK_M: gl.constexpr = TILE.CONSUMERS * WARPGROUP_ROWS
    matrices = call.heads_q * call.batch
    num_blocks = gl.cdiv(call.seqlen_q, BLOCK_M)
    block, matrix = place_in_section(tile, num_blocks, matrices, call.section)
    if SPEC.HAS_UPPER:
        block = num_blocks - 1 - block
    if SPEC.BIAS_SHARED:
        head = matrix // call.batch
        batch = matrix - head * call.batch
    else:
        batch = matrix // call.heads_q
        head = matrix - batch * call.heads_q
    return block * BLOCK_M, head, batch


@gluon.jit
def new_ticker(TILE: gl.constexpr):
    """Brings each consumer the fields of its `Work`: (slots * consumers, fields)."""
    tiles = gl.allocate_shared_memory(gl.int32, [2 * TILE.CONSUMERS, 8], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    return Channel(tiles, 0, new_barriers(2, 1), new_barriers(2, TILE.CONSUMERS))


@gluon.jit
def announce(ticker, i, tile, end, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Producer: the i-th tile of this program has this number, or there is none if it is not below `end`."""
    BLOCK_N: gl.constexpr = TILE.BLOCK_N
    CONSUMERS: gl.constexpr = TILE.CONSUMERS
    start_m, head, batch = place(tile, call, SPEC, TILE)
    begin, _, _, tile_end = key_range(start_m, CONSUMERS * WARPGROUP_ROWS, call, SPEC, TILE)
    first = begin // BLOCK_N
    tile_last = gl.maximum(gl.cdiv(tile_end, BLOCK_N), first + 1)
    exists = gl.where(tile < end, tile_last, 0)

    slot = i % 2
    field = gl.arange(0, 8, layout=gl.BlockedLayout([1], [32], [1], [0]))
    mbarrier.wait(ticker.empty.index(slot), (i // 2 & 1) ^ 1)
    for consumer in gl.static_range(CONSUMERS):
        rows_m = start_m + consumer * WARPGROUP_ROWS
        _, full_begin, full_end, rows_end = key_range(rows_m, WARPGROUP_ROWS, call, SPEC, TILE)
        last = tile_last
        if TILE.SKIPS:
            last = gl.minimum(gl.maximum(gl.cdiv(rows_end, BLOCK_N), first + 1), tile_last)
        values = gl.where(field == 0, rows_m, head)
        values = gl.where(field == 2, batch, values)
        values = gl.where(field == 3, first, values)
        full_first = gl.cdiv(full_begin, BLOCK_N)
        values = gl.where(field == 4, full_first, values)
        values = gl.where(field == 5, gl.maximum(full_end // BLOCK_N, full_first), values)
        values = gl.where(field == 6, last, values)
        values = gl.where(field == 7, exists, values)
        ticker.tiles.index(slot * CONSUMERS + consumer).store(values)
    mbarrier.arrive(ticker.full.index(slot), count=1)
    return Work(start_m, head, batch, first, first, tile_last, tile_last, exists)


@gluon.jit
def key_range(start_m, ROWS: gl.constexpr, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """(begin, full_begin, full_end, end): the keys that ROWS queries visit, see `blocks.visible_range`."""
    return visible_range(
        start_m,
        call.seqlen_q,
        call.seqlen_k,
        call.lower,
        call.upper,
        SPEC.HAS_LOWER,
        SPEC.HAS_UPPER,
        ROWS,
        TILE.BLOCK_N,
    )


@gluon.jit
def hear(ticker, i, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """Consumer: the i-th tile."""
    slot = i % 2
    mbarrier.wait(ticker.full.index(slot), i // 2 & 1)
    fields = ticker.tiles.index(slot * TILE.CONSUMERS + INDEX).load(gl.BlockedLayout([8], [32], [4], [0]))
    mbarrier.arrive(ticker.empty.index(slot), count=1)
    if SPEC.HAS_LOWER:
        first, full_first = number(fields, 3), number(fields, 4)
    else:
        first, full_first = 0, 0
    return Work(
        number(fields, 0), number(fields, 1), number(fields, 2), first, full_first, number(fields, 5),
        number(fields, 6), number(fields, 7),
    )  # fmt: skip


@gluon.jit
def number(fields, FIELD: gl.constexpr):
    """One of the fields, all of which every thread holds."""
    return gl.sum(gl.where(gl.arange(0, 8, layout=gl.BlockedLayout([8], [32], [4], [0])) == FIELD, fields, 0), 0)
