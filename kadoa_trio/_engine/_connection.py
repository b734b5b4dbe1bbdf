"""One connection, from its token to its end: token, handshake, subscribe, read, end.

Its phases are defined in `_phase`. A connection reads until it ends; events go
to the admission, everything else into the ledger and the notices. It calls no
other connection: the supervisor does that.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Final

import attrs
import trio

from .._errors import AttemptError
from .._events import Event
from .._net._api import KadoaApi
from .._net._socket import End, EndReason, Socket, SocketEnded, open_socket
from .._net._wire import Draining as DrainNotice
from .._net._wire import Heartbeat, Ignored, decode, subscribe
from .._settings import Settings
from ..notices import (
    Draining,
    EventLoopBlocked,
    FrameIgnored,
    Live,
    Lost,
    Replaced,
    Stable,
    Subscribed,
)
from ._admission import Admission
from ._cursor_check import Hold
from ._ledger import Ledger, Moment
from ._phase import Phase, check_transition
from ._reporter import Reporter
from ._team import TeamCheck

MIN_ADVICE, MAX_ADVICE, DEFAULT_ADVICE = 0.1, 30.0, 1.0
"""Minimum and maximum of a drain notice's ``retryAfterMs``, and what replaces a missing or unreadable one, in seconds.

A notice with ``1e12`` must not keep the client from reconnecting, and one with 0 must not make it reconnect at once.
"""
DRAIN_READ = 0.25
"""How long a retiring connection is read for what it has already received, in seconds."""
MESSAGE_ALLOWANCE = 10.0
"""A message that is still arriving delays the heartbeat timer for at most this many times `Timeouts.heartbeat`.

At 30 s that is 300 s: 64 MiB at 2 Mbit/s take 268 s.
"""
_GOING_AWAY: Final = 1001
_ADVICE_JITTER: Final = 0.1
_AGE_JITTER: Final = 0.1
_PROGRESS: Final = 1024
# Moving a deadline costs as much as decoding a small frame, so that it is moved a little further, and less often.
_HEARTBEAT_SLACK: Final = 0.01
# When the heartbeat timer expires, the socket is read for this many seconds more: the event loop may have been blocked,
# and what arrived meanwhile waits to be read.
_LAST_LOOK: Final = 0.25
# A timer that fires this many seconds late shows that the event loop was blocked.
_BLOCKED: Final = 1.0
# A frame that was waited for at least this many seconds was not there when it was asked for. While frames come without
# a wait, the reader may be behind; but it has caught up after this many seconds of reading.
_WAITED: Final = 0.05
_CATCH_UP: Final = 2.0
_LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)
# How often a connection that is not trusted looks whether its deliveries can be relied on, as a part of stable_after.
_LOOKS: Final = 4


@attrs.frozen(eq=False)
class ConnectionContext:
    """What every connection of a client works with."""

    settings: Settings
    http: KadoaApi
    ledger: Ledger
    admission: Admission
    reporter: Reporter
    team: TeamCheck
    rng: random.Random


class Connection:
    """A connection, from its token to its end.

    Args:
        context: what every connection works with.
        generation: its number.
        promised: False if the server announced that it does not resume.
        hold: where its events go if it is a probe, which subscribes without
            the cursor.
        on_live: called when it becomes live; no checkpoint.
    """

    # Without a dict for each, which would take 2 KB.
    __slots__ = (
        "_asked",
        "_caught_up",
        "_changed",
        "_context",
        "_entered",
        "_far_enough",
        "_fault",
        "_heartbeat",
        "_hold",
        "_idle",
        "_last_frame",
        "_life",
        "_not_before",
        "_on_live",
        "_pauses",
        "_progress",
        "_promised",
        "_received_before",
        "_resumed",
        "_retire_by_force",
        "_retire_left",
        "_retired_unread",
        "_stopping",
        "_wait_scope",
        "_waited",
        "_waiting_since",
        "_why_retired",
        "cursor",
        "draining",
        "end",
        "events",
        "generation",
        "hold_is_full",
        "phase",
        "renew_at",
        "replaced_by",
        "replacement_due",
        "resume_supported",
    )

    def __init__(
        self,
        context: ConnectionContext,
        generation: int,
        *,
        promised: bool,
        hold: Hold | None,
        on_live: Callable[[], None],
    ) -> None:
        self._context = context
        self.generation = generation
        self._promised = promised
        self._hold = hold
        self._on_live = on_live

        self.phase: Phase = Phase.TOKEN
        self._entered: dict[Phase, float] = {}
        self._changed = trio.lowlevel.ParkingLot()
        self.cursor: str | None = None
        """The cursor that it subscribed with."""
        self.replaced_by: int | None = None
        """The generation of its replacement, once there is one."""
        self.draining: bool = False
        """Whether a drain notice has come."""
        self.replacement_due: float = math.inf
        """When its replacement is to be opened, on Trio's clock; set by a drain notice."""
        self.renew_at: float = math.inf
        """When it has reached its maximum age, on Trio's clock."""
        self.end: End | None = None
        self.resume_supported: bool | None = None
        """What its drain notice said; None for nothing."""
        self.events: int = 0
        """Events that it delivered, the repeated and the held ones included."""
        self.hold_is_full: bool = False
        """Whether it has delivered, as a probe, all that may be held."""
        self._received_before = math.inf

        self._life = trio.CancelScope()
        self._heartbeat = trio.CancelScope()
        self._why_retired = ""
        self._retire_left: float | None = None
        self._retire_by_force = False
        self._retired_unread = False
        self._waited = 0.0
        self._pauses = 0
        self._waiting_since = 0.0
        self._resumed = trio.Event()
        # The socket's reader handles messages in its own task: whether it does, what it waits in, and whether it must end.
        self._idle = trio.Event()
        self._idle.set()
        self._wait_scope = trio.CancelScope()
        self._stopping = False
        self._fault: Exception | None = None
        self._last_frame = 0.0
        # Until this time a frame need not move the heartbeat's deadline.
        self._far_enough = 0.0
        self._progress = 0
        # When the next frame was asked for; a time before which the last one cannot have come; and the next such time.
        self._asked: Moment = (_LONG_AGO, 0.0)
        self._not_before: Moment = (_LONG_AGO, 0.0)
        self._caught_up: Moment = (_LONG_AGO, 0.0)

    def __repr__(self) -> str:
        return f"<Connection {self.generation}, {self.end or 'open'}>"

    # ---- from outside ------------------------------------------------------------------------------------------

    def retire(self, why: str, *, after: float, force: bool = False) -> None:
        """End it after a time, in seconds, when what it has already received was read.

        Time in which it waits for its own program does not count, or a slow
        program would lose what waits to be read; except with *force*.
        """
        self._why_retired = why
        self._retire_left = None
        if self._pauses and not force:
            self._retire_left = after + DRAIN_READ
        else:
            self._life.deadline = trio.current_time() + after + DRAIN_READ
        self._retire_by_force = force

    def cancel_retirement(self) -> None:
        """Cancel a retirement that is not due yet; not one by force, which makes place for the next connection."""
        if self._retire_by_force:
            return
        self._why_retired = ""
        self._retire_left = None
        self._life.deadline = math.inf

    @property
    def retiring(self) -> bool:
        """Whether `retire` was called."""
        return bool(self._why_retired)

    # ---- phases ------------------------------------------------------------------------------------------------

    def _enter(self, phase: Phase) -> None:
        check_transition(self.phase, phase)
        self.phase = phase
        self._entered[phase] = trio.current_time()
        self._changed.unpark_all()

    def was(self, phase: Phase) -> bool:
        """Return whether it is in a phase, or has been."""
        return phase in self._entered

    @property
    def ended(self) -> bool:
        """Whether it is not read any more."""
        return self.phase >= Phase.ENDED

    @property
    def is_live(self) -> bool:
        """Whether a frame has come, and it is still read."""
        return Phase.LIVE <= self.phase < Phase.ENDED

    @property
    def life(self) -> float:
        """How long it has been live, in seconds; until its end, if it has ended."""
        if not self.was(Phase.LIVE):
            return 0.0
        until = self._entered.get(Phase.ENDED)
        return (trio.current_time() if until is None else until) - self._entered[Phase.LIVE]

    async def wait_phase(self, phase: Phase) -> None:
        """Wait until it enters a phase or a later one. A checkpoint."""
        await self.wait_until(lambda: self.phase >= phase)

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition of its phase, its drain notice, its first event or its hold. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while not condition():
            await self._changed.park()

    # ---- life --------------------------------------------------------------------------------------------------

    @property
    def made_progress(self) -> bool:
        """Whether it delivered events while new ones came, on it or on another one."""
        return bool(self.events) and self._context.admission.received > self._received_before

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open it, report it started when the subscription is sent, and serve it until it ends.

        Raises:
            AttemptError, AuthenticationError, RequestRefusedError,
                ConfigurationError, CursorStoreError: before it has started. Afterwards nothing: `end` says how it ended.
        """
        context = self._context
        settings = context.settings
        mark = context.ledger.mark(context.reporter.moment())
        try:
            token = await context.http.fetch_token()
            await context.team.check(token.team_id)
            self._enter(Phase.HANDSHAKE)
            async with open_socket(
                settings.endpoints.websocket,
                token=token.access_token,
                settings=settings,
                on_bytes=self._on_bytes,
                wall_clock=context.reporter.wall_clock,
                also=context.http.secrets,
            ) as socket:
                self.cursor = context.ledger.open(
                    self.generation,
                    context.reporter.moment(),
                    mark=mark,
                    promised=self._promised,
                    with_cursor=self._hold is None,
                )
                self._received_before = context.admission.received
                age = settings.timeouts.max_age * context.rng.uniform(1 - _AGE_JITTER, 1)
                self.renew_at = trio.current_time() + age
                self._enter(Phase.SUBSCRIBING)
                try:
                    await self._subscribe(socket, token.team_id)
                    self._enter(Phase.SUBSCRIBED)
                    context.reporter.publish(Subscribed(generation=self.generation, cursor=self.cursor))
                    task_status.started()
                    self.end = End(EndReason.LEFT)
                    self.end = await self._serve(socket)
                finally:
                    # No checkpoint here: tasks waiting for the end must see the ledger updated.
                    self._enter(Phase.ENDED)
                    gaps = context.ledger.ended(self.generation, context.reporter.moment(), unread=self._retired_unread)
                    context.admission.report_gaps(gaps)
                    if self.end is not None and self.end.reason is not EndReason.LEFT:
                        self._report_end(self.end)
        finally:
            self._enter(Phase.CLOSED)

    async def _subscribe(self, socket: Socket, team_id: str) -> None:
        timeout = self._context.settings.timeouts.handshake
        with trio.move_on_after(timeout):
            try:
                await socket.send(subscribe(team_id, self.cursor))
            except SocketEnded as exc:
                reason = exc.end
            else:
                return
            raise AttemptError("subscribe", str(reason))
        raise AttemptError("subscribe", f"could not be sent within {timeout:g} s")

    async def _serve(self, socket: Socket) -> End:
        end: End | None = None
        try:
            with self._life:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch)
                    end = await self._read_while_alive(socket)
                    nursery.cancel_scope.cancel(reason="the connection has ended")
        finally:
            # The socket's reader calls `_handle` in its own task: when the connection has ended, it must not.
            socket.stop()
            self._stopping = True
            self._wait_scope.cancel(reason="the connection has ended")
            with trio.CancelScope(shield=True):
                await self._idle.wait()  # noqa: ASYNC102  # shielded, and over at the next step of the reader
        if self._fault is not None:
            raise self._fault
        if end is not None:
            return end
        return End(EndReason.RETIRED, detail=self._why_retired)

    async def _read_while_alive(self, socket: Socket) -> End:
        """Read until the connection ends, or no frame has come within `Timeouts.heartbeat`."""
        timeout = self._context.settings.timeouts.heartbeat
        self._asked = self._not_before = self._caught_up = self._context.reporter.moment()
        self._last_frame = self._asked[1]
        self._heartbeat.deadline = self._last_frame + timeout
        looked_after: float | None = None
        while True:
            with self._heartbeat:
                return await socket.read(self._handle)
            if self._last_frame == looked_after:
                return End(EndReason.SILENT, detail=f"{timeout:g} s")
            # Expired. The event loop may have been blocked: look at the socket once before the connection is given up.
            now = trio.current_time()
            late = now - self._heartbeat.deadline
            if late >= _BLOCKED:
                self._context.reporter.publish(EventLoopBlocked(generation=self.generation, seconds=late))
            looked_after = self._last_frame
            self._far_enough = 0.0
            self._heartbeat = trio.CancelScope(deadline=now + _LAST_LOOK)

    @trio.lowlevel.enable_ki_protection
    async def _handle(self, messages: list[str | bytes]) -> None:
        """Handle messages that have arrived together. Called by the socket, mostly in the task of its reader."""
        self._idle = trio.Event()
        try:
            await self._handle_each(messages)
        except Exception as exc:
            # A bug. It must not look like one of the server's: `_serve` raises it.
            self._fault = exc
            self._stopping = True
            self._life.cancel(reason="a message could not be handled")
        finally:
            self._idle.set()

    async def _handle_each(self, messages: list[str | bytes]) -> None:
        moment = self._context.reporter.moment()
        self._note_life(moment, messages)
        events: list[Event] = []
        messages.reverse()
        while messages:
            # Taken out, so that a large message is not kept for the time that its event waits.
            frame = decode(messages.pop(), moment[0])
            if isinstance(frame, Event):
                events.append(frame)
                continue
            if events:
                await self._take(events, moment)
                if self._stopping:
                    return
                moment = self._context.reporter.moment()
            self._handle_other(frame, moment)
        if events:
            await self._take(events, moment)

    def _handle_other(self, frame: Heartbeat | DrainNotice | Ignored, moment: Moment) -> None:
        if isinstance(frame, DrainNotice):
            self._drain(frame, moment[1])
        elif isinstance(frame, Ignored):
            self._context.reporter.publish(
                FrameIgnored(generation=self.generation, kind=frame.kind, why=frame.why, type=frame.type)
            )

    def _note_life(self, moment: Moment, messages: list[str | bytes]) -> None:
        """Record when messages came, and move the heartbeat timer."""
        now = moment[1]
        if now - self._asked[1] >= _WAITED:
            self._not_before = self._caught_up = self._asked
        elif now - self._caught_up[1] >= _CATCH_UP:
            self._not_before, self._caught_up = self._caught_up, moment
        self._asked = moment
        self._context.ledger.last_life = self._not_before[0]
        self._progress = 0
        if not any(messages):
            return  # an empty message is no sign of life
        self._last_frame = now
        self._context.reporter.last_frame_at = moment[0]
        if now > self._far_enough:
            timeout = self._context.settings.timeouts.heartbeat
            slack = timeout * _HEARTBEAT_SLACK
            self._heartbeat.deadline = now + timeout + slack
            self._far_enough = now + slack
        if self.phase is Phase.SUBSCRIBED:
            self._become_live(moment)

    def _become_live(self, now: Moment) -> None:
        self._context.ledger.live(self.generation, now)
        self._enter(Phase.LIVE)
        reporter = self._context.reporter
        older = tuple(c.generation for c in reporter.status.connections if c.generation < self.generation)
        reporter.publish(Live(generation=self.generation, replaces=older))
        self._on_live()

    def _drain(self, notice: DrainNotice, now: float) -> None:
        if notice.resume_supported is False:
            self._withdraw_promise()
        if self.draining:
            return  # Ignore repeats: they must not postpone the replacement.
        advice = DEFAULT_ADVICE if notice.advice is None else min(max(notice.advice, MIN_ADVICE), MAX_ADVICE)
        # Jitter only upwards: never reconnect before the server's delay.
        delay = min(advice * (1 + self._context.rng.uniform(0, _ADVICE_JITTER)), MAX_ADVICE)
        self.replacement_due = now + delay
        self.draining = True
        self._changed.unpark_all()
        self._context.reporter.publish(
            Draining(
                generation=self.generation,
                delay=delay if self.replaced_by is None else 0.0,
                deadline=notice.deadline,
                resume_supported=notice.resume_supported,
            )
        )

    def _withdraw_promise(self) -> None:
        self.resume_supported = False
        self._context.ledger.withdraw_promise()
        self._context.admission.position_changed()  # the position says it, too: have it saved

    def _report_end(self, end: End) -> None:
        reporter = self._context.reporter
        if self.replaced_by is not None:
            reporter.publish(Replaced(generation=self.generation, by=self.replaced_by, how=str(end)))
        else:
            expected = self.draining and end.reason is EndReason.CLOSED and end.code == _GOING_AWAY
            reporter.publish(Lost(generation=self.generation, how=str(end), expected=expected))

    # ---- events ------------------------------------------------------------------------------------------------

    async def _take(self, events: list[Event], moment: Moment) -> None:
        """Take events that have arrived together out of a list, each as soon as there is space for it."""
        context, hold = self._context, self._hold
        if not self.events:
            self._changed.unpark_all()
        self.events += len(events)
        while events and not self._stopping:
            if hold is not None and not hold.admitted.is_set():
                await self._hold_back(events.pop(0), hold)
            else:
                del events[: context.admission.admit_many(events, self.generation, moment, self._not_before)]
                if events:
                    await self._admit(events.pop(0))
                    moment = context.reporter.moment()

    async def _admit(self, event: Event) -> None:
        """Admit an event as soon as there is space."""
        arrived = self._not_before
        while not self._stopping:
            await self._wait(functools.partial(self._context.admission.wait_space, event))
            if self._try_admit(event, self._context.reporter.moment(), arrived):
                return

    def _try_admit(self, event: Event, now: Moment, arrived: Moment) -> bool:
        return self._context.admission.try_admit(event, self.generation, now, arrived)

    async def _hold_back(self, event: Event, hold: Hold) -> None:
        """Hold an event of a probe; if the hold is full, wait until the held events are admitted."""
        arrived = self._not_before
        if hold.full:
            # The probe has shown that the server is well. It is read again when the held events are admitted.
            self.hold_is_full = True
            self._changed.unpark_all()
            await self._wait(hold.admitted.wait)
        if self._stopping:
            return
        if not hold.admitted.is_set():
            hold.put(self.generation, event, arrived)
        elif not self._try_admit(event, self._context.reporter.moment(), arrived):
            await self._admit(event)

    # ---- timers ------------------------------------------------------------------------------------------------

    async def _wait(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Wait for something of the client, while nothing is read, or until the connection has ended."""
        interrupted = True
        self.pause_timers()
        try:
            with trio.CancelScope() as self._wait_scope:
                await wait()
                interrupted = False
        finally:
            self.resume_timers(interrupted=interrupted)

    def pause_timers(self) -> None:
        """Pause the timers of heartbeat, stability and retirement while the connection is not read."""
        if not self._pauses:
            now = self._waiting_since = trio.current_time()
            self._heartbeat.deadline = self._far_enough = math.inf
            if self.retiring and not self._retire_by_force:
                self._retire_left = max(self._life.deadline - now, DRAIN_READ)
                self._life.deadline = math.inf
        self._pauses += 1

    def resume_timers(self, *, interrupted: bool) -> None:
        """Resume the timers. *interrupted*: the connection was ended while it was not read."""
        self._pauses -= 1
        if self._pauses:
            return
        self._retired_unread = interrupted
        # What comes next may have been waiting to be read: the time before which it cannot have come stays as it is.
        self._asked = self._caught_up = self._context.reporter.moment()
        now = self._asked[1]
        self._count_as_waited(now - self._waiting_since)
        if self._retire_left is not None:
            self._life.deadline = now + self._retire_left
            self._retire_left = None
        self._heartbeat.deadline = now + self._context.settings.timeouts.heartbeat
        self._far_enough = 0.0
        self._last_frame = now
        self._resumed.set()
        self._resumed = trio.Event()

    def _on_bytes(self, count: int) -> None:
        """Count the bytes of a message that is still arriving as life: heartbeats queue behind it.

        Only steps of 1,024 bytes count, so that very small amounts of data do
        not look like a working server; and only up to `MESSAGE_ALLOWANCE`.
        """
        self._progress += count
        if self._progress < _PROGRESS or not self._last_frame:
            return
        self._progress = 0
        timeout = self._context.settings.timeouts.heartbeat
        now = trio.current_time()
        limit = self._last_frame + MESSAGE_ALLOWANCE * timeout
        if self._heartbeat.deadline - now < timeout and not self._pauses:
            self._heartbeat.deadline = max(self._heartbeat.deadline, min(now + timeout, limit))

    def _count_as_waited(self, seconds: float) -> None:
        self._waited += seconds
        self._context.ledger.waited(self.generation, seconds)

    @trio.lowlevel.enable_ki_protection
    async def _watch(self) -> None:
        """Watch for when the connection is stable, and for when the ledger can rely on what it delivered."""
        context = self._context
        ledger, interval = context.ledger, context.settings.timeouts.stable_after / _LOOKS
        await self.wait_phase(Phase.LIVE)
        next_look = trio.current_time() + interval
        while not (self.was(Phase.STABLE) and ledger.trusts(self.generation)):
            if self._pauses:
                await self._resumed.wait()
                continue
            due = min(self._stable_at(), next_look)
            await trio.sleep_until(due)
            now = trio.current_time()
            if self._pauses:
                continue
            if now - due >= max(_BLOCKED, interval):
                # The event loop was blocked: what arrived meanwhile is read first, and that time shows nothing.
                self._count_as_waited(now - due)
                next_look = now + interval
                continue
            if now >= self._stable_at():
                self._enter(Phase.STABLE)
                context.reporter.publish(Stable(generation=self.generation))
                next_look = now
            if now >= next_look:
                next_look = now + interval
                context.admission.report_gaps(ledger.tick(self.generation, context.reporter.moment(), self._asked))

    def _stable_at(self) -> float:
        """When it will be stable, on Trio's clock; infinity if it is."""
        if self.was(Phase.STABLE):
            return math.inf
        return self._entered[Phase.LIVE] + self._waited + self._context.settings.timeouts.stable_after
