"""What is measured beside the table: memory, idle clients, opening, acknowledgements, and the stages of an event."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from ._figures import COUNT
from ._processes import PATIENCE, TOP, Bench
from ._server import Feed

MEMORY_EVENTS: Final = 3_000_000
THROTTLE: Final = 200
"""Token requests in a second that the server allows while many clients are opened, 1,000 in a second."""
STORM: Final = 5.0
"""Maximum number of token requests for each client, on average. 1,000 clients that all try again each second make 3."""
IDLE_SECONDS: Final = 60
ACK_RATE, ACK_SECONDS = 1_000, 15


def row(value: float | None, unit: str, limit: float | None = None, *, at_least: bool = False) -> dict[str, Any]:
    """Make a row of a table: a value, and its limit if there is one. A value of None has no meaning here."""
    meets = None
    if limit is not None and value is not None:
        meets = value >= limit if at_least else value <= limit
    return {"value": value, "unit": unit, "limit": limit, "at_least": at_least, "meets": meets}


Say = Callable[[str], None]


def memory(bench: Bench, scale: float, say: Say) -> dict[str, Any]:
    """Measure how much the peak of the memory grows after the first tenth of very many events."""
    count = max(int(MEMORY_EVENTS * scale), 10)
    say(f"{count:,} events, with a store and acknowledgements")
    result = bench.run("memory", Feed(count=count))
    if "skipped" in result:
        return result
    return {
        f"peak after {count // 10:,} events": row(result["early"], "MB"),
        f"peak after {count:,} events": row(result["peak"], "MB"),
        "growth after the first tenth": row(result["peak"] - result["early"], "MB", 2.0),
        "CPU per event": row(result["cpu"] / count * 1e6, "µs"),
    }


def clients(bench: Bench, count: int, scale: float, say: Say) -> dict[str, Any]:
    """Open many clients in a process within a second, at a server that throttles, and leave them idle."""
    results = {}
    for kind in ("bare", "client"):
        say(f"{count:,} idle connections: {kind}")
        seconds = IDLE_SECONDS * scale
        results[kind] = bench.run("idle", kind=kind, count=count, throttle=THROTTLE, seconds=seconds)
        if "skipped" in results[kind]:
            return results[kind]
    client, base = results["client"], results["bare"]
    for failure in client["failures"]:
        say(f"failure: {failure}")
    return {
        "clients, opened 1,000 in a second": row(count, ""),
        "failures": row(len(client["failures"]), "", 0),
        f"token requests for each client, {THROTTLE} a second allowed": row(client["attempts"] / count, "", STORM),
        "time until all are live": row(client["opening"], "s"),
        "CPU for opening, each": row(client["opening_cpu"] / count * 1e3, "ms"),
        "memory each": row(client["kb_each"], "KB", 75),
        "memory each, bare": row(base["kb_each"], "KB"),
        "idle CPU each, in an hour": row(client["cpu_ms_each_hour"], "ms"),
        "idle CPU each, in an hour, bare": row(base["cpu_ms_each_hour"], "ms"),
        "idle CPU, to bare": row(client["cpu_ms_each_hour"] / base["cpu_ms_each_hour"], "", 1.6),
    }


def opening(bench: Bench, rounds: int, say: Say) -> dict[str, Any]:
    """Open the first client of a fresh process, and a second one."""
    results: list[dict[str, float]] = []
    script = Path(__file__).with_name("_opening.py")
    for number in range(rounds):
        say(f"open, round {number + 1} of {rounds}")
        arguments = [sys.executable, "-P", str(script), bench.package or str(TOP), str(bench.servers.port)]
        done = subprocess.run(arguments, stdout=subprocess.PIPE, timeout=PATIENCE, check=True)
        results.append(json.loads(done.stdout))
    rows = {}
    for clock, suffix in (("wall", ""), ("CPU", "_cpu")):
        imported, first, second = (
            [1e3 * one[name + suffix] for one in results] for name in ("import", "first", "second")
        )
        rows[f"import, {clock}"] = row(statistics.median(imported), "ms")
        rows[f"first client, {clock}"] = row(statistics.median(first), "ms")
        rows[f"import and first client, {clock}"] = row(
            statistics.median(a + b for a, b in zip(imported, first, strict=True)), "ms"
        )
        rows[f"second client, {clock}"] = row(statistics.median(second), "ms")
    return rows


def acknowledgements(bench: Bench, scale: float, say: Say) -> dict[str, Any]:
    """Receive a lasting load with and without acknowledgements."""
    feed = Feed(rate=ACK_RATE, count=max(int(ACK_RATE * ACK_SECONDS * scale), 10), warm=100)
    say(f"{ACK_RATE:,} events a second, {feed.count:,} in all, with acknowledgements and without")
    results = {flag: bench.run("acknowledged", feed, acknowledge=flag) for flag in (False, True)}
    mine = results[True]
    sent = mine["acknowledged"]
    cost = (mine["cpu"] - results[False]["cpu"]) / sent * 1e6 if sent else None
    return {
        f"acknowledged, of {feed.count:,} events at {ACK_RATE:,} a second": row(sent, "", feed.count, at_least=True),
        "of these, when the last event came": row(mine["at_end"], "", int(0.95 * feed.count), at_least=True),
        "dropped": row(mine["dropped"], "", 0),
        "CPU per acknowledgement": row(cost, "µs"),
    }


def profile(bench: Bench, rounds: int, scale: float, say: Say) -> dict[str, Any]:
    """Measure the stages of an event, and a bare loop in the same rounds."""
    feed = Feed(count=max(int(COUNT * scale), 1))
    results, bare = [], []
    for number in range(rounds):
        say(f"profile, round {number + 1} of {rounds}")
        results.append(bench.run("stages", feed))
        one = bench.run("bare", feed)
        bare.append(one["cpu"] / one["events"] * 1e6)
    rows: dict[str, Any] = {}
    for stage in results[0]["stages"]:
        values = [one["stages"][stage] for one in results]
        numbers = [value for value in values if not isinstance(value, str)]
        rows[stage] = row(statistics.median(numbers), "µs") if numbers else {"skipped": values[0]}
    rows["sum of the stages"] = row(sum(one["value"] for one in rows.values() if "value" in one), "µs")
    rows["in place"] = row(statistics.median(one["whole"] for one in results), "µs")
    rows["bare loop"] = row(statistics.median(bare), "µs")
    return rows
