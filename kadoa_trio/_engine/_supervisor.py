"""Succession: there is always a newest connection, or an attempt at one, or its timer.

::

    loop:
        connection = establish()           # backoff between attempts
        serve it in the background         # it reads until it ends; its end does not end the loop
        wait until it needs a replacement  # its drain notice came and the advised delay has passed,
                                           # or it reached its maximum age, or it ended

The loop waits for the newest connection only. An older connection that ends or
hangs cannot stop the loop. If a replacement ends during the overlap, it is the
newest connection that has ended, and the loop opens the next one.
"""

from __future__ import annotations

import math

import trio

from .._backoff import Backoff
from .._errors import (
    AttemptError,
    AuthenticationError,
    ConnectionFailedError,
    InternalError,
    KadoaError,
    MessageTooLargeError,
    RequestRefusedError,
)
from .._net._socket import EndReason
from ..notices import (
    AttemptStarted,
    ConnectionAged,
    CursorAccepted,
    CursorCheckStarted,
    CursorDropped,
    Failed,
    HeldEventsReleased,
    Refused,
    Retrying,
    State,
)
from ._connection import Connection, ConnectionContext
from ._cursor_check import HOLD_TIME, REFUSAL_TIME, CursorCheck, Hold
from ._phase import Phase

MAX_SOCKETS = 3
"""Maximum number of open sockets: the newest connection, the one that it replaces, and one that is slow to close."""


def is_refusal(connection: Connection) -> bool:
    """Return whether a connection ended as one with a refused cursor would: closed soon, before any event."""
    return (
        connection.cursor is not None
        and connection.end is not None
        and connection.end.reason is EndReason.CLOSED
        and not connection.events
        and connection.life <= REFUSAL_TIME
        and not connection.draining
    )


class Supervisor:
    """Opens the connections of a client, one after the other, and retires the old ones.

    A background service that raises nothing. A fault of the first connection
    is `start_fault`; a later one goes to the channel of events.

    Args:
        context: what every connection works with.
    """

    def __init__(self, context: ConnectionContext) -> None:
        self._context = context
        self._settings = context.settings
        self._backoff = Backoff(context.settings.retry, context.rng)
        self._check = CursorCheck()
        self._hold: Hold | None = None
        self._generation = 0
        self._open: list[Connection] = []
        """Oldest first; with those whose socket is closing."""
        self._newest: Connection | None = None
        self._ever_live = False
        self._refused_since: float | None = None
        self._refusals = 0
        self._last_failure: AttemptError | None = None
        self._admitted_at_too_large = -1
        self._started_at = 0.0
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._crash: Exception | None = None
        self.started: trio.Event = trio.Event()
        """Set when the first subscription is sent, or the client has ended before."""
        self.start_fault: KadoaError | None = None
        """Why the first connection could not be made."""

    def stop(self, *, retry_within: float = 0.0) -> None:
        """End all connections. Nothing is admitted from here on; see `Buffer.end` for *retry_within*."""
        self._context.admission.stop(retry_within=retry_within)
        self._scope.cancel(reason="the client was stopped")

    def fail(self, fault: KadoaError) -> bool:
        """End all connections with a fault from elsewhere; return False if they have ended already."""
        if self._context.admission.ended:
            return False
        self._crash = self._crash or fault
        if self.started.is_set():
            # At once: the program may leave before all sockets are closed.
            self._report_failure(fault)
            self._context.admission.end(fault)
        self._scope.cancel(reason="the client has failed")
        return True

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Run until stopped. Raises nothing: `started` is set when the first subscription is sent, or has failed.

        The main task must not wait for the start with `trio.Nursery.start`: a
        KeyboardInterrupt that is raised there together with a failure is a
        `trio.TrioInternalError`.
        """
        self._started_at = trio.current_time()
        fault: Exception | None = None
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    # Caught inside of the nursery, which would wrap it.
                    try:
                        newest = await self._establish()
                        self.started.set()
                        await self._succeed(newest)
                    except Exception as exc:
                        fault = exc
                    self._nursery.cancel_scope.cancel(reason="the client has ended")
        except Exception as exc:
            # A connection's task let something out: it must not, so that it is a bug whatever it is.
            fault = exc
        fault = self._crash or fault
        if fault is None:
            self.started.set()
            return
        if not isinstance(fault, KadoaError):
            bug = fault
            fault = InternalError(f"the client failed by a bug of its own ({type(bug).__name__}); please report it")
            fault.__cause__ = bug
        self._report_failure(fault)
        if self.started.is_set():
            self._context.admission.end(fault)
        else:
            self._context.admission.end()
            self.start_fault = fault
            self.started.set()

    def _report_failure(self, fault: KadoaError) -> None:
        if self._context.reporter.status.state is not State.FAILED:
            self._context.reporter.publish(Failed(fault=f"{type(fault).__name__}: {fault}"))

    # ---- the loop ----------------------------------------------------------------------------------------------

    async def _succeed(self, newest: Connection) -> None:
        while True:
            not_before = await self._needs_replacement(newest)
            if self._check.due and not newest.draining and self._context.ledger.resume_cursor is not None:
                newest = await self._check_cursor(not_before)
            else:
                newest = await self._establish(not_before)

    async def _needs_replacement(self, newest: Connection) -> float:
        """Wait until *newest* is due for replacement, and return the earliest time for it."""
        earliest = 0.0
        with trio.move_on_at(newest.renew_at) as due:
            await newest.wait_until(lambda: newest.draining or newest.ended)
            if not newest.ended:
                if newest.was(Phase.STABLE):
                    self._backoff.stable()
                else:
                    # A server that drains whatever it accepts: the larger of its advice and our backoff.
                    earliest = self._next_after_failure()
                due.deadline = max(newest.replacement_due, earliest)
                await newest.wait_phase(Phase.ENDED)
        now = trio.current_time()
        if not newest.ended:
            if not newest.draining:
                self._context.reporter.publish(ConnectionAged(generation=newest.generation))
            return now
        # Ended before its replacement was due, which ends the wait.
        self._observe_end(newest)
        if newest.was(Phase.STABLE):
            self._backoff.stable()
            return now if newest.draining else now + self._backoff.delay()
        if newest.made_progress and not newest.draining:
            # It made progress: the next wait is a first one.
            self._backoff.stable()
            return now + self._backoff.delay()
        return earliest or self._next_after_failure()

    def _next_after_failure(self) -> float:
        self._backoff.failed()
        return trio.current_time() + self._backoff.delay()

    async def _establish(self, not_before: float = 0.0, *, hold: Hold | None = None) -> Connection:
        """Make attempts until one is subscribed, and return it; the older ones are read meanwhile."""
        deadline = math.inf if self._was_live() else self._started_at + self._settings.timeouts.connect
        connection: Connection | None = None
        with trio.move_on_at(deadline):
            while connection is None:
                await trio.sleep_until(max(not_before, self._backoff.earliest(trio.current_time())))
                await self._make_place()
                connection, not_before = await self._attempt(hold)
        if connection is None:
            last = self._last_failure
            seconds = trio.current_time() - self._started_at
            raise ConnectionFailedError(
                self._generation, seconds, str(last) if last is not None else "no answer in time"
            ) from last
        return connection

    async def _attempt(self, hold: Hold | None) -> tuple[Connection | None, float]:
        """Make one attempt; return the connection, or when the next attempt is due."""
        context, nursery = self._context, self._nursery
        assert nursery is not None
        self._generation += 1
        self._backoff.begin(trio.current_time())
        context.reporter.publish(AttemptStarted(generation=self._generation))
        asked = [] if self._newest is None else [self._newest]
        connection = Connection(
            context,
            self._generation,
            promised=all(one.resume_supported is not False for one in (*self._open, *asked)),
            hold=hold,
            on_live=self._review_retirement,
        )
        self._open.append(connection)
        retry_after: float | None = None
        try:
            await nursery.start(self._serve, connection)
        except (AuthenticationError, RequestRefusedError) as exc:
            latest = self._refused(exc)
            why = str(exc)
        except AttemptError as exc:
            self._last_failure = exc
            self._refused_since = None  # any other failure ends the grace period; the next refusal starts a new one
            latest, retry_after, why = math.inf, exc.retry_after, str(exc)
        else:
            self._succeeded(connection)
            return connection, 0.0
        self._backoff.failed()
        now = trio.current_time()
        due = min(now + self._backoff.delay(retry_after), max(latest, now))
        context.reporter.publish(
            Retrying(generation=connection.generation, why=why, delay=due - now, failures=self._backoff.failures)
        )
        return None, due

    def _succeeded(self, connection: Connection) -> None:
        for older in self._open:
            if older is not connection:
                older.replaced_by = connection.generation
        self._newest = connection
        self._review_retirement()

    @trio.lowlevel.enable_ki_protection
    async def _serve(self, connection: Connection, *, task_status: trio.TaskStatus[None]) -> None:
        try:
            await connection.run(task_status=task_status)
        except Exception as exc:
            if not connection.was(Phase.SUBSCRIBED):
                raise
            self._crash = self._crash or exc
            self._scope.cancel(reason="a connection crashed")
        finally:
            self._open.remove(connection)
            if connection.was(Phase.SUBSCRIBED):
                self._account_for(connection)

    def _account_for(self, connection: Connection) -> None:
        """Take the end of a connection into account."""
        if connection.was(Phase.LIVE):
            self._ever_live = True
        self._review_retirement()

    # ---- faults ------------------------------------------------------------------------------------------------

    def _was_live(self) -> bool:
        """Return whether a connection of this client has ever been live."""
        self._ever_live = self._ever_live or any([connection.was(Phase.LIVE) for connection in self._open])  # noqa: C419
        return self._ever_live

    def _refused(self, exc: AuthenticationError | RequestRefusedError) -> float:
        """Return until when to try again after a refusal; raise it when that time has come."""
        now = trio.current_time()
        self._refusals += 1
        if not self._was_live():
            # A refused key once more, with a fresh token: the first one may have met a server that was starting.
            if self._refusals > 1 or isinstance(exc, RequestRefusedError):
                raise exc
            return math.inf
        if self._refused_since is None:
            self._refused_since = now
        grace = self._refused_since + self._settings.timeouts.auth_grace - now
        if grace <= 0:
            raise exc
        self._context.reporter.publish(Refused(generation=self._generation, why=str(exc), grace=grace))
        return now + grace

    def _observe_end(self, connection: Connection) -> None:
        end = connection.end
        assert end is not None
        if is_refusal(connection):
            self._check.closed(connection.life)
        elif connection.cursor is not None and (connection.events or self._has_outlived(connection)):
            self._check.reset()
        # Anything else, a reset or a time-out, says nothing about the cursor.
        self._last_failure = AttemptError("subscribe", str(end))
        if end.reason is EndReason.TOO_LARGE:
            if self._admitted_at_too_large == self._context.admission.received:
                raise MessageTooLargeError(self._settings.limits.message_size)
            self._admitted_at_too_large = self._context.admission.received

    def _has_outlived(self, connection: Connection) -> bool:
        """Return whether a connection was stable, and lived longer than those that were closed before it."""
        return connection.was(Phase.STABLE) and connection.life >= self._check.patience

    # ---- retiring ----------------------------------------------------------------------------------------------

    def _review_retirement(self) -> None:
        """Retire the older connections while the newest one is live, and only then."""
        newest = self._newest
        if newest is None:
            return
        if newest.was(Phase.LIVE):
            self._ever_live = True
            self._refused_since = None
        for older in self._open:
            if older.generation >= newest.generation or older.ended:
                continue
            if not newest.is_live:
                older.cancel_retirement()
            elif not older.retiring:
                older.retire("replaced", after=self._settings.timeouts.overlap)

    async def _make_place(self) -> None:
        """Keep to the maximum number of sockets: retire the oldest connection, and wait until it is gone."""
        while len(self._open) >= MAX_SOCKETS:
            oldest = next((one for one in self._open if one.ended), self._open[0])
            if not oldest.ended:
                oldest.retire("too many sockets", after=0.0, force=True)
            await oldest.wait_phase(Phase.CLOSED)

    # ---- the cursor check --------------------------------------------------------------------------------------

    async def _check_cursor(self, not_before: float) -> Connection:
        """Find out whether the server refuses the cursor or is faulty, and return the newest connection.

        A probe connection without the cursor shows whether the server works.
        Only then do connections with the cursor, beside it, show whether the
        server accepts the cursor. See `_cursor_check` for when it is dropped.
        """
        context, check = self._context, self._check
        cursor = context.ledger.resume_cursor
        assert cursor is not None
        if check.begin():
            context.reporter.publish(CursorCheckStarted(cursor=cursor))
        probe = await self._establish(not_before, hold=self._current_hold())
        await probe.wait_until(lambda: probe.phase >= Phase.STABLE or probe.hold_is_full)
        not_before = 0.0
        while not probe.ended:
            candidate = await self._establish(not_before)
            await self._wait_for_result(candidate)
            if context.ledger.resume_cursor != cursor and not candidate.events:
                # So much was delivered without it that the ledger has given the cursor up, with a possible gap.
                self._end_check()
                return candidate
            if candidate.draining and not candidate.events and not candidate.ended:
                # No result. The drain comes first; the check continues after the next close.
                check.postpone()
                return candidate
            if candidate.events or (candidate.was(Phase.STABLE) and not candidate.ended):
                context.reporter.publish(CursorAccepted(cursor=cursor))
                check.reset()
                probe.retire("the cursor check is over", after=0.0)
                # When the replay is over, it has brought the held events; those that it has not brought are admitted.
                assert self._nursery is not None
                self._nursery.start_soon(self._decide_hold_later, candidate)
                return candidate
            if probe.ended:
                break
            if (
                is_refusal(candidate)
                # A server that closes every connection after a while refuses no cursor: the probe must outlive the others.
                and check.outlived_by(probe.life, candidate.life)
                and check.refused(trio.current_time())
            ):
                context.reporter.publish(CursorDropped(cursor=cursor))
                self._newest = probe
                probe.replaced_by = None
                context.admission.report_gaps(context.ledger.drop_cursor(probe.generation, context.reporter.moment()))
                self._end_check()
                return probe
            self._observe_end(candidate)
            not_before = self._next_after_failure()
        # The server is faulty. The events stay held for the next check, or until `HOLD_TIME` has passed.
        check.postpone()
        newest = self._newest
        assert newest is not None
        return newest

    async def _wait_for_result(self, candidate: Connection) -> None:
        """Wait until a connection with the cursor has delivered an event, has ended, or has lived for long enough."""
        await candidate.wait_until(
            lambda: candidate.events > 0 or candidate.draining or candidate.phase >= Phase.STABLE
        )
        # Those before it were closed after they were stable: this one must outlive them.
        with trio.move_on_after(max(self._check.patience - candidate.life, 0.0)):
            await candidate.wait_until(lambda: candidate.events > 0 or candidate.draining or candidate.ended)

    def _end_check(self) -> None:
        self._check.reset()
        if self._hold is not None:
            self._hold.decided.set()

    def _current_hold(self) -> Hold:
        """Return where the events of a probe are held: what an earlier probe brought is kept in order before them."""
        if self._hold is None or self._hold.admitted.is_set():
            settings = self._settings
            self._hold = Hold(settings.limits.buffered_events, settings.limits.buffered_bytes)
            assert self._nursery is not None
            self._nursery.start_soon(self._admit_held_later, self._hold)
        return self._hold

    @trio.lowlevel.enable_ki_protection
    async def _decide_hold_later(self, candidate: Connection) -> None:
        hold = self._hold
        assert hold is not None
        await candidate.wait_phase(Phase.STABLE)
        if candidate.was(Phase.STABLE):
            hold.decided.set()

    @trio.lowlevel.enable_ki_protection
    async def _admit_held_later(self, hold: Hold) -> None:
        """Admit the held events, in order, when the check is over, the hold is full, or `HOLD_TIME` has passed."""
        context = self._context
        await _wait_either(hold.some, hold.decided)
        with trio.move_on_after(HOLD_TIME):
            await _wait_either(hold.decided, hold.filled)
        if not hold.decided.is_set():
            context.reporter.publish(HeldEventsReleased(cursor=context.ledger.resume_cursor, events=len(hold.events)))
        while hold.events:
            # Taken only when it is admitted: being cancelled here loses nothing that was admitted.
            generation, event, arrived = hold.events[0]
            apart = not context.ledger.is_open(generation)
            if context.admission.try_admit(event, generation, context.reporter.moment(), arrived, apart=apart):
                hold.take()
            else:
                await context.admission.wait_space(event)
        hold.admitted.set()


@trio.lowlevel.enable_ki_protection
async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel(reason="what was waited for has come")


async def _wait_either(*events: trio.Event) -> None:
    """Wait until one of the events is set. A checkpoint."""
    async with trio.open_nursery() as nursery:
        for event in events[1:]:
            nursery.start_soon(_cancel_when, event, nursery.cancel_scope)
        await events[0].wait()
        nursery.cancel_scope.cancel(reason="what was waited for has come")
