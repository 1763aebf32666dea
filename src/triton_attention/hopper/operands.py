"""How does a tensor become an operand of a Hopper kernel: with which descriptor, and in which layout?"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_attention.arguments import (
    ABSENT,
    DTYPES,
    Argument,
    ceil_div,
    descriptor_strides,
    flat,
    has_aligned_rows,
    pointer_type,
)
from triton_attention.hopper.bias import BiasTensor
from triton_attention.hopper.channel import PACKED_ROWS
from triton_attention.hopper.heads import Extras as KernelExtras
from triton_attention.hopper.heads import Slopes
from triton_attention.hopper.schedule import Packing as PackingNumbers
from triton_attention.philox import drop_below, kept_factor
from triton_attention.problem import Extras, Mask, Packing

_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.uint8: gl.uint8}
_PACKED_ROWS = PACKED_ROWS.value
_ROUND = 2**64  # numbers of two bytes: a multiple of the addresses that there are
_SOFTCAPS = (1e-30, 1e30)  # beyond these a softcap or its reciprocal leaves float32, and no score tells them apart


def split_columns(head_dim: int) -> tuple[int, int]:
    """A head dimension as two powers of two, the larger first, that hold it; the second is 0 where one is enough."""
    whole = max(32, 1 << (head_dim - 1).bit_length())
    if whole == 256:
        rest = head_dim - 128
        return 128, max(32, 1 << (rest - 1).bit_length())
    if whole == 128 and head_dim <= 96:
        return 64, 16 if head_dim <= 80 else 32
    return whole, 0


def with_aligned_rows(tensor: Tensor) -> Tensor:
    if has_aligned_rows(tensor):
        return tensor
    columns, multiple = tensor.shape[3], 16 // tensor.element_size()
    rows = tensor.new_empty(*tensor.shape[:3], ceil_div(columns, multiple) * multiple)
    return rows[..., :columns].copy_(tensor)


def bias_tensor(tensor: Tensor) -> Argument:
    """A (batch, heads, seqlen_q, seqlen_k) tensor."""
    batch, head, row, _ = tensor.stride()
    return Argument(BiasTensor(tensor, batch, head, row), BiasTensor(pointer_type(tensor), "i64", "i64", "i64"))


def row_descriptors(
    tensor: Tensor, rows: int, columns: int, tail: int, packed: bool = False
) -> tuple[Argument, Argument]:
    """Tiles of a (batch, rows, heads, columns) tensor, and of its columns beyond the first."""
    tensor = tensor.transpose(1, 2)
    make = packed_descriptor if packed else descriptor
    return make(tensor, rows, columns), make(tensor[..., columns:], rows, tail) if tail else ABSENT


def packed_descriptor(tensor: Tensor, rows: int, columns: int) -> Argument:
    """Tiles of sequences packed into a (1, heads, total, columns) tensor, which end where their sequence does.

    Copies know the end of an axis alone. So each sequence is moved until its last row is the last of the axis of rows:
    at (2**30, end, head, 2**30 - seqlen + row, column) is a row of the sequence of `seqlen` rows that ends before row
    `end`. What is read beyond a sequence is 0, and nothing is written there.

    The second axis goes by the stride of a row as well. The 2**30 rows too many are taken back by the first, at whose
    end addresses have gone round once: its stride is 2**34 numbers, less a row. So the descriptor begins where the
    tensor does. One that begins 2**30 rows before it needs no such axis, but a GPU reads by it only where memory is
    mapped at its beginning, too. Each axis ends with its last coordinate, lest memory behind the tensor be touched.
    """
    _, heads, total, width = tensor.shape
    _, head, row, one = descriptor_strides(tensor)
    shape = [_PACKED_ROWS + 1, total + 1, heads, _PACKED_ROWS, width]
    strides = [_ROUND // _PACKED_ROWS - row, row, head, row, one]
    return _descriptor(tensor, shape, strides, [1, 1, 1, rows, columns])


def descriptor(tensor: Tensor, rows: int, columns: int) -> Argument:
    """Tiles (rows, columns) of the matrices of a (batch, heads, rows, columns) tensor."""
    return _descriptor(tensor, list(tensor.shape), descriptor_strides(tensor), [1, 1, rows, columns])


def _descriptor(tensor: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Argument:
    layout = _shared_layout(tuple(block), tensor.dtype)
    made: Any = TensorDescriptor(tensor, shape, strides, block, layout)
    return Argument(made, f"tensordesc<{DTYPES[tensor.dtype]}{block},{layout!r}>")


def softcap_of(extras: Extras) -> float:
    smallest, largest = _SOFTCAPS
    return min(max(extras.softcap, smallest), largest)


def packing_argument(packing: Packing | None, total_q: int, total_k: int, mask: Mask) -> Argument:
    """Where packed sequences are; None for others."""
    if packing is None:
        return ABSENT
    starts_q, starts_k = flat(packing.cu_seqlens_q.contiguous()), flat(packing.cu_seqlens_k.contiguous())
    numbers = PackingNumbers(starts_q.value, starts_k.value, total_q, total_k, int(not mask.top_left))
    return Argument(numbers, PackingNumbers(starts_q.type, starts_k.type, "i32", "i32", "i32"))


def relative_bounds(mask: Mask, total_q: int, total_k: int) -> tuple[int, int]:
    """The band of packed sequences, which each of them counts from its own diagonal."""
    reach = max(total_q, total_k)
    return -min(mask.left or 0, reach), min(mask.right or 0, reach)


def extras_argument(extras: Extras, batch: int, heads: int, diagonal: int) -> Argument:
    """What few calls have; what is absent is None."""
    if extras.absent:
        return ABSENT
    softcap = slopes = no_distance = sink = seed = threshold = factor = ABSENT
    if extras.softcap > 0.0:
        softcap = Argument(softcap_of(extras), "fp32")
    if extras.alibi_slopes is not None:
        strides = extras.alibi_slopes.expand(batch, heads).stride()
        types = Slopes(pointer_type(extras.alibi_slopes), "i64", "i64")
        slopes = Argument(Slopes(extras.alibi_slopes, *strides), types)
        no_distance = Argument(diagonal, "i32")
    if extras.sink is not None:
        sink = flat(extras.sink.contiguous())
    if extras.seed is not None:
        seed, threshold = flat(extras.seed), Argument(drop_below(extras.dropout_p), "u32")
        factor = Argument(kept_factor(extras.dropout_p), "fp32")
    arguments = (softcap, slopes, no_distance, sink, seed, threshold, factor)
    return Argument(KernelExtras(*(x.value for x in arguments)), KernelExtras(*(x.type for x in arguments)))


@lru_cache
def _shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])
