"""How is a model trained with a learned attention bias? A small language model with T5's relative-position bias.

The model reads bytes of a real text and predicts the next one. It has no position embedding: all it knows about order
is a learned table (buckets, heads) that becomes the bias of every attention layer (Raffel et al. 2020, section 2.1),
so it learns as well as the gradient of the bias is right. Before it trains, that gradient and the others are checked
against float64.

    python examples/relative_bias_lm.py [--steps N] [--seconds S] [--device cuda] [--seed N] [--output picture.png]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from triton_attention import attention, explain

HERE = Path(__file__).resolve().parent
TEXT = HERE / "data" / "samuel_and_kings.txt"
PROMPT = "And the king said unto "

LAYERS, HEADS, HEAD_DIM = 4, 4, 32
SEQLEN, BATCH = 128, 8
BUCKETS, MAX_DISTANCE = 32, 128
LEARNING_RATE, WARMUP_STEPS = 3e-3, 20
BIAS_LEARNING_RATE = 10 * LEARNING_RATE  # scores must move by whole units before the heads can tell positions apart


# The model


class RelativeBias(nn.Module):
    """T5's relative-position bias: one learned number per head and bucket of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(BUCKETS, HEADS))

    @staticmethod
    def bucket(distance: Tensor) -> Tensor:
        """Half of the buckets hold one distance each, the other half logarithmically wider ranges up to the longest."""
        exact = BUCKETS // 2
        share = torch.log(distance.clamp(min=exact) / exact) / math.log(MAX_DISTANCE / exact)
        far = (exact + share * (BUCKETS - exact)).long().clamp(max=BUCKETS - 1)
        return torch.where(distance < exact, distance.clamp(min=0), far)

    def forward(self, seqlen: int) -> Tensor:
        position = torch.arange(seqlen, device=self.table.device)
        distance = position[:, None] - position[None, :]  # (seqlen, seqlen): the query's position less the key's
        return self.table[self.bucket(distance)].permute(2, 0, 1)[None]  # (1, heads, seqlen, seqlen)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x))  # (batch, seqlen, 3 * width)
        q, k, v = qkv.unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)  # views (batch, seqlen, heads, head_dim)
        x = x + self.out(attention(q, k, v, bias=bias.to(q.dtype), causal=True).flatten(-2))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class LanguageModel(nn.Module):
    """Bytes (batch, seqlen) -> logits of the next byte (batch, seqlen, 256)."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.embedding = nn.Embedding(256, width)
        self.relative_bias = RelativeBias()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        bias = self.relative_bias(tokens.shape[1])  # one table for all layers: its gradient is the sum over them
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, bias)
        logits: Tensor = self.head(self.norm(x))
        return logits


# The check


def attention_in_pytorch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Causal attention with a bias as one would write it, in the dtype of its inputs."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + bias
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -math.inf).softmax(-1), v)


def check_against_float64(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare out and all gradients with float64: err <= 2 x err(same-dtype PyTorch) + rounding of the largest."""
    shape = (4, 512, 8, 64)  # (batch, seqlen, heads, head_dim)
    bias_shape = (1, 8, 512, 512)  # (1, heads, seqlen, seqlen)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    bias = torch.randn(bias_shape, device=device, dtype=dtype)

    def results(function: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        inputs = [tensor.detach().to(to).requires_grad_() for tensor in (q, k, v, bias)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(to))]

    def with_backend(backend: str) -> Callable[..., Tensor]:
        return lambda q, k, v, bias: attention(q, k, v, bias=bias, causal=True, backend=backend)

    ours = results(with_backend("auto"), dtype)
    plain = results(attention_in_pytorch, dtype)
    exact = results(with_backend("reference"), torch.float64)

    print(f"Check against float64: q, k, v {shape} {dtype}, bias {bias_shape}, causal; largest absolute errors:")
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


def bits_per_character(model: LanguageModel, windows: Tensor) -> Tensor:
    """Cross entropy in bits of each byte of the windows (batch, seqlen + 1) but the first."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=windows.is_cuda):
        logits = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def evaluate(model: LanguageModel, text: Tensor) -> float:
    """Bits per character over a whole text, in windows that do not overlap."""
    windows = text.unfold(0, SEQLEN + 1, SEQLEN)
    parts = [(bits_per_character(model, part), len(part)) for part in windows.split(64)]
    return sum(bits.item() * size for bits, size in parts) / len(windows)


def train(model: LanguageModel, text: Tensor, steps: int, seconds: float) -> list[float]:
    """Train for so many steps or seconds, whichever ends first; return the loss of each step."""
    table = model.relative_bias.table
    others = [parameter for parameter in model.parameters() if parameter is not table]
    groups = [{"params": others, "initial_lr": LEARNING_RATE}, {"params": [table], "initial_lr": BIAS_LEARNING_RATE}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0)
    offsets = torch.arange(SEQLEN + 1, device=text.device)
    losses: list[float] = []
    start = time.perf_counter()
    reported_step, reported_time, progress = 0, start, 0.0
    print(f"  {'step':>6}{'train bits/char':>17}{'tokens/s':>12}{'done':>7}")
    while progress < 1:
        schedule = min(1, (len(losses) + 1) / WARMUP_STEPS) * (1 - progress)  # warm up, then decay linearly
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule
        starts = torch.randint(len(text) - SEQLEN, (BATCH, 1)).to(text.device)
        loss = bits_per_character(model, text[starts + offsets])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())

        now, step = time.perf_counter(), len(losses)
        progress = max(step / steps, (now - start) / seconds)
        if step == 1 or progress >= 1 or now - reported_time > seconds / 20 or step - reported_step >= steps / 20:
            recent = losses[reported_step:]
            speed = len(recent) * BATCH * SEQLEN / (now - reported_time)
            print(f"  {step:6}{sum(recent) / len(recent):17.3f}{speed:12,.0f}{min(progress, 1):7.0%}", flush=True)
            reported_step, reported_time = step, now
    return losses


@torch.no_grad()
def generate(model: LanguageModel, prompt: str, length: int, device: torch.device, temperature: float = 0.7) -> str:
    """Continue the prompt by so many sampled bytes."""
    tokens = torch.tensor(list(prompt.encode()), device=device)
    for _ in range(length):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(tokens[None, -SEQLEN:])[0, -1].float()
        tokens = torch.cat([tokens, torch.multinomial((logits / temperature).softmax(-1), 1)])
    return bytes(tokens.tolist()).decode(errors="replace")


def draw(losses: list[float], validation: tuple[float, float], bias: Tensor, path: Path) -> None:
    """Write a picture: the loss curve, and the learned bias of each head as a function of distance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.plot(range(1, len(losses) + 1), losses, color="tab:blue", linewidth=1, label="training, each step")
    left.plot([1, len(losses)], validation, "o", color="tab:orange", label="validation, before and after")
    left.set(title="Loss", xlabel="step", ylabel="bits per character", ylim=(0, None))
    left.legend(frameon=False)
    for head, values in enumerate(bias.tolist()):
        right.plot(range(len(values)), values, drawstyle="steps-mid", label=f"head {head}")
    right.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    right.set(title="Learned bias", xlabel="distance from query back to key", ylabel="added to the score")
    right.set_xscale("symlog", base=2, linthresh=2)
    right.set_xlim(-0.5, SEQLEN)
    right.set_xticks([0, 1, 2, 4, 8, 16, 32, 64, 127], labels=["0", "1", "2", "4", "8", "16", "32", "64", "127"])
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="train for at most so many steps (default 3000)")
    parser.add_argument("--seconds", type=float, default=45, help="train for at most so many seconds (default 45)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "output" / "relative_bias_lm.png", help="the picture")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.seconds <= 0:
        parser.error("--steps must be at least 1 and --seconds above 0")

    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    packages = [import_module(package) for package in ("triton_attention", "torch", "triton") if find_spec(package)]
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in packages)
    print(f"{name}; {versions}, Python {sys.version.split()[0]}\n")

    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).to(device, torch.long)
    split = len(text) * 9 // 10
    training, held_out = text[:split], text[split:]
    model = LanguageModel().to(device)

    q = torch.empty(BATCH, SEQLEN, HEADS, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
    print("The model's attention call:")
    print(explain(q, q, q, bias=model.relative_bias(SEQLEN).to(dtype), causal=True), "\n")

    if not check_against_float64(device, dtype):
        print("The check failed: the results are wrong, so nothing was trained.", file=sys.stderr)
        return 1

    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"\nTraining {parameters:,} parameters on {len(training):,} bytes, {len(held_out):,} held out ({TEXT.name}):")
    before = evaluate(model, held_out)
    losses = train(model, training, arguments.steps, arguments.seconds)
    after = evaluate(model, held_out)
    print(f"Validation: {before:.3f} bits/char before, {after:.3f} after {len(losses)} steps")

    print(f"\nA sample:\n{generate(model, PROMPT, 400, device)}\n")

    with torch.no_grad():
        learned = model.relative_bias(SEQLEN)[0, :, -1].flip(-1)  # (heads, distance): the last query sees them all
        model.relative_bias.table.zero_()
    print(f"The same model with its bias set to zero: {evaluate(model, held_out):.3f} bits/char")
    draw(losses, (before, after), learned, arguments.output)
    print(f"Picture: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
