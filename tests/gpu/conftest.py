"""What does the GPU suite start from, and what does it leave? Poisoned memory, and tests/gpu_report.json.

The report is written with every failure and every few seconds, so that a run that is cut short leaves what it knows.
"""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
import triton

import triton_attention

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode warns at every product without it

HERE = Path(__file__).resolve().parent
REPORT = HERE.parent / "gpu_report.json"
SECONDS_BETWEEN_REPORTS = 5


def pytest_addoption(parser):
    parser.addoption("--commit", help="what the report says was tried (default: what git says of this folder)")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and PyTorch sees none"))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every torch.empty is full of NaN, so that an output that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


class Report:
    """Counts outcomes, and writes them."""

    def __init__(self, commit):
        self.commit = commit
        self.started = self.written = time.time()
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.failures, self.skips = [], {}

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        self.outcomes[report.outcome] += 1
        if report.failed:
            words = report.longreprtext.splitlines()
            reason = "; ".join(line[1:].strip() for line in words if line.startswith("E ")) or "".join(words[-1:])
            self.failures.append(f"{report.nodeid}: {reason[:500]}")
        if report.skipped:
            skipped = isinstance(report.longrepr, tuple)  # else it failed, as it says that it does
            reason = report.longrepr[2] if skipped else f"expected to fail: {report.wasxfail}"
            self.skips[reason] = self.skips.get(reason, 0) + 1
        if report.failed or time.time() - self.written > SECONDS_BETWEEN_REPORTS:
            self.write(finished=False)

    def pytest_sessionfinish(self, exitstatus):
        self.write(finished=exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))

    def write(self, finished):
        if not torch.cuda.is_available():
            return
        self.written = time.time()
        report = {
            "commit": self.commit,
            "finished": finished,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "device": torch.cuda.get_device_name(),
            "triton_attention": triton_attention.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "seconds": round(time.time() - self.started),
            **self.outcomes,
            "failures": self.failures,
            "skip_reasons": self.skips,
        }
        REPORT.write_text(json.dumps(report, indent=2) + "\n")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # with several processes, the one that collects what they report
        config.pluginmanager.register(Report(config.getoption("--commit") or _commit()))


def _commit():
    """The commit that was tried; "-dirty" where the sources differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown: not a git checkout"
