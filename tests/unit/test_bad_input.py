"""Does every public function refuse a wrong call before anything runs, in words that help, and leave no trace?

The rows of the table are grouped by argument. Most messages are the argument, what it must be, and what it got.
"""

import inspect
import math
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import triton_attention
from triton_attention import attention, attention_varlen, dispatch, explain, ops, reference
from triton_attention.compat import flash_attn, flash_attn_triton, sdpa


def tensor(*shape, dtype=torch.float32, device="cpu"):
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(dtype).to(device)


def exotic(make, *arguments, **options):
    """A tensor of a kind that PyTorch warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments, **options)


def nested(*shape, layout=torch.jagged):
    return exotic(torch.nested.nested_tensor, [tensor(*shape)] * 2, layout=layout)


def sparse_rows(*shape):
    return exotic(tensor(*shape).to_sparse_csr, dense_dim=len(shape) - 2)


def quantised(*shape):
    return exotic(torch.quantize_per_tensor, tensor(*shape), 0.1, 0, torch.quint8)


# Right arguments, by name. What a function requires of them makes a right call of it.
Q, K, V = tensor(2, 3, 4, 8), tensor(2, 5, 2, 8), tensor(2, 5, 2, 8)
QUERY, KEY, VALUE = tensor(2, 4, 3, 8), tensor(2, 4, 5, 8), tensor(2, 4, 5, 6)
RIGHT = {
    "q": Q,
    "k": K,
    "v": V,
    "kv": tensor(2, 5, 2, 2, 8),
    "qkv": tensor(2, 5, 3, 4, 8),
    "query": QUERY,
    "key": KEY,
    "value": VALUE,
}

# Groups of functions: what is called.
NATIVE = (attention, explain)
SEPARATE = (*NATIVE, flash_attn.flash_attn_func, flash_attn_triton.flash_attn_func)  # q, k, v
KV_PACKED = (flash_attn.flash_attn_kvpacked_func, flash_attn_triton.flash_attn_kvpacked_func)
QKV_PACKED = (flash_attn.flash_attn_qkvpacked_func, flash_attn_triton.flash_attn_qkvpacked_func)
TAKE_Q = (*SEPARATE, *KV_PACKED)
TAKE_SCALE = (*TAKE_Q, *QKV_PACKED)
FLASH_ATTN = (
    flash_attn.flash_attn_func,
    flash_attn.flash_attn_kvpacked_func,
    flash_attn.flash_attn_qkvpacked_func,
)
TAKE_SOFTCAP = (*NATIVE, *FLASH_ATTN)
SDPA = (sdpa.scaled_dot_product_attention,)


class Row(NamedTuple):
    """A wrong call and what it gets."""

    function: Any
    arguments: dict[str, Any]
    error: type[Exception]
    message: str | re.Pattern[str]
    name: str


def name_of(function):
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def right(function, **changes):
    """The arguments of a right call, with these changes."""
    parameters = inspect.signature(function).parameters.values()
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    return {name: value for name, value in RIGHT.items() if name in required} | changes


def rows(functions, changes, error, message, name):
    """One row for each of the functions: a right call of it but for these changes."""
    return [
        Row(function, right(function, **changes), error, message, f"{name_of(function)}-{name}")
        for function in functions
    ]


def wrong(functions, argument, error, requirement, *cases, **others):
    """One row for each of the functions and (value of the argument, what the message calls it)."""
    return [
        row
        for value, got in cases
        for row in rows(
            functions, others | {argument: value}, error, f"{argument} {requirement}, got {got}", f"{argument}-{got}"
        )
    ]


def as_written(*values):
    return [(value, repr(value)) for value in values]


TENSOR, DENSE = "must be a torch.Tensor", "must be a dense strided tensor"
FLOATS = "torch.float16 or torch.bfloat16 or torch.float32"
ON_CPU = "must be on the device of q, cpu"
NO_TENSORS = [(None, "NoneType"), ([[1.0]], "list"), (np.zeros((2, 3, 4, 8)), "ndarray"), (1.0, "float")]
NO_ADDENDS = NO_TENSORS[1:]  # None means none
NO_BOOLS = as_written(0, 1, None, "True", np.bool_(True), torch.tensor(True))
NO_NUMBERS = as_written("1", True, 1j, [1.0], np.float32(1), torch.tensor(1.0))

Q_ROWS = [
    *wrong(TAKE_Q, "q", TypeError, TENSOR, *NO_TENSORS),
    *wrong(
        TAKE_Q,
        "q",
        ValueError,
        DENSE,
        (Q.to_sparse(), "torch.sparse_coo"),
        (sparse_rows(2, 3, 4, 8), "torch.sparse_csr"),
        (nested(3, 4, 8), "nested"),
        (nested(3, 4, 8, layout=torch.strided), "nested"),
    ),
    *wrong(
        TAKE_Q,
        "q",
        TypeError,
        f"must be {FLOATS} or torch.float64",
        (Q.long(), "torch.int64"),
        (Q.bool(), "torch.bool"),
        (Q.to(torch.complex64), "torch.complex64"),
        (Q.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (quantised(2, 3, 4, 8), "torch.quint8"),
    ),
    *wrong(
        TAKE_Q,
        "q",
        ValueError,
        "must be (batch, seqlen_q, heads_q, head_dim)",
        (Q[0], "(3, 4, 8)"),
        (Q[None], "(1, 2, 3, 4, 8)"),
        (tensor(), "()"),
    ),
    *wrong(
        TAKE_Q,
        "q",
        ValueError,
        "must have a head dim from 1 to 256",
        (tensor(2, 3, 4, 0), "0"),
        (tensor(2, 3, 4, 257), "257"),
    ),
    *wrong(
        TAKE_Q,
        "q",
        ValueError,
        "must have a positive multiple of the heads of k, 2",
        (tensor(2, 3, 3, 8), "3"),
        (tensor(2, 3, 1, 8), "1"),
        (tensor(2, 3, 0, 8), "0"),
    ),
    *wrong(
        SEPARATE,
        "q",
        ValueError,
        "must have a positive multiple of the heads of k, 0",
        (Q, "4"),
        k=tensor(2, 5, 0, 8),
    ),
]

K_SHAPE, V_SHAPE = (
    "must be (batch=2, seqlen_k, heads_kv, head_dim=8)",
    "must be (batch=2, seqlen_k=5, heads_kv=2, head_dim_v)",
)
K_AND_V_ROWS = [
    *(
        row
        for name in ("k", "v")
        for row in (
            *wrong(SEPARATE, name, TypeError, TENSOR, *NO_TENSORS),
            *wrong(
                SEPARATE,
                name,
                TypeError,
                "must have the dtype of q, torch.float32",
                (K.half(), "torch.float16"),
                (K.double(), "torch.float64"),
                (quantised(2, 5, 2, 8), "torch.quint8"),
            ),
            *wrong(
                SEPARATE,
                name,
                ValueError,
                DENSE,
                (K.to_sparse(), "torch.sparse_coo"),
                (nested(5, 2, 8), "nested"),
            ),
            *wrong(SEPARATE, name, ValueError, ON_CPU, (K.to("meta"), "meta")),
        )
    ),
    *wrong(SEPARATE, "k", ValueError, "must be on the device of q, meta", (K, "cpu"), q=Q.to("meta")),
    *wrong(
        SEPARATE,
        "k",
        ValueError,
        K_SHAPE,
        (K[0], "(5, 2, 8)"),
        (tensor(3, 5, 2, 8), "(3, 5, 2, 8)"),
        (tensor(2, 5, 2, 16), "(2, 5, 2, 16)"),
    ),
    *wrong(
        SEPARATE,
        "v",
        ValueError,
        V_SHAPE,
        (V[None], "(1, 2, 5, 2, 8)"),
        (tensor(3, 5, 2, 8), "(3, 5, 2, 8)"),
        (tensor(2, 6, 2, 8), "(2, 6, 2, 8)"),
        (tensor(2, 5, 4, 8), "(2, 5, 4, 8)"),
    ),
    *wrong(
        SEPARATE,
        "v",
        ValueError,
        "must have a head dim from 1 to 256",
        (tensor(2, 5, 2, 0), "0"),
        (tensor(2, 5, 2, 300), "300"),
    ),
]

PACKED_ROWS = [
    *wrong(KV_PACKED, "kv", TypeError, TENSOR, *NO_TENSORS),
    *wrong(
        KV_PACKED,
        "kv",
        ValueError,
        DENSE,
        (nested(5, 2, 2, 8), "nested"),
        (tensor(2, 5, 2, 2, 8).to_sparse(), "torch.sparse_coo"),
    ),
    *wrong(
        KV_PACKED,
        "kv",
        ValueError,
        "must be (batch, seqlen, 2, heads, head_dim)",
        (K, "(2, 5, 2, 8)"),
        (tensor(2, 5, 3, 2, 8), "(2, 5, 3, 2, 8)"),
        (tensor(1, 2, 5, 2, 2, 8), "(1, 2, 5, 2, 2, 8)"),
    ),
    *wrong(QKV_PACKED, "qkv", TypeError, TENSOR, *NO_TENSORS),
    *wrong(
        QKV_PACKED,
        "qkv",
        ValueError,
        DENSE,
        (nested(5, 3, 4, 8), "nested"),
        (tensor(2, 5, 3, 4, 8).to_sparse(), "torch.sparse_coo"),
    ),
    *wrong(
        QKV_PACKED,
        "qkv",
        ValueError,
        "must be (batch, seqlen, 3, heads, head_dim)",
        (Q, "(2, 3, 4, 8)"),
        (tensor(2, 5, 2, 4, 8), "(2, 5, 2, 4, 8)"),
        (tensor(3, 2, 5, 4, 8), "(3, 2, 5, 4, 8)"),
    ),
]

BIAS_ROWS = [
    *wrong(TAKE_SCALE, "bias", TypeError, TENSOR, *NO_ADDENDS),
    *wrong(
        TAKE_SCALE,
        "bias",
        TypeError,
        f"must be {FLOATS} or torch.bool",
        (tensor(5, dtype=torch.int8), "torch.int8"),
        (tensor(5, dtype=torch.float64), "torch.float64"),
        (quantised(5), "torch.quint8"),
    ),
    *wrong(
        TAKE_SCALE,
        "bias",
        ValueError,
        DENSE,
        (tensor(5, 5).to_sparse(), "torch.sparse_coo"),
        (sparse_rows(3, 5), "torch.sparse_csr"),
        (nested(4, 3, 5), "nested"),
        (nested(3, 5, layout=torch.strided), "nested"),
    ),
    *wrong(TAKE_SCALE, "bias", ValueError, ON_CPU, (tensor(5, device="meta"), "meta")),
    *wrong(
        TAKE_Q,
        "bias",
        ValueError,
        "must be broadcastable to (batch=2, heads_q=4, seqlen_q=3, seqlen_k=5)",
        (tensor(3, 1, 1, 1), "(3, 1, 1, 1)"),
        (tensor(2, 1, 1), "(1, 2, 1, 1)"),  # heads_kv is not heads_q
        (tensor(2, 5), "(1, 1, 2, 5)"),
        (tensor(4), "(1, 1, 1, 4)"),
        (tensor(0), "(1, 1, 1, 0)"),
        (tensor(2, 3, 4, 5), "(2, 3, 4, 5)"),
        (tensor(1, 2, 4, 3, 5), "(1, 2, 4, 3, 5)"),
        (tensor(5, 3, dtype=torch.bool), "(1, 1, 5, 3)"),
    ),
    *wrong(
        QKV_PACKED,
        "bias",
        ValueError,
        "must be broadcastable to (batch=2, heads_q=4, seqlen_q=5, seqlen_k=5)",
        (tensor(3, 5), "(1, 1, 3, 5)"),
        (tensor(3, 5, 5), "(1, 3, 5, 5)"),
    ),
]

SLOPES_AND_SINK_ROWS = [
    *wrong(TAKE_SOFTCAP, "alibi_slopes", TypeError, TENSOR, *NO_ADDENDS),
    *wrong(
        TAKE_SOFTCAP,
        "alibi_slopes",
        TypeError,
        "must be torch.float32",
        (tensor(4, dtype=torch.float16), "torch.float16"),
        (tensor(4, dtype=torch.float64), "torch.float64"),
        (quantised(4), "torch.quint8"),
    ),
    *wrong(
        TAKE_SOFTCAP,
        "alibi_slopes",
        ValueError,
        DENSE,
        (nested(4), "nested"),
        (tensor(4).to_sparse(), "torch.sparse_coo"),
    ),
    *wrong(TAKE_SOFTCAP, "alibi_slopes", ValueError, ON_CPU, (tensor(4, device="meta"), "meta")),
    *wrong(
        TAKE_SOFTCAP,
        "alibi_slopes",
        ValueError,
        "must be (heads_q=4)",
        (tensor(2), "(2,)"),
        (tensor(), "()"),
        (tensor(2, 4, 1), "(2, 4, 1)"),
    ),
    *wrong(
        TAKE_SOFTCAP,
        "alibi_slopes",
        ValueError,
        "must be (batch=2, heads_q=4)",
        (tensor(1, 4), "(1, 4)"),
        (tensor(2, 2), "(2, 2)"),
    ),
    *wrong(
        TAKE_SOFTCAP,
        "alibi_slopes",
        ValueError,
        "must not require grad (it is not differentiable)",
        (tensor(4).requires_grad_(), "requires_grad=True"),
        (tensor(2, 4).requires_grad_(), "requires_grad=True"),
    ),
    *wrong(NATIVE, "sink", TypeError, TENSOR, *NO_ADDENDS),
    *wrong(
        NATIVE,
        "sink",
        TypeError,
        f"must be {FLOATS}",
        (tensor(4, dtype=torch.bool), "torch.bool"),
        (tensor(4, dtype=torch.float64), "torch.float64"),
        (tensor(4, dtype=torch.int32), "torch.int32"),
        (quantised(4), "torch.quint8"),
    ),
    *wrong(
        NATIVE,
        "sink",
        ValueError,
        DENSE,
        (tensor(4).to_sparse(), "torch.sparse_coo"),
        (nested(4), "nested"),
    ),
    *wrong(NATIVE, "sink", ValueError, ON_CPU, (tensor(4, device="meta"), "meta")),
    *wrong(NATIVE, "sink", ValueError, "must be (heads_q=4)", (tensor(2), "(2,)"), (tensor(2, 4), "(2, 4)")),
]

SDPA_DENSE_ROWS = [
    row
    for name in ("query", "key", "value")
    for row in wrong(
        SDPA,
        name,
        ValueError,
        DENSE,
        (nested(4, 3, 8), "nested"),
        (tensor(2, 4, 3, 8).to_sparse(), "torch.sparse_coo"),
    )
]

NUMBER_ROWS = [
    *wrong(TAKE_SCALE, "softmax_scale", TypeError, "must be a number", *NO_NUMBERS),
    *wrong(TAKE_SCALE, "softmax_scale", ValueError, "must be finite", *as_written(math.nan, math.inf, -math.inf)),
    *wrong(
        TAKE_SCALE,
        "softmax_scale",
        ValueError,
        "must be finite in float32",
        *as_written(1e300, -1e39),
        (10**400, "an int of 1329 bits"),
    ),
    *wrong(TAKE_SOFTCAP, "softcap", TypeError, "must be a number", *NO_NUMBERS, (None, "None")),
    *wrong(TAKE_SOFTCAP, "softcap", ValueError, "must be in [0, inf)", *as_written(-1.0, -1, math.nan, math.inf)),
    *wrong(TAKE_SOFTCAP, "softcap", ValueError, "must be finite in float32", *as_written(1e39)),
    *wrong((*TAKE_SOFTCAP, *SDPA), "dropout_p", TypeError, "must be a number", *NO_NUMBERS, (None, "None")),
    *wrong(
        (*TAKE_SOFTCAP, *SDPA),
        "dropout_p",
        ValueError,
        "must be in [0, 1)",
        *as_written(1.0, 1, 1.5, -0.1, math.nan, math.inf),
    ),
]

WINDOW_ROWS = [
    row
    for functions, window in ((NATIVE, "window"), (FLASH_ATTN, "window_size"))
    for row in (
        *wrong(
            functions,
            window,
            TypeError,
            "must be None or a tuple (left, right)",
            *as_written(3, [1, 2], "11", False, torch.tensor([1, 2])),
        ),
        *wrong(functions, window, ValueError, "must be a tuple (left, right)", *as_written((), (1,), (1, 2, 3))),
        *wrong(
            functions,
            window,
            TypeError,
            "must hold integers or None",
            *as_written((1.0, 2), (1, math.nan), (True, 1), (1, "2"), (np.int64(1), 2)),
        ),
        *wrong(
            functions,
            window,
            ValueError,
            "must have sides of at least 0, or -1 or None for unbounded",
            *as_written((-2, 0), (0, -5), (None, -2)),
        ),
    )
]

FLAG_ROWS = [
    *wrong(TAKE_SCALE, "causal", TypeError, "must be a bool", *NO_BOOLS),
    *wrong(TAKE_SOFTCAP, "deterministic", TypeError, "must be a bool", *NO_BOOLS),
    *wrong(NATIVE, "return_lse", TypeError, "must be a bool", *NO_BOOLS),
    *wrong(FLASH_ATTN, "return_attn_probs", TypeError, "must be a bool", *NO_BOOLS),
    *wrong(SDPA, "is_causal", TypeError, "must be a bool", *NO_BOOLS),
    *wrong(SDPA, "enable_gqa", TypeError, "must be a bool", *NO_BOOLS),
]

SDPA_ROWS = [
    *(
        row
        for name in ("query", "key", "value")
        for row in (
            *wrong(SDPA, name, TypeError, TENSOR, *NO_TENSORS),
            *wrong(
                SDPA,
                name,
                ValueError,
                "must be (batch, heads, seqlen, head_dim)",
                (KEY[0], "(4, 5, 8)"),
                (KEY[None], "(1, 2, 4, 5, 8)"),
            ),
        )
    ),
    *wrong(
        SDPA,
        "key",
        ValueError,
        "must have the 4 heads of query unless enable_gqa=True",
        (tensor(2, 2, 5, 8), "2"),
        (tensor(2, 8, 5, 8), "8"),
    ),
    *wrong(SDPA, "attn_mask", ValueError, "must be None with is_causal=True", (tensor(3, 5), "both"), is_causal=True),
]

BACKEND_ROWS = wrong(
    NATIVE,
    "backend",
    ValueError,
    "must be 'auto', 'hopper', 'portable', 'reference'",
    *as_written("cudnn", "", "Reference", None, 0, True, ["auto"], b"auto"),
)


def refused_by(backend, *reasons, **changes):
    """A call that a named backend does not run. Where Triton is missing, that is one more reason."""
    described, *reasons = (re.escape(part) for part in reasons)
    lines = [rf"(\n  {backend}: triton is not installed)?", *(rf"\n  {backend}: {reason}" for reason in reasons)]
    message = re.compile(rf"no backend runs this call \(backend='{backend}': {described}\):{''.join(lines)}")
    return rows([attention], {"backend": backend} | changes, NotImplementedError, message, f"by-{backend}")


CALL = "batch 2, heads 4 / 2, seqlen 3 x 5, head dim 8 / 8"
EVERYTHING = {"softcap": 2.0, "alibi_slopes": tensor(4), "sink": tensor(4), "dropout_p": 0.5}
NEEDS_A_GPU = "runs on CUDA and ROCm GPUs, and the tensors are on cpu"
NEEDS_HOPPER = "runs on NVIDIA GPUs of compute capability 9.0, and the tensors are on cpu"

NO_BACKEND_ROWS = [
    *refused_by("portable", f"{CALL}, torch.float32 on cpu, causal, forward", NEEDS_A_GPU, causal=True),
    *refused_by(
        "portable",
        f"{CALL}, torch.float32 on cpu, alibi, sink, softcap 2, dropout_p 0.5, forward",
        NEEDS_A_GPU,
        **EVERYTHING,
    ),
    *refused_by(
        "portable",
        f"{CALL}, torch.float64 on cpu, forward",
        NEEDS_A_GPU,
        "computes in float16, bfloat16 and float32, and the tensors are torch.float64",
        q=Q.double(),
        k=K.double(),
        v=V.double(),
    ),
    *refused_by(
        "hopper",
        f"{CALL}, torch.float16 on cpu, window (1, 0), bias (1, 1, 1, 5) torch.float32 with gradient, "
        "forward and backward",
        NEEDS_HOPPER,
        q=Q.half(),
        k=K.half(),
        v=V.half(),
        window=(1, 0),
        bias=tensor(5).requires_grad_(),
    ),
    *refused_by(
        "hopper",
        "batch 2, heads 4 / 2, seqlen 3 x 5, head dim 8 / 6, torch.float32 on cpu, alibi, sink, softcap 2, "
        "dropout_p 0.5, forward",
        NEEDS_HOPPER,
        "computes in float16 and bfloat16, and the tensors are torch.float32",
        "takes head dims from 8 to 256 that are multiples of 8, and they are 8 and 6",
        "reads tiles whose rows start at multiples of 16 bytes, and in q, k, v or the bias some do not; "
        "contiguous tensors with a row length that is a multiple of 8 do",
        v=tensor(2, 5, 2, 6),
        **EVERYTHING,
    ),
]


# Packed sequences
STARTS = torch.tensor([0, 3, 5], dtype=torch.int32)
CUMULATED = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 3, "max_seqlen_k": 3}
PACKED = {"q": tensor(5, 4, 8), "k": tensor(5, 2, 8), "v": tensor(5, 2, 6), **CUMULATED}
VARLEN = (attention_varlen, flash_attn.flash_attn_varlen_func)
VARLEN_KV, VARLEN_QKV = (flash_attn.flash_attn_varlen_kvpacked_func,), (flash_attn.flash_attn_varlen_qkvpacked_func,)


def starts(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


VARLEN_ROWS = [
    *wrong(VARLEN, "q", ValueError, "must be (total_q, heads_q, head_dim)", (Q, "(2, 3, 4, 8)"), **PACKED),
    *wrong(VARLEN, "k", ValueError, "must be (total_k, heads_kv, head_dim=8)", (K, "(2, 5, 2, 8)"), **PACKED),
    *wrong(VARLEN, "k", ValueError, ON_CPU, (PACKED["k"].to("meta"), "meta"), **PACKED),
    *wrong(VARLEN, "bias", ValueError, ON_CPU, (tensor(3, device="meta"), "meta"), **PACKED),
    *wrong(VARLEN, "bias", TypeError, f"must be {FLOATS} or torch.bool", (STARTS, "torch.int32"), **PACKED),
    *wrong(
        VARLEN,
        "v",
        ValueError,
        "must be (total_k=5, heads_kv=2, head_dim_v)",
        (tensor(4, 2, 8), "(4, 2, 8)"),
        (tensor(5, 4, 8), "(5, 4, 8)"),
        **PACKED,
    ),
    *(
        row
        for axis in ("q", "k")
        for row in (
            *wrong(VARLEN, f"cu_seqlens_{axis}", TypeError, TENSOR, *NO_TENSORS, **PACKED),
            *wrong(
                VARLEN,
                f"cu_seqlens_{axis}",
                TypeError,
                "must be torch.int32",
                (STARTS.long(), "torch.int64"),
                (STARTS.float(), "torch.float32"),
                **PACKED,
            ),
            *wrong(
                VARLEN,
                f"cu_seqlens_{axis}",
                ValueError,
                DENSE,
                (STARTS.to_sparse(), "torch.sparse_coo"),
                (nested(3), "nested"),
                **PACKED,
            ),
            *wrong(VARLEN, f"cu_seqlens_{axis}", ValueError, ON_CPU, (STARTS.to("meta"), "meta"), **PACKED),
            *wrong(
                VARLEN,
                f"cu_seqlens_{axis}",
                ValueError,
                f"must rise from 0 to at most the 5 rows of {axis}",
                *((starts(*values), str(values)) for values in ([1, 3, 5], [0, 4, 3], [0, -1, 3], [0, 3, 6])),
                **PACKED,
            ),
            *wrong(
                VARLEN,
                f"max_seqlen_{axis}",
                TypeError,
                "must be an int",
                *as_written(None, 3.0, True, "3", torch.tensor(3)),
                **PACKED,
            ),
            *wrong(VARLEN, f"max_seqlen_{axis}", ValueError, "must not be negative", (-1, "-1"), **PACKED),
            *wrong(
                VARLEN,
                f"max_seqlen_{axis}",
                ValueError,
                "must be at least the length of every sequence, 3",
                (2, "2"),
                **PACKED,
            ),
        )
    ),
    *wrong(
        VARLEN,
        "cu_seqlens_q",
        ValueError,
        "must be (batch + 1,)",
        (starts(), "(0,)"),
        (STARTS[None], "(1, 3)"),
        (STARTS[0], "()"),
        **PACKED,
    ),
    *wrong(
        VARLEN,
        "cu_seqlens_k",
        ValueError,
        "must be (batch + 1 = 3,)",
        (starts(0, 5), "(2,)"),
        (STARTS[None], "(1, 3)"),
        **PACKED,
    ),
    *wrong(
        VARLEN,
        "bias",
        ValueError,
        "must be broadcastable to (batch=2, heads_q=4, max_seqlen_q=3, max_seqlen_k=3)",
        (tensor(4, 5, 5), "(1, 4, 5, 5)"),
        (tensor(3, 1, 1, 3), "(3, 1, 1, 3)"),
        **PACKED,
    ),
    *wrong(
        VARLEN,
        "alibi_slopes",
        ValueError,
        "must be (batch=2, heads_q=4)",
        (tensor(5, 4), "(5, 4)"),
        **PACKED,
    ),
    *wrong(
        VARLEN_KV,
        "kv",
        ValueError,
        "must be (total_k, 2, heads, head_dim)",
        (PACKED["k"], "(5, 2, 8)"),
        **CUMULATED,
        q=PACKED["q"],
    ),
    *wrong(
        VARLEN_QKV,
        "qkv",
        ValueError,
        "must be (total, 3, heads, head_dim)",
        (tensor(5, 2, 4, 8), "(5, 2, 4, 8)"),
        cu_seqlens=STARTS,
        max_seqlen=3,
    ),
    *rows(
        [flash_attn.flash_attn_varlen_func],
        PACKED | {"block_table": starts(0)},
        NotImplementedError,
        "block_table is not there yet: give flash_attn_varlen_func k and v as contiguous rows, without pages",
        "block_table",
    ),
    *rows(
        [attention_varlen],
        PACKED | {"backend": "portable", "causal": True},
        NotImplementedError,
        re.compile(
            r"no backend runs this call \(backend='portable': batch 2, heads 4 / 2, seqlen up to 3 x 3, head dim 8 / "
            r"6, torch.float32 on cpu, causal, forward\):(\n  portable: triton is not installed)?"
            rf"\n  portable: {NEEDS_A_GPU}"
        ),
        "by-portable",
    ),
]


def not_there_yet(function, advice, **arguments):
    return rows([function], arguments, NotImplementedError, f"{function.__name__} is not there yet: {advice}", "call")


NOT_THERE_YET_ROWS = [
    *not_there_yet(
        flash_attn.flash_attn_with_kvcache,
        "give flash_attn_func the filled part of the cache, k_cache[:, :seqlen] and v_cache[:, :seqlen], and for "
        "lengths that differ a bool bias (batch, 1, 1, seqlen_k)",
        k_cache=K,
        v_cache=V,
        cache_seqlens=3,
    ),
]

TABLE = [
    *Q_ROWS,
    *K_AND_V_ROWS,
    *PACKED_ROWS,
    *BIAS_ROWS,
    *SLOPES_AND_SINK_ROWS,
    *SDPA_DENSE_ROWS,
    *NUMBER_ROWS,
    *WINDOW_ROWS,
    *FLAG_ROWS,
    *SDPA_ROWS,
    *BACKEND_ROWS,
    *NO_BACKEND_ROWS,
    *VARLEN_ROWS,
    *NOT_THERE_YET_ROWS,
]


@pytest.fixture
def launches(monkeypatch):
    """What has computed attention since the test began: a backend's name, "operator" or "reference"."""
    seen = []

    def counted(name, function):
        def run(*arguments):
            seen.append(name)
            return function(*arguments)

        return run

    backends = tuple(backend._replace(run=counted(backend.name, backend.run)) for backend in dispatch.BACKENDS)
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
    monkeypatch.setattr(ops, "attention", counted("operator", ops.attention))
    monkeypatch.setattr(reference, "attention", counted("reference", reference.attention))
    return seen


def refuse(row):
    with pytest.raises(row.error) as caught:
        row.function(**row.arguments)
    assert type(caught.value) is row.error
    message = str(caught.value)
    if isinstance(row.message, str):
        assert message == row.message
    else:
        assert row.message.fullmatch(message), message


def contents(arguments):
    """The shape, strides and bytes of every dense tensor on the CPU."""
    return {
        name: (value.shape, value.stride(), value.detach().flatten().view(torch.uint8).tolist())
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and is_dense(value)
    }


def is_dense(value):
    return value.layout == torch.strided and not value.is_nested and not value.is_quantized


def settings():
    """What a call could leave changed in the process."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_is_refused(row, launches):
    before, settings_before = contents(row.arguments), settings()
    refuse(row)
    assert not launches
    assert contents(row.arguments) == before
    assert settings() == settings_before


def public_functions():
    for module in (flash_attn, flash_attn_triton, sdpa):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith(("flash_attn", "scaled_dot_product")):
                yield function
    for name in triton_attention.__all__:
        if name != "__version__":
            yield getattr(triton_attention, name)


def test_every_public_function_has_rows():
    assert {row.function for row in TABLE} == set(public_functions())


def test_a_launch_is_counted(launches):
    attention(Q, K, V)
    assert launches == ["reference"]
    attention(Q, K[:, :0], V[:, :0])  # nothing to launch, and still no refusal
    assert launches == ["reference"] * 2


RIGHT_CALLS = [
    *((function, right(function)) for function in (*TAKE_SCALE, *SDPA)),
    *((function, right(function, dropout_p=0.5, softcap=2.0, alibi_slopes=tensor(4))) for function in TAKE_SOFTCAP),
    *((function, right(function, bias=tensor(4, 1, 5), causal=True, softmax_scale=0.5)) for function in TAKE_SCALE),
    *((function, PACKED | {"causal": True, "bias": tensor(4, 3, 3)}) for function in VARLEN),
]


def is_differentiable(name):
    return name != "alibi_slopes" and not name.startswith("cu_seqlens")


def right_results():
    """What the right calls return, and the gradients of what they are given."""
    torch.manual_seed(1)
    results = []
    for function, arguments in RIGHT_CALLS:
        arguments = {
            name: value.clone().requires_grad_(is_differentiable(name)) if torch.is_tensor(value) else value
            for name, value in arguments.items()
        }
        result = function(**arguments)
        if function is explain:
            results.append(str(result))
            continue
        leaves = [value for value in arguments.values() if torch.is_tensor(value) and value.requires_grad]
        gradients = torch.autograd.grad(result.square().sum(), leaves)
        results.append([value.tolist() for value in (result, *gradients)])
    return results


def test_right_calls_are_as_right_afterwards():
    before = right_results()
    for row in TABLE:
        refuse(row)
    assert right_results() == before


def test_wrong_calls_are_refused_in_the_same_words_in_any_order():
    for row in reversed(TABLE):
        refuse(row)
    for row in TABLE:
        refuse(row)


def test_a_graph_survives_wrong_calls_of_its_leaves():
    leaves = {name: RIGHT[name].clone().requires_grad_() for name in ("q", "k", "v")}
    expected = torch.autograd.grad(attention(**leaves).square().sum(), leaves.values())
    out = attention(**leaves)
    for row in (*NUMBER_ROWS, *WINDOW_ROWS):
        if row.function in NATIVE:
            refuse(row._replace(arguments=row.arguments | leaves))
    gradients = torch.autograd.grad(out.square().sum(), leaves.values())
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8])
def test_a_mask_of_whole_numbers_that_requires_grad_is_refused_by_pytorch(dtype):
    """So that no call can have one; without it an integer mask is a row of the table."""
    mask = torch.ones(3, 5, dtype=dtype)
    with pytest.raises(RuntimeError, match="floating point"):
        mask.requires_grad_()
    assert not mask.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_wrong_call_leaves_the_mode_of_its_caller(mode):
    with mode():
        before = settings()
        for row in SLOPES_AND_SINK_ROWS:
            if "require grad" not in row.message:  # here nothing does
                refuse(row)
        assert settings() == before
