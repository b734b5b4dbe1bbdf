"""Dead letters in memory, for tests of a program that has some."""

from __future__ import annotations

from typing import final

import trio

from .._dead_letters import DeadLetter


@final
class MemoryDeadLetters:
    """Dead letters in a list, for tests: pass it as ``dead_letters``.

    Example::

        dead = MemoryDeadLetters()
        nursery.start_soon(partial(process, realtime.events, handle, max_attempts=3, dead_letters=dead))
        await kadoa.wait_settled()
        assert [letter.attempts for letter in dead.letters] == [3]
    """

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []
        """The letters, oldest first."""
        self.fault: Exception | None = None
        """What `add` raises instead of keeping the letter, as a full disk would; None to keep it."""

    def __repr__(self) -> str:
        return f"<MemoryDeadLetters, {len(self.letters)} letters>"

    async def add(self, letter: DeadLetter) -> None:
        """Keep a letter. If cancelled, it is not kept."""
        await trio.lowlevel.checkpoint()
        if self.fault is not None:
            raise self.fault
        self.letters.append(letter)
