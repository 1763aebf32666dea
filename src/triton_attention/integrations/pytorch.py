"""How does plain `torch.nn.functional.scaled_dot_product_attention` come to run on this package?

    from triton_attention.integrations import pytorch

    pytorch.register()
    torch.nn.attention.activate_flash_attention_impl("triton_attention")
    ...
    torch.nn.attention.restore_flash_attention_impl()

PyTorch keeps a registry of what its backend FLASH_ATTENTION runs (2.11 does). It decides as ever which calls go there:
those on a GPU in float16 or bfloat16, of one head dim, without a mask or causal with as many keys as queries; in
`torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION)` there is no other choice. Calls with a mask or a bias never
come here: `triton_attention.compat.sdpa` takes those. Nested tensors stay with PyTorch's own kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from triton_attention import (
    dispatch,
    ops,  # noqa: F401  (it defines torch.ops.triton_attention)
)
from triton_attention.problem import Inputs, Mask, Problem

NAME = "triton_attention"


class Handle:
    """Keeps the kernels in PyTorch's dispatcher, until `remove`."""

    def __init__(self, library: Library) -> None:
        self._library: Library | None = library

    def remove(self) -> None:
        """Give PyTorch its own kernels back."""
        self._library = None  # the dispatcher forgets what a library registered when the library dies


def register() -> None:
    """Make "triton_attention" known to `torch.nn.attention.activate_flash_attention_impl`.

    Raises:
        NotImplementedError: this PyTorch has no such registry.
    """
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise NotImplementedError(
            f"torch must have torch.nn.attention.register_flash_attention_impl, got {torch.__version__}; "
            "triton_attention.compat.sdpa.scaled_dot_product_attention needs no registry"
        )
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=activate)


def activate(device: str = "CUDA") -> Handle:
    """Put the kernels into PyTorch's dispatcher for a kind of device; PyTorch calls this when a user activates them."""
    library = Library("aten", "IMPL", device)
    library.impl("_scaled_dot_product_flash_attention", flash_attention_forward, device)
    library.impl("_scaled_dot_product_flash_attention_backward", flash_attention_backward, device)
    return Handle(library)


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor]:
    """`aten::_scaled_dot_product_flash_attention`: out = softmax(scale * query key^T) value, and lse.

    Args:
        query: (batch, heads, seqlen_q, head_dim); key and value likewise.
        key: see `query`.
        value: see `query`.
        dropout_p: must be 0.0.
        is_causal: key j is visible to query i iff j <= i.
        return_debug_mask: must be False.
        scale: None = 1 / sqrt(head_dim).

    Returns:
        out, laid out as `query`; lse (batch, heads, seqlen_q) float32; what the operator's schema wants beside them: no
        cumulative lengths, both lengths, and three tensors that only dropout would fill.

    Raises:
        NotImplementedError: dropout is asked for, or no backend runs this.
    """
    if dropout_p != 0.0 or return_debug_mask:
        raise NotImplementedError(
            "dropout_p must be 0.0 and return_debug_mask False in "
            f"activate_flash_attention_impl({NAME!r}), got {dropout_p} and {return_debug_mask}"
        )
    inputs, problem = _described(query, key, value, is_causal, scale)
    out, lse = dispatch.select(problem).run(inputs, problem)
    out = _laid_out_as(query, out.transpose(1, 2))
    seed = query.new_zeros(2, dtype=torch.uint64)
    offset = query.new_zeros((), dtype=torch.uint64)
    return out, lse, None, None, query.shape[2], key.shape[2], seed, offset, query.new_empty(0)


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten::_scaled_dot_product_flash_attention_backward`: the gradients of query, key and value.

    Tensors are as in `flash_attention_forward`; the arguments between `logsumexp` and `is_causal` say nothing here.
    """
    inputs, problem = _described(query, key, value, is_causal, scale)
    operator = torch.ops.triton_attention.attention_bwd.default
    call = {
        **problem._asdict(),
        **problem.mask._asdict(),
        **inputs._asdict(),
        "dout": grad_out.transpose(1, 2),
        "out": out.transpose(1, 2),
        "lse": logsumexp,
        "needs_dbias": False,
        "backend": dispatch.select(problem).name,
    }
    # What else the operator takes is None: SDPA's call has no gradient of the log-sum-exp, for instance.
    dq, dk, dv, *_ = operator(**{argument.name: call.get(argument.name) for argument in operator._schema.arguments})
    return (
        _laid_out_as(query, dq.transpose(1, 2)),
        _laid_out_as(key, dk.transpose(1, 2)),
        _laid_out_as(value, dv.transpose(1, 2)),
    )


def _laid_out_as(model: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the strides that `empty_like` gives to the model's: PyTorch promises them its compiler."""
    expected = torch.empty_like(model)
    return tensor if tensor.stride() == expected.stride() else expected.copy_(tensor)


def _described(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None
) -> tuple[Inputs, Problem]:
    """The call as backends take it."""
    inputs = Inputs(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
    problem = Problem.from_tensors(
        inputs,
        mask=Mask(right=0 if is_causal else None, top_left=True),
        softmax_scale=scale,
        softcap=0.0,
        dropout_p=0.0,
        deterministic=False,  # the operator asks PyTorch itself
    )
    return inputs, problem
