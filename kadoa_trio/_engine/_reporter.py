"""The one state of the client, from which everything that it reports comes; notices are published here.

Publishing a notice folds it into the `Status`, logs it, and puts it into the
bounded channel of notices; `realtime.state`, `realtime.wait_live()` and
`realtime.statistics()` read the same status. So no two of them can disagree.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

import attrs
import trio

from .._redact import presentable
from ..notices import (
    AdmissionPaused,
    AttemptStarted,
    ConnectionStatus,
    Draining,
    Failed,
    FrameIgnored,
    Live,
    Lost,
    Notice,
    PossibleGap,
    Replaced,
    Stable,
    State,
    Stopped,
    Subscribed,
)
from ._ledger import Moment

MAX_NOTICES = 256
"""How many unread notices are kept; with more, the oldest is dropped, and counted."""

NOTICES_AT_ONCE, NOTICE_INTERVAL = 5, 10.0
"""Notices of a kind that a server or a consumer can repeat at will, such as `FrameIgnored`: so many are published at
once, then one for each interval, in seconds. The others are counted, and the next one carries their number."""
MAX_NOTICE_TEXT = 2_000
"""Maximum length of each text in a notice, in characters: 256 unread notices stay below 4 MB, whatever a server sends."""

_log = logging.getLogger("kadoa_trio.client")


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
            case Live(generation=generation):
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
            # While a replacement is being opened, the older connection still delivers.
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


class RateLimit:
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
        clock: gives the time that durations are measured with, in seconds; Trio's.
        on_notice: called with each notice that is published.
    """

    def __init__(
        self,
        wall_clock: Callable[[], datetime],
        clock: Callable[[], float] = trio.current_time,
        on_notice: Callable[[Notice], object] | None = None,
    ) -> None:
        self.wall_clock = wall_clock
        self._on_notice = on_notice
        self._hook_faults = RateLimit()
        self.censor: Callable[[str], str] = str
        """Takes the secrets of the client out of a text: a server may repeat them in its frames."""
        self.status: Status = Status()
        self.state_since: datetime = wall_clock()
        """Since when the state is what it is, in wall time."""
        self.state_clock: float | None = None
        """The same on the clock that durations are measured with; None before the first notice."""
        self.last_frame_at: datetime | None = None
        """When a connection received a frame last, in wall time."""
        self.dropped: int = 0
        """How many notices nobody read in time."""
        self._clock = clock
        self._limits: dict[str, RateLimit] = {}
        """By `Notice.repeats`, of which there are a few."""
        self._send, self._receive = trio.open_memory_channel[Notice](MAX_NOTICES)
        self.notices: trio.MemoryReceiveChannel[Notice] = self._receive.clone()
        """The user's end."""
        self._changed = trio.Event()

    def publish(self, notice: Notice) -> None:
        """Publish a notice, with its time and with its texts cut and censored, unless there were too many like it.

        The status follows every notice, also those that are not published.
        """
        changes: dict[str, Any] = {"at": self.wall_clock()}
        for field in attrs.fields(type(notice)):
            value = getattr(notice, field.name)
            if isinstance(value, str):
                short = value if len(value) <= MAX_NOTICE_TEXT else value[: MAX_NOTICE_TEXT - 1] + "…"
                changes[field.name] = self.censor(short)
        notice = attrs.evolve(notice, **changes)
        before, self.status = self.status, self.status.after(notice)
        if self.state_clock is None:
            self.state_clock = self._clock()
        if self.status.state is not before.state:
            self.state_since, self.state_clock = notice.at, self._clock()
            self._changed.set()
            self._changed = trio.Event()
        if notice.repeats is not None:
            suppressed = self._limits.setdefault(notice.repeats, RateLimit()).admit(self._clock())
            if suppressed is None:
                return
            if suppressed:
                changes["suppressed"] = suppressed  # a field of every notice that has a limit
                notice = attrs.evolve(notice, **changes)
        if _log.isEnabledFor(notice.level):
            text = str(notice)
            with contextlib.suppress(Exception):  # of a logging filter of the program's: the client goes on
                _log.log(notice.level, "%s", text, extra={"notice": notice})
        try:
            self._send.send_nowait(notice)
        except trio.WouldBlock:
            self._receive.receive_nowait()
            self.dropped += 1
            self._send.send_nowait(notice)
        except trio.ClosedResourceError:
            pass  # the client has been left: nobody can read this notice
        if self._on_notice is not None:
            self._call_hook(self._on_notice, notice)

    def _call_hook(self, hook: Callable[[Notice], object], notice: Notice) -> None:
        try:
            result = hook(notice)
            if inspect.iscoroutine(result):
                result.close()
                raise TypeError("it is an async function, which is never awaited")
        except Exception as exc:
            suppressed = self._hook_faults.admit(self._clock())
            if suppressed is not None:
                with contextlib.suppress(Exception):  # of a logging filter of the program's
                    _log.error(
                        "on_notice has raised %s for a notice %s; the client goes on%s",
                        presentable(f"{type(exc).__name__}: {exc}", 300),
                        type(notice).__name__,
                        f" ({suppressed} more since the last such line)" if suppressed else "",
                    )

    def moment(self) -> Moment:
        """Return the time on both clocks: the wall's, and Trio's."""
        return self.wall_clock(), self._clock()

    async def wait_for(self, states: frozenset[State]) -> State:
        """Wait until the state is one of *states*, and return it."""
        await trio.lowlevel.checkpoint()
        while self.status.state not in states:
            await self._changed.wait()
        return self.status.state

    def close(self) -> None:
        """End the channel of notices: what is in it can still be read."""
        self._send.close()
