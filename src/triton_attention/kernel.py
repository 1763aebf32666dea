"""How does a jitted kernel become a compiled variant, and how is it launched?

A variant is a kernel, the types of its arguments, a Spec and a Tile. We name the types ourselves instead of letting
Triton's JIT specialise on the values it meets (it compiles again for a length of 1, or one divisible by 16). So a
sequence length, a batch size or a number of heads never compiles anything, the same launch compiles for a GPU that
is not there, and a launch skips the JIT's binder.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction

from triton_attention.arguments import Argument


class Launch(NamedTuple):
    """A kernel, the number of programs, its arguments before SPEC and TILE, and these two."""

    kernel: Any
    programs: int
    arguments: tuple[Argument, ...]
    spec: Any
    tile: Any


class ForwardPlan(NamedTuple):
    """The outputs of a forward pass, and the launch that fills them."""

    out: Tensor
    lse: Tensor
    launch: Launch


def jit_plain(function: Any) -> Any:
    """Triton's form of a function of operators alone (see blocks.py); the interpreter runs it as it is."""
    return function if triton.knobs.runtime.interpret else triton.jit(function)


_variants: dict[Any, CompiledKernel] = {}
_one_compilation = (
    Lock()
)  # at a time: where threads interleave, CPython 3.11's parser fails (AST recursion depth mismatch)


def run(launch: Launch) -> None:
    """Launch on the current device and stream; compiles the variant where this process has not yet."""
    kernel, programs, arguments, spec, tile = launch
    values = [argument.value for argument in arguments]
    if isinstance(kernel, InterpretedFunction):
        kernel[(programs,)](*values, spec, tile)
        return
    variant(launch)[(programs, 1, 1)](*values, spec, tile)


def variant(launch: Launch) -> CompiledKernel:
    """The compiled kernel that `launch` needs on the current device."""
    types = tuple(argument.type for argument in launch.arguments)
    key = (id(launch.kernel), types, launch.spec, launch.tile, driver.active.get_current_device())
    compiled = _variants.get(key)
    if compiled is None:
        compiled = _variants[key] = compile_launch(launch, driver.active.get_current_target())
    return compiled


def compile_launch(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """The variant that `launch` needs on `target`, which need not be a GPU of this machine."""
    kernel, _, arguments, spec, tile = launch
    types = tuple(argument.type for argument in arguments)
    constants: dict[tuple[int, ...], Any] = {(len(types),): spec, (len(types) + 1,): tile}
    hints: dict[tuple[int, ...], Any] = {}
    for path, name in _leaves(types):
        if name is None:
            constants[path] = None
        elif ":" in name:
            hints[path] = [["tt.divisibility", int(name.split(":")[1])]]
    signature = dict(zip(kernel.arg_names, (*_without_hints(types), "constexpr", "constexpr"), strict=True))
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    options = {name: getattr(tile, name) for name in ("num_warps", "num_stages", "maxnreg") if hasattr(tile, name)}
    with _one_compilation:
        return triton.compile(source(kernel, signature, constants, hints), target=target, options=options)


def _leaves(types: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str | None]]:
    if isinstance(types, tuple):
        for i, item in enumerate(types):
            yield from _leaves(item, (*path, i))
    else:
        yield path, types


def _without_hints(types: Any) -> Any:
    if isinstance(types, tuple):
        items = [_without_hints(item) for item in types]
        return type(types)(*items) if hasattr(types, "_fields") else tuple(items)
    return "constexpr" if types is None else types.split(":")[0]
