"""The whole client on virtual time, against servers that the specification allows and the simulator does not imitate.

Each test names a promise. The test plays the server, connection by connection:
the simulated Kadoa takes the cursor and replays nothing, and the test sends
what such a server would send.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from kadoa_trio import (
    AuthenticationError,
    ConfigurationError,
    GapReason,
    Limits,
    MemoryCursorStore,
    Realtime,
    RequestRefusedError,
    Timeouts,
    open_realtime,
)
from kadoa_trio.notices import (
    ConnectionAged,
    CursorAccepted,
    CursorDropped,
    EventLoopBlocked,
    FirstStart,
    HeldEventsReleased,
    Lost,
    Notice,
    PossibleGap,
    State,
)
from kadoa_trio.testing import Faults, PublishedEvent, SimulatedConnection, SimulatedKadoa, open_simulated_kadoa

DAY = 86_400.0


class Consumer:
    """Receives and settles every event, one per *pace* seconds; remembers the ids in their order."""

    def __init__(self, realtime: Realtime, pace: float = 0.0) -> None:
        self.realtime = realtime
        self.pace = pace
        self.ids: list[str] = []

    async def run(self) -> None:
        async for event in self.realtime.events:
            self.ids.append(event.id)
            if self.pace:
                await trio.sleep(self.pace)


def ids(events: list[PublishedEvent]) -> list[str]:
    return [event.id or "" for event in events]


def notices(realtime: Realtime, kind: type[Notice]) -> list[Any]:
    """Take all notices; return those of one kind."""
    found = []
    try:
        while True:
            found.append(realtime.notices.receive_nowait())
    except (trio.WouldBlock, trio.EndOfChannel):
        return [notice for notice in found if isinstance(notice, kind)]


Scenario = Callable[[SimulatedKadoa, Realtime, Consumer], Awaitable[object]]


def scenario(pace: float = 0.0, **options: Any) -> Callable[[Scenario], Callable[[], None]]:
    """Make a test of a scenario: a client whose consumer has had one event and whose connection is stable."""

    def decorate(function: Scenario) -> Callable[[], None]:
        async def main() -> None:
            async with (
                open_simulated_kadoa() as kadoa,
                open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, **options) as realtime,
                trio.open_nursery() as nursery,
            ):
                await kadoa.wait_subscribed(1)
                consumer = Consumer(realtime, pace)
                nursery.start_soon(consumer.run)
                kadoa.publish()
                await trio.sleep(30)
                await function(kadoa, realtime, consumer)
                nursery.cancel_scope.cancel()

        @functools.wraps(function)
        def test() -> None:
            trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

        del test.__wrapped__  # type: ignore[attr-defined]  # pytest would ask for its fixtures
        return test

    return decorate


async def assert_complete_when_healed(kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer) -> None:
    """End the faults; two minutes later every event has come once, and no possible gap was found."""
    kadoa.heal()
    await trio.sleep(120)
    assert sorted(consumer.ids) == sorted(ids(kadoa.published))
    assert realtime.statistics().gap_count == 0


# ---- replays -------------------------------------------------------------------------------------------------------


@scenario()
async def test_reset_amid_a_paged_replay_with_live_events_loses_nothing(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    kadoa.faults = Faults(refuse_connections=True)
    kadoa.newest.reset()
    backlog = kadoa.publish_many(25)
    await trio.sleep(5)
    kadoa.faults = Faults(ignore_cursors=True)
    connection = await kadoa.wait_subscribed(2)
    for page in range(3):  # of five; a page every 5 s, and live events between them
        for event in backlog[5 * page : 5 * page + 5]:
            connection.deliver(event)
        kadoa.publish_many(3)
        await trio.sleep(5)
    connection.reset()
    await assert_complete_when_healed(kadoa, realtime, consumer)


@scenario()
async def test_connections_dropped_every_eight_seconds_receive_a_whole_backlog(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    kadoa.faults = Faults(refuse_connections=True)
    kadoa.newest.reset()
    kadoa.publish_many(400)
    await trio.sleep(5)
    kadoa.faults = Faults(ignore_cursors=True)
    for made in range(2, 80):
        connection = await kadoa.wait_subscribed(made)
        replay = iter(list(kadoa.stream.after(connection.last_cursor or "0-0")))
        for _ in range(8):  # five events a second, and a live one
            for _, event in zip(range(5), replay, strict=False):  # in this order, or it would lose one
                connection.deliver(event)
            kadoa.publish()
            await trio.sleep(1)
        connection.reset()
        if len(set(consumer.ids)) == len(kadoa.published):
            break
    statistics = realtime.statistics()
    assert sorted(consumer.ids) == sorted(ids(kadoa.published))
    assert statistics.repeated < 3 * len(kadoa.published)
    assert statistics.gap_count == 0


@scenario()
async def test_broken_promise_to_resume_is_reported_when_the_replacement_dies_young(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    kadoa.faults = Faults(ignore_cursors=True)
    kadoa.newest.drain(100, resume_supported=False)
    second = await kadoa.wait_subscribed(2)
    kadoa.connections[0].reset()
    second.reset()
    lost = kadoa.publish_many(5)
    await kadoa.wait_subscribed(3)
    kadoa.publish()
    await trio.sleep(30)
    assert not set(ids(lost)) & set(consumer.ids)
    assert [notice.gap.reason for notice in notices(realtime, PossibleGap)] == [GapReason.NOT_PROMISED]


@scenario(pace=3.0, limits=Limits(buffered_events=1), timeouts=Timeouts(overlap=20.0))
async def test_old_connection_is_not_retired_while_the_program_does_not_read(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    kadoa.faults = Faults(ignore_cursors=True)
    old = kadoa.publish_many(25)  # read at a third of an event a second
    kadoa.newest.drain(100)
    await kadoa.wait_subscribed(2)
    for _ in range(60):
        kadoa.connections[-1].send_heartbeat()
        await trio.sleep(3)
    assert set(ids(old)) <= set(consumer.ids) or realtime.statistics().gap_count
    assert set(ids(old)) <= set(consumer.ids)


@pytest.mark.parametrize("delay", [0.15, 0.2, 0.25, 0.3])
def test_reset_while_the_oldest_connection_is_retired_leaves_no_deaf_client(delay: float) -> None:
    @scenario()
    async def run(kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer) -> None:
        for made in (2, 3):  # two old connections linger
            kadoa.newest.drain(100)
            await kadoa.wait_subscribed(made)
            await trio.sleep(20)
        newest = kadoa.newest
        newest.drain(100)
        await trio.sleep(delay)
        newest.reset()
        await trio.sleep(120)
        event = kadoa.publish()
        await trio.sleep(60)
        assert consumer.ids[-1] == event.id
        assert realtime.state is State.LIVE
        assert len(realtime.statistics().connections) == 1

    run()


async def test_age_at_which_no_heartbeat_could_have_come_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"twice Timeouts\.heartbeat"):
        async with open_realtime("key-0123456789", timeouts=Timeouts(heartbeat=30.0, max_age=59.0)):
            pytest.fail("it opened")


# ---- the cursor check ----------------------------------------------------------------------------------------------


async def begin_check(kadoa: SimulatedKadoa) -> Any:
    """Refuse cursors until a probe is subscribed; return its connection."""
    kadoa.faults = Faults(refuse_cursors=True)
    kadoa.newest.reset()
    while not any(one.subscribed and one.last_cursor is None and one.number > 1 for one in kadoa.connections):  # noqa: ASYNC110  # a poll of the simulator
        await trio.sleep(0.1)
    return next(one for one in kadoa.connections if one.subscribed)


@scenario(pace=4.0, limits=Limits(buffered_events=2))
async def test_probe_that_is_reset_while_its_events_wait_for_space_ends_nothing(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    probe = await begin_check(kadoa)
    kadoa.publish_many(2)
    await trio.sleep(200)  # the check takes longer than events are held
    live = kadoa.publish_many(20)
    await trio.sleep(1)
    probe.reset()
    kadoa.heal()
    await trio.sleep(300)
    assert realtime.state is State.LIVE
    assert set(ids(live)) <= set(consumer.ids)
    assert len(consumer.ids) == len(set(consumer.ids))


@pytest.mark.parametrize(
    "faults",
    [{"token_status": 503}, {"handshake_status": 503}, {"accept_then_reset": True}],
    ids=["token", "handshake", "reset"],
)
def test_events_of_a_probe_are_handed_out_after_a_minute(faults: dict[str, Any]) -> None:
    @scenario()
    async def run(kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer) -> None:
        await begin_check(kadoa)
        kadoa.faults = Faults(**faults)
        found: list[Notice] = []
        for _ in range(600):
            kadoa.publish()
            await trio.sleep(2)
            found += notices(realtime, Notice)  # in time: the client keeps the newest 256
        assert set(ids(kadoa.published[1:-40])) <= set(consumer.ids)
        assert any(isinstance(notice, HeldEventsReleased) for notice in found)
        assert not any(isinstance(notice, CursorDropped) for notice in found)
        assert realtime.statistics().resume_cursor == kadoa.published[0].cursor
        assert realtime.position.cursor == kadoa.published[0].cursor

    run()


@scenario()
async def test_replay_service_that_is_down_for_a_while_does_not_cost_the_cursor(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    kadoa.faults = Faults(refuse_cursors=True)
    kadoa.newest.reset()
    kadoa.publish_many(22)
    await trio.sleep(20)
    await assert_complete_when_healed(kadoa, realtime, consumer)
    assert not notices(realtime, CursorDropped)


@scenario()
async def test_event_from_a_candidate_shows_that_the_cursor_is_accepted(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    await begin_check(kadoa)
    kadoa.publish_many(22)
    await trio.sleep(12)
    kadoa.faults = Faults()
    while not kadoa.connections[-1].sent or kadoa.connections[-1].last_cursor is None:  # noqa: ASYNC110  # a poll of the simulator
        await trio.sleep(0.05)
    kadoa.connections[-1].close(1011, "sick")
    await trio.sleep(120)
    found = notices(realtime, Notice)
    assert any(isinstance(notice, CursorAccepted) for notice in found)
    assert not any(isinstance(notice, (CursorDropped, PossibleGap)) for notice in found)
    assert sorted(consumer.ids) == sorted(ids(kadoa.published))


@scenario()
async def test_held_events_survive_the_end_of_their_connection(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    probe = await begin_check(kadoa)
    held = kadoa.publish_many(5)
    await trio.sleep(3)
    probe.reset()
    kadoa.faults = Faults(refuse_connections=True)
    await trio.sleep(70)
    assert set(ids(held)) <= set(consumer.ids)
    await assert_complete_when_healed(kadoa, realtime, consumer)


@scenario()
async def test_refused_cursor_is_dropped_after_several_candidates_and_minutes(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    start = trio.current_time()
    await begin_check(kadoa)
    while not (dropped := notices(realtime, CursorDropped)):
        kadoa.publish()
        await trio.sleep(1)
        assert trio.current_time() < start + 600
    assert trio.current_time() >= start + 120
    assert dropped[0].cursor == kadoa.published[0].cursor
    kadoa.publish_many(3)
    await trio.sleep(30)
    assert ids(kadoa.published[-3:]) == consumer.ids[-3:]
    assert [gap.reason for gap in realtime.statistics().gaps] == [GapReason.CURSOR_DROPPED]
    assert realtime.position.cursor == kadoa.published[-1].cursor


@scenario()
async def test_cursor_that_is_refused_after_the_connection_was_stable_is_dropped(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    # A server that looks the cursor up late: heartbeats come, the connection is stable, and then it is closed.
    start = trio.current_time()
    kadoa.faults = Faults(refuse_cursors=True, refuse_cursors_after=12.0)
    kadoa.newest.reset()
    while not (dropped := notices(realtime, CursorDropped)):
        kadoa.publish()
        await trio.sleep(1)
        assert trio.current_time() < start + 900
    assert trio.current_time() >= start + 120
    assert dropped[0].cursor == kadoa.published[0].cursor
    event = kadoa.publish()
    await trio.sleep(30)
    assert consumer.ids[-1] == event.id
    assert [gap.reason for gap in realtime.statistics().gaps] == [GapReason.CURSOR_DROPPED]


@pytest.mark.parametrize("seed", range(3))
def test_quiet_server_that_closes_every_connection_after_a_while_keeps_the_cursor(seed: int) -> None:
    # A load balancer with a limit on idle connections: each connection has a life of its own.
    rng = random.Random(seed)

    async def close_later(connection: SimulatedConnection) -> None:
        await trio.sleep(rng.uniform(15, 200))
        if connection.open:
            connection.close(1001, "idle")

    @scenario()
    async def run(kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer) -> None:
        async with trio.open_nursery() as nursery:

            async def balance() -> None:
                count = len(kadoa.subscribed)
                nursery.start_soon(close_later, kadoa.newest)
                while True:
                    count += 1
                    nursery.start_soon(close_later, await kadoa.wait_subscribed(count))

            nursery.start_soon(balance)
            await trio.sleep(3 * 3_600)
            nursery.cancel_scope.cancel()
        assert not notices(realtime, CursorDropped)
        assert realtime.statistics().gap_count == 0
        event = kadoa.publish()
        await trio.sleep(60)
        assert consumer.ids[-1] == event.id

    run()


# ---- backoff, age, refusals ----------------------------------------------------------------------------------------


@scenario()
async def test_resets_of_connections_that_made_progress_are_first_failures(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    waits = []
    for made in range(2, 22):
        kadoa.publish()
        await trio.sleep(0.5)
        kadoa.newest.reset()
        before = trio.current_time()
        await kadoa.wait_subscribed(made)
        waits.append(trio.current_time() - before)
        kadoa.publish()
        await trio.sleep(4)
    assert max(waits) < 1
    assert sorted(waits)[len(waits) // 2] < 0.3
    await trio.sleep(30)
    assert consumer.ids == ids(kadoa.published)


@scenario()
async def test_connections_closed_without_an_event_are_failures(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    kadoa.faults = Faults(accept_then_close=1011)
    kadoa.newest.reset()
    made = len(kadoa.attempt_times)
    await trio.sleep(60)
    assert len(kadoa.attempt_times) - made < 20


@scenario(timeouts=Timeouts(max_age=3600.0))
async def test_subscription_that_is_lost_behind_heartbeats_is_noticed_at_the_maximum_age(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    deaf = kadoa.newest
    deaf.hold()
    for _ in range(70):
        kadoa.publish()
        await trio.sleep(60)
    assert consumer.ids == ids(kadoa.published)
    found = notices(realtime, Notice)
    assert [notice.generation for notice in found if isinstance(notice, ConnectionAged)] == [1]
    assert not any(isinstance(notice, (Lost, PossibleGap)) for notice in found)


@pytest.mark.parametrize("status", [400, 401, 404, 405, 409, 421, 431, 451])
def test_refusal_of_a_client_that_was_live_is_retried_for_its_grace(status: int) -> None:
    @scenario()
    async def run(kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer) -> None:
        await trio.sleep(DAY if status == 404 else 60)
        kadoa.faults = Faults(token_status=status)
        kadoa.newest.reset()
        await trio.sleep(200)
        kadoa.heal()
        event = kadoa.publish()
        await trio.sleep(60)
        assert consumer.ids[-1] == event.id

    run()


@pytest.mark.parametrize("status", [401, 404])
def test_refusal_that_lasts_ends_a_client_that_was_live(status: int) -> None:
    async def main() -> None:
        async with (
            open_simulated_kadoa() as kadoa,
            open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime,
        ):
            await kadoa.wait_subscribed(1)
            kadoa.publish()
            await realtime.events.receive()
            kadoa.faults = Faults(token_status=status)
            kadoa.newest.reset()
            with pytest.raises(AuthenticationError if status == 401 else RequestRefusedError):
                await realtime.events.receive()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@scenario()
async def test_other_answers_between_two_refusals_start_the_grace_anew(
    kadoa: SimulatedKadoa, realtime: Realtime, consumer: Consumer
) -> None:
    kadoa.newest.reset()
    for _ in range(3):
        kadoa.faults = Faults(token_status=401)
        asked = kadoa.token_requests
        while kadoa.token_requests == asked:  # noqa: ASYNC110  # a poll of the simulator
            await trio.sleep(0.1)
        kadoa.faults = Faults(token_status=503)
        await trio.sleep(600)
    kadoa.heal()
    event = kadoa.publish()
    await trio.sleep(60)
    assert consumer.ids[-1] == event.id


# ---- first start, blocked loop -------------------------------------------------------------------------------------


def test_first_start_is_a_notice_and_no_gap() -> None:
    async def main() -> None:
        store = MemoryCursorStore()
        async with open_simulated_kadoa() as kadoa:
            for run in range(2):
                async with open_realtime(
                    kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=store, consumer="billing"
                ) as realtime:
                    await kadoa.wait_subscribed(run + 1)
                    assert realtime.statistics().gap_count == 0
                    assert realtime.position.gaps == ()
                    kadoa.publish()
                    await realtime.events.receive()
                    realtime.events.settle()
                    started = notices(realtime, FirstStart)
                    assert [notice.consumer for notice in started] == ["billing"] * (run == 0)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_blocked_event_loop_does_not_cost_a_healthy_connection() -> None:
    # In real time: Trio's clock must run while the event loop is blocked.
    async with (
        open_simulated_kadoa(heartbeat_interval=0.2) as kadoa,
        open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, timeouts=Timeouts(heartbeat=1.0)) as realtime,
    ):
        await kadoa.wait_subscribed(1)
        await realtime.wait_live()
        kadoa.publish()
        await trio.testing.wait_all_tasks_blocked()
        time.sleep(2.5)  # noqa: ASYNC251  # this is the fault
        kadoa.publish()
        for _ in range(2):
            await realtime.events.receive()
        found = notices(realtime, Notice)
        assert [notice for notice in found if isinstance(notice, EventLoopBlocked)]
        assert not [notice for notice in found if isinstance(notice, Lost)]
        assert len(kadoa.subscribed) == 1
