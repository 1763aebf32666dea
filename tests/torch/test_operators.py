"""Do the operators keep PyTorch's rules (opcheck), and do their fakes predict the real results?"""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from triton_attention import ops
from triton_attention.problem import Inputs, Mask
from triton_attention.testing import Case, make_inputs

# numpy's, where a query sees no key
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning:triton")

CAUSAL, FLOAT32 = Mask(None, 0), torch.float32
CASES = {
    "no bias": Case(5, 7, 16, batch=1, heads_q=1, dtype=FLOAT32),
    "bias": Case(5, 7, 16, batch=1, bias="bhqk", dtype=FLOAT32),
    "bias shared by heads, causal": Case(5, 7, 16, batch=1, bias="b1qk", mask=CAUSAL, dtype=FLOAT32),
    "bias shared by the batch, float32 for float16": Case(5, 8, 16, heads_q=1, bias="1hqk", bias_dtype=FLOAT32),
    "bias of keys, float16 for float32": Case(5, 7, 16, batch=1, bias="b11k", bias_dtype=torch.float16, dtype=FLOAT32),
    "bias of keys, unshared": Case(5, 7, 16, batch=1, heads_q=1, bias="bh1k"),
    "bias of queries, unshared": Case(5, 7, 16, batch=1, heads_q=1, bias="bhq1"),
    "mask": Case(5, 7, 16, heads_q=1, bias="b11k", bias_dtype=torch.bool, dtype=FLOAT32),
    "causal, grouped heads": Case(5, 7, 16, batch=1, heads_kv=1, mask=CAUSAL, dtype=FLOAT32),
    "window from the top left": Case(5, 7, 16, batch=1, heads_q=1, mask=Mask(2, 1, top_left=True), dtype=FLOAT32),
    "packed, float16": Case(7, 7, 16, heads_q=1, layout="packed"),
    "softcap, ALiBi, sink": Case(5, 7, 16, batch=1, softcap=2.0, alibi="h", sink=True, dtype=FLOAT32),
    "ALiBi of the batch, sink, bias": Case(5, 7, 16, alibi="bh", sink=True, bias="1h1k", mask=CAUSAL),
    "dropout": Case(5, 7, 16, batch=1, heads_q=1, dropout_p=0.4, dtype=FLOAT32),
    "packed sequences": Case(5, 7, 16, 8, heads_kv=1, lengths=((5, 7), (0, 2), (1, 1)), mask=CAUSAL, dtype=FLOAT32),
    "packed sequences, bias": Case(5, 7, 16, lengths=((5, 7), (2, 3)), unused=(3, 1), bias="1hqk", sink=True),
    "transposed, head dims differ": Case(5, 7, 16, 8, batch=1, layout="bhsd", dtype=FLOAT32),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
forward_operator = torch.ops.triton_attention.attention_fwd
backward_operator = torch.ops.triton_attention.attention_bwd


def call_of(inputs, problem):
    """The arguments that both operators take."""
    seed = torch.tensor(7) if problem.dropout_p > 0.0 else None
    lengths = (problem.seqlen_q, problem.seqlen_k) if problem.varlen else (None, None)
    numbers = (problem.softmax_scale, problem.softcap, problem.dropout_p, *problem.mask, problem.deterministic)
    return *inputs, seed, *lengths, *numbers, "portable"


def backward_arguments(case, uses_lse, needs_dbias):
    """Without a tensor that requires a gradient."""
    inputs, problem = make_inputs(case)
    with torch.no_grad():
        out, lse = ops.attention(inputs, problem, "portable")
    dlse = torch.randn_like(lse) if uses_lse else None
    inputs = Inputs._make(None if x is None else x.detach() for x in inputs)
    return torch.randn_like(out), dlse, out, lse, needs_dbias, *call_of(inputs, problem)


@each_case
def test_opcheck_forward(case):
    inputs, problem = make_inputs(case)
    torch.library.opcheck(forward_operator, call_of(inputs, problem))


def test_opcheck_forward_without_gradients():
    inputs, problem = make_inputs(CASES["bias"])
    inputs = Inputs._make(None if x is None else x.detach() for x in inputs)
    torch.library.opcheck(forward_operator, call_of(inputs, problem))


@each_case
def test_opcheck_backward(case):
    needs_dbias = case.bias is not None and case.bias_dtype != torch.bool
    torch.library.opcheck(backward_operator, backward_arguments(case, uses_lse=True, needs_dbias=needs_dbias))


def test_opcheck_backward_of_out_alone_without_dbias():
    torch.library.opcheck(backward_operator, backward_arguments(CASES["bias"], uses_lse=False, needs_dbias=False))


def test_opcheck_backward_of_leaves():
    """All but the test that differentiates: the backward operator has no derivative."""
    arguments = backward_arguments(CASES["bias"], uses_lse=True, needs_dbias=True)
    leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(backward_operator, leaves, test_utils=tests)


def results(inputs, problem):
    """out, lse and, through both, the gradients of what requires one."""
    outputs = ops.attention(inputs, problem, "portable")
    leaves = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return *outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])


def metadata(tensor):
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def on_meta_device(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@each_case
def test_fakes(case):
    inputs, problem = make_inputs(case)
    real = [metadata(tensor) for tensor in results(inputs, problem)]
    mode = FakeTensorMode()
    for convert, context in ((mode.from_tensor, mode), (on_meta_device, nullcontext())):
        fakes = inputs._make(None if x is None else convert(x.detach()).requires_grad_(x.requires_grad) for x in inputs)
        with context:
            assert [metadata(tensor) for tensor in results(fakes, problem)] == real
