"""How is a compiled kernel launched with arguments that are ready? The one place that knows Triton's launcher inside.

Triton encodes a tensor map for each descriptor in every launch, in Python. With the same values the maps are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from itertools import accumulate
from types import CellType, FunctionType
from typing import Any, NamedTuple

from triton import knobs
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_STREAM = 3  # where a native launcher takes the stream: after the three sizes of the grid


def is_watched() -> bool:
    """Whether somebody asked Triton to be told of launches, as profilers do: then they go the public way."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool((enter and getattr(enter, "calls", True)) or (leave and getattr(leave, "calls", True)))


class Ready(NamedTuple):
    """A launch whose arguments are as the function in C takes them."""

    start: Callable[[int, list[Any]], object]  # of the stream and all that the values became; it tells no hook
    arguments: list[tuple[Any, ...]]  # what each value became: of a descriptor a tensor map, its sizes and strides


def ready(compiled: CompiledKernel, programs: int, values: tuple[Any, ...]) -> Ready | None:
    """`compiled[(programs, 1, 1)](*values)`, as Triton's own code tells it to a function in the place of the one in C.

    Tried with Triton 3.6 to 3.9; None for a launcher of another make.
    """
    launcher: Any = compiled.run
    sizes = [getattr(launcher, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    if sizes != [0, 0] or getattr(launcher, "gsan_enabled", False):  # else each launch has memory of its own
        return None
    seen: list[tuple[Any, ...]] = []

    def see(*arguments: Any) -> None:
        seen.append(arguments)

    native, replaced = launcher.launch, see
    if isinstance(native, FunctionType):  # it wraps the one in C to encode descriptors
        names = native.__code__.co_freevars
        if "launcher" not in names or native.__closure__ is None:
            return None
        cells = dict(zip(names, native.__closure__, strict=True))
        replaced = FunctionType(
            native.__code__, native.__globals__, closure=tuple((cells | {"launcher": CellType(see)}).values())
        )
        native = cells["launcher"].cell_contents
    twin = copy(launcher)
    twin.launch = replaced
    stream = object()
    twin(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
    if len(seen) != 1 or seen[0][_STREAM] is not stream:
        return None
    return _split(native, seen[0], values)


def _split(native: Callable[..., object], seen: tuple[Any, ...], values: tuple[Any, ...]) -> Ready | None:
    """`seen` is what `native` would have got: where to launch what, and last, one by one or in one list, the items that
    the values became."""
    sizes = [1 + 2 * len(value.shape) if isinstance(value, TensorDescriptor) else 1 for value in values]
    together = isinstance(seen[-1], (list, tuple)) and len(seen[-1]) == sum(sizes)
    items, others = (seen[-1], seen[:-1]) if together else (seen[-sum(sizes) :], seen[: -sum(sizes)])
    if len(others) <= _STREAM:
        return None
    ends = list(accumulate(sizes))
    arguments = [tuple(items[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    before, after = others[:_STREAM], others[_STREAM + 1 :]
    if together:
        return Ready(lambda stream, items: native(*before, stream, *after, items), arguments)
    return Ready(lambda stream, items: native(*before, stream, *after, *items), arguments)
