"""The command line: ``python -m tests.bench --help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import _report
from ._figures import FIGURES, PEERS, run_rounds
from ._processes import opened


def say(text: str) -> None:
    """Report progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure what the options name, and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Measure the client; see docs/performance.md."
    )
    parser.add_argument(
        "--peers", action="store_true", help="compare with Kadoa's official SDK, which must be installed"
    )
    parser.add_argument("--only", metavar="TEXT", help="only the figures whose names contain TEXT")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the table; the medians count (default 5)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="this part of the events only; less is not past every window"
    )
    parser.add_argument(
        "--package",
        type=Path,
        metavar="FOLDER",
        help="measure the kadoa_trio in FOLDER, not the one beside the benchmarks",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="put the results into FILE, beside what it holds of others"
    )
    options = parser.parse_args()
    package = None if options.package is None else str(options.package.resolve())
    results: dict[str, Any] = {}
    with opened(package) as bench:
        figures = PEERS if options.peers else FIGURES
        wanted = [figure for figure in figures if options.only is None or options.only in figure.name]
        results["peers" if options.peers else "table"] = run_rounds(bench, wanted, options.rounds, options.scale, say)
    print(_report.text(results))
    if options.json is not None:
        _report.save(options.json, results)


if __name__ == "__main__":
    main()
