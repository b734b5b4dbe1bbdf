"""The ledger alone, against a model of the server: schedules drawn by Hypothesis, and the rules one by one.

The model's server keeps one stream. A connection is sent its replay, then
what is published; a server may let live events overtake the replay, begin a
replay earlier than asked, or take a cursor and ignore it. A connection counts
as stable only when its replay is over: that is the assumption behind
``stable_after``.
"""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kadoa_trio._ledger import MAX_GAPS, RECENT_IDS, Entry, GapReason, Ledger, Position

START = datetime(2026, 1, 1, tzinfo=UTC)
WINDOW = 100_000


class Link:
    """A connection in the model: what the server still has to send on it."""

    def __init__(self, generation: int, cursor: str | None) -> None:
        self.generation = generation
        self.cursor = cursor
        self.replay: deque[int] = deque()
        self.live: deque[int] = deque()
        self.delivered: list[int] = []
        self.stable = False
        self.draining = False
        self.ignored = False


def name(number: int) -> str:
    return f"e{number}"


mostly = st.sampled_from([True, True, True, False])


class Machine(RuleBasedStateMachine):
    @initialize(overtake=st.booleans(), coarse=st.integers(0, 3), honest=mostly, cursors=mostly)
    def begin(self, overtake: bool, coarse: int, honest: bool, cursors: bool) -> None:
        self.overtake, self.coarse, self.honest, self.cursors = overtake, coarse, honest, cursors
        self.now = START
        self.published = 0
        self.first: int | None = None  # the first event that the program could have received
        self.links: dict[int, Link] = {}
        self.generation = 0
        self.handed_out: set[int] = set()  # by this process
        self.settled: set[int] = set()  # by any
        self.unsettled: dict[int, Entry] = {}
        self.reported = 0
        self.saved: tuple[Position, set[int]] | None = None
        self.saw_gap = False
        self.cursor_before = -1
        self.ledger = Ledger(WINDOW)
        self.open(ignore=False, promised=True)

    # ---- the server ------------------------------------------------------------------------------------------------

    def cursor_of(self, number: int) -> str | None:
        return f"1-{number}" if self.cursors else None

    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        for _ in range(count):
            for link in self.links.values():
                link.live.append(self.published)
            self.published += 1

    @precondition(lambda self: len(self.links) < 3)
    @rule(ignore=st.booleans(), promised=mostly)
    def connect(self, ignore: bool, promised: bool) -> None:
        self.open(ignore=ignore, promised=promised)

    def open(self, *, ignore: bool, promised: bool) -> None:
        self.generation += 1
        promised = promised or self.honest
        cursor = self.ledger.open(self.generation, self.tick(), promised=promised)
        link = Link(self.generation, cursor)
        if cursor is not None:
            number = int(cursor.removeprefix("1-"))
            if self.honest or not ignore:
                link.replay.extend(range(max(number + 1 - self.coarse, 0), self.published))
            else:
                link.ignored = True
        if self.first is None:
            self.first = self.published if cursor is None else 0
        self.links[self.generation] = link

    def tick(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now

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
        self.receive(link, data.draw(st.sampled_from(link.delivered)))

    def receive(self, link: Link, number: int) -> None:
        link.delivered.append(number)
        if self.ledger.knows(name(number)):
            self.ledger.repeat(link.generation, name(number), self.cursor_of(number))
            return
        assert number not in self.handed_out, "handed out twice"
        entry, gaps = self.ledger.admit(link.generation, name(number), self.cursor_of(number))
        self.count(len(gaps))
        self.handed_out.add(number)
        self.unsettled[number] = entry

    @precondition(lambda self: any(not one.stable and not one.replay for one in self.links.values()))
    @rule(data=st.data())
    def become_stable(self, data: st.DataObject) -> None:
        link = data.draw(st.sampled_from([one for one in self.links.values() if not one.stable and not one.replay]))
        link.stable = True
        self.count(len(self.ledger.stable(link.generation)))

    @precondition(lambda self: self.links)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(sorted(self.links)))
        del self.links[generation]
        self.count(len(self.ledger.ended(generation, self.tick())))

    def count(self, gaps: int) -> None:
        self.reported += gaps
        self.saw_gap = self.saw_gap or gaps > 0

    # ---- the program -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.unsettled)
    @rule(data=st.data(), all_of_them=st.booleans())
    def settle(self, data: st.DataObject, all_of_them: bool) -> None:
        chosen = sorted(self.unsettled) if all_of_them else [data.draw(st.sampled_from(sorted(self.unsettled)))]
        for number in chosen:
            entry = self.unsettled.pop(number)
            foreseen = None
            if self.ledger.oldest_unsettled == name(number):
                foreseen = self.ledger.position_after(name(number))
            self.ledger.settle(entry)
            assert foreseen is None or foreseen == self.ledger.settled_position()
            self.ledger.settle(entry)  # changes nothing
            self.settled.add(number)

    @rule()
    def save(self) -> None:
        self.saved = (self.ledger.settled_position(), set(self.settled))

    @precondition(lambda self: self.first is not None and not self.saw_gap)
    @rule(data=st.data())
    def take_from_the_log(self, data: st.DataObject) -> None:
        candidates = [n for n in range(self.first or 0, self.published) if n not in self.handed_out]
        if candidates:
            number = data.draw(st.sampled_from(candidates))
            self.unsettled[number] = self.ledger.admit_from_log(name(number))
            self.handed_out.add(number)

    @precondition(lambda self: self.settled and self.unsettled)
    @rule(from_saved=st.booleans())
    def crash_and_restart(self, from_saved: bool) -> None:
        position = self.ledger.settled_position()
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
        for number in self.settled:
            # Whatever a replay can bring again is known; so much goes into a position here that nothing is left out.
            if len(self.settled) <= RECENT_IDS:
                assert self.ledger.knows(name(number))

    # ---- what must hold at any moment ------------------------------------------------------------------------------

    def missing_after(self, cursor: str | None, had: set[int]) -> list[int]:
        """Give the events that a program would never get if it went on from *cursor* now, having *had* some."""
        assert self.first is not None
        if cursor is None:
            return []  # the ledger reports a gap when it goes on; see below
        return [n for n in range(self.first, int(cursor.removeprefix("1-"))) if n not in had]

    @invariant()
    def resuming_loses_nothing(self) -> None:
        if self.first is not None and not self.saw_gap and not any(one.ignored for one in self.links.values()):
            assert not self.missing_after(self.ledger.resume_cursor, self.handed_out) or self.cheated()

    @invariant()
    def restarting_loses_nothing(self) -> None:
        if self.first is not None and not self.saw_gap:
            position = self.ledger.settled_position()
            assert not self.missing_after(position.cursor, self.settled) or self.cheated()

    def cheated(self) -> bool:
        """A server that takes the cursor and ignores it, with nobody beside it to tell, cannot be found out."""
        return not self.honest

    @invariant()
    def resume_cursor_never_goes_back(self) -> None:
        cursor = self.ledger.resume_cursor
        if cursor is not None and not self.overtake and not self.saw_gap:
            number = int(cursor.removeprefix("1-"))
            assert number >= self.cursor_before or self.coarse
            self.cursor_before = number

    @invariant()
    def honest_servers_are_not_suspected(self) -> None:
        if self.honest and self.cursors:
            # A run that goes on from an older save may not know of a gap that the run before it found.
            assert {gap.reason for gap in self.ledger.gaps} <= {GapReason.NO_CURSOR}

    @invariant()
    def counts_agree(self) -> None:
        assert self.ledger.gap_count >= len(self.ledger.gaps)
        assert self.ledger.unsettled >= len(self.unsettled)
        if self.unsettled:
            assert self.ledger.oldest_unsettled is not None


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=600, stateful_step_count=40, deadline=None)


# ---- the rules, one by one -----------------------------------------------------------------------------------------


def cursor(number: int) -> str:
    return f"1-{number}"


def feed(ledger: Ledger, generation: int, *numbers: int, cursors: bool = True) -> list[GapReason]:
    reasons: list[GapReason] = []
    for number in numbers:
        where = cursor(number) if cursors else None
        if ledger.knows(name(number)):
            ledger.repeat(generation, name(number), where)
        else:
            entry, gaps = ledger.admit(generation, name(number), where)
            ledger.settle(entry)
            reasons += [gap.reason for gap in gaps]
    return reasons


def reasons(gaps: list[object]) -> list[GapReason]:
    return [gap.reason for gap in gaps]  # type: ignore[attr-defined]


def led(*numbers: int, window: int = WINDOW) -> Ledger:
    """Give a ledger whose first connection has delivered *numbers*."""
    ledger = Ledger(window)
    assert ledger.open(1, START) is None
    feed(ledger, 1, *numbers)
    return ledger


def test_first_connection_leads_at_once() -> None:
    ledger = led(1, 2)
    assert ledger.resume_cursor == cursor(2)
    assert ledger.settled_position().cursor == cursor(2)


def test_heir_is_not_relied_on_before_it_is_stable() -> None:
    ledger = led(10)
    ledger.open(2, START)
    feed(ledger, 2, 14)  # the old one still owes 11 to 13
    assert ledger.resume_cursor == cursor(10)
    feed(ledger, 1, 11)
    assert ledger.resume_cursor == cursor(11)
    feed(ledger, 1, 12, 13, 14)
    assert ledger.resume_cursor == cursor(14)


def test_common_id_is_no_reason_to_move_the_cursor() -> None:
    # The heir: e11 by the replay (common), e14 live; it dies before e12.
    ledger = led(10, 11)
    ledger.open(2, START)
    ledger.ended(1, START)
    feed(ledger, 2, 14)
    assert ledger.ended(2, START) == []
    assert ledger.resume_cursor == cursor(11)


def test_stable_heir_takes_the_lead_when_the_old_one_ends() -> None:
    ledger = led(10)
    ledger.open(2, START)
    feed(ledger, 1, 11)
    feed(ledger, 2, 11, 12)
    assert ledger.stable(2) == []
    assert ledger.resume_cursor == cursor(11)
    assert ledger.ended(1, START) == []
    assert ledger.resume_cursor == cursor(12)
    assert ledger.settled_position().cursor == cursor(12)


def test_repetition_does_not_take_the_cursor_back() -> None:
    ledger = led(*range(10))
    feed(ledger, 1, 2, 3)
    assert ledger.resume_cursor == cursor(9)
    assert ledger.repeated == 2


def test_connection_does_not_owe_what_a_newer_one_brings_early() -> None:
    # e4 is live, and overtakes on the newer connection; the older one has not come to it yet.
    ledger = Ledger(WINDOW, Position(cursor=cursor(0)))
    ledger.open(1, START)
    feed(ledger, 1, 1)
    ledger.open(2, START)
    feed(ledger, 1, 2)
    feed(ledger, 2, 4)
    assert ledger.stable(1) == []


def test_event_from_the_log_proves_no_replay() -> None:
    ledger = led(1, 2, 3)
    ledger.open(2, START)
    feed(ledger, 1, 4)
    ledger.ended(1, START)
    ledger.settle(ledger.admit_from_log(name(5)))
    feed(ledger, 2, 5, 6)  # it goes on live, and never replays e4
    assert reasons(ledger.stable(2)) == [GapReason.NOT_REPLAYED]


def test_position_after_is_for_what_is_in_hand() -> None:
    ledger = Ledger(WINDOW)
    ledger.open(1, START)
    first, second = (ledger.admit(1, name(number), cursor(number))[0] for number in range(2))
    with pytest.raises(ValueError, match="not in hand"):
        ledger.position_after("never heard of")
    with pytest.raises(ValueError, match="e0 came before"):
        ledger.position_after(name(1))
    ledger.settle(second)
    assert ledger.position_after(name(0)).cursor == cursor(1)
    ledger.settle(first)
    with pytest.raises(ValueError, match="not in hand"):
        ledger.position_after(name(0))


def test_repetition_by_the_leader_of_an_event_without_a_cursor() -> None:
    ledger = led(10)
    ledger.open(2, START)
    feed(ledger, 2, 14)
    feed(ledger, 1, 14, cursors=False)
    assert ledger.resume_cursor == cursor(10)


def test_gap_is_closed_when_everything_before_is_settled() -> None:
    ledger = Ledger(WINDOW)
    gap = ledger.first_start(START, START + timedelta(seconds=1))
    ledger.open(1, START)
    entry = ledger.admit_from_log(name(0))
    ledger.close_gap(gap)
    assert ledger.settled_position().gaps == (gap,)
    ledger.settle(entry)
    assert ledger.settled_position().gaps == ()
    ledger.close_gap(gap)  # once more changes nothing
    assert ledger.gap_count == 1


def test_window_bounds_what_comes_from_the_log() -> None:
    ledger = Ledger(10)
    for number in range(50):
        ledger.settle(ledger.admit_from_log(name(number)))
    assert sum(ledger.knows(name(number)) for number in range(50)) == 10


def test_position_stands_before_the_oldest_unsettled_event() -> None:
    ledger = Ledger(WINDOW)
    ledger.open(1, START)
    entries = [ledger.admit(1, name(n), cursor(n))[0] for n in range(4)]
    ledger.settle(entries[2])
    ledger.settle(entries[0])
    position = ledger.settled_position()
    assert (position.cursor, position.settled) == (cursor(0), (name(2),))
    assert ledger.oldest_unsettled == name(1)
    again = Ledger(WINDOW, position)
    assert again.knows(name(0))
    assert again.knows(name(2))
    assert not again.knows(name(1))


def test_position_does_not_take_an_events_own_cursor() -> None:
    ledger = led(10)
    ledger.open(2, START)
    feed(ledger, 2, 14)  # settled, though 11 to 13 are still owed
    position = ledger.settled_position()
    assert (position.cursor, position.settled) == (cursor(10), (name(14),))


def test_steps_of_the_cursor_without_events_do_not_grow_the_list() -> None:
    ledger = led(0)
    ledger.open(2, START)
    feed(ledger, 2, *range(1, 50))
    stuck, _ = ledger.admit(2, "stuck", cursor(50))
    feed(ledger, 1, *range(1, 50))
    assert ledger.unsettled <= 2
    assert ledger.resume_cursor == cursor(49)
    ledger.settle(stuck)


def test_server_that_takes_a_cursor_and_does_not_replay_is_found_out() -> None:
    ledger = led(10)
    ledger.open(2, START)
    feed(ledger, 1, 11)
    feed(ledger, 2, 12)
    ledger.stable(2)
    assert reasons(ledger.ended(1, START)) == [GapReason.NOT_REPLAYED]


def test_silent_heir_is_doubted_until_its_next_event() -> None:
    for repeats in (True, False):
        ledger = led(10)
        ledger.open(2, START)
        feed(ledger, 1, 11)
        ledger.stable(2)
        assert ledger.ended(1, START) == []
        found = feed(ledger, 2, *((11,) if repeats else ()), 12)
        assert found == ([] if repeats else [GapReason.NOT_REPLAYED])


def test_heir_of_unstable_connections_is_believed_when_it_repeats_their_events() -> None:
    ledger = led(10)
    ledger.ended(1, START)
    ledger.open(2, START)
    feed(ledger, 2, 11, 12)
    ledger.ended(2, START)
    ledger.open(3, START)
    feed(ledger, 3, 11, 12, 13)
    assert ledger.stable(3) == []
    assert ledger.resume_cursor == cursor(13)


@pytest.mark.parametrize("promised", [True, False])
def test_heir_without_a_cursor_or_a_promise_is_a_possible_gap_unless_they_meet(promised: bool) -> None:
    for meet in (True, False):
        ledger = Ledger(WINDOW)
        ledger.open(1, START)
        feed(ledger, 1, 1, cursors=not promised)
        ledger.open(2, START, promised=promised)
        feed(ledger, 1, 2, cursors=not promised)
        feed(ledger, 2, *((2,) if meet else (3,)), cursors=not promised)
        ledger.stable(2)
        reason = GapReason.NO_CURSOR if promised else GapReason.NOT_PROMISED
        assert reasons(ledger.ended(1, START)) == ([] if meet else [reason])


def test_outage_without_a_cursor_is_a_gap_at_the_first_event() -> None:
    ledger = Ledger(WINDOW)
    ledger.open(1, START)
    feed(ledger, 1, 1, cursors=False)
    ledger.ended(1, START + timedelta(seconds=5))
    ledger.open(2, START + timedelta(seconds=9))
    assert feed(ledger, 2, 2, cursors=False) == [GapReason.NO_CURSOR]
    (gap,) = ledger.gaps
    assert (gap.since, gap.until) == (START + timedelta(seconds=5), START + timedelta(seconds=9))
    assert feed(ledger, 2, 3, cursors=False) == []


def test_connection_on_trial_does_not_lead_until_the_cursor_is_dropped() -> None:
    ledger = led(10)
    ledger.ended(1, START)
    assert ledger.open(2, START, with_cursor=False) is None
    assert ledger.stable(2) == []
    feed(ledger, 2, 15)
    assert ledger.resume_cursor == cursor(10)
    assert reasons(ledger.drop_cursor(2)) == [GapReason.CURSOR_DROPPED]
    assert ledger.resume_cursor is None
    assert ledger.settled_position().cursor is None
    feed(ledger, 2, 16)
    assert ledger.resume_cursor == cursor(16)


def test_window_forgets_the_oldest_but_nothing_unsettled() -> None:
    ledger = Ledger(10)
    ledger.open(1, START)
    stuck, _ = ledger.admit(1, "stuck", cursor(0))
    feed(ledger, 1, *range(1, 30))
    assert ledger.knows("stuck")
    ledger.settle(stuck)
    feed(ledger, 1, *range(30, 60))
    assert not ledger.knows("stuck")
    assert sum(ledger.knows(name(n)) for n in range(60)) == 10


def test_what_waits_for_a_proof_is_bounded() -> None:
    ledger = led(0, window=20)
    ledger.open(2, START)
    found = feed(ledger, 2, *range(1, 30))
    assert found == [GapReason.UNPROVED]
    assert ledger.resume_cursor == cursor(29)


def test_gaps_are_bounded_and_counted_on() -> None:
    ledger = Ledger(WINDOW)
    for n in range(MAX_GAPS + 10):
        ledger.open(n, START)
        feed(ledger, n, n, cursors=False)
        ledger.ended(n, START)
    assert (len(ledger.gaps), ledger.gap_count) == (MAX_GAPS, MAX_GAPS + 9)
    assert ledger.ended(99_999, START) == []


def test_position_survives_a_restart_with_its_gaps() -> None:
    ledger = Ledger(WINDOW)
    for n in range(2):
        ledger.open(n, START)
        feed(ledger, n, n, cursors=False)
        ledger.ended(n, START)
    position = ledger.settled_position(START)
    again = Ledger(WINDOW, position)
    assert again.settled_position(START) == position
    assert again.gap_count == 1


def test_restart_with_a_settled_event_past_the_cursor_keeps_it_pinned() -> None:
    position = Position(cursor=cursor(5), settled=(name(7),), recent=(name(4), name(5)))
    ledger = Ledger(WINDOW, position)
    assert ledger.open(1, START) == cursor(5)
    feed(ledger, 1, 6)
    assert name(7) in ledger.settled_position().settled
    feed(ledger, 1, 7, 8)
    assert ledger.stable(1) == []
    assert ledger.resume_cursor == cursor(8)
    assert ledger.settled_position().cursor == cursor(8)


def test_stretches_joined_again_and_again_are_one() -> None:
    ledger = led(0)
    for n in range(2, 8):
        ledger.open(n, START)
        feed(ledger, n - 1, n)
        feed(ledger, n, n)
        ledger.stable(n)
        assert ledger.ended(n - 1, START) == []
    ledger.open(8, START)
    ledger.open(9, START)
    feed(ledger, 8, 20)
    feed(ledger, 9, 20)
    feed(ledger, 7, 20)
    feed(ledger, 9, 20)
    ledger.ended(8, START)
    ledger.stable(9)
    assert ledger.ended(7, START) == []
