"""Does the server refuse the resume cursor, is it sick, or is only its replay service down?

Nobody has documented what a refused cursor looks like. Several connections in
a row that subscribed with it and were closed before any event look like all
three. Dropping the cursor would lose events in two of the cases, and clinging
to it would make the client deaf in the first. So the supervisor opens a
*probe* connection without the cursor, whose events are held, and beside it
others with the cursor. This module counts and holds; it opens nothing.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import attrs
import trio

from .._events import Event
from ._ledger import Moment

CLOSES_BEFORE_CHECK: Final = 3
"""Consecutive closes before any event after which the cursor is checked."""
REFUSALS_BEFORE_DROP: Final = 5
"""Minimum of connections with the cursor that were closed beside a healthy probe before the cursor is dropped."""
CHECK_TIME: Final = 120.0
"""Minimum time from the first of these refusals to the last, in seconds: a replay service may restart."""
MAX_PAUSE: Final = 60.0
"""Maximum pause between two refusals that count together, in seconds: what the server did meanwhile is not known.

Waits between attempts are at most 30 s.
"""
LONG_REFUSALS, LONG_TIME = 10, 600.0
"""So many refusals over so many seconds drop the cursor whatever was between them: a client must not stay deaf."""
HOLD_TIME: Final = 60.0
"""Maximum time that events of a probe are held, in seconds; then they are handed out, and the cursor is kept."""


@attrs.define(eq=False)
class CursorCheck:
    """Counts what speaks against the cursor. No I/O and no clock."""

    closes: int = 0
    """Consecutive connections with the cursor that were closed before any event and before they were stable."""
    running: bool = False
    """Whether a check has begun and not ended."""
    refusals: int = 0
    """Connections with the cursor that were closed before any event while a probe was healthy, one soon after the other."""
    _first: float = 0.0
    _last: float = 0.0
    _all: int = 0
    _begun: float = 0.0

    def closed(self) -> None:
        """Record a close that looks like a refusal."""
        self.closes += 1

    @property
    def due(self) -> bool:
        """Whether the cursor must be checked."""
        return self.closes >= CLOSES_BEFORE_CHECK

    def begin(self) -> bool:
        """Begin, or resume, the check; return whether it is a new one."""
        new, self.running = not self.running, True
        return new

    def refused(self, now: float) -> bool:
        """Record a refusal beside a healthy probe; return whether the cursor is to be dropped.

        Args:
            now: when, in seconds.
        """
        if not self._all:
            self._begun = now
        if not self.refusals or now - self._last > MAX_PAUSE:
            self.refusals, self._first = 0, now
        self.refusals += 1
        self._all += 1
        self._last = now
        soon = self.refusals >= REFUSALS_BEFORE_DROP and now - self._first >= CHECK_TIME
        return soon or (self._all >= LONG_REFUSALS and now - self._begun >= LONG_TIME)

    def postpone(self) -> None:
        """Interrupt the check until one more connection with the cursor was closed: the probe has ended, too."""
        self.closes = CLOSES_BEFORE_CHECK - 1

    def acquit(self) -> None:
        """End the check: forget what speaks against the cursor."""
        self.closes = self.refusals = self._all = 0
        self.running = False


class Hold:
    """Events of a probe connection, kept back until it is known what the cursor is worth.

    Bounded in number and bytes as the buffer is, and in time by `HOLD_TIME`:
    when it is full, or the time is over, they are handed out and the cursor is kept.
    They outlive the connection that brought them.
    """

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self.events: deque[tuple[int, Event, Moment]] = deque()
        """With the generation of the connection that brought each, and when it did."""
        self._bytes = 0
        self.some = trio.Event()
        """Set by the first event."""
        self.decided = trio.Event()
        """Set when nothing more is to be waited for."""
        self.filled = trio.Event()
        """Set when nothing more fits."""
        self.released = trio.Event()
        """Set when everything was handed out; from then on events pass."""

    def put(self, generation: int, event: Event, arrived: Moment) -> None:
        """Keep an event back."""
        self.events.append((generation, event, arrived))
        self._bytes += event.size
        self.some.set()
        if self.full:
            self.filled.set()

    def take(self) -> None:
        """Remove the oldest event, which was admitted."""
        _, event, _ = self.events.popleft()
        self._bytes -= event.size

    @property
    def full(self) -> bool:
        """Whether nothing more fits."""
        return len(self.events) >= self._max_events or self._bytes >= self._max_bytes
