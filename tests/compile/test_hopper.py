"""Does every variant of the Hopper kernels compile, fit the GPU, and keep several matrix products under way?"""

import re
from unittest.mock import patch

import pytest
import torch

from triton_attention.hopper import support
from triton_attention.hopper.configs import BACKWARD_ROWS, KEPT_ROWS, KEYS_ROWS, QUERIES_ROWS, ROWS
from triton_attention.kernel import compile_launch
from triton_attention.problem import Mask
from triton_attention.testing import CASES, Case, make_inputs
from triton_attention.testing.cases import CAUSAL, FEATURES_OF_EVERY_BACKEND, FULL
from triton_attention.testing.fake_device import TARGETS, assembler_messages, compile_for, launches

SM_90 = TARGETS["sm_90"]
SHARED_MEMORY = 232_448  # bytes that one block may have

WINDOW = Mask(300, 200)

LENGTHS = ((2048, 2048), (30, 700))
CHANGES = ({"softcap": 50.0}, {"alibi": "bh"}, {"dropout_p": 0.1})  # of scores or weights
EXTRAS = (*CHANGES, {"sink": True}, {"lengths": LENGTHS})
ALL_EXTRAS = {name: value for extra in EXTRAS for name, value in extra.items()}
DENSE_EXTRAS = {name: value for name, value in ALL_EXTRAS.items() if name != "lengths"}
PACKED_EXTRAS = {name: value for name, value in ALL_EXTRAS.items() if name != "dropout_p"}


def larger(head_dim, mask, bias=None, bias_dtype=None, seqlen=2048, **extras):
    return Case(seqlen, seqlen, head_dim, mask=mask, bias=bias, bias_dtype=bias_dtype, dtype=torch.bfloat16, **extras)


LARGER = (
    *(larger(head_dim, FULL) for head_dim in (96, 128, 160, 192, 256)),
    *(larger(head_dim, WINDOW) for head_dim in (80, 128, 160, 256)),
    *(larger(head_dim, CAUSAL) for head_dim in (80, 96, 160, 192)),
    *(larger(64, mask, seqlen=seqlen) for mask in (FULL, CAUSAL) for seqlen in (1024, 16384)),
    larger(32, FULL, "1hqk", seqlen=384),
    larger(32, FULL, "1hqk"),
    larger(64, FULL, "1hqk"),
    *(larger(128, FULL, "1hqk", **extras) for extras in ({}, *EXTRAS)),
    larger(192, CAUSAL, "1hqk"),
    *(larger(head_dim, CAUSAL, "1hqk", torch.bool) for head_dim in (64, 128, 192)),
    *(larger(head_dim, CAUSAL, "1hqk") for head_dim in (64, 80, 128, 256)),
    *(larger(head_dim, CAUSAL, "1hqk", torch.float32) for head_dim in (128, 256)),
    larger(256, WINDOW, "1hqk", torch.bool),
    *(larger(head_dim, CAUSAL, "b11k") for head_dim in (64, 256)),
    *(larger(head_dim, CAUSAL, "bhqk") for head_dim in (32, 64, 128)),
    larger(64, CAUSAL, "1hqk", torch.float32),
    *(larger(head_dim, mask, **extras) for head_dim in (64, 128, 256) for mask in (FULL, CAUSAL) for extras in EXTRAS),
    *(
        larger(head_dim, CAUSAL, bias, **extras)
        for head_dim in (64, 128, 256)
        for bias in ("1hqk", "b11k")
        for extras in (*CHANGES, DENSE_EXTRAS)
    ),
    *(larger(head_dim, CAUSAL, **extras) for head_dim in (96, 192) for extras in (DENSE_EXTRAS, PACKED_EXTRAS)),
    larger(96, CAUSAL, "b11k", **DENSE_EXTRAS),
    *(larger(head_dim, CAUSAL, "bhqk") for head_dim in (80, 96)),
    larger(96, CAUSAL, head_dim_v=64),
    *(
        larger(32, mask, bias, seqlen=200, batch=132, heads_q=4)  # so many heads that dq is kept
        for mask, bias in ((FULL, "1hqk"), (FULL, "b11k"), (CAUSAL, "bhqk"), (CAUSAL, None))
    ),
    *(larger(head_dim, CAUSAL, "1hqk", **ALL_EXTRAS) for head_dim in (64, 128)),
    *(larger(head_dim, WINDOW, **extras) for head_dim in (64, 128, 256) for extras in (PACKED_EXTRAS, ALL_EXTRAS)),
    *(larger(head_dim, CAUSAL, lengths=LENGTHS, dropout_p=0.1) for head_dim in (64, 128, 256)),
    *(larger(head_dim, CAUSAL, "bhqk", dropout_p=0.1) for head_dim in (64, 256)),
    *(larger(head_dim, FULL, "1hqk", dropout_p=0.1) for head_dim in (32, 64)),
    *(larger(head_dim, WINDOW, "1hqk", torch.float32, dropout_p=0.1) for head_dim in (128, 256)),
)


def runs_on_hopper(case):
    _, problem = make_inputs(case, "meta")
    with patch.object(support, "_other_than_hopper", return_value=None):
        return not support.why_not(problem)


def different_variants():
    """The launches of the larger cases and the common ones, but one of those that differ in the dtype of q alone."""
    variants = {}
    for case in filter(runs_on_hopper, (*LARGER, *CASES)):
        bias_size = None if case.bias is None else (case.bias_dtype or case.dtype).itemsize
        for launch in launches(case, SM_90, "hopper"):
            key = (launch.kernel, launch.spec, launch.tile, bias_size)
            variants.setdefault(key, (f"{launch.kernel.__name__}-{case}", launch))
    return [pytest.param(launch, id=name) for name, launch in variants.values()]


VARIANTS = different_variants()


def test_larger_cases_and_pairs_of_features_run_on_hopper():
    assert all(map(runs_on_hopper, (*LARGER, *FEATURES_OF_EVERY_BACKEND)))


def spills_allowed(launch):
    """Bytes that a thread may keep in memory instead of registers, with any Triton from 3.6 to 3.9."""
    kernel, spec = launch.kernel.__name__, launch.spec
    if all(getattr(spec, name, False) for name in ("SOFTCAP", "ALIBI", "DROPOUT")):
        # The worst is 384 with 3.6, and 464 with 3.9: head dim 128 and the gradient of a bias of the keys.
        return 480
    if kernel == "attention_bwd" and spec.HAS_LOWER and spec.BIAS_ROWS and spec.DROPOUT:
        return 352  # no clock has seen it: head dim 128 and a float32 bias
    # The worst is 200 with 3.6, with which a clock chose the tiles, and 320 with 3.9: the gradient of a bias of the
    # keys.
    return 320


@pytest.mark.parametrize("launch", VARIANTS)
def test_variant_compiles(launch):
    resources = compile_for(launch, SM_90)
    assert resources.shared_memory <= SHARED_MEMORY, resources
    assert resources.spills <= spills_allowed(launch), resources
    assert "wgmma" not in assembler_messages(launch, SM_90)  # "... instructions are serialized due to ..."


@pytest.mark.parametrize("launch", VARIANTS)
def test_no_shared_memory_is_unused(launch):
    """Triton gives the memory of what nobody uses to others. Of a barrier that spoils them: see `new_barriers`."""
    source = compile_launch(launch, SM_90).asm["ttgir"]
    allocations = re.findall(r"(%\w+) = ttg\.local_alloc : ", source)
    assert allocations or "ttg.warp_specialize" not in source
    for name in allocations:
        uses = re.findall(rf"^.*{name}\b(?! =).*$", source, re.MULTILINE)
        assert any("init_barrier" not in use and "memdesc_index" not in use for use in uses), name


def test_every_row_of_the_tables_is_compiled():
    taken = {variant.values[0].tile for variant in VARIANTS}
    assert {row.tile for row in (*ROWS, *BACKWARD_ROWS, *KEPT_ROWS, *KEYS_ROWS, *QUERIES_ROWS)} <= taken
