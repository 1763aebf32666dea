"""What runs beside the consumers of the forward? A producer, which copies their operands, and for dropout a drawer."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.channel import send
from triton_attention.hopper.dropout import draw, send_bits
from triton_attention.hopper.heads import load_seed
from triton_attention.hopper.layouts import WARPGROUP_ROWS
from triton_attention.hopper.schedule import (
    announce,
    hear,
    next_tile,
    place_of_keys,
    place_of_queries,
    tile_range,
)

PRODUCER_REGISTERS = gl.constexpr(24)  # of a thread: it holds addresses alone


class Operands(NamedTuple):
    """Tensor descriptors; those of the tail of the head dimension are None where there is none."""

    q: object
    q_tail: object
    k: object
    k_tail: object
    v: object
    v_tail: object
    bias: object  # or a `BiasTensor`, or None
    out: object
    out_tail: object


class Channels(NamedTuple):
    """What the producer sends, and a drawer."""

    q: object
    k: object
    v: object
    bias: object
    ticker: object
    bits: object  # from a drawer; 0 where there is none


@gluon.jit
def send_queries(channels, operands, i, work, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    batch, start_m = place_of_queries(work.start_m, work.batch, work.sequence, SPEC)
    send(channels.q, operands.q, operands.q_tail, i, batch, work.head, start_m, 0, TILE.CONSUMERS)


@gluon.jit
def produce(channels, operands, counter, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The producer warp: the operands of one tile after the other, from the last block of keys to the first."""
    BIAS_PARTS: gl.constexpr = TILE.CONSUMERS if SPEC.BIAS_ROWS else 1
    # With two stages consumers are close behind, and short tiles over before the next are there.
    AHEAD: gl.constexpr = TILE.STAGES if SPEC.UNEVEN and TILE.STAGES == 2 else TILE.STAGES + 1
    tile, end = tile_range(call, SPEC, TILE)
    i = 0
    step = 0
    bias_step = 0
    slab_changes = True
    tile, work = announce(channels.ticker, 0, tile, end, counter, call, SPEC, TILE)
    if TILE.Q_STAGES > 1:
        send_queries(channels, operands, 0, work, call, SPEC, TILE)
    while work.tile_last > 0:
        if TILE.Q_STAGES == 1:
            send_queries(channels, operands, i, work, call, SPEC, TILE)
        head_kv = work.head // call.group
        following = work
        for n in range(work.tile_last - 1, work.first - 1, -1):
            start_n = n * TILE.BLOCK_N
            batch_kv, row_kv = place_of_keys(start_n, work.batch, work.sequence, SPEC)
            send(channels.k, operands.k, operands.k_tail, step, batch_kv, head_kv, row_kv, 0, 1)
            if SPEC.BIAS_COLS:
                bias_m = work.start_m if SPEC.BIAS_ROWS else 0
                if TILE.BIAS_STAYS:
                    if slab_changes:
                        send(
                            channels.bias, operands.bias, None, bias_step, work.batch, work.head, bias_m, start_n,
                            BIAS_PARTS,
                        )  # fmt: skip
                        bias_step += 1
                else:
                    send(channels.bias, operands.bias, None, step, work.batch, work.head, bias_m, start_n, BIAS_PARTS)
            send(channels.v, operands.v, operands.v_tail, step, batch_kv, head_kv, row_kv, 0, 1)
            step += 1
            # The next tile is chosen early, so that its queries are there in time, but not before the consumers have
            # begun with this one: they still need the queries of the last.
            if n == max(work.tile_last - AHEAD, work.first):
                tile = next_tile(tile, end, counter, SPEC, TILE)
                tile, following = announce(channels.ticker, i + 1, tile, end, counter, call, SPEC, TILE)
                if TILE.Q_STAGES > 1 and following.tile_last > 0:
                    send_queries(channels, operands, i + 1, following, call, SPEC, TILE)
        slab_changes = following.head != work.head or following.start_m != work.start_m
        work = following
        i += 1


@gluon.jit
def draw_ahead(channels, call, SPEC: gl.constexpr, TILE: gl.constexpr):
    """The drawer, a warpgroup: what dropout keeps of the blocks of keys of one tile after the other, the last block
    first, for each consumer. Those that a consumer lets pass too, so that both sides count alike."""
    CONSUMERS: gl.constexpr = TILE.CONSUMERS
    i = 0
    message = 0
    seed = load_seed(call, SPEC)
    work = hear(channels.ticker, 0, SPEC, TILE, 0)
    while work.tile_last > 0:
        number = work.batch * call.heads_q + work.head
        for n in range(work.tile_last - 1, work.first - 1, -1):
            for consumer in gl.static_range(CONSUMERS):
                start_m = work.start_m + consumer * WARPGROUP_ROWS
                bits = draw(seed, number, start_m, n * TILE.BLOCK_N, call, SPEC, TILE.BLOCK_N, False, False)
                send_bits(channels.bits, message + consumer, bits)
            message += CONSUMERS
        i += 1
        work = hear(channels.ticker, i, SPEC, TILE, 0)
