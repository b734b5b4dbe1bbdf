"""`open_realtime`: the way in, and what a program holds while it is open."""

from __future__ import annotations

import math
import os
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import UTC, datetime
from typing import Final, final

import attrs
import trio

from ._checks import (
    check_async,
    check_delay,
    check_flag,
    check_hook,
    check_seconds,
    check_text,
    refusal,
    strings_of,
)
from ._contexts import async_context
from ._engine._acks import Acknowledger
from ._engine._admission import Admission
from ._engine._buffer import Buffer
from ._engine._channel import EventChannel
from ._engine._connection import ConnectionContext
from ._engine._health import examine
from ._engine._ledger import Ledger, Moment
from ._engine._repair import Repairer
from ._engine._reporter import Reporter
from ._engine._saver import Saver
from ._engine._supervisor import Supervisor
from ._engine._team import TeamCheck
from ._errors import ConfigurationError, CursorStoreError, OwnershipLostError
from ._events import Event
from ._exits import clean_up, pick
from ._net._api import KadoaApi, open_api
from ._position import Gap, Position
from ._redact import Secret, hidden
from ._settings import Endpoints, Limits, RetryPolicy, Settings, Timeouts, read_key, settings_of
from ._stores import CursorStore, store_of
from .notices import ConnectionStatus, Health, Notice, State

LEAVE_TIMEOUT = 2.0
"""Maximum duration of leaving in all, in seconds: sockets, the last save, the last acknowledgements."""
_LAST_ACKNOWLEDGEMENTS: Final = 0.5
_RNG: Final[random.Random] = random.SystemRandom()
"""For jitter. One for all clients, because each object of its kind takes 2.5 KB."""
_RESERVE: Final = 0.3
"""What of the time for leaving is kept for giving up what did not end in time, in seconds."""


@attrs.frozen(kw_only=True)
class RealtimeStatistics:
    """What a client has done so far. All counts are since it was opened."""

    state: State
    connections: tuple[ConnectionStatus, ...]
    """The connections that are read, oldest first."""
    attempts: int
    """Attempts at a connection."""
    opened: int
    """Connections that were opened and subscribed."""
    drains: int
    """Drain notices, one a connection."""
    replaced: int
    """Connections that ended while a newer one went on."""
    lost: int
    """Connections that ended without one."""
    received: int
    """Events admitted, filtered ones included."""
    filtered: int
    """Events that ``event_types`` or ``workflow_ids`` kept away."""
    repeated: int
    """Deliveries of an event that had been delivered before; they were dropped."""
    ignored: int
    """Frames that were not understood."""
    pauses: int
    """How often admission paused because too much was unsettled."""
    gap_count: int
    """Possible gaps, those of the position that was resumed from included."""
    gaps: tuple[Gap, ...]
    """The newest of them, at most 100, oldest first."""
    resume_cursor: str | None
    """Where the next connection would subscribe from."""
    saves: int
    """Positions that were saved in the cursor store."""
    save_failures: int
    """Saves that failed; they were tried again."""
    unsaved: int
    """Settled events that no save covers yet; 0 without a cursor store."""
    acknowledged: int
    """Acknowledgements that the server accepted."""
    acknowledgements_failed: int
    """Acknowledgements that were refused or did not arrive."""
    acknowledgements_waiting: int
    acknowledgements_dropped: int
    """Acknowledgements that were not sent because too many waited."""
    repaired: int
    """Events that were taken from the notification log."""
    settled: int
    """Events that the program has settled; the filtered ones are not counted."""
    redelivered: int
    """How often an event went back to be delivered again."""
    dead: int
    """Events that the program has put into dead letters. They are settled."""
    notices_dropped: int
    """Notices that nobody read in time."""


@final
class Realtime:
    """An open client. Made by `open_realtime`."""

    def __init__(self, assembly: _Assembly) -> None:
        self._assembly = assembly
        self._events = EventChannel(assembly.buffer)

    def __repr__(self) -> str:
        return f"<Realtime, {self.state.value}>"

    @property
    def events(self) -> EventChannel:
        """The events. Always the same handle; workers use clones of it."""
        return self._events

    @property
    def notices(self) -> trio.MemoryReceiveChannel[Notice]:
        """What happens to the client, as `Notice` objects.

        The newest 256 that were not read are kept, so that nothing waits for
        a reader and no reader is needed. It ends when the client is left.
        """
        return self._assembly.reporter.notices

    @property
    def state(self) -> State:
        """What the newest connection is doing."""
        return self._assembly.reporter.status.state

    @property
    def position(self) -> Position:
        """How far the program's processing has come, for ``resume_from`` of a later run.

        It passes no event that was not settled.
        """
        return self._assembly.ledger.settled_position(self._now())

    def position_after(self, event: Event) -> Position:
        """Return what `position` will be when *event*, which is in hand, is settled.

        For programs that keep their position in their own database, in the
        transaction that also holds what they made of the event: write both,
        commit, and ask for the next event. For one task at a time, because
        positions that are made side by side do not know of each other's
        events. Events that wait for their redelivery do no harm. See also
        `Delivery.position` and `Batch.position`.

        Raises:
            ValueError: the event is not in hand, or others are in hand, too.
        """
        return self._assembly.buffer.position_after([event])

    def _now(self) -> Moment | None:
        return self._assembly.reporter.moment() if trio.lowlevel.in_trio_run() else None  # None after the run

    async def wait_live(self) -> None:
        """Wait until the newest connection, or the one that it replaces, is live. Being cancelled changes nothing.

        Raises:
            trio.ClosedResourceError: the client was stopped.
            trio.BrokenResourceError: a fault has ended the client; `events` raises it.
        """
        live = frozenset({State.LIVE, State.REPLACING})
        state = await self._assembly.reporter.wait_for(live | {State.STOPPED, State.FAILED})
        if state is State.STOPPED:
            raise trio.ClosedResourceError("the client was stopped")
        if state is State.FAILED:
            raise trio.BrokenResourceError("the client has failed; receiving from its events raises the fault")

    @trio.lowlevel.enable_ki_protection
    def stop(self, *, retry_within: float = 0.0) -> None:
        """End admission: nothing more is received from Kadoa; what is buffered is still handed out.

        ``async for`` over `events` ends after that. Call it for an orderly
        end, at SIGTERM for example (`stopping_on_signals` does): nothing that
        was finished is repeated by the next run. Stopping twice is fine; the
        first call counts.

        An event that fails after that, or waits for its redelivery, stays
        unsettled, so that the next run receives it again.

        Args:
            retry_within: for how long such events are still delivered again,
                in seconds. The channel ends when all events are settled, or
                after this time. Default 0.

        Raises:
            ConfigurationError: *retry_within* is not a finite number from 0 on.
            RuntimeError: it was called in another thread than that of
                ``trio.run``. Use ``trio.from_thread.run_sync(realtime.stop)``
                there.
        """
        check_delay("retry_within", retry_within)
        trio.lowlevel.current_trio_token()  # raises before anything is changed
        self._assembly.supervisor.stop(retry_within=retry_within)

    def health(self, *, stuck_after: float = 300.0) -> Health:
        """Return whether the client and its program are well, and if not, why: for a health check or a log line.

        Quick, and never a checkpoint. Possible gaps are shown, but do not
        make the client unhealthy: they are about the past.

        Args:
            stuck_after: the age of an unsettled event from which the program
                counts as stuck, in seconds; `math.inf` for no maximum. Default 300 s.

        Raises:
            ConfigurationError: *stuck_after* is not a positive number.
        """
        check_seconds("stuck_after", stuck_after, unlimited=True)
        assembly = self._assembly
        return examine(
            assembly.reporter, assembly.ledger, assembly.buffer, assembly.admission, assembly.saver, stuck_after
        )

    def statistics(self) -> RealtimeStatistics:
        """Return what the client has done so far."""
        assembly, ledger, status = self._assembly, self._assembly.ledger, self._assembly.reporter.status
        saver, acknowledger, repairer = assembly.saver, assembly.acknowledger, assembly.repairer
        return RealtimeStatistics(
            state=status.state,
            connections=status.connections,
            attempts=status.attempts,
            opened=status.opened,
            drains=status.drains,
            replaced=status.replaced,
            lost=status.lost,
            received=assembly.admission.received,
            filtered=assembly.admission.filtered,
            repeated=ledger.repeated,
            ignored=status.ignored,
            pauses=status.pauses,
            gap_count=ledger.gap_count,
            gaps=ledger.gaps,
            resume_cursor=ledger.resume_cursor,
            saves=saver.saves if saver is not None else 0,
            save_failures=saver.failures if saver is not None else 0,
            unsaved=saver.unsaved if saver is not None else 0,
            acknowledged=acknowledger.sent if acknowledger is not None else 0,
            acknowledgements_failed=acknowledger.failed if acknowledger is not None else 0,
            acknowledgements_waiting=acknowledger.waiting if acknowledger is not None else 0,
            acknowledgements_dropped=acknowledger.dropped if acknowledger is not None else 0,
            repaired=repairer.repaired if repairer is not None else 0,
            settled=assembly.buffer.settled_events,
            redelivered=assembly.buffer.redelivered,
            dead=assembly.buffer.dead,
            notices_dropped=assembly.reporter.dropped,
        )


def _utc_now() -> datetime:
    return datetime.now(UTC)


@async_context
@trio.lowlevel.enable_ki_protection
async def open_realtime(
    api_key: str | Callable[[], Awaitable[str]] | None = None,
    *,
    endpoints: Endpoints | None = None,
    event_types: Iterable[str] | None = None,
    workflow_ids: Iterable[str] | None = None,
    timeouts: Timeouts | None = None,
    limits: Limits | None = None,
    retry: RetryPolicy | None = None,
    redelivery: RetryPolicy | None = None,
    resume_from: str | Position | None = None,
    cursor_store: CursorStore | str | os.PathLike[str] | None = None,
    consumer: str = "default",
    acknowledge: bool = True,
    repair_gaps: bool = False,
    on_notice: Callable[[Notice], object] | None = None,
    ssl_context: ssl.SSLContext | None = None,
    allow_insecure: bool = False,
) -> AsyncIterator[Realtime]:
    """Open a client, which stays connected to Kadoa until the block is left.

    Entering returns when the first subscription has been sent. Leaving, or
    being cancelled anywhere in it, closes every socket within 2 seconds and
    leaves no task behind. Events that are not settled then are delivered again
    to a later run that resumes from `Realtime.position`.

    Example::

        async with open_realtime() as realtime:
            async for event in realtime.events:
                match event.message:
                    case WorkflowFailed(workflow_id=workflow, reason=reason):
                        print(workflow, "failed:", reason)

    Args:
        api_key: Kadoa's API key; None reads ``KADOA_API_KEY``. Or an async
            function without arguments that returns the key, for keys that
            change: it is awaited for every connection attempt, maximum
            `Timeouts.token`. If it raises, or returns nothing that can be a
            key, the attempt has failed, and is repeated.
        endpoints: where Kadoa is; None reads the environment
            (`Endpoints.from_environment`), where Kadoa's own are the default.
        event_types: deliver events of these types only; None for all. An
            event that is filtered out counts as settled.
        workflow_ids: deliver events of these workflows only; None for all. An
            event that names no workflow passes.
        timeouts: how long the client waits for a frame, a connection, an
            answer; default ``Timeouts()``.
        limits: how many events and bytes the client reads ahead and holds in
            memory; default ``Limits()``.
        retry: when the client tries again; default ``RetryPolicy()``.
        redelivery: when an event whose delivery or batch has failed is
            delivered again; default ``RetryPolicy(initial=0.1)``: up to 0.1 s
            after the first failure, up to 30 s after many, at random.
        resume_from: where to resume: a cursor, or the `Realtime.position` of
            an earlier run, which also holds what was settled. None begins
            with the events that are sent from now on. Not together with *cursor_store*.
        cursor_store: where the position is saved for later runs; a path means
            ``SQLiteCursorStore(path)``. The position is loaded when the
            client is opened, and saved behind the events and on leaving. None
            holds it in memory only.
        consumer: the name under which the position is saved, for each team.
            Programs that share a store need a name each. Default "default".
        acknowledge: report each settled event to Kadoa, as its own SDKs do on
            delivery. What this changes at Kadoa is not documented. Default
            True.
        repair_gaps: look up possible gaps in Kadoa's notification log, and
            deliver missed events, late and marked (`Event.from_log`).
            Default False: it makes requests that count against the account.
        on_notice: called with every `Notice`, from the first attempt on, also
            while entering has not returned. It must be quick, and not raise;
            if it raises an `Exception`, the client goes on, and the log
            (``kadoa_trio.client``) has an error.
        ssl_context: for both the API and the WebSocket; default: the
            authorities of certifi, ``SSL_CERT_FILE`` or ``SSL_CERT_DIR``, as httpx has them.
        allow_insecure: allow plain ``http://`` and ``ws://`` to hosts that
            are not loopback addresses: the key crosses the network in the
            clear. Default False.

    Yields:
        The open client.

    Raises:
        ConfigurationError: an option cannot be used, or there is no key.
        AuthenticationError: the key or a token was refused, twice.
        RequestRefusedError: the token request was refused for good.
        ConnectionFailedError: no connection within `Timeouts.connect`.
        ConsumerOwnedError: another client owns the consumer's position.
        CursorStoreError: the store cannot be used; on leaving: the last
            position could not be saved.
        KadoaError: on leaving: a fault that ended the client and that no
            ``receive`` has raised. If the block raises on its own, the fault
            is a note on that exception instead.

    After entering, the same faults are raised by ``receive``, once. No
    exception group is raised for a fault of the client.
    """
    # Whatever cannot be called may be a key of a wrong type.
    ask = api_key if callable(api_key) else None
    key = None if callable(api_key) else hidden(api_key)
    del api_key  # whatever is raised through this frame shows its names
    check_async("api_key", ask)
    check_hook("on_notice", on_notice)
    settings = settings_of(
        endpoints=endpoints,
        timeouts=timeouts,
        limits=limits,
        retry=retry,
        redelivery=redelivery,
        ssl_context=ssl_context,
        allow_insecure=allow_insecure,
    )
    options = _Options(
        position=_position_of(resume_from),
        cursor_store=store_of(cursor_store),
        consumer=consumer,
        acknowledge=acknowledge,
        repair_gaps=repair_gaps,
        event_types=strings_of("event_types", event_types),
        workflow_ids=strings_of("workflow_ids", workflow_ids),
    )
    credential = ask if ask is not None else read_key(key)
    async with _run(credential, settings, options, _RNG, _utc_now, on_notice) as realtime:
        yield realtime


def _position_of(resume_from: object) -> Position | None:
    if isinstance(resume_from, str):
        resume_from = Position(cursor=resume_from)
    if resume_from is not None and not isinstance(resume_from, Position):
        raise refusal("resume_from", "a cursor (a string), a Position or None", resume_from)
    if resume_from is not None and resume_from.cursor == "":
        raise ConfigurationError("resume_from must not be empty; None begins with what is sent from now on")
    return resume_from


@attrs.frozen(kw_only=True)
class _Options:
    """The options that the client itself reads, checked; the others are in `Settings`."""

    position: Position | None
    cursor_store: CursorStore | None
    consumer: str
    acknowledge: bool
    repair_gaps: bool
    event_types: frozenset[str] | None
    workflow_ids: frozenset[str] | None

    def __attrs_post_init__(self) -> None:
        check_text("consumer", self.consumer)
        check_flag("acknowledge", self.acknowledge)
        check_flag("repair_gaps", self.repair_gaps)
        if self.position is not None and self.cursor_store is not None:
            raise ConfigurationError("resume_from and cursor_store both say where to resume; use one of them")


class _Assembly:
    """The parts of one client, connected.

    Events go from the connections through the admission into the buffer; what
    is settled there goes to the observers: the saver, the acknowledger, and a
    simulated Kadoa. Imports never run upwards: a lower part calls a higher one
    only through a protocol or a callable that it is given (the observers of
    buffer and admission, ``on_abandoned`` of the buffer, and ``on_live`` of a connection).
    """

    def __init__(
        self,
        http: KadoaApi,
        settings: Settings,
        options: _Options,
        rng: random.Random,
        reporter: Reporter,
    ) -> None:
        self.reporter = reporter
        self.ledger: Ledger = Ledger(
            settings.limits.dedupe_window, options.position, stable_after=settings.timeouts.stable_after
        )
        self.buffer: Buffer = Buffer(settings, self.ledger, reporter, rng)
        self.admission: Admission = Admission(
            self.ledger, self.buffer, reporter, event_types=options.event_types, workflow_ids=options.workflow_ids
        )
        self.saver: Saver | None = None
        self.acknowledger: Acknowledger | None = None
        self.repairer: Repairer | None = None
        simulated = settings.endpoints.network
        if simulated is not None and simulated.settlement_observer is not None:
            self.buffer.observe(simulated.settlement_observer)
        if options.cursor_store is not None:
            self.saver = Saver(options.cursor_store, options.consumer, self.ledger, self.buffer, reporter)
            self.buffer.observe(self.saver)
            self.admission.observe(self.saver)
        if options.acknowledge:
            self.acknowledger = Acknowledger(http, reporter)
            self.buffer.observe(self.acknowledger)
        if options.repair_gaps:
            self.repairer = Repairer(http, self.ledger, self.admission, reporter, settings.limits.buffered_bytes)
            self.admission.observe(self.repairer)
        team = TeamCheck(self.ledger, self.saver, self.repairer)
        context = ConnectionContext(settings, http, self.ledger, self.admission, reporter, team, rng)
        self.supervisor: Supervisor = Supervisor(context)
        self.buffer.on_abandoned = self.supervisor.stop
        self.fault: CursorStoreError | None = None
        """What went wrong after the client had ended."""

    async def run(self, nursery: trio.Nursery) -> None:
        """Start everything; return when the first subscription is sent."""
        self.buffer.start(nursery)
        if self.saver is not None:
            nursery.start_soon(self._save, self.saver)
        if self.acknowledger is not None:
            self.acknowledger.start(nursery)
        if self.repairer is not None:
            nursery.start_soon(self.repairer.run)
        nursery.start_soon(self.supervisor.run)
        await self.supervisor.started.wait()
        if self.supervisor.start_fault is not None:
            raise self.supervisor.start_fault

    def stop(self) -> None:
        """End all connections, and start no task from now on."""
        self.supervisor.stop()
        self.buffer.stop_starting()
        if self.acknowledger is not None:
            self.acknowledger.stop_starting()

    async def finish(self, deadline: float) -> None:
        """Save and acknowledge for the last time, when all sockets are closed. Run it with `clean_up`."""
        if self.saver is not None:
            self.fault = await self.saver.finish(deadline) or self.fault
        if self.acknowledger is not None:
            await self.acknowledger.finish(min(deadline, trio.current_time() + _LAST_ACKNOWLEDGEMENTS))

    @trio.lowlevel.enable_ki_protection
    async def _save(self, saver: Saver) -> None:
        try:
            await saver.run()
        except OwnershipLostError as exc:
            if not self.supervisor.fail(exc):
                self.fault = exc


@async_context
@trio.lowlevel.enable_ki_protection
async def _run(
    api_key: Secret | Callable[[], Awaitable[str]],
    settings: Settings,
    options: _Options,
    rng: random.Random,
    wall_clock: Callable[[], datetime],
    on_notice: Callable[[Notice], object] | None = None,
) -> AsyncIterator[Realtime]:
    # What surfaces:
    #   entering fails                            the KadoaError, bare
    #   the body raises                           the same object, with a fault of ours as a note
    #   the body ends, a fault was not received   the fault, bare
    #   ... or the last position was not saved    the CursorStoreError, bare
    #   KeyboardInterrupt in a task of ours       it, bare
    #   cancelled from outside                    Cancelled, one, and no group
    reporter = Reporter(wall_clock, on_notice=on_notice)
    error: BaseException | None = None
    crash: BaseException | None = None
    realtime: Realtime | None = None
    async with open_api(api_key=api_key, settings=settings, calls=options.repair_gaps, wall_clock=wall_clock) as http:
        reporter.censor = http.censor
        assembly = _Assembly(http, settings, options, rng, reporter)
        leaving_at = math.inf
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                # The nursery must see no exception of the body, or it would wrap it. Nothing is swallowed: see below.
                try:
                    opened = Realtime(assembly)
                    await assembly.run(nursery)
                    realtime = opened
                    yield realtime
                except BaseException as exc:  # noqa: ASYNC103  # raised again, outside of the nursery
                    error = exc
                    if realtime is None and isinstance(exc, BaseExceptionGroup):
                        # Cancelled while it started, the supervisor's own nursery raises a group.
                        error = pick(exc)
                leaving_at = trio.current_time()
                assembly.stop()
                nursery.cancel_scope.cancel(reason="the client is left")
        except BaseExceptionGroup as group:
            crash = pick(group)
        finally:
            deadline = min(leaving_at, trio.current_time()) + LEAVE_TIMEOUT
            try:
                await clean_up(deadline, assembly.finish, deadline - _RESERVE)  # noqa: ASYNC102  # shielded in there
            except KeyboardInterrupt as exc:
                crash = exc
            finally:
                reporter.close()
    fault: Exception | None = assembly.buffer.take_fault() or assembly.fault
    if isinstance(crash, (KeyboardInterrupt, SystemExit)):
        raise crash
    if crash is not None and isinstance(error, trio.Cancelled):
        raise crash  # a task of ours has failed, and so cancelled the body
    if error is not None:
        if fault is not None and not isinstance(error, trio.Cancelled):
            error.add_note(f"kadoa_trio had failed, too: {type(fault).__name__}: {fault}")
        raise error
    if crash is not None:
        raise crash
    if fault is not None:
        raise fault
