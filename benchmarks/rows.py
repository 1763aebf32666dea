"""What does a row of results hold, and how do rows read as tables?"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.cases import Case

# A row as it stands in the CSV, column -> text; empty where there is nothing to say. results/README.md describes them.
Row = dict[str, str]

COLUMNS = (
    *Case._fields,
    *("provider", "pass", "status", "reason"),
    *("p20_ms", "p50_ms", "p80_ms", "tflops", "share_of_ceiling", "peak_extra_mib"),
    *("ceiling_tflops", "device", "torch", "triton", "cuda", "version", "commit", "date"),
)


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a CSV. Raises ValueError if it lacks a column."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} must be written by `python -m benchmarks run`, it lacks the columns {missing}")
        return list(reader)


def grouped(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the values of these columns, in order of appearance."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def tables(rows: list[Row]) -> str:
    """One table per group: a line per case and pass, a column per provider with its TFLOP/s or its status, and the
    speed of `ours` over the fastest other provider. Below it, each reason once."""
    lines: list[str] = []
    for (group,), of_group in grouped(rows, "group").items():
        providers = list(dict.fromkeys(row["provider"] for row in of_group))
        widths = [max(9, len(provider) + 2) for provider in providers]
        heading = "".join(f"{provider:>{width}}" for provider, width in zip(providers, widths, strict=True))
        lines += ["", f"{group + ', TFLOP/s at p50':36s}{heading}   ours / best other"]
        ratios = []
        for (name, pass_name), of_pass in grouped(of_group, "name", "pass").items():
            cells = {
                row["provider"]: f"{float(row['tflops']):.4g}" if row["tflops"] else row["status"] for row in of_pass
            }
            line = "".join(f"{cells.get(p, ''):>{width}}" for p, width in zip(providers, widths, strict=True))
            best = _ours_over_best(of_pass)
            if best is not None:
                ratios.append(best[0])
                line += f"   {best[0]:.2f} {best[1]}"
            lines.append(f"{name + ' ' + pass_name:36s}{line}")
        if ratios:
            lines.append(f"geometric mean of ours / best other: {statistics.geometric_mean(ratios):.2f}")
        for (provider, status, reason), affected in grouped(of_group, "provider", "status", "reason").items():
            if reason:
                lines.append(f"  {provider} {status} in {len(affected)}: {reason}")
    return "\n".join(lines)


def _ours_over_best(of_pass: list[Row]) -> tuple[float, str] | None:
    speeds = {row["provider"]: float(row["tflops"]) for row in of_pass if row["tflops"]}
    ours = speeds.pop("ours", None)
    if ours is None or not speeds:
        return None
    best = max(speeds, key=speeds.__getitem__)
    return ours / speeds[best], best
