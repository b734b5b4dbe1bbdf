"""Runs a program: processes that open the client, are crashed, left and opened again, beside one server.

What must hold is checked as things happen, and the first promise that is
broken ends the program. The promises::

    not deaf      a healthy connection, an attempt, or a bounded timer; events of a healthy connection come out
    lossless      every event is handed out, or a reported possible gap spans the time at which it was sent
    spans         a possible gap does not end before it begins
    once          no event twice in a process, except after a failed delivery; none that a completed save covers
    order         an event that every connection brought before another one comes out before it
    crash-safe    the saved position passes no event that was not settled, and never goes back
    cursor kept   a cursor is not given up for a short refusal; what can be resumed is resumed
    bounded       sockets, attempts, buffers, acknowledgements, the time to leave
    backoff       a connection that made progress is replaced at once
    structured    documented exceptions, no crash of the client, nothing left behind
    bare          no exception group
    patient       a fault that may pass does not end a client that was live
    repaired      what the log holds of a possible gap is handed out, and nothing else of it
    discreet      key and token in no log record, notice, repr or exception
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, Final
from unittest import mock

import attrs
import trio
import trio.testing

import kadoa_trio
import kadoa_trio._client
import kadoa_trio._engine._process
from kadoa_trio import Endpoints, Event, Limits, Position, Realtime, Timeouts, open_realtime, process

from ._program import Program
from ._server import BASE, FILTER, KEY, SECRETS, SHORT_REFUSAL, Item, Server
from ._store import ChaosStore

PROMISES: Final = (
    "not deaf",
    "lossless",
    "spans",
    "once",
    "order",
    "crash-safe",
    "cursor kept",
    "bounded",
    "backoff",
    "structured",
    "bare",
    "patient",
    "repaired",
    "discreet",
)
WELL_AFTER: Final = 300.0
"""How long a client may take to deliver again when the server is well, in seconds.

``Retry-After`` is cut to 120 s, and a hung attempt before it takes 3 times
10 s; a half-open connection is noticed after 30 s and its replacement may
wait 30 s; held events wait a minute.
"""
HELD_LIMIT: Final = 150.0
"""How long an event may be held that a healthy connection has brought, in seconds."""
LEAVE_LIMIT: Final = 2.2
DEAF_LIMIT: Final = 9 * 3_600.0
"""How long a subscription that the server has lost may go unnoticed: 6 h, with jitter, in seconds."""
_TICK: Final = 5.0
_MAX_STEPS: Final = 4_000_000
_SLACK: Final = timedelta(milliseconds=2)


class _Failed(Exception):
    """A delivery that the program fails."""


@attrs.frozen
class Violation:
    """A promise that was broken."""

    promise: str
    text: str
    at: float

    def __str__(self) -> str:
        return f"{self.promise}: {self.text} (at {self.at:.2f} s)"


@attrs.define
class Result:
    """What a program came to."""

    violation: Violation | None
    events: int
    connections: int
    processes: int
    gaps: int
    seconds: float
    """Of virtual time."""
    trace: list[str]


@attrs.define(eq=False)
class Run:
    """A process: from opening the client to its end."""

    number: int
    world: World
    started_at: float
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    realtime: Realtime | None = None
    dead: bool = False
    """It has crashed: nothing that it does counts any more."""
    left_at: float | None = None
    stopped: bool = False
    ended: bool = False
    live: bool = False
    """A connection has delivered a frame."""
    fresh: bool = True
    """It knows of no earlier process."""
    without_cursor: bool = True
    registered: bool = False
    covered: frozenset[int] = frozenset()
    handed: set[int] = attrs.field(factory=set)
    failed: set[int] = attrs.field(factory=set)
    order: list[int] = attrs.field(factory=list)
    brought: set[int] = attrs.field(factory=set)
    settled: int = 0
    settled_here: set[int] = attrs.field(factory=set)
    saved_here: int = 0
    store_failed: bool = False
    lied_to: bool = False
    doomed: bool = False
    """The store has said that somebody else owns the position: the client must end."""
    waiting: bool = False
    restart_after: float = 0.5
    settings: dict[str, int] = attrs.field(factory=dict)

    def starts_from(self, position: Position | None, covered: frozenset[int]) -> None:
        self.fresh = position is None
        self.without_cursor = position is None or position.cursor is None
        self.covered = covered
        if self.without_cursor:
            self.world.anchor = None

    def saved(self, covered: frozenset[int]) -> None:
        self.saved_here = len(self.settled_here & covered)


class World:
    """One program, running."""

    def __init__(self, program: Program, ignore: frozenset[str] = frozenset()) -> None:
        self.program = program
        self.ignore = ignore
        self.violation: Violation | None = None
        self.lines: list[str] = []
        self.server = Server(self, program.style)
        self.store = ChaosStore(self)
        self.run: Run | None = None
        self.runs: list[Run] = []
        self.settled: set[int] = set()
        self.handed_ever: set[int] = set()
        self.gaps: list[Any] = []
        self.repaired: list[Any] = []
        self.own: tuple[Position | None, frozenset[int]] = (None, frozenset())
        self.owed_from: int | None = None
        self.anchor: int | None = None
        self.low = 0
        self.offset = 0.0
        self.offsets = [0.0]
        self.stall_until = 0.0
        self.failures = 0
        self.calm = False
        self.ending = False
        self.blocked_at = -1e9
        self.cut: tuple[str, float] | None = None
        self.clock = trio.testing.MockClock(autojump_threshold=0)
        self.countdown = _Countdown(self)
        self.scope = trio.CancelScope()
        self.alive_at = 0.0
        self.finished = trio.Event()
        steps = program.steps
        self.strict = (
            program.style.cursors in ("ordered", "opaque", "grouped", "some")
            and not program.style.retention
            and program.options.position == "store"
            and not any(
                (step.op == "drain" and step.args[1] is False)
                or (step.op == "refuse" and step.args[0] > SHORT_REFUSAL)
                or (step.op == "store" and step.args[0] in ("vanish", "lie_done"))
                or step.op == "deaf"
                for step in steps
            )
        )
        """Everything can be resumed, so that nothing may be lost, gap or not."""

    # ---- what everything uses ----------------------------------------------------------------------------------

    def wall(self) -> datetime:
        return BASE + timedelta(seconds=self.clock.current_time() + self.offset)

    def trace(self, text: str) -> None:
        if len(self.lines) < 5_000:
            self.lines.append(f"{self.clock.current_time():9.3f} {text}")

    def fail(self, promise: str, text: str) -> None:
        """Record that a promise is broken, and end the program."""
        assert promise in PROMISES
        self.trace(f"BROKEN {promise}: {text}")
        if self.violation is None and promise not in self.ignore:
            self.violation = Violation(promise, text, self.clock.current_time())
            self.scope.cancel()

    def is_up(self, run: Run | None) -> bool:
        """Tell whether this process is the present one, and has a client that should work."""
        return (
            run is not None
            and run is self.run
            and run.realtime is not None
            and run.left_at is None
            and not (run.dead or run.stopped or run.ended or run.doomed)
        )

    def wanted(self, item: Item) -> bool:
        return not self.program.options.filters or item.type in FILTER

    # ---- the whole ---------------------------------------------------------------------------------------------

    async def main(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                self.server.nursery = nursery
                nursery.start_soon(self._watch)
                nursery.start_soon(self._live)
                await self._perform()
                nursery.cancel_scope.cancel()

    async def _perform(self) -> None:
        for step in self.program.steps:
            await trio.sleep(step.after)
            self.trace(f"step {step}")
            getattr(self, f"op_{step.op}")(*step.args)
        await trio.sleep(0.5)
        self.heal()
        limit = await self._recovered()
        await trio.sleep(45)
        self.server.emit()
        await trio.sleep(1)
        self.server.emit()
        await self._arrived(limit)
        if self.program.options.repair:
            await self._until(self._all_repaired, 7200)
        self.check_end()
        run = self.run
        assert run is not None
        if self.program.options.position != "none":
            # Another process, to see that nothing was forgotten.
            self._leave(run, 0.5)
            limit = await self._recovered()
            await self._arrived(limit)
            if self.program.options.repair:
                await self._until(self._all_repaired, 7200)
            self.check_end()
        self.ending = True
        if self.run is not None:
            self._leave(self.run, 0.0)
        with trio.move_on_after(10):
            await self.finished.wait()
        if not self.finished.is_set():
            self.fail("bounded", "the client was left, and has not ended within 10 s")

    async def _recovered(self) -> float:
        """Wait until what is sent arrives, and what is owed was handed out; return when that must be so."""
        started = trio.current_time()
        limit = started + (DEAF_LIMIT if any(conn.deaf and conn.open for conn in self.server.conns) else WELL_AFTER)
        sentinels: list[Item] = []
        every = 10.0 if limit - started < 1_000 else 600.0
        while not any(item.serial in self.settled for item in sentinels):
            if trio.current_time() > limit:
                self.fail(
                    "not deaf",
                    f"the server is well since {started:.1f} s, and nothing of what it sent since then was handed out",
                )
                return limit
            item = self.server.emit()
            if self.wanted(item):
                sentinels.append(item)
            await trio.sleep(0.5 if len(sentinels) < 3 else every)
        await self._until(lambda: self._unexplained() is None, limit - trio.current_time())
        return limit

    async def _arrived(self, limit: float) -> None:
        """Wait until what was sent last was handed out, too, or *limit* on the clock."""
        await trio.sleep(15)
        # A connection that was well at first may have ended since; the next attempt waits as long as a Retry-After says.
        await self._until(lambda: self._unexplained() is None, limit - trio.current_time())

    async def _until(self, condition: Any, seconds: float) -> None:
        limit = trio.current_time() + seconds
        while not condition() and trio.current_time() < limit:  # noqa: ASYNC110  # virtual time costs nothing
            await trio.sleep(_TICK)

    def heal(self) -> None:
        """End all faults."""
        self.trace("all faults end")
        self.calm = True
        self.server.heal()
        self.store.heal()
        self.stall_until = 0.0
        self.failures = 0
        self.cut = None

    # ---- steps -------------------------------------------------------------------------------------------------

    def op_emit(self, count: int, spacing: float, size: int = 0) -> None:
        self.server.nursery.start_soon(self._emit, count, spacing, size)

    async def _emit(self, count: int, spacing: float, size: int) -> None:
        for _ in range(count):
            self.server.emit(size)
            await trio.sleep(spacing)

    def op_reset(self, which: str) -> None:
        self.server.reset(which)

    def op_close(self, code: int | None, flush: bool, which: str) -> None:
        self.server.close(code, flush, which)

    def op_silence(self, which: str) -> None:
        for conn in self.server.chosen(which):
            conn.silent = True

    def op_deaf(self, which: str) -> None:
        for conn in self.server.chosen(which):
            if conn.live:
                conn.deaf = True

    def op_drain(self, advice: object, promised: bool | None, close_after: float | None, which: str) -> None:
        conns = self.server.drain(advice, promised, which)
        if close_after is not None:
            self.server.nursery.start_soon(self._close_later, conns, close_after)

    async def _close_later(self, conns: list[Any], seconds: float) -> None:
        await trio.sleep(seconds)
        for conn in conns:
            conn.close(1001, "Server shutting down")

    def op_token(self, kind: str, seconds: float, retry_after: int | None) -> None:
        self.server.faults["token"] = (trio.current_time() + seconds, (kind, retry_after))

    def op_handshake(self, kind: str, seconds: float, retry_after: int | None) -> None:
        self.server.faults["handshake"] = (trio.current_time() + seconds, (kind, retry_after))

    def op_connect(self, kind: str, seconds: float) -> None:
        self.server.faults["connect"] = (trio.current_time() + seconds, kind)

    def op_refuse(self, seconds: float, how: int | str, greets: bool) -> None:
        self.server.faults["refuse"] = (trio.current_time() + seconds, (how, greets))

    def op_sick(self, seconds: float) -> None:
        self.server.faults["sick"] = (trio.current_time() + seconds, True)

    def op_lives(self, life: float, seconds: float, how: str) -> None:
        self.server.faults["lives"] = (trio.current_time() + seconds, (life, how))

    def op_garbage(self, kind: int) -> None:
        self.server.garbage(kind)

    def op_stall(self, seconds: float) -> None:
        self.stall_until = trio.current_time() + seconds

    def op_fail(self, count: int) -> None:
        self.failures += count

    def op_store(self, kind: str, seconds: float) -> None:
        self.store.break_for(kind, seconds)

    def op_wall(self, seconds: float) -> None:
        self.offset += seconds
        self.offsets.append(self.offset)

    def op_block(self, seconds: float) -> None:
        for conn in self.server.conns:
            if conn.healthy and self.server.style.heartbeat:
                conn.wire.write_now(b"\x81\x14" + b'{"type":"heartbeat"}')
        self.clock.jump(seconds)
        self.blocked_at = self.clock.current_time()
        self.server.attempt_due = None
        for conn in self.server.conns:
            if conn.healthy:
                conn.last_frame_at = self.blocked_at

    def op_stop(self, restart_after: float) -> None:
        run = self.run
        if run is not None and self.is_up(run):
            run.stopped = True
            run.restart_after = restart_after
            self.server.attempt_due = None
            assert run.realtime is not None
            run.realtime.stop()

    def op_leave(self, steps: int, restart_after: float) -> None:
        self.countdown.arm(steps, lambda run: self._leave(run, restart_after))

    def op_crash(self, steps: int, restart_after: float) -> None:
        self.countdown.arm(steps, lambda run: self._crash(run, restart_after))

    def op_cut(self, how: str, seconds: float) -> None:
        self.cut = (how, seconds)

    def _leave(self, run: Run, restart_after: float) -> None:
        if run.left_at is None and not run.ended:
            self.trace(f"process {run.number} is left")
            run.left_at = self.clock.current_time()
            run.restart_after = restart_after
            self.server.attempt_due = None
            run.scope.cancel()

    def _crash(self, run: Run, restart_after: float) -> None:
        if not run.dead and not run.ended:
            self.trace(f"process {run.number} dies")
            run.dead = True
            run.left_at = run.left_at or self.clock.current_time()
            run.restart_after = restart_after
            self.server.attempt_due = None
            run.scope.cancel()

    # ---- processes ---------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        while not self.ending:
            run = Run(len(self.runs) + 1, self, trio.current_time())
            self.runs.append(run)
            self.run = run
            self.server.answers.clear()
            self.server.attempts.clear()
            self.server.attempt_due = None
            self.server.same_cursor = []
            self.trace(f"process {run.number} begins")
            self.server.last_token = ""  # of an earlier process: this one cannot know it
            self.server.last_attempt = self.alive_at = trio.current_time()
            await self._process(run)
            run.ended = True
            self.trace(f"process {run.number} has ended")
            self.check_order(run)
            if not self.ending:
                await trio.sleep(0.5 if self.calm else run.restart_after)
        self.finished.set()

    def _options(self, run: Run) -> dict[str, Any]:
        options = self.program.options
        chosen: dict[str, Any] = {
            "endpoints": Endpoints(
                public_api="http://127.0.0.1:1",
                websocket="ws://127.0.0.1:2/socket",
                realtime_api="http://127.0.0.1:3",
                network=self.server,
            ),
            "limits": Limits(
                buffered_events=options.buffered,
                buffered_bytes=options.buffered_bytes,
                unsettled=options.unsettled,
                unsaved=options.unsaved,
            ),
            "acknowledge": options.acknowledge,
            "repair_gaps": options.repair,
            "timeouts": Timeouts(auth_grace=options.auth_grace),
        }
        if options.filters:
            chosen["event_types"] = sorted(FILTER)
        if options.position == "store":
            chosen["cursor_store"] = self.store
        elif options.position == "own":
            position, covered = self.own
            run.starts_from(position, covered)
            if position is not None:
                chosen["resume_from"] = position
        else:
            run.starts_from(None, frozenset())
        return chosen

    async def _process(self, run: Run) -> None:
        cut, self.cut = self.cut, None
        if cut is not None:
            self.server.nursery.start_soon(self._cut, run, *cut)
        try:
            with run.scope:
                try:
                    async with open_realtime(KEY, **self._options(run)) as realtime:
                        run.realtime = realtime
                        self.server.nursery.start_soon(self._read_notices, run)
                        await self._consume(run)
                        run.left_at = run.left_at or trio.current_time()
                except BaseExceptionGroup as group:
                    if self.violation is None:
                        self.fail("bare", f"an exception group: {group!r}")
                    raise
        except trio.Cancelled:
            raise
        except Exception as exc:
            run.left_at = run.left_at or trio.current_time()
            run.restart_after = max(run.restart_after, 1.0)
            self.check_fault(run, exc)
        self.check_left(run)

    async def _cut(self, run: Run, how: str, seconds: float) -> None:
        await trio.sleep(seconds)
        if how == "crash":
            self._crash(run, 0.5)
        else:
            self._leave(run, 0.5)

    async def _consume(self, run: Run) -> None:
        assert run.realtime is not None
        events = run.realtime.events
        kind = self.program.options.consumer
        if kind == "workers":
            faults: list[Exception] = []
            try:
                async with trio.open_nursery() as nursery:
                    for _ in range(self.program.options.workers):
                        nursery.start_soon(self._worker, run, faults)
            except BaseExceptionGroup:
                await trio.lowlevel.checkpoint()  # raises Cancelled, bare
                raise
            if faults:
                raise faults[0]
            return
        if kind == "process":
            await process(events, functools.partial(self._handle, run), workers=self.program.options.workers)
            return
        if kind == "batches":
            with contextlib.suppress(trio.EndOfChannel):
                while True:
                    await self._take_batch(run)
        if kind == "delivery":
            while True:
                try:
                    run.waiting = True
                    async with events.delivery() as delivery:
                        run.waiting = False
                        serial = self.handed(run, delivery.event)
                        await self._work(run)
                        if self.failures and serial is not None and not run.dead:
                            self.failures -= 1
                            run.failed.add(serial)
                            raise _Failed
                        self.settling(run, serial)
                except _Failed:
                    continue
                except trio.EndOfChannel:
                    return
                finally:
                    run.waiting = False
        run.waiting = True
        async for event in events:
            run.waiting = False
            serial = self.handed(run, event)
            await self._work(run)
            if self.program.options.position == "own" and not run.dead and serial is not None:
                position = run.realtime.position_after(event)
                covered = run.covered | run.settled_here | {serial}
                self.check_save(run, position, self.own[0], also=serial)
                self.own = (position, covered)
            self.settling(run, serial)
            run.waiting = True

    async def _handle(self, run: Run, event: Event) -> None:
        serial = self.handed(run, event)
        await self._work(run)
        self._fail_perhaps(run, [serial])
        self.settling(run, serial)

    async def _take_batch(self, run: Run) -> None:
        assert run.realtime is not None
        with contextlib.suppress(_Failed):
            try:
                run.waiting = True
                async with run.realtime.events.batch(max_events=5, within=0.5) as batch:
                    run.waiting = False
                    serials = [self.handed(run, event) for event in batch]
                    await self._work(run)
                    if len(serials) > 2:
                        self.settling(run, serials.pop(1))
                        batch.settle(batch.events[1])
                    self._fail_perhaps(run, serials)
                    if self.program.options.position == "own" and not run.dead and None not in serials:
                        covered = run.covered | run.settled_here | {one for one in serials if one is not None}
                        self.own = (batch.position, covered)
                    for serial in serials:
                        self.settling(run, serial)
            finally:
                run.waiting = False

    def _fail_perhaps(self, run: Run, serials: list[int | None]) -> None:
        if self.failures and not run.dead and None not in serials:
            self.failures -= 1
            run.failed.update([one for one in serials if one is not None])
            raise _Failed

    async def _worker(self, run: Run, faults: list[Exception]) -> None:
        try:
            await self._work_off(run)
        except Exception as exc:
            faults.append(exc)

    async def _work_off(self, run: Run) -> None:
        assert run.realtime is not None
        while True:
            async with run.realtime.events.clone() as handle:
                async for event in handle:
                    serial = self.handed(run, event)
                    await self._work(run)
                    if self.failures and serial is not None and not run.dead:
                        self.failures -= 1
                        run.failed.add(serial)
                        break
                    self.settling(run, serial)
                else:
                    return

    async def _work(self, run: Run) -> None:
        while trio.current_time() < self.stall_until:  # noqa: ASYNC110  # the time may be set anew meanwhile
            await trio.sleep(min(self.stall_until - trio.current_time(), 2.0))
        if self.program.options.work and not self.calm:
            await trio.sleep(self.program.options.work)

    def handed(self, run: Run, event: Event) -> int | None:
        """Look at an event that the client hands out."""
        if run.dead:
            return None
        raw = event.raw
        body = raw.get("message") or raw.get("data") or {}
        serial = body.get("n") if isinstance(body, dict) else None
        log = self.server.log
        if not isinstance(serial, int) or not 0 <= serial < len(log):
            promise = "repaired" if event.from_log else "structured"
            self.fail(promise, f"{event} was handed out, which the server never owed to the socket")
            return None
        item = log[serial]
        if item.id is not None and event.id != item.id:
            self.fail("once", f"{event} was handed out with another id than the server's {item.id!r}")
        _ = event.message, event.timestamp, repr(event)
        if serial in run.handed and serial not in run.failed:
            self.fail("once", f"event {serial} was handed out twice in one process")
        if serial in run.covered and serial not in run.failed and len(run.covered) < 900:
            self.fail("once", f"event {serial} was handed out again, although a completed save covers it")
        if not self.wanted(item):
            self.fail("structured", f"event {serial} of type {item.type} was handed out in spite of event_types")
        if serial not in run.handed and not event.from_log:
            run.order.append(serial)
        run.handed.add(serial)
        run.failed.discard(serial)
        self.handed_ever.add(serial)
        if self.anchor is None:
            self.anchor = serial
        self.check_bounds(run)
        return serial

    def settling(self, run: Run, serial: int | None) -> None:
        """Note that the program is done with an event: the client is told in the same step."""
        if serial is not None and not run.dead:
            self.settled.add(serial)
            run.settled_here.add(serial)

    def subscribed(self, conn: Any) -> None:
        """Note a subscription of the present process."""

    def registered(self) -> None:
        """Note that a subscription takes effect."""
        run = self.run
        if run is not None and not run.registered:
            run.registered = True
            if run.fresh:
                self.owed_from = self.low = len(self.server.log)

    # ---- notices -----------------------------------------------------------------------------------------------

    async def _read_notices(self, run: Run) -> None:
        assert run.realtime is not None
        async for notice in run.realtime.notices:
            self.note(run, notice)

    def _drain_notices(self, run: Run) -> None:
        if run.realtime is not None:
            with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                while True:
                    self.note(run, run.realtime.notices.receive_nowait())

    def note(self, run: Run, notice: Any) -> None:
        """Look at a notice."""
        kind = type(notice).__name__
        self.trace(f"process {run.number}: {kind}: {notice}")
        self.check_text(str(notice), repr(notice))
        gap = getattr(notice, "gap", None)
        if kind == "Live":
            run.live = True
        elif kind == "PossibleGap":
            self.gaps.append(gap)
            if gap.since is not None and gap.since > gap.until:
                self.fail("spans", f"a gap that ends before it begins: {gap}")
            if gap.reason.name == "CURSOR_DROPPED":
                self._check_dropped()
        elif kind == "GapRepaired":
            self.repaired.append(gap)

    def _check_dropped(self) -> None:
        if self.program.style.retention and self.program.style.on_forgotten == "refuse":
            return
        longest = max((end - begin for begin, end in self.server.refusals), default=0.0)
        if longest < SHORT_REFUSAL:
            self.fail("cursor kept", f"the cursor was given up after it had been refused for {longest:.1f} s")

    # ---- checks ------------------------------------------------------------------------------------------------

    def covered(self, item: Item, gaps: list[Any]) -> bool:
        """Tell whether a possible gap spans the time at which this event was sent, by the client's clock."""
        slack = _SLACK
        if len(self.offsets) > 1:
            slack += timedelta(seconds=max(self.offsets) - min(self.offsets))
        return any(
            (gap.since is None or gap.since - slack <= item.wall) and item.wall <= gap.until + slack for gap in gaps
        )

    def _excused(self, item: Item, gaps: list[Any]) -> bool:
        return item.serial in self.settled or bool(item.exempt) or not self.wanted(item) or self.covered(item, gaps)

    def _unexplained(self, gaps: list[Any] | None = None, upto: int | None = None) -> Item | None:
        """Give the first event that is owed, was not settled, and that no gap spans."""
        if self.owed_from is None:
            return None
        log = self.server.log
        gaps = self.gaps if gaps is None else gaps
        while self.low < len(log) and log[self.low].serial in self.settled:
            self.low += 1
        for item in log[self.low : upto]:
            if not self._excused(item, gaps):
                return item
        return None

    def check_save(self, run: Run, position: Position, before: Position | None, also: int | None = None) -> None:
        """Look at a position that is saved, or written by the program."""
        if run.dead:
            return
        self._drain_notices(run)
        if Position.from_json(position.to_json()) != position:
            self.fail("crash-safe", "a position does not survive to_json and from_json")
        dropped = any(gap.reason.name == "CURSOR_DROPPED" for gap in (*self.gaps, *position.gaps))
        cursors = self.server.cursors
        if before is not None and before.cursor is not None and not dropped:
            if position.cursor is None:
                self.fail("crash-safe", f"the saved cursor {before.cursor} was wiped")
            elif self.program.style.order == "before" and cursors[position.cursor][0] < cursors[before.cursor][0]:
                self.fail("crash-safe", f"the saved position went back from {before.cursor} to {position.cursor}")
        if len(position.recent) > 1_000 or len(position.settled) > 25_000:
            self.fail("bounded", f"a position of {len(position.settled)} + {len(position.recent)} ids")
        if position.cursor is None or self.owed_from is None:
            return
        first, last = cursors[position.cursor]
        end = first if self.program.style.cursors == "grouped" else last + 1
        added = also is not None and also not in self.settled
        if added and also is not None:
            self.settled.add(also)
        item = self._unexplained([*self.gaps, *position.gaps], end)
        if added and also is not None:
            self.settled.discard(also)
            self.low = max(self.owed_from, min(self.low, also))
        if item is not None:
            what = "was not settled" if item.serial in run.handed else "was never handed out"
            self.fail(
                "crash-safe",
                f"the position {position.cursor} passes event {item.serial}, which {what} and no reported gap spans",
            )

    def check_bounds(self, run: Run) -> None:
        """Look at the numbers."""
        realtime, options = run.realtime, self.program.options
        if realtime is None or run.dead:
            return
        statistics = realtime.events.statistics()
        spare = options.workers + 1  # deliveries that failed come back beside the others
        if statistics.buffered_events > options.buffered + spare:
            self.fail("bounded", f"{statistics.buffered_events} events are buffered, {options.buffered} may be")
        if statistics.buffered_bytes > options.buffered_bytes + 70_000:
            self.fail("bounded", f"{statistics.buffered_bytes} bytes are buffered, {options.buffered_bytes} may be")
        if statistics.unsettled > options.unsettled + 1:
            self.fail("bounded", f"{statistics.unsettled} entries are unsettled, {options.unsettled} may be")
        if options.position == "store" and not run.lied_to:
            unsaved = len(run.settled_here) - run.saved_here
            limit = options.unsaved + options.buffered + spare
            if unsaved > limit:
                self.fail("bounded", f"{unsaved} settled events are not saved, {options.unsaved} may be")

    def check_left(self, run: Run) -> None:
        """Look at a process that has ended."""
        now = trio.current_time()
        if run.left_at is not None and self.blocked_at < run.left_at and now - run.left_at > LEAVE_LIMIT:
            self.fail("bounded", f"leaving took {now - run.left_at:.2f} s")
        left = [conn for conn in self.server.conns if conn.run is run and not conn.wire.client_closed]
        if left:
            self.fail("structured", f"the client was left, and {left} are open")
        if self.server.transport.requests:
            self.fail("structured", "the client was left, and a request is open")

    def check_fault(self, run: Run, exc: Exception) -> None:
        """Look at what the client raised."""
        texts = []
        seen: BaseException | None = exc
        while seen is not None and len(texts) < 20:
            texts += [str(seen), repr(seen), *getattr(seen, "__notes__", ())]
            seen = seen.__cause__ or seen.__context__
        self.check_text(*texts)
        name = type(exc).__name__
        self.trace(f"process {run.number}: {name}: {exc}")
        if self.violation is not None:
            return
        self._drain_notices(run)
        now = trio.current_time()
        match name:
            case "AuthenticationError" | "RequestRefusedError":
                answers = self.server.answers
                if not any(kind == "refused" for _, kind in answers):
                    self.fail("patient", f"{name} without a refusal: {exc}")
                elif run.live:
                    others = [time for time, kind in answers if kind == "other"]
                    refused = [
                        time for time, kind in answers if kind == "refused" and (not others or time > others[-1])
                    ]
                    lasted = now - refused[0] if refused else 0.0
                    if lasted < self.program.options.auth_grace - 1:
                        self.fail("patient", f"a client that was live ended after {lasted:.1f} s of refusals: {exc}")
            case "ConnectionFailedError":
                if run.live or now - run.started_at < 59:
                    self.fail("patient", f"{name} after {now - run.started_at:.1f} s: {exc}")
            case "CursorStoreError" | "ConsumerOwnedError" | "OwnershipLostError":
                if not run.store_failed:
                    self.fail("structured", f"{name}, although the store was well: {exc}")
            case _:
                cause = f", from {exc.__cause__!r}" if exc.__cause__ is not None else ""
                self.fail("structured", f"{name}: {exc}{cause}")

    def check_text(self, *texts: str) -> None:
        """Look for secrets."""
        for text in texts:
            if any(secret in text for secret in SECRETS):
                self.fail("discreet", f"a secret in {text[:200]!r}")

    def check_order(self, run: Run) -> None:
        """Look for events that came out before others that every connection had brought before them."""
        if self.violation is not None or run.failed:
            return
        conns = [conn for conn in self.server.conns if conn.run is run and conn.place]
        rank = {serial: place for place, serial in enumerate(run.order)}
        for serial, place in rank.items():
            earlier: set[int] | None = None
            for conn in conns:
                at = conn.place.get(serial)
                if at is not None:
                    before = {other for other, its in conn.place.items() if its < at}
                    earlier = before if earlier is None else earlier & before
            late = [other for other in earlier or () if rank.get(other, -1) > place]
            if late:
                self.fail("order", f"event {serial} came out before {min(late)}, which every connection brought first")
                return

    def check_end(self) -> None:
        """Look at what is missing when the server has been well for long enough."""
        if self.violation is not None:
            return
        if self.run is not None:
            self._drain_notices(self.run)
        item = self._unexplained()
        if item is not None:
            self.fail(
                "lossless",
                f"event {item.serial}, sent at {item.sent_at:.2f} s, was not handed out, and none of the reported gaps "
                f"spans its time {item.wall.isoformat()}: {self._said()}",
            )
        if self.strict and self.anchor is not None:
            log = self.server.log[self.anchor :]
            lost = [item.serial for item in log if item.serial not in self.settled and self.wanted(item)]
            if lost:
                self.fail("cursor kept", f"events {lost} are lost, although the server held them and would resume")
        if self.program.options.repair and len(self.offsets) == 1 and not self._all_repaired():
            lost = [item.serial for item in self._repairable()]
            self.fail("repaired", f"events {lost} stand in the log, within reported gaps, and were not handed out")

    def _said(self) -> str:
        return ", ".join(f"{gap.reason.name} {gap.since} to {gap.until}" for gap in self.gaps[-5:]) or "none"

    def _repairable(self) -> list[Item]:
        if self.owed_from is None or self.run is None or self.program.options.position != "store":
            return []
        gaps = [gap for gap in self.gaps if gap.since is not None and gap.reason.name != "FIRST_START"]
        return [
            item
            for item in self.server.log[self.owed_from :]
            if item.serial not in self.settled and item.has_id and self.wanted(item) and self.covered(item, gaps)
        ]

    def _all_repaired(self) -> bool:
        return not self._repairable()

    async def _watch(self) -> None:
        """Look at what no event brings to light."""
        unread_at = frame_at = 0.0
        while True:
            await trio.sleep(_TICK)
            now, run, server = trio.current_time(), self.run, self.server
            if self.countdown.steps > _MAX_STEPS:
                self.fail("bounded", "the program does not come to an end")
            if run is None or not self.is_up(run):
                unread_at = now
                continue
            assert run.realtime is not None
            self.check_bounds(run)
            if self.blocked_at > now - 60:
                unread_at = now
                continue
            conns = [conn for conn in server.conns if conn.run is run and conn.open]
            if any(conn.healthy for conn in conns):
                self.alive_at = now
            if any(conn.wire.to_client for conn in conns) or trio.current_time() < self.stall_until + 1:
                unread_at = now
            if now - max(self.alive_at, server.last_attempt, unread_at) > 240:
                self.fail("not deaf", f"no healthy connection and no attempt since {server.last_attempt:.1f} s")
            frame_at = max([frame_at, *(conn.last_frame_at for conn in conns)])
            state = run.realtime.state.value
            if state == "live" and now - max(frame_at, unread_at, run.started_at) > 50:
                self.fail("not deaf", f"the state is live, and the last frame came at {frame_at:.1f} s")
            if run.waiting and self.owed_from is not None:
                for item in server.log[max(self.low, self.owed_from) :]:
                    if now - item.sent_at < HELD_LIMIT:
                        break
                    if (
                        item.serial not in run.handed
                        and item.serial not in self.settled
                        and self.wanted(item)
                        and any(
                            item.serial in conn.place
                            and item.serial >= conn.live_from
                            and conn.healthy
                            and conn.wire.client_waits
                            for conn in conns
                        )
                    ):
                        self.fail(
                            "not deaf",
                            f"event {item.serial} was received from a healthy connection at {item.sent_at:.1f} s, "
                            f"the program waits for events, and it was not handed out ({state})",
                        )
                        break


class _Countdown(trio.abc.Instrument):
    """Does something after a number of the scheduler's steps."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.steps = 0
        self._left: int | None = None
        self._action: Any = None

    def arm(self, steps: int, action: Any) -> None:
        """Act on the present process after so many steps, or after 3 s."""
        self._left, self._action = steps, action
        self._world.server.nursery.start_soon(self._late, action)

    async def _late(self, action: Any) -> None:
        await trio.sleep(3)
        if self._action is action:
            self._fire()

    def _fire(self) -> None:
        action, self._left, self._action = self._action, None, None
        if self._world.run is not None and not self._world.calm:
            action(self._world.run)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                self._fire()


class _Records(logging.Handler):
    """Looks into every log record."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.check_text(record.getMessage(), str(record.exc_info or ""))


_LOGGERS: Final = ("kadoa_trio", "httpx", "httpcore", "trio-websocket", "wsproto")


@contextlib.contextmanager
def _surroundings(world: World) -> Iterator[None]:
    """Fix what a client takes from its process: jitter, wall clock, scheduler, logging."""
    seed = world.program.seed
    run_module: Any = trio._core._run  # type: ignore[attr-defined]  # what Hypothesis does, too
    handler = _Records(world)
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    state = run_module._r.getstate()
    run_module._r.seed(seed)
    with (
        mock.patch.object(run_module, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch.object(kadoa_trio._engine._process, "_RNG", random.Random(f"{seed} retries")),
        mock.patch.object(kadoa_trio._client, "_RNG", random.Random(f"{seed} jitter")),
        mock.patch.object(kadoa_trio._client, "_utc_now", world.wall),
    ):
        root.addHandler(handler)
        if world.program.options.debug:
            for name in _LOGGERS:
                logging.getLogger(name).setLevel(logging.DEBUG)
        try:
            yield
        finally:
            root.removeHandler(handler)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            run_module._r.setstate(state)


def execute(program: Program, ignore: frozenset[str] = frozenset()) -> Result:
    """Run a program, and give what it came to.

    Args:
        program: what to run.
        ignore: promises that are not looked at.
    """
    world = World(program, ignore)
    with _surroundings(world):
        try:
            trio.run(world.main, clock=world.clock, instruments=[world.countdown])
        except BaseException as exc:
            if isinstance(exc, KeyboardInterrupt) or world.violation is None:
                raise
    return Result(
        world.violation,
        len(world.server.log),
        world.server.connections,
        len(world.runs),
        len(world.gaps),
        world.clock.current_time(),
        world.lines,
    )
