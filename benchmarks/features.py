"""What does each feature cost beside the plain kernel, and beside others that have it?

Softcap, ALiBi, sink, dropout, window and packed sequences, each in one run with the plain call of the same shape, with
FlexAttention where a score function says the same, with PyTorch's FlashAttention-2 for dropout, and for packed
sequences with FlashAttention-3 where it is installed. Speeds count the query-key pairs that a mask leaves; that results
are right is for the tests.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import time_call
from benchmarks.run import commit_of_this_folder
from triton_attention import attention, attention_varlen

COLUMNS = (
    *("feature", "provider", "batch", "seqlen", "heads", "head_dim", "causal", "pass", "p50_ms", "tflops"),
    *("of_plain", "note", "device", "torch", "triton", "commit"),
)
_SOFTCAP = 30.0
_WINDOW = 1024
_DROPOUT = 0.1


class Shape(NamedTuple):
    """Self attention."""

    batch: int
    seqlen: int
    heads: int
    head_dim: int
    causal: bool

    def pairs(self, window: int | None = None) -> float:
        """Query-key pairs of a head and batch entry that attend."""
        if not self.causal:
            return float(self.seqlen**2)
        hidden = max(0, self.seqlen - 1 - window) if window is not None else 0
        return self.seqlen * (self.seqlen + 1) / 2 - hidden * (hidden + 1) / 2


class Call(NamedTuple):
    """A forward pass to be timed, its leaves, and the FLOPs that it needs."""

    feature: str
    provider: str
    run: Callable[[], Any]
    leaves: tuple[Tensor, ...]
    flops: float

    def named(self, shape: Shape) -> str:
        """What it is, in words."""
        return (
            f"{self.feature} {self.provider} d{shape.head_dim} s{shape.seqlen} {'causal' if shape.causal else 'full'}"
        )


def calls(shape: Shape, device: torch.device) -> Iterator[Call]:
    """The plain call first: the others are measured against it."""

    b, s, h, d, causal = shape
    leaves = tuple(_leaf(device, b, s, h, d) for _ in range(3))
    slopes = torch.tensor([2.0 ** (-8.0 * (i + 1) / h) for i in range(h)], device=device)
    sink = torch.randn(h, device=device).requires_grad_()
    each = 4.0 * b * h * d
    features: dict[str, dict[str, Any]] = {
        "plain": {},
        "softcap": {"softcap": _SOFTCAP},
        "alibi": {"alibi_slopes": slopes},
        "sink": {"sink": sink},
        "dropout": {"dropout_p": _DROPOUT},
    }
    if causal and s > 2 * _WINDOW:
        features["window"] = {"window": (_WINDOW, 0)}
    for name, options in features.items():
        flops = each * shape.pairs(_WINDOW if name == "window" else None)
        wanted = (*leaves, sink) if name == "sink" else leaves
        yield Call(name, "ours", partial(attention, *leaves, causal=causal, **options), wanted, flops)
    yield from _packed("packed, equal", [s] * b, shape, device)
    if device.type != "cuda":
        return
    heads_first = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves)
    for name, score in (("softcap", _capped), ("alibi", _sloped(slopes))):
        yield Call(name, "flex", _flex(heads_first, score, shape), heads_first, each * shape.pairs())

    def with_dropout() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            q, k, v = heads_first
            return scaled_dot_product_attention(q, k, v, dropout_p=_DROPOUT, is_causal=causal)

    yield Call("dropout", "sdpa_flash", with_dropout, heads_first, each * shape.pairs())


def mixed_lengths(shape: Shape, device: torch.device) -> Iterator[Call]:
    """Packed sequences of other lengths than the plain call's: from 64 to 8192, and a long one among short ones."""

    chance = random.Random(0)
    largest = 8192 if device.type == "cuda" else 128
    lengths = [round(64 * (largest / 64) ** chance.random()) for _ in range(64)]
    yield from _packed("packed, 64 to 8192", lengths, shape, device)
    lengths = [2 * largest, *range(1, 64)]
    chance.shuffle(lengths)
    yield from _packed("packed, 16384 and 63 short", lengths, shape, device)


def _leaf(device: torch.device, *sizes: int) -> Tensor:
    return torch.randn(sizes, device=device, dtype=torch.bfloat16).requires_grad_()


def _packed(name: str, lengths: list[int], shape: Shape, device: torch.device) -> Iterator[Call]:
    leaves = tuple(_leaf(device, sum(lengths), shape.heads, shape.head_dim) for _ in range(3))
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    sizes: dict[str, Any] = {
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts,
        "max_seqlen_q": max(lengths),
        "max_seqlen_k": max(lengths),
    }
    pairs = sum(shape._replace(seqlen=length).pairs() for length in lengths)
    flops = 4.0 * shape.heads * shape.head_dim * pairs
    for provider, function in _varlen_functions().items():
        yield Call(name, provider, partial(function, *leaves, **sizes, causal=shape.causal), leaves, flops)


def _varlen_functions() -> dict[str, Callable[..., Tensor]]:
    """Ours, and FlashAttention-3's where it is installed."""
    functions: dict[str, Callable[..., Tensor]] = {"ours": attention_varlen}
    name = "flash_attn_interface"
    try:
        function = importlib.import_module(name).flash_attn_varlen_func
    except ModuleNotFoundError as error:
        if error.name != name:  # it is there and lacks a module that it needs
            raise
        return functions

    def out_of(*arguments: Any, **keywords: Any) -> Tensor:
        result = function(*arguments, **keywords)
        out: Tensor = result[0] if isinstance(result, tuple) else result  # some releases return the lse as well
        return out

    return functions | {name: out_of}


def _capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return _SOFTCAP * torch.tanh(score / _SOFTCAP)


def _sloped(slopes: Tensor) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[head] * (query - key).abs()

    return score_mod


def _not_later(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _flex(leaves: Sequence[Tensor], score: Callable[..., Tensor], shape: Shape) -> Callable[[], Tensor]:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False  # the backward pass runs many times on one kept graph
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    mask = None
    if shape.causal:
        mask = create_block_mask(_not_later, None, None, shape.seqlen, shape.seqlen, device=str(leaves[0].device))
    return partial(compiled, *leaves, score_mod=score, block_mask=mask)


def shapes(device: torch.device) -> list[Shape]:
    if device.type != "cuda":
        return [Shape(2, 32, 2, 16, True)]
    base = [Shape(4, 4096, 2048 // d, d, causal) for d in (64, 128) for causal in (False, True)]
    return [*base, Shape(1, 16384, 16, 128, True)]


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about: dict[str, object] = {"device": name, "torch": torch.__version__, "triton": _triton_version()}
    about["commit"] = options.commit or commit_of_this_folder()
    with open(options.output, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for shape in shapes(device):
            plain: dict[str, float] = {}
            makers = [
                calls(shape, device),
                *([mixed_lengths(shape, device)] if shape.causal and shape.batch > 1 else []),
            ]
            for call in (call for maker in makers for call in maker):
                if call.feature != "plain" and not options.match.search(call.named(shape)):
                    continue
                row = about | shape._asdict() | {"feature": call.feature, "provider": call.provider}
                for row_of_pass in _rows(call, plain, device, options.seconds_per_case):
                    writer.writerow(row | row_of_pass)
                    print(" ".join(f"{row[key]}" for key in COLUMNS[:7]), *row_of_pass.values(), flush=True)
                file.flush()
                gc.collect()
    print(f"rows in {options.output}")
    return 0


def _rows(call: Call, plain: dict[str, float], device: torch.device, seconds: float) -> Iterator[dict[str, str]]:
    """A row for each pass. `plain` has the speeds of the plain call, and gets them from it."""
    try:
        out = call.run()
        dout = torch.randn_like(out)
        passes: dict[str, tuple[Callable[[], object], float]] = {
            "fwd": (call.run, call.flops),
            "bwd": (lambda: torch.autograd.grad(out, call.leaves, dout, retain_graph=True), 2.5 * call.flops),
        }
        for name, (run, flops) in passes.items():
            milliseconds = time_call(run, device, seconds).p50_ms
            speed = flops / milliseconds / 1e9
            if call.feature == "plain":
                plain[name] = speed
            numbers = {
                "p50_ms": f"{milliseconds:.4g}",
                "tflops": f"{speed:.4g}",
                "of_plain": f"{speed / plain[name]:.3f}",
            }
            yield {"pass": name} | numbers
    except RuntimeError as error:
        yield {"note": " ".join(str(error).split())[:200]}


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks features", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--seconds-per-case", type=float, default=0.3, help="(default: %(default)s)")
    add("--match", type=re.compile, default="", help="regular expression for 'FEATURE PROVIDER d128 s4096 causal|full'")
    add("--output", type=Path, default=Path("features.csv"), help="CSV to write (default: %(default)s)")
    add("--commit", help="what the rows say was measured (default: what git says of this folder)")
    return parser.parse_args(arguments)
