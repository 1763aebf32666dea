"""Which implementations are measured, and how is each called?

A provider is a function (q, k, v, bias) -> out for each case, the layout it prefers, and the reasons for which it does
not run a case. To measure another implementation, subclass `Provider` and put an instance into `PROVIDERS`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import Case, Inputs, random_inputs

AttentionFunction = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


class Prepared(NamedTuple):
    """A pass of a case, ready to be timed: only `run` is timed; `results` returns what it computes by name (out, or
    dq, dk, dv and, where asked for, dbias), in the layout of `Inputs`."""

    run: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]


class Provider:
    """Base of the providers: everything but the call itself."""

    name: str
    heads_first = (
        False  # True: the provider gets (batch, heads, seqlen, head_dim), else (batch, seqlen, heads, head_dim)
    )

    def version(self) -> str:
        """Version of the package that computes."""
        raise NotImplementedError

    def why_not(self, case: Case, pass_name: str, device: torch.device) -> str | None:
        """Why this provider does not run this pass of this case, or None if it does."""
        raise NotImplementedError

    def function(self, case: Case, device: torch.device) -> AttentionFunction:
        """The attention function of a case, in the provider's layout."""
        raise NotImplementedError

    def prepare(self, case: Case, pass_name: str, inputs: Inputs) -> Prepared:
        """Everything that is not to be timed: the layout, the compilation, and for a backward pass the forward pass."""
        function = self.function(case, inputs.q.device)
        q, k, v = (self._layout(tensor).detach().requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v))
        bias = None if inputs.bias is None else inputs.bias.detach().requires_grad_(pass_name == "bwd_db")
        out = function(q, k, v, bias)
        if pass_name == "fwd":
            return Prepared(lambda: function(q, k, v, bias), lambda: {"out": self._layout(out.detach())})

        wanted = {"dq": q, "dk": k, "dv": v}
        if bias is not None and bias.requires_grad:
            wanted["dbias"] = bias
        grad_out = self._layout(inputs.grad_out)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, tuple(wanted.values()), grad_out, retain_graph=True)

        def gradients() -> dict[str, Tensor]:
            named = dict(zip(wanted, backward(), strict=True))
            return {name: grad if name == "dbias" else self._layout(grad) for name, grad in named.items()}

        return Prepared(backward, gradients)

    def _layout(self, tensor: Tensor) -> Tensor:
        """From the layout of `Inputs` to the provider's, or back: exchanging two axes is its own inverse."""
        return tensor.transpose(1, 2).contiguous() if self.heads_first else tensor


class Ours(Provider):
    """triton_attention.attention, with whichever backend it chooses."""

    name = "ours"

    def version(self) -> str:
        return str(importlib.import_module("triton_attention").__version__)

    def why_not(self, case: Case, pass_name: str, device: torch.device) -> str | None:
        return _not_installed("triton_attention", "attention")

    def function(self, case: Case, device: torch.device) -> AttentionFunction:
        attention = importlib.import_module("triton_attention").attention
        return lambda q, k, v, bias: attention(q, k, v, bias=bias, causal=case.causal)


class Sdpa(Provider):
    """torch.nn.functional.scaled_dot_product_attention, held to one of its backends."""

    heads_first = True

    def __init__(self, name: str, backend: SDPBackend) -> None:
        self.name = name
        self.backend = backend

    def version(self) -> str:
        if self.backend == SDPBackend.CUDNN_ATTENTION:
            return f"{torch.__version__} cuDNN {torch.backends.cudnn.version()}"
        return torch.__version__

    def why_not(self, case: Case, pass_name: str, device: torch.device) -> str | None:
        if self.backend == SDPBackend.MATH:
            scores = case.batch * case.heads_q * case.seqlen_q * case.seqlen_k
            return f"it would store {scores:,} scores, and is asked for at most {2**28:,}" if scores > 2**28 else None
        if device.type != "cuda":
            return "runs on CUDA devices only"
        if self.backend == SDPBackend.CUDNN_ATTENTION and pass_name == "bwd_db":
            return "gives no gradient for a bias"
        return self.refusal(case._replace(batch=1), pass_name, device)

    def refusal(self, case: Case, pass_name: str, device: torch.device) -> str | None:
        """What PyTorch itself answers: the backends do not publish what they take, the call warns about each reason."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.prepare(case, pass_name, random_inputs(case, device))
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                reasons = [str(warning.message).split(" (Triggered internally")[0] for warning in caught]
                return "; ".join(dict.fromkeys(reasons)) or str(error)
        return None

    def function(self, case: Case, device: torch.device) -> AttentionFunction:
        shape = (case.batch, case.heads_q, case.seqlen_q, case.seqlen_k)
        both = case.causal and case.bias != "none"
        future = torch.ones(shape[2:], dtype=torch.bool, device=device).triu(1) if both else None
        gqa = case.heads_q != case.heads_kv

        def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            mask = None if bias is None else bias.expand(shape)
            if mask is not None and future is not None:  # PyTorch takes either is_causal or a mask
                mask = mask.masked_fill(future, float("-inf"))
            with sdpa_kernel(self.backend):
                return scaled_dot_product_attention(
                    q, k, v, mask, is_causal=case.causal and mask is None, enable_gqa=gqa
                )

        return attention


class Flex(Provider):
    """torch.nn.attention.flex_attention, compiled for each case; the bias is a tensor that its score_mod captures."""

    name = "flex"
    heads_first = True

    def version(self) -> str:
        return torch.__version__

    def why_not(self, case: Case, pass_name: str, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "its backward pass runs on CUDA devices only"

    def function(self, case: Case, device: torch.device) -> AttentionFunction:
        import torch._functorch.config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch.compiler.reset()  # else the cases before would count towards Dynamo's limit of recompilations
        torch._functorch.config.donated_buffer = False  # the backward pass runs many times on one kept graph
        compiled = torch.compile(flex_attention, dynamic=False)
        block_mask = None
        if case.causal:
            block_mask = create_block_mask(_not_later, None, None, case.seqlen_q, case.seqlen_k, device=str(device))

        def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            out: Tensor = compiled(
                q,
                k,
                v,
                score_mod=None if bias is None else _add_bias(bias, case.bias),
                block_mask=block_mask,
                enable_gqa=case.heads_q != case.heads_kv,
            )
            return out

        return attention


def _not_later(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _add_bias(bias: Tensor, pattern: str) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """score + bias[batch, head, query, key] as a score_mod, without the axes along which the bias has size 1."""
    axes = [axis for axis, letter in enumerate(pattern) if letter != "1"]
    table = bias.reshape([bias.shape[axis] for axis in axes])

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = (batch, head, query, key)
        return score + table[tuple(position[axis] for axis in axes)]

    return score_mod


class FlashAttention(Provider):
    """A generation of the flash_attn packages: same function, other module."""

    def __init__(self, name: str, package: str, only_capability: int | None = None) -> None:
        self.name = name  # the module as well
        self.package = package
        self.only_capability = only_capability  # major compute capability that the kernels are written for

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:  # built from source under another name
            return "unknown"

    def why_not(self, case: Case, pass_name: str, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "runs on CUDA devices only"
        if self.only_capability is not None and torch.cuda.get_device_capability(device)[0] != self.only_capability:
            return f"runs on compute capability {self.only_capability} only"
        if case.bias != "none":
            return "takes no bias tensor"
        if case.dtype == "float32":
            return "takes no float32"
        return _not_installed(self.name, "flash_attn_func")

    def function(self, case: Case, device: torch.device) -> AttentionFunction:
        flash_attn_func = importlib.import_module(self.name).flash_attn_func

        def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            result = flash_attn_func(q, k, v, causal=case.causal)
            out: Tensor = result[0] if isinstance(result, tuple) else result  # some releases return the lse as well
            return out

        return attention


def _not_installed(module: str, attribute: str) -> str | None:
    """A module that is there but does not load is no refusal: its ImportError passes through."""
    try:
        found = hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # it is there and lacks a module that it needs
            raise
        return f"{module} is not installed"
    return None if found else f"{module} is installed without {attribute}"


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Ours(),
        Sdpa("sdpa_flash", SDPBackend.FLASH_ATTENTION),
        Sdpa("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
        Sdpa("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION),
        Sdpa("sdpa_math", SDPBackend.MATH),
        Flex(),
        FlashAttention("flash_attn", "flash-attn"),
        FlashAttention("flash_attn_interface", "flash-attn-3", only_capability=9),
        FlashAttention("flash_attn.cute", "flash-attn-4"),
    )
}
