"""What a run prints, and the JSON file that it leaves for the documentation."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

TITLES: Final = {
    "open": "Opening the first client of a fresh process",
    "acks": "Acknowledgements",
    "profile": "CPU for each event",
    "clients": "Idle clients in one process",
    "memory": "Memory",
}
"""The parts that consist of rows, with their headings."""


def text(results: dict[str, Any]) -> str:
    """Format the results of a run as plain tables."""
    lines: list[str] = []
    for name in ("table", "peers"):
        if name in results:
            lines += [*_figures(results[name]["figures"]), "", *_cases(results[name]["cases"]), ""]
    for name, title in TITLES.items():
        if name in results:
            lines += [title, *_rows(results[name]), ""]
    return "\n".join(lines).rstrip()


def _figures(figures: dict[str, Any]) -> Iterator[str]:
    yield from _columns(
        ["ratio", "bar", "aim", "by CPU", "by wall", "lowest", "highest", ""],
        [
            [name, number(one["bar"]), number(one["aim"]), one["skipped"]]
            if "skipped" in one
            else [
                name,
                ("<= " if one["latency"] and one["bar"] else "") + number(one["bar"]),
                number(one["aim"]),
                *(number(one[column]) for column in ("cpu", "wall", "low", "high")),
                verdict(one["meets"]),
            ]
            for name, one in figures.items()
        ],
    )
    yield ""
    yield "By CPU: events per second of the CPU time of the client's process. By wall: events per second; for latency, time."
    yield "Bar, lowest and highest are about CPU; for latency, about wall time. Medians of rounds."


def _cases(cases: dict[str, Any]) -> Iterator[str]:
    yield from _columns(
        ["case", "µs CPU per event", "events per second", "p50 in µs", "p99 in µs"],
        [
            [name, one["skipped"]]
            if "skipped" in one
            else [
                name,
                f"{one['cpu_us']:.1f}",
                f"{one['per_second']:,.0f}",
                *(f"{one[column]:.0f}" if column in one else "" for column in ("p50_us", "p99_us")),
            ]
            for name, one in cases.items()
        ],
    )


def _rows(rows: dict[str, Any]) -> Iterator[str]:
    if "skipped" in rows:
        yield f"skipped: {rows['skipped']}"
        return
    yield from _columns(
        ["", "value", "unit", "bar", ""],
        [
            [name, one["skipped"]]
            if "skipped" in one
            else [name, number(one["value"]), one["unit"], limit(one), verdict(one["meets"])]
            for name, one in rows.items()
        ],
    )


def number(value: float | None) -> str:
    """Format a number: of one that is not whole, two digits after the point below 100."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def limit(one: dict[str, Any]) -> str:
    """Format the limit of a row."""
    return "" if one["limit"] is None else f"{'>=' if one['at_least'] else '<='} {number(one['limit'])}"


def verdict(meets: bool | None) -> str:
    """Say whether a result is as good as its bar; nothing if there is none."""
    return "" if meets is None else "ok" if meets else "MISSED"


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    # A row that ends early ends with a text in place of numbers, which makes no column wide.
    whole = [head, *(row for row in rows if len(row) == len(head))]
    widths = [max(len(row[column]) for row in whole) for column in range(len(head))]
    widths[0] = max(len(row[0]) for row in [head, *rows])
    for row in [head, *rows]:
        first, *others = row
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False))]
        yield "  ".join(cells).rstrip()


def save(path: Path, results: dict[str, Any], circumstances: dict[str, Any], name: str | None = None) -> None:
    """Put results into a JSON file; the results of other parts, and under other names, stay.

    Args:
        path: the file.
        results: by the name of the part.
        circumstances: of this run, such as the load of the machine before it.
        name: what the results are put under; None for the version of Python, such as "3.11".
    """
    whole: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    names = ("kadoa-trio", "trio", "trio-websocket", "wsproto", "msgspec", "orjson")
    about = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cores": os.cpu_count(),
        **circumstances,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    known = whole.setdefault(name or ".".join(platform.python_version_tuple()[:2]), {})
    known |= {part: result | {"about": about} for part, result in results.items()}
    path.write_text(json.dumps(whole, indent=1) + "\n")
