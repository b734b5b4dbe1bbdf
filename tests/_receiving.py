"""A consumer in the background that does nothing but remember, and a client that must survive a schedule with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from kadoa_trio import Realtime, open_realtime
from kadoa_trio.testing import Schedule, open_simulated_kadoa


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


def survive(schedule: Schedule) -> None:
    """Run a client through a schedule, in virtual time; fail unless it has every event once and in order after it."""

    async def main() -> None:
        async with (
            open_simulated_kadoa() as kadoa,
            open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime,
        ):
            await kadoa.wait_subscribed(1)
            async with receiving(realtime) as received, trio.open_nursery() as nursery:
                kadoa.publish()  # without a cursor nothing could be resumed
                await trio.sleep(30)
                nursery.start_soon(kadoa.play, schedule)
                for _ in range(100):
                    await trio.sleep(3)
                    kadoa.publish()
                with trio.fail_after(3600):
                    await kadoa.wait_settled()
                await trio.sleep(60)  # what comes twice would come now
            assert received == [event.id for event in kadoa.published]
            assert realtime.statistics().gap_count == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
