"""Which problems is every kernel tried on? One list for the interpreter, the compiler and the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any, NamedTuple

import torch

from triton_attention.problem import Mask

CAUSAL = Mask(None, 0)
CAUSAL_TOP_LEFT = Mask(None, 0, top_left=True)
FULL = Mask()

LENGTHS = ((35, 40), (0, 7), (1, 1), (50, 61), (9, 0), (33, 17))  # of packed sequences: (seqlen_q, seqlen_k)

# Each of (batch, heads, seqlen_q, seqlen_k) is there, or 1 where the bias is broadcast.
BIAS_PATTERNS = tuple("".join(letters) for letters in product("1b", "1h", "1q", "1k"))


class Case(NamedTuple):
    """A problem, small enough to be checked against the reference."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int = 64
    head_dim_v: int | None = None  # None = head_dim
    batch: int = 2
    heads_q: int = 2
    heads_kv: int | None = None  # None = heads_q
    mask: Mask = FULL
    bias: str | None = None  # one of BIAS_PATTERNS
    bias_dtype: torch.dtype | None = None  # None = dtype; torch.bool = a mask
    layout: str = "bshd"  # "bshd" contiguous; "bhsd" transposed; "packed" q, k, v are views of one tensor
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi: str | None = None  # "h" or "bh": the axes of the slopes
    sink: bool = False
    dropout_p: float = 0.0
    lengths: tuple[tuple[int, int], ...] | None = None  # (seqlen_q, seqlen_k) of packed sequences; those above are max
    unused: tuple[int, int] = (0, 0)  # rows of q and k that no sequence has
    dtype: torch.dtype = torch.float16

    @property
    def bias_shape(self) -> tuple[int, int, int, int]:
        batch = self.batch if self.lengths is None else len(self.lengths)
        sizes = (batch, self.heads_q, self.seqlen_q, self.seqlen_k)
        letters = self.bias or "1111"
        b, h, q, k = (1 if letter == "1" else size for letter, size in zip(letters, sizes, strict=True))
        return b, h, q, k

    def __str__(self) -> str:
        """What differs from the defaults, short enough for a test's name."""
        shown = {name: value for name, value in self._asdict().items() if value != self._field_defaults.get(name)}
        lengths = f"{shown.pop('seqlen_q')}x{shown.pop('seqlen_k')}"
        words = [f"{name}={_short(value)}" for name, value in shown.items()]
        return ",".join([lengths, *words])


def _short(value: object) -> str:
    if isinstance(value, Mask):
        left, right = ("" if side is None else str(side) for side in value[:2])
        return f"[{left}:{right}]{'top-left' if value.top_left else ''}"
    if isinstance(value, tuple):
        return "+".join("x".join(map(str, pair)) if isinstance(pair, tuple) else str(pair) for pair in value)
    return str(value).removeprefix("torch.")


def _with_every_bias() -> list[Case]:
    lengths = {FULL: (35, 40), CAUSAL: (40, 35)}  # 40 keys: rows of 16 bytes, for descriptors; 35: for pointers
    return [Case(q, k, 16, heads_kv=1, mask=mask, bias=b) for mask, (q, k) in lengths.items() for b in BIAS_PATTERNS]


def pairwise(**factors: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Few combinations in which every two values of different factors meet: greedy, and the same each time."""

    def pairs(row: dict[str, int]) -> set[tuple[tuple[str, int], ...]]:
        return set(combinations(sorted(row.items()), 2))

    values = {name: range(len(factor)) for name, factor in factors.items()}
    missing = set()
    for one, two in combinations(sorted(factors), 2):
        missing |= set(product(((one, i) for i in values[one]), ((two, i) for i in values[two])))
    while missing:
        row = dict(min(missing))
        for name in factors:
            if name not in row:
                gains = [len(missing & pairs({**row, name: i})) for i in values[name]]
                row[name] = gains.index(max(gains))
        missing -= pairs(row)
        yield {name: factors[name][i] for name, i in row.items()}


def _features(
    lengths: tuple[tuple[int, int], ...],
    longest: tuple[int, int],
    head_dims: tuple[tuple[int, int | None], ...],
    dtypes: tuple[torch.dtype, ...],
) -> Iterator[Case]:
    """What changes scores and probabilities, in pairs with each other, with these lengths and LENGTHS, whose bias has
    the lengths `longest`, and with the rest."""
    for row in pairwise(
        lengths=(*lengths, LENGTHS),
        bias=(
            (None, None),
            ("1hqk", None),
            ("b11k", None),
            ("b1q1", None),
            ("bhqk", torch.float32),
            ("b1qk", torch.bool),
        ),
        mask=(FULL, CAUSAL, CAUSAL_TOP_LEFT, Mask(9, 4)),
        head_dims=head_dims,
        alibi=(None, "h", "bh"),
        softcap=(0.0, 3.0),
        sink=(False, True),
        dropout_p=(0.0, 0.3),
        heads=((2, None), (4, 2)),
        dtype=dtypes,
    ):
        drawn, (head_dim, head_dim_v), (heads_q, heads_kv), (bias, bias_dtype) = (
            row.pop(name) for name in ("lengths", "head_dims", "heads", "bias")
        )
        seqlen_q, seqlen_k = longest if drawn == LENGTHS else drawn
        yield Case(
            seqlen_q, seqlen_k, head_dim, head_dim_v, heads_q=heads_q, heads_kv=heads_kv, bias=bias,
            bias_dtype=bias_dtype, lengths=LENGTHS if drawn == LENGTHS else None, **row,
        )  # fmt: skip


# Rows of q, k, v and of every bias, a bool one too, are multiples of 16 bytes, as `hopper` wants them.
FEATURES_OF_EVERY_BACKEND = tuple(
    _features(
        ((35, 48), (67, 16), (3, 80)),
        longest=(50, 64),
        head_dims=((16, None), (40, 24)),
        dtypes=(torch.float16,),
    )
)

CASES: tuple[Case, ...] = (
    # lengths: one, odd, above and below a block; more queries than keys leaves rows that see nothing under CAUSAL
    *(
        Case(q, k, 32, mask=mask)
        for q, k in ((1, 1), (1, 67), (67, 1), (17, 33), (64, 64), (65, 37), (37, 65))
        for mask in (FULL, CAUSAL, CAUSAL_TOP_LEFT)
    ),
    # windows: both sides, one side, narrower than a block, beyond the keys
    *(
        Case(50, 61, 16, mask=mask)
        for mask in (Mask(5, 3), Mask(20, 0), Mask(None, 9), Mask(7, None), Mask(0, 0), Mask(40, 2, True), Mask(3, 99))
    ),
    Case(50, 61, 16, mask=Mask(10**12, 10**12)),
    # head dimensions
    *(Case(33, 47, d, mask=CAUSAL) for d in (1, 2, 7, 8, 24, 40, 59, 72, 96, 111, 128, 160, 256)),
    Case(33, 47, 64, 24),
    Case(33, 47, 24, 128, mask=CAUSAL),
    Case(33, 47, 13, 11),
    # heads that share keys
    Case(37, 45, 32, heads_q=6, heads_kv=2, mask=CAUSAL),
    Case(37, 45, 32, heads_q=4, heads_kv=1, bias="1h1k"),
    # layouts
    *(Case(33, 33, 40, layout=layout, mask=CAUSAL) for layout in ("bhsd", "packed")),
    Case(33, 33, 7, layout="packed"),
    # scales
    *(Case(33, 47, 32, softmax_scale=scale, mask=CAUSAL) for scale in (0.0, -0.3, 2.0)),
    Case(33, 47, 32, softmax_scale=-0.3, bias="1hqk"),
    # every bias pattern, and every dtype
    *_with_every_bias(),
    *(Case(35, 40, 16, bias=b, bias_dtype=torch.bool, mask=CAUSAL) for b in ("b11k", "1hqk", "bhq1", "1111")),
    *(Case(35, 40, 16, bias=b, bias_dtype=torch.float32) for b in ("b11k", "1hqk", "bhqk")),
    Case(35, 40, 16, bias="bhqk", mask=Mask(9, 4)),
    Case(35, 40, 16, heads_q=4, heads_kv=2, bias="1hqk", mask=Mask(9, 4)),
    # float32
    Case(37, 45, 40, mask=CAUSAL, dtype=torch.float32),
    *(Case(35, 40, 16, bias=b, dtype=torch.float32) for b in ("1h1k", "1hqk", "b1qk", "bhqk")),
    Case(35, 40, 16, bias="1hqk", bias_dtype=torch.float16, dtype=torch.float32),
    # packed sequences: empty, of one row, longer than a block, with rows that none has, and all that may go with them
    *(Case(50, 61, 16, lengths=LENGTHS, mask=mask) for mask in (FULL, CAUSAL, CAUSAL_TOP_LEFT, Mask(9, 4))),
    Case(50, 61, 16, lengths=LENGTHS, unused=(5, 40), mask=CAUSAL),
    Case(50, 61, 16, lengths=LENGTHS, unused=(5, 40), sink=True),
    Case(99, 99, 16, lengths=LENGTHS, bias="bhqk"),
    Case(50, 61, 40, 24, lengths=LENGTHS),
    Case(61, 61, 40, lengths=((61, 61), (3, 3), (20, 20)), layout="packed", mask=CAUSAL),
    *(Case(50, 61, 16, lengths=LENGTHS, heads_kv=1, bias=b, mask=CAUSAL) for b in BIAS_PATTERNS),
    # softcap, ALiBi, sink, dropout: each alone, and all in pairs
    Case(50, 61, 16, mask=CAUSAL, softcap=2.0),
    Case(50, 61, 16, mask=CAUSAL, alibi="h"),
    Case(50, 61, 16, mask=CAUSAL, sink=True),
    *(Case(35, 40, 16, bias=b, bias_dtype=torch.bool, sink=True) for b in ("bhq1", "b111")),  # lse hides no hidden row
    Case(50, 61, 16, mask=CAUSAL, dropout_p=0.3),
    *_features(
        ((40, 35), (35, 40), (1, 67), (67, 1)),
        longest=(50, 61),
        head_dims=((16, None), (40, 24), (13, 11)),
        dtypes=(torch.float16, torch.float32),
    ),
    *FEATURES_OF_EVERY_BACKEND,
)
