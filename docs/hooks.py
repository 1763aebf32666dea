"""What does the site have that no Markdown file has? Tables and pictures, made from the code and the measurements."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from torch import Tensor

from triton_attention import dispatch, explain
from triton_attention.problem import Problem

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
GPUS = {  # what PyTorch would say of them
    "H100": SimpleNamespace(name="an H100", major=9, minor=0),
    "A100": SimpleNamespace(name="an A100", major=8, minor=0),
}


def on_files(files: Files, config: Any) -> Files:
    """The pictures of the measurements become files of the site."""
    for picture in sorted(RESULTS.glob("*.svg")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Marks become what they stand for, and formulas MathML, which browsers show without a script."""
    for mark, make in MARKS.items():
        markdown = markdown.replace(mark, make()) if mark in markdown else markdown
    markdown = re.sub(
        r"^```math\n(.*?)^```$",
        lambda match: f"\n<div>{convert(match[1].strip(), display='block')}</div>\n",
        markdown,
        flags=re.DOTALL | re.MULTILINE,
    )
    return re.sub(r"\$`(.+?)`\$", lambda match: convert(match[1]), markdown)


def support_table() -> str:
    """Which calls the Triton backends run on an H100, and their reasons not to."""
    backends = [backend for backend in dispatch.BACKENDS if backend.name != "reference"]
    return _table(backends, {kind: _problem("H100", arguments) for kind, arguments in _calls().items()})


def device_table() -> str:
    """Which backends run a plain call where, unless one is named."""
    devices = {"H100": "H100, H200, GH200", "A100": "other CUDA GPUs, such as an A100", "cpu": "a CPU"}
    arguments = _calls()["bfloat16 or float16"]
    return _table(dispatch.BACKENDS, {name: _problem(device, arguments) for device, name in devices.items()})


def pictures() -> str:
    """A heading for each file of measurements, and its pictures."""
    lines = []
    for table in sorted(RESULTS.glob("*.csv")):
        lines.append(f"## {table.stem}\n")
        for picture in sorted(RESULTS.glob(f"{table.stem}_*.svg")):
            title = picture.stem.removeprefix(f"{table.stem}_").replace("_", " ")
            lines.append(f"![{title}](pictures/{picture.name})\n")
    return "\n".join(lines)


MARKS: dict[str, Callable[[], str]] = {
    "<!-- the support table -->": support_table,
    "<!-- the device table -->": device_table,
    "<!-- the pictures -->": pictures,
}


def _table(
    backends: tuple[dispatch.Backend, ...] | list[dispatch.Backend], rows: dict[str, tuple[str, Problem]]
) -> str:
    lines = [f"| | {' | '.join(f'`{backend.name}`' for backend in backends)} |", "|---" * (1 + len(backends)) + "|"]
    for kind, (gpu, problem) in rows.items():
        with patch("torch.cuda.get_device_properties", lambda _, gpu=gpu: GPUS[gpu]):
            reasons = [backend.why_not(problem) for backend in backends]
        lines.append(f"| {kind} | {' | '.join('no: ' + '; '.join(why) if why else 'yes' for why in reasons)} |")
    return "\n".join(lines)


def _problem(device: str, arguments: dict[str, Any]) -> tuple[str, Problem]:
    """The device, and the problem that a call is there. The call is described with tensors that have no data."""
    problem = explain(**arguments).problem
    return device, problem._replace(device=torch.device("cuda" if device in GPUS else device))


def _calls() -> dict[str, dict[str, Any]]:
    """kind of call -> the arguments of `attention`, or of `attention_varlen`."""

    def qkv(dtype: torch.dtype = torch.bfloat16, **changes: int) -> dict[str, Any]:
        size = {"heads_kv": 16, "seqlen_k": 1024, "head_dim": 64, "head_dim_v": 64} | changes
        q = _empty(2, 1024, 16, size["head_dim"], dtype=dtype)
        k = _empty(2, size["seqlen_k"], size["heads_kv"], size["head_dim"], dtype=dtype)
        return {"q": q, "k": k, "v": _empty(2, size["seqlen_k"], size["heads_kv"], size["head_dim_v"], dtype=dtype)}

    plain = qkv()
    starts = torch.empty(3, dtype=torch.int32, device="meta")
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 1024, "max_seqlen_k": 1024}
    packed = {name: _empty(2048, 16, 64) for name in ("q", "k", "v")} | lengths
    return {
        "bfloat16 or float16": plain,
        "float32": qkv(torch.float32),
        "float64": qkv(torch.float64),
        "head dim 256": qkv(head_dim=256, head_dim_v=256),
        "a head dim that is no multiple of 8": qkv(head_dim=59, head_dim_v=59),
        "v of another head dim": qkv(head_dim_v=128),
        "grouped-query heads": qkv(heads_kv=4),
        "more keys than queries": qkv(seqlen_k=3000),
        "rows that start anywhere": plain | {"q": _empty(2, 1024, 16, 65)[..., 1:]},
        "causal": plain | {"causal": True},
        "sliding window": plain | {"window": (256, 0)},
        "bias of a pair, with its gradient": plain | {"bias": _empty(1, 16, 1024, 1024)},
        "bias of a key, with its gradient": plain | {"bias": _empty(2, 1, 1, 1024)},
        "boolean mask": plain | {"bias": _empty(2, 1, 1024, 1024, dtype=torch.bool)},
        "deterministic gradients": plain | {"deterministic": True},
        "softcap": plain | {"softcap": 30.0},
        "ALiBi": plain | {"alibi_slopes": torch.empty(16, device="meta")},
        "attention sink": plain | {"sink": _empty(16)},
        "dropout": plain | {"dropout_p": 0.1},
        "packed sequences": packed,
        "packed sequences, with a bias": packed | {"bias": _empty(1, 16, 1024, 1024)},
    }


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)
