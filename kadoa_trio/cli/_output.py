"""What is written where: data to stdout without blocking Trio, news to stderr, colours only for a terminal."""

from __future__ import annotations

import logging
import os
import stat
import sys
import time

import click
import trio

from .._client import Realtime
from .._events import Event, Message, WorkflowDataChange, WorkflowFailed, WorkflowFinished, WorkflowRecovered
from .._redact import presentable
from ..notices import Notice

_COLOURS = {
    "workflow_failed": "red",
    "workflow_recovered": "green",
    "workflow_finished": "green",
    "workflow_data_change": "cyan",
}


_MAX_LINE = 2_000


def say(text: str) -> None:
    """Tell something on stderr, in one line: nothing in *text* reaches a terminal as a server or a file wrote it."""
    print(f"kadoa-trio: {presentable(text, _MAX_LINE)}", file=sys.stderr, flush=True)


class LogFormatter(logging.Formatter):
    """Keeps the message of a record in one printable line; libraries below log what servers send."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format a record without its traceback, which is ours and keeps its lines."""
        return presentable(super().formatMessage(record), _MAX_LINE)


def colours(descriptor: int) -> bool:
    """Tell whether to colour what is written to a file descriptor. See https://no-color.org."""
    return os.isatty(descriptor) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Output:
    """Stdout. A reader that is slow holds up the writer, and nothing else."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._descriptor = 1
        self.terminal: bool = os.isatty(self._descriptor)
        self.colours: bool = colours(self._descriptor)

    async def write(self, line: str) -> None:
        """Write a line, all of it. Cancellation abandons the write.

        Raises:
            BrokenPipeError: the reader has gone.
        """
        # In a thread, and past Python's buffer, whose lock an abandoned thread would keep until the exit.
        data = (line + "\n").encode(errors="backslashreplace")
        await trio.to_thread.run_sync(_write_all, self._descriptor, data, abandon_on_cancel=True)

    async def wait_closed(self) -> None:
        """Wait until the reader of a pipe has gone, where the system tells; else for ever."""
        if sys.platform == "linux" and stat.S_ISFIFO(os.fstat(self._descriptor).st_mode):
            # The writing end of a pipe is "readable" when it is broken, and only then.
            await trio.lowlevel.wait_readable(self._descriptor)
        else:
            await trio.sleep_forever()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


async def tell(realtime: Realtime) -> None:
    """Tell on stderr what happens to the connection."""
    async for notice in realtime.notices:
        if worth_telling(notice):
            say(str(notice))


def worth_telling(notice: Notice) -> bool:
    """Tell whether a notice is for people."""
    return notice.level >= logging.INFO


def event_line(event: Event, *, coloured: bool = False) -> str:
    """Write an event in one line for people: when, what, which workflow, and the one thing that matters."""
    # Nothing that a server sends reaches a terminal as it came: it could hold control characters.
    workflow = presentable(event.workflow_id or "-", 40)
    kind = f"{presentable(event.type, 40):<20}"
    if coloured:
        kind = click.style(kind, fg=_COLOURS.get(event.type, "yellow"))
    late = "  (from the log)" if event.from_log else ""
    return f"{when(event)}  {kind}  {workflow:<12}  {detail(event.message)}{late}".rstrip()


def when(event: Event) -> str:
    """Write an event's time, in the zone of the machine."""
    if event.timestamp is None:
        return f"{'(no time)':<19}"
    try:
        return event.timestamp.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):  # a year that the zone does not reach
        return event.timestamp.strftime("%Y-%m-%d %H:%M:%S")


def detail(message: Message) -> str:
    """Say the one thing that matters about a message."""
    match message:
        case WorkflowFailed(reason=reason):
            return presentable(reason, 200)
        case WorkflowRecovered(source=source):
            return f"works again: {presentable(source, 120)}"
        case WorkflowFinished():
            return presentable(str(message.state or message.id or ""), 80)
        case WorkflowDataChange(differences=differences):
            counts: dict[str, int] = {}
            for difference in differences:
                counts[difference.type] = counts.get(difference.type, 0) + 1
            each = ", ".join(f"{count} {presentable(kind, 20)}" for kind, count in counts.items())
            return f"{len(differences)} difference{'' if len(differences) == 1 else 's'}" + (
                f": {each}" if each else ""
            )
    return "" if message.untyped_because is None else f"not typed: {presentable(message.untyped_because, 120)}"


class Summary:
    """What a run came to, told at its end however it ends."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.events = 0

    def tell(self, realtime: Realtime) -> None:
        statistics = realtime.statistics()
        seconds = time.monotonic() - self._began
        parts = [
            f"{self.events} event{'' if self.events == 1 else 's'} in {seconds:.0f} s",
            f"{statistics.opened} connection{'' if statistics.opened == 1 else 's'}",
        ]
        if statistics.gap_count:
            parts.append(f"{statistics.gap_count} possible gap{'' if statistics.gap_count == 1 else 's'}")
        if realtime.position.cursor is not None:
            parts.append(f"cursor {presentable(realtime.position.cursor, 80)}")
        say("; ".join(parts))
