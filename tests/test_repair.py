"""Gaps repaired from the notification log; the whole client in memory.

Virtual time, and a wall clock that goes with it on both sides: a repair
compares the times of the log with those of the gap.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from kadoa_trio import (
    Event,
    Gap,
    GapReason,
    Limits,
    MemoryCursorStore,
    Position,
    Realtime,
    RetryPolicy,
    Timeouts,
    _client,
    open_realtime,
)
from kadoa_trio._engine import _repair
from kadoa_trio._engine._ledger import MAX_GAPS
from kadoa_trio._engine._repair import channel_types
from kadoa_trio._net._wire import event_from_log
from kadoa_trio.notices import GapRemains, GapRepaired, Notice
from kadoa_trio.testing import SimulatedKadoa, open_simulated_kadoa
from kadoa_trio.workspace import _notifications

HOUR = 3600.0
OPTIONS: dict[str, Any] = {
    "repair_gaps": True,
    # Without cursors, each replacement in a quiet workspace is a gap.
    "timeouts": Timeouts(heartbeat=1_000.0, connect=1e6, max_age=math.inf),
    "retry": RetryPolicy(initial=2.0, maximum=5.0),
}
LAST_TRY = sum(_repair.REPAIR_DELAYS) + 30
"""After it a gap has its result, also where no newer event shows that the log has caught up."""


def wall() -> datetime:
    return datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=trio.current_time())


@contextlib.contextmanager
def virtual_wall_clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_client, "_utc_now", wall)
        yield


@pytest.fixture(autouse=True)
def _wall_clock() -> Iterator[None]:
    with virtual_wall_clock():
        yield


@attrs.define
class World:
    """A client that repairs, its server, and what the client has handed out and reported."""

    kadoa: SimulatedKadoa
    realtime: Realtime
    received: list[Event] = attrs.field(factory=list)
    notices: list[Notice] = attrs.field(factory=list)

    @property
    def ids(self) -> list[str]:
        return [event.id for event in self.received]

    @property
    def from_log(self) -> list[str]:
        return [event.id for event in self.received if event.from_log]

    @property
    def repaired(self) -> list[int]:
        return [notice.events for notice in self.notices if isinstance(notice, GapRepaired)]

    @property
    def remains(self) -> list[GapRemains]:
        return [notice for notice in self.notices if isinstance(notice, GapRemains)]

    async def lose(self, count: int, *, seconds: float = 20.0) -> list[str]:
        """Publish *count* events in an outage."""
        async with self.outage():
            missed = []
            for _ in range(count):
                missed.append(self.publish())
                await trio.sleep(0.001)  # the log's times are in milliseconds
            await trio.sleep(seconds)
        return missed

    @asynccontextmanager
    async def outage(self) -> AsyncIterator[None]:
        await trio.sleep(15)
        self.kadoa.faults.refuse_connections = True
        made = len(self.kadoa.subscribed)
        self.kadoa.newest.reset()
        await trio.sleep(1)
        yield
        self.kadoa.faults.refuse_connections = False
        await self.kadoa.wait_subscribed(made + 1)

    def publish(self) -> str:
        return str(self.kadoa.publish().id)


@asynccontextmanager
async def client(kadoa: SimulatedKadoa, **options: Any) -> AsyncIterator[World]:
    """Open a client whose events and notices are received in the background."""
    made = len(kadoa.subscribed)
    async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, **OPTIONS | options) as realtime:
        await kadoa.wait_subscribed(made + 1)
        world = World(kadoa, realtime)

        async def consume() -> None:
            async for event in realtime.events:
                world.received.append(event)
                realtime.events.settle()

        async def listen() -> None:
            async for notice in realtime.notices:
                world.notices.append(notice)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(consume)
            nursery.start_soon(listen)
            yield world
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def server() -> AsyncIterator[SimulatedKadoa]:
    """Run a Kadoa without cursors: every outage is a gap."""
    # Few heartbeats, because the tests take many hours of virtual time.
    async with open_simulated_kadoa(heartbeat_interval=100) as kadoa:
        kadoa.faults.without_cursors = True
        kadoa.stream.wall_clock = wall
        yield kadoa


@asynccontextmanager
async def world(**options: Any) -> AsyncIterator[World]:
    async with server() as kadoa, client(kadoa, **options) as opened:
        yield opened


# ---- what is found -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
async def test_outage_without_cursors_is_filled_from_the_log(whole: bool, autojump_clock: Any) -> None:
    async with server() as kadoa, open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, **OPTIONS) as realtime:
        await kadoa.wait_subscribed(1)
        kadoa.faults.log_whole_events = whole
        world = World(kadoa, realtime)
        kadoa.publish_many(3)
        for _ in range(3):
            await realtime.events.receive()
        missed = await world.lose(250)
        live = world.publish()
        event = await realtime.events.receive()
        assert (event.id, event.from_log) == (live, False)  # it does not wait for the repair
        realtime.events.settle()
        with trio.fail_after(60):
            for expected in missed:
                event = await realtime.events.receive()
                assert (event.id, event.from_log, event.type) == (expected, True, "workflow_finished")
        # The last one is not settled.
        await trio.sleep(LAST_TRY)
        assert realtime.statistics().repaired == 250
        assert realtime.position.gaps != ()
        realtime.events.settle()
        assert realtime.position.gaps == ()
        kadoa.publish()
        await realtime.events.receive()
        assert realtime.statistics().received == 255


async def test_repair_says_how_many_events_were_missing(autojump_clock: Any) -> None:
    async with world() as one:
        one.publish()
        missed = await one.lose(7)
        one.publish()
        await trio.sleep(LAST_TRY)
        assert one.from_log == missed
        assert one.repaired == [7]
        assert one.realtime.statistics().repaired == 7
        await one.lose(0)
        one.publish()
        await trio.sleep(LAST_TRY)
        assert one.repaired == [7, 0]
        assert one.remains == []
        assert one.realtime.position.gaps == ()


async def test_dropped_cursor_is_a_gap_that_is_repaired(autojump_clock: Any) -> None:
    async with world() as one:
        one.kadoa.faults.without_cursors = False
        one.kadoa.publish_many(3)
        await trio.sleep(20)
        one.kadoa.faults.refuse_cursors = True
        missed = await one.lose(4)
        await trio.sleep(HOUR)
        assert one.ids[3:] == missed
        assert one.realtime.position.gaps == ()


async def test_events_before_the_client_began_are_not_handed_out(autojump_clock: Any) -> None:
    async with server() as kadoa:
        kadoa.publish_many(5)
        await trio.sleep(5)
        async with client(kadoa) as one:
            one.publish()
            missed = await one.lose(2, seconds=1)
            one.publish()
            await trio.sleep(LAST_TRY)
            assert one.from_log == missed


# ---- which rows ----------------------------------------------------------------------------------------------------


async def test_rows_of_other_channels_are_not_handed_out(autojump_clock: Any) -> None:
    async with world() as one:
        workspace = one.kadoa.workspace
        mail = workspace.add_channel("EMAIL")
        workspace.add_setting("credits_low", [mail])
        workspace.add_setting("workflow_failed", [mail], "wf_mail")
        one.publish()
        async with one.outage():
            owed = one.kadoa.dispatch("workflow_failed", workflow_id="wf_1")
            assert one.kadoa.dispatch("credits_low") is None
            assert one.kadoa.dispatch("workflow_failed", workflow_id="wf_mail") is None
        one.publish()
        await trio.sleep(LAST_TRY)
        assert owed is not None
        assert one.from_log == [owed.id]
        assert one.repaired == [1]


async def test_failed_try_of_the_socket_is_handed_out_and_failed_mail_is_not(autojump_clock: Any) -> None:
    async with world() as one:
        one.publish()
        missed = await one.lose(30)
        rows = one.kadoa.stream.log(one.kadoa.faults, trio.current_time(), None, None)
        failed = {row["channelConfig"]["channelType"] for row in rows if row["eventStatus"] == "FAILED"}
        assert failed == {"EMAIL", "SLACK", "WEBHOOK", "WEBSOCKET"}
        one.publish()
        await trio.sleep(LAST_TRY)
        assert one.from_log == missed


async def test_settings_decide_where_a_row_names_no_channel(autojump_clock: Any) -> None:
    async with world() as one:
        one.kadoa.faults.log_unnamed = True
        workspace = one.kadoa.workspace
        workspace.clear()
        socket, mail = workspace.add_channel("WEBSOCKET"), workspace.add_channel("EMAIL")
        workspace.add_setting("workflow_finished", [mail, socket])
        workspace.add_setting("workflow_finished", [mail], "wf_mail")
        workspace.add_setting("workflow_failed", [mail])
        workspace.add_setting("workflow_failed", [socket], "wf_both")
        workspace.add_setting("credits_low", [mail])
        one.kadoa.dispatch("workflow_finished", workflow_id="wf_1")
        async with one.outage():
            owed = [
                one.kadoa.dispatch("workflow_finished", workflow_id="wf_1"),
                one.kadoa.dispatch("workflow_failed", workflow_id="wf_both"),
            ]
            for event_type, workflow_id in (("workflow_finished", "wf_mail"), ("workflow_failed", "wf_1")):
                assert one.kadoa.dispatch(event_type, workflow_id=workflow_id) is None
            assert one.kadoa.dispatch("credits_low") is None
        await trio.sleep(LAST_TRY * 2)
        assert one.from_log == [event.id for event in owed if event is not None]
        assert one.repaired == [2]


@pytest.mark.parametrize("body", [b"{}", b'{"data":{"channels":5}}', b"no JSON"])
async def test_gap_stays_open_while_the_settings_cannot_be_read(body: bytes, autojump_clock: Any) -> None:
    async with world() as one:
        one.kadoa.faults.log_unnamed = True
        one.kadoa.faults.api_body = body
        one.publish()
        missed = await one.lose(3)
        one.publish()
        await trio.sleep(LAST_TRY)
        assert one.from_log == []
        assert one.realtime.position.gaps != ()
        assert [notice.final for notice in one.remains] == [False]
        one.kadoa.faults.api_body = None
        await trio.sleep(HOUR)
        assert one.from_log == missed
        assert one.repaired == [3]


async def test_recovered_comes_with_failed_where_it_has_no_setting() -> None:
    async with (
        open_simulated_kadoa() as kadoa,
        _notifications.open_notifications(kadoa.api_key, endpoints=kadoa.endpoints) as notifications,
    ):
        workspace = kadoa.workspace
        workspace.clear()
        socket = workspace.add_channel("WEBSOCKET")
        workspace.add_setting("workflow_failed", [socket])
        row = _notifications.LogEntry(event_type="workflow_recovered", workflow_id="wf_1")
        assert await _repair._Routes(notifications).owed(row)
        workspace.add_setting("workflow_finished", [socket], "wf_1")
        assert not await _repair._Routes(notifications).owed(row)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (None, set()),
        ({}, set()),
        ("", set()),
        ({"recipients": ["a@example.com"], "type": "html"}, set()),
        ({"channelType": "WEBSOCKET"}, {"WEBSOCKET"}),
        ({"type": "websocket", "config": {}}, {"WEBSOCKET"}),
        ({"channelType": "TEAMS"}, {"TEAMS"}),
        ("WEBSOCKET", {"WEBSOCKET"}),
        ("Web-Socket", {"WEBSOCKET"}),
        ("socket-1", {"WEBSOCKET"}),
        ({"channelId": "mail-1"}, {"EMAIL"}),
        ({"id": "socket-1", "name": "EMAIL"}, {"WEBSOCKET"}),
        ([{"channelType": "EMAIL"}, {"channelType": "WEBSOCKET"}], {"EMAIL", "WEBSOCKET"}),
        ({"channels": ["mail-1", "unknown"]}, {"EMAIL"}),
        ({"channel": {"channelType": "SLACK"}}, {"SLACK"}),
        ('{"channelType":"WEBHOOK","config":{"url":"x"}}', {"WEBHOOK"}),
        ('{"channelType":', set()),
        ("[" * 10_000, set()),
        (7, set()),
    ],
)
def test_channel_of_a_row_is_read_in_every_format(config: Any, named: set[str]) -> None:
    assert channel_types(config, {"socket-1": "WEBSOCKET", "mail-1": "EMAIL"}) == named


def test_payload_with_an_id_and_a_type_of_its_own_is_not_taken_for_the_event() -> None:
    payload = {"id": "change-1", "type": "snapshot", "data": [], "workflowId": "wf_1"}
    event = event_from_log({"eventType": "workflow_data_change", "eventId": "e1", "payload": payload})
    assert event is not None
    assert (event.id, event.type, event.workflow_id) == ("e1", "workflow_data_change", "wf_1")


def test_row_that_is_nested_too_deeply_is_no_event() -> None:
    payload: Any = []
    for _ in range(100_000):
        payload = [payload]
    assert event_from_log({"eventType": "x", "eventId": "e1", "payload": payload}) is None


@pytest.mark.parametrize("whole", [True, False])
def test_row_whose_type_has_a_lone_surrogate_is_an_event(whole: bool) -> None:
    payload: dict[str, object] = {"workflowId": "wf_1"}
    if whole:
        payload = {"eventType": "x\ud800", "id": "e1", "message": payload}
    event = event_from_log({"eventType": "x\ud800", "eventId": "e1", "payload": payload})
    assert event is not None
    assert (event.id, event.type, event.workflow_id) == ("e1", "x\ufffd", "wf_1")


async def test_filters_hold_for_repaired_events(autojump_clock: Any) -> None:
    async with world(event_types=["workflow_failed"]) as one:
        one.kadoa.publish("workflow_failed")
        async with one.outage():
            one.kadoa.publish("workflow_finished")
            wanted = one.kadoa.publish("workflow_failed")
        one.publish()
        await trio.sleep(LAST_TRY)
        assert one.from_log == [wanted.id]
        assert one.realtime.position.gaps == ()


# ---- is the log complete? ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0.0, 30.0, 200.0, 850.0])
@pytest.mark.parametrize("busy", [False, True])
async def test_repair_is_final_only_when_the_log_has_caught_up(lag: float, busy: bool, autojump_clock: Any) -> None:
    async with world() as one:
        one.kadoa.faults.log_lag = lag
        one.publish()
        await trio.sleep(HOUR)
        missed = await one.lose(5)
        one.publish()
        for _ in range(600):
            await trio.sleep(5)
            if busy:
                one.publish()
            if one.repaired:
                break
        assert one.from_log == missed
        assert one.repaired == [5]
        assert one.remains == []


async def test_busy_workspace_is_repaired_after_two_minutes(autojump_clock: Any) -> None:
    async with world() as one:
        one.publish()
        missed = await one.lose(5)
        for _ in range(120):
            one.publish()
            await trio.sleep(1)
        assert one.from_log == missed
        assert one.repaired == [5]


async def test_what_a_later_try_finds_is_handed_out(autojump_clock: Any) -> None:
    async with world() as one:
        one.publish()
        async with one.outage():
            first = one.publish()
            await trio.sleep(40)
            second = one.publish()
        one.kadoa.faults.log_lag = 30
        one.publish()
        await trio.sleep(8)
        assert one.from_log == [first]
        await trio.sleep(95)
        assert one.from_log == [first, second]
        assert one.repaired == []
        await trio.sleep(HOUR)
        assert one.repaired == [2]


async def test_nothing_is_repaired_by_a_log_that_shows_nothing(autojump_clock: Any) -> None:
    async with world() as one:
        one.publish()
        await trio.sleep(10)
        await one.lose(5)
        one.kadoa.stream.notified.clear()
        await trio.sleep(24 * HOUR)
        assert one.repaired == []
        (remains,) = one.remains
        assert not remains.final
        assert one.realtime.position.gaps != ()


async def test_log_that_may_have_forgotten_a_gap_does_not_repair_it(autojump_clock: Any) -> None:
    async with server() as kadoa:
        old = wall() - timedelta(days=40)
        gap = Gap(since=old, until=old + timedelta(minutes=5), reason=GapReason.NO_CURSOR)
        known = kadoa.publish()
        position = Position(recent=(str(known.id),), gaps=(gap,), last_life=wall())
        async with client(kadoa, resume_from=position) as one:
            await trio.sleep(HOUR)
            assert gap not in [notice.gap for notice in one.notices if isinstance(notice, GapRepaired)]
            (remains,) = [notice for notice in one.remains if notice.gap == gap]
            assert remains.final
            assert "forgotten" in remains.why


# ---- are its ids those of the socket? ------------------------------------------------------------------------------


async def test_log_with_other_ids_is_not_believed(autojump_clock: Any) -> None:
    async with world() as one:
        one.kadoa.faults.log_other_ids = True
        one.kadoa.publish_many(3)
        await one.lose(5)
        one.publish()
        await trio.sleep(HOUR)
        assert one.realtime.statistics().repaired == 0
        (remains,) = one.remains
        assert remains.final
        assert "no row of the log has an id that the socket delivered" in remains.why


@pytest.mark.parametrize("oldest_first", [False, True])
async def test_quiet_workspace_is_repaired_without_a_neighbour(oldest_first: bool, autojump_clock: Any) -> None:
    async with world() as one:
        one.kadoa.faults.log_oldest_first = oldest_first
        mail = one.kadoa.workspace.add_channel("EMAIL")
        one.kadoa.workspace.add_setting("credits_low", [mail])
        for _ in range(700):
            one.kadoa.dispatch("credits_low")
            await trio.sleep(0.1)
        one.publish()
        await trio.sleep(12 * HOUR)
        missed = await one.lose(3)
        await trio.sleep(HOUR)
        assert one.from_log == missed
        assert one.repaired == [3]


async def test_events_of_an_earlier_run_prove_the_ids(autojump_clock: Any) -> None:
    store = MemoryCursorStore()
    async with server() as kadoa:
        async with client(kadoa, cursor_store=store) as one:
            one.publish()
            await trio.sleep(HOUR)
        missed = [str(kadoa.publish().id) for _ in range(3)]
        await trio.sleep(6 * HOUR)
        async with client(kadoa, cursor_store=store) as one:
            await trio.sleep(HOUR)
            assert one.from_log == missed
            assert one.realtime.position.gaps == ()


async def test_ids_that_were_proved_once_stay_proved(autojump_clock: Any) -> None:
    async with world() as one:
        one.publish()
        await one.lose(1)
        await trio.sleep(HOUR)
        assert one.repaired == [1]
        one.kadoa.stream.notified.clear()  # no row of a delivered event is left
        missed = await one.lose(2)
        await trio.sleep(HOUR)
        assert one.from_log[1:] == missed
        assert one.repaired == [1, 2]


async def test_first_events_of_all_are_repaired_though_there_is_nothing_to_compare(autojump_clock: Any) -> None:
    async with world() as one:
        missed = await one.lose(2)
        await trio.sleep(HOUR)
        assert one.from_log == missed
        assert one.repaired == [2]


async def test_bare_cursor_is_not_enough_to_believe_the_ids(autojump_clock: Any) -> None:
    async with server() as kadoa:
        kadoa.faults.without_cursors = False
        cursor = kadoa.publish().cursor
        await trio.sleep(120)
        kadoa.faults.refuse_cursors = True
        async with client(kadoa, resume_from=cursor) as one:
            await trio.sleep(10)
            await one.lose(3)
            await trio.sleep(3 * HOUR)
            assert one.from_log == []
            assert one.repaired == []
            assert not any(notice.final for notice in one.remains if notice.gap.since is not None)


# ---- a log that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404, 503])
async def test_failing_log_leaves_the_gap_open_for_the_next_run(status: int, autojump_clock: Any) -> None:
    store = MemoryCursorStore()
    async with server() as kadoa:
        async with client(kadoa, cursor_store=store) as one:
            await trio.sleep(60)
            kadoa.faults.log_status = status
            one.publish()
            missed = await one.lose(5)
            one.publish()
            await trio.sleep(1_000)
            assert {notice.final for notice in one.remains} == {False}
            assert all(str(status) in notice.why and kadoa.api_key not in notice.why for notice in one.remains)
            assert GapReason.NO_CURSOR in {gap.reason for gap in one.realtime.position.gaps}
        kadoa.faults.log_status = None
        async with client(kadoa, cursor_store=store) as one:
            await trio.sleep(2 * LAST_TRY)
            assert one.from_log == missed
            assert one.realtime.position.gaps == ()


async def test_log_is_asked_again_when_it_says(autojump_clock: Any) -> None:
    async with world() as one:
        one.kadoa.faults.log_status, one.kadoa.faults.log_failures = 429, 1
        one.kadoa.faults.log_headers = {"Retry-After": "200"}
        one.publish()
        missed = await one.lose(2)
        one.publish()
        await trio.sleep(190)
        assert one.from_log == []
        await trio.sleep(30)
        assert one.from_log == missed


async def test_waiting_repairs_are_bounded_by_the_open_gaps(autojump_clock: Any) -> None:
    async with world() as one:
        one.kadoa.faults.log_status = 503
        one.publish()
        for _ in range(150):
            await one.lose(1, seconds=1)
            one.publish()
        repairer = one.realtime._assembly.repairer
        assert repairer is not None
        await trio.sleep(1_000)
        assert repairer.waiting <= MAX_GAPS
        assert len(repairer._work) <= MAX_GAPS
        assert len(one.realtime.position.gaps) <= MAX_GAPS
        # Each gap that is no longer kept was reported as final.
        dropped = {notice.gap for notice in one.remains if notice.final}
        assert len(dropped) >= 150 - MAX_GAPS
        one.kadoa.faults.log_status = None
        await trio.sleep(3 * HOUR)
        assert one.realtime.position.gaps == ()
        assert len(one.repaired) == 150 - len(dropped)


async def test_failing_log_is_asked_seldom_however_many_gaps_wait(autojump_clock: Any) -> None:
    async with world() as one:
        one.kadoa.faults.log_status = 503
        one.publish()
        missed = []
        for _ in range(20):
            missed += await one.lose(1, seconds=1)
            one.publish()
        asked = one.kadoa.log_requests
        await trio.sleep(24 * HOUR)
        assert one.kadoa.log_requests - asked <= 24 * 4
        one.kadoa.faults.log_status = None
        await trio.sleep(900 + LAST_TRY)
        assert sorted(one.from_log) == sorted(missed)
        assert len(one.repaired) == 20


async def test_gap_that_waits_does_not_hold_up_another(autojump_clock: Any) -> None:
    async with world() as one:
        one.publish()
        await one.lose(1)
        one.publish()
        await trio.sleep(200)  # it waits for its next try, five minutes long
        missed = await one.lose(1)
        one.publish()
        await trio.sleep(10)
        assert one.from_log[1:] == missed


async def test_gap_that_cannot_be_read_does_not_hold_up_another(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = _notifications.Notifications.log
    bad: list[datetime] = []

    async def log(self: Any, **options: Any) -> Any:
        if bad and options["since"] is not None and options["since"] < bad[0]:
            raise _notifications.ProtocolError("notifications", "this page cannot be read")
        return await inner(self, **options)

    monkeypatch.setattr(_notifications.Notifications, "log", log)
    async with world() as one:
        one.publish()
        await trio.sleep(HOUR)
        await one.lose(1)
        one.publish()
        bad.append(wall())
        await trio.sleep(HOUR)
        # The next gap begins here, so that what is read around it shows nothing of the first one.
        one.publish()
        missed = await one.lose(1)
        one.publish()
        await trio.sleep(65)
        assert one.from_log == missed
        await trio.sleep(2 * LAST_TRY)
        assert one.repaired == [1]
        assert len(one.realtime.position.gaps) == 1


async def test_stopped_client_asks_the_log_no_more(autojump_clock: Any) -> None:
    async with world() as one:
        one.kadoa.faults.log_status = 503
        one.publish()
        await one.lose(3)
        one.publish()
        await trio.sleep(1)
        assert one.realtime.statistics().gap_count == 1
        await trio.sleep(_repair.REPAIR_DELAYS[0])
        asked = one.kadoa.log_requests
        assert asked > 0  # the gap waits for its next try
        one.realtime.stop()
        await trio.sleep(HOUR)
        assert one.kadoa.log_requests == asked


# ---- reading by pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [True, False])
async def test_rows_that_change_places_between_pages_are_not_lost(total: bool, autojump_clock: Any) -> None:
    async with world() as one:
        one.kadoa.faults.log_without_total = not total
        one.publish()
        async with one.outage():
            missed = {one.publish() for _ in range(250)}
            one.kadoa.faults.log_shuffles = 25
        one.publish()
        await trio.sleep(2 * HOUR)
        assert set(one.from_log) == missed
        assert len(one.from_log) == 250
        assert one.repaired == [250]


async def test_log_whose_pages_never_fit_together_repairs_nothing(autojump_clock: Any) -> None:
    async with world() as one:
        one.publish()
        async with one.outage():
            missed = {one.publish() for _ in range(2)}
            mail = one.kadoa.workspace.add_channel("EMAIL")
            one.kadoa.workspace.add_setting("credits_low", [mail])
            for _ in range(100):
                one.kadoa.dispatch("credits_low")
            one.kadoa.faults.log_shuffles = 1_000_000
        one.publish()
        await trio.sleep(3 * HOUR)
        assert set(one.from_log) == missed
        assert one.repaired == []
        (remains,) = one.remains
        assert not remains.final
        assert "2 events were taken from it" in remains.why


async def test_later_try_does_not_hand_out_again_what_the_ledger_has_forgotten(autojump_clock: Any) -> None:
    async with world(limits=Limits(buffered_events=100, unsettled=100, dedupe_window=200)) as one:
        one.publish()
        missed = await one.lose(20)
        for _ in range(500):
            one.publish()
            await trio.sleep(0.1)
        assert one.from_log == missed
        await trio.sleep(2 * HOUR)
        assert one.from_log == missed
        assert one.repaired == [20]


async def test_page_that_is_too_long_is_read_in_parts(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_notifications, "MAX_LOG_ANSWER", 20_000)
    async with world() as one:
        one.publish()
        async with one.outage():
            missed = [str(one.kadoa.publish("workflow_finished", {"pad": "x" * 5_000}).id) for _ in range(9)]
        one.publish()
        await trio.sleep(LAST_TRY)
        assert one.from_log == missed
        assert one.repaired == [9]


@pytest.mark.parametrize("oldest_first", [False, True])
async def test_more_than_memory_takes_is_handed_out_in_order(oldest_first: bool, autojump_clock: Any) -> None:
    async with world(limits=Limits(buffered_bytes=3_000)) as one:
        one.kadoa.faults.log_oldest_first = oldest_first
        one.publish()
        async with one.outage():
            missed = []
            for _ in range(40):
                missed.append(one.publish())
                await trio.sleep(0.1)
        one.publish()
        await trio.sleep(LAST_TRY)
        assert one.from_log == missed
        assert one.repaired == [40]


async def test_more_rows_than_are_read_are_reported(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_repair, "REPAIR_PAGES", 3)
    async with world() as one:
        one.publish()
        await one.lose(400)
        one.publish()
        await trio.sleep(LAST_TRY)
        assert one.repaired == []
        (remains,) = one.remains
        assert remains.final
        assert f"{len(one.from_log)} events were taken from it" in remains.why


async def test_rows_that_name_no_event_are_reported(autojump_clock: Any) -> None:
    async with world() as one:
        one.publish()
        async with one.outage():
            one.kadoa.publish(with_id=False)
        one.publish()
        await trio.sleep(LAST_TRY)
        assert one.repaired == []
        (remains,) = one.remains
        assert remains.final
        assert "do not say which event" in remains.why


async def test_server_that_ignores_the_times_does_not_flood(
    autojump_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_notifications, "write_time", lambda time: (time - timedelta(days=9)).isoformat())
    async with server() as kadoa:
        kadoa.publish_many(20)
        await trio.sleep(HOUR)
        inner = kadoa.stream.log
        monkeypatch.setattr(
            type(kadoa.stream), "log", lambda self, faults, now, start, end: inner(faults, now, None, None)
        )
        async with client(kadoa) as one:
            one.publish()
            await trio.sleep(HOUR)
            missed = await one.lose(2)
            one.publish()
            await trio.sleep(LAST_TRY)
            assert one.from_log == missed


# ---- any workspace -------------------------------------------------------------------------------------------------

TYPES = ["workflow_finished", "workflow_failed", "workflow_recovered", "credits_low"]
WORKFLOWS = ["wf_1", "wf_2"]
CHANNELS = ["WEBSOCKET", "EMAIL", "SLACK", "WEBHOOK"]

events = st.tuples(st.just("event"), st.sampled_from(TYPES), st.sampled_from(WORKFLOWS))
pauses = st.tuples(st.just("pause"), st.sampled_from([0.01, 3.0, 70.0, 400.0, 4_000.0]))
short_pauses = st.tuples(st.just("pause"), st.sampled_from([0.01, 3.0, 70.0]))
outages = st.tuples(st.just("outage"), st.lists(events | short_pauses, max_size=8))
levels = st.tuples(
    st.sampled_from(TYPES), st.none() | st.sampled_from(WORKFLOWS), st.sets(st.sampled_from(CHANNELS)), st.booleans()
)


async def live(program: list[Any], levels: list[Any], faults: dict[str, Any]) -> None:
    async with server() as kadoa:
        for name, value in faults.items():
            setattr(kadoa.faults, name, value)
        workspace = kadoa.workspace
        workspace.clear()
        ids = {kind: workspace.add_channel(kind) for kind in CHANNELS}
        for event_type, workflow_id, kinds, enabled in levels:
            if workspace.find(event_type, workflow_id) is None:
                workspace.add_setting(event_type, [ids[kind] for kind in sorted(kinds)], workflow_id, enabled=enabled)
        async with client(kadoa) as one:
            owed: list[str | None] = []
            missing: list[str | None] = []

            async def perform(steps: list[Any], *, out: bool) -> None:
                for step in steps:
                    if step[0] == "pause":
                        await trio.sleep(step[1])
                    elif step[0] == "outage":
                        async with one.outage():
                            await perform(step[1], out=True)
                    else:
                        event = kadoa.dispatch(step[1], workflow_id=step[2])
                        if event is not None:
                            owed.append(event.id)
                            if out:
                                missing.append(event.id)

            await perform(program, out=False)
            await trio.sleep(2 * HOUR)
            assert sorted(one.ids) == sorted(map(str, owed))
            assert sorted(one.from_log) == sorted(map(str, missing))
            assert sum(one.repaired) == len(missing) == one.realtime.statistics().repaired
            if owed:  # else the log may be empty, and nothing says that it is kept at all
                assert one.realtime.position.gaps == ()
                # Others than final ones may be: in an outage the log cannot be read either.
                assert not any(notice.final for notice in one.remains)


@settings(max_examples=50, deadline=None)
@given(
    program=st.lists(events | pauses | outages, max_size=7),
    levels=st.lists(levels, min_size=1, max_size=8),
    faults=st.fixed_dictionaries(
        {
            "log_lag": st.sampled_from([0.0, 20.0, 200.0, 800.0]),
            "log_unnamed": st.booleans(),
            "log_oldest_first": st.booleans(),
            "log_without_total": st.booleans(),
            "log_whole_events": st.booleans(),
            "log_shuffles": st.sampled_from([0, 5]),
        }
    ),
    page=st.sampled_from([100, 20]),
)
def test_repair_hands_out_exactly_what_the_socket_owed(
    program: list[Any], levels: list[Any], faults: dict[str, Any], page: int
) -> None:
    with virtual_wall_clock(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_repair, "_PAGE_SIZES", (page, 1))
        trio.run(live, program, levels, faults, clock=trio.testing.MockClock(autojump_threshold=0))
