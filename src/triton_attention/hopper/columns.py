"""How are tiles multiplied whose columns are no power of two? As two tiles, a block and its tail, that are one each.

A head dimension of 96 is 64 + 32: a product along it is two products, added, and what has as many columns is
accumulated, copied and stored as two.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from triton_attention._compat import copy_to_global, copy_to_shared
from triton_attention.hopper.channel import tile_of, whole_tile
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout, operand_layout


class Columns(NamedTuple):
    """A tile in registers or in shared memory, or the tensor descriptors of one."""

    block: object
    tail: object  # where there is none 0, or of descriptors None


@gluon.constexpr_function
def products(tail):
    """How many products are under way when one with a right factor of so many columns in its tail was issued."""
    return 2 if tail > 0 else 1


@gluon.jit
def new_sums(BLOCK: gl.constexpr, TAIL: gl.constexpr):
    """Accumulators of 64 rows."""
    block = gl.full([WARPGROUP_ROWS, BLOCK], 0.0, gl.float32, accumulator_layout(BLOCK))
    if TAIL > 0:
        tail = gl.full([WARPGROUP_ROWS, TAIL], 0.0, gl.float32, accumulator_layout(TAIL))
    else:
        tail = 0
    return Columns(block, tail)


@gluon.jit
def columns_of(channel, step, PART: gl.constexpr, TAIL: gl.constexpr):
    """Consumer: a tile of a step, in shared memory."""
    block = tile_of(channel.tiles, channel, step, PART)
    if TAIL > 0:
        tail = tile_of(channel.tails, channel, step, PART)
    else:
        tail = 0
    return Columns(block, tail)


@gluon.jit
def multiply_transposed(left, right, acc, ADDED: gl.constexpr, TAIL: gl.constexpr):
    """Issue left right^T, of tiles in shared memory; added to `acc` if ADDED."""
    acc = warpgroup_mma(left.block, right.block.permute((1, 0)), acc, use_acc=ADDED, is_async=True)
    if TAIL > 0:
        acc = warpgroup_mma(left.tail, right.tail.permute((1, 0)), acc, is_async=True)
    return acc


@gluon.jit
def accumulate(operand, right, sums, TAIL: gl.constexpr):
    """Issue sums + operand right; the operand has the layout that the block wants."""
    block = warpgroup_mma(operand, right.block, sums.block, is_async=True)
    tail = sums.tail
    if TAIL > 0:
        tail = warpgroup_mma(gl.convert_layout(operand, operand_layout(TAIL)), right.tail, tail, is_async=True)
    return Columns(block, tail)


@gluon.jit
def wait_sums(sums, TAIL: gl.constexpr):
    """Wait until no product is under way."""
    block = sums.block
    tail = sums.tail
    if TAIL > 0:
        block, tail = warpgroup_mma_wait(0, deps=[block, tail])
    else:
        block = warpgroup_mma_wait(0, deps=[block])
    return Columns(block, tail)


@gluon.jit
def wait_both(first, second, FIRST_TAIL: gl.constexpr, SECOND_TAIL: gl.constexpr):
    """The same for two sums."""
    block, tail = first.block, first.tail
    other, other_tail = second.block, second.tail
    if FIRST_TAIL > 0 and SECOND_TAIL > 0:
        block, tail, other, other_tail = warpgroup_mma_wait(0, deps=[block, tail, other, other_tail])
    elif FIRST_TAIL > 0:
        block, tail, other = warpgroup_mma_wait(0, deps=[block, tail, other])
    elif SECOND_TAIL > 0:
        block, other, other_tail = warpgroup_mma_wait(0, deps=[block, other, other_tail])
    else:
        block, other = warpgroup_mma_wait(0, deps=[block, other])
    return Columns(block, tail), Columns(other, other_tail)


@gluon.jit
def scaled(sums, factor, TAIL: gl.constexpr):
    tail = sums.tail
    if TAIL > 0:
        tail = tail * factor
    return Columns(sums.block * factor, tail)


@gluon.jit
def copy_columns(descriptors, place, full, channel, slot):
    """Producer: start the copy of a tile, which is the only part of its slot."""
    copy_to_shared(descriptors.block, place, full, channel.tiles.index(slot))
    if descriptors.tail is not None:
        copy_to_shared(descriptors.tail, place, full, channel.tails.index(slot))


@gluon.jit
def leave_columns(channel, step, PART: gl.constexpr, sums, TAIL: gl.constexpr):
    """Consumer: round a tile to the type of a channel, in the place of a part of a step."""
    tile_of(channel.tiles, channel, step, PART).store(sums.block.to(channel.tiles.dtype))
    if TAIL > 0:
        tile_of(channel.tails, channel, step, PART).store(sums.tail.to(channel.tails.dtype))


@gluon.jit
def store_columns(descriptors, place, channel, step, PART: gl.constexpr):
    """Consumer: start the copy of what was left there to global memory."""
    copy_to_global(descriptors.block, place, whole_tile(channel.tiles, channel, step, PART))
    if descriptors.tail is not None:
        copy_to_global(descriptors.tail, place, whole_tile(channel.tails, channel, step, PART))
