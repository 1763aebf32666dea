"""Does every row of the tile table compile, for every family of GPUs, within its shared memory and registers?"""

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import pytest
import torch

from triton_attention.portable.configs import GPUS, Row, gpu_family, rows_for
from triton_attention.testing.cases import CAUSAL, FULL, Case
from triton_attention.testing.fake_device import TARGETS, compile_for, launches

KERNELS = ("attention_fwd", "attention_bwd_dkdv", "attention_bwd_dq", "attention_bwd_dbias")

# Bytes that a thread may keep in memory instead of registers, with any Triton from 3.6 to 3.9. Rows that read element
# by element, or multiply without tensor cores, are there to be right.
SPILLS_ALLOWED = {"descriptors": 512, "vectors": 512, "elements": 2048, "float32": 1024}
# A clock chose this row with Triton 3.6, where it spills 176 bytes; with 3.9 it spills 576.
SPILLS_OF_ROW = {"sm_90-attention_bwd_dkdv-descriptors-d256-64x64x2": 576}


class Compilation(NamedTuple):
    """A row of the table, and where it stands."""

    target: str
    kernel: str
    row: Row
    access: str

    def __str__(self):
        tile = self.row.tile
        size = f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.num_stages}"
        return f"{self.target}-{self.kernel}-{self.access}-d{self.row.head_dim}-{size}"


def cases_for(row, access):
    """Problems that may take this row, the most demanding first: with a causal mask, and a bias and its gradient."""
    odd = access == "elements"
    for mask, bias in product((CAUSAL, FULL), ("1hqk", None)):
        yield Case(
            2048,
            2047 if odd else 2048,
            row.head_dim - 1 if odd else row.head_dim,
            mask=mask,
            bias=bias,
            dropout_p=0.1 if row.dropout else 0.0,
            dtype=torch.float32 if access == "float32" else torch.bfloat16,
        )


def launch_that_takes(row, access, kernel, target):
    for case in cases_for(row, access):
        for launch in launches(case, target):
            if launch.kernel.__name__ == kernel and replace(launch.tile, TMA_BIAS=False) == row.tile:
                return launch
    pytest.fail("no problem takes this row: an earlier one hides it")


def all_rows():
    for target, gpu in TARGETS.items():
        family = gpu_family(gpu.backend, gpu.arch)
        for kernel in KERNELS:
            for access in ("descriptors" if GPUS[family].descriptors else "vectors", "elements", "float32"):
                for row in rows_for(kernel, family, access):
                    yield Compilation(target, kernel, row, access)


@pytest.mark.parametrize("compilation", list(all_rows()), ids=str)
def test_row_compiles(compilation):
    _, kernel, row, access = compilation
    target = TARGETS[compilation.target]
    family = gpu_family(target.backend, target.arch)
    resources = compile_for(launch_that_takes(row, access, kernel, target), target)
    assert resources.shared_memory <= GPUS[family].shared_memory, resources
    assert resources.tensor_memory <= GPUS[family].tensor_memory, resources
    assert resources.spills <= SPILLS_OF_ROW.get(str(compilation), SPILLS_ALLOWED[access]), resources


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 111, 128, 192, 256])
def test_every_problem_has_a_tile(name, head_dim):
    for mask, bias, dtype in product((CAUSAL, FULL), (None, "1h1k", "1hqk"), (torch.float16, torch.float32)):
        assert launches(Case(300, 300, head_dim, mask=mask, bias=bias, dtype=dtype), TARGETS[name])


# What few calls have asks for more registers, and dropout for more shared memory than a row was chosen with: these
# fit as well. Spills are not held to a budget: no clock has seen them.
ALL_EXTRAS = {"softcap": 30.0, "alibi": "h", "sink": True, "dropout_p": 0.1}


@pytest.mark.parametrize(("head_dim", "lengths"), [(256, None), (128, ((300, 256), (0, 7)))])
@pytest.mark.parametrize("name", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_what_few_calls_have_fits(name, head_dim, lengths):
    target = TARGETS[name]
    gpu = GPUS[gpu_family(target.backend, target.arch)]
    for mask, bias in ((CAUSAL, "1hqk"), (FULL, None)):
        case = Case(300, 256, head_dim, mask=mask, bias=bias, dtype=torch.bfloat16, lengths=lengths, **ALL_EXTRAS)
        for launch in launches(case, target):
            resources = compile_for(launch, target)
            assert resources.shared_memory <= gpu.shared_memory, (launch.kernel.__name__, resources)
            assert resources.tensor_memory <= gpu.tensor_memory, (launch.kernel.__name__, resources)


def test_a_gpu_that_is_not_known_gets_the_most_modest_rows():
    assert gpu_family("cuda", 75) == gpu_family("cuda", 130) == "sm_86"
    assert gpu_family("hip", "gfx1100") == "gfx942"


@pytest.mark.parametrize("name", ["sm_90", "sm_100"])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_a_float32_bias_fits(name, head_dim):
    """Its tiles take twice the shared memory, beside 16-bit queries and keys: by a descriptor, and by pointers."""
    case = Case(304, 304, head_dim, bias="bhqk", bias_dtype=torch.float32, dtype=torch.bfloat16)
    for each in (case, case._replace(seqlen_k=303), case._replace(lengths=((304, 304), (100, 90)))):
        for launch in launches(each, TARGETS[name]):
            assert compile_for(launch, TARGETS[name]).shared_memory <= 232_448, launch
