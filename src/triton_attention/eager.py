"""Is this a plain eager call, and which calls are the same but for addresses? What was decided on one holds for all.

A call is plain if nothing stands between it and its kernels: no compiler, transform of functorch, dispatch mode, tensor
subclass or profiler wants to see the operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad
from torch.nn import Parameter

_DEVICE, _is_there = "cuda", attrgetter("is_cuda")  # where Triton backends run
_TYPES = (Tensor, Parameter)
_BACKEND = DispatchKeySet(DispatchKey.BackendSelect)
_NO_MODE = (  # what PyTorch's dispatcher adds to the keys of tensors in inference mode, and outside of it
    _BACKEND.raw_repr(),
    _BACKEND.add(DispatchKey.ADInplaceOrView).raw_repr(),
)


def _is_eager() -> bool:
    return (
        not torch.compiler.is_compiling()
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _NO_MODE
        and not torch._C._is_torch_function_mode_enabled()
        and not torch._C._autograd._profiler_enabled()
        and forward_ad._current_level < 0
    )


def key(tensors: Iterable[Tensor | None], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What is equal for plain calls on a GPU that differ in nothing but the addresses and the data of their tensors.

    None for other calls: the operators would do more with their tensors than to run kernels and record gradients.
    Options of equal value and different type are different.
    """
    if not _is_eager():
        return None
    parts: list[Any] = [options, *map(type, options), torch.is_grad_enabled(), torch.is_autocast_enabled(_DEVICE)]
    if parts[-1]:
        parts.append(torch.get_autocast_dtype(_DEVICE))
    try:
        for tensor in tensors:
            if tensor is None:
                parts.append(None)
            elif type(tensor) in _TYPES and _is_there(tensor) and not tensor.is_neg():
                parts += (layout(tensor), tensor.requires_grad)
            else:
                return None
    except RuntimeError:  # a tensor without strides or memory
        return None
    return tuple(parts)


def layout(tensor: Tensor | None) -> tuple[Any, ...]:
    """Everything about a tensor but its address, of which it has the alignment."""
    if tensor is None:
        return ()
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16
