"""Admission: space, dedupe and buffer in one step."""

from __future__ import annotations

import contextlib
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import hypothesis.strategies as st
import pytest
import trio
import trio.testing
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kadoa_trio import Event, GapReason, Limits
from kadoa_trio._engine._admission import Admission
from kadoa_trio._engine._buffer import Buffer, BufferedEvent
from kadoa_trio._engine._channel import EventChannel
from kadoa_trio._engine._ledger import Ledger, Moment
from kadoa_trio._engine._reporter import Reporter
from kadoa_trio._settings import Settings
from kadoa_trio.notices import PossibleGap
from kadoa_trio.testing import make_event, workflow_failed, workflow_finished

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> Moment:
    return BEGIN + timedelta(seconds=seconds), seconds


def event(number: int, *, failed: bool = True) -> Event:
    draft = workflow_failed() if failed else workflow_finished()
    return make_event(draft, id=f"e{number}", cursor=f"1-{number}")


@attrs.define(eq=False)
class Observer:
    settled_ids: list[str] = attrs.field(factory=list)
    changes: int = 0

    def settled(self, event: Event) -> None:
        self.settled_ids.append(event.id)

    def position_changed(self) -> None:
        self.changes += 1


class Parts:
    """An admission with its ledger and its buffer, and a connection that is live."""

    def __init__(
        self,
        *,
        types: frozenset[str] | None = None,
        buffered: int = 3,
        buffered_bytes: int = 10**6,
        window: int = 200,
    ) -> None:
        limits = Limits(buffered_events=buffered, buffered_bytes=buffered_bytes, unsettled=100, dedupe_window=200)
        settings = Settings(limits=limits)
        self.reporter = Reporter(lambda: BEGIN, clock=lambda: 0.0)
        self.ledger = Ledger(window)
        self.buffer = Buffer(settings, self.ledger, self.reporter, random.Random(1))
        self.admission = Admission(self.ledger, self.buffer, self.reporter, event_types=types, workflow_ids=None)
        self.observer = Observer()
        self.buffer.observe(self.observer)
        self.admission.observe(self.observer)
        self.ledger.open(1, at(0))
        self.ledger.live(1, at(0))

    def admit(self, one: Event, *, generation: int = 1) -> bool:
        admitted = self.admission.try_admit(one, generation, at(1), at(1))
        self.ledger.check()
        return admitted

    @property
    def buffered(self) -> int:
        return self.buffer.statistics().buffered_events


async def test_event_without_space_changes_nothing() -> None:
    parts = Parts(buffered=2)
    assert parts.admit(event(1))
    assert parts.admit(event(2))
    assert not parts.admit(event(3))
    assert (parts.admission.received, parts.buffered) == (2, 2)
    assert not parts.ledger.knows("e3")
    assert parts.ledger.resume_cursor == "1-2"


async def test_repeat_needs_no_space_and_is_not_buffered() -> None:
    parts = Parts(buffered=1)
    assert parts.admit(event(1))
    assert parts.admit(event(1))
    assert (parts.admission.received, parts.buffered, parts.ledger.repeated) == (1, 1, 1)


async def test_filtered_event_is_settled_at_once_and_observed() -> None:
    parts = Parts(types=frozenset({"workflow_finished"}))
    assert parts.admit(event(1))
    assert parts.admit(event(2, failed=False))
    assert (parts.admission.received, parts.admission.filtered, parts.buffered) == (2, 1, 1)
    assert parts.observer.settled_ids == ["e1"]
    assert parts.ledger.settled_position(at(2)).cursor == "1-1"


async def test_filtered_event_does_not_wait_for_space_of_its_size() -> None:
    parts = Parts(types=frozenset({"workflow_finished"}), buffered_bytes=1_000)
    assert parts.admit(event(1, failed=False))
    large = make_event(workflow_failed(reason="x" * 2_000), id="e2", cursor="1-2")
    with trio.fail_after(5):
        await parts.admission.wait_space(large)
    assert parts.admit(large)


async def test_event_of_the_log_enters_by_the_same_parts() -> None:
    parts = Parts(buffered=1)
    assert parts.admission.try_admit_from_log(event(1))
    assert not parts.admission.try_admit_from_log(event(2))
    assert parts.admit(event(1))  # a connection brings it, too: a repeat
    assert (parts.admission.received, parts.buffered) == (1, 1)


async def test_event_whose_connection_has_ended_moves_no_cursor() -> None:
    parts = Parts()
    assert parts.admit(event(1))
    parts.ledger.ended(1, at(1))
    assert parts.admission.try_admit(event(2), 1, at(2), at(2), apart=True)
    assert parts.admission.try_admit(event(2), 1, at(2), at(2), apart=True)
    assert (parts.admission.received, parts.ledger.repeated) == (2, 0)
    assert parts.ledger.resume_cursor == "1-1"


async def test_nothing_is_admitted_after_the_end() -> None:
    parts = Parts()
    parts.admission.end()
    assert parts.admit(event(1))  # the caller need not wait
    assert (parts.admission.received, parts.buffered) == (0, 0)
    assert not parts.ledger.knows("e1")


async def test_gap_is_published_and_observed() -> None:
    parts = Parts()
    assert parts.admit(make_event(workflow_failed(), id="e1"))
    parts.ledger.ended(1, at(60))
    parts.ledger.open(2, at(61))
    parts.ledger.live(2, at(61))
    assert parts.admission.try_admit(make_event(workflow_failed(), id="e2"), 2, at(62), at(62))
    notice = parts.reporter.notices.receive_nowait()
    assert isinstance(notice, PossibleGap)
    assert parts.observer.changes == 1
    with pytest.raises(trio.WouldBlock):
        parts.reporter.notices.receive_nowait()


@pytest.mark.parametrize("waiting", [1, 2, 3])
async def test_handle_that_is_closed_after_it_was_woken_leaves_the_events_to_the_others(waiting: int) -> None:
    parts = Parts(buffered=10)
    handles = [EventChannel(parts.buffer) for _ in range(waiting + 1)]
    received: list[str] = []

    async def receive(handle: EventChannel) -> None:
        try:
            received.append((await handle.receive()).id)
        except trio.ClosedResourceError:
            received.append("closed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive, handles[0])
        await trio.testing.wait_all_tasks_blocked()
        for handle in handles[1:]:
            nursery.start_soon(receive, handle)
        await trio.testing.wait_all_tasks_blocked()
        parts.admission.admit_many([event(number) for number in range(1, waiting + 1)], 1, at(1), at(1))
        handles[0].close()  # it has been handed the events, and has not run yet
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(received) == sorted(["closed", *(f"e{number}" for number in range(1, waiting + 1))])
        nursery.cancel_scope.cancel()
    for handle in handles[1:]:
        handle.settle()
    assert parts.ledger.unsettled == 0


# ---- in lists --------------------------------------------------------------------------------------------------------


async def test_list_is_admitted_up_to_the_first_event_without_space() -> None:
    parts = Parts(buffered=3)
    events = [event(number) for number in range(1, 6)]
    assert parts.admission.admit_many(events, 1, at(1), at(1)) == 3
    parts.ledger.check()
    assert (parts.admission.received, parts.buffered) == (3, 3)
    assert parts.ledger.resume_cursor == "1-3"
    assert not parts.ledger.knows("e4")
    assert parts.admission.admit_many(events[3:], 1, at(1), at(1)) == 0


async def test_bytes_bound_a_list() -> None:
    size = event(1).size
    parts = Parts(buffered=100, buffered_bytes=3 * size + size // 2)
    assert parts.admission.admit_many([event(number) for number in range(1, 6)], 1, at(1), at(1)) == 3
    large = make_event(workflow_failed(reason="x" * 10 * size), id="e9", cursor="1-9")
    empty = Parts(buffered_bytes=size)
    assert empty.admission.admit_many([large, event(10)], 1, at(1), at(1)) == 1  # alone, or it could never be delivered


async def test_repeats_in_a_list_need_no_space() -> None:
    parts = Parts(buffered=2)
    assert parts.admission.admit_many([event(1), event(1), event(2), event(1), event(3)], 1, at(1), at(1)) == 4
    parts.ledger.check()
    assert (parts.admission.received, parts.buffered, parts.ledger.repeated) == (2, 2, 2)


async def test_list_after_the_end_of_admission_is_dropped() -> None:
    parts = Parts()
    parts.admission.end()
    assert parts.admission.admit_many([event(1), event(2)], 1, at(1), at(1)) == 2
    assert (parts.admission.received, parts.buffered) == (0, 0)


async def test_list_of_a_connection_that_is_doubted_reports_a_gap() -> None:
    parts = Parts(buffered=10)
    assert parts.admission.admit_many([event(1)], 1, at(1), at(1)) == 1
    parts.ledger.open(2, at(2))
    parts.ledger.live(2, at(2))
    assert parts.admission.admit_many([event(2)], 1, at(3), at(3)) == 1
    parts.ledger.tick(2, at(70), at(70))
    assert parts.ledger.ended(1, at(71)) == []  # the other one may be about to bring event 2
    assert parts.admission.admit_many([event(3), event(4)], 2, at(72), at(72)) == 2
    parts.ledger.check()
    notice = parts.reporter.notices.receive_nowait()
    assert isinstance(notice, PossibleGap)
    assert notice.gap.reason is GapReason.NOT_REPLAYED


ENTRY = ("id", "seq", "generation", "moved", "cursor", "at", "ahead", "covered", "settled", "passed")
SOURCE = (
    "generation",
    "trusted",
    "decided",
    "doubted",
    "admitted",
    "by_newer",
    "first_event",
    "last",
    "heard",
)
"""What is compared of an entry, and of a connection in the ledger."""


class Stack(Parts):
    """An admission as the client's program uses it: events are taken out of the buffer, settled, or put back."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.handle = self.buffer.open_handle()
        self.in_hand: list[BufferedEvent] = []
        self.gaps: list[str] = []

    def waiting_batch(self) -> list[BufferedEvent] | None:
        try:
            return None if self.buffer.has_line else self.handle.receive_nowait()
        except trio.WouldBlock:
            return []

    def state(self) -> dict[str, Any]:
        """Give everything that can make a difference later."""
        self.ledger.check()
        ledger, channel = self.ledger, self.buffer.statistics()
        with contextlib.suppress(trio.WouldBlock):
            while True:
                notice = self.reporter.notices.receive_nowait()
                if isinstance(notice, PossibleGap):
                    self.gaps.append(repr(notice.gap))
        return {
            "entries": [[getattr(entry, name) for name in ENTRY] for entry in ledger._ids.values()],
            "order": [entry.id for entry in ledger._order],
            "sources": [[getattr(one, name) for name in SOURCE] for one in ledger._sources.values()],
            "leader": ledger._leader and ledger._leader.generation,
            "trails": [[left.entry.id for left in one.trail] for one in ledger._sources.values()],
            "snapshots": list(ledger._snapshots),
            "position": ledger.settled_position(at(0)),
            "cursor": (ledger.resume_cursor, ledger._cursor_at, ledger._cursor_seq, ledger._cursor_admitted),
            "counts": (ledger.repeated, ledger.settled_count, ledger.gap_count, ledger._admitted, ledger._seq),
            "admission": (self.admission.received, self.admission.filtered),
            "channel": channel,
            "in hand": [(one.event.id, one.attempt) for one in self.in_hand],
            "observed": (sorted(self.observer.settled_ids), self.observer.changes),
            "gaps": self.gaps,
        }


class ListsMachine(RuleBasedStateMachine):
    """Two clients in the same world: one handles events in lists, the other one by one. They must not differ."""

    @initialize(
        types=st.sampled_from([None, frozenset({"workflow_failed"})]),
        buffered=st.integers(1, 12),
        size=st.sampled_from([1_000, 10**6]),
    )
    def begin(self, types: frozenset[str] | None, buffered: int, size: int) -> None:
        options = {"types": types, "buffered": buffered, "buffered_bytes": size, "window": 8}
        self.lists, self.single = Stack(**options), Stack(**options)
        self.both = (self.lists, self.single)
        self.clock = 1.0
        self.generation = 1
        self.open = {1}
        self.published = 0

    def now(self) -> Moment:
        return at(self.clock)

    @rule(data=st.data(), count=st.integers(1, 8))
    def deliver(self, data: st.DataObject, count: int) -> None:
        if not self.open:
            return
        generation = data.draw(st.sampled_from(sorted(self.open)))
        events = []
        for _ in range(count):
            if self.published and data.draw(st.integers(0, 3)) == 0:
                number = data.draw(st.integers(max(1, self.published - 10), self.published))
            else:
                self.published += 1
                number = self.published
            draft = workflow_failed() if number % 3 else workflow_finished()
            cursor = None if number % 7 == 0 else f"1-{number // 2}"  # some events share one, some have none
            events.append(make_event(draft, id=f"e{number}", cursor=cursor))
        arrived = at(self.clock - data.draw(st.sampled_from([0.0, 0.5])))
        taken = self.lists.admission.admit_many(events, generation, self.now(), arrived)
        expected = 0
        for one in events:
            if not self.single.admission.try_admit(one, generation, self.now(), arrived):
                break
            expected += 1
        assert taken == expected

    @rule(most=st.integers(1, 6), size=st.sampled_from([1, 900, 10**6]))
    def take(self, most: int, size: int) -> None:
        batch = self.lists.waiting_batch()
        if batch == []:
            assert self.single.waiting_batch() == []
            return
        taken = self.lists.buffer.take_many(batch, most, size)
        self.lists.in_hand += taken
        assert 1 <= len(taken) <= most
        assert len(taken) == 1 or sum(one.event.size for one in taken) <= size
        for _ in taken:
            one = self.single.buffer.from_line()
            if one is None:
                batch = self.single.waiting_batch()
                assert batch
                one = self.single.buffer.split(batch)
            self.single.in_hand.append(one)

    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        count = len(self.lists.in_hand)
        chosen = data.draw(st.lists(st.integers(0, count - 1), unique=True)) if count else []
        if data.draw(st.booleans()):
            chosen.sort()
        self.lists.buffer.settle_many([self.lists.in_hand[at] for at in chosen])
        for at_index in chosen:
            self.single.buffer.settle_taken(self.single.in_hand[at_index])
        for stack in self.both:
            stack.in_hand = [one for index, one in enumerate(stack.in_hand) if index not in chosen]

    @rule()
    def put_back(self) -> None:
        self.lists.buffer.put_back(self.lists.in_hand)
        for one in reversed(self.single.in_hand):
            self.single.buffer.put_back([one])
        for stack in self.both:
            stack.in_hand = []

    @rule(promised=st.booleans())
    def connect(self, promised: bool) -> None:
        self.generation += 1
        self.open.add(self.generation)
        for stack in self.both:
            stack.ledger.open(self.generation, self.now(), promised=promised)
            stack.ledger.live(self.generation, self.now())

    @rule(data=st.data())
    def disconnect(self, data: st.DataObject) -> None:
        if not self.open:
            return
        generation = data.draw(st.sampled_from(sorted(self.open)))
        self.open.remove(generation)
        for stack in self.both:
            stack.admission.report_gaps(stack.ledger.ended(generation, self.now()))

    @rule(seconds=st.sampled_from([0.1, 3.0, 12.0]))
    def wait(self, seconds: float) -> None:
        self.clock += seconds
        for generation in sorted(self.open):
            for stack in self.both:
                stack.admission.report_gaps(stack.ledger.tick(generation, self.now()))

    @rule()
    def take_from_the_log(self) -> None:
        self.published += 1
        one = make_event(workflow_failed(), id=f"e{self.published}", cursor=f"1-{self.published // 2}")
        assert len({stack.admission.try_admit_from_log(one) for stack in self.both}) == 1

    @invariant()
    def nothing_differs(self) -> None:
        assert self.lists.state() == self.single.state()


ListsMachine.TestCase.settings = hypothesis_settings(max_examples=100, stateful_step_count=40)
TestLists = ListsMachine.TestCase
