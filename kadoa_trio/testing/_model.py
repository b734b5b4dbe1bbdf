"""The simulated team's stream of events, and the faults of the server. No I/O."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import attrs

Spelling = Literal["documented", "sdk", "webhook"]
"""The spelling of a frame: that of Kadoa's page, of its SDKs, or of webhooks."""

_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
# Several events share the first number, so that a client that compares cursors as text fails at the tenth event.
_EVENTS_PER_TICK = 12
_MAX_CURSOR = 100


@attrs.frozen
class PublishedEvent:
    """An event of the simulated stream."""

    number: int
    """The position in the stream, from 0."""
    id: str | None
    type: str
    cursor: str | None
    frame: str = attrs.field(repr=False)
    """The frame that is sent."""
    published_at: datetime = attrs.field(repr=False)
    """The wall time at which the event was published, as the notification log shows it."""


@attrs.frozen
class Send:
    """An attempt to send an event to a channel. The notification log has one row for each attempt."""

    channel_type: str
    status: str


@attrs.frozen
class Notified:
    """An event in the notification log."""

    event: PublishedEvent
    sends: tuple[Send, ...]
    at: float
    """Trio's time."""


@attrs.define
class Faults:
    """The faults of the server; every field can be changed at any time. A new object has no fault."""

    token_status: int | None = None
    """Answer token requests with this status."""
    token_headers: dict[str, str] = attrs.field(factory=dict)
    token_body: bytes | None = None
    """Answer token requests with this body."""
    token_failures: int | None = None
    """Number of further token requests that meet `token_status`, `token_body` or `token_hang`; None for all."""
    token_hang: bool = False
    """Never answer token requests."""
    handshake_status: int | None = None
    """Refuse WebSocket handshakes with this status."""
    handshake_headers: dict[str, str] = attrs.field(factory=dict)
    handshake_failures: int | None = None
    """Number of further handshakes that meet `handshake_status` or `handshake_hang`; None for all."""
    handshake_hang: bool = False
    """Never answer handshakes."""
    refuse_connections: bool = False
    """Refuse TCP connections; on loopback they are accepted and immediately reset."""
    accept_then_close: int | None = None
    """Close each connection with this code as soon as it has subscribed."""
    accept_then_reset: bool = False
    """Reset each connection as soon as it has subscribed."""
    refuse_cursors: bool = False
    """Close each connection that subscribes with a cursor, with code 1008."""
    refuse_cursors_after: float = 0.0
    """Send a heartbeat and close such a connection this many seconds later, instead of immediately."""
    ignore_cursors: bool = False
    """Accept cursors and replay nothing."""
    replay_late: float | None = None
    """Send replays this many seconds late, so that live events overtake them; None sends them immediately."""
    replay_extra: int = 0
    """Begin replays this many events earlier than the cursor asks for."""
    without_cursors: bool = False
    """Publish events without a cursor."""
    no_heartbeats: bool = False
    """Send no heartbeats."""
    ack_status: int | None = None
    """Answer acknowledgements with this status."""
    ack_hang: bool = False
    """Never answer acknowledgements."""
    log_status: int | None = None
    """Answer requests for the notification log with this status."""
    log_headers: dict[str, str] = attrs.field(factory=dict)
    log_failures: int | None = None
    """Number of further requests for the log that meet `log_status`; None for all."""
    log_other_ids: bool = False
    """The log names events by other ids than the socket."""
    log_whole_events: bool = False
    """The payloads of the log are whole events."""
    log_lag: float = 0.0
    """The log shows a row this many seconds after its event, on Trio's clock."""
    log_unnamed: bool = False
    """The rows of the log do not name their channel."""
    log_oldest_first: bool = False
    """The log begins with its oldest row instead of its newest."""
    log_without_total: bool = False
    """The log does not state its number of rows."""
    log_shuffles: int = 0
    """Number of further requests for the log that each see its rows in another order, so that pages miss and repeat rows."""
    api_status: int | None = None
    """Answer calls of the notifications API, except for the log, with this status."""
    api_body: bytes | None = None
    """Answer calls of the notifications API, except for the log, with this body."""


@attrs.define(eq=False)
class Stream:
    """The published events, and the part of them that a replay contains."""

    events: list[PublishedEvent] = attrs.field(factory=list)
    notified: list[Notified] = attrs.field(factory=list)
    """The events in the notification log, oldest first."""
    wall_clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    """Returns the aware wall time of the server, for the notification log. Can be replaced."""
    forgotten: int = 0
    """Number of the oldest events that no replay contains."""

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
        event = PublishedEvent(number, event_id, event_type, cursor, json.dumps(frame), self.wall_clock())
        self.events.append(event)
        return event

    def notify(self, event: PublishedEvent, sends: Iterable[Send], at: float) -> None:
        """Record in the log that an event was sent to channels.

        Args:
            event: one of `events`, or one of `elsewhere`.
            sends: the attempts to send; each makes a row.
            at: Trio's time, from which `Faults.log_lag` counts.
        """
        self.notified.append(Notified(event, tuple(sends), at))

    def elsewhere(self, event_type: str, message: Any, *, id: str | None = None) -> PublishedEvent:
        """Make an event for other channels than the socket. It has no position in the stream."""
        event_id = id or f"elsewhere-{len(self.notified)}"
        frame = {"eventType": event_type, "id": event_id, "message": message}
        return PublishedEvent(-1, event_id, event_type, None, json.dumps(frame), self.wall_clock())

    def log(self, faults: Faults, now: float, start: datetime | None, end: datetime | None) -> list[dict[str, Any]]:
        """Return the rows of the notification log between two times that are visible at Trio's time *now*."""
        rows: list[dict[str, Any]] = []
        for place in range(len(self.notified) - 1, -1, -1):
            notified = self.notified[place]
            created = notified.event.published_at
            if notified.at + faults.log_lag > now or (start and created < start) or (end and created > end):
                continue
            for number in range(len(notified.sends) - 1, -1, -1):
                rows.append(_log_row(f"log-{place}-{number}", notified.event, notified.sends[number], faults))
        if faults.log_oldest_first:
            rows.reverse()
        if faults.log_shuffles:
            faults.log_shuffles -= 1
            random.Random(faults.log_shuffles).shuffle(rows)
        return rows

    def after(self, cursor: str, *, extra: int = 0) -> Iterator[PublishedEvent]:
        """Return the events after *cursor*, and *extra* events before them, without the forgotten ones."""
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


def everywhere(number: int, *, heard: bool) -> list[Send]:
    """Return where an event of the stream is sent: to the socket and to other channels, some with failed attempts.

    Args:
        number: of the event; it decides on the other channels.
        heard: whether a connection was subscribed.
    """
    sends = [Send("EMAIL", "SENT")]
    if number % 2:
        sends.append(Send("SLACK", "FAILED"))
    if number % 3 == 0:
        sends += [Send("WEBHOOK", "FAILED"), Send("WEBHOOK", "SENT")]
    if number % 5 == 0:
        sends.append(Send("WEBSOCKET", "FAILED"))
    return [*sends, Send("WEBSOCKET", "SENT" if heard else "FAILED")]


def _log_row(row_id: str, event: PublishedEvent, send: Send, faults: Faults) -> dict[str, Any]:
    frame = json.loads(event.frame)
    payload = frame.get("message", frame.get("data"))
    return {
        "id": row_id,
        "workflowId": payload.get("workflowId") if isinstance(payload, dict) else None,
        "eventType": event.type,
        "eventStatus": send.status,
        "channelConfig": {} if faults.log_unnamed else {"channelType": send.channel_type},
        "payload": frame if faults.log_whole_events and not faults.log_other_ids else payload,
        "eventId": f"other-{event.id}" if faults.log_other_ids else event.id,
        "createdAt": event.published_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }


def _parse(cursor: str) -> tuple[int, int] | None:
    first, dash, second = cursor.partition("-")
    # Python refuses to convert thousands of digits; see sys.set_int_max_str_digits().
    if dash and first.isdecimal() and second.isdecimal() and len(cursor) <= _MAX_CURSOR:
        return int(first), int(second)
    return None
