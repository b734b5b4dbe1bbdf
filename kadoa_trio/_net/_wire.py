"""Frames to objects and back. Sans-I/O.

Nothing that a server can send makes `decode` raise. A frame is read in one
pass that parses its envelope and skips its payload, so a frame of many
megabytes costs one scan.

Kadoa's pages, its SDKs and its webhooks spell events differently: the type is
in ``eventType`` or in ``type``, the payload in ``message`` or in ``data``, and
times are ISO 8601 or milliseconds. `decode` reads all of these spellings.

The size of an object made here, without the frame that it holds, is bounded
(`MAX_ID` and the other limits below), because ids, cursors and notices stay in
memory, and in positions, after their frames are gone.

To add a control message: write its class, add the class to `Decoded` and an
entry to `CONTROL_MESSAGES`, and add its fields to ``_Envelope``. Tests name
the place that was forgotten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal, TypeGuard

import attrs
import msgspec
from msgspec.structs import force_setattr

from .._events import WORKFLOW_FIELD, Event, json_kind, parse_json
from .._redact import presentable

MAX_ID: Final = 256
"""Maximum length of an event id and of a workflow id, in characters. The documented ones have about 40.

A longer event id is replaced by its digest; a longer workflow id counts as missing.
"""
MAX_CURSOR: Final = 1_024
"""Maximum length of a cursor, in characters. The client does not resume from a longer one."""
MAX_NAME: Final = 256
"""Maximum length of a type and of the texts of a drain notice, in characters. Longer ones are cut."""
_MAX_TIME: Final = 64
# About 600 digits, which Python always converts to text; see sys.set_int_max_str_digits().
_MAX_BITS: Final = 2_000
# JSON can express one in an escape; only Python's own parser accepts it.
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@attrs.frozen
class Heartbeat:
    """The server is alive."""


@attrs.frozen(kw_only=True)
class Draining:
    """The server is about to close this connection, and asks the client to open another one.

    The server may leave out every field.
    """

    advice: float | None = None
    """How long to wait before opening the other connection, in seconds, as sent; may be infinite.

    None if the server sent no readable value.
    """
    resume_supported: bool | None = None
    """Whether the server promises to resume from a cursor."""
    deadline: str | None = None
    """When the server will close this connection, by its clock, as sent but printable. Maximum length in characters: 256."""


@attrs.frozen(kw_only=True)
class Ignored:
    """A frame that is neither an event nor a known control message. The connection stays open."""

    kind: Literal["malformed", "control", "unknown"]
    """Not a JSON object; an unknown control message; or a frame without a type or without content."""
    why: str
    """The reason, as text. It contains nothing of the frame."""
    type: str | None = None
    """The type that the frame names, made printable. Maximum length in characters: 256."""


Decoded = Heartbeat | Draining | Event | Ignored
"""Everything that `decode` can return."""


class _Payload(msgspec.Struct, gc=False):
    workflow_id: str | None = msgspec.field(default=None, name=WORKFLOW_FIELD)


class _Envelope(msgspec.Struct, gc=False):
    # Every field that is read of a frame. A value of another kind makes the decoder fail; such a frame is read through
    # _Loose. Arrays and objects are never built here: msgspec skips everything that is not declared.
    type: str | None = None
    event_type: str | None = msgspec.field(default=None, name="eventType")
    id: str | int | float | None = None
    timestamp: str | int | float | None = None
    cursor: str | int | float | None = msgspec.field(default=None, name="_cursor")
    message: _Payload | None = None
    data: _Payload | None = None
    retry_after_ms: int | float | None = msgspec.field(default=None, name="retryAfterMs")
    resume_supported: bool | None = msgspec.field(default=None, name="resumeSupported")
    deadline_at: str | None = msgspec.field(default=None, name="deadlineAt")


_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID)]


class _UsualPayload(msgspec.Struct, gc=False):
    workflow_id: _Id = msgspec.field(name=WORKFLOW_FIELD)


class _UsualEvent(msgspec.Struct, gc=False):
    # An event as Kadoa documents it: nearly every frame. msgspec checks everything, lone surrogates included, so that
    # nothing is left to interpret. Any other frame makes the decoder fail, and is read as an _Envelope.
    id: _Id
    event_type: _Name = msgspec.field(name="eventType")
    message: _UsualPayload
    timestamp: Annotated[str, msgspec.Meta(max_length=_MAX_TIME)] | None = None
    cursor: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_CURSOR)] | None = msgspec.field(
        default=None, name="_cursor"
    )


_FIELDS: Final = tuple((field.name, field.encode_name) for field in msgspec.structs.fields(_Envelope))
"""Each field of an envelope: its attribute, and its name on the wire."""
_PAYLOADS: Final = frozenset({"message", "data"})
_NOTHING: Final = msgspec.Raw(b"null")

# The same fields as JSON text: an unexpected value must not make the frame unreadable, and is not parsed either.
_Loose: Final[Any] = msgspec.defstruct(
    "_Loose",
    [(name, msgspec.Raw, msgspec.field(default=_NOTHING, name=wire_name)) for name, wire_name in _FIELDS],
    gc=False,
)

_read_usual: Final = msgspec.json.Decoder(_UsualEvent).decode
_read_envelope: Final = msgspec.json.Decoder(_Envelope).decode
_read_loosely: Final = msgspec.json.Decoder(_Loose).decode
_read_payload: Final = msgspec.json.Decoder(_Payload).decode


def decode(message: str | bytes, at: datetime | None = None) -> Decoded:
    """Read a frame that was received at the time *at*. Never raises, whatever *message* is.

    A frame that names a type and carries an id, a ``message`` or ``data``
    becomes an `Event`, whatever the values are. Bytes are read as UTF-8, so
    a server that switches to binary messages is still understood.
    """
    try:
        frame = _compact(message)
    except UnicodeError:
        return Ignored(kind="malformed", why="not valid Unicode")
    try:
        usual = _read_usual(frame)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        other = _decode_any(frame)
        if at is not None and isinstance(other, Event):
            force_setattr(other, "received_at", at)
        return other
    return Event(usual.id, usual.event_type, usual.timestamp, usual.cursor, "id", frame, usual.message.workflow_id, at)


def _decode_any(frame: str | bytes) -> Decoded:
    """Read a frame of any kind."""
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
    """Read a frame that only Python's own parser accepts. That parser builds the whole frame."""
    try:
        envelope = _envelope_of(parse_json(frame))
    except RecursionError:
        return Ignored(kind="malformed", why="nested too deeply")
    except ValueError:
        return Ignored(kind="malformed", why="not JSON")
    except TypeError as exc:
        return Ignored(kind="malformed", why=str(exc))
    return _interpret(envelope, frame)


def _loose_envelope(fields: Any) -> _Envelope:
    values: dict[str, Any] = {
        name: (_read_loose_payload if name in _PAYLOADS else _scalar)(getattr(fields, name)) for name, _ in _FIELDS
    }
    return _Envelope(**values)


def _scalar(field: msgspec.Raw) -> Any:
    """Parse a field; None for an array or an object, which cannot be a name, an id or a number."""
    return None if bytes(memoryview(field)[:1]) in b"[{" else msgspec.json.decode(field)


def _read_loose_payload(field: msgspec.Raw) -> _Payload | None:
    if field == _NOTHING:
        return None
    try:
        return _read_payload(field)
    except msgspec.MsgspecError:  # an array, or a workflow id that is not a string
        return _Payload()


def _compact(message: str | bytes) -> str | bytes:
    """Convert a frame to an ASCII string if possible, else to valid UTF-8.

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
    values: dict[str, Any] = {
        name: (_payload_of if name in _PAYLOADS else _scalar_of)(frame.get(wire_name)) for name, wire_name in _FIELDS
    }
    for name in ("type", "event_type"):
        if isinstance(values[name], str):
            values[name] = _LONE_SURROGATE.sub("\ufffd", values[name])
    return _Envelope(**values)


def _scalar_of(value: object) -> Any:
    return None if isinstance(value, (dict, list)) else value


def _payload_of(payload: object) -> _Payload | None:
    if payload is None:
        return None
    workflow_id = payload.get(WORKFLOW_FIELD) if isinstance(payload, dict) else None
    return _Payload(workflow_id if isinstance(workflow_id, str) else None)


def _interpret(envelope: _Envelope, frame: str | bytes) -> Decoded:
    event_type, kind = envelope.event_type, envelope.type
    if not (type(event_type) is str and event_type and event_type.isascii()) and not _names(event_type):
        event_type = None
        if _names(kind) and kind not in _READERS and not kind.startswith(_CONTROL):
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
            # The digest of an overlong id or cursor, not of the frame: a repeat may come in a different frame.
            return Event(f"digest:{_digest(identity)}", event_type, time, cursor, "digest", frame, workflow_id)
    # A control message may have an ``eventType``, too: its ``type`` counts, because the frame carries no event.
    name = kind if _names(kind) else event_type
    if name is None:
        return Ignored(kind="unknown", why="it names no type")
    read = _READERS.get(name)
    if read is not None:
        return read(envelope)
    if name.startswith(_CONTROL):
        return Ignored(kind="control", why="an unknown control message", type=_shown(name))
    return Ignored(kind="unknown", why="it carries neither an id nor a payload", type=_shown(name))


def event_from_log(row: Mapping[str, object], at: datetime | None = None) -> Event | None:
    """Make an event from a row of the notification log, read at *at*; None if the row does not identify its event.

    A row's ``payload`` is the payload or the whole event. It counts as the
    whole event only if it names the row's event type, because payloads have
    ids and types of their own.
    """
    payload = row.get("payload")
    if isinstance(payload, str):
        with contextlib.suppress(ValueError, RecursionError):  # a payload that is a string
            payload = parse_json(payload)
    frame: dict[str, object]
    if isinstance(payload, dict) and _is_whole_event(payload, row.get("eventType")):
        frame = {name: value for name, value in payload.items() if name != "_cursor"}
    else:
        frame = {"eventType": row.get("eventType"), "id": row.get("eventId"), "message": payload}
        workflow_id = row.get("workflowId")
        if workflow_id is not None and isinstance(payload, dict) and WORKFLOW_FIELD not in payload:
            frame["message"] = {WORKFLOW_FIELD: workflow_id, **payload}
    frame.setdefault("timestamp", row.get("createdAt"))
    try:
        event = decode(json.dumps(frame), at)
    except RecursionError:  # nested too deeply
        return None
    if not isinstance(event, Event) or event.id_source != "id":
        return None
    return msgspec.structs.replace(event, from_log=True)


def _is_whole_event(payload: dict[str, object], event_type: object) -> bool:
    if "id" not in payload or not ("message" in payload or "data" in payload):
        return False
    name = payload.get("eventType", payload.get("type"))
    return isinstance(name, str) and name != "" and (event_type is None or name == event_type)


def _names(value: object) -> TypeGuard[str]:
    """Whether *value* is a string that can be a name: not empty, and possible to encode."""
    if not isinstance(value, str) or not value:
        return False
    return value.isascii() or _encodable(value)


def _encodable(value: str) -> bool:
    # JSON can express a lone surrogate; databases, files and logs cannot store one.
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _identifier(value: object) -> str | None:
    """Read an id or a cursor: a string, or an integer, which counts as its decimal digits."""
    if _names(value):
        return value
    if not isinstance(value, int) or isinstance(value, bool) or value.bit_length() > _MAX_BITS:
        return None
    return str(value)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 1] + "…"


def _shown(text: str) -> str:
    """Make a text for a notice: printable, in one line, cut."""
    return _cut(presentable(text, MAX_NAME + 1)) or "?"


def _digest(frame: str | bytes) -> str:
    return hashlib.sha256(frame.encode() if isinstance(frame, str) else frame).hexdigest()


def _seconds(milliseconds: object) -> float | None:
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)):
        return None
    try:
        seconds = milliseconds / 1000
    except OverflowError:
        seconds = math.inf if milliseconds > 0 else -math.inf
    # NaN compares as false.
    return seconds if seconds >= 0 else None


def subscribe(team_id: str, cursor: str | None) -> str:
    """Make the frame that subscribes to the channel of *team_id*, from *cursor* on if it is not None."""
    frame = {"action": "subscribe", "channel": team_id}
    if cursor is not None:
        frame["lastCursor"] = cursor
    return json.dumps(frame, separators=(",", ":"))


@attrs.frozen
class ControlMessage:
    """A kind of message that controls the connection and carries no event."""

    name: str
    """The name on the wire: in ``type`` from the server, in ``action`` from the client."""
    documentation: str
    """What the sender says with the message."""
    fields: tuple[str, ...]
    """The fields on the wire beside the name that are read or written."""
    read: Callable[[_Envelope], Decoded] | None = None
    """Makes the object that `decode` returns; None for messages that only the client sends."""
    write: Callable[..., str] | None = None
    """Makes the frame; None for messages that only the server sends."""


_HEARTBEAT: Final = Heartbeat()


def _read_heartbeat(_envelope: _Envelope) -> Heartbeat:
    return _HEARTBEAT


def _read_draining(envelope: _Envelope) -> Draining:
    return Draining(
        advice=_seconds(envelope.retry_after_ms),
        resume_supported=envelope.resume_supported if isinstance(envelope.resume_supported, bool) else None,
        deadline=_shown(envelope.deadline_at) if _names(envelope.deadline_at) else None,
    )


CONTROL_MESSAGES: Final = {
    one.name: one
    for one in (
        ControlMessage("heartbeat", "The server is alive.", (), read=_read_heartbeat),
        ControlMessage(
            "control.draining",
            "The server is about to close the connection, and asks the client to open another one.",
            ("retryAfterMs", "resumeSupported", "deadlineAt"),
            read=_read_draining,
        ),
        ControlMessage(
            "subscribe",
            "The client asks for the events of a team, from a cursor on if it has one.",
            ("channel", "lastCursor"),
            write=subscribe,
        ),
    )
}
"""Every control message, by its name on the wire. The server may add further ones, which `decode` ignores."""

_CONTROL: Final = "control."
_READERS: Final = {one.name: one.read for one in CONTROL_MESSAGES.values() if one.read is not None}
