"""The handles that a program receives events from: `EventChannel`, `Delivery` and `Batch`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, NoReturn, final

import trio

from .._checks import check_count, check_delay, refusal
from .._dead_letters import DeadLetter, DeadLetters, check_dead_letters
from .._events import Event
from .._position import Position
from .._redact import presentable
from ._buffer import Buffer, BufferedEvent, EventChannelStatistics

BATCH_BYTES: Final = 64 * 1024 * 1024
"""Maximum size of the events of a batch, in bytes, as `Limits.buffered_bytes` by default."""


@final
class EventChannel(trio.abc.ReceiveChannel[Event]):
    """Where a program receives its events: ``realtime.events``, and clones of it.

    *Asking for the next event settles the one before it* on the same handle,
    at once, before anything is awaited. So a plain ``async for`` settles each
    event when its turn of the loop is over. Leaving the loop settles nothing.
    An unsettled event is delivered again: to another handle when this one is
    closed, or to the next run. But a loop that is begun again on the same
    handle asks for the next event, and so settles the one whose turn failed:
    use `delivery` or `process` where failures are caught.

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
        self._given: dict[int, BufferedEvent] = {}
        """The events of deliveries that were not entered yet, by the identity of each event."""
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

    def delivery(self, *, dead_letters: DeadLetters | None = None) -> Delivery:
        """Receive an event for a block, and settle it at the block's end.

        If the block is left with an exception, `trio.Cancelled` included, the
        event is delivered again instead, to this or another handle: after a
        wait that grows with its attempts (``redelivery`` of `open_realtime`),
        during which other events are delivered. A task may hold several
        deliveries of one handle, and settle them in any order.

        Entering settles an event that `receive` returned before, and raises
        what `receive` raises.

        Example::

            async with events.delivery() as delivery:
                await handle(delivery.event)

        Args:
            dead_letters: where `Delivery.reject` puts the event.
        """
        return Delivery(self, None, check_dead_letters(dead_letters))

    def deliveries(self, *, dead_letters: DeadLetters | None = None) -> Deliveries:
        """Iterate over deliveries until the channel ends.

        Each turn of the loop has a `Delivery` with its event, to be entered
        in this or another task; see `delivery`.

        Example::

            async for delivery in events.deliveries(dead_letters=DeadLetterFile("dead.jsonl")):
                async with delivery:
                    if not known(delivery.event):
                        delivery.reject("not known")
                    elif not await sent(delivery.event):
                        delivery.retry(after=60)

        The loop raises what `receive` raises, except `trio.EndOfChannel`,
        which ends it.

        Args:
            dead_letters: where `Delivery.reject` puts the events.
        """
        return Deliveries(self, check_dead_letters(dead_letters))

    def batch(self, *, max_events: int = 100, max_bytes: int = BATCH_BYTES, within: float = 1.0) -> Batch:
        """Receive several events for a block, and settle all of them at the block's end.

        Entering waits for an event, and then until there are *max_events*,
        or for *within* seconds. The end of the channel does not drop what was
        collected: the next batch raises `trio.EndOfChannel`. If it is
        cancelled while it collects, no event is lost and none is settled. A
        batch costs one checkpoint, not one for each event.

        If the block is left with an exception, `trio.Cancelled` included, the
        events that `Batch.settle` has not settled are delivered again, in
        their order: after a wait that grows with their attempts, during which
        other events are delivered.

        Entering settles an event that `receive` returned before, and raises
        what `receive` raises.

        Example::

            while True:
                async with events.batch(max_events=500, within=0.2) as batch:
                    await insert_rows(batch.events)

        Args:
            max_events: maximum number of events, from 1 on. Default 100.
            max_bytes: maximum size of their frames in all, in bytes; one
                event comes even if it is larger. Default 64 MiB.
            within: maximum time from the first event to the block, in
                seconds; 0 takes what is buffered, `math.inf` waits until the
                batch is full. Default 1 s.

        Raises:
            ConfigurationError: an argument cannot be used.
        """
        check_count("max_events", max_events)
        check_count("max_bytes", max_bytes)
        check_delay("within", within, unlimited=True)
        return Batch(self, max_events, max_bytes, within)

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
        given = list(self._given.values())
        self._given.clear()
        self._buffer.put_back(given)
        buffered, self._current = self._current, None
        self._owner = None
        if buffered is not None:
            self._buffer.put_back_handed_out(buffered)
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
    async def _collect(self, max_events: int, max_bytes: int, within: float) -> list[BufferedEvent]:
        """Receive events until there are enough of them, or for *within* seconds after the first one."""
        collected = await self._receive_many(max_events, max_bytes)
        space = max_bytes - sum([one.event.size for one in collected])
        self._busy = True
        try:
            with trio.move_on_after(within):
                while (left := max_events - len(collected)) > 0:
                    batch = None if self._buffer.has_line else await self._receive_batch()
                    more = self._buffer.take_many(batch, left, space, any_size=False)
                    if not more:
                        break  # the next one is too large
                    space -= sum([one.event.size for one in more])
                    collected += more
        except trio.EndOfChannel:
            pass  # raised by the next call
        except BaseException:
            self._buffer.put_back(collected)
            raise
        finally:
            self._busy = False
        return collected

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

    @trio.lowlevel.enable_ki_protection
    async def _receive_one(self) -> BufferedEvent:
        """Receive an event that the caller settles."""
        await self.receive()
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
    """An event in hand for a block. Made by `EventChannel.delivery` and `EventChannel.deliveries`.

    The end of the block settles the event, unless `retry` or `reject` was
    called. A block that is left with an exception has the event delivered again.
    """

    def __init__(self, channel: EventChannel, given: BufferedEvent | None, dead_letters: DeadLetters | None) -> None:
        self._channel = channel
        self._buffer = channel._buffer
        self._taken = given
        self._dead_letters = dead_letters
        self._entered = self._left = False
        self._retry_after: float | None = None
        self._retries = False
        self._rejected: str | None = None

    def __repr__(self) -> str:
        if self._taken is None:
            return "<Delivery, without an event yet>"
        return f"<Delivery of {self._taken.event!r}, attempt {self._taken.attempt}>"

    @property
    def event(self) -> Event:
        """The event."""
        return self._require().event

    @property
    def attempt(self) -> int:
        """How often this process has handed it out, 1 the first time."""
        return self._require().attempt

    @property
    def position(self) -> Position:
        """What `Realtime.position` will be when the event is settled, for a transaction of the program's own.

        Raises:
            ValueError: other events are in hand, too; see `Realtime.position_after`.
        """
        return self._buffer.position_after([self._require().event])

    def retry(self, after: float | None = None) -> None:
        """Have the event delivered again when the block has ended, instead of settling it.

        The event stays unsettled, so that the position waits for it.

        Args:
            after: in how many seconds; None for a wait that grows with the
                attempts (``redelivery`` of `open_realtime`).

        Raises:
            ConfigurationError: *after* is not a finite number from 0 on.
            RuntimeError: the block was left, or not entered.
        """
        self._require_block()
        if after is not None:
            check_delay("after", after)
        self._retries, self._retry_after, self._rejected = True, after, None

    def reject(self, reason: str) -> None:
        """Have the event put into the dead letters at the end of the block, and settled then.

        The block's end raises what the dead letters raise; the event is
        delivered again in that case.

        Args:
            reason: why, as text.

        Raises:
            RuntimeError: there are no dead letters, or the block was left or not entered.
        """
        self._require_block()
        if not isinstance(reason, str):
            raise refusal("reason", "a string", reason)
        if self._dead_letters is None:
            raise RuntimeError("reject() needs dead letters: pass dead_letters= to delivery() or deliveries()")
        self._rejected, self._retries = reason, False

    def _require(self) -> BufferedEvent:
        if self._taken is None:
            raise RuntimeError("a delivery has its event inside of its async with block only")
        return self._taken

    def _require_block(self) -> None:
        if not self._entered or self._left:
            raise RuntimeError("retry() and reject() belong inside of the delivery's async with block")

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Delivery:
        if self._entered:
            raise RuntimeError("a delivery can be entered once")
        if self._taken is None:
            self._taken = await self._channel._receive_one()
        else:
            # Where the loop has received it, there was a checkpoint, too; but this may be another task.
            await trio.lowlevel.checkpoint()
            if self._channel._given.pop(id(self._taken), None) is None:
                raise trio.ClosedResourceError  # and put back
        self._entered = True
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        taken = self._require()
        self._left = True
        if exc is not None or self._retries:
            self._buffer.retry([taken], self._retry_after)
        elif self._rejected is not None:
            await self._put_aside(taken, self._rejected)  # noqa: ASYNC102  # a part of the block: cancelled as the block is
        else:
            self._buffer.settle_taken(taken)

    async def _put_aside(self, taken: BufferedEvent, reason: str) -> None:
        assert self._dead_letters is not None
        letter = DeadLetter(event=taken.event, attempts=taken.attempt, reason=reason, failed_at=datetime.now(UTC))
        try:
            await self._dead_letters.add(letter)
        except BaseException:
            self._buffer.retry([taken])
            raise
        self._buffer.dead += 1
        self._buffer.settle_taken(taken)


@final
class Deliveries:
    """The deliveries of a channel, for ``async for``. Made by `EventChannel.deliveries`."""

    def __init__(self, channel: EventChannel, dead_letters: DeadLetters | None) -> None:
        self._channel = channel
        self._dead_letters = dead_letters

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    @trio.lowlevel.enable_ki_protection
    async def __anext__(self) -> Delivery:
        try:
            taken = await self._channel._receive_one()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        delivery = Delivery(self._channel, taken, self._dead_letters)
        # Until it is entered, closing the handle gives the event to another one.
        self._channel._given[id(taken)] = taken
        return delivery


@final
class Batch:
    """Events in hand for a block. Made by `EventChannel.batch`.

    Iterating over it gives its events.
    """

    def __init__(self, channel: EventChannel, max_events: int, max_bytes: int, within: float) -> None:
        self._channel = channel
        self._limits = max_events, max_bytes, within
        self._taken: list[BufferedEvent] | None = None
        self._events: tuple[Event, ...] = ()
        self._unsettled: dict[str, BufferedEvent] = {}
        """By event id, in order."""
        self._left = False

    def __repr__(self) -> str:
        if self._taken is None:
            return "<Batch, without events yet>"
        return f"<Batch of {len(self._taken)} events, {len(self._unsettled)} unsettled>"

    @property
    def events(self) -> tuple[Event, ...]:
        """The events, in order, those that `settle` has settled included. At least one."""
        self._require()
        return self._events

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    @property
    def attempt(self) -> int:
        """How often this process has handed out the event among them that failed most often, 1 the first time."""
        return max([one.attempt for one in self._require()])

    @property
    def position(self) -> Position:
        """What `Realtime.position` will be when the batch is settled, for a transaction of the program's own.

        Raises:
            ValueError: other events are in hand, too, or all of these are
                settled; see `Realtime.position_after`.
        """
        self._require()
        if not self._unsettled:
            raise ValueError("every event of the batch is settled; Realtime.position is the position after it")
        return self._channel._buffer.position_after([one.event for one in self._unsettled.values()])

    @trio.lowlevel.enable_ki_protection
    def settle(self, *events: Event) -> None:
        """Settle some of the events now. If the block fails, only the others are delivered again.

        Settling one again changes nothing.

        Raises:
            ValueError: one is not of this batch; then none was settled.
            RuntimeError: the block was left, or not entered.
        """
        known = {one.event.id for one in self._require()}
        if self._left:
            raise RuntimeError("settle() belongs inside of the batch's async with block")
        for event in events:
            if event.id not in known:
                raise ValueError(f"event {presentable(event.id, 80)} is not of this batch")
        chosen = [self._unsettled.pop(event.id) for event in events if event.id in self._unsettled]
        self._channel._buffer.settle_many(chosen)

    def _require(self) -> list[BufferedEvent]:
        if self._taken is None:
            raise RuntimeError("a batch has its events inside of its async with block only")
        return self._taken

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Batch:
        if self._taken is not None:
            raise RuntimeError("a batch can be entered once")
        self._taken = await self._channel._collect(*self._limits)
        self._events = tuple([one.event for one in self._taken])
        self._unsettled = {one.event.id: one for one in self._taken}
        return self

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._require()
        self._left = True
        rest = list(self._unsettled.values())
        self._unsettled.clear()
        if exc is None:
            self._channel._buffer.settle_many(rest)
        else:
            self._channel._buffer.retry(rest)
