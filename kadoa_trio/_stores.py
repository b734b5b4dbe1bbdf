"""Cursor stores, which save positions for later runs: their protocol, one store in memory and one in an SQLite file.

A position belongs to a team and a *consumer*, a name that the program gives.
The client that opens the position becomes its owner and gets a number that is
larger than every earlier owner's; a save by an earlier owner is refused. So a
process that was thought dead, and is not, cannot move the position back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import stat
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn, Protocol, TypeVar, cast, final

import attrs
import trio

from ._checks import check_flag, path_of, refusal
from ._errors import ConsumerOwnedError, CursorStoreError, OwnershipLostError
from ._files import FileLock, identity
from ._position import Position
from ._redact import presentable

_APPLICATION_ID: Final = 0x4B61646F  # "Kado": marks an SQLite file as a cursor store
_SCHEMA: Final = 1
_BUSY_TIMEOUT: Final = 1.0
"""Maximum time that a statement waits for another process that is writing, in seconds."""
_OPEN_TIMEOUT: Final = 10.0
"""Maximum duration of opening, in seconds."""

T = TypeVar("T")


class CursorSession(Protocol):
    """The position of one team and consumer, owned. Used by one task at a time."""

    async def load(self) -> Position | None:
        """Return the last position that any owner has saved; None if there is none.

        Raises:
            CursorStoreError: the position cannot be read.
        """
        ...

    async def save(self, position: Position) -> None:
        """Save a position, and return when a crash can no longer lose it.

        If it is cancelled, the position is saved whole or not at all.

        Raises:
            OwnershipLostError: another client has become the owner. Nothing was saved.
            CursorStoreError: the position could not be saved this time; the client tries again.
        """
        ...

    async def aclose(self) -> None:
        """Release the ownership."""
        ...


class CursorStore(Protocol):
    """Saves positions for later runs. Implement it to save them in a place of your own."""

    async def open(self, team: str, consumer: str) -> CursorSession:
        """Become the owner of the position of *team* and *consumer*.

        Raises:
            ConsumerOwnedError: another client that still runs owns it; the message names that client.
            CursorStoreError: the store cannot be used.
        """
        ...


# ---- in memory -----------------------------------------------------------------------------------------------------


@final
class MemoryCursorStore:
    """Saves positions in memory: for tests, and for programs that open several clients one after the other."""

    def __init__(self) -> None:
        self._positions: dict[tuple[str, str], Position] = {}
        self._owners: dict[tuple[str, str], int] = {}
        self._owned: set[tuple[str, str]] = set()

    def position(self, consumer: str = "default", *, team: str | None = None) -> Position | None:
        """Return the position that was saved last, or None; without *team*, the one of any team.

        Its cursor lags behind the settled events until the connection that
        brought them is stable, 10 s by default; their ids are in it at once.
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
            raise ConsumerOwnedError(
                f"another client in this process owns consumer {consumer!r} of team {_shown(team)}"
            )
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
    """Saves positions in an SQLite file, for one or more consumers. A crash loses no save.

    Ownership is a lock of the operating system on a file beside the database.
    The operating system releases the lock when the process ends, by a crash,
    too. The database runs in WAL mode with ``synchronous=NORMAL``: a save
    survives a crash of the process. A loss of power may lose the newest
    saves; their events are delivered again.

    Use a local disk, because locks on network file systems are not reliable.

    Args:
        path: the file; it is created if it is missing, its directory is not.
        take_over: own a consumer even if another process that runs owns it.
            For an owner that hangs and cannot be killed: if it resumes, its
            saves are refused and it ends with `OwnershipLostError`.

    Raises:
        ConfigurationError: *path* is not a path, or *take_over* is neither
            True nor False.

    Opening raises `CursorStoreError` for a file that is damaged, belongs to
    another program, or was made by a newer version of this library; the file
    is not changed.

    A file that is deleted, replaced, truncated or overwritten while it is
    used makes the next save fail with an error that says so. The save after
    that opens the path again, as at a start: a missing or empty file is
    created again, a file that is not a store is refused and not changed.

    A process that was forked while a session is open does not share the
    ownership and cannot use the session.
    """

    def __init__(self, path: str | os.PathLike[str], *, take_over: bool = False) -> None:
        check_flag("take_over", take_over)
        self._path = path_of("the path of SQLiteCursorStore", path).absolute()
        self._take_over = take_over

    def __repr__(self) -> str:
        return f"<SQLiteCursorStore {str(self._path)!r}>"

    async def open(self, team: str, consumer: str) -> CursorSession:
        """Become the owner; see `CursorStore.open`.

        Cancellation does not wait for the disk. The thread that opens the
        file then releases the ownership as soon as it has it.

        Raises:
            ConsumerOwnedError: another client that still runs owns it.
            CursorStoreError: the file cannot be used, or opening takes longer
                than 10 s.
        """
        opening = _Opening(self._path, team, consumer, self._take_over)
        with trio.move_on_after(_OPEN_TIMEOUT):
            try:
                return await trio.to_thread.run_sync(
                    opening.run, abandon_on_cancel=True, limiter=_opening_limiter(self._path)
                )
            except BaseException:
                opening.abandon()
                raise
        raise CursorStoreError(
            f"{self._path}: not opened within {_OPEN_TIMEOUT:g} s, because the disk does not answer or an earlier opening "
            "of this file still waits for it; nothing was changed"
        )


def store_of(given: object) -> CursorStore | None:
    """Give the cursor store that an option names: itself, or `SQLiteCursorStore` for a path.

    Raises:
        ConfigurationError: it is neither.
    """
    if given is None:
        return None
    if isinstance(given, (str, os.PathLike)):
        return SQLiteCursorStore(path_of("cursor_store", given))
    if isinstance(given, type) or not callable(getattr(given, "open", None)):
        raise refusal("cursor_store", "a cursor store, the path of an SQLite file or None", given)
    return cast("CursorStore", given)


_opening_limiters: Final = trio.lowlevel.RunVar[weakref.WeakValueDictionary[Path, trio.CapacityLimiter]](
    "kadoa_trio._stores._opening_limiters"
)


def _opening_limiter(path: Path) -> trio.CapacityLimiter:
    """Give the limiter of the threads that open *path*.

    One thread for each path: a disk that hangs holds one thread, however
    often its store is opened, and none of Trio's default limiter.
    """
    try:
        limiters = _opening_limiters.get()
    except LookupError:
        limiters = weakref.WeakValueDictionary()
        _opening_limiters.set(limiters)
    # A thread that still runs holds a reference to its limiter.
    limiter = limiters.get(path)
    if limiter is None:
        limiter = limiters[path] = trio.CapacityLimiter(1)
    return limiter


class _Opening:
    """Opens a session in a thread. If the caller was cancelled meanwhile, the thread closes the session again."""

    def __init__(self, path: Path, team: str, consumer: str, force: bool) -> None:
        self._path = path
        self._team = team
        self._consumer = consumer
        self._force = force
        self._guard = threading.Lock()
        self._session: _SQLiteSession | None = None
        self._abandoned = False

    def run(self) -> _SQLiteSession:
        session = _open_session(self._path, self._team, self._consumer, self._force)
        with self._guard:
            abandoned = self._abandoned
            self._session = session
        if abandoned:
            session.discard()
        return session

    def abandon(self) -> None:
        """Close the session, now or when its thread has opened it. Never waits."""
        # Release the lock only when the thread has ended. Otherwise a thread that was delayed would take the ownership
        # from the next owner.
        with self._guard:
            self._abandoned = True
            session = self._session
        if session is not None:
            trio.lowlevel.start_thread_soon(session.discard, _ignore)


def _ignore(_outcome: object) -> None:
    pass


def _open_session(path: Path, team: str, consumer: str, force: bool) -> _SQLiteSession:
    # Two paths to one file have one lock; SQLite names its files beside it in the same way.
    path = Path(os.path.realpath(path))
    lock = FileLock(Path(f"{path}.{hashlib.sha256(json.dumps([team, consumer]).encode()).hexdigest()[:16]}.lock"))
    session = _SQLiteSession(path, lock, team, consumer)
    try:
        session.begin(force=force)
    except BaseException:
        lock.release()
        raise
    return session


@attrs.frozen
class _Identity:
    """Identifies the files at the paths of a database, to detect that one of them was replaced or changed."""

    file: tuple[int, int] | None
    beside: tuple[tuple[int, int] | None, ...]
    """SQLite's write-ahead log and its index. A save that goes into a deleted log is lost."""
    content: tuple[int, int, int]
    """Size and times of the file. SQLite changes the file only at a checkpoint, every 1,000 pages."""

    @classmethod
    def at(cls, path: Path) -> _Identity:
        found = _stat(path)
        return cls(
            _number(found),
            tuple(_number(_stat(Path(f"{path}{ending}"))) for ending in ("-wal", "-shm")),
            (0, 0, 0) if found is None else (found.st_size, found.st_mtime_ns, found.st_ctime_ns),
        )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _number(found: os.stat_result | None) -> tuple[int, int] | None:
    return None if found is None else (found.st_dev, found.st_ino)


_DAMAGE: Final = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
    }
)
"""SQLite's error codes after which a connection is not used again, because its open file may not be the one at the path."""


@attrs.define(eq=False)
class _SQLiteSession:
    _path: Path
    _lock: FileLock = attrs.field(repr=False)
    _team: str
    _consumer: str
    _number: int = 0
    _connection: sqlite3.Connection | None = attrs.field(default=None, repr=False)
    """None after the file was lost; the next save opens the path again."""
    _identity: _Identity | None = attrs.field(default=None, repr=False)
    _process: int = attrs.field(factory=os.getpid)
    # One thread at a time. An abandoned thread holds its token until it ends.
    _limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(1), repr=False)
    _guard: threading.Lock = attrs.field(factory=threading.Lock, repr=False)
    _busy: bool = False
    _leaving: bool = False

    async def load(self) -> Position | None:
        text = await self._run(self._load)
        if text is None:
            return None
        try:
            return Position.from_json(text)
        except (ValueError, RecursionError) as exc:
            raise CursorStoreError(
                f"{self._path}: the position of consumer {self._consumer!r} cannot be read: {_shown(str(exc))}"
            ) from None

    async def save(self, position: Position) -> None:
        await self._run(lambda: self._save(position.to_json()))

    async def aclose(self) -> None:
        if self._is_forked():
            await trio.lowlevel.checkpoint()
            return
        self._lock.release()
        with self._guard:
            self._leaving = True
            busy = self._busy
        if busy:
            # The thread closes the connection when its statement has ended.
            self._interrupt()
            async with self._limiter:
                return
        try:
            await trio.to_thread.run_sync(self.close, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        except BaseException:
            trio.lowlevel.start_thread_soon(self.close, _ignore)
            raise

    def discard(self) -> None:
        """Close a session that was not used. Blocks."""
        self._lock.release()
        self.close()

    async def _run(self, function: Callable[[], T]) -> T:
        if self._is_forked():
            raise CursorStoreError(
                f"{self._path}: process {self._process} owns consumer {self._consumer!r}, and process {os.getpid()} was "
                "forked from it and cannot use its session; nothing was read or saved. Open a client in each process"
            )

        def work() -> T:
            with self._guard:
                if self._leaving:
                    raise CursorStoreError(f"{self._path}: the session was closed")
                self._busy = True
            try:
                with _explained(self._path):
                    return function()
            finally:
                with self._guard:
                    self._busy = False
                    leaving = self._leaving
                if leaving:
                    self.close()

        # Abandoned when cancelled, because SQLite's transactions save the position whole or not at all.
        try:
            return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)
        except trio.Cancelled:
            self._interrupt()
            raise

    def _is_forked(self) -> bool:
        return os.getpid() != self._process

    def _interrupt(self) -> None:
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(sqlite3.ProgrammingError):  # closed meanwhile
                connection.interrupt()

    # ---- in a thread -----------------------------------------------------------------------------------------------

    def begin(self, *, force: bool = False) -> None:
        """Become the owner; also the owner of a new file after the file was lost."""
        path = self._path
        with _explained(path):
            _create(path)
            _check(path)
        if not self._lock.held():
            self._lock.release()
            try:
                owner = self._lock.take(force=force)
            except OSError as exc:
                raise CursorStoreError(
                    f"{path}: the lock file {self._lock.path} cannot be used: {exc.strerror or exc}"
                ) from None
            if owner is not None:
                raise ConsumerOwnedError(
                    f"{path}: consumer {self._consumer!r} of team {_shown(self._team)} is owned by {_shown(owner)}"
                )
        with _explained(path):
            before = _Identity.at(path)
            connection = _connect(path)
            try:
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    # Larger than every number that this session had in a file that was lost.
                    (number,) = connection.execute(
                        "INSERT INTO positions (team, consumer, ownership, owner) VALUES (:team, :consumer, :number + 1, :owner)"
                        " ON CONFLICT (team, consumer) DO UPDATE"
                        " SET ownership = max(ownership, :number) + 1, owner = excluded.owner RETURNING ownership",
                        {
                            "team": self._team,
                            "consumer": self._consumer,
                            "owner": identity(),
                            "number": self._number,
                        },
                    ).fetchone()
                opened = _Identity.at(path)
                if opened.file != before.file:
                    raise CursorStoreError(f"{path}: the file was replaced while it was opened; nothing was saved")
            except BaseException:
                connection.close()
                raise
        self._connection, self._number, self._identity = connection, number, opened

    def _load(self) -> str | None:
        assert self._connection is not None
        row = self._connection.execute(
            "SELECT position FROM positions WHERE team = ? AND consumer = ?", (self._team, self._consumer)
        ).fetchone()
        return None if row is None else row[0]

    def _save(self, text: str) -> None:
        if self._connection is None:
            self._begin_again()
        self._look()
        try:
            self._write(text)
        except sqlite3.Error as exc:
            if exc.sqlite_errorcode & 0xFF in _DAMAGE:
                self._disconnect(checkpoint=False)
            raise
        # Look again after the commit, because it may have gone into a file that was deleted meanwhile.
        self._look()

    def _begin_again(self) -> None:
        try:
            self.begin()
        except ConsumerOwnedError as exc:
            raise OwnershipLostError(f"{exc}, since the files of this client were removed") from None

    def _write(self, text: str) -> None:
        connection = self._connection
        assert connection is not None
        with connection:
            saved = connection.execute(
                "UPDATE positions SET position = ?, saved_at = ? WHERE team = ? AND consumer = ? AND ownership = ?",
                (text, datetime.now(UTC).isoformat(), self._team, self._consumer, self._number),
            ).rowcount
        if saved:
            return
        row = connection.execute(
            "SELECT ownership, owner FROM positions WHERE team = ? AND consumer = ?", (self._team, self._consumer)
        ).fetchone()
        if row is None:
            self._lose(
                f"the row of consumer {self._consumer!r} was deleted while it was used",
                "the next save writes it again",
                checkpoint=True,
            )
        if row[0] < self._number:
            self._lose(
                f"the file holds an older state of consumer {self._consumer!r} (owner {row[0]}, this client is owner "
                f"{self._number})",
                "the next save takes the ownership again",
                checkpoint=True,
            )
        raise OwnershipLostError(f"{self._path}: consumer {self._consumer!r} was taken over by {_shown(str(row[1]))}")

    def _look(self) -> None:
        """Raise if the file at the path is not the file that was opened. Takes microseconds if nothing has changed."""
        path, then, now = self._path, self._identity, _Identity.at(self._path)
        if now == then:
            return
        assert then is not None
        if now.file is None:
            self._lose("the file was deleted or moved away while it was used", "the next save makes it again")
        if now.file != then.file:
            self._lose("the file was replaced by another one while it was used", "the next save opens the new one")
        if now.beside != then.beside:
            self._lose(
                f"{path.name}-wal or {path.name}-shm was deleted or replaced while the file was used",
                "the next save opens the file again",
                checkpoint=True,  # SQLite still has the deleted log open: save what it holds of other consumers
            )
        if not now.content[0]:
            self._lose("the file was truncated while it was used", "the next save makes it again")
        try:
            _check(path)
        except sqlite3.OperationalError:
            raise  # locked, for example
        except (CursorStoreError, sqlite3.DatabaseError) as exc:
            self._lose(
                f"the file was overwritten while it was used ({_shown(str(exc).removeprefix(f'{path}: '))})",
                "it is left as it is; when it is moved away, the next save makes a new one",
            )
        self._identity = now

    def _lose(self, why: str, then: str, *, checkpoint: bool = False) -> NoReturn:
        self._disconnect(checkpoint=checkpoint)
        raise CursorStoreError(f"{self._path}: {why}: the position was not saved; {then}")

    def close(self) -> None:
        """Close the connection. Blocks."""
        if self._connection is not None:
            with contextlib.suppress(CursorStoreError, sqlite3.Error, OSError):
                self._look()
            self._disconnect()

    def _disconnect(self, *, checkpoint: bool = True) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with contextlib.suppress(sqlite3.Error):
            if not checkpoint:
                # Closing the last connection writes SQLite's log into the file, which may belong to another program now.
                # An interrupt prevents that: https://www.sqlite.org/c3ref/interrupt.html
                connection.interrupt()
            connection.close()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        # None of these errors has changed the file.
        raise CursorStoreError(f"{path}: {_shown(str(exc))}") from None
    except OSError as exc:
        raise CursorStoreError(f"{path}: {exc.strerror or exc}") from None


def _shown(text: str) -> str:
    """Make text of a server or a file safe to show: one line, printable, at most 200 characters."""
    return presentable(text, 200)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path.as_uri() + "?mode=rw", uri=True, timeout=_BUSY_TIMEOUT, check_same_thread=False)
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _create(path: Path) -> None:
    """Create a missing file: under another name first, then renamed, so that no process sees a half-written file."""
    found = _stat(path)
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise CursorStoreError(f"{path}: not a file")
    if found is not None and found.st_size:
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
        # SQLite must not replay the log of a deleted file, which a crash has left behind, into the new file:
        # https://www.sqlite.org/howtocorrupt.html, "Unlinking or renaming a database file while in use"
        for ending in ("-wal", "-shm", "-journal"):
            Path(f"{path}{ending}").unlink(missing_ok=True)
        if found is not None:
            draft.replace(path)  # an empty file
        else:
            # Fails if another process has created the file meanwhile; that file is used.
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _check(path: Path) -> None:
    """Refuse a file that is not a cursor store of this version, or is damaged, without writing to it."""
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
            raise CursorStoreError(f"{path}: damaged: {_shown(str(verdict))}")
    finally:
        connection.close()
