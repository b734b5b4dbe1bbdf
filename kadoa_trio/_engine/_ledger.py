"""Remembers which events came, which are settled, and from which cursor to resume.

Sans-I/O: no Trio, no clock, no randomness. Times are arguments; possible gaps
are return values. `Ledger.check` states the invariants.

The ledger answers two different questions.

**Where does the next connection resume?** At the *resume cursor*. It follows
one connection, the *leader*: the oldest one that is still read. The ledger
follows every event of the leader only when the leader is *trusted*: it opened
when nothing came before it, so there is no replay that could be incomplete, or
its replay is known to be over. Events of other connections, and of a leader
that is not trusted, are *ahead* of the resume cursor: the program gets them,
their ids are remembered, and the resume cursor does not move. There are two
reasons. A replacement that cannot resume delivers e14 while the old connection
has not yet delivered e11 to e13. And a server may send live events before a
replay and between its parts. A cursor that followed such events would step
over others that only a resumption can bring.

An event of a leader that is not trusted moves the resume cursor

* at once, if the event is *older than the subscription* by `RELY_FACTOR` times
  ``stable_after``, because then it is a part of the replay, and the replay has
  already brought everything before it. The signs of that: the event's cursor
  is not after the newest one that was known that long before the attempt; or,
  with opaque cursors, its id was admitted that long before;
* at once, if the connection's cursors step back to the event, because then it
  is a part of the replay, too. Each of these signs also shows that the replay
  goes on, so the waits below start again. An event that became known later
  before the attempt also starts the waits again, but does not move the cursor,
  because another instance of the server may send a live event some seconds
  late, before its replay;
* after `RELY_FACTOR` times ``stable_after`` of reading in which no later event
  has stepped back behind it (comparable cursors only);
* when the connection becomes trusted: after `TRUST_FACTOR` times
  ``stable_after`` of reading without a sign of a replay.

**Has the stream continued without a hole?** The ledger decides this when a
connection leads and has shown no sign of a replay for ``stable_after``. The
connection has *joined* the line of the leader before it if both delivered the
same id, or if it replays: the line was in order up to that event, and the
connection is in order from there. If the connection was asked to resume, the
ledger assumes that it did, unless the events contradict: another connection
delivered events past the cursor, and this one brought events, but none of
those. To repeat an event of a connection that itself contradicted proves
nothing. Everything else is a `Gap`. A shared id proves that nothing is missing
in the end, not that nothing is missing yet. So it settles the question of the
gap, and does not move the cursor.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import ClassVar, Final

import attrs
import msgspec

from .._events import Event
from .._position import Gap, GapReason, Position
from .._redact import presentable
from ._cursors import CursorKey, cursor_key

RECENT_IDS = 1_000
"""Maximum ids in `Position.recent`: a replay may include the cursor's own event, or start earlier than asked."""
RECENT_IDS_WITHOUT_CURSOR: Final = 100
"""Maximum ids in `Position.recent` without a cursor: nothing can be replayed then; a repair of a gap needs a few."""
MAX_GAPS = 100
"""Maximum gaps that are remembered: the newest. `Ledger.gap_count` counts all."""
STABLE_AFTER: Final = 10.0
"""Default of ``stable_after``, in seconds of reading."""
RELY_FACTOR: Final = 3
"""Time after an event until no step back behind it is expected, in units of ``stable_after``: 30 s by default.

It is the longest pause in a replay, or before it, that costs nothing if the connection then breaks.
"""
TRUST_FACTOR: Final = 6
"""Time without a sign of a replay until it is over, in units of ``stable_after``: 60 s by default.

More than `RELY_FACTOR`, because a replay in pages can be seen only when a page follows a live event.
"""
SNAPSHOT_INTERVAL: Final = 1.0
"""Minimum time between two snapshots of what is known, in seconds; see `Mark`."""
_NO_GAPS: Final[Sequence[Gap]] = ()
_FROM_LOG: Final = -1
"""`Entry.generation` of an event that was taken from the notification log."""
_RESTORED: Final = 0
"""`Entry.generation` of an event that an earlier run settled, or whose connection ended before it was admitted."""

Moment = tuple[datetime, float]
"""A time on two clocks: the wall clock, with its time zone, and a monotonic one, in seconds."""
_Reading = tuple[datetime, float | None]
"""A `Moment`. The second part is None for a time of an earlier process."""


class _Line:
    """A part of the stream without a hole. `join` makes two of them one (union-find)."""

    __slots__ = ("_into", "owing")

    def __init__(self) -> None:
        self._into: _Line | None = None
        self.owing: bool = False
        """Of the line of one connection, not of what it was joined with: whether that had ended while it owed events."""

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


class Entry(msgspec.Struct, eq=False, gc=False):
    """An event in the admission list. `Ledger.settle` takes it.

    A struct outside of the garbage collector, because each remembered event
    has one: it refers to nothing that could refer to it.
    """

    seq: int
    """Its number in the admission list."""
    id: str
    generation: int
    """The connection that delivered it first, or `_FROM_LOG`, or `_RESTORED`."""
    line: _Line
    """The line of that connection."""
    admitted: Moment | None = None
    """When it was admitted; None again when the position has passed this entry."""
    moved: bool = False
    """Whether the resume cursor moved when this event was admitted."""
    cursor: str | None = None
    """If so, the resume cursor after that; None again when the position has passed this entry."""
    at: _Reading | None = None
    """Since when events may be missing if nothing is replayed from that cursor."""
    ahead: bool = False
    """Whether it was delivered ahead of the resume cursor, and no cursor covers it yet."""
    covered: int = 0
    """For an event that was ahead: the number of the item whose cursor covers it, else 0."""
    settled: bool = False
    passed: bool = False
    """Whether the position has passed it: this event and everything before it are settled."""


@attrs.frozen(eq=False, kw_only=True)
class _CursorStep:
    """A step of the resume cursor without an event, in the admission list."""

    seq: int
    """Its number in the admission list."""
    cursor: str | None
    """The resume cursor after the step."""
    at: _Reading | None
    """Since when events may be missing if nothing is replayed from that cursor."""
    moved: ClassVar[bool] = True
    settled: ClassVar[bool] = True


@attrs.frozen(eq=False, kw_only=True)
class _GapClosing:
    """The end of a gap's repair, in the admission list: the gap is closed when the position passes this item."""

    seq: int
    """Its number in the admission list."""
    gap: Gap
    settled: ClassVar[bool] = True


_Item = Entry | _CursorStep | _GapClosing
"""What the admission list holds."""


@attrs.define(eq=False)
class _Tail:
    """The settled position: what is remembered of the items that it has passed."""

    cursor: str | None = None
    at: _Reading | None = None
    seq: int = 0
    """The number of the item that set the cursor."""
    pins: dict[str, None] = attrs.field(factory=dict)
    """Ids that were passed after that item."""
    late_pins: dict[str, int] = attrs.field(factory=dict)
    """Ids that were passed, each with the number of the item whose cursor covers it."""
    next_cover: float = 0
    """No late pin is covered by an item before this number."""

    def take(self, item: Entry | _CursorStep) -> None:
        """Pass an item."""
        if not item.moved:
            assert isinstance(item, Entry)
            self._pin(item)
            return
        self.cursor, self.at, self.seq = item.cursor, item.at, item.seq
        if self.pins:
            self.pins.clear()
        if self.late_pins and item.seq >= self.next_cover:
            self.late_pins = {i: seq for i, seq in self.late_pins.items() if seq > item.seq}
            self.next_cover = min(self.late_pins.values(), default=0)

    def _pin(self, entry: Entry) -> None:
        if entry.ahead:
            pass  # a position finds it in `Ledger._ahead`
        elif entry.covered:
            self.pin_until(entry.id, entry.covered)
        elif self.cursor is not None:
            self.pins[entry.id] = None  # without a cursor nothing can be replayed, so no id needs to be known

    def pin_until(self, event_id: str, covered: int) -> None:
        """Remember an id until the item of number *covered* is passed."""
        self.next_cover = min(self.next_cover, covered) if self.late_pins else covered
        self.late_pins[event_id] = covered

    def copy(self) -> _Tail:
        return attrs.evolve(self, pins=dict(self.pins), late_pins=dict(self.late_pins))


@attrs.frozen
class _Known:
    """What the ledger knew at a time."""

    seq: int
    """The number of the newest item of the admission list."""
    key: CursorKey | None
    """The newest cursor."""


@attrs.frozen
class Mark:
    """What the ledger knew when an attempt began, and some time before.

    An event that was known when the attempt began may still come as a live
    event: it may reach another instance of the server later, or be sent again
    before the replay. So it is a sign that the replay goes on, but it moves no
    cursor. Only an event that was known `RELY_FACTOR` times ``stable_after``
    earlier is a part of the replay for certain.
    """

    then: _Known
    """When the attempt began."""
    before: _Known
    """That time before."""


@attrs.frozen
class _Delivered:
    """A delivery of a connection that the resume cursor does not follow."""

    at: Moment
    clock: float
    """The connection's own clock at that time. It stops while the connection does not read."""
    entry: Entry
    cursor: str | None
    key: CursorKey | None


@attrs.define(eq=False)
class _Source:
    """A connection, as the ledger sees it."""

    generation: int
    mark: Mark
    cursor_key: CursorKey | None
    """The key of the cursor that it subscribed with."""
    resumes: bool
    """Whether it subscribed with the resume cursor."""
    asked: bool
    """Whether it did, and the server has not announced that it does not resume."""
    unasked_because: GapReason
    """The reason of a gap if `asked` is false."""
    baseline: int
    """The number of the item that set the cursor that it subscribed with."""
    admitted_before: int
    """How many events had been admitted at that item."""
    opaque: bool
    """Whether its cursors cannot be compared."""
    held: bool
    """Whether it must not lead, because it is a probe: it subscribed without the cursor, to check the server."""
    line: _Line = attrs.field(factory=_Line)
    first: Moment | None = None
    """When its first frame came."""
    waited: float = 0.0
    """Time in which it did not read, in seconds."""
    trusted: bool = False
    """Whether its replay is known to be over, or it had none."""
    decided: bool = False
    """Whether the ledger has decided if it continued the stream without a hole."""
    repeats: bool = False
    """Whether it has repeated an event past the cursor that it subscribed with."""
    replays: bool = False
    """Whether that was an event of a connection that owed nothing at that time."""
    admitted: int = 0
    """How many events it delivered first."""
    by_newer: int = 0
    """Events that newer connections delivered first: it does not owe them, because they may come to it later."""
    doubted: bool = False
    """Whether it leads without having repeated what it owes: its next event decides."""
    # Its replay: how far it has come.
    replayed_key: CursorKey | None = None
    replayed_seq: int = 0
    replayed: _Delivered | None = None
    # The last sign that the replay goes on, on the connection's clock, and the newest event that was one.
    last_sign: float = 0.0
    sign_key: CursorKey | None = None
    sign_seq: int = 0
    top: CursorKey | None = None
    """The newest cursor that it delivered."""
    first_event: Moment | None = None
    """When it delivered its first event. The subscription had taken effect by then."""
    last: Moment | None = None
    """When it last delivered an event with a cursor."""
    heard: float = 0.0
    """When its last frame came, on its own clock. Silence after that shows nothing about the replay."""
    trail: deque[_Delivered] = attrs.field(factory=deque)
    """Its deliveries that are ahead of the resume cursor, in their order."""
    trail_ids: set[str] = attrs.field(factory=set)

    def clock(self, now: Moment) -> float:
        """Return the time for which it has been reading, in seconds from an arbitrary point."""
        return now[1] - self.waited

    def take_trail(self, count: int) -> list[_Delivered]:
        """Take the oldest *count* deliveries out of the trail."""
        taken = [self.trail.popleft() for _ in range(count)]
        for one in taken:
            self.trail_ids.discard(one.entry.id)
            if one.key is not None and (self.replayed_key is None or one.key > self.replayed_key):
                self.replayed_key = one.key
        return taken

    def sign(self, one: _Delivered, seq: int) -> None:
        """Record that a delivery is a sign that the replay goes on, unless it was one before."""
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
    """Knows which events came and which are settled: where to resume, and where another run may.

    Every event that is admitted gets an `Entry` in the *admission list*. So do
    two things that must not take effect before the events in front of them
    are settled: a step of the resume cursor without an event, and the closing
    of a gap. The *position* passes the items of the list in their order, each
    when it is settled, and takes over the resume cursor of each. So the position
    never passes an event that is not settled.

    Args:
        window: maximum ids that are remembered. More only while the oldest of
            them is not settled, because an unsettled id is never forgotten.
        position: the position of an earlier run, to resume from.
        stable_after: `Timeouts.stable_after`, in seconds.
    """

    def __init__(self, window: int, position: Position | None = None, *, stable_after: float = STABLE_AFTER) -> None:
        self._window = window
        self._stable_after = stable_after
        self._seq = 0
        self._admitted = 0
        self._ids: dict[str, Entry] = {}
        # The same, oldest first. To find the first item of a dict, Python walks over all that were removed before it.
        self._order: deque[Entry] = deque()
        self._sources: dict[int, _Source] = {}
        # `_line` is the line without a hole: that of the leader, or of the last leader.
        self._line: _Line | None = None
        self._leader: _Source | None = None
        # Why the next connection that leads is not assumed to resume: a promise withdrawn, events not read.
        self._unpromised = False
        self._unread = False
        # No replay was promised from the cursors of the items up to this number.
        self._unpromised_seq = -1
        # The resume cursor, since when events after it may be missing, and the counts when it was set.
        self._cursor: str | None = None
        self._cursor_at: _Reading | None = None
        self._cursor_seq = 0
        self._cursor_admitted = 0
        self._top: CursorKey | None = None
        # What was known at times, oldest first: each is the state just before its time. See `mark`.
        self._snapshots: list[tuple[float, _Known]] = []  # a few, so that no deque is needed
        self._restored = False
        # The admission list from the oldest unsettled event on, and the position before it.
        self._pending: deque[_Item] = deque()
        self._tail = _Tail()
        self._ahead: dict[str, Entry] = {}
        self._recent: deque[str] = deque(maxlen=RECENT_IDS)
        self._gaps: list[Gap] = []
        self.last_life: datetime | None = None
        """When the last frame came, by the wall clock. The connections set it."""
        self.gap_count: int = 0
        """How many possible gaps were found in all, including those of the position that was restored."""
        self.repeated: int = 0
        """How many deliveries repeated a remembered id."""
        self.settled_count: int = 0
        """How many events were settled."""
        self.team: str | None = None
        """The team whose stream it is, once that is known. It is a part of the position."""
        if position is not None:
            self.restore(position)

    def restore(self, position: Position) -> None:
        """Resume from the position of an earlier run. Only before the first connection."""
        self.team = position.team
        self._cursor = self._tail.cursor = position.cursor
        since = position.cursor_at or position.last_life
        self._cursor_at = self._tail.at = None if since is None else (since, None)
        self.last_life = position.last_life
        self._gaps = list(position.gaps)[-MAX_GAPS:]
        self.gap_count = len(position.gaps)
        self._line = _Line()
        self._restored = True
        # Each id once, though a position may name it several times: it was delivered again after it was forgotten.
        settled = dict.fromkeys(position.settled)
        for event_id in dict.fromkeys(position.recent):
            if event_id not in settled:
                self._remember(event_id)
        # The recent ids are behind the cursor. The settled ones are past it, and a replay owes them.
        self._seq += 1  # a number of its own: the next event is not the item that set this cursor
        self._cursor_seq = self._tail.seq = self._seq
        self._cursor_admitted = self._admitted
        if not position.promised:
            self._unpromised_seq = self._cursor_seq
        unproved, apart = frozenset(position.unproved), _Line()
        apart.owing = True
        for event_id in settled:
            self._admitted += 1
            entry = self._remember(event_id)
            if event_id in unproved:
                entry.line = apart
            if self._cursor is not None:
                self._put_ahead(entry)

    def _remember(self, event_id: str) -> Entry:
        assert self._line is not None
        self._seq += 1
        entry = Entry(self._seq, event_id, _RESTORED, self._line)
        entry.settled = entry.passed = True
        self._ids[event_id] = entry
        self._order.append(entry)
        self._recent.append(event_id)
        return entry

    def note_start(self, at: Moment) -> None:
        """Record when a program without a position started: the first gap begins then if it crashes before any event."""
        self._cursor_at = self._tail.at = at

    # ---- connections -------------------------------------------------------------------------------------------

    @property
    def resume_cursor(self) -> str | None:
        """The cursor from which the next connection subscribes."""
        return self._cursor

    def mark(self, now: Moment | None = None) -> Mark:
        """Return what is known now, before an attempt begins, and was known some time earlier. `open` takes it.

        Args:
            now: the time. None if nothing is known to be older than the attempt.
        """
        then = self._known()
        if now is None:
            return Mark(then, _Known(0, cursor_key(self._cursor)))
        if self._restored:
            # It is not known when an earlier run received what it has settled, so the time counts from now on.
            self._restored = False
            self._snapshots.append((now[1], _Known(0, cursor_key(self._cursor))))
        while self._snapshots and self._snapshots[0][0] <= now[1] - RELY_FACTOR * self._stable_after:
            del self._snapshots[0]
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
            now: the time. None if the start of a first gap does not matter.
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
            # Nothing came before, so there is no replay that could be incomplete.
            self._line = source.line
            self._leader = source
            source.decided = source.trusted = True
            if self._cursor_at is None:
                self._cursor_at = self._tail.at = now
        elif self._leader is None:
            self._elect()
        return cursor

    def withdraw_promise(self) -> None:
        """Record that the server announced that it does not resume. See `open`."""
        if self._cursor is not None:
            self._unpromised = True

    def live(self, generation: int, now: Moment) -> None:
        """Record a connection's first frame."""
        source = self._sources[generation]
        source.first = now
        source.last_sign = source.heard = source.clock(now)

    def waited(self, generation: int, seconds: float) -> None:
        """Record that a connection was not read for *seconds*: that time shows nothing about its replay."""
        self._sources[generation].waited += seconds

    def is_open(self, generation: int) -> bool:
        """Return whether a connection is registered and has not ended."""
        return generation in self._sources

    def trusts(self, generation: int) -> bool:
        """Return whether a connection's replay is known to be over, or the connection has ended."""
        source = self._sources.get(generation)
        return source is None or source.trusted

    def tick(self, generation: int, now: Moment, heard: Moment | None = None) -> list[Gap]:
        """Take the time into account that has passed on a connection; return the possible gaps that this shows.

        To be called every few seconds until the connection is trusted, after
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
        # What it owes may still come, in a replay that shows no sign.
        quiet = source.clock(now) - source.last_sign
        if not source.decided and quiet >= (patience if self._owes(source) else self._stable_after):
            gaps = self._decide(source, now)
        if source.decided:
            self._mature(source, source.heard)
            if not source.resumes or source.heard - source.last_sign >= patience:
                self._trust(source)
        return gaps

    def ended(self, generation: int, now: Moment, *, unread: bool = False) -> list[Gap]:
        """Record that a connection is no longer read; return the possible gaps that this shows.

        Args:
            generation: the connection.
            now: the time.
            unread: True if events that the connection had received may not have been read.
        """
        source = self._sources.get(generation)
        if source is None:
            return []
        source.line.owing = self._owes(source)
        del self._sources[generation]
        if source is not self._leader:
            return []
        if unread:
            self._unread = True
        self._leader = None
        leader = self._elect()
        return [] if leader is None else self._look(leader, now)

    def drop_cursor(self, generation: int, now: Moment) -> list[Gap]:
        """Drop the resume cursor, because the server refuses it; return the possible gap.

        Connection *generation*, which subscribed without the cursor, leads from now on.
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
        """Make the oldest connection the leader; return it."""
        leader = next((source for source in self._sources.values() if not source.held), None)
        self._leader = leader
        if leader is None:
            return None
        if leader.trusted:
            self._trust(leader)  # again: for what it delivered while another one led
        elif leader.replayed is not None:
            one, leader.replayed = leader.replayed, None
            self._replayed(leader, one)
        return leader

    def _owes(self, source: _Source) -> bool:
        """Return whether others delivered events past its cursor, and it has not shown that it continues the stream.

        To repeat an event of a connection that itself owed others shows
        nothing: the server may have forgotten these others before both.
        """
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
            elif owes and (source.admitted or source.repeats):
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
        cursor_at = self._cursor_at
        since = None if cursor_at is None else _earliest(cursor_at, now)
        if since is not None and since > until:
            # The time is of an earlier run, whose clock was ahead of this one's by an unknown time.
            since = None
        gap = Gap(since=since, until=until, reason=reason, cursor=self._cursor)
        self._gaps.append(gap)
        del self._gaps[:-MAX_GAPS]
        self.gap_count += 1
        self._cursor_at = first  # the gap reports the time before
        return gap

    # ---- the resume cursor, without events ---------------------------------------------------------------------

    def _mature(self, source: _Source, clock: float) -> None:
        """Rely on deliveries of the leader after which enough time, or enough events, came without a step back."""
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
        """Follow the leader from now on, because its replay is over: the resume cursor covers what it delivered."""
        source.trusted = True
        last = next((one for one in reversed(source.trail) if one.cursor is not None), None)
        # Not if an older leader has covered it since: the resume cursor never goes back.
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
            # Step to the same cursor, for the time: everything up to now was delivered.
            self._cursor_at = source.last
            promised = self._cursor_seq > self._unpromised_seq
            self._step(self._cursor)
            if not promised:
                self._unpromised_seq = self._cursor_seq  # the cursor is the same

    def _is_beyond(self, key: CursorKey | None) -> bool:
        mine = cursor_key(self._cursor)
        return key is not None and (mine is None or key > mine)

    def _cover_all(self, delivered: Iterable[_Delivered], covered: int = 0) -> None:
        for one in delivered:
            if one.entry.ahead:
                self._cover(one.entry, covered)

    def _cover(self, entry: Entry, covered: int = 0) -> None:
        """Record that the resume cursor covers an entry that was ahead, from item *covered* on, or from the next item."""
        self._ahead.pop(entry.id, None)
        entry.ahead = False
        entry.covered = covered or self._seq + 1
        if entry.passed and entry.id in self._ids:
            self._tail.pin_until(entry.id, entry.covered)

    def _step(self, cursor: str | None) -> None:
        """Move the resume cursor without an event: an item of its own."""
        self._seq += 1
        self._cursor, self._cursor_seq, self._cursor_admitted = cursor, self._seq, self._admitted
        if self._pending and isinstance(self._pending[-1], _CursorStep):
            # Replace a step that no event follows: a long overlap must not grow the list.
            self._pending.pop()
        self._pending.append(_CursorStep(seq=self._seq, cursor=cursor, at=self._cursor_at))
        self._advance()

    # ---- events ------------------------------------------------------------------------------------------------

    def knows(self, event_id: str) -> bool:
        """Return whether this id was admitted and is remembered: another delivery of it is a repetition."""
        return event_id in self._ids

    def delivered(self, event_id: str) -> bool:
        """Return whether a connection delivered this id, in this run or an earlier one. The log does not count."""
        entry = self._ids.get(event_id)
        return entry is not None and entry.generation != _FROM_LOG

    @property
    def has_delivered(self) -> bool:
        """Whether an id is remembered that a connection delivered."""
        return any(entry.generation != _FROM_LOG for entry in self._order)

    def repeat(
        self, generation: int, event_id: str, cursor: str | None, now: Moment, arrived: Moment | None = None
    ) -> None:
        """Record that a connection delivered an id that is known. Arguments as for `admit`."""
        self.repeated += 1
        arrived = arrived or now
        source, entry = self._sources[generation], self._ids[event_id]
        self._hear(source, now)
        # An event from the log shows nothing about what a connection owes.
        if entry.generation != _FROM_LOG and entry.seq >= source.baseline and entry.line is not source.line:
            source.repeats = True
            source.replays = source.replays or self._is_proof(event_id)
            self._join(source, entry.line)
        if cursor is not None:
            source.last = arrived
        if source is self._leader and source.trusted:
            if entry.ahead:
                # The leader delivers in order, so everything up to this event came. If the event is not ahead,
                # nothing changes: a replay of old events must not take the cursor back.
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
    ) -> tuple[Entry, Sequence[Gap]]:
        """Record a new event. The caller must put it into the buffer before the next checkpoint.

        Args:
            generation: the connection that delivered it.
            event_id: its id, which `knows` does not know.
            cursor: its cursor, if it has one.
            now: when it is admitted.
            arrived: a time before which it cannot have come, if that is
                earlier, because it may have waited to be read. The spans of
                gaps begin then.

        Returns the entry to settle, and the possible gaps that the event shows.
        """
        source = self._sources[generation]
        arrived = arrived or now
        self._hear(source, now)
        leads = source is self._leader
        gaps: list[Gap] = []
        if leads and source.doubted:
            # It owes events that another connection delivered past the cursor, and brings different ones.
            source.doubted = False
            gaps.append(self._gap(source, GapReason.NOT_REPLAYED, now))
            self._line = source.line
        elif leads and not source.decided and self._cursor is None:
            # Without a cursor there is no replay that could be incomplete, so waiting would prove nothing.
            gaps.extend(self._decide(source, now))
            self._trust(source)
        elif not (leads and source.trusted) and len(self._ahead) >= self._window // 2:
            # Maximum events ahead: half of the window, or their ids would be forgotten.
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
        entry = Entry(self._seq, event_id, generation, source.line, now)
        if leads and source.trusted:
            if cursor is not None or self._cursor is None:
                entry.moved, entry.cursor = True, cursor
                entry.at = self._cursor_at = arrived
                self._cursor, self._cursor_seq, self._cursor_admitted = cursor, self._seq, self._admitted
            self._record(entry)
            return entry, gaps
        key = cursor_key(cursor)
        one = _Delivered(arrived, source.clock(now), entry, cursor, key)
        replayed = self._is_replayed(source, None, event_id, one)
        if replayed and leads and self._is_beyond(key):
            # A part of the replay, which has brought everything before it in the stream.
            self._cover_all(source.take_trail(_behind(source.trail, key)), entry.seq)
            entry.moved, entry.cursor, entry.at = True, cursor, self._cursor_at
            self._cursor, self._cursor_seq, self._cursor_admitted = cursor, self._seq, self._admitted
            self._record(entry)
            return entry, gaps
        if leads and not source.opaque and key is not None and not self._is_beyond(key):
            # It shares the resume cursor with another event, or is older.
            self._record(entry)
            return entry, gaps
        self._record(entry)
        self._put_ahead(entry)
        if replayed:
            source.replayed = one
        else:
            self._leave_in_trail(source, one)
            if leads and source.decided and len(source.trail) > self._window // 4:
                self._mature(source, one.clock)
        return entry, gaps

    def admit_run(
        self, generation: int, events: Sequence[Event], span: range, now: Moment, arrived: Moment
    ) -> Sequence[Entry]:
        """Record new events that came together, as `admit` for each would, but at a fraction of its cost.

        That is possible for nearly all events: their connection is the only
        one, it leads, its replay is over, they are new, and each has a cursor.
        The first event for which this is not so ends the run; it is for
        `admit` or `repeat`. The caller must put the events into the buffer
        before the next checkpoint.

        Args:
            generation: the connection that delivered them.
            events: the events that came, in their order.
            span: the indices of those that may be recorded now.
            now: when they are admitted.
            arrived: a time before which they cannot have come.

        Returns the entries to settle, one for each recorded event; maybe none.
        """
        source = self._sources[generation]
        if source is not self._leader or not source.trusted or source.doubted or len(self._sources) > 1:
            return ()
        ids, line, seq = self._ids, source.line, self._seq
        entries: list[Entry] = []
        newest: str | None = None
        self._hear(source, now)
        for event in itertools.islice(events, span.start, span.stop):
            event_id, cursor = event.id, event.cursor
            if cursor is None or event_id in ids:
                break
            newest = cursor
            seq += 1
            ids[event_id] = entry = Entry(seq, event_id, generation, line, now, True, cursor, arrived)
            entries.append(entry)
        if not entries:
            return entries
        self._seq = self._cursor_seq = seq
        self._admitted += len(entries)
        self._cursor, self._cursor_admitted = newest, self._admitted
        source.admitted += len(entries)
        source.last = self._cursor_at = arrived
        self._order.extend(entries)
        self._pending.extend(entries)
        if len(ids) > self._window:
            self._forget()
        return entries

    def _hear(self, source: _Source, now: Moment) -> None:
        if source.first_event is None:
            source.first_event = now
        clock = now[1]
        source.heard = clock - source.waited
        snapshots = self._snapshots
        if not snapshots or clock - snapshots[-1][0] >= SNAPSHOT_INTERVAL:
            snapshots.append((now[1], self._known()))
            while snapshots[0][0] <= now[1] - RELY_FACTOR * self._stable_after:
                del snapshots[0]

    def _record(self, entry: Entry) -> None:
        self._ids[entry.id] = entry
        self._order.append(entry)
        self._pending.append(entry)
        if len(self._ids) > self._window:
            self._forget()

    def _put_ahead(self, entry: Entry) -> None:
        entry.ahead = True
        self._ahead[entry.id] = entry

    def _is_replayed(self, source: _Source, entry: Entry | None, event_id: str, one: _Delivered) -> bool:
        """Return whether a delivery is a part of the replay for certain; record the sign if it shows one."""
        key = one.key
        if key is not None and (self._top is None or key > self._top):
            self._top = key
        if not source.resumes:
            return False
        if one.cursor is not None and key is None:
            source.opaque = True
        mark = source.mark
        # An event from the log shows nothing about what a connection owes.
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
        # Only if a replay is promised: otherwise these may be live events out of order.
        steps_back = source.asked and top is not None and key < top
        # A new event at the newest cursor itself may be live, because several events may share a cursor.
        if steps_back or seq <= mark.then.seq or (mark.then.key is not None and key < mark.then.key):
            source.sign(one, seq)
        if not (steps_back or seq <= mark.before.seq or (mark.before.key is not None and key < mark.before.key)):
            return False
        if source.replayed_key is not None and key <= source.replayed_key:
            return False  # repeated: no sign that the replay goes on
        source.replayed_key = key
        source.last_sign = one.clock
        if (
            source.asked
            and source.cursor_key is not None
            and key > source.cursor_key
            and self._line is not None
            and not self._owes(source)
        ):
            # A replay that was not promised may begin anywhere: it shows that the events before it are held, not that
            # those after the cursor came. One that brings none of those that others delivered does not begin there, either.
            self._join(source, self._line)
        return True

    def _replayed(self, source: _Source, one: _Delivered) -> None:
        """Move the resume cursor to a part of a replay if its connection leads; else remember that part."""
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
        if source.doubted and source.replays:
            source.doubted = False
            self._line = source.line

    def _leave_in_trail(self, source: _Source, one: _Delivered) -> None:
        trail = source.trail
        while trail and not trail[0].entry.ahead:
            source.take_trail(1)  # an older leader has covered it since
        trail.append(one)
        source.trail_ids.add(one.entry.id)

    def admit_apart(self, event_id: str, now: Moment | None = None) -> Entry:
        """Record a new event that was held and whose connection has ended. The resume cursor does not move."""
        self._seq += 1
        self._admitted += 1
        entry = Entry(self._seq, event_id, _RESTORED, _Line(), now)
        self._record(entry)
        if self._cursor is not None:
            self._put_ahead(entry)
        return entry

    def admit_from_log(self, event_id: str, now: Moment | None = None) -> Entry:
        """Record a new event from the notification log. The resume cursor does not move."""
        self._seq += 1
        entry = Entry(self._seq, event_id, _FROM_LOG, _Line(), now)
        self._record(entry)
        return entry

    def close_gap(self, gap: Gap) -> None:
        """Remove a gap as soon as everything that was admitted so far is settled."""
        self._seq += 1
        self._pending.append(_GapClosing(seq=self._seq, gap=gap))
        self._advance()

    def _forget(self) -> None:
        """Forget the oldest ids beyond the window, up to the first that is not settled."""
        ids, order, tail = self._ids, self._order, self._tail
        elsewhere = [names for names in (tail.pins, tail.late_pins, self._ahead) if names]
        while len(ids) > self._window and order[0].settled:
            event_id = order.popleft().id
            del ids[event_id]
            for names in elsewhere:
                names.pop(event_id, None)

    # ---- settling ----------------------------------------------------------------------------------------------

    def settle(self, entry: Entry) -> None:
        """Record that the program has handled an event. Settling it again changes nothing."""
        if entry.settled:
            return
        entry.settled = True
        self._recent.append(entry.id)
        self.settled_count += 1
        pending, tail = self._pending, self._tail
        if pending[0] is entry and entry.moved and not tail.pins and not tail.late_pins:
            # Nearly every event: the oldest one, in its order. `_advance` would come to the same.
            pending.popleft()
            tail.cursor, tail.at, tail.seq = entry.cursor, entry.at, entry.seq
            entry.passed = True
            entry.cursor = entry.at = entry.admitted = None
            if not pending:
                return
        if pending[0].settled:
            self._advance()

    def settle_run(self, entries: Sequence[Entry]) -> None:
        """Settle events, as `settle` for each would."""
        pending, tail, recent = self._pending, self._tail, self._recent
        last: Entry | None = None
        rest = 0
        if not tail.pins and not tail.late_pins:
            for entry in entries:
                # As in `settle`: the oldest one, in its order. Only the last one of them has to become the position.
                if not pending or pending[0] is not entry or not entry.moved:
                    break
                pending.popleft()
                recent.append(entry.id)
                entry.settled = entry.passed = True
                if last is not None:
                    last.cursor = last.at = last.admitted = None
                last = entry
                rest += 1
        if last is not None:
            self.settled_count += rest
            tail.cursor, tail.at, tail.seq = last.cursor, last.at, last.seq
            last.cursor = last.at = last.admitted = None
            if pending and pending[0].settled:
                self._advance()
        for entry in itertools.islice(entries, rest, None):
            self.settle(entry)

    def _advance(self) -> None:
        """Move the position past everything that is settled at the beginning of the admission list."""
        pending, tail = self._pending, self._tail
        while pending and pending[0].settled:
            item = pending.popleft()
            if isinstance(item, Entry):
                tail.take(item)
                item.passed = True
                item.cursor = item.at = item.admitted = None
            elif isinstance(item, _CursorStep):
                tail.take(item)
            elif item.gap in self._gaps:
                self._gaps.remove(item.gap)

    @property
    def unsettled(self) -> int:
        """How many items the admission list holds, from the oldest unsettled event to the newest item."""
        return len(self._pending)

    @property
    def oldest_unsettled(self) -> str | None:
        """The id of the oldest event that is not settled."""
        oldest = self._pending[0] if self._pending else None
        return oldest.id if isinstance(oldest, Entry) else None

    @property
    def oldest_unsettled_since(self) -> Moment | None:
        """When the oldest event that is not settled was admitted."""
        oldest = self._pending[0] if self._pending else None
        return oldest.admitted if isinstance(oldest, Entry) else None

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """The newest possible gaps, oldest first."""
        return tuple(self._gaps)

    def settled_position(self, now: Moment | None = None) -> Position:
        """Return the position: another run that resumes there loses no event that is not settled."""
        return self._position(self._tail, self._pending, self._gaps, {}, now)

    def position_after(self, event_ids: Collection[str], now: Moment | None = None) -> Position:
        """Return what `settled_position` will return once these events are settled, too.

        Raises:
            ValueError: one of them is unknown or settled.
        """
        also: dict[str, Entry] = {}
        for event_id in event_ids:
            entry = self._ids.get(event_id)
            if entry is None or entry.settled:
                raise ValueError(f"event {presentable(event_id, 80)} is not in hand")
            also[event_id] = entry
        tail, pending, gaps = self._tail.copy(), deque(self._pending), list(self._gaps)
        while pending and (pending[0].settled or (isinstance(pending[0], Entry) and pending[0].id in also)):
            item = pending.popleft()
            if not isinstance(item, _GapClosing):
                tail.take(item)
            elif item.gap in gaps:
                gaps.remove(item.gap)
        return self._position(tail, pending, gaps, also, now)

    def _position(
        self,
        tail: _Tail,
        pending: Iterable[_Item],
        gaps: Collection[Gap],
        also: Mapping[str, Entry],
        now: Moment | None,
    ) -> Position:
        settled: list[str] = []
        # Without a cursor nothing can be replayed. But the repair of a gap, open or to come, finds events again.
        newest = [*self._recent, *_ids_in_order(also.values())]
        recent = newest if gaps else newest[-RECENT_IDS_WITHOUT_CURSOR:]
        if tail.cursor is not None:
            pinned = {*tail.pins, *tail.late_pins}
            ahead = [entry for entry in self._ahead.values() if entry.settled or entry.id in also]
            items = [item for item in pending if isinstance(item, Entry) and not item.ahead]
            beyond = [item for item in items if item.settled or item.id in also]
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
            gaps=tuple(gaps),
            unproved=tuple(event_id for event_id in settled if not self._is_proof(event_id)),
        )

    def _is_proof(self, event_id: str) -> bool:
        """Return whether another connection continues the stream if it repeats this event; see `_owes`."""
        entry = self._ids.get(event_id)
        if entry is not None and entry.generation != _FROM_LOG and entry.line.root() is not self._whole():
            source = self._sources.get(entry.generation)
            return not (entry.line.owing if source is None else self._owes(source))
        return True

    # ---- invariants --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check every invariant of the ledger. For tests: it walks over everything that is remembered.

        Raises:
            AssertionError: an invariant does not hold. The message says which one.
        """
        self._check_ids()
        self._check_admission_list()
        self._check_position()
        self._check_pins()
        self._check_sources()
        self._check_counts()

    def _check_ids(self) -> None:
        order = list(self._order)
        assert list(self._ids.items()) == [(entry.id, entry) for entry in order], "the ids differ from their order"
        numbers = [entry.seq for entry in order]
        assert _increase([*numbers, self._seq + 1]), f"the numbers of the remembered events do not increase: {numbers}"
        for entry in order:
            assert entry.settled or not entry.passed, f"the position has passed {entry.id}, which is not settled"
            assert not (entry.ahead and entry.moved), f"{entry.id} is ahead of the resume cursor, and moved it"
            assert not (entry.ahead and entry.covered), f"{entry.id} is ahead of the resume cursor, and covered by it"
            assert not entry.covered or entry.covered > entry.seq, f"{entry.id} is covered by an older item"
        ahead = {entry.id: entry for entry in order if entry.ahead}
        assert self._ahead == ahead, f"ahead are {list(ahead)}, listed are {list(self._ahead)}"
        if len(self._recent) < RECENT_IDS:
            lost = {entry.id for entry in order if entry.settled}.difference(self._recent)
            assert not lost, f"settled ids are missing among the recent ones: {lost}"

    def _check_admission_list(self) -> None:
        pending = list(self._pending)
        if pending:
            oldest = pending[0]
            assert isinstance(oldest, Entry), "the admission list does not begin with an event"
            assert not oldest.settled, f"the admission list begins with {oldest.id}, which is settled"
        numbers = [item.seq for item in pending]
        assert _increase([*numbers, self._seq + 1]), f"the numbers in the admission list do not increase: {numbers}"
        listed = [item for item in pending if isinstance(item, Entry)]
        assert listed == [entry for entry in self._order if not entry.passed], (
            "the admission list does not hold exactly the events that the position has not passed"
        )
        for one, following in itertools.pairwise(pending):
            steps = isinstance(one, _CursorStep) and isinstance(following, _CursorStep)
            assert not steps, f"the steps {one.seq} and {following.seq} have no event between them"

    def _check_position(self) -> None:
        tail = self._tail
        assert tail.seq <= self._seq, "the position is that of an item that does not exist"
        assert not self._pending or tail.seq < self._pending[0].seq, (
            f"the position is ahead of the unsettled event {self.oldest_unsettled}"
        )
        moves = [item for item in self._pending if not isinstance(item, _GapClosing) and item.moved]
        last: Entry | _CursorStep | _Tail = moves[-1] if moves else tail
        assert (last.cursor, last.seq) == (self._cursor, self._cursor_seq), (
            f"the resume cursor is {self._cursor} of item {self._cursor_seq}, "
            f"the newest that the position can come to is {last.cursor} of item {last.seq}"
        )

    def _check_pins(self) -> None:
        tail = self._tail
        passed = [entry for entry in self._order if entry.passed and not entry.ahead]
        pins = {entry.id for entry in passed if not entry.covered and entry.seq > tail.seq}
        if tail.cursor is None:
            pins.clear()
        assert set(tail.pins) == pins, f"pinned are {list(tail.pins)} instead of {pins}"
        late = {entry.id: entry.covered for entry in passed if entry.covered > tail.seq}
        assert tail.late_pins == late, f"pinned until an item are {tail.late_pins} instead of {late}"
        assert not late or tail.next_cover <= min(late.values()), "a late pin is covered before it is looked for"

    def _check_sources(self) -> None:
        generations = [source.generation for source in self._sources.values()]
        assert generations == list(self._sources), "a connection is registered under another one's generation"
        assert _increase([0, *generations]), f"the connections are not registered oldest first: {generations}"
        assert self._line is not None or not self._sources, "connections are open, and no line has begun"
        leader = self._leader
        if leader is None:
            assert all(source.held for source in self._sources.values()), "no connection leads, though one may"
        else:
            assert self._sources.get(leader.generation) is leader, "the leader is not registered"
            assert not leader.held, "a held connection leads"
            assert not (leader.trusted and leader.trail), "a leader that is trusted has deliveries in its trail"
        for number, source in self._sources.items():
            assert source.decided or not source.trusted, f"connection {number} is trusted before it is decided"
            assert source.decided or not source.doubted, f"connection {number} is doubted before it is decided"
            assert source.mark.then.seq <= self._seq, f"connection {number} began in the future"
            assert source.trail_ids <= {one.entry.id for one in source.trail}, f"trail and ids of {number} differ"

    def _check_counts(self) -> None:
        assert self._admitted <= self._seq, f"{self._admitted} events admitted, {self._seq} numbers given"
        assert self._cursor_admitted <= self._admitted, "more events were admitted at the resume cursor than in all"
        assert self._unpromised_seq <= self._cursor_seq, "a promise is withdrawn for a cursor that does not exist"
        settled = sum(entry.settled and entry.generation != _RESTORED for entry in self._order)
        assert self.settled_count >= settled, f"{settled} events of this run are settled, {self.settled_count} counted"
        assert self.gap_count >= len(self._gaps), f"{len(self._gaps)} gaps are open, {self.gap_count} counted"
        assert len(self._gaps) <= MAX_GAPS, f"{len(self._gaps)} gaps, maximum {MAX_GAPS}"
        assert len(self._recent) <= RECENT_IDS, f"{len(self._recent)} recent ids, maximum {RECENT_IDS}"
        ahead = sum(entry.generation != _RESTORED for entry in self._ahead.values())
        assert ahead <= self._window // 2, f"{ahead} events are ahead, maximum {self._window // 2}"
        times = [time for time, _ in self._snapshots]
        assert _increase(times), f"the times of the snapshots do not increase: {times}"
        maximum = RELY_FACTOR * self._stable_after / SNAPSHOT_INTERVAL + 2
        assert len(times) <= maximum, f"{len(times)} snapshots, maximum {maximum:.0f}"
        assert all(known.seq <= self._seq for _, known in self._snapshots), "a snapshot is of the future"


def _increase(numbers: Sequence[float]) -> bool:
    return all(one < following for one, following in itertools.pairwise(numbers))


def _behind(trail: Iterable[_Delivered], key: CursorKey | None) -> int:
    """Count the deliveries at the beginning of a trail that are not after *key* in the stream."""
    count = 0
    for number, one in enumerate(trail, 1):
        if one.key is not None and (key is None or one.key > key):
            break
        if one.key is not None:
            count = number
    return count


def _earliest(reading: _Reading, now: Moment | None) -> datetime:
    """Return the earlier of what the wall clock showed then, and what it would have shown if set as it is now."""
    wall, clock = reading
    if now is None or clock is None:
        return wall
    return min(wall, now[0] - timedelta(seconds=max(now[1] - clock, 0.0)))


def _ids_in_order(entries: Iterable[Entry]) -> list[str]:
    return [entry.id for entry in sorted(entries, key=lambda entry: entry.seq)]
