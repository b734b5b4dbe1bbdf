"""Tests of the pager: its handler without a server, and the whole program through faults and crashes, in virtual time.

Run them with ``pytest``. kadoa_trio provides the fixture ``simulated_kadoa``.
"""

from __future__ import annotations

import pager
import pytest
import trio
import trio.testing
from hypothesis import given, settings

from kadoa_trio import Event, MemoryCursorStore
from kadoa_trio.testing import Schedule, make_event, open_simulated_kadoa, workflow_failed, workflow_recovered
from kadoa_trio.testing.strategies import events, schedules


class Pages:
    """Receives pages and drops repeated ones, as a paging service does."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.broken = False

    async def __call__(self, event_id: str, text: str) -> None:
        await trio.sleep(0.1)
        if self.broken:
            raise OSError("the paging service is down")
        self.texts[event_id] = text


# ---- the handler alone -----------------------------------------------------------------------------------------------


@pytest.mark.trio
async def test_failure_is_paged_with_its_reason() -> None:
    pages = Pages()
    await pager.handle(make_event(workflow_failed(workflow_name="Prices", reason="no table"), id="e1"), pages)
    assert pages.texts == {"e1": "Prices has failed: no table"}


@given(events(odd=True))
def test_no_event_breaks_the_handler(event: Event) -> None:
    trio.run(pager.handle, event, Pages(), clock=trio.testing.MockClock(autojump_threshold=0))


# ---- the whole program, in virtual time ------------------------------------------------------------------------------


@pytest.mark.trio
async def test_every_failure_and_recovery_of_a_day_with_faults_is_paged(simulated_kadoa, autojump_clock) -> None:
    kadoa, pages = simulated_kadoa, Pages()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pager.run, pages, MemoryCursorStore())
        await kadoa.wait_subscribed(1)
        kadoa.publish(workflow_failed(reason="no table"))
        await kadoa.wait_settled()
        nursery.start_soon(kadoa.play, Schedule.chaos(7, seconds=24 * 3600, every=600))
        for _ in range(24):
            await trio.sleep(3600)
            kadoa.publish(workflow_failed())
            kadoa.publish(workflow_recovered())
        await kadoa.wait_settled()
        assert list(pages.texts) == [event.id for event in kadoa.published]
        nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_crash_before_a_page_was_sent_sends_it_after_the_restart(simulated_kadoa, autojump_clock) -> None:
    kadoa, pages, store = simulated_kadoa, Pages(), MemoryCursorStore()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pager.run, pages, store)
        await kadoa.wait_subscribed(1)
        kadoa.publish(workflow_failed())
        await kadoa.wait_settled()
        nursery.cancel_scope.cancel()

    pages.broken = True
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pager.run, pages, store)
            await kadoa.wait_subscribed(2)
            second = kadoa.publish(workflow_failed())
            await trio.sleep(60)
    assert caught.group_contains(OSError)
    assert store.position("pager").cursor == kadoa.published[0].cursor

    pages.broken = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pager.run, pages, store)
        await kadoa.wait_settled()
        nursery.cancel_scope.cancel()
    assert list(pages.texts) == [kadoa.published[0].id, second.id]
    assert kadoa.subscriptions[-1] == (3, kadoa.published[0].cursor)


@given(schedules(seconds=120))
@settings(max_examples=15, deadline=None)
def test_every_failure_is_paged_through_any_faults(schedule: Schedule) -> None:
    async def main() -> None:
        pages = Pages()
        async with open_simulated_kadoa() as kadoa:
            with kadoa.as_default():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pager.run, pages, MemoryCursorStore())
                    await kadoa.wait_subscribed(1)
                    kadoa.publish(workflow_failed())
                    await kadoa.wait_settled()
                    nursery.start_soon(kadoa.play, schedule)
                    for number in range(20):
                        await trio.sleep(7)
                        kadoa.publish(workflow_failed(reason=f"reason {number}"))
                    with trio.fail_after(3600):  # in virtual time: a test that never ends shows nothing
                        await kadoa.wait_settled()
                    nursery.cancel_scope.cancel()
            assert list(pages.texts) == [event.id for event in kadoa.published]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
