"""What does a long context buy, and cost? A language model with grouped-query heads reads thousands of bytes at once.

Eight query heads share two key/value heads, which makes the cache of a long text a quarter as large (Ainslie et al.
2023). The longer the text that the model has read, the better it should know the next byte: after training, the loss is
printed by position. Before it trains, results and gradients are checked against float64; after it, time and memory at
growing lengths are compared with eager PyTorch.

    python examples/long_context_lm.py [--steps N] [--seconds S] [--seqlen N] [--device cuda] [--seed N] [--output PNG]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from triton_attention import attention, explain

HERE = Path(__file__).resolve().parent
TEXT = HERE / "data" / "samuel_and_kings.txt"

LAYERS, HEADS, HEADS_KV, HEAD_DIM = 4, 8, 2, 32
SEQLEN, COMPARED = {"cuda": 8192, "cpu": 384}, {"cuda": (2048, 4096, 8192, 16384, 32768), "cpu": (128, 256, 512)}
BATCH = 2
ROTARY_BASE = 10000.0
LEARNING_RATE, WARMUP_STEPS = 2e-3, 20

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> out, causal


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (batch, seqlen, heads, head_dim), k and v with a divisor of its heads: they are not repeated in memory."""
    out: Tensor = attention(q, k, v, causal=True)
    return out


def causal_attention_in_pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as one would write it, with keys repeated and all scores in memory."""
    k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for tensor in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -math.inf).softmax(-1), v)


# The model


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021): x (batch, seqlen, heads, head_dim) turned by its position."""
    half = x.shape[-1] // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[1], device=x.device)[:, None, None] * frequency  # (seqlen, 1, half)
    first, second = x.float().chunk(2, dim=-1)
    turned = [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()]
    return torch.cat(turned, dim=-1).to(x.dtype)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, (HEADS + 2 * HEADS_KV) * HEAD_DIM, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split([HEADS, HEADS_KV, HEADS_KV], dim=2)  # views (batch, seqlen, heads, head_dim)
        x = x + self.out(causal_attention(rotated(q), rotated(k), v).flatten(-2))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class LanguageModel(nn.Module):
    """Bytes (batch, seqlen) -> logits of the next byte (batch, seqlen, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, HEADS * HEAD_DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, 256))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.embedding(tokens)))
        return logits


# The check


def check_against_float64(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare out and all gradients with float64: err <= 2 x err(same-dtype PyTorch) + rounding of the largest."""
    q, dout = (torch.randn(2, 300, HEADS, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(2, 300, HEADS_KV, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))

    def results(function: Attention, to: torch.dtype) -> list[Tensor]:
        inputs = [tensor.detach().to(to).requires_grad_() for tensor in (q, k, v)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(to))]

    ours, plain = results(causal_attention, dtype), results(causal_attention_in_pytorch, dtype)
    exact = results(causal_attention_in_pytorch, torch.float64)
    print(f"Check against float64: q {tuple(q.shape)}, k and v {tuple(k.shape)}, {dtype}; largest absolute errors:")
    print(f"  {'':6}{'ours':>10}{'PyTorch':>10}{'allowed':>10}")
    passed = True
    for name, our, their, true in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        error, baseline = ((tensor.double() - true).abs().max().item() for tensor in (our, their))
        allowed = 2 * baseline + torch.finfo(dtype).eps * true.abs().max().item()
        good = error <= allowed  # False for a NaN
        passed &= good
        print(f"  {name:6}{error:10.1e}{baseline:10.1e}{allowed:10.1e}  {'ok' if good else 'WRONG'}")
    return passed


# The training


def bits_per_character(model: LanguageModel, windows: Tensor) -> Tensor:
    """Cross entropy in bits of each byte of the windows (batch, seqlen + 1) but the first: (batch, seqlen)."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
        logits = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.float().mT, windows[:, 1:], reduction="none") / math.log(2)


@torch.no_grad()
def loss_by_position(model: LanguageModel, text: Tensor, seqlen: int) -> dict[int, float]:
    """Bytes that were read before -> bits of the next one, over a whole text; a point stands for what is up to it."""
    windows = text.unfold(0, seqlen + 1, seqlen)[:64]
    bits = torch.cat([bits_per_character(model, part) for part in windows.split(BATCH)]).mean(dim=0)
    ends = [2**power for power in range(2, seqlen.bit_length()) if 2**power < seqlen] + [seqlen]
    starts = [0, *ends[:-1]]
    return {end: bits[start:end].mean().item() for start, end in zip(starts, ends, strict=True)}


def train(model: LanguageModel, text: Tensor, seqlen: int, steps: int, seconds: float) -> list[float]:
    """Train for so many steps or seconds, whichever ends first; return the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0)
    offsets = torch.arange(seqlen + 1, device=text.device)
    losses: list[float] = []
    start = time.perf_counter()
    reported_step, reported_time, progress = 0, start, 0.0
    print(f"  {'step':>6}{'train bits/char':>17}{'tokens/s':>12}{'done':>7}")
    while progress < 1:
        for group in optimizer.param_groups:  # warm up, then decay linearly
            group["lr"] = LEARNING_RATE * min(1, (len(losses) + 1) / WARMUP_STEPS) * (1 - progress)
        starts = torch.randint(len(text) - seqlen, (BATCH, 1)).to(text.device)
        loss = bits_per_character(model, text[starts + offsets]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

        now, step = time.perf_counter(), len(losses)
        progress = max(step / steps, (now - start) / seconds)
        if step == 1 or progress >= 1 or now - reported_time > seconds / 20 or step - reported_step >= steps / 20:
            recent = losses[reported_step:]
            speed = len(recent) * BATCH * seqlen / (now - reported_time)
            print(f"  {step:6}{sum(recent) / len(recent):17.3f}{speed:12,.0f}{min(progress, 1):7.0%}", flush=True)
            reported_step, reported_time = step, now
    return losses


# The comparison with eager PyTorch


class Cost(NamedTuple):
    """Of a forward and a backward pass; None: out of memory, or not measured on this device."""

    milliseconds: float | None
    mebibytes: float | None  # at the peak, beyond what was there before


def measure(function: Attention, seqlen: int, device: torch.device, dtype: torch.dtype) -> Cost:
    """One sequence, 32 query heads, 8 key/value heads, head dim 64."""
    q = torch.randn(1, seqlen, 32, 64, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(1, seqlen, 8, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    dout = torch.randn_like(q)
    try:
        torch.autograd.grad(function(q, k, v), (q, k, v), dout)  # compiles
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.autograd.grad(function(q, k, v), (q, k, v), dout)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return Cost(None, None)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else None
    return Cost(1e3 * sorted(times)[2], peak)


def compare(device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...]) -> dict[str, list[Cost]]:
    """The costs of ours and of eager PyTorch at each length."""
    costs: dict[str, list[Cost]] = {"ours": [], "eager": []}
    print(f"Forward and backward, {dtype}, causal, heads 32 / 8, head dim 64:")
    print(f"  {'seqlen':>7}{'ours ms':>10}{'eager ms':>10}{'ours MiB':>10}{'eager MiB':>11}")
    for seqlen in lengths:
        for name, function in (("ours", causal_attention), ("eager", causal_attention_in_pytorch)):
            costs[name].append(measure(function, seqlen, device, dtype))
        shown = [costs[name][-1][field] for field in (0, 1) for name in ("ours", "eager")]
        numbers = ["-" if number is None else f"{number:,.1f}" for number in shown]
        print(f"  {seqlen:7}{numbers[0]:>10}{numbers[1]:>10}{numbers[2]:>10}{numbers[3]:>11}", flush=True)
    if device.type != "cuda":
        print("  On a CPU the reference runs, which has all scores in memory too: its memory is not compared.")
    return costs


def draw(
    losses: list[float],
    by_position: dict[int, float],
    lengths: tuple[int, ...],
    costs: dict[str, list[Cost]],
    path: Path,
) -> None:
    """Write a picture: the loss by step and by position, and the costs by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4), layout="constrained")
    axes[0].plot(range(1, len(losses) + 1), losses, linewidth=1)
    axes[0].set(title="Loss", xlabel="step", ylabel="bits per character", ylim=(0, None))
    axes[1].plot(list(by_position), list(by_position.values()), "o-")
    axes[1].set(
        title="Held-out loss by position", xlabel="bytes read, up to", ylabel="bits per character", xscale="log"
    )
    for place, quantity in ((axes[2], "milliseconds"), (axes[3], "mebibytes")):
        for name, points in costs.items():
            known = [(n, getattr(cost, quantity)) for n, cost in zip(lengths, points, strict=True)]
            known = [(n, number) for n, number in known if number is not None]
            if known:
                place.plot(*zip(*known, strict=True), "o-", label=name)
                place.set(xscale="log", yscale="log")
                place.legend(frameon=False)
        place.set(title="Time" if quantity == "milliseconds" else "Memory", xlabel="seqlen", ylabel=quantity)
        place.minorticks_off()
        place.set_xticks(lengths, labels=[str(n) for n in lengths])
        if not place.lines:
            place.text(0.5, 0.5, "not compared on a CPU", ha="center", transform=place.transAxes)
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="train for at most so many steps (default 1000)")
    parser.add_argument("--seconds", type=float, default=60, help="train for at most so many seconds (default 60)")
    parser.add_argument(
        "--seqlen", type=int, help=f"bytes read at once (default {SEQLEN['cuda']}, or {SEQLEN['cpu']} on a CPU)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "output" / "long_context_lm.png", help="the picture")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.seconds <= 0:
        parser.error("--steps must be at least 1 and --seconds above 0")
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    seqlen = arguments.seqlen or SEQLEN[device.type]
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).to(device, torch.long)
    split = len(text) * 9 // 10
    training, held_out = text[:split], text[split:]
    if not 8 <= seqlen < len(held_out):
        parser.error(f"--seqlen must be from 8 to {len(held_out) - 1}, the bytes that are held out")

    q = torch.empty(BATCH, seqlen, HEADS, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
    k = torch.empty(BATCH, seqlen, HEADS_KV, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
    print("The model's attention call:")
    print(explain(q, k, k, causal=True), "\n")
    if not check_against_float64(device, dtype):
        print("The check failed: the results are wrong, so nothing was trained.", file=sys.stderr)
        return 1

    model = LanguageModel().to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"\nTraining {parameters:,} parameters, {seqlen:,} bytes at once, of {TEXT.name}:")
    losses = train(model, training, seqlen, arguments.steps, arguments.seconds)
    by_position = loss_by_position(model, held_out, seqlen)
    print("Held out, by how much the model has read:")
    start = 0
    for end, bits in by_position.items():
        print(f"  bytes {start:6,} to {end:6,}: {bits:.3f} bits/char")
        start = end
    print()
    lengths = COMPARED[device.type]
    draw(losses, by_position, lengths, compare(device, dtype, lengths), arguments.output)
    print(f"Picture: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
