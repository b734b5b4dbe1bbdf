"""Where positions outlive a process: the protocol of cursor stores, and the two that come along.

A position belongs to a team and a *consumer*, a name that the program gives.
Whoever opens it becomes its owner and gets a number, larger than every
earlier owner's; a save of an earlier owner is refused. So a process that was
thought dead, and is not, cannot take the position back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol, TypeVar, final

import attrs
import trio

from ._errors import ConsumerOwnedError, CursorStoreError, OwnershipLostError
from ._ledger import Position

_APPLICATION_ID: Final = 0x4B61646F  # "Kado": tells SQLite files of ours from others
_SCHEMA: Final = 1
_BUSY_TIMEOUT: Final = 1.0
"""How long a statement waits for another process that is writing, in seconds."""

T = TypeVar("T")


class CursorSession(Protocol):
    """The position of one team and consumer, owned. Used by one task at a time."""

    async def load(self) -> Position | None:
        """Return the last position that was saved, by whichever owner; None if there is none.

        Raises:
            CursorStoreError: it cannot be read.
        """
        ...

    async def save(self, position: Position) -> None:
        """Save a position, and return when a crash can no longer lose it.

        Cancellation may leave it saved or not; in part, never.

        Raises:
            OwnershipLostError: somebody else has become the owner. Nothing was saved.
            CursorStoreError: it could not be saved this time; the client tries again.
        """
        ...

    async def aclose(self) -> None:
        """Give the ownership up."""
        ...


class CursorStore(Protocol):
    """Something that keeps positions. Implement it to keep them in a place of your own."""

    async def open(self, team: str, consumer: str) -> CursorSession:
        """Become the owner of the position of *team* and *consumer*.

        Raises:
            ConsumerOwnedError: a client that lives owns it; say who.
            CursorStoreError: the store cannot be used.
        """
        ...


# ---- in memory -----------------------------------------------------------------------------------------------------


@final
class MemoryCursorStore:
    """Keeps positions as long as it lives itself: for tests, and for programs that open several clients in turn."""

    def __init__(self) -> None:
        self._positions: dict[tuple[str, str], Position] = {}
        self._owners: dict[tuple[str, str], int] = {}
        self._owned: set[tuple[str, str]] = set()

    def position(self, consumer: str = "default", *, team: str | None = None) -> Position | None:
        """Return the position that was saved last, or None; without *team*, the one of any team.

        Its cursor lags behind the settled events until the connection that
        brought them is stable, 10 s by default; their ids stand in it at once.
        """
        for (of_team, of_consumer), position in reversed(self._positions.items()):
            if of_consumer == consumer and team in (None, of_team):
                return position
        return None

    async def open(self, team: str, consumer: str) -> CursorSession:
        """Become the owner; see `CursorStore.open`."""
        await trio.lowlevel.checkpoint()
        key = (team, consumer)
        if key in self._owned:
            raise ConsumerOwnedError(f"another client in this process owns consumer {consumer!r} of team {team}")
        self._owned.add(key)
        self._owners[key] = number = self._owners.get(key, 0) + 1
        return _MemorySession(self, key, number)


@attrs.define(eq=False)
class _MemorySession:
    _store: MemoryCursorStore
    _key: tuple[str, str]
    _number: int

    async def load(self) -> Position | None:
        await trio.lowlevel.checkpoint()
        return self._store._positions.get(self._key)

    async def save(self, position: Position) -> None:
        await trio.lowlevel.checkpoint()
        if self._store._owners[self._key] != self._number:
            raise OwnershipLostError(f"consumer {self._key[1]!r} was taken over")
        self._store._positions[self._key] = position

    async def aclose(self) -> None:
        if self._store._owners[self._key] == self._number:
            self._store._owned.discard(self._key)
        await trio.lowlevel.checkpoint()


# ---- in a file -----------------------------------------------------------------------------------------------------


@final
class SQLiteCursorStore:
    """Keeps positions in an SQLite file: several consumers in one, and crash-safe.

    Ownership is a lock of the operating system on a file beside it, which
    ends with its process, however that ends. The database runs in WAL mode
    with ``synchronous=NORMAL``: a save survives the death of the process; one
    of the last moment may not survive a loss of power, after which its
    events are delivered again.

    Keep it on a local disk: locks on network file systems cannot be relied on.

    Args:
        path: the file; it is made if it is missing, its directory is not.
        take_over: own a consumer even if a living process does. For the case
            that the owner is frozen and cannot be killed; should it wake up,
            its saves are refused and it ends with `OwnershipLostError`.

    Opening raises `CursorStoreError` for a file that is damaged, of another
    program, or of a newer version of this library, and leaves it as it is.
    """

    def __init__(self, path: str | os.PathLike[str], *, take_over: bool = False) -> None:
        self._path = Path(path).absolute()
        self._take_over = take_over

    def __repr__(self) -> str:
        return f"<SQLiteCursorStore {str(self._path)!r}>"

    async def open(self, team: str, consumer: str) -> CursorSession:
        """Become the owner; see `CursorStore.open`. It is not cancelled in the middle, which takes a second at most."""
        return await trio.to_thread.run_sync(self._open, team, consumer)

    def _open(self, team: str, consumer: str) -> CursorSession:
        path = self._path
        with _explained(path):
            _create(path)
            _check(path)
        lock = _Lock(Path(f"{path}.{hashlib.sha256(json.dumps([team, consumer]).encode()).hexdigest()[:16]}.lock"))
        try:
            owner = lock.take(force=self._take_over)
        except OSError as exc:
            raise CursorStoreError(f"{path}: the lock beside it cannot be taken: {exc.strerror}") from None
        if owner is not None:
            raise ConsumerOwnedError(f"{path}: consumer {consumer!r} of team {team} is owned by {owner}")
        connection: sqlite3.Connection | None = None
        try:
            with _explained(path):
                connection = _connect(path)
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    (number,) = connection.execute(
                        "INSERT INTO positions (team, consumer, ownership, owner) VALUES (?, ?, 1, ?)"
                        " ON CONFLICT (team, consumer) DO UPDATE SET ownership = ownership + 1, owner = excluded.owner"
                        " RETURNING ownership",
                        (team, consumer, _identity()),
                    ).fetchone()
        except BaseException:
            if connection is not None:
                connection.close()
            lock.release()
            raise
        return _SQLiteSession(path, connection, lock, team, consumer, number)


@attrs.define(eq=False)
class _SQLiteSession:
    _path: Path
    _connection: sqlite3.Connection = attrs.field(repr=False)
    _lock: _Lock = attrs.field(repr=False)
    _team: str
    _consumer: str
    _number: int
    # One thread at a time; an abandoned one keeps its place until it ends.
    _limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1), repr=False)

    async def load(self) -> Position | None:
        text = await self._run(self._load)
        if text is None:
            return None
        try:
            return Position.from_json(text)
        except ValueError as exc:
            raise CursorStoreError(
                f"{self._path}: the position of consumer {self._consumer!r} cannot be read: {exc}"
            ) from None

    async def save(self, position: Position) -> None:
        await self._run(lambda: self._save(position.to_json()))

    async def aclose(self) -> None:
        self._lock.release()
        if self._limiter.borrowed_tokens:
            # A thread that hangs in a statement would be waited for. (Otherwise this would keep SQLite from tidying up.)
            self._connection.interrupt()
        await self._run(self._connection.close)

    async def _run(self, function: Callable[[], T]) -> T:
        def explained() -> T:
            with _explained(self._path):
                return function()

        # Abandoned when cancelled: SQLite's transactions see to it that a save is whole or not there.
        try:
            return await trio.to_thread.run_sync(explained, abandon_on_cancel=True, limiter=self._limiter)
        except trio.Cancelled:
            self._connection.interrupt()
            raise

    def _load(self) -> str | None:
        row = self._connection.execute(
            "SELECT position FROM positions WHERE team = ? AND consumer = ?", (self._team, self._consumer)
        ).fetchone()
        return None if row is None else row[0]

    def _save(self, text: str) -> None:
        with self._connection:
            saved = self._connection.execute(
                "UPDATE positions SET position = ?, saved_at = ? WHERE team = ? AND consumer = ? AND ownership = ?",
                (text, datetime.now(UTC).isoformat(), self._team, self._consumer, self._number),
            ).rowcount
        if not saved:
            (owner,) = self._connection.execute(
                "SELECT owner FROM positions WHERE team = ? AND consumer = ?", (self._team, self._consumer)
            ).fetchone() or ("somebody who has deleted it",)
            raise OwnershipLostError(f"{self._path}: consumer {self._consumer!r} was taken over by {owner}")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        # Every one of these leaves the file as it was.
        raise CursorStoreError(f"{path}: {exc}") from None
    except OSError as exc:
        raise CursorStoreError(f"{path}: {exc.strerror or exc}") from None


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path.as_uri() + "?mode=rw", uri=True, timeout=_BUSY_TIMEOUT, check_same_thread=False)
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _create(path: Path) -> None:
    """Make the file if there is none: beside its place, then moved there, so that nobody ever sees half of it."""
    if path.exists() and path.stat().st_size:
        return
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        connection = sqlite3.connect(draft)
        try:
            connection.executescript(
                f"""
                PRAGMA application_id = {_APPLICATION_ID};
                PRAGMA user_version = {_SCHEMA};
                CREATE TABLE positions (
                    team TEXT NOT NULL,
                    consumer TEXT NOT NULL,
                    ownership INTEGER NOT NULL,
                    owner TEXT NOT NULL,
                    position TEXT,
                    saved_at TEXT,
                    PRIMARY KEY (team, consumer)
                ) WITHOUT ROWID;
                PRAGMA journal_mode = WAL;
                """
            )
        finally:
            connection.close()
        if path.exists() and not path.stat().st_size:
            draft.replace(path)
        else:
            # Fails if another process was faster, whose file is as good.
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _check(path: Path) -> None:
    """Refuse a file that is not ours, without writing to it."""
    if not path.is_file():
        raise CursorStoreError(f"{path}: not a file")
    connection = sqlite3.connect(path.as_uri() + "?mode=ro", uri=True, timeout=_BUSY_TIMEOUT)
    try:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID:
            raise CursorStoreError(f"{path}: an SQLite database of another program")
        if version > _SCHEMA:
            raise CursorStoreError(
                f"{path}: made by a newer version of this library (schema {version}, this one knows {_SCHEMA})"
            )
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise CursorStoreError(f"{path}: damaged: {verdict}")
    finally:
        connection.close()


def _identity() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now(UTC).isoformat(timespec='seconds')}"


class _Lock:
    """A lock of the operating system, which ends with its process. The file says who holds it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def take(self, *, force: bool) -> str | None:
        """Take the lock; return who holds it if somebody else does and it is not to be taken by force."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                locked = _try_lock(file)
                if not locked and not force:
                    os.lseek(file, 0, os.SEEK_SET)
                    owner = os.read(file, 300).decode(errors="replace").strip()
                    os.close(file)
                    return owner or "a process that does not say"
                # Somebody may have taken the place of the file since it was opened.
                current = self._path.exists() and os.path.samestat(os.fstat(file), self._path.stat())
                if locked and current:
                    os.ftruncate(file, 0)
                    os.write(file, _identity().encode())
                    self._file = file
                    return None
                if current:
                    # By force: the holder keeps its lock, on a file that nobody looks at any more.
                    self._path.unlink(missing_ok=True)
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def release(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)


if sys.platform == "win32":  # pragma: no cover

    def _try_lock(file: int) -> bool:
        import msvcrt

        try:
            os.lseek(file, 1_000, os.SEEK_SET)  # beyond the text, which stays readable
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:

    def _try_lock(file: int) -> bool:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
