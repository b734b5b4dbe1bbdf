"""The order of cursors: two integers where a cursor shows them, and no order elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kadoa_trio._engine._cursors import cursor_key


@given(*[st.tuples(st.integers(0, 10**30), st.integers(0, 10**30))] * 2)
def test_stream_cursors_compare_as_integers(a: tuple[int, int], b: tuple[int, int]) -> None:
    first, second = cursor_key(f"{a[0]}-{a[1]}"), cursor_key(f"{b[0]}-{b[1]}")
    assert first is not None
    assert second is not None
    assert (first < second, first == second, first > second) == (a < b, a == b, a > b)


def test_later_cursor_is_later_though_its_text_is_not() -> None:
    later, earlier = cursor_key("1742-10"), cursor_key("1742-9")
    assert later is not None
    assert earlier is not None
    assert later > earlier


@pytest.mark.parametrize(
    "odd", ["", "5", "1-", "-1", "1-2-3", "a-b", "+1-2", "1-2\n", "\u0661-\u0662", "1_0-2", "9" * 5_000 + "-1", None]
)
def test_other_cursors_have_no_order(odd: str | None) -> None:
    assert cursor_key(odd) is None
