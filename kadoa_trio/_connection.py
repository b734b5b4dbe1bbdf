"""One generation of connection: token, handshake, subscribe, read, end.

::

    token → handshake → subscribe → subscribed → first frame → confirmed
                                → alive for stable_after → stable → (draining) → ended

A connection reads until it ends, and tells the ledger, the channel and the
notices what it reads. It knows nothing of those before and after it.
"""

from __future__ import annotations

import enum
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Final

import attrs
import trio

from ._channel import Intake
from ._errors import AttemptError
from ._events import Event
from ._http import HttpClient
from ._ledger import Gap, Ledger
from ._notices import (
    Connected,
    Draining,
    FrameIgnored,
    Lost,
    PossibleGap,
    Replaced,
    Reporter,
    Stable,
    Subscribed,
)
from ._settings import DEFAULT_ADVICE, DRAIN_READ, MAX_ADVICE, MESSAGE_ALLOWANCE, MIN_ADVICE, Settings
from ._socket import EndKind, Socket, SocketEnded, open_socket
from ._wire import Draining as DrainNotice
from ._wire import Heartbeat, Ignored, decode, subscribe

_GOING_AWAY: Final = 1001
_ADVICE_JITTER: Final = 0.1
_PROGRESS: Final = 1024
# Moving a deadline costs as much as decoding a small frame, so that it is moved a little further, and less often.
_HEARTBEAT_SLACK: Final = 0.01


class EndReason(enum.Enum):
    """Why a connection is read no more."""

    CLOSED = "closed by the server"
    LOST = "broken"
    TOO_LARGE = "a message over max_message_size"
    PROTOCOL = "the server broke the WebSocket protocol"
    SILENT = "no frame within heartbeat_timeout"
    RETIRED = "retired"
    LEFT = "left"


@attrs.frozen
class End:
    """How a connection ended."""

    reason: EndReason
    detail: str = ""
    code: int | None = None

    def __str__(self) -> str:
        code = f" with {self.code}" if self.code is not None and self.reason is EndReason.CLOSED else ""
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.reason.value}{code}{detail}"


@attrs.define(eq=False)
class Shared:
    """What every generation works with."""

    settings: Settings
    http: HttpClient
    ledger: Ledger
    intake: Intake
    reporter: Reporter
    rng: random.Random
    event_types: frozenset[str] | None
    workflow_ids: frozenset[str] | None
    enter_team: Callable[[str], Awaitable[None]]
    """Called with the team of each new token, before anything is subscribed to."""
    on_gaps: Callable[[list[Gap]], None]
    """Called with possible gaps after they were reported."""
    received: int = 0
    """Events admitted, the filtered ones included."""
    filtered: int = 0
    filters: bool = attrs.field(init=False)
    """Whether the program asked for some events only."""

    def __attrs_post_init__(self) -> None:
        self.filters = self.event_types is not None or self.workflow_ids is not None

    def tell(self, gaps: list[Gap]) -> None:
        """Report possible gaps."""
        for gap in gaps:
            self.reporter.publish(PossibleGap, gap=gap)
        if gaps:
            self.on_gaps(gaps)

    def wants(self, event: Event) -> bool:
        """Tell whether the program asked for an event like this one."""
        if self.event_types is not None and event.type not in self.event_types:
            return False
        return self.workflow_ids is None or event.workflow_id is None or event.workflow_id in self.workflow_ids


class Hold:
    """Events of a connection on trial, kept back until it is known what they are worth. Bounded as the buffer is."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.events: deque[Event] = deque()
        self._bytes = 0

    def put(self, event: Event) -> None:
        self.events.append(event)
        self._bytes += event.size

    def take(self) -> Event:
        event = self.events.popleft()
        self._bytes -= event.size
        return event

    @property
    def full(self) -> bool:
        settings = self._settings
        return len(self.events) >= settings.max_buffered_events or self._bytes >= settings.max_buffered_bytes


class Connection:
    """A connection, from its token to its end.

    Args:
        shared: what every generation works with.
        generation: its number.
        promised: False if the server announced that it does not resume.
        hold: where its events go while it is on trial; it subscribes without
            a cursor then.
        on_confirmed: called when it is confirmed.
    """

    def __init__(
        self,
        shared: Shared,
        generation: int,
        *,
        promised: bool,
        hold: Hold | None,
        on_confirmed: Callable[[], None],
    ) -> None:
        self._shared = shared
        self.generation = generation
        self._promised = promised
        self._hold = hold
        self._released = trio.Event()
        self._on_confirmed = on_confirmed

        self.cursor: str | None = None
        """The cursor that it subscribed with."""
        self.superseded_by: int | None = None
        """The generation of its heir, once there is one."""
        self.confirmed = trio.Event()
        """Set by its first frame."""
        self.lasting = trio.Event()
        """Set when it is stable, or holds so much that nobody can doubt it."""
        self.draining = trio.Event()
        """Set by its first drain notice."""
        self.ended = trio.Event()
        """Set when it is read no more; its socket may still be closing."""
        self.closed = trio.Event()
        """Set when nothing of it is left."""
        self.end: End | None = None
        self.stable = False
        self.heir_due = math.inf
        """When its heir is to be opened, on Trio's clock; set by a drain notice."""
        self.resume_supported: bool | None = None
        self.events = 0
        """Events that it delivered, the repeated and the held ones included."""
        self.admitted = 0

        self._life = trio.CancelScope()
        self._heartbeat = trio.CancelScope()
        self._why_retired = ""
        self._confirmed_at = 0.0
        self._waited = 0.0
        self._pauses = 0
        self._waiting_since = 0.0
        self._resumed = trio.Event()
        self._last_frame = 0.0
        # Until this time a frame need not move the heartbeat's deadline.
        self._far_enough = 0.0
        self._progress = 0

    def __repr__(self) -> str:
        return f"<Connection {self.generation}, {self.end or 'open'}>"

    # ---- from outside ------------------------------------------------------------------------------------------

    def retire(self, why: str, *, at: float) -> None:
        """End it at *at*, on Trio's clock, when what it has already received is read out."""
        self._why_retired = why
        self._life.deadline = at + DRAIN_READ

    def spare(self) -> None:
        """Take a retirement that is not due yet back."""
        self._life.deadline = math.inf

    @property
    def retiring(self) -> bool:
        """Whether `retire` was called."""
        return self._life.deadline != math.inf

    async def release(self, hold: Hold, *, relied_on: bool) -> None:
        """Admit what was held on trial, in order; then whatever comes, if it was this connection's trial.

        Args:
            hold: what was held.
            relied_on: False if another connection leads; the cursors of what
                was held then mean nothing.
        """
        while hold.events:
            # Taken only when it is admitted: being cancelled here loses nothing that was admitted.
            await self._admit(hold.events[0], use_cursor=relied_on)
            hold.take()
        if self._hold is hold:
            self._hold = None
            self._released.set()

    # ---- life --------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open it, report it started when the subscription is sent, and serve it until it ends.

        Raises:
            AttemptError, AuthenticationError, RequestRefusedError,
                ConfigurationError, CursorStoreError: before it has started. Afterwards nothing: `end` says how it ended.
        """
        shared = self._shared
        settings = shared.settings
        try:
            token = await shared.http.fetch_token()
            await shared.enter_team(token.team_id)
            async with open_socket(
                settings.endpoints.websocket,
                token=token.access_token,
                settings=settings,
                on_bytes=self._on_bytes,
                wall_clock=shared.reporter.wall_clock,
            ) as socket:
                self.cursor = shared.ledger.open(
                    self.generation,
                    shared.reporter.wall_clock(),
                    promised=self._promised,
                    with_cursor=self._hold is None,
                )
                last_life = shared.reporter.wall_clock()
                try:
                    await self._subscribe(socket, token.team_id)
                    shared.reporter.publish(Subscribed, generation=self.generation, cursor=self.cursor)
                    task_status.started()
                    self.end = End(EndReason.LEFT)
                    self.end = await self._serve(socket)
                    last_life = self._last_life()
                finally:
                    # No checkpoint in here: it is read no more, and whoever waits for that goes on.
                    self.ended.set()
                    shared.tell(shared.ledger.ended(self.generation, last_life))
                    if self.end is not None and self.end.reason is not EndReason.LEFT:
                        self._tell_end(self.end)
        finally:
            self.closed.set()

    async def _subscribe(self, socket: Socket, team_id: str) -> None:
        timeout = self._shared.settings.handshake_timeout
        with trio.move_on_after(timeout):
            try:
                await socket.send(subscribe(team_id, self.cursor))
            except SocketEnded as exc:
                reason = _end_of(exc)
            else:
                return
            raise AttemptError("subscribe", str(reason))
        raise AttemptError("subscribe", f"could not be sent within {timeout:g} s")

    async def _serve(self, socket: Socket) -> End:
        end: End | None = None
        with self._life:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_stability)
                self._last_frame = trio.current_time()
                self._heartbeat.deadline = self._last_frame + self._shared.settings.heartbeat_timeout
                with self._heartbeat:
                    end = await self._read(socket)
                nursery.cancel_scope.cancel(reason="the connection has ended")
        if end is not None:
            return end
        if self._life.cancelled_caught:
            return End(EndReason.RETIRED, self._why_retired)
        return End(EndReason.SILENT, f"{self._shared.settings.heartbeat_timeout:g} s")

    async def _read(self, socket: Socket) -> End:
        shared, heartbeat = self._shared, self._heartbeat
        timeout = shared.settings.heartbeat_timeout
        slack = timeout * _HEARTBEAT_SLACK
        confirmed = False
        while True:
            try:
                message = await socket.receive()
            except SocketEnded as exc:
                return _end_of(exc)
            now = self._last_frame = trio.current_time()
            self._progress = 0
            if now > self._far_enough:
                heartbeat.deadline = now + timeout + slack
                self._far_enough = now + slack
            if not confirmed:
                confirmed = True
                self._confirm(now)
            frame = decode(message)
            del message  # a large one is not kept for the time that its event waits
            if isinstance(frame, Event):
                self.events += 1
                if self._hold is not None:
                    await self._keep(frame)
                elif not self._try_admit(frame, frame.cursor):
                    await self._admit(frame)
                del frame
            elif isinstance(frame, DrainNotice):
                self._drain(frame, now)
            elif isinstance(frame, Ignored):
                shared.reporter.publish(
                    FrameIgnored, generation=self.generation, kind=frame.kind, why=frame.why, type=frame.type
                )
            else:
                assert isinstance(frame, Heartbeat)

    def _confirm(self, now: float) -> None:
        self._confirmed_at = now
        self.confirmed.set()
        reporter = self._shared.reporter
        older = tuple(c.generation for c in reporter.status.connections if c.generation < self.generation)
        reporter.publish(Connected, generation=self.generation, replaces=older)
        self._on_confirmed()

    def _drain(self, notice: DrainNotice, now: float) -> None:
        if self.draining.is_set():
            return  # once is enough: a repeated notice must not put the heir off
        advice = DEFAULT_ADVICE if notice.advice is None else min(max(notice.advice, MIN_ADVICE), MAX_ADVICE)
        # Upwards only: the server asked to be left alone for so long.
        delay = min(advice * (1 + self._shared.rng.uniform(0, _ADVICE_JITTER)), MAX_ADVICE)
        self.heir_due = now + delay
        self.resume_supported = notice.resume_supported
        self.draining.set()
        self._shared.reporter.publish(
            Draining,
            generation=self.generation,
            delay=delay if self.superseded_by is None else 0.0,
            deadline=notice.deadline,
            resume_supported=notice.resume_supported,
        )

    def _tell_end(self, end: End) -> None:
        reporter = self._shared.reporter
        if self.superseded_by is not None:
            reporter.publish(Replaced, generation=self.generation, by=self.superseded_by, how=str(end))
        else:
            expected = self.draining.is_set() and end.reason is EndReason.CLOSED and end.code == _GOING_AWAY
            reporter.publish(Lost, generation=self.generation, how=str(end), expected=expected)

    # ---- events ------------------------------------------------------------------------------------------------

    async def _admit(self, event: Event, *, use_cursor: bool = True) -> None:
        """Admit an event as soon as there is room."""
        cursor = event.cursor if use_cursor else None
        while not self._try_admit(event, cursor):
            with self._suspended():
                await self._shared.intake.wait_room(event.size)

    def _try_admit(self, event: Event, cursor: str | None) -> bool:
        """Admit an event, in one step with its place in the buffer; False if there is no room for it.

        Everything is looked at again after a wait: another connection may have
        brought the event meanwhile, and admission may have ended.
        """
        shared = self._shared
        ledger, intake = shared.ledger, shared.intake
        if ledger.knows(event.id):
            ledger.repeat(self.generation, event.id, cursor)
            return True
        if intake.closed:
            return True
        wanted = not shared.filters or shared.wants(event)
        if wanted and not intake.has_room(event.size):
            return False
        entry, gaps = ledger.admit(self.generation, event.id, cursor)
        self.admitted += 1
        shared.received += 1
        if wanted:
            intake.put(event, entry)
        else:
            shared.filtered += 1
            intake.settle(event, entry)
        if gaps:
            shared.tell(gaps)
        return True

    async def _keep(self, event: Event) -> None:
        hold = self._hold
        assert hold is not None
        if hold.full:
            # It has shown that it lives. Reading goes on when the trial is over.
            self.lasting.set()
            with self._suspended():
                await self._released.wait()
        if self._hold is None:
            await self._admit(event)
        else:
            hold.put(event)

    # ---- clocks ------------------------------------------------------------------------------------------------

    def _suspended(self) -> _Suspended:
        return _Suspended(self)

    def pause_clocks(self) -> None:
        """Stop the clocks of heartbeat and stability: it is we who do not read."""
        if not self._pauses:
            self._waiting_since = trio.current_time()
            self._heartbeat.deadline = self._far_enough = math.inf
        self._pauses += 1

    def resume_clocks(self) -> None:
        """Start the clocks again."""
        self._pauses -= 1
        if self._pauses:
            return
        now = trio.current_time()
        self._waited += now - self._waiting_since
        self._heartbeat.deadline = now + self._shared.settings.heartbeat_timeout
        self._far_enough = 0.0
        self._last_frame = now
        self._resumed.set()
        self._resumed = trio.Event()

    def _on_bytes(self, count: int) -> None:
        """Count the bytes of a message that is still arriving as life: heartbeats queue behind it.

        In steps, so that pings do not pass for the life of what is behind the
        server's front; and within a limit, so that a trickle does not either.
        """
        self._progress += count
        if self._progress < _PROGRESS or not self._last_frame:
            return
        self._progress = 0
        timeout = self._shared.settings.heartbeat_timeout
        now = trio.current_time()
        limit = self._last_frame + MESSAGE_ALLOWANCE * timeout
        if self._heartbeat.deadline - now < timeout and not self._pauses:
            self._heartbeat.deadline = max(self._heartbeat.deadline, min(now + timeout, limit))

    @trio.lowlevel.enable_ki_protection
    async def _watch_stability(self) -> None:
        await self.confirmed.wait()
        while True:
            if self._pauses:
                await self._resumed.wait()
                continue
            left = self._confirmed_at + self._waited + self._shared.settings.stable_after - trio.current_time()
            if left <= 0:
                break
            await trio.sleep(left)
        self.stable = True
        self.lasting.set()
        self._shared.reporter.publish(Stable, generation=self.generation)
        self._shared.tell(self._shared.ledger.stable(self.generation))

    def _last_life(self) -> datetime:
        silence = trio.current_time() - self._last_frame
        return self._shared.reporter.wall_clock() - timedelta(seconds=max(silence, 0))


class _Suspended:
    """A block in which a connection waits for its own client; see `Connection.pause_clocks`."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.pause_clocks()

    def __exit__(self, *_exc: object) -> None:
        self._connection.resume_clocks()


def _end_of(exc: SocketEnded) -> End:
    reason = {
        EndKind.CLOSED: EndReason.CLOSED,
        EndKind.LOST: EndReason.LOST,
        EndKind.TOO_LARGE: EndReason.TOO_LARGE,
        EndKind.PROTOCOL: EndReason.PROTOCOL,
    }[exc.end.kind]
    return End(reason, exc.end.reason, exc.end.code)
