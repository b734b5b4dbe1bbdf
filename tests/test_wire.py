"""Frames: whatever a server sends, `decode` returns an object for it and loses no event."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kadoa_trio._engine import _connection
from kadoa_trio._events import Event, OtherMessage, WorkflowFinished
from kadoa_trio._net._wire import (
    CONTROL_MESSAGES,
    MAX_CURSOR,
    MAX_ID,
    MAX_NAME,
    Decoded,
    Draining,
    Heartbeat,
    Ignored,
    _Envelope,
    decode,
    subscribe,
)

FRAMES = Path(__file__).parent / "frames"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)
odd_frames = st.dictionaries(
    st.sampled_from(
        [
            "type",
            "eventType",
            "id",
            "timestamp",
            "_cursor",
            "message",
            "data",
            "retryAfterMs",
            "resumeSupported",
            "connectionId",
            "deadlineAt",
            "x",
        ]
    ),
    json_values | st.sampled_from(["heartbeat", "control.draining", "control.new", "workflow_failed"]),
)


def decode_value(frame: object) -> Heartbeat | Draining | Event | Ignored:
    return decode(json.dumps(frame))


def event_of(frame: object) -> Event:
    event = decode_value(frame)
    assert isinstance(event, Event)
    return event


@pytest.mark.parametrize("name", sorted(path.stem for path in FRAMES.glob("*.json")))
@pytest.mark.parametrize("as_bytes", [False, True])
def test_documented_frame_is_what_it_says(name: str, as_bytes: bool) -> None:
    data = (FRAMES / f"{name}.json").read_bytes()
    frame = json.loads(data)
    decoded = decode(data if as_bytes else data.decode())
    if name.startswith("subscribe"):
        assert decoded == Ignored(kind="unknown", why="it names no type")
    elif name == "heartbeat":
        assert decoded == Heartbeat()
    elif name == "control_draining":
        assert decoded == Draining(
            advice=0.5,
            resume_supported=True,
            deadline="2026-03-22T14:05:30.000Z",
        )
    else:
        assert isinstance(decoded, Event)
        assert decoded.raw == frame
        assert (decoded.id, decoded.id_source) == (frame["id"], "id")
        assert decoded.cursor == frame.get("_cursor")
        assert decoded.workflow_id == "wf_123"
        assert decoded.timestamp is not None


def test_three_spellings_give_the_same_event() -> None:
    message = {"workflowId": "wf_1"}
    page = event_of(
        {"eventType": "workflow_finished", "id": "1", "timestamp": "2025-01-15T10:31:00Z", "message": message}
    )
    sdk = event_of({"type": "workflow_finished", "id": "1", "timestamp": 1736937060000, "message": message})
    webhook = event_of(
        {"eventType": "workflow_finished", "id": "1", "timestamp": "2025-01-15T10:31:00Z", "data": message}
    )
    for event in (page, sdk, webhook):
        assert (event.id, event.type, event.timestamp, event.workflow_id, event.message) == (
            "1",
            "workflow_finished",
            page.timestamp,
            "wf_1",
            WorkflowFinished(workflow_id="wf_1"),
        )


@given(st.text() | st.binary())
@example("")
@example("null")
@example("[]")
@example("1" * 5_000)
@example("\ud800")
@example('{"type":"","id":"\\ud800"}')
@example(b"\xff\xfe{}")
@example("\ufeff{}")
@example('{"type":"x","id":"1"} {"type":"x","id":"1"}')
@example("[" * 200_000)
@example('{"a":' * 200_000)
def test_decode_never_raises_on_text_or_bytes(message: str | bytes) -> None:
    assert isinstance(decode(message), Ignored)


@given(json_values)
def test_decode_never_raises_on_json(value: object) -> None:
    assert isinstance(decode_value(value), Ignored)


@given(odd_frames, st.booleans())
def test_decode_loses_no_event_however_odd(frame: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(frame, ensure_ascii=ascii_only)
    decoded = decode(text)
    event_type, kind = frame.get("eventType"), frame.get("type")
    by_event_type = isinstance(event_type, str) and event_type != ""
    name = event_type if by_event_type else kind
    named = isinstance(name, str) and name != ""
    control = not by_event_type and named and (name == "heartbeat" or name.startswith("control."))
    has_id = isinstance(frame.get("id"), (str, int)) and not isinstance(frame.get("id"), bool) and frame["id"] != ""
    carries = has_id or frame.get("message") is not None or frame.get("data") is not None
    assert isinstance(decoded, Event) is (named and not control and carries)
    if isinstance(decoded, Event):
        assert decoded.type == name
        assert (decoded.id_source == "id") is has_id
        assert repr(decoded.raw) == repr(json.loads(text))  # repr: NaN is not itself
        assert decoded.message is decoded.message
        assert decoded == decode(text.encode())


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        ("", "not JSON"),
        ('{"type":"x"', "not JSON"),
        (b'{"type":"\xff"}', "not valid Unicode"),
        (b'{"type":"x","id":"1","message":{"x":"\xff"}}', "not valid Unicode"),
        ("[]", "expected an object, not an array"),
        ("null", "expected an object, not null"),
        ("true", "expected an object, not a boolean"),
        ("1", "expected an object, not a number"),
        ("9" * 400, "expected an object, not a number"),
        ("NaN", "expected an object, not a number"),
        ('"x"', "expected an object, not a string"),
        ('{"type":"x","id":"1","message":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_malformed_frame_is_ignored_with_its_reason(frame: str | bytes, why: str) -> None:
    assert decode(frame) == Ignored(kind="malformed", why=why)


@pytest.mark.parametrize(
    ("frame", "kind", "name"),
    [
        ({}, "unknown", None),
        ({"id": "1", "message": {}}, "unknown", None),
        ({"type": 5, "eventType": None, "id": "1"}, "unknown", None),
        ({"type": "", "eventType": "", "id": "1"}, "unknown", None),
        ({"type": "subscribed", "channel": "team-1"}, "unknown", "subscribed"),
        ({"type": "x", "message": None}, "unknown", "x"),
        ({"eventType": "x", "id": ""}, "unknown", "x"),
        ({"type": "control.new", "id": "1", "message": {}}, "control", "control.new"),
        ({"type": "control.", "id": "1"}, "control", "control."),
    ],
)
def test_frame_without_an_event_is_ignored(frame: object, kind: str, name: str | None) -> None:
    decoded = decode_value(frame)
    assert isinstance(decoded, Ignored)
    assert (decoded.kind, decoded.type) == (kind, name)


@pytest.mark.parametrize(
    ("sent", "shown"),
    [("\x1b]0;pwn\x07\nFAKE", "]0;pwn FAKE"), ("a\u202eb\u2028c", "a b c"), ("\x00", "?"), ("é x", "é x")],
)
def test_texts_for_notices_are_printable(sent: str, shown: str) -> None:
    ignored = decode_value({"type": sent})
    assert isinstance(ignored, Ignored)
    assert ignored.type == shown
    draining = decode_value({"type": "control.draining", "deadlineAt": sent})
    assert isinstance(draining, Draining)
    assert draining.deadline == shown


@pytest.mark.parametrize("payload", [5, 0, "", "x", True, False, [], {}, [1, {"workflowId": "no"}]])
@pytest.mark.parametrize("key", ["message", "data"])
def test_odd_payload_is_an_event(key: str, payload: object) -> None:
    event = event_of({"eventType": "workflow_failed", key: payload})
    assert event.raw[key] == payload
    assert event.workflow_id is None


def test_payload_that_only_pythons_parser_takes_is_an_event() -> None:
    for inside in ("NaN", "-Infinity", "1e999", '"\\ud800"', "9" * 5_000):
        event = decode('{"eventType":"workflow_failed","id":"1","message":{"workflowId":"wf_1","x":' + inside + "}}")
        assert isinstance(event, Event)
        assert event.workflow_id == "wf_1"
        assert "x" in event.raw["message"]


@pytest.mark.parametrize("key", ["eventType", "type"])
@pytest.mark.parametrize("sent", [r"quota\ud800left", r"quota\udc00left"])
def test_lone_surrogate_of_a_type_is_replaced(key: str, sent: str) -> None:
    frame = f'{{"{key}":"{sent}","id":"1","_cursor":"5-0","message":{{"workflowId":"wf_1"}}}}'
    for message in (frame, frame.encode()):
        event = decode(message)
        assert isinstance(event, Event)
        assert (event.type, event.id, event.cursor, event.workflow_id) == ("quota\ufffdleft", "1", "5-0", "wf_1")
        assert event.raw[key] == json.loads(f'"{sent}"')
        assert event.message == OtherMessage({"workflowId": "wf_1"})


def test_lone_surrogates_make_no_event_of_a_frame_that_is_none() -> None:
    assert decode(r'{"eventType":"","type":"","id":"\ud800","message":{}}') == Ignored(
        kind="unknown", why="it names no type"
    )
    ignored = decode(r'{"type":"control.\ud800"}')
    assert isinstance(ignored, Ignored)
    assert (ignored.kind, ignored.type) == ("control", "control.\ufffd")


def test_event_type_wins_over_type() -> None:
    assert event_of({"type": "event", "eventType": "workflow_failed", "id": "1"}).type == "workflow_failed"
    assert event_of({"type": "heartbeat", "eventType": "workflow_failed", "message": {}}).type == "workflow_failed"
    assert event_of({"type": "workflow_failed", "eventType": 5, "id": "1"}).type == "workflow_failed"


def test_control_message_that_names_itself_twice_stays_one() -> None:
    assert decode_value({"type": "heartbeat", "eventType": "heartbeat"}) == Heartbeat()
    assert decode_value({"type": "control.draining", "eventType": "control", "retryAfterMs": 1}) == Draining(
        advice=0.001
    )


def test_event_without_an_id_is_known_by_its_cursor_or_its_frame() -> None:
    by_cursor = event_of({"type": "x", "_cursor": "1742-0", "message": {}})
    assert (by_cursor.id, by_cursor.id_source, by_cursor.cursor) == ("cursor:1742-0", "cursor", "1742-0")
    for text in ('{"type":"x","message":{}}', '{"type":"x","message":"é"}'):
        event = decode(text)
        assert isinstance(event, Event)
        assert event.id == f"digest:{hashlib.sha256(text.encode()).hexdigest()}"
        assert (event.id_source, event.cursor) == ("digest", None)


@pytest.mark.parametrize(("value", "read"), [("a", "a"), ("é", "é"), (5, "5"), (0, "0"), (2**70, str(2**70))])
def test_id_and_cursor_are_strings_or_whole_numbers(value: object, read: str) -> None:
    event = event_of({"type": "x", "id": value, "_cursor": value})
    assert (event.id, event.id_source, event.cursor) == (read, "id", read)


@pytest.mark.parametrize("value", ["", None, True, 1.5, [], ["a"], {}, {"a": 1}, "\ud800", math.inf])
def test_other_id_or_cursor_counts_as_missing(value: object) -> None:
    event = event_of({"type": "x", "id": value, "_cursor": value, "message": {}})
    assert (event.id_source, event.cursor) == ("digest", None)


@pytest.mark.parametrize("value", [None, "soon", [], {}, True, 1e300, math.nan])
def test_unreadable_timestamp_costs_nothing_else(value: object) -> None:
    event = event_of({"type": "x", "id": "1", "timestamp": value})
    assert (event.id, event.timestamp) == ("1", None)


@pytest.mark.parametrize(
    ("sent", "advice"),
    [
        ("500", 0.5),
        ("0", 0.0),
        ("250.5", 0.2505),
        ("1e15", 1e12),
        ("1e999", math.inf),
        ("9" * 400, math.inf),
        ("9" * 5_000, math.inf),
        ("Infinity", math.inf),
        *[(odd, None) for odd in ("-1", "-1e999", "-" + "9" * 400, "NaN", "true", "null", '"500"', "[500]", "{}")],
    ],
)
def test_advice_is_seconds_as_sent_or_none(sent: str, advice: float | None) -> None:
    assert decode(f'{{"type":"control.draining","retryAfterMs":{sent}}}') == Draining(advice=advice)


def test_drain_notice_may_lack_every_field() -> None:
    assert decode('{"type":"control.draining"}') == Draining()
    odd = {"type": "control.draining", "resumeSupported": "true", "connectionId": 5, "deadlineAt": [], "message": 5}
    assert decode_value(odd) == Draining()


@given(st.text(min_size=1), st.none() | st.text())
def test_subscription_names_team_and_cursor(team_id: str, cursor: str | None) -> None:
    expected = {"action": "subscribe", "channel": team_id} | ({} if cursor is None else {"lastCursor": cursor})
    assert json.loads(subscribe(team_id, cursor)) == expected


def test_subscription_is_the_documented_frame() -> None:
    assert json.loads(subscribe("team-1", None)) == json.loads((FRAMES / "subscribe.json").read_text())
    assert json.loads(subscribe("team-1", "1742-0")) == json.loads((FRAMES / "subscribe_resume.json").read_text())


# ---- control messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROL_MESSAGES)
def test_control_message_is_read_or_written_with_all_of_its_fields(name: str) -> None:
    message = CONTROL_MESSAGES[name]
    assert (message.name, message.documentation[-1]) == (name, ".")
    documented = json.loads((FRAMES / f"{name.replace('.', '_')}.json").read_text())
    if message.read is not None:
        assert documented["type"] == name
        assert set(message.fields) <= set(documented)
        assert set(message.fields) <= {field.encode_name for field in msgspec.structs.fields(_Envelope)}
        decoded = decode_value(documented)
        assert not isinstance(decoded, Event | Ignored)
        # Every field is read: without it the object is another one.
        for field in message.fields:
            assert decode_value({**documented, field: None}) != decoded
    else:
        assert message.write is not None
        assert set(documented) <= {"action", *message.fields}
        assert documented["action"] == name
        written = json.loads(message.write(*message.fields))
        assert written == {"action": name} | {field: field for field in message.fields}


def test_every_class_that_decode_returns_is_handled_by_the_connection() -> None:
    read = {
        type(decode_value({"type": message.name})) for message in CONTROL_MESSAGES.values() if message.read is not None
    }
    assert read == set(get_args(Decoded)) - {Event, Ignored}
    tree = ast.parse(Path(_connection.__file__).read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "_net._wire"
        for alias in node.names
    }
    assert {kind.__name__ for kind in read} <= imported


# ---- bounds: the size of what is made from a frame, without the frame ------------------------------------------------


@pytest.mark.parametrize("letter", ["a", "é", "😀"])
def test_id_up_to_the_limit_is_kept_and_a_longer_one_is_known_by_its_digest(letter: str) -> None:
    longest, longer = letter * MAX_ID, letter * (MAX_ID + 1)
    event = event_of({"type": "x", "id": longest, "_cursor": "1742-0"})
    assert (event.id, event.id_source, event.cursor) == (longest, "id", "1742-0")
    event = event_of({"type": "x", "id": longer, "_cursor": "1742-0"})
    digest = hashlib.sha256(longer.encode()).hexdigest()
    assert (event.id, event.id_source, event.cursor) == (f"digest:{digest}", "digest", "1742-0")
    assert event.raw["id"] == longer


def test_overlong_id_is_the_same_in_a_repeat_that_differs() -> None:
    longer = "a" * 1_000_000
    first = event_of({"type": "x", "id": longer, "_cursor": "1742-0", "message": {}})
    again = event_of({"type": "x", "id": longer, "_cursor": "1742-1", "message": {}, "repeated": True})
    other = event_of({"type": "x", "id": longer + "b", "message": {}})
    assert first.id == again.id != other.id
    assert len(first.id) < 100


def test_event_with_an_overlong_cursor_has_no_cursor() -> None:
    longest = "1" * MAX_CURSOR
    assert event_of({"type": "x", "id": "1", "_cursor": longest}).cursor == longest
    event = event_of({"type": "x", "id": "1", "_cursor": longest + "1"})
    assert (event.id, event.id_source, event.cursor) == ("1", "id", None)


def test_event_without_an_id_is_known_by_the_digest_of_an_overlong_cursor() -> None:
    longer = "c" * (MAX_CURSOR + 1)
    first = event_of({"type": "x", "_cursor": longer, "message": {}})
    again = event_of({"type": "x", "_cursor": longer, "message": {}, "repeated": True})
    digest = hashlib.sha256(longer.encode()).hexdigest()
    assert (first.id, first.id_source, first.cursor) == (f"digest:{digest}", "digest", None)
    assert again.id == first.id


def test_event_of_an_overlong_type_is_delivered_with_a_cut_type() -> None:
    longest = "t" * MAX_NAME
    assert event_of({"eventType": longest, "id": "1"}).type == longest
    event = event_of({"eventType": longest + "t", "id": "1"})
    assert event.type == "t" * (MAX_NAME - 1) + "…"
    assert event.raw["eventType"] == longest + "t"


def test_overlong_workflow_id_counts_as_missing() -> None:
    longest = "w" * MAX_ID
    assert event_of({"type": "x", "message": {"workflowId": longest}}).workflow_id == longest
    assert event_of({"type": "x", "message": {"workflowId": longest + "w"}}).workflow_id is None


def test_texts_of_ignored_frame_and_drain_notice_are_cut() -> None:
    longer = "x" * (MAX_NAME + 1)
    cut = "x" * (MAX_NAME - 1) + "…"
    for frame in ({"type": longer}, {"type": "control." + longer}):
        ignored = decode_value(frame)
        assert isinstance(ignored, Ignored)
        assert ignored.type is not None
        assert (len(ignored.type), ignored.type[-1]) == (MAX_NAME, "…")
    drained = decode_value({"type": "control.draining", "connectionId": longer, "deadlineAt": longer})
    assert drained == Draining(deadline=cut)


def test_overlong_timestamp_counts_as_missing() -> None:
    digits = "2025-01-15T10:30:00." + "0" * 40 + "Z"
    assert event_of({"type": "x", "id": "1", "timestamp": digits}).timestamp is not None
    assert event_of({"type": "x", "id": "1", "timestamp": digits.replace("Z", "0" * 1_000_000 + "Z")})._time is None


@pytest.mark.parametrize("digits", [601, 640, 641, 1_000, 4_300, 4_301, 100_000])
@pytest.mark.parametrize("limit", [0, 640, 4_300])
def test_integer_of_any_length_is_read_whatever_python_allows(digits: int, limit: int) -> None:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(limit)
    try:
        event = decode('{"type":"x","id":%s,"_cursor":%s,"timestamp":%s,"message":{}}' % (("9" * digits,) * 3))
        assert isinstance(event, Event)
        assert (event.cursor, event.timestamp) in ((None, None), ("9" * digits, None))
        assert len(event.id) < 100
        assert isinstance(event.raw["id"], int | float)
        assert len(pickle.dumps(event)) < 4 * digits + 3_000
    finally:
        sys.set_int_max_str_digits(before)


@pytest.mark.parametrize(
    "field",
    [
        "type",
        "eventType",
        "id",
        "timestamp",
        "_cursor",
        "message",
        "data",
        "retryAfterMs",
        "connectionId",
        "deadlineAt",
    ],
)
@pytest.mark.parametrize("named", ['"eventType":"x","id":"1","message":{}', '"type":"control.draining"'])
def test_field_of_a_megabyte_is_neither_built_nor_held(field: str, named: str) -> None:
    for value in ("[" + ",".join(["[]"] * 300_000) + "]", '"' + "a" * 1_000_000 + '"'):
        frame = "{" + named + ',"' + field + '":' + value + "}"
        tracemalloc.start()
        try:
            decoded = decode(frame)
            _, peak = tracemalloc.get_traced_memory()
            # What other threads of the process have allocated meanwhile does not count.
            own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/kadoa_trio/*")])
        finally:
            tracemalloc.stop()
        held = sum(trace.size for trace in own.traces)
        assert 0 < held < 10_000, decoded
        # A string is built once, and once more to be digested. An array of empty arrays would take 20 times its text.
        assert peak < 2.5 * len(frame)
