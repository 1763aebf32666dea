"""How is attention over pairs trained, as in AlphaFold? A model fills in the distances of a protein from a few of them.

A pair representation (n, n, channels) holds something about each pair of residues. In triangle attention (Jumper et al.
2021, supplement, algorithms 13 and 14) each of its rows attends within itself, and all rows share one bias, made of
the pairs too. With n rows of n queries and n keys, eager PyTorch has n x n x n scores for each head in memory; here
there is the bias, its gradient, and nothing larger.

The model sees the binned distances of some pairs and predicts those of all others. Two distances bound the third of a
triangle, so that attention over triangles is what the task needs. Before it trains, results and gradients are checked
against float64; after it, time and memory are compared with eager PyTorch.

    python examples/triangle_attention.py [--steps N] [--seconds S] [--device cuda] [--seed N] [--output picture.png]
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
STRUCTURES = HERE / "data" / "protein_backbones.txt"
HELD_OUT = ("1UBI", "1EJG")

BLOCKS, CHANNELS, HEADS, HEAD_DIM = 2, 32, 4, 8
LONGEST, SHORTEST, BATCH = 40, 24, 4  # residues of a piece of a chain, and pieces of a step
KNOWN = 0.1  # share of the pairs whose distance is given
BIN_WIDTH, BINS = 2.0, 16  # in Angstrom; the last bin holds everything farther
FARTHEST_NEIGHBOUR = 12  # separations along the chain are told apart up to here
LEARNING_RATE, WARMUP_STEPS = 3e-3, 20

Attention = Callable[..., Tensor]  # (q, k, v, bias, exists) -> out


# Attention


def attention_over_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, exists: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + bias) v within each row, over the keys that exist.

    q, k, v are (rows, n, heads, head_dim); the bias (heads, n, n) and exists (n,) bool are shared by the rows, so that
    the mask can be part of the bias. (docs/migrating/pair_bias.md says what to do where each row has its own mask.)
    """
    return attention(q, k, v, bias=bias.masked_fill(~exists, -math.inf)[None])


def attention_in_pytorch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, exists: Tensor) -> Tensor:
    """The same as one would write it, with all scores in memory."""
    scores = torch.einsum("rqhd,rkhd->rhqk", q, k) * q.shape[-1] ** -0.5 + bias
    return torch.einsum("rhqk,rkhd->rqhd", scores.masked_fill(~exists, -math.inf).softmax(-1), v)


# The model


class TriangleAttention(nn.Module):
    """Gated attention within the rows of a pair representation, or within its columns."""

    def __init__(self, columns: bool) -> None:
        super().__init__()
        self.columns = columns
        width = HEADS * HEAD_DIM
        self.norm = nn.LayerNorm(CHANNELS)
        self.qkv, self.bias = nn.Linear(CHANNELS, 3 * width, bias=False), nn.Linear(CHANNELS, HEADS, bias=False)
        self.gate, self.out = nn.Linear(CHANNELS, width), nn.Linear(width, CHANNELS)

    def forward(self, pairs: Tensor, exists: Tensor) -> Tensor:
        if self.columns:
            pairs = pairs.transpose(1, 2)
        normed = self.norm(pairs)  # (batch, n, n, channels)
        q, k, v = self.qkv(normed).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)
        bias = self.bias(normed).permute(0, 3, 1, 2)  # (batch, heads, n, n)
        # each structure has a bias of its own, which its rows share: one call for each
        out = torch.stack([attention_over_rows(*one) for one in zip(q, k, v, bias, exists, strict=True)])
        update: Tensor = self.out(torch.sigmoid(self.gate(normed)) * out.flatten(-2))
        return update.transpose(1, 2) if self.columns else update


class DistanceModel(nn.Module):
    """Binned distances of some pairs (batch, n, n), BINS = not known -> logits of all pairs (batch, n, n, BINS)."""

    def __init__(self) -> None:
        super().__init__()
        self.distance = nn.Embedding(BINS + 1, CHANNELS)
        self.separation = nn.Embedding(2 * FARTHEST_NEIGHBOUR + 1, CHANNELS)
        self.attentions = nn.ModuleList(TriangleAttention(columns) for _ in range(BLOCKS) for columns in (False, True))
        self.transitions = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 4 * CHANNELS), nn.GELU(), nn.Linear(4 * CHANNELS, CHANNELS)
            )
            for _ in range(2 * BLOCKS)
        )
        self.head = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, BINS))

    def forward(self, given: Tensor, exists: Tensor) -> Tensor:
        position = torch.arange(given.shape[1], device=given.device)
        separation = (position - position[:, None]).clamp(-FARTHEST_NEIGHBOUR, FARTHEST_NEIGHBOUR) + FARTHEST_NEIGHBOUR
        pairs = self.distance(given) + self.separation(separation)
        for attend, transition in zip(self.attentions, self.transitions, strict=True):
            pairs = pairs + attend(pairs, exists)
            pairs = pairs + transition(pairs)
        logits: Tensor = self.head(pairs + pairs.transpose(1, 2))  # a distance has no direction
        return logits


# The data


class Pieces(NamedTuple):
    """Pieces of chains, padded to one length."""

    given: Tensor  # (batch, n, n) bins, BINS where the distance is not known
    bins: Tensor  # (batch, n, n) of all distances
    exists: Tensor  # (batch, n) bool
    asked: Tensor  # (batch, n, n) bool: pairs of residues that exist, whose distance is not given


def read_chains(path: Path) -> dict[str, Tensor]:
    """Name -> the places of its residues (residues, 3) in Angstrom."""
    chains = {}
    for record in path.read_text().split(">")[1:]:
        title, *lines = record.splitlines()
        chains[title.split()[0]] = torch.tensor([[float(number) for number in line.split()] for line in lines])
    return chains


def sample(chains: list[Tensor], batch: int, generator: torch.Generator, device: torch.device) -> Pieces:
    """Random pieces of random chains."""
    bins = torch.zeros(batch, LONGEST, LONGEST, dtype=torch.long)
    exists = torch.zeros(batch, LONGEST, dtype=torch.bool)
    for row in range(batch):
        chain = chains[_random(len(chains), generator)]
        length = SHORTEST + _random(min(LONGEST, len(chain)) - SHORTEST + 1, generator)
        start = _random(len(chain) - length + 1, generator)
        piece = chain[start : start + length]
        bins[row, :length, :length] = (torch.cdist(piece, piece) / BIN_WIDTH).long().clamp(max=BINS - 1)
        exists[row, :length] = True
    known = (torch.rand(bins.shape, generator=generator) < KNOWN).triu(1)
    known = known | known.mT
    asked = exists[:, :, None] & exists[:, None, :] & ~known & ~torch.eye(LONGEST, dtype=torch.bool)
    pieces = Pieces(bins.masked_fill(~known, BINS), bins, exists, asked)
    return Pieces(*[tensor.to(device) for tensor in pieces])


def _random(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


# The check


def check_against_float64(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare out and all gradients with float64: err <= 2 x err(same-dtype PyTorch) + rounding of the largest."""
    rows, n, heads, head_dim = 40, 72, 4, 32
    q, k, v, dout = (torch.randn(rows, n, heads, head_dim, device=device, dtype=dtype) for _ in range(4))
    bias = torch.randn(heads, n, n, device=device, dtype=dtype)
    exists = torch.arange(n, device=device) < n - 9

    def results(function: Attention, to: torch.dtype) -> list[Tensor]:
        inputs = [tensor.detach().to(to).requires_grad_() for tensor in (q, k, v, bias)]
        out = function(*inputs, exists)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(to))]

    ours, plain = results(attention_over_rows, dtype), results(attention_in_pytorch, dtype)
    exact = results(attention_in_pytorch, torch.float64)
    print(f"Check against float64: {rows} rows of {n}, {heads} heads, {dtype}; largest absolute errors:")
    print(f"  {'':6}{'ours':>10}{'PyTorch':>10}{'allowed':>10}")
    passed = True
    for name, our, their, true in zip(("out", "dq", "dk", "dv", "dbias"), ours, plain, exact, strict=True):
        error, baseline = ((tensor.double() - true).abs().max().item() for tensor in (our, their))
        allowed = 2 * baseline + torch.finfo(dtype).eps * true.abs().max().item()
        good = error <= allowed  # False for a NaN
        passed &= good
        print(f"  {name:6}{error:10.1e}{baseline:10.1e}{allowed:10.1e}  {'ok' if good else 'WRONG'}")
    return passed


# The training


def loss_of(model: DistanceModel, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Cross entropy in bits of a distance that is asked for, and the share of them that is at most one bin off."""
    with torch.autocast(pieces.given.device.type, torch.bfloat16, enabled=pieces.given.is_cuda):
        logits = model(pieces.given, pieces.exists)
    asked, true = logits[pieces.asked].float(), pieces.bins[pieces.asked]
    close = (asked.argmax(-1) - true).abs() <= 1
    return nn.functional.cross_entropy(asked, true) / math.log(2), close.float().mean()


@torch.no_grad()
def evaluate(model: DistanceModel, chains: list[Tensor], device: torch.device) -> tuple[float, float]:
    """(bits, share within one bin) over the same pieces each time."""
    generator = torch.Generator().manual_seed(0)
    parts = [loss_of(model, sample(chains, BATCH, generator, device)) for _ in range(8)]
    bits, close = (torch.stack(numbers).mean().item() for numbers in zip(*parts, strict=True))
    return bits, close


def train(
    model: DistanceModel, chains: list[Tensor], steps: int, seconds: float, seed: int, device: torch.device
) -> list[float]:
    """Train for so many steps or seconds, whichever ends first; return the loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0)
    losses: list[float] = []
    start = time.perf_counter()
    reported_step, reported_time, progress = 0, start, 0.0
    print(f"  {'step':>6}{'train bits':>12}{'pieces/s':>10}{'done':>7}")
    while progress < 1:
        for group in optimizer.param_groups:  # warm up, then decay linearly
            group["lr"] = LEARNING_RATE * min(1, (len(losses) + 1) / WARMUP_STEPS) * (1 - progress)
        loss, _ = loss_of(model, sample(chains, BATCH, generator, device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

        now, step = time.perf_counter(), len(losses)
        progress = max(step / steps, (now - start) / seconds)
        if step == 1 or progress >= 1 or now - reported_time > seconds / 20 or step - reported_step >= steps / 20:
            recent = losses[reported_step:]
            speed = len(recent) * BATCH / (now - reported_time)
            print(f"  {step:6}{sum(recent) / len(recent):12.3f}{speed:10,.0f}{min(progress, 1):7.0%}", flush=True)
            reported_step, reported_time = step, now
    return losses


# The comparison with eager PyTorch


class Cost(NamedTuple):
    """Of a forward and a backward pass; None: out of memory, or not measured on this device."""

    milliseconds: float | None
    mebibytes: float | None  # at the peak, beyond what was there before


def measure(function: Attention, n: int, device: torch.device, dtype: torch.dtype) -> Cost:
    """n rows of n queries and keys, with the gradients of q, k, v and the bias."""
    heads, head_dim = 4, 32
    q, k, v = (torch.randn(n, n, heads, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = torch.randn(heads, n, n, device=device, dtype=dtype, requires_grad=True)
    exists = torch.arange(n, device=device) < n - 3
    dout = torch.randn_like(q)

    def run() -> None:
        torch.autograd.grad(function(q, k, v, bias, exists), (q, k, v, bias), dout)

    try:
        run()  # compiles
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return Cost(None, None)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if device.type == "cuda" else None
    return Cost(1e3 * sorted(times)[2], peak)


def compare(device: torch.device, dtype: torch.dtype, sizes: list[int]) -> dict[str, list[Cost]]:
    """The costs of ours and of eager PyTorch for each n."""
    costs: dict[str, list[Cost]] = {"ours": [], "eager": []}
    print(f"Forward and backward, {dtype}, 4 heads of 32:")
    print(f"  {'n':>5}{'ours ms':>10}{'eager ms':>10}{'ours MiB':>10}{'eager MiB':>11}")
    for n in sizes:
        for name, function in (("ours", attention_over_rows), ("eager", attention_in_pytorch)):
            costs[name].append(measure(function, n, device, dtype))
        shown = [costs[name][-1][field] for field in (0, 1) for name in ("ours", "eager")]
        numbers = ["-" if number is None else f"{number:,.1f}" for number in shown]
        print(f"  {n:5}{numbers[0]:>10}{numbers[1]:>10}{numbers[2]:>10}{numbers[3]:>11}", flush=True)
    if device.type != "cuda":
        print("  On a CPU the reference runs, which has all scores in memory too: its memory is not compared.")
    return costs


def draw(
    losses: list[float], maps: dict[str, Tensor], sizes: list[int], costs: dict[str, list[Cost]], path: Path
) -> None:
    """Write a picture: the loss, a protein's distances as given, predicted and true, and the costs by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(12, 7.5), layout="constrained")
    axes[0, 0].plot(range(1, len(losses) + 1), losses, linewidth=1)
    axes[0, 0].set(title="Loss", xlabel="step", ylabel="bits of a distance", ylim=(0, None))
    for place, quantity in ((axes[0, 1], "milliseconds"), (axes[0, 2], "mebibytes")):
        for name, points in costs.items():
            known = [(n, getattr(cost, quantity)) for n, cost in zip(sizes, points, strict=True)]
            known = [(n, number) for n, number in known if number is not None]
            if known:
                place.plot(*zip(*known, strict=True), "o-", label=name)
                place.set(xscale="log", yscale="log")
                place.legend(frameon=False)
        place.set(title="Time" if quantity == "milliseconds" else "Memory", xlabel="n", ylabel=quantity)
        place.minorticks_off()
        place.set_xticks(sizes, labels=[str(n) for n in sizes])
        if not place.lines:
            place.text(0.5, 0.5, "not compared on a CPU", ha="center", transform=place.transAxes)
    for place, (name, distances) in zip(axes[1], maps.items(), strict=True):
        image = place.imshow(distances.cpu(), vmin=0, vmax=BIN_WIDTH * BINS, cmap="viridis_r")
        place.set(title=f"{name} distances", xlabel="residue", ylabel="residue")
    figure.colorbar(image, ax=axes[1, 2], label="Angstrom")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


@torch.no_grad()
def distance_maps(model: DistanceModel, chains: list[Tensor], device: torch.device) -> dict[str, Tensor]:
    """One piece of a held-out chain: what is given, what is predicted, what is true, in Angstrom (NaN: not known)."""
    pieces = sample(chains, 1, torch.Generator().manual_seed(1), device)
    predicted = model(pieces.given, pieces.exists).argmax(-1)
    predicted = torch.where(pieces.asked, predicted, pieces.bins)  # the others are known
    length = int(pieces.exists.sum())
    maps = {"given": pieces.given, "predicted": predicted, "true": pieces.bins}
    shown = {name: (bins[0, :length, :length] + 0.5) * BIN_WIDTH for name, bins in maps.items()}
    return shown | {"given": shown["given"].masked_fill(pieces.given[0, :length, :length] == BINS, math.nan)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="train for at most so many steps (default 2000)")
    parser.add_argument("--seconds", type=float, default=60, help="train for at most so many seconds (default 60)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "output" / "triangle_attention.png", help="the picture")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.seconds <= 0:
        parser.error("--steps must be at least 1 and --seconds above 0")

    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.empty(LONGEST, LONGEST, HEADS, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
    bias = torch.empty(1, HEADS, LONGEST, LONGEST, device=device, dtype=dtype, requires_grad=True)
    print("The model's attention call:")
    print(explain(q, q, q, bias=bias), "\n")
    if not check_against_float64(device, dtype):
        print("The check failed: the results are wrong, so nothing was trained.", file=sys.stderr)
        return 1

    chains = read_chains(STRUCTURES)
    held_out = [chain for name, chain in chains.items() if name in HELD_OUT]
    training = [chain for name, chain in chains.items() if name not in HELD_OUT]
    model = DistanceModel().to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"\nTraining {parameters:,} parameters on {len(training)} proteins; held out: {', '.join(HELD_OUT)}:")
    before, _ = evaluate(model, held_out, device)
    losses = train(model, training, arguments.steps, arguments.seconds, arguments.seed, device)
    after, close = evaluate(model, held_out, device)
    print(f"Held out: {before:.3f} bits before, {after:.3f} after {len(losses)} steps; {close:.0%} within one bin")
    maps = distance_maps(model, held_out, device)
    with torch.no_grad():
        for attend in model.attentions:
            attend.get_parameter("bias.weight").zero_()
    print(f"The same model with its pair bias set to zero: {evaluate(model, held_out, device)[0]:.3f} bits\n")

    sizes = [128, 256, 384, 512] if device.type == "cuda" else [16, 32, 64]
    draw(losses, maps, sizes, compare(device, dtype, sizes), arguments.output)
    print(f"Picture: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
