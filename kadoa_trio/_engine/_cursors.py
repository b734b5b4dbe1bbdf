"""The order of cursors, where they show one.

Kadoa's page shows ``"1742-0"``, which looks like the id of a Redis stream
entry: two integers, whose text says nothing about their order (``1742-10`` is
after ``1742-9``). Every other cursor is opaque.
"""

from __future__ import annotations

import re
from typing import Final

_COMPARABLE: Final = re.compile(r"([0-9]{1,40})-([0-9]{1,40})", re.ASCII)

CursorKey = tuple[int, int]
"""What a comparable cursor is compared by."""


def cursor_key(cursor: str | None) -> CursorKey | None:
    """Return what to compare a cursor by; None for an opaque one, and for none."""
    match = None if cursor is None else _COMPARABLE.fullmatch(cursor)
    return None if match is None else (int(match[1]), int(match[2]))
