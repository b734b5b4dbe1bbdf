"""The simulated team's stream of events, and what is wrong with the server. No I/O."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import attrs

Spelling = Literal["documented", "sdk", "webhook"]
"""How a frame is spelt: as on Kadoa's page, as its SDKs type it, or as webhooks do."""

_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
# Several events share the first number, so that a client that compares cursors as text goes wrong at the tenth.
_EVENTS_PER_TICK = 12


@attrs.frozen
class PublishedEvent:
    """An event of the simulated stream."""

    number: int
    """Its place in the stream, from 0."""
    id: str | None
    type: str
    cursor: str | None
    frame: str = attrs.field(repr=False)
    """What is sent for it."""
    published_at: datetime = attrs.field(repr=False)
    """The wall time at which it was published, as the notification log tells it."""


@attrs.define
class Faults:
    """What is wrong with the server; everything can be changed at any time. A new object means: nothing."""

    token_status: int | None = None
    """Answer token requests with this status."""
    token_headers: dict[str, str] = attrs.field(factory=dict)
    token_body: bytes | None = None
    """Answer token requests with this body."""
    token_failures: int | None = None
    """So many more token requests meet `token_status`, `token_body` or `token_hang`; None: all."""
    token_hang: bool = False
    """Never answer token requests."""
    handshake_status: int | None = None
    """Refuse WebSocket handshakes with this status."""
    handshake_headers: dict[str, str] = attrs.field(factory=dict)
    handshake_failures: int | None = None
    """So many more handshakes meet `handshake_status` or `handshake_hang`; None: all."""
    handshake_hang: bool = False
    """Never answer handshakes."""
    refuse_connections: bool = False
    """Refuse TCP connections, which on loopback means to reset them at once."""
    accept_then_close: int | None = None
    """Close each connection with this code as soon as it has subscribed."""
    accept_then_reset: bool = False
    """Reset each connection as soon as it has subscribed."""
    refuse_cursors: bool = False
    """Close with 1008 whoever subscribes with a cursor."""
    ignore_cursors: bool = False
    """Take a cursor and replay nothing."""
    replay_late: float | None = None
    """Send a replay so many seconds late, in which live events overtake it."""
    replay_extra: int = 0
    """Begin a replay so many events earlier than asked."""
    without_cursors: bool = False
    """Publish events without a cursor."""
    no_heartbeats: bool = False
    ack_status: int | None = None
    """Answer acknowledgements with this status."""
    ack_hang: bool = False
    """Never answer acknowledgements."""
    log_status: int | None = None
    """Answer requests for the notification log with this status."""
    log_headers: dict[str, str] = attrs.field(factory=dict)
    log_failures: int | None = None
    """So many more requests for the log meet `log_status`; None: all."""
    log_other_ids: bool = False
    """The log names events by ids that the socket does not know."""
    log_whole_events: bool = False
    """The log's payloads are the whole events."""
    api_status: int | None = None
    """Answer calls of the notifications API, the log left out, with this status."""
    api_body: bytes | None = None
    """Answer calls of the notifications API, the log left out, with this body."""


@attrs.define(eq=False)
class Stream:
    """What was published, and what of it a replay brings."""

    events: list[PublishedEvent] = attrs.field(factory=list)
    forgotten: int = 0
    """So many of the oldest events are kept no more."""

    def publish(
        self,
        event_type: str,
        message: Any,
        *,
        id: str | None,
        with_id: bool,
        with_cursor: bool,
        timestamp: datetime | None,
        spelling: Spelling,
    ) -> PublishedEvent:
        number = len(self.events)
        cursor = f"{1742 + number // _EVENTS_PER_TICK}-{number % _EVENTS_PER_TICK}" if with_cursor else None
        when = timestamp or _EPOCH + timedelta(seconds=number)
        event_id = (id or str(uuid.UUID(int=number + 1))) if with_id else None
        frame: dict[str, Any] = {"type" if spelling == "sdk" else "eventType": event_type}
        if event_id is not None:
            frame["id"] = event_id
        if spelling == "sdk":
            frame["timestamp"] = int(when.timestamp() * 1000)
        else:
            frame["timestamp"] = when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if cursor is not None:
            frame["_cursor"] = cursor
        frame["data" if spelling == "webhook" else "message"] = message
        event = PublishedEvent(number, event_id, event_type, cursor, json.dumps(frame), datetime.now(UTC))
        self.events.append(event)
        return event

    def after(self, cursor: str, *, extra: int = 0) -> Iterator[PublishedEvent]:
        """Give what is kept after *cursor*, and *extra* events before that."""
        asked = _parse(cursor)
        if asked is None:
            return
        first = len(self.events)
        for event in reversed(self.events):
            place = None if event.cursor is None else _parse(event.cursor)
            if place is not None and place <= asked:
                break
            first = event.number
        yield from self.events[max(first - extra, self.forgotten) :]

    def forget(self) -> None:
        self.forgotten = len(self.events)


def log_row(event: PublishedEvent, faults: Faults) -> dict[str, Any]:
    """Make the row of the notification log that tells of an event."""
    frame = json.loads(event.frame)
    payload = frame.get("message", frame.get("data"))
    return {
        "id": f"log-{event.number}",
        "workflowId": payload.get("workflowId") if isinstance(payload, dict) else None,
        "eventType": event.type,
        "eventStatus": "SENT",
        "channelConfig": {},
        "payload": frame if faults.log_whole_events and not faults.log_other_ids else payload,
        "eventId": f"other-{event.number}" if faults.log_other_ids else event.id,
        "createdAt": event.published_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }


def _parse(cursor: str) -> tuple[int, int] | None:
    first, dash, second = cursor.partition("-")
    if dash and first.isdecimal() and second.isdecimal():
        return int(first), int(second)
    return None
