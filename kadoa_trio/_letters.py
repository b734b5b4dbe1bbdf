"""A file of dead letters: programs append lines to it, and a replay takes lines out, at the same time.

There are other files beside it, for a while::

    FILE.lock            locked while a letter is appended or the file is set aside
    FILE.replaying.lock  locked while a replay runs
    FILE.replaying       the letters that the replay has set aside
    FILE.replayed        the number of its lines that are done

Letters are appended to the file that has the name at that time, and it is set
aside only while no letter is being appended, so no letter can be added to a
file that a replay has read. If a replay is killed at any moment, the next one
continues with the lines that are left: no letter is lost, and maximum one is
delivered twice.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar, final

import attrs
import trio

from ._checks import path_of
from ._errors import ConfigurationError, DeadLetterError
from ._events import parse_json
from ._files import FileLock, open_file, sync_directory

_LOCK_TIMEOUT: Final = 10.0
"""Maximum time to wait for another process's lock, in seconds; an append takes milliseconds."""
_LOCK_INTERVAL: Final = 0.01
"""Time between attempts to take the lock, in seconds."""
_MAX_COUNT: Final = 20
"""Maximum length of the text of a count, in bytes."""

T = TypeVar("T")


@final
@attrs.frozen(kw_only=True)
class Replayed:
    """The result of replaying a file of dead letters."""

    delivered: int
    remaining: int
    """Letters that failed again and stay in the file, with those that are unreadable."""
    unreadable: int = 0
    """Lines that are no dead letter; they are part of `remaining`."""


def file_of(name: str, value: object) -> Path:
    """Give the path of a file that was given as a string or a path object."""
    path = path_of(name, value)
    if not path.name:
        raise ConfigurationError(f"{name} must be the path of a file, not of a directory")
    return path


def body_of_letter(line: bytes) -> dict[str, Any] | None:
    """Return the event of a letter, in the shape of a webhook; None if the line is no letter."""
    try:
        letter = parse_json(line)
    except (ValueError, RecursionError):
        return None
    body = letter.get("event") if isinstance(letter, dict) else None
    if isinstance(body, dict) and isinstance(body.get("eventType"), str) and isinstance(body.get("id"), str):
        return body
    return None


class LetterFile:
    """A file of dead letters.

    Args:
        path: the file. It is created with the first letter, readable by its owner only.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self._working = path.with_name(path.name + ".replaying")
        self._done = path.with_name(path.name + ".replayed")
        self._lock = path.with_name(path.name + ".lock")
        self._replay_lock = FileLock(path.with_name(path.name + ".replaying.lock"))

    async def append(self, line: bytes) -> None:
        """Append a line; when this returns, no crash can lose it. After a cancellation it may or may not be appended.

        Raises:
            DeadLetterError: it could not be appended.
        """
        await self._exclusively(lambda: _append(self.path, line))

    async def replay(self, deliver: Callable[[bytes], Awaitable[bool | None]]) -> Replayed:
        """Deliver the letters again, in order. Those that `replay` of another process has left come first.

        Letters that are appended meanwhile are left to the next replay.

        Args:
            deliver: called with each line. It returns whether the letter was
                delivered; False if it has appended the letter again; None for
                a line that is no letter, which is appended again here.

        Raises:
            DeadLetterError: the file cannot be read or written, or another
                replay of it is running.
        """
        await self.begin_replay()
        try:
            total = Replayed(delivered=0, remaining=0)
            if await self.has_unfinished():
                # The letters that an earlier replay has left come first, because they are older.
                total = await self._replay_unfinished(deliver)
                if not await self.has_letters():
                    return total
            await self.set_aside()
            newer = await self._replay_unfinished(deliver)
        finally:
            self.end_replay()
        return Replayed(
            delivered=total.delivered + newer.delivered, remaining=newer.remaining, unreadable=newer.unreadable
        )

    async def _replay_unfinished(self, deliver: Callable[[bytes], Awaitable[bool | None]]) -> Replayed:
        delivered = remaining = unreadable = number = 0
        file, skip = await self.open_unfinished()
        with file:
            while line := await self.next_line(file):
                number += 1
                if number <= skip or not line.strip():
                    continue
                match await deliver(line):
                    case None:
                        unreadable += 1
                        await self.append(line.rstrip(b"\n"))
                    case True:
                        delivered += 1
                    case False:
                        remaining += 1
                # So that a crash does not repeat it.
                await self.write_done(number)
        await self.remove_unfinished()
        return Replayed(delivered=delivered, remaining=remaining + unreadable, unreadable=unreadable)

    async def begin_replay(self) -> None:
        """Become the only replay of the file, until `end_replay`. Fails, instead of waiting, if another one runs.

        Raises:
            DeadLetterError: another replay of it is running, or there is nothing to replay.
        """
        owner = await _guarded(self._begin_replay)
        if owner is not None:
            raise DeadLetterError(f"{self.path}: another replay of it is running, in {owner}; no letter was posted")

    def _begin_replay(self) -> str | None:
        # First, so that no lock file is made where there is no file to replay.
        if not os.path.lexists(self._working):
            os.close(open_file(self.path, os.O_RDONLY))
        return self._replay_lock.take()

    def end_replay(self) -> None:
        """Allow other replays of the file."""
        self._replay_lock.release(remove=True)

    async def has_unfinished(self) -> bool:
        """Return whether an earlier replay has left letters."""
        return await _guarded(lambda: os.path.lexists(self._working))

    async def has_letters(self) -> bool:
        """Return whether the file exists, with letters that were appended since it was set aside."""
        return await _guarded(lambda: os.path.lexists(self.path))

    async def set_aside(self) -> None:
        """Set the file aside for this replay; letters that are appended from now on are in a new file."""
        await self._exclusively(self._set_aside)

    def _set_aside(self) -> None:
        # The count is valid only for the file that is set aside, so it is removed before the next file is set aside,
        # and after the last one is removed.
        os.close(open_file(self.path, os.O_RDONLY))
        _read_count(self._done)  # raises for a file that is not a count
        self._done.unlink(missing_ok=True)
        self.path.rename(self._working)
        sync_directory(self.path.parent)

    async def open_unfinished(self) -> tuple[BinaryIO, int]:
        """Open the file that was set aside, and return it with the number of its lines that are done."""
        done = await _guarded(lambda: _read_count(self._done))
        return await _guarded(lambda: open(open_file(self._working, os.O_RDONLY), "rb")), done

    async def next_line(self, file: BinaryIO) -> bytes:
        """Read the next line, with its end; empty at the end of the file."""
        return await _guarded(file.readline)

    async def write_done(self, count: int) -> None:
        """Record the number of lines that are done, so that a crash does not repeat them."""
        await _guarded(lambda: _write_count(self._done, count))

    async def remove_unfinished(self) -> None:
        """Remove the file that was set aside, when all its lines are done."""
        await _guarded(self._remove_unfinished)

    def _remove_unfinished(self) -> None:
        self._working.unlink()
        self._done.unlink(missing_ok=True)

    async def _exclusively(self, function: Callable[[], None]) -> None:
        lock = FileLock(self._lock)
        owner: str | None = None

        def attempt() -> str | None:
            owner = lock.take()
            if owner is None:
                try:
                    function()
                finally:
                    lock.release(remove=True)
            return owner

        with trio.move_on_after(_LOCK_TIMEOUT):
            while (owner := await _guarded(attempt)) is not None:  # noqa: ASYNC110  # another process holds it
                await trio.sleep(_LOCK_INTERVAL)
            return
        raise DeadLetterError(
            f"{self.path}: not written, because {owner} has held the lock {self._lock} for {_LOCK_TIMEOUT:g} s"
        )


async def _guarded(function: Callable[[], T]) -> T:
    with _explained():
        # Not abandoned when cancelled, so that a letter is written as a whole or not at all.
        return await trio.to_thread.run_sync(function)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        what = f"{exc.filename}: {exc.strerror}" if exc.filename is not None and exc.strerror else str(exc)
        raise DeadLetterError(f"the dead letters cannot be read or written: {what}") from exc


def _append(path: Path, line: bytes) -> None:
    with open(open_file(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        torn = False
        if size:
            # A crash may have cut the last line. This one must not become a part of it.
            file.seek(size - 1)
            torn = file.read(1) != b"\n"
        unwritten = memoryview((b"\n" if torn else b"") + line + b"\n")
        while unwritten:
            unwritten = unwritten[file.write(unwritten) :]
        os.fsync(file.fileno())
    if not size:
        sync_directory(path.parent)


def _read_count(path: Path) -> int:
    try:
        with open(open_file(path, os.O_RDONLY), "rb") as file:
            return _count(file.read(_MAX_COUNT + 1), path)
    except FileNotFoundError:
        return 0


def _count(text: bytes, path: Path) -> int:
    if text and (len(text) > _MAX_COUNT or not text.isdigit()):
        raise OSError(None, "is not a count of this library", str(path))
    return int(text or b"0")


def _write_count(path: Path, count: int) -> None:
    # By a rename, so that the count is whole at any moment.
    new = path.with_name(path.name + ".new")
    with open(open_file(new, os.O_RDWR | os.O_CREAT), "r+b", buffering=0) as file:
        _count(file.read(_MAX_COUNT + 1), new)  # raises for a file that is not a count
        file.truncate(0)
        file.seek(0)
        file.write(str(count).encode())
        os.fsync(file.fileno())
    os.replace(new, path)
