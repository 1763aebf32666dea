"""What do the numbers of a CSV look like? Draws a PNG and an SVG for each group and pass; measures nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from benchmarks.rows import Row, grouped, read_rows

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same CSV gives the same file

from matplotlib import pyplot  # noqa: E402  (after the choice of the backend)
from matplotlib.patches import Patch  # noqa: E402

CASES_A_LINE = 6
PASS_TITLES = {"fwd": "forward", "bwd": "backward", "bwd_db": "backward with the gradient of the bias"}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--output", type=Path, help="folder for the pictures (default: the CSV's)")
    options = parser.parse_args(arguments)
    folder = options.output or options.csv.parent
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_rows(options.csv)
    # a provider keeps its colour in every picture
    colours = {provider: f"C{number}" for number, (provider,) in enumerate(grouped(rows, "provider"))}
    for (group, pass_name), chosen in grouped(rows, "group", "pass").items():
        timed = [row for row in chosen if row["status"] == "ok"]
        if not timed:
            print(f"{group} {pass_name}: no provider was timed, no picture")
            continue
        stem = folder / f"{options.csv.stem}_{group}_{pass_name}"
        draw(timed, f"{group}, {PASS_TITLES[pass_name]}", colours, stem)
        print(f"{stem}.png {stem}.svg")
    return 0


def draw(rows: list[Row], title: str, colours: dict[str, str], stem: Path) -> None:
    """Bars of TFLOP/s at the median, side by side for the providers of a case; whiskers from p20 to p80."""
    cases = [name for (name,) in grouped(rows, "name")]
    providers = [provider for provider in colours if (provider,) in grouped(rows, "provider")]
    lines = [cases[start : start + CASES_A_LINE] for start in range(0, len(cases), CASES_A_LINE)]
    width = max(6.5, 1.0 + 0.24 * len(lines[0]) * len(providers))  # inches: the number above each bar can be read
    figure, all_axes = pyplot.subplots(
        len(lines), figsize=(width, 1.4 + 2.6 * len(lines)), sharey=True, squeeze=False, layout="constrained"
    )
    for line, axes in zip(lines, all_axes[:, 0], strict=True):
        bar = 0.85 / len(providers)  # of the unit between two cases
        for place, provider in enumerate(providers):
            own = [row for row in rows if row["provider"] == provider and row["name"] in line]
            centres = [line.index(row["name"]) + (place - (len(providers) - 1) / 2) * bar for row in own]
            speeds = [float(row["tflops"]) for row in own]
            # TFLOP/s = FLOPs / time, so the speed at another percentile of the time follows from the speed at p50
            slow = [s - s * _faster_than_p50(row, "p80_ms") for s, row in zip(speeds, own, strict=True)]
            fast = [s * _faster_than_p50(row, "p20_ms") - s for s, row in zip(speeds, own, strict=True)]
            bars = axes.bar(
                centres, speeds, bar, color=colours[provider], yerr=(slow, fast), error_kw={"linewidth": 0.7}
            )
            axes.bar_label(bars, fmt="{:.3g}", fontsize=7, rotation=90, padding=3)
        axes.set_xticks(range(len(line)), line, fontsize=8)
        axes.set_xlim(-0.5, len(lines[0]) - 0.5)  # the last line may be shorter
        axes.set_ylabel("TFLOP/s")
        axes.margins(y=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    first = rows[0]
    versions = f"torch {first['torch']}, triton {first['triton']}, cuda {first['cuda']}, commit {first['commit']}"
    figure.suptitle(f"{title}\n{first['device']}\n{versions}", fontsize=9)
    handles = [Patch(color=colours[provider], label=provider) for provider in providers]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(f"{stem}.png", dpi=150)
    figure.savefig(f"{stem}.svg", metadata={"Date": None})
    pyplot.close(figure)


def _faster_than_p50(row: Row, percentile: str) -> float:
    """The speed at a percentile of the time over that at the median; 1 where the median alone was kept."""
    return float(row["p50_ms"]) / float(row[percentile] or row["p50_ms"])
