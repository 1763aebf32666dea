"""Is anything read or written outside of a tensor, or left unwritten in it? Memory of a pattern that is NaN says so."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

POISON = 0xFF  # bytes of it are NaN as float16, bfloat16, float32 and float64, and -1 as integers
GUARD_BYTES = 4096  # before and behind a tensor; a multiple of what tensors are aligned to

_empty = torch.empty


class GuardedMemory:
    """While it is entered, what Python code allocates by torch.empty and the like is full of POISON, and so is the
    memory around it."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> GuardedMemory:
        for owner, name, zero in (
            (torch, "empty", False),
            (torch, "empty_like", False),
            (torch, "empty_strided", False),
            (torch, "zeros", True),
            (torch, "zeros_like", True),
            (Tensor, "new_empty", False),
            (Tensor, "new_zeros", True),
        ):
            original = getattr(owner, name)
            self._before.append((owner, name, original))
            setattr(owner, name, self._guarded(original, zero))
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        while self._before:
            owner, name, original = self._before.pop()
            setattr(owner, name, original)

    def intact(self) -> bool:
        """Whether nothing was written around what was allocated so far."""
        bands = [band for block in self._blocks for band in (block[:GUARD_BYTES], block[-GUARD_BYTES:])]
        return not bands or bool((torch.stack(bands) == POISON).all())

    def _guarded(self, original: Callable[..., Tensor], zero: bool) -> Callable[..., Tensor]:
        def allocate(*arguments: Any, **keywords: Any) -> Tensor:
            like = original(*arguments, **keywords | {"device": "meta"})
            device = keywords.get("device") or next(
                (argument.device for argument in arguments if isinstance(argument, Tensor)), "cpu"
            )
            size = like.numel() * like.element_size()
            if size == 0 or torch.device(device).type == "meta" or not like.is_contiguous():
                return original(*arguments, **keywords)
            block = _empty(GUARD_BYTES + size + GUARD_BYTES, dtype=torch.uint8, device=device).fill_(POISON)
            self._blocks.append(block)
            tensor = block[GUARD_BYTES : GUARD_BYTES + size].view(like.dtype).view(like.shape)
            return tensor.zero_() if zero else tensor

        return allocate
