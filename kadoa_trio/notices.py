"""What the client reports about itself: its state, and a notice for each change.

`Realtime.notices` delivers the notices. Each notice is also a record of the
logger ``kadoa_trio.client``, with the same text; its attribute ``notice`` is
the notice.
"""

from __future__ import annotations

import enum
import logging
from datetime import UTC, datetime

import attrs

from ._position import Gap
from ._redact import presentable

__all__ = [
    "AcknowledgementsPaused",
    "AdmissionPaused",
    "AttemptStarted",
    "ConnectionAged",
    "ConnectionStatus",
    "CursorAccepted",
    "CursorCheckStarted",
    "CursorDropped",
    "Draining",
    "EventLoopBlocked",
    "Failed",
    "FirstStart",
    "FrameIgnored",
    "GapRemains",
    "GapRepaired",
    "Health",
    "HeldEventsReleased",
    "Live",
    "Lost",
    "Notice",
    "PositionNotSaved",
    "PositionSaved",
    "PossibleGap",
    "Refused",
    "Replaced",
    "Resumed",
    "Retrying",
    "Stable",
    "State",
    "Stopped",
    "Subscribed",
]


def _name(text: str) -> str:
    """Make a name from a server safe to show: a cursor, an id, a type."""
    return presentable(text, 80)


def _words(text: str) -> str:
    """Make a reason safe to show: the text may come from a server or a cursor store."""
    return presentable(text, 300)


_NOT_PUBLISHED = datetime.min.replace(tzinfo=UTC)


class State(enum.Enum):
    """What the newest connection is doing."""

    CONNECTING = "connecting"
    """No connection is live; an attempt is running or its timer is armed."""
    LIVE = "live"
    """The newest connection has delivered a frame, and its heartbeat has not timed out."""
    REPLACING = "replacing"
    """The newest connection is draining. It still delivers events while its replacement is opened."""
    STOPPED = "stopped"
    """The client admits no further events, because `stop()` was called or the block was left."""
    FAILED = "failed"
    """A fault that a retry cannot repair ended the client."""


@attrs.frozen(kw_only=True)
class Health:
    """How the client and its program are at one moment. Times are in UTC, by the machine's clock."""

    problems: tuple[str, ...]
    """Why the client or the program is not well, one sentence each; empty if both are."""
    state: State
    state_since: datetime
    live: bool
    """Whether a connection delivers events; also while it is being replaced."""
    last_frame_at: datetime | None
    """When a connection received a frame last, heartbeats included; None before the first one."""
    last_event_at: datetime | None
    """When an event was received last, filtered ones included; None before the first one."""
    last_settled_at: datetime | None
    """When the program settled an event last; None before the first one."""
    unsettled: int
    """The span from the oldest unsettled event to the newest one received, in events."""
    oldest_unsettled: str | None
    """The id of the oldest event that is not settled."""
    oldest_unsettled_age: float | None
    """How long ago that event was received, in seconds."""
    unsaved: int
    """Settled events that no save covers yet; 0 without a cursor store."""
    open_gaps: int
    """Possible gaps that are not repaired, maximum 100."""

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        """Give the problems in one line; ``"live"`` if there is none."""
        return "; ".join(self.problems) or self.state.value


@attrs.frozen(kw_only=True)
class Notice:
    """The base class of the notices: something happened to the client."""

    at: datetime = _NOT_PUBLISHED
    """When it happened, in wall time with a time zone. Set when the notice is published."""

    @property
    def level(self) -> int:
        """The logging level of the notice's log record."""
        return logging.INFO

    @property
    def repeats(self) -> str | None:
        """The name of the rate limit that this notice shares with others; None for a notice without a limit."""
        return None

    def __str__(self) -> str:
        return type(self).__name__


@attrs.frozen(kw_only=True)
class AttemptStarted(Notice):
    """An attempt to open a connection began."""

    generation: int

    @property
    def level(self) -> int:
        return logging.DEBUG

    def __str__(self) -> str:
        return f"connection {self.generation}: opening"


@attrs.frozen(kw_only=True)
class Subscribed(Notice):
    """A connection was opened and its subscription sent."""

    generation: int
    cursor: str | None
    """The cursor that the connection asked to resume from; None for a subscription without a cursor."""

    @property
    def level(self) -> int:
        return logging.DEBUG

    def __str__(self) -> str:
        how = f"resuming from {_name(self.cursor)}" if self.cursor is not None else "without a cursor"
        return f"connection {self.generation}: subscribed {how}"


@attrs.frozen(kw_only=True)
class Live(Notice):
    """The server sent the first frame on a connection."""

    generation: int
    replaces: tuple[int, ...] = ()
    """The older connections that the client still reads."""

    def __str__(self) -> str:
        older = ", ".join(map(str, self.replaces))
        several = "s" if len(self.replaces) > 1 else ""
        overlap = f"; older connection{several} {older} still open" if older else ""
        return f"connection {self.generation}: live{overlap}"


@attrs.frozen(kw_only=True)
class Stable(Notice):
    """A connection has been live for `Timeouts.stable_after`."""

    generation: int

    @property
    def level(self) -> int:
        return logging.DEBUG

    def __str__(self) -> str:
        return f"connection {self.generation}: stable"


@attrs.frozen(kw_only=True)
class Draining(Notice):
    """The server announced that it will close a connection. Every redeploy of Kadoa does this."""

    generation: int
    delay: float
    """How long the client waits before it opens the replacement, in seconds; 0 if a newer connection exists."""
    deadline: str | None
    """The server's ``deadlineAt``, made printable. Maximum 256 characters. The client does not act on it, because clocks differ."""
    resume_supported: bool | None
    """The server's ``resumeSupported``; None if the server did not send it."""

    def __str__(self) -> str:
        next_step = f"opening a replacement in {self.delay:.2f} s" if self.delay else "a newer connection exists"
        return f"connection {self.generation}: draining; {next_step}"


@attrs.frozen(kw_only=True)
class Replaced(Notice):
    """An older connection ended, and a newer one continues: the overlap is over."""

    generation: int
    by: int
    """The generation of the connection that continues."""
    how: str
    """How the older connection ended."""

    def __str__(self) -> str:
        return f"connection {self.generation}: replaced by connection {self.by} ({_words(self.how)})"


@attrs.frozen(kw_only=True)
class Lost(Notice):
    """The newest connection has ended. The client opens another one."""

    generation: int
    how: str
    """How the connection ended."""
    expected: bool = False
    """Whether a drain notice had announced this end."""

    @property
    def level(self) -> int:
        return logging.INFO if self.expected else logging.WARNING

    def __str__(self) -> str:
        return f"connection {self.generation}: lost ({_words(self.how)}); opening a replacement"


@attrs.frozen(kw_only=True)
class Retrying(Notice):
    """An attempt to open a connection failed. The client tries again after a wait."""

    generation: int
    why: str
    delay: float
    """How long the client waits before the next attempt, in seconds."""
    failures: int
    """The number of consecutive failures, this one included."""

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        return (
            f"connection {self.generation}: attempt failed ({_words(self.why)}); "
            f"consecutive failures: {self.failures}; next attempt in {self.delay:.2f} s"
        )


@attrs.frozen(kw_only=True)
class Refused(Notice):
    """The server refused the API key or a token, and had accepted one before.

    The client retries for `Timeouts.auth_grace`, because a short fault of a gateway
    must not end a program that has run for weeks.
    """

    generation: int
    why: str
    grace: float
    """How much longer the client retries, in seconds."""

    @property
    def level(self) -> int:
        return logging.ERROR

    def __str__(self) -> str:
        return (
            f"connection {self.generation}: {_words(self.why)}; retrying for {self.grace:.0f} s, then failing "
            "(option Timeouts.auth_grace)"
        )


@attrs.frozen(kw_only=True)
class PossibleGap(Notice):
    """Events may be missing, because the client cannot prove that the stream continued without a loss."""

    gap: Gap

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        since = "the start" if self.gap.since is None else self.gap.since.isoformat(timespec="milliseconds")
        until = self.gap.until.isoformat(timespec="milliseconds")
        return (
            f"possible gap from {since} to {until}: {self.gap.reason.value}; events may be missing (option repair_gaps)"
        )


@attrs.frozen(kw_only=True)
class FrameIgnored(Notice):
    """A frame could not be read and was not delivered; the connection stays open.

    The client publishes this notice at a limited rate for each `kind`: five
    at once, then one in 10 s. ``realtime.statistics().ignored`` counts every
    ignored frame.
    """

    generation: int
    kind: str
    """``"malformed"``, ``"control"`` or ``"unknown"``."""
    why: str
    type: str | None = None
    """The type that the frame names, made printable. Maximum 256 characters."""
    suppressed: int = 0
    """The number of frames of this kind that were ignored without a notice since the last notice of this kind."""

    @property
    def level(self) -> int:
        # Kadoa announces new kinds of frames, and they are harmless; a frame that cannot be read may be a lost event.
        return logging.WARNING if self.kind == "malformed" else logging.DEBUG

    @property
    def repeats(self) -> str:
        """Frames of one kind share a limit."""
        return f"FrameIgnored {self.kind}"

    def __str__(self) -> str:
        named = f" of type {_name(self.type)!r}" if self.type is not None else ""
        return (
            f"connection {self.generation}: ignored a frame{named} ({_name(self.kind)}: {_words(self.why)}); "
            f"the connection stays open{_and_suppressed(self.suppressed, 'frames of this kind were ignored')}"
        )


@attrs.frozen(kw_only=True)
class AdmissionPaused(Notice):
    """The client stopped reading, because `Limits.unsettled` or `Limits.unsaved` was reached.

    Each pause is published once. A pause ends when the number has fallen to
    80 % of its limit. Pauses in quick succession are published at a limited
    rate: five at once, then one in 10 s. ``realtime.statistics().pauses``
    counts every pause.
    """

    oldest: str | None
    """The id of the oldest unsettled event; None if the client waits for the cursor store."""
    unsettled: int
    """The number of events from the oldest unsettled one to the newest."""
    unsaved: int = 0
    """The number of events that no save covers."""
    suppressed: int = 0
    """The number of pauses that were not published since the last such notice."""

    @property
    def level(self) -> int:
        return logging.WARNING

    @property
    def repeats(self) -> str:
        """All pauses share a limit."""
        return "AdmissionPaused"

    def __str__(self) -> str:
        more = _and_suppressed(self.suppressed, "pauses began")
        if self.oldest is None:
            return (
                f"admission paused: {self.unsaved} settled events are not saved, because the cursor store fails; "
                f"reading resumes after a save (option Limits.unsaved){more}"
            )
        return (
            f"admission paused: event {_name(self.oldest)!r} is not settled, and the {self.unsettled} events from it to "
            f"the newest are the maximum; reading resumes when that event is settled (option Limits.unsettled){more}"
        )


def _and_suppressed(count: int, what: str) -> str:
    return f"; {count} more {what} since the last such record" if count else ""


@attrs.frozen(kw_only=True)
class CursorCheckStarted(Notice):
    """The server closed several connections that sent the cursor, so the client checks whether the server accepts it.

    A probe connection subscribes without the cursor, and its events are held.
    """

    cursor: str

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        return (
            f"checking the cursor {_name(self.cursor)}: the server closed several connections that sent it, before any "
            "event; opening a probe connection without it"
        )


@attrs.frozen(kw_only=True)
class CursorAccepted(Notice):
    """The cursor check is over: the server accepts the cursor, so the closes had another cause."""

    cursor: str

    def __str__(self) -> str:
        return f"the server accepts the cursor {_name(self.cursor)}; the cursor check is over"


@attrs.frozen(kw_only=True)
class CursorDropped(Notice):
    """The cursor check is over: the server refuses the cursor, so the client drops it and reports a `PossibleGap`."""

    cursor: str

    @property
    def level(self) -> int:
        return logging.ERROR

    def __str__(self) -> str:
        return f"the server refuses the cursor {_name(self.cursor)}; the cursor was dropped and events may be missing"


@attrs.frozen(kw_only=True)
class HeldEventsReleased(Notice):
    """The events that were held for a cursor check are delivered, because the check takes long or held many events.

    The check continues, and the cursor is not dropped. Events that only a
    replay from the cursor can bring may be delivered later, after newer ones.
    """

    cursor: str | None
    events: int
    """The number of held events."""

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        which = "" if self.cursor is None else f" {_name(self.cursor)}"
        return f"the check of the cursor{which} continues; delivering the {self.events} held events now"


@attrs.frozen(kw_only=True)
class ConnectionAged(Notice):
    """The newest connection reached `Timeouts.max_age`, so the client opens a replacement."""

    generation: int

    def __str__(self) -> str:
        return f"connection {self.generation}: reached Timeouts.max_age; opening a replacement"


@attrs.frozen(kw_only=True)
class EventLoopBlocked(Notice):
    """A task of the program blocked the event loop, so a heartbeat timer fired late.

    The client reads the connection once more before it closes it. Look for
    blocking calls and long computations in ``async`` functions, and run them
    with `trio.to_thread.run_sync`.
    """

    generation: int
    seconds: float
    """How late the timer fired."""

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        return (
            f"connection {self.generation}: a task of this program blocked the event loop for at least "
            f"{self.seconds:.1f} s; reading the frames that have arrived"
        )


@attrs.frozen(kw_only=True)
class Resumed(Notice):
    """The client resumes from the position that an earlier run saved in the cursor store."""

    cursor: str | None
    last_life: datetime | None
    """When the earlier run last received a frame from the server."""

    def __str__(self) -> str:
        where = "without a cursor" if self.cursor is None else f"at {_name(self.cursor)}"
        return f"resuming {where}"


@attrs.frozen(kw_only=True)
class FirstStart(Notice):
    """The cursor store has no position of an earlier run, so the client receives the events from now on."""

    consumer: str

    def __str__(self) -> str:
        return f"no saved position of consumer {_name(self.consumer)!r}: receiving events from now on"


@attrs.frozen(kw_only=True)
class PositionNotSaved(Notice):
    """A save of the position failed. Events still arrive; after a crash the unsaved events are delivered again."""

    why: str
    delay: float
    """How long the client waits before the next save, in seconds."""
    unsaved: int
    """The number of settled events that no save covers."""

    @property
    def level(self) -> int:
        return logging.ERROR

    def __str__(self) -> str:
        return (
            f"the position was not saved ({_words(self.why)}); unsaved events: {self.unsaved}; "
            f"next save in {self.delay:.2f} s"
        )


@attrs.frozen(kw_only=True)
class PositionSaved(Notice):
    """A save of the position succeeded after one or more had failed."""

    failures: int
    """The number of saves that had failed."""

    def __str__(self) -> str:
        return f"the position was saved; failed saves before it: {self.failures}"


@attrs.frozen(kw_only=True)
class AcknowledgementsPaused(Notice):
    """The server refused ten acknowledgements in a row, so the client pauses them for five minutes. Events still arrive.

    Published once, and again only after an acknowledgement has succeeded.
    """

    why: str

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        return (
            f"the server refuses acknowledgements ({_words(self.why)}); pausing them for 5 minutes; "
            "events are not affected (option acknowledge)"
        )


@attrs.frozen(kw_only=True)
class GapRepaired(Notice):
    """A possible gap was filled from the notification log, which showed the whole time of the gap."""

    gap: Gap
    events: int
    """The number of events that the client took from the log for this gap, in all tries."""

    def __str__(self) -> str:
        return (
            f"gap up to {self.gap.until.isoformat(timespec='milliseconds')} repaired from the notification log; "
            f"missing events delivered: {self.events}"
        )


@attrs.frozen(kw_only=True)
class GapRemains(Notice):
    """A possible gap could not be filled from the notification log."""

    gap: Gap
    why: str
    final: bool
    """Whether the client stops trying. If False, the gap stays in the position, and later tries and runs try again."""

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        until = self.gap.until.isoformat(timespec="milliseconds")
        next_step = "not trying again" if self.final else "trying again later"
        return f"gap up to {until} not repaired: {_words(self.why)}; {next_step}"


@attrs.frozen(kw_only=True)
class Stopped(Notice):
    """The client admits no further events. Buffered events can still be received."""

    def __str__(self) -> str:
        return "stopped; buffered events can still be received"


@attrs.frozen(kw_only=True)
class Failed(Notice):
    """A fault that a retry cannot repair ended the client. ``receive`` raises the same fault."""

    fault: str

    @property
    def level(self) -> int:
        return logging.ERROR

    def __str__(self) -> str:
        return f"failed: {_words(self.fault)}"


@attrs.frozen(kw_only=True)
class ConnectionStatus:
    """An open connection, as `RealtimeStatistics.connections` lists it."""

    generation: int
    live: bool = False
    stable: bool = False
    draining: bool = False
