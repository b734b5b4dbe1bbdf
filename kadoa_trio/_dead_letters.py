"""Where a program puts events that it cannot handle, so that the others go on and none is lost."""

from __future__ import annotations

from datetime import datetime
from typing import Final, Protocol, final

import attrs

from ._checks import refusal
from ._events import Event
from ._redact import presentable

MAX_REASON: Final = 2_000
"""Maximum length of the reason of a dead letter that is made from an exception, or is in a file, in characters."""


@final
@attrs.frozen(kw_only=True)
class DeadLetter:
    """An event that was put aside, and why."""

    event: Event
    attempts: int
    """How often it was handed out."""
    reason: str
    """Why it was put aside, as text."""
    failed_at: datetime
    """When it was put aside, in UTC."""
    error: Exception | None = attrs.field(default=None, eq=False, repr=False)
    """What the last attempt has raised; None for an event that was rejected."""


class DeadLetters(Protocol):
    """Where dead letters go: `DeadLetterFile`, or a class of the program's own.

    ``kadoa_trio.testing.MemoryDeadLetters`` is one for tests.
    """

    async def add(self, letter: DeadLetter) -> None:
        """Keep a letter. When this returns, no crash may lose it: the event is settled then.

        If it raises, the event is not settled. After a cancellation it may or
        may not have kept the letter, so that a letter may be there twice.
        """
        ...


def check_dead_letters(value: DeadLetters | None) -> DeadLetters | None:
    """Refuse what has no method ``add``."""
    if value is not None and (isinstance(value, type) or not callable(getattr(value, "add", None))):
        raise refusal("dead_letters", "an object with a method add, such as DeadLetterFile(path), or None", value)
    return value


def reason_of(error: Exception) -> str:
    """Give the reason of a letter for an exception: its type and text, in one printable line."""
    text = presentable(str(error), MAX_REASON)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
