"""The kernel for the gradient of a bias that batch entries or heads share: dS summed over all who share it.

A tile of 128 x 128 numbers of the gradient stays in the registers of two consumer warpgroups while the queries, keys,
values and output gradients of one sharer after the other pass. The bias, of which that tile is the gradient, is copied
once. A producer warp copies; it is a tile ahead where consumers end one. Each number is summed by one program or, where
there are fewer tiles than programs, by `splits` of them, whose sums are added in a fixed order later.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_attention._compat import copy_to_shared
from triton_attention.hopper.backward import load_query_numbers
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
from triton_attention.hopper.forward import PRODUCER_REGISTERS
from triton_attention.hopper.layouts import WARPGROUP_ROWS, accumulator_layout, columns_layout, rows_layout
from triton_attention.hopper.schedule import visible_range
from triton_attention.hopper.softmax import LOG2_E, allowed, opaque_zero

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
    rows: object  # a pointer to (batch, heads_q, 2, seqlen_q padded)


class Streams(NamedTuple):
    """What the producer sends: for each sharer, CHUNKS times 64 columns of the four operands together."""

    q: object  # (STAGES * CONSUMERS, 1, 1, 64, columns)
    k: object  # (STAGES, 1, 1, 128, columns)
    v: object
    dout: object
    ready: object  # a channel without tiles of its own
    bias: object


class Tile(NamedTuple):
    """A tile of the gradient, and the sharers [first, last) that a program sums."""

    start_m: object
    start_n: object
    head: object  # the first that shares it
    batch: object
    matrix: object
    split: object
    first: object
    last: object
    masked: object


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
    split = number % sharing.splits
    block = number // sharing.splits
    matrix = block // blocks
    block = block - matrix * blocks
    start_m = block // blocks_n * BLOCK_M
    start_n = block % blocks_n * BLOCK_N
    begin, full_begin, full_end, end = visible_range(
        start_m, call.seqlen_q, call.seqlen_k, call.lower, call.upper, SPEC.HAS_LOWER, SPEC.HAS_UPPER, BLOCK_M, BLOCK_N
    )
    sharers = sharing.shared_batches * sharing.shared_heads
    seen = (start_n < end) & (start_n + BLOCK_N > begin)
    first = sharers * split // sharing.splits
    last = gl.where(seen, sharers * (split + 1) // sharing.splits, first)
    masked = (start_n < full_begin) | (start_n + BLOCK_N > full_end)
    batch = matrix // sharing.heads
    head = (matrix - batch * sharing.heads) * sharing.shared_heads
    return Tile(start_m, start_n, head, batch * sharing.shared_batches, matrix, split, first, last, masked)


@gluon.jit
def sharer(tile, i, sharing):
    """(batch, head) of the i-th that shares the tile."""
    entry = i // sharing.shared_heads
    return tile.batch + entry, tile.head + i - entry * sharing.shared_heads


@gluon.jit
def produce(streams, operands, sharing, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    STAGES: gl.constexpr = TILE.STAGES
    COLUMNS: gl.constexpr = operands.q.block_type.shape[3]
    PARTS: gl.constexpr = CONSUMERS
    BYTES: gl.constexpr = (
        PARTS * (bytes_of(operands.q) + bytes_of(operands.dout)) + bytes_of(operands.k) + bytes_of(operands.v)
    )
    tiles = 0
    step = 0
    for number in range(gl.program_id(0), num_tiles(sharing, call), gl.num_programs(0)):
        tile = tile_of(number, sharing, call, SPEC)
        send(streams.bias, operands.bias, None, tiles, tile.batch, tile.head, tile.start_m, tile.start_n, CONSUMERS)
        tiles += 1
        for i in range(tile.first, tile.last):
            batch, head = sharer(tile, i, sharing)
            head_kv = head // call.group
            for chunk in range(TILE.CHUNKS):
                slot = step % STAGES
                wait_empty(streams.ready, step)
                full = streams.ready.full.index(slot)
                mbarrier.expect(full, BYTES)
                column = chunk * COLUMNS
                for part in gl.static_range(PARTS):
                    place = [batch, head, tile.start_m + part * WARPGROUP_ROWS, column]
                    copy_to_shared(operands.q, place, full, streams.q.index(slot * CONSUMERS + part))
                    copy_to_shared(operands.dout, place, full, streams.dout.index(slot * CONSUMERS + part))
                place = [batch, head_kv, tile.start_n, column]
                copy_to_shared(operands.k, place, full, streams.k.index(slot))
                copy_to_shared(operands.v, place, full, streams.v.index(slot))
                step += 1


@gluon.jit
def multiply(left, right, acc, slot, INDEX: gl.constexpr, FIRST: gl.constexpr):
    """Issue the product of this consumer's rows of one operand with the other's: (64, 128)."""
    COLUMNS: gl.constexpr = left.shape[4]
    a = left.index(slot * CONSUMERS + INDEX).reshape([WARPGROUP_ROWS, COLUMNS])
    b = right.index(slot).reshape([BLOCK_N, COLUMNS])
    return warpgroup_mma(a, b.permute((1, 0)), acc, use_acc=not FIRST, is_async=True)


@gluon.jit
def add_sharers(
    streams, operands, tile, start_m, step, sharing, call, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr
):
    """(sum of dS over the sharers of a tile: 64 rows of it, the next step)."""
    CHUNKS: gl.constexpr = TILE.CHUNKS
    STAGES: gl.constexpr = TILE.STAGES
    layout: gl.constexpr = accumulator_layout(BLOCK_N)
    zero = gl.full([WARPGROUP_ROWS, BLOCK_N], 0.0, gl.float32, layout)
    grad = zero
    numbers = start_m + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(BLOCK_N))
    for i in range(tile.first, tile.last):
        batch, head = sharer(tile, i, sharing)
        lse, negative_delta = load_query_numbers(operands.rows, batch, head, numbers, call, SPEC)
        scores = zero
        dweights = zero
        for chunk in gl.static_range(CHUNKS):
            slot = step % STAGES
            wait_full(streams.ready, step)
            scores = multiply(streams.q, streams.k, scores, slot, INDEX, chunk == 0)
            dweights = multiply(streams.dout, streams.v, dweights, slot, INDEX, chunk == 0)
            scores, dweights = warpgroup_mma_wait(0, deps=[scores, dweights])
            release(streams.ready, step)
            step += 1
        bias = streams.bias.tiles.index(INDEX).reshape([WARPGROUP_ROWS, BLOCK_N]).load(layout)
        weights = gl.exp2(scores * call.scale + (bias.to(gl.float32) * LOG2_E - lse[:, None]))
        if tile.masked:
            columns = tile.start_n + gl.arange(0, BLOCK_N, layout=columns_layout(BLOCK_N)) + opaque_zero()
            visible = allowed(
                numbers[:, None], columns[None, :], call.seqlen_k, call.lower, call.upper, SPEC.HAS_LOWER,
                SPEC.HAS_UPPER,
            )  # fmt: skip
            weights = gl.where(visible, weights, 0.0)
        grad += weights * (dweights + negative_delta[:, None])
    return grad, step


@gluon.jit
def consume(streams, operands, dbias, sharing, call, SPEC: gl.constexpr, TILE: gl.constexpr, INDEX: gl.constexpr):
    """A consumer warpgroup: the rows [64 INDEX, 64 INDEX + 64) of every tile."""
    tiles = 0
    step = 0
    num_matrices = sharing.heads * (call.batch // sharing.shared_batches)
    for number in range(gl.program_id(0), num_tiles(sharing, call), gl.num_programs(0)):
        tile = tile_of(number, sharing, call, SPEC)
        start_m = tile.start_m + INDEX * WARPGROUP_ROWS
        wait_full(streams.bias, tiles)
        grad, step = add_sharers(streams, operands, tile, start_m, step, sharing, call, SPEC, TILE, INDEX)
        release(streams.bias, tiles)
        tiles += 1
        # (splits, matrices, seqlen_q, seqlen_k)
        rows = start_m + gl.arange(0, WARPGROUP_ROWS, layout=rows_layout(BLOCK_N))
        columns = tile.start_n + gl.arange(0, BLOCK_N, layout=columns_layout(BLOCK_N)) + opaque_zero()
        origin = (tile.split * num_matrices + tile.matrix).to(gl.int64) * call.seqlen_q
        pointers = dbias + (origin + rows)[:, None] * call.seqlen_k + columns[None, :]
        inside = (rows < call.seqlen_q)[:, None] & (columns < call.seqlen_k)[None, :]
        gl.store(pointers, grad.to(dbias.dtype.element_ty), mask=inside)


@gluon.jit
def attention_bwd_dbias(q, k, v, dout, bias, rows, dbias, sharing, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The gradient of a bias that varies along queries and keys: dS, summed over the batch entries and heads.

    Grid: at most one program for each multiprocessor. Program p of P computes the tiles p, p + P, ...: each is a
    (128, 128) tile of a matrix of the bias, summed over a part of those who share it, and written once, zeros where the
    mask hides everything, to `dbias` (splits, matrices, seqlen_q, seqlen_k).
    """
    STAGES: gl.constexpr = TILE.STAGES
    operands = Operands(q, k, v, dout, bias, rows)
    streams = Streams(
        new_tiles(q, STAGES * CONSUMERS),
        new_tiles(k, STAGES),
        new_tiles(v, STAGES),
        new_tiles(dout, STAGES * CONSUMERS),
        Channel(0, 0, new_barriers(STAGES, 1), new_barriers(STAGES, CONSUMERS)),
        new_channel(bias, None, 1, CONSUMERS, CONSUMERS),
    )
    fence_async_shared()
    C0: gl.constexpr = 0
    C1: gl.constexpr = 1
    gl.warp_specialize(
        [
            (consume, (streams, operands, dbias, sharing, call, SPEC, TILE, C0)),
            (consume, (streams, operands, dbias, sharing, call, SPEC, TILE, C1)),
            (produce, (streams, operands, sharing, call, SPEC, TILE)),
        ],
        [4, 1],
        [TILE.REGISTERS, PRODUCER_REGISTERS],
    )
