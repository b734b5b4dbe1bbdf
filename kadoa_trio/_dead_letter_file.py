"""Dead letters in a file: `DeadLetterFile`."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any, final

from ._checks import check_callable
from ._dead_letters import MAX_REASON, DeadLetter, reason_of
from ._events import Event, parse_json, write_time
from ._letters import LetterFile, Replayed, body_of_letter, file_of
from ._net._wire import decode
from ._redact import presentable
from ._webhooks import strict_json, webhook_body


@final
class DeadLetterFile:
    """Dead letters in a file, one JSON object per line, as those of `Forwarder`.

    Each line has ``failedAt``, ``attempts``, ``why`` and ``event``, the event
    in the shape of Kadoa's webhooks. ``kadoa-trio forward --replay`` can post
    them, and `replay` hands them to a function. Several processes may add
    letters to one file at the same time, and replay it.

    Args:
        path: the file. It is created with the first letter, readable by its
            owner only. A symbolic link is refused.

    Raises:
        ConfigurationError: *path* cannot be the path of a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = LetterFile(file_of("path", path))

    def __repr__(self) -> str:
        return f"DeadLetterFile({str(self._file.path)!r})"

    async def add(self, letter: DeadLetter) -> None:
        """Append a letter; when this returns, no crash can lose it.

        If cancelled, it waits for the disk, and the letter is there as a whole or not at all.

        Raises:
            DeadLetterError: the file cannot be written.
        """
        await self._file.append(_line(letter))

    async def replay(self, handle: Callable[[Event], Awaitable[object]]) -> Replayed:
        """Hand the events to *handle* again, oldest first. An event for which it raises stays in the file.

        Letters that are added meanwhile are left to the next replay. After a
        crash, or if it was cancelled, the next replay continues with the
        letters that are left: none is lost, and maximum one is handed out twice.
        The events have no cursor, and the payload and the id that the letter has.

        Args:
            handle: an async function that takes an `Event`.

        Returns:
            How many it has handled, and how many are left.

        Raises:
            DeadLetterError: there is no such file, it cannot be read or
                written, or another replay of it is running.
        """
        check_callable("handle", handle)

        async def deliver(line: bytes) -> bool | None:
            body = body_of_letter(line)
            event = None if body is None else _event_of(body)
            if event is None:
                return None
            try:
                await handle(event)
            except Exception as exc:
                await self._file.append(_again(line, exc))
                return False
            return True

        return await self._file.replay(deliver)


def _line(letter: DeadLetter) -> bytes:
    head = {
        "failedAt": write_time(letter.failed_at),
        "attempts": letter.attempts,
        "why": presentable(letter.reason, MAX_REASON),
    }
    return strict_json(head)[:-1] + b',"event":' + strict_json(webhook_body(letter.event)) + b"}"


def _event_of(body: dict[str, Any]) -> Event | None:
    frame = {"eventType": body["eventType"], "id": body["id"], "timestamp": body.get("timestamp")}
    event = decode(json.dumps({**frame, "message": body.get("data")}))
    return event if isinstance(event, Event) else None


def _again(line: bytes, error: Exception) -> bytes:
    """Write the letter of an event that has failed again: one more attempt, and the newest reason."""
    letter = parse_json(line)
    attempts = letter.get("attempts")
    letter["attempts"] = attempts + 1 if isinstance(attempts, int) else 1
    letter["why"] = reason_of(error)
    return strict_json(letter)
