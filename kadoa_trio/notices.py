"""What the client reports of itself: the state, and a notice for each change.

They come through `Realtime.notices`, each also as a log record of the logger
``kadoa_trio.client``.
"""

from __future__ import annotations

import enum
import logging
from datetime import datetime

import attrs

from ._position import Gap
from ._redact import presentable

__all__ = [
    "AcknowledgementsResting",
    "AdmissionPaused",
    "AttemptStarted",
    "Connected",
    "ConnectionAged",
    "ConnectionStatus",
    "CursorAccepted",
    "CursorDropped",
    "CursorOnTrial",
    "Draining",
    "EventLoopBlocked",
    "Failed",
    "FirstStart",
    "FrameIgnored",
    "GapRemains",
    "GapRepaired",
    "HeldEventsReleased",
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
    """Make a name that a server gave safe to show: a cursor, an id, a type."""
    return presentable(text, 80)


def _words(text: str) -> str:
    """Make a reason safe to show: it may hold a server's words, or those of a cursor store."""
    return presentable(text, 300)


class State(enum.Enum):
    """What the newest connection is doing."""

    CONNECTING = "connecting"
    """No connection is live; an attempt is running or its timer is armed."""
    LIVE = "live"
    """The newest connection has delivered a frame and is watched by its heartbeat."""
    REPLACING = "replacing"
    """The newest connection is draining. It is live, and its heir is on the way."""
    STOPPED = "stopped"
    """Admission has ended; `stop()` was called, or the block was left."""
    FAILED = "failed"
    """A fault that retrying cannot mend ended the client."""


@attrs.frozen(kw_only=True)
class Notice:
    """Something happened to the client. The subclasses say what."""

    at: datetime
    """Wall time, aware."""

    @property
    def level(self) -> int:
        """The level that it is logged at."""
        return logging.INFO

    @property
    def repeats(self) -> str | None:
        """What notices share a rate limit with this one; None for one that needs no limit."""
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
    """The cursor it asked to resume from."""

    @property
    def level(self) -> int:
        return logging.DEBUG

    def __str__(self) -> str:
        how = f"resuming from {_name(self.cursor)}" if self.cursor is not None else "without a cursor"
        return f"connection {self.generation}: subscribed {how}"


@attrs.frozen(kw_only=True)
class Connected(Notice):
    """A connection is confirmed: the server has sent its first frame on it."""

    generation: int
    replaces: tuple[int, ...] = ()
    """Older connections that are still read."""

    def __str__(self) -> str:
        beside = f", beside {', '.join(map(str, self.replaces))}" if self.replaces else ""
        return f"connection {self.generation}: live{beside}"


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
    """The server announced that it will close a connection. Expected in every redeploy."""

    generation: int
    delay: float
    """How long the client waits before it opens the heir, in seconds; 0 for a connection that has one."""
    deadline: str | None
    """The server's ``deadlineAt``, as it stood there. It drives nothing: clocks differ."""
    resume_supported: bool | None

    def __str__(self) -> str:
        return f"connection {self.generation}: draining, heir in {self.delay:.2f} s"


@attrs.frozen(kw_only=True)
class Replaced(Notice):
    """An older connection has ended while a newer one goes on: the end of an overlap."""

    generation: int
    by: int
    how: str

    def __str__(self) -> str:
        return f"connection {self.generation}: ended ({_words(self.how)}); {self.by} goes on"


@attrs.frozen(kw_only=True)
class Lost(Notice):
    """The newest connection has ended. The client opens another one."""

    generation: int
    how: str
    expected: bool = False
    """Whether it was the end that a drain notice had announced."""

    @property
    def level(self) -> int:
        return logging.INFO if self.expected else logging.WARNING

    def __str__(self) -> str:
        return f"connection {self.generation}: lost ({_words(self.how)})"


@attrs.frozen(kw_only=True)
class Retrying(Notice):
    """An attempt failed; the next one is due after a wait."""

    generation: int
    why: str
    delay: float
    """In seconds."""
    failures: int
    """Failures in a row."""

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        return (
            f"connection {self.generation}: attempt failed ({_words(self.why)}); "
            f"next in {self.delay:.2f} s after {self.failures} in a row"
        )


@attrs.frozen(kw_only=True)
class Refused(Notice):
    """The key or a token was refused by a server that had accepted one before.

    The client goes on trying for `Timeouts.auth_grace`: a gateway's hiccup must not
    end a service of weeks.
    """

    generation: int
    why: str
    grace: float
    """How much longer it will try, in seconds."""

    @property
    def level(self) -> int:
        return logging.ERROR

    def __str__(self) -> str:
        return f"connection {self.generation}: {_words(self.why)}; giving up in {self.grace:.0f} s"


@attrs.frozen(kw_only=True)
class PossibleGap(Notice):
    """Continuity could not be proved: events may have been missed."""

    gap: Gap

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        since = "the start" if self.gap.since is None else self.gap.since.isoformat(timespec="milliseconds")
        until = self.gap.until.isoformat(timespec="milliseconds")
        return f"possible gap from {since} to {until}: {self.gap.reason.value}"


@attrs.frozen(kw_only=True)
class FrameIgnored(Notice):
    """A frame was not understood and not delivered; the connection lives on.

    Published at a limited rate for each `kind`: five at once, then one in 10 s.
    ``realtime.statistics().ignored`` counts every frame.
    """

    generation: int
    kind: str
    """``"malformed"``, ``"control"`` or ``"unknown"``."""
    why: str
    type: str | None = None
    """The type that the frame names. Maximum 256 characters."""
    suppressed: int = 0
    """Frames of this kind that were ignored without a notice since the last notice of this kind."""

    @property
    def level(self) -> int:
        # New kinds of frames are announced and harmless; one that cannot be read may have been an event.
        return logging.WARNING if self.kind == "malformed" else logging.DEBUG

    @property
    def repeats(self) -> str:
        """Frames of one kind share a limit."""
        return f"FrameIgnored {self.kind}"

    def __str__(self) -> str:
        named = f" of type {_name(self.type)!r}" if self.type is not None else ""
        return (
            f"connection {self.generation}: ignored a frame{named} ({_name(self.kind)}: {_words(self.why)}); "
            f"the connection goes on{_and_suppressed(self.suppressed, 'frames of this kind were ignored')}"
        )


@attrs.frozen(kw_only=True)
class AdmissionPaused(Notice):
    """Too much is unsettled (`Limits.unsettled`) or unsaved (`Limits.unsaved`): nothing is read until that changes.

    Published once for each pause: a pause is over when the number is down to
    80 % of its limit. Pauses in quick succession are published at a limited
    rate, five at once, then one in 10 s; ``realtime.statistics().pauses``
    counts every one.
    """

    oldest: str | None
    """The id of the event that everything waits for; None if it waits for the cursor store."""
    unsettled: int
    unsaved: int = 0
    suppressed: int = 0
    """Pauses that were not published since the last notice of one."""

    @property
    def level(self) -> int:
        return logging.WARNING

    @property
    def repeats(self) -> str:
        """All pauses share a limit."""
        return "AdmissionPaused"

    def __str__(self) -> str:
        more = _and_suppressed(self.suppressed, "pauses")
        if self.oldest is None:
            return (
                f"admission paused: {self.unsaved} settled events are not saved, because the cursor store fails; "
                f"the client reads on after a save (option Limits.unsaved){more}"
            )
        return (
            f"admission paused: event {_name(self.oldest)!r} is not settled, and the {self.unsettled} events from it on "
            f"are the maximum (option Limits.unsettled); the client reads on when it is settled{more}"
        )


def _and_suppressed(count: int, what: str) -> str:
    return f"; {count} more {what} since the last such record" if count else ""


@attrs.frozen(kw_only=True)
class CursorOnTrial(Notice):
    """The server keeps closing connections that resume: the next one does without the cursor, and holds its events."""

    cursor: str

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        return f"the cursor {_name(self.cursor)} is on trial: several connections that sent it were closed before any event"


@attrs.frozen(kw_only=True)
class CursorAccepted(Notice):
    """A connection with the cursor lives after all: it was the server, not the cursor."""

    cursor: str

    def __str__(self) -> str:
        return f"the cursor {_name(self.cursor)} is accepted after all"


@attrs.frozen(kw_only=True)
class CursorDropped(Notice):
    """The server accepts connections, but not with the cursor: it is given up. A `PossibleGap` says what that means."""

    cursor: str

    @property
    def level(self) -> int:
        return logging.ERROR

    def __str__(self) -> str:
        return f"the cursor {_name(self.cursor)} is refused and was dropped"


@attrs.frozen(kw_only=True)
class HeldEventsReleased(Notice):
    """A cursor check takes long, or many events: those that were held for it are handed out, and the cursor is kept.

    The check continues. Events that only a resumption from the cursor can
    bring may still be delivered later, after newer ones.
    """

    cursor: str | None
    events: int
    """How many events were held."""

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        which = "" if self.cursor is None else f" {_name(self.cursor)}"
        return f"the check of the cursor{which} continues; {self.events} held events are handed out, the cursor is kept"


@attrs.frozen(kw_only=True)
class ConnectionAged(Notice):
    """The newest connection has reached `Timeouts.max_age`. A replacement is opened beside it."""

    generation: int

    def __str__(self) -> str:
        return f"connection {self.generation}: reached Timeouts.max_age; opening a replacement"


@attrs.frozen(kw_only=True)
class EventLoopBlocked(Notice):
    """A task of the program kept the event loop busy for so long that a heartbeat timer fired late.

    The connection is read once more before it is given up. Look for blocking
    calls and long computations in ``async`` functions; `trio.to_thread` is for them.
    """

    generation: int
    seconds: float
    """How late the timer fired."""

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        return (
            f"connection {self.generation}: the event loop was blocked for at least {self.seconds:.1f} s "
            "by a task of this program; reading what has arrived"
        )


@attrs.frozen(kw_only=True)
class Resumed(Notice):
    """A cursor store was opened, and the position of an earlier run taken up."""

    cursor: str | None
    last_life: datetime | None
    """When the server last gave a sign of life to that run."""

    def __str__(self) -> str:
        where = "without a cursor" if self.cursor is None else f"at {_name(self.cursor)}"
        return f"resuming {where}"


@attrs.frozen(kw_only=True)
class FirstStart(Notice):
    """A cursor store was opened, and has no position of an earlier run: events are received from now on."""

    consumer: str

    def __str__(self) -> str:
        return f"no saved position of consumer {_name(self.consumer)!r}: receiving events from now on"


@attrs.frozen(kw_only=True)
class PositionNotSaved(Notice):
    """A save failed. Events go on; what is not saved would be delivered again after a crash."""

    why: str
    delay: float
    """When it is tried again, in seconds."""
    unsaved: int
    """Settled events that no save covers."""

    @property
    def level(self) -> int:
        return logging.ERROR

    def __str__(self) -> str:
        return f"the position cannot be saved ({_words(self.why)}); {self.unsaved} events unsaved; next try in {self.delay:.2f} s"


@attrs.frozen(kw_only=True)
class PositionSaved(Notice):
    """A save has succeeded after others had failed."""

    failures: int
    """How many had."""

    def __str__(self) -> str:
        return f"the position is saved again, after {self.failures} failures"


@attrs.frozen(kw_only=True)
class AcknowledgementsResting(Notice):
    """The endpoint for acknowledgements keeps refusing them and is left alone for a while. Events are not affected.

    Told once; not again before an acknowledgement has succeeded.
    """

    why: str

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        return f"acknowledgements are refused ({_words(self.why)}) and rest; events are not affected"


@attrs.frozen(kw_only=True)
class GapRepaired(Notice):
    """A possible gap was filled from the notification log."""

    gap: Gap
    events: int
    """How many events were taken from the log for it, in all tries. The log has shown all of the gap."""

    def __str__(self) -> str:
        return (
            f"gap up to {self.gap.until.isoformat(timespec='milliseconds')} repaired: {self.events} events were missing"
        )


@attrs.frozen(kw_only=True)
class GapRemains(Notice):
    """A possible gap could not be filled from the notification log."""

    gap: Gap
    why: str
    final: bool
    """Whether it is given up; else it stays in the position, and a later try or another run tries again."""

    @property
    def level(self) -> int:
        return logging.WARNING

    def __str__(self) -> str:
        until = self.gap.until.isoformat(timespec="milliseconds")
        return f"gap up to {until} not repaired{'' if self.final else ' yet'}: {_words(self.why)}"


@attrs.frozen(kw_only=True)
class Stopped(Notice):
    """Admission has ended; what is buffered can still be received."""

    def __str__(self) -> str:
        return "stopped"


@attrs.frozen(kw_only=True)
class Failed(Notice):
    """A fault that retrying cannot mend. The same fault is raised by ``receive``."""

    fault: str

    @property
    def level(self) -> int:
        return logging.ERROR

    def __str__(self) -> str:
        return f"failed: {_words(self.fault)}"


@attrs.frozen(kw_only=True)
class ConnectionStatus:
    """A connection that is open."""

    generation: int
    live: bool = False
    stable: bool = False
    draining: bool = False
