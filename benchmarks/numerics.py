"""How large is each provider's error, at which length and on which data?

Every result is compared with float64, computed some queries at a time, so that 64k tokens need no matrix of scores.
"eager" is PyTorch in the case's own dtype, computed in the same way.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, random_inputs
from benchmarks.correctness import Size
from benchmarks.providers import PROVIDERS, AttentionFunction, Ours, Provider
from benchmarks.run import commit_of_this_folder
from triton_attention import attention

COLUMNS = (
    *("data", "seqlen", "head_dim", "causal", "bias", "dtype", "provider", "result"),
    *("largest_error", "rms_error", "rms_of_result", "note", "device", "torch", "commit"),
)  # of the CSV; the errors are empty where the note says why
_SCORES = 2**27  # of the rows that are computed together: 1 GiB in float64
_RESULTS = ("out", "lse", "dq", "dk", "dv", "dbias")


class Portable(Ours):
    """triton_attention.attention on its portable backend."""

    name = "ours_portable"

    def function(self, case: Case, device: torch.device) -> AttentionFunction:
        return lambda q, k, v, bias: attention(q, k, v, bias=bias, causal=case.causal, backend="portable")


COMPARED: dict[str, Provider] = {
    name: PROVIDERS[name] for name in ("ours", "sdpa_flash", "sdpa_cudnn", "flash_attn", "flash_attn_interface")
} | {"ours_portable": Portable()}


class Data(NamedTuple):
    """Standard normal data, made into something harder."""

    name: str
    make: Callable[[Inputs], Inputs]


def _scaled(factor: float) -> Data:
    """q and k times a factor: logits grow with its square."""
    return Data(f"q, k x {factor:g}", lambda x: x._replace(q=factor * x.q, k=factor * x.k))


NORMAL = Data("normal", lambda x: x)
EQUAL_LOGITS = Data("equal logits", lambda x: x._replace(k=x.k[:, :1].expand_as(x.k).contiguous()))
OFFSET_VALUES = Data("v + 100", lambda x: x._replace(v=x.v + 100))  # out is 100 almost everywhere, delta cancels
LARGE_BIAS = Data("bias x 1000", lambda x: x._replace(bias=None if x.bias is None else 1000 * x.bias))


def _half_hidden(inputs: Inputs) -> Inputs:
    """-inf in half of the bias, and in all of every tenth row."""
    if inputs.bias is None:
        return inputs
    hidden = torch.rand_like(inputs.bias, dtype=torch.float32) < 0.5
    hidden[:, :, ::10] = True
    return inputs._replace(bias=inputs.bias.masked_fill(hidden, -math.inf))


def trials(longest: int) -> Iterator[tuple[Data, Case]]:
    """What is compared: lengths first, then data at one length."""

    def case(seqlen: int, head_dim: int, causal: bool = False, dtype: str = "bfloat16", bias: str = "none") -> Case:
        return Case("numerics", "", 1, 2, 2, seqlen, seqlen, head_dim, causal, bias, dtype)

    for seqlen in (1024, 4096, 16384, 65536):
        for head_dim in (64, 128):
            for causal in (False, True):
                if seqlen <= longest:
                    yield NORMAL, case(seqlen, head_dim, causal)
    seqlen = min(longest, 4096)
    for dtype in ("bfloat16", "float16", "float32"):
        for factor in (0.01, 1.0, 4.0, 16.0, 64.0, 1000.0):
            yield _scaled(factor), case(seqlen, 64, dtype=dtype)
        for data in (EQUAL_LOGITS, OFFSET_VALUES):
            yield data, case(seqlen, 64, dtype=dtype)
        for data in (NORMAL, LARGE_BIAS, Data("half of the bias -inf", _half_hidden)):
            yield data, case(min(seqlen, 2048), 64, dtype=dtype, bias="1hqk")


def by_rows(case: Case, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse and the gradients in `dtype`, as many queries at a time as fit; what all of them add to is added in
    float32 at least. Of a case whose heads share no keys and whose queries share no bias."""
    wider = torch.promote_types(dtype, torch.float32)
    k, v = (x.to(dtype).requires_grad_() for x in (inputs.k, inputs.v))
    sums = {"dk": torch.zeros_like(k, dtype=wider), "dv": torch.zeros_like(v, dtype=wider)}
    rows: dict[str, list[Tensor]] = {}
    step = max(1, _SCORES // (case.batch * case.heads_q * case.seqlen_k))
    for begin in range(0, case.seqlen_q, step):
        part = slice(begin, begin + step)
        leaves = {"dq": inputs.q[:, part].to(dtype).requires_grad_(), "dk": k, "dv": v}
        scores = torch.einsum("bqhd,bkhd->bhqk", leaves["dq"] * case.head_dim**-0.5, k)
        if inputs.bias is not None:
            leaves["dbias"] = inputs.bias[:, :, part].to(dtype).requires_grad_()
            scores = scores + leaves["dbias"]
        if case.causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(begin + 1)
            scores = scores.masked_fill(later, -math.inf)
        empty = (scores == -math.inf).all(dim=-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        grads = torch.autograd.grad(out, tuple(leaves.values()), inputs.grad_out[:, part].to(dtype))
        named = dict(zip(leaves, grads, strict=True))
        for name in sums:
            sums[name] += named.pop(name)
        named |= {"out": out.detach(), "lse": scores.detach().to(wider).logsumexp(dim=-1)}
        for name, tensor in named.items():
            rows.setdefault(name, []).append(tensor)
    axes = {"out": 1, "lse": 2, "dq": 1, "dbias": 2}
    return {name: torch.cat(parts, dim=axes[name]) for name, parts in rows.items()} | {
        name: total.to(dtype) for name, total in sums.items()
    }


def results_of(provider: Provider, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """out, the gradients, without dbias where the provider has none, and lse where it tells it."""
    device = inputs.q.device
    results: dict[str, Tensor] = {}
    passes = ["fwd", "bwd" if case.bias == "none" or provider.why_not(case, "bwd_db", device) else "bwd_db"]
    for pass_name in passes:
        refusal = provider.why_not(case, pass_name, device)
        if refusal is not None:
            raise NotImplementedError(refusal)
        results |= provider.prepare(case, pass_name, inputs).results()
    lse = _lse_of(provider, case, inputs)
    return results if lse is None else results | {"lse": lse}


def _lse_of(provider: Provider, case: Case, inputs: Inputs) -> Tensor | None:
    """Of those that tell it: ours, and the operator below SDPA's FlashAttention."""
    q, k, v, bias, _ = inputs
    lse: Tensor | None = None
    with torch.no_grad():
        if isinstance(provider, Ours):
            backend = "portable" if isinstance(provider, Portable) else "auto"
            _, lse = attention(q, k, v, bias=bias, causal=case.causal, return_lse=True, backend=backend)
        elif provider.name == "sdpa_flash":
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            lse = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first, 0.0, case.causal)[1]
            lse = lse[..., : case.seqlen_q]
    return lse


def error_of(result: Tensor, exact: Tensor) -> Size:
    """Infinities that agree are no error."""
    same = result.double() == exact
    return Size.of((result.double() - exact).masked_fill(same, 0.0))


class Comparison(NamedTuple):
    """The errors of a case by provider and result, the size of each result, and why providers have none."""

    errors: dict[tuple[str, str], Size]
    sizes: dict[str, Size]
    notes: dict[str, str]


def compare(data: Data, case: Case, device: torch.device) -> Comparison:
    inputs = data.make(random_inputs(case, device))
    exact = by_rows(case, inputs, torch.float64)
    zero = {name: torch.zeros_like(tensor) for name, tensor in exact.items()}
    finite = {name: tensor.masked_fill(tensor == -math.inf, 0.0) for name, tensor in exact.items()}
    comparison = Comparison({}, {name: error_of(zero[name], finite[name]) for name in exact}, {})
    results = {"eager": by_rows(case, inputs, case.torch_dtype)}
    for provider in COMPARED.values():
        try:
            results[provider.name] = results_of(provider, case, inputs)
        except (NotImplementedError, RuntimeError) as error:
            comparison.notes[provider.name] = " ".join(str(error).split())[:200]
    for name, of_provider in results.items():
        comparison.errors.update({(name, key): error_of(tensor, exact[key]) for key, tensor in of_provider.items()})
    return comparison


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {"device": name, "torch": torch.__version__, "commit": options.commit or commit_of_this_folder()}
    with open(options.output, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for data, case in trials(options.longest):
            described: dict[str, object] = {
                "data": data.name,
                "seqlen": case.seqlen_q,
                "head_dim": case.head_dim,
                "causal": case.causal,
            }
            described |= {"bias": case.bias, "dtype": case.dtype}
            errors, sizes, notes = compare(data, case, device)
            for (provider, result), error in errors.items():
                numbers = (error.largest, error.rms, sizes[result].rms)
                texts = dict(zip(COLUMNS[8:11], (f"{number:.4g}" for number in numbers), strict=True))
                writer.writerow(about | described | {"provider": provider, "result": result} | texts)
            for provider, note in notes.items():
                writer.writerow(about | described | {"provider": provider, "note": note})
            file.flush()
            print(_shown(described, errors), flush=True)
            gc.collect()
    print(f"\nrows in {options.output}")
    return 0


def _shown(described: dict[str, object], errors: dict[tuple[str, str], Size]) -> str:
    """A table of one case: a line per result, and per provider its largest and its root mean square error."""
    providers = list(dict.fromkeys(provider for provider, _ in errors))
    lines = ["", ", ".join(f"{name} {value}" for name, value in described.items())]
    lines.append(f"{'':6}" + "".join(f"{provider:>22}" for provider in providers))
    for result in _RESULTS:
        cells = [errors.get((provider, result)) for provider in providers]
        if any(cells):
            words = [f"{cell.largest:.1e} ({cell.rms:.1e})" if cell else "-" for cell in cells]
            lines.append(f"{result:6}" + "".join(f"{word:>22}" for word in words))
    return "\n".join(lines)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks numerics",
        description="Errors of every provider against float64: largest, and (root mean square).",
    )
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", default="cuda" if on_gpu else "cpu", help="(default: %(default)s)")
    add("--longest", type=int, default=65536 if on_gpu else 1024, help="leave out longer sequences")
    add("--output", type=Path, default=Path("numerics.csv"), help="CSV to write (default: %(default)s)")
    add("--commit", help="what the rows say was measured (default: what git says of this folder)")
    return parser.parse_args(arguments)
