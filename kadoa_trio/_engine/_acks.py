"""Acknowledgements, as Kadoa's SDKs send them: one request for each event, here after it was settled.

What they change on the server is not documented. So they never delay events
or leaving: few at once, at a maximum per second, and dropped when too many
wait.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import trio

from .._errors import AttemptError, InternalError
from .._events import Event
from .._net._api import KadoaApi
from ..notices import AcknowledgementsPaused
from ._reporter import Reporter

MAX_ACKNOWLEDGEMENTS = 10_000
"""Maximum number of acknowledgements that wait; with more, the oldest is dropped, and counted."""
ACKNOWLEDGEMENTS_IN_FLIGHT = 4
"""Maximum number of acknowledgements that are sent at once."""
ACKNOWLEDGEMENTS_PER_SECOND, ACKNOWLEDGEMENTS_BURST = 1_200, 100
"""Maximum per second, and maximum without any delay after fewer were sent: what a backlog may take from the events."""
REFUSALS_BEFORE_REST, ACKNOWLEDGEMENTS_REST = 10, 300.0
"""Failures in a row after which acknowledgements are suspended, and for how long, in seconds; then one is tried."""
QUIET_AFTER: Final = 6.0
"""Without anything to send for this time, in seconds, the workers end: an idle client has none.

Longer than connections are kept without a request, so that they are closed by then.
"""


class Pace:
    """A maximum rate: in any time of *t* seconds, ``rate * t + burst`` are allowed. No I/O and no clock.

    Args:
        rate: maximum per second.
        burst: maximum at once, from 2 on: a wait may end a rounding error before its whole burst is allowed.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst: Final = float(burst)
        self._left = self._burst
        self._counted_at = 0.0

    def take(self, now: float) -> float:
        """Use the pace for one, and return 0; or return how long to wait, in seconds, without using it.

        The wait is for a whole burst, so that a long queue costs one sleep for each burst.
        """
        self._left = min(self._left + (now - self._counted_at) * self._rate, self._burst)
        self._counted_at = now
        if self._left < 1:
            return (self._burst - self._left) / self._rate
        self._left -= 1
        return 0.0


class Acknowledger:
    """Sends acknowledgements in the background.

    Args:
        http: the way to the endpoint.
        reporter: publishes that the endpoint keeps refusing.
    """

    def __init__(self, http: KadoaApi, reporter: Reporter) -> None:
        self._http = http
        self._reporter = reporter
        self._waiting: deque[str] = deque()
        self._idle = trio.lowlevel.ParkingLot()
        """The workers that have nothing to send."""
        self._nursery: trio.Nursery | None = None
        self._runs = False
        """Whether there are workers."""
        self._finished = False
        self._tried = 0
        self._pace = Pace(ACKNOWLEDGEMENTS_PER_SECOND, ACKNOWLEDGEMENTS_BURST)
        self._paused_until = 0.0
        self._failed_in_a_row = 0
        self._trying = False
        """Whether one is tried after a pause; the others wait for its answer."""
        self._reported = False
        self.sent: int = 0
        """Acknowledgements that were accepted."""
        self.failed: int = 0
        """Acknowledgements that were refused or did not arrive. They are not repeated."""
        self.dropped: int = 0
        """Acknowledgements that were never sent."""

    def settled(self, event: Event) -> None:
        """Acknowledge a settled event some time soon."""
        if event.id_source != "id":
            return  # the server does not know this id
        if self._finished:
            self.dropped += 1
            return
        self._waiting.append(event.id)
        if len(self._waiting) > MAX_ACKNOWLEDGEMENTS:
            self._waiting.popleft()
            self.dropped += 1
        if self._runs:
            self._idle.unpark()
        else:
            self._ensure_running()

    @property
    def waiting(self) -> int:
        """How many wait to be sent."""
        return len(self._waiting)

    def start(self, nursery: trio.Nursery) -> None:
        """Send from now on, in tasks of *nursery*, until it is cancelled."""
        self._nursery = nursery
        self._ensure_running()

    def stop_starting(self) -> None:
        """Start no task from now on: the nursery is about to end."""
        self._nursery = None

    def _ensure_running(self) -> None:
        if self._waiting and not self._runs and self._nursery is not None:
            self._runs = True
            self._nursery.start_soon(self._run)

    @trio.lowlevel.enable_ki_protection
    async def _run(self) -> None:
        """Send until there was nothing to send for a while."""
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(ACKNOWLEDGEMENTS_IN_FLIGHT):
                    nursery.start_soon(self._work)
                nursery.start_soon(self._http.close_idle)
                await self._wait_quiet()
                nursery.cancel_scope.cancel(reason="there is nothing to acknowledge")
        finally:
            self._runs = False
        self._ensure_running()

    async def _wait_quiet(self) -> None:
        """Wait until nothing was sent, or waited to be sent, for `QUIET_AFTER`."""
        sent_before = -1
        while self._waiting or self._tried != sent_before or len(self._idle) < ACKNOWLEDGEMENTS_IN_FLIGHT:
            sent_before = self._tried
            await trio.sleep(QUIET_AFTER)

    @trio.lowlevel.enable_ki_protection
    async def _work(self) -> None:
        while True:
            if not self._waiting or self._trying:
                await self._idle.park()
            else:
                await self._send_or_sleep()

    async def _send_or_sleep(self) -> None:
        now = trio.current_time()
        delay = max(self._paused_until - now, 0.0) or self._pace.take(now)
        if delay:
            await trio.sleep(delay)
        else:
            await self._send()

    async def _send(self) -> None:
        event_id = self._waiting.popleft()
        self._tried += 1
        self._trying = trying = self._failed_in_a_row >= REFUSALS_BEFORE_REST
        try:
            await self._http.acknowledge(event_id)
        except trio.Cancelled:
            self._waiting.appendleft(event_id)
            raise
        except (AttemptError, InternalError) as exc:
            self.failed += 1
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= REFUSALS_BEFORE_REST:
                self._paused_until = trio.current_time() + ACKNOWLEDGEMENTS_REST
                if not self._reported:
                    self._reported = True
                    self._reporter.publish(AcknowledgementsPaused(why=str(exc)))
        else:
            self.sent += 1
            self._failed_in_a_row, self._reported = 0, False
        finally:
            if trying:
                self._trying = False
                self._idle.unpark_all()

    async def finish(self, deadline: float) -> None:
        """Send what waits, until *deadline* on Trio's clock; then drop what is left."""
        with trio.CancelScope(deadline=deadline):
            async with trio.open_nursery() as nursery:
                for _ in range(ACKNOWLEDGEMENTS_IN_FLIGHT):
                    nursery.start_soon(self._finish)
        self._finished = True
        self.dropped += len(self._waiting)
        self._waiting.clear()

    @trio.lowlevel.enable_ki_protection
    async def _finish(self) -> None:
        while self._waiting and trio.current_time() >= self._paused_until:
            await self._send_or_sleep()
