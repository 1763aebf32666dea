"""Which random problem does a number stand for?

A seed is a kind and an index: `kind * TRIALS_OF_A_KIND + index`. The kind decides on what kernels are compiled for
(dtype, head dims, mask, bias, alignment, packed sequences), the index on the rest (sizes, strides, magnitudes), so that
the problems of one kind share a few compiled variants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from triton_attention.philox import kept_factor
from triton_attention.problem import Inputs, Mask, Problem
from triton_attention.testing.cases import BIAS_PATTERNS
from triton_attention.testing.guards import GUARD_BYTES, POISON

TRIALS_OF_A_KIND = 1000
LARGEST_SCORES = 2**20  # elements of batch * heads * seqlen_q * seqlen_k

_HEAD_DIMS = (8, 16, 24, 32, 40, 48, 64, 64, 64, 72, 80, 88, 96, 104, 112, 128, 128, 128, 136, 160, 192, 200, 224, 256)
_ODD_HEAD_DIMS = (1, 2, 3, 7, 11, 20, 33, 59, 65, 100, 111, 127, 129, 250)
_DTYPES = (torch.float16, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32)
_BLOCKS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
_LARGEST_LOGIT = 1e3  # beyond, a log-sum-exp in float32 does not give the backward its probabilities back
_LARGEST_GRADIENT = 1e4  # in float16: 4 standard deviations are still in its range


class Layout(NamedTuple):
    """How a tensor lies in its buffer. Sizes do not matter to what is compiled: rows stay (un)aligned with any."""

    order: tuple[int, int, int, int]  # of its axes, the outermost first
    multiple: int  # elements in 16 bytes
    residue: int  # of the distance between rows modulo `multiple`; 0 = rows are aligned if the first is
    extra: int  # how many times `multiple` it is larger than it must be
    start: int  # elements before the first
    expanded: tuple[int, ...]  # axes along which all elements are one (stride 0)

    def row_stride(self, columns: int) -> int:
        return columns + (self.residue - columns) % self.multiple + self.extra * self.multiple


BOUNDARIES = Layout((0, 1, 2, 3), multiple=4, residue=0, extra=0, start=0, expanded=())


class Sizes(NamedTuple):
    """What can be made smaller without making it a problem of another kind."""

    batch: int
    heads_kv: int
    group: int  # query heads that share a key head
    seqlen_q: int  # of packed sequences: no one is longer
    seqlen_k: int

    @property
    def heads_q(self) -> int:
        return self.heads_kv * self.group


class Trial(NamedTuple):
    """A problem and its inputs, as numbers."""

    seed: int
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    sizes: Sizes
    mask: Mask
    softmax_scale: float | None
    softcap: float
    dropout_p: float
    alibi: str  # the axes of the slopes, "h" or "bh"; "" = none
    sink: bool
    bias: str  # one of BIAS_PATTERNS; "" = none
    bias_dtype: torch.dtype
    bias_needs_grad: bool
    hidden: float  # share of the bias that is -inf or False
    magnitudes: tuple[float, float, float, float]  # of q, k, v, bias
    layouts: tuple[Layout, Layout, Layout, Layout]
    packed: bool  # sequences of different lengths, in rows one after the other

    @property
    def loss_scale(self) -> float:
        """A size of the output's gradient for which no gradient leaves the range of float16."""
        if torch.float16 not in (self.dtype, self.bias_dtype):
            return 1.0
        q, k, v, _ = self.magnitudes
        scale = 1 / math.sqrt(self.head_dim) if self.softmax_scale is None else abs(self.softmax_scale)
        dscores = v * math.sqrt(self.head_dim_v) * kept_factor(self.dropout_p) + 1
        summed = math.sqrt(self.sizes.batch * self.sizes.heads_q * self.sizes.seqlen_q)
        return min(1.0, _LARGEST_GRADIENT / (4 * dscores * max(1.0, scale * k, scale * q) * summed))


def draw(seed: int, largest_scores: int = LARGEST_SCORES) -> Trial:
    """The trial of a seed, with at most `largest_scores` scores."""
    kind, draw = Random(seed // TRIALS_OF_A_KIND), Random(f"trial {seed}")

    # what is compiled
    dtype = kind.choice(_DTYPES)
    odd = kind.random() < 0.2
    head_dim = head_dim_v = kind.choice(_ODD_HEAD_DIMS if odd else _HEAD_DIMS)
    if kind.random() < 0.25:
        head_dim_v = kind.choice(_ODD_HEAD_DIMS if odd else _HEAD_DIMS)
    left, right = kind.choice(
        [(False, False), (False, False), (False, True), (False, True), (True, False), (True, True)]
    )
    bias = kind.choice(BIAS_PATTERNS) if kind.random() < 0.6 else ""
    bias_dtype = kind.choice([dtype, dtype, torch.float32, torch.float16, torch.bfloat16, torch.bool])
    bias_needs_grad = bool(bias) and bias_dtype != torch.bool and kind.random() < 0.8
    misaligned = kind.random() < 0.25
    odd_rows = [misaligned and kind.random() < 0.5 for _ in range(4)]
    odd_starts = [misaligned and kind.random() < 0.5 for _ in range(4)]
    sign = kind.choice([1, 1, 1, 1, 1, 1, 1, 1, -1, 0])  # of the scale
    softcap, dropout, sink = (kind.random() < share for share in (0.1, 0.1, 0.1))
    alibi = kind.choice(["h", "bh"]) if kind.random() < 0.1 else ""
    packed = kind.random() < 0.2

    # what is not
    sizes = _draw_sizes(draw, largest_scores, (1, 2, 5, 20) if packed else (1, 1, 2, 3))
    batch, heads_kv, _, seqlen_q, seqlen_k = sizes
    sides = [draw.choice([0, 1, draw.randrange(20), draw.randrange(seqlen_q + seqlen_k), 2**40]) for _ in range(2)]
    causal = right and (not left or draw.random() < 0.5)
    mask = Mask(sides[0] if left else None, 0 if causal else sides[1] if right else None, draw.random() < 0.3)
    magnitudes = tuple(10 ** draw.uniform(-4, 4) if draw.random() < 0.3 else 1.0 for _ in range(4))
    q, k, v, added = magnitudes
    dropout_p = draw.choice([0.05, 0.5, 0.9]) if dropout else 0.0
    v = min(v, 1e4 / kept_factor(dropout_p))  # what is kept grows, and float16 ends at 65,504
    scale = None if draw.random() < 0.6 and sign == 1 else draw.choice([0.01, 0.2, 1.0, 3.0])
    logits = q * k * math.sqrt(head_dim)
    largest = _LARGEST_LOGIT if draw.random() < 0.3 else 30.0
    if (head_dim**-0.5 if scale is None else scale) * logits > largest:
        scale = largest / logits
    scale = scale if scale is None else sign * scale
    layouts = []
    shapes = {
        "q": (batch, seqlen_q, sizes.heads_q, head_dim),
        "k": (batch, seqlen_k, heads_kv, head_dim),
        "v": (batch, seqlen_k, heads_kv, head_dim_v),
        "bias": _bias_shape(bias, sizes),
    }
    for shape, name, odd_row, odd_start in zip(shapes.values(), shapes, odd_rows, odd_starts, strict=True):
        multiple = 16 // (bias_dtype if name == "bias" else dtype).itemsize
        layouts.append(_draw_layout(draw, name, shape[3], multiple, odd_row, odd_start))
    return Trial(
        seed, dtype, head_dim, head_dim_v, sizes, mask, scale,
        softcap=draw.choice([0.5, 5.0, 50.0]) if softcap else 0.0,
        dropout_p=dropout_p,
        alibi=alibi,
        sink=sink,
        bias=bias,
        bias_dtype=bias_dtype,
        bias_needs_grad=bias_needs_grad,
        hidden=draw.choice([0.0, 0.1, 0.6, 0.97]),
        magnitudes=(q, k, v, added),
        layouts=(layouts[0], layouts[1], layouts[2], layouts[3]),
        packed=packed,
    )  # fmt: skip


def _draw_sizes(draw: Random, largest_scores: int, batches: Sequence[int]) -> Sizes:
    while True:
        batch, heads_kv, group = draw.choice(batches), draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 4])
        if draw.random() < 0.05:  # more tiles than a GPU runs at once
            batch = draw.choice([40, 131])
        lengths = [
            draw.choice(
                [
                    1,
                    draw.randint(1, 20),
                    max(1, draw.choice(_BLOCKS) + draw.choice([-1, 0, 1])),
                    draw.randint(1, 300),
                    draw.randint(1, 300),
                    draw.randint(1, 2500),
                    draw.randint(2000, 10_000),
                ]
            )
            for _ in range(2)
        ]
        if draw.random() < 0.3:
            lengths[1] = lengths[0]
        matrices = batch * heads_kv * group
        few_rows = matrices * max(lengths) <= largest_scores // 16 + 300  # those of one key have no fewer numbers
        if few_rows and matrices * lengths[0] * lengths[1] <= largest_scores:
            return Sizes(batch, heads_kv, group, lengths[0], lengths[1])


class Lengths(NamedTuple):
    """Of packed sequences: (seqlen_q, seqlen_k) of each, and how many rows of q and k follow that none of them has."""

    of_each: list[tuple[int, int]]
    unused: tuple[int, int]

    @classmethod
    def of(cls, trial: Trial) -> Lengths:
        """They shrink with the trial's sizes."""
        draw = Random(f"lengths {trial.seed}")
        equal = draw.random() < 0.5

        def length(longest: int) -> int:
            return draw.choice([0, 1, longest, *(int(draw.random() * (longest + 1)) for _ in range(3))])

        pairs = [(length(trial.sizes.seqlen_q), length(trial.sizes.seqlen_k)) for _ in range(trial.sizes.batch)]
        if equal:
            pairs = [(q, min(q, trial.sizes.seqlen_k)) for q, _ in pairs]
        totals = map(sum, zip(*pairs, strict=True))
        unused_q, unused_k = (max(draw.choice([0, 0, 1, 40]), int(total == 0)) for total in totals)
        return cls(pairs, (unused_q, unused_k))


def _draw_layout(draw: Random, name: str, columns: int, multiple: int, odd_rows: bool, odd_start: bool) -> Layout:
    """A layout whose rows, of `columns` elements, are aligned unless they are to be odd."""
    orders = [(0, 1, 2, 3), (0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 1, 3), (2, 1, 0, 3)]
    residue = draw.choice([columns % multiple or 1, draw.randrange(1, multiple)]) if odd_rows else 0
    extra = draw.choice([0, 0, 0, 1, draw.randrange(50)])
    start = multiple * draw.choice([0, 0, 1, draw.randrange(100)])
    if odd_start:
        start += draw.randrange(1, multiple)
    order = draw.choice(orders)
    if (odd_rows or name == "bias") and draw.random() < 0.05:
        order = (0, 2, 3, 1)  # a last stride that is not 1
    expanded = tuple(axis for axis in range(3) if draw.random() < 0.04)
    return Layout(order, multiple, residue, extra, start, expanded)


def _bias_shape(bias: str, sizes: Sizes) -> tuple[int, int, int, int]:
    full = (sizes.batch, sizes.heads_q, sizes.seqlen_q, sizes.seqlen_k)
    b, h, m, n = (1 if letter == "1" else size for letter, size in zip(bias or "1111", full, strict=True))
    return b, h, m, n


class Made(NamedTuple):
    """The inputs of a trial, and the buffers that they lie in."""

    inputs: Inputs
    problem: Problem
    buffers: list[Tensor]


def make(trial: Trial, device: torch.device | str) -> Made:
    """Tensors in buffers of NaN, so that what is read outside of them shows."""
    device = torch.device(device)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(trial.seed)
    buffers: list[Tensor] = []

    def normal(shape: Sequence[int], magnitude: float = 1.0) -> Tensor:
        return magnitude * torch.randn(tuple(shape), generator=generator, device=device)

    def placed(values: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        buffer, tensor = _place(values.to(dtype), layout)
        buffers.append(buffer)
        return tensor

    b, hk, _, seqlen_q, seqlen_k = trial.sizes
    h = trial.sizes.heads_q
    shapes = [(b, seqlen_q, h, trial.head_dim), (b, seqlen_k, hk, trial.head_dim), (b, seqlen_k, hk, trial.head_dim_v)]
    lengths = Lengths.of(trial) if trial.packed else None
    unused = (0, 0, 0)
    if lengths is not None:  # a batch of one
        unused = (lengths.unused[0], lengths.unused[1], lengths.unused[1])
        totals = [sum(column) for column in zip(*lengths.of_each, strict=True)]
        shapes = [(1, totals[min(i, 1)] + unused[i], *shape[2:]) for i, shape in enumerate(shapes)]
    q, k, v = (
        placed(_without_the_last(normal(shape, size), rows), layout, trial.dtype)
        for shape, size, rows, layout in zip(shapes, trial.magnitudes, unused, trial.layouts, strict=False)
    )
    bias = slopes = sink = cu_seqlens_q = cu_seqlens_k = None
    if lengths is not None:
        q, k, v = q[0], k[0], v[0]
        starts = [torch.tensor([0, *accumulate(x)], device=device) for x in zip(*lengths.of_each, strict=True)]
        cu_seqlens_q, cu_seqlens_k = (placed(x.view(1, 1, 1, -1), BOUNDARIES, torch.int32)[0, 0, 0] for x in starts)
    if trial.bias:
        shape = _bias_shape(trial.bias, trial.sizes)
        hidden = torch.rand(shape, generator=generator, device=device) < trial.hidden
        if trial.hidden > 0:  # some rows see nothing
            hidden |= torch.rand((*shape[:3], 1), generator=generator, device=device) < 0.1
        size = trial.magnitudes[3]
        values = ~hidden if trial.bias_dtype == torch.bool else normal(shape, size).masked_fill(hidden, -math.inf)
        bias = placed(values, trial.layouts[3], trial.bias_dtype)
    if trial.alibi:
        slopes = normal((b, h) if trial.alibi == "bh" else (h,)).abs()
    if trial.sink:
        sink = normal((h,)).to(trial.dtype)
    leaves = [q, k, v, bias if trial.bias_needs_grad else None, sink]
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    inputs = Inputs(q, k, v, bias, slopes, sink, cu_seqlens_q, cu_seqlens_k)
    problem = Problem.from_tensors(
        inputs,
        mask=trial.mask,
        softmax_scale=trial.softmax_scale,
        softcap=trial.softcap,
        dropout_p=trial.dropout_p,
        deterministic=trial.seed // TRIALS_OF_A_KIND % 2 == 1,  # by its kind: hopper then has other kernels
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k,
    )
    return Made(inputs, problem, buffers)


def _without_the_last(tensor: Tensor, rows: int) -> Tensor:
    """Of these rows, which no sequence has, every number is NaN."""
    tensor[:, tensor.shape[1] - rows :] = math.nan
    return tensor


def _place(values: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """A buffer full of NaN, and in it a tensor of these values (of the first ones, along an axis that is expanded)."""
    shape = values.shape
    for axis in layout.expanded:
        values = values.narrow(axis, 0, 1)
    strides, step = [0, 0, 0, 0], 1
    for axis in reversed(layout.order):
        strides[axis] = step
        step *= layout.row_stride(values.shape[axis]) if axis == layout.order[3] else values.shape[axis]
    band = GUARD_BYTES // values.element_size()
    size = (band + layout.start + step + band) * values.element_size()
    buffer = torch.full((size,), POISON, dtype=torch.uint8, device=values.device)
    tensor = buffer.view(values.dtype).as_strided(values.shape, strides, band + layout.start)
    tensor.copy_(values)
    return buffer, tensor.expand(shape)
