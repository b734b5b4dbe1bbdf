"""What the client tells about itself, and the one state that all of it comes from.

Every change is a `Notice`. Publishing one folds it into the `Status`, logs it,
and puts it into the bounded channel of notices; `realtime.state`,
`realtime.wait_live()` and `realtime.statistics()` read the same status. So no
two of them can tell different stories.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
from collections.abc import Callable
from datetime import datetime

import attrs
import trio

from ._ledger import Gap, Moment
from ._redact import presentable

MAX_NOTICES = 256
"""How many unread notices are kept; the oldest is dropped, and counted, to make room."""

NOTICES_AT_ONCE, NOTICE_INTERVAL = 5, 10.0
"""Notices of a kind that a server or a consumer can repeat at will, such as `FrameIgnored`: so many are published at
once, then one for each interval, in seconds. The others are counted, and the next one carries their number."""
MAX_NOTICE_TEXT = 2_000
"""Maximum length of each text in a notice, in characters: 256 unread notices stay below 4 MB, whatever a server sends."""

_log = logging.getLogger("kadoa_trio.client")


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
    """A connection has been live for ``stable_after``."""

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

    The client goes on trying for ``auth_grace``: a gateway's hiccup must not
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
    """Too much is unsettled (``max_unsettled``) or unsaved (``max_unsaved``): nothing is read until that changes.

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
                f"the client reads on after a save (option max_unsaved){more}"
            )
        return (
            f"admission paused: event {_name(self.oldest)!r} is not settled, and the {self.unsettled} events from it on "
            f"are the maximum (option max_unsettled); the client reads on when it is settled{more}"
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
    """The newest connection has reached ``max_connection_age``. A replacement is opened beside it."""

    generation: int

    def __str__(self) -> str:
        return f"connection {self.generation}: reached max_connection_age; opening a replacement"


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


@attrs.frozen(kw_only=True)
class Status:
    """The one state: what all notices so far come to."""

    state: State = State.CONNECTING
    connections: tuple[ConnectionStatus, ...] = ()
    """The connections that are read, oldest first."""
    attempts: int = 0
    opened: int = 0
    drains: int = 0
    lost: int = 0
    replaced: int = 0
    ignored: int = 0
    pauses: int = 0
    gaps: int = 0

    def after(self, notice: Notice) -> Status:
        """Return the status after *notice*."""
        match notice:
            case AttemptStarted():
                status = attrs.evolve(self, attempts=self.attempts + 1)
            case Subscribed(generation=generation):
                connection = ConnectionStatus(generation=generation)
                status = attrs.evolve(self, opened=self.opened + 1, connections=(*self.connections, connection))
            case Connected(generation=generation):
                status = self._with(generation, live=True)
            case Stable(generation=generation):
                status = self._with(generation, stable=True)
            case Draining(generation=generation):
                status = attrs.evolve(self._with(generation, draining=True), drains=self.drains + 1)
            case Replaced(generation=generation):
                status = attrs.evolve(self._without(generation), replaced=self.replaced + 1)
            case Lost(generation=generation):
                status = attrs.evolve(self._without(generation), lost=self.lost + 1)
            case PossibleGap():
                return attrs.evolve(self, gaps=self.gaps + 1)
            case FrameIgnored():
                return attrs.evolve(self, ignored=self.ignored + 1)
            case AdmissionPaused():
                return attrs.evolve(self, pauses=self.pauses + 1)
            case Stopped():
                state = self.state if self.state is State.FAILED else State.STOPPED
                return attrs.evolve(self, state=state, connections=())
            case Failed():
                return attrs.evolve(self, state=State.FAILED, connections=())
            case _:
                return self
        if status.state in (State.STOPPED, State.FAILED):
            return status
        newest = status.connections[-1] if status.connections else None
        if newest is None or not newest.live:
            # While an heir is on its way the older connection is what the program lives on.
            older = any(connection.live for connection in status.connections)
            return attrs.evolve(status, state=State.REPLACING if older else State.CONNECTING)
        return attrs.evolve(status, state=State.REPLACING if newest.draining else State.LIVE)

    def _with(self, generation: int, **changes: bool) -> Status:
        return attrs.evolve(
            self,
            connections=tuple(
                attrs.evolve(connection, **changes) if connection.generation == generation else connection
                for connection in self.connections
            ),
        )

    def _without(self, generation: int) -> Status:
        return attrs.evolve(
            self,
            connections=tuple(connection for connection in self.connections if connection.generation != generation),
        )


class _RateLimit:
    """Lets `NOTICES_AT_ONCE` notices through, then one for each `NOTICE_INTERVAL`; counts the others.

    After a quiet time as many may come at once again.
    """

    def __init__(self) -> None:
        # When the limit is what it was at first: each notice that is let through puts it off by the interval.
        self._fresh_at = -math.inf
        self._suppressed = 0

    def admit(self, now: float) -> int | None:
        """Return how many were suppressed before this one; None if this one is suppressed, too."""
        fresh_at = max(self._fresh_at, now) + NOTICE_INTERVAL
        if fresh_at - now > NOTICES_AT_ONCE * NOTICE_INTERVAL:
            self._suppressed += 1
            return None
        self._fresh_at = fresh_at
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed


class Reporter:
    """Publishes notices: into the status, the log and the channel. Never blocks, never raises.

    What it keeps is bounded: the number of unread notices, the length of
    each text in them, and the rate of those that can be repeated at will.

    Args:
        wall_clock: gives the time of a notice, aware.
        clock: gives the time that rates are measured with, in seconds; Trio's.
    """

    def __init__(self, wall_clock: Callable[[], datetime], clock: Callable[[], float] = trio.current_time) -> None:
        self.wall_clock = wall_clock
        self.censor: Callable[[str], str] = str
        """Takes the secrets of the client out of a text: a server may repeat them in its frames."""
        self.status: Status = Status()
        self.dropped: int = 0
        """How many notices nobody read in time."""
        self._clock = clock
        self._limits: dict[str, _RateLimit] = {}
        """By `Notice.repeats`, of which there are a few."""
        self._send, self._receive = trio.open_memory_channel[Notice](MAX_NOTICES)
        self.notices: trio.MemoryReceiveChannel[Notice] = self._receive.clone()
        """The user's end."""
        self._changed = trio.Event()

    def publish(self, kind: Callable[..., Notice], /, **facts: object) -> None:
        """Make a notice of *kind*, and publish it unless there were too many like it; the status takes in every one."""
        for name, value in facts.items():
            if isinstance(value, str):
                short = value if len(value) <= MAX_NOTICE_TEXT else value[: MAX_NOTICE_TEXT - 1] + "…"
                facts[name] = self.censor(short)
        notice = kind(at=self.wall_clock(), **facts)
        before, self.status = self.status, self.status.after(notice)
        if self.status.state is not before.state:
            self._changed.set()
            self._changed = trio.Event()
        if notice.repeats is not None:
            suppressed = self._limits.setdefault(notice.repeats, _RateLimit()).admit(self._clock())
            if suppressed is None:
                return
            if suppressed:
                notice = kind(at=notice.at, **facts, suppressed=suppressed)
        if _log.isEnabledFor(notice.level):
            text = str(notice)
            with contextlib.suppress(Exception):  # of a logging filter of the program's: the client goes on
                _log.log(notice.level, "%s", text)
        try:
            self._send.send_nowait(notice)
        except trio.WouldBlock:
            self._receive.receive_nowait()
            self.dropped += 1
            self._send.send_nowait(notice)
        except trio.ClosedResourceError:
            pass  # the client has been left: nobody can read this notice

    def moment(self) -> Moment:
        """Return the time on both clocks: the wall's, and Trio's."""
        return self.wall_clock(), trio.current_time()

    async def wait_for(self, states: frozenset[State]) -> State:
        """Wait until the state is one of *states*, and return it."""
        await trio.lowlevel.checkpoint()
        while self.status.state not in states:
            await self._changed.wait()
        return self.status.state

    def close(self) -> None:
        """End the channel of notices: what is in it can still be read."""
        self._send.close()
