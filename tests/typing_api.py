"""Checked by mypy and pyright, never run: what programs do with the public types."""

from __future__ import annotations

import math
from pathlib import Path
from typing import assert_type

import trio

from kadoa_trio import (
    DeadLetterFile,
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
    process,
    stopping_on_signals,
)
from kadoa_trio.consuming import DeadLetter, DeadLetters, FailedAttempt, Processed, Replayed, Stopping
from kadoa_trio.notices import Health, Notice, PossibleGap, State
from kadoa_trio.testing import MemoryDeadLetters, SimulatedKadoa, open_simulated_kadoa


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


async def consume_in_other_shapes(realtime: Realtime) -> None:
    async with realtime.events.batch(max_events=10, within=0.5) as batch:
        assert_type(batch.events, tuple[Event, ...])
        assert_type(list(batch), list[Event])
        assert_type(batch.position, Position)
        batch.settle(*batch.events[:1])
    async for delivery in realtime.events.deliveries(dead_letters=MemoryDeadLetters()):
        async with delivery as entered:
            assert_type(entered.event, Event)
            delivery.retry(after=1.5)
            delivery.reject("no")


class Letters:
    async def add(self, letter: DeadLetter) -> None:
        print(letter.reason, letter.error)


async def handle(event: Event) -> int:
    return event.size


def note(failure: FailedAttempt) -> None:
    print(failure.error)


async def process_all() -> None:
    letters: DeadLetters = Letters()

    async def key() -> str:
        return "key"

    async with open_realtime(key, on_notice=print, redelivery=RetryPolicy(initial=1)) as realtime:
        async with stopping_on_signals(realtime, grace=5) as stopping:
            assert_type(stopping, Stopping)
            done = await process(
                realtime.events,
                handle,
                key=lambda event: event.workflow_id,
                max_attempts=3,
                dead_letters=letters,
                on_failure=note,
            )
        assert_type(done, Processed)
        assert_type(realtime.health(), Health)
        realtime.stop(retry_within=3)
    assert_type(await DeadLetterFile("dead.jsonl").replay(handle), Replayed)


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
