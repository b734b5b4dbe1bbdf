"""The events between admission and settlement, within the limits of the client."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

import attrs
import msgspec
import trio

from .._events import Event
from .._settings import Settings, SettlementObserver
from ..notices import AdmissionPaused, Stopped
from ._ledger import Entry, Ledger
from ._reporter import Reporter

_LOW_WATER: Final = 0.8
"""A full buffer takes events again when it is down to this share of its limits: not one wake-up for every event."""


class BufferedEvent(msgspec.Struct, eq=False, gc=False):
    """An admitted event that is not settled yet."""

    event: Event
    entry: Entry
    attempt: int = 1


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
    tasks_waiting_space: int
    """Connections that stopped reading because the buffer is full or too much is unsettled."""


class Buffer:
    """Holds the events that wait to be received, and settles those that were.

    Args:
        settings: for the limits.
        ledger: records what is settled.
        reporter: publishes pauses of admission.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        reporter: Reporter,
    ) -> None:
        self._settings = settings
        # Looked up for every event.
        self._max_events = settings.limits.buffered_events
        self._max_bytes = settings.limits.buffered_bytes
        self._max_unsettled = settings.limits.unsettled
        self._max_settled = math.inf
        self._in_hand = 0  # admitted and not settled; counted because it may be settled before the next save
        self._ledger = ledger
        self._reporter = reporter
        self._observers: tuple[SettlementObserver, ...] = ()
        # Bounded by has_space(): by events and bytes, which a capacity in batches could not express.
        self._send, self._receive = trio.open_memory_channel[list[BufferedEvent]](math.inf)
        self._growing: list[BufferedEvent] | None = None
        self._line: deque[BufferedEvent] = deque()
        self._space = trio.lowlevel.ParkingLot()
        self._waiting = 0  # tasks that wait there
        self._events = 0
        self._bytes = 0
        self._paused = False
        self._handles = 0
        self._fault: Exception | None = None
        self.closed: bool = False
        """Whether admission has ended."""
        self.abandoned: trio.Event = trio.Event()
        """Set when the last handle is closed: nobody receives any more."""

    def observe(self, observer: SettlementObserver) -> None:
        """Have an observer notified of each settlement from now on."""
        self._observers += (observer,)

    # ---- admission ---------------------------------------------------------------------------------------------

    def has_space(self, size: int) -> bool:
        """Return whether an event of *size* bytes may be admitted now."""
        ledger, events = self._ledger, self._events
        return (
            events < self._max_events
            # One that is larger than the whole budget is let in alone, or it could never be delivered.
            and (self._bytes + size <= self._max_bytes or not events)
            and ledger.unsettled < self._max_unsettled
            and ledger.settled_count + self._in_hand < self._max_settled
        ) or self.closed

    def saved(self, count: int) -> None:
        """Record that a save covers the first *count* settlements. At most `Limits.unsaved` more may follow."""
        self._max_settled = count + self._settings.limits.unsaved
        if self._waiting or self._paused:
            self._make_space()

    async def wait_space(self, size: int) -> None:
        """Wait until an event of *size* bytes may be admitted, or admission has ended. Cancellation changes nothing."""
        await trio.lowlevel.checkpoint()
        while not self.has_space(size):
            if not self._paused:
                self._report_pause()
            self._waiting += 1
            try:
                await self._space.park()
            finally:
                self._waiting -= 1

    def _report_pause(self) -> None:
        ledger = self._ledger
        if ledger.unsettled >= self._max_unsettled:
            self._paused = True
            self._reporter.publish(AdmissionPaused(oldest=ledger.oldest_unsettled, unsettled=ledger.unsettled))
        elif ledger.settled_count >= self._max_settled:
            self._paused = True
            unsaved = self._settings.limits.unsaved
            self._reporter.publish(AdmissionPaused(oldest=None, unsettled=ledger.unsettled, unsaved=unsaved))

    def put(self, event: Event, entry: Entry) -> None:
        """Put an admitted event into the buffer."""
        self._in_hand += 1
        self._events += 1
        self._bytes += event.size
        if self._growing is not None:
            self._growing.append(BufferedEvent(event, entry))
        else:
            self._offer([BufferedEvent(event, entry)])

    def end(self, fault: Exception | None = None) -> None:
        """End admission. What is buffered can still be received; then *fault* is raised once, if there is one."""
        if not self.closed:
            self.closed = True
            self._fault = fault
            self._send.close()
            self._space.unpark_all()

    def stop(self) -> None:
        """End admission in an orderly way, and publish that."""
        if not self.closed:
            self.end()
            self._reporter.publish(Stopped())

    def take_fault(self) -> Exception | None:
        """Return the fault that ended admission, once."""
        fault, self._fault = self._fault, None
        return fault

    # ---- handing out -------------------------------------------------------------------------------------------

    def open_handle(self) -> trio.MemoryReceiveChannel[list[BufferedEvent]]:
        """Count one more handle, and give its end of the memory channel."""
        self._handles += 1
        return self._receive.clone()

    def handle_closed(self) -> None:
        """Count one handle less. Without any, admission ends."""
        self._handles -= 1
        if not self._handles:
            self.stop()
            self.abandoned.set()

    def _offer(self, batch: list[BufferedEvent]) -> None:
        # The batch grows until the task that receives it runs, even if the channel has already handed it over.
        self._growing = batch
        self._send.send_nowait(batch)

    def from_line(self) -> BufferedEvent | None:
        """Take the oldest of the events that an earlier batch left; None if there is none."""
        return self._taken(self._line.popleft()) if self._line else None

    def split(self, batch: list[BufferedEvent]) -> BufferedEvent:
        """Take the first event of a batch, and leave the others for those who receive next."""
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

    def _taken(self, buffered: BufferedEvent) -> BufferedEvent:
        self._events -= 1
        self._bytes -= buffered.event.size
        if self._waiting:
            self._make_space()
        return buffered

    def put_back(self, buffered: BufferedEvent) -> None:
        """Put an event that was not settled at the head of the line."""
        buffered.attempt += 1
        self._events += 1
        self._bytes += buffered.event.size
        if not self.closed and self._receive.statistics().tasks_waiting_receive:
            self._send.send_nowait([buffered])
        else:
            self._line.appendleft(buffered)

    def settle(self, event: Event, entry: Entry) -> None:
        """Settle an event."""
        self._ledger.settle(entry)
        for observer in self._observers:
            observer.settled(event)
        if self._waiting or self._paused:
            self._make_space()

    def settle_taken(self, buffered: BufferedEvent) -> None:
        """Settle an event that was put into the buffer and taken."""
        self._in_hand -= 1
        self.settle(buffered.event, buffered.entry)

    def _make_space(self) -> None:
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
            self._space.unpark_all()

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
            tasks_waiting_space=len(self._space),
        )
