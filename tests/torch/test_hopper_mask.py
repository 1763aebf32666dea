"""Do the bits of the Hopper kernels' masks say what `blocks.allowed` says? Their arithmetic runs as Python."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from gluon_as_python import as_python, language

from triton_attention import blocks
from triton_attention.hopper import mask

ROWS = 64


def assembler(text, constraints, operands, **_):
    """The two pieces of PTX in mask.py."""
    if text.startswith("bmsk"):
        return (1 << operands[0].clamp(max=32)) - 1
    values, words, bit = operands
    rest = float("-inf") if "0fFF800000" in text else 0.0
    return torch.where(words & bit != 0, values, rest)


def nothing(*_):
    return None


STAND_IN = SimpleNamespace(
    **vars(language([0]))
    | {
        "full_like": torch.full_like,
        "inline_asm_elementwise": assembler,
        "float32": torch.float32,
        "static_assert": nothing,
    }
)
INSTEAD = {"rows_layout": nothing, "columns_layout": nothing, "opaque_zero": lambda: 0}
mask_queries, mask_keys = (as_python(function, STAND_IN, INSTEAD) for function in (mask.mask_queries, mask.mask_keys))


@pytest.mark.parametrize("rest", [0.0, float("-inf")])
@pytest.mark.parametrize("columns", [32, 64, 128])
@pytest.mark.parametrize(("has_lower", "has_upper"), list(product([False, True], repeat=2)))
def test_a_mask_hides_what_is_not_allowed(has_lower, has_upper, columns, rest):
    random = torch.Generator().manual_seed(0)
    spec = SimpleNamespace(HAS_LOWER=has_lower, HAS_UPPER=has_upper)
    for _ in range(200):
        start_m, start_n, seqlen_k, lower, width = torch.randint(0, 300, (5,), generator=random).tolist()
        limits = SimpleNamespace(seqlen_k=seqlen_k, lower=lower - 150, upper=lower - 150 + width)
        band = (limits.lower, limits.upper, has_lower, has_upper)
        rows, cols = torch.arange(ROWS), torch.arange(columns)
        values = torch.rand(ROWS, columns, generator=random) + 1
        for transposed, masked in ((False, mask_queries), (True, mask_keys)):
            queries, keys = (cols[None, :], rows[:, None]) if transposed else (rows[:, None], cols[None, :])
            seen = blocks.allowed(start_m + queries, start_n + keys, seqlen_k, *band)
            out = masked(values, start_m, start_n, limits, spec, rest)
            assert torch.equal(out, torch.where(seen, values, rest))
