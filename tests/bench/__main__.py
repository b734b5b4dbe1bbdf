"""The command line: ``python -m tests.bench --help``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from . import _further, _report
from ._figures import FIGURES, PEERS, run_rounds
from ._processes import PATIENCE, Bench, opened

BUSY: Final = 1.0
"""Above this load average, before the start, the results are worth little."""


def say(text: str) -> None:
    """Report progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure what the client costs (docs/performance.md). Without an option that names parts: the table.",
    )
    parts = parser.add_argument_group("parts")
    parts.add_argument("--table", action="store_true", help="the table of ratios")
    parts.add_argument("--peers", action="store_true", help="ratios to Kadoa's official SDK, which must be installed")
    parts.add_argument("--memory", action="store_true", help="the peak of the memory over 3,000,000 events")
    parts.add_argument(
        "--clients", type=int, metavar="NUMBER", help="this many idle clients in one process, such as 1000"
    )
    parts.add_argument("--open", action="store_true", help="the time to open the first client of a process")
    parts.add_argument("--acks", action="store_true", help="acknowledgements under a lasting load")
    parts.add_argument("--profile", action="store_true", help="the stages of an event")
    parts.add_argument("--all", action="store_true", help="everything but --peers, with 1,000 clients")
    parser.add_argument("--only", metavar="TEXT", default="", help="only ratios whose names contain TEXT")
    parser.add_argument("--rounds", type=int, default=5, metavar="NUMBER", help="the medians count (default 5)")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="FACTOR", help="this part of the events and times only"
    )
    parser.add_argument(
        "--package", type=Path, metavar="FOLDER", help="measure the kadoa_trio in FOLDER, not the one here"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="put the results into FILE, beside what it holds of others"
    )
    parser.add_argument(
        "--as", dest="name", metavar="NAME", help="under this name there (default: the version of Python)"
    )
    options = parser.parse_args(arguments)
    if options.all:
        options.table = options.memory = options.open = options.acks = options.profile = True
        options.clients = options.clients or 1_000
    named = (options.peers, options.memory, options.clients, options.open, options.acks, options.profile)
    options.table = options.table or not any(named)
    return options


def run(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts that the options name, and return their results by name."""
    rounds, scale = options.rounds, options.scale
    results: dict[str, Any] = {}
    for part, figures in (("table", FIGURES), ("peers", PEERS)):
        if getattr(options, part):
            wanted = [figure for figure in figures if options.only in figure.name]
            results[part] = run_rounds(bench, wanted, rounds, scale, say)
    if options.open:
        results["open"] = _further.opening(bench, rounds, say)
    if options.acks:
        results["acks"] = _further.acknowledgements(bench, scale, say)
    if options.profile:
        results["profile"] = _further.profile(bench, rounds, scale, say)
    if options.clients:
        results["clients"] = _further.clients(bench, options.clients, scale, say)
    if options.memory:
        results["memory"] = _further.memory(bench, scale, say)
    return results


def main(arguments: Sequence[str] | None = None, *, isolated: bool = True, patience: float = PATIENCE) -> None:
    """Measure what the options name, print it, and write it to a file if one is named.

    Args:
        arguments: of the command line; None for those of this process.
        isolated: measure each thing in a fresh process.
        patience: how long each may take, in seconds.
    """
    options = parse(arguments)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > BUSY:
        say(f"the load average is {load:.1f}: other processes share the machine, and change even the ratios")
    package = None if options.package is None else str(options.package.resolve())
    with opened(package, isolated=isolated, patience=patience) as bench:
        results = run(bench, options)
    if options.scale != 1:
        print(f"Only {options.scale:g} times the events that are named, so not past every window.\n")
    print(_report.text(results))
    if options.json is not None:
        circumstances = {"load": round(load, 1), "rounds": options.rounds, "scale": options.scale}
        _report.save(options.json, results, circumstances, options.name)


if __name__ == "__main__":
    main()
