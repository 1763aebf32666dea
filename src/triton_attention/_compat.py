"""What is called otherwise in some Triton from 3.6 to 3.9? Kernels take these names from here."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

copy_to_shared = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # since 3.8
copy_to_global = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global  # since 3.8
