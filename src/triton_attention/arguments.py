"""How does a tensor become a kernel argument: with which type, alignment and strides? The same for every backend."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_attention.problem import has_aligned_strides

DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Argument(NamedTuple):
    """A kernel argument and its type: the name Triton has for it, with ":n" where a pointer is aligned to n bytes or
    a number is a multiple of n; None for an argument that is absent. Tuples have tuples of types."""

    value: Any
    type: Any


ABSENT = Argument(None, None)


def pointer_type(tensor: Tensor) -> str:
    return f"*{DTYPES[tensor.dtype]}{':16' if tensor.data_ptr() % 16 == 0 else ''}"


def flat(tensor: Tensor) -> Argument:
    """A contiguous tensor."""
    return Argument(tensor, pointer_type(tensor))


def with_unit_last_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def has_aligned_rows(tensor: Tensor) -> bool:
    """Whether every row of a tensor of four axes starts at a multiple of 16 bytes, as wide loads and tensor descriptors
    want it."""
    return tensor.data_ptr() % 16 == 0 and has_aligned_strides(tensor)


def descriptor_strides(tensor: Tensor) -> list[int]:
    """The strides, with others for axes of size 1: theirs mean nothing, but a descriptor would refuse odd ones."""
    sizes, strides = tensor.shape, tensor.stride()
    outer = [16 if size == 1 else stride for size, stride in zip(sizes[:3], strides[:3], strict=True)]
    return [*outer, 1]


_thread = threading.local()


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the device of a CUDA tensor the current one, where kernels are launched.

    A thread that has called CUDA's runtime never before has no context either, which tensor descriptors want.
    """
    if tensor.is_cuda and not getattr(_thread, "has_context", False):
        torch.cuda.is_current_stream_capturing()  # any call of the runtime makes it
        _thread.has_context = True
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
