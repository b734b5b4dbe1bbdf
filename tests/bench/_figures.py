"""The figures of the table: each is one loop compared to another one in the same round of the same run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import attrs

from ._processes import Bench
from ._server import Feed

COUNT: Final = 45_000
LONG: Final = 300_000
"""Past every window of the client; the largest is `Limits.dedupe_window`, of 50,000 ids."""
LARGE: Final = 500_000
"""The size of a large event, in bytes."""
LATENCY_RATE: Final = 500


@attrs.frozen
class Case:
    """One loop on one feed."""

    loop: str
    feed: Feed = attrs.field(factory=lambda: Feed(count=COUNT))

    @property
    def name(self) -> str:
        """How the case is named in tables."""
        feed = self.feed
        size = f"{feed.size:,} bytes" if feed.size < 10_000 else f"{feed.size // 1_000:,} KB"
        rate = f", {feed.rate:,} a second" if feed.rate else ""
        return f"{self.loop}; {feed.count:,} events of {size}{rate}"

    def scaled(self, factor: float) -> Case:
        """Give the same case with a part of its events."""
        feed = self.feed
        count, warm = (max(1, math.ceil(number * factor)) for number in (feed.count, feed.warm))
        return attrs.evolve(self, feed=attrs.evolve(feed, count=count, warm=warm))


@attrs.frozen
class Figure:
    """A ratio of two cases: of events per second, or of latencies (`latency`)."""

    name: str
    case: Case
    to: Case
    bar: float | None = None
    """The worst acceptable ratio."""
    aim: float | None = None
    latency: bool = False

    def ratio(self, mine: dict[str, Any], base: dict[str, Any], clock: str) -> float:
        """Compare two results of the same round, by the clock ``"cpu"`` or ``"wall"``, or ``"p50"``."""
        if self.latency:
            return float(mine["p50"] / base["p50"])
        return float((mine["events"] / mine[clock]) / (base["events"] / base[clock]))

    def meets(self, ratio: float, limit: float) -> bool:
        """Whether a ratio, rounded as it is shown, is as good as a limit."""
        return round(ratio, 2) <= limit if self.latency else round(ratio, 2) >= limit


BARE: Final = Case("bare")
EVENTS: Final = Case("events")
_LARGE: Final = Feed(size=LARGE, warm=10, count=300)
_PACED: Final = Feed(rate=LATENCY_RATE, warm=100, count=2_000)
_NAMELESS: Final = Feed(count=COUNT, id_field="eventId")

FIGURES: Final = (
    Figure("450-byte events, to the bare loop", EVENTS, BARE, 1.7, 2.0),
    Figure("batches, to the bare loop", Case("batches"), BARE, 4.0, 5.0),
    Figure("300,000 events, to 45,000 events", Case("events", Feed(count=LONG)), EVENTS, 0.93, 1.0),
    Figure("with a SQLite store, to the bare loop", Case("events, SQLite"), BARE, 1.5, 2.0),
    Figure("with acknowledgements (default), to the bare loop", Case("events, acknowledged"), BARE, 1.2, 1.6),
    Figure("with TLS, to the bare loop with TLS", Case("events, TLS"), Case("bare, TLS"), 1.5, 1.7),
    Figure("four workers, to the bare loop", Case("workers"), BARE, 1.5, 1.8),
    Figure("`process` with eight workers and keys, to the bare loop", Case("process"), BARE, 1.2, 1.5),
    Figure("`event.message` read, to the bare loop", Case("typed"), BARE, 1.0, 1.4),
    Figure("500 KB events, to the bare loop", Case("events", _LARGE), Case("bare", _LARGE), 1.4, 1.7),
    Figure("latency p50, to the bare loop", Case("events", _PACED), Case("bare", _PACED), 1.1, 1.0, latency=True),
)
PEERS: Final = (
    Figure("450-byte events, to the official SDK", EVENTS, Case("official", _NAMELESS), 1.15, 1.4),
    Figure("450-byte events, to the official SDK with ids, silenced", EVENTS, Case("official, silenced")),
    Figure("batches, to the official SDK", Case("batches"), Case("official", _NAMELESS)),
    Figure("450-byte events, to the bare loop", EVENTS, BARE, 1.7, 2.0),
    Figure(
        "latency p50, to the official SDK",
        Case("events", _PACED),
        Case("official", attrs.evolve(_PACED, id_field="eventId")),
        latency=True,
    ),
)


def run_rounds(
    bench: Bench, figures: Sequence[Figure], rounds: int, scale: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure every case of *figures* once a round, so that what disturbs the machine disturbs all of them.

    Returns:
        For JSON: ``figures``, each with the medians of its ratios over the
        rounds, and ``cases``, each with the medians of its own figures.
    """
    cases = list(dict.fromkeys(case for figure in figures for case in (figure.to, figure.case)))
    results: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(1, rounds + 1):
        for case in cases:
            small = case.scaled(scale)
            result = bench.run(small.loop, small.feed)
            results[case].append(result)
            say(f"round {number} of {rounds}: {small.name}: {_brief(result)}")
    return {
        "figures": {figure.name: _compare(figure, results[figure.case], results[figure.to]) for figure in figures},
        "cases": {case.name: _absolute(results[case]) for case in cases},
    }


def _brief(result: dict[str, Any]) -> str:
    if "skipped" in result:
        return f"skipped, because {result['skipped']}"
    if "p50" in result:
        return f"p50 {result['p50']:.0f} µs"
    return f"{result['cpu'] / result['events'] * 1e6:.1f} µs CPU per event, {result['events'] / result['wall']:,.0f} a second"


def _skipped(results: Iterable[dict[str, Any]]) -> str | None:
    return next((result["skipped"] for result in results if "skipped" in result), None)


def _compare(figure: Figure, mine: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    known = {"bar": figure.bar, "aim": figure.aim, "latency": figure.latency}
    skipped = _skipped([*mine, *base])
    if skipped is not None:
        return known | {"skipped": skipped}
    pairs = list(zip(mine, base, strict=True))
    ratios = {clock: sorted(figure.ratio(*pair, clock) for pair in pairs) for clock in ("cpu", "wall")}
    judged = ratios["wall" if figure.latency else "cpu"]
    return known | {
        "cpu": None if figure.latency else statistics.median(ratios["cpu"]),
        "wall": statistics.median(ratios["wall"]),
        "low": judged[0],
        "high": judged[-1],
        "meets": None if figure.bar is None else figure.meets(statistics.median(judged), figure.bar),
    }


def _absolute(results: list[dict[str, Any]]) -> dict[str, Any]:
    skipped = _skipped(results)
    if skipped is not None:
        return {"skipped": skipped}
    absolute = {
        "cpu_us": statistics.median(result["cpu"] / result["events"] * 1e6 for result in results),
        "per_second": statistics.median(result["events"] / result["wall"] for result in results),
    }
    for name in ("p50", "p99"):
        if name in results[0]:
            absolute[f"{name}_us"] = statistics.median(result[name] for result in results)
    return absolute
