"""Puts the figures of docs/performance.json into the tables of docs/performance.md, and draws its picture.

The benchmarks write the JSON file (``nox -s bench bench-peers -- --docs``). By
hand, after a change of the file or of this script::

    python docs/figures.py

The build draws the picture (see conf.py), and a test checks the tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

HERE: Final = Path(__file__).resolve().parent
DATA: Final = HERE / "performance.json"
PAGE: Final = HERE / "performance.md"
BEFORE: Final = "before"
"""The name of results of the commit that the page compares with."""

Results = dict[str, Any]


def number(value: float | None) -> str:
    """Format a number: of one that is not whole, two digits after the point below 10, and one below 100."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Make a table of Markdown."""
    first = list(head)
    lines = [first, ["---"] * len(first), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_part(results: Results, part: str) -> dict[str, Results]:
    """Give a part of the results of each version of Python that has it, oldest first."""
    versions = sorted((name for name in results if name != BEFORE), key=lambda name: [int(n) for n in name.split(".")])
    return {name: results[name][part] for name in versions if part in results[name]}


def only(results: Results, part: str) -> Results:
    """Give a part of the results of the oldest version of Python that has it."""
    return next(iter(with_part(results, part).values()))


# ---- the tables ------------------------------------------------------------------------------------------------------


def ratios(results: Results, part: str) -> str:
    """Make the table of ratios, with two columns for each version of Python."""
    versions = with_part(results, part)
    head = ["ratio", "bar", "aim"]
    for version in versions:
        head += [f"{version}, CPU (lowest to highest)", f"{version}, wall"]
    rows = []
    for name, known in next(iter(versions.values()))["figures"].items():
        row = [name, bar(known["bar"], at_least=not known["latency"]), number(known["aim"])]
        for measured in versions.values():
            row += ratio(measured["figures"].get(name, {"skipped": "not measured"}))
        rows.append(row)
    return table(head, rows)


def ratio(one: Results) -> list[str]:
    """Make the cells of a ratio."""
    if "skipped" in one:
        return ["not measured", "-"]
    judged, spread = one["wall" if one["latency"] else "cpu"], f"({one['low']:.2f} to {one['high']:.2f})"
    cell = f"{judged:.2f} {spread}" + missed(one["meets"])
    return ["-", cell] if one["latency"] else [cell, f"{one['wall']:.2f}"]


def bar(limit: float | None, *, at_least: bool) -> str:
    """Format a bar."""
    return "-" if limit is None else f"at {'least' if at_least else 'most'} {number(limit)}"


def missed(meets: bool | None) -> str:
    """Mark what misses its bar."""
    return ", missed" if meets is False else ""


def cases(results: Results, part: str) -> str:
    """Make the table of absolute figures."""
    versions = with_part(results, part)
    head = ["loop and events"]
    for version in versions:
        head += [f"{version}, µs of CPU per event", f"{version}, events per second", f"{version}, latency p50 and p99"]
    rows = []
    for name in next(iter(versions.values()))["cases"]:
        row = [name]
        for measured in versions.values():
            one = measured["cases"].get(name, {"skipped": ""})
            if "skipped" in one:
                row += ["not measured", "-", "-"]
                continue
            latency = f"{one['p50_us']:,.0f} and {one['p99_us']:,.0f} µs" if "p50_us" in one else "-"
            row += [number(one["cpu_us"]), f"{one['per_second']:,.0f}", latency]
        rows.append(row)
    return table(head, rows)


COSTS: Final = (
    ("bare", "a bare loop, with no guarantee"),
    ("events", "all guarantees within one process: reconnecting, order, dedupe, settling, bounds"),
    ("events, SQLite", "and no loss in a crash: the position in SQLite"),
    ("events, acknowledged", "and acknowledgements, without a store"),
    ("typed", "and each payload as an object of its class"),
    ("workers", "and four workers"),
)


def costs(results: Results, part: str) -> str:
    """Make the table of what each guarantee costs."""
    known = only(results, part)["cases"]
    taken = {loop: one["cpu_us"] for name, one in known.items() for loop, _what in COSTS if is_plain(name, loop)}
    rows = []
    for loop, what in COSTS:
        beside = taken["bare" if loop == "events" else "events"]
        more = "-" if loop == "bare" else f"{taken[loop] - beside:+.1f}"
        rows.append([what, number(taken[loop]), more])
    return table(["with", "µs of CPU per event", "beside the row that it builds on"], rows)


def is_plain(name: str, loop: str) -> bool:
    """Whether a case is a loop on the usual events."""
    return name == f"{loop}; 45,000 events of 450 bytes"


def part_rows(results: Results, part: str) -> str:
    """Make the table of a part that consists of rows, with what another commit had, if that is known."""
    known = only(results, part)
    before: Results = results.get(BEFORE, {}).get(part, {})
    rows = []
    for name, one in known.items():
        if name == "about":
            continue
        if "skipped" in one:
            rows.append([name, "not measured", "-"] + ["-"] * bool(before))
            continue
        unit = f" {one['unit']}" if one["unit"] else ""
        row = [name, number(one["value"]) + unit + missed(one["meets"]), bar(one["limit"], at_least=one["at_least"])]
        if before:
            row.append(number(before[name]["value"]) + unit if "value" in before.get(name, {}) else "-")
        rows.append(row)
    return table(["", "result", "bar"] + ["before"] * bool(before), rows)


def about(results: Results, part: str) -> str:
    """Say how and with which versions a part was measured."""
    lines = []
    for one in with_part(results, part).values():
        known = one["about"]
        versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
        scale = "" if known["scale"] == 1 else f", only {known['scale']:g} times the events that are named"
        lines.append(
            f"* {known['python']}, {known['cores']} cores, {known['rounds']} round{'s'[: known['rounds'] > 1]}{scale}; load average before the run "
            f"{known['load']:.1f}; {versions}"
        )
    return "\n".join(lines)


TABLES: Final[dict[str, tuple[Callable[[Results, str], str], str]]] = {
    "about": (about, "table"),
    "ratios": (ratios, "table"),
    "peers": (ratios, "peers"),
    "cases": (cases, "table"),
    "peer cases": (cases, "peers"),
    "costs": (costs, "table"),
    "profile": (part_rows, "profile"),
    "acks": (part_rows, "acks"),
    "open": (part_rows, "open"),
    "clients": (part_rows, "clients"),
    "memory": (part_rows, "memory"),
}
"""The tables of the page, by the name in their comments: what makes each, from which part of the results."""


def fill(page: str, results: Results) -> str:
    """Replace every table of the page by that of the results; one of a part that was not measured says so."""

    def replace(match: re.Match[str]) -> str:
        make, part = TABLES[match[1]]
        made = make(results, part) if with_part(results, part) else "Not measured yet."
        return f"<!-- figures: {match[1]} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- figures: ([\w ]+) -->\n.*?<!-- end -->", replace, page, flags=re.DOTALL)


# ---- the picture -----------------------------------------------------------------------------------------------------

COLOURS: Final = ("#9db8c9", "#2b8fb3", "#e0b000", "#2a9d4a", "#b05fb3", "#c33", "#777")
LEFT, WIDTH, BAR = 110, 640, 30


def budget(results: Results) -> str:
    """Draw where the CPU time of an event goes, beside the whole in place and a bare loop."""
    profile = only(results, "profile")
    values = {name: one["value"] for name, one in profile.items() if "value" in one}
    wholes = {name: values.pop(name) for name in ("in place", "bare loop")}
    total = values.pop("sum of the stages")
    scale = WIDTH / max(total, *wholes.values())
    height = 200 + 18 * ((len(values) + 3) // 4)
    size = f'viewBox="0 0 {LEFT + WIDTH + 90} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13" role="img">',
        f"<title>CPU time of an event, in µs: {escape(', '.join(f'{n} {v:.1f}' for n, v in values.items()))}</title>",
        '<rect width="100%" height="100%" fill="#ffffff" rx="6"/>',
    ]

    def label(y: float, name: str, value: float) -> None:
        parts.append(f'<text x="{LEFT - 10}" y="{y + 20}" text-anchor="end" fill="#333">{name}</text>')
        parts.append(f'<text x="{LEFT + value * scale + 8:.1f}" y="{y + 20}" fill="#333">{value:.1f} µs</text>')

    y, x = 20.0, float(LEFT)
    label(y, "the stages", total)
    for place, (name, value) in enumerate(values.items()):
        colour = COLOURS[place % len(COLOURS)]
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{value * scale:.1f}" height="{BAR}" fill="{colour}"/>')
        x += value * scale
        column, line = place % 4, place // 4
        at = f'x="{LEFT + column * 170}" y="{170 + line * 22}"'
        parts.append(f'<rect {at} width="12" height="12" fill="{colour}"/>')
        parts.append(
            f'<text x="{LEFT + column * 170 + 18}" y="{181 + line * 22}" fill="#333">{escape(name)}, {value:.1f} µs</text>'
        )
    for name, value in wholes.items():
        y += BAR + 14
        label(y, name, value)
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR}" fill="#bbb"/>')
    parts.append("</svg>")
    return "\n".join(parts)


def read() -> Results:
    """Read the results."""
    results: Results = json.loads(DATA.read_text())
    return results


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(), read()))
