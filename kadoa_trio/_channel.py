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
from types import TracebackType
from typing import Final, NoReturn, final

import attrs
import trio

from ._events import Event
from ._ledger import Entry, Ledger
from ._notices import AdmissionPaused, Reporter
from ._redact import presentable
from ._settings import Settings

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
        self._max_events = settings.max_buffered_events
        self._max_bytes = settings.max_buffered_bytes
        self._max_unsettled = settings.max_unsettled
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
        """Record that the position covers the first *count* settlements; maximum unsaved after it: ``max_unsaved``."""
        self._max_settled = count + self._settings.max_unsaved
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
            unsaved = self._settings.max_unsaved
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

    def open_handle(self) -> EventChannel:
        """Make a handle."""
        self._handles += 1
        return EventChannel(self, self._receive.clone())

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
            and self._max_settled - ledger.settled_count >= (1 - _LOW_WATER) * settings.max_unsaved
        ):
            # Not earlier: where a consumer is behind, each event that it settles would end a pause and begin another.
            self._paused = False
        if (
            self._events <= _LOW_WATER * settings.max_buffered_events
            and self._bytes <= _LOW_WATER * settings.max_buffered_bytes
        ):
            self._room.unpark_all()

    def statistics(self) -> EventChannelStatistics:
        return EventChannelStatistics(
            buffered_events=self._events,
            max_buffered_events=self._settings.max_buffered_events,
            buffered_bytes=self._bytes,
            max_buffered_bytes=self._settings.max_buffered_bytes,
            unsettled=self._ledger.unsettled,
            max_unsettled=self._settings.max_unsettled,
            oldest_unsettled=self._ledger.oldest_unsettled,
            open_handles=self._handles,
            tasks_waiting_receive=self._receive.statistics().tasks_waiting_receive,
            tasks_waiting_room=len(self._room),
        )


@final
class EventChannel(trio.abc.ReceiveChannel[Event]):
    """Where a program receives its events: ``realtime.events``, and clones of it.

    *Asking for the next event settles the one before it* on the same handle,
    at once, before anything is awaited. So a plain ``async for`` settles each
    event when its turn of the loop is over. Leaving the loop settles nothing:
    what was in hand when a program was cancelled or failed comes again, to
    another handle now or to the next run.

    A handle belongs to one task at a time. Several workers use `clone`, and
    compete for the events.

    When admission has ended, what is buffered is still received, then
    `trio.EndOfChannel` is raised; a fatal fault is raised once, before that.

    Example::

        async def worker(events: EventChannel) -> None:
            async with events:
                async for event in events:
                    await handle(event)

        async with open_realtime() as realtime, trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(worker, realtime.events.clone())
    """

    def __init__(self, intake: Intake, receive: trio.MemoryReceiveChannel[list[_Parcel]]) -> None:
        self._intake = intake
        self._receive = receive
        self._current: _Parcel | None = None
        self._owner: trio.lowlevel.Task | None = None
        self._asking: trio.lowlevel.Task | None = None
        self._busy = False
        self._closed = False

    def __repr__(self) -> str:
        if self._closed:
            return "<EventChannel, closed>"
        in_hand = f", unsettled: {presentable(self._current.event.id, 80)}" if self._current is not None else ""
        return f"<EventChannel, {self._intake.statistics().buffered_events} buffered{in_hand}>"

    @trio.lowlevel.enable_ki_protection
    async def receive(self) -> Event:
        """Settle the event received before, and wait for the next one.

        Being cancelled while it waits loses nothing; the event before it *is*
        settled then.

        Raises:
            trio.EndOfChannel: admission has ended and everything was received.
            trio.BusyResourceError: another task is receiving from this handle,
                or has received an event from it that is not settled.
            trio.ClosedResourceError: this handle was closed.
            KadoaError: the fault that ended the client; once, on one handle.
        """
        self._current = parcel = await self._take()
        self._owner = self._asking
        return parcel.event

    @trio.lowlevel.enable_ki_protection
    def receive_nowait(self) -> Event:
        """Settle the event received before, and return the next one if there is one.

        Raises:
            trio.WouldBlock: nothing is buffered.
            trio.EndOfChannel: as `receive`; and what else `receive` raises.
        """
        self._ask()
        parcel = self._intake.from_line()
        if parcel is None:
            try:
                batch = self._receive.receive_nowait()
            except trio.EndOfChannel:
                self._end()
            parcel = self._intake.split(batch)
        self._current = parcel
        self._owner = self._asking
        return parcel.event

    @trio.lowlevel.enable_ki_protection
    def settle(self) -> None:
        """Settle the event received last, without asking for the next one. Does nothing if there is none."""
        parcel, self._current = self._current, None
        self._owner = None
        if parcel is not None:
            self._intake.settle_parcel(parcel)

    def delivery(self) -> Delivery:
        """Receive an event for a block, and settle it at the block's end.

        If the block is left with an exception, `trio.Cancelled` included, the
        event goes back to the head of the line instead, for this or another
        handle. A task may hold several deliveries of one handle, and settle
        them in any order.

        Entering settles an event that `receive` returned before, and raises
        what `receive` raises.

        Example::

            async with events.delivery() as delivery:
                await handle(delivery.event)
        """
        return Delivery(self)

    def clone(self) -> EventChannel:
        """Make another handle to the same stream: each event goes to one of them.

        The stream is stopped when all of them are closed.

        Raises:
            trio.ClosedResourceError: this handle was closed.
        """
        if self._closed:
            raise trio.ClosedResourceError
        return self._intake.open_handle()

    def statistics(self) -> EventChannelStatistics:
        """Return how full the channel is."""
        return self._intake.statistics()

    @trio.lowlevel.enable_ki_protection
    def close(self) -> None:
        """Close this handle; an event that it has not settled goes to another one.

        Closing the last handle stops the client, as `Realtime.stop` does.
        Closing twice is fine.
        """
        if self._closed:
            return
        self._closed = True
        parcel, self._current = self._current, None
        self._owner = None
        if parcel is not None:
            self._intake.put_back(parcel)
        self._receive.close()
        self._intake.handle_closed()

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close this handle, as `close` does. A checkpoint."""
        self.close()
        await trio.lowlevel.checkpoint()

    def __enter__(self) -> EventChannel:
        return self

    @trio.lowlevel.enable_ki_protection
    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @trio.lowlevel.enable_ki_protection  # the one that is inherited is not
    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _ask(self) -> None:
        """What every way of asking does first, without a checkpoint."""
        if self._closed:
            raise trio.ClosedResourceError
        if self._busy:
            raise trio.BusyResourceError("another task is receiving from this handle; give each task a clone()")
        self._asking = trio.lowlevel.current_task()
        parcel = self._current
        if parcel is not None:
            if self._owner is not self._asking:
                raise trio.BusyResourceError(
                    f"another task received event {presentable(parcel.event.id, 80)} from this handle and has not settled it; "
                    "give each task a clone()"
                )
            self._current = None
            self._intake.settle_parcel(parcel)

    @trio.lowlevel.enable_ki_protection
    async def _take(self) -> _Parcel:
        self._ask()
        self._busy = True
        intake = self._intake
        try:
            # First, so that under load the next event is there already: to be woken for each one costs twice as much.
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError
            parcel = intake.from_line()
            if parcel is not None:
                return parcel
            try:
                batch = self._receive.receive_nowait()
            except trio.WouldBlock:
                # It takes with no checkpoint after it, or is handed a batch while it waits: never cancelled and taken.
                batch = await self._receive.receive()
            return intake.split(batch)
        except trio.EndOfChannel:
            self._end()
        finally:
            self._busy = False

    def _end(self) -> NoReturn:
        fault = self._intake.take_fault()
        if fault is not None:
            raise fault from fault.__cause__
        raise trio.EndOfChannel


@final
class Delivery:
    """An event in hand for a block. Made by `EventChannel.delivery`."""

    def __init__(self, channel: EventChannel) -> None:
        self._channel = channel
        self._parcel: _Parcel | None = None

    @property
    def event(self) -> Event:
        """The event."""
        return self._require().event

    @property
    def attempt(self) -> int:
        """How often this process has handed it out, 1 the first time."""
        return self._require().attempt

    def _require(self) -> _Parcel:
        if self._parcel is None:
            raise RuntimeError("a delivery has its event inside of its async with block only")
        return self._parcel

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Delivery:
        if self._parcel is not None:
            raise RuntimeError("a delivery can be entered once")
        self._parcel = await self._channel._take()
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        parcel = self._require()
        if exc is None:
            self._channel._intake.settle_parcel(parcel)
        else:
            self._channel._intake.put_back(parcel)
