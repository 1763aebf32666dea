"""How is a compiled kernel launched with arguments that are ready? The one place that knows Triton's launcher inside.

Triton encodes a tensor map for each descriptor in every launch, in Python. With the same values the maps are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from types import CellType, FunctionType
from typing import Any

from triton import knobs
from triton.compiler import CompiledKernel

_STREAM = 3  # where a native launcher takes the stream: after the three sizes of the grid


def is_watched() -> bool:
    """Whether somebody asked Triton to be told of launches, as profilers do: then they go the public way."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool((enter and getattr(enter, "calls", True)) or (leave and getattr(leave, "calls", True)))


def ready(compiled: CompiledKernel, programs: int, values: tuple[Any, ...]) -> Callable[[int], object]:
    """`compiled[(programs, 1, 1)](*values)` as a function of the stream. It tells no hook: see `is_watched`.

    Tried with Triton 3.6 to 3.9; a launcher of another make is called the public way.
    """
    start = compiled[(programs, 1, 1)]
    prepared = _native(compiled, programs, values)
    if prepared is None:
        return lambda stream: start(*values, stream=stream)
    native, before, after = prepared
    return lambda stream: native(*before, stream, *after)


def _native(
    compiled: CompiledKernel, programs: int, values: tuple[Any, ...]
) -> tuple[Callable[..., object], tuple[Any, ...], tuple[Any, ...]] | None:
    """The function in C that launches, and its arguments before and after the stream; None for an unknown launcher.

    The arguments are those that Triton's own code hands to a function in the place of the one in C.
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
    return native, seen[0][:_STREAM], seen[0][_STREAM + 1 :]
