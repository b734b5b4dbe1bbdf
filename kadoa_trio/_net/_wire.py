"""Frames to objects and back. Sans-I/O.

Nothing that a server can send makes `decode` raise. A frame is read in one
pass that parses its envelope and skips its payload, so that a frame of many
megabytes costs a scan and no more.

Kadoa's pages, its SDKs and its webhooks spell events differently: the type
stands in ``eventType`` or in ``type``, the payload in ``message`` or in
``data``, and times are ISO 8601 or milliseconds. All of them are read.

What an object made here keeps of a frame, beside the frame itself, is bounded
(`MAX_ID` and the other limits below), because ids, cursors and notices stay in
memory, and in positions, after their frames are gone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeGuard

import attrs
import msgspec

from .._events import Event, json_kind, parse_json

MAX_ID: Final = 256
"""Maximum length of an event id and of a workflow id, in characters; those that are documented have some tens.

A longer event id is replaced by its digest, a longer workflow id counts as missing.
"""
MAX_CURSOR: Final = 1_024
"""Maximum length of a cursor, in characters. The client does not resume from a longer one."""
MAX_NAME: Final = 256
"""Maximum length of a type and of the texts of a drain notice, in characters. Longer ones are cut."""
_MAX_TIME: Final = 64
# Some 600 digits: Python always writes those down, see sys.set_int_max_str_digits().
_MAX_BITS: Final = 2_000

_CURSOR: Final = re.compile(r"([0-9]{1,40})-([0-9]{1,40})", re.ASCII)


@attrs.frozen
class Heartbeat:
    """The server is alive."""


@attrs.frozen(kw_only=True)
class Draining:
    """The server is about to close this connection, and asks to open another one. Every field may be missing."""

    advice: float | None = None
    """How long to wait before that, in seconds, as told: infinity is possible. None where nothing readable was told."""
    resume_supported: bool | None = None
    """Whether the server promises to resume from a cursor."""
    connection_id: str | None = None
    """The server's name for this connection. Maximum 256 characters."""
    deadline: str | None = None
    """When the server means to close this one, as told, by its own clock. Maximum 256 characters."""


@attrs.frozen(kw_only=True)
class Ignored:
    """A frame that is neither of the others; the connection lives on."""

    kind: Literal["malformed", "control", "unknown"]
    """No JSON object, a control message that is not known, or a frame without a type or a content."""
    why: str
    """The reason in words. It repeats nothing of the frame."""
    type: str | None = None
    """The type that the frame names. Maximum 256 characters."""


Decoded = Heartbeat | Draining | Event | Ignored
"""Everything that `decode` can return."""

_HEARTBEAT: Final = Heartbeat()


class _Payload(msgspec.Struct, gc=False):
    workflow_id: str | None = msgspec.field(default=None, name="workflowId")


class _Envelope(msgspec.Struct, gc=False):
    # A field of another kind fails, and the frame is read by way of _Loose. Arrays and objects are never built here:
    # what is read of a payload is declared, since that is what makes msgspec skip all else.
    type: str | None = None
    event_type: str | None = msgspec.field(default=None, name="eventType")
    id: str | int | float | None = None
    timestamp: str | int | float | None = None
    cursor: str | int | float | None = msgspec.field(default=None, name="_cursor")
    message: _Payload | None = None
    data: _Payload | None = None
    retry_after_ms: int | float | None = msgspec.field(default=None, name="retryAfterMs")
    resume_supported: bool | None = msgspec.field(default=None, name="resumeSupported")
    connection_id: str | None = msgspec.field(default=None, name="connectionId")
    deadline_at: str | None = msgspec.field(default=None, name="deadlineAt")


_NOTHING: Final = msgspec.Raw(b"null")


class _Loose(msgspec.Struct, gc=False):
    # The same fields as JSON text: an odd one must not make the frame unreadable, and is not parsed either.
    type: msgspec.Raw = _NOTHING
    event_type: msgspec.Raw = msgspec.field(default=_NOTHING, name="eventType")
    id: msgspec.Raw = _NOTHING
    timestamp: msgspec.Raw = _NOTHING
    cursor: msgspec.Raw = msgspec.field(default=_NOTHING, name="_cursor")
    message: msgspec.Raw = _NOTHING
    data: msgspec.Raw = _NOTHING
    retry_after_ms: msgspec.Raw = msgspec.field(default=_NOTHING, name="retryAfterMs")
    resume_supported: msgspec.Raw = msgspec.field(default=_NOTHING, name="resumeSupported")
    connection_id: msgspec.Raw = msgspec.field(default=_NOTHING, name="connectionId")
    deadline_at: msgspec.Raw = msgspec.field(default=_NOTHING, name="deadlineAt")


_read_envelope: Final = msgspec.json.Decoder(_Envelope).decode
_read_loosely: Final = msgspec.json.Decoder(_Loose).decode
_read_payload: Final = msgspec.json.Decoder(_Payload).decode


def decode(message: str | bytes) -> Decoded:
    """Read a frame. Never raises, whatever *message* is.

    An `Event` is a frame that names a type and carries an id, a ``message``
    or ``data``, however odd they are. Bytes are taken for UTF-8: a server
    that switches to binary messages is still understood.
    """
    try:
        frame = _compact(message)
    except UnicodeError:
        return Ignored(kind="malformed", why="not valid Unicode")
    try:
        envelope = _read_envelope(frame)
    except msgspec.ValidationError:
        try:
            envelope = _loose_envelope(_read_loosely(frame))
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return _decode_by_python(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _decode_by_python(frame)
    return _interpret(envelope, frame)


def _decode_by_python(frame: str | bytes) -> Decoded:
    """Read what only Python's own parser takes. It builds the whole frame."""
    try:
        envelope = _envelope_of(parse_json(frame))
    except RecursionError:
        return Ignored(kind="malformed", why="nested too deeply")
    except ValueError:
        return Ignored(kind="malformed", why="not JSON")
    except TypeError as exc:
        return Ignored(kind="malformed", why=str(exc))
    return _interpret(envelope, frame)


def _loose_envelope(fields: _Loose) -> _Envelope:
    return _Envelope(
        _scalar(fields.type),
        _scalar(fields.event_type),
        _scalar(fields.id),
        _scalar(fields.timestamp),
        _scalar(fields.cursor),
        _read_loose_payload(fields.message),
        _read_loose_payload(fields.data),
        _scalar(fields.retry_after_ms),
        _scalar(fields.resume_supported),
        _scalar(fields.connection_id),
        _scalar(fields.deadline_at),
    )


def _scalar(field: msgspec.Raw) -> Any:
    """Parse a field; None for an array or an object, which names nothing."""
    return None if bytes(memoryview(field)[:1]) in b"[{" else msgspec.json.decode(field)


def _read_loose_payload(field: msgspec.Raw) -> _Payload | None:
    if field == _NOTHING:
        return None
    try:
        return _read_payload(field)
    except msgspec.MsgspecError:  # an array, or a workflow id that is no string
        return _Payload()


def _compact(message: str | bytes) -> str | bytes:
    """Give the frame as an ASCII string, else as valid UTF-8.

    Parsing a string that is not ASCII would leave a second copy of it, in
    UTF-8, attached to it.
    """
    if isinstance(message, str):
        return message if message.isascii() else message.encode()
    text = message.decode()
    return text if text.isascii() else message


def _envelope_of(frame: object) -> _Envelope:
    if not isinstance(frame, dict):
        raise TypeError(f"expected an object, not {json_kind(frame)}")
    return _Envelope(
        frame.get("type"),
        frame.get("eventType"),
        frame.get("id"),
        frame.get("timestamp") if isinstance(frame.get("timestamp"), (str, int, float)) else None,
        frame.get("_cursor"),
        _payload_of(frame.get("message")),
        _payload_of(frame.get("data")),
        frame.get("retryAfterMs"),
        frame.get("resumeSupported"),
        frame.get("connectionId"),
        frame.get("deadlineAt"),
    )


def _payload_of(payload: object) -> _Payload | None:
    if payload is None:
        return None
    workflow_id = payload.get("workflowId") if isinstance(payload, dict) else None
    return _Payload(workflow_id if isinstance(workflow_id, str) else None)


def _interpret(envelope: _Envelope, frame: str | bytes) -> Decoded:
    event_type, kind = envelope.event_type, envelope.type
    if not (type(event_type) is str and event_type and event_type.isascii()) and not _names(event_type):
        event_type = None
        if _names(kind) and kind != "heartbeat" and not kind.startswith("control."):
            event_type = kind
    if event_type is not None:
        event_id = _identifier(envelope.id)
        message, data = envelope.message, envelope.data
        if event_id is not None or message is not None or data is not None:
            if len(event_type) > MAX_NAME:
                event_type = _cut(event_type)
            workflow_id = None
            if message is not None and _names(message.workflow_id):
                workflow_id = message.workflow_id
            elif data is not None and _names(data.workflow_id):
                workflow_id = data.workflow_id
            if workflow_id is not None and len(workflow_id) > MAX_ID:
                workflow_id = None
            time = envelope.timestamp
            if type(time) is str and len(time) > _MAX_TIME:
                time = None
            place = _identifier(envelope.cursor)
            cursor = place
            if cursor is not None and len(cursor) > MAX_CURSOR:
                cursor = None
            if event_id is not None:
                if len(event_id) <= MAX_ID:
                    return Event(event_id, event_type, time, cursor, "id", frame, workflow_id)
                identity: str | bytes = event_id
            elif cursor is not None:
                return Event(f"cursor:{cursor}", event_type, time, cursor, "cursor", frame, workflow_id)
            else:
                identity = frame if place is None else place
            # Of an id or a cursor that is too long, not of the frame: another frame may repeat it.
            return Event(f"digest:{_digest(identity)}", event_type, time, cursor, "digest", frame, workflow_id)
    # A control message that names itself twice stays one: its ``type`` counts where there is no event.
    name = kind if _names(kind) else event_type
    if name is None:
        return Ignored(kind="unknown", why="it names no type")
    if name == "heartbeat":
        return _HEARTBEAT
    if name == "control.draining":
        return Draining(
            advice=_seconds(envelope.retry_after_ms),
            resume_supported=envelope.resume_supported if isinstance(envelope.resume_supported, bool) else None,
            connection_id=_cut(envelope.connection_id) if _names(envelope.connection_id) else None,
            deadline=_cut(envelope.deadline_at) if _names(envelope.deadline_at) else None,
        )
    if name.startswith("control."):
        return Ignored(kind="control", why="a control message that is not known", type=_cut(name))
    return Ignored(kind="unknown", why="it carries neither an id nor a payload", type=_cut(name))


def event_from_log(row: Mapping[str, object]) -> Event | None:
    """Make an event of a row of the notification log; None if the row does not say which event it is.

    A row's ``payload`` may be the payload or the whole event. It is taken for
    the whole event only if it names the row's event type: payloads have ids
    and types of their own.
    """
    payload = row.get("payload")
    if isinstance(payload, str):
        with contextlib.suppress(ValueError, RecursionError):  # else it is a payload that is a string
            payload = parse_json(payload)
    frame: dict[str, object]
    if isinstance(payload, dict) and _is_whole_event(payload, row.get("eventType")):
        frame = {name: value for name, value in payload.items() if name != "_cursor"}
    else:
        frame = {"eventType": row.get("eventType"), "id": row.get("eventId"), "message": payload}
        if row.get("workflowId") is not None and isinstance(payload, dict) and "workflowId" not in payload:
            frame["message"] = {"workflowId": row.get("workflowId"), **payload}
    frame.setdefault("timestamp", row.get("createdAt"))
    try:
        event = decode(json.dumps(frame))
    except RecursionError:  # nested too deeply
        return None
    if not isinstance(event, Event) or event.id_source != "id":
        return None
    return attrs.evolve(event, from_log=True)


def _is_whole_event(payload: dict[str, object], event_type: object) -> bool:
    if "id" not in payload or not ("message" in payload or "data" in payload):
        return False
    name = payload.get("eventType", payload.get("type"))
    return _names(name) and (event_type is None or name == event_type)


def _names(value: object) -> TypeGuard[str]:
    """Tell whether *value* is a string that can name something: not empty, and possible to write down."""
    if not isinstance(value, str) or not value:
        return False
    return value.isascii() or _encodable(value)


def _encodable(value: str) -> bool:
    # JSON can spell a lone surrogate; no database, file or log takes one.
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _identifier(value: object) -> str | None:
    """Read an id or a cursor: a string, or an integer that somebody forgot to quote."""
    if _names(value):
        return value
    if not isinstance(value, int) or isinstance(value, bool) or value.bit_length() > _MAX_BITS:
        return None
    return str(value)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…"


def _digest(frame: str | bytes) -> str:
    return hashlib.sha256(frame.encode() if isinstance(frame, str) else frame).hexdigest()


def _seconds(milliseconds: object) -> float | None:
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)):
        return None
    try:
        seconds = milliseconds / 1000
    except OverflowError:
        seconds = math.inf if milliseconds > 0 else -math.inf
    # Not a number compares as false.
    return seconds if seconds >= 0 else None


def subscribe(team_id: str, cursor: str | None) -> str:
    """Write the frame that subscribes to the channel of *team_id*, from *cursor* where one is known."""
    frame = {"action": "subscribe", "channel": team_id}
    if cursor is not None:
        frame["lastCursor"] = cursor
    return json.dumps(frame, separators=(",", ":"))


def compare_cursors(a: str, b: str) -> int | None:
    """Compare two cursors.

    Both must have the form ``<integer>-<integer>``; their text says nothing
    about their order (``1742-10`` is after ``1742-9``).

    Returns:
        A number below, equal to or above zero, as *a* is before, at or after
        *b*; None when they cannot be compared.
    """
    left, right = _CURSOR.fullmatch(a), _CURSOR.fullmatch(b)
    if left is None or right is None:
        return None
    first, second = (int(left[1]), int(left[2])), (int(right[1]), int(right[2]))
    return (first > second) - (first < second)
