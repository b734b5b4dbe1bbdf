"""Events and their messages: every documented payload is typed, every other payload is delivered untyped."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import sys
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kadoa_trio._events import (
    EVENT_TYPES,
    Difference,
    Event,
    FieldChange,
    Message,
    OtherMessage,
    WorkflowDataChange,
    WorkflowFailed,
    WorkflowFinished,
    WorkflowRecovered,
    parse_json,
    read_time,
    to_message,
)
from kadoa_trio._net._wire import Ignored, decode

FRAMES = Path(__file__).parent / "frames"
FAILED = {"workflowId": "wf_1", "source": "example.com", "reason": "gone", "action": "look"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def event_of(frame: str | bytes | dict[str, Any]) -> Event:
    event = decode(json.dumps(frame) if isinstance(frame, dict) else frame)
    assert isinstance(event, Event)
    return event


def test_documented_failure_is_typed() -> None:
    event = event_of((FRAMES / "workflow_failed.json").read_text())
    assert event.message == WorkflowFailed(
        workflow_id="wf_123",
        source="monitored-page.com",
        reason="Page layout changed",
        action="Review the workflow",
        workflow_name="Prices",
        source_url="https://monitored-page.com",
        url="https://www.kadoa.com/workflow/wf_123",
    )
    match event.message:
        case WorkflowFailed(reason=reason):
            assert reason == "Page layout changed"
        case _:
            pytest.fail("the pattern does not match the class")


def test_documented_recovery_is_typed() -> None:
    event = event_of((FRAMES / "workflow_recovered.json").read_text())
    assert event.message == WorkflowRecovered("wf_123", "Prices", "monitored-page.com")


def test_documented_data_change_is_typed_to_the_last_field() -> None:
    event = event_of((FRAMES / "workflow_data_change.json").read_text())
    assert event.message == WorkflowDataChange(
        id="change_123",
        workflow_id="wf_123",
        data=({"id": "record-1", "name": "Product A", "price": 29.99},),
        differences=(
            Difference("changed", (FieldChange("price", 29.99, 24.99),)),
            Difference("added", (FieldChange("id", "record-2"), FieldChange("name", "New Product"))),
        ),
        url="https://monitored-page.com",
        created_at=datetime(2025, 1, 9, 10, tzinfo=UTC),
    )


def test_metadata_and_times_in_milliseconds_are_read() -> None:
    metadata = {"workflowName": "Prices", "tags": ["a"], "more": 1}
    message = to_message("workflow_data_change", {"metadata": metadata, "createdAt": 0})
    assert message == WorkflowDataChange(metadata=metadata, created_at=datetime(1970, 1, 1, tzinfo=UTC))
    assert to_message("workflow_finished", {"startedAt": "2025-01-15T10:31:00.5+02:00"}) == WorkflowFinished(
        started_at=datetime(2025, 1, 15, 8, 31, 0, 500_000, tzinfo=UTC)
    )


@pytest.mark.parametrize("name", ["workflow_finished", "sdk_spelling", "webhook_spelling"])
def test_finished_is_typed_in_every_spelling(name: str) -> None:
    message = event_of((FRAMES / f"{name}.json").read_text()).message
    assert isinstance(message, WorkflowFinished)
    assert message.workflow_id == "wf_123"


def test_null_counts_as_missing_in_optional_fields_only() -> None:
    assert to_message("workflow_failed", {**FAILED, "url": None}) == WorkflowFailed(
        "wf_1", "example.com", "gone", "look"
    )
    assert to_message("workflow_failed", {**FAILED, "reason": None}) == OtherMessage(
        {**FAILED, "reason": None}, "message.reason: expected a string, not null"
    )


def test_unknown_fields_are_ignored_by_the_class_and_stay_in_raw() -> None:
    event = event_of({"eventType": "workflow_failed", "id": "1", "message": {**FAILED, "new": [1]}, "also": {"x": 2}})
    assert isinstance(event.message, WorkflowFailed)
    assert event.raw["message"]["new"] == [1]
    assert event.raw["also"] == {"x": 2}


@pytest.mark.parametrize(
    ("event_type", "payload", "reason"),
    [
        ("workflow_failed", 5, "message: expected an object, not a number"),
        ("workflow_failed", [], "message: expected an object, not an array"),
        ("workflow_failed", None, "message: missing or unreadable"),
        ("workflow_failed", {**FAILED, "workflowId": 5}, "message.workflowId: expected a string, not a number"),
        ("workflow_failed", {**FAILED, "sourceUrl": True}, "message.sourceUrl: expected a string, not a boolean"),
        ("workflow_recovered", {"workflowId": "a", "source": "b"}, "message.workflowName: missing"),
        ("workflow_finished", {"startedAt": "soon"}, "message.startedAt: expected a time, not a string"),
        ("workflow_data_change", {"data": "abc"}, "message.data: expected an array, not a string"),
        ("workflow_data_change", {"data": {"a": 1}}, "message.data: expected an array, not an object"),
        ("workflow_data_change", {"metadata": [1]}, "message.metadata: expected an object, not an array"),
        ("workflow_data_change", {"differences": "x"}, "message.differences: expected an array, not a string"),
        (
            "workflow_data_change",
            {"differences": [{"type": "added", "fields": [{"key": "a"}, {"value": 1}]}]},
            "message.differences[0].fields[1].key: missing",
        ),
        (
            "workflow_data_change",
            {"differences": [{"type": "added"}, 7]},
            "message.differences[1]: expected an object, not a number",
        ),
    ],
)
def test_odd_payload_is_delivered_with_the_reason(event_type: str, payload: object, reason: str) -> None:
    assert to_message(event_type, payload) == OtherMessage(payload, reason)


def test_many_reasons_are_cut_short() -> None:
    message = to_message("workflow_failed", {})
    assert isinstance(message, OtherMessage)
    assert message.untyped_because is not None
    assert message.untyped_because.endswith("; and more")


def test_reason_and_repr_never_show_values() -> None:
    event = event_of({"eventType": "workflow_failed", "id": "1", "message": {"workflowId": ["hush"], "reason": "hush"}})
    assert "hush" not in f"{event!r} {event} {event.message!r}"


def test_event_of_an_unknown_type_has_no_reason() -> None:
    event = event_of({"eventType": "credits_low", "id": "1", "message": {"left": 3}})
    assert event.message == OtherMessage({"left": 3}, None)


@given(st.sampled_from(list(EVENT_TYPES)), json_values)
def test_payload_of_any_kind_makes_a_message(event_type: str, payload: object) -> None:
    message = to_message(event_type, payload)
    if not isinstance(payload, dict):
        assert isinstance(message, OtherMessage)
    if isinstance(message, OtherMessage):
        assert message.payload is payload
        assert message.untyped_because


@given(
    st.fixed_dictionaries(
        {name: st.text(max_size=5) for name in FAILED},
        optional=dict.fromkeys(("workflowName", "sourceUrl", "url", "other"), json_values),
    )
)
def test_required_strings_and_sound_optionals_make_the_class(payload: dict[str, Any]) -> None:
    sound = all(isinstance(payload.get(name), (str, type(None))) for name in ("workflowName", "sourceUrl", "url"))
    assert isinstance(to_message("workflow_failed", payload), WorkflowFailed) is sound


def test_message_and_raw_are_parsed_once_and_shared() -> None:
    event = event_of((FRAMES / "workflow_data_change.json").read_text())
    assert event.message is event.message
    assert event.raw is event.raw
    assert isinstance(event.message, WorkflowDataChange)
    assert event.message.data is not None
    assert event.message.data[0] is event.raw["message"]["data"][0]


def test_nested_nearly_too_deeply_is_still_an_event() -> None:
    # Readable where it arrived, not from the depth of the stack where it is looked into.
    frame = '{"eventType":"workflow_finished","id":"1","message":{"x":' + "[" * 200 + "]" * 200 + "}}"
    event = event_of(frame)

    def dig(event: Event) -> None:
        try:
            dig(event)
        except RecursionError:
            event.message  # noqa: B018  # may fail because the stack is full, and must not cache a wrong result

    with contextlib.suppress(RecursionError):
        dig(copy.copy(event))
    assert isinstance(event.message, WorkflowFinished)


def test_frame_that_cannot_be_parsed_again_has_type_and_id() -> None:
    # `decode` never makes such an event; it represents a frame that is read deeper in the stack.
    deep = "[" * 100_000 + "]" * 100_000
    event = Event("1", "workflow_finished", None, None, "id", f'{{"message":{deep}}}')
    assert event.raw == {"eventType": "workflow_finished", "id": "1"}
    assert event.message == OtherMessage(None, "message: missing or unreadable")


def test_events_are_values() -> None:
    text = (FRAMES / "workflow_failed.json").read_text()
    event, twin = event_of(text), event_of(text)
    assert event == twin
    assert hash(event) == hash(twin)
    assert len({event, twin}) == 1
    assert event != event_of(text.replace("Page layout", "Layout"))
    assert event != text
    _ = event.message, event.raw
    for other in (
        copy.copy(event),
        copy.deepcopy(event),
        pickle.loads(pickle.dumps(event)),
        msgspec.structs.replace(event),
    ):
        assert other == event
        assert other.message == event.message
        assert other.raw == event.raw
        assert other.timestamp == event.timestamp
    with pytest.raises(AttributeError):
        event.id = "2"  # type: ignore[misc]  # what the test is about


def test_repr_is_short_and_printable() -> None:
    assert (
        repr(event_of({"type": "x_y", "id": "a", "_cursor": "1-0", "message": 1})) == "<Event x_y id='a' cursor='1-0'>"
    )
    assert repr(event_of({"type": "x", "id": "a"})) == "<Event x id='a'>"
    odd = repr(event_of({"type": "x\n\x1b[31m", "id": "i" * 10_000, "_cursor": "\n" * 10_000}))
    assert odd.isprintable()
    assert len(odd) < 400


def test_size_is_the_bytes_of_the_frame() -> None:
    assert event_of('{"type":"x","id":"ab"}').size == 22
    assert event_of('{"type":"x","id":"é😀"}').size == 26


def test_long_text_with_an_emoji_is_held_once_as_utf_8() -> None:
    event = event_of('{"type":"x","id":"1","message":"' + "a" * 1_000_000 + '😀"}')
    held = event._frame
    assert isinstance(held, bytes)
    assert held.__sizeof__() < 1_100_000
    assert event.raw["message"].endswith("a😀")


@pytest.mark.parametrize(
    ("value", "time"),
    [
        ("2025-01-15T10:30:00.000Z", datetime(2025, 1, 15, 10, 30, tzinfo=UTC)),
        ("2025-01-15T10:30:00", datetime(2025, 1, 15, 10, 30, tzinfo=UTC)),
        ("2025-01-15T10:30:00-01:30", datetime(2025, 1, 15, 12, 0, tzinfo=UTC)),
        (1736937060123, datetime(2025, 1, 15, 10, 31, 0, 123_000, tzinfo=UTC)),
        (1736937060000.5, datetime(2025, 1, 15, 10, 31, 0, 500, tzinfo=UTC)),
        (-1, datetime(1969, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)),
        *[
            (odd, None)
            for odd in ("", "soon", "0001-01-01T00:00:00+14:00", 1e300, 10**400, float("nan"), True, None, [], {})
        ],
    ],
)
def test_time_is_read_or_none(value: object, time: datetime | None) -> None:
    assert read_time(value) == time
    assert time is None or read_time(value).tzinfo is UTC  # type: ignore[union-attr]  # it equals time


@given(json_values)
def test_time_of_anything_is_aware_or_none(value: object) -> None:
    time = read_time(value)
    assert time is None or time.tzinfo is UTC


def test_json_beyond_the_strict_parser_is_read() -> None:
    digits = "9" * 5_000
    parsed = parse_json(f'{{"a": NaN, "b": 1e999, "c": "\\ud800", "d": {digits}, "e": 123456789012345678901234567890}}')
    assert parsed["a"] != parsed["a"]
    assert parsed["b"] == parsed["d"] == float("inf")
    assert parsed["c"] == "\ud800"
    assert parsed["e"] == 123456789012345678901234567890


# ---- bounds: the cost of reading a payload ---------------------------------------------------------------------------


def calls_of(function: Callable[[], object]) -> int:
    """Count the calls of Python and C functions that *function* makes: a measure of work, independent of the machine."""
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


GOOD = {"type": "changed", "fields": [{"key": "price", "value": 2, "previousValue": 1}]}
BAD: list[tuple[str, object]] = [
    ("differences[0]: expected an object, not a number", 7),
    ("differences[0].type: expected a string, not a number", {"type": 7, "fields": []}),
    ("differences[0].fields[0].key: missing", {"type": "added", "fields": [{}] * 1_000}),
    ("differences[0].fields: expected an array, not an object", {"type": "added", "fields": {}}),
]


@pytest.mark.parametrize(("reason", "bad"), BAD)
def test_reading_stops_after_a_few_bad_differences(reason: str, bad: object) -> None:
    def read(count: int) -> None:
        messages.append(to_message("workflow_data_change", {"differences": [bad] * count}))

    messages: list[Message] = []
    read(1)  # what is made once, at the first use
    few, many = calls_of(lambda: read(10)), calls_of(lambda: read(100_000))
    assert many < 2 * few
    *_, message = messages
    assert isinstance(message, OtherMessage)
    assert message.untyped_because is not None
    assert message.untyped_because.startswith(f"message.{reason}; ")
    assert message.untyped_because.endswith("; and more")
    assert message.untyped_because.count("; ") == 3
    assert len(message.payload["differences"]) == 100_000


def test_bad_differences_take_no_memory_of_their_number() -> None:
    payload = {"differences": [{"type": n, "fields": [{"key": n}] * 2} for n in range(30_000)]}
    to_message("workflow_data_change", payload)
    tracemalloc.start()
    try:
        message = to_message("workflow_data_change", payload)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(message, OtherMessage)
    assert peak < 100_000


def test_bad_difference_behind_many_good_ones_is_found() -> None:
    message = to_message("workflow_data_change", {"differences": [GOOD] * 1_000 + [{"type": "added", "fields": [5]}]})
    assert isinstance(message, OtherMessage)
    assert message.untyped_because == "message.differences[1000].fields[0]: expected an object, not a number"


def test_three_bad_differences_are_all_named() -> None:
    message = to_message("workflow_data_change", {"differences": [1, 2, 3]})
    assert isinstance(message, OtherMessage)
    assert message.untyped_because == "; ".join(
        f"message.differences[{n}]: expected an object, not a number" for n in range(3)
    )


@pytest.mark.parametrize(
    "payload",
    [
        lambda n: {"differences": [GOOD] * n},
        lambda n: {"differences": [{"type": "added", "fields": [{"key": "a"}] * n}]},
        lambda n: {"data": [{"a": 1}] * n},
        lambda n: {str(key): key for key in range(n)},
        lambda n: {"metadata": {str(key): key for key in range(n)}},
    ],
    ids=["differences", "fields", "data", "keys", "metadata"],
)
def test_cost_of_a_large_payload_is_linear(payload: Callable[[int], dict[str, Any]]) -> None:
    small, large = payload(2_000), payload(20_000)
    assert isinstance(to_message("workflow_data_change", large), WorkflowDataChange)
    once = calls_of(lambda: to_message("workflow_data_change", small))
    assert calls_of(lambda: to_message("workflow_data_change", large)) <= 11 * once


def test_payload_of_a_million_keys_is_read() -> None:
    event = event_of('{"eventType":"workflow_data_change","id":"1","message":{' + _keys(1_000_000) + ',"id":"c"}}')
    assert event.message == WorkflowDataChange(id="c")


def _keys(count: int) -> str:
    return ",".join(f'"{n}":0' for n in range(count))


@pytest.mark.parametrize("depth", [100, 400, 900, 10_000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("field", ["data", "differences", "metadata", "other"])
def test_deep_nesting_costs_at_most_the_message(field: str, opening: str, closing: str, depth: int) -> None:
    nested = opening * depth + "0" + closing * depth
    decoded = decode(f'{{"eventType":"workflow_data_change","id":"1","message":{{"id":"c","{field}":{nested}}}}}')
    if depth < 1_000:
        assert isinstance(decoded, Event)
        assert isinstance(decoded.message, WorkflowDataChange | OtherMessage)
    elif isinstance(decoded, Event):
        assert decoded.message is not None
    else:
        assert decoded == Ignored(kind="malformed", why="nested too deeply")
