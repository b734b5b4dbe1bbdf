"""Compares cursors, where their form allows it.

Kadoa's documentation shows ``"1742-0"``. That looks like the id of an entry in
a Redis stream: two integers, compared as numbers and not as text, because
``1742-10`` is after ``1742-9``. Every other cursor is *opaque*: it cannot be
compared.

https://redis.io/docs/latest/develop/data-types/streams/#entry-ids
"""

from __future__ import annotations

import re
from typing import Final

_COMPARABLE: Final = re.compile(r"([0-9]{1,40})-([0-9]{1,40})", re.ASCII)

CursorKey = tuple[int, int]
"""The two integers of a comparable cursor."""


def cursor_key(cursor: str | None) -> CursorKey | None:
    """Return the key by which a cursor is compared; None for an opaque cursor, or if there is none."""
    match = None if cursor is None else _COMPARABLE.fullmatch(cursor)
    return None if match is None else (int(match[1]), int(match[2]))
