"""Many seeds from a command line: ``python -m tests.chaos --help``."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import itertools
import sys
import time
import traceback

from ._program import ALL, FEATURES, Program, of_seed, shrink
from ._world import PROMISES, Result, execute


def _seeds(text: str) -> range:
    first, _, last = text.partition(":")
    return range(int(first), int(last)) if last else range(int(first), int(first) + 1)


def _one(seed: int, features: frozenset[str], ignore: frozenset[str]) -> tuple[int, Result | None, str]:
    try:
        result = execute(of_seed(seed, features), ignore)
    except Exception:
        return seed, None, traceback.format_exc()
    result.trace = []
    return seed, result, ""


def shrunk(program: Program, promise: str, ignore: frozenset[str]) -> Program:
    """Give a simpler program that breaks the same promise."""

    def fails(candidate: Program) -> bool:
        violation = execute(candidate, ignore).violation
        return violation is not None and violation.promise == promise

    return shrink(program, fails)


def main() -> int:
    """Run, and say what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Test the client with random programs.")
    parser.add_argument("--seeds", type=_seeds, default=range(200), help="a seed, or FIRST:LAST; default 0:200")
    parser.add_argument("--jobs", type=int, default=1, help="processes; default 1")
    parser.add_argument("--only", default="", help="features, with commas; default all")
    parser.add_argument("--without", default="", help="features that are left out, with commas")
    parser.add_argument("--ignore", default="", help="promises that are not looked at, with commas")
    parser.add_argument("--shrink", action="store_true", help="give a simpler program for each failure")
    parser.add_argument("--trace", action="store_true", help="print what happened, of each failure")
    parser.add_argument("--features", action="store_true", help="list the features and the promises, and end")
    parser.add_argument("--mutations", action="store_true", help="break the client on purpose, and see it caught")
    options = parser.parse_args()
    if options.features:
        print("\n".join(f"{name:18} {text}" for name, text in FEATURES.items()))
        print(f"\npromises: {', '.join(PROMISES)}")
        return 0
    if options.mutations:
        from ._mutations import report

        return report()
    ignore = frozenset(filter(None, options.ignore.split(",")))
    only = frozenset(filter(None, options.only.split(",")))
    without = frozenset(filter(None, options.without.split(",")))
    unknown = (only | without) - ALL | (ignore - set(PROMISES))
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    features = (only or ALL) - without
    switches = "".join(
        f" --{name} {getattr(options, name)!r}" for name in ("only", "without", "ignore") if getattr(options, name)
    )
    started, failures = time.monotonic(), 0
    totals: collections.Counter[str] = collections.Counter()
    if options.jobs > 1:
        pool = concurrent.futures.ProcessPoolExecutor(options.jobs)
        results = pool.map(_one, options.seeds, itertools.repeat(features), itertools.repeat(ignore), chunksize=8)
    else:
        results = map(_one, options.seeds, itertools.repeat(features), itertools.repeat(ignore))
    for seed, result, crash in results:
        if result is None:
            print(f"seed {seed}: the tester failed:\n{crash}")
            failures += 1
            totals["the tester itself"] += 1
            continue
        totals["events"] += result.events
        totals["connections"] += result.connections
        totals["processes"] += result.processes
        totals["gaps"] += result.gaps
        totals["virtual hours"] += round(result.seconds)
        if result.violation is None:
            continue
        failures += 1
        totals[f"broken: {result.violation.promise}"] += 1
        print(
            f"seed {seed}: {result.violation}\n    python -m tests.chaos --seeds {seed} --trace{switches}", flush=True
        )
        program = of_seed(seed, features)
        if options.trace:
            print(program)
            print("\n".join(execute(program, ignore).trace))
        if options.shrink:
            simple = shrunk(program, result.violation.promise, ignore)
            again = execute(simple, ignore)
            print(f"shrunk: {again.violation}\n{simple}", flush=True)
            if options.trace:
                print("\n".join(again.trace))
    totals["virtual hours"] //= 3_600
    counts = ", ".join(f"{count} {name}" for name, count in totals.items() if "broken" not in name)
    print(f"{len(options.seeds)} programs in {time.monotonic() - started:.1f} s: {counts}; {failures} failed")
    for name, count in totals.most_common():
        if "broken" in name:
            print(f"    {name}: {count}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
