"""What a run prints, and the JSON file that it leaves for the documentation."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def text(results: dict[str, Any]) -> str:
    """Format the results of a run as plain tables."""
    lines: list[str] = []
    for name in ("table", "peers"):
        if name in results:
            lines += [*_figures(results[name]["figures"]), "", *_cases(results[name]["cases"]), ""]
    return "\n".join(lines).rstrip()


def _figures(figures: dict[str, Any]) -> Iterator[str]:
    yield from _columns(
        ["ratio", "bar", "aim", "by CPU", "by wall", "lowest", "highest", ""],
        [
            [name, _number(one["bar"]), _number(one["aim"]), one["skipped"]]
            if "skipped" in one
            else [
                name,
                ("<= " if one["latency"] and one["bar"] else "") + _number(one["bar"]),
                _number(one["aim"]),
                *(_number(one[column]) for column in ("cpu", "wall", "low", "high")),
                "" if one["bar"] is None else "ok" if one["meets"] else "MISSED",
            ]
            for name, one in figures.items()
        ],
    )
    yield ""
    yield "By CPU: events per second of CPU time of the client's process; the bar is about this, for latency about wall time."


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
                *(f"{one[column]:.0f}" for column in ("p50_us", "p99_us") if column in one),
            ]
            for name, one in cases.items()
        ],
    )


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    # A text that stands in place of numbers, at the end of a row, makes no column wide.
    widths = [
        max(len(row[column]) for row in [head, *rows] if column < len(row) and (len(row) == len(head) or column == 0))
        if any(len(row) == len(head) for row in rows)
        else len(head[column])
        for column in range(len(head))
    ]
    for row in [head, *rows]:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        yield "  ".join(cells).rstrip()


def save(path: Path, results: dict[str, Any]) -> None:
    """Put results into a JSON file under the version of Python; results of other parts and versions stay."""
    whole: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    names = ("kadoa-trio", "trio", "trio-websocket", "wsproto", "msgspec", "orjson")
    about = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    version = ".".join(platform.python_version_tuple()[:2])
    whole[version] = whole.get(version, {}) | {"about": about} | results
    path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
