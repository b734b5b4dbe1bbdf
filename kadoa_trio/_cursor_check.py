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

from ._events import Event
from ._ledger import Moment

CLOSES_BEFORE_CHECK: Final = 3
"""Consecutive closes before any event after which the cursor is checked."""
REFUSALS_BEFORE_DROP: Final = 5
"""Minimum of connections with the cursor that were closed beside a healthy probe before the cursor is dropped."""
CHECK_TIME: Final = 120.0
"""Minimum time from the beginning of a check until the cursor is dropped, in seconds: a replay service may restart."""
HOLD_TIME: Final = 60.0
"""Maximum time that events of a probe are held, in seconds; then they are handed out, and the cursor is kept."""


@attrs.define(eq=False)
class CursorCheck:
    """Counts what speaks against the cursor. No I/O and no clock."""

    closes: int = 0
    """Consecutive connections with the cursor that were closed before any event and before they were stable."""
    refusals: int = 0
    """Those of them that were closed while a probe was healthy."""
    begun_at: float | None = None
    """When the check began, in seconds; None while none is running."""

    def closed(self) -> None:
        """Record a close that looks like a refusal."""
        self.closes += 1

    @property
    def due(self) -> bool:
        """Whether the cursor must be checked."""
        return self.closes >= CLOSES_BEFORE_CHECK

    def begin(self, now: float) -> bool:
        """Begin, or resume, the check; return whether it is a new one."""
        new = self.begun_at is None
        if self.begun_at is None:
            self.begun_at = now
        return new

    def refused(self, now: float) -> bool:
        """Record a refusal beside a healthy probe; return whether the cursor is to be dropped."""
        assert self.begun_at is not None
        self.refusals += 1
        return self.refusals >= REFUSALS_BEFORE_DROP and now - self.begun_at >= CHECK_TIME

    def postpone(self) -> None:
        """Interrupt the check until one more connection with the cursor was closed: the probe has ended, too."""
        self.closes = CLOSES_BEFORE_CHECK - 1

    def acquit(self) -> None:
        """End the check: forget what speaks against the cursor."""
        self.closes = self.refusals = 0
        self.begun_at = None


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
