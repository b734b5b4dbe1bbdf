"""The cursor check: decides whether the server refuses the resume cursor, and holds the events of a probe meanwhile.

Kadoa does not document how a server refuses a cursor. When several connections
in a row subscribe with it and are closed before any event, there are three
explanations: the server refuses the cursor, the server is faulty, or its
replay service is down. To drop the cursor would lose events in the second and
third case. To use it for ever would leave the client without events in the
first. So the supervisor opens a *probe* connection without the cursor, whose
events are held, and connections with the cursor beside it. This module counts
and holds. It opens no connection.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import attrs
import trio

from .._events import Event
from ._ledger import Moment

REFUSAL_TIME: Final = 300.0
"""Maximum life of a connection whose close, before any event, may be a refusal of the cursor, in seconds.

A server may look the cursor up only after it has accepted the subscription and sent heartbeats.
"""
CLOSES_BEFORE_CHECK: Final = 3
"""Consecutive closes before any event after which the cursor is checked."""
REFUSALS_BEFORE_DROP: Final = 5
"""Minimum connections with the cursor, closed beside a healthy probe, before the cursor is dropped."""
CHECK_TIME: Final = 120.0
"""Minimum time from the first of these refusals to the last, in seconds, because a replay service may restart."""
MAX_PAUSE: Final = 60.0
"""Maximum pause between two refusals that count together, in seconds, beside the longest life of such a connection.

The server's state in a pause is not known.

Longer than the maximum wait between two attempts, which is 30 s.
"""
LONG_REFUSALS: Final = 10
"""Minimum refusals before the cursor is dropped whatever the pauses between them: a client must not stay deaf."""
LONG_TIME: Final = 600.0
"""Minimum time from the first of these refusals to the last, in seconds."""
HOLD_TIME: Final = 60.0
"""Maximum time for which the events of a probe are held, in seconds. Then they are admitted; the cursor stays."""


@attrs.define(eq=False)
class CursorCheck:
    """Counts the closes and refusals that speak against the cursor. No I/O and no clock."""

    closes: int = 0
    """Consecutive connections with the cursor that were closed before any event, within `REFUSAL_TIME`."""
    longest: float = 0.0
    """The longest life of such a connection, in seconds."""
    running: bool = False
    """Whether a check has begun and not ended."""
    refusals: int = 0
    """Refusals that count together: connections with the cursor, closed before any event while a probe was healthy."""
    _first: float = 0.0
    """When the first of these came, in seconds."""
    _last: float = 0.0
    """When the newest refusal came, in seconds."""
    _all: int = 0
    """Refusals in all."""
    _begun: float = 0.0
    """When the first of all came, in seconds."""

    def closed(self, life: float) -> None:
        """Record a close that looks like a refusal.

        Args:
            life: how long the connection was live, in seconds.
        """
        self.closes += 1
        self.longest = max(self.longest, life)

    @property
    def patience(self) -> float:
        """How long a connection with the cursor must be live, in seconds, to speak for the cursor without an event."""
        return self.longest * 1.5 + 5

    @property
    def due(self) -> bool:
        """Whether the cursor must be checked."""
        return self.closes >= CLOSES_BEFORE_CHECK

    def begin(self) -> bool:
        """Begin the check, or resume it after `postpone`; return whether it is a new one."""
        new, self.running = not self.running, True
        return new

    def outlived_by(self, probe: float, candidate: float) -> bool:
        """Record the life of a connection with the cursor, and return whether the probe shows that others live longer.

        Args:
            probe: how long the probe has been live, in seconds.
            candidate: how long the connection with the cursor was live, in seconds.
        """
        self.longest = max(self.longest, candidate)
        return probe >= self.patience

    def refused(self, now: float) -> bool:
        """Record a refusal beside a healthy probe; return whether the cursor must be dropped.

        Args:
            now: the time, in seconds.
        """
        if not self._all:
            self._begun = now
        if not self.refusals or now - self._last > MAX_PAUSE + self.longest:
            self.refusals, self._first = 0, now
        self.refusals += 1
        self._all += 1
        self._last = now
        soon = self.refusals >= REFUSALS_BEFORE_DROP and now - self._first >= CHECK_TIME
        return soon or (self._all >= LONG_REFUSALS and now - self._begun >= LONG_TIME)

    def postpone(self) -> None:
        """Interrupt the check, because the probe has ended: it resumes after one more close."""
        self.closes = CLOSES_BEFORE_CHECK - 1

    def reset(self) -> None:
        """End the check, whatever its result, and set all counts to zero."""
        self.closes = self.refusals = self._all = 0
        self.longest = 0.0
        self.running = False


class Hold:
    """Holds the events of a probe connection until the cursor check has ended.

    The limits are those of the buffer, in events and in bytes, and `HOLD_TIME`.
    When one of them is reached, the events are admitted and the cursor stays.
    The events outlive the connection that delivered them.

    Args:
        max_events: maximum events that are held.
        max_bytes: maximum size of their frames, in bytes.
    """

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self.events: deque[tuple[int, Event, Moment]] = deque()
        """Oldest first, each with the generation of its connection and the time at which it came."""
        self._bytes = 0
        self.some = trio.Event()
        """Set when the first event is held."""
        self.decided = trio.Event()
        """Set when the cursor check has ended, so that the events need not be held longer."""
        self.filled = trio.Event()
        """Set when a limit is reached."""
        self.admitted = trio.Event()
        """Set when every held event was admitted. From then on events are not held."""

    def put(self, generation: int, event: Event, arrived: Moment) -> None:
        """Hold an event."""
        self.events.append((generation, event, arrived))
        self._bytes += event.size
        self.some.set()
        if self.full:
            self.filled.set()

    def take(self) -> None:
        """Remove the oldest event, because it was admitted."""
        _, event, _ = self.events.popleft()
        self._bytes -= event.size

    @property
    def full(self) -> bool:
        """Whether a limit is reached."""
        return len(self.events) >= self._max_events or self._bytes >= self._max_bytes
