"""Acknowledgements, as Kadoa's SDKs send them: one request for each event, here after it was settled.

What they change on the server is not documented. So they never delay events
or leaving: few at once, at a maximum per second, and dropped when too many
wait.
"""

from __future__ import annotations

from collections import deque

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
ACKNOWLEDGEMENTS_PER_SECOND = 200
"""Maximum per second. Each costs about 20 times the CPU of its event."""
REFUSALS_BEFORE_REST, ACKNOWLEDGEMENTS_REST = 10, 300.0
"""Failures in a row after which acknowledgements are suspended, and for how long, in seconds; then one is tried."""


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
        self._some = trio.Event()
        self._next = 0.0
        self._paused_until = 0.0
        self._failed_in_a_row = 0
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
        self._waiting.append(event.id)
        if len(self._waiting) > MAX_ACKNOWLEDGEMENTS:
            self._waiting.popleft()
            self.dropped += 1
        elif not self._some.is_set():
            self._some.set()

    @property
    def waiting(self) -> int:
        """How many wait to be sent."""
        return len(self._waiting)

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Send until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(ACKNOWLEDGEMENTS_IN_FLIGHT):
                nursery.start_soon(self._work)

    @trio.lowlevel.enable_ki_protection
    async def _work(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            if not self._waiting:
                if self._some.is_set():
                    self._some = trio.Event()
                await self._some.wait()
                continue
            # Each takes the next slot, so that the maximum per second holds for all together.
            self._next = max(self._next, trio.current_time(), self._paused_until) + 1 / ACKNOWLEDGEMENTS_PER_SECOND
            await trio.sleep_until(self._next)
            if self._waiting and trio.current_time() >= self._paused_until:
                await self._send()

    async def _send(self) -> None:
        event_id = self._waiting.popleft()
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

    async def finish(self, deadline: float) -> None:
        """Send what waits, until *deadline* on Trio's clock; then drop what is left."""
        with trio.CancelScope(deadline=deadline):
            async with trio.open_nursery() as nursery:
                for _ in range(ACKNOWLEDGEMENTS_IN_FLIGHT):
                    nursery.start_soon(self._finish)
        self.dropped += len(self._waiting)
        self._waiting.clear()

    @trio.lowlevel.enable_ki_protection
    async def _finish(self) -> None:
        while self._waiting and trio.current_time() >= self._paused_until:
            await self._send()
