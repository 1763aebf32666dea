"""Which kernel is asked for (Spec), and with which tile does it run (Tile)?

Tiles are data: rows that say for which head dimension, bias and mask they are, in order of preference, with the
measurement that chose them. Nothing is tuned at run time. Where two tiles are far apart for long and for short
sequences there are two rows, so that a problem has two variants at most, whatever its lengths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar


@dataclass(frozen=True)
class Spec:
    """What a kernel computes. Plain fields only: Triton's cache sees the text of a constant, nothing inside it."""

    BLOCK_D: int  # the head dimensions as one power of two, or two: BLOCK + TAIL
    TAIL_D: int
    BLOCK_DV: int
    TAIL_DV: int
    HAS_LOWER: bool  # the mask's band has a lower bound: the left side of a window
    HAS_UPPER: bool  # it has an upper bound: causal, or the right side of a window
    BIAS: str  # "none", "added" or "mask" (boolean)
    BIAS_ROWS: bool  # the bias varies along the queries
    BIAS_COLS: bool  # it varies along the keys
    BIAS_SHARED: bool  # it varies along both, and the batch shares it
    RAW_SCORES: bool  # scores keep the units of q k^T: softmax_scale > 0 folds into the exponent
    UNEVEN: bool  # tiles differ in length, so that programs take them as they come: under a causal mask, or packed
    SOFTCAP: bool
    ALIBI: bool
    DROPOUT: bool
    VARLEN: bool  # sequences are packed one after the other
    SINK: bool  # a logit a head joins the denominator of the softmax


@dataclass(frozen=True)
class Tile:
    """How a kernel computes it; see `tile`."""

    CONSUMERS: int  # warpgroups of 64 queries
    BLOCK_N: int  # keys
    STAGES: int  # blocks of keys, and of values, in shared memory
    Q_STAGES: int  # tiles of queries there: with 2 those of the next tile come early
    BIAS_STAGES: int  # blocks of the bias there
    BIAS_STAYS: bool  # all of a tile's bias stays there, while the batch entries that share it pass
    SKIPS: bool  # a consumer leaves out blocks whose keys its own 64 queries do not see; wants 3 stages
    REGISTERS: int  # of a consumer's thread
    maxnreg: int  # of any thread, before the producer gives its own away
    BITS_STAGES: int = 0  # blocks in shared memory of what a drawer draws for dropout; 0: the consumers draw
    DRAWER_REGISTERS: int = 0  # of a thread of it
    num_warps: int = 4  # of a consumer


# 65,536 registers, shared by a producer of 24 a thread and as many consumers, in steps of 8.
_REGISTERS = {2: (240, 168), 3: (160, 128), 4: (112, 96)}
_REGISTERS_BESIDE_DRAWER = (216, 128, 56)  # of two consumers, of all at first, and of the drawer's four warps


def tile(
    consumers: int, block_n: int, stages: int, *, q_stages: int = 2, bias_stages: int = 2, bias_stays: bool = False,
    skips: bool = False, bits_stages: int = 0,
) -> Tile:  # fmt: skip
    """A tile, with the registers that its number of consumers leaves to each."""
    shape = (consumers, block_n, stages, q_stages, bias_stages, bias_stays, skips)
    if bits_stages == 0:
        return Tile(*shape, *_REGISTERS[consumers])
    registers, maxnreg, drawer_registers = _REGISTERS_BESIDE_DRAWER
    return Tile(*shape, registers, maxnreg, bits_stages, drawer_registers)


class Row(NamedTuple):
    """A tile and what it is for; None matches anything, and the first row that matches is taken."""

    head_dim: int  # the larger head dimension, padded, is at most this
    tile: Tile
    bias_size: int | None = None  # bytes of a number of a bias that varies along queries and keys; 0 = no such bias
    columns: bool | None = None  # whether there is a bias that varies along the keys only
    banded: bool | None = None  # whether there is a causal mask or a window
    shared: bool | None = None  # whether the batch shares the bias
    dropout: bool | None = None  # whether there is dropout, whose random numbers want registers
    seqlen_k: range = range(2**31)


# H100 80GB HBM3, Triton 3.6.0, bf16. Each comment has TFLOP/s; without a bias at batch * seqlen 16k, heads * d 2048.
ROWS = (
    Row(64, tile(2, 128, 3, bits_stages=2), bias_size=0, dropout=True),  # s 4k: 338; causal 318 (H200)
    Row(128, tile(2, 128, 2, bits_stages=1), bias_size=0, columns=False, dropout=True),  # 480; causal 466 (H200)
    Row(64, tile(4, 64, 4), bias_size=0, columns=True),  # vector bias, s 2k: 370; 2 x 128: 351
    Row(64, tile(3, 128, 2), bias_size=0, banded=False, seqlen_k=range(2048, 2**31)),  # s 4k, 16k: 505, 554
    Row(64, tile(4, 64, 4), bias_size=0, banded=False),  # s 512, 1k, 4k: 358, 447, 458; 3 x 128: 323, 419, 505
    Row(64, tile(3, 128, 3, skips=True), bias_size=0, seqlen_k=range(8192, 2**31)),  # causal, s 16k: 503
    Row(64, tile(4, 64, 4, skips=True), bias_size=0),  # causal, s 1k, 4k, 16k: 323, 453, 434; 3 x 128: 252, 442, 503
    Row(128, tile(2, 128, 2), bias_size=0),  # s 1k, 4k, 16k: 592, 687, 656; causal 392, 600, 618
    Row(
        160, tile(2, 64, 3, q_stages=1, skips=True), bias_size=0, banded=True
    ),  # s 2000, causal: 482, no skips: 467 (H200)
    Row(160, tile(2, 64, 3, q_stages=1), bias_size=0),  # s 2000, causal: 421; 2 stages, and 2 of queries: 414
    Row(192, tile(2, 64, 2, q_stages=1), bias_size=0),  # s 2000, b 4, causal: 428
    Row(256, tile(2, 64, 2, q_stages=1), bias_size=0),  # s 1k, 4k, 16k: 597, 732, 707; causal 409, 611, 673
    # pair bias, d 32, h 4, n rows of n, n 256, 384, 512: 134, 158, 173 (with 8 stages of bias); 4 x 64: 126, 128, 186
    Row(  # pair bias, n 384: 175; 2 x 64 queries: 161
        32,
        tile(3, 64, 4, bias_stages=6, bias_stays=True),
        bias_size=2,
        banded=False,
        shared=True,
        seqlen_k=range(4 * 64 + 1, 6 * 64 + 1),
    ),
    Row(
        32,
        tile(2, 64, 4, bias_stages=7, bias_stays=True),
        bias_size=2,
        banded=False,
        shared=True,
        seqlen_k=range(7 * 64 + 1),
    ),
    Row(64, tile(2, 64, 3), bias_size=2, banded=False, dropout=True),  # not timed; four consumers spill registers
    Row(32, tile(4, 64, 4, bias_stages=3), bias_size=2, banded=False),
    Row(64, tile(4, 64, 4, q_stages=1), bias_size=2, banded=False),  # s 2k: 331; 2 x 128: 313
    Row(64, tile(2, 128, 2), bias_size=2),  # s 2k, causal: 257; 4 x 64: 192
    Row(  # s 2k: 464; 64 keys: 449 (H200)
        128, tile(2, 128, 2, q_stages=1, bias_stages=1), bias_size=2, banded=False, dropout=False
    ),
    Row(128, tile(2, 64, 2), bias_size=2),  # s 2k: causal 366
    Row(192, tile(2, 64, 2, q_stages=1), bias_size=2),
    Row(256, tile(2, 32, 2, q_stages=1), bias_size=2),
    Row(64, tile(2, 64, 3), bias_size=1),
    Row(128, tile(2, 64, 2), bias_size=1),
    Row(192, tile(2, 64, 2, q_stages=1), bias_size=1),
    Row(256, tile(2, 32, 2, q_stages=1), bias_size=1),
    Row(128, tile(2, 64, 2, q_stages=1), bias_size=4),
    Row(256, tile(2, 32, 2, q_stages=1), bias_size=4),
)


def padded_head_dim(spec: Spec | BackwardSpec) -> int:
    """The larger head dimension, as kernels compute it."""
    return max(spec.BLOCK_D + spec.TAIL_D, spec.BLOCK_DV + spec.TAIL_DV)


@lru_cache(1024)  # lengths are many
def tile_for(spec: Spec, bias_size: int, seqlen_k: int) -> Tile:
    """The tile of the first row that matches; `bias_size` is that of one number of the bias, 0 without one."""
    head_dim = padded_head_dim(spec)
    matrix = spec.BIAS_ROWS and spec.BIAS_COLS
    banded = spec.HAS_LOWER or spec.HAS_UPPER
    for row in ROWS:
        if (
            head_dim <= row.head_dim
            and row.bias_size in (None, bias_size if matrix else 0)
            and row.columns in (None, spec.BIAS_COLS and not matrix)
            and row.banded in (None, banded)
            and row.shared in (None, spec.BIAS_SHARED)
            and row.dropout in (None, spec.DROPOUT)
            and seqlen_k in row.seqlen_k
        ):
            return row.tile
    raise LookupError(f"no tile for {spec} with a bias of {bias_size} bytes a number and {seqlen_k} keys")


_SHARED_MEMORY = 232_448  # bytes of a program
REGISTER_HEAD_DIM = 128  # above it a warpgroup's registers do not hold both dk and dv


@dataclass(frozen=True)
class BackwardSpec:
    """What a backward kernel computes."""

    BLOCK_D: int  # the head dimensions as one power of two, or two: BLOCK + TAIL
    TAIL_D: int
    BLOCK_DV: int
    TAIL_DV: int
    HAS_LOWER: bool
    HAS_UPPER: bool
    BIAS: str = "none"  # or "added" or "mask": one that varies along the keys
    BIAS_ROWS: bool = False  # it varies along the queries too
    DBIAS: str = "none"  # or "keys": one number a key; or "tile": of a bias that nothing shares
    DQ: str = "apart"  # or the kernel that owns keys makes it: "added", in no fixed order, or "kept" by one program
    SOFTCAP: bool = False
    ALIBI: bool = False
    DROPOUT: bool = False
    VARLEN: bool = False  # sequences are packed one after the other; then no bias


def takes_turns(spec: BackwardSpec) -> bool:
    """Whether programs of the kernel that owns keys take one block of them after the other, each the next that is free.
    Not where they keep dq; of packed sequences whose dq is made apart, and of wide heads, each has one."""
    head_dim = max(spec.BLOCK_D + spec.TAIL_D, spec.BLOCK_DV + spec.TAIL_DV)  # kernels ask too, and call nothing plain
    deals = spec.DQ == "added" or (spec.DQ == "apart" and not spec.VARLEN)
    return deals and head_dim <= REGISTER_HEAD_DIM


@dataclass(frozen=True)
class BackwardTile:
    """How a kernel that owns keys computes it."""

    CONSUMERS: int  # warpgroups, or for wide heads pairs of them, of 64 keys
    STAGES: int  # blocks of queries in shared memory
    DSCORES_STAGES: int  # and of dS, or for wide heads of P
    EARLY: bool  # dP is under way while the probabilities are made; wants registers
    REGISTERS: int  # of a consumer's thread
    SERVING_REGISTERS: int  # of the others
    maxnreg: int  # of any thread before these are given out
    KEYS_STAGES: int = 1  # blocks of keys, and of values, in shared memory: with 2 those of the next block come early
    BLOCK_M: int = 64  # queries
    DQ_TILES: int = 0  # of 64 queries: where dq is kept in shared memory, as many as a head may have
    num_warps: int = 4  # of a consumer


@dataclass(frozen=True)
class QueriesTile:
    """How the kernel that owns queries computes dq."""

    CONSUMERS: int  # warpgroups of 64 queries
    BLOCK_N: int  # keys
    STAGES: int  # blocks of keys in shared memory
    REGISTERS: int
    maxnreg: int
    num_warps: int = 4


@dataclass(frozen=True)
class RowsSpec:
    """What the passes over queries before and after it read and write."""

    HEAD_DIM: int
    HEAD_DIM_V: int
    BLOCK_D: int  # of the sums of dq, which lie as BLOCK + TAIL columns
    TAIL_D: int
    BLOCK_DV: int  # one power of two
    VARLEN: bool = False
    DROPOUT: bool = False


@dataclass(frozen=True)
class RowsTile:
    """How they do it."""

    BLOCK_M: int  # that of the backward kernel
    DQ_COLUMNS: int  # of a piece of dq: see `backward_assistant.assist`
    num_warps: int = 4


@dataclass(frozen=True)
class BiasGradientTile:
    """How the kernel for the gradient of a shared bias computes it."""

    STAGES: int  # in shared memory, of 64 columns of q and k, or of dout and v
    BIAS_STAGES: int  # of tiles of the bias
    CHUNKS: int  # of 64 columns a head dimension
    REGISTERS: int = _REGISTERS[2][0]
    maxnreg: int = _REGISTERS[2][1]
    num_warps: int = 4


class BackwardRow(NamedTuple):
    """A tile and what it is for; the first row that matches is taken."""

    head_dim: int  # the larger head dimension, padded, is at most this
    bias_size: int  # bytes of a number of a bias that varies along queries and keys are at most this; 0 = no such bias
    tile: BackwardTile
    seqlen_k: range = range(2**31)
    dropout: bool | None = None  # whether there is dropout, whose bits want shared memory; None matches either
    crowding: range = range(4)  # see `_crowding`
    banded: bool | None = None  # whether there is a causal mask or a window
    packed: bool | None = None  # whether sequences are packed, whose numbers are padded to 64 queries


class QueriesRow(NamedTuple):
    """The same for the kernel that owns queries."""

    head_dim: int
    bias_size: int
    tile: QueriesTile
    seqlen_k: range = range(2**31)


_Row = TypeVar("_Row", BackwardRow, QueriesRow)


# H100 80GB HBM3, Triton 3.6.0, bf16, microseconds of this kernel; batch * seqlen 16k, heads * d 2048, or with a matrix
# bias that the batch shares, b 4, h 16, s 2048. A row without a comment was not timed.
BACKWARD_ROWS = (
    # three consumers spill up to 424 bytes, and 616 with Triton 3.9
    BackwardRow(64, 0, BackwardTile(2, 3, 2, False, 208, 88, 168, 2), crowding=range(2, 4)),
    BackwardRow(64, 2, BackwardTile(2, 3, 1, False, 208, 88, 168), crowding=range(2, 4)),
    # s 1024: 671 us, three consumers 705; causal 440 and 408, s 4096 2375 and 2355 (H200)
    BackwardRow(
        64,
        0,
        BackwardTile(2, 2, 1, False, 192, 120, 168, 2, 128),
        seqlen_k=range(2048),
        crowding=range(1),
        banded=False,
        packed=False,
    ),
    # s 1024 full / causal: 705 / 465 us; with two stages 760 / 485, with three and one block of keys 710 / 501
    BackwardRow(64, 0, BackwardTile(3, 3, 2, False, 144, 80, 128, 2)),
    # pair bias n 256, 384, 512: 106, 308, 696 us, with three consumers 137, 265, 653; with two stages 119, 336, 725 and
    # 142, 294, 694
    BackwardRow(32, 2, BackwardTile(2, 3, 2, True, 208, 88, 168, 2), seqlen_k=range(257)),
    BackwardRow(32, 2, BackwardTile(3, 3, 2, False, 144, 80, 128, 2)),
    BackwardRow(64, 2, BackwardTile(3, 3, 1, False, 144, 80, 128)),  # 414 us; two stages 452; two consumers 432
    BackwardRow(64, 4, BackwardTile(2, 2, 1, False, 208, 88, 168)),
    # s 2000, causal, d 80 / 96: 787 / 714 us; one block of keys, 200 and 104 registers 809 / 783, 216 and 72 858 / 801
    # (H200)
    BackwardRow(96, 0, BackwardTile(2, 3, 1, False, 192, 120, 168, 2), crowding=range(2)),
    # s 1024 full / causal: 602 / 449 us; two stages 653 / 463. 208 and 88 registers spill: 444 TFLOP/s of 528
    BackwardRow(128, 0, BackwardTile(2, 3, 1, False, 216, 72, 168)),
    BackwardRow(128, 2, BackwardTile(2, 2, 1, False, 216, 72, 168)),  # 662 us
    BackwardRow(128, 4, BackwardTile(2, 1, 1, False, 216, 72, 168)),
)

# Where dq of a head of a batch entry is kept in shared memory by the program that has all of its keys.
KEPT_ROWS = (
    # pair bias n 256: 122 us with the passes before and after it, 144 where dq is added up; n 384 and 512 with as many
    # tiles as these need: 326 and 341, 759 and 759 (H200)
    BackwardRow(32, 2, BackwardTile(2, 2, 1, False, 208, 88, 168, 2, 128, 4), crowding=range(2)),
)

# Where dq is made apart: the kernels that own keys, in TFLOP/s that count the four products they do; full / causal.
KEYS_ROWS = (
    BackwardRow(64, 0, BackwardTile(3, 3, 0, False, 160, 24, 128, 2)),  # s 4096: 1873 / 1003 us; two stages 1933 / 1065
    BackwardRow(64, 2, BackwardTile(2, 3, 0, False, 240, 24, 168, 2)),
    BackwardRow(64, 4, BackwardTile(2, 2, 0, False, 240, 24, 168)),
    BackwardRow(128, 0, BackwardTile(2, 2, 0, True, 240, 24, 168)),  # 733 / 678; not early: 648 / 639
    BackwardRow(128, 2, BackwardTile(2, 2, 0, True, 240, 24, 168)),
    BackwardRow(128, 4, BackwardTile(2, 1, 0, True, 240, 24, 168)),
    BackwardRow(256, 2, BackwardTile(1, 2, 1, True, 240, 24, 168), dropout=True),
    BackwardRow(256, 2, BackwardTile(1, 2, 2, True, 240, 24, 168)),  # 749 / 686
    BackwardRow(256, 4, BackwardTile(1, 1, 2, True, 240, 24, 168)),
)

# And the kernel that owns queries, in TFLOP/s that count its three products.
QUERIES_ROWS = (
    QueriesRow(64, 0, QueriesTile(3, 64, 4, 160, 128)),
    QueriesRow(64, 4, QueriesTile(2, 64, 3, 240, 168)),
    QueriesRow(128, 4, QueriesTile(2, 64, 2, 240, 168)),  # 697 / 631; 3 x 64, 2 x 128: 631 / 545, 536 / 476
    QueriesRow(
        192, 0, QueriesTile(2, 64, 2, 240, 168)
    ),  # s 2000, causal, d 160 / 192: 305 / 293 us; 32 keys: 378 / 356
    QueriesRow(256, 4, QueriesTile(2, 32, 2, 240, 168)),  # 670 / 558; 2 x 64 in one stage: 552 / 481
)


def keys_tile_for(spec: BackwardSpec, bias_size: int, seqlen_k: int) -> BackwardTile:
    """The tile of the kernel for dk and dv; `bias_size` is that of one number of the bias, 0 without one."""
    rows = BACKWARD_ROWS if spec.DQ == "added" else KEYS_ROWS
    return _first_row((row for row in rows if _suits(row, spec)), spec, bias_size, seqlen_k).tile


def kept_tile_for(spec: BackwardSpec, bias_size: int, seqlen_q: int) -> BackwardTile | None:
    """The same where dq is kept; None if there is none for so many queries."""
    size = bias_size if spec.BIAS_ROWS else 0
    for row in KEPT_ROWS:
        fits = padded_head_dim(spec) <= row.head_dim and seqlen_q <= 64 * row.tile.DQ_TILES
        if fits and size <= row.bias_size and _suits(row, spec):
            return row.tile
    return None


def queries_tile_for(spec: BackwardSpec, bias_size: int, seqlen_k: int) -> QueriesTile:
    """The tile of the kernel for dq."""
    return _first_row(QUERIES_ROWS, spec, bias_size, seqlen_k).tile


def _first_row(rows: Iterable[_Row], spec: BackwardSpec, bias_size: int, seqlen_k: int) -> _Row:
    head_dim = padded_head_dim(spec)
    size = bias_size if spec.BIAS_ROWS else 0
    return next(row for row in rows if head_dim <= row.head_dim and size <= row.bias_size and seqlen_k in row.seqlen_k)


def _suits(row: BackwardRow, spec: BackwardSpec) -> bool:
    banded = spec.HAS_LOWER or spec.HAS_UPPER
    return (
        row.dropout in (None, spec.DROPOUT)
        and _crowding(spec) in row.crowding
        and row.banded in (None, banded)
        and row.packed in (None, spec.VARLEN)
    )


def _crowding(spec: BackwardSpec) -> int:
    """How much there is that wants registers: changed scores, dropout, and the gradient of a bias of the keys."""
    return (spec.SOFTCAP or spec.ALIBI) + spec.DROPOUT + (spec.DBIAS == "keys")


def bias_gradient_tile(head_dim: int, bias_size: int, gradient_size: int) -> BiasGradientTile:
    """The tile for the larger head dimension and the bytes of a number; as many stages as shared memory holds.

    The bias of the next tile comes early where tiles are not split, and so may have few sharers.
    """
    room = _SHARED_MEMORY - 1024 - 128 * 128 * gradient_size
    stage = (128 + 128) * min(head_dim, 64) * 2 + 128 * 4
    bias = 128 * 128 * bias_size
    bias_stages = 2 if gradient_size <= 2 and room - 2 * bias >= 3 * stage else 1
    return BiasGradientTile(min(8, (room - bias_stages * bias) // stage), bias_stages, -(-head_dim // 64))
