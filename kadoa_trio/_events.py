"""Events, and what they carry.

An `Event` is cheap until somebody looks inside: it holds the frame as it came
and parses it when `Event.message` or `Event.raw` is asked for. A
``workflow_data_change`` carries the whole snapshot, so a frame of many
megabytes is normal, and an event that is dropped as repeated or filtered out
never pays for it.

Real payloads differ from any page that describes them. Nothing inside a
payload can cost an event: what does not fit its documented class is handed
out as `OtherMessage`, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final, Literal, TypeVar, final, get_args, get_origin

import attrs
import cattrs
import cattrs.gen
import msgspec

IdSource = Literal["id", "cursor", "digest"]
"""What identifies an event: its own id, its cursor, or a digest of its frame, its overlong id or its overlong cursor."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_REASONS: Final = 3
_MAX_REPR: Final = 80
_MAX_DIGITS: Final = 4_300

T = TypeVar("T")


@final
@attrs.frozen
class WorkflowFinished:
    """A run of a workflow is over (``workflow_finished``). Pages disagree about the fields, so all are optional."""

    id: str | None = None
    """What Kadoa calls the message."""
    workflow_id: str | None = None
    job_id: str | None = None
    state: str | None = None
    """The state that the run ended in, such as ``"FINISHED"``."""
    started_at: datetime | None = None


@final
@attrs.frozen
class WorkflowFailed:
    """A workflow does not work any more (``workflow_failed``)."""

    workflow_id: str
    source: str
    """The site that the workflow reads."""
    reason: str
    """Why it failed, in words."""
    action: str
    """What Kadoa proposes to do about it, in words."""
    workflow_name: str | None = None
    source_url: str | None = None
    url: str | None = None


@final
@attrs.frozen
class WorkflowRecovered:
    """A workflow that had failed works again (``workflow_recovered``)."""

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
    """The value now; None too where the message names none."""
    previous_value: Any = None
    """The value before; None too where the message names none."""


@final
@attrs.frozen
class Difference:
    """One record that differs from the run before."""

    type: str
    """``"changed"``, ``"added"`` or ``"removed"``; another word is let through."""
    fields: tuple[FieldChange, ...] = ()


@final
@attrs.frozen
class WorkflowDataChange:
    """The data that a workflow finds have changed (``workflow_data_change``)."""

    id: str | None = None
    """The id of the change; `Event.id` is another one."""
    workflow_id: str | None = None
    data: tuple[Any, ...] | None = attrs.field(default=None, repr=False)
    """The records, where they are sent along; possibly all of them, and megabytes."""
    differences: tuple[Difference, ...] = attrs.field(default=(), repr=False)
    url: str | None = None
    created_at: datetime | None = None
    metadata: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    """``workflowName``, ``tags`` and what else came with it, as sent: only older pages describe it."""


@final
@attrs.frozen
class OtherMessage:
    """A payload without a class of its own, or one that does not fit its class."""

    payload: Any = attrs.field(repr=False)
    """The payload as parsed from JSON; None where the frame carries none."""
    untyped_because: str | None = None
    """Why a payload of a documented type has not become its class; None for types that have none.

    It names fields and kinds of values, never values: it is safe to log.
    """


Message = WorkflowFinished | WorkflowFailed | WorkflowRecovered | WorkflowDataChange | OtherMessage
"""Everything that `Event.message` can be."""

_MESSAGE_CLASSES: Final[Mapping[str, type[Message]]] = {
    "workflow_finished": WorkflowFinished,
    "workflow_failed": WorkflowFailed,
    "workflow_recovered": WorkflowRecovered,
    "workflow_data_change": WorkflowDataChange,
}


@final
@attrs.frozen(eq=False, repr=False)
class Event:
    """Something happened in Kadoa.

    Events are values: two are equal when they have the same id, type, cursor
    and content, and they can be hashed, copied and pickled. Look inside with
    ``match``::

        match event.message:
            case WorkflowFailed(workflow_id=workflow, reason=reason):
                print(workflow, "failed:", reason)
    """

    id: str
    """Kadoa's id of the event, which stays the same when it is sent again.

    An event that came without one is identified by ``cursor:`` and its
    cursor, else by ``digest:`` and the SHA-256 of its frame. An id of more
    than 256 characters, or a cursor of more than 1,024 that stands in for an
    id, is replaced by ``digest:`` and the SHA-256 of its text, which is the
    same in every repeat; `raw` has it as it came. See `id_source`.
    """
    type: str
    """The event type, such as ``"workflow_failed"``; new ones may come at any time.

    Maximum 256 characters; a longer one is cut and ends with ``…``.
    """
    _time: object = attrs.field(repr=False)
    cursor: str | None
    """Where the event stands in the server's stream, if the server said so.

    None too for a cursor of more than 1,024 characters: the client does not
    resume from it, and resumes from the cursor before it.
    """
    id_source: IdSource
    """Where `id` was taken from."""
    _frame: str | bytes
    # An ASCII string or else UTF-8: one emoji makes a string of 50 MB one of 200 MB.
    workflow_id: str | None = None
    """The workflow that the event is about, where its payload names one of at most 256 characters."""
    from_log: bool = False
    """Whether it was taken from Kadoa's notification log to repair a gap, and so comes late and out of order."""

    @cached_property
    def timestamp(self) -> datetime | None:
        """When it happened, in UTC; None where the frame says nothing that can be read."""
        return read_time(self._time)

    @cached_property
    def raw(self) -> dict[str, Any]:
        """The whole frame, parsed: everything that the server sent, unknown fields too.

        Parsed once and shared with `message`: copy it before changing it.
        """
        try:
            frame = parse_json(self._frame)
        except (ValueError, RecursionError):
            # Only a frame that is nested nearly too deeply gets here: what could be read once may
            # not be readable from deeper in the stack.
            frame = None
        if isinstance(frame, dict):
            return frame
        return {"eventType": self.type, **({"id": self.id} if self.id_source == "id" else {})}

    @cached_property
    def message(self) -> Message:
        """The payload, as the class of its event type, else as an `OtherMessage`. Parsed once."""
        payload = self.raw.get("message")
        if payload is None:
            # Webhooks, and older pages about the socket, say ``data``.
            payload = self.raw.get("data")
        return to_message(self.type, payload)

    @property
    def size(self) -> int:
        """The size of the frame, in bytes of UTF-8."""
        return len(self._frame)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Event):
            return NotImplemented
        # The frame last: it may be long.
        return (
            self.id == other.id
            and self.type == other.type
            and self.cursor == other.cursor
            and self._frame == other._frame
        )

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        kind = self.type if self.type.isprintable() and len(self.type) <= _MAX_REPR else _short(self.type)
        cursor = "" if self.cursor is None else f" cursor={_short(self.cursor)}"
        return f"<Event {kind} id={_short(self.id)}{cursor}>"


def _short(text: str) -> str:
    return repr(text if len(text) <= _MAX_REPR else text[:_MAX_REPR] + "…")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, and what passes for it: ``NaN``, lone surrogates, numbers beyond every range.

    Raises:
        ValueError: it is no JSON, or not UTF-8.
        RecursionError: it is nested too deeply.
    """
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError):
        # msgspec is three times as fast, and strict. Its errors are not ValueErrors.
        return json.loads(text, parse_int=_parse_int)


def _parse_int(digits: str) -> int | float:
    # The time that int() takes grows with the square of the digits. Python's own limit may be switched off, or lower.
    with contextlib.suppress(ValueError):
        if len(digits) <= _MAX_DIGITS:
            return int(digits)
    return float(digits)


def read_time(value: object) -> datetime | None:
    """Read a time as Kadoa writes it: ISO 8601, or milliseconds since the epoch.

    A time without an offset is taken for UTC.

    Returns:
        An aware time in UTC, or None when *value* is nothing of the kind or
        lies outside of the years that `datetime` knows.
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
    kind = _MESSAGE_CLASSES.get(event_type)
    if kind is None:
        return OtherMessage(payload)
    if payload is None:
        return OtherMessage(None, "message: there is none that can be read")
    try:
        return structure(payload, kind, "message")
    except ValueError as exc:
        return OtherMessage(payload, str(exc))


def structure(value: Any, kind: type[T], name: str) -> T:
    """Make an object of an attrs class from parsed JSON, whose names are camelCase.

    Raises:
        ValueError: it does not fit. The text names the first three places
            that do not, from *name* on, and the kinds of values, never a
            value.
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
    # cattrs names the attributes of our classes; a reader compares the reason with the JSON.
    what, _, path = reason.rpartition(" @ ")
    return f"{_camel(path)}: {what}"


def _camel(name: str) -> str:
    """Spell ``workflow_id`` as Kadoa does: ``workflowId``."""
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


def _structure_str(value: Any, _kind: object) -> str:
    # cattrs would call str(): a 5 that becomes "5" hides that the payload is not what we think it is.
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
    """Make the hook for a class of ours, whose attributes are camelCase in JSON."""
    names = {field.name: cattrs.gen.override(rename=_camel(field.name)) for field in attrs.fields(kind)}  # type: ignore[arg-type]  # T is one of ours
    structure = cattrs.gen.make_dict_structure_fn(kind, _converter(), **names)  # type: ignore[arg-type]  # no option of it

    def hook(value: Any, _kind: Any) -> T:
        if not isinstance(value, dict):
            raise _Mistyped("an object", value)
        return structure(value, kind)

    return hook


def _array_hook(kind: Any) -> Callable[[Any, Any], tuple[Any, ...]]:
    # cattrs takes any iterable (the characters of a string, the keys of an object), and goes on after any number of
    # errors: 100,000 bad items, each an exception with its notes, took 16 s and 650 MB.
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
    # Our own: hooks that a program registers on cattrs' global converter must not reach events.
    converter = cattrs.Converter(detailed_validation=True)
    converter.register_structure_hook(str, _structure_str)
    converter.register_structure_hook(bool, _structure_bool)
    converter.register_structure_hook(datetime, _structure_time)
    converter.register_structure_hook_func(lambda kind: _is_generic(kind, Mapping), _structure_mapping)
    converter.register_structure_hook_factory(_is_attrs, _object_hook)
    converter.register_structure_hook_factory(lambda kind: _is_generic(kind, tuple), _array_hook)
    return converter
