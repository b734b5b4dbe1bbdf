"""``kadoa-trio forward``: every event to a webhook endpoint, or dead letters again."""

from __future__ import annotations

import trio

from .._client import open_realtime
from .._forward import open_forwarder
from ._listen import Source
from ._output import Summary, say, tell


async def forward(
    source: Source, url: str, *, timeout: float, max_attempts: int | None, dead_letters: str, limit: int | None
) -> int:
    """Post events to *url* until cancelled or *limit* is reached."""
    summary = Summary()
    async with (
        open_forwarder(
            url,
            timeout=timeout,
            max_attempts=max_attempts,
            dead_letters=dead_letters,
            on_failure=lambda failed: say(str(failed)),
        ) as forwarder,
        open_realtime(source.api_key, **source.options()) as realtime,  # type: ignore[arg-type]  # see options()
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(tell, realtime)
        try:
            async for event in realtime.events:
                await forwarder.forward(event)
                summary.events += 1
                if summary.events == limit:
                    realtime.events.settle()
                    break
        finally:
            summary.tell(realtime)
            say(f"{forwarder.delivered} delivered, {forwarder.dead} put aside, {forwarder.failures} failed attempts")
        nursery.cancel_scope.cancel(reason="done")
    if forwarder.dead:
        say(f"`kadoa-trio forward --replay {dead_letters} URL` sends what was put aside again")
    return 0


async def replay(file: str, url: str, *, timeout: float, max_attempts: int | None) -> int:
    """Post dead letters again; the exit code is 1 if some are left."""
    async with open_forwarder(
        url,
        timeout=timeout,
        max_attempts=max_attempts,
        dead_letters=file,
        on_failure=lambda failed: say(str(failed)),
    ) as forwarder:
        done = await forwarder.replay(file)
    unreadable = f", {done.unreadable} of them unreadable" if done.unreadable else ""
    say(f"{done.delivered} delivered, {done.remaining} left in {file}{unreadable}")
    return 1 if done.remaining else 0
