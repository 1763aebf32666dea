"""Does each command answer, with the right exit code, and without Triton or a GPU?"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import triton_attention
from triton_attention import cli, dispatch, reference
from triton_attention.cli import main
from triton_attention.dispatch import Backend
from triton_attention.testing import Case

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two_cases(monkeypatch):
    cases = {"plain": Case(9, 9, 8, dtype=torch.float32), "biased": Case(9, 7, 8, bias="1hqk", dtype=torch.float32)}
    monkeypatch.setattr(cli, "CHECKED", cases)


def run_with(monkeypatch, run, why_not=lambda problem: []):
    monkeypatch.setattr(dispatch, "BACKENDS", (Backend("ours", why_not, run),))


def lines_of(output, verdict):
    return [line for line in output.splitlines() if line.endswith(verdict)]


def test_info(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    rows = dict(line.split(maxsplit=1) for line in output.split("\n\n")[0].splitlines())
    assert rows["triton_attention"] == triton_attention.__version__
    assert rows["torch"] == torch.__version__
    assert {"Python", "triton"} < set(rows)
    assert "batch 1, heads 8 / 8, seqlen 1024 x 1024, head dim 64 / 64, torch.bfloat16 on" in output
    assert "->" in output


def test_info_names_each_gpu(capsys, monkeypatch):
    gpu = type("Properties", (), {"name": "Some GPU", "major": 8, "minor": 6, "total_memory": 24 * 2**30})
    monkeypatch.setattr(cli, "_default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert all(f"cuda:{index}            Some GPU, compute capability 8.6, 24 GiB\n" in output for index in (0, 1))


def test_check(capsys):
    assert main(["check", "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    right = lines_of(output, "ok")
    assert len(right) == len(cli.CHECKED)
    assert all(line.startswith(name) and " reference " in line for name, line in zip(cli.CHECKED, right, strict=True))
    assert output.endswith(f"{len(cli.CHECKED)} ok, 0 WRONG, 0 refused\n")


def noisy_out(inputs, problem):
    out, lse = reference.attention(inputs, problem)
    return out + 1e-3, lse


def noisy_gradient(inputs, problem):
    inputs.k.register_hook(lambda gradient: gradient + 1e-3)
    return reference.attention(inputs, problem)


@pytest.mark.parametrize(("run", "wrong"), [(noisy_out, "out"), (noisy_gradient, "dk")])
def test_check_finds_what_is_wrong(two_cases, monkeypatch, capsys, run, wrong):
    run_with(monkeypatch, lambda inputs, problem: (run if problem.bias else reference.attention)(inputs, problem))
    assert main(["check", "--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert output.endswith("1 ok, 1 WRONG, 0 refused\n")
    (plain,) = [line for line in lines_of(output, "ok") if line.startswith("plain")]
    case, row = lines_of(output, "WRONG")  # the case's line, and below it the one of its results that is wrong
    assert " ours " in plain
    assert case.startswith("biased")
    assert row.split()[0] == wrong
    assert "9x7,head_dim=8,bias=1hqk,dtype=float32" in output


def test_a_nan_is_wrong(two_cases, monkeypatch, capsys):
    def run(inputs, problem):
        out, lse = reference.attention(inputs, problem)
        return out * float("nan"), lse

    run_with(monkeypatch, run)
    assert main(["check", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.endswith("0 ok, 2 WRONG, 0 refused\n")


@pytest.mark.parametrize("backend", ["auto", "ours"])
def test_a_refused_case_is_shown_and_no_error(two_cases, monkeypatch, capsys, backend):
    run_with(monkeypatch, reference.attention, lambda problem: ["has no bias"] if problem.bias else [])
    assert main(["check", "--device", "cpu", "--backend", backend]) == 0
    output = capsys.readouterr().out
    assert "refused\n  ours: has no bias\n" in output
    assert output.endswith("1 ok, 0 WRONG, 1 refused\n")


def test_nothing_checked_is_an_error(two_cases, monkeypatch):
    run_with(monkeypatch, reference.attention, lambda problem: ["is asleep"])
    assert main(["check", "--device", "cpu"]) == 1


def test_a_named_backend_runs(two_cases, capsys):
    assert main(["check", "--device", "cpu", "--backend", "reference"]) == 0
    assert capsys.readouterr().out.count(" reference ") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        (["check", "--backend", "fastest"], "invalid choice: 'fastest'"),
        (["check", "--device", "meta"], "must be a device that computes here, got 'meta'"),
        (["check", "--device", "toaster"], "must be a device that computes here, got 'toaster'"),
        (["info", "more"], "unrecognized arguments: more"),
    ],
)
def test_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"triton-attention {triton_attention.__version__}\n"


def pop_the_benchmarks():
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "benchmarks"}


@pytest.fixture
def no_benchmarks(monkeypatch):
    """As for an installed script: neither imported nor on the path."""
    before = pop_the_benchmarks()
    elsewhere = [path for path in sys.path if not (Path(path) / "benchmarks" / "__main__.py").exists()]
    monkeypatch.setattr(sys, "path", elsewhere)
    yield
    pop_the_benchmarks()
    sys.modules.update(before)


def test_bench_hands_its_arguments_on(no_benchmarks, tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__main__.py").write_text("def main(arguments):\n    return len(arguments)\n")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "run", "--group", "main"]) == 3


def test_bench_finds_the_repository(no_benchmarks, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "run", "--help"])
    assert stopped.value.code == 0
    assert "usage: python -m benchmarks run" in capsys.readouterr().out


def test_bench_says_where_the_benchmarks_are(no_benchmarks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "run"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "repository's root" in message


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # importing it raises, and it has no spec

from triton_attention import cli
from triton_attention.testing import Case

cli.CHECKED = {"plain": Case(9, 9, 8)}
print(cli.main(["info"]), cli.main(["check", "--device", "cpu"]))
"""


def run_python(*arguments):
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )


def test_without_triton():
    done = run_python("-c", WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr
    assert "triton            not installed\n" in done.stdout
    assert "triton is not installed" in done.stdout
    assert done.stdout.endswith("1 ok, 0 WRONG, 0 refused\n0 0\n")


def test_python_m():
    done = run_python("-m", "triton_attention", "--version")
    assert (done.returncode, done.stdout) == (0, f"triton-attention {triton_attention.__version__}\n")


def test_the_script_is_declared():
    declared = (ROOT / "pyproject.toml").read_text().split("[project.scripts]\n")[1].splitlines()[0]
    assert declared == f'triton-attention = "{main.__module__}:{main.__name__}"'
