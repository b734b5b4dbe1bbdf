"""``kadoa-trio listen``: one JSON line an event."""

from __future__ import annotations

import json
import logging
import sys

import trio

from .._client import Realtime, open_realtime
from .._notices import Notice


async def listen(types: list[str] | None, workflows: list[str] | None, limit: int | None) -> int:
    """Print events to stdout, and what happens to the connection to stderr, until cancelled or *limit* is reached."""
    async with open_realtime(event_types=types, workflow_ids=workflows) as realtime, trio.open_nursery() as nursery:
        nursery.start_soon(_tell, realtime)
        count = 0
        async for event in realtime.events:
            # Settled by asking for the next one, so after the line is out.
            print(json.dumps(event.raw, separators=(",", ":")), flush=True)
            count += 1
            if count == limit:
                realtime.events.settle()
                break
        nursery.cancel_scope.cancel(reason="done")
    return 0


async def _tell(realtime: Realtime) -> None:
    async for notice in realtime.notices:
        if _worth_telling(notice):
            print(f"kadoa-trio: {notice}", file=sys.stderr, flush=True)


def _worth_telling(notice: Notice) -> bool:
    return notice.level >= logging.INFO
