"""When a refused cursor is dropped: the counts alone, without a connection."""

from __future__ import annotations

import pytest

from kadoa_trio._engine._cursor_check import (
    CHECK_TIME,
    CLOSES_BEFORE_CHECK,
    LONG_REFUSALS,
    LONG_TIME,
    MAX_PAUSE,
    REFUSALS_BEFORE_DROP,
    CursorCheck,
)


def test_patience_follows_the_longest_life_until_the_check_ends() -> None:
    check = CursorCheck()
    check.closed(12.0)
    check.closed(4.0)
    assert check.patience == 1.5 * 12.0 + 5
    assert not check.outlived_by(34.0, 20.0)  # the probe has lived longer, but not for long enough to show it
    assert check.longest == 20.0
    assert check.outlived_by(35.0, 20.0)
    check.reset()
    assert check.patience == 5.0


def test_refusals_after_long_lives_count_together() -> None:
    check = CursorCheck()
    check.closed(100.0)
    times = [100.0 * number for number in range(REFUSALS_BEFORE_DROP)]
    assert [check.refused(now) for now in times] == [False] * (REFUSALS_BEFORE_DROP - 1) + [True]


def test_check_is_due_after_consecutive_closes() -> None:
    check = CursorCheck()
    for number in range(CLOSES_BEFORE_CHECK):
        assert not check.due, number
        check.closed(0.0)
    assert check.due
    assert check.begin()
    assert not check.begin()  # resumed
    check.postpone()
    assert not check.due
    check.closed(0.0)
    assert check.due
    check.reset()
    assert not check.due
    assert check.begin()


@pytest.mark.parametrize("pause", [1.0, 10.0, MAX_PAUSE])
def test_cursor_is_dropped_after_enough_refusals_over_enough_time(pause: float) -> None:
    check = CursorCheck()
    now, refusals = 50.0, 1
    dropped = check.refused(now)
    while not dropped:
        now += pause
        refusals += 1
        dropped = check.refused(now)
    assert refusals == max(REFUSALS_BEFORE_DROP, CHECK_TIME / pause + 1)


def test_refusals_with_an_outage_between_them_do_not_count_together() -> None:
    check = CursorCheck()
    for outage in range(3):
        for number in range(8):
            assert not check.refused(200.0 * outage + 5 * number)


def test_refusals_that_never_end_drop_the_cursor_whatever_is_between_them() -> None:
    check = CursorCheck()
    dropped = [number for number in range(20) if check.refused(number * (MAX_PAUSE + 10))]
    assert dropped[0] == max(LONG_REFUSALS - 1, -(-LONG_TIME // (MAX_PAUSE + 10)))
