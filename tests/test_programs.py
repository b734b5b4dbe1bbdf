"""Drawn programs: any schedule of faults and consumers against the whole client, then a quiet time.

Each example runs in memory on virtual time. At its end every event that the
client could have received was handled exactly once, no gap is reported that
was impossible, and no bound was exceeded.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from typing import Any

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from kadoa_trio import (
    CursorSession,
    CursorStoreError,
    EventChannel,
    Limits,
    MemoryCursorStore,
    Position,
    Realtime,
    Timeouts,
    open_realtime,
)
from kadoa_trio.notices import State
from kadoa_trio.testing import Faults, SimulatedKadoa, open_simulated_kadoa

SERVER_FAULTS: list[dict[str, Any]] = [
    {},
    {"token_status": 503},
    {"token_status": 429, "token_headers": {"Retry-After": "20"}},
    {"token_hang": True},
    {"token_body": b"{}"},
    {"handshake_status": 500},
    {"handshake_hang": True},
    {"refuse_connections": True},
    {"accept_then_close": 1011},
    {"accept_then_reset": True},
    {"replay_late": 3.0},
    {"replay_extra": 3},
    {"no_heartbeats": True},
]

operations = st.one_of(
    st.tuples(st.just("publish"), st.integers(1, 30)),
    st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.1, 1.0, 5.0, 11.0, 40.0, 200.0])),
    st.tuples(st.just("drain"), st.sampled_from([None, 0, 100, 5_000, 1e12]), st.sampled_from([None, 0.0, 0.2, 3.0])),
    st.tuples(st.just("close"), st.sampled_from([1000, 1001, 1008, 1011])),
    st.tuples(st.sampled_from(["reset", "eof", "silent", "heartbeat", "junk"])),
    st.tuples(st.just("repeat"), st.integers(0, 50)),
    st.tuples(st.just("faults"), st.sampled_from(SERVER_FAULTS)),
)
consumers = st.lists(st.sampled_from(["fast", "slow", "failing", "leaving"]), min_size=1, max_size=3)


class Program:
    def __init__(self, kadoa: SimulatedKadoa, realtime: Realtime) -> None:
        self.kadoa = kadoa
        self.realtime = realtime
        self.handled: list[str] = []
        self.failures = 0

    def connection(self, which: int) -> Any:
        alive = [one for one in self.kadoa.connections if not one.silent]
        return alive[which % len(alive)] if alive else None

    async def perform(self, operation: tuple[Any, ...], which: int) -> None:
        kadoa = self.kadoa
        match operation:
            case ("publish", count):
                kadoa.publish_many(count)
            case ("sleep", seconds):
                await trio.sleep(seconds)
            case ("faults", faults):
                kadoa.faults = Faults(**faults)
            case ("drain", advice, close_after) if connection := self.connection(which):
                connection.drain(advice, close_after=close_after)
            case ("close", code) if connection := self.connection(which):
                connection.close(code, "drawn")
            case ("repeat", number) if kadoa.published and (connection := self.connection(which)):
                if connection.subscribed and connection.sent:
                    connection.deliver(connection.sent[number % len(connection.sent)])
            case (action,) if connection := self.connection(which):
                call = {
                    "reset": connection.reset,
                    "eof": connection.eof,
                    "silent": connection.go_silent,
                    "heartbeat": connection.send_heartbeat,
                    "junk": lambda: connection.send_raw("null"),
                }[action]
                call()

    async def consume(self, events: EventChannel, how: str) -> None:
        async with events:
            number = 0
            while True:
                number += 1
                try:
                    with trio.move_on_after(1.5) if how == "leaving" and number % 3 == 0 else trio.CancelScope():
                        async with events.delivery() as delivery:
                            if how == "slow":
                                await trio.sleep(2)
                            if how == "failing" and number % 3 == 0:
                                self.failures += 1
                                raise ValueError("drawn")
                            if how == "leaving" and number % 3 == 0:
                                await trio.sleep(5)  # cancelled in the middle
                            self.handled.append(delivery.event.id)
                except ValueError:
                    pass


async def run(program: list[tuple[tuple[Any, ...], int]], hows: list[str], options: dict[str, Any]) -> None:
    async with open_simulated_kadoa() as kadoa:
        async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, **options) as realtime:
            await kadoa.wait_subscribed(1)
            drawn = Program(kadoa, realtime)
            first = kadoa.publish()
            async with trio.open_nursery() as nursery:
                for how in hows:
                    nursery.start_soon(drawn.consume, realtime.events.clone(), how)
                while realtime.statistics().resume_cursor is None:  # noqa: ASYNC110  # without a cursor nothing is promised
                    await trio.sleep(0.01)
                for operation, which in program:
                    await drawn.perform(operation, which)
                    check_bounds(kadoa, realtime)
                # The quiet time. A slow consumer needs two seconds per event.
                kadoa.heal()
                await trio.sleep(600 + 2.5 * len(kadoa.published))
                assert realtime.state is State.LIVE
                last = kadoa.publish()
                await trio.sleep(60)
                check_bounds(kadoa, realtime)
                nursery.cancel_scope.cancel()
            counts = Counter(drawn.handled)
            assert set(counts) == {event.id for event in kadoa.published}
            assert set(counts.values()) == {1}
            if hows == ["fast"]:
                late = any(operation[0] == "faults" and operation[1].get("replay_late") for operation, _ in program)
                assert drawn.handled == [event.id for event in kadoa.published] or late
            assert {first.id, last.id} <= set(counts)
            statistics = realtime.statistics()
            assert statistics.gap_count == 0, statistics.gaps
            assert realtime.position.cursor == last.cursor
        await trio.sleep(30)
        assert not [one for one in kadoa.connections if not one.silent]


def check_bounds(kadoa: SimulatedKadoa, realtime: Realtime) -> None:
    statistics = realtime.events.statistics()
    # Events that consumers returned count, too.
    assert statistics.buffered_events <= statistics.max_buffered_events + 3
    assert statistics.unsettled <= statistics.max_unsettled
    assert len(realtime.statistics().connections) <= 3
    now = trio.current_time()
    assert len([time for time in kadoa.attempt_times if time > now - 60]) <= 60


@settings(max_examples=60, deadline=None)
@given(
    program=st.lists(st.tuples(operations, st.integers(0, 2)), max_size=25),
    hows=consumers,
    options=st.fixed_dictionaries(
        {
            "limits": st.builds(
                Limits,
                buffered_events=st.sampled_from([1_000, 1, 5]),
                unsettled=st.sampled_from([10_000, 1, 7, 1_000]),
            ),
            "timeouts": st.builds(Timeouts, overlap=st.sampled_from([60.0, 1.0])),
        }
    ),
)
def test_any_schedule_ends_with_every_event_handled_once(
    program: list[tuple[tuple[Any, ...], int]], hows: list[str], options: dict[str, Any]
) -> None:
    trio.run(run, program, hows, options, clock=trio.testing.MockClock(autojump_threshold=0))


class FickleStore:
    """A store that is slow and fails, as drawn; a save that fails late has been written."""

    def __init__(self, moods: list[str]) -> None:
        self.inner = MemoryCursorStore()
        self.moods = itertools.cycle(moods)
        self.saved: Position | None = None

    async def open(self, team: str, consumer: str) -> CursorSession:
        return FickleSession(self, await self.inner.open(team, consumer))


class FickleSession:
    def __init__(self, store: FickleStore, inner: CursorSession) -> None:
        self.store = store
        self.inner = inner

    async def load(self) -> Position | None:
        return await self.inner.load()

    async def save(self, position: Position) -> None:
        mood = "well" if self.store.saved is None else next(self.store.moods)
        if mood == "slow":
            await trio.sleep(3)
        if mood == "fails":
            raise OSError("drawn")
        if mood == "fails late":
            await self.inner.save(position)
            self.store.saved = position
            raise OSError("drawn")
        await self.inner.save(position)
        self.store.saved = position

    async def aclose(self) -> None:
        await self.inner.aclose()


async def crash_and_restart(schedule: list[list[tuple[tuple[Any, ...], int]]], moods: list[str], repair: bool) -> None:
    """Run the program several times and kill it each time: only the last save of the store survives."""
    store = FickleStore(moods)
    handled: list[str] = []
    async with open_simulated_kadoa() as kadoa:

        async def life(program: list[tuple[tuple[Any, ...], int]], last: bool) -> None:
            made = len(kadoa.subscribed)
            async with open_realtime(
                kadoa.api_key,
                endpoints=kadoa.endpoints,
                cursor_store=store,
                timeouts=Timeouts(connect=1e6),
                repair_gaps=repair,
            ) as realtime:
                await kadoa.wait_subscribed(made + 1)
                drawn = Program(kadoa, realtime)
                drawn.handled = handled
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(drawn.consume, realtime.events.clone(), "fast")
                    if not made:
                        kadoa.publish()
                        while store.saved is None or store.saved.cursor is None:  # noqa: ASYNC110  # without a cursor nothing is promised
                            await trio.sleep(0.1)
                    for operation, which in program:
                        await drawn.perform(operation, which)
                        assert store.saved is not None
                        assert store.saved.cursor is not None
                        # Every event up to the saved position was handled.
                        known = set(handled)
                        assert set(store.saved.settled) | set(store.saved.recent) <= known
                        for event in kadoa.published:
                            if event.cursor == store.saved.cursor:
                                break
                            assert event.id in known
                    if last:
                        kadoa.heal()
                        await trio.sleep(600)
                    # The kill: from now on nothing can be saved.
                    store.moods = itertools.repeat("fails")
                    nursery.cancel_scope.cancel()

        for number, program in enumerate(schedule):
            store.moods = itertools.cycle(moods)
            with contextlib.suppress(CursorStoreError):
                await life(program, last=number == len(schedule) - 1)
            kadoa.heal()
        assert set(handled) == {event.id for event in kadoa.published}


@settings(max_examples=30, deadline=None)
@given(
    schedule=st.lists(st.lists(st.tuples(operations, st.integers(0, 2)), max_size=8), min_size=2, max_size=5),
    moods=st.lists(st.sampled_from(["well", "slow", "fails", "fails late"]), min_size=1, max_size=5).map(
        lambda moods: [*moods, "well"]
    ),
    repair=st.booleans(),
)
def test_any_schedule_of_crashes_loses_nothing(
    schedule: list[list[tuple[tuple[Any, ...], int]]], moods: list[str], repair: bool
) -> None:
    trio.run(crash_and_restart, schedule, moods, repair, clock=trio.testing.MockClock(autojump_threshold=0))
