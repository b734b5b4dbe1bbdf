"""Acknowledgements: how many at once and per second, when they pause, and what is sent on leaving."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise

import pytest
import trio
import trio.testing
from test_ctrl_c import protected

from kadoa_trio import Event, open_realtime
from kadoa_trio._engine import _acks
from kadoa_trio._engine._acks import (
    ACKNOWLEDGEMENTS_BURST,
    ACKNOWLEDGEMENTS_IN_FLIGHT,
    ACKNOWLEDGEMENTS_PER_SECOND,
    ACKNOWLEDGEMENTS_REST,
    MAX_ACKNOWLEDGEMENTS,
    QUIET_AFTER,
    REFUSALS_BEFORE_REST,
    Acknowledger,
    Pace,
)
from kadoa_trio._engine._reporter import Reporter
from kadoa_trio._errors import AttemptError
from kadoa_trio._net._wire import decode
from kadoa_trio.notices import AcknowledgementsPaused
from kadoa_trio.testing import open_simulated_kadoa

Clock = trio.testing.MockClock


def event(number: int) -> Event:
    made = decode(f'{{"eventType":"workflow_finished","id":"e{number}","message":{{}}}}')
    assert isinstance(made, Event)
    return made


class Api:
    """Takes acknowledgements, each for some time, and records when each one was sent."""

    def __init__(self, takes: float = 0.0) -> None:
        self.takes = takes
        self.refuses = False
        self.sent: list[tuple[float, str]] = []
        self.cancelled = 0
        self.at_once = 0
        self.most_at_once = 0
        self.closes_idle = False

    async def acknowledge(self, event_id: str) -> None:
        self.sent.append((trio.current_time(), event_id))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await trio.sleep(self.takes)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.at_once -= 1
        if self.refuses:
            raise AttemptError("acknowledge", "HTTP 503", status=503)

    async def close_idle(self) -> None:
        self.closes_idle = True
        await trio.sleep_forever()

    @property
    def ids(self) -> list[str]:
        return [event_id for _time, event_id in self.sent]


@asynccontextmanager
async def running(api: Api) -> AsyncIterator[tuple[Acknowledger, Reporter]]:
    reporter = Reporter(lambda: datetime.now(UTC))
    acknowledger = Acknowledger(api, reporter)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        acknowledger.start(nursery)
        yield acknowledger, reporter
        nursery.cancel_scope.cancel()


def pauses(reporter: Reporter) -> int:
    found = 0
    while reporter.notices.statistics().current_buffer_used:
        found += isinstance(reporter.notices.receive_nowait(), AcknowledgementsPaused)
    return found


# --- how many ---


async def test_1000_events_a_second_are_acknowledged_completely(autojump_clock: Clock) -> None:
    # An answer takes as long as it may: four in flight, and a thousand a second.
    api = Api(takes=0.0039)
    async with running(api) as (acknowledger, _reporter):
        for number in range(20_000):
            acknowledger.settled(event(number))
            assert acknowledger.waiting <= 20
            if number % 10 == 9:
                await trio.sleep(0.01)
        assert trio.current_time() == pytest.approx(20)
        await trio.sleep(0.1)
        assert (acknowledger.sent, acknowledger.failed, acknowledger.dropped) == (20_000, 0, 0)
    assert api.ids == [f"e{number}" for number in range(20_000)]
    assert api.most_at_once <= ACKNOWLEDGEMENTS_IN_FLIGHT


async def test_backlog_is_sent_at_the_maximum_rate(autojump_clock: Clock) -> None:
    api = Api(takes=0.001)
    async with running(api) as (acknowledger, _reporter):
        await trio.sleep(100)  # the unused time allows one burst, and no more
        began = trio.current_time()
        for number in range(MAX_ACKNOWLEDGEMENTS + 500):
            acknowledger.settled(event(number))
        assert (acknowledger.waiting, acknowledger.dropped) == (MAX_ACKNOWLEDGEMENTS, 500)
        await trio.sleep(MAX_ACKNOWLEDGEMENTS / ACKNOWLEDGEMENTS_PER_SECOND + 0.1)
        assert acknowledger.sent == MAX_ACKNOWLEDGEMENTS
    assert api.ids == [f"e{number}" for number in range(500, MAX_ACKNOWLEDGEMENTS + 500)]
    for number, (time, _event_id) in enumerate(api.sent):
        assert number < (time - began) * ACKNOWLEDGEMENTS_PER_SECOND + ACKNOWLEDGEMENTS_BURST + 1e-6


def test_pace_is_a_maximum_in_any_time_and_is_reached() -> None:
    rng = random.Random(20261127)
    for _ in range(50):
        rate, burst = rng.choice([0.5, 10, 2_000]), rng.choice([2, 7, 100])
        pace = Pace(rate, burst)
        now = start = rng.choice([0.0, 1e6])
        times: list[float] = []
        for _ in range(1_000):
            if rng.random() < 0.02:
                now += rng.uniform(0, 3 * burst / rate)
            wait = pace.take(now)
            assert 0 <= wait <= burst / rate
            if wait:
                now += wait
                assert pace.take(now) == 0
            times.append(now)
        for first in range(0, len(times), 37):
            for last in range(first, len(times), 41):
                assert last - first + 1 <= (times[last] - times[first]) * rate + burst + 1e-3
        # Idle times apart, it takes no longer than the rate requires.
        steps = sum(after - before for before, after in pairwise([start, *times]) if after - before <= burst / rate)
        assert steps <= len(times) / rate + burst / rate


async def test_event_without_an_id_of_the_server_is_not_acknowledged(autojump_clock: Clock) -> None:
    api = Api()
    async with running(api) as (acknowledger, _reporter):
        without = decode('{"eventType":"workflow_finished","message":{}}')
        assert isinstance(without, Event)
        acknowledger.settled(without)
        acknowledger.settled(event(1))
        await trio.sleep(1)
    assert api.ids == ["e1"]


async def test_one_settled_event_wakes_one_worker(autojump_clock: Clock) -> None:
    api = Api()
    async with running(api) as (acknowledger, _reporter):
        acknowledger.settled(event(0))
        for number in range(1, 4):
            await trio.sleep(1)
            assert len(acknowledger._idle) == ACKNOWLEDGEMENTS_IN_FLIGHT
            acknowledger.settled(event(number))
            assert len(acknowledger._idle) == ACKNOWLEDGEMENTS_IN_FLIGHT - 1
        assert api.closes_idle
        await trio.sleep(1)
    assert len(api.sent) == 4


@pytest.mark.parametrize("takes", [0.0, 1.0, 10 * QUIET_AFTER])
async def test_there_are_workers_only_while_there_is_something_to_send(autojump_clock: Clock, takes: float) -> None:
    api = Api(takes)
    async with running(api) as (acknowledger, _reporter):
        for number in range(3):
            assert not acknowledger._runs
            acknowledger.settled(event(number))
            assert acknowledger._runs
            await trio.sleep(takes + 3 * QUIET_AFTER)
            assert api.ids == [f"e{sent}" for sent in range(number + 1)]
            assert not api.at_once


async def test_every_event_is_acknowledged_whenever_it_comes(autojump_clock: Clock) -> None:
    api = Api(0.01)
    rng = random.Random(20261127)
    async with running(api) as (acknowledger, _reporter):
        for number in range(300):
            acknowledger.settled(event(number))
            # Around the moments at which the workers end.
            await trio.sleep(
                rng.choice([0.0, 1e-9, QUIET_AFTER - 0.01, QUIET_AFTER, QUIET_AFTER + 0.01, 2 * QUIET_AFTER])
            )
        await trio.sleep(QUIET_AFTER)
    assert sorted(api.ids) == sorted(f"e{number}" for number in range(300))
    assert api.cancelled == 0


async def test_event_that_is_settled_while_the_workers_end_is_acknowledged(autojump_clock: Clock) -> None:
    class Last(Api):
        async def close_idle(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                acknowledger.settled(event(2))

    api = Last()
    async with running(api) as (acknowledger, _reporter):
        acknowledger.settled(event(1))
        await trio.sleep(3 * QUIET_AFTER - 0.1)
        assert api.ids == ["e1", "e2"]


async def test_workers_do_not_end_between_events(autojump_clock: Clock) -> None:
    starts = 0

    class Counting(Api):
        async def close_idle(self) -> None:
            nonlocal starts
            starts += 1
            await trio.sleep_forever()

    async with running(Counting()) as (acknowledger, _reporter):
        for number in range(20):
            acknowledger.settled(event(number))
            await trio.sleep(0.9 * QUIET_AFTER)
    assert starts == 1


async def test_event_that_is_settled_after_the_end_is_not_acknowledged(autojump_clock: Clock) -> None:
    api = Api()
    async with running(api) as (acknowledger, _reporter):
        acknowledger.stop_starting()
    acknowledger.settled(event(1))
    assert not api.sent
    await acknowledger.finish(trio.current_time() + 1)
    assert api.ids == ["e1"]
    acknowledger.settled(event(2))  # the program settles it after it has left the client
    assert (acknowledger.waiting, acknowledger.sent, acknowledger.dropped) == (0, 1, 1)


# --- pauses ---


async def test_failures_in_a_row_pause_and_then_one_is_tried(autojump_clock: Clock) -> None:
    api = Api(takes=0.5)
    api.refuses = True
    async with running(api) as (acknowledger, reporter):
        for number in range(100):
            acknowledger.settled(event(number))
        await trio.sleep(10)
        # Those that were in flight with the last of them are not counted as tried after it.
        first = len(api.sent)
        assert REFUSALS_BEFORE_REST <= first < REFUSALS_BEFORE_REST + ACKNOWLEDGEMENTS_IN_FLIGHT
        for number in range(1, 6):
            acknowledger.settled(event(100 + number))  # wakes nobody up for more than a look
            await trio.sleep(ACKNOWLEDGEMENTS_REST + 1)
            assert len(api.sent) == acknowledger.failed == first + number
        assert pauses(reporter) == 1
        api.refuses = False
        await trio.sleep(ACKNOWLEDGEMENTS_REST + 5)
        assert acknowledger.waiting == 0
        assert (acknowledger.sent, acknowledger.failed) == (105 - first - 5, first + 5)
        # A new row of failures is a new pause, and a new notice.
        api.refuses = True
        for number in range(100):
            acknowledger.settled(event(number))
        await trio.sleep(10)
        assert pauses(reporter) == 1
        assert len(api.sent) < 105 + REFUSALS_BEFORE_REST + ACKNOWLEDGEMENTS_IN_FLIGHT


async def test_pause_without_anything_to_send_ends_too(autojump_clock: Clock) -> None:
    api = Api()
    api.refuses = True
    async with running(api) as (acknowledger, _reporter):
        for number in range(REFUSALS_BEFORE_REST):
            acknowledger.settled(event(number))
        await trio.sleep(2 * ACKNOWLEDGEMENTS_REST)
        assert (acknowledger.failed, acknowledger.waiting) == (REFUSALS_BEFORE_REST, 0)
        api.refuses = False
        for number in range(50):
            acknowledger.settled(event(number))
        await trio.sleep(1)
        assert acknowledger.sent == 50


async def test_failures_that_are_not_in_a_row_pause_nothing(autojump_clock: Clock) -> None:
    api = Api()
    async with running(api) as (acknowledger, reporter):
        for number in range(100):
            api.refuses = number % REFUSALS_BEFORE_REST != 0
            acknowledger.settled(event(number))
            await trio.sleep(0.1)
        assert (acknowledger.sent, acknowledger.failed, acknowledger.waiting) == (10, 90, 0)
        assert pauses(reporter) == 0


# --- leaving ---


async def test_leaving_sends_what_waits_and_what_was_cut_short(autojump_clock: Clock) -> None:
    api = Api(takes=0.01)
    async with running(api) as (acknowledger, _reporter):
        for number in range(60):
            acknowledger.settled(event(number))
        await trio.sleep(0.005)
    assert api.cancelled == ACKNOWLEDGEMENTS_IN_FLIGHT
    await acknowledger.finish(trio.current_time() + 0.5)
    assert (acknowledger.sent, acknowledger.dropped, acknowledger.waiting) == (60, 0, 0)
    assert set(api.ids) == {f"e{number}" for number in range(60)}
    assert api.most_at_once == ACKNOWLEDGEMENTS_IN_FLIGHT


async def test_leaving_drops_what_takes_too_long_and_what_is_paused(autojump_clock: Clock) -> None:
    api = Api(takes=0.2)
    async with running(api) as (acknowledger, _reporter):
        for number in range(100):
            acknowledger.settled(event(number))
    began = trio.current_time()
    await acknowledger.finish(began + 0.5)
    assert trio.current_time() == began + 0.5
    assert (acknowledger.sent, acknowledger.dropped) == (2 * ACKNOWLEDGEMENTS_IN_FLIGHT, 92)

    api = Api()
    api.refuses = True
    async with running(api) as (acknowledger, _reporter):
        for number in range(100):
            acknowledger.settled(event(number))
        await trio.sleep(1)
    began = trio.current_time()
    await acknowledger.finish(began + 0.5)
    assert trio.current_time() == began
    assert (acknowledger.failed, acknowledger.dropped) == (len(api.sent), 100 - len(api.sent))
    assert len(api.sent) < REFUSALS_BEFORE_REST + ACKNOWLEDGEMENTS_IN_FLIGHT


def test_background_tasks_are_protected_from_ctrl_c() -> None:
    for function in (Acknowledger._run, Acknowledger._work, Acknowledger._finish):
        assert protected(function)


# --- the whole client ---


@pytest.mark.sockets
async def test_a_lasting_load_is_acknowledged_completely_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, batches = 100, 20
    # Too short for the load, if acknowledgements are slower than events.
    monkeypatch.setattr(_acks, "MAX_ACKNOWLEDGEMENTS", 2 * batch)
    with trio.fail_after(240):
        async with (
            open_simulated_kadoa(loopback=True) as kadoa,
            open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime,
        ):
            await kadoa.wait_subscribed(1)
            for _ in range(batches):
                published = kadoa.publish_many(batch)
                for _ in published:
                    await realtime.events.receive()
                # As fast as the machine sends them: what is shown is that none is lost, not how long it takes.
                while realtime.statistics().acknowledgements_waiting > batch // 2:  # noqa: ASYNC110  # statistics cannot be waited for
                    await trio.sleep(0.001)
                assert realtime.statistics().acknowledgements_dropped == 0
            realtime.events.settle()
            await kadoa.wait_settled()
            while realtime.statistics().acknowledged < batch * batches:  # noqa: ASYNC110  # the last answers are on their way
                await trio.sleep(0.001)
            statistics = realtime.statistics()
            assert sorted(kadoa.acknowledged) == sorted(str(one.id) for one in kadoa.published)
            assert statistics.acknowledged == batch * batches
            assert statistics.acknowledgements_failed == 0
