"""The ledger alone: against a model of the server in programs that Hypothesis draws, and rule by rule.

The server of the model has one stream. It sends a connection its replay, and
then what is published. It may also send live events before a replay or between
its parts, begin a replay earlier than asked, or take a cursor and ignore it.
Of a replay the ledger assumes only what the documentation promises, if cursors
are comparable: no pause in it is as long as `RELIED`, and it is over at the
time of trust if no sign of it has come.

The model calls `Ledger.check` after each step, the other tests after each
change of a ledger.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kadoa_trio._engine._ledger import (
    MAX_GAPS,
    RECENT_IDS,
    RELY_FACTOR,
    STABLE_AFTER,
    TRUST_FACTOR,
    Entry,
    Ledger,
    _CursorStep,
    _GapClosing,
)
from kadoa_trio._events import Event
from kadoa_trio._position import Gap, GapReason, Position
from kadoa_trio.testing import make_event

START = datetime(2026, 1, 1, tzinfo=UTC)
WINDOW = 100_000
RELIED = RELY_FACTOR * STABLE_AFTER
TRUSTED = TRUST_FACTOR * STABLE_AFTER


class Link:
    """A connection in the model: what the server still has to send on it."""

    def __init__(self, generation: int, cursor: str | None, opened: float) -> None:
        self.generation = generation
        self.cursor = cursor
        self.replay: deque[int] = deque()
        self.live: deque[int] = deque()
        self.delivered: list[int] = []
        self.ignored = False
        self.replayed_at = opened
        self.sign_at = opened


def name(number: int) -> str:
    return f"e{number}"


mostly = st.sampled_from([True, True, True, False])


class Machine(RuleBasedStateMachine):
    @initialize(overtake=st.booleans(), coarse=st.integers(0, 3), honest=mostly, cursors=mostly, opaque=st.booleans())
    def begin(self, overtake: bool, coarse: int, honest: bool, cursors: bool, opaque: bool) -> None:
        self.overtake, self.coarse, self.honest, self.cursors, self.opaque = overtake, coarse, honest, cursors, opaque
        self.clock = 0.0
        self.published: list[datetime] = []
        self.first: int | None = None  # the first event that the program could have received
        self.links: dict[int, Link] = {}
        self.generation = 0
        self.handed_out: set[int] = set()  # by this process
        self.settled: set[int] = set()  # by any
        self.unsettled: dict[int, Entry] = {}
        self.reported: list[Gap] = []
        self.saved: tuple[Position, set[int]] | None = None
        self.saw_gap = False
        self.forgotten: set[int] = set()
        self.cursor_before = -1
        self.ledger = Ledger(WINDOW)
        self.open(ignore=False, promised=True)

    # ---- the server ------------------------------------------------------------------------------------------------

    def cursor_of(self, number: int) -> str | None:
        if not self.cursors:
            return None
        return f"opaque {number}" if self.opaque else f"1-{number}"

    def number_of(self, cursor: str) -> int:
        return int(cursor.removeprefix("opaque ").removeprefix("1-"))

    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        for _ in range(count):
            for link in self.links.values():
                link.live.append(len(self.published))
            self.published.append(self.now()[0])
            self.clock += 0.001

    @precondition(lambda self: len(self.links) < 3)
    @rule(ignore=st.booleans(), promised=mostly)
    def connect(self, ignore: bool, promised: bool) -> None:
        self.open(ignore=ignore, promised=promised)

    def open(self, *, ignore: bool, promised: bool) -> None:
        self.generation += 1
        promised = promised or self.honest
        mark = self.ledger.mark(self.now())
        cursor = self.ledger.open(self.generation, self.now(), mark=mark, promised=promised)
        link = Link(self.generation, cursor, self.clock)
        if cursor is not None:
            if self.honest or not ignore:
                link.replay.extend(range(max(self.number_of(cursor) + 1 - self.coarse, 0), len(self.published)))
            else:
                link.ignored = True
        if self.first is None:
            self.first = len(self.published) if cursor is None else 0
        self.links[self.generation] = link
        self.ledger.live(self.generation, self.now())

    def now(self) -> tuple[datetime, float]:
        return START + timedelta(seconds=self.clock), self.clock

    # ---- time ------------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 3.0, 9.0]), times=st.integers(1, 8))
    def wait(self, seconds: float, times: int) -> None:
        for _ in range(times):
            for link in self.links.values():
                # What is sent arrives: a span is compared with the times at which events were published.
                while seconds >= 1 and link.live and not link.replay:
                    self.receive(link, link.live.popleft())
            self.clock += seconds
            for link in self.links.values():
                # What a server may do is documented: no pause in a replay is this long.
                if link.replay and self.clock - link.replayed_at + seconds >= RELIED:
                    self.receive(link, link.replay.popleft())
                if link.replay and self.clock - link.sign_at + seconds >= TRUSTED:
                    while link.replay:
                        self.receive(link, link.replay.popleft())
            self.look()

    def look(self) -> None:
        for generation in self.links:
            self.count(self.ledger.tick(generation, self.now()))

    # ---- the connections -------------------------------------------------------------------------------------------

    @precondition(lambda self: any(link.replay or link.live for link in self.links.values()))
    @rule(data=st.data(), count=st.integers(1, 5))
    def deliver(self, data: st.DataObject, count: int) -> None:
        link = data.draw(st.sampled_from([one for one in self.links.values() if one.replay or one.live]))
        for _ in range(count):
            if link.replay and not (self.overtake and link.live and data.draw(st.booleans())):
                self.receive(link, link.replay.popleft())
            elif link.live:
                self.receive(link, link.live.popleft())

    @precondition(lambda self: any(link.delivered for link in self.links.values()))
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        link = data.draw(st.sampled_from([one for one in self.links.values() if one.delivered]))
        self.receive(link, data.draw(st.sampled_from(link.delivered)), again=True)

    def receive(self, link: Link, number: int, *, again: bool = False) -> None:
        if not again:
            if link.delivered and number < max(link.delivered):
                link.sign_at = self.clock  # a sign that the replay goes on
            if number not in link.live:
                link.replayed_at = self.clock
            link.delivered.append(number)
        if self.ledger.knows(name(number)):
            self.ledger.repeat(link.generation, name(number), self.cursor_of(number), self.now())
            return
        assert number not in self.handed_out, "handed out twice"
        entry, gaps = self.ledger.admit(link.generation, name(number), self.cursor_of(number), self.now())
        self.count(gaps)
        self.handed_out.add(number)
        self.unsettled[number] = entry

    @precondition(lambda self: self.links)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(sorted(self.links)))
        del self.links[generation]
        self.clock += 1
        self.count(self.ledger.ended(generation, self.now()))

    def count(self, gaps: list[Gap]) -> None:
        for gap in gaps:
            assert gap.since is None or gap.since <= gap.until
        self.reported += gaps
        self.saw_gap = self.saw_gap or bool(gaps)

    # ---- the program -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.unsettled)
    @rule(data=st.data(), all_of_them=st.booleans())
    def settle(self, data: st.DataObject, all_of_them: bool) -> None:
        numbers = sorted(self.unsettled)
        chosen = (
            numbers
            if all_of_them
            else data.draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=3, unique=True))
        )
        entries = sorted((self.unsettled.pop(number) for number in chosen), key=lambda entry: entry.seq)
        # Whatever is not settled before them.
        foreseen = self.ledger.position_after([entry.id for entry in reversed(entries)])
        for entry in entries:
            self.ledger.settle(entry)
        assert foreseen == self.ledger.settled_position()
        for entry in entries:
            self.ledger.settle(entry)  # changes nothing
        self.settled.update(chosen)

    @rule()
    def save(self) -> None:
        self.saved = (self.ledger.settled_position(self.now()), set(self.settled))

    @precondition(lambda self: self.first is not None and not self.saw_gap)
    @rule(data=st.data())
    def take_from_the_log(self, data: st.DataObject) -> None:
        numbers = range(self.first or 0, len(self.published))
        candidates = [n for n in numbers if n not in self.handed_out and not self.ledger.knows(name(n))]
        if candidates:
            number = data.draw(st.sampled_from(candidates))
            self.unsettled[number] = self.ledger.admit_from_log(name(number))
            self.handed_out.add(number)

    @precondition(lambda self: self.ledger.gaps)
    @rule(data=st.data())
    def end_a_repair(self, data: st.DataObject) -> None:
        self.ledger.close_gap(data.draw(st.sampled_from(self.ledger.gaps)))

    @precondition(lambda self: self.settled and self.unsettled)
    @rule(from_saved=st.booleans())
    def crash_and_restart(self, from_saved: bool) -> None:
        position = self.ledger.settled_position(self.now())
        if from_saved and self.saved is not None:
            # The last completed save may be older than what was settled since.
            position, self.settled = self.saved
            self.settled = set(self.settled)
        position = Position.from_json(position.to_json())
        self.links.clear()
        self.unsettled.clear()
        self.handed_out = set(self.settled)
        self.ledger = Ledger(WINDOW, position)
        self.cursor_before = -1
        self.clock += 1
        if position.cursor is None:
            self.handed_out = set()  # nothing can be replayed, so the position has no ids
            self.forgotten = set(self.settled)
            return
        for number in self.settled - self.forgotten:
            # Every id that a replay can bring again is known. None is left out while there are so few.
            if len(self.settled) <= RECENT_IDS:
                assert self.ledger.knows(name(number))

    # ---- what must hold at any moment ------------------------------------------------------------------------------

    def missing_after(self, cursor: str | None, had: set[int]) -> list[int]:
        """Return the events that a program would never get if it resumed from *cursor* now, after it has *had* some."""
        assert self.first is not None
        if cursor is None:
            return []  # the ledger reports a gap when it resumes; see below
        return [n for n in range(self.first, self.number_of(cursor)) if n not in had]

    @invariant()
    def resuming_loses_nothing(self) -> None:
        if self.first is not None and not any(one.ignored for one in self.links.values()):
            missing = self.missing_after(self.ledger.resume_cursor, self.handed_out)
            assert not self.unreported(missing) or self.cheated()

    @invariant()
    def restarting_loses_nothing(self) -> None:
        if self.first is not None:
            position = self.ledger.settled_position(self.now())
            missing = self.missing_after(position.cursor, self.settled | set(self.unsettled))
            assert not self.unreported(missing) or self.cheated()
            if not self.saw_gap:
                assert not self.missing_after(position.cursor, self.settled) or self.cheated()

    def unreported(self, missing: list[int]) -> list[int]:
        """Return those of the missing events that are in the span of no possible gap."""
        return [
            number
            for number in missing
            if not any((gap.since or START) <= self.published[number] <= gap.until for gap in self.reported)
        ]

    def cheated(self) -> bool:
        """Whether the server takes cursors and ignores them, which a single connection cannot detect."""
        return not self.honest

    @invariant()
    def ledger_is_consistent(self) -> None:
        self.ledger.check()

    @invariant()
    def resume_cursor_never_goes_back(self) -> None:
        cursor = self.ledger.resume_cursor
        if cursor is not None and not self.saw_gap:
            number = self.number_of(cursor)
            assert number >= self.cursor_before
            self.cursor_before = number

    @invariant()
    def honest_servers_are_not_suspected(self) -> None:
        if self.honest and self.cursors:
            # A run that resumes from an older save may not know of a gap that the run before it found.
            assert {gap.reason for gap in self.ledger.gaps} <= {GapReason.NO_CURSOR}

    @invariant()
    def counts_agree(self) -> None:
        assert self.ledger.gap_count >= len(self.ledger.gaps)
        assert self.ledger.unsettled >= len(self.unsettled)
        if self.unsettled:
            assert self.ledger.oldest_unsettled is not None


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


# ---- the rules, one by one -----------------------------------------------------------------------------------------


class CheckedLedger(Ledger):
    """A ledger that checks its invariants after each change, while that is cheap."""


def checked(change: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(change)
    def call(ledger: CheckedLedger, *args: Any, **options: Any) -> Any:
        result = change(ledger, *args, **options)
        if len(ledger._order) <= 100:
            ledger.check()
        return result

    return call


for change in ("restore", "note_start", "open", "withdraw_promise", "live", "waited", "tick", "ended", "drop_cursor"):
    setattr(CheckedLedger, change, checked(getattr(Ledger, change)))
for change in ("repeat", "admit", "admit_run", "admit_apart", "admit_from_log", "close_gap", "settle", "settle_run"):
    setattr(CheckedLedger, change, checked(getattr(Ledger, change)))


def cursor(number: int) -> str:
    return f"1-{number}"


def at(seconds: float = 0.0) -> tuple[datetime, float]:
    return START + timedelta(seconds=seconds), seconds


def opened(ledger: Ledger, generation: int, seconds: float = 0.0, *, promised: bool = True) -> str | None:
    """Open a connection whose first frame comes at once; return the cursor that it subscribes with."""
    cursor = ledger.open(generation, at(seconds), promised=promised)
    ledger.live(generation, at(seconds))
    return cursor


def feed(
    ledger: Ledger, generation: int, *numbers: int, cursors: bool | str = True, seconds: float = 0.0
) -> list[GapReason]:
    """Deliver events, settle those that are new, and return the reasons of the possible gaps that this shows."""
    reasons: list[GapReason] = []
    for number in numbers:
        where = f"{cursors} {number}" if isinstance(cursors, str) else cursor(number) if cursors else None
        if ledger.knows(name(number)):
            ledger.repeat(generation, name(number), where, at(seconds))
        else:
            entry, gaps = ledger.admit(generation, name(number), where, at(seconds))
            ledger.settle(entry)
            reasons += [gap.reason for gap in gaps]
    if isinstance(ledger, CheckedLedger):
        ledger.check()
    return reasons


def reasons(gaps: list[Gap]) -> list[GapReason]:
    return [gap.reason for gap in gaps]


def led(*numbers: int, window: int = WINDOW) -> Ledger:
    """Return a ledger whose first connection has delivered *numbers*."""
    ledger = CheckedLedger(window)
    assert opened(ledger, 1) is None
    feed(ledger, 1, *numbers)
    return ledger


def test_first_connection_leads_at_once() -> None:
    ledger = led(1, 2)
    assert ledger.resume_cursor == cursor(2)
    assert ledger.settled_position().cursor == cursor(2)


def test_replacement_is_not_relied_on_before_it_is_stable() -> None:
    ledger = led(10)
    opened(ledger, 2)
    feed(ledger, 2, 14)  # the old connection still owes 11 to 13
    assert ledger.resume_cursor == cursor(10)
    feed(ledger, 1, 11)
    assert ledger.resume_cursor == cursor(11)
    feed(ledger, 1, 12, 13, 14)
    assert ledger.resume_cursor == cursor(14)


def test_common_id_is_no_reason_to_move_the_cursor() -> None:
    # The replacement delivers e11 by the replay (both have it) and e14 live, and ends before e12.
    ledger = led(10, 11)
    opened(ledger, 2)
    ledger.ended(1, at())
    feed(ledger, 2, 14)
    assert ledger.ended(2, at(STABLE_AFTER - 1)) == []
    assert ledger.resume_cursor == cursor(11)


def test_stable_replacement_leads_when_the_old_connection_ends() -> None:
    ledger = led(10)
    opened(ledger, 2)
    feed(ledger, 1, 11)
    feed(ledger, 2, 11, 12)
    assert ledger.tick(2, at(TRUSTED)) == []
    assert ledger.resume_cursor == cursor(11)
    assert ledger.ended(1, at(TRUSTED)) == []
    assert ledger.resume_cursor == cursor(12)
    assert ledger.settled_position().cursor == cursor(12)


def test_repetition_does_not_take_the_cursor_back() -> None:
    ledger = led(*range(10))
    feed(ledger, 1, 2, 3)
    assert ledger.resume_cursor == cursor(9)
    assert ledger.repeated == 2


def test_connection_does_not_owe_what_a_newer_one_brings_early() -> None:
    # e4 is live and comes first on the newer connection. The older one will deliver it later.
    ledger = CheckedLedger(WINDOW, Position(cursor=cursor(0)))
    opened(ledger, 1)
    feed(ledger, 1, 1)
    opened(ledger, 2)
    feed(ledger, 1, 2)
    feed(ledger, 2, 4)
    assert ledger.tick(1, at(TRUSTED)) == []


def test_event_from_the_log_proves_no_replay() -> None:
    ledger = led(1, 2, 3)
    opened(ledger, 2)
    feed(ledger, 1, 4)
    ledger.ended(1, at())
    ledger.settle(ledger.admit_from_log(name(5)))
    feed(ledger, 2, 5, 6)  # it delivers live events, and never replays e4
    assert reasons(ledger.tick(2, at(TRUSTED))) == [GapReason.NOT_REPLAYED]


def test_position_after_is_for_what_is_in_hand() -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    first, second = (ledger.admit(1, name(number), cursor(number), at())[0] for number in range(2))
    with pytest.raises(ValueError, match="not in hand"):
        ledger.position_after(["never heard of"])
    assert ledger.position_after([name(1)]).cursor is None
    assert ledger.position_after([name(1), name(0)]).cursor == cursor(1)
    ledger.settle(second)
    with pytest.raises(ValueError, match="not in hand"):
        ledger.position_after([name(1)])
    assert ledger.position_after([name(0)]).cursor == cursor(1)
    ledger.settle(first)
    with pytest.raises(ValueError, match="not in hand"):
        ledger.position_after([name(0)])


def test_position_after_an_event_behind_an_unsettled_one_names_that_event() -> None:
    ledger = led(10)
    first, _second = (ledger.admit(1, name(number), cursor(number), at())[0] for number in (11, 12))
    before = ledger.settled_position()
    foreseen = ledger.position_after([name(12)])
    assert (foreseen.cursor, foreseen.settled) == (before.cursor, (*before.settled, name(12)))
    ledger.settle(first)
    assert ledger.position_after([name(12)]).cursor == cursor(12)


def test_oldest_unsettled_event_has_the_time_of_its_admission() -> None:
    ledger = led(10)
    assert ledger.oldest_unsettled_since is None
    entry, _ = ledger.admit(1, name(11), cursor(11), at(5))
    newer = ledger.admit_from_log(name(5), at(7))
    assert ledger.oldest_unsettled_since == at(5)
    ledger.settle(entry)
    assert ledger.oldest_unsettled_since == at(7)
    ledger.settle(newer)
    assert ledger.oldest_unsettled_since is None


def test_position_after_closes_the_gaps_whose_repair_ends_before_the_next_event() -> None:
    ledger = CheckedLedger(WINDOW, Position(cursor_at=START))
    opened(ledger, 1)
    entry, (gap,) = ledger.admit(1, name(1), None, at(7))
    ledger.close_gap(gap)
    ledger.close_gap(gap)
    assert ledger.settled_position().gaps == (gap,)
    foreseen = ledger.position_after([name(1)])
    ledger.settle(entry)
    assert foreseen == ledger.settled_position()
    assert foreseen.gaps == ()


def test_repetition_by_the_leader_of_an_event_without_a_cursor() -> None:
    ledger = led(10)
    opened(ledger, 2)
    feed(ledger, 2, 14)
    feed(ledger, 1, 14, cursors=False)
    assert ledger.resume_cursor == cursor(10)


def test_gap_is_closed_when_everything_before_is_settled() -> None:
    ledger = CheckedLedger(WINDOW, Position(cursor_at=START))
    opened(ledger, 1, seconds=5)
    ((entry, (gap,)),) = [ledger.admit(1, "first", None, at(7))]
    assert (gap.since, gap.until) == (START, START + timedelta(seconds=7))
    ledger.settle(entry)
    entry = ledger.admit_from_log(name(0))
    ledger.close_gap(gap)
    assert ledger.settled_position().gaps == (gap,)
    ledger.settle(entry)
    assert ledger.settled_position().gaps == ()
    ledger.close_gap(gap)  # once more changes nothing
    assert ledger.gap_count == 1


def test_event_from_the_log_counts_as_known_and_not_as_delivered() -> None:
    ledger = CheckedLedger(WINDOW, Position(cursor_at=START))
    opened(ledger, 1)
    ledger.settle(ledger.admit_from_log(name(0)))
    assert ledger.knows(name(0))
    assert not ledger.delivered(name(0))
    assert not ledger.has_delivered
    ledger.admit(1, name(1), None, at())
    assert ledger.delivered(name(1))
    assert ledger.has_delivered


@pytest.mark.parametrize("place", ["recent", "settled"])
def test_ids_of_a_position_count_as_delivered(place: str) -> None:
    ledger = CheckedLedger(WINDOW, Position(cursor=cursor(0), **{place: (name(0),)}))  # type: ignore[arg-type]
    assert ledger.delivered(name(0))
    assert ledger.has_delivered


def test_window_bounds_what_comes_from_the_log() -> None:
    ledger = CheckedLedger(10)
    for number in range(50):
        ledger.settle(ledger.admit_from_log(name(number)))
    assert sum(ledger.knows(name(number)) for number in range(50)) == 10


def test_position_is_before_the_oldest_unsettled_event() -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    entries = [ledger.admit(1, name(n), cursor(n), at())[0] for n in range(4)]
    ledger.settle(entries[2])
    ledger.settle(entries[0])
    position = ledger.settled_position()
    assert (position.cursor, position.settled) == (cursor(0), (name(2),))
    assert ledger.oldest_unsettled == name(1)
    again = CheckedLedger(WINDOW, position)
    assert again.knows(name(0))
    assert again.knows(name(2))
    assert not again.knows(name(1))


def test_position_does_not_take_an_events_own_cursor() -> None:
    ledger = led(10)
    opened(ledger, 2)
    feed(ledger, 2, 14)  # settled, though the old connection still owes 11 to 13
    position = ledger.settled_position()
    assert (position.cursor, position.settled) == (cursor(10), (name(14),))


def test_steps_of_the_cursor_without_events_do_not_grow_the_list() -> None:
    ledger = led(0)
    opened(ledger, 2)
    feed(ledger, 2, *range(1, 50))
    stuck, _ = ledger.admit(2, "stuck", cursor(50), at())
    feed(ledger, 1, *range(1, 50))
    assert ledger.unsettled <= 2
    assert ledger.resume_cursor == cursor(49)
    ledger.settle(stuck)


def test_server_that_takes_a_cursor_and_does_not_replay_is_detected() -> None:
    ledger = led(10)
    opened(ledger, 2)
    feed(ledger, 1, 11)
    feed(ledger, 2, 12)
    ledger.tick(2, at(TRUSTED))
    assert reasons(ledger.ended(1, at(TRUSTED))) == [GapReason.NOT_REPLAYED]


def test_silent_replacement_is_doubted_until_its_next_event() -> None:
    for repeats in (True, False):
        ledger = led(10)
        opened(ledger, 2)
        feed(ledger, 1, 11)
        ledger.tick(2, at(TRUSTED))
        assert ledger.ended(1, at(TRUSTED)) == []
        found = feed(ledger, 2, *((11,) if repeats else ()), 12)
        assert found == ([] if repeats else [GapReason.NOT_REPLAYED])


@pytest.mark.parametrize("short", [0.5, 9.0, 35.0, 55.0])
def test_event_of_a_short_connection_that_owed_others_is_no_proof(short: float) -> None:
    ledger = led(10)
    ledger.ended(1, at(0))
    opened(ledger, 2, 1)
    feed(ledger, 2, 11, 12, seconds=1)
    ledger.ended(2, at(2))
    # The server has forgotten everything. One event comes, and the connection ends before it is judged.
    opened(ledger, 3, 3)
    feed(ledger, 3, 20, seconds=3)
    ledger.tick(3, at(3 + short))
    assert ledger.ended(3, at(3 + short)) == []
    opened(ledger, 4, 4 + short)
    assert feed(ledger, 4, 20, seconds=4 + short) == []
    gaps = ledger.tick(4, at(5 + short + TRUSTED))
    assert [*reasons(gaps), *feed(ledger, 4, 21, seconds=6 + short + TRUSTED)] == [GapReason.NOT_REPLAYED]
    (gap,) = ledger.gaps
    assert gap.since is not None
    assert gap.since <= at(1)[0]
    assert gap.until >= at(3)[0]


def short_lives() -> Ledger:
    """Return a ledger with two connections that ended young: the first brought e11 and e12, the second e20 and none of these."""
    ledger = led(10)
    ledger.ended(1, at(0))
    opened(ledger, 2, 1)
    feed(ledger, 2, 11, 12, seconds=1)
    ledger.ended(2, at(2))
    opened(ledger, 3, 3)
    feed(ledger, 3, 20, seconds=3)
    ledger.ended(3, at(4))
    assert ledger.settled_position().unproved == (name(20),)
    return ledger


@pytest.mark.parametrize("proof", [True, False])
def test_doubt_about_a_silent_connection_ends_with_a_repeat_of_a_connection_that_owed_nothing(proof: bool) -> None:
    ledger = short_lives()
    opened(ledger, 4, 5)
    assert ledger.tick(4, at(6 + TRUSTED)) == []
    feed(ledger, 4, 11 if proof else 20, seconds=7 + TRUSTED)
    assert feed(ledger, 4, 30, seconds=8 + TRUSTED) == ([] if proof else [GapReason.NOT_REPLAYED])


def test_event_is_proof_when_its_line_has_joined_the_stream() -> None:
    ledger = short_lives()
    opened(ledger, 4, 5)
    feed(ledger, 4, 11, 12, 20, seconds=5)
    assert ledger.tick(4, at(6 + STABLE_AFTER)) == []
    assert ledger.settled_position().settled == (name(11), name(12), name(20))
    assert ledger.settled_position().unproved == ()


@pytest.mark.parametrize("ends", [True, False])
def test_connection_owes_what_came_after_another_one_repeated_it(ends: bool) -> None:
    ledger = led(10)
    opened(ledger, 2, 1)
    opened(ledger, 3, 1)
    feed(ledger, 2, 11, seconds=2)
    feed(ledger, 3, 11, seconds=2)  # at this time, connection 2 owes nothing
    feed(ledger, 1, 12, 13, seconds=3)
    assert ledger.ended(1, at(4)) == []
    if ends:
        ledger.ended(3, at(4))
    found = [*reasons(ledger.tick(2, at(5 + TRUSTED))), *feed(ledger, 2, 20, seconds=6 + TRUSTED)]
    assert found == [GapReason.NOT_REPLAYED]


def test_repeat_of_a_held_event_continues_the_stream() -> None:
    ledger = led(10)
    ledger.ended(1, at(0))
    ledger.admit_apart(name(11))
    opened(ledger, 2, 1)
    feed(ledger, 2, 11, 12, seconds=1)
    assert ledger.tick(2, at(2 + TRUSTED)) == []
    assert ledger.gaps == ()


@pytest.mark.parametrize("restarts", [1, 2])
def test_event_that_is_no_proof_is_none_after_a_restart_either(restarts: int) -> None:
    ledger = led(10)
    ledger.ended(1, at(0))
    opened(ledger, 2, 1)
    feed(ledger, 2, 11, 12, seconds=1)
    assert ledger.settled_position().unproved == ()
    ledger.ended(2, at(2))
    for number in range(restarts):
        ledger = CheckedLedger(WINDOW, Position.from_json(ledger.settled_position().to_json()))
        opened(ledger, 1, 3 + number)
        feed(ledger, 1, 20 + number, seconds=3 + number)  # the server has forgotten everything before
        assert ledger.settled_position().unproved == tuple(name(20 + n) for n in range(number + 1))
        if number:
            ledger.ended(1, at(3 + number))
    ledger = CheckedLedger(WINDOW, ledger.settled_position())
    opened(ledger, 1, 10)
    feed(ledger, 1, *(20 + number for number in range(restarts)), seconds=10)
    gaps = ledger.tick(1, at(11 + TRUSTED))
    assert [*reasons(gaps), *feed(ledger, 1, 30, seconds=12 + TRUSTED)] == [GapReason.NOT_REPLAYED]
    assert ledger.settled_position().unproved == ()


def test_settled_events_of_a_restart_are_proof_if_they_were_before() -> None:
    ledger = led(10)
    ledger.ended(1, at(0))
    opened(ledger, 2, 1)
    feed(ledger, 2, 11, 12, seconds=1)
    ledger = CheckedLedger(WINDOW, ledger.settled_position())  # killed: the connection had not ended
    opened(ledger, 1, 3)
    feed(ledger, 1, 11, 12, 13, seconds=3)
    assert ledger.settled_position().unproved == ()
    assert ledger.tick(1, at(4 + TRUSTED)) == []
    assert ledger.resume_cursor == cursor(13)


def test_replacement_of_unstable_connections_is_believed_when_it_repeats_their_events() -> None:
    ledger = led(10)
    ledger.ended(1, at(TRUSTED))
    opened(ledger, 2)
    feed(ledger, 2, 11, 12)
    ledger.ended(2, at(TRUSTED))
    opened(ledger, 3)
    feed(ledger, 3, 11, 12, 13)
    assert ledger.tick(3, at(TRUSTED)) == []
    assert ledger.resume_cursor == cursor(13)


@pytest.mark.parametrize("promised", [True, False])
def test_replacement_without_a_cursor_or_a_promise_is_a_possible_gap_unless_both_deliver_an_event(
    promised: bool,
) -> None:
    for meet in (True, False):
        ledger = CheckedLedger(WINDOW)
        opened(ledger, 1)
        feed(ledger, 1, 1, cursors=not promised)
        opened(ledger, 2, promised=promised)
        feed(ledger, 1, 2, cursors=not promised)
        feed(ledger, 2, *((2,) if meet else (3,)), cursors=not promised)
        ledger.tick(2, at(TRUSTED))
        reason = GapReason.NO_CURSOR if promised else GapReason.NOT_PROMISED
        assert reasons(ledger.ended(1, at(TRUSTED))) == ([] if meet else [reason])


def test_outage_without_a_cursor_is_a_gap_at_the_first_event() -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    feed(ledger, 1, 1, cursors=False)
    ledger.ended(1, at(5))
    opened(ledger, 2, seconds=9)
    assert feed(ledger, 2, 2, cursors=False, seconds=10) == [GapReason.NO_CURSOR]
    (gap,) = ledger.gaps
    assert (gap.since, gap.until) == (START, START + timedelta(seconds=10))
    assert feed(ledger, 2, 3, cursors=False) == []


def test_probe_does_not_lead_until_the_cursor_is_dropped() -> None:
    ledger = led(10)
    ledger.ended(1, at(TRUSTED))
    assert ledger.open(2, with_cursor=False) is None
    ledger.live(2, at(TRUSTED))
    assert ledger.tick(2, at(2 * TRUSTED)) == []
    assert ledger.resume_cursor == cursor(10)
    assert reasons(ledger.drop_cursor(2, at(2 * TRUSTED))) == [GapReason.CURSOR_DROPPED]
    assert ledger.resume_cursor is None
    assert ledger.settled_position().cursor is None
    feed(ledger, 2, 15)
    assert ledger.resume_cursor == cursor(15)
    feed(ledger, 2, 16)
    assert ledger.resume_cursor == cursor(16)


def test_window_forgets_the_oldest_but_nothing_unsettled() -> None:
    ledger = CheckedLedger(10)
    opened(ledger, 1)
    stuck, _ = ledger.admit(1, "stuck", cursor(0), at())
    feed(ledger, 1, *range(1, 30))
    assert ledger.knows("stuck")
    ledger.settle(stuck)
    feed(ledger, 1, *range(30, 60))
    assert not ledger.knows("stuck")
    assert sum(ledger.knows(name(n)) for n in range(60)) == 10


def test_events_ahead_of_the_cursor_are_bounded() -> None:
    ledger = led(0, window=20)
    opened(ledger, 2)
    found = feed(ledger, 2, *range(1, 30))
    assert found == [GapReason.UNPROVED]
    assert ledger.resume_cursor == cursor(29)


def test_gaps_are_bounded_and_all_of_them_are_counted() -> None:
    ledger = CheckedLedger(WINDOW)
    for n in range(1, MAX_GAPS + 11):
        opened(ledger, n)
        feed(ledger, n, n, cursors=False)
        ledger.ended(n, at(TRUSTED))
    assert (len(ledger.gaps), ledger.gap_count) == (MAX_GAPS, MAX_GAPS + 9)
    assert ledger.ended(99_999, at(TRUSTED)) == []


def test_position_survives_a_restart_with_its_gaps() -> None:
    ledger = CheckedLedger(WINDOW)
    for n in (1, 2):
        opened(ledger, n)
        feed(ledger, n, n, cursors=False)
        ledger.ended(n, at(TRUSTED))
    position = ledger.settled_position(at(TRUSTED))
    again = CheckedLedger(WINDOW, position)
    assert again.settled_position(at(0)) == position
    assert again.gap_count == 1


def test_settled_event_past_the_cursor_stays_pinned_after_a_restart() -> None:
    position = Position(cursor=cursor(5), settled=(name(7),), recent=(name(4), name(5)))
    ledger = CheckedLedger(WINDOW, position)
    assert opened(ledger, 1) == cursor(5)
    feed(ledger, 1, 6)
    assert name(7) in ledger.settled_position().settled
    feed(ledger, 1, 7, 8)
    assert ledger.tick(1, at(TRUSTED)) == []
    assert ledger.resume_cursor == cursor(8)
    assert ledger.settled_position().cursor == cursor(8)


def test_lines_that_are_joined_several_times_are_one() -> None:
    ledger = led(0)
    for n in range(2, 8):
        opened(ledger, n)
        feed(ledger, n - 1, n)
        feed(ledger, n, n)
        ledger.tick(n, at(TRUSTED))
        assert ledger.ended(n - 1, at(TRUSTED)) == []
    opened(ledger, 8)
    opened(ledger, 9)
    feed(ledger, 8, 20)
    feed(ledger, 9, 20)
    feed(ledger, 7, 20)
    feed(ledger, 9, 20)
    ledger.ended(8, at(TRUSTED))
    ledger.tick(9, at(TRUSTED))
    assert ledger.ended(7, at(TRUSTED)) == []


# ---- what is trusted, and when -------------------------------------------------------------------------------------


def resumed(*numbers: int, seconds: float = 0.0) -> Ledger:
    """Return a ledger whose first connection delivered *numbers* and ended, and whose second has resumed after them."""
    ledger = led(*numbers)
    ledger.ended(1, at(seconds))
    opened(ledger, 2, seconds)
    return ledger


@pytest.mark.parametrize("cursors", [True, "opaque"])
def test_live_events_between_the_pages_of_a_replay_do_not_move_the_cursor(cursors: bool | str) -> None:
    ledger = led(0, *(10,) if cursors is True else ())
    if cursors != True:  # noqa: E712  # "opaque" is true, too
        feed(ledger, 1, 10, cursors=cursors)
    ledger.ended(1, at(0))
    opened(ledger, 2)
    for page in range(5):  # a page every 5 s, and a live event behind each
        feed(ledger, 2, 11 + page, 50 + page, cursors=cursors, seconds=5.0 * page)
        ledger.tick(2, at(5.0 * page + 4))
        assert not ledger.trusts(2)
        ledger_cursor = ledger.resume_cursor
        assert ledger_cursor is not None
        assert int(ledger_cursor.replace("1-", "").removeprefix("opaque ")) <= 11 + page
    ledger.ended(2, at(24))
    assert opened(ledger, 3) == ledger_cursor


def test_part_of_a_replay_that_steps_back_moves_the_cursor_at_once() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 50, 11)
    assert ledger.resume_cursor == cursor(11)
    feed(ledger, 2, 51, 12, 13)
    assert ledger.resume_cursor == cursor(13)
    assert set(ledger.settled_position().settled) == {name(50), name(51)}


def test_events_that_share_a_cursor_are_not_taken_for_older_ones() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 20)
    ledger.ended(2, at(1))
    opened(ledger, 3, 2)
    for event_id in ("20b", "20c"):  # live, with the cursor of e20
        ledger.admit(3, event_id, cursor(20), at(2))
    assert ledger.resume_cursor == cursor(10)
    feed(ledger, 3, 11)
    ledger.admit(3, "11b", cursor(11), at(2))
    assert ledger.resume_cursor == cursor(11)
    assert "11b" not in ledger._ahead
    ledger.ended(3, at(3))
    opened(ledger, 4, 4 + RELIED)
    ledger.repeat(4, "11b", cursor(11), at(4 + RELIED))
    feed(ledger, 4, 12, seconds=4 + RELIED)
    assert ledger.resume_cursor == cursor(12)


def test_event_that_was_sent_again_is_no_part_of_the_replay() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 50, 51, 50, 51)
    assert ledger.resume_cursor == cursor(10)


def test_event_older_than_the_subscription_moves_the_cursor_at_once() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 11, 12, 13)
    assert ledger.resume_cursor == cursor(10)  # they may be live events before a replay
    ledger.ended(2, at(8))
    opened(ledger, 3, RELIED)
    feed(ledger, 3, 11, seconds=RELIED)
    assert ledger.resume_cursor == cursor(11)
    feed(ledger, 3, 12, 13, 14, seconds=RELIED)
    assert ledger.resume_cursor == cursor(13)


@pytest.mark.parametrize("cursors", [True, "opaque"])
def test_live_event_that_comes_again_before_the_replay_moves_no_cursor(cursors: bool | str) -> None:
    # Another instance of the server sends it some seconds late, or it is sent again because it was not acknowledged.
    ledger = Ledger(WINDOW)
    opened(ledger, 1)
    feed(ledger, 1, 10, cursors=cursors)
    ledger.ended(1, at(60))
    opened(ledger, 2, 60)
    feed(ledger, 2, 14, cursors=cursors, seconds=62)
    ledger.ended(2, at(63))
    before = ledger.resume_cursor
    opened(ledger, 3, 64)
    feed(ledger, 3, 14, cursors=cursors, seconds=66)
    assert ledger.resume_cursor == before
    ledger.ended(3, at(67))
    assert ledger.settled_position(at(67)).cursor == before


def test_live_event_that_comes_late_moves_no_cursor_though_a_newer_one_is_known() -> None:
    ledger = led(10)
    ledger.ended(1, at(60))
    opened(ledger, 2, 60)
    feed(ledger, 2, 15, seconds=62)
    ledger.ended(2, at(63))
    opened(ledger, 3, 64)
    feed(ledger, 3, 14, 15, seconds=66)  # 11 to 13 are owed by a replay that has not begun
    assert ledger.resume_cursor == cursor(10)


@pytest.mark.parametrize("place", ["recent", "settled"])
def test_event_of_an_earlier_run_that_comes_again_before_the_replay_moves_no_cursor(place: str) -> None:
    ids = (name(14),)
    position = Position(
        cursor=cursor(10), recent=ids if place == "recent" else (), settled=ids if place == "settled" else ()
    )
    ledger = Ledger(WINDOW, position)
    opened(ledger, 1)
    feed(ledger, 1, 14, seconds=1)
    assert ledger.resume_cursor == cursor(10)


def test_live_event_that_comes_again_shows_that_the_replay_may_go_on() -> None:
    ledger = led(10)
    ledger.ended(1, at(60))
    opened(ledger, 2, 60)
    feed(ledger, 2, 14, seconds=62)
    ledger.ended(2, at(63))
    opened(ledger, 3, 64)
    ledger.tick(3, at(64 + TRUSTED - 5))
    feed(ledger, 3, 14, seconds=64 + TRUSTED - 5)
    ledger.tick(3, at(64 + TRUSTED + 1))
    assert not ledger.trusts(3)


def test_opaque_cursor_moves_to_a_repeated_event_that_is_older_than_the_attempt() -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    feed(ledger, 1, 10, cursors="opaque")
    ledger.ended(1, at(1))
    opened(ledger, 2, 1)
    feed(ledger, 2, 11, 12, cursors="opaque", seconds=2)
    ledger.ended(2, at(9))
    mark = ledger.mark(at(2 + RELIED))
    ledger.open(3, mark=mark)
    ledger.live(3, at(3 + RELIED))
    feed(ledger, 3, 11, cursors="opaque", seconds=3 + RELIED)
    assert ledger.resume_cursor == "opaque 11"
    feed(ledger, 3, 13, cursors="opaque", seconds=3 + RELIED)
    assert ledger.resume_cursor == "opaque 11"
    feed(ledger, 3, 10, 11, cursors="opaque", seconds=3 + RELIED)
    assert ledger.resume_cursor == "opaque 11"


def test_connections_that_end_before_they_are_stable_receive_a_whole_backlog() -> None:
    ledger = led(0)
    ledger.ended(1, at(0))
    published = 500
    generation = 1
    while ledger.resume_cursor != cursor(published - 1):
        generation += 1
        assert generation < 60
        where = opened(ledger, generation, 8.0 * generation)
        assert where is not None
        first = int(where.removeprefix("1-")) + 1
        feed(ledger, generation, *range(first, min(first + 50, published)), seconds=8.0 * generation)
        ledger.tick(generation, at(8.0 * generation + 7))
        ledger.ended(generation, at(8.0 * generation + 8))
    assert all(ledger.knows(name(n)) for n in range(published))
    assert ledger.gap_count == 0


def test_time_in_which_nothing_is_read_shows_nothing_about_a_replay() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 50)
    ledger.waited(2, 100.0)
    ledger.tick(2, at(125))
    assert ledger.resume_cursor == cursor(10)
    ledger.tick(2, at(100 + RELIED))
    assert ledger.resume_cursor == cursor(50)


def test_silence_of_a_connection_shows_nothing_about_its_replay() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 50, seconds=1)
    ledger.tick(2, at(RELIED + 5), at(2))  # nothing has come since
    assert ledger.resume_cursor == cursor(10)
    ledger.tick(2, at(RELIED + 6), at(RELIED + 6))
    assert ledger.resume_cursor == cursor(50)


def test_cursor_matures_when_nothing_steps_back() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 11, 12)
    feed(ledger, 2, 13, cursors=False)
    feed(ledger, 2, 14, seconds=5)
    ledger.tick(2, at(RELIED))
    assert ledger.resume_cursor == cursor(12)
    assert set(ledger.settled_position().settled) == {name(13), name(14)}
    ledger.tick(2, at(RELIED + 5))
    assert ledger.resume_cursor == cursor(14)
    assert ledger.settled_position().settled == ()
    feed(ledger, 2, 15, seconds=TRUSTED)
    ledger.tick(2, at(TRUSTED))
    assert ledger.trusts(2)
    assert ledger.resume_cursor == cursor(15)


def test_many_events_without_a_step_back_mature_without_waiting() -> None:
    ledger = led(0, window=40)
    ledger.ended(1, at(0))
    opened(ledger, 2)
    ledger.tick(2, at(STABLE_AFTER))
    assert feed(ledger, 2, *range(1, 200), seconds=STABLE_AFTER) == []
    assert ledger.resume_cursor is not None
    assert int(ledger.resume_cursor.removeprefix("1-")) >= 180


def test_new_cursor_format_is_treated_as_opaque() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 11)
    feed(ledger, 2, 12, cursors="opaque", seconds=1)
    ledger.tick(2, at(RELIED + 1))
    assert ledger.resume_cursor == cursor(10)
    ledger.tick(2, at(TRUSTED + 1))
    assert ledger.resume_cursor == "opaque 12"


def test_older_connection_covers_what_the_next_one_left_in_its_trail() -> None:
    ledger = led(10)
    opened(ledger, 2)
    feed(ledger, 2, 11, 12)
    feed(ledger, 1, 11, 12, 13)
    feed(ledger, 2, 14)
    assert ledger.resume_cursor == cursor(13)
    ledger.tick(2, at(RELIED))  # frames still come on it
    ledger.ended(1, at(RELIED))
    assert ledger.resume_cursor == cursor(14)


def test_replay_that_came_while_another_connection_led_counts_when_that_ends() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 13)
    opened(ledger, 3, RELIED)
    feed(ledger, 3, 11, 12, seconds=RELIED)
    assert ledger.resume_cursor == cursor(10)
    ledger.ended(2, at(RELIED))
    assert ledger.resume_cursor == cursor(12)
    for cursors in ("opaque", True):
        other = led(10)
        feed(other, 1, 20, cursors=cursors)
        other.ended(1, at(0))
        opened(other, 2)
        feed(other, 2, 21, cursors=cursors)
        opened(other, 3, RELIED)
        feed(other, 3, 21, cursors=cursors, seconds=RELIED)
        other.ended(2, at(1 + RELIED))
        assert other.resume_cursor == (f"opaque {21}" if cursors == "opaque" else cursor(21))


def test_broken_promise_counts_until_a_connection_leads() -> None:
    ledger = led(10)
    assert opened(ledger, 2, promised=False) == cursor(10)
    ledger.ended(1, at(0))
    ledger.ended(2, at(1))  # it ends before it leads; the promise stays withdrawn
    opened(ledger, 3, 2)
    feed(ledger, 3, 20, seconds=2)
    assert reasons(ledger.tick(3, at(2 + STABLE_AFTER))) == [GapReason.NOT_PROMISED]
    ledger.ended(3, at(15))
    opened(ledger, 4, 16)  # with the same cursor, which is as old as the announcement
    feed(ledger, 4, 21, seconds=16)
    assert reasons(ledger.tick(4, at(16 + STABLE_AFTER))) == [GapReason.NOT_PROMISED]
    position = Position.from_json(ledger.settled_position().to_json())
    assert not position.promised
    again = CheckedLedger(WINDOW, position)
    opened(again, 1)
    assert reasons(again.tick(1, at(STABLE_AFTER))) == [GapReason.NOT_PROMISED]
    ledger.tick(4, at(16 + RELIED))
    assert ledger.settled_position().promised
    ledger.ended(4, at(50))
    assert opened(ledger, 5, 51) == cursor(21)
    assert ledger.tick(5, at(51 + STABLE_AFTER)) == []


def test_position_before_the_announcement_has_no_promise_either() -> None:
    ledger = led(*range(1, 6))
    held = [ledger.admit(1, name(n), cursor(n), at())[0] for n in range(6, 11)]
    ledger.withdraw_promise()
    opened(ledger, 2)
    ledger.ended(1, at(1))
    assert reasons(ledger.tick(2, at(STABLE_AFTER))) == [GapReason.NOT_PROMISED]
    position = ledger.settled_position()
    assert (position.cursor, position.promised) == (cursor(5), False)
    feed(ledger, 2, 20, seconds=STABLE_AFTER)
    ledger.tick(2, at(STABLE_AFTER + TRUSTED))
    assert ledger.resume_cursor == cursor(20)
    assert not ledger.settled_position().promised
    for entry in held:
        ledger.settle(entry)
    assert (ledger.settled_position().cursor, ledger.settled_position().promised) == (cursor(20), True)


def test_time_that_passes_does_not_renew_a_promise() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 11)
    ledger.withdraw_promise()
    ledger.tick(2, at(STABLE_AFTER))
    ledger.tick(2, at(RELIED))
    ledger.withdraw_promise()
    ledger.ended(2, at(RELIED))
    opened(ledger, 3, RELIED)
    feed(ledger, 3, 11, seconds=RELIED)
    assert reasons(ledger.tick(3, at(RELIED + STABLE_AFTER))) in ([GapReason.NOT_PROMISED], [])
    ledger.tick(3, at(RELIED + TRUSTED))
    assert ledger.trusts(3)
    assert not ledger.settled_position().promised


def test_replay_without_a_promise_is_not_believed_to_begin_at_the_cursor() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 50)
    opened(ledger, 3, RELIED, promised=False)
    feed(ledger, 3, 12, seconds=RELIED)  # older than the subscription, so that the server does replay: from anywhere
    ledger.ended(2, at(1 + RELIED))
    assert reasons(ledger.tick(3, at(STABLE_AFTER + RELIED))) == [GapReason.NOT_PROMISED]
    assert ledger.resume_cursor == cursor(12)


@pytest.mark.parametrize("cursors", [True, "opaque"])
def test_replay_that_begins_at_or_before_the_cursor_leaves_it(cursors: bool | str) -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    feed(ledger, 1, *range(1, 11), cursors=cursors)
    newest = ledger.resume_cursor
    ledger.ended(1, at(2 * RELIED))
    opened(ledger, 2, 2 * RELIED)
    for n in (9, 10):
        feed(ledger, 2, n, cursors=cursors, seconds=2 * RELIED)
        assert ledger.resume_cursor == newest
    feed(ledger, 2, 11, cursors=cursors, seconds=2 * RELIED + 1)
    assert ledger.tick(2, at(2 * RELIED + 1 + STABLE_AFTER)) == []


def test_events_of_a_connection_that_ended_young_do_not_vouch_for_the_time_before_it() -> None:
    # The server announces that it does not resume; 11 and 12 are sent while nobody listens.
    ledger = led(*range(1, 11))
    ledger.withdraw_promise()
    ledger.ended(1, at(1))
    opened(ledger, 2, 2, promised=False)
    feed(ledger, 2, 13, seconds=3)
    ledger.ended(2, at(5))  # before it was decided whether anything is missing
    opened(ledger, 3, 5 + RELIED)
    feed(ledger, 3, 13, 14, seconds=6 + RELIED)  # 13 is older than the subscription: a replay of what the server holds
    assert reasons(ledger.tick(3, at(7 + RELIED + TRUSTED))) == [GapReason.NOT_PROMISED]


def test_connection_that_ended_unread_leaves_a_possible_gap_unless_the_next_replays() -> None:
    for replays in (False, True):
        ledger = led(10)
        ledger.ended(1, at(0), unread=True)
        opened(ledger, 2)
        feed(ledger, 2, *(50, 11) if replays else (50,))
        expected = [] if replays else [GapReason.UNREAD]
        assert reasons(ledger.tick(2, at(STABLE_AFTER))) == expected


def test_held_event_of_an_ended_connection_stays_known_until_the_cursor_passes_it() -> None:
    ledger = resumed(10)
    entry = ledger.admit_apart(name(30))
    ledger.settle(entry)
    assert ledger.settled_position().settled == (name(30),)
    feed(ledger, 2, 50, 30)
    assert ledger.resume_cursor == cursor(30)
    assert name(30) not in ledger.settled_position().settled
    other = CheckedLedger(WINDOW)
    other.settle(other.admit_apart(name(1)))
    assert other.settled_position().settled == ()


def test_ticks_of_an_ended_or_silent_connection_change_nothing() -> None:
    ledger = resumed(10)
    assert ledger.tick(7, at(1)) == []
    assert ledger.trusts(7)
    assert not ledger.is_open(7)
    ledger.open(3)
    ledger.ended(2, at(1))
    assert ledger.tick(3, at(TRUSTED)) == []
    assert not ledger.trusts(3)


# ---- spans ---------------------------------------------------------------------------------------------------------


def test_gap_begins_when_the_resume_cursor_was_set() -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    feed(ledger, 1, 1, seconds=5)
    ledger.last_life = at(100)[0]  # heartbeats still came
    opened(ledger, 2, 100, promised=False)
    ledger.ended(1, at(110))
    ledger.tick(2, at(120))
    feed(ledger, 2, 9, seconds=130)
    (gap,) = ledger.gaps
    assert (gap.since, gap.until) == (at(5)[0], at(110)[0])


def test_gap_of_a_replay_begins_when_the_cursor_that_it_resumed_from_was_set() -> None:
    # e11, published long before it was replayed, does not show that nothing older is missing.
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    feed(ledger, 1, 10, seconds=5)
    ledger.ended(1, at(6))
    opened(ledger, 2, 1000)
    feed(ledger, 2, 50, 11, seconds=1000)
    assert ledger.resume_cursor == cursor(11)
    assert ledger.settled_position(at(1001)).cursor_at == at(5)[0]
    ledger.ended(2, at(1002))
    opened(ledger, 3, 1003, promised=False)
    ledger.tick(3, at(1013))
    (gap,) = ledger.gaps
    assert (gap.since, gap.until) == (at(5)[0], at(1013)[0])


@pytest.mark.parametrize("jump", [timedelta(hours=-1), timedelta(hours=1)])
def test_gap_spans_the_loss_on_either_reading_of_a_clock_that_was_set(jump: timedelta) -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    feed(ledger, 1, 10, cursors=False, seconds=100)

    def later(seconds: float) -> tuple[datetime, float]:
        return START + jump + timedelta(seconds=seconds), seconds

    ledger.ended(1, later(110))
    ledger.open(2)
    ledger.live(2, later(120))
    ledger.admit(2, name(11), None, later(121))
    (gap,) = ledger.gaps
    assert gap.since is not None
    assert gap.since <= min(at(100)[0], later(100)[0])
    assert gap.since <= gap.until
    assert gap.until >= later(120)[0]


def test_gap_after_a_run_whose_clock_was_ahead_begins_at_an_unknown_time() -> None:
    ledger = CheckedLedger(WINDOW, Position(cursor_at=START + timedelta(days=1)))  # the clock was set back since
    opened(ledger, 1, 5)
    feed(ledger, 1, 1, cursors=False, seconds=6)
    (gap,) = ledger.gaps
    assert (gap.since, gap.until) == (None, at(6)[0])


def test_first_start_is_no_gap_and_a_crash_before_any_event_leaves_one() -> None:
    ledger = CheckedLedger(WINDOW)
    ledger.note_start(at(3))
    assert ledger.gap_count == 0
    position = Position.from_json(ledger.settled_position(at(4)).to_json())
    assert position.cursor_at == at(3)[0]
    again = CheckedLedger(WINDOW, position)
    opened(again, 1, 50)
    assert feed(again, 1, 7, seconds=51) == [GapReason.NO_CURSOR]
    assert (again.gaps[0].since, again.gaps[0].until) == (at(3)[0], at(51)[0])


# ---- bounds --------------------------------------------------------------------------------------------------------


def test_position_without_a_cursor_has_few_ids() -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    feed(ledger, 1, *range(5_000), cursors=False)
    position = ledger.settled_position(at())
    assert position.settled == ()
    assert position.recent == tuple(name(number) for number in range(4_900, 5_000))  # for a repair
    assert len(position.to_json()) < 2_000


def test_gap_after_a_connection_that_had_no_frame_begins_with_its_subscription() -> None:
    ledger = CheckedLedger(WINDOW)
    ledger.open(1, at(10))
    ledger.ended(1, at(30))
    opened(ledger, 2, 50)
    assert feed(ledger, 2, 1, cursors=False, seconds=55) == [GapReason.NO_CURSOR]
    assert (ledger.gaps[0].since, ledger.gaps[0].until) == (at(10)[0], at(55)[0])


class NeverWalked(dict[str, Entry]):
    """A dict in which ids are only looked up. To find its first item, Python walks over all that were removed."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("somebody iterates over the ids")

    items = keys = values = __iter__  # type: ignore[assignment]


def test_forgetting_an_id_costs_the_same_however_many_were_forgotten() -> None:
    ledger = Ledger(100)
    opened(ledger, 1)
    ledger._ids = NeverWalked()
    feed(ledger, 1, *range(1_000))
    assert len(ledger._ids) == len(ledger._order) == 100
    assert all(ledger.knows(name(number)) == (number >= 900) for number in range(1_000))


def test_held_events_are_bounded_as_all_events_ahead_of_the_cursor() -> None:
    ledger = led(0, window=20)
    ledger.ended(1, at())
    assert ledger.open(2, with_cursor=False) is None
    ledger.live(2, at())
    assert GapReason.UNPROVED in feed(ledger, 2, *range(1, 30))
    assert ledger.resume_cursor == cursor(29)


def test_late_pins_of_a_slow_program_are_dropped_when_the_position_passes_their_cursor() -> None:
    ledger = led(0)
    opened(ledger, 2)
    stuck, _ = ledger.admit(1, "stuck", cursor(1), at())
    feed(ledger, 2, 2, 3, 4)
    feed(ledger, 1, 2, 3, 4)
    assert set(ledger.settled_position().settled) == {name(2), name(3), name(4)}
    ledger.settle(stuck)
    assert ledger.settled_position().settled == ()
    assert ledger.settled_position().cursor == cursor(4)


def test_event_covered_before_the_position_has_a_cursor_goes_with_the_first_one() -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    opened(ledger, 2)
    first, _ = ledger.admit(1, name(0), None, at())
    feed(ledger, 2, 14)
    held = [ledger.admit(1, name(number), cursor(number), at())[0] for number in (11, 12)]
    feed(ledger, 2, 15)
    feed(ledger, 1, 14, 15)  # now both are covered, by cursors that the position has not come to
    ledger.settle(first)
    ledger.settle(held[0])
    position = ledger.settled_position()
    assert (position.cursor, set(position.settled)) == (cursor(11), {name(14), name(15)})
    ledger.settle(held[1])
    assert ledger.settled_position().settled == ()


# ---- corners -------------------------------------------------------------------------------------------------------


def test_position_with_ids_and_no_cursor_can_be_resumed_from() -> None:
    ledger = CheckedLedger(WINDOW, Position(settled=(name(1),), recent=(name(0),)))
    opened(ledger, 1)
    assert ledger.knows(name(0))
    assert ledger.knows(name(1))
    assert ledger.settled_position().settled == ()


def test_first_event_after_a_restart_is_not_the_item_that_set_the_cursor() -> None:
    ledger = CheckedLedger(1, Position(cursor=cursor(1), promised=False))
    opened(ledger, 1)
    assert feed(ledger, 1, 2) == [GapReason.UNPROVED]  # in so small a window it leads at once
    position = ledger.settled_position()
    assert (position.cursor, position.promised) == (cursor(2), True)


def test_id_that_a_position_names_several_times_is_remembered_once() -> None:
    # An id is settled twice if it is delivered again after the window has forgotten it.
    ledger = CheckedLedger(4)
    opened(ledger, 1)
    feed(ledger, 1, 0, *range(1, 7), 0)
    position = ledger.settled_position()
    assert position.recent.count(name(0)) == 2
    for twice in (position, Position(cursor=cursor(3), settled=(name(5), name(5)), recent=(name(1), name(5)))):
        again = CheckedLedger(4, twice)
        opened(again, 1)
        feed(again, 1, *range(10, 30))
        assert sum(again.knows(name(number)) for number in range(30)) == 4


def test_withdrawn_promise_means_nothing_without_a_cursor() -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    ledger.withdraw_promise()
    feed(ledger, 1, 1)
    ledger.ended(1, at(1))
    opened(ledger, 2, 1)
    assert ledger.tick(2, at(1 + STABLE_AFTER)) == []


def test_connection_that_lost_the_lead_by_force_leads_again() -> None:
    ledger = led(0, window=20)
    opened(ledger, 2)
    found = feed(ledger, 2, *range(1, 12))
    assert found == [GapReason.UNPROVED]
    feed(ledger, 1, 12)
    ledger.ended(2, at(1))
    assert ledger.resume_cursor == cursor(12)


def test_event_without_a_cursor_is_pinned_until_the_next_one_with_it() -> None:
    ledger = led(0)
    feed(ledger, 1, 1, cursors=False)
    assert ledger.settled_position().settled == (name(1),)
    feed(ledger, 1, 2)
    assert ledger.settled_position().settled == ()


def test_opaque_repetition_of_what_is_covered_moves_nothing() -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    feed(ledger, 1, 1, 2, 3, cursors="opaque")
    ledger.ended(1, at(1))
    opened(ledger, 2, 1)
    feed(ledger, 2, 2, cursors="opaque", seconds=2)  # the replay begins earlier than asked
    assert ledger.resume_cursor == "opaque 3"


def test_neighbour_that_another_connection_left_ahead_is_covered_by_the_replay() -> None:
    ledger = resumed(10)
    opened(ledger, 3, 1)
    ledger.admit(3, "11b", cursor(11), at(1))
    feed(ledger, 2, 50, 11)
    assert ledger.resume_cursor == cursor(11)
    ledger.repeat(2, "11b", cursor(11), at(2))
    assert "11b" not in ledger._ahead


def test_event_without_a_cursor_between_others_is_passed_with_them() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 11)
    feed(ledger, 2, 12, cursors=False)
    feed(ledger, 2, 13, 50, 14)
    assert ledger.resume_cursor == cursor(14)
    assert set(ledger.settled_position().settled) == {name(50)}


# ---- runs ----------------------------------------------------------------------------------------------------------


def run(*numbers: int, without_cursor: int | None = None) -> list[Event]:
    return [
        make_event("workflow_failed", id=name(n), cursor=None if n == without_cursor else cursor(n)) for n in numbers
    ]


def test_run_ends_at_a_known_event_and_at_one_without_a_cursor() -> None:
    ledger = led(1)
    events = run(2, 3, 1, 4, 5, 6, without_cursor=5)
    assert [entry.id for entry in ledger.admit_run(1, events, range(6), at(1), at(1))] == [name(2), name(3)]
    assert not ledger.admit_run(1, events, range(2, 6), at(1), at(1))
    assert [entry.id for entry in ledger.admit_run(1, events, range(3, 6), at(1), at(1))] == [name(4)]
    assert not ledger.admit_run(1, events, range(4, 6), at(1), at(1))
    assert ledger.admit_run(1, events, range(5, 5), at(1), at(1)) == []
    assert ledger.resume_cursor == cursor(4)
    assert ledger.unsettled == 3


def test_events_of_one_of_two_connections_are_no_run() -> None:
    ledger = led(1)
    opened(ledger, 2, 1)
    assert ledger.admit_run(1, run(2), range(1), at(2), at(2)) == ()
    assert ledger.admit_run(2, run(2), range(1), at(2), at(2)) == ()
    assert not ledger.knows(name(2))


def test_run_beyond_the_window_forgets_the_oldest() -> None:
    ledger = led(1, 2, 3, window=4)
    ledger.admit_run(1, run(4, 5, 6), range(3), at(1), at(1))
    assert [ledger.knows(name(n)) for n in range(1, 7)] == [False, False, True, True, True, True]


def test_settled_run_becomes_the_position() -> None:
    ledger = led(1)
    entries = ledger.admit_run(1, run(2, 3, 4, 5), range(4), at(1), at(1))
    ledger.settle_run(entries[:2])
    assert ledger.settled_position().cursor == cursor(3)
    ledger.settle_run(entries[:2])  # again
    ledger.settle(entries[3])
    ledger.settle_run(entries[2:3])
    expected = attrs.evolve(
        led(1, 2, 3, 4, 5).settled_position(), cursor_at=at(1)[0], recent=tuple(name(n) for n in (1, 2, 3, 5, 4))
    )
    assert ledger.settled_position() == expected
    assert (ledger.settled_count, ledger.unsettled) == (5, 0)
    ledger.settle_run(entries)  # and when nothing is pending
    ledger.settle_run([])
    assert ledger.settled_count == 5


def test_run_that_is_settled_out_of_order_waits_for_the_oldest() -> None:
    ledger = led(1)
    entries = list(ledger.admit_run(1, run(2, 3, 4), range(3), at(1), at(1)))
    ledger.settle_run([entries[1], entries[2]])
    assert ledger.settled_position().cursor == cursor(1)
    ledger.settle_run([entries[0]])
    assert ledger.settled_position().cursor == cursor(4)


def test_run_behind_an_event_without_a_cursor_takes_its_pin_along() -> None:
    ledger = led(1)
    feed(ledger, 1, 2, cursors=False)
    assert ledger.settled_position().settled == (name(2),)
    ledger.settle_run(ledger.admit_run(1, run(3, 4), range(2), at(1), at(1)))
    assert (ledger.settled_position().cursor, ledger.settled_position().settled) == (cursor(4), ())


def test_run_with_an_event_without_a_cursor_is_settled_to_its_end() -> None:
    ledger = led(1)
    entries = list(ledger.admit_run(1, run(2), range(1), at(1), at(1)))
    entry, _ = ledger.admit(1, name(3), None, at(1))
    ledger.settle_run([*entries, entry])
    assert (ledger.settled_position().cursor, ledger.settled_position().settled) == (cursor(2), (name(3),))


def test_settling_twice_counts_once() -> None:
    ledger = CheckedLedger(WINDOW)
    opened(ledger, 1)
    entry, _ = ledger.admit(1, name(1), cursor(1), at())
    ledger.settle(entry)
    ledger.settle(entry)
    assert ledger.settled_count == 1


def test_older_generations_are_covered_when_a_replacement_is_trusted() -> None:
    ledger = resumed(10)
    feed(ledger, 2, 30, cursors=False)
    ledger.ended(2, at(1))
    opened(ledger, 3, 2)
    feed(ledger, 3, 31, seconds=3)
    ledger.tick(3, at(3 + TRUSTED))
    ledger.tick(3, at(4 + TRUSTED))
    assert ledger.trusts(3)
    assert not ledger._ahead


def test_start_that_was_recorded_is_not_moved_by_the_first_connection() -> None:
    ledger = CheckedLedger(WINDOW)
    ledger.note_start(at(1))
    opened(ledger, 1, 5)
    assert ledger.settled_position().cursor_at == at(1)[0]


# ---- the invariants can fail ---------------------------------------------------------------------------------------

A_GAP = Gap(since=None, until=START, reason=GapReason.NO_CURSOR)


def busy() -> Ledger:
    """Return a ledger in a state to which every invariant applies."""
    ledger = Ledger(WINDOW, Position(cursor_at=START, gaps=(A_GAP,)))
    opened(ledger, 1)
    opened(ledger, 2)
    feed(ledger, 1, 0)
    feed(ledger, 2, 14)
    feed(ledger, 1, 1, cursors=False)  # pinned
    ledger.admit(1, name(3), cursor(3), at())  # not settled
    feed(ledger, 2, 15, 16)  # ahead
    feed(ledger, 1, 14)  # pinned until the step that this makes
    ledger.admit(1, name(17), cursor(17), at())
    ledger.close_gap(A_GAP)
    return ledger


def pass_unsettled(ledger: Ledger) -> None:
    ledger._order[0].settled = False


def number_an_event_late(ledger: Ledger) -> None:
    ledger._order[0].seq = 10


def move_the_cursor_by_an_event_ahead(ledger: Ledger) -> None:
    ledger._ahead[name(16)].moved = True


def cover_an_event_ahead(ledger: Ledger) -> None:
    ledger._ahead[name(16)].covered = 99


def cover_by_an_older_item(ledger: Ledger) -> None:
    ledger._ids[name(14)].covered = 1


def settle_without_passing(ledger: Ledger) -> None:
    ledger._ids[name(3)].settled = True
    ledger._recent.append(name(3))


def step_twice(ledger: Ledger) -> None:
    for _ in range(2):
        ledger._seq += 1
        ledger._pending.append(_CursorStep(seq=ledger._seq, cursor=None, at=None))


def swap_the_newest_items(ledger: Ledger) -> None:
    pending = ledger._pending
    pending[-1], pending[-2] = pending[-2], pending[-1]


def pass_an_unsettled_event(ledger: Ledger) -> None:
    ledger._tail.seq = ledger._pending[0].seq


def hold_the_leader(ledger: Ledger) -> None:
    assert ledger._leader is not None
    ledger._leader.held = True


def leave_deliveries_in_the_leaders_trail(ledger: Ledger) -> None:
    ledger._sources[1].trail.extend(ledger._sources[2].trail)


def begin_in_the_future(ledger: Ledger) -> None:
    source = ledger._sources[2]
    source.mark = attrs.evolve(source.mark, then=attrs.evolve(source.mark.then, seq=99))


def have_many_gaps(ledger: Ledger) -> None:
    ledger._gaps = deque([A_GAP] * (MAX_GAPS + 1))
    ledger.gap_count = MAX_GAPS + 1


def have_many_snapshots(ledger: Ledger) -> None:
    ((_, known),) = ledger._snapshots
    ledger._snapshots = deque((float(number), known) for number in range(40))


def know_the_future(ledger: Ledger) -> None:
    ((time, known),) = ledger._snapshots
    ledger._snapshots = deque([(time, attrs.evolve(known, seq=99))])


def having(path: str, value: object) -> Callable[[Ledger], None]:
    """Return the damage that sets one private attribute."""

    def damage(ledger: Ledger) -> None:
        target: Any = ledger
        *way, last = path.split(".")
        for one in way:
            target = target[int(one)] if one.isdigit() else getattr(target, one)
        setattr(target, last, value)

    damage.__name__ = f"{path}={value}"[:40]
    return damage


DAMAGES: list[tuple[Callable[[Ledger], object], str]] = [
    # ids
    (lambda ledger: ledger._order.rotate(), "ids differ from their order"),
    (number_an_event_late, "numbers of the remembered events do not increase"),
    (having("_seq", 5), "numbers of the remembered events do not increase"),
    (pass_unsettled, "has passed e0, which is not settled"),
    (move_the_cursor_by_an_event_ahead, "e16 is ahead of the resume cursor, and moved it"),
    (cover_an_event_ahead, "e16 is ahead of the resume cursor, and covered by it"),
    (cover_by_an_older_item, "e14 is covered by an older item"),
    (lambda ledger: ledger._ahead.clear(), "ahead are .* listed are"),
    (lambda ledger: ledger._recent.popleft(), "missing among the recent ones: .*e0"),
    # the admission list
    (lambda ledger: ledger._pending.appendleft(_GapClosing(seq=0, gap=A_GAP)), "does not begin with an event"),
    (settle_without_passing, "begins with e3, which is settled"),
    (swap_the_newest_items, "numbers in the admission list do not increase"),
    (lambda ledger: ledger._pending.remove(ledger._ids[name(15)]), "exactly the events that the position has not"),
    (step_twice, "have no event between them"),
    # the position
    (having("_tail.seq", 99), "an item that does not exist"),
    (pass_an_unsettled_event, "ahead of the unsettled event e3"),
    (having("_cursor", cursor(99)), "the resume cursor is 1-99 .* the position can come to is 1-17"),
    (lambda ledger: ledger._tail.pins.clear(), r"pinned are \[\] instead of .*e1"),
    (lambda ledger: ledger._tail.late_pins.clear(), "pinned until an item are .* instead of .*e14"),
    (having("_tail.next_cover", 99), "covered before it is looked for"),
    # connections
    (lambda ledger: ledger._sources.update({5: ledger._sources[2]}), "under another one's generation"),
    (lambda ledger: ledger._sources.update({1: ledger._sources.pop(1)}), "not registered oldest first"),
    (having("_line", None), "no line has begun"),
    (having("_leader", None), "no connection leads, though one may"),
    (lambda ledger: ledger._sources.pop(1), "the leader is not registered"),
    (hold_the_leader, "a held connection leads"),
    (leave_deliveries_in_the_leaders_trail, "has deliveries in its trail"),
    (having("_leader.decided", False), "connection 1 is trusted before it is decided"),
    (having("_sources.2.doubted", True), "connection 2 is doubted before it is decided"),
    (begin_in_the_future, "connection 2 began in the future"),
    (lambda ledger: ledger._sources[2].trail_ids.add(name(99)), "trail and ids of 2 differ"),
    # counts and bounds
    (having("_admitted", 99), "99 events admitted"),
    (having("_cursor_admitted", 50), "more events were admitted at the resume cursor than in all"),
    (having("_unpromised_seq", 99), "a cursor that does not exist"),
    (having("settled_count", 0), "events of this run are settled, 0 counted"),
    (having("gap_count", 0), "2 gaps are open, 0 counted"),
    (have_many_gaps, "101 gaps, maximum 100"),
    (having("_recent", deque([name(0)] * (RECENT_IDS + 1))), "1001 recent ids, maximum 1000"),
    (having("_window", 2), "2 events are ahead, maximum 1"),
    (lambda ledger: ledger._snapshots.append(ledger._snapshots[-1]), "times of the snapshots do not increase"),
    (have_many_snapshots, "40 snapshots, maximum 32"),
    (know_the_future, "a snapshot is of the future"),
]


@pytest.mark.parametrize(("damage", "complaint"), DAMAGES, ids=[complaint for _, complaint in DAMAGES])
def test_damage_is_found_by_the_check(damage: Callable[[Ledger], object], complaint: str) -> None:
    ledger = busy()
    ledger.check()
    damage(ledger)
    with pytest.raises(AssertionError, match=complaint):
        ledger.check()
