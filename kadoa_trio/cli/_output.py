"""Output: data to stdout without blocking Trio, messages to stderr, colours in a terminal only."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import stat
import sys
import time

import click
import trio

from .._client import Realtime
from .._events import (
    Event,
    Message,
    OtherMessage,
    WorkflowDataChange,
    WorkflowFailed,
    WorkflowFinished,
    WorkflowRecovered,
)
from .._redact import presentable
from .._webhooks import strict_json
from ..notices import Failed, Notice, Stopped

_COLOURS = {
    "workflow_failed": "red",
    "workflow_recovered": "green",
    "workflow_finished": "green",
    "workflow_data_change": "cyan",
}


_MAX_LINE = 2_000


def say(text: str) -> None:
    """Print a message to stderr, in one line. Control characters in *text* never reach the terminal."""
    print(f"kadoa-trio: {presentable(text, _MAX_LINE)}", file=sys.stderr, flush=True)


class LogFormatter(logging.Formatter):
    """Formats a record in one printable line, because libraries log texts that servers send."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format a record without its traceback. The traceback is added later, with its line breaks."""
        return presentable(super().formatMessage(record), _MAX_LINE)


def colours(descriptor: int) -> bool:
    """Return whether output to a file descriptor is coloured. See https://no-color.org."""
    return os.isatty(descriptor) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Output:
    """Standard output. A slow reader blocks the writing task only, not the event loop."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._descriptor = 1
        self.terminal: bool = os.isatty(self._descriptor)
        self.colours: bool = colours(self._descriptor)

    async def write(self, line: str) -> None:
        """Write a whole line. Cancellation abandons the write.

        Raises:
            BrokenPipeError: the reader has closed the pipe.
        """
        # In a thread, and without Python's buffer, whose lock an abandoned thread would hold until the exit.
        data = (line + "\n").encode(errors="backslashreplace")
        await trio.to_thread.run_sync(_write_all, self._descriptor, data, abandon_on_cancel=True)

    async def wait_closed(self) -> None:
        """Wait until the reader has closed the pipe; for ever on systems other than Linux, and without a pipe."""
        if sys.platform == "linux" and stat.S_ISFIFO(os.fstat(self._descriptor).st_mode):
            # The writing end of a pipe becomes "readable" only when the reading end is closed.
            await trio.lowlevel.wait_readable(self._descriptor)
        else:
            await trio.sleep_forever()


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class NoticePrinter:
    """Prints notices to stderr, as ``on_notice`` of a client, until it is stopped."""

    def __init__(self) -> None:
        self._stopped = False

    def __call__(self, notice: Notice) -> None:
        """Print a notice, unless the command itself says how it ends."""
        if not self._stopped and is_for_people(notice) and not isinstance(notice, Failed | Stopped):
            with contextlib.suppress(OSError, ValueError):  # a closed stderr does not end the client
                say(str(notice))

    def stop(self) -> None:
        """Print nothing from now on: something else shows them, or the command has ended."""
        self._stopped = True


def is_for_people(notice: Notice) -> bool:
    """Return whether a notice is shown to people: not if it is for debugging."""
    return notice.level >= logging.INFO


def event_line(event: Event, *, coloured: bool = False) -> str:
    """Format an event as one line for people: time, type, workflow, and the most important detail."""
    # No text of the server is printed unchanged, because it may contain control characters.
    workflow = presentable(event.workflow_id or "-", 40)
    kind = f"{presentable(event.type, 40):<20}"
    if coloured:
        kind = click.style(kind, fg=_COLOURS.get(event.type, "yellow"))
    late = "  (from the log)" if event.from_log else ""
    return f"{when(event)}  {kind}  {workflow:<12}  {detail(event.message)}{late}".rstrip()


def json_line(event: Event) -> str:
    """Format an event as one line of strict JSON. In ASCII, because other characters may control a terminal."""
    return re.sub("[^\\x00-\\x7f]+", lambda match: json.dumps(match[0])[1:-1], strict_json(event.raw).decode())


def when(event: Event) -> str:
    """Format an event's time, in the time zone of the machine."""
    if event.timestamp is None:
        return f"{'(no time)':<19}"
    try:
        return event.timestamp.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):  # a year that the time zone does not support
        return event.timestamp.strftime("%Y-%m-%d %H:%M:%S")


def detail(message: Message) -> str:
    """Format the most important detail of a message; empty for a class that has no format here."""
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
        case OtherMessage(untyped_because=str(reason)):
            return f"not typed: {presentable(reason, 120)}"
    return ""


class Summary:
    """Counts the events of a command, and prints a summary when the command ends, for whatever reason."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.events = 0

    def say(self, realtime: Realtime) -> None:
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
