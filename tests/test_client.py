"""The whole client, in memory, on virtual time: one test for each row of the fault table, and for what others get wrong.

Nothing here waits for real time, and nothing is asserted about it. Where a
number of attempts is asserted, it is a bound that the documentation states.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
from typing import Any

import pytest
import trio
import trio.testing

import kadoa_trio
from kadoa_trio import (
    AuthenticationError,
    ConfigurationError,
    ConnectionFailedError,
    Endpoints,
    Event,
    GapReason,
    Limits,
    MemoryCursorStore,
    MessageTooLargeError,
    OtherMessage,
    Position,
    Realtime,
    RequestRefusedError,
    RetryPolicy,
    Timeouts,
    WorkflowFailed,
    open_realtime,
)
from kadoa_trio._engine._ledger import Ledger
from kadoa_trio.notices import (
    AdmissionPaused,
    CursorAccepted,
    CursorCheckStarted,
    CursorDropped,
    FrameIgnored,
    Lost,
    Notice,
    PossibleGap,
    Refused,
    Replaced,
    State,
)
from kadoa_trio.testing import Faults, PublishedEvent, SimulatedKadoa, open_simulated_kadoa

HOUR = 3600.0


async def take(realtime: Realtime, count: int) -> list[str]:
    """Receive *count* events and settle them, within an hour of virtual time."""
    with trio.fail_after(HOUR):
        ids = [(await realtime.events.receive()).id for _ in range(count)]
    realtime.events.settle()
    return ids


async def settle_in(kadoa: SimulatedKadoa, realtime: Realtime) -> None:
    """Give the client a cursor and a stable connection: without a cursor nothing could be resumed."""
    published = kadoa.publish()
    assert await take(realtime, 1) == [published.id]
    await trio.sleep(30)


def ids(events: list[PublishedEvent]) -> list[str]:
    return [event.id or "" for event in events]


def notices(realtime: Realtime) -> list[Notice]:
    found = []
    try:
        while True:
            found.append(realtime.notices.receive_nowait())
    except (trio.WouldBlock, trio.EndOfChannel):
        return found


def kinds(found: list[Notice], kind: type[Notice]) -> list[Any]:
    return [notice for notice in found if isinstance(notice, kind)]


def assert_cursor_kept(realtime: Realtime, reported: type[Notice]) -> None:
    """Assert that the cursor was checked, as the notices show, and is kept: nothing may be missing."""
    found = notices(realtime)
    assert kinds(found, reported)
    assert not kinds(found, CursorDropped)
    assert realtime.statistics().gap_count == 0


async def nothing_more(realtime: Realtime, seconds: float = 60) -> None:
    with trio.move_on_after(seconds) as scope:
        event = await realtime.events.receive()
        pytest.fail(f"received {event}")
    assert scope.cancelled_caught


# ---- entering and leaving ------------------------------------------------------------------------------------------


async def test_events_are_received_once_and_in_order(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(50)
        assert await take(realtime, 50) == ids(sent)
        await nothing_more(realtime)
    assert not kadoa.connections


async def test_message_can_be_matched(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        kadoa.publish("workflow_failed")
        event = await realtime.events.receive()
        match event.message:
            case WorkflowFailed(reason=reason, workflow_id=workflow):
                assert (reason, workflow) == ("The page has changed", "wf_123")
            case other:
                pytest.fail(f"{other}")


async def test_odd_payload_never_costs_the_event(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = [kadoa.publish("workflow_failed", payload) for payload in (5, "x", [], {"workflowId": 7})]
        for published in sent:
            event = await realtime.events.receive()
            assert event.id == published.id
            assert isinstance(event.message, OtherMessage)
            assert event.message.untyped_because


async def test_wrong_key_is_fatal_and_bare(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        with pytest.raises(AuthenticationError) as caught:
            async with open_realtime("wrong-key-0123456789", endpoints=kadoa.endpoints):
                pytest.fail("it opened")
        assert (caught.value.step, caught.value.status) == ("token", 401)
        assert kadoa.token_requests == 2  # a fresh token once
        assert "wrong-key" not in str(caught.value)


async def test_refused_token_is_fatal_after_a_fresh_one(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        with kadoa.suffering(handshake_status=403), pytest.raises(AuthenticationError) as caught:
            async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints):
                pytest.fail("it opened")
        assert (caught.value.step, kadoa.handshakes) == ("handshake", 2)
        kadoa.faults = Faults(handshake_status=401, handshake_failures=1)
        async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints):
            pass


async def test_other_refusal_of_the_token_is_fatal_with_the_servers_words(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        kadoa.faults = Faults(token_status=422, token_body=b'{"error":"team is suspended"}')
        with pytest.raises(RequestRefusedError, match="team is suspended") as caught:
            async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints):
                pytest.fail("it opened")
        assert (caught.value.status, kadoa.token_requests) == (422, 1)


TRANSIENT = [
    *({"token_status": status} for status in (302, 408, 425, 429, 500, 502, 503)),
    *({"token_body": body} for body in (b"", b"<html>", b"{}", b'{"access_token":5,"team_id":"x"}')),
    {"token_hang": True},
    *({"handshake_status": status} for status in (404, 429, 500, 503)),
    {"handshake_hang": True},
    {"refuse_connections": True},
    {"accept_then_close": 1011},
    {"accept_then_reset": True},
]


@pytest.mark.parametrize("fault", TRANSIENT, ids=str)
async def test_transient_fault_is_outwaited(autojump_clock: Any, fault: dict[str, Any]) -> None:
    async with open_simulated_kadoa() as kadoa:
        kadoa.faults = Faults(**fault)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def heal() -> None:
                await trio.sleep(25)
                kadoa.heal()

            async with open_realtime(
                kadoa.api_key, endpoints=kadoa.endpoints, timeouts=Timeouts(connect=120)
            ) as realtime:
                with trio.fail_after(110):
                    await realtime.wait_live()
                sent = kadoa.publish()
                assert await take(realtime, 1) == [sent.id]


@pytest.mark.parametrize("fault", TRANSIENT, ids=str)
async def test_first_connection_is_given_up_after_connect_timeout(autojump_clock: Any, fault: dict[str, Any]) -> None:
    async with open_simulated_kadoa() as kadoa:
        kadoa.faults = Faults(**fault)
        began = trio.current_time()
        with pytest.raises(ConnectionFailedError) as caught:
            async with open_realtime(
                kadoa.api_key, endpoints=kadoa.endpoints, timeouts=Timeouts(connect=40)
            ) as realtime:
                await realtime.events.receive()
        assert trio.current_time() - began <= 42
        assert isinstance(caught.value.__cause__, kadoa_trio.AttemptError)
        assert kadoa.api_key not in repr(caught.value.__cause__)


@pytest.mark.parametrize("fault", TRANSIENT, ids=str)
async def test_long_outage_is_outwaited_without_a_storm(autojump_clock: Any, pair: Any, fault: dict[str, Any]) -> None:
    async with pair() as (kadoa, realtime):
        await settle_in(kadoa, realtime)
        before = realtime.statistics().attempts
        kadoa.faults = Faults(**fault)
        kadoa.newest.reset()
        sent = kadoa.publish_many(3)
        await trio.sleep(HOUR / 2)  # the waits are at their longest after a minute
        assert realtime.state is State.CONNECTING
        attempts = realtime.statistics().attempts - before
        # Backoff to 30 s at most, half of it on average: neither deaf nor a storm.
        assert 30 <= attempts <= 30 * 6
        kadoa.heal()
        assert await take(realtime, 3) == ids(sent)
        assert realtime.statistics().gap_count == 0


async def test_retry_after_is_honoured_and_bounded(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, _realtime):
        for header, least, most in (("7", 7, 40), ("1000000", 120, 155)):
            await trio.sleep(30)
            kadoa.faults = Faults(token_status=503, token_headers={"Retry-After": header}, token_failures=1)
            done = len(kadoa.attempt_times)
            kadoa.newest.reset()
            await kadoa.wait_subscribed(len(kadoa.subscribed) + 1)
            first, second = kadoa.attempt_times[done:]
            assert least - 0.001 <= second - first <= most


async def test_refusal_after_confirmation_is_outwaited(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        await settle_in(kadoa, realtime)
        kadoa.faults = Faults(token_status=401)
        kadoa.newest.reset()
        sent = kadoa.publish()
        await trio.sleep(200)
        assert kinds(notices(realtime), Refused)
        kadoa.heal()
        assert await take(realtime, 1) == [sent.id]


async def test_refusal_for_longer_than_auth_grace_is_fatal_through_receive(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        async with open_realtime(
            kadoa.api_key, endpoints=kadoa.endpoints, timeouts=Timeouts(auth_grace=100)
        ) as realtime:
            await kadoa.wait_subscribed(1)
            kadoa.publish()
            await trio.sleep(30)
            kadoa.faults = Faults(handshake_status=401)
            kadoa.newest.reset()
            began = trio.current_time()
            assert (await realtime.events.receive()).id  # what is buffered comes first
            with pytest.raises(AuthenticationError):
                await realtime.events.receive()
            assert 100 <= trio.current_time() - began <= 131
            with pytest.raises(trio.EndOfChannel):
                await realtime.events.receive()
            assert realtime.state is State.FAILED
            with pytest.raises(trio.BrokenResourceError):
                await realtime.wait_live()
        assert not kadoa.connections


async def test_fault_that_nobody_received_is_raised_on_leaving(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        for body_raises in (False, True):
            kadoa.heal()
            with pytest.raises(ValueError if body_raises else AuthenticationError) as caught:
                async with open_realtime(
                    kadoa.api_key, endpoints=kadoa.endpoints, timeouts=Timeouts(auth_grace=1)
                ) as realtime:
                    await trio.sleep(20)
                    kadoa.publish()
                    await realtime.events.receive()
                    kadoa.faults = Faults(token_status=403)
                    kadoa.newest.reset()
                    await trio.sleep(100)
                    if body_raises:
                        raise ValueError("mine")
            notes = getattr(caught.value, "__notes__", [])
            assert any("AuthenticationError" in note for note in notes) == body_raises


async def test_exception_of_the_body_comes_out_bare(autojump_clock: Any, pair: Any) -> None:
    for error in (ValueError("mine"), ExceptionGroup("mine", [KeyError("a")]), KeyboardInterrupt()):
        async with open_simulated_kadoa() as kadoa:
            with pytest.raises(type(error)) as caught:
                async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints):
                    raise error
            assert caught.value is error


async def test_exception_of_the_body_survives_a_cancellation(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        with trio.CancelScope() as scope, pytest.raises(ValueError, match="mine"):
            async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints):
                scope.cancel()
                raise ValueError("mine")


@pytest.mark.parametrize("how", ["leave", "cancel", "raise"])
async def test_leaving_is_bounded_even_if_nobody_answers(autojump_clock: Any, how: str) -> None:
    async with open_simulated_kadoa() as kadoa:
        with trio.CancelScope() as scope:
            try:
                async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints):
                    await kadoa.wait_subscribed(1)
                    kadoa.newest.drain(100)
                    await kadoa.wait_subscribed(2)
                    for connection in kadoa.connections:
                        connection.go_silent()
                    began = trio.current_time()
                    if how == "cancel":
                        scope.cancel()
                        await trio.sleep_forever()
                    if how == "raise":
                        raise ValueError("mine")
            except ValueError:
                assert how == "raise"
        assert trio.current_time() - began <= 2
        assert trio.lowlevel.current_task().child_nurseries


async def test_stop_lets_the_buffer_be_finished(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(10)
        await trio.testing.wait_all_tasks_blocked()
        realtime.stop()
        realtime.stop()
        kadoa.publish()
        got = [event.id async for event in realtime.events]
        assert got == ids(sent)
        assert realtime.state is State.STOPPED
        assert realtime.position.cursor == sent[-1].cursor
        with pytest.raises(trio.ClosedResourceError):
            await realtime.wait_live()
        await trio.sleep(2)
        assert not kadoa.connections


async def test_stopping_from_another_thread_is_refused_and_changes_nothing(pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        with pytest.raises(RuntimeError):
            await trio.to_thread.run_sync(realtime.stop)
        assert realtime.state is not State.STOPPED
        kadoa.publish()
        await realtime.events.receive()
        await trio.to_thread.run_sync(trio.from_thread.run_sync, realtime.stop)
        assert realtime.state is State.STOPPED


async def test_closing_the_last_handle_stops_the_client(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (_kadoa, realtime):
        other = realtime.events.clone()
        await realtime.events.aclose()
        assert realtime.state is State.LIVE or realtime.state is State.CONNECTING
        await other.aclose()
        assert realtime.state is State.STOPPED


@pytest.mark.parametrize(
    "options",
    [
        {"endpoints": Endpoints(websocket="ws://realtime.example")},
        {"endpoints": Endpoints(public_api="http://api.example")},
        {"endpoints": Endpoints(public_api="https://user:password@api.example")},
        {"endpoints": Endpoints(websocket="wss://realtime.example?access_token=secret")},
        {"endpoints": Endpoints(websocket="https://realtime.example")},
        {"event_types": "workflow_failed"},
        {"workflow_ids": []},
        {"resume_from": ""},
        {"resume_from": 5},
    ],
    ids=str,
)
async def test_option_that_cannot_work_is_refused_before_anything_is_sent(
    autojump_clock: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        async with open_realtime("key", **options):
            pytest.fail("it opened")
    assert isinstance(caught.value, ValueError)
    assert "password" not in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_missing_key_is_a_clear_error(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KADOA_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="KADOA_API_KEY"):
        async with open_realtime():
            pytest.fail("it opened")


async def test_no_secret_in_any_log_or_repr(autojump_clock: Any, pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    async with pair(timeouts=Timeouts(connect=30)) as (kadoa, realtime):
        for fault in TRANSIENT:
            await trio.sleep(20)
            kadoa.faults = Faults(**fault)
            kadoa.newest.reset()
            await trio.sleep(40)
            kadoa.heal()
            await kadoa.wait_subscribed(len(kadoa.subscribed) + 1)
            await trio.sleep(1)
            shown += [repr(realtime), repr(realtime.statistics()), *map(repr, notices(realtime)), repr(kadoa)]
        tokens = list(kadoa._tokens)
        assert len(tokens) > len(TRANSIENT)
    text = "\n".join([*shown, *(str(vars(record)) for record in caplog.records)])
    assert ": live" in text
    assert kadoa.api_key not in text
    assert not [token for token in tokens if token in text]


# ---- succession ----------------------------------------------------------------------------------------------------


async def test_drain_overlaps_and_loses_nothing(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        await trio.sleep(30)
        sent = kadoa.publish_many(5)
        await trio.testing.wait_all_tasks_blocked()
        old = kadoa.newest
        old.drain(500, close_after=5)
        new = await kadoa.wait_subscribed(2)
        assert old.open
        assert new.last_cursor == sent[-1].cursor
        assert kadoa.token_requests == 2
        sent += kadoa.publish_many(5)  # on both
        await trio.sleep(10)
        assert not old.open
        sent += kadoa.publish_many(5)
        assert await take(realtime, 15) == ids(sent)
        await nothing_more(realtime)
        statistics = realtime.statistics()
        assert (statistics.repeated, statistics.lost, statistics.gap_count) == (5, 0, 0)
        assert kinds(notices(realtime), Replaced)


@pytest.mark.parametrize(
    "advice",
    [None, -1, 0, 1e12, float("nan"), float("inf"), True, "500", [], 10**400],
    ids=lambda value: str(value)[:9],
)
@pytest.mark.parametrize("deadline", ["2000-01-01T00:00:00Z", "soon", 5, None], ids=str)
async def test_odd_advice_neither_deafens_nor_storms(
    autojump_clock: Any, pair: Any, advice: Any, deadline: Any
) -> None:
    async with pair() as (kadoa, realtime):
        await trio.sleep(30)
        began = trio.current_time()
        kadoa.newest.drain(advice, deadline_at=deadline, omit=("retryAfterMs",) if advice is None else ())
        with trio.fail_after(31):
            await kadoa.wait_subscribed(2)
        assert trio.current_time() - began >= 0.1
        assert not kinds(notices(realtime), Lost)


async def test_old_connection_dying_ends_the_wait(autojump_clock: Any, pair: Any) -> None:
    for end in ("close", "reset", "eof"):
        async with pair() as (kadoa, realtime):
            await trio.sleep(30)
            kadoa.newest.drain(20_000)
            await trio.sleep(1)
            getattr(kadoa.newest, end)()
            began = trio.current_time()
            await kadoa.wait_subscribed(2)
            assert trio.current_time() - began < 1
            lost = kinds(notices(realtime), Lost)
            assert [notice.expected for notice in lost] == [end == "close"]


async def test_replacement_dying_during_the_overlap_is_replaced(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        await settle_in(kadoa, realtime)
        kadoa.newest.drain(100)
        replacement = await kadoa.wait_subscribed(2)
        replacement.reset()
        sent = kadoa.publish_many(3)
        with trio.fail_after(30):
            await kadoa.wait_subscribed(3)
        assert kadoa.subscribed[0].open  # not retired while the newest is not confirmed
        sent += kadoa.publish_many(3)
        assert await take(realtime, 6) == ids(sent)


async def test_half_open_old_connection_and_reset_new_one(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        await settle_in(kadoa, realtime)
        kadoa.newest.drain(100)
        kadoa.subscribed[0].go_silent()
        # The notice had gone out before.
        with trio.fail_after(60):
            replacement = await kadoa.wait_subscribed(2)
            replacement.reset()
            await kadoa.wait_subscribed(3)
        sent = kadoa.publish_many(5)
        assert await take(realtime, 5) == ids(sent)
        await trio.sleep(120)
        assert len([one for one in kadoa.connections if one.subscribed and not one.silent]) == 1


async def test_old_connection_that_never_closes_is_retired(autojump_clock: Any, pair: Any) -> None:
    async with pair(timeouts=Timeouts(overlap=60)) as (kadoa, realtime):
        await trio.sleep(30)
        kadoa.newest.drain(100)
        await kadoa.wait_subscribed(2)
        await trio.sleep(50)
        assert kadoa.subscribed[0].open
        await trio.sleep(40)
        assert not kadoa.subscribed[0].open
        assert realtime.state is State.LIVE


async def test_drain_notices_that_never_stop_make_no_storm(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def drain() -> None:
            while True:
                for connection in kadoa.connections:
                    connection.drain(0)
                await trio.sleep(0.5)

        received = []
        sent = []
        for _ in range(600):
            sent.append(kadoa.publish())
            await trio.sleep(1)
        assert len(kadoa.attempt_times) <= 11 * 60
        assert kadoa.max_open_connections <= 3
        received = await take(realtime, len(sent))
        assert sorted(received) == ids(sent)
        assert realtime.statistics().gap_count == 0
        nursery.cancel_scope.cancel()


async def test_no_more_than_the_promised_attempts_in_any_minute(autojump_clock: Any, pair: Any) -> None:
    async with pair(retry=RetryPolicy(initial=0.001, maximum=0.001, attempts_per_minute=10)) as (kadoa, realtime):
        await settle_in(kadoa, realtime)
        kadoa.faults = Faults(token_status=500)
        kadoa.newest.reset()
        await trio.sleep(600)
        times = kadoa.attempt_times
        for first in times:
            assert len([time for time in times if first <= time < first + 60]) <= 10


async def test_chained_drains_under_load_lose_nothing(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        await settle_in(kadoa, realtime)
        sent: list[PublishedEvent] = []
        received: list[str] = []

        @nursery.start_soon
        async def consume() -> None:
            async for event in realtime.events:
                received.append(event.id)

        for step in range(1000):
            sent.append(kadoa.publish())
            if step % 200 == 100 and any(one.subscribed for one in kadoa.connections):
                kadoa.newest.drain(300, close_after=2)
            if step % 300 == 250:
                for connection in list(kadoa.connections):
                    connection.reset()
            await trio.sleep(0.05)
        await trio.sleep(120)
        assert received == ids(sent)
        assert realtime.statistics().gap_count == 0
        nursery.cancel_scope.cancel()


async def test_empty_messages_are_no_sign_of_life(autojump_clock: Any, pair: Any) -> None:
    async with pair(timeouts=Timeouts(heartbeat=30.0)) as (kadoa, realtime):
        kadoa.publish()
        await realtime.events.receive()
        connection = kadoa.newest
        connection.go_silent()
        for _ in range(60):
            await trio.sleep(1)
            connection.send_raw("")
        await kadoa.wait_subscribed(2)
        assert "Timeouts.heartbeat" in str(kinds(notices(realtime), Lost)[0])


async def test_silent_connection_is_lost_after_the_heartbeat_timeout(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        await settle_in(kadoa, realtime)
        kadoa.newest.go_silent()
        began = trio.current_time()
        sent = kadoa.publish_many(3)
        assert await take(realtime, 3) == ids(sent)
        assert 15 <= trio.current_time() - began <= 32
        assert "Timeouts.heartbeat" in str(kinds(notices(realtime), Lost)[0])


async def test_first_frame_never_coming_is_a_failure(autojump_clock: Any, pair: Any) -> None:
    async with pair(timeouts=Timeouts(connect=600)) as (kadoa, _realtime):
        kadoa.newest.go_silent()
        with trio.fail_after(70):
            await kadoa.wait_subscribed(2)


async def test_large_event_on_a_slow_link_is_received(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        await trio.sleep(16)
        kadoa.newest.hold()
        event = kadoa.publish("workflow_data_change", {"data": ["x" * 2_000_000]})
        kadoa.newest.send_slowly(event, bytes_per_second=20_000)  # 100 s, with heartbeats behind it
        assert await take(realtime, 1) == [event.id]
        assert realtime.statistics().attempts == 1


async def test_trickle_is_not_taken_for_life_for_ever(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, _realtime):
        await trio.sleep(16)
        kadoa.newest.hold()
        event = kadoa.publish("workflow_data_change", {"data": ["x" * 4_000_000]})
        kadoa.newest.send_slowly(event, bytes_per_second=200)
        began = trio.current_time()
        with trio.fail_after(400):
            await kadoa.wait_subscribed(2)
        assert trio.current_time() - began > 200


async def test_malformed_frames_cost_nothing(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        frames: list[Any] = ["null", "[]", "5", '"x"', "{", "", "\ud83d".encode("utf-8", "surrogatepass"), b"\xff\x00"]
        for frame in frames:
            kadoa.newest.send_raw(frame)
        kadoa.newest.send_raw('{"type":"control.new","x":1}')
        kadoa.newest.send_raw('{"type":"news"}')
        sent = kadoa.publish()
        assert await take(realtime, 1) == [sent.id]
        statistics = realtime.statistics()
        assert (statistics.ignored, statistics.attempts) == (len(frames) + 2, 1)
        assert {notice.kind for notice in kinds(notices(realtime), FrameIgnored)} == {"malformed", "control", "unknown"}


async def test_message_too_large_twice_is_fatal(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        began = trio.current_time()
        with pytest.raises(MessageTooLargeError, match=r"10,000.*Limits\.message_size") as caught:
            async with open_realtime(
                kadoa.api_key, endpoints=kadoa.endpoints, limits=Limits(message_size=10_000)
            ) as realtime:
                await kadoa.wait_subscribed(1)
                sent = kadoa.publish_many(2)
                kadoa.publish("workflow_data_change", {"data": "x" * 20_000})
                assert await take(realtime, 2) == ids(sent)
                await realtime.events.receive()
        assert caught.value.limit == 10_000
        assert len(kadoa.subscribed) == 2
        assert trio.current_time() - began < 60


async def test_message_too_large_once_is_survived(autojump_clock: Any, pair: Any) -> None:
    async with pair(limits=Limits(message_size=10_000)) as (kadoa, realtime):
        kadoa.newest.send_raw("x" * 20_000)
        await kadoa.wait_subscribed(2)
        sent = kadoa.publish_many(2)
        assert await take(realtime, 2) == ids(sent)


# ---- cursors -------------------------------------------------------------------------------------------------------


async def test_refused_cursor_is_distinguished_from_a_failing_server_and_dropped(
    autojump_clock: Any, pair: Any
) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        await trio.sleep(30)
        kadoa.faults = Faults(refuse_cursors=True)
        kadoa.newest.reset()
        lost = kadoa.publish()
        assert await take(realtime, 3) == ids(sent)
        await trio.sleep(300)
        found = notices(realtime)
        assert [notice.cursor for notice in kinds(found, CursorDropped)] == [sent[-1].cursor]
        assert [notice.gap.reason for notice in kinds(found, PossibleGap)] == [GapReason.CURSOR_DROPPED]
        assert realtime.state is State.LIVE
        more = kadoa.publish_many(3)
        assert await take(realtime, 3) == ids(more)
        assert lost.id not in ids(more)
        assert len(kadoa.subscribed) < 24


async def test_events_held_during_a_cursor_check_are_not_lost(autojump_clock: Any, pair: Any) -> None:
    async with pair(limits=Limits(buffered_events=5)) as (kadoa, realtime), trio.open_nursery() as nursery:
        kadoa.publish()
        await trio.sleep(30)
        received = await take(realtime, 1)
        kadoa.faults = Faults(refuse_cursors=True)
        kadoa.newest.reset()

        @nursery.start_soon
        async def consume() -> None:
            async for event in realtime.events:
                received.append(event.id)

        sent: list[PublishedEvent] = []
        probe = None
        for _ in range(120):
            if probe is None:
                probe = next((one for one in kadoa.connections if one.subscribed), None)
            event = kadoa.publish()
            if probe is not None:
                sent.append(event)
            await trio.sleep(1)
        assert received[-len(sent) :] == ids(sent)
        nursery.cancel_scope.cancel()


async def test_sick_server_does_not_cost_the_cursor(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        await trio.sleep(30)
        kadoa.faults = Faults(accept_then_close=1011)
        kadoa.newest.reset()
        sent += kadoa.publish_many(3)
        await trio.sleep(600)
        kadoa.heal()
        assert await take(realtime, 6) == ids(sent)
        await trio.sleep(60)
        assert_cursor_kept(realtime, CursorCheckStarted)


async def test_checked_cursor_is_accepted_when_the_server_recovers(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        await trio.sleep(30)
        kadoa.faults = Faults(refuse_cursors=True)
        kadoa.newest.reset()
        while not kinds(found := notices(realtime), CursorCheckStarted):  # noqa: ASYNC110  # a notice has no event
            await trio.sleep(0.1)
        while not any(one.subscribed and one.last_cursor is None and one.number > 1 for one in kadoa.connections):  # noqa: ASYNC110
            await trio.sleep(0.1)
        kadoa.heal()
        sent += kadoa.publish_many(3)
        assert await take(realtime, 6) == ids(sent)
        await trio.sleep(60)
        found += notices(realtime)
        assert kinds(found, CursorAccepted)
        assert realtime.statistics().gap_count == 0
        await nothing_more(realtime)


async def test_reset_of_the_candidate_shows_nothing_about_the_cursor(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        await settle_in(kadoa, realtime)
        kadoa.faults = Faults(refuse_cursors=True)
        kadoa.newest.reset()
        while not any(one.subscribed for one in kadoa.connections):  # noqa: ASYNC110  # the probe
            await trio.sleep(0.1)
        kadoa.faults = Faults(accept_then_reset=True)
        made = len(kadoa.subscribed)
        await kadoa.wait_subscribed(made + 3)
        kadoa.heal()
        sent = kadoa.publish_many(3)
        assert await take(realtime, 3) == ids(sent)
        await trio.sleep(60)
        assert_cursor_kept(realtime, CursorAccepted)


async def test_resets_start_no_cursor_check(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        await trio.sleep(30)
        kadoa.faults = Faults(accept_then_reset=True)
        kadoa.newest.reset()
        await trio.sleep(600)
        kadoa.heal()
        sent += kadoa.publish_many(1)
        assert await take(realtime, 4) == ids(sent)
        assert not kinds(notices(realtime), CursorCheckStarted)


async def test_late_repeats_do_not_take_the_cursor_back(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(200)
        await take(realtime, 200)
        await trio.sleep(30)
        old = kadoa.newest
        old.drain(100)
        await kadoa.wait_subscribed(2)
        for event in sent[:5]:
            old.deliver(event)
        await trio.sleep(20)
        assert realtime.statistics().resume_cursor == sent[-1].cursor
        for connection in list(kadoa.connections):
            connection.reset()
        replacement = await kadoa.wait_subscribed(3)
        assert replacement.last_cursor == sent[-1].cursor


async def test_live_events_overtaking_a_replay_that_is_cut_lose_nothing(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        first = kadoa.publish()
        await trio.sleep(30)
        kadoa.faults = Faults(replay_late=5)
        kadoa.newest.reset()
        missed = kadoa.publish_many(3)
        await kadoa.wait_subscribed(2)
        overtaking = kadoa.publish_many(2)
        await trio.sleep(1)
        kadoa.newest.reset()  # before the replay has come
        kadoa.heal()
        got = await take(realtime, 6)
        assert sorted(got) == sorted(ids([first, *missed, *overtaking]))


@pytest.mark.parametrize("silence", [30, 90])
async def test_ignored_cursor_is_found_out_in_an_overlap(silence: float, autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        kadoa.publish_many(3)
        await take(realtime, 3)
        await trio.sleep(30)
        kadoa.faults = Faults(ignore_cursors=True)
        old = kadoa.newest
        old.drain(100)
        new = await kadoa.wait_subscribed(2)
        new.hold()
        kadoa.publish()  # by the old one only
        await trio.sleep(1)
        new._waiting = None
        old.reset()
        await trio.sleep(silence)
        kadoa.publish_many(2)
        await take(realtime, 3)
        # What the new connection owes may come in a replay: after its first frame, which is a heartbeat, six times
        # stable_after without a sign of one decides.
        await trio.sleep(90 - silence)
        assert [notice.gap.reason for notice in kinds(notices(realtime), PossibleGap)] == [GapReason.NOT_REPLAYED]


async def test_outage_without_cursors_is_a_possible_gap(
    autojump_clock: Any, pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with pair() as (kadoa, realtime):
        kadoa.faults = Faults(without_cursors=True)
        kadoa.publish()
        await take(realtime, 1)
        await trio.sleep(30)
        kadoa.newest.reset()
        await kadoa.wait_subscribed(2)
        kadoa.publish()
        await take(realtime, 1)
        (notice,) = kinds(notices(realtime), PossibleGap)
        assert notice.gap.reason is GapReason.NO_CURSOR
        assert notice.gap.since is not None
        assert notice.gap.since <= notice.gap.until
        assert realtime.statistics().gaps == (notice.gap,)
        assert [record.levelno for record in caplog.records if "possible gap" in record.message] == [logging.WARNING]


async def test_drain_without_resumption_is_a_possible_gap_unless_the_streams_meet(
    autojump_clock: Any, pair: Any
) -> None:
    for meet in (True, False):
        async with pair() as (kadoa, realtime):
            await trio.sleep(30)
            kadoa.publish()
            await take(realtime, 1)
            old = kadoa.newest
            kadoa.faults = Faults(ignore_cursors=True)
            old.drain(100, resume_supported=False)
            await kadoa.wait_subscribed(2)
            await trio.testing.wait_all_tasks_blocked()
            if meet:
                kadoa.publish()
                await take(realtime, 1)
            await trio.sleep(1)
            old.close()
            await trio.sleep(30)
            kadoa.publish()
            await take(realtime, 1)
            reasons = [notice.gap.reason for notice in kinds(notices(realtime), PossibleGap)]
            assert reasons == ([] if meet else [GapReason.NOT_PROMISED])


async def test_events_without_ids_are_distinguished(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        with_cursor = kadoa.publish(with_id=False)
        kadoa.faults = Faults(without_cursors=True)
        bare = kadoa.publish(with_id=False)
        for event in (with_cursor, bare, with_cursor, bare):
            kadoa.newest.deliver(event)
        got = [await realtime.events.receive() for _ in range(2)]
        assert [event.id_source for event in got] == ["cursor", "digest"]
        await nothing_more(realtime)


async def test_resume_from_a_position_goes_on_where_processing_stood(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime:
            await kadoa.wait_subscribed(1)
            sent = kadoa.publish_many(10)
            received = await take(realtime, 4)
            await realtime.events.receive()  # in hand when the block is left: not settled
            position = realtime.position
        sent += kadoa.publish_many(3)
        kadoa.faults = Faults(replay_extra=4)  # a coarse replay
        async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, resume_from=position) as realtime:
            received += await take(realtime, 9)
            await nothing_more(realtime)
            assert realtime.statistics().gap_count == 0
        assert received == ids(sent)


async def test_resume_from_a_cursor(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        sent = kadoa.publish_many(5)
        async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, resume_from=sent[1].cursor) as realtime:
            assert await take(realtime, 3) == ids(sent[2:])


# ---- consuming -----------------------------------------------------------------------------------------------------


async def test_asking_settles_the_event_before_and_leaving_does_not(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        await trio.testing.wait_all_tasks_blocked()
        await realtime.events.receive()
        assert realtime.position.cursor is None
        await realtime.events.receive()
        assert realtime.position.cursor == sent[0].cursor
        await realtime.events.receive()
        with trio.move_on_after(0) as scope:  # asked, though cancelled: settled
            await realtime.events.receive()
        assert scope.cancelled_caught
        assert realtime.position.cursor == sent[2].cursor


async def test_delivery_settles_at_its_end_and_goes_back_on_failure(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        with pytest.raises(ValueError, match="mine"):
            async with realtime.events.delivery() as delivery:
                assert (delivery.event.id, delivery.attempt) == (sent[0].id, 1)
                raise ValueError("mine")
        await trio.sleep(0.1)
        with trio.CancelScope() as scope:
            async with realtime.events.delivery() as delivery:
                assert (delivery.event.id, delivery.attempt) == (sent[0].id, 2)
                scope.cancel()
                await trio.sleep_forever()
        await trio.sleep(0.2)
        async with realtime.events.delivery() as first, realtime.events.delivery() as second:
            assert (first.event.id, first.attempt) == (sent[0].id, 3)
            assert (second.event.id, second.attempt) == (sent[1].id, 1)
            assert realtime.position.cursor is None
        assert realtime.position.cursor == sent[1].cursor


async def test_closed_handle_gives_its_event_back(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(3)
        worker = realtime.events.clone()
        first = await worker.receive()
        await worker.aclose()
        assert first.id == sent[0].id
        with pytest.raises(trio.ClosedResourceError):
            await worker.receive()
        async with realtime.events.delivery() as delivery:
            assert (delivery.event.id, delivery.attempt) == (sent[0].id, 2)
        assert await take(realtime, 2) == ids(sent[1:])


async def test_event_goes_back_to_a_handle_that_is_waiting(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        worker, got = realtime.events.clone(), []

        @nursery.start_soon
        async def wait() -> None:
            got.append((await worker.receive()).id)

        kadoa.publish()
        await trio.testing.wait_all_tasks_blocked()
        assert len(got) == 1
        handle = realtime.events.clone()
        second = kadoa.publish()
        received = await handle.receive()
        assert received.id == second.id

        @nursery.start_soon
        async def wait_again() -> None:
            got.append((await worker.receive()).id)

        worker.settle()
        await trio.testing.wait_all_tasks_blocked()
        await handle.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert got[1:] == [second.id]


async def test_second_task_on_one_handle_raises_an_error_that_names_clone(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), trio.open_nursery() as nursery:
        nursery.start_soon(realtime.events.receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await realtime.events.receive()
        kadoa.publish_many(2)
        await trio.testing.wait_all_tasks_blocked()
        # Received by the other task, which is over; nobody knows whether it has handled it.
        with pytest.raises(trio.BusyResourceError):
            realtime.events.receive_nowait()
        realtime.events.settle()
        realtime.events.receive_nowait()


async def test_workers_compete_and_every_event_is_handled_once(autojump_clock: Any, pair: Any) -> None:
    async with pair(limits=Limits(buffered_events=10)) as (kadoa, realtime):
        handled: list[str] = []

        async def work(events: kadoa_trio.EventChannel, pace: float) -> None:
            async with events:
                async for event in events:
                    await trio.sleep(pace)
                    handled.append(event.id)

        async with trio.open_nursery() as nursery:
            for pace in (0, 0.01, 0.1, 1):
                nursery.start_soon(work, realtime.events.clone(), pace)
            sent = kadoa.publish_many(500)
            await trio.sleep(200)
            assert sorted(handled) == ids(sent)
            await trio.sleep(2)
            realtime.stop()
        assert realtime.position.cursor == sent[-1].cursor


async def test_events_are_received_together_with_one_checkpoint(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(10)
        await trio.sleep(1)
        channel = realtime.events
        first = await channel.receive()
        with trio.testing.assert_checkpoints():
            batch = await channel._receive_many(4, 10**6)  # settles the one before
        assert [first.id, *(one.event.id for one in batch)] == ids(sent[:5])
        assert realtime.position.cursor == sent[0].cursor
        channel._buffer.put_back(batch[2:])
        channel._buffer.settle_many(batch[:2])
        assert realtime.position.cursor == sent[2].cursor
        (one,) = await channel._receive_many(10, 1)
        assert (one.event.id, one.attempt) == (sent[3].id, 1)
        rest = await channel._receive_many(10, 10**6)
        assert [one.event.id for one in rest] == ids(sent[4:])
        channel._buffer.settle_many([one, *rest])
        realtime.stop()
        with pytest.raises(trio.EndOfChannel):
            await channel._receive_many(10, 10**6)
        await channel.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await channel._receive_many(10, 10**6)


async def test_cancelled_receiving_together_loses_nothing(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        received: list[str] = []
        channel = realtime.events
        for n in range(200):
            if n % 3 == 0:
                kadoa.publish_many(5)
            with trio.move_on_after(0.0005 * (n % 7)):
                batch = await channel._receive_many(3, 10**6)
                received += [one.event.id for one in batch]
                channel._buffer.settle_many(batch)
            await trio.sleep(0.0003 * (n % 5))
        await trio.sleep(1)
        while len(received) < len(kadoa.published):
            batch = await channel._receive_many(1_000, 10**6)
            received += [one.event.id for one in batch]
            channel._buffer.settle_many(batch)
        assert received == ids(kadoa.published)
        assert realtime.position.cursor == kadoa.published[-1].cursor


async def test_second_task_that_receives_together_from_one_handle_is_refused(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (_kadoa, realtime), trio.open_nursery() as nursery:
        nursery.start_soon(realtime.events._receive_many, 1, 1)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await realtime.events._receive_many(1, 1)
        nursery.cancel_scope.cancel()


async def test_no_worker_waits_while_there_are_events_and_they_come_in_order(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        begun: list[float] = []
        received: list[str] = []

        async def work(events: kadoa_trio.EventChannel) -> None:
            async with events:
                async for event in events:
                    begun.append(trio.current_time())
                    received.append(event.id)
                    await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(work, realtime.events.clone())
            await trio.testing.wait_all_tasks_blocked()  # all of them wait
            start = trio.current_time()
            sent = kadoa.publish_many(40)
            await trio.sleep(11)
            assert received == ids(sent)
            assert [time - start for time in begun] == pytest.approx([second for second in range(10) for _ in range(4)])
            nursery.cancel_scope.cancel()


async def test_full_buffer_takes_many_events_at_once(autojump_clock: Any, pair: Any) -> None:
    # A connection that were woken for each event that a consumer takes would cost as much as the event.
    async with pair(limits=Limits(buffered_events=100)) as (kadoa, realtime):
        kadoa.publish_many(300)
        await trio.sleep(1)
        buffered = []
        for _ in range(60):
            await realtime.events.receive()
            await trio.testing.wait_all_tasks_blocked()
            buffered.append(realtime.events.statistics().buffered_events)
        assert buffered[:19] == list(range(99, 80, -1))
        assert buffered[19] == 100
        assert buffered.count(100) == 3


async def test_buffer_is_bounded_by_events_and_reading_goes_on(autojump_clock: Any, pair: Any) -> None:
    async with pair(limits=Limits(buffered_events=20)) as (kadoa, realtime):
        sent = kadoa.publish_many(100)
        await trio.sleep(HOUR)
        statistics = realtime.events.statistics()
        assert (statistics.buffered_events, statistics.tasks_waiting_space) == (20, 1)
        assert realtime.statistics().attempts == 1  # the clock stood still: it is we who do not read
        assert await take(realtime, 100) == ids(sent)


async def test_buffer_is_bounded_by_bytes_and_lets_a_giant_in_alone(autojump_clock: Any, pair: Any) -> None:
    async with pair(limits=Limits(buffered_bytes=10_000)) as (kadoa, realtime):
        sent = [kadoa.publish("news", {"x": "y" * size}) for size in (4_000, 4_000, 4_000, 50_000, 100)]
        await trio.testing.wait_all_tasks_blocked()
        assert realtime.events.statistics().buffered_events == 2
        for event in sent:
            assert (await realtime.events.receive()).id == event.id
            await trio.testing.wait_all_tasks_blocked()
            assert realtime.events.statistics().buffered_bytes <= 50_200


async def test_too_much_unsettled_pauses_admission_and_says_which_event(autojump_clock: Any, pair: Any) -> None:
    async with pair(limits=Limits(unsettled=10)) as (kadoa, realtime):
        worker = realtime.events.clone()
        sent = kadoa.publish_many(30)
        stuck = await worker.receive()
        received = await take(realtime, 9)
        await nothing_more(realtime)
        (notice,) = kinds(notices(realtime), AdmissionPaused)
        assert (notice.oldest, notice.unsettled) == (stuck.id, 10)
        worker.settle()
        received += await take(realtime, 20)
        assert [stuck.id, *received] == ids(sent)


async def test_filters_settle_what_they_keep_away(autojump_clock: Any, pair: Any) -> None:
    async with pair(event_types=["workflow_failed"], workflow_ids={"a"}) as (kadoa, realtime):
        kadoa.publish("workflow_finished", workflow_id="a")
        kadoa.publish("workflow_failed", workflow_id="b")
        wanted = [
            kadoa.publish("workflow_failed", workflow_id="a"),
            kadoa.publish("workflow_failed", {"no": "workflow"}),
        ]
        last = kadoa.publish("workflow_finished", workflow_id="a")
        await trio.testing.wait_all_tasks_blocked()
        assert await take(realtime, 2) == ids(wanted)
        assert realtime.position.cursor == last.cursor
        assert realtime.statistics().filtered == 3


async def test_receive_is_a_checkpoint(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        kadoa.publish_many(3)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            with trio.testing.assert_checkpoints():
                await realtime.events.receive()
        with trio.testing.assert_checkpoints():
            await realtime.wait_live()
        with pytest.raises(trio.WouldBlock):
            realtime.events.receive_nowait()
        clone = realtime.events.clone()
        with trio.testing.assert_checkpoints():
            await clone.aclose()
        await clone.aclose()


async def test_cancelled_receive_loses_nothing(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish_many(200)
        received: list[str] = []
        cancelled = 0
        while len(received) < 200:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.lowlevel.checkpoint)
                    nursery.start_soon(_cancel_soon, scope, cancelled % 3)
                    received.append((await realtime.events.receive()).id)
                    nursery.cancel_scope.cancel()
            cancelled += scope.cancelled_caught
        assert received == ids(sent)
        assert cancelled


async def _cancel_soon(scope: trio.CancelScope, steps: int) -> None:
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    scope.cancel()


async def test_state_statistics_and_notices_agree(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        with trio.fail_after(20):
            await realtime.wait_live()
        assert realtime.state is State.LIVE
        await trio.sleep(15)
        kadoa.newest.drain(5_000)
        await trio.sleep(1)
        assert realtime.state is State.REPLACING
        await trio.sleep(30)
        assert realtime.state is State.LIVE
        assert [type(notice).__name__ for notice in notices(realtime)][:6] == [
            "AttemptStarted", "Subscribed", "Live", "Stable", "Draining", "AttemptStarted",
        ]  # fmt: skip
        assert realtime.statistics().connections[-1].live


async def test_unread_notices_are_bounded(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        for _ in range(60):
            await trio.sleep(60)
            kadoa.newest.reset()
        await trio.sleep(60)
        assert len(notices(realtime)) == 256
        # At least five for each connection: an attempt began, subscribed, was live, was stable, and was lost.
        assert realtime.statistics().notices_dropped >= 44


# ---- cancellation --------------------------------------------------------------------------------------------------


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope after the *n*-th step of any task."""

    def __init__(self, scope: trio.CancelScope, n: int) -> None:
        self.scope, self.n, self.steps = scope, n, 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.steps == self.n:
            self.scope.cancel()


async def test_every_step_can_be_cancelled_and_nothing_is_left(autojump_clock: Any) -> None:
    n = 1
    finished = False
    while not finished:
        async with open_simulated_kadoa() as kadoa:
            began = trio.current_time()
            left: BaseException | None = None
            with trio.CancelScope() as scope:
                instrument = CancelAtStep(scope, n)
                trio.lowlevel.add_instrument(instrument)
                try:
                    async with open_realtime(
                        kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=MemoryCursorStore(), repair_gaps=True
                    ) as realtime:
                        await kadoa.wait_subscribed(1)
                        kadoa.publish_many(2)
                        await realtime.events.receive()
                        kadoa.newest.drain(100)
                        await kadoa.wait_subscribed(2)
                        kadoa.newest.reset()
                        await kadoa.wait_subscribed(3)
                        async with realtime.events.delivery():
                            pass
                    finished = True
                except BaseException as exc:
                    left = exc
                    raise
                finally:
                    trio.lowlevel.remove_instrument(instrument)
            # One Cancelled and not a group of them, so that `except trio.Cancelled` around the client sees it.
            assert left is None if finished else isinstance(left, trio.Cancelled), (n, left)
            assert finished or scope.cancelled_caught
            assert trio.current_time() - began < 60
            await trio.sleep(10)  # a server takes its time to notice
            assert not kadoa.connections, n
        n += 1
    assert n > 100


def test_reprs_are_short_and_stable() -> None:
    assert repr(Position(cursor="1-0")).startswith("Position(team=None, cursor='1-0'")
    assert re.fullmatch(r"RetryPolicy\(.{20,200}\)", repr(RetryPolicy()))
    event = Event("e1", "workflow_failed", None, "1742-0", "id", '{"secret": 1}')
    assert repr(event) == "<Event workflow_failed id='e1' cursor='1742-0'>"
    assert SimulatedKadoa.__name__ in repr(SimulatedKadoa)


async def test_ctrl_c_never_cuts_a_step_of_the_client_in_two(
    autojump_clock: Any, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trio raises KeyboardInterrupt between any two instructions that are not protected from it, and both the ledger
    # and the spawning of a task (which Trio leaves unprotected) would be left half done.
    unprotected: set[str] = set()
    seen: set[str] = set()

    def watched(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_globals["__name__"]
            if caller.startswith("kadoa_trio._"):
                seen.add(name)
                if not trio.lowlevel.currently_ki_protected():
                    unprotected.add(f"{name} from {caller}")
            return function(*args, **options)

        return call

    for name in ("open", "admit_run", "settle", "tick", "ended"):
        monkeypatch.setattr(Ledger, name, watched(name, getattr(Ledger, name)))
    monkeypatch.setattr(trio.Nursery, "start_soon", watched("start_soon", trio.Nursery.start_soon))
    async with pair(cursor_store=MemoryCursorStore(), repair_gaps=True) as (
        kadoa,
        client,
    ):
        await settle_in(kadoa, client)
        kadoa.publish_many(3)
        await take(client, 1)
        await trio.sleep(1)
        client.events.receive_nowait()
        client.events.settle()
        async with client.events.delivery():
            pass
        kadoa.newest.drain(100, close_after=1)
        await trio.sleep(60)
    assert seen == {"open", "admit_run", "settle", "tick", "ended", "start_soon"}
    assert not unprotected
