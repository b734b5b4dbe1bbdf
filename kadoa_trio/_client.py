"""`open_realtime`: the way in, and what a program holds while it is open."""

from __future__ import annotations

import os
import random
import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import final

import attrs
import trio

from ._backoff import RetryPolicy
from ._channel import EventChannel, Intake
from ._connection import Shared
from ._errors import ConfigurationError
from ._exits import pick
from ._http import open_http
from ._ledger import Gap, Ledger, Position
from ._notices import ConnectionStatus, Notice, Reporter, State
from ._settings import Endpoints, Settings
from ._supervisor import Supervisor


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
    notices_dropped: int
    """Notices that nobody read in time."""


@final
class Realtime:
    """An open client. Made by `open_realtime`."""

    def __init__(self, shared: Shared, supervisor: Supervisor) -> None:
        self._shared = shared
        self._supervisor = supervisor
        self._events = shared.intake.open_handle()

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
        return self._shared.reporter.notices

    @property
    def state(self) -> State:
        """What the newest connection is doing."""
        return self._shared.reporter.status.state

    @property
    def position(self) -> Position:
        """How far the program's processing has come, for ``resume_from`` of a later run.

        It passes no event that was not settled.
        """
        reporter = self._shared.reporter
        live = any(connection.live for connection in reporter.status.connections)
        return self._shared.ledger.settled_position(reporter.wall_clock() if live else None)

    async def wait_live(self) -> None:
        """Wait until the newest connection, or the one that it replaces, is live. Being cancelled changes nothing.

        Raises:
            trio.ClosedResourceError: the client was stopped.
            trio.BrokenResourceError: a fault has ended the client; `events` raises it.
        """
        live = frozenset({State.LIVE, State.REPLACING})
        state = await self._shared.reporter.wait_for(live | {State.STOPPED, State.FAILED})
        if state is State.STOPPED:
            raise trio.ClosedResourceError("the client was stopped")
        if state is State.FAILED:
            raise trio.BrokenResourceError("the client has failed; receiving from its events raises the fault")

    def stop(self) -> None:
        """End admission: nothing more is received from Kadoa; what is buffered is still handed out.

        ``async for`` over `events` ends after that. Call it for an orderly
        end, at SIGTERM for example: nothing that was finished is repeated by
        the next run. Stopping twice is fine.
        """
        self._supervisor.stop()

    def statistics(self) -> RealtimeStatistics:
        """Return what the client has done so far."""
        shared, status = self._shared, self._shared.reporter.status
        return RealtimeStatistics(
            state=status.state,
            connections=status.connections,
            attempts=status.attempts,
            opened=status.opened,
            drains=status.drains,
            replaced=status.replaced,
            lost=status.lost,
            received=shared.received,
            filtered=shared.filtered,
            repeated=shared.ledger.repeated,
            ignored=status.ignored,
            pauses=status.pauses,
            gap_count=shared.ledger.gap_count,
            gaps=shared.ledger.gaps,
            resume_cursor=shared.ledger.resume_cursor,
            notices_dropped=shared.reporter.dropped,
        )


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _only(name: str, values: Iterable[str] | None) -> frozenset[str] | None:
    if values is None:
        return None
    if isinstance(values, str):
        raise ConfigurationError(f"{name} must be a collection of strings, not one string")
    chosen = frozenset(values)
    if not chosen or not all(isinstance(value, str) and value for value in chosen):
        raise ConfigurationError(f"{name} must hold at least one non-empty string, and nothing else; None means all")
    return chosen


def _key(api_key: str | None) -> str:
    if api_key is None:
        api_key = os.environ.get("KADOA_API_KEY")
        if not api_key:
            raise ConfigurationError("no API key: pass api_key, or set the environment variable KADOA_API_KEY")
    if not isinstance(api_key, str):
        raise ConfigurationError(f"the API key must be a string, not {type(api_key).__name__}")
    return api_key


@asynccontextmanager
async def open_realtime(
    api_key: str | None = None,
    *,
    endpoints: Endpoints | None = None,
    event_types: Iterable[str] | None = None,
    workflow_ids: Iterable[str] | None = None,
    heartbeat_timeout: float = 30.0,
    stable_after: float = 10.0,
    connect_timeout: float = 60.0,
    auth_grace: float = 300.0,
    token_timeout: float = 10.0,
    handshake_timeout: float = 10.0,
    retry: RetryPolicy | None = None,
    overlap_limit: float = 60.0,
    max_message_size: int = 64 * 1024 * 1024,
    max_buffered_events: int = 1_000,
    max_buffered_bytes: int = 64 * 1024 * 1024,
    max_unsettled: int = 10_000,
    dedupe_window: int = 50_000,
    resume_from: str | Position | None = None,
    ssl_context: ssl.SSLContext | None = None,
    allow_insecure: bool = False,
) -> AsyncIterator[Realtime]:
    """Open a client: connected to Kadoa, and kept so until the block is left.

    Entering returns when the first subscription has been sent. Leaving, or
    being cancelled anywhere in it, closes every socket within 2 seconds and
    leaves no task behind. What is not settled then is delivered again to a
    later run that resumes from `Realtime.position`.

    Example::

        async with open_realtime() as realtime:
            async for event in realtime.events:
                match event.message:
                    case WorkflowFailed(workflow_id=workflow, reason=reason):
                        print(workflow, "failed:", reason)

    Args:
        api_key: Kadoa's API key; None reads ``KADOA_API_KEY``.
        endpoints: where Kadoa is; None reads the environment
            (`Endpoints.from_environment`), where Kadoa's own are the default.
        event_types: deliver events of these types only; None for all. What is
            filtered out counts as settled.
        workflow_ids: deliver events of these workflows only; None for all. An
            event that names no workflow passes.
        heartbeat_timeout: a connection without a frame for so long, in
            seconds, is lost. Default 30: Kadoa sends a heartbeat every 15 s,
            as its earlier documentation and its SDKs say.
        stable_after: a connection that lived for so long, in seconds, was a
            success: the backoff starts over, and its replay counts as
            complete. Default 10.
        connect_timeout: how long the first connection is tried for, in
            seconds, until the server has sent a frame. After that an outage
            is outwaited however long it takes. Default 60.
        auth_grace: how long a key or a token may be refused after it had been
            accepted, in seconds. Default 300: a gateway's hiccup does not end
            a service of weeks.
        token_timeout: for the token request as a whole, in seconds. Default 10.
        handshake_timeout: for connecting, TLS and the WebSocket handshake
            together, and again for the subscription, in seconds. Default 10.
        retry: when to try again; default ``RetryPolicy()``.
        overlap_limit: an old connection is read beside a live new one for at
            most so long, in seconds, if the server does not close it before.
            Default 60.
        max_message_size: in characters; a larger message ends the connection,
            and the client if it comes again (`MessageTooLargeError`). Default
            64 Mi: data changes may carry the whole snapshot.
        max_buffered_events: events that wait to be received. When so many do,
            the client stops reading. Default 1,000.
        max_buffered_bytes: the same in bytes; a larger event is let in alone.
            Default 64 Mi.
        max_unsettled: the span from the oldest unsettled event to the newest
            one, in events; admission pauses there. Default 10,000.
        dedupe_window: ids that are remembered; at least the sum of
            *max_buffered_events* and *max_unsettled*. Default 50,000.
        resume_from: where to go on: a cursor, or the `Realtime.position` of
            an earlier run, which also knows what was settled. None begins
            with what is sent from now on.
        ssl_context: for both the API and the WebSocket; default httpx's.
        allow_insecure: allow plain ``http://`` and ``ws://`` to hosts that
            are not loopback addresses: the key crosses the network in the
            clear. Default False.

    Yields:
        The open client.

    Raises:
        ConfigurationError: an option cannot be used, or there is no key.
        AuthenticationError: the key or a token was refused, twice.
        RequestRefusedError: the token request was refused for good.
        ConnectionFailedError: no connection within *connect_timeout*.
        KadoaError: on leaving: a fault that ended the client and that no
            ``receive`` has raised. If the block raises on its own, the fault
            is a note on that exception instead.

    After entering, the same faults are raised by ``receive``, once. No
    exception group is raised for a fault of the client.
    """
    settings = Settings(
        endpoints=Endpoints.from_environment() if endpoints is None else endpoints,
        heartbeat_timeout=heartbeat_timeout,
        stable_after=stable_after,
        connect_timeout=connect_timeout,
        auth_grace=auth_grace,
        token_timeout=token_timeout,
        handshake_timeout=handshake_timeout,
        retry=RetryPolicy() if retry is None else retry,
        overlap_limit=overlap_limit,
        max_message_size=max_message_size,
        max_buffered_events=max_buffered_events,
        max_buffered_bytes=max_buffered_bytes,
        max_unsettled=max_unsettled,
        dedupe_window=dedupe_window,
        ssl_context=ssl_context,
        allow_insecure=allow_insecure,
    )
    position = Position(cursor=resume_from) if isinstance(resume_from, str) else resume_from
    if position is not None and not isinstance(position, Position):
        raise ConfigurationError("resume_from must be a cursor or a Position")
    if position is not None and position.cursor == "":
        raise ConfigurationError("resume_from must not be empty; None begins with what is sent from now on")
    async with _run(
        _key(api_key),
        settings,
        position,
        _only("event_types", event_types),
        _only("workflow_ids", workflow_ids),
        random.Random(),
        _utc_now,
    ) as realtime:
        yield realtime


@asynccontextmanager
async def _run(
    api_key: str,
    settings: Settings,
    position: Position | None,
    event_types: frozenset[str] | None,
    workflow_ids: frozenset[str] | None,
    rng: random.Random,
    wall_clock: Callable[[], datetime],
) -> AsyncIterator[Realtime]:
    # What surfaces:
    #   entering fails                            the KadoaError, bare
    #   the body raises                           the same object, with a fault of ours as a note
    #   the body ends, a fault was not received   the fault, bare
    #   KeyboardInterrupt in a task of ours       it, bare
    #   cancelled from outside                    Cancelled
    reporter = Reporter(wall_clock)
    ledger = Ledger(settings.dedupe_window, position)
    error: BaseException | None = None
    crash: BaseException | None = None
    realtime: Realtime | None = None
    async with open_http(api_key=api_key, settings=settings, wall_clock=wall_clock) as http:
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                # The nursery must see no exception of the body, or it would wrap it. Nothing is swallowed: see below.
                try:
                    intake = Intake(settings, ledger, reporter, lambda: supervisor.stop())
                    shared = Shared(settings, http, ledger, intake, reporter, rng, event_types, workflow_ids)
                    supervisor = Supervisor(shared)
                    realtime = Realtime(shared, supervisor)
                    await nursery.start(supervisor.run)
                    yield realtime
                except BaseException as exc:  # noqa: ASYNC103  # raised again, outside of the nursery
                    error = exc
                if realtime is not None:
                    realtime.stop()
                nursery.cancel_scope.cancel(reason="the client is left")
        except BaseExceptionGroup as group:
            crash = pick(group)
        finally:
            reporter.close()
    fault = None if realtime is None else realtime._shared.intake.take_fault()
    if isinstance(crash, (KeyboardInterrupt, SystemExit)):
        raise crash
    if error is not None:
        if fault is not None and not isinstance(error, trio.Cancelled):
            error.add_note(f"kadoa_trio had failed, too: {type(fault).__name__}: {fault}")
        raise error
    if crash is not None:
        raise crash
    if fault is not None:
        raise fault
