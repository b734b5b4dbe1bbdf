"""Fills possible gaps from Kadoa's notification log.

That an ``eventId`` of the log is the ``id`` on the socket is nowhere
documented. So nothing is taken from the log before one of its rows, in the
span or near it, has shown an id that a connection delivered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta

import attrs
import trio

from ._channel import Intake
from ._errors import AttemptError
from ._events import Event
from ._http import HttpClient
from ._ledger import Gap, Ledger
from ._notices import GapRemains, GapRepaired, Reporter
from ._settings import REPAIR_DELAYS, REPAIR_PAGES, REPAIR_SLACK
from ._wire import event_from_log


@attrs.define
class _Found:
    missing: dict[str, Event] = attrs.field(factory=dict)
    """The events that no connection has delivered, each once."""
    matched: bool = False
    """Whether a row has shown an id that a connection delivered."""
    size: int = 0
    """Of what is missing, in bytes."""


class Repairer:
    """Repairs one gap after the other, in the background.

    Args:
        http: the way to the log.
        ledger: knows what was delivered.
        intake: where events go.
        reporter: told of the result.
        deliver: admits an event and puts it into the buffer, where there is room.
        max_bytes: how much of the log is held in memory at once.
    """

    def __init__(
        self,
        http: HttpClient,
        ledger: Ledger,
        intake: Intake,
        reporter: Reporter,
        deliver: Callable[[Event], None],
        max_bytes: int,
    ) -> None:
        self._http = http
        self._ledger = ledger
        self._intake = intake
        self._reporter = reporter
        self._deliver = deliver
        self._max_bytes = max_bytes
        self._send, self._receive = trio.open_memory_channel[Gap](math.inf)  # the ledger bounds gaps
        self.repaired: int = 0
        """Events that were taken from the log."""

    def add(self, gap: Gap) -> None:
        """Repair a gap some time soon."""
        self._send.send_nowait(gap)

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Repair until cancelled. A repair that is cut short is begun again by the next run."""
        async for gap in self._receive:
            await self._repair(gap)

    async def _repair(self, gap: Gap) -> None:
        if gap.since is None:
            self._give_up(gap, "nothing is known of the time before it", final=True)
            return
        why, final, retry_after = "", False, 0.0
        for delay in REPAIR_DELAYS:
            await trio.sleep(max(delay, retry_after))
            retry_after = 0.0
            found = _Found()
            try:
                complete = await self._read(gap, found)
            except AttemptError as exc:
                why, final, retry_after = str(exc), False, min(exc.retry_after or 0.0, REPAIR_DELAYS[-1])
                continue
            if not found.matched:
                why, final = "no row of the log near it has an id that the socket delivered", True
                continue
            if not await self._hand_out(found):
                return  # the client is ending; the gap stays in the position
            if not complete:
                self._give_up(gap, "the log holds more of that time than is read for one gap", final=True)
                return
            self._reporter.publish(GapRepaired, gap=gap, events=len(found.missing))
            self._ledger.close_gap(gap)
            return
        self._give_up(gap, why, final=final)

    def _give_up(self, gap: Gap, why: str, *, final: bool) -> None:
        self._reporter.publish(GapRemains, gap=gap, why=why, final=final)
        if final:
            self._ledger.close_gap(gap)

    async def _read(self, gap: Gap, found: _Found) -> bool:
        """Read the log around a gap; return whether that was all of it."""
        assert gap.since is not None
        slack = timedelta(seconds=REPAIR_SLACK)
        offset = 0
        for _ in range(REPAIR_PAGES):
            page = await self._http.fetch_log(gap.since - slack, gap.until + slack, offset)
            for row in page.rows:
                event = event_from_log(row)
                # Several rows may tell of one event: one for each channel, or for each try.
                if event is None or event.id in found.missing:
                    continue
                if self._ledger.knows(event.id):
                    found.matched = True
                    continue
                found.missing[event.id] = event
                found.size += event.size
                if found.size > self._max_bytes:
                    return False
            if not page.has_more:
                return True
            offset += len(page.rows)
        return False

    async def _hand_out(self, found: _Found) -> bool:
        """Hand out what is missing, oldest first, as far as no connection brings it meanwhile."""
        events = list(found.missing.values())
        if events and _time(events[0]) >= _time(events[-1]):
            events.reverse()  # newest first, as logs are; else the sort would leave equal times in that order
        events.sort(key=_time)
        for event in events:
            while not self._ledger.knows(event.id):
                if self._intake.closed:
                    return False
                if self._intake.has_room(event.size):
                    self._deliver(event)
                    self.repaired += 1
                else:
                    await self._intake.wait_room(event.size)
        return True


def _time(event: Event) -> float:
    return event.timestamp.timestamp() if event.timestamp is not None else math.inf
