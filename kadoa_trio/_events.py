"""Events, the classes of their payloads, and the table of event types.

An `Event` holds its frame as received, and parses the frame when
`Event.message` or `Event.raw` is read for the first time. A
``workflow_data_change`` carries the whole snapshot, so frames of many
megabytes are normal; an event that is dropped as repeated or filtered out is
never parsed.

Real payloads differ from the pages that describe them. No payload can make an
event undeliverable: a payload that does not fit its class becomes an
`OtherMessage` that names the reason.

To add an event type: write its class, add the class to `Message` and to
`EVENT_TYPES`, export it from ``kadoa_trio``, and write its builder in
``kadoa_trio.testing._builders``. Tests name the place that was forgotten.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, TypeVar, final, get_args, get_origin

import attrs
import cattrs
import cattrs.gen
import msgspec
from msgspec.structs import force_setattr

IdSource = Literal["id", "cursor", "digest"]
"""What identifies an event: its own id, its cursor, or a digest of its frame, its overlong id or its overlong cursor."""

WORKFLOW_FIELD: Final = "workflowId"
"""The field in which a payload names its workflow, in every event type, those without a class included."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_REASONS: Final = 3
_MAX_REPR: Final = 80
_MAX_DIGITS: Final = 4_300

T = TypeVar("T")


@final
@attrs.frozen
class WorkflowFinished:
    """A run of a workflow has ended.

    The payload of ``workflow_finished``. Kadoa's pages disagree about the
    fields, so all of them are optional.
    """

    id: str | None = None
    """Kadoa's id of the message; `Event.id` is another one."""
    workflow_id: str | None = None
    job_id: str | None = None
    state: str | None = None
    """The final state of the run, such as ``"FINISHED"``."""
    started_at: datetime | None = None


@final
@attrs.frozen
class WorkflowFailed:
    """A workflow has failed.

    The payload of ``workflow_failed``.
    """

    workflow_id: str
    source: str
    """The site that the workflow reads."""
    reason: str
    """Why the workflow failed, as text."""
    action: str
    """The action that Kadoa proposes, as text."""
    workflow_name: str | None = None
    source_url: str | None = None
    url: str | None = None


@final
@attrs.frozen
class WorkflowRecovered:
    """A workflow that had failed works again.

    The payload of ``workflow_recovered``.
    """

    workflow_id: str
    workflow_name: str
    source: str
    """The site that the workflow reads."""
    source_url: str | None = None
    url: str | None = None


@final
@attrs.frozen
class FieldChange:
    """One field of a record that differs."""

    key: str
    value: Any = None
    """The value now; also None where the message names none."""
    previous_value: Any = None
    """The value before; also None where the message names none."""


@final
@attrs.frozen
class Difference:
    """One record that differs from the previous run."""

    type: str
    """``"changed"``, ``"added"`` or ``"removed"``; any other word is accepted."""
    fields: tuple[FieldChange, ...] = ()


@final
@attrs.frozen
class WorkflowDataChange:
    """The data that a workflow finds have changed.

    The payload of ``workflow_data_change``.
    """

    id: str | None = None
    """The id of the change; `Event.id` is another one."""
    workflow_id: str | None = None
    data: tuple[Any, ...] | None = attrs.field(default=None, repr=False)
    """The records, if the message carries them; possibly all records of the workflow, in many megabytes."""
    differences: tuple[Difference, ...] = attrs.field(default=(), repr=False)
    url: str | None = None
    created_at: datetime | None = None
    metadata: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    """``workflowName``, ``tags`` and further fields, as sent. Only Kadoa's older pages describe them."""


@final
@attrs.frozen
class OtherMessage:
    """A payload whose event type has no class, or that does not fit its class."""

    payload: Any = attrs.field(repr=False)
    """The payload as parsed from JSON; None where the frame carries none."""
    untyped_because: str | None = None
    """Why the payload does not fit the class of its event type; None for event types without a class.

    The text names fields and kinds of values, never values, so it is safe to log.
    """


Message = WorkflowFinished | WorkflowFailed | WorkflowRecovered | WorkflowDataChange | OtherMessage
"""Everything that `Event.message` can be."""


@final
@attrs.frozen
class EventType:
    """An event type whose payload has a class."""

    name: str
    """The name on the wire."""
    message: type[Message]
    """The class of the payload. Its attributes are the fields on the wire, in ``snake_case``."""

    @property
    def documentation(self) -> str:
        """What has happened, in one sentence."""
        return (self.message.__doc__ or "").partition("\n")[0]


EVENT_TYPES: Final[Mapping[str, EventType]] = {
    one.name: one
    for one in (
        EventType("workflow_finished", WorkflowFinished),
        EventType("workflow_failed", WorkflowFailed),
        EventType("workflow_recovered", WorkflowRecovered),
        EventType("workflow_data_change", WorkflowDataChange),
    )
}
"""Every event type whose payload has a class. Events of all other types are delivered with an `OtherMessage`."""


@final
class Event(msgspec.Struct, frozen=True, eq=False):
    """Something that happened in Kadoa.

    Events are values: two are equal when they have the same id, type, cursor
    and content, and they can be hashed, copied and pickled. Look inside with
    ``match``::

        match event.message:
            case WorkflowFailed(workflow_id=workflow, reason=reason):
                print(workflow, "failed:", reason)
    """

    id: str
    """Kadoa's id of the event, which stays the same when it is sent again.

    An event without an id is identified by ``cursor:`` and its cursor, else
    by ``digest:`` and the SHA-256 of its frame. An id of more than 256
    characters, or a cursor of more than 1,024 characters that replaces an
    id, is itself replaced by ``digest:`` and the SHA-256 of its text, which
    is the same in every repeat; `raw` has the original. See `id_source`.
    """
    type: str
    """The event type, such as ``"workflow_failed"``; Kadoa may add types at any time.

    Maximum length in characters: 256; a longer type is cut and ends with ``…``.
    Each lone surrogate, which UTF-8 cannot encode, is replaced by U+FFFD;
    `raw` has the original.
    """
    _time: Any
    cursor: str | None
    """The position of the event in the server's stream; None if the server sent none.

    Also None for a cursor of more than 1,024 characters: the client resumes
    from the cursor before it instead.
    """
    id_source: IdSource
    """The origin of `id`."""
    _frame: str | bytes
    # An ASCII string or else UTF-8: one emoji makes a string of 50 MB one of 200 MB.
    workflow_id: str | None = None
    """The workflow that the event is about, if its payload names one in ``workflowId``.

    Maximum length in characters: 256; a longer one counts as missing.
    """
    received_at: datetime | None = None
    """When this client received it, in UTC by the machine's clock; None for one that no client has received."""
    from_log: bool = False
    """Whether the event comes from Kadoa's notification log, to repair a gap. Such an event is late and out of order."""
    # What was parsed on demand; None for what was not yet. No cached_property: it would need a dict for each event.
    _timestamp: datetime | None = None
    _raw: dict[str, Any] | None = None
    _message: Message | None = None

    @property
    def timestamp(self) -> datetime | None:
        """When the event happened, in UTC; None if the frame has no readable time."""
        if self._timestamp is None:
            force_setattr(self, "_timestamp", read_time(self._time))
        return self._timestamp

    @property
    def raw(self) -> dict[str, Any]:
        """The whole frame as parsed JSON, with everything that the server sent, unknown fields included.

        Parsed once and shared with `message`, so copy it before changing it.
        """
        if self._raw is None:
            force_setattr(self, "_raw", self._parse())
            assert self._raw is not None
        return self._raw

    @property
    def message(self) -> Message:
        """The payload, as an object of the class of its event type or as an `OtherMessage`. Parsed once."""
        if self._message is None:
            payload = self.raw.get("message")
            if payload is None:
                # Webhooks, and Kadoa's older pages about the socket, name the payload ``data``.
                payload = self.raw.get("data")
            force_setattr(self, "_message", to_message(self.type, payload))
            assert self._message is not None
        return self._message

    def _parse(self) -> dict[str, Any]:
        try:
            frame = parse_json(self._frame)
        except (ValueError, RecursionError):
            # Only for a frame that is nested nearly too deeply: readable where it was received, it may be
            # unreadable from deeper in the stack.
            frame = None
        if isinstance(frame, dict):
            return frame
        return {"eventType": self.type, **({"id": self.id} if self.id_source == "id" else {})}

    @property
    def size(self) -> int:
        """The size of the frame, in bytes of UTF-8."""
        return len(self._frame)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        # Compare the frame last, because it may be long.
        return (
            self.id == other.id
            and self.type == other.type
            and self.cursor == other.cursor
            and self._frame == other._frame
        )

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what was parsed: copies and pickles stay small.
        fields = (self.id, self.type, self._time, self.cursor, self.id_source, self._frame, self.workflow_id)
        return (Event, (*fields, self.received_at, self.from_log))

    def __repr__(self) -> str:
        kind = self.type if self.type.isprintable() and len(self.type) <= _MAX_REPR else _short(self.type)
        cursor = "" if self.cursor is None else f" cursor={_short(self.cursor)}"
        return f"<Event {kind} id={_short(self.id)}{cursor}>"


def _short(text: str) -> str:
    return repr(text if len(text) <= _MAX_REPR else text[:_MAX_REPR] + "…")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, and its common extensions: ``NaN``, lone surrogates, numbers of any size.

    Raises:
        ValueError: *text* is not JSON, or not UTF-8.
        RecursionError: *text* is nested too deeply.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError):
        # msgspec is three times as fast as json, and stricter. Its errors are no ValueErrors.
        return json.loads(text, parse_int=_parse_int)


def _parse_int(digits: str) -> int | float:
    # int() takes time quadratic in the number of digits. Python's own limit may be switched off, or lower.
    with contextlib.suppress(ValueError):
        if len(digits) <= _MAX_DIGITS:
            return int(digits)
    return float(digits)


def read_time(value: object) -> datetime | None:
    """Read a time as Kadoa writes it: ISO 8601, or milliseconds since the epoch.

    A time without an offset counts as UTC.

    Returns:
        An aware time in UTC; None if *value* is not a time, or is outside of
        the years that `datetime` supports.
    """
    try:
        if isinstance(value, str):
            time = datetime.fromisoformat(value)
            if time.tzinfo is UTC:
                return time
            return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _EPOCH + timedelta(milliseconds=value)
    except (ValueError, OverflowError):
        pass
    return None


def write_time(time: datetime) -> str:
    """Write an aware time as Kadoa does: ISO 8601, in UTC, with milliseconds."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_message(event_type: str, payload: Any) -> Message:
    """Make the message of an event from its parsed payload. Never raises."""
    known = EVENT_TYPES.get(event_type)
    if known is None:
        return OtherMessage(payload)
    if payload is None:
        return OtherMessage(None, "message: missing or unreadable")
    try:
        return structure(payload, known.message, "message")
    except ValueError as exc:
        return OtherMessage(payload, str(exc))


def structure(value: Any, kind: type[T], name: str) -> T:
    """Make an object of an attrs class from parsed JSON, whose names are camelCase.

    Raises:
        ValueError: *value* does not fit *kind*. The text names the first
            three fields that do not fit, as paths that begin with *name*, and
            the kinds of their values, never a value.
    """
    try:
        return _converter().structure(value, kind)
    except Exception as exc:  # cattrs raises what its hooks raise, in groups of its own
        reasons = cattrs.transform_error(exc, name, _say)
    more = "; and more" if len(reasons) > _MAX_REASONS else ""
    raise ValueError("; ".join(map(_wire_path, reasons[:_MAX_REASONS])) + more)


class _Mistyped(TypeError):
    def __init__(self, expected: str, value: object) -> None:
        super().__init__(f"expected {expected}, not {json_kind(value)}")


def json_kind(value: object) -> str:
    """Name the kind of a parsed JSON value, with its article."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _say(exc: BaseException, _kind: type | None) -> str:
    return "missing" if isinstance(exc, KeyError) else str(exc)


def _wire_path(reason: str) -> str:
    # cattrs names the attributes of our classes; the text names the fields of the JSON, because users look there.
    what, _, path = reason.rpartition(" @ ")
    return f"{camel_case(path)}: {what}"


def camel_case(name: str) -> str:
    """Convert ``workflow_id`` to Kadoa's spelling, ``workflowId``."""
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


def _structure_str(value: Any, _kind: object) -> str:
    # cattrs would call str(). A 5 that becomes "5" would hide that the payload differs from its documentation.
    if not isinstance(value, str):
        raise _Mistyped("a string", value)
    return value


def _structure_time(value: Any, _kind: object) -> datetime:
    time = read_time(value)
    if time is None:
        raise _Mistyped("a time", value)
    return time


def _structure_mapping(value: Any, _kind: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Mistyped("an object", value)
    return value


def _object_hook(kind: type[T]) -> Callable[[Any, Any], T]:
    """Make the hook for a class of this package, whose attributes are camelCase in JSON."""
    names = {field.name: cattrs.gen.override(rename=camel_case(field.name)) for field in attrs.fields(kind)}  # type: ignore[arg-type]  # T is a class of this module
    structure = cattrs.gen.make_dict_structure_fn(kind, _converter(), **names)  # type: ignore[arg-type]  # no option of it

    def hook(value: Any, _kind: Any) -> T:
        if not isinstance(value, dict):
            raise _Mistyped("an object", value)
        return structure(value, kind)

    return hook


def _array_hook(kind: Any) -> Callable[[Any, Any], tuple[Any, ...]]:
    # cattrs accepts any iterable (the characters of a string, the keys of an object), and continues after any number
    # of errors: 100,000 bad items, each an exception with its notes, took 16 s and 650 MB.
    item_kind = get_args(kind)[0]
    structure: Any = None if item_kind is Any else _converter().get_structure_hook(item_kind)

    def hook(value: Any, _kind: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _Mistyped("an array", value)
        if structure is None:
            return tuple(value)
        done: list[Any] = []
        errors: list[Exception] = []
        for index, item in enumerate(value):
            try:
                done.append(structure(item, item_kind))
            except Exception as exc:  # cattrs raises what its hooks raise, in groups of its own
                exc.add_note(cattrs.IterableValidationNote("an item of an array", index, item_kind))
                errors.append(exc)
                if len(errors) > _MAX_REASONS:
                    break
        if errors:
            # ExceptionGroup hides the arguments of cattrs' class from pyright.
            raise cattrs.IterableValidationError("items of an array", errors, kind)  # pyright: ignore[reportCallIssue]
        return tuple(done)

    return hook


def _is_generic(kind: Any, origin: object) -> bool:
    return bool(get_origin(kind) == origin)


def _is_attrs(kind: Any) -> bool:
    return isinstance(kind, type) and bool(attrs.has(kind))


def _structure_bool(value: Any, _kind: Any) -> bool:
    if not isinstance(value, bool):
        raise _Mistyped("a boolean", value)
    return value


@functools.cache
def _converter() -> cattrs.Converter:
    # A converter of our own: hooks that a program registers on cattrs' global converter must not apply to events.
    converter = cattrs.Converter(detailed_validation=True)
    converter.register_structure_hook(str, _structure_str)
    converter.register_structure_hook(bool, _structure_bool)
    converter.register_structure_hook(datetime, _structure_time)
    converter.register_structure_hook_func(lambda kind: _is_generic(kind, Mapping), _structure_mapping)
    converter.register_structure_hook_factory(_is_attrs, _object_hook)
    converter.register_structure_hook_factory(lambda kind: _is_generic(kind, tuple), _array_hook)
    return converter
