"""Which operators does PyTorch see? Opaque ones: `torch.compile` and autograd know their shapes and gradients only.

There is one operator a pass, the same for every Triton backend; the launchers that load Triton are imported when one
runs. Outputs that are absent are empty tensors, so that the schemas have a fixed arity.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from triton_attention.problem import Extras, Inputs, Mask, Problem

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi_slopes, Tensor? sink"  # the fields of Inputs
_NUM_TENSORS = len(Inputs._fields)
_CALL = "float softmax_scale, float softcap, int? left, int? right, bool top_left, str backend"

torch.library.define(
    "triton_attention::attention_fwd",
    f"({_TENSORS}, {_CALL}) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "triton_attention::attention_bwd",
    f"(Tensor dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, bool needs_dbias, {_CALL}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)",
)


def attention(inputs: Inputs, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) by a Triton backend, differentiable in q, k, v, the bias and the sink."""
    for tensor in inputs:  # the operator would drop a tangent in silence: its results would be constants
        if tensor is not None and unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "attention has no forward-mode derivative on the Triton backends; backend='reference' has one"
            )
    mask = problem.mask
    result: tuple[Tensor, Tensor] = torch.ops.triton_attention.attention_fwd(
        *inputs, problem.softmax_scale, problem.softcap, *mask, backend
    )
    return result


_STAND_IN = {"hopper": "portable"}  # which backend runs what another one leaves: its backward pass, and odd layouts
_RUN_EXTRAS = ("portable",)  # whose launchers take extras as their last argument, and return dsink as theirs


def _launcher(backend: str) -> ModuleType:
    return import_module(f"triton_attention.{backend}.launch")


@torch.library.impl("triton_attention::attention_fwd", ("cpu", "cuda"))
def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, alibi_slopes: Tensor | None, sink: Tensor | None,
    softmax_scale: float, softcap: float, left: int | None, right: int | None, top_left: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = (q, k, v, bias, Mask(left, right, top_left), softmax_scale)
    if backend in _RUN_EXTRAS:
        return _launcher(backend).forward(*call, Extras(softcap, alibi_slopes, sink))  # type: ignore[no-any-return]
    result: tuple[Tensor, Tensor] | None = _launcher(backend).forward(*call)
    if result is None:
        return _launcher(_STAND_IN[backend]).forward(*call)  # type: ignore[no-any-return]
    return result


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(batch, seqlen_q, heads, v.shape[3]), q.new_empty(batch, heads, seqlen_q, dtype=torch.float32)


@torch.library.impl("triton_attention::attention_bwd", ("cpu", "cuda"))
def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    alibi_slopes: Tensor | None, sink: Tensor | None, out: Tensor, lse: Tensor, needs_dbias: bool,
    softmax_scale: float, softcap: float, left: int | None, right: int | None, top_left: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mask = Mask(left, right, top_left)
    dq, dk, dv, dbias, dsink = _launcher(_STAND_IN.get(backend, backend)).backward(
        dout, dlse, q, k, v, bias, out, lse, mask, softmax_scale, needs_dbias, Extras(softcap, alibi_slopes, sink)
    )
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias, q.new_empty(0) if dsink is None else dsink


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    alibi_slopes: Tensor | None, sink: Tensor | None, out: Tensor, lse: Tensor, needs_dbias: bool, *call: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    wanted = (q, k, v, bias if needs_dbias else None, sink)
    return tuple(q.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output)  # nothing that grows with seqlen^2 but the bias
    ctx.call = inputs[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)  # most calls use `out` alone: then there is no dlse to add


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    bias, _alibi_slopes, sink = tensors[3:]
    if dout is None:
        dout = torch.zeros_like(out)
    needs_dbias = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, dbias, dsink = torch.ops.triton_attention.attention_bwd(
        dout, dlse, *tensors, out, lse, needs_dbias, *ctx.call
    )
    dbias, dsink = dbias if needs_dbias else None, None if sink is None else dsink
    return dq, dk, dv, dbias, None, dsink, *(None for _ in ctx.call)


def _refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "attention can be differentiated once on the Triton backends; backend='reference' has higher derivatives"
    )


torch.library.register_fake("triton_attention::attention_fwd", _forward_fake)
torch.library.register_fake("triton_attention::attention_bwd", _backward_fake)
torch.library.register_autograd("triton_attention::attention_fwd", _differentiate, setup_context=_save_for_backward)
torch.library.register_autograd("triton_attention::attention_bwd", _refuse_second_derivative)
