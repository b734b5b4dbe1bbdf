"""Sends a page when a workflow fails, once, and when it works again. A crash loses no page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from kadoa_trio import (
    CursorStore,
    Event,
    SQLiteCursorStore,
    WorkflowFailed,
    WorkflowRecovered,
    open_realtime,
    stopping_on_signals,
)

Page = Callable[[str, str], Awaitable[None]]
"""Sends a text about an event. Takes the event's id, so that the receiver can drop a repeated page."""


async def handle(event: Event, page: Page) -> None:
    """Send a page for an event, if its type needs one."""
    match event.message:
        case WorkflowFailed(workflow_name=name, workflow_id=workflow, reason=reason):
            await page(event.id, f"{name or workflow} has failed: {reason}")
        case WorkflowRecovered(workflow_name=name):
            await page(event.id, f"{name} works again")


async def run(page: Page, store: CursorStore) -> None:
    """Send pages until SIGTERM, Ctrl-C or a cancellation. An event is settled when its page was sent."""
    types = ["workflow_failed", "workflow_recovered"]
    async with (
        open_realtime(event_types=types, cursor_store=store, consumer="pager") as realtime,
        stopping_on_signals(realtime),
    ):
        async for event in realtime.events:
            await handle(event, page)


async def print_page(event_id: str, text: str) -> None:
    print(text, flush=True)
    await trio.lowlevel.checkpoint()


if __name__ == "__main__":
    trio.run(run, print_page, SQLiteCursorStore("pager.db"), restrict_keyboard_interrupt_to_checkpoints=True)
