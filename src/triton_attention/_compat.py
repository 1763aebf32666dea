"""What is called otherwise in some Triton from 3.6 to 3.9? Kernels take these names from here."""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

copy_to_shared = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # since 3.8
copy_to_global = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global  # since 3.8

if hasattr(tma, "async_atomic_add"):  # since 3.8
    add_to_global = tma.async_atomic_add
else:

    @builtin
    def add_to_global(tensor_desc, coord, src, _semantic=None):  # type: ignore[no-untyped-def]
        """Add a tile of shared memory to a tile of global memory, as `copy_to_global` would write it."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


@builtin
def reinterpret(tile, dtype, shape, layout, _semantic=None):  # type: ignore[no-untyped-def]
    """The same shared memory as a tile of another type, shape and layout."""
    method = tile.reinterpret if hasattr(tile, "reinterpret") else tile._reinterpret  # since 3.9
    return method(dtype, shape, layout, _semantic=_semantic)
