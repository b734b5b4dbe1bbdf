"""Cursor stores by themselves: ownership, what a save survives, and files that are damaged, replaced or not a store."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio
from _processes import started
from hypothesis import given
from hypothesis import strategies as st

from kadoa_trio import (
    ConsumerOwnedError,
    CursorStore,
    CursorStoreError,
    Gap,
    GapReason,
    MemoryCursorStore,
    OwnershipLostError,
    Position,
    SQLiteCursorStore,
    _stores,
    open_realtime,
)
from kadoa_trio._files import FileLock
from kadoa_trio.testing import open_simulated_kadoa

POSITION = Position(team="team-1", cursor="1742-3", settled=("e4", "é\n"), recent=("e1",))


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CursorStore:
    return MemoryCursorStore() if request.param == "memory" else SQLiteCursorStore(tmp_path / "positions.db")


async def test_what_was_saved_is_loaded_by_the_next_owner(store: CursorStore) -> None:
    session = await store.open("team-1", "a")
    assert await session.load() is None
    await session.save(POSITION)
    assert await session.load() == POSITION
    await session.aclose()
    session = await store.open("team-1", "a")
    assert await session.load() == POSITION
    await session.aclose()


async def test_positions_of_other_consumers_and_teams_are_separate(store: CursorStore) -> None:
    sessions = [await store.open(team, consumer) for team in ("t1", "t2") for consumer in ("a", "b")]
    for number, session in enumerate(sessions):
        await session.save(Position(cursor=f"1-{number}"))
    for number, session in enumerate(sessions):
        assert await session.load() == Position(cursor=f"1-{number}")
        await session.aclose()


async def test_second_owner_is_refused_by_name(store: CursorStore) -> None:
    session = await store.open("team-1", "a")
    with pytest.raises(ConsumerOwnedError, match=r"'a' of team team-1") as caught:
        await store.open("team-1", "a")
    if isinstance(store, SQLiteCursorStore):
        assert f"process {os.getpid()} on " in str(caught.value)
    await session.aclose()
    await (await store.open("team-1", "a")).aclose()


async def test_stale_owner_never_moves_the_position(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    old = await SQLiteCursorStore(path).open("team-1", "a")
    await old.save(Position(cursor="1-1"))
    new = await SQLiteCursorStore(path, take_over=True).open("team-1", "a")
    await new.save(Position(cursor="1-5"))
    with pytest.raises(OwnershipLostError, match="taken over by process"):
        await old.save(Position(cursor="1-2"))
    assert await new.load() == Position(cursor="1-5")
    # The new owner is still the owner after the earlier one has closed its session.
    await old.aclose()
    with pytest.raises(ConsumerOwnedError):
        await SQLiteCursorStore(path).open("team-1", "a")
    await new.aclose()


async def test_position_in_the_file_can_be_read_by_people(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    session = await SQLiteCursorStore(path).open("team-1", "a")
    await session.save(POSITION)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        ((text, version),) = connection.execute("SELECT position, ownership FROM positions").fetchall()
    assert '"cursor": "1742-3"' in text
    assert version == 1
    await session.aclose()


def other_program(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")


def newer(path: Path) -> None:
    trio.run(_make, path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def damaged(path: Path) -> None:
    trio.run(_make, path)
    data = bytearray(path.read_bytes())
    data[4096:] = b"\x07" * len(data[4096:])
    path.write_bytes(data)


async def _make(path: Path) -> None:
    session = await SQLiteCursorStore(path).open("team-1", "a")
    await session.save(POSITION)
    await session.aclose()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.write_bytes(b"no database, but a diary" * 100), "not a database"),
        (other_program, "another program"),
        (newer, "newer version"),
        (damaged, "damaged|malformed"),
        (lambda path: path.mkdir(), "not a file"),
    ],
    ids=["text", "other_program", "newer", "damaged", "directory"],
)
def test_file_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, make: object, why: str) -> None:
    path = tmp_path / "positions.db"
    make(path)  # type: ignore[operator]
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(CursorStoreError, match=why) as caught:
        trio.run(_make, path)
    assert str(path) in str(caught.value)
    assert before is None or path.read_bytes() == before


async def test_unreadable_position_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    await _make(path)
    good = '{"version": 1, "team": null, "cursor": null, "settled": [], "recent": [], "last_life": null, "gaps": []}'
    assert Position.from_json(good) == Position()
    for text in (
        "{}",
        "[",
        '"x"',
        '{"version": 2}',
        '{"version": 1}',
        good.replace('"cursor": null', '"cursor": 1'),
        good.replace('"settled": []', '"settled": [1]'),
        good.replace('"gaps": []', '"gaps": [{"since": null, "until": null, "reason": "NO_CURSOR", "cursor": null}]'),
    ):
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE positions SET position = ?", (text,))
        session = await SQLiteCursorStore(path).open("team-1", "a")
        with pytest.raises(CursorStoreError, match="cannot be read"):
            await session.load()
        await session.aclose()


async def test_empty_file_is_a_first_start(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    path.touch()
    await _make(path)
    assert path.stat().st_size


async def test_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CursorStoreError, match="No such file"):
        await SQLiteCursorStore(tmp_path / "no" / "positions.db").open("team-1", "a")


async def test_locked_database_is_a_temporary_error(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    session = await SQLiteCursorStore(path).open("team-1", "a")
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CursorStoreError, match="locked"):
            await session.save(POSITION)
        other.rollback()
    await session.save(POSITION)
    assert await session.load() == POSITION
    await session.aclose()


async def test_full_disk_is_a_temporary_error(tmp_path: Path) -> None:
    session = await SQLiteCursorStore(tmp_path / "positions.db").open("team-1", "a")
    await session.save(POSITION)
    connection = session._connection  # type: ignore[attr-defined]  # SQLite's own limit simulates a full disk
    connection.execute("PRAGMA max_page_count = 3")
    with pytest.raises(CursorStoreError, match="full"):
        await session.save(Position(cursor="1742-9", recent=tuple(str(number) * 8 for number in range(1_000))))
    assert await session.load() == POSITION
    connection.execute("PRAGMA max_page_count = 1000000")
    await session.save(Position(cursor="1742-9"))
    assert await session.load() == Position(cursor="1742-9")
    await session.aclose()


OWNER = """
import sys, time, trio
from kadoa_trio import OwnershipLostError, Position, SQLiteCursorStore

async def main():
    session = await SQLiteCursorStore(sys.argv[1]).open("team-1", "a")
    await session.save(Position(cursor="1-1"))
    print("owned", flush=True)
    sys.stdin.readline()
    try:
        await session.save(Position(cursor="1-2"))
    except OwnershipLostError:
        print("lost", flush=True)
    else:
        print("saved", flush=True)

trio.run(main)
"""


@contextlib.contextmanager
def owner(path: Path) -> Iterator[subprocess.Popen[str]]:
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with started([sys.executable, "-c", OWNER, str(path)], **options) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        yield process


def test_crash_releases_the_ownership(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    with owner(path) as process:
        with pytest.raises(ConsumerOwnedError, match=f"process {process.pid} on"):
            trio.run(_make, path)
        process.kill()
        process.wait(10)
    trio.run(_make, path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot freeze a process")
def test_frozen_owner_that_wakes_up_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"

    async def succeed() -> None:
        session = await SQLiteCursorStore(path, take_over=True).open("team-1", "a")
        await session.save(Position(cursor="1-9"))
        process.send_signal(signal.SIGCONT)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout is not None
        assert await trio.to_thread.run_sync(process.stdout.readline) == "lost\n"
        assert await session.load() == Position(cursor="1-9")
        await session.aclose()

    with owner(path) as process:
        process.send_signal(signal.SIGSTOP)
        trio.run(succeed)


async def test_save_that_hangs_can_be_cancelled(tmp_path: Path) -> None:
    session = await SQLiteCursorStore(tmp_path / "positions.db").open("team-1", "a")
    with contextlib.closing(sqlite3.connect(tmp_path / "positions.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with trio.move_on_after(0.01) as scope:
            await session.save(POSITION)
        assert scope.cancelled_caught
        other.rollback()
    await session.save(POSITION)
    await session.aclose()
    assert not (tmp_path / "positions.db-wal").exists()


# ---- files at the paths --------------------------------------------------------------------------------------------

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")


async def lock_path(path: Path) -> Path:
    """Make a store, and return the path of its lock file."""
    await _make(path)
    (lock,) = path.parent.glob("*.lock")
    return lock


def link(lock: Path, victim: Path) -> None:
    lock.symlink_to(victim)


def dangling_link(lock: Path, victim: Path) -> None:
    lock.symlink_to(victim.with_name("new"))


def hard_link(lock: Path, victim: Path) -> None:
    os.link(victim, lock)


def fifo(lock: Path, victim: Path) -> None:
    os.mkfifo(lock)


def text(lock: Path, victim: Path) -> None:
    lock.write_text("mine")


@posix
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (link, "symbolic link"),
        (dangling_link, "symbolic link"),
        (hard_link, "not a lock file"),
        (fifo, "not a regular file"),
        (text, "not a lock file"),
    ],
)
async def test_lock_file_that_is_not_ours_is_refused_and_left_alone(
    make: Callable[[Path, Path], None], why: str, tmp_path: Path
) -> None:
    path, victim = tmp_path / "positions.db", tmp_path / "victim"
    lock = await lock_path(path)
    lock.unlink()
    victim.write_text("precious")
    make(lock, victim)
    with trio.fail_after(60), pytest.raises(CursorStoreError, match=why) as caught:
        await SQLiteCursorStore(path).open("team-1", "a")
    assert str(lock) in str(caught.value)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "new").exists()
    if make is text:
        assert lock.read_text() == "mine"


@posix
async def test_files_can_be_read_by_their_user_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        session = await SQLiteCursorStore(tmp_path / "positions.db").open("team-1", "a")
    finally:
        os.umask(old)
    await session.aclose()
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}


@posix
async def test_client_that_is_refused_writes_nothing_into_the_lock_file(tmp_path: Path) -> None:
    import fcntl

    path = tmp_path / "positions.db"
    lock = await lock_path(path)
    lock.write_bytes(b"process 1 on \x1b[2Jhost\n")
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConsumerOwnedError) as caught:
            await SQLiteCursorStore(path).open("team-1", "a")
    assert lock.read_bytes() == b"process 1 on \x1b[2Jhost\n"
    assert str(caught.value).endswith("owned by process 1 on [2Jhost")  # no escape sequence reaches a terminal


@posix
@pytest.mark.parametrize("kind", ["fifo", "device"])
async def test_store_at_a_special_file_is_refused_and_leaves_it(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("needs root")
    with trio.fail_after(60), pytest.raises(CursorStoreError, match="not a file"):
        await SQLiteCursorStore(path).open("team-1", "a")
    assert not stat.S_ISREG(path.stat().st_mode)
    assert os.listdir(tmp_path) == ["positions.db"]


@posix
async def test_two_paths_to_one_file_have_one_owner(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    path, other = tmp_path / "disk" / "positions.db", tmp_path / "positions.db"
    other.symlink_to(path)  # to a file that does not exist yet
    session = await SQLiteCursorStore(other).open("team-1", "a")
    with pytest.raises(ConsumerOwnedError):
        await SQLiteCursorStore(path).open("team-1", "a")
    await session.save(POSITION)
    await session.aclose()
    session = await SQLiteCursorStore(path).open("team-1", "a")
    assert await session.load() == POSITION
    await session.aclose()


# ---- files that are lost while they are used -----------------------------------------------------------------------


def deleted(path: Path) -> None:
    path.unlink()


def all_deleted(path: Path) -> None:
    for one in path.parent.iterdir():
        one.unlink()


def moved_with_its_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.mkdir()


def replaced(path: Path) -> None:
    new = path.with_name("new")
    trio_free_store(new)
    os.replace(new, path)


def truncated(path: Path) -> None:
    os.truncate(path, 0)


def log_deleted(path: Path) -> None:
    Path(f"{path}-wal").unlink()


def index_replaced(path: Path) -> None:
    Path(f"{path}-shm").unlink()
    Path(f"{path}-shm").touch()


def row_deleted(path: Path) -> None:
    execute(path, "DELETE FROM positions")


def older_row(path: Path) -> None:
    execute(path, "UPDATE positions SET ownership = ownership - 1, owner = 'a backup'")


def execute(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


def trio_free_store(path: Path) -> None:
    """Make a store with a position of another run of the same consumer."""
    session = _stores._open_session(path, "team-1", "a", False)
    session._save(Position(cursor="1-1").to_json())
    session.discard()


@posix
@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (deleted, "was deleted or moved away"),
        (all_deleted, "was deleted or moved away"),
        (moved_with_its_directory, "was deleted or moved away"),
        (replaced, "was replaced by another one"),
        (truncated, "was truncated"),
        (log_deleted, "positions.db-wal or positions.db-shm was deleted"),
        (index_replaced, "positions.db-wal or positions.db-shm was deleted"),
        (row_deleted, "row of consumer 'a' was deleted"),
        (older_row, "older state of consumer 'a'"),
    ],
)
async def test_lost_file_fails_the_next_save_and_the_save_after_it_succeeds(
    lose: Callable[[Path], None], why: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "positions.db"
    await _make(path)
    session = await SQLiteCursorStore(path).open("team-1", "a")
    await session.save(Position(cursor="1-2"))
    await trio.to_thread.run_sync(lose, path)
    with pytest.raises(CursorStoreError, match=f"{why}.*not saved; the next save") as caught:
        await session.save(Position(cursor="1-3"))
    assert not isinstance(caught.value, OwnershipLostError)
    assert str(path) in str(caught.value)
    await session.save(Position(cursor="1-4"))
    await session.save(Position(cursor="1-5"))
    # The session is still the owner, or has become the owner again.
    with pytest.raises(ConsumerOwnedError):
        await SQLiteCursorStore(path).open("team-1", "a")
    assert position_on_disk(path) == Position(cursor="1-5")
    await session.aclose()
    session = await SQLiteCursorStore(path).open("team-1", "a")
    assert await session.load() == Position(cursor="1-5")
    await session.aclose()


@posix
async def test_file_that_is_deleted_during_a_save_fails_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "positions.db"
    session = await SQLiteCursorStore(path).open("team-1", "a")
    real = _stores._SQLiteSession._write

    def write(self: Any, text: str) -> None:
        real(self, text)
        path.unlink()

    monkeypatch.setattr(_stores._SQLiteSession, "_write", write)
    with pytest.raises(CursorStoreError, match="was deleted"):
        await session.save(POSITION)
    monkeypatch.undo()
    await session.save(POSITION)
    assert await session.load() == POSITION
    await session.aclose()


@posix
async def test_deleted_log_loses_no_position_of_other_consumers(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    session = await SQLiteCursorStore(path).open("team-1", "a")
    other = await SQLiteCursorStore(path).open("team-1", "b")
    await other.save(POSITION)
    await other.aclose()
    log_deleted(path)
    with pytest.raises(CursorStoreError, match=r"positions\.db-wal"):
        await session.save(Position(cursor="1-1"))
    await session.save(Position(cursor="1-2"))
    other = await SQLiteCursorStore(path).open("team-1", "b")
    assert await other.load() == POSITION
    await other.aclose()
    await session.aclose()


def position_on_disk(path: Path) -> Position:
    """Read the position as a process after a crash would: from a copy of what has a name."""
    script = (
        "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute("
        "'SELECT position FROM positions').fetchone()[0])"
    )
    copy = path.parent.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for ending in ("", "-wal"):
        subprocess.run(["cp", f"{path}{ending}", copy], check=True)  # no lock of this process is dropped
    command = [sys.executable, "-c", script, str(copy / path.name)]
    return Position.from_json(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


def with_text(path: Path) -> None:
    subprocess.run(["sh", "-c", 'printf %9999s diary > "$0"', str(path)], check=True)


def with_zeros(path: Path) -> None:
    size = path.stat().st_size
    subprocess.run(["sh", "-c", 'head -c "$1" /dev/zero > "$0"', str(path), str(size)], check=True)


def with_other_program(path: Path) -> None:
    other_program(path.with_name("theirs"))
    os.replace(path.with_name("theirs"), path)


@posix
@pytest.mark.parametrize("overwrite", [with_text, with_zeros, with_other_program])
async def test_overwritten_file_is_not_written_until_it_is_moved_away(
    overwrite: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "positions.db"
    await _make(path)
    session = await SQLiteCursorStore(path).open("team-1", "a")
    await session.save(Position(cursor="1-2"))
    overwrite(path)
    theirs = path.read_bytes()
    with pytest.raises(CursorStoreError, match=r"overwritten while it was used \(.*moved away|replaced by another one"):
        await session.save(Position(cursor="1-3"))
    for _ in range(3):
        with pytest.raises(CursorStoreError, match=r"not a database|another program|damaged|malformed"):
            await session.save(Position(cursor="1-3"))
    assert path.read_bytes() == theirs
    path.unlink()
    await session.save(Position(cursor="1-4"))
    await session.aclose()
    session = await SQLiteCursorStore(path).open("team-1", "a")
    assert await session.load() == Position(cursor="1-4")
    await session.aclose()


@posix
async def test_leaving_writes_nothing_into_a_file_that_was_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    await _make(path)
    session = await SQLiteCursorStore(path).open("team-1", "a")
    await session.save(Position(cursor="1-2"))
    with_text(path)
    theirs = path.read_bytes()
    await session.aclose()
    assert path.read_bytes() == theirs


@posix
async def test_log_of_a_deleted_file_is_not_played_back_into_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    with owner(path) as process:
        process.kill()
        process.wait(60)
    assert Path(f"{path}-wal").stat().st_size
    path.unlink()
    session = await SQLiteCursorStore(path).open("team-1", "a")
    assert await session.load() is None
    await session.aclose()


@posix
async def test_deleted_file_that_another_client_owns_now_ends_the_ownership(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    old = await SQLiteCursorStore(path).open("team-1", "a")
    await old.save(Position(cursor="1-1"))
    all_deleted(path)
    new = await SQLiteCursorStore(path).open("team-1", "a")
    await new.save(Position(cursor="1-5"))
    with pytest.raises(CursorStoreError, match="replaced"):
        await old.save(Position(cursor="1-2"))
    with pytest.raises(OwnershipLostError, match=f"owned by process {os.getpid()}"):
        await old.save(Position(cursor="1-2"))
    await old.aclose()
    assert await new.load() == Position(cursor="1-5")
    await new.aclose()


async def test_checkpoint_by_another_process_is_not_a_lost_file(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    session = await SQLiteCursorStore(path).open("team-1", "a")
    with contextlib.closing(sqlite3.connect(path)) as other:
        for number in range(10):
            await session.save(Position(cursor=f"1-{number}"))
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            if number == 5:
                other.execute("VACUUM")
    for number in range(1_500):  # and those of SQLite's own
        session._save(Position(cursor=f"2-{number}").to_json())  # type: ignore[attr-defined]
    assert await session.load() == Position(cursor="2-1499")
    await session.aclose()


# ---- forked processes ----------------------------------------------------------------------------------------------

FORKING_OWNER = """
import multiprocessing, os, sys, trio
from kadoa_trio import CursorStoreError, Position, SQLiteCursorStore

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # two processes write: whole lines

def child(session, path):
    try:
        trio.run(session.save, Position(cursor="1-2"))
    except CursorStoreError as exc:
        say("refused:", exc)
    trio.run(session.aclose)
    say("child", os.getpid())
    sys.stdin.read()  # until the test has ended
    os._exit(0)

async def main():
    session = await SQLiteCursorStore(sys.argv[1]).open("team-1", "a")
    await session.save(Position(cursor="1-1"))
    return session

session = trio.run(main)
if sys.argv[2] == "os":
    if not os.fork():
        child(session, sys.argv[1])
else:
    sys.stdin = None
    context = multiprocessing.get_context("fork")
    context.Process(target=child_with_stdin, args=(session, sys.argv[1]), daemon=False).start()
trio.run(session.save, Position(cursor="1-3"))
say("saved")
import time
time.sleep(600)
"""


@posix
@pytest.mark.parametrize("how", ["os", "multiprocessing"])
def test_forked_child_has_no_ownership_and_cannot_save(how: str, tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    script = FORKING_OWNER.replace(
        "child_with_stdin", "lambda session, path: (setattr(sys, 'stdin', os.fdopen(os.dup(0))), child(session, path))"
    )
    if how == "multiprocessing":
        # multiprocessing gives its children /dev/null as stdin; this one waits for the test's pipe.
        script = script.replace("sys.stdin = None", "pipe = os.dup(0)").replace(
            "os.fdopen(os.dup(0))", "os.fdopen(pipe)"
        )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, str(path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
        try:
            with pytest.raises(ConsumerOwnedError, match=f"process {process.pid} on"):
                trio.run(_make, path)
        finally:
            process.kill()
            process.wait(60)
        (child,) = (int(line.split()[1]) for line in said if line.startswith("child"))
        (refused,) = (line for line in said if line.startswith("refused"))
        assert f"process {process.pid} owns" in refused
        assert f"process {child} was forked from it" in refused
        os.kill(child, 0)  # it has outlived the owner
        session = _stores._open_session(path, "team-1", "a", False)
        assert Position.from_json(session._load() or "") == Position(cursor="1-3")
        session.discard()


@posix
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_fork_while_a_lock_is_taken_shares_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Between the opening of the file and the lock: the child has the file open, and no code of the child closes it.
    children: list[int] = []
    hold, end = os.pipe()
    real = _files_open()

    def open_and_fork(path: Path, flags: int) -> int:
        file: int = real(path, flags)
        if not children:
            child = os.fork()
            if not child:
                os.close(end)
                os.read(hold, 1)
                os._exit(0)
            children.append(child)
        return file

    monkeypatch.setattr("kadoa_trio._files.open_file", open_and_fork)
    lock = FileLock(tmp_path / "lock")
    assert lock.take() is None
    # As when the owner crashes: its descriptor is closed, and nothing is unlocked.
    assert lock._file is not None
    os.close(lock._file)
    try:
        assert FileLock(tmp_path / "lock").take() is None
    finally:
        os.close(end)
        os.close(hold)
        os.waitpid(children[0], 0)


def _files_open() -> Callable[[Path, int], int]:
    from kadoa_trio import _files

    return _files.open_file


# ---- disks that hang -----------------------------------------------------------------------------------------------


class Disk:
    """Makes a function of the store hang in its thread until `answer` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.hangs = threading.Event()
        self.answers = threading.Event()
        self.count = 0
        real = getattr(owner, name)

        def hanging(*args: Any) -> Any:
            self.count += 1
            self.hangs.set()
            assert self.answers.wait(60)
            return real(*args)

        monkeypatch.setattr(owner, name, hanging)

    async def wait_hanging(self) -> None:
        await trio.to_thread.run_sync(self.hangs.wait, 60)

    def answer(self) -> None:
        self.answers.set()


@contextlib.contextmanager
def hanging(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Iterator[Disk]:
    disk = Disk(monkeypatch, owner, name)
    try:
        yield disk
    finally:
        disk.answer()


@pytest.mark.parametrize("where", ["_create", "_connect"])
async def test_thread_of_a_cancelled_opening_releases_the_ownership(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "positions.db"
    await _make(path)
    with trio.fail_after(60), hanging(monkeypatch, _stores, where) as disk:
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(SQLiteCursorStore(path).open, "team-1", "a")
                await disk.wait_hanging()
                nursery.cancel_scope.cancel()
        # One thread waits for the disk. It uses no token of Trio's default limiter, which the program's own calls share.
        assert disk.count == 1
        assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
        disk.answer()
        # Waits for the thread, which has released its lock and closed its connection.
        session = await SQLiteCursorStore(path).open("team-1", "a")
        assert await session.load() == POSITION
        await session.aclose()
    assert not Path(f"{path}-wal").exists()


async def test_opening_that_ends_while_it_is_cancelled_releases_the_ownership(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    opening = _stores._Opening(path, "team-1", "a", False)
    session = await trio.to_thread.run_sync(opening.run)
    assert session._lock.held()
    opening.abandon()
    with trio.fail_after(60):
        while session._connection is not None:  # noqa: ASYNC110  # a thread closes it
            await trio.sleep(0.001)
    assert not session._lock.held()
    late = _stores._Opening(path, "team-1", "a", False)
    late.abandon()
    session = await trio.to_thread.run_sync(late.run)
    assert session._connection is None
    assert not session._lock.held()


async def test_opening_that_hangs_for_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stores, "_OPEN_TIMEOUT", 0.01)
    error = pytest.raises(CursorStoreError, match=r"not opened within 0.01 s, because the disk")
    with trio.fail_after(60), hanging(monkeypatch, _stores, "_create"), error:
        await SQLiteCursorStore(tmp_path / "positions.db").open("team-1", "a")


@pytest.mark.parametrize("where", ["_create", "_connect", "_load"])
async def test_disk_that_hangs_at_the_start_does_not_delay_leaving(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "positions.db"
    await _make(path)
    owner: Any = _stores._SQLiteSession if where == "_load" else _stores
    with trio.fail_after(60), hanging(monkeypatch, owner, where) as disk:
        async with open_simulated_kadoa() as kadoa:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_enter, kadoa.api_key, kadoa.endpoints, SQLiteCursorStore(path))
                await disk.wait_hanging()
                began = time.monotonic()
                nursery.cancel_scope.cancel()
            assert time.monotonic() - began < 30  # 2 s, on a machine that is not loaded; it hangs for 60
        disk.answer()
        monkeypatch.undo()
        session = await SQLiteCursorStore(path).open("team-1", "default")
        await session.aclose()
        session = await SQLiteCursorStore(path).open("team-1", "a")
        assert await session.load() == POSITION
        await session.aclose()


async def _enter(api_key: str, endpoints: Any, store: CursorStore) -> None:
    async with open_realtime(api_key, endpoints=endpoints, cursor_store=store):
        raise AssertionError("entered")


async def test_statement_that_hangs_closes_its_connection_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "positions.db"
    await _make(path)
    session = await SQLiteCursorStore(path).open("team-1", "a")
    with trio.fail_after(60), hanging(monkeypatch, _stores._SQLiteSession, "_load") as disk:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.load)
            await disk.wait_hanging()
            nursery.cancel_scope.cancel()
        with trio.move_on_after(0.01) as scope:
            await session.aclose()
        assert scope.cancelled_caught
        assert session._connection is not None  # type: ignore[attr-defined]
        # The ownership is free at once, although the thread still hangs.
        new = await SQLiteCursorStore(path).open("team-1", "a")
        disk.answer()
        async with session._limiter:  # type: ignore[attr-defined]
            assert session._connection is None  # type: ignore[attr-defined]
        with pytest.raises(CursorStoreError, match="was closed"):
            await session.load()
        assert await new.load() == POSITION
        await new.aclose()
    assert not Path(f"{path}-wal").exists()


async def test_closing_in_a_cancelled_scope_closes(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    session = await SQLiteCursorStore(path).open("team-1", "a")
    with trio.CancelScope() as scope:
        scope.cancel()
        await session.aclose()
    with trio.fail_after(60):
        while Path(f"{path}-wal").exists():  # noqa: ASYNC110  # a thread closes it
            await trio.sleep(0.001)
    await _make(path)


times = st.datetimes(timezones=st.just(UTC))
gaps = st.builds(
    Gap,
    since=st.none() | times,
    until=times,
    reason=st.sampled_from(GapReason),
    cursor=st.none() | st.text(),
)
ids = st.lists(st.text(), max_size=5).map(tuple)


@given(
    st.builds(
        Position,
        team=st.none() | st.text(),
        cursor=st.none() | st.text(),
        settled=ids,
        recent=ids,
        cursor_at=st.none() | times,
        last_life=st.none() | times,
        promised=st.booleans(),
        gaps=st.lists(gaps, max_size=3).map(tuple),
        unproved=ids,
    )
)
def test_position_survives_json(position: Position) -> None:
    assert Position.from_json(position.to_json()) == position


@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["version", "team", "cursor", "settled", "recent", "cursor_at", "last_life", "gaps"]),
                inner,
            )
        ),
    )
)
def test_json_of_anything_but_a_position_is_a_value_error(data: object) -> None:
    with contextlib.suppress(ValueError):
        Position.from_json(json.dumps(data))


def test_position_of_a_newer_version_says_so() -> None:
    with pytest.raises(ValueError, match="version 2"):
        Position.from_json('{"version": 2}')


def test_times_have_an_offset() -> None:
    naive = Position(last_life=datetime(2026, 1, 1)).to_json()  # that is the point
    with pytest.raises(ValueError, match="offset"):
        Position.from_json(naive)
