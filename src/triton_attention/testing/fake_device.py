"""Does a kernel compile for a GPU that is not here, and what does it need there?

Plans are made with meta tensors, so that nothing is computed; Triton and its ptxas compile them down to the binary.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import CompiledKernel

from triton_attention.hopper import launch as hopper
from triton_attention.hopper.plan_backward import plan_backward as plan_hopper_backward
from triton_attention.kernel import Launch, compile_launch
from triton_attention.portable.configs import gpu_family
from triton_attention.portable.launch import Settings, plan_backward, plan_forward
from triton_attention.problem import Extras, Inputs, Packing
from triton_attention.testing.cases import Case
from triton_attention.testing.inputs import make_inputs

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_NUM_SMS = 132  # of an H100: the number of programs depends on it, and no variant does


class Resources(NamedTuple):
    """What one block of a compiled kernel needs."""

    shared_memory: int  # bytes
    tensor_memory: int  # columns
    registers: int  # of a thread
    spills: int  # bytes of a thread's registers that go through memory


def launches(case: Case, target: GPUTarget, backend: str = "portable") -> list[Launch]:
    """What a forward pass of `case` and a backward pass through out and lse launch on `target`, as far as that backend
    runs them itself."""
    inputs, problem = make_inputs(case, "meta")
    inputs = Inputs._make(None if tensor is None else tensor.detach() for tensor in inputs)
    q, k, v, bias, slopes, sink, cu_seqlens_q, cu_seqlens_k = inputs
    needs_dbias = bias is not None and bias.dtype != torch.bool
    seed = torch.empty((), dtype=torch.int64, device="meta") if problem.dropout_p > 0.0 else None
    packing = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        packing = Packing(cu_seqlens_q, cu_seqlens_k, problem.seqlen_q, problem.seqlen_k)
        q, k, v = q[None], k[None], v[None]
    extras = Extras(problem.softcap, slopes, sink, problem.dropout_p, seed, packing)
    if backend == "hopper":
        plan = hopper.plan_forward(q, k, v, bias, problem.mask, problem.softmax_scale, _NUM_SMS, extras)
        if not hopper.differentiates(extras, bias is not None):
            return [plan.launch]
        dout, dlse = torch.empty_like(plan.out), torch.empty_like(plan.lse)
        call = (dout, dlse, q, k, v, bias, plan.out, plan.lse, problem.mask)
        numbers = (problem.softmax_scale, needs_dbias, extras)
        both = [plan_hopper_backward(*call, *numbers, deterministic, _NUM_SMS) for deterministic in (False, True)]
        return [plan.launch, *both[0].launches, *both[1].launches]
    family = gpu_family(target.backend, target.arch)
    settings = Settings(problem.mask, problem.softmax_scale, family, extras)
    forward = plan_forward(q, k, v, bias, settings)
    dout, dlse = torch.empty_like(forward.out), torch.empty_like(forward.lse)
    backward = plan_backward(dout, dlse, q, k, v, bias, forward.out, forward.lse, settings, needs_dbias)
    return [forward.launch, *backward.launches]


def compile_for(launch: Launch, target: GPUTarget) -> Resources:
    """Compile down to the binary and read what it needs."""
    compiled = compile_launch(launch, target)
    if target.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.findall(rf"\.{what}:\s*(\d+)", assembly)[0]) for what in ("vgpr_count", "vgpr_spill_count")
        )
        return Resources(compiled.metadata.shared, 0, registers, 4 * spilled)
    usage = _resource_usage(compiled)
    registers, stack = (int(re.findall(rf"{what}:(\d+)", usage)[0]) for what in ("REG", "STACK"))
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    return Resources(compiled.metadata.shared, tensor_memory, registers, stack)


def assembler_messages(launch: Launch, target: GPUTarget) -> str:
    """What ptxas says of a kernel for sm_90: that it serialised wgmma instructions, where it had to."""
    compiled = compile_launch(launch, target)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [get_ptxas(target.arch).path, "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def layouts_of_places(launch: Launch, target: GPUTarget) -> list[set[int]]:
    """Of each place in shared memory that operands of wgmma lie in: how, by the upper halves of their descriptors.

    Several at one place, of keys and then of values with another head dimension, are what the ptxas of CUDA 12.8
    (Triton 3.6 and 3.7) compiles wrongly: it adds the second to a register that holds something else, and the product
    reads anywhere. The ptxas of CUDA 12.9 does not.
    """
    layouts: dict[str, set[int]] = {}
    ptx = compile_launch(launch, target).asm["ptx"]
    for place, descriptor in re.findall(r"(?:or|add)\.[bs]64\s+%rd\d+, (%rd\d+), (-?\d{15,});", ptx):
        layouts.setdefault(place, set()).add(int(descriptor) >> 32)
    return list(layouts.values())


def _resource_usage(compiled: CompiledKernel) -> str:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
