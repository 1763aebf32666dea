"""The kernel for the gradient of a bias that batch entries or heads share: dS summed over all who share it.

A tile of 128 x 128 numbers of the gradient stays in the registers of two consumer warpgroups while the queries, keys,
values and output gradients of one sharer after the other pass. The bias, of which that tile is the gradient, is copied
once. One producer warp copies operands and another one the bias, so that neither waits for the other's room: both
are at the next tile while consumers end one. Each number is summed by one program or, where there are fewer tiles than
programs, by `splits` of them, whose sums are added in a fixed order later.
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

from triton_attention._compat import copy_to_global, copy_to_shared
from triton_attention.hopper.backward_channels import LSE, NEGATIVE_DELTA
from triton_attention.hopper.channel import (
    Channel,
    bytes_of,
    new_barriers,
    new_channel,
    new_tiles,
    release,
    send,
    wait_empty,
    wait_full,
)
from triton_attention.hopper.channel import tile_of as tile_of_channel
from triton_attention.hopper.dropout import draw, drop
from triton_attention.hopper.forward_producer import PRODUCER_REGISTERS
from triton_attention.hopper.heads import load_seed, load_slope
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout, rows_layout
from triton_attention.hopper.mask import mask_queries
from triton_attention.hopper.narrow import widening
from triton_attention.hopper.schedule import visible_range
from triton_attention.hopper.softmax import LOG2_E, cap_scores, distances, opaque_zero

CONSUMERS = gl.constexpr(2)
BLOCK_M = gl.constexpr(2 * 64)  # 64 a consumer
BLOCK_N = gl.constexpr(128)


class Sharing(NamedTuple):
    """How a bias is shared: it has `heads` matrices for each of its batch entries, and each of them serves
    `shared_batches` batch entries and `shared_heads` heads. `splits` programs divide these among them."""

    heads: object
    shared_batches: object
    shared_heads: object
    splits: object


class Operands(NamedTuple):
    """Tensor descriptors of tiles of 64 columns, and the numbers of the queries: see `attention_bwd_rows`."""

    q: object
    k: object
    v: object
    dout: object
    bias: object
    rows: object  # (batch, heads_q, 2, seqlen_q padded)


class Streams(NamedTuple):
    """What the producers send: 64 columns of q and k, or of dout and v, in each slot, and tiles of the bias.

    A sharer takes CHUNKS slots of the first and as many of the second.
    """

    left: object  # (STAGES * CONSUMERS, 1, 1, 64, columns): of q or dout
    right: object  # (STAGES, 1, 1, 128, columns): of k or v
    numbers: object  # (STAGES * CONSUMERS, 1, 1, 1, 64): lse of the queries of q, or -delta of those of dout
    ready: object  # a channel without tiles of its own
    bias: object


class Tile(NamedTuple):
    """A tile of the gradient, and the sharers that a program sums."""

    start_m: object
    start_n: object
    head: object  # the first that shares it
    batch: object
    matrix: object  # of the gradient's batch entry `entry`, which counts splits too
    entry: object
    first: object  # of the sharers
    count: object  # of those that this program sums; 0 where no query sees a key
    masked: object


class Sharer(NamedTuple):
    batch: object
    head: object


@gluon.jit
def num_tiles(sharing, call):
    """Tiles of all matrices, each as often as it is split."""
    blocks = gl.cdiv(call.seqlen_q, BLOCK_M) * gl.cdiv(call.seqlen_k, BLOCK_N)
    return blocks * sharing.heads * (call.batch // sharing.shared_batches) * sharing.splits


@gluon.jit
def tile_of(number, sharing, call, SPEC: gl.constexpr):
    """The tile of a number. Neighbours share queries, or keys, of the same sharers."""
    blocks_n = gl.cdiv(call.seqlen_k, BLOCK_N)
    blocks = gl.cdiv(call.seqlen_q, BLOCK_M) * blocks_n
    block = number // sharing.splits
    split = number - block * sharing.splits
    matrix = block // blocks
    block -= matrix * blocks
    row = block // blocks_n
    start_m = row * BLOCK_M
    start_n = (block - row * blocks_n) * BLOCK_N
    begin, full_begin, full_end, end = visible_range(
        start_m, call.seqlen_q, call.seqlen_k, call.lower, call.upper, SPEC.HAS_LOWER, SPEC.HAS_UPPER, BLOCK_M, BLOCK_N
    )
    seen = (start_n < end) & (start_n + BLOCK_N > begin)
    sharers = sharing.shared_batches * sharing.shared_heads
    first = sharers * split // sharing.splits
    count = gl.where(seen, sharers * (split + 1) // sharing.splits - first, 0)
    masked = (start_n < full_begin) | (start_n + BLOCK_N > full_end)
    entry = matrix // sharing.heads
    matrix -= entry * sharing.heads
    batch = entry * sharing.shared_batches
    entry += split * (call.batch // sharing.shared_batches)
    return Tile(start_m, start_n, matrix * sharing.shared_heads, batch, matrix, entry, first, count, masked)


@gluon.jit
def first_sharer(tile, sharing):
    """The first that this program sums; heads of one batch entry follow each other."""
    entry = tile.first // sharing.shared_heads
    return Sharer(tile.batch + entry, tile.head + tile.first - entry * sharing.shared_heads)


@gluon.jit
def next_sharer(sharer, tile, sharing):
    """The one after it."""
    head = sharer.head + 1
    is_last = head == tile.head + sharing.shared_heads
    return Sharer(gl.where(is_last, sharer.batch + 1, sharer.batch), gl.where(is_last, tile.head, head))


@gluon.jit
def send_factors(streams, left, right, rows, step, sharer, tile, column, call, NUMBER: gl.constexpr):
    """Copy columns of the factors of a product, and a number a query, once the slot of a step is empty."""
    STAGES: gl.constexpr = streams.right.shape[0]
    PARTS: gl.constexpr = CONSUMERS
    BYTES: gl.constexpr = PARTS * (bytes_of(left) + bytes_of(rows)) + bytes_of(right)
    slot = step % STAGES
    wait_empty(streams.ready, step)
    full = streams.ready.full.index(slot)
    mbarrier.expect(full, BYTES)
    for part in gl.static_range(PARTS):
        start_m = tile.start_m + part * WARPGROUP_ROWS
        index = slot * CONSUMERS + part
        copy_to_shared(left, [sharer.batch, sharer.head, start_m, column], full, streams.left.index(index))
        copy_to_shared(rows, [sharer.batch, sharer.head, NUMBER, start_m], full, streams.numbers.index(index))
    place = [sharer.batch, sharer.head // call.group, tile.start_n, column]
    copy_to_shared(right, place, full, streams.right.index(slot))


@gluon.jit
def produce(streams, operands, sharing, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The producer warp of the operands."""
    COLUMNS: gl.constexpr = operands.q.block_type.shape[3]
    q, k, v, dout, rows = operands.q, operands.k, operands.v, operands.dout, operands.rows
    step = 0
    for number in range(gl.program_id(0), num_tiles(sharing, call), gl.num_programs(0)):
        tile = tile_of(number, sharing, call, SPEC)
        sharer = first_sharer(tile, sharing)
        for _ in range(tile.count):
            for chunk in range(TILE.CHUNKS):
                send_factors(streams, q, k, rows, step, sharer, tile, chunk * COLUMNS, call, LSE)
                step += 1
            for chunk in range(TILE.CHUNKS):
                send_factors(streams, dout, v, rows, step, sharer, tile, chunk * COLUMNS, call, NEGATIVE_DELTA)
                step += 1
            sharer = next_sharer(sharer, tile, sharing)


@gluon.jit
def produce_bias(streams, operands, sharing, call, SPEC: gl.constexpr):
    """The producer warp of the bias: that of the tiles in which a query sees a key."""
    tiles = 0
    for number in range(gl.program_id(0), num_tiles(sharing, call), gl.num_programs(0)):
        tile = tile_of(number, sharing, call, SPEC)
        if tile.count > 0:
            send(streams.bias, operands.bias, None, tiles, tile.batch, tile.head, tile.start_m, tile.start_n, CONSUMERS)
            tiles += 1


@gluon.jit
def multiply(streams, step, acc, INDEX: gl.constexpr, FIRST: gl.constexpr):
    """Issue the product of this consumer's rows of the left factor of a step with the right one: (64, 128)."""
    STAGES: gl.constexpr = streams.right.shape[0]
    COLUMNS: gl.constexpr = streams.right.shape[4]
    slot = step % STAGES
    wait_full(streams.ready, step)
    left = streams.left.index(slot * CONSUMERS + INDEX).reshape([WARPGROUP_ROWS, COLUMNS])
    right = streams.right.index(slot).reshape([BLOCK_N, COLUMNS])
    return warpgroup_mma(left, right.permute((1, 0)), acc, use_acc=not FIRST, is_async=True)


@gluon.jit
def load_numbers(streams, step, INDEX: gl.constexpr):
    """(64,): lse or -delta of this consumer's queries, which came with the slot of a step."""
    STAGES: gl.constexpr = streams.right.shape[0]
    numbers = streams.numbers.index(step % STAGES * CONSUMERS + INDEX)
    return numbers.reshape([WARPGROUP_ROWS]).load(rows_layout(BLOCK_N))


@gluon.jit
def load_bias(tile):
    """In float32; numbers of 16 bits are widened two at once."""
    values = tile.load(accumulator_layout(BLOCK_N))
    if values.dtype != gl.float32:
        values = gl.inline_asm_elementwise(
            widening(values.dtype, "$2", "$0", "$1"), "=&r,=&r,r", [values], dtype=gl.float32, is_pure=True, pack=2
        )
    return values


@gluon.jit
def add_sharers(
    streams, tile, tiles, start_m, step, sharing, call, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr
):  # fmt: skip
    """(sum of dS over the sharers of the tile that is this program's `tiles`-th: 64 rows of it, the next step).

    Where a query does not see a key the sum may be anything. The next product is under way when the slot of one is
    released, and that of dP while the weights are made.
    """
    CHUNKS: gl.constexpr = TILE.CHUNKS
    zero = gl.full([WARPGROUP_ROWS, BLOCK_N], 0.0, gl.float32, accumulator_layout(BLOCK_N))
    grad = zero
    bias_tile = tile_of_channel(streams.bias.tiles, streams.bias, tiles, INDEX)
    seed = load_seed(call, SPEC)
    sharer = first_sharer(tile, sharing)
    for i in range(tile.count):
        slope = load_slope(sharer.batch, sharer.head, call, SPEC) * LOG2_E
        matrix = sharer.batch * call.heads_q + sharer.head
        scores = zero
        dweights = zero
        for chunk in gl.static_range(CHUNKS):
            scores = multiply(streams, step, scores, INDEX, chunk == 0)
            if chunk > 0:
                scores = warpgroup_mma_wait(1, deps=[scores])
                release(streams.ready, step - 1)
            step += 1
        lse = load_numbers(streams, step - 1, INDEX)
        bits = draw(seed, matrix, start_m, tile.start_n, call, SPEC, BLOCK_N, False)
        for chunk in gl.static_range(CHUNKS):
            dweights = multiply(streams, step, dweights, INDEX, chunk == 0)
            if chunk == 0:
                negative_delta = load_numbers(streams, step, INDEX)
                scores = warpgroup_mma_wait(1, deps=[scores])
            else:
                dweights = warpgroup_mma_wait(1, deps=[dweights])
            release(streams.ready, step - 1)
            step += 1
        sharer = next_sharer(sharer, tile, sharing)
        scores, _ = cap_scores(scores, call, SPEC)  # before the bias is in registers
        wait_full(streams.bias, tiles)
        exponents = scores + (load_bias(bias_tile) * LOG2_E - lse[:, None])
        if SPEC.ALIBI:  # with a zero that the compiler does not know: distances are not kept from sharer to sharer
            exponents -= slope * distances(start_m + call.extras.diagonal + opaque_zero(), tile.start_n, BLOCK_N)
        weights = gl.exp2(exponents)
        # The branch keeps the exponentials before the wait, which ptxas would else move up.
        if i == tile.count - 1:
            release(streams.bias, tiles)
        dweights = warpgroup_mma_wait(0, deps=[dweights])
        release(streams.ready, step - 1)
        grad += weights * (drop(dweights, bits, SPEC) + negative_delta[:, None])
    return grad, step


@gluon.jit
def consume(streams, dbias, staging, sharing, call, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """A consumer warpgroup: the rows [64 INDEX, 64 INDEX + 64) of every tile."""
    tiles = 0
    step = 0
    buffer = staging.index(INDEX)
    for number in range(gl.program_id(0), num_tiles(sharing, call), gl.num_programs(0)):
        tile = tile_of(number, sharing, call, SPEC)
        start_m = tile.start_m + INDEX * WARPGROUP_ROWS
        grad, step = add_sharers(streams, tile, tiles, start_m, step, sharing, call, SPEC, TILE, INDEX)
        if tile.count > 0:
            tiles += 1
        # Once a tile, not for each sharer; and what lies outside of the matrix a copy leaves out.
        if SPEC.HAS_LOWER or SPEC.HAS_UPPER:
            if tile.masked:
                grad = mask_queries(grad, start_m, tile.start_n, call, SPEC, 0.0)
        tma.store_wait(0)
        buffer.reshape([WARPGROUP_ROWS, BLOCK_N]).store(grad.to(dbias.dtype))
        fence_async_shared()
        copy_to_global(dbias, [tile.entry, tile.matrix, start_m, tile.start_n], buffer)
    tma.store_wait(0)


@gluon.jit
def attention_bwd_dbias(q, k, v, dout, bias, rows, dbias, sharing, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The gradient of a bias that varies along queries and keys: dS, summed over the batch entries and heads.

    Grid: at most one program for each multiprocessor. Program p of P computes the tiles p, p + P, ...: each is a
    (128, 128) tile of a matrix of the bias, summed over a part of those who share it, and written once, zeros where the
    mask hides everything, to `dbias` (splits * batch entries of the bias, its heads, seqlen_q, seqlen_k).
    """
    STAGES: gl.constexpr = TILE.STAGES
    operands = Operands(q, k, v, dout, bias, rows)
    streams = Streams(
        new_tiles(q, STAGES * CONSUMERS),
        new_tiles(k, STAGES),
        new_tiles(rows, STAGES * CONSUMERS),
        Channel(0, 0, new_barriers(STAGES, 1), new_barriers(STAGES, CONSUMERS)),
        new_channel(bias, None, TILE.BIAS_STAGES, CONSUMERS, CONSUMERS),
    )
    staging = new_tiles(dbias, CONSUMERS)
    fence_async_shared()
    C0: gl.constexpr = 0
    C1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (consume, (streams, dbias, staging, sharing, call, SPEC, TILE, C0)),
            (consume, (streams, dbias, staging, sharing, call, SPEC, TILE, C1)),
            (produce, (streams, operands, sharing, call, SPEC, TILE)),
            (produce_bias, (streams, operands, sharing, call, SPEC)),
        ],
        [4, 1, 1],
        [TILE.REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
