"""`process`: a loop over events with several workers, order within a key, retries and dead letters."""

from __future__ import annotations

import logging
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from datetime import UTC, datetime
from typing import Final, final

import attrs
import trio

from .._backoff import jitter
from .._checks import check_callable, check_count, check_instance, refusal
from .._dead_letters import DeadLetter, DeadLetters, check_dead_letters, reason_of
from .._errors import ConfigurationError, KadoaError
from .._events import Event
from .._exits import hidden_nursery
from .._redact import presentable
from .._settings import REDELIVERY, RetryPolicy
from ._buffer import BufferedEvent
from ._channel import EventChannel
from ._delays import Delays
from ._reporter import RateLimit

LOOK_AHEAD: Final = 1_000
"""Maximum number of events that are taken from the channel and not settled, by default; as `Limits.buffered_events`."""
_AT_ONCE: Final = 128
"""Maximum number of events that are taken between two checkpoints."""
_LOW_WATER: Final = 0.8
"""While all workers are busy, more is received when what was taken is down to this share of the maximum."""
_LOOK_INTERVAL: Final = 10.0
"""Minimum time between two looks for a key that holds up the others, in seconds."""

_log = logging.getLogger("kadoa_trio.process")
_RNG: Final[random.Random] = random.SystemRandom()


@final
@attrs.frozen(kw_only=True)
class FailedAttempt:
    """One attempt of `process` to handle an event has failed."""

    event: Event
    attempt: int
    """The number of this attempt for the event, from 1."""
    error: Exception
    """What the handler has raised."""
    delay: float | None
    """Seconds until the next attempt; None if there is none in this run."""
    dead: bool = False
    """Whether the event is a dead letter now. If it is none and there is no delay, the next run receives it."""

    def __str__(self) -> str:
        event = f"{presentable(self.event.type, 80)} {presentable(self.event.id, 80)}"
        if self.delay is not None:
            then = f"again in {self.delay:.2f} s"
        else:
            then = "a dead letter now" if self.dead else "left to the next run, because the channel has ended"
        return f"{event}: attempt {self.attempt} failed ({presentable(reason_of(self.error), 300)}); {then}"


@final
@attrs.frozen(kw_only=True)
class Processed:
    """What `process` has done."""

    handled: int
    """Events that the handler has handled."""
    dead: int
    """Events that were put into the dead letters."""
    failures: int
    """Attempts that failed."""
    unsettled: int
    """Events that were taken and not handled when the channel ended. The next run receives them again."""


async def process(
    events: EventChannel,
    handle: Callable[[Event], Awaitable[object]],
    *,
    workers: int = 8,
    key: Callable[[Event], Hashable] | None = None,
    retry: RetryPolicy | None = None,
    max_attempts: int | None = None,
    dead_letters: DeadLetters | None = None,
    look_ahead: int = LOOK_AHEAD,
    on_failure: Callable[[FailedAttempt], None] | None = None,
) -> Processed:
    """Handle every event of a channel in several tasks, until the channel ends and all that can be settled is settled.

    An event is settled when ``await handle(event)`` returns. If it raises an
    `Exception`, the event is handled again later, while other events go on,
    and is a dead letter after *max_attempts*. The log (``kadoa_trio.process``)
    has a warning for it, maximum one each 10 s after the first five.

    With a *key*, events of one key are handled one after the other and in
    their order, those of different keys in parallel. While an event waits
    for its next attempt, the later ones of its key wait, too. They all count
    as taken. When *look_ahead* events are taken, nothing more is received
    until one of them is settled. So a key that is slow or always fails holds
    up all others when it has that many events, and the log says so. Give
    *max_attempts* and *dead_letters* where an event may fail for ever. Two
    calls of `process` on one stream know nothing of each other's keys.

    When the channel ends (`Realtime.stop`, a fatal fault), the events that
    were taken are handled. An event that fails then, or waits for its next
    attempt, stays unsettled, with the later ones of its key: the next run
    receives them again. ``stop(retry_within=...)`` gives them time.

    If it is cancelled, or leaves with an exception, the events that were not
    handled go back to the channel, for other handles; the one in hand counts
    as an attempt. It does not close *events*.

    Example::

        async with open_realtime(cursor_store="positions.db") as realtime:
            await process(
                realtime.events,
                notify,
                key=lambda event: event.workflow_id,
                max_attempts=5,
                dead_letters=DeadLetterFile("dead.jsonl"),
            )

    Args:
        events: the channel. No other task may use this handle meanwhile.
        handle: an async function that takes an `Event`.
        workers: maximum number of events that are handled at once. Default 8.
        key: a function that gives the key of an event, such as its
            `Event.workflow_id`; None for no order. It must be quick, and not raise.
        retry: when a failed event is handled again; default
            ``RetryPolicy(initial=0.1)``: up to 0.1 s after the first failure,
            up to 30 s after many, at random ("full jitter").
        max_attempts: attempts before an event is a dead letter; None for no maximum.
        dead_letters: where such events go; required with *max_attempts*.
        look_ahead: maximum number of events that are taken and not settled,
            from *workers* on. Default 1,000. Their frames have maximum
            `Limits.buffered_bytes` in all, or one event may be larger.
        on_failure: called after each failed attempt, in place of the log. It
            must be quick, and not raise.

    Returns:
        How many events were handled, and how many were not.

    Raises:
        ConfigurationError: an argument cannot be used.
        KadoaError: the fault that ended the client, when all that was taken is handled.
        trio.BusyResourceError: another task uses the handle.
        trio.ClosedResourceError: the handle was closed.

    What *key*, *on_failure* or *dead_letters* raises, and what *handle*
    raises that is no `Exception` (`KeyboardInterrupt`, `trio.Cancelled`), is
    raised as it is.
    """
    if not isinstance(events, EventChannel):
        raise refusal("events", "an EventChannel, such as realtime.events", events)
    if not callable(handle):
        raise refusal("handle", "an async function that takes an Event", handle)
    check_count("workers", workers)
    check_callable("key", key)
    check_instance("retry", retry, RetryPolicy)
    check_dead_letters(dead_letters)
    check_count("look_ahead", look_ahead)
    check_callable("on_failure", on_failure)
    if look_ahead < workers:
        raise ConfigurationError(f"look_ahead ({look_ahead}) must be at least workers ({workers})")
    if max_attempts is not None:
        check_count("max_attempts", max_attempts)
        if dead_letters is None:
            raise ConfigurationError("max_attempts needs dead_letters, where events go that could not be handled")
    loop = _Loop(
        events,
        handle,
        key=key,
        policy=REDELIVERY if retry is None else retry,
        max_attempts=max_attempts,
        dead_letters=dead_letters,
        look_ahead=look_ahead,
        on_failure=on_failure,
    )
    return await loop.run(workers)


@trio.lowlevel.disable_ki_protection
async def _call(handle: Callable[[Event], Awaitable[object]], event: Event) -> None:
    # Ctrl-C must be able to interrupt the program's own code.
    await handle(event)


class _Lane:
    """The events of one key, in order. The first one is in work, ready, or waits for its next attempt."""

    __slots__ = ("events", "key")

    def __init__(self, key: Hashable, first: BufferedEvent) -> None:
        self.key = key
        self.events = deque([first])


class _Loop:
    def __init__(
        self,
        channel: EventChannel,
        handle: Callable[[Event], Awaitable[object]],
        *,
        key: Callable[[Event], Hashable] | None,
        policy: RetryPolicy,
        max_attempts: int | None,
        dead_letters: DeadLetters | None,
        look_ahead: int,
        on_failure: Callable[[FailedAttempt], None] | None,
    ) -> None:
        self._channel = channel
        self._buffer = channel._buffer
        self._handle = handle
        self._key = key
        self._policy = policy
        self._max_attempts = max_attempts
        self._dead_letters = dead_letters
        self._look_ahead = look_ahead
        self._on_failure = on_failure
        self._taken: dict[str, BufferedEvent] = {}
        """Every event that was taken and is not settled, by its id, in order."""
        self._bytes = 0
        self._lanes: dict[Hashable, _Lane] = {}
        self._ready: deque[_Lane] = deque()
        """Whose first event can be handled now."""
        self._delays: Delays[_Lane] = Delays(self._make_ready)
        self._idle = trio.lowlevel.ParkingLot()
        """The workers that have nothing to do."""
        self._space = trio.lowlevel.ParkingLot()
        """The task that receives, while there is no space, and at the end."""
        self._in_work: set[str] = set()
        self._ended = False
        self._failures_logged = RateLimit()
        self._next_look = -math.inf
        self._handled = self._dead = self._failures = self._left = 0

    @trio.lowlevel.enable_ki_protection
    async def run(self, workers: int) -> Processed:
        fault: KadoaError | None = None
        try:
            async with hidden_nursery("process() ends") as nursery:
                self._delays.start(nursery)
                for _ in range(workers):
                    nursery.start_soon(self._work)
                try:
                    await self._receive()
                except trio.EndOfChannel:
                    pass
                except KadoaError as exc:
                    fault = exc
                self._end()
                while self._taken:
                    await self._space.park()
        except BaseException:
            if fault is not None:
                self._buffer.give_back_fault(fault)
            raise
        finally:
            self._put_back()
        if fault is not None:
            raise fault from fault.__cause__
        return Processed(handled=self._handled, dead=self._dead, failures=self._failures, unsettled=self._left)

    # ---- receiving -----------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        max_bytes = self._buffer.max_bytes
        while True:
            while (free := self._look_ahead - len(self._taken)) <= 0 or self._bytes >= max_bytes:
                self._log_full()
                await self._space.park()
            batch = await self._channel._receive_many(min(free, _AT_ONCE), max_bytes - self._bytes)
            # All of them first, so that a key function that raises loses none.
            for buffered in batch:
                self._taken[buffered.event.id] = buffered
                self._bytes += buffered.event.size
            if self._key is None:
                self._ready.extend([_Lane(None, buffered) for buffered in batch])
            else:
                for buffered in batch:
                    self._add_to_lane(self._key(buffered.event), buffered)
            self._idle.unpark(count=len(self._ready))

    def _add_to_lane(self, key: Hashable, buffered: BufferedEvent) -> None:
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key, buffered)
            self._ready.append(lane)
        else:
            lane.events.append(buffered)

    def _log_full(self) -> None:
        now = trio.current_time()
        if now < self._next_look or not self._lanes:
            return
        self._next_look = now + _LOOK_INTERVAL
        longest = max(self._lanes.values(), key=lambda lane: len(lane.events))
        if len(longest.events) * 2 > len(self._taken):
            _log.warning(
                "the key %s has %d of the %d events that are taken and not settled; nothing more is received until "
                "one is settled, because of look_ahead=%d and Limits.buffered_bytes",
                presentable(repr(longest.key), 80),
                len(longest.events),
                len(self._taken),
                self._look_ahead,
            )

    # ---- handling ------------------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def _work(self) -> None:
        while True:
            # One of both for each event, so that no handler can hold up the other tasks for long.
            if self._ready:
                await trio.lowlevel.checkpoint()
            else:
                # The task that receives may wait for fewer taken events, which must not leave this worker without any.
                self._space.unpark_all()
                await self._idle.park()
            if self._ready:
                await self._attempt(self._ready.popleft())

    async def _attempt(self, lane: _Lane) -> None:
        buffered = lane.events[0]
        self._in_work.add(buffered.event.id)
        try:
            await _call(self._handle, buffered.event)
        except Exception as exc:
            await self._failed(lane, buffered, exc)
        else:
            self._handled += 1
            self._settle(lane, buffered)
        # Not where anything else was raised: what is in work then was handed out.
        self._in_work.discard(buffered.event.id)

    async def _failed(self, lane: _Lane, buffered: BufferedEvent, error: Exception) -> None:
        self._failures += 1
        event, attempt = buffered.event, buffered.attempt
        if self._max_attempts is not None and attempt >= self._max_attempts:
            # If the dead letters raise, the attempt is counted where the event is put back.
            assert self._dead_letters is not None
            letter = DeadLetter(
                event=event, attempts=attempt, reason=reason_of(error), failed_at=datetime.now(UTC), error=error
            )
            await self._dead_letters.add(letter)
            self._dead += 1
            self._buffer.dead += 1
            self._settle(lane, buffered)
            self._report(FailedAttempt(event=event, attempt=attempt, error=error, delay=None, dead=True))
            return
        buffered.attempt += 1
        self._in_work.discard(event.id)  # so that the attempt is counted once if on_failure raises
        if self._ended:
            self._leave(lane)
            self._report(FailedAttempt(event=event, attempt=attempt, error=error, delay=None))
        else:
            delay = jitter(self._policy, attempt, _RNG)
            self._buffer.redelivered += 1
            self._delays.add([lane], trio.current_time() + delay)
            self._report(FailedAttempt(event=event, attempt=attempt, error=error, delay=delay))

    def _report(self, failure: FailedAttempt) -> None:
        if self._on_failure is not None:
            self._on_failure(failure)
            return
        suppressed = self._failures_logged.admit(trio.current_time())
        if suppressed is not None:
            more = f" ({suppressed} more since the last such line)" if suppressed else ""
            _log.warning("%s%s", failure, more)

    def _settle(self, lane: _Lane, buffered: BufferedEvent) -> None:
        del self._taken[buffered.event.id]
        self._bytes -= buffered.event.size
        self._buffer.settle_taken(buffered)
        lane.events.popleft()
        if lane.events:
            self._ready.append(lane)
            self._idle.unpark()
        elif self._key is not None:
            del self._lanes[lane.key]
        self._wake_receiver()

    def _make_ready(self, lanes: list[_Lane]) -> None:
        self._ready.extend(lanes)
        self._idle.unpark(count=len(lanes))

    def _wake_receiver(self) -> None:
        """Wake the task that receives if there is reason to: not for each event while the workers have enough to do."""
        if self._ended:
            if not self._taken:
                self._space.unpark_all()
        elif self._space and (self._idle or len(self._taken) <= _LOW_WATER * self._look_ahead):
            self._space.unpark_all()

    # ---- the end -------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Handle what was taken, and leave to the next run what would have to wait."""
        self._ended = True
        for lane in self._delays.clear():
            self._leave(lane)

    def _leave(self, lane: _Lane) -> None:
        # All of the key, because the others must not be handled before this one.
        for buffered in lane.events:
            del self._taken[buffered.event.id]
            self._bytes -= buffered.event.size
        self._left += len(lane.events)
        self._buffer.retry(list(lane.events))  # which gives them up, because the channel has ended
        if self._key is not None:
            del self._lanes[lane.key]
        self._wake_receiver()

    def _put_back(self) -> None:
        """Give what was not handled to other handles of the channel."""
        back = list(self._taken.values())
        for buffered in back:
            if buffered.event.id in self._in_work:
                buffered.attempt += 1
                self._buffer.redelivered += 1
        self._buffer.put_back(back)
        self._taken.clear()
