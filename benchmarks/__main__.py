"""Which command was asked for: run, plot, compare, features or numerics?"""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "run": "measure providers on cases and write a CSV",
    "plot": "draw a CSV as PNG and SVG",
    "compare": "speed of one CSV over another, case by case",
    "features": "what softcap, ALiBi, sink, dropout, window and packed sequences cost, and write a CSV",
    "numerics": "errors against float64 by length and data, and write a CSV",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n".join(f"{command:8s} {meaning}" for command, meaning in COMMANDS.items()),
        epilog="python -m benchmarks COMMAND --help lists a command's own arguments",
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    # Only the command that was asked for is imported: plotting needs matplotlib, the others do not.
    return int(importlib.import_module(f"benchmarks.{chosen.command}").main(chosen.arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
