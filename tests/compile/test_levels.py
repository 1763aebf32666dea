"""Do the levels of the Hopper tutorial compile for an H100 without spilling, and are those right that can run here?"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import triton
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

import triton_attention
from triton_attention.testing.fake_device import TARGETS

LEVELS = Path(__file__).resolve().parents[2] / "examples" / "hopper_levels"
SM_90 = TARGETS["sm_90"]


def tile(rows):
    return f"tensordesc<bf16[{rows}, 128]>"


def gluon_tile(rows):
    layout = gl.NVMMASharedLayout.get_default_for([rows, 128], gl.bfloat16)
    return f"tensordesc<bf16[{rows}, 128],{layout!r}>"


WARP_SPECIALIZED = ([gluon_tile(64), gluon_tile(128), gluon_tile(128), "*bf16"], [128, 128], {"maxnreg": 168})
KERNELS = {  # the types of q, k, v and out, the constants, and the options that each level launches with
    "level1_online_softmax": (["*bf16"] * 4, [128, 64, 64], {}),
    "level2_descriptors": ([tile(128)] * 4, [128, 128, 128], {"num_warps": 8, "num_stages": 2}),
    "level3_wgmma": (WARP_SPECIALIZED[0], [128, 128], {}),
    "level4_producer": WARP_SPECIALIZED,
    "level5_overlap": WARP_SPECIALIZED,
}


def test_every_level_is_tested():
    assert {path.stem for path in LEVELS.glob("*.py")} == {*KERNELS, "harness"}


@pytest.mark.parametrize("name", KERNELS)
def test_a_level_compiles(name, monkeypatch):
    """Without a spill, and without a matrix product that ptxas had to wait for where the code does not (C7514)."""
    monkeypatch.syspath_prepend(LEVELS)
    kernel = importlib.import_module(name).attention_fwd
    operands, constants, options = KERNELS[name]
    types = [*operands, "i32", "fp32"]
    signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
    values = {(len(types) + place,): value for place, value in enumerate(constants)}
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name == "i32" or name.startswith("*")}
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    compiled = triton.compile(
        source(kernel, signature, values, hints), target=SM_90, options={"num_warps": 4, **options}
    )
    assert compiled.metadata.shared <= 232_448
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [get_ptxas(SM_90.arch).path, "-v", "--gpu-name", "sm_90a", file.name, "-o", os.devnull]
        messages = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"(\d+) bytes spill", messages) == ["0", "0"]
    assert "C7514" not in messages


INTERPRETED = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import harness
error, allowed = harness.errors(__import__(sys.argv[2]).level, 2, 256, torch.device("cpu"), torch.float16)
assert 0 < error <= allowed, (error, allowed)
"""


@pytest.mark.parametrize("name", ["level1_online_softmax", "level2_descriptors"])
def test_a_level_is_right(name):
    """In Triton's interpreter, which knows no Gluon."""
    source = str(Path(triton_attention.__file__).parents[1])
    path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERPRETED, str(LEVELS), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
