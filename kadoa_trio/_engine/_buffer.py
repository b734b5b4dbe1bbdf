"""The events between admission and settlement, within the limits of the client."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
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
"""A full buffer takes events again when it is down to this share of its limits."""


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
    """The span from the oldest unsettled event to the newest one admitted.

    A step of the resume cursor without an event, and the end of a repair,
    count as one event each, so that it may be one more than the maximum.
    """
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
        self._low_events = _LOW_WATER * settings.limits.buffered_events
        self._max_settled: float = math.inf
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
        self.on_abandoned: Callable[[], None] = self.stop
        """Called when the last handle is closed: nobody receives any more."""

    def observe(self, observer: SettlementObserver) -> None:
        """Have an observer notified of each settlement from now on."""
        self._observers += (observer,)

    # ---- admission ---------------------------------------------------------------------------------------------

    def has_space(self, size: int) -> bool:
        """Return whether an event of *size* bytes may be admitted now."""
        ledger = self._ledger
        return (
            self._has_room(size)
            and ledger.unsettled < self._max_unsettled
            and ledger.settled_count + self._in_hand < self._max_settled
        ) or self.closed

    def _has_room(self, size: int) -> bool:
        # One that is larger than the whole budget is let in alone, or it could never be delivered.
        return self._events < self._max_events and (self._bytes + size <= self._max_bytes or not self._events)

    def _is_low(self) -> bool:
        """Return whether a buffer that was full takes events again: not one wake-up for each event that is received."""
        return (self._events <= self._low_events and self._bytes <= _LOW_WATER * self._max_bytes) or self.closed

    def count_fitting(self, events: Sequence[Event]) -> int:
        """Return how many of *events*, from the first one on, may be admitted now for certain."""
        ledger = self._ledger
        fitting = min(
            len(events),
            self._max_events - self._events,
            self._max_unsettled - ledger.unsettled,
            self._max_settled - ledger.settled_count - self._in_hand,
        )
        if fitting <= 0 or self.closed:
            return 0
        count, left = int(fitting), self._max_bytes - self._bytes
        sizes = [event.size for event in itertools.islice(events, count)]
        if sum(sizes) > left:
            count = sum(1 for _ in itertools.takewhile(left.__ge__, itertools.accumulate(sizes)))
        return count

    def saved(self, count: int) -> None:
        """Record that a save covers the first *count* settlements. At most `Limits.unsaved` more may follow."""
        self._max_settled = count + self._settings.limits.unsaved
        if self._waiting or self._paused:
            self._make_space()

    async def wait_space(self, size: int) -> None:
        """Wait until an event of *size* bytes may be admitted, or admission has ended. Cancellation changes nothing."""
        full = not self._has_room(size)
        await trio.lowlevel.checkpoint()
        while not self.has_space(size) or (full and not self._is_low()):
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
        self._append([BufferedEvent(event, entry)])

    def put_many(self, events: Sequence[Event], entries: Sequence[Entry]) -> None:
        """Put admitted events into the buffer, in their order."""
        if not events:
            return
        self._in_hand += len(events)
        self._events += len(events)
        self._bytes += sum([event.size for event in events])
        self._append([BufferedEvent(event, entry) for event, entry in zip(events, entries, strict=True)])

    def _append(self, batch: list[BufferedEvent]) -> None:
        if self._growing is not None:
            self._growing += batch
        else:
            self._offer(batch)

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
            self.on_abandoned()

    def _offer(self, batch: list[BufferedEvent]) -> None:
        # The batch grows until the task that receives it runs, even if the channel has already handed it over.
        self._growing = batch
        self._send.send_nowait(batch)

    @property
    def has_line(self) -> bool:
        """Whether there are events that an earlier batch left."""
        return bool(self._line)

    def from_line(self) -> BufferedEvent | None:
        """Take the oldest of the events that an earlier batch left; None if there is none."""
        return self._taken(self._line.popleft()) if self._line else None

    def split(self, batch: list[BufferedEvent]) -> BufferedEvent:
        """Take the oldest event when *batch* was received, and leave the others for those who receive next."""
        if batch is self._growing:
            self._growing = None
        line = self._line
        line.extend(batch)
        first = line.popleft()
        if line:
            self._wake_waiting()
        return self._taken(first)

    def take_many(self, batch: list[BufferedEvent] | None, max_events: int, max_bytes: int) -> list[BufferedEvent]:
        """Take the oldest events together.

        Args:
            batch: what was received from the handle; None if there are events
                that an earlier batch left.
            max_events: how many to take at most.
            max_bytes: the maximum size of their frames in all, in bytes. One
                event is taken even if it is larger.

        Returns at least one event, in order.
        """
        line = self._line
        if batch is not None:
            if batch is self._growing:
                self._growing = None
            line.extend(batch)
        taken: list[BufferedEvent] = []
        size = 0
        while line and len(taken) < max_events:
            more = line[0].event.size
            if taken and size + more > max_bytes:
                break
            size += more
            taken.append(line.popleft())
        self._events -= len(taken)
        self._bytes -= size
        if line:
            self._wake_waiting()
        if self._waiting:
            self._make_space()
        return taken

    def give_back(self, batch: list[BufferedEvent]) -> None:
        """Leave what was received to other handles: the one that was woken for it is closed."""
        if batch is self._growing:
            self._growing = None
        self._line.extend(batch)
        self._wake_waiting()

    def _wake_waiting(self) -> None:
        """Wake the tasks that wait, as many as there are events in the line. Each takes the oldest one when it runs.

        So no task waits while there are events, and they come out in their order. What a task is woken with is an
        empty batch, not its event: tasks run in no particular order.
        """
        if not self.closed:
            waiting = self._receive.statistics().tasks_waiting_receive
            for _ in range(min(waiting, len(self._line))):
                self._send.send_nowait([])

    def _taken(self, buffered: BufferedEvent) -> BufferedEvent:
        self._events -= 1
        self._bytes -= buffered.event.size
        if self._waiting and self._events <= self._low_events:
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
        if self._paused or (self._waiting and self._events <= self._low_events):
            self._make_space()

    def settle_taken(self, buffered: BufferedEvent) -> None:
        """Settle an event that was put into the buffer and taken."""
        self._in_hand -= 1
        self.settle(buffered.event, buffered.entry)

    def settle_many(self, taken: Sequence[BufferedEvent]) -> None:
        """Settle events that were taken together."""
        self._in_hand -= len(taken)
        self._ledger.settle_run([buffered.entry for buffered in taken])
        for observer in self._observers:
            for buffered in taken:
                observer.settled(buffered.event)
        if self._waiting or self._paused:
            self._make_space()

    def put_back_many(self, taken: Sequence[BufferedEvent]) -> None:
        """Put events that were taken together, and not settled, at the head of the line, in their order."""
        for buffered in reversed(taken):
            self.put_back(buffered)

    def _make_space(self) -> None:
        settings, ledger = self._settings, self._ledger
        if self._paused and (
            ledger.unsettled <= _LOW_WATER * self._max_unsettled
            and self._max_settled - ledger.settled_count >= (1 - _LOW_WATER) * settings.limits.unsaved
        ):
            # Not earlier: where a consumer is behind, each event that it settles would end a pause and begin another.
            self._paused = False
        if self._is_low():
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
