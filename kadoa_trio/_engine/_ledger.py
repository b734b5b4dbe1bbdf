"""What was received, what was handed out, and where to resume: the client's memory.

Sans-I/O: no Trio, no clock, no randomness. Times come in as arguments and go
out in what is reported.

Two questions are answered here, and they are not the same one:

*Where does the next connection resume?* At the **resume cursor**. It follows
one connection, the **leader**: the oldest one that is still read. A leader is
followed event by event only when it is **trusted**: it opened when nothing
came before it, so that it has no replay that could be incomplete, or its
replay is known to be over. What another connection delivers, and what a
leader that is not trusted delivers, is **ahead** of the resume cursor: handed
out, remembered, and not relied on. A replacement that cannot resume delivers
e14 while the old connection still owes e11 to e13, and a server may send live
events before and between the parts of a replay: a cursor that followed them
would step over events that only a resumption can bring.

What a leader that is not trusted delivers moves the resume cursor

* at once, where the event is **older than the subscription** by `RELY_FACTOR`
  times ``stable_after``, so that it is a part of the replay, and everything
  before it in the stream was replayed before it: its cursor is not after the
  newest one that was known that long before the attempt; or, with opaque
  cursors, its id was admitted that long before. Or where the cursors of the
  connection step back to it. Each of these also shows that the replay still
  goes on, and starts the waits again. An event that became known later than
  that does, too, but moves nothing: another instance of the server may send a
  live event some seconds late, before its replay;
* after `RELY_FACTOR` times ``stable_after`` of reading in which no later event
  has stepped back behind it (comparable cursors only);
* when the connection becomes trusted: after `TRUST_FACTOR` times
  ``stable_after`` without any sign of a replay.

*Did the stream go on without a hole?* That is decided when a connection leads
and has shown no sign of a replay for ``stable_after``. It has *joined* the
line of the leader before it when both delivered the same id, or when it
replays: the one was in order up to it, the other is from there on. One that
was asked to resume is believed without that, unless it shows otherwise:
another connection delivered events past the cursor, and it brought new ones
but none of those. Everything else is a `Gap`. A shared id proves that nothing
is missing in the end, not that nothing is missing now. So it closes the
question of the gap and does not move the cursor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final

import attrs

from .._position import Gap, GapReason, Position
from .._redact import presentable
from ._cursors import CursorKey, cursor_key

RECENT_IDS = 1_000
"""How many of the newest settled ids go with a position: a replay may be inclusive, or start earlier than asked."""
RECENT_IDS_WITHOUT_CURSOR: Final = 100
"""The same for a position without a cursor, from which nothing can be replayed."""
MAX_GAPS = 100
"""How many gaps are kept; the count goes on."""
STABLE_AFTER: Final = 10.0
"""Default of ``stable_after``, in seconds of reading."""
RELY_FACTOR: Final = 3
"""So many times ``stable_after`` after an event, 30 s by default, no step back behind it is expected any more.

It is the longest pause in a replay, or before it, that costs nothing if the connection then breaks.
"""
TRUST_FACTOR: Final = 6
"""A replay is known to be over after this many times ``stable_after`` without a sign of it: 60 s by default.

More than for one event, because a replay that comes in pages shows itself only when a page follows a live event.
"""
SNAPSHOT_INTERVAL: Final = 1.0
"""Minimum time between two snapshots of what is known, in seconds; see `Mark`."""
_FROM_LOG: Final = -1
"""Stands where a connection's number would, for what was taken from the notification log."""
_RESTORED: Final = 0
"""The same, for what an earlier run has settled."""

Moment = tuple[datetime, float]
"""A time on both clocks: the wall's, aware, and a monotonic one, in seconds."""
_Stood = tuple[datetime, float | None]
"""A `Moment`; without its second part when it is of an earlier process."""


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
    """The resume cursor as it stood after this entry, if this entry moved it."""
    at: _Stood | None
    """Since when events may be missing if nothing is replayed from that cursor."""
    moved: bool
    """Whether this entry moved the resume cursor."""
    generation: int
    line: _Line
    ahead: bool = False
    """Delivered by a connection that is not followed, and not yet by one that is."""
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
    at: _Stood | None = None
    seq: int = 0
    """The number of the entry that set the cursor."""
    pins: dict[str, None] = attrs.field(factory=dict)
    """Ids passed since that cursor stood."""
    late_pins: dict[str, int] = attrs.field(factory=dict)
    """The same, covered only by the entry of this number."""
    next_cover: float = 0
    """No late pin is covered by an entry before this one."""

    def take(self, entry: Entry) -> None:
        """Pass an entry."""
        if entry.moved:
            self.cursor, self.at, self.seq = entry.cursor, entry.at, entry.seq
            if self.pins:
                self.pins.clear()
            if self.late_pins and entry.seq >= self.next_cover:
                self.late_pins = {i: seq for i, seq in self.late_pins.items() if seq > entry.seq}
                self.next_cover = min(self.late_pins.values(), default=0)
        elif entry.id is None or entry.ahead or self.cursor is None:
            pass  # without a cursor nothing can be replayed, so that no id needs to be known
        elif entry.covered:
            self.pin_until(entry.id, entry.covered)
        else:
            self.pins[entry.id] = None

    def pin_until(self, event_id: str, covered: int) -> None:
        """Keep an id until the entry of number *covered* is passed."""
        self.next_cover = min(self.next_cover, covered) if self.late_pins else covered
        self.late_pins[event_id] = covered

    def copy(self) -> _Tail:
        return _Tail(self.cursor, self.at, self.seq, dict(self.pins), dict(self.late_pins), self.next_cover)


@attrs.frozen
class _Known:
    """What was known at a time."""

    seq: int
    """The admission list's number."""
    key: CursorKey | None
    """The newest cursor."""


@attrs.frozen
class Mark:
    """What was known when an attempt began, and some time before.

    An event that was known when the attempt began may still be a live event:
    it may reach another server's instance later, or be sent again before the
    replay. So it shows that the replay goes on, and moves no cursor. Only an
    event that was known `RELY_FACTOR` times ``stable_after`` earlier is a
    part of the replay for certain.
    """

    then: _Known
    """When the attempt began."""
    before: _Known
    """That time earlier."""


@attrs.frozen
class _Delivered:
    """What a connection that is not followed has delivered ahead of the resume cursor."""

    at: Moment
    clock: float
    """The connection's own clock then: it stands still while the connection does not read."""
    entry: Entry
    cursor: str | None
    key: CursorKey | None


@attrs.define(eq=False)
class _Source:
    """A connection, as the ledger sees it."""

    generation: int
    mark: Mark
    cursor_key: CursorKey | None
    """What the cursor that it subscribed with is compared by."""
    resumes: bool
    """It subscribed with the resume cursor."""
    asked: bool
    """The same, and the server did not announce that this is useless."""
    unasked_because: GapReason
    baseline: int
    """The admission list's number at the cursor that it subscribed with."""
    admitted_before: int
    """How many events had been admitted when that cursor stood."""
    opaque: bool
    """Its cursors cannot be compared."""
    held: bool
    """It must not lead: it subscribed without the cursor, to find out whether the server is well."""
    line: _Line = attrs.field(factory=_Line)
    first: Moment | None = None
    """Its first frame."""
    waited: float = 0.0
    """How long it has not read, in seconds."""
    trusted: bool = False
    """Its replay is known to be over."""
    decided: bool = False
    """Whether it has continued the stream without a hole was found out, or reported."""
    replays: bool = False
    """It has delivered a part of the replay past the cursor that it subscribed with."""
    admitted: int = 0
    by_newer: int = 0
    """Events that newer connections brought: it does not owe them, they may come to it later."""
    doubted: bool = False
    """It leads, but has not repeated what it owes: its next event decides."""
    # Its replay: how far it is known to have come.
    replayed_key: CursorKey | None = None
    replayed_seq: int = 0
    replayed: _Delivered | None = None
    # The last sign that it goes on, on the connection's clock; and the newest event that was one.
    last_sign: float = 0.0
    sign_key: CursorKey | None = None
    sign_seq: int = 0
    top: CursorKey | None = None
    """The newest cursor that it delivered."""
    first_event: Moment | None = None
    """When it delivered its first event: its subscription had taken effect by then."""
    last: Moment | None = None
    """When it last delivered an event with a cursor."""
    heard: float = 0.0
    """When its last frame came, on its own clock: silence after that shows nothing."""
    trail: deque[_Delivered] = attrs.field(factory=deque)
    """What it delivered ahead and is not yet relied on, in its order. Comparable cursors ascend in it."""
    trail_ids: set[str] = attrs.field(factory=set)

    def clock(self, now: Moment) -> float:
        """Return the time that it has been reading, in seconds from an arbitrary point."""
        return now[1] - self.waited

    def take_trail(self, count: int) -> list[_Delivered]:
        """Take the oldest *count* deliveries out of the trail."""
        taken = [self.trail.popleft() for _ in range(count)]
        for one in taken:
            assert one.entry.id is not None
            self.trail_ids.discard(one.entry.id)
            if one.key is not None and (self.replayed_key is None or one.key > self.replayed_key):
                self.replayed_key = one.key
        return taken

    def sign(self, one: _Delivered, seq: int) -> None:
        """Record that a delivery shows that the replay goes on, unless it is one that has shown this before."""
        if one.key is not None and not self.opaque:
            if self.sign_key is not None and one.key <= self.sign_key:
                return
            self.sign_key = one.key
        elif seq <= self.sign_seq:
            return
        else:
            self.sign_seq = seq
        self.last_sign = one.clock


class Ledger:
    """Ids, the admission list, the resume cursor and the settled position.

    Args:
        window: how many ids are remembered, at least. What is unsettled is
            never forgotten.
        position: where an earlier run stood, if this one resumes.
        stable_after: `Timeouts.stable_after`, in seconds.
    """

    def __init__(self, window: int, position: Position | None = None, *, stable_after: float = STABLE_AFTER) -> None:
        self._window = window
        self._stable_after = stable_after
        self._seq = 0
        self._admitted = 0
        self._ids: dict[str, Entry] = {}
        # The same, oldest first. A dict that loses its first items is walked from its beginning for each of them.
        self._order: deque[Entry] = deque()
        self._sources: dict[int, _Source] = {}
        # The lead. `_line` is what is known to be whole: the leader's, or the last leader's.
        self._line: _Line | None = None
        self._leader: _Source | None = None
        # What the next connection that leads must show, because the one before left it open.
        self._unpromised = False
        self._unread = False
        # No replay was promised from the cursors of the entries up to this one.
        self._unpromised_seq = -1
        # The resume cursor, since when events after it may be missing, and where the list stood when it came.
        self._cursor: str | None = None
        self._cursor_at: _Stood | None = None
        self._cursor_seq = 0
        self._cursor_admitted = 0
        self._top: CursorKey | None = None
        # What was known at times, oldest first: each is the state just before its time. See `mark`.
        self._snapshots: deque[tuple[float, _Known]] = deque()
        self._restored = False
        # The settled position. `_pending` begins with the oldest unsettled entry.
        self._pending: deque[Entry] = deque()
        self._tail = _Tail()
        self._ahead: dict[str, Entry] = {}
        self._recent: deque[str] = deque(maxlen=RECENT_IDS)
        self._gaps: deque[Gap] = deque(maxlen=MAX_GAPS)
        self.last_life: datetime | None = None
        """When the last frame came, by the wall clock; the connections set it."""
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
        """Resume where an earlier run stood. Before the first connection only."""
        self.team = position.team
        self._cursor = self._tail.cursor = position.cursor
        stood = position.cursor_at or position.last_life
        self._cursor_at = self._tail.at = None if stood is None else (stood, None)
        self.last_life = position.last_life
        self._gaps.extend(position.gaps)
        self.gap_count = len(position.gaps)
        self._line = _Line()
        self._restored = True
        for event_id in position.recent:
            self._remember(event_id)
        # What lies behind the cursor is older than the admission list; what lies past it is owed by a replay.
        self._cursor_seq = self._tail.seq = self._seq + 1
        self._cursor_admitted = self._admitted
        if not position.promised:
            self._unpromised_seq = self._cursor_seq
        for event_id in position.settled:
            self._admitted += 1
            entry = self._remember(event_id)
            if self._cursor is not None:
                entry.ahead = True
                self._ahead[event_id] = entry

    def _remember(self, event_id: str) -> Entry:
        assert self._line is not None
        self._seq += 1
        entry = Entry(self._seq, event_id, None, None, False, _RESTORED, self._line, settled=True, passed=True)
        self._ids[event_id] = entry
        self._order.append(entry)
        self._recent.append(event_id)
        return entry

    def note_start(self, at: Moment) -> None:
        """Record when a program that has no position started: if it crashes before any event, gaps begin then."""
        self._cursor_at = self._tail.at = at

    # ---- connections -------------------------------------------------------------------------------------------

    @property
    def resume_cursor(self) -> str | None:
        """Where the next connection subscribes from."""
        return self._cursor

    def mark(self, now: Moment | None = None) -> Mark:
        """Return what is known before an attempt begins, and was some time earlier; give it to `open`.

        Args:
            now: the time; None if nothing is known to be older than the attempt.
        """
        then = self._known()
        if now is None:
            return Mark(then, _Known(0, cursor_key(self._cursor)))
        if self._restored:
            # When an earlier run received what it has settled is not known, so that it counts from here on.
            self._restored = False
            self._snapshots.append((now[1], _Known(0, cursor_key(self._cursor))))
        while self._snapshots and self._snapshots[0][0] <= now[1] - RELY_FACTOR * self._stable_after:
            self._snapshots.popleft()
        return Mark(then, self._snapshots[0][1] if self._snapshots else then)

    def _known(self) -> _Known:
        keys = [key for key in (cursor_key(self._cursor), self._top) if key is not None]
        return _Known(self._seq, max(keys, default=None))

    def open(
        self,
        generation: int,
        now: Moment | None = None,
        *,
        mark: Mark | None = None,
        promised: bool = True,
        with_cursor: bool = True,
    ) -> str | None:
        """Register a connection, and return the cursor that it must subscribe with.

        Args:
            generation: its number, larger than every earlier one's.
            now: the time; None if it does not matter since when events may be
                missing.
            mark: what was known when its attempt began; None for now.
            promised: False if the server announced that it does not resume.
                The cursor is sent anyway: it does no harm. The announcement
                counts until a connection that was opened after it has moved the
                resume cursor.
            with_cursor: False to subscribe without one. The connection leads
                only after `drop_cursor` then.
        """
        cursor = self._cursor if with_cursor else None
        key = cursor_key(cursor)
        if not promised:
            self.withdraw_promise()
        source = _Source(
            generation,
            mark or self.mark(now),
            key,
            resumes=cursor is not None,
            asked=cursor is not None and not self._unpromised and self._cursor_seq > self._unpromised_seq,
            unasked_because=GapReason.NOT_PROMISED if cursor is not None else GapReason.NO_CURSOR,
            baseline=self._cursor_seq if cursor is not None else self._seq + 1,
            admitted_before=self._cursor_admitted,
            opaque=cursor is not None and key is None,
            held=not with_cursor and self._cursor is not None,
        )
        self._sources[generation] = source
        if self._line is None and self._cursor is None:
            # Nothing came before, and there is no replay that could be incomplete.
            self._line = source.line
            self._leader = source
            source.decided = source.trusted = True
            if self._cursor_at is None:
                self._cursor_at = self._tail.at = now
        elif self._leader is None:
            self._elect()
        return cursor

    def withdraw_promise(self) -> None:
        """Record that the server announced that it does not resume: see `open`."""
        if self._cursor is not None:
            self._unpromised = True

    def live(self, generation: int, now: Moment) -> None:
        """Record a connection's first frame."""
        source = self._sources[generation]
        source.first = now
        source.last_sign = source.heard = source.clock(now)

    def waited(self, generation: int, seconds: float) -> None:
        """Record that a connection was not read for so long: that time shows nothing about its replay."""
        self._sources[generation].waited += seconds

    def is_open(self, generation: int) -> bool:
        """Tell whether a connection is registered, and has not ended."""
        return generation in self._sources

    def trusts(self, generation: int) -> bool:
        """Tell whether a connection's replay is known to be over; also for one that has ended."""
        source = self._sources.get(generation)
        return source is None or source.trusted

    def tick(self, generation: int, now: Moment, heard: Moment | None = None) -> list[Gap]:
        """Take into account that time has passed on a connection, and return the possible gaps that this brings to light.

        To be called every few seconds until the connection is trusted, when
        everything that has arrived was read.

        Args:
            generation: the connection.
            now: the time.
            heard: when its last frame came; None for now.
        """
        source = self._sources.get(generation)
        if source is None or source.first is None:
            return []
        source.heard = max(source.heard, source.clock(heard or now))
        return self._look(source, now)

    def _look(self, source: _Source, now: Moment) -> list[Gap]:
        if source is not self._leader or source.trusted or source.first is None:
            return []
        gaps: list[Gap] = []
        patience = TRUST_FACTOR * self._stable_after
        # What it owes may still come in a replay that goes on without showing itself.
        quiet = source.clock(now) - source.last_sign
        if not source.decided and quiet >= (patience if self._owes(source) else self._stable_after):
            gaps = self._decide(source, now)
        if source.decided:
            self._mature(source, source.heard)
            if not source.resumes or source.heard - source.last_sign >= patience:
                self._trust(source)
        return gaps

    def ended(self, generation: int, now: Moment, *, unread: bool = False) -> list[Gap]:
        """Record that a connection is no longer read; return the possible gaps that this brings to light.

        Args:
            generation: which one.
            now: when.
            unread: events that it had received may not have been read.
        """
        source = self._sources.pop(generation, None)
        if source is None or source is not self._leader:
            return []
        if unread:
            self._unread = True
        self._leader = None
        leader = self._elect()
        return [] if leader is None else self._look(leader, now)

    def drop_cursor(self, generation: int, now: Moment) -> list[Gap]:
        """Give the resume cursor up: the server refuses it. *generation*, opened without it, takes the lead.

        Returns the possible gap that this makes.
        """
        source = self._sources[generation]
        gap = self._gap(source, GapReason.CURSOR_DROPPED, now)
        self._step(None)
        self._lead_by_force(source)
        return [gap]

    def _lead_by_force(self, source: _Source) -> None:
        source.held = source.doubted = False
        source.decided = True
        self._close_question()
        self._line = source.line
        self._leader = source
        self._trust(source)

    def _whole(self) -> _Line | None:
        return None if self._line is None else self._line.root()

    def _elect(self) -> _Source | None:
        """Give the lead to the oldest connection; return it."""
        leader = next((source for source in self._sources.values() if not source.held), None)
        self._leader = leader
        if leader is None:
            return None
        if leader.trusted:
            self._trust(leader)  # once more: for what it delivered while another one led
        elif leader.replayed is not None:
            one, leader.replayed = leader.replayed, None
            self._replayed(leader, one)
        return leader

    def _owes(self, source: _Source) -> bool:
        """Tell whether others have delivered events past its cursor, and it has repeated none of them."""
        return (
            source.asked
            and not source.replays
            and source.line.root() is not self._whole()
            and self._admitted - source.admitted_before - source.by_newer > source.admitted
        )

    def _decide(self, source: _Source, now: Moment) -> list[Gap]:
        """Decide whether the leader continues the stream without a hole."""
        source.decided = True
        gaps: list[Gap] = []
        if source.line.root() is not self._whole():
            owes = self._owes(source)
            if not source.asked:
                gaps.append(self._gap(source, source.unasked_because, now))
            elif self._unread:
                gaps.append(self._gap(source, GapReason.UNREAD, now))
            elif owes and source.admitted:
                gaps.append(self._gap(source, GapReason.NOT_REPLAYED, now))
            elif owes:
                source.doubted = True
        if not source.doubted:
            self._line = source.line
        self._close_question()
        return gaps

    def _close_question(self) -> None:
        if self._unpromised:
            self._unpromised_seq = self._cursor_seq
        self._unpromised = self._unread = False

    def _gap(self, source: _Source, reason: GapReason, now: Moment) -> Gap:
        first = source.first_event or now
        elapsed = timedelta(seconds=max(now[1] - first[1], 0.0))
        # Where the clock was set meanwhile, the span is the longer one.
        until = max(first[0], now[0] - elapsed)
        stood = self._cursor_at
        since = None if stood is None else _earliest(stood, now)
        if since is not None and since > until:
            # Of an earlier run, whose clock was ahead of this one's by an unknown time.
            since = None
        gap = Gap(since=since, until=until, reason=reason, cursor=self._cursor)
        self._gaps.append(gap)
        self.gap_count += 1
        self._cursor_at = first  # up to there the gap says it
        return gap

    # ---- the resume cursor, without events ---------------------------------------------------------------------

    def _mature(self, source: _Source, clock: float) -> None:
        """Rely on what the leader delivered long enough ago, or so many events ago: no step back is expected."""
        if source.opaque or not source.resumes:
            return
        count = 0
        for number, one in enumerate(source.trail, 1):
            old = clock - max(one.clock, source.last_sign) >= RELY_FACTOR * self._stable_after
            if not old and len(source.trail) - number < self._window // 4:
                break
            if one.key is not None:
                count = number
        if not count:
            return
        taken = source.take_trail(count)
        newest = taken[-1]
        self._cover_all(taken)
        if self._is_beyond(newest.key):
            self._step(newest.cursor)

    def _trust(self, source: _Source) -> None:
        """Follow the leader from now on: its replay is over, and what it delivered is behind the resume cursor."""
        source.trusted = True
        last = next((one for one in reversed(source.trail) if one.cursor is not None), None)
        # Not when an older leader has covered it since: the resume cursor never goes back.
        moves = last is not None and (
            last.entry.ahead if source.opaque or not source.resumes else self._is_beyond(last.key)
        )
        self._cover_all(source.take_trail(len(source.trail)))
        for entry in [entry for entry in self._ahead.values() if entry.generation <= source.generation]:
            self._cover(entry)
        if last is not None and moves:
            self._cursor_at = last.at
            self._step(last.cursor)
        elif source.last is not None and self._cursor is not None:
            # The time counts from now on, too: everything up to here was delivered.
            self._cursor_at = source.last
            promised = self._cursor_seq > self._unpromised_seq
            self._step(self._cursor)
            if not promised:
                self._unpromised_seq = self._cursor_seq  # it has not moved

    def _is_beyond(self, key: CursorKey | None) -> bool:
        mine = cursor_key(self._cursor)
        return key is not None and (mine is None or key > mine)

    def _cover_all(self, delivered: Iterable[_Delivered], covered: int = 0) -> None:
        for one in delivered:
            if one.entry.ahead:
                self._cover(one.entry, covered)

    def _cover(self, entry: Entry, covered: int = 0) -> None:
        """Put an entry that was ahead behind the resume cursor, as it stands after entry *covered* or else the next."""
        assert entry.id is not None
        self._ahead.pop(entry.id, None)
        entry.ahead = False
        entry.covered = covered or self._seq + 1
        if entry.passed and entry.id in self._ids and self._tail.cursor is not None:
            self._tail.pin_until(entry.id, entry.covered)

    def _step(self, cursor: str | None) -> None:
        """Move the resume cursor without an event: an entry of its own."""
        self._seq += 1
        self._cursor, self._cursor_seq, self._cursor_admitted = cursor, self._seq, self._admitted
        if self._pending and self._pending[-1].id is None and self._pending[-1].closes is None:
            # Steps without an event between them are one: a long overlap must not grow the list.
            self._pending.pop()
        line = self._line
        assert line is not None
        self._pending.append(Entry(self._seq, None, cursor, self._cursor_at, True, 0, line, settled=True))
        self._advance()

    # ---- events ------------------------------------------------------------------------------------------------

    def knows(self, event_id: str) -> bool:
        """Tell whether this id was admitted: to deliver it again would be a repetition."""
        return event_id in self._ids

    def delivered(self, event_id: str) -> bool:
        """Tell whether a connection delivered this id, in this run or an earlier one: the log alone does not count."""
        entry = self._ids.get(event_id)
        return entry is not None and entry.generation != _FROM_LOG

    @property
    def has_delivered(self) -> bool:
        """Whether an id is remembered that a connection delivered."""
        return any(entry.generation != _FROM_LOG for entry in self._order)

    def repeat(
        self, generation: int, event_id: str, cursor: str | None, now: Moment, arrived: Moment | None = None
    ) -> None:
        """Record that a connection delivered an id that is known. Nothing is handed out. Arguments as for `admit`."""
        self.repeated += 1
        arrived = arrived or now
        source, entry = self._sources[generation], self._ids[event_id]
        self._hear(source, now)
        # What was taken from the log says nothing about what any connection owes.
        if entry.generation != _FROM_LOG and entry.seq >= source.baseline and entry.line is not source.line:
            self._join(source, entry.line)
        if cursor is not None:
            source.last = arrived
        if source is self._leader and source.trusted:
            if entry.ahead:
                # In order up to here by the leader's own word. Otherwise nothing changes:
                # a replay of old events must not take the cursor back.
                self._cover(entry)
                if cursor is not None:
                    self._cursor_at = arrived
                    self._step(cursor)
            return
        key = cursor_key(cursor)
        one = _Delivered(arrived, source.clock(now), entry, cursor, key)
        if self._is_replayed(source, entry, event_id, one):
            self._replayed(source, one)
        elif entry.ahead and event_id not in source.trail_ids:
            if source is self._leader and not source.opaque and key is not None and not self._is_beyond(key):
                self._cover(entry)
            else:
                self._leave_in_trail(source, one)

    def admit(
        self, generation: int, event_id: str, cursor: str | None, now: Moment, arrived: Moment | None = None
    ) -> tuple[Entry, list[Gap]]:
        """Record a new event. The caller enqueues it before anything else can happen.

        Args:
            generation: the connection that delivered it.
            event_id: what identifies it.
            cursor: where it stands in the stream.
            now: when it is admitted.
            arrived: a time before which it cannot have come, if that is
                earlier: it may have waited to be read. Spans of gaps begin there.

        Returns the entry to settle, and the possible gaps that the event
        brings to light.
        """
        source = self._sources[generation]
        arrived = arrived or now
        self._hear(source, now)
        gaps: list[Gap] = []
        leads = source is self._leader
        if leads and source.doubted:
            # It owes events that another connection delivered past the cursor, and brings others.
            source.doubted = False
            gaps.append(self._gap(source, GapReason.NOT_REPLAYED, now))
            self._line = source.line
        elif leads and not source.decided and self._cursor is None:
            # No cursor, so no replay that could be incomplete, and nothing that waiting for a proof could save.
            gaps.extend(self._decide(source, now))
            self._trust(source)
        elif not (leads and source.trusted) and len(self._ahead) >= self._window // 2:
            # Bounded: what waits for a proof may not outgrow the window of ids.
            gaps.append(self._gap(source, GapReason.UNPROVED, now))
            self._lead_by_force(source)
            leads = True
        self._seq += 1
        self._admitted += 1
        source.admitted += 1
        if len(self._sources) > 1:
            for older in self._sources.values():
                if older.generation < generation:
                    older.by_newer += 1
        if cursor is not None:
            source.last = arrived
        if leads and source.trusted:
            moved = cursor is not None or self._cursor is None
            if moved:
                self._cursor_at = arrived
                self._cursor, self._cursor_seq, self._cursor_admitted = cursor, self._seq, self._admitted
            entry = Entry(self._seq, event_id, cursor, self._cursor_at, moved, generation, source.line)
            self._record(entry)
            return entry, gaps
        key = cursor_key(cursor)
        entry = Entry(self._seq, event_id, None, None, False, generation, source.line, ahead=True)
        one = _Delivered(arrived, source.clock(now), entry, cursor, key)
        replayed = self._is_replayed(source, None, event_id, one)
        if replayed and leads and self._is_beyond(key):
            # A part of the replay: everything before it in the stream was replayed before it.
            self._cover_all(source.take_trail(_behind(source.trail, key)), entry.seq)
            entry.ahead, entry.moved = False, True
            entry.cursor, entry.at = cursor, self._cursor_at
            self._cursor, self._cursor_seq, self._cursor_admitted = cursor, self._seq, self._admitted
            self._record(entry)
            return entry, gaps
        if leads and not source.opaque and key is not None and not self._is_beyond(key):
            # Of the neighbours of the resume cursor, which share it, or older: a resumption brings it again.
            entry.ahead = False
            self._record(entry)
            return entry, gaps
        self._record(entry)
        self._ahead[event_id] = entry
        if replayed:
            source.replayed = one
        else:
            self._leave_in_trail(source, one)
            if leads and source.decided and len(source.trail) > self._window // 4:
                self._mature(source, one.clock)
        return entry, gaps

    def _hear(self, source: _Source, now: Moment) -> None:
        if source.first_event is None:
            source.first_event = now
        source.heard = source.clock(now)
        snapshots = self._snapshots
        if not snapshots or now[1] - snapshots[-1][0] >= SNAPSHOT_INTERVAL:
            snapshots.append((now[1], self._known()))
            while snapshots[0][0] <= now[1] - RELY_FACTOR * self._stable_after:
                snapshots.popleft()

    def _record(self, entry: Entry) -> None:
        assert entry.id is not None
        self._ids[entry.id] = entry
        self._order.append(entry)
        self._pending.append(entry)
        if len(self._ids) > self._window:
            self._forget()

    def _is_replayed(self, source: _Source, entry: Entry | None, event_id: str, one: _Delivered) -> bool:
        """Tell whether a delivery is a part of the replay for certain, and take in what it shows of the replay."""
        key = one.key
        if key is not None and (self._top is None or key > self._top):
            self._top = key
        if not source.resumes:
            return False
        if one.cursor is not None and key is None:
            source.opaque = True
        mark = source.mark
        # What was taken from the log says nothing about what any connection owes.
        seq = mark.then.seq + 1 if entry is None or entry.generation == _FROM_LOG else entry.seq
        if source.opaque or key is None:
            if seq <= mark.then.seq:
                source.sign(one, seq)
            if seq > mark.before.seq or seq <= source.replayed_seq:
                return False
            source.replayed_seq = seq
            return True
        top = source.top
        if top is None or key > top:
            source.top = key
        if event_id in source.trail_ids:
            return False
        # Only where a replay is promised: the live events of a careless server may be out of order.
        steps_back = source.asked and top is not None and key < top
        # A new event at the newest cursor itself may be live: neighbours may share a cursor.
        if steps_back or seq <= mark.then.seq or (mark.then.key is not None and key < mark.then.key):
            source.sign(one, seq)
        if not (steps_back or seq <= mark.before.seq or (mark.before.key is not None and key < mark.before.key)):
            return False
        if source.replayed_key is not None and key <= source.replayed_key:
            return False  # sent again: no sign that the replay goes on
        source.replayed_key = key
        source.last_sign = one.clock
        if source.cursor_key is not None and key > source.cursor_key and self._line is not None:
            self._join(source, self._line)
        return True

    def _replayed(self, source: _Source, one: _Delivered) -> None:
        """Move the resume cursor to a part of a replay, if its connection leads."""
        if source is not self._leader:
            source.replayed = one
        elif source.opaque or one.key is None:
            if one.entry.ahead and one.cursor is not None:
                self._cover(one.entry)
                self._step(one.cursor)
        elif self._is_beyond(one.key):
            self._cover_all(source.take_trail(_behind(source.trail, one.key)))
            self._cover_all([one])
            self._step(one.cursor)

    def _join(self, source: _Source, line: _Line) -> None:
        """Record that a connection continues a line without a hole."""
        source.line.join(line)
        source.replays = True
        if source.doubted:
            source.doubted = False
            self._line = source.line

    def _leave_in_trail(self, source: _Source, one: _Delivered) -> None:
        trail = source.trail
        while trail and not trail[0].entry.ahead:
            source.take_trail(1)  # an older leader has covered it since
        trail.append(one)
        assert one.entry.id is not None
        source.trail_ids.add(one.entry.id)

    def admit_apart(self, event_id: str) -> Entry:
        """Record a new event that was held and whose connection has ended. It moves no cursor and proves nothing."""
        self._seq += 1
        self._admitted += 1
        entry = Entry(self._seq, event_id, None, None, False, _RESTORED, _Line(), ahead=self._cursor is not None)
        self._record(entry)
        if entry.ahead:
            self._ahead[event_id] = entry
        return entry

    def admit_from_log(self, event_id: str) -> Entry:
        """Record a new event that no connection brought. It moves no cursor and proves nothing."""
        self._seq += 1
        entry = Entry(self._seq, event_id, None, None, False, _FROM_LOG, _Line())
        self._record(entry)
        return entry

    def close_gap(self, gap: Gap) -> None:
        """Take a gap out of the position as soon as everything that was admitted so far is settled."""
        self._seq += 1
        line = _Line()
        self._pending.append(Entry(self._seq, None, None, None, False, _FROM_LOG, line, settled=True, closes=gap))
        self._advance()

    def _forget(self) -> None:
        """Forget the oldest ids beyond the window; never one that is unsettled."""
        ids, order = self._ids, self._order
        while len(ids) > self._window and order[0].settled:
            event_id = order.popleft().id
            assert event_id is not None
            del ids[event_id]
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
            entry.cursor = entry.at = None
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

    def settled_position(self, now: Moment | None = None) -> Position:
        """Return where another run may resume without losing anything that was not settled."""
        return self._position(self._tail, self._pending, None, now)

    def position_after(self, event_id: str, now: Moment | None = None) -> Position:
        """Return what `settled_position` will be when this event is settled, too.

        Raises:
            ValueError: it is not in hand, or something before it is not settled.
        """
        entry = self._ids.get(event_id)
        if entry is None or entry.passed:
            raise ValueError(f"event {presentable(event_id, 80)} is not in hand")
        if self._pending[0] is not entry:
            older, newer = presentable(str(self._pending[0].id), 80), presentable(event_id, 80)
            raise ValueError(f"event {older} came before {newer} and is not settled")
        tail = self._tail.copy()
        rest = deque(self._pending)
        while rest and (rest[0] is entry or rest[0].settled):
            tail.take(rest.popleft())
        return self._position(tail, rest, entry, now)

    def _position(self, tail: _Tail, pending: Iterable[Entry], also: Entry | None, now: Moment | None) -> Position:
        settled: list[str] = []
        # Without a cursor nothing can be replayed; but a repair of an open gap, or of the one that follows, finds events.
        newest = [*self._recent, also.id] if also is not None and also.id is not None else list(self._recent)
        recent = newest if self._gaps else newest[-RECENT_IDS_WITHOUT_CURSOR:]
        if tail.cursor is not None:
            pinned = {*tail.pins, *tail.late_pins}
            ahead = [entry for entry in self._ahead.values() if entry.settled or entry is also]
            beyond = [entry for entry in pending if entry.settled and entry.id is not None and not entry.ahead]
            others = [entry for entry in (*ahead, *beyond) if entry.id not in pinned]
            settled = [*tail.pins, *tail.late_pins, *_ids_in_order(others)]
            known = set(settled)
            recent = [event_id for event_id in newest if event_id not in known][-RECENT_IDS:]
        return Position(
            team=self.team,
            cursor=tail.cursor,
            settled=tuple(settled),
            recent=tuple(recent),
            cursor_at=None if tail.at is None else _earliest(tail.at, now),
            last_life=self.last_life,
            promised=tail.cursor is None or not (self._unpromised or tail.seq <= self._unpromised_seq),
            gaps=tuple(self._gaps),
        )


def _behind(trail: Iterable[_Delivered], key: CursorKey | None) -> int:
    """Count the deliveries at the beginning of a trail that stand before *key* in the stream."""
    count = 0
    for number, one in enumerate(trail, 1):
        if one.key is not None and (key is None or one.key > key):
            break
        if one.key is not None:
            count = number
    return count


def _earliest(stood: _Stood, now: Moment | None) -> datetime:
    """Return the earlier of what the wall clock said then, and what it would have said by its time now."""
    wall, clock = stood
    if now is None or clock is None:
        return wall
    return min(wall, now[0] - timedelta(seconds=max(now[1] - clock, 0.0)))


def _ids_in_order(entries: Iterable[Entry]) -> list[str]:
    return [entry.id for entry in sorted(entries, key=lambda entry: entry.seq) if entry.id is not None]
