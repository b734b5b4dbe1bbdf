"""Draws the documentation's pictures from recorded runs of the client, on virtual time.

Run by the build (see conf.py), and by hand for the one that the README shows::

    python docs/pictures.py docs/demo.svg
"""

from __future__ import annotations

import ast
import io
import itertools
import logging
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.sax.saxutils import escape

import figures
import trio
import trio.testing
from rich.console import Console

import kadoa_trio
from kadoa_trio import Realtime, open_realtime
from kadoa_trio._engine import _phase
from kadoa_trio._engine._ledger import Entry, Ledger
from kadoa_trio._engine._phase import TRANSITIONS, Phase
from kadoa_trio.cli._board import Board
from kadoa_trio.cli._watch import Picture
from kadoa_trio.notices import AttemptStarted, Draining, Live, Lost, Notice, Replaced
from kadoa_trio.testing import Schedule, SimulatedKadoa, open_simulated_kadoa

WIDTH, HEIGHT = 100, 28
BEGIN = datetime(2026, 1, 1, 9, 0, tzinfo=UTC)


async def record(schedule: Schedule, seconds: float, board: Board, notices: list[tuple[float, Notice]]) -> str:
    """Run a client through a schedule; fill the board; return the board's picture."""
    async with open_simulated_kadoa() as kadoa, open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime:
        await kadoa.wait_subscribed(1)
        began = trio.current_time()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(consume, realtime, board, began)
            nursery.start_soon(follow, realtime, board, notices, began)
            nursery.start_soon(publish, kadoa, began)
            nursery.start_soon(kadoa.play, schedule)
            await trio.sleep(seconds)
            nursery.cancel_scope.cancel()
        return draw(board, realtime)


def wall(began: float) -> datetime:
    return BEGIN + timedelta(seconds=trio.current_time() - began)


async def publish(kadoa: SimulatedKadoa, began: float) -> None:
    kinds = ("workflow_finished", "workflow_data_change", "workflow_finished", "workflow_failed", "workflow_recovered")
    number = 0
    while True:
        kadoa.publish(kinds[number % 5], workflow_id=f"wf_{number % 7 + 1}", timestamp=wall(began))
        number += 1
        await trio.sleep(0.4 + 0.3 * (number * 7 % 5))


async def consume(realtime: Realtime, board: Board, began: float) -> None:
    async for event in realtime.events:
        # The simulated Kadoa in memory has no network delay; this sleep stands for it.
        await trio.sleep(0.012)
        board.event(event, trio.current_time(), wall(began).timestamp())


async def follow(realtime: Realtime, board: Board, notices: list[tuple[float, Notice]], began: float) -> None:
    async for notice in realtime.notices:
        board.notice(notice, trio.current_time())
        notices.append((trio.current_time() - began, notice))


def draw(board: Board, realtime: Realtime) -> str:
    console = Console(record=True, width=WIDTH, height=HEIGHT, file=io.StringIO(), force_terminal=True)
    console.print(Picture(board, realtime, height=HEIGHT))
    svg = console.export_svg(title="kadoa-trio watch", unique_id="kadoa")
    # No fonts from other servers: a reader of the page must not cause requests to them.
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def timeline(notices: list[tuple[float, Notice]], seconds: float, schedule: Schedule) -> str:
    """Draw generations as bars in time, with the faults above them."""
    rows: dict[int, dict[str, float]] = {}
    for at, notice in notices:
        match notice:
            case AttemptStarted(generation=number):
                rows[number] = {"began": at}
            case Live(generation=number):
                rows[number]["live"] = at
            case Draining(generation=number):
                rows[number]["draining"] = at
            case Lost(generation=number) | Replaced(generation=number):
                rows[number]["ended"] = at
            case _:
                pass
    left, top, row, width = 120, 56, 30, 640
    height = top + row * len(rows) + 34

    def x(at: float) -> float:
        return round(left + at / seconds * width, 1)

    size = f'viewBox="0 0 {left + width + 30} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13" role="img">',
        "<title>Generations of connections through "
        + escape(", ".join(f"{fault.kind} at {fault.at:g} s" for fault in schedule.faults))
        + "</title>",
        '<rect width="100%" height="100%" fill="#ffffff" rx="6"/>',
    ]
    for fault in schedule.faults:
        parts.append(
            f'<line x1="{x(fault.at)}" y1="30" x2="{x(fault.at)}" y2="{height - 30}" stroke="#c33" stroke-dasharray="3 3"/>'
            f'<text x="{x(fault.at)}" y="22" text-anchor="middle" fill="#c33">{fault.kind}</text>'
        )
    for place, (number, times) in enumerate(rows.items()):
        y = top + place * row
        end = times.get("ended", seconds)
        live, draining = times.get("live", end), times.get("draining", end)
        parts.append(f'<text x="{left - 12}" y="{y + 14}" text-anchor="end" fill="#333">connection {number}</text>')
        for begin, until, colour in (
            (times["began"], live, "#e0b000"),
            (live, draining, "#2a9d4a"),
            (draining, end, "#2b8fb3"),
        ):
            if until > begin:
                parts.append(
                    f'<rect x="{x(begin)}" y="{y}" width="{max(2.0, x(until) - x(begin)):.1f}" height="18" fill="{colour}"/>'
                )
    for tick in range(0, int(seconds) + 1, 20):
        parts.append(f'<text x="{x(tick)}" y="{height - 10}" text-anchor="middle" fill="#666">{tick} s</text>')
    parts.append("</svg>")
    return "\n".join(parts)


def modules() -> str:
    """Make the table of modules from the map in the package and from the imports."""
    package = Path(kadoa_trio.__file__).parent
    top, *inner = re.split(
        r"^# (\w+), each building on those above it:$", (package / "__init__.py").read_text(), flags=re.M
    )
    parts = {
        name: re.findall(r"^#   (\w+)  +(\S.*)$", part, re.M)
        for name, part in zip(inner[::2], inner[1::2], strict=True)
    }
    named: list[tuple[str, tuple[str, str]]] = []
    for line in re.findall(r"^#   (\w+)  +(\S.*)$", top, re.M):
        named.append(("", line))
        named += [(f"{line[0]}.", part) for part in parts.get(line[0], [])]
    known = [prefix + name for prefix, (name, _what) in named]
    lines = ["| module | what it is | builds on |", "|---|---|---|"]
    for prefix, (name, what) in named:
        whole = prefix + name
        file = package / f"{whole.replace('.', '/')}.py"
        files = [file] if file.exists() else sorted((package / name).glob("*.py"))
        below: set[str] = set()
        for path in files:
            parents = path.relative_to(package).parts[:-1]
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    base = (*parents[: len(parents) - node.level + 1], *(node.module or "").split("."))
                    below.add(".".join(base))
        needs = [
            one
            for one in known
            if one != whole
            and not one.startswith(f"{whole}.")
            and (one in below or (one in ("workspace", "testing") and one in {x.split(".")[0] for x in below}))
        ]
        lines.append(f"| `{whole}` | {what} | {', '.join(f'`{one}`' for one in needs)} |")
    return "\n".join(lines) + "\n"


def phases() -> tuple[str, str]:
    """Draw the phases of a connection and their transitions; and list what each phase means."""
    source = ast.parse(Path(_phase.__file__).read_text())
    declared = next(node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "Phase").body
    meanings = {
        line.targets[0].id: text.value.value
        for line, text in itertools.pairwise(declared)
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    width, gap, top, height = 92, 22, 20, 34
    centre = {phase: 20 + place * (width + gap) + width // 2 for place, phase in enumerate(Phase)}
    total = 40 + len(centre) * (width + gap)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} 195" font-family="sans-serif" font-size="11">',
        "<title>The phases of a connection, and which may follow which</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        '<path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff" rx="6"/>',
    ]
    for phase, x in centre.items():
        parts.append(
            f'<rect x="{x - width // 2}" y="{top}" width="{width}" height="{height}" rx="6" fill="#eef4fb" stroke="#2b8fb3"/>'
            f'<text x="{x}" y="{top + 21}" text-anchor="middle" fill="#222">{phase.name.lower()}</text>'
        )
    for before, after in [(one, other) for one in Phase for other in TRANSITIONS[one]]:
        start, end = centre[before], centre[after]
        steps = after - before
        if steps == 1:
            y = top + height // 2
            path = f"M{start + width // 2},{y} L{end - width // 2},{y}"
        else:
            # Below the row; the longer a transition is, the deeper.
            y, depth = top + height, top + height + 24 * steps
            path = f"M{start},{y} C{start},{depth} {end},{depth} {end - 3 * steps},{y + 2}"
        parts.append(f'<path d="{path}" fill="none" stroke="#555" marker-end="url(#tip)"/>')
    parts.append("</svg>")
    lines = ["| phase | what it means | may be followed by |", "|---|---|---|"]
    for phase in Phase:
        following = ", ".join(one.name.lower() for one in sorted(TRANSITIONS[phase])) or "-"
        lines.append(f"| {phase.name.lower()} | {meanings[phase.name]} | {following} |")
    return "\n".join(parts), "\n".join(lines) + "\n"


def ledger() -> str:
    """Record a run of the ledger through a drain."""
    seconds = 0.0
    one = Ledger(1_000)

    def now() -> tuple[datetime, float]:
        return BEGIN + timedelta(seconds=seconds), seconds

    entries: dict[str, Entry] = {}
    lines = ["| what happens | resume cursor | saved cursor | ids settled beyond it |", "|---|---|---|---|"]

    def record_step(what: str) -> None:
        position = one.settled_position(now())
        beside = ", ".join(sorted(position.settled)) or "-"
        lines.append(f"| {what} | {one.resume_cursor or '-'} | {position.cursor or '-'} | {beside} |")

    def admit(generation: int, number: int) -> None:
        entries[f"e{number}"], _gaps = one.admit(generation, f"e{number}", f"1-{number}", now())
        record_step(f"connection {generation} delivers e{number}")

    def settle(name: str) -> None:
        one.settle(entries[name])
        record_step(f"{name} is settled")

    one.open(1)
    one.live(1, now())
    record_step("connection 1 subscribes without a cursor")
    admit(1, 1)
    admit(1, 2)
    settle("e1")
    one.open(2)
    one.live(2, now())
    record_step("connection 2 subscribes from 1-2; connection 1 is still open")
    admit(2, 4)
    settle("e4")
    admit(1, 3)
    settle("e2")
    settle("e3")
    one.repeat(1, "e4", "1-4", now())
    record_step("connection 1 delivers e4, too")
    admit(2, 5)
    settle("e5")
    one.ended(1, now())
    record_step("connection 1 ends; connection 2 leads, but a part of its replay may come after e5")
    seconds = 30.0
    one.tick(2, now())
    record_step("30 s pass without an event that steps back behind e5")
    return "\n".join(lines) + "\n"


# The client's log records would be printed into the output of the build.
logging.getLogger("kadoa_trio").addHandler(logging.NullHandler())


def draw_all(directory: Path) -> None:
    """Draw every picture into *directory*."""
    directory.mkdir(exist_ok=True)
    schedule = Schedule.parse("20 drain 8, 60 reset, 85 silence")
    board = Board(0.0)
    notices: list[tuple[float, Notice]] = []
    (directory / "watch.svg").write_text(run(schedule, 140.0, board, notices))
    (directory / "timeline.svg").write_text(timeline(notices, 140.0, schedule))
    (directory / "modules.md").write_text(modules())
    (directory / "ledger.md").write_text(ledger())
    picture, table = phases()
    (directory / "phases.svg").write_text(picture)
    (directory / "phases.md").write_text(table)
    (directory / "budget.svg").write_text(figures.budget(figures.read()))


def run(schedule: Schedule, seconds: float, board: Board, notices: list[tuple[float, Notice]]) -> str:
    clock = trio.testing.MockClock(autojump_threshold=0)

    async def main() -> str:
        board.started = trio.current_time()
        return await record(schedule, seconds, board, notices)

    return trio.run(main, clock=clock)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(
        run(Schedule.parse("15 drain 6, 40 reset, 70 drain 4, 74.5 reset"), 110.0, Board(0.0), [])
    )
