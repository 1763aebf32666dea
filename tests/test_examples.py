"""Do the examples work? A few steps of each, as a user runs it, and its check when a gradient is wrong."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
RESULTS = {  # of each example, what its check compares; relative_bias_lm.py has a file of its own, test_demo.py
    "triangle_attention": ("out", "dq", "dk", "dv", "dbias"),
    "long_context_lm": ("out", "dq", "dk", "dv"),
}


def run_example(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two threads crawl where other tests run beside this one
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*RESULTS, "relative_bias_lm"}


@pytest.mark.parametrize("name", RESULTS)
def test_an_example_checks_itself_trains_and_draws(name, tmp_path):
    picture = tmp_path / "new folder" / "picture.png"
    shorter = ["--seqlen", "64"] if name == "long_context_lm" else []
    result = run_example(name, "--device", "cpu", "--steps", "30", "--output", str(picture), *shorter)
    assert result.returncode == 0, result.stdout + result.stderr

    verdicts = dict(re.findall(r"^  (out|dq|dk|dv|dbias) .* (ok|WRONG)$", result.stdout, re.MULTILINE))
    assert verdicts == dict.fromkeys(RESULTS[name], "ok")
    steps = re.findall(r"^ +(\d+) +(\d+\.\d+) +[\d,]+ +(\d+)%$", result.stdout, re.MULTILINE)
    assert steps[-1][::2] == ("30", "100")
    assert float(steps[-1][1]) < 0.9 * float(steps[0][1]), "it learns"
    assert f"Picture: {picture}" in result.stdout
    assert picture.read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize(("option", "value"), [("--steps", "0"), ("--seconds", "-1")])
def test_an_example_refuses_to_train_for_no_time(name, option, value):
    result = run_example(name, option, value)
    assert result.returncode == 2
    assert "--steps must be at least 1 and --seconds above 0" in result.stderr


@pytest.mark.parametrize("seqlen", ["7", "1000000"])
def test_a_context_that_does_not_fit_the_text_is_refused(seqlen):
    result = run_example("long_context_lm", "--device", "cpu", "--seqlen", seqlen)
    assert result.returncode == 2
    assert "--seqlen must be from 8 to" in result.stderr


@pytest.mark.parametrize("wrong", [True, False])
@pytest.mark.parametrize("name", RESULTS)
def test_the_check_finds_a_wrong_gradient(name, wrong, monkeypatch):
    example = load_example(name)
    right = example.attention

    def attention(q, k, v, **options):
        if wrong:
            k = k.detach() + 0.999 * (k - k.detach())  # the same values, the gradient times 0.999
        return right(q, k, v, **options)

    monkeypatch.setattr(example, "attention", attention)
    assert example.check_against_float64(torch.device("cpu"), torch.float32) is not wrong


def test_the_structures_are_whole():
    """Each title says how many residues follow, and neighbours that were resolved are 3.8 Angstrom apart."""
    example = load_example("triangle_attention")
    titles = re.findall(r"^>(\w+) \w (\d+)$", example.STRUCTURES.read_text(), re.MULTILINE)
    chains = example.read_chains(example.STRUCTURES)
    assert {name: int(residues) for name, residues in titles} == {name: len(chain) for name, chain in chains.items()}
    assert set(example.HELD_OUT) < set(chains)
    for name, chain in chains.items():
        assert (chain[1:] - chain[:-1]).norm(dim=-1).median().sub(3.8).abs() < 0.1, name
