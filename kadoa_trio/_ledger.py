"""What was received, what was handed out, and where to go on: the client's memory.

Sans-I/O: no Trio, no clock, no randomness. Times come in as arguments and go
out in what is reported.

Two questions are answered here, and they are not the same one:

*Where does the next connection resume?* At the **resume cursor**. It follows
one connection only, the **leader**: the oldest one still read of those that
are *proved*. A connection is proved when it opened without a cursor and
nothing came before it (it has no replay that could be incomplete), or when it
is *stable*: then its replay is over. Until a connection leads, what it
delivers is **ahead** of the resume cursor: handed out, remembered, and not
relied on. An heir that cannot resume delivers e14 while the old connection
still owes e11 to e13, and a server may send live events before the replay
(nobody has documented that it does not): a cursor that followed either would
step over events that only a resumption can bring.

*Did the stream go on without a hole?* That is settled when a connection takes
the lead. It has *joined* the old leader when both delivered the same id: the
one was in order up to it, the other is from there on, at once or by the end of
its replay. One that was asked to resume is believed without that, unless it
shows otherwise: another connection delivered events past the cursor, and it
brought new ones but none of those. Everything else is a `Gap`.

A shared id proves that nothing is missing in the end, not that nothing is
missing now (e11 from the replay, e14 live, e12 still to come). So it closes
the question of the gap and does not move the cursor.
"""

from __future__ import annotations

import enum
import json
from collections import deque
from collections.abc import Iterable
from datetime import datetime

import attrs

RECENT_IDS = 1_000
"""How many of the newest settled ids go with a position: a replay may be inclusive, or start earlier than asked."""
MAX_GAPS = 100
"""How many gaps are kept; the count goes on."""
_VERSION = 1
_FROM_LOG = -1
"""Stands where a connection's number would, for what was taken from the notification log."""


class GapReason(enum.Enum):
    """Why continuity could not be proved."""

    FIRST_START = "the store had no position of an earlier run"
    NO_CURSOR = "there was no cursor to resume from"
    NOT_PROMISED = "the server announced that it does not resume"
    NOT_REPLAYED = "the server took the cursor and did not replay"
    CURSOR_DROPPED = "the server kept refusing the cursor"
    UNPROVED = "no connection lived long enough to be relied on"


@attrs.frozen(kw_only=True)
class Gap:
    """A span of time in which events may have been missed."""

    since: datetime | None
    """The last sign of life of the stream before it; None when there was none in this process."""
    until: datetime
    """When the connection that goes on was opened."""
    reason: GapReason
    """Why the client cannot exclude a loss."""
    cursor: str | None = None
    """Where the stream stood before it, if that had a cursor."""


@attrs.frozen(kw_only=True)
class Position:
    """How far a program's *processing* has come: where another run may resume.

    It never passes an event that was not settled. Give it to
    ``open_realtime(resume_from=...)``, or have a cursor store keep it.
    """

    team: str | None = None
    """The team whose stream it is a place in; None before the first connection."""
    cursor: str | None = None
    """The cursor to resume from; None when the server has given none."""
    settled: tuple[str, ...] = ()
    """Ids that were settled and that a resumption from `cursor` may bring again, oldest first."""
    recent: tuple[str, ...] = ()
    """The newest settled ids besides, at most 1,000, since a replay may start earlier than asked."""
    last_life: datetime | None = None
    """When the server last gave a sign of life."""
    gaps: tuple[Gap, ...] = ()
    """Possible gaps that nothing has closed, oldest first, at most 100."""

    def to_json(self) -> str:
        """Write it as JSON, for a store of your own. Readable, and versioned."""
        return json.dumps(
            {
                "version": _VERSION,
                "team": self.team,
                "cursor": self.cursor,
                "last_life": _write_time(self.last_life),
                "gaps": [
                    {
                        "since": _write_time(gap.since),
                        "until": _write_time(gap.until),
                        "reason": gap.reason.name,
                        "cursor": gap.cursor,
                    }
                    for gap in self.gaps
                ],
                "settled": self.settled,
                "recent": self.recent,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Position:
        """Read what `to_json` has written.

        Raises:
            ValueError: it is something else, or of a newer version.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or not isinstance(data.get("version"), int):
            raise ValueError("not a position")
        if data["version"] > _VERSION:
            raise ValueError(f"a position of version {data['version']}; this library knows version {_VERSION}")
        try:
            return cls(
                team=_text(data["team"]),
                cursor=_text(data["cursor"]),
                settled=_texts(data["settled"]),
                recent=_texts(data["recent"]),
                last_life=_read_time(data["last_life"]),
                gaps=tuple(map(_read_gap, data["gaps"])),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise ValueError(f"not a position: {type(exc).__name__} in its {exc}") from None


def _write_time(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _read_time(text: object) -> datetime | None:
    if text is None:
        return None
    time = datetime.fromisoformat(_text(text) or "")
    if time.tzinfo is None:
        raise ValueError("a time without its offset")
    return time


def _text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a string belongs")
    return value


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("list of ids")
    return tuple(values)


def _read_gap(data: dict[str, object]) -> Gap:
    until = _read_time(data["until"])
    if until is None:
        raise TypeError("gap without an end")
    return Gap(
        since=_read_time(data["since"]),
        until=until,
        reason=GapReason[_text(data["reason"]) or ""],
        cursor=_text(data["cursor"]),
    )


class _Line:
    """A stretch of the stream without a hole; joining makes two of them one (union-find)."""

    __slots__ = ("_into",)

    def __init__(self) -> None:
        self._into: _Line | None = None

    def root(self) -> _Line:
        line = self
        while line._into is not None:
            if line._into._into is not None:
                line._into = line._into._into
            line = line._into
        return line

    def join(self, other: _Line) -> None:
        mine, theirs = self.root(), other.root()
        if mine is not theirs:
            mine._into = theirs


@attrs.define(eq=False)
class Entry:
    """A line of the admission list: an event, or (without an id) a step of the resume cursor alone."""

    seq: int
    id: str | None
    cursor: str | None
    """The resume cursor as it stood after this entry."""
    moved: bool
    """Whether this entry moved it."""
    generation: int
    line: _Line
    ahead: bool = False
    """Delivered by a connection that does not lead, and not yet by one that does."""
    covered: int = 0
    """For an entry that was ahead: the entry whose cursor covers it."""
    settled: bool = False
    passed: bool = False
    """Whether the position has passed it: it and everything before it are settled."""
    closes: Gap | None = None
    """The gap that is closed when the position passes this entry."""


@attrs.define(eq=False)
class _Tail:
    """Where the settled position stands."""

    cursor: str | None = None
    pins: dict[str, None] = attrs.field(factory=dict)
    """Ids passed since that cursor stood."""
    late_pins: dict[str, int] = attrs.field(factory=dict)
    """The same, covered only by the entry of this number."""

    def take(self, entry: Entry) -> None:
        """Pass an entry."""
        if entry.moved:
            self.cursor = entry.cursor
            self.pins.clear()
            if self.late_pins:
                self.late_pins = {i: seq for i, seq in self.late_pins.items() if seq > entry.seq}
        elif entry.id is None or entry.ahead:
            pass
        elif entry.covered:
            self.late_pins[entry.id] = entry.covered
        else:
            self.pins[entry.id] = None

    def copy(self) -> _Tail:
        return _Tail(self.cursor, dict(self.pins), dict(self.late_pins))


@attrs.define(eq=False)
class _Source:
    """A connection, as the ledger sees it."""

    generation: int
    opened_at: datetime
    asked: bool
    """It subscribed with the resume cursor, and the server did not announce that this is useless."""
    unasked_because: GapReason
    baseline: int
    """The admission list's number at the cursor that it subscribed with."""
    admitted_before: int
    """How many events had been admitted when that cursor stood."""
    line: _Line = attrs.field(factory=_Line)
    on_trial: bool = False
    """It must not take the lead: whether the cursor is worth anything is just being found out."""
    replays: bool = False
    """It has repeated an event past the cursor that it subscribed with."""
    admitted: int = 0
    by_newer: int = 0
    """Events that newer connections brought: it does not owe them, they may come to it later."""
    stable: bool = False
    doubted: bool = False
    """It leads, but has not repeated what it owes: its next event decides."""
    last_ahead: Entry | None = None
    last_ahead_cursor: str | None = None


class Ledger:
    """Ids, the admission list, the resume cursor and the settled position.

    Args:
        window: how many ids are remembered, at least. What is unsettled is
            never forgotten.
        position: where an earlier run stood, if this one resumes.
    """

    def __init__(self, window: int, position: Position | None = None) -> None:
        self._window = window
        self._seq = 0
        self._admitted = 0
        self._ids: dict[str, Entry] = {}
        self._sources: dict[int, _Source] = {}
        # The lead. `_line` is what is known to be whole: the leader's, or the last leader's.
        self._line: _Line | None = None
        self._leader: _Source | None = None
        self._last_life: datetime | None = None
        # The resume cursor, and where the list stood when it came.
        self._cursor: str | None = None
        self._cursor_seq = 0
        self._cursor_admitted = 0
        # The settled position. `_pending` begins with the oldest unsettled entry.
        self._pending: deque[Entry] = deque()
        self._tail = _Tail()
        self._ahead: dict[str, Entry] = {}
        self._recent: deque[str] = deque(maxlen=RECENT_IDS)
        self._gaps: deque[Gap] = deque(maxlen=MAX_GAPS)
        self.gap_count: int = 0
        """How many possible gaps were found in all, those of the position included."""
        self.repeated: int = 0
        """How many deliveries were repetitions of a remembered id."""
        self.settled_count: int = 0
        """How many events were settled."""
        self.team: str | None = None
        """Whose stream it is, once that is known; it goes with the position."""
        if position is not None:
            self.restore(position)

    def restore(self, position: Position) -> None:
        """Go on where an earlier run stood. Before the first connection only."""
        self.team = position.team
        self._cursor = self._tail.cursor = position.cursor
        self._last_life = position.last_life
        self._gaps.extend(position.gaps)
        self.gap_count = len(position.gaps)
        self._line = _Line()
        for event_id in position.recent:
            self._remember(event_id)
        # What lies behind the cursor is older than the admission list; what lies past it is owed by a replay.
        self._cursor_seq = self._seq + 1
        self._cursor_admitted = self._admitted
        for event_id in position.settled:
            self._admitted += 1
            self._remember(event_id)
            self._tail.pins[event_id] = None

    def _remember(self, event_id: str) -> None:
        assert self._line is not None
        self._seq += 1
        self._ids[event_id] = Entry(self._seq, event_id, self._cursor, False, 0, self._line, settled=True, passed=True)
        self._recent.append(event_id)

    def first_start(self, since: datetime, until: datetime) -> Gap:
        """Record that no earlier run is known of, and return the possible gap that this makes."""
        gap = Gap(since=since, until=until, reason=GapReason.FIRST_START)
        self._gaps.append(gap)
        self.gap_count += 1
        return gap

    # ---- connections -------------------------------------------------------------------------------------------

    @property
    def resume_cursor(self) -> str | None:
        """Where the next connection subscribes from."""
        return self._cursor

    def open(
        self, generation: int, opened_at: datetime, *, promised: bool = True, with_cursor: bool = True
    ) -> str | None:
        """Register a connection, and return the cursor that it must subscribe with.

        Args:
            generation: its number, larger than every earlier one's.
            opened_at: the wall time, for reports.
            promised: False if the server announced that it does not resume.
                The cursor is sent all the same: it does no harm.
            with_cursor: False to subscribe without one, and on trial.
        """
        cursor = self._cursor if with_cursor else None
        reason = GapReason.NOT_PROMISED if cursor is not None else GapReason.NO_CURSOR
        source = _Source(
            generation,
            opened_at,
            asked=cursor is not None and promised,
            unasked_because=reason,
            baseline=self._cursor_seq if cursor is not None else self._seq + 1,
            admitted_before=self._cursor_admitted,
            on_trial=not with_cursor and self._cursor is not None,
        )
        self._sources[generation] = source
        if self._line is None and self._cursor is None:
            # Nothing came before, and there is no replay that could be incomplete.
            self._line = source.line
            self._leader = source
        return cursor

    def stable(self, generation: int) -> list[Gap]:
        """Record that a connection's replay is over; return the possible gaps that this brings to light."""
        source = self._sources[generation]
        source.stable = True
        return self._succeed()

    def ended(self, generation: int, last_life: datetime) -> list[Gap]:
        """Record that a connection is read no more; return the possible gaps that this brings to light.

        Args:
            generation: which one.
            last_life: when it last delivered anything.
        """
        source = self._sources.pop(generation, None)
        if source is None:
            return []
        # One that joined the last leader carries its stretch on, up to here.
        whole = source is self._leader or (self._leader is None and source.line.root() is self._whole())
        if whole and (self._last_life is None or last_life > self._last_life):
            self._last_life = last_life
        if source is not self._leader:
            return []
        self._leader = None
        return self._succeed()

    def drop_cursor(self, generation: int) -> list[Gap]:
        """Give the resume cursor up: the server refuses it. *generation*, opened without it, takes the lead.

        Returns the possible gap that this makes.
        """
        source = self._sources[generation]
        source.on_trial = False
        gap = self._gap(source, GapReason.CURSOR_DROPPED)
        self._line = source.line
        self._leader = source
        self._cover(generation)
        self._step(None)
        return [gap]

    def _whole(self) -> _Line | None:
        return None if self._line is None else self._line.root()

    def _succeed(self) -> list[Gap]:
        """Give the lead to the oldest stable connection, if nobody has it."""
        if self._leader is not None:
            return []
        heir = next((source for source in self._sources.values() if source.stable and not source.on_trial), None)
        return [] if heir is None else self._take_lead(heir)

    def _take_lead(self, heir: _Source, *, forced: bool = False) -> list[Gap]:
        gaps: list[Gap] = []
        if forced:
            gaps.append(self._gap(heir, GapReason.UNPROVED))
        elif heir.line.root() is not self._whole():
            owes = not heir.replays and self._admitted - heir.admitted_before - heir.by_newer > heir.admitted
            if not heir.asked:
                gaps.append(self._gap(heir, heir.unasked_because))
            elif owes and heir.admitted:
                gaps.append(self._gap(heir, GapReason.NOT_REPLAYED))
            elif owes:
                heir.doubted = True
        if not heir.doubted:
            self._line = heir.line
        self._leader = heir
        last = heir.last_ahead
        # Not when an older leader has covered it since: the resume cursor never goes back.
        covers = last is not None and last.ahead
        self._cover(heir.generation)
        if covers and heir.last_ahead_cursor is not None:
            self._step(heir.last_ahead_cursor)
        heir.last_ahead = None
        return gaps

    def _cover(self, generation: int) -> None:
        """What this connection, and those before it, delivered ahead is behind the resume cursor from now on."""
        for entry in [entry for entry in self._ahead.values() if entry.generation <= generation]:
            self._catch_up(entry)

    def _catch_up(self, entry: Entry) -> None:
        assert entry.id is not None
        del self._ahead[entry.id]
        entry.ahead = False
        entry.covered = self._seq + 1  # the step that follows
        if entry.passed and entry.id in self._ids:
            self._tail.late_pins[entry.id] = entry.covered

    def _step(self, cursor: str | None) -> None:
        """Move the resume cursor without an event: a proof is an entry of its own."""
        self._seq += 1
        self._cursor, self._cursor_seq, self._cursor_admitted = cursor, self._seq, self._admitted
        if self._pending and self._pending[-1].id is None and self._pending[-1].closes is None:
            # Steps without an event between them are one: a long overlap must not grow the list.
            self._pending.pop()
        line = self._line
        assert line is not None
        self._pending.append(Entry(self._seq, None, cursor, True, 0, line, settled=True))
        self._advance()

    def _gap(self, source: _Source, reason: GapReason) -> Gap:
        gap = Gap(since=self._last_life, until=source.opened_at, reason=reason, cursor=self._cursor)
        self._gaps.append(gap)
        self.gap_count += 1
        return gap

    # ---- events ------------------------------------------------------------------------------------------------

    def knows(self, event_id: str) -> bool:
        """Tell whether this id was admitted: to deliver it again would be a repetition."""
        return event_id in self._ids

    def repeat(self, generation: int, event_id: str, cursor: str | None) -> None:
        """Record that a connection delivered an id that is known. Nothing is handed out."""
        self.repeated += 1
        source, entry = self._sources[generation], self._ids[event_id]
        if entry.generation == _FROM_LOG:
            return  # says nothing about what any connection owes
        if entry.seq >= source.baseline and entry.line is not source.line:
            source.line.join(entry.line)
            source.replays = True
            if source.doubted:
                source.doubted = False
                self._line = source.line
        if not entry.ahead:
            return  # changes nothing: a replay of old events must not take the cursor back
        if source is not self._leader:
            source.last_ahead, source.last_ahead_cursor = entry, cursor
        else:
            # In order up to here by the leader's own word.
            self._catch_up(entry)
            if cursor is not None:
                self._step(cursor)

    def admit(self, generation: int, event_id: str, cursor: str | None) -> tuple[Entry, list[Gap]]:
        """Record a new event. The caller enqueues it before anything else can happen.

        Returns the entry to settle, and the possible gaps that the event
        brings to light.
        """
        source = self._sources[generation]
        gaps: list[Gap] = []
        if source.doubted:
            # It owes events that another connection delivered past the cursor, and goes on without them.
            source.doubted = False
            gaps.append(self._gap(source, GapReason.NOT_REPLAYED))
            self._line = source.line
        elif self._leader is None and self._cursor is None:
            # No cursor, so no replay that could be incomplete, and nothing that waiting for a proof could save.
            gaps.extend(self._take_lead(source))
        elif source is not self._leader and len(self._ahead) >= self._window // 2:
            # Bounded: what waits for a proof may not outgrow the window of ids.
            gaps.extend(self._take_lead(source, forced=True))
        self._seq += 1
        self._admitted += 1
        source.admitted += 1
        if len(self._sources) > 1:
            for older in self._sources.values():
                if older.generation < generation:
                    older.by_newer += 1
        leads = source is self._leader
        moved = leads and cursor is not None
        if moved:
            self._cursor, self._cursor_seq, self._cursor_admitted = cursor, self._seq, self._admitted
        entry = Entry(self._seq, event_id, self._cursor, moved, generation, source.line, not leads)
        self._ids[event_id] = entry
        self._pending.append(entry)
        if not leads:
            self._ahead[event_id] = entry
            source.last_ahead, source.last_ahead_cursor = entry, cursor
        if len(self._ids) > self._window:
            self._forget()
        return entry, gaps

    def admit_from_log(self, event_id: str) -> Entry:
        """Record a new event that no connection brought. It moves no cursor and proves nothing."""
        self._seq += 1
        entry = Entry(self._seq, event_id, self._cursor, False, _FROM_LOG, _Line())
        self._ids[event_id] = entry
        self._pending.append(entry)
        if len(self._ids) > self._window:
            self._forget()
        return entry

    def close_gap(self, gap: Gap) -> None:
        """Take a gap out of the position as soon as everything that was admitted so far is settled."""
        self._seq += 1
        self._pending.append(Entry(self._seq, None, self._cursor, False, _FROM_LOG, _Line(), settled=True, closes=gap))
        self._advance()

    def _forget(self) -> None:
        """Forget the oldest ids beyond the window; never one that is unsettled."""
        while len(self._ids) > self._window:
            event_id, entry = next(iter(self._ids.items()))
            if not entry.settled:
                break
            del self._ids[event_id]
            self._tail.pins.pop(event_id, None)
            self._tail.late_pins.pop(event_id, None)
            self._ahead.pop(event_id, None)

    # ---- settling ----------------------------------------------------------------------------------------------

    def settle(self, entry: Entry) -> None:
        """Record that an event is done with. Settling it again changes nothing."""
        if entry.settled:
            return
        entry.settled = True
        assert entry.id is not None
        self._recent.append(entry.id)
        self.settled_count += 1
        if self._pending[0].settled:
            self._advance()

    def _advance(self) -> None:
        pending, take = self._pending, self._tail.take
        while pending and pending[0].settled:
            entry = pending.popleft()
            entry.passed = True
            take(entry)
            if entry.closes is not None and entry.closes in self._gaps:
                self._gaps.remove(entry.closes)

    @property
    def unsettled(self) -> int:
        """How many entries the span from the oldest unsettled event to the newest one holds."""
        return len(self._pending)

    @property
    def oldest_unsettled(self) -> str | None:
        """The id of the oldest event that was not settled."""
        return self._pending[0].id if self._pending else None

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """The newest possible gaps, oldest first."""
        return tuple(self._gaps)

    def settled_position(self, last_life: datetime | None = None) -> Position:
        """Return where another run may resume without losing anything that was not settled."""
        return self._position(self._tail, self._pending, None, last_life)

    def position_after(self, event_id: str, last_life: datetime | None = None) -> Position:
        """Return what `settled_position` will be when this event is settled, too.

        Raises:
            ValueError: it is not in hand, or something before it is not settled.
        """
        entry = self._ids.get(event_id)
        if entry is None or entry.passed:
            raise ValueError(f"event {event_id} is not in hand")
        if self._pending[0] is not entry:
            raise ValueError(f"event {self._pending[0].id} came before {event_id} and is not settled")
        tail = self._tail.copy()
        rest = deque(self._pending)
        while rest and (rest[0] is entry or rest[0].settled):
            tail.take(rest.popleft())
        return self._position(tail, rest, entry, last_life)

    def _position(
        self, tail: _Tail, pending: Iterable[Entry], also: Entry | None, last_life: datetime | None
    ) -> Position:
        pinned = {*tail.pins, *tail.late_pins}
        ahead = [entry for entry in self._ahead.values() if entry.settled or entry is also]
        beyond = [entry for entry in pending if entry.settled and entry.id is not None and not entry.ahead]
        others = [entry for entry in (*ahead, *beyond) if entry.id not in pinned]
        settled = [*tail.pins, *tail.late_pins, *_ids_in_order(others)]
        known = set(settled)
        recent = [*self._recent, also.id] if also is not None and also.id is not None else self._recent
        return Position(
            team=self.team,
            cursor=tail.cursor,
            settled=tuple(settled),
            recent=tuple(event_id for event_id in recent if event_id not in known)[-RECENT_IDS:],
            last_life=last_life or self._last_life,
            gaps=tuple(self._gaps),
        )


def _ids_in_order(entries: Iterable[Entry]) -> list[str]:
    return [entry.id for entry in sorted(entries, key=lambda entry: entry.seq) if entry.id is not None]
