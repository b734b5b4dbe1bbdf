"""Admission: space, dedupe and buffer in one step."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import attrs
import pytest
import trio

from kadoa_trio import Event, Limits
from kadoa_trio._engine._admission import Admission
from kadoa_trio._engine._buffer import Buffer
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

    def __init__(self, *, types: frozenset[str] | None = None, buffered: int = 3, buffered_bytes: int = 10**6) -> None:
        limits = Limits(buffered_events=buffered, buffered_bytes=buffered_bytes, unsettled=100, dedupe_window=200)
        settings = Settings(limits=limits)
        self.reporter = Reporter(lambda: BEGIN, clock=lambda: 0.0)
        self.ledger = Ledger(200)
        self.buffer = Buffer(settings, self.ledger, self.reporter)
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
