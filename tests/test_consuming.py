"""The shapes of consuming, one by one: batches, deliveries, `process`, orderly ends, health, hooks, changing keys."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from kadoa_trio import (
    ConfigurationError,
    ConnectionFailedError,
    CursorSession,
    CursorStoreError,
    DeadLetterFile,
    Event,
    Limits,
    MemoryCursorStore,
    Position,
    Realtime,
    RetryPolicy,
    Timeouts,
    open_forwarder,
    open_realtime,
    process,
    stopping_on_signals,
)
from kadoa_trio.consuming import DeadLetter, FailedAttempt, Processed
from kadoa_trio.notices import AttemptStarted, Live, Notice, State
from kadoa_trio.testing import (
    MemoryDeadLetters,
    PublishedEvent,
    SimulatedKadoa,
    make_event,
    open_simulated_kadoa,
    workflow_failed,
)


def ids(events: list[PublishedEvent]) -> list[str]:
    return [event.id or "" for event in events]


def of(*workflows: str) -> list[Any]:
    return [workflow_failed(workflow_id=name) for name in workflows]


# ---- batches -------------------------------------------------------------------------------------------------------


async def test_batch_takes_what_is_there_up_to_its_maximum(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(5)
        await trio.sleep(1)
        async with realtime.events.batch(max_events=3) as batch:
            assert [event.id for event in batch] == [event.id for event in batch.events] == ids(sent[:3])
            assert (len(batch), batch.attempt) == (3, 1)
            assert realtime.position.recent == ()
        assert realtime.position.recent == tuple(ids(sent[:3]))
        async with realtime.events.batch(within=0) as batch:
            assert [event.id for event in batch] == ids(sent[3:])


async def test_batch_waits_for_its_time_from_the_first_event_on(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def publish() -> None:
            await trio.sleep(20)
            for _ in range(5):
                kadoa.publish()
                await trio.sleep(1)

        async with realtime.events.batch(within=2.5) as batch:
            assert trio.current_time() == pytest.approx(22.5)
            assert len(batch) == 3
        async with realtime.events.batch(max_events=2, within=math.inf) as batch:
            assert trio.current_time() == pytest.approx(24)
            assert len(batch) == 2


async def test_batch_is_one_checkpoint(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        kadoa.publish_many(50)
        await trio.sleep(1)
        steps = 0

        class Count(trio.abc.Instrument):
            def before_task_step(self, task: Any) -> None:
                nonlocal steps
                steps += task is own

        own = trio.lowlevel.current_task()
        instrument = Count()
        trio.lowlevel.add_instrument(instrument)
        with trio.testing.assert_checkpoints():
            async with realtime.events.batch(max_events=50) as batch:
                assert len(batch) == 50
        trio.lowlevel.remove_instrument(instrument)
        assert steps == 1


async def test_batch_ends_before_an_event_that_is_too_large_for_it(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = [kadoa.publish(workflow_failed(reason="x" * size)) for size in (10, 10, 5_000, 10)]
        await trio.sleep(1)
        found = []
        for _ in range(3):
            async with realtime.events.batch(max_bytes=2_000, within=5) as batch:
                found.append([event.id for event in batch])
        # The large one comes alone.
        assert found == [ids(sent[:2]), ids(sent[2:3]), ids(sent[3:])]


async def test_batch_that_fails_comes_back_in_order_after_a_wait(autojump_clock: Any, pair: Any) -> None:
    async with pair(redelivery=RetryPolicy(initial=100, maximum=100)) as (kadoa, realtime):
        sent = kadoa.publish_many(4)
        await trio.sleep(1)
        with pytest.raises(ValueError, match="mine"):
            async with realtime.events.batch(within=0) as batch:
                batch.settle(batch.events[1], batch.events[1])
                raise ValueError("mine")
        assert realtime.events.statistics().delayed_events == 3
        later = kadoa.publish()
        assert (await realtime.events.receive()).id == later.id  # not held up
        before = trio.current_time()
        async with realtime.events.batch(max_events=3, within=0) as batch:
            assert [event.id for event in batch] == [sent[0].id, *ids(sent[2:])]
            assert batch.attempt == 2
        assert 0 < trio.current_time() - before <= 100
        assert realtime.position.recent[-3:] == (sent[0].id, *ids(sent[2:]))
        assert realtime.statistics().redelivered == 3


async def test_cancelled_while_collecting_a_batch_settles_nothing_and_loses_nothing(
    autojump_clock: Any, pair: Any
) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        with trio.move_on_after(1) as scope:
            async with realtime.events.batch(max_events=10, within=5):
                raise AssertionError("it is still collecting")
        assert scope.cancelled_caught
        assert realtime.position.recent == ()
        async with realtime.events.batch(within=0) as batch:
            assert [event.id for event in batch] == ids(sent)
            assert batch.attempt == 1  # the program has not seen them


async def test_end_of_the_channel_gives_what_was_collected(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        sent = kadoa.publish_many(2)

        @nursery.start_soon
        async def stop() -> None:
            await trio.sleep(1)
            realtime.stop()

        async with realtime.events.batch(within=60) as batch:
            assert [event.id for event in batch] == ids(sent)
            assert trio.current_time() == pytest.approx(1)
        with pytest.raises(trio.EndOfChannel):
            async with realtime.events.batch():
                pass


async def test_fault_is_raised_by_the_batch_after_the_last_events(autojump_clock: Any, pair: Any) -> None:
    async with pair(limits=Limits(message_size=2_000)) as (kadoa, realtime):
        sent = kadoa.publish_many(2)
        await trio.sleep(30)
        kadoa.publish(workflow_failed(reason="x" * 3_000))
        async with realtime.events.batch(max_events=10, within=600) as batch:
            assert [event.id for event in batch] == ids(sent)
        with pytest.raises(Exception, match=r"Limits\.message_size"):
            async with realtime.events.batch():
                pass


async def test_position_of_a_batch_is_the_position_after_it(autojump_clock: Any, pair: Any) -> None:
    async with pair(redelivery=RetryPolicy(initial=100, maximum=100)) as (kadoa, realtime):
        kadoa.publish_many(6)
        await trio.sleep(60)
        with pytest.raises(ValueError, match="mine"):
            async with realtime.events.batch(max_events=2):
                raise ValueError("mine")
        for number in range(2):
            async with realtime.events.batch(max_events=2, within=0) as batch:
                if number:
                    batch.settle(batch.events[1])
                foreseen = batch.position
            # Times are by the machine's clock, which virtual time does not stop.
            assert attrs.evolve(realtime.position, last_life=None, cursor_at=None) == attrs.evolve(
                foreseen, last_life=None, cursor_at=None
            )
        async with realtime.events.batch(max_events=2, within=0) as batch:
            batch.settle(*batch)
            with pytest.raises(ValueError, match="every event of the batch is settled"):
                _ = batch.position


async def test_what_a_batch_refuses(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        for options in ({"max_events": 0}, {"max_bytes": 1.5}, {"within": -1}, {"within": "1"}, {"within": math.nan}):
            with pytest.raises(ConfigurationError, match=next(iter(options))):
                realtime.events.batch(**options)
        kadoa.publish()
        batch = realtime.events.batch()
        for use in (lambda: batch.events, lambda: len(batch), lambda: batch.position, lambda: batch.settle()):
            with pytest.raises(RuntimeError, match="inside of its async with block"):
                use()
        async with batch:
            foreign = make_event(workflow_failed())
            with pytest.raises(ValueError, match="is not of this batch"):
                batch.settle(batch.events[0], foreign)
            assert "1 unsettled" in repr(batch)
        with pytest.raises(RuntimeError, match="inside of"):
            batch.settle(batch.events[0])
        with pytest.raises(RuntimeError, match="entered once"):
            async with batch:
                pass


# ---- deliveries ----------------------------------------------------------------------------------------------------


async def test_deliveries_end_with_the_channel(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        await trio.sleep(1)
        realtime.stop()
        handled = []
        async for delivery in realtime.events.deliveries():
            async with delivery:
                handled.append(delivery.event.id)
        assert handled == ids(sent)
        assert realtime.statistics().settled == 3


async def test_retry_delivers_again_at_its_time_and_holds_up_nobody(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        seen: list[tuple[str, int, float]] = []
        async for delivery in realtime.events.deliveries():
            async with delivery:
                seen.append((delivery.event.id, delivery.attempt, round(trio.current_time())))
                if delivery.event.id == sent[0].id and delivery.attempt < 3:
                    delivery.retry(after=60)
            if len(seen) == 5:
                break
        first, second, third = ids(sent)
        assert seen == [(first, 1, 0), (second, 1, 0), (third, 1, 0), (first, 2, 60), (first, 3, 120)]
        assert realtime.position.recent == (second, third, first)


async def test_failing_delivery_waits_longer_each_time(autojump_clock: Any, pair: Any) -> None:
    async with pair(redelivery=RetryPolicy(initial=1, maximum=4)) as (kadoa, realtime):
        kadoa.publish()
        times: list[float] = []
        while len(times) < 200:
            try:
                async with realtime.events.delivery():
                    times.append(trio.current_time())
                    raise ValueError
            except ValueError:
                pass
        waits = [later - earlier for earlier, later in itertools.pairwise(times)]
        for wait, maximum in zip(waits, [1, 2, *[4] * 200], strict=False):
            assert wait <= maximum + 0.001
        assert 1.5 < sum(waits[2:]) / len(waits[2:]) < 2.5  # full jitter


async def test_delivery_fails_rarely_per_second_by_default(autojump_clock: Any, pair: Any) -> None:
    # Without a wait it would be a hundred thousand attempts.
    async with pair() as (kadoa, realtime):
        kadoa.publish()
        attempts = 0
        with trio.move_on_after(60):
            while True:
                try:
                    async with realtime.events.delivery() as delivery:
                        attempts = delivery.attempt
                        raise ValueError
                except ValueError:
                    pass
        assert 3 < attempts < 60


async def test_rejected_event_is_a_dead_letter_and_settled(autojump_clock: Any, pair: Any) -> None:
    dead = MemoryDeadLetters()
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(2)
        async for delivery in realtime.events.deliveries(dead_letters=dead):
            async with delivery:
                if delivery.event.id == sent[0].id:
                    delivery.reject("not for us")
            if delivery.event.id == sent[1].id:
                break
        (letter,) = dead.letters
        assert (letter.event.id, letter.attempts, letter.reason, letter.error) == (sent[0].id, 1, "not for us", None)
        statistics = realtime.statistics()
        assert (statistics.settled, statistics.dead) == (2, 1)


async def test_dead_letters_that_fail_are_raised_and_the_event_comes_again(autojump_clock: Any, pair: Any) -> None:
    dead = MemoryDeadLetters()
    dead.fault = OSError("the disk is full")
    async with pair() as (kadoa, realtime):
        kadoa.publish()
        with pytest.raises(OSError, match="the disk is full"):
            async with realtime.events.delivery(dead_letters=dead) as delivery:
                delivery.reject("no")
        dead.fault = None
        async with realtime.events.delivery(dead_letters=dead) as delivery:
            assert delivery.attempt == 2
            delivery.reject("no")
        assert [letter.attempts for letter in dead.letters] == [2]


async def test_last_word_of_a_block_counts(autojump_clock: Any, pair: Any) -> None:
    dead = MemoryDeadLetters()
    async with pair() as (kadoa, realtime):
        kadoa.publish()
        async with realtime.events.delivery(dead_letters=dead) as delivery:
            delivery.reject("no")
            delivery.retry(after=5)
        # The exception has priority, and the wait that was asked for stays.
        with pytest.raises(ValueError, match="mine"):
            async with realtime.events.delivery(dead_letters=dead) as delivery:
                assert trio.current_time() == pytest.approx(5)
                delivery.retry(after=10)
                raise ValueError("mine")
        async with realtime.events.delivery(dead_letters=dead) as delivery:
            assert (delivery.attempt, trio.current_time()) == (3, pytest.approx(15))
            delivery.retry()
            delivery.reject("no")
        assert len(dead.letters) == 1
        assert realtime.events.statistics().unsettled == 0


async def test_deliveries_can_be_entered_in_other_tasks(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(20)
        handled: list[str] = []

        async def handle(delivery: Any) -> None:
            async with delivery:
                await trio.sleep(1)
                handled.append(delivery.event.id)

        async with trio.open_nursery() as nursery:
            async for delivery in realtime.events.deliveries():
                nursery.start_soon(handle, delivery)
                if delivery.event.id == sent[-1].id:
                    break
        assert sorted(handled) == ids(sent)
        assert trio.current_time() == pytest.approx(1)
        assert realtime.events.statistics().unsettled == 0


async def test_delivery_that_was_never_entered_goes_to_another_handle(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        handle = realtime.events.clone()
        given = [await anext(handle.deliveries()) for _ in range(2)]
        assert [one.event.id for one in given] == ids(sent[:2])
        handle.close()
        with pytest.raises(trio.ClosedResourceError):
            async with given[0]:
                pass
        async with realtime.events.batch(max_events=3) as batch:
            assert [event.id for event in batch] == ids(sent)
            assert batch.attempt == 1


async def test_cancelled_at_the_entry_of_a_delivery_loses_nothing(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        kadoa.publish()
        delivery = await anext(realtime.events.deliveries())
        with trio.move_on_after(0) as scope:
            async with delivery:
                pass
        assert scope.cancelled_caught
        async with delivery:
            assert delivery.attempt == 1
        assert realtime.statistics().settled == 1


async def test_what_a_delivery_refuses(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        with pytest.raises(ConfigurationError, match="dead_letters"):
            realtime.events.delivery(dead_letters="dead.jsonl")
        with pytest.raises(ConfigurationError, match="dead_letters"):
            realtime.events.deliveries(dead_letters=DeadLetterFile)  # the class
        kadoa.publish()
        delivery = realtime.events.delivery()
        with pytest.raises(RuntimeError, match="inside of"):
            delivery.retry()
        async with delivery:
            for after in (-1, math.inf, math.nan, "soon"):
                with pytest.raises(ConfigurationError, match="after"):
                    delivery.retry(after)  # type: ignore[arg-type]
            with pytest.raises(RuntimeError, match="dead_letters="):
                delivery.reject("no")
            with pytest.raises(ConfigurationError, match="reason"):
                delivery.reject(ValueError("no"))  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="inside of"):
            delivery.reject("no")
        assert realtime.statistics().settled == 1


# ---- redelivery and the end ----------------------------------------------------------------------------------------


async def fail_once(realtime: Realtime, after: float) -> str:
    async with realtime.events.delivery() as delivery:
        delivery.retry(after)
    return delivery.event.id


async def test_stop_does_not_wait_for_redeliveries(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        kadoa.publish_many(2)
        await trio.sleep(1)
        await fail_once(realtime, 30)
        realtime.stop()
        with pytest.raises(ValueError, match="mine"):
            async with realtime.events.delivery():
                raise ValueError("mine")
        with trio.fail_after(0.5), pytest.raises(trio.EndOfChannel):
            await realtime.events.receive()
        assert realtime.events.statistics().unsettled == 2
        assert realtime.events.statistics().buffered_bytes == 0


@pytest.mark.parametrize("after", [5, 20])
async def test_stop_waits_for_redeliveries_as_long_as_it_is_asked(after: float, autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        kadoa.publish_many(2)
        await trio.sleep(1)
        first = await fail_once(realtime, after)
        realtime.stop(retry_within=10)
        realtime.stop()  # the first call counts
        assert realtime.state is State.STOPPED
        handled = [event.id async for event in realtime.events]
        assert (first in handled) == (after == 5)
        assert len(handled) == 1 + (after == 5)
        # No longer than until all is settled that can be.
        assert trio.current_time() == pytest.approx(6 if after == 5 else 1)


async def test_worker_that_waits_is_given_what_another_one_fails_after_the_stop(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        sent = kadoa.publish()
        handled: list[tuple[str, float]] = []

        @nursery.start_soon
        async def slow() -> None:
            async with realtime.events.clone() as events, events.delivery() as delivery:
                await trio.sleep(5)
                delivery.retry(after=1)

        @nursery.start_soon
        async def other() -> None:
            await trio.sleep(1)
            async with realtime.events.clone() as events:
                handled.extend([(event.id, trio.current_time()) async for event in events])

        await trio.sleep(2)
        realtime.stop(retry_within=60)
        await trio.sleep(60)
        assert handled == [(sent.id, pytest.approx(6))]


async def test_leaving_ends_channels_that_wait_for_redeliveries(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime:
            await kadoa.wait_subscribed(1)
            kadoa.publish()
            await fail_once(realtime, 60)
            realtime.stop(retry_within=1e6)
        with trio.fail_after(1), pytest.raises(trio.EndOfChannel):
            await realtime.events.receive()


async def test_event_that_waits_for_its_redelivery_is_not_passed_by_the_position(autojump_clock: Any) -> None:
    store = MemoryCursorStore()
    async with open_simulated_kadoa() as kadoa:
        options: Any = {"endpoints": kadoa.endpoints, "cursor_store": store}
        async with open_realtime(kadoa.api_key, **options) as realtime:
            await kadoa.wait_subscribed(1)
            kadoa.publish()
            await realtime.events.receive()
            await trio.sleep(60)
            kadoa.publish_many(3)
            failed = await fail_once(realtime, 1e5)
            async with realtime.events.batch(max_events=2):
                pass
        async with open_realtime(kadoa.api_key, **options) as realtime, realtime.events.batch(within=60) as batch:
            assert [event.id for event in batch] == [failed]


async def test_redeliveries_stay_within_max_unsettled(autojump_clock: Any, pair: Any) -> None:
    async with pair(limits=Limits(unsettled=5)) as (kadoa, realtime):
        kadoa.publish_many(20)
        handled = 0
        await fail_once(realtime, 1_000)
        with trio.move_on_after(500):
            async for _ in realtime.events:
                handled += 1
        realtime.events.settle()
        assert handled == 4  # the fifth would be too far from the oldest unsettled one
        assert realtime.events.statistics().unsettled <= 5
        with trio.move_on_after(1_000):
            async for _ in realtime.events:
                handled += 1
        assert handled == 20


# ---- process -------------------------------------------------------------------------------------------------------


class Handler:
    """Handles events, and remembers how."""

    def __init__(self, *, seconds: float = 0.0, failing: dict[str, int] | None = None) -> None:
        self.seconds = seconds
        self.left = dict(failing or {})
        """How often each of these fails before it succeeds."""
        self.handled: list[str] = []
        self.begun: list[tuple[str, float]] = []
        self.running = self.most = 0

    async def __call__(self, event: Event) -> None:
        self.begun.append((event.id, trio.current_time()))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await trio.sleep(self.seconds)
            if self.left.get(event.id, 0) > 0:
                self.left[event.id] -= 1
                raise OSError("not now")
            self.handled.append(event.id)
        finally:
            self.running -= 1


async def stop_when_settled(kadoa: SimulatedKadoa, realtime: Realtime) -> None:
    await kadoa.wait_settled()
    realtime.stop()


async def test_process_handles_every_event_with_its_workers(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        sent = kadoa.publish_many(100)
        nursery.start_soon(stop_when_settled, kadoa, realtime)
        handler = Handler(seconds=1)
        done = await process(realtime.events, handler, workers=5)
        assert done == Processed(handled=100, dead=0, failures=0, unsettled=0)
        assert [event for event, _ in handler.begun] == sorted(handler.handled) == ids(sent)
        assert handler.most == 5
        assert trio.current_time() == pytest.approx(20)


async def test_process_keeps_the_order_of_each_key(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        sent = [kadoa.publish(draft) for draft in of(*"aabacabbcaad" * 5)]
        failing = {event.id or "": number % 3 for number, event in enumerate(sent)}
        handler = Handler(seconds=0.5, failing=failing)
        nursery.start_soon(stop_when_settled, kadoa, realtime)
        keys = {}

        def key(event: Event) -> str | None:
            keys[event.id] = event.workflow_id
            return event.workflow_id

        done = await process(realtime.events, handler, workers=3, key=key)
        assert done == Processed(handled=60, dead=0, failures=60, unsettled=0)
        for name in "abcd":
            mine = [event for event in ids(sent) if keys[event] == name]
            assert [event for event in handler.handled if keys[event] == name] == mine
        assert handler.most == 3


async def test_failing_event_holds_up_its_own_key_only(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = [kadoa.publish(draft) for draft in of("a", "b", "a", "b", "c")]
        handler = Handler(failing={sent[0].id or "": 10**6})
        with trio.move_on_after(3_600):
            await process(realtime.events, handler, key=lambda event: event.workflow_id)
        assert sorted(handler.handled) == [sent[1].id, sent[3].id, sent[4].id]
        attempts = [time for event, time in handler.begun if event == sent[0].id]
        assert 100 < len(attempts) < 600  # the wait grows up to 30 s
        # They go back, in order; the one that was tried counts its attempts.
        async with realtime.events.batch(within=0) as batch:
            assert [event.id for event in batch] == [sent[0].id, sent[2].id]
            assert batch.attempt >= len(attempts)


async def test_event_is_a_dead_letter_after_its_attempts(autojump_clock: Any, pair: Any) -> None:
    dead = MemoryDeadLetters()
    failures: list[FailedAttempt] = []
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        sent = [kadoa.publish(draft) for draft in of("a", "a", "b")]
        handler = Handler(failing={sent[0].id or "": 10**6})
        nursery.start_soon(stop_when_settled, kadoa, realtime)
        done = await process(
            realtime.events,
            handler,
            key=lambda event: event.workflow_id,
            retry=RetryPolicy(initial=8, maximum=8),
            max_attempts=3,
            dead_letters=dead,
            on_failure=failures.append,
        )
        assert done == Processed(handled=2, dead=1, failures=3, unsettled=0)
        assert handler.handled == [sent[2].id, sent[1].id]
        (letter,) = dead.letters
        assert (letter.event.id, letter.attempts, letter.reason) == (sent[0].id, 3, "OSError: not now")
        assert isinstance(letter.error, OSError)
        assert [(one.attempt, one.dead) for one in failures] == [(1, False), (2, False), (3, True)]
        assert [0 <= (one.delay or 0) <= 8 for one in failures] == [True] * 3
        assert "attempt 3 failed (OSError: not now); a dead letter now" in str(failures[-1])
        statistics = realtime.statistics()
        assert (statistics.settled, statistics.dead, statistics.redelivered) == (3, 1, 2)


async def test_dead_letters_that_fail_end_process_and_lose_nothing(autojump_clock: Any, pair: Any) -> None:
    dead = MemoryDeadLetters()
    dead.fault = OSError("the disk is full")
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        handler = Handler(failing={sent[0].id or "": 1})
        with pytest.raises(OSError, match="the disk is full"):
            await process(realtime.events, handler, max_attempts=1, dead_letters=dead)
        async with realtime.events.batch(within=0) as batch:
            assert batch.events[0].id == sent[0].id


async def test_what_is_no_exception_leaves_process_as_it_is(autojump_clock: Any, pair: Any) -> None:
    class Leave(BaseException):
        pass

    async def leave(event: Event) -> None:
        await trio.sleep(1)
        raise Leave

    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(20)
        with pytest.raises(Leave):
            await process(realtime.events, leave, workers=2)
        async with realtime.events.batch(within=0) as batch:
            assert [event.id for event in batch] == ids(sent)
            assert batch.attempt == 2


async def test_key_that_raises_ends_process_and_loses_nothing(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(5)
        await trio.sleep(1)
        with pytest.raises(TypeError, match="unhashable"):
            await process(realtime.events, Handler(), key=lambda event: [event.id])
        async with realtime.events.batch(within=0) as batch:
            assert [event.id for event in batch] == ids(sent)
            assert batch.attempt == 1


async def test_process_takes_no_more_than_its_look_ahead(
    autojump_clock: Any, pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        [kadoa.publish(draft) for draft in of(*"a" * 50, *"b" * 5)]
        gate = trio.Event()
        handler = Handler()

        async def handle(event: Event) -> None:
            if event.workflow_id == "a":
                await gate.wait()
            await handler(event)

        nursery.start_soon(
            functools.partial(
                process, realtime.events, handle, workers=3, key=lambda one: one.workflow_id, look_ahead=20
            )
        )
        await trio.sleep(100)
        # One key has everything that may be taken. The log says so, once.
        assert handler.handled == []
        assert realtime.events.statistics().buffered_events == 35
        said = [record.getMessage() for record in caplog.records if record.name == "kadoa_trio.process"]
        assert len(said) == 1
        assert "the key 'a' has 20 of the 20 events" in said[0]
        assert "look_ahead=20" in said[0]
        gate.set()
        await kadoa.wait_settled()
        assert len(handler.handled) == 55
        realtime.stop()


async def test_process_leaves_to_the_next_run_what_fails_after_the_stop(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryCursorStore()
    async with open_simulated_kadoa() as kadoa:
        options: Any = {"endpoints": kadoa.endpoints, "cursor_store": store}
        async with open_realtime(kadoa.api_key, **options) as realtime, trio.open_nursery() as nursery:
            await kadoa.wait_subscribed(1)
            kadoa.publish()
            await realtime.events.receive()
            await trio.sleep(60)
            realtime.events.settle()
            sent = [kadoa.publish(draft) for draft in of("a", "a", "b", "b", "c")]
            handler = Handler(failing={sent[0].id or "": 1, sent[2].id or "": 1}, seconds=2)

            @nursery.start_soon
            async def stop() -> None:
                await trio.sleep(1)
                realtime.stop()

            done = await process(realtime.events, handler, key=lambda event: event.workflow_id)
            # In their order: what came after a failed event of its key was not handled before it.
            assert done == Processed(handled=1, dead=0, failures=2, unsettled=4)
            assert handler.handled == [sent[4].id]
            assert "left to the next run, because the channel has ended" in caplog.text
        async with open_realtime(kadoa.api_key, **options) as realtime, trio.open_nursery() as nursery:
            nursery.start_soon(stop_when_settled, kadoa, realtime)
            done = await process(realtime.events, handler, key=lambda event: event.workflow_id)
            assert done.handled == 4
            assert sorted(handler.handled) == sorted(ids(sent))


async def test_process_retries_after_the_stop_as_long_as_it_is_asked(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        sent = kadoa.publish_many(5)
        handler = Handler(failing={sent[0].id or "": 3}, seconds=1)

        @nursery.start_soon
        async def stop() -> None:
            await trio.sleep(0.5)
            realtime.stop(retry_within=60)

        done = await process(realtime.events, handler)
        assert done == Processed(handled=5, dead=0, failures=3, unsettled=0)


async def test_fault_of_the_client_is_raised_when_all_is_handled(autojump_clock: Any, pair: Any) -> None:
    async with pair(limits=Limits(message_size=2_000)) as (kadoa, realtime):
        kadoa.publish_many(20)
        await trio.sleep(30)
        kadoa.publish(workflow_failed(reason="x" * 3_000))
        handler = Handler(seconds=30)
        with pytest.raises(Exception, match=r"Limits\.message_size"):
            await process(realtime.events, handler, workers=2)
        assert len(handler.handled) == 20


async def test_fault_that_process_could_not_raise_is_raised_on_leaving(autojump_clock: Any, pair: Any) -> None:
    with pytest.raises(Exception, match=r"Limits\.message_size"):
        async with pair(limits=Limits(message_size=2_000)) as (kadoa, realtime):
            kadoa.publish_many(2)
            await trio.sleep(30)
            kadoa.publish(workflow_failed(reason="x" * 3_000))
            with trio.move_on_after(600) as scope:
                await process(realtime.events, Handler(seconds=1e6))
            assert scope.cancelled_caught


async def test_handler_that_never_waits_lets_other_tasks_run(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        kadoa.publish_many(200)
        await trio.sleep(1)
        turns = handled = 0

        async def handle(event: Event) -> None:
            nonlocal handled
            handled += 1

        @nursery.start_soon
        async def other() -> None:
            nonlocal turns
            while handled < 200:
                turns += 1
                await trio.lowlevel.checkpoint()

        nursery.start_soon(stop_when_settled, kadoa, realtime)
        await process(realtime.events, handle, workers=1)
        assert turns >= 100


async def test_log_has_failures_but_not_all_of_many(
    autojump_clock: Any, pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        sent = kadoa.publish_many(100)
        handler = Handler(failing=dict.fromkeys(ids(sent), 1))
        nursery.start_soon(stop_when_settled, kadoa, realtime)
        await process(realtime.events, handler)
        said = [record for record in caplog.records if record.name == "kadoa_trio.process"]
        assert 5 <= len(said) <= 6
        assert said[0].levelno == logging.WARNING
        assert "attempt 1 failed (OSError: not now); again in 0.0" in said[0].getMessage()


async def test_what_process_refuses(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (_kadoa, realtime):
        handler = Handler()
        wrong: list[dict[str, Any]] = [
            {"events": realtime},
            {"handle": "print"},
            {"workers": 0},
            {"key": "workflow_id"},
            {"retry": 3},
            {"max_attempts": 0, "dead_letters": MemoryDeadLetters()},
            {"max_attempts": 3},
            {"dead_letters": "dead.jsonl"},
            {"look_ahead": 7},
            {"on_failure": 1},
        ]
        for options in wrong:
            arguments: dict[str, Any] = {"events": realtime.events, "handle": handler, **options}
            with pytest.raises(ConfigurationError, match=next(iter(options))):
                await process(arguments.pop("events"), arguments.pop("handle"), **arguments)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(realtime.events.receive)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await process(realtime.events, handler)
            nursery.cancel_scope.cancel()


# ---- files of dead letters -----------------------------------------------------------------------------------------


async def test_file_of_dead_letters_can_be_handled_again(tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    letters = DeadLetterFile(path)
    now = datetime(2026, 1, 2, 3, tzinfo=UTC)
    events = [make_event(workflow_failed(reason=f"r{number}")) for number in range(3)]
    for event in events:
        await letters.add(DeadLetter(event=event, attempts=5, reason="a\nreason", failed_at=now))
    path.write_bytes(path.read_bytes() + b"not a letter\n")
    seen: list[Event] = []

    async def handle(event: Event) -> None:
        seen.append(event)
        if event.id == events[1].id:
            raise ValueError("again")

    done = await letters.replay(handle)
    assert (done.delivered, done.remaining, done.unreadable) == (2, 2, 1)
    assert [(one.id, one.type, one.message, one.timestamp) for one in seen] == [
        (one.id, one.type, one.message, one.timestamp) for one in events
    ]
    text = path.read_text()
    assert '"attempts":6,"why":"ValueError: again"' in text
    assert "not a letter" in text
    done = await letters.replay(handle)
    assert (done.delivered, done.remaining) == (0, 2)
    assert len(seen) == 4


async def test_forwarder_replays_the_letters_of_process(tmp_path: Path) -> None:
    letters = DeadLetterFile(tmp_path / "dead.jsonl")
    await letters.add(
        DeadLetter(event=make_event(workflow_failed()), attempts=1, reason="no", failed_at=datetime.now(UTC))
    )
    async with open_forwarder("http://127.0.0.1:1/hook", max_attempts=1, dead_letters=tmp_path / "other") as forwarder:
        done = await forwarder.replay(tmp_path / "dead.jsonl")
    # Nobody listens there. It was a letter, and stays one.
    assert (done.delivered, done.remaining, done.unreadable) == (0, 1, 0)


# ---- orderly ends --------------------------------------------------------------------------------------------------


@pytest.fixture
def _as_in_a_terminal() -> Iterator[None]:
    """Have SIGINT handled as in a terminal: a script's background starts processes that ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


async def raise_signal(number: signal.Signals) -> None:
    signal.raise_signal(number)
    await trio.testing.wait_all_tasks_blocked()


@pytest.mark.usefixtures("_as_in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_stops_the_client_and_lets_the_block_finish(
    number: signal.Signals, autojump_clock: Any, pair: Any
) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        await trio.sleep(1)
        handled = []
        async with stopping_on_signals(realtime) as stopping:
            assert stopping.signal is None
            async for event in realtime.events:
                if not handled:
                    await raise_signal(number)
                    assert realtime.state is State.STOPPED
                handled.append(event.id)
        assert handled == ids(sent)
        assert stopping.signal is number
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("_as_in_a_terminal")
@pytest.mark.parametrize(
    ("second", "seconds", "code"), [(signal.SIGINT, 5, 130), (signal.SIGTERM, 5, 143), (None, 20, 143)]
)
async def test_second_signal_or_the_end_of_grace_cancels_the_block(
    second: signal.Signals | None, seconds: float, code: int, autojump_clock: Any, pair: Any
) -> None:
    async with pair() as (_kadoa, realtime), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await trio.sleep(1)
            signal.raise_signal(signal.SIGTERM)
            await trio.sleep(5)
            if second is not None:
                signal.raise_signal(second)

        with pytest.raises(SystemExit) as caught:
            async with stopping_on_signals(realtime):
                await trio.sleep_forever()
        assert caught.value.code == code
        assert trio.current_time() == pytest.approx(1 + seconds)


async def test_block_that_fails_while_it_ends_raises_its_own_error(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (_kadoa, realtime):
        with pytest.raises(ValueError, match="mine"):
            async with stopping_on_signals(realtime):
                await raise_signal(signal.SIGTERM)
                raise ValueError("mine")


@pytest.mark.usefixtures("_as_in_a_terminal")
@pytest.mark.parametrize("ignored", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
async def test_signal_that_the_process_ignores_stays_ignored(
    ignored: list[signal.Signals], autojump_clock: Any, pair: Any
) -> None:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    try:
        async with pair() as (_kadoa, realtime), stopping_on_signals(realtime) as stopping:
            for number in ignored:
                await raise_signal(number)
            assert realtime.state is not State.STOPPED
            assert stopping.signal is None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def test_what_stopping_on_signals_refuses(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (_kadoa, realtime):
        for arguments, options in (
            ((), {}),
            ((realtime.events,), {}),
            ((realtime,), {"grace": -1}),
            ((realtime,), {"retry_within": math.inf}),
        ):
            with pytest.raises(ConfigurationError):
                async with stopping_on_signals(*arguments, **options):
                    pass

    def elsewhere() -> None:
        async def main() -> None:
            async with (
                open_simulated_kadoa() as kadoa,
                open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime,
                stopping_on_signals(realtime),
            ):
                pass

        with pytest.raises(RuntimeError, match="main thread"):
            trio.run(main)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await trio.to_thread.run_sync(thread.join)


# ---- health, hooks, and keys that change ---------------------------------------------------------------------------


async def test_health_of_a_client_that_is_well(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        before = datetime.now(UTC)
        kadoa.publish_many(2)
        event = await realtime.events.receive()
        await realtime.events.receive()
        health = realtime.health()
        assert health.healthy
        assert (str(health), health.problems, health.live, health.state) == ("live", (), True, State.LIVE)
        for time in (health.last_frame_at, health.last_event_at, health.last_settled_at, event.received_at):
            assert time is not None
            assert before <= time <= datetime.now(UTC)
        assert (health.unsettled, health.unsaved, health.open_gaps) == (1, 0, 0)
        assert health.oldest_unsettled is not None
        assert health.oldest_unsettled_age == pytest.approx(trio.current_time(), abs=1)


async def test_health_names_an_event_that_is_stuck(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish()
        await realtime.events.receive()
        await trio.sleep(299)
        assert realtime.health().healthy
        await trio.sleep(2)
        health = realtime.health()
        assert health.problems == (f"event {sent.id} is not settled for 301 s",)
        assert realtime.health(stuck_after=math.inf).healthy
        realtime.events.settle()
        assert realtime.health().healthy
        assert realtime.health().oldest_unsettled_age is None


async def test_health_during_an_outage_and_at_the_end(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        await trio.sleep(60)
        with kadoa.suffering(refuse_connections=True):
            kadoa.newest.reset()
            await trio.sleep(120)
            health = realtime.health()
            assert not health.live
            assert len(health.problems) == 1
            assert "no connection is live for 120 s" in str(health)
        await realtime.wait_live()
        kadoa.newest.drain(10_000)
        await trio.sleep(5)
        assert realtime.state is State.REPLACING
        assert realtime.health().live
        realtime.stop()
        assert "the client was stopped" in str(realtime.health())
    assert "the client was stopped" in str(realtime.health())
    for wrong in (0, -1, math.nan, "1"):
        with pytest.raises(ConfigurationError, match="stuck_after"):
            realtime.health(stuck_after=wrong)


async def test_health_of_a_program_that_is_too_slow_and_of_a_store_that_fails(autojump_clock: Any) -> None:
    class FullDisk:
        """A store in memory whose saves fail while it is full."""

        full = False

        async def open(self, team: str, consumer: str) -> CursorSession:
            self.inner = await MemoryCursorStore().open(team, consumer)
            return self

        async def load(self) -> Position | None:
            return await self.inner.load()

        async def save(self, position: Position) -> None:
            if self.full:
                raise CursorStoreError("disk full")
            await self.inner.save(position)

        async def aclose(self) -> None:
            await self.inner.aclose()

    store = FullDisk()
    async with (
        open_simulated_kadoa() as kadoa,
        open_realtime(
            kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=store, limits=Limits(buffered_events=3, unsaved=6)
        ) as realtime,
    ):
        await kadoa.wait_subscribed(1)
        kadoa.publish_many(10)
        await trio.sleep(10)
        assert realtime.health().healthy  # a full buffer is normal for a program that works off a backlog
        store.full = True
        await realtime.events.receive()
        await realtime.events.receive()
        await trio.sleep(5)
        assert "the position cannot be saved: disk full" in str(realtime.health())
        assert realtime.health().unsaved == 1
        for _ in range(4):
            await realtime.events.receive()
        realtime.events.settle()
        await trio.sleep(5)
        assert "reading is paused: 0 events are not settled (maximum 10000), 6 are not saved" in str(realtime.health())
        store.full = False
        await trio.sleep(60)
        assert realtime.health().unsaved == 0


async def test_hook_sees_notices_before_entering_returns(autojump_clock: Any) -> None:
    seen: list[Notice] = []
    async with open_simulated_kadoa() as kadoa:
        with kadoa.suffering(refuse_connections=True), pytest.raises(ConnectionFailedError):
            async with open_realtime(
                kadoa.api_key, endpoints=kadoa.endpoints, on_notice=seen.append, timeouts=Timeouts(connect=20)
            ):
                pass
        assert isinstance(seen[0], AttemptStarted)
        assert len(seen) > 5
        seen.clear()
        async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, on_notice=seen.append) as realtime:
            await realtime.wait_live()
            published = []
            with pytest.raises(trio.WouldBlock):
                while True:
                    published.append(realtime.notices.receive_nowait())
            assert published == seen
            assert all(notice.at.year > 2000 for notice in seen)


async def test_hook_that_turns_out_to_be_async_is_an_error_in_the_log(
    autojump_clock: Any, pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def hook(seen: list[Notice], notice: Notice) -> None:
        seen.append(notice)

    seen: list[Notice] = []
    async with pair(on_notice=lambda notice: hook(seen, notice)) as (_kadoa, realtime):
        await realtime.wait_live()
    assert not seen
    assert "on_notice has raised TypeError: it is an async function" in caplog.text


async def test_hook_that_raises_changes_nothing(
    autojump_clock: Any, pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def hook(notice: Notice) -> None:
        raise KeyError(type(notice).__name__)

    async with pair(on_notice=hook) as (kadoa, realtime):
        sent = kadoa.publish()
        assert (await realtime.events.receive()).id == sent.id
        await trio.sleep(60)
        assert realtime.state is State.LIVE
    said = [record for record in caplog.records if "on_notice has raised" in record.getMessage()]
    assert said
    assert said[0].levelno == logging.ERROR
    assert "KeyError: 'AttemptStarted' for a notice AttemptStarted; the client goes on" in said[0].getMessage()


async def test_log_records_carry_their_notice(autojump_clock: Any, pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kadoa_trio.client")
    async with pair() as (_kadoa, realtime):
        await realtime.wait_live()
    assert any(isinstance(getattr(record, "notice", None), Live) for record in caplog.records)


async def test_key_that_changes_is_asked_for_at_every_attempt(autojump_clock: Any, leaks: Any) -> None:
    keys = ["sk-first-0123456789abcdef", "sk-second-0123456789abcdef", "sk-third-0123456789abcdef"]
    leaks.guard(*keys)
    asked = 0

    async def give() -> str:
        nonlocal asked
        asked += 1
        await trio.sleep(1)
        kadoa.api_key = keys[asked - 1]  # the server accepts the newest one only
        return keys[asked - 1]

    async with open_simulated_kadoa() as kadoa, open_realtime(give, endpoints=kadoa.endpoints) as realtime:
        await realtime.wait_live()
        assert asked == 1
        await trio.sleep(60)
        kadoa.newest.drain(0)
        await trio.sleep(60)
        assert asked == 2
        kadoa.newest.reset()
        await trio.sleep(60)
        assert asked == 3
        assert realtime.state is State.LIVE
        leaks.search(repr(realtime), repr(realtime._assembly))


async def test_function_that_gives_the_key_may_be_a_plain_one(autojump_clock: Any) -> None:
    async with (
        open_simulated_kadoa() as kadoa,
        open_realtime(lambda: kadoa.api_key, endpoints=kadoa.endpoints) as realtime,  # type: ignore[arg-type,return-value]
    ):
        await realtime.wait_live()


@pytest.mark.parametrize(
    ("give", "why"),
    [
        ("raises", "the function given as api_key has failed: LookupError: no vault"),
        ("hangs", "the function given as api_key has returned no key within 10 s"),
        ("number", "has not returned printable ASCII"),
        ("spaces", "has not returned printable ASCII"),
    ],
)
async def test_key_that_cannot_be_had_is_a_failed_attempt(give: str, why: str, autojump_clock: Any) -> None:
    works = False

    async def key() -> Any:
        if works:
            return kadoa.api_key
        if give == "raises":
            raise LookupError("no vault")
        if give == "hangs":
            await trio.sleep_forever()
        return 5 if give == "number" else " key-with-spaces "

    async with open_simulated_kadoa() as kadoa:
        with pytest.raises(ConnectionFailedError, match="token") as caught:
            async with open_realtime(key, endpoints=kadoa.endpoints, timeouts=Timeouts(connect=60)):
                pass
        assert why in str(caught.value.__cause__)
        works = True
        async with open_realtime(key, endpoints=kadoa.endpoints) as realtime:
            await realtime.wait_live()
            await trio.sleep(60)
            works = False
            kadoa.newest.reset()
            await trio.sleep(600)
            assert realtime.state is State.CONNECTING
            works = True
            await realtime.wait_live()


async def test_events_have_the_time_at_which_they_were_received(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        kadoa.publish()
        event = await realtime.events.receive()
        assert event.received_at is not None
        assert abs(datetime.now(UTC) - event.received_at) < timedelta(minutes=1)
        kadoa.newest.send_raw('{"type": "odd", "id": 7, "message": 1}')
        event = await realtime.events.receive()
        assert event.received_at is not None
        assert make_event(workflow_failed()).received_at is None


async def test_statistics_count_what_graphs_need(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        kadoa.publish_many(10)
        await trio.sleep(1)
        async with realtime.events.batch(max_events=10):
            pass
        await trio.sleep(1)
        statistics = realtime.events.statistics()
        assert (statistics.buffered_events, statistics.peak_buffered_events) == (0, 10)
        assert realtime.statistics().settled == 10
