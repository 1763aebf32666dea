"""Which operators does PyTorch see? Opaque ones: `torch.compile` and autograd know their shapes and gradients only.

There is one operator a pass, the same for every Triton backend; the launchers that load Triton are imported when one
runs. Outputs that are absent are empty tensors, so that the schemas have a fixed arity.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from triton_attention.philox import draw_seed
from triton_attention.problem import Extras, Inputs, Mask, Packing, Problem

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? alibi_slopes, Tensor? sink, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? seed"
)
_NUMBERS = (
    "SymInt? max_seqlen_q, SymInt? max_seqlen_k, float softmax_scale, float softcap, float dropout_p, int? left, "
    "int? right, bool top_left, bool deterministic, str backend"
)


class _Call(NamedTuple):
    """The arguments that both operators take, in the order of their schemas."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sink: Tensor | None
    cu_seqlens_q: Tensor | None  # sequences are packed if these are there
    cu_seqlens_k: Tensor | None
    seed: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    softmax_scale: float
    softcap: float
    dropout_p: float
    left: int | None
    right: int | None
    top_left: bool
    deterministic: bool  # gradients are the same bit for bit in every run
    backend: str

    @property
    def mask(self) -> Mask:
        return Mask(self.left, self.right, self.top_left)

    @property
    def extras(self) -> Extras:
        packing: Any = (self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k)
        packing = None if self.cu_seqlens_q is None else Packing._make(packing)
        return Extras(self.softcap, self.alibi_slopes, self.sink, self.dropout_p, self.seed, packing)


_NUM_TENSORS = _Call._fields.index("max_seqlen_q")

torch.library.define(
    "triton_attention::attention_fwd",
    f"({_TENSORS}, {_NUMBERS}) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "triton_attention::attention_bwd",
    f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool needs_dbias, {_TENSORS}, {_NUMBERS}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)",
)


def attention(inputs: Inputs, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) by a Triton backend, differentiable in q, k, v, the bias and the sink."""
    for tensor in inputs:  # the operator would drop a tangent in silence: its results would be constants
        if tensor is not None and unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "attention has no forward-mode derivative on the Triton backends; backend='reference' has one"
            )
    seed = draw_seed(inputs.q.device) if problem.dropout_p > 0.0 else None
    lengths = (problem.seqlen_q, problem.seqlen_k) if problem.varlen else (None, None)
    numbers = (problem.softmax_scale, problem.softcap, problem.dropout_p, *problem.mask, problem.deterministic)
    result: tuple[Tensor, Tensor] = torch.ops.triton_attention.attention_fwd(*inputs, seed, *lengths, *numbers, backend)
    return result


_STAND_IN = {"hopper": "portable"}  # which backend runs what another's launcher leaves: see what it returns None for


def _launcher(backend: str) -> ModuleType:
    return import_module(f"triton_attention.{backend}.launch")


@torch.library.impl("triton_attention::attention_fwd", ("cpu", "cuda"))
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = _Call(*arguments)
    plain = (call.q, call.k, call.v, call.bias, call.mask, call.softmax_scale, call.extras)
    result: tuple[Tensor, Tensor] | None = _launcher(call.backend).forward(*plain)
    if result is None:
        result = _launcher(_STAND_IN[call.backend]).forward(*plain)
        assert result is not None  # the stand-in runs everything
    return result


def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, v = _Call(*arguments).q, _Call(*arguments).v
    *batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(*batch, seqlen_q, heads, v.shape[-1]), q.new_empty(*batch, heads, seqlen_q, dtype=torch.float32)


@torch.library.impl("triton_attention::attention_bwd", ("cpu", "cuda"))
def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs_dbias: bool, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Call(*arguments)
    q, k, v, bias = call[:4]
    deterministic = call.deterministic or _must_be_deterministic()
    numbers = (call.mask, call.softmax_scale, needs_dbias, call.extras, deterministic)
    result = _launcher(call.backend).backward(dout, dlse, q, k, v, bias, out, lse, *numbers)
    if result is None:
        result = _launcher(_STAND_IN[call.backend]).backward(dout, dlse, q, k, v, bias, out, lse, *numbers)
    dq, dk, dv, dbias, dsink = result
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias, q.new_empty(0) if dsink is None else dsink


def _must_be_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs_dbias: bool, *arguments: Any
) -> tuple[Tensor, ...]:
    call = _Call(*arguments)
    wanted = (call.q, call.k, call.v, call.bias if needs_dbias else None, call.sink)
    return tuple(
        call.q.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output)  # but for the bias nothing that grows with seqlen^2
    ctx.numbers = inputs[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)  # most calls use `out` alone: then there is no dlse to add


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    call = _Call(*tensors, *ctx.numbers)
    if dout is None:
        dout = torch.zeros_like(out)
    needs_dbias = call.bias is not None and ctx.needs_input_grad[call._fields.index("bias")]
    dq, dk, dv, dbias, dsink = torch.ops.triton_attention.attention_bwd(dout, dlse, out, lse, needs_dbias, *call)
    gradients = {"q": dq, "k": dk, "v": dv, "bias": dbias if needs_dbias else None, "sink": dsink}
    return tuple(gradients.get(name) if argument is not None else None for name, argument in call._asdict().items())


def _refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "attention can be differentiated once on the Triton backends; backend='reference' has higher derivatives"
    )


torch.library.register_fake("triton_attention::attention_fwd", _forward_fake)
torch.library.register_fake("triton_attention::attention_bwd", _backward_fake)
torch.library.register_autograd("triton_attention::attention_fwd", _differentiate, setup_context=_save_for_backward)
torch.library.register_autograd("triton_attention::attention_bwd", _refuse_second_derivative)
