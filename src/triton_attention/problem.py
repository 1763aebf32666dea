"""What is asked? Value objects that describe a call without its data, and the only validator.

Everything after `Problem.from_tensors` may rely on what it checked. It runs on every eager call and is traced by
`torch.compile` with symbolic sizes: sizes are compared, never converted, hashed or formatted, unless a check fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

MAX_HEAD_DIM = 256

_LARGEST_FLOAT32 = torch.finfo(torch.float32).max
_DESCRIPTOR_REACH = 2**40  # bytes that a stride of a tensor descriptor stays below
_LONGEST = 2**31  # no sequence has as many keys: a window's side of that size is unbounded

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ADDEND_DTYPES = _DTYPES[:3]  # what may be added to scores of any precision; float64 joins float64 only


class Mask(NamedTuple):
    """Which keys a query may see, by position: a band around the diagonal.

    The diagonal starts at (0, 0) if `top_left`, else it ends at (seqlen_q - 1, seqlen_k - 1).
    """

    left: int | None = None  # keys to the left of the diagonal; None = unbounded
    right: int | None = None  # keys to the right of it; 0 = causal
    top_left: bool = False

    @classmethod
    def of(
        cls,
        causal: bool,
        window: tuple[int | None, int | None] | None,
        top_left: bool = False,
        name: str = "window",
    ) -> Mask:
        """The mask of a `causal` flag and a `window` (left, right), where a side of None or -1 is unbounded.

        `causal` wins over the right side of the window. `name` is what errors call the window.
        """
        check_flag("causal", causal)
        if window is None:
            left = right = None
        else:
            if not isinstance(window, tuple):
                raise TypeError(f"{name} must be None or a tuple (left, right), got {window!r}")
            if len(window) != 2:
                raise ValueError(f"{name} must be a tuple (left, right), got {window!r}")
            left, right = _window_side(name, window, 0), _window_side(name, window, 1)
        return cls(left, 0 if causal else right, top_left)

    def diagonal(self, seqlen_q: int, seqlen_k: int) -> int:
        """The j - i of the keys j on the diagonal, where query i stands."""
        return 0 if self.top_left else seqlen_k - seqlen_q

    def band(self, seqlen_q: int, seqlen_k: int) -> tuple[int | None, int | None]:
        """(lower, upper): key j is visible to query i iff lower <= j - i <= upper; None = unbounded."""
        diagonal = self.diagonal(seqlen_q, seqlen_k)
        lower = None if self.left is None else diagonal - self.left
        upper = None if self.right is None else diagonal + self.right
        return lower, upper

    def bounds(self, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        """The band as numbers for kernels, 0 where it is unbounded.

        j - i lies between -seqlen_q and seqlen_k: a wider band says no more, and might not fit 32 bits.
        """
        lower, upper = self.band(seqlen_q, seqlen_k)
        return min(max(lower or 0, -seqlen_q), seqlen_k), min(max(upper or 0, -seqlen_q), seqlen_k)


class Bias(NamedTuple):
    """The shape and kind of what is added to the scores."""

    broadcast: tuple[bool, bool, bool, bool]  # axes (batch, heads, seqlen_q, seqlen_k) along which it has size 1
    dtype: torch.dtype  # torch.bool: a mask, True = may attend
    needs_grad: bool

    @classmethod
    def of(cls, bias: Tensor) -> Bias:
        batch, heads, seqlen_q, seqlen_k = bias.shape
        return cls((batch == 1, heads == 1, seqlen_q == 1, seqlen_k == 1), bias.dtype, _needs_grad(bias))


class Inputs(NamedTuple):
    """The tensors of a call. Packed sequences have no axis batch: they follow each other in (total, heads, dim)."""

    q: Tensor  # (batch, seqlen_q, heads_q, head_dim)
    k: Tensor  # (batch, seqlen_k, heads_kv, head_dim)
    v: Tensor  # (batch, seqlen_k, heads_kv, head_dim_v)
    bias: Tensor | None = None  # (1 | batch, 1 | heads_q, 1 | seqlen_q, 1 | seqlen_k)
    alibi_slopes: Tensor | None = None  # (heads_q,) or (batch, heads_q)
    sink: Tensor | None = None  # (heads_q,)
    cu_seqlens_q: Tensor | None = None  # int32 (batch + 1,): where packed sequences begin, and the last one ends
    cu_seqlens_k: Tensor | None = None


class Packing(NamedTuple):
    """How sequences are packed one after the other into tensors (total, heads, dim): sequence i has the rows
    [cu_seqlens[i], cu_seqlens[i + 1])."""

    cu_seqlens_q: Tensor  # int32 (batch + 1,)
    cu_seqlens_k: Tensor
    max_seqlen_q: int  # no sequence is longer
    max_seqlen_k: int

    @property
    def batch(self) -> int:
        return self.cu_seqlens_q.shape[0] - 1


class Extras(NamedTuple):
    """What few calls have, and some backends do not run."""

    softcap: float = 0.0  # 0.0 = none
    alibi_slopes: Tensor | None = None  # (heads_q,) or (batch, heads_q), float32
    sink: Tensor | None = None  # (heads_q,)
    dropout_p: float = 0.0
    seed: Tensor | None = None  # of dropout, int64 (); there if dropout_p > 0
    packing: Packing | None = None

    @property
    def absent(self) -> bool:
        """Whether a call has none of them."""
        return (
            self.softcap == 0.0
            and self.alibi_slopes is None
            and self.sink is None
            and self.seed is None
            and self.packing is None
        )


NO_EXTRAS = Extras()


class Problem(NamedTuple):
    """Everything about a call but its data: what a backend decides on."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int  # of packed sequences: max_seqlen_q and max_seqlen_k
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device
    mask: Mask
    softmax_scale: float
    softcap: float  # 0.0 = none
    bias: Bias | None
    alibi: bool
    sink: bool
    dropout_p: float
    deterministic: bool
    needs_grad: bool
    # Every row of q, k, v, and of a bias that varies along queries and keys, starts at a multiple of 16 bytes, as
    # tensor descriptors want it. Always True under torch.compile, where the question would be a guard on strides.
    aligned: bool
    varlen: bool = False  # sequences of different lengths are packed one after the other

    @classmethod
    def from_tensors(
        cls,
        inputs: Inputs,
        *,
        mask: Mask,
        softmax_scale: float | None,
        softcap: float,
        dropout_p: float,
        deterministic: bool,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> Problem:
        """Validate a call and describe it. It is one of packed sequences iff `inputs` has `cu_seqlens_q`.

        `softmax_scale=None` means 1 / sqrt(head_dim); every other number, 0.0 included, means itself. A batch or a
        sequence length of 0 is valid.

        Raises:
            TypeError: an argument is of the wrong kind: no tensor, a wrong dtype, no number, no bool.
            ValueError: an argument is of the right kind, but its shape, device, layout or value is wrong.
        """
        q, k, v, bias, alibi_slopes, sink, cu_seqlens_q, cu_seqlens_k = inputs
        varlen = cu_seqlens_q is not None
        _check_qkv(q, k, v, packed=varlen)
        *_, heads_q, head_dim = q.shape
        *_, heads_kv, head_dim_v = v.shape
        if varlen:
            seqlen_q, seqlen_k = _length("max_seqlen_q", max_seqlen_q), _length("max_seqlen_k", max_seqlen_k)
            boundaries = _check_cu_seqlens("q", cu_seqlens_q, q, seqlen_q, None)
            _check_cu_seqlens("k", cu_seqlens_k, k, seqlen_k, boundaries)
            batch = boundaries - 1
        else:
            batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        addend_dtypes = _DTYPES if q.dtype == torch.float64 else _ADDEND_DTYPES
        if bias is not None:
            _check_extra("bias", bias, q, (*addend_dtypes, torch.bool))
            longest = "max_" if varlen else ""
            rows = {f"{longest}seqlen_q": seqlen_q, f"{longest}seqlen_k": seqlen_k}
            _check_broadcastable("bias", bias, batch=batch, heads_q=heads_q, **rows)
        if alibi_slopes is not None:
            _check_extra("alibi_slopes", alibi_slopes, q, (torch.float32,))
            _check_slopes("alibi_slopes", alibi_slopes, batch, heads_q)
        if sink is not None:
            _check_extra("sink", sink, q, addend_dtypes)
            _check_shape("sink", sink, heads_q=heads_q)
        check_flag("deterministic", deterministic)
        return cls(
            batch=batch,
            heads_q=heads_q,
            heads_kv=heads_kv,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=q.dtype,
            device=q.device,
            mask=mask,
            softmax_scale=head_dim**-0.5 if softmax_scale is None else _number("softmax_scale", softmax_scale),
            softcap=_number("softcap", softcap, low=0.0),
            bias=None if bias is None else Bias.of(bias),
            alibi=alibi_slopes is not None,
            sink=sink is not None,
            dropout_p=_number("dropout_p", dropout_p, low=0.0, below=1.0),
            deterministic=deterministic,
            needs_grad=any(_needs_grad(tensor) for tensor in inputs),
            aligned=torch.compiler.is_compiling() or all(map(_starts_aligned, read_by_rows(q, k, v, bias))),
            varlen=varlen,
        )


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def read_by_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """What kernels read as matrices: q, k, v, and a bias that varies along queries and keys."""
    if q.dim() == 3:
        q, k, v = q[None], k[None], v[None]
    return (q, k, v) if bias is None or bias.shape[2] == 1 or bias.shape[3] == 1 else (q, k, v, bias)


def has_aligned_strides(tensor: Tensor) -> bool:
    """Whether every row of a tensor of four axes starts at a multiple of 16 bytes if the first one does.

    Written out, since every eager call asks. The stride of an axis of size 1 leads nowhere; an empty tensor has no row.
    """
    if tensor.numel() == 0:
        return True
    size = tensor.element_size()
    multiple, limit = 16 // size, _DESCRIPTOR_REACH // size
    shape, strides = tensor.shape, tensor.stride()
    return (
        ((strides[0] % multiple == 0 and strides[0] < limit) or shape[0] == 1)
        and ((strides[1] % multiple == 0 and strides[1] < limit) or shape[1] == 1)
        and ((strides[2] % multiple == 0 and strides[2] < limit) or shape[2] == 1)
        and (strides[3] == 1 or shape[3] == 1)
    )


def _starts_aligned(tensor: Tensor) -> bool:
    """Storages start at multiples of 16 bytes; asked of the offset, since a fake tensor has no address."""
    return tensor.storage_offset() * tensor.element_size() % 16 == 0 and has_aligned_strides(tensor)


def check_flag(name: str, value: object) -> None:
    """Raise a TypeError that names the argument unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    check_tensor("q", q)
    _check_dtype("q", q, _DTYPES)
    rows_q: dict[str, int | None] = {"total_q": None} if packed else {"batch": None, "seqlen_q": None}
    _check_shape("q", q, **rows_q, heads_q=None, head_dim=None)
    *_, heads_q, head_dim = q.shape
    _check_head_dim("q", head_dim)

    check_tensor("k", k)
    _check_like_q("k", k, q)
    rows_k: dict[str, int | None] = {"total_k": None} if packed else {"batch": q.shape[0], "seqlen_k": None}
    _check_shape("k", k, **rows_k, heads_kv=None, head_dim=head_dim)
    *_, heads_kv, _ = k.shape
    _check_heads(heads_q, heads_kv)

    check_tensor("v", v)
    _check_like_q("v", v, q)
    _check_shape("v", v, **dict(zip(rows_k, k.shape, strict=False)), heads_kv=heads_kv, head_dim_v=None)
    _check_head_dim("v", v.shape[-1])


def _check_cu_seqlens(axis: str, cu_seqlens: Tensor | None, rows: Tensor, max_seqlen: int, size: int | None) -> int:
    """Check the boundaries of the sequences packed into `rows`, q or k, and return how many there are.

    What they hold is checked where it can be read without waiting for a device.
    """
    name = f"cu_seqlens_{axis}"
    check_tensor(name, cu_seqlens)
    assert cu_seqlens is not None  # for the type checker
    _check_dtype(name, cu_seqlens, (torch.int32,))
    _check_device(name, cu_seqlens, rows)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or (size is not None and cu_seqlens.shape[0] != size):
        expected = "batch + 1" if size is None else f"batch + 1 = {size}"
        raise ValueError(f"{name} must be ({expected},), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        starts = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(starts)]
        total = rows.shape[0]
        if starts[0] != 0 or starts[-1] > total or any(length < 0 for length in lengths):
            raise ValueError(f"{name} must rise from 0 to at most the {total} rows of {axis}, got {starts}")
        if any(length > max_seqlen for length in lengths):
            raise ValueError(
                f"max_seqlen_{axis} must be at least the length of every sequence, {max(lengths)}, got {max_seqlen}"
            )
    return cu_seqlens.shape[0]


def _length(name: str, value: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return value


def _check_extra(name: str, tensor: Tensor, q: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor(name, tensor)
    _check_dtype(name, tensor, dtypes)
    _check_device(name, tensor, q)


def check_tensor(name: str, tensor: object) -> None:
    """Raise an error that names the argument unless it is a dense strided tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense strided tensor, got {'nested' if tensor.is_nested else tensor.layout}"
        )


def _check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")


def _check_like_q(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    _check_device(name, tensor, q)


def _check_shape(name: str, tensor: Tensor, **axes: int | None) -> None:
    """Each axis has its given size; None = any."""
    shape = tensor.shape
    fits = len(shape) == len(axes) and all(
        required is None or size == required for size, required in zip(shape, axes.values(), strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must be {_named(axes)}, got {tuple(shape)}")


def _check_broadcastable(name: str, tensor: Tensor, **axes: int) -> None:
    shape = tensor.shape
    fits = len(shape) == len(axes) and all(size in (1, full) for size, full in zip(shape, axes.values(), strict=True))
    if not fits:
        raise ValueError(f"{name} must be broadcastable to {_named(axes)}, got {tuple(shape)}")


def _check_slopes(name: str, slopes: Tensor, batch: int, heads_q: int) -> None:
    if slopes.dim() == 2:
        _check_shape(name, slopes, batch=batch, heads_q=heads_q)
    else:
        _check_shape(name, slopes, heads_q=heads_q)
    if _needs_grad(slopes):
        raise ValueError(f"{name} must not require grad (it is not differentiable), got requires_grad=True")


def _check_heads(heads_q: int, heads_kv: int) -> None:
    if heads_q == 0 or heads_kv == 0 or heads_q % heads_kv != 0:
        raise ValueError(f"q must have a positive multiple of the heads of k, {heads_kv}, got {heads_q}")


def _check_head_dim(name: str, head_dim: int) -> None:
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name} must have a head dim from 1 to {MAX_HEAD_DIM}, got {head_dim}")


def _number(name: str, value: float, low: float = -math.inf, below: float = math.inf) -> float:
    """A number that float32 holds, low <= value < below."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if low > -math.inf and not low <= value < below:
        raise ValueError(f"{name} must be in [{low:g}, {below:g}), got {_shown(value)}")
    if not abs(value) <= _LARGEST_FLOAT32:  # kernels compute with it in float32
        finite = "finite in float32" if abs(value) < math.inf else "finite"
        raise ValueError(f"{name} must be {finite}, got {_shown(value)}")
    return float(value)


def _shown(value: float) -> str:
    return f"an int of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 2**64 else str(value)


def _window_side(name: str, window: tuple[int | None, int | None], side: int) -> int | None:
    value = window[side]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must hold integers or None, got {window!r}")
    if value < -1:
        raise ValueError(f"{name} must have sides of at least 0, or -1 or None for unbounded, got {window!r}")
    return None if value == -1 or value >= _LONGEST else value


def _named(axes: Mapping[str, int | None]) -> str:
    """(batch=2, seqlen_k, heads_kv, head_dim=64): an axis of any size stands without one."""
    return f"({', '.join(name if size is None else f'{name}={size}' for name, size in axes.items())})"
