"""A consumer in the background that does nothing but remember."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from kadoa_trio import Realtime


@asynccontextmanager
async def receiving(realtime: Realtime) -> AsyncIterator[list[str]]:
    """Receive and settle everything for the length of a block, and give the ids in the order in which they came."""
    received: list[str] = []

    async def consume() -> None:
        async for event in realtime.events:
            received.append(event.id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(consume)
        yield received
        nursery.cancel_scope.cancel()
