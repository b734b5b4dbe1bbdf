"""A test of a handler that fails twice, in virtual time."""

import pytest
import trio
from trio.testing import MockClock

from kadoa_trio import Event, open_realtime, process
from kadoa_trio.testing import SimulatedKadoa


@pytest.mark.trio
async def test_event_that_failed_twice_is_handled(simulated_kadoa: SimulatedKadoa, autojump_clock: MockClock) -> None:
    attempts: list[str] = []

    async def handle(event: Event) -> None:
        attempts.append(event.id)
        if len(attempts) < 3:
            raise OSError("not yet")

    async with open_realtime() as realtime, trio.open_nursery() as nursery:
        nursery.start_soon(process, realtime.events, handle)
        await simulated_kadoa.wait_subscribed(1)
        event = simulated_kadoa.publish("workflow_failed")
        await simulated_kadoa.wait_settled(event)
        realtime.stop()
    assert attempts == [event.id] * 3
