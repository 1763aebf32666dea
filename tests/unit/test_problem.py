"""What does a bad call get? One row per requirement, with the exact message; and what does a good one become?"""

import math
import sys

import numpy as np
import pytest
import torch

from triton_attention import attention, explain
from triton_attention.problem import Bias, Inputs, Mask, Problem


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


Q, K, V = tensor(2, 3, 4, 8), tensor(2, 5, 2, 8), tensor(2, 5, 2, 6)
DTYPES = "torch.float16 or torch.bfloat16 or torch.float32"
WINDOW_SIDES = "window must have sides of at least 0, or -1 or None for unbounded"

BAD_CALLS = [
    # No tensor, or one that is not dense.
    ({"q": [[1.0]]}, TypeError, "q must be a torch.Tensor, got list"),
    ({"k": np.zeros((2, 5, 2, 8))}, TypeError, "k must be a torch.Tensor, got ndarray"),
    ({"v": None}, TypeError, "v must be a torch.Tensor, got NoneType"),
    ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor, got float"),
    ({"alibi_slopes": [0.5] * 4}, TypeError, "alibi_slopes must be a torch.Tensor, got list"),
    ({"sink": 0.0}, TypeError, "sink must be a torch.Tensor, got float"),
    ({"q": Q.to_sparse()}, ValueError, "q must be a dense strided tensor, got torch.sparse_coo"),
    (
        {"k": torch.nested.nested_tensor([K[0], K[1]], layout=torch.jagged)},
        ValueError,
        "k must be a dense strided tensor, got nested",
    ),
    # Rank.
    ({"q": Q[0]}, ValueError, "q must be (batch, seqlen_q, heads_q, head_dim), got (3, 4, 8)"),
    ({"k": K[0]}, ValueError, "k must be (batch=2, seqlen_k, heads_kv, head_dim=8), got (5, 2, 8)"),
    ({"v": V[None]}, ValueError, "v must be (batch=2, seqlen_k=5, heads_kv=2, head_dim_v), got (1, 2, 5, 2, 6)"),
    ({"sink": tensor()}, ValueError, "sink must be (heads_q=4), got ()"),
    (
        {"bias": tensor(1, 1, 1, 1, 5)},
        ValueError,
        "bias must be broadcastable to (batch=2, heads_q=4, seqlen_q=3, seqlen_k=5), got (1, 1, 1, 1, 5)",
    ),
    # Shape.
    ({"k": tensor(3, 5, 2, 8)}, ValueError, "k must be (batch=2, seqlen_k, heads_kv, head_dim=8), got (3, 5, 2, 8)"),
    ({"k": tensor(2, 5, 2, 16)}, ValueError, "k must be (batch=2, seqlen_k, heads_kv, head_dim=8), got (2, 5, 2, 16)"),
    (
        {"v": tensor(2, 6, 2, 8)},
        ValueError,
        "v must be (batch=2, seqlen_k=5, heads_kv=2, head_dim_v), got (2, 6, 2, 8)",
    ),
    (
        {"v": tensor(2, 5, 4, 8)},
        ValueError,
        "v must be (batch=2, seqlen_k=5, heads_kv=2, head_dim_v), got (2, 5, 4, 8)",
    ),
    ({"alibi_slopes": tensor(2)}, ValueError, "alibi_slopes must be (heads_q=4), got (2,)"),
    ({"alibi_slopes": tensor(3, 4)}, ValueError, "alibi_slopes must be (batch=2, heads_q=4), got (3, 4)"),
    ({"sink": tensor(2)}, ValueError, "sink must be (heads_q=4), got (2,)"),
    # Dtype.
    ({"q": Q.long()}, TypeError, f"q must be {DTYPES} or torch.float64, got torch.int64"),
    ({"q": Q.to(torch.float8_e4m3fn)}, TypeError, f"q must be {DTYPES} or torch.float64, got torch.float8_e4m3fn"),
    ({"k": K.half()}, TypeError, "k must have the dtype of q, torch.float32, got torch.float16"),
    ({"v": V.double()}, TypeError, "v must have the dtype of q, torch.float32, got torch.float64"),
    ({"bias": tensor(5, dtype=torch.int8)}, TypeError, f"bias must be {DTYPES} or torch.bool, got torch.int8"),
    ({"bias": tensor(5, dtype=torch.float64)}, TypeError, f"bias must be {DTYPES} or torch.bool, got torch.float64"),
    (
        {"alibi_slopes": tensor(4, dtype=torch.float16)},
        TypeError,
        "alibi_slopes must be torch.float32, got torch.float16",
    ),
    ({"sink": tensor(4, dtype=torch.int32)}, TypeError, f"sink must be {DTYPES}, got torch.int32"),
    # Devices.
    ({"k": K.to("meta")}, ValueError, "k must be on the device of q, cpu, got meta"),
    ({"v": V.to("meta")}, ValueError, "v must be on the device of q, cpu, got meta"),
    ({"bias": tensor(5, device="meta")}, ValueError, "bias must be on the device of q, cpu, got meta"),
    ({"alibi_slopes": tensor(4, device="meta")}, ValueError, "alibi_slopes must be on the device of q, cpu, got meta"),
    ({"sink": tensor(4, device="meta")}, ValueError, "sink must be on the device of q, cpu, got meta"),
    # Heads that do not divide.
    ({"q": tensor(2, 3, 3, 8)}, ValueError, "q must have a positive multiple of the heads of k, 2, got 3"),
    ({"q": tensor(2, 3, 0, 8)}, ValueError, "q must have a positive multiple of the heads of k, 2, got 0"),
    ({"k": tensor(2, 5, 0, 8)}, ValueError, "q must have a positive multiple of the heads of k, 0, got 4"),
    # A bias that does not broadcast.
    (
        {"bias": tensor(4, 3, 4)},
        ValueError,
        "bias must be broadcastable to (batch=2, heads_q=4, seqlen_q=3, seqlen_k=5), got (1, 4, 3, 4)",
    ),
    (
        {"bias": tensor(2, 2, 3, 5, dtype=torch.bool)},
        ValueError,
        "bias must be broadcastable to (batch=2, heads_q=4, seqlen_q=3, seqlen_k=5), got (2, 2, 3, 5)",
    ),
    # Dropout.
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be in [0, 1), got -0.1"),
    ({"dropout_p": math.nan}, ValueError, "dropout_p must be in [0, 1), got nan"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a number, got None"),
    # Window.
    ({"window": (-2, 0)}, ValueError, f"{WINDOW_SIDES}, got (-2, 0)"),
    ({"window": (0, -5)}, ValueError, f"{WINDOW_SIDES}, got (0, -5)"),
    ({"window": (1, 2, 3)}, ValueError, "window must be a tuple (left, right), got (1, 2, 3)"),
    ({"window": [1, 2]}, TypeError, "window must be None or a tuple (left, right), got [1, 2]"),
    ({"window": 3}, TypeError, "window must be None or a tuple (left, right), got 3"),
    ({"window": (1.0, 2)}, TypeError, "window must hold integers or None, got (1.0, 2)"),
    ({"window": (1, True)}, TypeError, "window must hold integers or None, got (1, True)"),
    # Numbers that are not finite.
    ({"softmax_scale": math.inf}, ValueError, "softmax_scale must be finite, got inf"),
    ({"softmax_scale": -math.inf}, ValueError, "softmax_scale must be finite, got -inf"),
    ({"softmax_scale": math.nan}, ValueError, "softmax_scale must be finite, got nan"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number, got '1'"),
    ({"softcap": math.inf}, ValueError, "softcap must be in [0, inf), got inf"),
    ({"softcap": -1.0}, ValueError, "softcap must be in [0, inf), got -1.0"),
    ({"softcap": True}, TypeError, "softcap must be a number, got True"),
    # Head dims.
    ({"q": tensor(2, 3, 4, 0), "k": tensor(2, 5, 2, 0)}, ValueError, "q must have a head dim from 1 to 256, got 0"),
    (
        {"q": tensor(2, 3, 4, 257), "k": tensor(2, 5, 2, 257)},
        ValueError,
        "q must have a head dim from 1 to 256, got 257",
    ),
    ({"v": tensor(2, 5, 2, 0)}, ValueError, "v must have a head dim from 1 to 256, got 0"),
    ({"v": tensor(2, 5, 2, 300)}, ValueError, "v must have a head dim from 1 to 256, got 300"),
    # Flags.
    ({"causal": 1}, TypeError, "causal must be a bool, got 1"),
    ({"deterministic": None}, TypeError, "deterministic must be a bool, got None"),
    ({"return_lse": "yes"}, TypeError, "return_lse must be a bool, got 'yes'"),
    # What has no gradient.
    (
        {"alibi_slopes": tensor(4).requires_grad_()},
        ValueError,
        "alibi_slopes must not require grad (it is not differentiable), got requires_grad=True",
    ),
    # Backends.
    ({"backend": "cudnn"}, ValueError, "backend must be 'auto', 'hopper', 'portable', 'reference', got 'cudnn'"),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS, ids=lambda value: value if value else None)
@pytest.mark.parametrize("function", [attention, explain])
def test_bad_call(function, arguments, error, message):
    with pytest.raises(error) as caught:
        function(**({"q": Q, "k": K, "v": V} | arguments))
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(("value", "got"), [([1.0], "list"), (torch.zeros(2, 3, 4, 8).long(), "torch.int64")])
def test_autocast_hides_no_bad_argument(name, value, got):
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=rf"^{name} must .*, got {got}$"):
        attention(**({"q": Q, "k": K, "v": V} | {name: value}))


NO_MASK = Mask()


def problem_of(inputs, mask=NO_MASK, softmax_scale=None, softcap=0.0, dropout_p=0.0, deterministic=False):
    return Problem.from_tensors(
        inputs,
        mask=mask,
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        deterministic=deterministic,
    )


def test_describes_the_call():
    inputs = Inputs(Q, K, V, tensor(1, 4, 1, 5, dtype=torch.float16).requires_grad_(), sink=tensor(4))
    problem = problem_of(inputs, Mask(right=0), softmax_scale=2, softcap=3, dropout_p=0.5, deterministic=True)
    assert problem == Problem(
        batch=2,
        heads_q=4,
        heads_kv=2,
        seqlen_q=3,
        seqlen_k=5,
        head_dim=8,
        head_dim_v=6,
        dtype=torch.float32,
        device=torch.device("cpu"),
        mask=Mask(None, 0, False),
        softmax_scale=2.0,
        softcap=3.0,
        bias=Bias((True, False, True, False), torch.float16, needs_grad=True),
        alibi=False,
        sink=True,
        dropout_p=0.5,
        deterministic=True,
        needs_grad=True,
        aligned=False,  # 6 numbers in a row of v
    )
    assert [type(number) for number in (problem.softmax_scale, problem.softcap)] == [float, float]
    assert hash(problem) == hash(problem_of(inputs, Mask(right=0), 2, 3, 0.5, True))


def test_scale_zero_is_not_the_default():
    assert problem_of(Inputs(Q, K, V)).softmax_scale == 8**-0.5
    assert problem_of(Inputs(Q, K, V), softmax_scale=0.0).softmax_scale == 0.0


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sink"])
def test_any_input_may_need_a_gradient(name):
    inputs = Inputs(Q, K, V, tensor(1, 1, 3, 5), sink=tensor(4))
    assert not problem_of(inputs).needs_grad
    inputs = inputs._replace(**{name: getattr(inputs, name).clone().requires_grad_()})
    assert problem_of(inputs).needs_grad
    assert problem_of(inputs).bias.needs_grad == (name == "bias")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not problem_of(inputs).needs_grad
            assert not problem_of(inputs).bias.needs_grad


@pytest.mark.parametrize(
    ("causal", "window", "expected"),
    [
        (False, (2**31, sys.maxsize), (None, None)),  # as many keys as no sequence has
        (False, (10**30, 2**31 - 1), (None, 2**31 - 1)),
        (False, None, (None, None)),
        (False, (-1, -1), (None, None)),
        (False, (None, None), (None, None)),
        (False, (3, None), (3, None)),
        (False, (-1, 2), (None, 2)),
        (True, None, (None, 0)),
        (True, (3, -1), (3, 0)),
        (True, (3, 0), (3, 0)),
        (True, (3, 7), (3, 0)),
    ],
)
def test_mask_of(causal, window, expected):
    assert Mask.of(causal, window) == Mask(*expected, top_left=False)
    assert Mask.of(causal, window, top_left=True) == Mask(*expected, top_left=True)


def test_mask_band():
    assert Mask().band(3, 5) == (None, None)
    assert Mask(1, 0).band(3, 5) == (1, 2)
    assert Mask(1, 0).band(5, 3) == (-3, -2)
    assert Mask(1, 0, top_left=True).band(3, 5) == (-1, 0)


def halves(*shape, strides=None, offset=0):
    """A float16 tensor on no device, dense or with the given strides."""
    if strides is None:
        return torch.empty(shape, dtype=torch.float16, device="meta")
    return torch.empty(0, dtype=torch.float16, device="meta").as_strided(shape, strides, offset)


def packed(head_dim):
    """q, k and v as views of one tensor."""
    return halves(2, 5, 3, 4, head_dim).unbind(2)


def dense(head_dim=16):
    return halves(2, 5, 4, head_dim), halves(2, 5, 2, head_dim), halves(2, 5, 2, head_dim)


ALIGNED = {
    "dense": (dense(), True),
    "head dim 40": (dense(40), True),
    "head dim 42": (dense(42), False),
    "packed": (packed(40), True),
    "packed, head dim 4": (packed(4), False),
    "heads before queries": ([tensor.transpose(1, 2) for tensor in (halves(2, 4, 5, 8),) * 3], True),
    "expanded over the batch": ([tensor[:1].expand(2, -1, -1, -1) for tensor in dense()], True),
    "every second number": ([halves(2, 5, 4, 32)[..., ::2]] * 3, False),
    "expanded along the head dim": ([halves(2, 5, 4, 1).expand(-1, -1, -1, 16)] * 3, False),
    "q starts at the second number": ((halves(2, 5, 4, 16, strides=(320, 64, 16, 1), offset=1), *dense()[1:]), False),
    "k starts at the ninth number": (
        (dense()[0], halves(2, 5, 2, 16, strides=(320, 64, 16, 1), offset=8), dense()[2]),
        True,
    ),
    "odd stride of the batch in v": ((*dense()[:2], halves(2, 5, 2, 16, strides=(321, 64, 16, 1))), False),
    "odd stride of the queries": ((halves(2, 5, 4, 16, strides=(320, 65, 16, 1)), *dense()[1:]), False),
    "odd stride of the heads in k": ((dense()[0], halves(2, 5, 2, 16, strides=(320, 64, 17, 1)), dense()[2]), False),
    "odd strides of axes of size 1": ([halves(1, 1, 1, 16, strides=(7, 9, 11, 1))] * 3, True),
    "odd stride of one number": ([halves(2, 5, 2, 1, strides=(80, 16, 8, 3))] * 3, True),
}


@pytest.mark.parametrize(("qkv", "aligned"), ALIGNED.values(), ids=ALIGNED)
def test_rows_are_aligned(qkv, aligned):
    assert problem_of(Inputs(*qkv)).aligned is aligned


@pytest.mark.parametrize(
    ("dtype", "multiple"), [(torch.float16, 8), (torch.bfloat16, 8), (torch.float32, 4), (torch.float64, 2)]
)
def test_rows_are_aligned_to_16_bytes(dtype, multiple):
    for head_dim in range(1, 33):
        q = torch.empty(2, 5, 4, head_dim, dtype=dtype, device="meta")
        assert problem_of(Inputs(q, q, q)).aligned == (head_dim % multiple == 0)


@pytest.mark.parametrize(
    ("shape", "aligned"),
    [
        ((1, 1, 35, 40), True),
        ((2, 4, 35, 40), True),
        ((1, 1, 40, 35), False),
        ((2, 1, 1, 35), True),  # one row of a matrix: it is read once, and cheap to copy
        ((1, 4, 40, 1), True),
    ],
)
def test_rows_of_a_bias_are_aligned(shape, aligned):
    _, _, seqlen_q, seqlen_k = shape
    seqlen_q, seqlen_k = max(seqlen_q, 35), max(seqlen_k, 35)
    q, k = halves(2, seqlen_q, 4, 16), halves(2, seqlen_k, 4, 16)
    assert problem_of(Inputs(q, k, k, halves(*shape))).aligned is aligned


@pytest.mark.parametrize(("dtype", "aligned"), [(torch.bool, False), (torch.float32, True), (torch.float16, True)])
def test_rows_of_a_bias_are_aligned_in_its_own_dtype(dtype, aligned):
    q = halves(2, 40, 4, 16)
    assert problem_of(Inputs(q, q, q, tensor(1, 1, 40, 40, dtype=dtype, device="meta"))).aligned is aligned


def test_alignment_is_no_question_of_a_compiled_graph():
    """Strides are symbols there: to ask would make guards on them, and compile again."""

    def function(x):
        return x + problem_of(Inputs(x, x, x)).aligned

    x = torch.zeros(2, 5, 4, 7)
    assert not problem_of(Inputs(x, x, x)).aligned
    torch._dynamo.reset()
    assert torch.equal(torch.compile(function, fullgraph=True, dynamic=True, backend="eager")(x), x + 1)
    torch._dynamo.reset()
