"""Positions across runs: the whole client with a store, its acknowledgements, and the gaps of a position."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from _receiving import receiving

from kadoa_trio import (
    ConfigurationError,
    ConnectionFailedError,
    ConsumerOwnedError,
    CursorSession,
    CursorStore,
    CursorStoreError,
    GapReason,
    Limits,
    MemoryCursorStore,
    OwnershipLostError,
    Position,
    Realtime,
    SQLiteCursorStore,
    Timeouts,
    open_realtime,
)
from kadoa_trio._engine._acks import Acknowledger
from kadoa_trio.notices import (
    AcknowledgementsPaused,
    AdmissionPaused,
    Notice,
    PositionNotSaved,
    PositionSaved,
    PossibleGap,
    Resumed,
    State,
)
from kadoa_trio.testing import SimulatedKadoa, open_simulated_kadoa

Clock = trio.testing.MockClock


@asynccontextmanager
async def connect(kadoa: SimulatedKadoa, **options: Any) -> AsyncIterator[Realtime]:
    """Open a client, and wait until the server has recorded its subscription."""
    made = len(kadoa.subscribed)
    async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, **options) as realtime:
        await kadoa.wait_subscribed(made + 1)
        yield realtime


async def take(realtime: Realtime, count: int) -> list[str]:
    """Receive *count* events and settle them."""
    with trio.fail_after(900):
        ids = [(await realtime.events.receive()).id for _ in range(count)]
    realtime.events.settle()
    return ids


def notices_of(realtime: Realtime, kind: type[Notice]) -> list[Notice]:
    found: list[Notice] = []
    with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
        while True:
            notice = realtime.notices.receive_nowait()
            if isinstance(notice, kind):
                found.append(notice)
    return found


class FaultyStore:
    """A store in memory whose saves and loads fail, hang or are slow, as a test sets them."""

    def __init__(self) -> None:
        self.inner = MemoryCursorStore()
        self.fault: Exception | None = None
        self.fault_after = 0
        """Saves that succeed before `fault` is raised."""
        self.delay = 0.0
        self.loaded: Exception | Position | str | None = None
        """What loading raises or returns instead of the position."""
        self.load_delay = 0.0
        self.loading = trio.Event()
        self.saved: list[Position] = []

    async def open(self, team: str, consumer: str) -> CursorSession:
        return FaultySession(self, await self.inner.open(team, consumer))


class FaultySession:
    def __init__(self, store: FaultyStore, inner: CursorSession) -> None:
        self.store = store
        self.inner = inner

    async def load(self) -> Position | None:
        self.store.loading.set()
        await trio.sleep(self.store.load_delay)
        if isinstance(self.store.loaded, Exception):
            raise self.store.loaded
        if self.store.loaded is not None:
            return self.store.loaded  # type: ignore[return-value]  # a store may do anything
        return await self.inner.load()

    async def save(self, position: Position) -> None:
        await trio.sleep(self.store.delay)
        if self.store.fault is not None and len(self.store.saved) >= self.store.fault_after:
            raise self.store.fault
        await self.inner.save(position)
        self.store.saved.append(position)

    async def aclose(self) -> None:
        await self.inner.aclose()


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_next_run_resumes_after_the_last_settled_event(kind: str, tmp_path: Path) -> None:
    store = MemoryCursorStore() if kind == "memory" else SQLiteCursorStore(tmp_path / "positions.db")
    async with open_simulated_kadoa() as kadoa:
        async with connect(kadoa, cursor_store=store) as realtime:
            events = kadoa.publish_many(10)
            await take(realtime, 4)
            assert (await realtime.events.receive()).id == events[4].id  # in hand, and not settled
        kadoa.publish_many(3)
        async with connect(kadoa, cursor_store=store) as realtime:
            assert await take(realtime, 9) == [event.id for event in kadoa.published[4:]]
            assert [notice.cursor for notice in notices_of(realtime, Resumed)] == [events[3].cursor]  # type: ignore[attr-defined]
            gaps = realtime.statistics().gaps
        async with connect(kadoa, cursor_store=store) as realtime:
            event = kadoa.publish()
            assert await take(realtime, 1) == [event.id]  # and nothing again, though no cursor has moved
    assert gaps == ()  # a first start is no gap


async def test_position_is_saved_behind_the_events(autojump_clock: Clock) -> None:
    store = FaultyStore()
    async with open_simulated_kadoa() as kadoa, connect(kadoa, cursor_store=store) as realtime:
        first = store.saved[0]
        assert first == Position(team="team-1", cursor_at=first.cursor_at)
        assert first.cursor_at is not None  # so that a crash before any event leaves a gap since then
        events = kadoa.publish_many(300)
        await take(realtime, 300)
        await trio.sleep(1)
        assert store.saved[-1].cursor == events[-1].cursor
        assert len(store.saved) < 10  # many settlements are one save
        await trio.sleep(600)
        assert 9 <= len(store.saved) < 30  # the time of life is still saved


async def test_first_position_is_saved_before_anything_is_subscribed_to(autojump_clock: Clock) -> None:
    store = FaultyStore()
    store.delay = 5
    async with open_simulated_kadoa() as kadoa, trio.open_nursery() as nursery:

        async def run() -> None:
            async with connect(kadoa, cursor_store=store):
                assert store.saved
                store.delay = 0

        nursery.start_soon(run)
        await trio.sleep(4)
        assert kadoa.handshakes == 0


async def test_saves_never_pass_what_is_unsettled(autojump_clock: Clock) -> None:
    store = FaultyStore()
    async with open_simulated_kadoa() as kadoa, connect(kadoa, cursor_store=store) as realtime:
        events = kadoa.publish_many(5)
        first = realtime.events.delivery()
        async with first:
            await take(realtime, 4)
            await trio.sleep(5)
            assert store.saved[-1].cursor is None
            assert store.saved[-1].settled == ()  # without a cursor nothing can be replayed, and no id is needed
        await trio.sleep(5)
        assert store.saved[-1].cursor == events[-1].cursor
        more = kadoa.publish_many(5)
        async with realtime.events.delivery():
            await take(realtime, 4)
            await trio.sleep(5)
            assert store.saved[-1].cursor == events[-1].cursor
            assert set(store.saved[-1].settled) == {event.id for event in more[1:]}
        await trio.sleep(5)
        assert store.saved[-1].cursor == more[-1].cursor


async def test_key_of_another_team_does_not_resume(autojump_clock: Clock) -> None:
    store = MemoryCursorStore()
    async with open_simulated_kadoa() as kadoa:
        async with connect(kadoa, cursor_store=store) as realtime:
            kadoa.publish()
            await take(realtime, 1)
            position = realtime.position
        assert position.team == "team-1"
        kadoa.team_id = "team-2"
        async with connect(kadoa, cursor_store=store):
            assert (await kadoa.wait_subscribed(2)).last_cursor is None
        with pytest.raises(ConfigurationError, match="belongs to team"):
            async with connect(kadoa, resume_from=position):
                pass


async def test_second_client_is_refused_and_another_consumer_is_not(autojump_clock: Clock) -> None:
    store = MemoryCursorStore()
    async with open_simulated_kadoa() as kadoa, connect(kadoa, cursor_store=store):
        with pytest.raises(ConsumerOwnedError):
            async with connect(kadoa, cursor_store=store):
                pass
        async with connect(kadoa, cursor_store=store, consumer="other"):
            pass
        with pytest.raises(ConfigurationError, match="consumer"):
            async with connect(kadoa, cursor_store=store, consumer=""):
                pass
        with pytest.raises(ConfigurationError, match="one of them"):
            async with connect(kadoa, cursor_store=store, resume_from="1-1"):
                pass


# ---- starts that are cut short -------------------------------------------------------------------------------------


async def saved_position(kadoa: SimulatedKadoa, store: CursorStore) -> Position:
    """Have a client save a position with a cursor, and return it."""
    async with connect(kadoa, cursor_store=store) as realtime:
        kadoa.publish_many(3)
        await take(realtime, 3)
        await trio.sleep(20)
    session = await store.open("team-1", "default")
    position = await session.load()
    await session.aclose()
    assert position is not None
    assert position.cursor == kadoa.published[-1].cursor
    return position


@pytest.mark.parametrize("how", ["cancelled", "connect_timeout"])
async def test_start_that_is_cut_short_while_loading_saves_nothing(how: str, autojump_clock: Clock) -> None:
    store = FaultyStore()
    async with open_simulated_kadoa() as kadoa:
        position = await saved_position(kadoa, store)
        store.load_delay, store.loading = 1e6, trio.Event()
        if how == "cancelled":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(enter, kadoa, store)
                await store.loading.wait()
                nursery.cancel_scope.cancel()
        else:
            with pytest.raises(ConnectionFailedError):
                await enter(kadoa, store, timeouts=Timeouts(connect=5))
        assert store.inner.position() == position
        store.load_delay = 0
        async with connect(kadoa, cursor_store=store):  # and the ownership was released
            assert kadoa.subscribed[-1].last_cursor == position.cursor


async def enter(kadoa: SimulatedKadoa, store: CursorStore, **options: Any) -> None:
    async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=store, **options):
        raise AssertionError("entered")


@pytest.mark.parametrize(
    ("loaded", "why"),
    [
        (CursorStoreError("it is damaged"), "it is damaged"),
        (OSError("disk"), "OSError: disk"),
        ("text", "str"),
        (Position(team="team-9", cursor="9-9"), "of team team-9.*left as it is"),
    ],
    ids=["damaged", "disk", "no_position", "other_team"],
)
async def test_position_that_cannot_be_loaded_is_left_unchanged(loaded: Any, why: str, autojump_clock: Clock) -> None:
    store = FaultyStore()
    async with open_simulated_kadoa() as kadoa:
        position = await saved_position(kadoa, store)
        saves = len(store.saved)
        store.loaded = loaded
        with pytest.raises(CursorStoreError, match=why) as caught:
            await enter(kadoa, store)
        assert "left as it is" in str(caught.value)
        assert "default" in str(caught.value)
        assert store.inner.position() == position
        assert len(store.saved) == saves
        store.loaded = None
        async with connect(kadoa, cursor_store=store):  # and the ownership was released
            assert kadoa.subscribed[-1].last_cursor == position.cursor


async def test_load_that_hangs_is_an_error_that_says_so(autojump_clock: Clock) -> None:
    store = FaultyStore()
    async with open_simulated_kadoa() as kadoa:
        position = await saved_position(kadoa, store)
        store.load_delay = 1e6
        with pytest.raises(CursorStoreError, match="not loaded within 10 s"):
            await enter(kadoa, store)
        assert store.inner.position() == position


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_first_position_that_cannot_be_saved_is_an_error_of_entering(how: str, autojump_clock: Clock) -> None:
    store = FaultyStore()
    store.fault = OSError("disk full") if how == "fails" else None
    store.delay = 0 if how == "fails" else 1e6
    async with open_simulated_kadoa() as kadoa:
        with pytest.raises(CursorStoreError, match="disk full" if how == "fails" else "not saved within 10 s"):
            await enter(kadoa, store)
        assert not kadoa.subscribed
        assert store.inner.position() is None
        store.fault, store.delay = None, 0
        async with connect(kadoa, cursor_store=store):
            pass


def stored(path: Path) -> list[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT consumer, position FROM positions").fetchall()


def of_a_newer_version(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE positions SET position = replace(position, '\"version\": ', '\"version\": 9')")


async def save_position(path: Path, position: Position) -> None:
    session = await SQLiteCursorStore(path).open("team-1", "default")
    await session.save(position)
    await session.aclose()


async def test_position_of_a_newer_version_is_left_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    await save_position(path, Position(team="team-1", cursor="1-7"))
    of_a_newer_version(path)
    before = stored(path)
    async with open_simulated_kadoa() as kadoa:
        for _ in range(2):
            with pytest.raises(CursorStoreError, match="version 9"):
                await enter(kadoa, SQLiteCursorStore(path))
            assert stored(path) == before


async def test_refused_start_leaves_the_position_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    await save_position(path, Position(team="team-1", cursor="1-7"))
    before = stored(path)
    owner = await SQLiteCursorStore(path).open("team-1", "default")
    async with open_simulated_kadoa() as kadoa:
        with pytest.raises(ConsumerOwnedError):
            await enter(kadoa, SQLiteCursorStore(path))
    assert stored(path) == before
    await owner.aclose()


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope after a number of scheduler steps, counted from the call of `start`."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self.scope = scope
        self.left: int = steps
        self.running = False

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.running:
            self.left -= 1
            if self.left < 0:
                self.running = False
                self.scope.cancel()


class WatchedStore:
    """An SQLite store that reports when opening begins."""

    def __init__(self, path: Path, instrument: CancelAtStep) -> None:
        self.inner = SQLiteCursorStore(path)
        self.instrument = instrument

    async def open(self, team: str, consumer: str) -> CursorSession:
        self.instrument.running = True
        return await self.inner.open(team, consumer)


async def test_start_that_is_cancelled_at_any_step_leaves_the_position(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    await save_position(path, Position(team="team-1", cursor="1-7", settled=("e1",), recent=("e0",)))
    async with open_simulated_kadoa() as kadoa:
        for step in range(10_000):
            with trio.CancelScope() as scope:
                instrument = CancelAtStep(scope, step)
                trio.lowlevel.add_instrument(instrument)
                store = WatchedStore(path, instrument)
                async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=store):
                    instrument.running = False
            trio.lowlevel.remove_instrument(instrument)
            ((_, text),) = stored(path)
            position = Position.from_json(text)
            assert (position.cursor, position.settled, position.recent) == ("1-7", ("e1",), ("e0",)), step
            if instrument.left >= 0:
                break
    assert step > 20


# ---- stores that fail ----------------------------------------------------------------------------------------------


async def test_failing_store_is_reported_and_events_are_still_delivered(autojump_clock: Clock) -> None:
    store = FaultyStore()
    async with open_simulated_kadoa() as kadoa, connect(kadoa, cursor_store=store) as realtime:
        store.fault = CursorStoreError("disk full")
        kadoa.publish_many(50)
        await take(realtime, 50)
        await trio.sleep(60)
        failures = notices_of(realtime, PositionNotSaved)
        assert 5 < len(failures) < 20  # retried, and with backoff
        assert "disk full" in str(failures[0])
        assert realtime.statistics().unsaved == 50
        kadoa.publish()
        await take(realtime, 1)
        store.fault = None
        await trio.sleep(60)
        assert len(notices_of(realtime, PositionSaved)) == 1
        assert realtime.statistics().unsaved == 0
        assert store.saved[-1].cursor == kadoa.published[-1].cursor


async def test_last_position_that_is_not_saved_is_an_error_at_exit(autojump_clock: Clock) -> None:
    store = FaultyStore()
    async with open_simulated_kadoa() as kadoa:
        with pytest.raises(CursorStoreError, match=r"3 settled events will be delivered again: .*disk full"):
            async with connect(kadoa, cursor_store=store) as realtime:
                store.fault = OSError("disk full")
                kadoa.publish_many(3)
                await take(realtime, 3)
        with pytest.raises(ZeroDivisionError) as caught:
            async with connect(kadoa, cursor_store=FaultyStore()) as realtime:
                realtime._assembly.saver._store.fault = OSError("disk full")  # type: ignore[union-attr]
                kadoa.publish()
                await take(realtime, 1)
                raise ZeroDivisionError
        assert "disk full" in caught.value.__notes__[0]


async def test_save_that_hangs_does_not_delay_leaving(autojump_clock: Clock) -> None:
    store = FaultyStore()
    async with open_simulated_kadoa() as kadoa:
        with pytest.raises(CursorStoreError, match="did not end in time"):
            async with connect(kadoa, cursor_store=store) as realtime:
                kadoa.publish()
                await take(realtime, 1)
                store.delay = 1e6
                left = trio.current_time()
        assert trio.current_time() - left <= 2
        # The ownership was released anyway.
        store.delay = 0
        async with connect(kadoa, cursor_store=store):
            pass


async def test_save_that_hangs_counts_as_failed(autojump_clock: Clock) -> None:
    store = FaultyStore()
    async with open_simulated_kadoa() as kadoa, connect(kadoa, cursor_store=store) as realtime:
        store.delay = 1e6
        kadoa.publish()
        await take(realtime, 1)
        await trio.sleep(30)
        assert "within 10 s" in str(notices_of(realtime, PositionNotSaved)[0])
        store.delay = 0
        await trio.sleep(30)


async def test_admission_pauses_when_too_much_is_unsaved(autojump_clock: Clock) -> None:
    store = FaultyStore()
    async with (
        open_simulated_kadoa() as kadoa,
        connect(kadoa, cursor_store=store, limits=Limits(unsaved=5)) as realtime,
    ):
        store.fault = CursorStoreError("disk full")
        kadoa.publish_many(20)
        async with receiving(realtime) as received:
            await trio.sleep(120)
            # Events that were in the buffer before are delivered; none is admitted after them.
            count = len(received)
            kadoa.publish_many(20)
            await trio.sleep(120)
            assert len(received) <= max(count, 20)
            assert any(notice.oldest is None for notice in notices_of(realtime, AdmissionPaused))  # type: ignore[attr-defined]
            store.fault = None
            await trio.sleep(60)
            assert received == [event.id for event in kadoa.published]


async def test_unsaved_events_are_bounded_before_the_first_save(autojump_clock: Clock) -> None:
    store = FaultyStore()
    store.fault, store.fault_after = CursorStoreError("disk full"), 1  # that of the first start
    async with (
        open_simulated_kadoa() as kadoa,
        connect(kadoa, cursor_store=store, limits=Limits(unsaved=10)) as realtime,
    ):
        kadoa.publish_many(101)
        async with receiving(realtime) as received:
            await trio.sleep(120)
            assert len(received) == 10
            assert realtime.statistics().unsaved == 10
            (paused,) = notices_of(realtime, AdmissionPaused)
            assert "10 settled events are not saved" in str(paused)
            store.fault = None
            await trio.sleep(600)
            assert received == [event.id for event in kadoa.published]


async def test_event_in_hand_counts_towards_what_may_be_unsaved(autojump_clock: Clock) -> None:
    # Admitted events may be settled before the next save. An event that was returned is not admitted twice.
    store = FaultyStore()
    async with (
        open_simulated_kadoa() as kadoa,
        connect(kadoa, cursor_store=store, limits=Limits(unsaved=3)) as realtime,
    ):
        await trio.sleep(1)
        store.fault = CursorStoreError("disk full")
        kadoa.publish_many(9)
        await trio.sleep(1)
        with pytest.raises(ZeroDivisionError):
            async with realtime.events.delivery():
                raise ZeroDivisionError
        await trio.sleep(0.1)
        async with realtime.events.delivery() as delivery:
            assert delivery.attempt == 2
            assert realtime.statistics().received == 3
        async with receiving(realtime) as received:
            await trio.sleep(60)
            assert len(received) == 2
            store.fault = None
            await trio.sleep(60)
            assert len(received) == 8


async def test_file_that_is_deleted_while_it_is_used_is_reported_and_made_again(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    async with open_simulated_kadoa() as kadoa:
        async with connect(kadoa, cursor_store=SQLiteCursorStore(path)) as realtime:
            kadoa.publish()
            await take(realtime, 1)
            path.unlink()
            kadoa.publish()
            await take(realtime, 1)
            with trio.fail_after(60):
                async for notice in realtime.notices:
                    if isinstance(notice, PositionNotSaved):
                        assert f"{path}: the file was deleted" in str(notice)
                        assert "makes it again" in str(notice)
                    if isinstance(notice, PositionSaved):
                        break
            assert realtime.statistics().save_failures == 1
        kadoa.publish()
        async with connect(kadoa, cursor_store=SQLiteCursorStore(path)) as realtime:
            assert await take(realtime, 1) == [kadoa.published[-1].id]


async def test_file_that_was_deleted_is_made_again_by_the_last_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "positions.db"
    async with open_simulated_kadoa() as kadoa:
        async with connect(kadoa, cursor_store=SQLiteCursorStore(path)) as realtime:
            kadoa.publish()
            event = await realtime.events.receive()
            path.unlink()
            realtime.events.settle()
        assert "the file was deleted" in caplog.text
        kadoa.publish()
        async with connect(kadoa, cursor_store=SQLiteCursorStore(path)) as realtime:
            assert await take(realtime, 1) == [kadoa.published[-1].id] != [event.id]


async def test_fault_is_raised_though_the_program_leaves_at_the_same_moment(autojump_clock: Clock) -> None:
    async with open_simulated_kadoa() as kadoa:
        with pytest.raises(OwnershipLostError):
            async with connect(kadoa) as realtime:
                await realtime.wait_live()
                assert realtime._assembly.supervisor.fail(OwnershipLostError("another client saves here now"))


async def test_crash_of_a_background_task_is_raised_as_it_is(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(_self: Acknowledger) -> None:
        await trio.sleep(1)
        raise RuntimeError("a bug")

    monkeypatch.setattr(Acknowledger, "_run", crash)
    async with open_simulated_kadoa() as kadoa:
        with pytest.raises(RuntimeError, match="a bug"):
            async with connect(kadoa) as realtime:
                kadoa.publish()
                async for _event in realtime.events:
                    pass


async def test_lost_ownership_ends_the_client(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    async with (
        open_simulated_kadoa() as kadoa,
        connect(kadoa, cursor_store=SQLiteCursorStore(path)) as realtime,
        connect(kadoa, cursor_store=SQLiteCursorStore(path, take_over=True)) as successor,
    ):
        event = kadoa.publish()
        assert await take(realtime, 1) == [event.id]
        with pytest.raises(OwnershipLostError):
            await realtime.events.receive()
        assert await take(successor, 1) == [event.id]
        assert realtime.state is State.FAILED


async def test_store_that_cannot_be_opened_is_an_error_of_entering(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    path.write_text("a diary")
    async with open_simulated_kadoa() as kadoa:
        with pytest.raises(CursorStoreError, match="not a database"):
            async with connect(kadoa, cursor_store=SQLiteCursorStore(path)):
                pass
        assert not kadoa.subscribed


async def test_program_saves_effects_and_position_in_one_transaction(tmp_path: Path, autojump_clock: Clock) -> None:
    database = sqlite3.connect(tmp_path / "mine.db")
    with database:
        database.execute("CREATE TABLE effects (event TEXT)")
        database.execute("CREATE TABLE position (one INTEGER PRIMARY KEY CHECK (one = 1), json TEXT)")

    def saved() -> Position | None:
        row = database.execute("SELECT json FROM position").fetchone()
        return None if row is None else Position.from_json(row[0])

    async def run(count: int) -> None:
        async with connect(kadoa, resume_from=saved()) as realtime:
            if not kadoa.published:
                kadoa.publish_many(8)
            for _ in range(count):
                event = await realtime.events.receive()
                with database:
                    database.execute("INSERT INTO effects VALUES (?)", (event.id,))
                    position = realtime.position_after(event).to_json()
                    database.execute("INSERT OR REPLACE INTO position VALUES (1, ?)", (position,))
            with pytest.raises(ValueError, match="not in hand"):
                realtime.events.settle()
                realtime.position_after(event)

    async with open_simulated_kadoa() as kadoa:
        await run(4)
        await run(4)
        effects = [row[0] for row in database.execute("SELECT event FROM effects ORDER BY rowid")]
        assert effects == [event.id for event in kadoa.published]
    database.close()


async def test_position_after_refuses_while_other_events_are_in_hand(autojump_clock: Clock) -> None:
    async with open_simulated_kadoa() as kadoa, connect(kadoa) as realtime:
        await kadoa.wait_subscribed(1)
        events = kadoa.publish_many(3)
        async with realtime.events.delivery() as first:
            assert first.position == realtime.position_after(first.event)
            second = await realtime.events.receive()
            for event in (first.event, second):
                with pytest.raises(ValueError, match="1 other events are in hand"):
                    realtime.position_after(event)
            realtime.events.settle()
            with pytest.raises(ValueError, match="not in hand"):
                realtime.position_after(second)
            first.retry(after=60)
        # It waits to be delivered again, and does no harm.
        with pytest.raises(ValueError, match="an event of them is not in hand"):
            realtime.position_after(first.event)
        async with realtime.events.delivery() as third:
            foreseen = third.position
            assert foreseen.recent[-2:] == (events[1].id, events[2].id)
        position = realtime.position
        # Times are by the machine's clock, which virtual time does not stop.
        assert position == attrs.evolve(foreseen, last_life=position.last_life, cursor_at=position.cursor_at)


# ---- acknowledgements ----------------------------------------------------------------------------------------------


async def test_events_are_acknowledged_after_they_are_settled(autojump_clock: Clock) -> None:
    async with open_simulated_kadoa() as kadoa, connect(kadoa) as realtime:
        events = kadoa.publish_many(3)
        await realtime.events.receive()
        await trio.sleep(5)
        assert kadoa.acknowledged == []
        await realtime.events.receive()
        await trio.sleep(5)
        assert kadoa.acknowledged == [events[0].id]
        realtime.events.settle()
        kadoa.newest.deliver(events[0])  # a repetition is not acknowledged again
        await trio.sleep(5)
        assert kadoa.acknowledged == [events[0].id, events[1].id]
        assert realtime.statistics().acknowledged == 2


async def test_waiting_acknowledgements_are_sent_on_leaving(autojump_clock: Clock) -> None:
    async with open_simulated_kadoa() as kadoa:
        async with connect(kadoa) as realtime:
            kadoa.publish_many(50)
            await take(realtime, 50)
        assert sorted(kadoa.acknowledged) == sorted(str(event.id) for event in kadoa.published)


async def test_acknowledgements_can_be_turned_off(autojump_clock: Clock) -> None:
    async with open_simulated_kadoa() as kadoa:
        async with connect(kadoa, acknowledge=False) as realtime:
            kadoa.publish_many(3)
            await take(realtime, 3)
            await trio.sleep(5)
        assert kadoa.acknowledged == []


async def test_refusing_endpoint_suspends_acknowledgements_with_one_notice(autojump_clock: Clock) -> None:
    async with open_simulated_kadoa() as kadoa, connect(kadoa) as realtime:
        kadoa.faults.ack_status = 404
        for _ in range(30):
            kadoa.publish_many(10)
            await take(realtime, 10)
            await trio.sleep(60)
        statistics = realtime.statistics()
        assert len(notices_of(realtime, AcknowledgementsPaused)) == 1
        assert statistics.acknowledgements_failed < 60
        kadoa.heal()
        await trio.sleep(400)
        assert realtime.statistics().acknowledgements_waiting == 0
        assert realtime.statistics().acknowledged + statistics.acknowledgements_failed >= 300


async def test_hanging_endpoint_delays_neither_events_nor_leaving(autojump_clock: Clock) -> None:
    async with open_simulated_kadoa() as kadoa:
        kadoa.faults.ack_hang = True
        async with connect(kadoa) as realtime:
            kadoa.publish_many(12_000)
            began = trio.current_time()
            await take(realtime, 12_000)
            assert trio.current_time() - began < 1
            statistics = realtime.statistics()
            assert statistics.acknowledgements_waiting <= 10_000
            assert statistics.acknowledgements_dropped >= 1_000
            left = trio.current_time()
        assert trio.current_time() - left <= 2


# ---- gaps ----------------------------------------------------------------------------------------------------------


def lose_cursors(kadoa: SimulatedKadoa) -> None:
    kadoa.faults.without_cursors = True


async def test_crash_before_the_first_save_of_an_event_is_a_gap(autojump_clock: Clock) -> None:
    # The position that is saved before the first subscription holds the time since when.
    store = FaultyStore()
    async with open_simulated_kadoa() as kadoa:
        lose_cursors(kadoa)
        async with connect(kadoa, cursor_store=store) as realtime:
            pass
        kadoa.publish()
        async with connect(kadoa, cursor_store=store) as realtime:
            kadoa.publish()
            await take(realtime, 1)
            (gap,) = [notice.gap for notice in notices_of(realtime, PossibleGap)]  # type: ignore[attr-defined]
            assert gap.reason is GapReason.NO_CURSOR
            assert gap.since is not None
