"""The testing kit, used as a program's tests use it."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import attrs
import httpx
import pytest
import trio
from _processes import environment_without, finished
from _receiving import receiving, survive
from hypothesis import given, settings
from hypothesis import strategies as st
from trio_websocket import ConnectionClosed, wrap_client_stream

import kadoa_trio
from kadoa_trio import (
    Endpoints,
    Event,
    MemoryCursorStore,
    Message,
    OtherMessage,
    Timeouts,
    WorkflowDataChange,
    open_realtime,
)
from kadoa_trio import testing as kit
from kadoa_trio._events import EVENT_TYPES, camel_case
from kadoa_trio._net._wire import decode
from kadoa_trio.notices import State
from kadoa_trio.testing import (
    Draft,
    Schedule,
    ScheduledFault,
    SimulatedConnection,
    SimulatedKadoa,
    difference,
    make_event,
    open_simulated_kadoa,
    other_event,
    workflow_data_change,
    workflow_failed,
)
from kadoa_trio.testing._builders import BUILDERS
from kadoa_trio.testing.strategies import drafts, events, frames, schedules

ROOT = Path(__file__).resolve().parent.parent
WEEK = 7 * 24 * 3600.0


# ---- builders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVENT_TYPES)
def test_event_type_has_an_exported_class_a_builder_a_documented_frame_and_a_page(name: str) -> None:
    kind = EVENT_TYPES[name].message
    assert kind in get_args(Message)
    assert kind.__name__ in kadoa_trio.__all__
    assert f".. autoclass:: kadoa_trio.{kind.__name__}\n" in (ROOT / "docs" / "reference.md").read_text()
    assert f"``{name}``" in (kind.__doc__ or "")
    assert EVENT_TYPES[name].documentation.endswith(".")
    assert getattr(kit, name) is BUILDERS[name]
    assert name in kit.__all__
    documented = decode((ROOT / "tests" / "frames" / f"{name}.json").read_bytes())
    drafted = make_event(BUILDERS[name](workflow_id="wf_7"))
    assert isinstance(documented, Event)
    for event in (documented, drafted):
        assert type(event.message) is kind
        assert event.workflow_id == event.message.workflow_id  # type: ignore[union-attr]  # every class has one
    # A builder drafts fields that the class has.
    assert set(drafted.raw["message"]) <= {camel_case(field.name) for field in attrs.fields(kind)}


def test_every_message_class_and_every_builder_is_of_an_event_type() -> None:
    assert {one.message for one in EVENT_TYPES.values()} == set(get_args(Message)) - {OtherMessage}
    assert set(BUILDERS) == set(EVENT_TYPES)


async def test_every_event_type_is_streamed_published_and_typed(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        for name, event_type in EVENT_TYPES.items():
            assert kadoa.workspace.streams(name, None)
            kadoa.publish(name, workflow_id="wf_9")
            event = await realtime.events.receive()
            assert (type(event.message), event.workflow_id) == (event_type.message, "wf_9")


def test_event_of_another_type_has_an_other_message() -> None:
    event = make_event(other_event("credits_low", left=3))
    assert event.message == OtherMessage({"left": 3})


@pytest.mark.parametrize("name", [*EVENT_TYPES, "credits_low"])
def test_made_events_have_a_time_and_an_id_of_their_own(name: str) -> None:
    draft = BUILDERS[name]() if name in BUILDERS else other_event(name)
    event = make_event(draft)
    assert event.timestamp is not None
    assert event.id != make_event(draft).id


def test_builders_use_their_arguments() -> None:
    message = make_event(
        workflow_data_change(differences=[difference("changed", price=(1, 2)), difference("added", name="x")], extra=7)
    ).message
    assert isinstance(message, WorkflowDataChange)
    assert [(one.type, one.fields[0].key) for one in message.differences] == [("changed", "price"), ("added", "name")]
    assert (message.differences[0].fields[0].previous_value, message.differences[0].fields[0].value) == (1, 2)
    failed = make_event(workflow_failed(reason="gone", workflow_id="wf_9"), id="e9", cursor="3-4")
    assert (failed.id, failed.cursor, failed.workflow_id) == ("e9", "3-4", "wf_9")
    assert failed.message.reason == "gone"  # type: ignore[union-attr]


@given(drafts(odd=True), st.none() | st.just("1742-0"))
def test_made_event_is_what_the_client_decodes_from_its_frame(draft: Draft, cursor: str | None) -> None:
    event = make_event(draft, cursor=cursor)
    decoded = decode(json.dumps(event.raw))
    assert isinstance(decoded, Event)
    assert decoded == event
    for name in ("workflow_id", "timestamp", "id_source", "from_log", "raw"):
        assert getattr(decoded, name) == getattr(event, name)


async def test_draft_is_published_unchanged(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        sent = kadoa.publish(workflow_failed(reason="because", tag="extra"))
        event = await realtime.events.receive()
        assert event.id == sent.id
        assert event.raw["message"] == workflow_failed(reason="because", tag="extra").message


# ---- assertions ----------------------------------------------------------------------------------------------------


async def test_settled_lists_what_the_client_settled(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        one, two = kadoa.publish_many(2)
        await realtime.events.receive()
        await trio.sleep(5)
        assert kadoa.settled == []
        await realtime.events.receive()
        await kadoa.wait_settled(one)
        assert kadoa.settled == [one]
        with trio.move_on_after(60) as scope:
            await kadoa.wait_settled()
        assert scope.cancelled_caught
        realtime.events.settle()
        await kadoa.wait_settled()
        assert kadoa.settled == [one, two]


async def test_settled_is_known_although_acknowledgements_are_lost(autojump_clock: Any) -> None:
    async with (
        open_simulated_kadoa() as kadoa,
        open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, acknowledge=False) as realtime,
    ):
        await kadoa.wait_subscribed(1)
        kadoa.publish()
        kadoa.faults.refuse_connections = True
        await realtime.events.receive()
        assert kadoa.settled == []
        realtime.events.settle()
        with trio.fail_after(1):
            await kadoa.wait_settled()
        assert kadoa.settled == kadoa.published
        assert kadoa.acknowledged == []


async def test_network_in_memory_observes_settlements() -> None:
    async with open_simulated_kadoa() as kadoa, open_simulated_kadoa(loopback=True) as other:
        first, second = kadoa.publish_many(2)
        network: Any = kadoa.endpoints.network
        network.settlement_observer.settled(make_event(workflow_failed(), id=second.id))
        assert kadoa.settled == [second]
        network.settlement_observer.settled(make_event(workflow_failed(), id=first.id))
        with trio.fail_after(1):
            await kadoa.wait_settled()
        assert other.endpoints.network is None


async def test_store_and_simulator_report_position_and_subscriptions(autojump_clock: Any) -> None:
    store = MemoryCursorStore()
    assert store.position() is None
    async with open_simulated_kadoa() as kadoa:
        for count in (1, 2):
            async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=store) as realtime:
                await kadoa.wait_subscribed(count)
                kadoa.publish()
                await realtime.events.receive()
                realtime.events.settle()
                # A connection that resumed moves the cursor after 3 times stable_after; until then the id is saved beside it.
                await trio.sleep(40)
        first, second = kadoa.published
        position = store.position()
        assert position is not None
        assert position.cursor == second.cursor
        assert store.position("other") is None
        assert store.position(team="team-1") == position
        assert store.position(team="team-2") is None
        assert kadoa.subscriptions == [(1, None), (2, first.cursor)]


async def test_simulated_kadoa_can_be_the_default(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KADOA_API_KEY", "mine")
    monkeypatch.delenv("KADOA_WSS_API_URI", raising=False)
    async with open_simulated_kadoa() as kadoa:
        with kadoa.as_default():
            async with open_realtime() as realtime:
                await kadoa.wait_subscribed(1)
                sent = kadoa.publish()
                assert (await realtime.events.receive()).id == sent.id
    assert os.environ["KADOA_API_KEY"] == "mine"
    assert "KADOA_WSS_API_URI" not in os.environ
    assert Endpoints.from_environment() == Endpoints()


async def test_default_inside_of_another_default_restores_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KADOA_API_KEY", raising=False)
    async with open_simulated_kadoa() as outer, open_simulated_kadoa() as inner:
        with outer.as_default():
            with inner.as_default():
                assert Endpoints.from_environment() is inner.endpoints
            # Their addresses are the same, and their networks are not.
            assert Endpoints.from_environment() is outer.endpoints
            assert os.environ["KADOA_API_KEY"] == outer.api_key


# ---- odd clients ---------------------------------------------------------------------------------------------------

NOTIFICATIONS = "/v5/notifications"
DEEP = "[" * 100_000
UPGRADE = (
    "upgrade: websocket\r\nconnection: upgrade\r\n"
    "sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
ODD_REQUESTS = [
    ("POST", f"{NOTIFICATIONS}/channels", DEEP),
    ("POST", f"{NOTIFICATIONS}/settings", '{"eventType":"credits_low","workflowId":{},"channelIds":[]}'),
    ("PUT", f"{NOTIFICATIONS}/settings/setting-2", '{"channelIds":5}'),
    ("PUT", f"{NOTIFICATIONS}/settings/setting-2", '{"channelIds":[{}]}'),
    ("POST", "/api/v1/events/ack", DEEP),
    ("POST", "/api/v1/events/ack", '{"id":{}}'),
    ("POST", "/api/v1/events/ack", "[]"),
    *(
        ("GET", f"{NOTIFICATIONS}/logs?{query}", "")
        for query in ("limit=1.5", "limit=abc", "offset=x", "offset=" + "9" * 5000, "startDate=x")
    ),
    ("GET", f"{NOTIFICATIONS}/logs?startDate=2026-01-01T00:00:00", ""),  # a time without a zone
    ("GET", "//[/x", ""),
    ("GET", "http://[bad", ""),
]


@pytest.mark.parametrize(
    ("method", "target", "body", "head"),
    [
        *((*request, "") for request in ODD_REQUESTS),
        *(("GET", target, "", UPGRADE) for target in ("//[/x", "http://[bad")),
    ],
    ids=lambda value: value[:40],
)
async def test_odd_request_is_refused_and_the_server_goes_on(method: str, target: str, body: str, head: str) -> None:
    async with open_simulated_kadoa(loopback=True) as kadoa:
        kadoa.publish()
        port = int(kadoa.endpoints.public_api.rpartition(":")[2])
        request = (
            f"{method} {target} HTTP/1.1\r\nhost: x\r\nx-api-key: {kadoa.api_key}\r\n{head}"
            f"content-length: {len(body)}\r\n\r\n{body}"
        )
        for _ in range(2):
            with trio.fail_after(10):
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                async with stream:
                    await stream.send_all(request.encode())
                    assert (await stream.receive_some()).startswith(b"HTTP/1.1 400 ")
        assert kadoa.acknowledged == []


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (DEEP, None),
        ("{", None),
        *(
            (f'{{"action":"subscribe","channel":"team-1","lastCursor":{cursor}}}', 1008)
            for cursor in ("5", "[1]", '{"a":1}', "true")
        ),
        (f'{{"action":"subscribe","channel":"team-1","lastCursor":"{"9" * 6000}-0"}}', None),
        ('{"action":"subscribe","channel":["team-1"]}', 1008),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_odd_frame_is_ignored_or_closes_its_connection(
    autojump_clock: Any, message: str, code: int | None
) -> None:
    async with open_simulated_kadoa() as kadoa:
        assert kadoa.endpoints.network is not None
        async with httpx.AsyncClient(transport=kadoa.endpoints.network.http_transport) as http:  # type: ignore[arg-type]  # an object for users
            token = (await http.post("http://localhost/v4/oauth2/token", headers={"x-api-key": kadoa.api_key})).json()[
                "access_token"
            ]
        stream = await kadoa.endpoints.network.open_stream("localhost", 1)
        async with trio.open_nursery() as nursery:
            socket = await wrap_client_stream(nursery, stream, "localhost", f"/?access_token={token}")  # type: ignore[arg-type]  # not a socket
            await socket.send_message(message)
            if code is None:
                assert "heartbeat" in await socket.get_message()
            else:
                with pytest.raises(ConnectionClosed):
                    await socket.get_message()
                assert socket.closed is not None
                assert socket.closed.code == code
            nursery.cancel_scope.cancel()
        kadoa.publish()


# ---- mistakes in tests ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (lambda seconds=seconds: Schedule.chaos(1, seconds=seconds), "seconds must be")
            for seconds in (math.inf, math.nan, 10**400, 1e12, -1, None, True)
        ),
        *(
            (lambda every=every: Schedule.chaos(1, seconds=10, every=every), "every must be|seconds must be maximum")
            for every in (0, math.inf, math.nan, -1, 1e-300, "x", None)
        ),
        *(
            (lambda kinds=kinds: Schedule.chaos(1, seconds=10, kinds=kinds), "kinds must be|unknown fault 'x'")
            for kinds in ("drain", [], ["x"], ["drain", "x"])
        ),
        (lambda: Schedule("10 drain"), r"Schedule\.parse\(\)"),  # type: ignore[arg-type]  # wrong, here and below
        (lambda: Schedule(None), "ScheduledFault"),  # type: ignore[arg-type]
        (lambda: Schedule.parse(None), "a string, not NoneType"),  # type: ignore[arg-type]
        *((lambda at=at: ScheduledFault(at, "drain"), "at must be") for at in (None, "1", -1, math.nan, math.inf)),
        (lambda: ScheduledFault(1, "drain", None), "seconds must be"),  # type: ignore[arg-type]
        *((lambda draft=draft: make_event(draft), "draft must be a draft") for draft in (None, True, 0)),
        *((lambda kind=kind: make_event(other_event(kind)), "type of an event") for kind in ("", "\ud800", None, 5)),
        (lambda: make_event(""), "type of an event"),
        *((lambda types=types: events(types), "types must be") for types in ("workflow_failed", [], 5)),
        (lambda: drafts("workflow_failed"), "types must be"),
        (lambda: schedules(seconds=math.inf), "seconds must be"),
        (lambda: schedules(kinds=["x"]), "unknown fault 'x'"),  # type: ignore[list-item]
    ],
)
def test_mistake_is_refused_by_the_call_that_makes_it(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (lambda one, after=after: one.drain(close_after=after), "close_after must be")
            for after in (-1, math.nan, math.inf, 10**400, "x", True)
        ),
        *((lambda one, raw=raw: one.send_raw(raw), "message must be") for raw in (None, 5, ["x"])),
        (lambda one: one.send_raw("\ud800"), "surrogates"),
        *(
            (lambda one, rate=rate: one.send_slowly(one.sent[0], bytes_per_second=rate), "bytes_per_second must be")
            for rate in (0, -1, math.nan, None)
        ),
        *((lambda one, code=code: one.close(code), "code must be") for code in (None, 1.5, -1, 70_000)),
        *((lambda one, why=why: one.close(1001, why), "reason must be") for why in (5, "x" * 124)),
    ],
)
async def test_mistake_on_a_connection_is_refused_by_the_call_and_sends_nothing(
    autojump_clock: Any, pair: Any, call: Callable[[SimulatedConnection], object], message: str
) -> None:
    async with pair() as (kadoa, realtime):
        kadoa.publish()
        await realtime.events.receive()
        with pytest.raises((ValueError, TypeError), match=message):
            call(kadoa.newest)
        await trio.sleep(60)
        assert not kadoa.newest.draining
        assert kadoa.handshakes == 1


@pytest.mark.parametrize(
    "options",
    [
        *({"port": port, "loopback": True} for port in (-1, True, 70_000, "1", None)),
        *({"heartbeat_interval": seconds} for seconds in (0, -1, math.nan, None, "x")),
        {"loopback": "no"},
    ],
)
async def test_simulated_kadoa_refuses_options_that_it_cannot_use(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        async with open_simulated_kadoa(**options):
            pass


@pytest.mark.parametrize("name", [*EVENT_TYPES, "credits_low"])
def test_event_is_made_from_the_name_of_its_type(name: str) -> None:
    event = make_event(name, id="e1")
    assert (event.id, event.type, event.workflow_id) == ("e1", name, "wf_123")
    assert type(event.message) is (EVENT_TYPES[name].message if name in EVENT_TYPES else OtherMessage)


# ---- strategies ----------------------------------------------------------------------------------------------------


@given(events())
def test_drawn_events_are_typed(event: Event) -> None:
    assert getattr(event.message, "untyped_because", None) is None, event.message
    assert event.id


@given(events(odd=True))
def test_odd_events_have_a_message_and_a_frame(event: Event) -> None:
    assert event.message is not None
    assert isinstance(event.raw, dict)


@given(frames())
def test_drawn_frames_are_decoded(frame: str) -> None:
    decode(frame)


@given(schedules(seconds=60, max_faults=4))
def test_drawn_schedules_are_within_their_bounds(schedule: Schedule) -> None:
    assert len(schedule.faults) <= 4
    assert all(fault.at <= 60 and fault.kind != "forget" for fault in schedule.faults)
    assert str(Schedule.parse(str(schedule))) == str(schedule)


@given(drafts(["workflow_failed"]))
def test_drawn_drafts_are_of_the_types_asked_for(draft: Draft) -> None:
    assert draft.type == "workflow_failed"
    json.dumps(draft.message)


@given(schedules(seconds=200))
@settings(max_examples=20, deadline=None)
def test_client_is_complete_after_any_drawn_schedule(schedule: Schedule) -> None:
    survive(schedule)


COLD = """
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.internal import charmap


def refuse(*_arguments):
    raise AssertionError("a codec is encoded")


charmap.intervals_from_codec = refuse
from kadoa_trio.testing import strategies as our

assert charmap._charmap is not None


@given(st.integers())
@settings(suppress_health_check=[HealthCheck.too_slow], database=None)
def collect_constants(value):  # of all modules outside of site-packages, which kadoa_trio is one of in its checkout
    pass


@pytest.mark.parametrize(
    "strategy", [our.events(), our.events(odd=True), our.drafts(odd=True), our.frames(), our.schedules()]
)
def test_it(strategy):
    @given(strategy)
    def draw(value):
        pass

    collect_constants()
    draw()
"""


async def test_strategies_are_fast_enough_where_hypothesis_has_no_cache(tmp_path: Path) -> None:
    # The health check counts more than a second for the first ten draws, which a cache on the disk hides.
    (tmp_path / "test_cold.py").write_text(COLD)
    storage = str(tmp_path / "hypothesis")
    code, text = await run("test_cold.py", cwd=tmp_path, HYPOTHESIS_STORAGE_DIRECTORY=storage)
    assert code == 0, text
    assert "5 passed" in text


async def test_client_that_outlives_the_server_in_memory_goes_on_trying(autojump_clock: Any) -> None:
    states: list[State] = []

    async def application(kadoa: SimulatedKadoa, *, task_status: Any) -> None:
        async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime:
            await realtime.wait_live()
            task_status.started()
            await trio.sleep(600)
            states.append(realtime.state)

    async with trio.open_nursery() as nursery, open_simulated_kadoa() as kadoa:
        await nursery.start(application, kadoa)
    assert states == [State.CONNECTING]


# ---- a week --------------------------------------------------------------------------------------------------------


async def test_week_of_drains_and_outages_loses_nothing(autojump_clock: Any) -> None:
    async with (
        # A heartbeat every 15 s would be 40,000 heartbeats, which cost ten times the CPU of everything else here.
        open_simulated_kadoa(heartbeat_interval=300) as kadoa,
        open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, timeouts=Timeouts(heartbeat=700)) as realtime,
    ):
        await kadoa.wait_subscribed(1)
        async with receiving(realtime) as received, trio.open_nursery() as nursery:
            kadoa.publish()
            await trio.sleep(60)
            nursery.start_soon(kadoa.play, Schedule.chaos(11, seconds=WEEK, every=2 * 3600))
            for _ in range(7 * 24):
                await trio.sleep(3600)
                kadoa.publish_many(3)
            await kadoa.wait_settled()
            nursery.cancel_scope.cancel()
        assert received == [event.id for event in kadoa.published]
        assert realtime.statistics().gap_count == 0


# ---- the plugin ----------------------------------------------------------------------------------------------------


async def run(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """Run pytest in a process of its own; return its exit code and its output."""
    # Without the options of this run: only the installed plugins are loaded.
    environment = {**environment_without("PYTEST", "COV"), **environment}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:anyio", "-p", "no:randomly", "-q"]
    done = await finished([*command, *arguments], cwd=cwd, env=environment)
    return done.returncode, (done.stdout + done.stderr).decode()


async def test_example_application_passes_its_own_tests() -> None:
    # Hypothesis's own profile for shared machines: no draw is too slow, and no example is saved.
    code, text = await run(
        "--strict-markers", "--hypothesis-profile", "ci", ".", cwd=ROOT / "docs" / "examples" / "pager"
    )
    assert code == 0, text
    assert "5 passed" in text


async def test_plugin_imports_nothing_until_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys\n\n\ndef test_it():\n    assert '_kadoa_trio_pytest' in sys.modules\n"
        "    assert 'kadoa_trio' not in sys.modules\n    assert 'httpx' not in sys.modules\n"
    )
    code, text = await run(str(tmp_path), cwd=tmp_path)
    assert code == 0, text


async def test_fixture_is_documented(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("")
    _code, text = await run("--fixtures", str(tmp_path), cwd=tmp_path)
    assert "simulated_kadoa" in text
