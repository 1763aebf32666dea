"""Is every level of the Hopper tutorial right on a GPU?"""

import importlib
from pathlib import Path

import pytest
import torch
from hardware import needs_hopper

LEVELS = Path(__file__).resolve().parents[2] / "examples" / "hopper_levels"
FOR_EVERY_GPU = ("level1_online_softmax", "level2_descriptors")
NAMES = sorted(path.stem for path in LEVELS.glob("level*.py"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FOR_EVERY_GPU else needs_hopper) for name in NAMES]
)
def test_a_level_is_right(name, dtype, monkeypatch):
    monkeypatch.syspath_prepend(LEVELS)
    level, harness = importlib.import_module(name).level, importlib.import_module("harness")
    for heads, seqlen in ((8, 1024), (3, 128)):
        error, allowed = harness.errors(level, heads, seqlen, torch.device("cuda"), dtype)
        assert error <= allowed
