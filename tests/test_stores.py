"""Cursor stores by themselves: ownership, what a save is worth, and files that are not what they should be."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
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
)

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


async def test_consumers_and_teams_are_apart(store: CursorStore) -> None:
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
    # The successor is an owner like any other, even when the one before it goes at last.
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


async def test_empty_file_is_as_good_as_none(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    path.touch()
    await _make(path)
    assert path.stat().st_size


async def test_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CursorStoreError, match="No such file"):
        await SQLiteCursorStore(tmp_path / "no" / "positions.db").open("team-1", "a")


async def test_locked_database_is_an_error_that_passes(tmp_path: Path) -> None:
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


async def test_full_disk_is_an_error_that_passes(tmp_path: Path) -> None:
    session = await SQLiteCursorStore(tmp_path / "positions.db").open("team-1", "a")
    await session.save(POSITION)
    connection = session._connection  # type: ignore[attr-defined]  # SQLite's own limit stands for a disk
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


def owner(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "owned\n"
    return process


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


async def test_save_that_hangs_can_be_left(tmp_path: Path) -> None:
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
        last_life=st.none() | times,
        gaps=st.lists(gaps, max_size=3).map(tuple),
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
                st.sampled_from(["version", "team", "cursor", "settled", "recent", "last_life", "gaps"]), inner
            )
        ),
    )
)
def test_anything_else_is_a_value_error(data: object) -> None:
    with contextlib.suppress(ValueError):
        Position.from_json(json.dumps(data))


def test_position_of_a_newer_version_says_so() -> None:
    with pytest.raises(ValueError, match="version 2"):
        Position.from_json('{"version": 2}')


def test_times_have_an_offset() -> None:
    naive = Position(last_life=datetime(2026, 1, 1)).to_json()  # that is the point
    with pytest.raises(ValueError, match="offset"):
        Position.from_json(naive)
