"""Fills possible gaps from Kadoa's notification log.

Nobody has documented three things that a repair needs to know. Each is found
out before it is relied on:

*Is an* ``eventId`` *of the log the* ``id`` *on the socket?* One row whose id a
connection delivered proves it, for the whole life of the client. The row may
be of any channel and of any time: the rows around the gap, the newest rows
before it and those after it are searched. Until it is proved nothing is handed
out, because an event could be delivered twice under two ids. One exception:
where no connection has ever delivered anything, and there is no cursor, no
socket can bring any of it a second time, and there is nothing to compare with.

*Which rows did the socket owe?* The log has one row for each channel and try.
A row that names the WebSocket channel counts, also if its try failed: that is
an event that the socket owed and did not send. A row that names other channels
does not count. Where a row names no channel, the workspace's settings decide,
as they are now.

*Does the log show all of the gap yet?* See `REPAIR_SLACK` and `REPAIR_LAG`.
What is found is handed out at once, and the gap stays open until this is
answered.

The work is derived from the open gaps of the ledger, whose number is bounded,
so there is no queue. The gap whose time comes first is tried first.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import attrs
import trio

from .._errors import AttemptError, KadoaError, ProtocolError
from .._events import Event, parse_json
from .._net._api import KadoaApi
from .._net._wire import event_from_log
from .._position import Gap
from ..notices import GapRemains, GapRepaired
from ..workspace._notifications import MAX_LOG_ROWS, WEBSOCKET, LogEntry, LogPage, Notifications, Setting
from ..workspace._streaming import find_setting
from ._admission import Admission
from ._ledger import MAX_GAPS, Ledger
from ._reporter import Reporter

REPAIR_DELAYS: Final = 5.0, 90.0, 300.0, 600.0
"""Seconds before the first try of a gap, and between its tries; the last one is repeated.

The second try comes more than `REPAIR_SLACK` after the gap, so that in a busy
workspace it can be the last one. The fourth comes after `REPAIR_LAG`.
"""
REPAIR_TRIES: Final = 12
"""Maximum readings of the log for one gap that has no result, about 95 minutes; then it is left to the next run."""
REPAIR_FAILURE_DELAYS: Final = 5.0, 60.0, 300.0, 900.0
"""Seconds to wait after each failure of the log in a row, for all gaps together; the last one is repeated.

Worst case, however many gaps are open: four tries in the first six minutes of
an outage of the log, then one in 15 minutes; and after the outage a gap is
tried after at most 15 minutes. An answer that cannot be read may concern one
gap only, so that others wait for it at most `REPAIR_ODD_DELAY`.
"""
REPAIR_ODD_DELAY: Final = 60.0
"""Maximum seconds for which an answer that cannot be read keeps other gaps from being tried."""
FAILURES_BEFORE_NOTICE: Final = 3
"""Failures of the log in a row after which the open gaps are reported."""
REPAIR_SLACK: Final = 60.0
"""Maximum difference between Kadoa's clock and ours, in seconds, and maximum disorder of the log.

The log is read this much beyond a gap on both sides. It has caught up with the
gap when it shows an event that a connection delivered, this much newer than
the end of the gap.
"""
REPAIR_LAG: Final = 900.0
"""Maximum lag of the log, in seconds, where no newer event shows that it has caught up.

A log of notifications is written as they are sent: seconds are usual, minutes
are an incident, and 15 minutes cover most incidents. Besides, two
readings at least one delay apart must show the same events.
"""
REPAIR_RETENTION: Final = 86_400.0
"""A gap that begins earlier, in seconds before now, is only complete if the log shows a row from before it.

How long Kadoa keeps its log is not documented; less than a day is implausible.
"""
REPAIR_PAGES: Final = 100
"""Maximum pages of the log in one reading of a gap: 10,000 rows."""
REPAIR_READINGS: Final = 3
"""Maximum readings in one try, until the pages fit together."""
REPAIR_TIMEOUT: Final = 300.0
"""Maximum time of one try, in seconds, without the time that waits for free space in the buffer."""
SEARCH_PAGES: Final = 5
"""Maximum pages that are searched for an event that a connection delivered, before a gap and after it."""
_PAGE_SIZES: Final = MAX_LOG_ROWS, 10, 1
"""Rows that are asked for at once. Fewer where the answer is too long to be read."""

_LATEST: Final = sys.float_info.max
_CHANNEL_TYPES: Final = frozenset({WEBSOCKET, "WEBHOOK", "EMAIL", "SLACK"})
_MAX_DEPTH: Final = 5


@attrs.define(eq=False)
class _Work:
    """What is known of the repair of one gap."""

    found_at: float
    """Trio's time at which it was found, or restored."""
    age: float
    """Seconds from its end to that time."""
    due: float
    """Trio's time of the next try; infinity when there is none in this run."""
    tries: int = 0
    """Readings that succeeded."""
    failures: int = 0
    """Failures in a row."""
    handed_out: int = 0
    """Events that were taken from the log for it."""
    shown: int | None = None
    """A hash of the ids that the last reading showed."""
    done: array[int] = attrs.field(factory=lambda: array("q"))
    """Hashes of the ids that need no handing out: the ledger may have forgotten them at the next try."""
    reported: bool = False
    """Whether a failing log was reported for it."""
    closed: bool = False
    """Whether it has its result, and waits in the ledger for its events to be settled."""


@attrs.define(eq=False)
class _Reading:
    """What the log shows of one gap."""

    missing: dict[str, Event] = attrs.field(factory=dict)
    """The events that the socket owed and that no connection delivered, each once."""
    size: int = 0
    """Of what is missing, in bytes."""
    seen: set[int] = attrs.field(factory=set)
    """Hashes of the ids of all events that the socket owed."""
    compared: int = 0
    """Rows of the socket whose id was compared with those that connections delivered."""
    nameless: int = 0
    """Rows of the socket in the gap that do not say which event it was."""
    newest: float = math.inf
    """Events that happened later than this were left out, because the memory for what is missing was full."""
    after: set[str] = attrs.field(factory=set)
    """Those of the missing ones that are newer than the end of the gap: there only because clocks differ."""
    forgotten: bool = False
    """Whether the ledger has forgotten ids that it knew at an earlier try."""
    deferred: bool = False
    """Whether there are events after the gap that the connection may still deliver itself."""
    whole: bool = False
    """Whether all of the span was read."""
    consistent: bool = False
    """Whether the pages fit together: none was shifted while they were read."""
    reaches_back: bool = False
    """Whether a row from before the gap was seen."""


class Repairer:
    """Repairs the open gaps of the ledger, one try after the other, in the background.

    Args:
        http: the way to the log.
        ledger: knows the open gaps, and what was delivered.
        admission: admits the events.
        reporter: publishes the results.
        max_bytes: maximum size of the events of the log that are held at once, in bytes.
    """

    def __init__(
        self,
        http: KadoaApi,
        ledger: Ledger,
        admission: Admission,
        reporter: Reporter,
        max_bytes: int,
    ) -> None:
        self._notifications = Notifications(http)
        self._ledger = ledger
        self._admission = admission
        self._reporter = reporter
        self._max_bytes = max_bytes
        # The log cuts its times to milliseconds.
        self._started_at = reporter.wall_clock() - timedelta(milliseconds=1)
        self._active = False
        self._wake = trio.Event()
        self._work: dict[Gap, _Work] = {}
        self._failures = 0
        self._log_due = -math.inf
        self._ids_proved = False
        self.repaired: int = 0
        """Events that were taken from the log."""

    @property
    def waiting(self) -> int:
        """How many gaps wait for their repair."""
        return sum(not work.closed for work in self._work.values())

    def position_changed(self) -> None:
        """Repair the open gaps of the ledger some time soon. Before the first call nothing is repaired."""
        self._active = True
        self._wake.set()

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Repair until cancelled, or until admission has ended. The next run begins again what is cut short."""
        while not self._admission.ended:
            self._wake = trio.Event()
            self._take_stock()
            gap = min(self._work, key=lambda gap: self._work[gap].due, default=None)
            due = math.inf if gap is None else max(self._work[gap].due, self._log_due)
            if gap is None or due > trio.current_time():
                with trio.move_on_at(due):
                    await self._wake.wait()
            elif gap.since is None:
                self._give_up(gap, self._work[gap], "nothing is known of the time before it", final=True)
            else:
                await self._try(gap, gap.since, self._work[gap])

    def _take_stock(self) -> None:
        """Make the work be that of the open gaps."""
        if not self._active:
            return
        gaps = self._ledger.gaps
        for gap in set(self._work).difference(gaps):
            if not self._work.pop(gap).closed:
                why = f"more than {MAX_GAPS} gaps are open, and the ledger no longer keeps this one"
                self._reporter.publish(GapRemains(gap=gap, why=why, final=True))
        now = trio.current_time()
        for gap in gaps:
            if gap not in self._work:
                age = 0.0
                if gap.until < self._started_at:
                    # Of an earlier run. From here on only Trio's clock counts, because the wall clock may be set.
                    age = (self._reporter.wall_clock() - gap.until).total_seconds()
                self._work[gap] = _Work(now, max(age, 0.0), now + REPAIR_DELAYS[0])

    def _give_up(self, gap: Gap, work: _Work, why: str, *, final: bool) -> None:
        work.due = math.inf
        self._reporter.publish(GapRemains(gap=gap, why=why, final=final))
        if final:
            work.closed = True
            self._ledger.close_gap(gap)

    async def _try(self, gap: Gap, since: datetime, work: _Work) -> None:
        """Read the log for a gap, hand out what is missing, and decide whether that was all."""
        age = work.age + trio.current_time() - work.found_at
        routes = _Routes(self._notifications)
        caught_up: bool | None = None
        while True:
            reading = _Reading()
            fault: KadoaError | None = None
            scope = trio.move_on_after(REPAIR_TIMEOUT)
            try:
                with scope:
                    if caught_up is None:
                        # Before the gap is read: a log that has caught up cannot grow there any more.
                        caught_up = await self._search_after(gap, routes)
                    await self._read(gap, since, work, reading, routes, defer=age < REPAIR_SLACK)
                    await self._search_before(since, reading, routes)
            except KadoaError as exc:
                fault = exc
            if scope.cancelled_caught:
                fault = AttemptError("notifications", f"not read within {REPAIR_TIMEOUT:g} s")
            if fault is not None:
                self._failed(work, fault)
                return
            # A gap of an earlier run follows something that was delivered, though a position may have no ids.
            trusted = self._ids_proved or (since >= self._started_at and self._nothing_delivered(gap))
            if trusted and not await self._hand_out(gap, work, reading):
                return  # the client is ending; the gap stays in the position
            if not trusted or reading.newest == math.inf:
                break
        self._failures = work.failures = 0
        work.tries += 1
        shown = hash(frozenset(reading.seen))
        stable = work.shown == shown
        work.shown = shown
        settled = (caught_up or (age >= REPAIR_LAG and stable)) and reading.consistent and not reading.deferred
        # Ids that were compared in vain are other ids. Where nothing could be compared, that may change.
        contradicted = not trusted and self._ledger.has_delivered and reading.compared > 0
        if settled and (trusted or contradicted):
            self._conclude(gap, since, work, reading, trusted=trusted)
        elif work.tries >= REPAIR_TRIES:
            why = f"the log did not settle in {work.tries} readings"
            if not trusted:
                why = "neither the log nor a connection has shown an event whose id could be compared"
            self._give_up(gap, work, self._so_far(why, work), final=False)
        else:
            work.due = trio.current_time() + REPAIR_DELAYS[min(work.tries, len(REPAIR_DELAYS) - 1)]

    def _conclude(self, gap: Gap, since: datetime, work: _Work, reading: _Reading, *, trusted: bool) -> None:
        """Give a gap its result: the log has shown all that it will ever show of it."""
        why = ""
        if not trusted:
            why = f"no row of the log has an id that the socket delivered ({reading.compared} rows were compared)"
        elif not reading.whole:
            why = f"the log holds more of that time than the {REPAIR_PAGES} pages that are read for one gap"
        elif self._is_old(since) and not reading.reaches_back:
            why = "the log shows nothing from before the gap, which began more than a day ago: it may have forgotten it"
        elif reading.nameless:
            why = f"{reading.nameless} rows of the log do not say which event they are about"
        if why:
            self._give_up(gap, work, self._so_far(why, work), final=True)
        else:
            work.due, work.closed = math.inf, True
            self._reporter.publish(GapRepaired(gap=gap, events=work.handed_out))
            self._ledger.close_gap(gap)

    def _so_far(self, why: str, work: _Work) -> str:
        return f"{why}; {work.handed_out} events were taken from it" if work.handed_out else why

    def _failed(self, work: _Work, fault: KadoaError) -> None:
        """Leave the log alone for a while, for all gaps: another gap would meet the same failure."""
        self._failures += 1
        work.failures += 1
        now = trio.current_time()
        longest = REPAIR_FAILURE_DELAYS[-1]
        asked = fault.retry_after if isinstance(fault, AttemptError) else None
        shared = _failure_delay(self._failures)
        if isinstance(fault, ProtocolError):
            shared = min(shared, REPAIR_ODD_DELAY)
        self._log_due = now + max(shared, min(asked or 0.0, longest))
        # Its own, besides: if only this gap cannot be read, the others come first.
        work.due = max(self._log_due, now + _failure_delay(work.failures))
        for gap, waiting in self._work.items():
            failures = self._failures if waiting is not work else max(self._failures, work.failures)
            if failures >= FAILURES_BEFORE_NOTICE and not waiting.reported and waiting.due < math.inf:
                waiting.reported = True
                why = f"{fault}; the log is tried again, at least once in {longest:g} s"
                self._reporter.publish(GapRemains(gap=gap, why=why, final=False))

    def _nothing_delivered(self, gap: Gap) -> bool:
        """Return whether no connection has ever delivered anything, so that nothing can be delivered twice."""
        return not self._ledger.has_delivered and gap.cursor is None and self._ledger.resume_cursor is None

    def _is_old(self, since: datetime) -> bool:
        return (self._reporter.wall_clock() - since).total_seconds() > REPAIR_RETENTION

    def _prove_ids(self) -> None:
        if self._ids_proved:
            return
        self._ids_proved = True
        for work in self._work.values():
            if work.due == math.inf and not work.closed:
                # It was given up for want of this.
                work.due, work.tries, work.shown = trio.current_time(), 0, None

    # ---- reading -----------------------------------------------------------------------------------------------

    async def _read(
        self, gap: Gap, since: datetime, work: _Work, reading: _Reading, routes: _Routes, *, defer: bool
    ) -> None:
        """Read the log around a gap, again if the pages do not fit together."""
        slack = timedelta(seconds=REPAIR_SLACK)
        start, end = min(since, gap.until) - slack, gap.until + slack
        # What this run began after is no concern of a gap in this run: "begins with what is sent from now on".
        floor = self._started_at if since >= self._started_at else None
        done = set(work.done)
        before: set[int] | None = None
        for _ in range(REPAIR_READINGS):
            rows: set[int] = set()
            totals: set[int | None] = set()
            reading.compared = reading.nameless = 0
            reading.whole = False
            offset, size, pages = 0, 0, 0
            while pages < REPAIR_PAGES:
                page, size = await self._page(start, end, offset, size)
                pages += 1
                totals.add(page.total)
                for entry in page.entries:
                    rows.add(_row_key(entry))
                    created = entry.created_at
                    if created is not None and not start <= created <= end:
                        continue  # a server that ignores the times that were asked for
                    if created is not None and created <= since:
                        reading.reaches_back = True
                    await self._take(entry, gap, since, reading, routes, floor, done, defer=defer)
                if not page.has_more:
                    reading.whole = True
                    break
                offset += len(page.entries)
            # Rows that are added or change places between two pages make one be missed or come twice.
            reading.consistent = pages == 1 or totals == {len(rows)} or rows == before or not reading.whole
            if reading.consistent:
                break
            before = rows
        if reading.forgotten:
            # A connection has most likely delivered these, and the ledger has forgotten them, too.
            for event_id in reading.after & reading.missing.keys():
                del reading.missing[event_id]
        work.done = array("q", done)

    async def _page(
        self, since: datetime | None, until: datetime | None, offset: int, size: int
    ) -> tuple[LogPage, int]:
        """Read a page, with fewer rows if it is too long; give the place in `_PAGE_SIZES` of what could be read, too."""
        while True:
            try:
                limit = _PAGE_SIZES[size]
                return await self._notifications.log(since=since, until=until, offset=offset, limit=limit), size
            except ProtocolError:
                if size == len(_PAGE_SIZES) - 1:
                    raise
            size += 1

    async def _take(
        self,
        entry: LogEntry,
        gap: Gap,
        since: datetime,
        reading: _Reading,
        routes: _Routes,
        floor: datetime | None,
        done: set[int],
        *,
        defer: bool,
    ) -> None:
        self._compare(entry.event_id)
        created = entry.created_at
        if not await routes.owed(entry) or (floor is not None and created is not None and created < floor):
            return
        reading.compared += 1
        event_id, event = entry.event_id, None
        if event_id is None or not self._ledger.knows(event_id):
            await trio.lowlevel.checkpoint()  # an event may be large, and there are many
            event = event_from_log(entry.raw, self._reporter.wall_clock())
            if event is None:
                if created is None or since <= created <= gap.until:
                    reading.nameless += 1
                return
            event_id = event.id
            self._compare(event_id)
        key = hash(event_id)
        reading.seen.add(key)
        if self._ledger.knows(event_id):
            done.add(key)
        elif key in done:
            reading.forgotten = True
        elif event is None or event_id in reading.missing:
            pass
        elif defer and created is not None and created > gap.until:
            reading.deferred = True
        elif _time(event) <= reading.newest:
            reading.missing[event_id] = event
            if created is not None and created > gap.until:
                reading.after.add(event_id)
            reading.size += event.size
            if reading.size > self._max_bytes and len(reading.missing) > 1:
                self._cut(reading)

    def _compare(self, event_id: str | None) -> None:
        if event_id is not None and not self._ids_proved and self._ledger.delivered(event_id):
            self._prove_ids()

    def _cut(self, reading: _Reading) -> None:
        """Leave the newest out, down to half of the memory: the next reading finds them again."""
        kept = _oldest_first(reading.missing)
        while len(kept) > 1 and reading.size > self._max_bytes / 2:
            reading.size -= kept.pop().size
        reading.missing = {event.id: event for event in kept}
        reading.newest = min(_time(kept[-1]), _LATEST)

    async def _search_after(self, gap: Gap, routes: _Routes) -> bool:
        """Return whether the log shows an event that a connection delivered, and that is newer than the gap for certain."""
        start = gap.until + timedelta(seconds=REPAIR_SLACK)
        if self._reporter.wall_clock() <= start:
            return False

        async def is_newer(entry: LogEntry) -> bool:
            self._compare(entry.event_id)
            if entry.event_id is None or entry.created_at is None or entry.created_at <= start:
                return False
            return self._ledger.delivered(entry.event_id) and await routes.owed(entry)

        return await self._search(is_newer, since=start)

    async def _search_before(self, since: datetime, reading: _Reading, routes: _Routes) -> None:
        """Search the newest rows before a gap for what its own rows have not shown."""
        old = self._is_old(since)

        def enough() -> bool:
            return (self._ids_proved or not self._ledger.has_delivered) and (reading.reaches_back or not old)

        async def look(entry: LogEntry) -> bool:
            self._compare(entry.event_id)
            reading.compared += await routes.owed(entry)
            if entry.created_at is not None and entry.created_at <= since:
                reading.reaches_back = True
            return enough()

        if not enough():
            await self._search(look, until=since + timedelta(seconds=REPAIR_SLACK))

    async def _search(
        self,
        found: Callable[[LogEntry], Awaitable[bool]],
        *,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> bool:
        """Look at rows of the log, the newest ones as far as the server's order can be known, until one is *found*."""
        offset, size = 0, 0
        for number in range(SEARCH_PAGES):
            page, size = await self._page(since, until, offset, size)
            for entry in page.entries:
                if await found(entry):
                    return True
            if not page.has_more:
                return False
            offset += len(page.entries)
            if number == 0 and page.total is not None and _begins_with_the_oldest(page):
                offset = max(offset, page.total - (SEARCH_PAGES - 1) * _PAGE_SIZES[size])
        return False

    # ---- handing out -------------------------------------------------------------------------------------------

    async def _hand_out(self, gap: Gap, work: _Work, reading: _Reading) -> bool:
        """Hand out what is missing, oldest first, as far as no connection brings it meanwhile."""
        for event in _oldest_first(reading.missing):
            while not self._ledger.knows(event.id):
                if self._admission.ended:
                    return False
                if self._admission.try_admit_from_log(event):
                    self.repaired += 1
                    work.handed_out += 1
                else:
                    await self._admission.wait_space(event)
            work.done.append(hash(event.id))
        return True


class _Routes:
    """Which rows the socket owed. The workspace is asked once for each try, and only if a row does not say."""

    def __init__(self, notifications: Notifications) -> None:
        self._notifications = notifications
        self._types: dict[str, str] | None = None
        self._settings: tuple[Setting, ...] = ()

    async def owed(self, entry: LogEntry) -> bool:
        """Return whether a row is about an event that the WebSocket channel had to send, whatever became of it."""
        named = channel_types(entry.channel_config, {})
        if not named:
            types = await self._load()
            named = channel_types(entry.channel_config, types)
        if named:
            return WEBSOCKET in named
        workflow_id = entry.workflow_id
        if workflow_id is None and isinstance(entry.payload, dict):
            workflow_id = entry.payload.get("workflowId")
        return entry.event_type is not None and self._routed(entry.event_type, workflow_id)

    async def _load(self) -> Mapping[str, str]:
        if self._types is None:
            channels = await self._notifications.channels()
            self._settings = await self._notifications.settings()
            self._types = {one.id: _type_name(one.channel_type or "") for one in channels}
        return self._types

    def _routed(self, event_type: str, workflow_id: str | None) -> bool:
        setting = None
        if workflow_id is not None:
            setting = find_setting(self._settings, event_type, workflow_id)
        if setting is None:
            setting = find_setting(self._settings, event_type, None)
        if setting is None and event_type == "workflow_recovered":
            # Without a setting of its own it comes with workflow_failed, unless workflow_finished is subscribed
            # (Kadoa's pages on webhooks and notifications).
            return self._routed("workflow_failed", workflow_id) and not self._routed("workflow_finished", workflow_id)
        if setting is None or not setting.enabled:
            return False
        types = self._types or {}
        # Where the answer does not name the channels: an event too many is better than one that is lost.
        return setting.channel_ids is None or any(types.get(one) == WEBSOCKET for one in setting.channel_ids)


def channel_types(config: Any, types: Mapping[str, str], depth: int = 0) -> set[str]:
    """Read which channels a row of the log names, by their types. Its shape is not documented.

    Args:
        config: the row's ``channelConfig``.
        types: the type of each channel of the workspace, by its id.
        depth: how deep in it this is.

    Returns:
        The types; empty where it names no channel.
    """
    found: set[str] = set()
    if depth > _MAX_DEPTH:
        return found
    if isinstance(config, str):
        if config[:1] in ("{", "[", '"'):
            try:
                return channel_types(parse_json(config), types, depth + 1)
            except (ValueError, RecursionError):
                return found
        if _type_name(config) in _CHANNEL_TYPES:
            found.add(_type_name(config))
        elif config in types:
            found.add(types[config])
    elif isinstance(config, list):
        for one in config:
            found |= channel_types(one, types, depth + 1)
    elif isinstance(config, dict):
        kind = config.get("channelType")
        if isinstance(kind, str) and kind:
            found.add(_type_name(kind))
        # Other fields may hold anything, such as a mail's format under "type": only known names count.
        for name in ("type", "channel", "channels", "id", "channelId", "channelIds"):
            if config.get(name) is not None:
                found |= channel_types(config[name], types, depth + 1)
    return found


def _type_name(text: str) -> str:
    return text.strip().upper().replace("_", "").replace("-", "")


def _failure_delay(failures: int) -> float:
    return REPAIR_FAILURE_DELAYS[min(failures, len(REPAIR_FAILURE_DELAYS)) - 1]


def _row_key(entry: LogEntry) -> int:
    if entry.id is not None:
        return hash(entry.id)
    return hash((entry.event_id, entry.event_status, entry.created_at, str(entry.channel_config)))


def _begins_with_the_oldest(page: LogPage) -> bool:
    first, last = page.entries[0].created_at, page.entries[-1].created_at
    return first is not None and last is not None and first < last


def _oldest_first(missing: Mapping[str, Event]) -> list[Event]:
    events = list(missing.values())
    if events and _time(events[0]) >= _time(events[-1]):
        events.reverse()  # newest first, as logs are; else the sort would leave equal times in that order
    events.sort(key=_time)
    return events


def _time(event: Event) -> float:
    return event.timestamp.timestamp() if event.timestamp is not None else _LATEST
