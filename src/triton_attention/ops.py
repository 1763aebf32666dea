"""Which operators does PyTorch see? Opaque ones: `torch.compile` and autograd know their shapes and gradients only.

There is one operator a pass, the same for every Triton backend; the launchers that load Triton are imported when one
runs. Outputs that are absent are empty tensors, so that the schemas have a fixed arity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from triton_attention import eager
from triton_attention.philox import draw_seed
from triton_attention.problem import NO_EXTRAS, Extras, Inputs, Mask, Packing, Problem

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
    result: tuple[Tensor, Tensor]
    result = torch.ops.triton_attention.attention_fwd(*inputs, seed, *_numbers(problem), backend)
    return result


def bind(problem: Problem, backend: str) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """`attention` of a problem as a function of tensors that have one layout, in plain eager calls.

    It goes by the operators: nobody would see them, and the way through PyTorch's dispatcher and back to Python takes
    longer than anything else in a call.
    """
    layout, numbers = object(), (*_numbers(problem), backend)
    plain = (problem.mask, problem.softmax_scale, NO_EXTRAS, backend, layout)

    def run(inputs: Inputs) -> tuple[Tensor, Tensor]:
        seed = draw_seed(problem.device) if problem.dropout_p > 0.0 else None
        call = _Call(*inputs, seed, *numbers)
        if not problem.needs_grad:
            return _run(call, layout)
        differentiable = (call.q, call.k, call.v, call.bias, call.sink)
        result: tuple[Tensor, Tensor] = _apply(*differentiable, call, layout)
        return result

    def run_plain(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return _run_forward(inputs.q, inputs.k, inputs.v, inputs.bias, *plain)

    has_extras = problem.softcap or problem.alibi or problem.sink or problem.dropout_p or problem.varlen
    return run if has_extras or problem.needs_grad else run_plain


def _numbers(problem: Problem) -> tuple[Any, ...]:
    """What the operators take after tensors and before the backend."""
    lengths = (problem.seqlen_q, problem.seqlen_k) if problem.varlen else (None, None)
    return *lengths, problem.softmax_scale, problem.softcap, problem.dropout_p, *problem.mask, problem.deterministic


_STAND_IN = {"hopper": "portable"}  # which backend runs what another's launcher leaves: see what it returns None for
_REMEMBER = ("hopper",)  # whose launchers take what stands for the layout of a call


@cache
def _launcher(backend: str) -> ModuleType:
    return import_module(f"triton_attention.{backend}.launch")


@torch.library.impl("triton_attention::attention_fwd", ("cpu", "cuda"))
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _run(_Call(*arguments), None)


def _run(call: _Call, layout: object) -> tuple[Tensor, Tensor]:
    plain = (call.q, call.k, call.v, call.bias, call.mask, call.softmax_scale)
    return _run_forward(*plain, call.extras, call.backend, layout)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Mask, softmax_scale: float, extras: Extras,
    backend: str, layout: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`layout` stands for everything but addresses and data of the call; None: it is not known."""
    call = (q, k, v, bias, mask, softmax_scale, extras)
    forward = _launcher(backend).forward
    result: tuple[Tensor, Tensor] | None
    result = forward(*call) if layout is None or backend not in _REMEMBER else forward(*call, known=layout)
    if result is None:
        result = _launcher(_STAND_IN[backend]).forward(*call)
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
    q = arguments[0]
    gradients = _run_backward(dout, dlse, out, lse, needs_dbias, _Call(*arguments), None)
    dq, dk, dv, dbias, dsink = (q.new_empty(0) if x is None else x for x in gradients)
    return dq, dk, dv, dbias, dsink


def _run_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, needs_dbias: bool, call: _Call, layout: object
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    q, k, v, bias, *_ = call
    deterministic = call.deterministic or _must_be_deterministic()
    numbers = (call.mask, call.softmax_scale, needs_dbias, call.extras, deterministic)
    given = (dout, dlse, q, k, v, bias, out, lse, *numbers)
    backward = _launcher(call.backend).backward
    result: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None] | None
    result = backward(*given) if layout is None or call.backend not in _REMEMBER else backward(*given, known=layout)
    if result is None:
        result = _launcher(_STAND_IN[call.backend]).backward(*given)
        assert result is not None  # the stand-in runs everything
    return result


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


def _gradients(ctx: Any, layout: object, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those of q, k, v, the bias and the sink. `layout` stands for that of the forward call, if it was a plain one."""
    saved = ctx.saved_tensors  # once: activation checkpointing computes them
    *tensors, out, lse = saved
    call = _Call(*tensors, *ctx.numbers)
    if dout is None:
        dout = torch.zeros_like(out)
    needs_dbias = call.bias is not None and ctx.needs_input_grad[_Call._fields.index("bias")]
    given = (dout, dlse, out, lse, needs_dbias)
    known = None if layout is None else eager.key((dout, dlse, *saved), (layout,))  # hooks may change what was saved
    # A derivative of the derivative is asked for where gradients are recorded: the operator refuses it.
    if known is not None and not torch.is_grad_enabled():
        dq, dk, dv, dbias, dsink = _run_backward(*given, call, known)
    else:
        dq, dk, dv, dbias, dsink = torch.ops.triton_attention.attention_bwd(*given, *call)
    return dq, dk, dv, dbias if needs_dbias else None, None if call.sink is None else dsink


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _gradients(ctx, None, *gradients)
    of = dict(zip(("q", "k", "v", "bias", "sink"), gradients, strict=True))
    return tuple(of.get(name) for name in _Call._fields)


class _Attention(torch.autograd.Function):
    """What `register_autograd` makes of the operators, for plain eager calls: q, k, v, bias and sink, the whole call,
    and what stands for its layout."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *_, call, layout = arguments
        output = _run(call, layout)
        _save_for_backward(ctx, call, output)
        ctx.layout = layout
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, ctx.layout, *gradients), None, None


# Without what `Function.apply` asks about functorch first: no plain call comes from there.
_apply: Any = super(torch.autograd.Function, _Attention).apply


def _refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "attention can be differentiated once on the Triton backends; backend='reference' has higher derivatives"
    )


torch.library.register_fake("triton_attention::attention_fwd", _forward_fake)
torch.library.register_fake("triton_attention::attention_bwd", _backward_fake)
torch.library.register_autograd("triton_attention::attention_fwd", _differentiate, setup_context=_save_for_backward)
torch.library.register_autograd("triton_attention::attention_bwd", _refuse_second_derivative)
