"""Which backend runs a call, and are all reasons given where none does?"""

import pytest
import torch

import triton_attention
from triton_attention import dispatch
from triton_attention.dispatch import BACKENDS, Backend, explain, select
from triton_attention.problem import Inputs, Mask, Problem


def make_problem(device="cpu", **fields):
    q, k, v = torch.zeros(2, 3, 4, 8), torch.zeros(2, 5, 2, 8), torch.zeros(2, 5, 2, 8)
    numbers = {"softmax_scale": None, "softcap": 0.0, "dropout_p": 0.0, "deterministic": False}
    problem = Problem.from_tensors(Inputs(q, k, v), mask=Mask(), **numbers)
    return problem._replace(device=torch.device(device), **fields)


def backend(name, *reasons):
    return Backend(name, lambda problem: list(reasons), lambda inputs, problem: pytest.fail("select runs nothing"))


def use(monkeypatch, *backends):
    monkeypatch.setattr(dispatch, "BACKENDS", backends)


def test_order():
    assert [backend.name for backend in BACKENDS] == ["hopper", "portable", "reference"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_reference_is_the_default_on_the_cpu(device):
    assert select(make_problem(device)).name == "reference"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu"])
def test_an_accelerator_lands_on_the_reference_by_name_only(device, monkeypatch):
    use(monkeypatch, BACKENDS[-1])
    assert select(make_problem(device), "reference").name == "reference"
    with pytest.raises(NotImplementedError, match=r"backend='reference' runs it in O\(seqlen\^2\) memory"):
        select(make_problem(device))


def test_auto_takes_the_first_without_reasons(monkeypatch):
    use(monkeypatch, backend("fast", "is too fast"), backend("slow"), backend("slower"))
    assert select(make_problem()).name == "slow"


def test_a_name_never_falls_back(monkeypatch):
    use(monkeypatch, backend("fast", "needs a GPU", "has no sink"), backend("slow"))
    with pytest.raises(NotImplementedError) as caught:
        select(make_problem(), "fast")
    assert str(caught.value) == (
        "no backend runs this call (backend='fast': batch 2, heads 4 / 2, seqlen 3 x 5, head dim 8 / 8, "
        "torch.float32 on cpu, forward):\n  fast: needs a GPU\n  fast: has no sink"
    )


def test_all_reasons_of_all_backends(monkeypatch):
    use(monkeypatch, backend("fast", "needs a GPU", "has no sink"), backend("slow", "sleeps"))
    with pytest.raises(NotImplementedError) as caught:
        select(make_problem())
    assert str(caught.value).splitlines()[1:] == ["  fast: needs a GPU", "  fast: has no sink", "  slow: sleeps"]


@pytest.mark.parametrize("function", [select, explain])
def test_unknown_name(function):
    with pytest.raises(ValueError, match=r"^backend must be 'auto', 'hopper', 'portable', 'reference', got 'cuda'$"):
        function(make_problem(), "cuda")


@pytest.mark.parametrize("backend", BACKENDS[:-1], ids=lambda backend: backend.name)
def test_a_triton_backend_by_name_gives_its_reasons_on_the_cpu(backend):
    q = torch.zeros(2, 3, 4, 8)
    reasons = backend.why_not(make_problem())
    assert reasons
    with pytest.raises(NotImplementedError) as caught:
        triton_attention.attention(q, q, q, backend=backend.name)
    assert all(f"{backend.name}: {reason}" in str(caught.value) for reason in reasons)


def test_explanation(monkeypatch):
    use(monkeypatch, backend("fast", "needs a GPU", "has no sink"), backend("slow"), backend("slower"))
    explanation = explain(make_problem(mask=Mask(2, 0, top_left=True), softcap=1.5, needs_grad=True))
    assert explanation.backend == "slow"
    assert explanation.reasons == {"fast": ["needs a GPU", "has no sink"], "slow": [], "slower": []}
    assert str(explanation).splitlines() == [
        "batch 2, heads 4 / 2, seqlen 3 x 5, head dim 8 / 8, torch.float32 on cpu, window (2, 0) from the top left, "
        "softcap 1.5, forward and backward",
        "    backend  runs  reasons",
        "    fast     no    needs a GPU",
        "                   has no sink",
        "->  slow     yes",
        "    slower   yes",
    ]


def test_explanation_of_a_name(monkeypatch):
    use(monkeypatch, backend("fast", "needs a GPU"), backend("slow"), backend("slower"))
    assert explain(make_problem(), "slower").backend == "slower"
    assert explain(make_problem(), "fast").backend is None


def test_explain_computes_nothing():
    q = torch.empty(64, 100_000, 16, 128, device="meta")  # 52 TB of scores
    bias = torch.empty(16, 1, 100_000, device="meta", requires_grad=True)
    explanation = triton_attention.explain(q, q, q, bias=bias, causal=True, return_lse=True)
    assert explanation.backend == "reference"
    assert str(explanation).splitlines()[0] == (
        "batch 64, heads 16 / 16, seqlen 100000 x 100000, head dim 128 / 128, torch.float32 on meta, causal, "
        "bias (1, 16, 1, 100000) torch.float32 with gradient, forward and backward"
    )


def test_packed_sequences_are_no_reason_against_a_backend():
    q = torch.zeros(5, 2, 8, dtype=torch.float16)
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 3, "max_seqlen_k": 3}
    reasons = triton_attention.explain(q, q, q, **lengths).reasons
    assert reasons == triton_attention.explain(q[None], q[None], q[None]).reasons
