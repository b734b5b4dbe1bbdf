"""Checked by mypy and pyright, never run: what programs do with the public types."""

from __future__ import annotations

import math
from pathlib import Path
from typing import assert_type

import trio

from kadoa_trio import (
    Event,
    EventChannel,
    Limits,
    MemoryCursorStore,
    Message,
    Position,
    Realtime,
    RetryPolicy,
    Timeouts,
    WorkflowDataChange,
    WorkflowFailed,
    open_realtime,
)
from kadoa_trio.notices import Notice, PossibleGap, State
from kadoa_trio.testing import SimulatedKadoa, open_simulated_kadoa


async def consume() -> None:
    async with open_realtime("key", event_types={"workflow_failed"}, resume_from=Position(cursor="1-0")) as realtime:
        assert_type(realtime, Realtime)
        assert_type(realtime.events, EventChannel)
        assert_type(realtime.state, State)
        channel: trio.abc.ReceiveChannel[Event] = realtime.events
        assert_type(await channel.receive(), Event)
        async for event in realtime.events:
            assert_type(event, Event)
            assert_type(event.message, Message)
            match event.message:
                case WorkflowFailed(reason=reason):
                    assert_type(reason, str)
                case WorkflowDataChange(differences=differences):
                    print(differences[0].fields[0].previous_value)
                case _:
                    pass
        async with realtime.events.delivery() as delivery:
            assert_type(delivery.event, Event)
            assert_type(delivery.attempt, int)
        async for notice in realtime.notices:
            assert_type(notice, Notice)
            if isinstance(notice, PossibleGap):
                print(notice.gap.since)


async def choose() -> None:
    async with open_realtime(
        timeouts=Timeouts(heartbeat=45, connect=math.inf),
        limits=Limits(buffered_events=100),
        retry=RetryPolicy(maximum=10),
        cursor_store=Path("positions.db"),
    ) as realtime:
        assert_type(realtime.statistics().unsaved, int)
    async with open_realtime(cursor_store="positions.db", consumer="typing"):
        pass
    async with open_realtime(cursor_store=MemoryCursorStore()):
        pass


async def rehearse() -> None:
    async with open_simulated_kadoa() as kadoa:
        assert_type(kadoa, SimulatedKadoa)
        kadoa.publish("workflow_failed")
