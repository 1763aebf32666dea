"""Did a provider become faster between two runs, and where did it become slower?"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.cases import Case
from benchmarks.rows import Row, grouped, read_rows


class Comparison(NamedTuple):
    ratios: dict[str, float]  # case and pass -> old time / new time: above 1 the new one is faster
    not_timed: dict[str, str]  # case and pass timed in one of the files only -> "old status -> new status"

    @property
    def mean(self) -> float:
        return statistics.geometric_mean(self.ratios.values())

    @property
    def worst(self) -> str:
        return min(self.ratios, key=self.ratios.__getitem__)


def compare(old: list[Row], new: list[Row], provider: str = "ours") -> Comparison:
    """Compare the p50 times of the rows of `provider` that agree in the pass and in every field of the case."""
    before, after = (_by_case(rows, provider) for rows in (old, new))
    comparison = Comparison({}, {})
    for key in dict.fromkeys((*before, *after)):
        group, name, *_, pass_name = key
        label = f"{group} {name} {pass_name}"
        statuses = [rows[key]["status"] if key in rows else "absent" for rows in (before, after)]
        if statuses == ["ok", "ok"]:
            comparison.ratios[label] = float(before[key]["p50_ms"]) / float(after[key]["p50_ms"])
        elif "ok" in statuses:
            comparison.not_timed[label] = " -> ".join(statuses)
    return comparison


def main(arguments: Sequence[str]) -> int:
    """0, or 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--provider", default="ours", help="whose rows are compared (default: %(default)s)")
    options = parser.parse_args(arguments)
    old, new = read_rows(options.old), read_rows(options.new)
    devices = [sorted({row["device"] for row in rows}) for rows in (old, new)]
    if devices[0] != devices[1]:
        print(f"WARNING: the devices differ, so the ratios say little about the code: {devices[0]} -> {devices[1]}")
    comparison = compare(old, new, options.provider)
    for label, statuses in comparison.not_timed.items():
        print(f"{label:44s} {statuses}")
    if not comparison.ratios:
        print(f"no case of {options.provider} is timed in both files")
        return 2
    for label, ratio in comparison.ratios.items():
        print(f"{label:44s} {ratio:.3f}")
    print(f"{'geometric mean':44s} {comparison.mean:.3f} of {len(comparison.ratios)}; above 1 the new one is faster")
    print(f"{'worst':44s} {comparison.ratios[comparison.worst]:.3f} {comparison.worst}")
    return 0


def _by_case(rows: list[Row], provider: str) -> dict[tuple[str, ...], Row]:
    own = [row for row in rows if row["provider"] == provider]
    return {key: same[-1] for key, same in grouped(own, *Case._fields, "pass").items()}
