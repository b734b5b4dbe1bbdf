"""``kadoa-trio listen``: one line per event."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal

import attrs
import trio

from .._client import open_realtime
from .._events import Event
from .._redact import Secret, revealed
from .._stores import SQLiteCursorStore
from ._output import NoticePrinter, Output, Summary, event_line, json_line

Format = Literal["auto", "text", "json"]


@attrs.frozen(kw_only=True)
class Source:
    """Which events a command receives, and where it resumes."""

    api_key: Secret | None = None
    types: tuple[str, ...] = ()
    workflows: tuple[str, ...] = ()
    since_cursor: str | None = None
    store: str | None = None
    consumer: str = "default"
    repair_gaps: bool = False

    def options(self) -> dict[str, object]:
        """Return the options for `open_realtime`."""
        return {
            "event_types": self.types or None,
            "workflow_ids": self.workflows or None,
            "resume_from": self.since_cursor,
            "cursor_store": None if self.store is None else SQLiteCursorStore(self.store),
            "consumer": self.consumer,
            "repair_gaps": self.repair_gaps,
            # A command without a position is read-only: it must not tell the server what was handled.
            "acknowledge": self.store is not None,
        }


async def follow(
    source: Source,
    limit: int | None,
    handle: Callable[[Event], Awaitable[object]],
    *beside: Callable[[trio.CancelScope], Awaitable[object]],
) -> None:
    """Handle events one by one until cancelled or *limit* is reached. An event is settled after *handle* returns.

    Args:
        source: the events to receive.
        limit: maximum number of events; None for no limit.
        handle: called with each event.
        beside: run at the same time; called with the scope whose
            cancellation ends the command.
    """
    summary = Summary()
    printer = NoticePrinter()
    async with (
        open_realtime(revealed(source.api_key), on_notice=printer, **source.options()) as realtime,  # type: ignore[arg-type]  # see options()
        trio.open_nursery() as nursery,
    ):
        for task in beside:
            nursery.start_soon(task, nursery.cancel_scope)
        try:
            async for event in realtime.events:
                await handle(event)
                summary.events += 1
                if summary.events == limit:
                    realtime.events.settle()
                    break
        finally:
            printer.stop()  # the summary is the last line
            summary.say(realtime)
        nursery.cancel_scope.cancel(reason="done")


async def listen(source: Source, *, limit: int | None, form: Format) -> int:
    """Print events to stdout, and notices to stderr, until cancelled or *limit* is reached."""
    output = Output()
    text = output.terminal if form == "auto" else form == "text"

    async def write(event: Event) -> None:
        await output.write(event_line(event, coloured=output.colours) if text else json_line(event))

    async def leave_with_reader(scope: trio.CancelScope) -> None:
        await output.wait_closed()
        scope.cancel(reason="the reader of the output has gone")

    await follow(source, limit, write, leave_with_reader)
    return 0
