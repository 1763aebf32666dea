"""Which weights of a block does dropout keep? Those that `philox.dropout_mask` names, whatever the tile.

What is decided on a tile travels as bits, so that it can be drawn before the tile is there: a thread has a word of them
for the 32 weights that it has of a 64 x 64 tile. Where the bit of a weight is, `spread` says.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention import philox
from triton_attention.hopper.channel import Channel, hand_over, new_barriers, release, wait_empty, wait_full
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout
from triton_attention.hopper.softmax import opaque_zero

ROUNDS = gl.constexpr(philox.ROUNDS)
HIGHEST_BIT = gl.constexpr(0x80000000)
WARPS = gl.constexpr(4)  # of a warpgroup; a warp has 16 rows of an accumulator, its thread (g, t) rows g and g + 8


@gluon.constexpr_function
def sixteens_layout(columns):
    """A (64, columns / 16) tile: element (i, j) stands for the columns [16 j, 16 j + 16) of row i of an accumulator.

    There four threads share these sixteen, of two rows; here each of them makes one of four such pairs of rows.
    """
    lanes = [[1, 0], [2, 0], [4, 0]]
    if columns == 32:
        registers, lanes = [], [[0, 1], [8, 0], *lanes]
    else:
        registers = [[8, 0], *([0, 4 << bit] for bit in range((columns // 64).bit_length() - 1))]
        lanes = [[0, 1], [0, 2], *lanes]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns // 16])


@gluon.constexpr_function
def row_sixteens_layout(columns):
    """A (4, columns) tile: element (i, j) stands for the rows [16 i, 16 i + 16) of column j of an accumulator.

    There eight threads share these sixteen, of a quarter of the columns, which they divide among them here.
    """
    registers = [[0, 1], *([0, 64 << bit] for bit in range((columns // 64).bit_length() - 1))]
    lanes = [[0, 2], [0, 4], [0, 8], [0, 16], [0, 32]]
    return gl.DistributedLinearLayout(registers, lanes, [[1, 0], [2, 0]], [], [4, columns])


@gluon.constexpr_function
def words_of(columns):
    """How many words a thread has for its weights of a (64, columns) tile."""
    return max(columns // 64, 1)


@gluon.constexpr_function
def owners_layout(words):
    """A (4 warps, 8, 4, words) tile: a thread (g, t) has the last axis of (its warp, g, t)."""
    registers = [[0, 0, 0, 1 << bit] for bit in range(words.bit_length() - 1)]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[1, 0, 0, 0], [2, 0, 0, 0]], [], [WARPS.value, 8, 4, words])


@gluon.constexpr_function
def axes_layout(shape, lanes):
    """A tile whose first axis is the warps: the axes `lanes` are the bits of a thread's number in its warp, from the
    lowest on, and each thread has all there is along the others."""

    def basis(axis, bit):
        return [1 << bit if axis == other else 0 for other in range(len(shape))]

    others = [axis for axis in range(len(shape) - 1, 0, -1) if axis not in lanes]
    registers = [basis(axis, bit) for axis in others for bit in range(shape[axis].bit_length() - 1)]
    return gl.DistributedLinearLayout(
        registers, [basis(axis, 0) for axis in lanes], [basis(0, 0), basis(0, 1)], [], list(shape)
    )


def philox_words(c0, c1, c2, c3, seed):
    """The four words of `philox.philox_4x32` for a counter of 32-bit numbers that broadcast and a 64-bit seed.

    In the names of plain Triton, whose interpreter can run it. Both halves of a product come from one multiplication of
    64 bits, where `tl.philox` takes two of 32. What depends on the queries or the keys alone stays a row or a
    column for two rounds.
    """
    seed = seed.to(tl.uint64)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


_philox_words = gluon.jit(philox_words)


@gluon.jit
def majority(first, second, third):
    """Of each bit of three words, in one instruction, which the compiler would take apart where it knows some bits."""
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xe8;", "=r,r,r,r", [first, second, third], dtype=gl.uint32, is_pure=True, pack=1
    )


@gluon.jit
def kept_bytes(words, drop_below):
    """The highest bit of each byte says whether that of `words` is not below `drop_below`, which is in [1, 255].

    Bytes without their highest bit, h, plus -drop_below mod 128 are less than 256, so that nothing is carried from
    byte to byte, and the highest bit of the sum, s, compares them with drop_below mod 128, or with 128 in place of 0. A
    byte is kept if h or s where drop_below <= 128, if h and s where it is more: that is the majority of h, s and a
    third bit. The other bits say nothing.
    """
    addend = (0 - drop_below & 0x7F) * 0x01010101
    either = (drop_below - 129 >> 31 & 1) * 0x80808080
    return majority(words, (words & 0x7F7F7F7F) + addend, either)


@gluon.jit
def merged(first, second, BITS: gl.constexpr):
    """These BITS of the first, and the others of the second; in one instruction, as `majority`."""
    bits = gl.to_tensor(BITS).to(gl.uint32)
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xe4;", "=r,r,r,r", [first, second, bits], dtype=gl.uint32, is_pure=True, pack=1
    )


@gluon.jit
def folded(words, PLACES: gl.constexpr, BITS: gl.constexpr):
    """Without the last axis, which has two words: the BITS of the first, and so many places below them the second's."""
    first, second = gl.split(words)
    return merged(first, second >> PLACES, BITS)


@gluon.jit
def exchanged(words, ORDER: gl.constexpr, LANES: gl.constexpr, PLACES: gl.constexpr, BITS: gl.constexpr):
    """With the axes in another order, and folded: threads send each other half of what they have, so that each has both
    words of the last axis. One bit of their number changes its axis; where two did, Triton would not shuffle."""
    words = words.permute(ORDER)
    return folded(gl.convert_layout(words, axes_layout(words.shape, LANES)), PLACES, BITS)


@gluon.jit
def draw(
    seed, matrix, start_m, start_n, call, SPEC: gl.constexpr, COLUMNS: gl.constexpr, TRANSPOSED: gl.constexpr,
    SPARING: gl.constexpr = True,
):  # fmt: skip
    """What dropout keeps of a (64, COLUMNS) tile of weights, (queries, keys) or if TRANSPOSED (keys, queries).

    Each thread's words, (4, 8, 4, COLUMNS / 64), in which a weight that is kept has a 1. `matrix` is the number of a
    query head among those of all batch entries, and start_n a multiple of 16. If SPARING, what is common to tiles is
    made anew for each, with a zero that the compiler does not know, and waits in no register.
    """
    if SPEC.DROPOUT:
        W: gl.constexpr = words_of(COLUMNS)
        zero = opaque_zero() if SPARING else gl.to_tensor(0)
        if TRANSPOSED:
            LAYOUT: gl.constexpr = row_sixteens_layout(COLUMNS)
            rows = gl.arange(0, WARPS, layout=gl.SliceLayout(1, LAYOUT)) + zero
            columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
            sixteens = (start_n // 16 + rows).to(gl.uint32)[:, None]
            queries = (start_m + columns).to(gl.uint32)[None, :]
        else:
            LAYOUT: gl.constexpr = sixteens_layout(COLUMNS)
            rows = gl.arange(0, WARPGROUP_ROWS, layout=gl.SliceLayout(1, LAYOUT)) + zero
            columns = gl.arange(0, COLUMNS // 16, layout=gl.SliceLayout(0, LAYOUT))
            sixteens = (start_n // 16 + columns).to(gl.uint32)[None, :]
            queries = (start_m + rows).to(gl.uint32)[:, None]
        number = gl.to_tensor(matrix).to(gl.uint32)
        last = gl.to_tensor(0).to(gl.uint32)
        first, second, third, fourth = _philox_words(sixteens, queries, number, last, seed + zero)
        drop_below = call.extras.drop_below
        first, second = kept_bytes(first, drop_below), kept_bytes(second, drop_below)
        third, fourth = kept_bytes(third, drop_below), kept_bytes(fourth, drop_below)
        words = gl.join(gl.join(first, third), gl.join(second, fourth))
        # From here on each axis is one bit of a number, but for the first, the warps, and W.
        if TRANSPOSED:
            words = words.reshape([WARPS, W, 2, 2, 2, 2, 2, 2, 2, 2])  # columns of an eight: the axes 5, 6, 7
            words = folded(words.permute((0, 1, 2, 3, 4, 5, 6, 8, 9, 7)), 1, 0x80808080)
            # Of a word, the thread of the keys 2 t and 2 t + 8 has the bytes 0 and 2, its neighbour 1 and 3.
            words = gl.join(words << 8, words)
            words = exchanged(words, (0, 1, 3, 4, 5, 6, 7, 8, 9, 2), (5, 4, 3, 2, 6), 8, 0xC000C000)
            words = exchanged(words, (0, 1, 3, 4, 5, 6, 7, 8, 2), (4, 3, 2, 6, 5), 4, 0xC0C0C0C0)
            words = exchanged(words, (0, 1, 3, 4, 5, 6, 7, 2), (3, 2, 6, 5, 4), 2, 0xCCCCCCCC)
            bits = words.permute((0, 4, 5, 6, 2, 3, 1))
        else:
            if COLUMNS == 32:
                words = words.reshape([WARPS, 2, 2, 2, 2, W, 2, 2, 2])  # rows of a sixteen: the axes 1 to 4
                words = exchanged(words, (0, 2, 3, 4, 5, 6, 7, 8, 1), (5, 6, 3, 2, 1), 1, 0x80808080)
            else:
                words = words.reshape([WARPS, 2, 2, 2, 2, W, 2, 2, 2, 2])
                words = folded(words.permute((0, 2, 3, 4, 5, 6, 7, 8, 9, 1)), 1, 0x80808080)
                words = exchanged(words, (0, 1, 2, 3, 4, 6, 7, 8, 5), (5, 6, 3, 2, 1), 4, 0xC0C0C0C0)
            words = exchanged(words, (0, 1, 2, 3, 4, 6, 7, 5), (6, 5, 3, 2, 1), 2, 0xCCCCCCCC)
            bits = words.permute((0, 1, 2, 3, 5, 6, 4))
        bits = gl.convert_layout(bits.reshape([WARPS, 8, 4, W]), owners_layout(W))
    else:
        bits = 0
    return bits


@gluon.jit
def no_bits(SPEC: gl.constexpr, COLUMNS: gl.constexpr):
    """As if a tile had been drawn, and nothing kept of it."""
    if SPEC.DROPOUT:
        W: gl.constexpr = words_of(COLUMNS)
        bits = gl.full([WARPS, 8, 4, W], 0, gl.uint32, owners_layout(W))
    else:
        bits = 0
    return bits


@gluon.constexpr_function
def threads_layout(words):
    """A (128, words) tile, in shared memory a row for each thread of a warpgroup."""
    registers = [[0, 1 << bit] for bit in range(words.bit_length() - 1)]
    lanes = [[1 << bit, 0] for bit in range(5)]
    return gl.DistributedLinearLayout(registers, lanes, [[32, 0], [64, 0]], [], [128, words])


@gluon.jit
def new_bits(SLOTS: gl.constexpr, COLUMNS: gl.constexpr):
    """A channel for what is drawn of (64, COLUMNS) tiles, each for one reader."""
    W: gl.constexpr = words_of(COLUMNS)
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    tiles = gl.allocate_shared_memory(gl.uint32, [SLOTS, WARPS * 32, W], LAYOUT)
    return Channel(tiles, 0, new_barriers(SLOTS, 1), new_barriers(SLOTS, 1))


@gluon.jit
def send_bits(channel, message, bits):
    """Of a tile; a message is what elsewhere is a step."""
    SLOTS: gl.constexpr = channel.full.shape[0]
    W: gl.constexpr = bits.shape[3]
    bits = gl.convert_layout(bits.reshape([WARPS * 32, W]), threads_layout(W))
    wait_empty(channel, message)
    channel.tiles.index(message % SLOTS).store(bits)
    hand_over(channel, message)


@gluon.jit
def receive_bits(channel, message):
    SLOTS: gl.constexpr = channel.full.shape[0]
    W: gl.constexpr = channel.tiles.shape[2]
    wait_full(channel, message)
    bits = channel.tiles.index(message % SLOTS).load(threads_layout(W))
    release(channel, message)
    return gl.convert_layout(bits.reshape([WARPS, 8, 4, W]), owners_layout(W))


@gluon.jit
def spread(bits, COLUMNS: gl.constexpr, TRANSPOSED: gl.constexpr):
    """(64, COLUMNS) numbers of what was drawn, one for each weight: the highest bit is 1 where it is kept."""
    if TRANSPOSED:
        bits = gl.join(bits, bits << 1)  # columns 0 and 1
        bits = gl.join(bits << 16, bits)  # rows 0 and 8
        bits = gl.join(bits, bits << 2)  # columns 0 and 8
        bits = gl.join(bits, bits << 4)  # columns 0 and 16
        bits = gl.join(bits, bits << 8)  # columns 0 and 32
    else:
        bits = gl.join(bits << 8, bits)
        bits = gl.join(bits, bits << 1)
        bits = gl.join(bits << 16, bits)
        bits = gl.join(bits, bits << 2)
        if COLUMNS > 32:
            bits = gl.join(bits, bits << 4)
    bits = bits.permute((0, 5, 1, 3, 8, 7, 6, 2, 4) if COLUMNS > 32 else (0, 5, 1, 3, 7, 6, 2, 4))
    return gl.convert_layout(bits.reshape([WARPGROUP_ROWS, COLUMNS]), accumulator_layout(COLUMNS))


@gluon.jit
def pair_mask(bits, HIGH: gl.constexpr):
    """Two halves, all ones or all zeros, by the highest bits of the two low bytes of a word, or of the HIGH ones."""
    if HIGH:
        mask = gl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0xbbaa;", "=r,r", [bits], dtype=gl.uint32, is_pure=True, pack=1
        )
    else:
        mask = gl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0x9988;", "=r,r", [bits], dtype=gl.uint32, is_pure=True, pack=1
        )
    return mask


@gluon.jit
def spread_over_pairs(bits, COLUMNS: gl.constexpr):
    """As `spread` for weights that are not transposed: masks of two neighbouring columns, the same number for both."""
    bits = gl.join(bits, bits << 1)  # rows 0 and 8
    bits = gl.join(bits, bits << 2)  # columns 0 and 16
    if COLUMNS > 32:
        bits = gl.join(bits, bits << 4)  # columns 0 and 32
    masks = gl.join(pair_mask(bits, False), pair_mask(bits, True))  # columns 0 and 8
    masks = gl.join(masks, masks)
    masks = masks.permute((0, 4, 1, 3, 6, 5, 7, 2, 8) if COLUMNS > 32 else (0, 4, 1, 3, 5, 6, 2, 7))
    return gl.convert_layout(masks.reshape([WARPGROUP_ROWS, COLUMNS]), accumulator_layout(COLUMNS))


@gluon.jit
def masked_pairs(tile, masks):
    """16-bit numbers and what `spread_over_pairs` made, two at once."""
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r,r", [tile, masks], dtype=tile.dtype, is_pure=True, pack=2
    )


@gluon.jit
def drop(tile, bits, SPEC: gl.constexpr):
    """The numbers of a (64, COLUMNS) tile with 0 where dropout leaves one out; of 16 bits, two at once."""
    if SPEC.DROPOUT:
        if tile.dtype == gl.float32:
            tile = gl.where(spread(bits, tile.shape[1], False) & HIGHEST_BIT == 0, 0.0, tile)
        else:
            tile = masked_pairs(tile, spread_over_pairs(bits, tile.shape[1]))
    return tile


@gluon.jit
def mark(weights, bits, SPEC: gl.constexpr):
    """Transposed weights, minus where dropout leaves one out: one number tells the weight, and whether it is kept.

    By their bits: comparisons would be kept, each in a register, from one barrier to the next.
    """
    if SPEC.DROPOUT:
        signs = ~spread(bits, weights.shape[1], True) & HIGHEST_BIT
        weights = (weights.to(gl.uint32, bitcast=True) | signs).to(gl.float32, bitcast=True)
    return weights
