"""The handles that a program receives events from: `EventChannel` and `Delivery`."""

from __future__ import annotations

from types import TracebackType
from typing import NoReturn, final

import trio

from .._events import Event
from .._redact import presentable
from ._buffer import Buffer, BufferedEvent, EventChannelStatistics


@final
class EventChannel(trio.abc.ReceiveChannel[Event]):
    """Where a program receives its events: ``realtime.events``, and clones of it.

    *Asking for the next event settles the one before it* on the same handle,
    at once, before anything is awaited. So a plain ``async for`` settles each
    event when its turn of the loop is over. Leaving the loop settles nothing.
    An unsettled event is delivered again: to another handle when this one is
    closed, or to the next run.

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

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._receive = buffer.open_handle()
        self._current: BufferedEvent | None = None
        self._owner: trio.lowlevel.Task | None = None
        self._asking: trio.lowlevel.Task | None = None
        self._busy = False
        self._closed = False

    def __repr__(self) -> str:
        if self._closed:
            return "<EventChannel, closed>"
        in_hand = f", unsettled: {presentable(self._current.event.id, 80)}" if self._current is not None else ""
        return f"<EventChannel, {self._buffer.statistics().buffered_events} buffered{in_hand}>"

    @trio.lowlevel.enable_ki_protection
    async def receive(self) -> Event:
        """Settle the event received before, and wait for the next one.

        If cancelled while waiting, no event is lost. The previous event stays
        settled.

        Raises:
            trio.EndOfChannel: admission has ended and everything was received.
            trio.BusyResourceError: another task is receiving from this handle,
                or has received an event from it that is not settled.
            trio.ClosedResourceError: this handle was closed.
            KadoaError: the fault that ended the client; once, on one handle.
        """
        self._ask()
        self._busy = True
        try:
            # First, so that under load the next event is there already: to be woken for each one costs twice as much.
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError
            buffered = self._buffer.from_line()
            if buffered is None:
                buffered = self._buffer.split(await self._receive_batch())
        except trio.EndOfChannel:
            self._end()
        finally:
            self._busy = False
        self._current = buffered
        self._owner = self._asking
        return buffered.event

    @trio.lowlevel.enable_ki_protection
    async def __anext__(self) -> Event:
        try:
            # A coroutine function, as `receive` is, and awaited at once: Ctrl-C between the call of a plain function that
            # returns a coroutine and the await would leave a coroutine that was never awaited.
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    @trio.lowlevel.enable_ki_protection
    def receive_nowait(self) -> Event:
        """Settle the event received before, and return the next one if there is one.

        Raises:
            trio.WouldBlock: nothing is buffered.
            trio.EndOfChannel: as `receive`; and what else `receive` raises.
        """
        self._ask()
        buffered = self._buffer.from_line()
        if buffered is None:
            try:
                batch = self._receive.receive_nowait()
            except trio.EndOfChannel:
                self._end()
            buffered = self._buffer.split(batch)
        self._current = buffered
        self._owner = self._asking
        return buffered.event

    @trio.lowlevel.enable_ki_protection
    def settle(self) -> None:
        """Settle the event received last, without asking for the next one. Does nothing if there is none."""
        buffered, self._current = self._current, None
        self._owner = None
        if buffered is not None:
            self._buffer.settle_taken(buffered)

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
        return EventChannel(self._buffer)

    def statistics(self) -> EventChannelStatistics:
        """Return how full the channel is."""
        return self._buffer.statistics()

    @trio.lowlevel.enable_ki_protection
    def close(self) -> None:
        """Close this handle; an event that it has not settled goes to another one.

        Closing the last handle stops the client, as `Realtime.stop` does.
        Closing twice is fine.
        """
        if self._closed:
            return
        self._closed = True
        buffered, self._current = self._current, None
        self._owner = None
        if buffered is not None:
            self._buffer.put_back(buffered)
        self._receive.close()
        self._buffer.handle_closed()

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
        """Settle the event before; the first step of each way to receive. No checkpoint."""
        if self._closed:
            raise trio.ClosedResourceError
        if self._busy:
            raise trio.BusyResourceError("another task is receiving from this handle; give each task a clone()")
        self._asking = trio.lowlevel.current_task()
        buffered = self._current
        if buffered is not None:
            if self._owner is not self._asking:
                raise trio.BusyResourceError(
                    f"another task received event {presentable(buffered.event.id, 80)} from this handle and has not settled it; "
                    "give each task a clone()"
                )
            self._current = None
            self._buffer.settle_taken(buffered)

    @trio.lowlevel.enable_ki_protection
    async def _receive_many(self, max_events: int, max_bytes: int) -> list[BufferedEvent]:
        """Receive the events that are buffered, at least one, with one checkpoint for all of them.

        Otherwise as `receive`. The caller settles them, or puts them back.

        Args:
            max_events: how many at most, from 1 on.
            max_bytes: the maximum size of their frames in all, in bytes. One
                event comes even if it is larger.
        """
        self._ask()
        self._busy = True
        buffer = self._buffer
        try:
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError
            batch = None if buffer.has_line else await self._receive_batch()
            return buffer.take_many(batch, max_events, max_bytes)
        except trio.EndOfChannel:
            self._end()
        finally:
            self._busy = False

    @trio.lowlevel.enable_ki_protection
    async def _receive_batch(self) -> list[BufferedEvent]:
        """Receive what was put into the buffer together; empty if there are events in the line. Cancelled, it has taken nothing."""
        while True:
            try:
                batch = self._receive.receive_nowait()
            except trio.WouldBlock:
                # It takes with no checkpoint after it, or is handed a batch while it waits: never cancelled and taken.
                batch = await self._receive.receive()
            if self._closed:  # between being woken and running
                self._buffer.give_back(batch)
                raise trio.ClosedResourceError
            # Woken for the line, but another task was faster: wait again.
            if batch or self._buffer.has_line:
                return batch

    def _take(self) -> BufferedEvent:
        """Give the current event to a delivery, which settles it."""
        buffered, self._current = self._current, None
        self._owner = None
        assert buffered is not None
        return buffered

    def _end(self) -> NoReturn:
        fault = self._buffer.take_fault()
        if fault is not None:
            raise fault from fault.__cause__
        raise trio.EndOfChannel


@final
class Delivery:
    """An event in hand for a block. Made by `EventChannel.delivery`."""

    def __init__(self, channel: EventChannel) -> None:
        self._channel = channel
        self._taken: BufferedEvent | None = None

    @property
    def event(self) -> Event:
        """The event."""
        return self._require().event

    @property
    def attempt(self) -> int:
        """How often this process has handed it out, 1 the first time."""
        return self._require().attempt

    def _require(self) -> BufferedEvent:
        if self._taken is None:
            raise RuntimeError("a delivery has its event inside of its async with block only")
        return self._taken

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Delivery:
        if self._taken is not None:
            raise RuntimeError("a delivery can be entered once")
        await self._channel.receive()
        self._taken = self._channel._take()
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        buffered = self._require()
        if exc is None:
            self._channel._buffer.settle_taken(buffered)
        else:
            self._channel._buffer.put_back(buffered)
