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
from triton_attention.hopper.channel import PACKED_ROWS, Channel, new_barriers
from triton_attention.hopper.layouts import WARPGROUP_ROWS

visible_range = gluon.jit(blocks.visible_range)
first_tile = gluon.jit(blocks.first_tile)

SEARCHED_AT_ONCE = gl.constexpr(64)  # sequences, two for each thread of the producer, which has few registers


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
    packing: object = None  # of packed sequences, a `Packing`; see `limits_of`


class Limits(NamedTuple):
    """The lengths of a batch entry, and the mask's band in it."""

    seqlen_q: object
    seqlen_k: object
    lower: object
    upper: object


class Packing(NamedTuple):
    """Where the sequences are that are packed into tensors of `total` rows.

    `bottom_right` is 1 if the diagonal ends at the bottom right of each sequence, 0 if it begins at the top left.
    """

    cu_seqlens_q: object  # (batch + 1,): where packed sequences begin, and the last one ends
    cu_seqlens_k: object
    total_q: object
    total_k: object
    bottom_right: object


class Sequence(NamedTuple):
    """A packed sequence: where it ends in the packed tensors, and its lengths."""

    end_q: object
    end_k: object
    seqlen_q: object
    seqlen_k: object


@gluon.jit
def num_blocks(call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Blocks of queries of a matrix, a head of a batch entry; of packed sequences, which are one entry: at most."""
    BLOCK_M: gl.constexpr = TILE.CONSUMERS * WARPGROUP_ROWS
    if SPEC.VARLEN:
        blocks = first_tile(call.packing.total_q, call.batch, BLOCK_M) + 1
    else:
        blocks = gl.cdiv(call.seqlen_q, BLOCK_M)
    return blocks


@gluon.jit
def num_tiles(call, SPEC: gl.constexpr, TILE: gl.constexpr):
    tiles = num_blocks(call, SPEC, TILE) * call.heads_q
    if not SPEC.VARLEN:
        tiles = tiles * call.batch
    return tiles


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
    sequence: object  # a `Sequence` where they are packed, else 0


@gluon.jit
def tile_range(call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """(first, end): this program's first tile, and the number at which its tiles end."""
    total = num_tiles(call, SPEC, TILE)
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
def place_in_section(tile, num_blocks, matrices, section_size, least_last):
    """(block, matrix) of a tile: by sections of `section_size` matrices, within one by block, and then by matrix. The
    last section has the rest, and `least_last` > 0 matrices at least, if there are as many."""
    last = gl.maximum(matrices - least_last, 0) // section_size
    section = gl.minimum(tile // (num_blocks * section_size), last)
    within = tile - section * num_blocks * section_size
    width = gl.where(section == last, matrices - last * section_size, section_size)
    block = within // width
    return block, section * section_size + within - block * width


@gluon.jit
def place(tile, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """(first query, head, batch, sequence) of a tile.

    Tiles are ordered by sections of `call.section` matrices, whose keys fit in L2 together; within a section by
    block, under a causal mask the longest first; and then by matrix. Matrices that share a bias are neighbours.
    """
    BLOCK_M: gl.constexpr = TILE.CONSUMERS * WARPGROUP_ROWS
    matrices = call.heads_q
    if not SPEC.VARLEN:
        matrices = call.heads_q * call.batch
    blocks = num_blocks(call, SPEC, TILE)
    block, matrix = place_in_section(tile, blocks, matrices, call.section, 1)
    if SPEC.HAS_UPPER:
        block = blocks - 1 - block
    sequence = 0
    if SPEC.VARLEN:
        head = matrix
        packing = call.packing
        batch, block = sequence_of(block, packing.cu_seqlens_q, packing.total_q, call, BLOCK_M)
        sequence = load_sequence(batch, call)
    elif SPEC.BIAS_SHARED:
        head = matrix // call.batch
        batch = matrix - head * call.batch
    else:
        batch = matrix // call.heads_q
        head = matrix - batch * call.heads_q
    return block * BLOCK_M, head, batch, sequence


@gluon.jit
def boundary(cu_seqlens, index, total):
    """Where a sequence begins; inside the tensors, whatever `cu_seqlens` says."""
    return gl.minimum(gl.maximum(gl.load(cu_seqlens + index), 0), total)


@gluon.jit
def sequence_of(tile, cu_seqlens, total, call, BLOCK: gl.constexpr):
    """(sequence, block in it) of a tile: how many have begun there? Number `call.batch` is what no sequence has."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    begun = 0
    for first in range(0, call.batch + 1, SEARCHED_AT_ONCE):
        index = first + gl.arange(0, SEARCHED_AT_ONCE, layout=LAYOUT)
        exists = index <= call.batch
        start = gl.minimum(gl.maximum(gl.load(cu_seqlens + index, mask=exists, other=0), 0), total)
        begun += gl.sum((exists & (first_tile(start, index, BLOCK) <= tile)).to(gl.int32), 0)
    sequence = gl.maximum(begun - 1, 0)
    start = boundary(cu_seqlens, sequence, total)
    return sequence, gl.maximum(tile - first_tile(start, sequence, BLOCK), 0)


@gluon.jit
def load_sequence(index, call, ALONG_KEYS: gl.constexpr = False):
    """A packed sequence. Number `call.batch` are the queries, or keys, behind the last one, which see nothing."""
    packing = call.packing
    after = gl.minimum(index + 1, call.batch)
    start_q = boundary(packing.cu_seqlens_q, index, packing.total_q)
    start_k = boundary(packing.cu_seqlens_k, index, packing.total_k)
    end_q = gl.maximum(boundary(packing.cu_seqlens_q, after, packing.total_q), start_q)
    end_k = gl.maximum(boundary(packing.cu_seqlens_k, after, packing.total_k), start_k)
    if ALONG_KEYS:
        end_k = gl.where(index == call.batch, packing.total_k, end_k)
    else:
        end_q = gl.where(index == call.batch, packing.total_q, end_q)
    return Sequence(end_q, end_k, end_q - start_q, end_k - start_k)


@gluon.jit
def limits_of(sequence, call, SPEC: gl.constexpr):
    """The limits of a batch entry or a packed sequence, which counts the band of the call from its own diagonal."""
    seqlen_q, seqlen_k, lower, upper = call.seqlen_q, call.seqlen_k, call.lower, call.upper
    if SPEC.VARLEN:
        seqlen_q, seqlen_k = sequence.seqlen_q, sequence.seqlen_k
        diagonal = (seqlen_k - seqlen_q) * call.packing.bottom_right
        lower += diagonal
        upper += diagonal
    return Limits(seqlen_q, seqlen_k, lower, upper)


@gluon.jit
def place_of_queries(start_m, batch, sequence, SPEC: gl.constexpr):
    """The coordinates of the batch and of the first row, in a tensor descriptor of q or out, of a tile.

    The last row of each packed sequence is the last of the axis, so that copies end where the sequence does: see
    `operands.packed_descriptor`.
    """
    if SPEC.VARLEN:
        batch = sequence.end_q
        start_m += PACKED_ROWS - sequence.seqlen_q
    return batch, start_m


@gluon.jit
def place_of_keys(start_n, batch, sequence, SPEC: gl.constexpr):
    """The same for a tile of k or v."""
    if SPEC.VARLEN:
        batch = sequence.end_k
        start_n += PACKED_ROWS - sequence.seqlen_k
    return batch, start_n


@gluon.jit
def find(tile, end, counter, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """(tile, *its place): this tile, or of packed sequences the first one from there on that has rows."""
    start_m, head, batch, sequence = place(tile, call, SPEC, TILE)
    if SPEC.VARLEN:
        while (tile < end) & (start_m >= sequence.seqlen_q):
            tile = next_tile(tile, end, counter, SPEC, TILE)
            start_m, head, batch, sequence = place(tile, call, SPEC, TILE)
    return tile, start_m, head, batch, sequence


@gluon.jit
def new_ticker(SPEC: gl.constexpr, TILE: gl.constexpr):
    """Brings each consumer the fields of its `Work`: (slots * consumers, fields)."""
    FIELDS: gl.constexpr = 16 if SPEC.VARLEN else 8
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    tiles = gl.allocate_shared_memory(gl.int32, [2 * TILE.CONSUMERS, FIELDS], LAYOUT)
    LISTENERS: gl.constexpr = TILE.CONSUMERS + (1 if TILE.BITS_STAGES > 0 else 0)
    return Channel(tiles, 0, new_barriers(2, 1), new_barriers(2, LISTENERS))


@gluon.jit
def announce(ticker, i, tile, end, counter, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """Producer: the i-th tile of this program has this number, or there is none if it is not below `end`.

    Returns the number, and the tile as `Work`. Of packed sequences it may be a later number.
    """
    BLOCK_N: gl.constexpr = TILE.BLOCK_N
    CONSUMERS: gl.constexpr = TILE.CONSUMERS
    FIELDS: gl.constexpr = ticker.tiles.shape[1]
    tile, start_m, head, batch, sequence = find(tile, end, counter, call, SPEC, TILE)
    limits = limits_of(sequence, call, SPEC)
    begin, _, _, tile_end = key_range(start_m, CONSUMERS * WARPGROUP_ROWS, limits, SPEC, TILE)
    first = begin // BLOCK_N
    tile_last = gl.maximum(gl.cdiv(tile_end, BLOCK_N), first + 1)
    exists = gl.where(tile < end, tile_last, 0)

    slot = i % 2
    field = gl.arange(0, FIELDS, layout=gl.BlockedLayout([1], [32], [1], [0]))
    mbarrier.wait(ticker.empty.index(slot), (i // 2 & 1) ^ 1)
    for consumer in gl.static_range(CONSUMERS):
        rows_m = start_m + consumer * WARPGROUP_ROWS
        _, full_begin, full_end, rows_end = key_range(rows_m, WARPGROUP_ROWS, limits, SPEC, TILE)
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
        if SPEC.VARLEN:
            values = gl.where(field == 8, sequence.end_q, values)
            values = gl.where(field == 9, sequence.end_k, values)
            values = gl.where(field == 10, gl.where(tile < end, sequence.seqlen_q, 0), values)  # none to be stored
            values = gl.where(field == 11, sequence.seqlen_k, values)
        ticker.tiles.index(slot * CONSUMERS + consumer).store(values)
    mbarrier.arrive(ticker.full.index(slot), count=1)
    return tile, Work(start_m, head, batch, first, first, tile_last, tile_last, exists, sequence)


@gluon.jit
def key_range(start_m, ROWS: gl.constexpr, limits, SPEC: gl.constexpr, TILE: gl.constexpr):
    """(begin, full_begin, full_end, end): the keys that ROWS queries visit, see `blocks.visible_range`."""
    return visible_range(
        start_m,
        limits.seqlen_q,
        limits.seqlen_k,
        limits.lower,
        limits.upper,
        SPEC.HAS_LOWER,
        SPEC.HAS_UPPER,
        ROWS,
        TILE.BLOCK_N,
    )


@gluon.jit
def hear(ticker, i, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """Consumer, or a drawer with one's INDEX: the i-th tile."""
    slot = i % 2
    mbarrier.wait(ticker.full.index(slot), i // 2 & 1)
    LAYOUT: gl.constexpr = gl.BlockedLayout([ticker.tiles.shape[1]], [32], [4], [0])
    fields = ticker.tiles.index(slot * TILE.CONSUMERS + INDEX).load(LAYOUT)
    mbarrier.arrive(ticker.empty.index(slot), count=1)
    if SPEC.HAS_LOWER:
        first, full_first = number(fields, 3), number(fields, 4)
    else:
        first, full_first = 0, 0
    sequence = 0
    if SPEC.VARLEN:
        sequence = Sequence(number(fields, 8), number(fields, 9), number(fields, 10), number(fields, 11))
    return Work(
        number(fields, 0), number(fields, 1), number(fields, 2), first, full_first, number(fields, 5),
        number(fields, 6), number(fields, 7), sequence,
    )  # fmt: skip


@gluon.jit
def number(fields, FIELD: gl.constexpr):
    """One of the fields, all of which every thread holds."""
    FIELDS: gl.constexpr = fields.shape[0]
    return gl.sum(gl.where(gl.arange(0, FIELDS, layout=fields.type.layout) == FIELD, fields, 0), 0)
