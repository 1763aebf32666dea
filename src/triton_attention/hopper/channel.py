"""How do tiles travel from the producer warp to the consumers? A ring of slots, two barriers each.

The producer waits until a slot is empty, and starts a copy that completes on the slot's `full` barrier. A consumer
waits for that, reads, and arrives on `empty`. Both sides count tiles: tile `step` uses slot `step % SLOTS`, for the
`step // SLOTS`-th time, and the parity of that is the phase that a barrier is waited for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from triton_attention._compat import copy_to_shared

PACKED_ROWS = gl.constexpr(1 << 30)  # of the axis of rows of packed sequences, see `operands.packed_descriptor`


class Channel(NamedTuple):
    """SLOTS slots of PARTS tiles; a part is what one copy brings."""

    tiles: object  # (SLOTS * PARTS, 1, 1, rows, columns) in shared memory
    tails: object  # the same for the columns that do not fit a power of two
    full: object  # (SLOTS, 1) barriers: the tiles have arrived
    empty: object  # (SLOTS, 1) barriers: every reader is done with them; 0 where those of another channel say so


@gluon.constexpr_function
def bytes_of(descriptor):
    """Of one tile."""
    if descriptor is None:
        return 0
    block = descriptor.block_type
    return math.prod(block.shape) * block.element_ty.primitive_bitwidth // 8


@gluon.constexpr_function
def has_packed_rows(descriptor):
    return len(descriptor.block_type.shape) == 5


@gluon.jit
def coordinates(descriptor, batch, head, row, column):
    """Of a tile. The tensor descriptors of packed sequences have one axis more."""
    if has_packed_rows(descriptor):
        place = [PACKED_ROWS, batch, head, row, column]
    else:
        place = [batch, head, row, column]
    return place


@gluon.jit
def new_tiles(descriptor, COUNT: gl.constexpr):
    if descriptor is None:
        tiles = 0
    else:
        SHAPE: gl.constexpr = [COUNT] + descriptor.block_type.shape
        gl.static_assert(bytes_of(descriptor) % 128 == 0, "a copy wants its place at a multiple of 128 bytes")
        tiles = gl.allocate_shared_memory(descriptor.dtype, SHAPE, descriptor.layout)
    return tiles


@gluon.jit
def new_barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """A barrier for each slot, that waits for ARRIVALS; a copy that completes on it is one.

    Only for barriers that somebody waits for. Triton lets what nobody uses share its memory with a tile, and a barrier
    that was made there spoils the tile when the GPU switches to another process and back.
    """
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def new_channel(descriptor, tail, SLOTS: gl.constexpr, PARTS: gl.constexpr, READERS: gl.constexpr):
    """A channel for tiles of a descriptor and, where it is not None, of one of the tail of their columns."""
    full = new_barriers(SLOTS, 1)
    empty = new_barriers(SLOTS, READERS)
    return Channel(new_tiles(descriptor, SLOTS * PARTS), new_tiles(tail, SLOTS * PARTS), full, empty)


@gluon.jit
def wait_empty(channel, step):
    """Producer: wait until every reader is done with what was in the slot of a step."""
    SLOTS: gl.constexpr = channel.empty.shape[0]
    mbarrier.wait(channel.empty.index(step % SLOTS), (step // SLOTS & 1) ^ 1)


@gluon.jit
def send(channel, descriptor, tail, step, batch, head, row, column, PARTS: gl.constexpr):
    """Producer: copy PARTS tiles, one below the other from (row, column), into the slot of a step."""
    SLOTS: gl.constexpr = channel.full.shape[0]
    ROWS: gl.constexpr = descriptor.block_type.shape[-2]
    BYTES: gl.constexpr = PARTS * (bytes_of(descriptor) + bytes_of(tail))
    slot = step % SLOTS
    wait_empty(channel, step)
    full = channel.full.index(slot)
    mbarrier.expect(full, BYTES)
    for part in gl.static_range(PARTS):
        place = coordinates(descriptor, batch, head, row + part * ROWS, column)
        copy_to_shared(descriptor, place, full, channel.tiles.index(slot * PARTS + part))
        if tail is not None:
            copy_to_shared(tail, place, full, channel.tails.index(slot * PARTS + part))


@gluon.jit
def hand_over(channel, step):
    """Producer: what this warpgroup itself wrote into the slot of a step is there."""
    SLOTS: gl.constexpr = channel.full.shape[0]
    mbarrier.arrive(channel.full.index(step % SLOTS), count=1)


@gluon.jit
def wait_full(channel, step, pred=True):
    """Consumer: wait for the tiles of a step."""
    SLOTS: gl.constexpr = channel.full.shape[0]
    mbarrier.wait(channel.full.index(step % SLOTS), step // SLOTS & 1, pred=pred)


@gluon.jit
def whole_tile(tiles, channel, step, PART: gl.constexpr):
    """A tile of a step with its axes of size 1, as copies want it; `tiles` is channel.tiles or channel.tails."""
    SLOTS: gl.constexpr = channel.full.shape[0]
    PARTS: gl.constexpr = tiles.shape[0] // SLOTS
    return tiles.index(step % SLOTS * PARTS + PART)


@gluon.jit
def tile_of(tiles, channel, step, PART: gl.constexpr):
    """Consumer: the same as a matrix, (rows, columns)."""
    SHAPE: gl.constexpr = tiles.shape
    return whole_tile(tiles, channel, step, PART).reshape([SHAPE[-2], SHAPE[-1]])


@gluon.jit
def release(channel, step):
    """Consumer: this warpgroup is done with the tiles of a step."""
    SLOTS: gl.constexpr = channel.full.shape[0]
    mbarrier.arrive(channel.empty.index(step % SLOTS), count=1)
