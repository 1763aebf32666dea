"""Are out, lse and every gradient right over the classic matrix, and over every case the interpreter tries?"""

import pytest
import torch
from hardware import IS_HOPPER
from matrix import ALL, all_runs

from triton_attention import dispatch, ops
from triton_attention.testing import check_against_float64, make_inputs

RUNS = list(all_runs())


@pytest.mark.parametrize("run", [run for run in RUNS if not run.why_not], ids=str)
def test_against_float64(run):
    def attention(inputs, problem):
        return ops.attention(inputs, problem._replace(deterministic=run.deterministic), run.backend)

    check = check_against_float64(attention, *make_inputs(run.case, "cuda"))
    assert check.good, f"\n{check}"


def test_portable_runs_every_case():
    assert [run.case for run in RUNS if run.backend == "portable" and not run.why_not] == ALL


def is_for_hopper(case):
    """16-bit numbers, and rows of q, k, v and of a bias matrix that are multiples of 16 bytes."""
    head_dims = (case.head_dim, case.head_dim_v or case.head_dim)
    *_, rows, columns = case.bias_shape
    row_bytes = columns * (case.bias_dtype or case.dtype).itemsize
    return (
        case.dtype != torch.float32
        and all(head_dim % 8 == 0 for head_dim in head_dims)
        and (rows == 1 or columns == 1 or row_bytes % 16 == 0)
    )


def test_hopper_runs_what_it_is_made_for_and_refuses_the_rest_with_reasons():
    runs = {run.case: run for run in RUNS if run.backend == "hopper"}
    assert list(runs) == ALL
    assert [case for case in ALL if not runs[case].why_not] == [
        case for case in ALL if IS_HOPPER and is_for_hopper(case)
    ]
    refused = next(run for run in runs.values() if run.why_not)
    _, problem = make_inputs(refused.case, "cuda")
    with pytest.raises(NotImplementedError) as caught:
        dispatch.select(problem, "hopper")
    assert all(f"hopper: {reason}" in str(caught.value) for reason in refused.why_not)
