"""Succession: there is always a newest connection, or an attempt at one, or its timer.

::

    loop:
        connection = establish()       # backoff between attempts
        serve it in the background     # its end is nobody else's business
        wait until it needs an heir    # its drain notice came and the advised delay has passed, or it ended

The loop waits for the newest connection only: one that is older, and dies,
hangs or lingers, cannot stop it; and a replacement that dies during the
overlap is simply the newest one ending.
"""

from __future__ import annotations

import math

import attrs
import trio

from ._backoff import Backoff
from ._connection import Connection, EndReason, Hold, Shared
from ._errors import (
    AttemptError,
    AuthenticationError,
    ConnectionFailedError,
    InternalError,
    KadoaError,
    MessageTooLargeError,
)
from ._notices import (
    AttemptStarted,
    CursorAccepted,
    CursorDropped,
    CursorOnTrial,
    Failed,
    Refused,
    Retrying,
    Stopped,
)
from ._settings import MAX_SOCKETS, REFUSALS_BEFORE_TRIAL


@attrs.define(eq=False)
class CursorSuspicion:
    """Counts closes that look like a refused cursor. They look like a sick server, too: see `Supervisor`."""

    refusals: int = 0

    def ended(self, connection: Connection) -> None:
        """Take the end of a connection into account."""
        if is_refusal(connection):
            self.refusals += 1
        elif connection.cursor is not None and (connection.events or connection.stable):
            self.refusals = 0
        # Anything else, a reset or a time-out, says nothing about the cursor.

    def acquit(self) -> None:
        """Forget what speaks against the cursor."""
        self.refusals = 0

    def adjourn(self) -> None:
        """Put the trial off until one more connection with the cursor was closed."""
        self.refusals = REFUSALS_BEFORE_TRIAL - 1

    @property
    def due(self) -> bool:
        """Whether the cursor must stand trial."""
        return self.refusals >= REFUSALS_BEFORE_TRIAL


def is_refusal(connection: Connection) -> bool:
    """Tell whether this is what a refused cursor would look like: a close, before any event and before it was stable."""
    return (
        connection.cursor is not None
        and connection.end is not None
        and connection.end.reason is EndReason.CLOSED
        and not connection.events
        and not connection.stable
        and not connection.draining.is_set()
    )


class Supervisor:
    """Opens the connections of a client, one after the other, and retires the old ones.

    A background service: once it has started it raises nothing. A fault goes
    to the channel of events.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._settings = shared.settings
        self._backoff = Backoff(shared.settings.retry, shared.rng)
        self._suspicion = CursorSuspicion()
        self._generation = 0
        self._open: list[Connection] = []
        """Oldest first; with those whose socket is closing."""
        self._newest: Connection | None = None
        self._ever_confirmed = False
        self._refused_since: float | None = None
        self._refusals = 0
        self._attempts = 0
        self._last_failure: AttemptError | None = None
        self._admitted_at_too_large = -1
        self._held: Hold | None = None
        self._started_at = 0.0
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._crash: Exception | None = None

    def stop(self) -> None:
        """End all connections. Nothing is admitted from here on."""
        if not self._shared.intake.closed:
            self._shared.intake.end()
            self._shared.reporter.publish(Stopped)
        self._scope.cancel(reason="the client was stopped")

    def fail(self, fault: Exception) -> bool:
        """End all connections with a fault from elsewhere; return False if they have ended already."""
        if self._shared.intake.closed:
            return False
        self._crash = self._crash or fault
        self._scope.cancel(reason="the client has failed")
        return True

    @trio.lowlevel.enable_ki_protection
    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until stopped; report started when the first subscription is sent.

        Raises:
            KadoaError: the first connection could not be made; only before it has started.
        """
        started = False
        self._started_at = trio.current_time()
        fault: Exception | None = None
        try:
            with self._scope:
                async with trio.open_nursery() as self._nursery:
                    # Caught inside of the nursery, which would wrap it.
                    try:
                        newest = await self._establish()
                        started = True
                        task_status.started()
                        await self._succeed(newest)
                    except Exception as exc:
                        fault = exc
                    self._nursery.cancel_scope.cancel(reason="the client has ended")
        except Exception as exc:
            # A connection's task let something out: it must not, so that it is a bug whatever it is.
            fault = exc
        fault = self._crash or fault
        if fault is None:
            return
        if not isinstance(fault, KadoaError):
            bug = fault
            fault = InternalError(f"the client failed by a bug of its own ({type(bug).__name__}); please report it")
            fault.__cause__ = bug
        self._shared.reporter.publish(Failed, fault=f"{type(fault).__name__}: {fault}")
        if not started:
            self._shared.intake.end()
            raise fault
        self._shared.intake.end(fault)

    # ---- the loop ----------------------------------------------------------------------------------------------

    async def _succeed(self, newest: Connection) -> None:
        while True:
            not_before = await self._needs_heir(newest)
            if self._suspicion.due and not newest.draining.is_set() and self._shared.ledger.resume_cursor is not None:
                newest = await self._trial(not_before)
            else:
                newest = await self._establish(not_before)

    async def _needs_heir(self, newest: Connection) -> float:
        """Wait until *newest* is due for replacement, and return the earliest time for it."""
        earliest = 0.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when, newest.ended, nursery.cancel_scope)
            await newest.draining.wait()
            if newest.stable:
                self._backoff.stable()
            else:
                # A server that drains whatever it accepts: the larger of its advice and our backoff.
                earliest = self._next_after_failure()
            await trio.sleep_until(max(newest.heir_due, earliest))
            nursery.cancel_scope.cancel(reason="its heir is due")
        now = trio.current_time()
        if not newest.ended.is_set():
            return now
        # Dead before its heir was due, which ends the wait.
        self._observe_end(newest)
        if not newest.stable:
            return earliest or self._next_after_failure()
        self._backoff.stable()
        return now if newest.draining.is_set() else now + self._backoff.delay()

    def _next_after_failure(self) -> float:
        self._backoff.failed()
        return trio.current_time() + self._backoff.delay()

    async def _establish(self, not_before: float = 0.0, *, hold: Hold | None = None) -> Connection:
        """Make attempts until one is subscribed, and return it; the older ones are read meanwhile."""
        deadline = math.inf if self._confirmed() else self._started_at + self._settings.connect_timeout
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
                self._attempts, seconds, str(last) if last is not None else "no answer in time"
            ) from last
        return connection

    async def _attempt(self, hold: Hold | None) -> tuple[Connection | None, float]:
        """Make one attempt; return the connection, or when the next attempt is due."""
        shared, nursery = self._shared, self._nursery
        assert nursery is not None
        self._generation += 1
        self._attempts += 1
        self._backoff.begin(trio.current_time())
        shared.reporter.publish(AttemptStarted, generation=self._generation)
        newest = self._newest
        connection = Connection(
            shared,
            self._generation,
            promised=newest is None or newest.resume_supported is not False,
            hold=hold,
            on_confirmed=self._review_retirement,
        )
        self._open.append(connection)
        retry_after: float | None = None
        try:
            await nursery.start(self._serve, connection)
        except AuthenticationError as exc:
            latest = self._refused(exc)
            why = str(exc)
        except AttemptError as exc:
            self._last_failure = exc
            latest, retry_after, why = math.inf, exc.retry_after, str(exc)
        else:
            self._succeeded(connection)
            return connection, 0.0
        self._backoff.failed()
        now = trio.current_time()
        due = min(now + self._backoff.delay(retry_after), max(latest, now))
        shared.reporter.publish(
            Retrying, generation=connection.generation, why=why, delay=due - now, failures=self._backoff.failures
        )
        return None, due

    def _succeeded(self, connection: Connection) -> None:
        for older in self._open:
            if older is not connection:
                older.superseded_by = connection.generation
        self._newest = connection
        self._review_retirement()

    @trio.lowlevel.enable_ki_protection
    async def _serve(self, connection: Connection, *, task_status: trio.TaskStatus[None]) -> None:
        started = _Started(task_status)
        try:
            await connection.run(task_status=started)
        except Exception as exc:
            if not started.done:
                raise
            self._crash = self._crash or exc
            self._scope.cancel(reason="a connection crashed")
        finally:
            self._open.remove(connection)
            if started.done:
                self._account_for(connection)

    def _account_for(self, connection: Connection) -> None:
        """Take the end of a connection into account."""
        if connection.confirmed.is_set():
            self._ever_confirmed = True
        self._review_retirement()

    # ---- faults ------------------------------------------------------------------------------------------------

    def _confirmed(self) -> bool:
        self._ever_confirmed = self._ever_confirmed or any(c.confirmed.is_set() for c in self._open)
        return self._ever_confirmed

    def _refused(self, exc: AuthenticationError) -> float:
        """Return until when to go on trying after a refusal; raise it when that time has come."""
        now = trio.current_time()
        self._refusals += 1
        if not self._confirmed():
            # Once more, with a fresh token: the first one may have met a server that was starting.
            if self._refusals > 1:
                raise exc
            return math.inf
        if self._refused_since is None:
            self._refused_since = now
        grace = self._refused_since + self._settings.auth_grace - now
        if grace <= 0:
            raise exc
        self._shared.reporter.publish(Refused, generation=self._generation, why=str(exc), grace=grace)
        return now + grace

    def _observe_end(self, connection: Connection) -> None:
        end = connection.end
        assert end is not None
        self._suspicion.ended(connection)
        self._last_failure = AttemptError("subscribe", str(end))
        if end.reason is EndReason.TOO_LARGE:
            if self._admitted_at_too_large == self._shared.received:
                raise MessageTooLargeError(self._settings.max_message_size)
            self._admitted_at_too_large = self._shared.received

    # ---- retiring ----------------------------------------------------------------------------------------------

    def _review_retirement(self) -> None:
        """Retire older connections when the newest is known to live; spare them while it is not."""
        newest = self._newest
        if newest is None:
            return
        if newest.confirmed.is_set():
            self._ever_confirmed = True
            self._refused_since = None
        healthy = newest.confirmed.is_set() and not newest.ended.is_set()
        for older in self._open:
            if older.generation >= newest.generation or older.ended.is_set():
                continue
            if not healthy:
                older.spare()
            elif not older.retiring:
                older.retire("replaced", at=trio.current_time() + self._settings.overlap_limit)

    async def _make_place(self) -> None:
        """Keep the bound of sockets: retire the oldest connection, and wait until it is gone."""
        while len(self._open) >= MAX_SOCKETS:
            oldest = next((one for one in self._open if one.ended.is_set()), self._open[0])
            if not oldest.ended.is_set():
                oldest.retire("too many sockets", at=trio.current_time())
            await oldest.closed.wait()

    # ---- the cursor on trial -----------------------------------------------------------------------------------

    async def _trial(self, not_before: float) -> Connection:
        """Find out whether the server refuses the cursor or is sick, and return the newest connection.

        Dropping a cursor for a sick server would lose events, and clinging to
        a refused one would make the client deaf. One connection without the
        cursor shows whether the server is well; only then does one with the
        cursor beside it show what the cursor is worth.
        """
        shared = self._shared
        cursor = shared.ledger.resume_cursor
        assert cursor is not None
        shared.reporter.publish(CursorOnTrial, cursor=cursor)
        hold = self._held = self._held or Hold(self._settings)
        witness = await self._establish(not_before, hold=hold)
        await _wait_either(witness.lasting, witness.ended)
        if witness.ended.is_set():
            # The server is sick. What was held is kept for the next trial.
            self._suspicion.adjourn()
            return witness
        not_before = 0.0
        while True:
            candidate = await self._establish(not_before)
            await _wait_either(candidate.lasting, candidate.ended)
            if candidate.lasting.is_set():
                shared.reporter.publish(CursorAccepted, cursor=cursor)
                self._suspicion.acquit()
                # The replay has brought what was held; if it has not, the events are admitted all the same.
                await self._release(witness if not witness.ended.is_set() else candidate, hold, relied_on=False)
                witness.retire("its trial is over", at=trio.current_time())
                return candidate
            if witness.ended.is_set():
                self._suspicion.adjourn()
                return candidate  # nobody vouches for the server any more
            if is_refusal(candidate):
                shared.reporter.publish(CursorDropped, cursor=cursor)
                self._suspicion.acquit()
                self._newest = witness
                witness.superseded_by = None
                shared.tell(shared.ledger.drop_cursor(witness.generation))
                await self._release(witness, hold, relied_on=True)
                return witness
            self._observe_end(candidate)
            not_before = self._next_after_failure()

    async def _release(self, connection: Connection, hold: Hold, *, relied_on: bool) -> None:
        await connection.release(hold, relied_on=relied_on)
        self._held = None


@trio.lowlevel.enable_ki_protection
async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel(reason="what was waited for has come")


async def _wait_either(one: trio.Event, other: trio.Event) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when, one, nursery.cancel_scope)
        await other.wait()
        nursery.cancel_scope.cancel(reason="what was waited for has come")


class _Started(trio.TaskStatus[None]):
    """Passes the start on, and remembers it."""

    def __init__(self, outer: trio.TaskStatus[None]) -> None:
        self._outer = outer
        self.done = False

    def started(self, value: None = None) -> None:
        self._outer.started(value)
        self.done = True
