"""From admission to settlement: the buffer of events, and the handles that programs receive from.

Inside is one Trio memory channel of *batches*: events that arrive while nobody
has come for the last batch join it, so that a consumer that is behind takes
many of them in one hop, and one that is not takes them one by one. A batch is
split before it reaches a handle: what the taker leaves stands in the *line*,
where the next taker looks first. While the line holds anything nobody waits
in the memory channel, or two handles could each leave the other's events.

Nothing here awaits between taking an event and returning it, nor between an
admission and its place in the buffer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final

import attrs
import trio

from .._events import Event
from .._settings import Settings
from ..notices import AdmissionPaused
from ._ledger import Entry, Ledger
from ._reporter import Reporter

_LOW_WATER: Final = 0.8
"""A full buffer takes events again when it is down to this share of its limits: not one wake-up for every event."""


class _Parcel:
    """An admitted event on its way to being settled."""

    __slots__ = ("attempt", "entry", "event")

    def __init__(self, event: Event, entry: Entry) -> None:
        self.event: Event = event
        self.entry: Entry = entry
        self.attempt: int = 1


@attrs.frozen(kw_only=True)
class EventChannelStatistics:
    """How full the channel is, and who waits at it. All counts are of events."""

    buffered_events: int
    """Admitted, and not yet received."""
    max_buffered_events: int
    buffered_bytes: int
    """The size of their frames, in bytes."""
    max_buffered_bytes: int
    unsettled: int
    """The span from the oldest unsettled event to the newest one admitted."""
    max_unsettled: int
    oldest_unsettled: str | None
    """The id of the event that the position waits for."""
    open_handles: int
    tasks_waiting_receive: int
    tasks_waiting_room: int
    """Connections that stopped reading because the buffer is full or too much is unsettled."""


class Intake:
    """The inner end of the channel: admission puts events in, handles take them out.

    Args:
        settings: for the limits.
        ledger: what is settled is told to it.
        reporter: told when too much is unsettled.
        on_settled: called after every settlement; cheap, and no checkpoint.
        on_abandoned: called when the last handle is closed.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        reporter: Reporter,
        on_settled: Callable[[Event], None],
        on_abandoned: Callable[[], None],
    ) -> None:
        self._settings = settings
        # Looked up for every event.
        self._max_events = settings.limits.buffered_events
        self._max_bytes = settings.limits.buffered_bytes
        self._max_unsettled = settings.limits.unsettled
        self._max_settled = math.inf
        self._in_hand = 0  # put and not settled: once admitted, an event may be settled before the next save
        self._ledger = ledger
        self._reporter = reporter
        self._on_settled = on_settled
        self._on_abandoned = on_abandoned
        # Bounded by has_room(): by events and bytes, which a capacity in batches could not express.
        self._send, self._receive = trio.open_memory_channel[list[_Parcel]](math.inf)
        self._growing: list[_Parcel] | None = None
        self._line: deque[_Parcel] = deque()
        self._room = trio.lowlevel.ParkingLot()
        self._waiting = 0  # at most so many are parked there
        self._events = 0
        self._bytes = 0
        self._paused = False
        self._handles = 0
        self._fault: Exception | None = None
        self.closed: bool = False
        """Whether admission has ended."""

    # ---- admission ---------------------------------------------------------------------------------------------

    def has_room(self, size: int) -> bool:
        """Tell whether an event of *size* bytes may be admitted now."""
        return (
            self._events < self._max_events
            # One that is larger than the whole budget is let in alone, or it could never be delivered.
            and (self._bytes + size <= self._max_bytes or not self._events)
            and self._ledger.unsettled < self._max_unsettled
            and self._ledger.settled_count + self._in_hand < self._max_settled
        ) or self.closed

    def saved(self, count: int) -> None:
        """Record that the position covers the first *count* settlements; maximum unsaved after it: `Limits.unsaved`."""
        self._max_settled = count + self._settings.limits.unsaved
        if self._waiting or self._paused:
            self._make_room()

    async def wait_room(self, size: int) -> None:
        """Wait until an event of *size* bytes may be admitted, or admission has ended. Cancellation changes nothing."""
        await trio.lowlevel.checkpoint()
        while not self.has_room(size):
            if not self._paused:
                self._tell_pause()
            self._waiting += 1
            try:
                await self._room.park()
            finally:
                self._waiting -= 1

    def _tell_pause(self) -> None:
        ledger = self._ledger
        if ledger.unsettled >= self._max_unsettled:
            self._paused = True
            self._reporter.publish(AdmissionPaused, oldest=ledger.oldest_unsettled, unsettled=ledger.unsettled)
        elif ledger.settled_count >= self._max_settled:
            self._paused = True
            unsaved = self._settings.limits.unsaved
            self._reporter.publish(AdmissionPaused, oldest=None, unsettled=ledger.unsettled, unsaved=unsaved)

    def put(self, event: Event, entry: Entry) -> None:
        """Put an admitted event into the buffer."""
        parcel = _Parcel(event, entry)
        self._in_hand += 1
        self._events += 1
        self._bytes += event.size
        if self._growing is not None:
            self._growing.append(parcel)
        else:
            self._offer([parcel])

    def end(self, fault: Exception | None = None) -> None:
        """End admission. What is buffered can still be received; after it *fault* is raised once, if there is one."""
        if not self.closed:
            self.closed = True
            self._fault = fault
            self._send.close()
            self._room.unpark_all()

    def take_fault(self) -> Exception | None:
        """Give the fault out, if nobody has got it yet."""
        fault, self._fault = self._fault, None
        return fault

    # ---- handing out -------------------------------------------------------------------------------------------

    def open_handle(self) -> trio.MemoryReceiveChannel[list[_Parcel]]:
        """Count one more handle, and give its end of the memory channel."""
        self._handles += 1
        return self._receive.clone()

    def handle_closed(self) -> None:
        self._handles -= 1
        if not self._handles:
            self._on_abandoned()

    def _offer(self, batch: list[_Parcel]) -> None:
        # It grows on until its taker runs, even if the channel has given it to a waiting one.
        self._growing = batch
        self._send.send_nowait(batch)

    def from_line(self) -> _Parcel | None:
        """Take the first of what an earlier taker left."""
        return self._taken(self._line.popleft()) if self._line else None

    def split(self, batch: list[_Parcel]) -> _Parcel:
        """Take the first event of a batch; the rest is for the next takers."""
        if batch is self._growing:
            self._growing = None
        first = batch[0]
        if len(batch) > 1:
            self._line.extend(batch[1:])
            if not self.closed and self._receive.statistics().tasks_waiting_receive:
                rest = list(self._line)
                self._line.clear()
                self._offer(rest)
        return self._taken(first)

    def _taken(self, parcel: _Parcel) -> _Parcel:
        self._events -= 1
        self._bytes -= parcel.event.size
        if self._waiting:
            self._make_room()
        return parcel

    def put_back(self, parcel: _Parcel) -> None:
        """Put an event that was not settled at the head of the line."""
        parcel.attempt += 1
        self._events += 1
        self._bytes += parcel.event.size
        if not self.closed and self._receive.statistics().tasks_waiting_receive:
            self._send.send_nowait([parcel])
        else:
            self._line.appendleft(parcel)

    def settle(self, event: Event, entry: Entry) -> None:
        """Settle an event."""
        self._ledger.settle(entry)
        self._on_settled(event)
        if self._waiting or self._paused:
            self._make_room()

    def settle_parcel(self, parcel: _Parcel) -> None:
        """Settle an event that was put into the buffer and taken."""
        self._in_hand -= 1
        self.settle(parcel.event, parcel.entry)

    def _make_room(self) -> None:
        settings, ledger = self._settings, self._ledger
        if self._paused and (
            ledger.unsettled <= _LOW_WATER * self._max_unsettled
            and self._max_settled - ledger.settled_count >= (1 - _LOW_WATER) * settings.limits.unsaved
        ):
            # Not earlier: where a consumer is behind, each event that it settles would end a pause and begin another.
            self._paused = False
        if (
            self._events <= _LOW_WATER * settings.limits.buffered_events
            and self._bytes <= _LOW_WATER * settings.limits.buffered_bytes
        ):
            self._room.unpark_all()

    def statistics(self) -> EventChannelStatistics:
        return EventChannelStatistics(
            buffered_events=self._events,
            max_buffered_events=self._settings.limits.buffered_events,
            buffered_bytes=self._bytes,
            max_buffered_bytes=self._settings.limits.buffered_bytes,
            unsettled=self._ledger.unsettled,
            max_unsettled=self._settings.limits.unsettled,
            oldest_unsettled=self._ledger.oldest_unsettled,
            open_handles=self._handles,
            tasks_waiting_receive=self._receive.statistics().tasks_waiting_receive,
            tasks_waiting_room=len(self._room),
        )
