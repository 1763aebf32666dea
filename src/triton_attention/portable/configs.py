"""Which kernel is asked for (Spec), and with which tile does it run (Tile)?

Tiles are data: rows that say for which GPU, kernel, head dimension, bias and dtype they are, in order of preference,
with the measurement that chose them. Nothing is tuned at run time, and no length is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple


@dataclass(frozen=True)
class Spec:
    """What a kernel computes. Plain fields only: Triton's cache sees the text of a constant, nothing inside it."""

    HEAD_DIM: int
    HEAD_DIM_V: int
    BLOCK_D: int  # the head dimensions, padded to powers of two
    BLOCK_DV: int
    HAS_LOWER: bool  # the mask's band has a lower bound: the left side of a window
    HAS_UPPER: bool  # it has an upper bound: causal, or the right side of a window
    BIAS: str  # "none", "added" or "mask" (boolean)
    BIAS_ROWS: bool  # the bias varies along the queries
    BIAS_COLS: bool  # it varies along the keys
    DBIAS: str  # what a kernel writes of its gradient: "none", "tile", "rows" or "cols"
    RAW_SCORES: bool  # nothing is done to q k^T and softmax_scale > 0: the scale folds into the exponent
    SOFTCAP: bool
    ALIBI: bool
    SINK: bool
    DROPOUT: bool
    VARLEN: bool  # sequences of different lengths are packed one after the other
    PRECISION: str = "ieee"  # of float32 products; tf32 would lose 13 bits silently


@dataclass(frozen=True)
class Tile:
    """How a kernel computes it."""

    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    num_warps: int
    num_stages: int
    TMA: bool = False  # q, k, v and dout come through tensor descriptors
    TMA_BIAS: bool = False  # so does a bias that varies along queries and keys


class Gpu(NamedTuple):
    """What a family of GPUs offers a kernel."""

    shared_memory: int  # bytes a block may have
    descriptors: bool  # copies tiles by tensor descriptors (TMA)
    tensor_memory: int = 0  # columns a block may have, where products accumulate there


GPUS = {
    "sm_80": Gpu(166_912, False),  # A100, and Orin
    "sm_86": Gpu(101_376, False),  # GeForce 30, 40 and 50: sm_86, sm_89, sm_120
    "sm_90": Gpu(232_448, True),  # H100, H200
    "sm_100": Gpu(232_448, True, 512),  # B200, B300
    "gfx942": Gpu(65_536, False),  # MI300
    "interpreter": Gpu(1 << 30, True),  # Triton's interpreter, on the CPU
}

_COMPUTE_CAPABILITIES = {80: "sm_80", 87: "sm_80", 90: "sm_90", 100: "sm_100", 103: "sm_100"}


def gpu_family(backend: str, arch: int | str) -> str:
    """The family in GPUS of a Triton target, the most modest one where it is not known."""
    if backend == "hip":
        return "gfx942"
    return _COMPUTE_CAPABILITIES.get(int(arch), "sm_86")


class Row(NamedTuple):
    """A tile and what it is for; None matches anything, and the first row that matches is taken."""

    head_dim: int  # the larger head dimension, padded, is at most this
    tile: Tile
    matrix_bias: bool | None = None  # whether there is a bias that varies along queries and keys
    banded: bool | None = None  # whether there is a causal mask or a window
    family: str | None = None  # of GPUS
    dropout: bool | None = None  # whether there is dropout, whose mask passes through shared memory


def _tiles(*rows: tuple[int, Tile]) -> list[Row]:
    return [Row(head_dim, tile) for head_dim, tile in rows]


# float16 and bfloat16 with descriptors. sm_90: H100 80GB HBM3, Triton 3.6.0, bf16; each comment has the TFLOP/s of the
# matrix products that the kernel really does, at s 4096 (batch * seqlen 16k, heads * d 2048; full / causal), and for a
# matrix bias at s 2048, b 4, h 16; a row without a comment was not timed. sm_100 has rows of its own where these do not
# fit its memories; no clock has seen it.
_DESCRIPTOR_ROWS = {
    "attention_fwd": [
        Row(32, Tile(64, 64, 4, 3, TMA=True)),  # d 32, pair bias n 384: 152; 128 x 64: 141
        Row(64, Tile(128, 64, 4, 3, TMA=True), matrix_bias=True),  # 280; without the bias's own descriptor 175
        Row(64, Tile(64, 64, 4, 3, TMA=True)),  # 453 / 398; 128 x 64: 427 / 384
        Row(128, Tile(128, 64, 8, 3, TMA=True), matrix_bias=True),  # 370; 128 x 128: 312
        Row(128, Tile(64, 64, 4, 3, TMA=True), banded=True),  # 487 causal; 128 x 64: 458
        Row(128, Tile(128, 64, 4, 2, TMA=True)),  # 554 full; 64 x 64: 537, 128 x 128 of 8 warps: 503
        Row(256, Tile(128, 64, 8, 2, TMA=True), matrix_bias=False),  # 542; 64 x 64: 454
        Row(256, Tile(128, 32, 8, 2, TMA=True)),
    ],
    "attention_bwd_dkdv": [
        Row(32, Tile(32, 128, 4, 3, TMA=True), banded=False),  # d 32, pair bias n 384: 196; 64 x 64: 159
        Row(64, Tile(64, 64, 4, 3, TMA=True), banded=False),  # 513, with a bias 362; 32 x 128: 451
        Row(64, Tile(64, 64, 4, 2, TMA=True)),  # 407 causal; 128 x 64: 412 with more spills
        Row(128, Tile(64, 64, 8, 2, TMA=True), family="sm_100"),
        # 574, with a bias 433; 32 x 128 of 8 warps: 486
        Row(128, Tile(32, 64, 4, 3, TMA=True), banded=False, family="sm_90"),
        Row(128, Tile(32, 64, 4, 2, TMA=True), family="sm_90"),  # 497 causal
        Row(256, Tile(32, 32, 8, 1), family="sm_100"),  # by pointers: 64 keys would not fit its tensor memory
        Row(256, Tile(64, 64, 8, 2, TMA=True), matrix_bias=False, family="sm_90"),  # 280; 32 x 64: 247
        Row(256, Tile(32, 64, 8, 2, TMA=True), family="sm_90"),
    ],
    "attention_bwd_dq": [
        Row(32, Tile(64, 64, 4, 3, TMA=True)),  # d 32, pair bias n 384: 238; 128 x 64: 197
        Row(64, Tile(128, 64, 4, 3, TMA=True), matrix_bias=True),  # 416; 64 x 32: 373
        Row(64, Tile(128, 64, 8, 3, TMA=True)),  # 674 / 597; 64 x 64 of 4 warps: 666 / 599
        Row(128, Tile(128, 64, 8, 3, TMA=True)),  # 664 / 581, with a bias 516; 64 x 64: 632 / 541
        Row(256, Tile(128, 32, 8, 2, TMA=True), matrix_bias=False, family="sm_100"),
        Row(256, Tile(128, 32, 8, 2, TMA=True), matrix_bias=False, family="sm_90", dropout=True),  # 3 would not fit
        Row(256, Tile(128, 32, 8, 3, TMA=True), matrix_bias=False, family="sm_90"),  # 624; 64 x 32: 525
        Row(256, Tile(64, 32, 4, 2, TMA=True)),
    ],
    "attention_bwd_dbias": [
        Row(32, Tile(64, 32, 4, 3, TMA=True)),  # d 32, pair bias n 256, 384, 512: 47, 92, 132; 64 x 64: 43, 88, -
        Row(64, Tile(64, 64, 4, 2, TMA=True)),  # 180; 3 stages: 151, 128 x 64: 150
        Row(128, Tile(64, 128, 4, 1, TMA=True)),  # 197; 128 x 64 of 8 warps and 2 stages: 180
        Row(256, Tile(64, 64, 8, 1, TMA=True)),
    ],
}

# float16 and bfloat16 by pointers, 16 bytes a load, on GPUs without descriptors. Chosen by what compiles with few
# spills into the shared memory there is: no clock has seen them.
_VECTOR_ROWS = {
    "sm_80": {
        "attention_fwd": _tiles((64, Tile(64, 64, 4, 3)), (128, Tile(128, 64, 8, 3)), (256, Tile(64, 64, 8, 2))),
        "attention_bwd_dkdv": _tiles((64, Tile(32, 64, 4, 3)), (128, Tile(64, 64, 8, 2)), (256, Tile(32, 32, 8, 1))),
        "attention_bwd_dq": _tiles((64, Tile(64, 32, 4, 3)), (128, Tile(64, 64, 8, 2)), (256, Tile(64, 32, 8, 1))),
        "attention_bwd_dbias": _tiles((128, Tile(64, 64, 4, 2)), (256, Tile(32, 32, 4, 2))),
    },
    "sm_86": {
        "attention_fwd": _tiles((64, Tile(64, 64, 4, 3)), (128, Tile(128, 32, 8, 3)), (256, Tile(64, 32, 4, 2))),
        "attention_bwd_dkdv": _tiles((64, Tile(32, 64, 4, 3)), (128, Tile(64, 64, 8, 2)), (256, Tile(32, 32, 8, 1))),
        "attention_bwd_dq": _tiles((64, Tile(64, 32, 4, 3)), (128, Tile(64, 64, 8, 2)), (256, Tile(32, 32, 4, 1))),
        "attention_bwd_dbias": _tiles((128, Tile(64, 64, 4, 2)), (256, Tile(32, 32, 4, 2))),
    },
    "gfx942": {
        "attention_fwd": _tiles((64, Tile(128, 64, 4, 2)), (128, Tile(64, 64, 4, 1)), (256, Tile(32, 32, 4, 1))),
        "attention_bwd_dkdv": _tiles((64, Tile(32, 64, 4, 1)), (128, Tile(32, 32, 4, 1)), (256, Tile(16, 32, 8, 1))),
        "attention_bwd_dq": _tiles((64, Tile(64, 32, 4, 1)), (128, Tile(64, 32, 8, 1)), (256, Tile(16, 32, 4, 1))),
        "attention_bwd_dbias": _tiles((128, Tile(64, 64, 8, 1)), (256, Tile(16, 32, 4, 1))),
    },
}

# float16 and bfloat16 element by element, everywhere: an odd head dimension, or strides that are. Right, not fast.
_ELEMENT_ROWS = {
    "attention_fwd": _tiles((64, Tile(32, 32, 4, 1)), (256, Tile(32, 32, 8, 1))),
    "attention_bwd_dkdv": [
        Row(64, Tile(32, 32, 4, 1)),
        *(Row(256, Tile(32, 32, 8, 1), family=family) for family in ("sm_80", "sm_86", "sm_90", "sm_100")),
        Row(256, Tile(16, 32, 8, 1), family="gfx942"),  # 32 queries spill 2,152 bytes
    ],
    "attention_bwd_dq": _tiles((64, Tile(32, 32, 4, 1)), (256, Tile(32, 32, 8, 1))),
    "attention_bwd_dbias": _tiles((64, Tile(32, 32, 4, 1)), (128, Tile(32, 32, 8, 1)), (256, Tile(16, 16, 4, 1))),
}

# float32, everywhere: products by fused multiply-adds, since tensor cores would round the operands to tf32.
_FLOAT32_ROWS = {
    "attention_fwd": _tiles((64, Tile(32, 32, 4, 1)), (128, Tile(32, 32, 8, 1)), (256, Tile(16, 16, 4, 1))),
    "attention_bwd_dkdv": _tiles((64, Tile(32, 32, 4, 1)), (128, Tile(32, 32, 8, 1)), (256, Tile(16, 16, 4, 1))),
    "attention_bwd_dq": _tiles((64, Tile(32, 32, 4, 1)), (128, Tile(16, 32, 4, 1)), (256, Tile(16, 16, 4, 1))),
    "attention_bwd_dbias": _tiles((64, Tile(32, 32, 4, 1)), (128, Tile(32, 32, 8, 1)), (256, Tile(16, 16, 4, 1))),
}

_INTERPRETER_TILE = Tile(16, 32, 1, 1)  # small, so that small problems have many blocks
_ROWS_TILE = Tile(32, 32, 4, 1)  # attention_bwd_rows is bound by memory: 16 to 128 rows measured alike
_PACKED_ROWS_TILE = Tile(128, 32, 8, 1)  # as many rows as those of a packed sequence are padded to


def rows_for(kernel: str, family: str, access: str) -> list[Row]:
    """The rows to choose from, in order of preference.

    `access` says how tiles of q, k, v and dout can be read: "descriptors", "vectors" of 16 bytes, or "elements";
    it is "float32" for tensors of that dtype, however they are read.
    """
    if kernel == "attention_bwd_rows":
        return [Row(256, _ROWS_TILE)]
    if family == "interpreter":
        return [Row(256, replace(_INTERPRETER_TILE, TMA=access == "descriptors"))]
    tables = {"descriptors": _DESCRIPTOR_ROWS, "elements": _ELEMENT_ROWS, "float32": _FLOAT32_ROWS}
    table = _VECTOR_ROWS[family] if access == "vectors" else tables[access]
    return [row for row in table[kernel] if row.family in (None, family)]


@cache
def tile_for(kernel: str, family: str, access: str, spec: Spec) -> Tile:
    """The tile of the first row that matches."""
    if kernel == "attention_bwd_rows" and spec.VARLEN:
        return _PACKED_ROWS_TILE
    head_dim = max(spec.BLOCK_D, spec.BLOCK_DV)
    matrix_bias = spec.BIAS != "none" and spec.BIAS_ROWS and spec.BIAS_COLS
    banded = spec.HAS_LOWER or spec.HAS_UPPER
    for row in rows_for(kernel, family, access):
        wanted = (row.matrix_bias, row.banded, row.dropout)
        asked = (matrix_bias, banded, spec.DROPOUT)
        if head_dim <= row.head_dim and all(w in (None, a) for w, a in zip(wanted, asked, strict=True)):
            return row.tile
    raise LookupError(f"no tile for {kernel} on {family} by {access}: {spec}")


def with_matrix_bias(tile: Tile, bias_size: int, described: bool) -> Tile:
    """The tile beside a bias that varies along queries and keys, of so many bytes a number, by a descriptor or not.

    The stages of the tables leave room for tiles of 16-bit numbers; where there are three, two hold those of float32.
    """
    stages = tile.num_stages if bias_size <= 2 else min(tile.num_stages, 2)
    return replace(tile, TMA_BIAS=described, num_stages=stages)
