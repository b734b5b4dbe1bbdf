"""The events between admission and settlement, within the limits of the client."""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Final

import attrs
import msgspec
import trio

from .._backoff import jitter
from .._events import Event
from .._position import Position
from .._settings import Settings, SettlementObserver
from ..notices import AdmissionPaused, Stopped
from ._delays import Delays
from ._ledger import Entry, Ledger
from ._reporter import Reporter

_LOW_WATER: Final = 0.8
"""A full buffer takes events again when it is down to this share of its limits."""


class BufferedEvent(msgspec.Struct, eq=False, gc=False):
    """An admitted event that is not settled yet."""

    event: Event
    entry: Entry
    attempt: int = 1
    due: float = 0.0
    """When it is delivered again, on Trio's clock, if it waits for that."""


@attrs.frozen(kw_only=True)
class EventChannelStatistics:
    """How full the channel is, and who waits at it. All counts are of events."""

    buffered_events: int
    """Admitted, and not yet received."""
    peak_buffered_events: int
    """The largest number so far."""
    max_buffered_events: int
    buffered_bytes: int
    """The size of their frames and of the frames of those that wait for their redelivery, in bytes."""
    max_buffered_bytes: int
    unsettled: int
    """The span from the oldest unsettled event to the newest one admitted.

    A step of the resume cursor without an event, and the end of a repair,
    count as one event each, so that it may be one more than the maximum.
    """
    max_unsettled: int
    oldest_unsettled: str | None
    """The id of the event that the position waits for."""
    delayed_events: int
    """Deliveries that failed and wait for their redelivery. Not counted as buffered, so that they hold up no other event."""
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
        rng: draws how long an event waits for its redelivery.
    """

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        reporter: Reporter,
        rng: random.Random,
    ) -> None:
        self._settings = settings
        self._rng = rng
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
        self._peak = 0
        self._fault: Exception | None = None
        self._delays: Delays[BufferedEvent] = Delays(self._redeliver)
        self._last_calls: Delays[None] = Delays(self._last_call)
        self._until = -math.inf
        """When admission has ended: until when events that come back are handed out again, on Trio's clock."""
        self._left = 0
        """When admission has ended: events that are not settled and not handed out again."""
        self._sealed = False
        """Whether the memory channel has ended: what is in it is the last."""
        self.closed: bool = False
        """Whether admission has ended."""
        self.settled_events: int = 0
        """Events that the program has settled; filtered ones are not counted."""
        self.settled_at: datetime | None = None
        """When the program settled an event last, in wall time."""
        self.redelivered: int = 0
        """How often an event went back to be handed out again."""
        self.dead: int = 0
        """Events that the program has put aside as dead letters; they are settled."""
        self.on_abandoned: Callable[[], None] = self.stop
        """Called when the last handle is closed: nobody receives any more."""

    @property
    def paused(self) -> bool:
        """Whether admission is paused because too many events are unsettled or unsaved; see `AdmissionPaused`."""
        return self._paused

    @property
    def max_bytes(self) -> int:
        """`Limits.buffered_bytes`."""
        return self._max_bytes

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
        if self._events > self._peak:
            self._peak = self._events
        self._append([BufferedEvent(event, entry)])

    def put_many(self, events: Sequence[Event], entries: Sequence[Entry]) -> None:
        """Put admitted events into the buffer, in their order."""
        if not events:
            return
        self._in_hand += len(events)
        self._events += len(events)
        self._bytes += sum([event.size for event in events])
        if self._events > self._peak:
            self._peak = self._events
        self._append([BufferedEvent(event, entry) for event, entry in zip(events, entries, strict=True)])

    def _append(self, batch: list[BufferedEvent]) -> None:
        if self._growing is not None:
            self._growing += batch
        else:
            self._offer(batch)

    def end(self, fault: Exception | None = None, *, retry_within: float = 0.0) -> None:
        """End admission. What is buffered can still be received; then *fault* is raised once, if there is one.

        Args:
            fault: what receivers raise.
            retry_within: for how long an event that comes back is still handed
                out again, in seconds. One that would be due later stays unsettled.
        """
        if self.closed:
            return
        self.closed = True
        self._fault = fault
        if retry_within > 0:
            self._until = trio.current_time() + retry_within
            self._last_calls.add([None], self._until)
        self._give_up([one for one in self._delays.clear() if not self._add_delayed([one], one.due)])
        self._space.unpark_all()
        self._seal_if_done()

    def stop(self, *, retry_within: float = 0.0) -> None:
        """End admission in an orderly way, and publish that."""
        if not self.closed:
            self.end(retry_within=retry_within)
            self._reporter.publish(Stopped())

    def _seal_if_done(self) -> None:
        """End the memory channel when nothing more can come into it. Admission has ended."""
        if not self._sealed and (self._in_hand <= self._left or trio.current_time() >= self._until):
            self._sealed = True
            self._send.close()

    def _last_call(self, _due: list[None]) -> None:
        self._give_up(self._delays.clear())
        self._seal_if_done()

    def _give_up(self, events: Collection[BufferedEvent]) -> None:
        """Leave events that wait for their redelivery to the next run: they stay unsettled."""
        self._left += len(events)
        self._bytes -= sum([one.event.size for one in events])

    def take_fault(self) -> Exception | None:
        """Return the fault that ended admission, once."""
        fault, self._fault = self._fault, None
        return fault

    def give_back_fault(self, fault: Exception) -> None:
        """Have the fault raised by another receiver, or when the client is left: the one that took it could not raise it."""
        self._fault = fault

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

    def take_many(
        self, batch: list[BufferedEvent] | None, max_events: int, max_bytes: int, *, any_size: bool = True
    ) -> list[BufferedEvent]:
        """Take the oldest events together, in order.

        Args:
            batch: what was received from the handle; None if there are events
                that an earlier batch left.
            max_events: how many to take at most.
            max_bytes: the maximum size of their frames in all, in bytes.
            any_size: take the first event even if it is larger.
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
            if size + more > max_bytes and (taken or not any_size):
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
        if not self._sealed:
            waiting = self._receive.statistics().tasks_waiting_receive
            for _ in range(min(waiting, len(self._line))):
                self._send.send_nowait([])

    def _taken(self, buffered: BufferedEvent) -> BufferedEvent:
        self._events -= 1
        self._bytes -= buffered.event.size
        if self._waiting and self._events <= self._low_events:
            self._make_space()
        return buffered

    def put_back(self, taken: Sequence[BufferedEvent]) -> None:
        """Put events back that were taken and not handled, at the head of the line, in their order."""
        self._bytes += sum([one.event.size for one in taken])
        self._return(taken)

    def put_back_handed_out(self, buffered: BufferedEvent) -> None:
        """Put an event back that a program has seen: the next delivery of it is another attempt."""
        buffered.attempt += 1
        self.redelivered += 1
        self.put_back([buffered])

    def _return(self, taken: Sequence[BufferedEvent]) -> None:
        self._events += len(taken)
        self._line.extendleft(reversed(taken))
        self._wake_waiting()

    def retry(self, taken: Sequence[BufferedEvent], after: float | None = None) -> None:
        """Have events whose delivery has failed delivered again, together and in their order.

        Args:
            taken: the events.
            after: in how many seconds; None for the client's policy and the
                number of attempts.
        """
        if not taken:
            return
        if after is None:
            after = jitter(self._settings.redelivery, max([one.attempt for one in taken]), self._rng)
        due = trio.current_time() + after
        for one in taken:
            one.attempt += 1
            one.due = due
        self._bytes += sum([one.event.size for one in taken])
        if after <= 0 and not self.closed:
            self.redelivered += len(taken)
            self._return(taken)
        elif not self._add_delayed(taken, due):
            self._give_up(taken)
            self._seal_if_done()

    def _add_delayed(self, events: Sequence[BufferedEvent], due: float) -> bool:
        """Have events wait for their redelivery; return False if that would be after the end."""
        if self.closed and due > self._until:
            return False
        self._delays.add(list(events), due)
        return True

    def _redeliver(self, events: list[BufferedEvent]) -> None:
        self.redelivered += len(events)
        self._return(events)

    def start(self, nursery: trio.Nursery) -> None:
        """Redeliver events from now on, in tasks of *nursery*, which there are only while events wait for it."""
        self._delays.start(nursery)
        self._last_calls.start(nursery)

    def stop_starting(self) -> None:
        """Start no task from now on: the nursery is about to end. What waits for its redelivery stays unsettled."""
        self._until = -math.inf
        self._delays.stop_starting()
        self._last_calls.stop_starting()
        self._give_up(self._delays.clear())
        if self.closed:
            self._seal_if_done()

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
        self.settled_events += 1
        self.settled_at = self._reporter.wall_clock()
        self.settle(buffered.event, buffered.entry)
        if self.closed:
            self._seal_if_done()

    def settle_many(self, taken: Sequence[BufferedEvent]) -> None:
        """Settle events that were taken together."""
        self._in_hand -= len(taken)
        self.settled_events += len(taken)
        self.settled_at = self._reporter.wall_clock()
        self._ledger.settle_run([buffered.entry for buffered in taken])
        for observer in self._observers:
            for buffered in taken:
                observer.settled(buffered.event)
        if self._waiting or self._paused:
            self._make_space()
        if self.closed:
            self._seal_if_done()

    def position_after(self, events: Collection[Event]) -> Position:
        """Return what the position will be when *events* are settled: all that are in hand.

        Raises:
            ValueError: one of them is not in hand, or others are, too. Two positions that were made side by side
                would not know of each other's events.
        """
        position = self._ledger.position_after([event.id for event in events], self._reporter.moment())
        in_hand = self._in_hand - self._events - len(self._delays) - self._left
        if in_hand > len(events):
            raise ValueError(
                f"{in_hand - len(events)} other events are in hand, and not settled: a position is for one task at a time"
            )
        if in_hand < len(events):
            raise ValueError("an event of them is not in hand: it waits to be delivered")
        return position

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
            peak_buffered_events=self._peak,
            max_buffered_events=self._settings.limits.buffered_events,
            buffered_bytes=self._bytes,
            max_buffered_bytes=self._settings.limits.buffered_bytes,
            unsettled=self._ledger.unsettled,
            max_unsettled=self._settings.limits.unsettled,
            oldest_unsettled=self._ledger.oldest_unsettled,
            delayed_events=len(self._delays),
            open_handles=self._handles,
            tasks_waiting_receive=self._receive.statistics().tasks_waiting_receive,
            tasks_waiting_space=len(self._space),
        )
