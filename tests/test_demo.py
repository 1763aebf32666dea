"""Does the demo work? A few steps of it, as a user runs it, and its check when the gradient is wrong."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

DEMO = Path(__file__).resolve().parents[1] / "examples" / "relative_bias_lm.py"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two threads crawl where other tests run beside this one
    command = [sys.executable, str(DEMO), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_demo_checks_its_gradients_learns_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "new folder" / "picture.png"
    result = run_demo("--device", "cpu", "--steps", "40", "--seconds", "120", "--output", str(picture))
    assert result.returncode == 0, result.stdout + result.stderr

    verdicts = dict(re.findall(r"^  (out|dq|dk|dv|dbias) .* (ok|WRONG)$", result.stdout, re.MULTILINE))
    assert verdicts == dict.fromkeys(("out", "dq", "dk", "dv", "dbias"), "ok")

    before, after = map(
        float, re.findall(r"Validation: (\S+) bits/char before, (\S+) after 40 steps", result.stdout)[0]
    )
    assert before > 7.9, "an untrained model cannot know which of 256 bytes comes next (8 bits)"
    assert after < 4.0, "40 steps are enough to learn how often each letter occurs"

    assert picture.read_bytes().startswith(PNG_SIGNATURE)
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(("option", "value"), [("--steps", "0"), ("--seconds", "-1")])
def test_demo_refuses_to_train_for_no_time(option: str, value: str) -> None:
    result = run_demo(option, value)
    assert result.returncode == 2
    assert "--steps must be at least 1 and --seconds above 0" in result.stderr


@pytest.mark.parametrize("wrong", [True, False])
def test_check_finds_a_wrong_bias_gradient(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("relative_bias_lm", DEMO)
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    right = demo.attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor, causal: bool, backend: str) -> Tensor:
        if wrong and backend == "auto":
            bias = bias.detach() + 0.999 * (bias - bias.detach())  # the same values, the gradient times 0.999
        return right(q, k, v, bias=bias, causal=causal, backend=backend)

    monkeypatch.setattr(demo, "attention", attention)
    assert demo.check_against_float64(torch.device("cpu"), torch.float32) is not wrong
