"""The programs of docs/examples that handle, retry and store events: in virtual time, and as processes that are killed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import sqlite3
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
import trio
import trio.testing
from _loopback import read_head, serving
from _processes import Running, environment_without, running

from kadoa_trio import Event, MemoryCursorStore, Position, open_realtime
from kadoa_trio.testing import (
    MemoryDeadLetters,
    Schedule,
    SimulatedKadoa,
    make_event,
    open_simulated_kadoa,
    workflow_failed,
)

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
KILLS = 50
DAY = 24 * 3600.0
CHAOS = Schedule.chaos(7, seconds=DAY, every=600)
"""A day of faults, one each ten minutes on average."""

pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the documentation is not beside an installed package")


def load(name: str) -> ModuleType:
    """Import an example as a module, so that a test can replace its functions."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store() -> MemoryCursorStore:
    """In place of the store of an example, because threads do not run on virtual time."""
    return MemoryCursorStore()


def use_store(monkeypatch: pytest.MonkeyPatch, module: ModuleType, store: MemoryCursorStore) -> None:
    def opened(**options: Any) -> Any:
        assert options["cursor_store"] == "positions.db"
        return open_realtime(**{**options, "cursor_store": store})

    monkeypatch.setattr(module, "open_realtime", opened)


@asynccontextmanager
async def run(kadoa: SimulatedKadoa, main: Callable[..., Awaitable[object]], *arguments: object) -> AsyncIterator[None]:
    """Run a program in virtual time for the length of a block, then stop it with SIGTERM; it must end by itself."""
    subscribed, ended = len(kadoa.subscribed), trio.Event()

    async def program() -> None:
        await main(*arguments)
        ended.set()

    with kadoa.as_default(), trio.fail_after(7 * DAY):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(program)
            await kadoa.wait_subscribed(subscribed + 1)
            yield
            assert not ended.is_set(), "the program has ended before it was stopped"
            with trio.fail_after(60):
                signal.raise_signal(signal.SIGTERM)
                await ended.wait()


async def crash(kadoa: SimulatedKadoa, main: Callable[..., Awaitable[object]], *arguments: object) -> None:
    """Run a program until it raises `Killed`."""
    with (
        kadoa.as_default(),
        trio.fail_after(DAY),
        pytest.RaisesGroup(Killed, allow_unwrapped=True, flatten_subgroups=True),
    ):
        await main(*arguments)


class Killed(BaseException):
    """The process ends here."""


async def live_through_a_day(kadoa: SimulatedKadoa, kind: str = "workflow_failed") -> None:
    """Let a day of faults happen while events come, then wait until each is settled."""
    first = kadoa.publish(kind)  # without a cursor nothing could be resumed
    await kadoa.wait_settled(first)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kadoa.play, CHAOS)
        for number in range(288):
            await trio.sleep(300)
            kadoa.publish(kind, workflow_id=f"wf_{number % 5}")
            kadoa.publish(kind, workflow_id=f"wf_{number % 3}")
    await kadoa.wait_settled()


# ---- the notifier ----------------------------------------------------------------------------------------------------


class Chat:
    """A chat that refuses messages."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.taken: list[str] = []
        self.refuses: Callable[[Event], bool] = lambda _event: False

    async def notify(self, _client: httpx.AsyncClient, event: Event) -> None:
        self.tried[event.id] += 1
        await trio.sleep(0.1)
        if self.refuses(event):
            raise OSError("the chat answered 503")
        self.taken.append(event.id)


@pytest.fixture
def notifier(monkeypatch: pytest.MonkeyPatch, store: MemoryCursorStore) -> SimpleNamespace:
    module, chat, dead = load("notifier"), Chat(), MemoryDeadLetters()
    use_store(monkeypatch, module, store)
    monkeypatch.setattr(module, "notify", chat.notify)
    monkeypatch.setattr(module, "DeadLetterFile", lambda _path: dead)
    return SimpleNamespace(main=module.main, chat=chat, dead=dead)


async def test_message_that_was_refused_twice_is_posted(
    notifier: SimpleNamespace, autojump_clock: trio.testing.MockClock
) -> None:
    chat = notifier.chat
    chat.refuses = lambda event: chat.tried[event.id] < 3
    async with open_simulated_kadoa() as kadoa, run(kadoa, notifier.main):
        events = [kadoa.publish("workflow_failed") for _ in range(5)]
        await kadoa.wait_settled(*events)
    assert Counter(chat.taken) == Counter(event.id for event in events)
    assert set(chat.tried.values()) == {3}
    assert not notifier.dead.letters


async def test_message_that_is_always_refused_is_a_dead_letter_and_delays_no_other(
    notifier: SimpleNamespace, autojump_clock: trio.testing.MockClock
) -> None:
    chat = notifier.chat
    async with open_simulated_kadoa() as kadoa, run(kadoa, notifier.main):
        bad = kadoa.publish("workflow_failed", id="bad")
        chat.refuses = lambda event: event.id == "bad"
        good = [kadoa.publish("workflow_failed") for _ in range(20)]
        await kadoa.wait_settled(*good)
        assert chat.tried["bad"] < 10
        await kadoa.wait_settled(bad)
    assert Counter(chat.taken) == Counter(event.id for event in good)
    (letter,) = notifier.dead.letters
    assert (letter.event.id, letter.attempts, letter.reason) == ("bad", 10, "OSError: the chat answered 503")


async def test_message_that_waits_at_the_end_is_posted_by_the_next_run(
    notifier: SimpleNamespace, store: MemoryCursorStore, autojump_clock: trio.testing.MockClock
) -> None:
    chat = notifier.chat
    async with open_simulated_kadoa() as kadoa:
        async with run(kadoa, notifier.main):
            await kadoa.wait_settled(kadoa.publish("workflow_failed"))
            chat.refuses = lambda _event: True
            late = [kadoa.publish("workflow_failed") for _ in range(3)]
            await trio.sleep(20)
        assert chat.taken == [kadoa.published[0].id]
        chat.refuses = lambda _event: False
        async with run(kadoa, notifier.main):
            await kadoa.wait_settled(*late)
    assert Counter(chat.taken) == Counter(event.id for event in kadoa.published)
    assert not notifier.dead.letters


async def test_each_failure_of_a_day_with_faults_is_posted_or_a_dead_letter(
    notifier: SimpleNamespace, autojump_clock: trio.testing.MockClock
) -> None:
    rng, chat = random.Random(7), notifier.chat
    chat.refuses = lambda _event: rng.random() < 0.6
    async with open_simulated_kadoa() as kadoa, run(kadoa, notifier.main):
        await live_through_a_day(kadoa)
        published = Counter(event.id for event in kadoa.published)
    dead = [letter.event.id for letter in notifier.dead.letters]
    assert Counter([*chat.taken, *dead]) == published
    assert 0 < len(dead) < len(published) / 20, dead
    assert all(chat.tried[event] == 10 for event in dead)


async def test_address_of_the_chat_is_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("notifier")

    async def refuse(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with serving(refuse) as port:
        monkeypatch.setenv("CHAT_WEBHOOK_URL", f"http://127.0.0.1:{port}/secret-of-the-chat")
        async with httpx.AsyncClient() as client:
            with pytest.raises(OSError, match="the chat answered 404") as caught:
                await module.notify(client, make_event(workflow_failed(reason="no table")))
    assert "secret" not in str(caught.value)


# ---- the database sink -----------------------------------------------------------------------------------------------


class Faulty(sqlite3.Connection):
    """A connection whose transactions fail, or whose process is killed before or after a commit."""

    fault: Callable[[], str] = staticmethod(lambda: "")

    def executemany(self, *arguments: Any) -> Any:
        result = super().executemany(*arguments)  # so that a transaction has begun
        self._outcome = self.fault() if arguments[1] else ""
        if self._outcome == "fails":
            raise sqlite3.OperationalError("disk I/O error")
        return result

    def __exit__(self, kind: Any, *rest: Any) -> Any:
        outcome, self._outcome = getattr(self, "_outcome", ""), ""
        if kind is None and outcome == "killed before":
            self.rollback()  # as SQLite does when the next process opens the file
            raise Killed
        result = super().__exit__(kind, *rest)
        if kind is None and outcome == "killed after":
            raise Killed
        return result


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    module, path = load("database_sink"), tmp_path / "sink.db"
    connect = partial(sqlite3.connect, factory=Faulty)
    monkeypatch.setattr(module, "sqlite3", SimpleNamespace(**{**vars(sqlite3), "connect": connect}))
    monkeypatch.setattr(Faulty, "fault", staticmethod(lambda: ""))

    def fail(fault: Callable[[], str]) -> None:
        monkeypatch.setattr(Faulty, "fault", staticmethod(fault))

    return SimpleNamespace(main=partial(module.main, str(path)), path=path, fail=fail)


def written(path: Path) -> list[str]:
    """Give the ids in the database, in the order in which they were written. An id that is written twice is there twice."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        return [row[0] for row in database.execute("SELECT id FROM events ORDER BY rowid")]


async def test_sink_has_a_position_before_its_first_event(
    sink: SimpleNamespace, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_simulated_kadoa() as kadoa, run(kadoa, sink.main):
        await trio.sleep(1)
    with contextlib.closing(sqlite3.connect(sink.path)) as database:
        (json,) = database.execute("SELECT json FROM position").fetchone()
    assert Position.from_json(json).cursor_at is not None


async def test_batch_whose_transaction_fails_is_written_later_and_once(
    sink: SimpleNamespace, capsys: pytest.CaptureFixture[str], autojump_clock: trio.testing.MockClock
) -> None:
    outcomes = iter(["", "fails", "fails", "", "fails"])
    sink.fail(lambda: next(outcomes, ""))
    async with open_simulated_kadoa() as kadoa:
        async with run(kadoa, sink.main):
            for _ in range(20):
                kadoa.publish_many(10)
                await trio.sleep(0.5)
            await kadoa.wait_settled()
        assert Counter(written(sink.path)) == Counter(event.id for event in kadoa.published)
    assert capsys.readouterr().out.count("was not written") == 3


@pytest.mark.parametrize("when", ["killed before", "killed after"])
async def test_no_effect_is_missing_or_there_twice_after_a_crash_at_a_commit(
    when: str, sink: SimpleNamespace, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_simulated_kadoa() as kadoa:
        for number in range(5):
            outcomes = iter(["", "fails", when])
            sink.fail(lambda outcomes=outcomes: next(outcomes))
            async with trio.open_nursery() as nursery:

                async def publish(subscribed: int = len(kadoa.subscribed)) -> None:
                    await kadoa.wait_subscribed(subscribed + 1)
                    while True:
                        kadoa.publish_many(3)
                        await trio.sleep(0.5)

                nursery.start_soon(publish)
                await crash(kadoa, sink.main)
                nursery.cancel_scope.cancel()
            kadoa.publish_many(number)  # while no program runs
        sink.fail(lambda: "")
        async with run(kadoa, sink.main):
            await kadoa.wait_settled(kadoa.publish())
            await trio.sleep(60)
        assert Counter(written(sink.path)) == Counter(event.id for event in kadoa.published)


async def test_each_event_of_a_day_with_faults_is_written_once(
    sink: SimpleNamespace, autojump_clock: trio.testing.MockClock
) -> None:
    rng = random.Random(7)
    sink.fail(lambda: "fails" if rng.random() < 0.3 else "")
    async with open_simulated_kadoa() as kadoa, run(kadoa, sink.main):
        await live_through_a_day(kadoa, "workflow_finished")
        published = Counter(event.id for event in kadoa.published)
    assert Counter(written(sink.path)) == published


# ---- the service -----------------------------------------------------------------------------------------------------


class Handler:
    """Handles events with faults and delays, and records which were handled."""

    def __init__(self) -> None:
        self.handled: list[Event] = []
        self.rng = random.Random(7)
        self.failing = 0.0

    async def __call__(self, event: Event) -> None:
        await trio.sleep(self.rng.uniform(0, 0.3))
        if self.rng.random() < self.failing:
            raise OSError("not now")
        self.handled.append(event)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, store: MemoryCursorStore, tmp_path: Path) -> SimpleNamespace:
    module, handler = load("service"), Handler()
    monkeypatch.chdir(tmp_path)
    use_store(monkeypatch, module, store)
    monkeypatch.setattr(module, "handle", handler)
    return SimpleNamespace(main=module.main, handler=handler, health=(tmp_path / "health").read_text)


def assert_each_once_and_in_the_order_of_its_workflow(handled: list[Event], kadoa: SimulatedKadoa) -> None:
    numbers = {event.id: number for number, event in enumerate(kadoa.published)}
    assert Counter(event.id for event in handled) == Counter(numbers.keys())  # each once
    lanes: dict[str | None, list[int]] = {}
    for event in handled:
        lanes.setdefault(event.workflow_id, []).append(numbers[event.id])
    assert len(lanes) > 3
    assert all(lane == sorted(lane) for lane in lanes.values())


async def test_events_of_a_workflow_are_handled_in_order_although_some_fail(
    service: SimpleNamespace, autojump_clock: trio.testing.MockClock
) -> None:
    service.handler.failing = 0.3
    async with open_simulated_kadoa() as kadoa, run(kadoa, service.main):
        for number in range(200):
            kadoa.publish(workflow_id=f"wf_{number % 7}")
        await kadoa.wait_settled()
        assert_each_once_and_in_the_order_of_its_workflow(service.handler.handled, kadoa)
        assert [event.id for event in service.handler.handled] != [
            event.id for event in kadoa.published
        ]  # side by side


async def test_health_of_the_service_names_an_outage_and_an_event_that_is_stuck(
    service: SimpleNamespace, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_simulated_kadoa() as kadoa, run(kadoa, service.main):
        await kadoa.wait_settled(kadoa.publish())
        await trio.sleep(20)
        assert service.health() == "healthy\n"
        kadoa.faults.refuse_connections = True
        kadoa.newest.reset()
        await trio.sleep(60)
        assert "no connection is live" in service.health()
        kadoa.heal()
        await trio.sleep(60)
        assert service.health() == "healthy\n"
        service.handler.failing = 1.0
        stuck = kadoa.publish(id="stuck")
        await trio.sleep(400)
        assert "event stuck is not settled for" in service.health()
        service.handler.failing = 0.0
        await kadoa.wait_settled(stuck)
        await trio.sleep(20)
        assert service.health() == "healthy\n"


async def test_each_event_of_a_day_with_faults_is_handled_once_and_in_order(
    service: SimpleNamespace, autojump_clock: trio.testing.MockClock
) -> None:
    service.handler.failing = 0.3
    async with open_simulated_kadoa() as kadoa, run(kadoa, service.main):
        await live_through_a_day(kadoa)
        assert_each_once_and_in_the_order_of_its_workflow(service.handler.handled, kadoa)


# ---- a test of the documentation -------------------------------------------------------------------------------------


async def test_test_of_a_handler_in_the_documentation_runs(
    simulated_kadoa: SimulatedKadoa, autojump_clock: trio.testing.MockClock
) -> None:
    await load("test_retries").test_event_that_failed_twice_is_handled(simulated_kadoa, autojump_clock)


# ---- real processes --------------------------------------------------------------------------------------------------

STARTER = """
import runpy, sys
import crash_consumer

sink = runpy.run_path(sys.argv[3])["main"]

async def main(path, _store):
    await sink(str(path))

crash_consumer.main = main
crash_consumer.serve()
"""
"""Forks a process with the sink for each line on stdin, as crash_consumer.py does with its own consumer."""


class Sink:
    """The process of a sink, which is killed and started again many times."""

    def __init__(self, kadoa: SimulatedKadoa, path: Path, starter: Running) -> None:
        self.kadoa = kadoa
        self.path = path
        self.starter = starter
        self.pid = 0
        self._lines = 0

    async def _line(self) -> bytes:
        self._lines += 1
        await self.starter.until(lambda: self.starter.out.count(b"\n") >= self._lines)
        return self.starter.out.split(b"\n")[self._lines - 1]

    async def start(self) -> None:
        """Start a process, and wait until it has subscribed."""
        made = len(self.kadoa.subscribed)
        assert self.starter.process.stdin is not None
        await self.starter.process.stdin.send_all(b"\n")
        self.pid = int(await self._line())
        await self.kadoa.wait_subscribed(made + 1)

    async def end(self, how: signal.Signals) -> None:
        os.kill(self.pid, how)
        assert await self._line() == b"ended"

    async def wait_written(self, count: int) -> None:
        while self.count() < count:  # noqa: ASYNC110  # another process has no event
            await trio.sleep(0.005)

    def count(self) -> int:
        with contextlib.closing(sqlite3.connect(self.path)) as database:
            count: int = database.execute("SELECT count(*) FROM events").fetchone()[0]
            return count

    async def publish(self) -> None:
        """Publish until cancelled, as fast as events are written."""
        while True:
            if len(self.kadoa.published) - self.count() < 40:
                self.kadoa.publish_many(7)
            await trio.sleep(0.02)


@asynccontextmanager
async def open_sink(folder: Path) -> AsyncIterator[Sink]:
    path = folder / "sink.db"
    arguments = [sys.executable, "-c", STARTER, str(path), "-", str(EXAMPLES / "database_sink.py")]
    async with open_simulated_kadoa(loopback=True) as kadoa:
        env = {**os.environ, **kadoa.environment, "PYTHONPATH": str(Path(__file__).parent)}
        async with running(arguments, env=env, stdin=subprocess.PIPE) as starter:
            try:
                yield Sink(kadoa, path, starter)
            finally:
                # At the end of its input the starter kills the process that it has forked.
                with trio.CancelScope(shield=True), trio.move_on_after(30):
                    assert starter.process.stdin is not None
                    await starter.process.stdin.aclose()
                    await starter.process.wait()
            assert starter.err == b""


@pytest.mark.sockets
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
async def test_sink_that_is_killed_fifty_times_has_written_each_event_once(tmp_path: Path) -> None:
    rng = random.Random()
    async with open_sink(tmp_path) as sink:
        await sink.start()
        sink.kadoa.publish()
        await sink.wait_written(1)
        await sink.end(signal.SIGTERM)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sink.publish)
            for _ in range(KILLS):
                before = sink.count()
                await sink.start()
                await sink.wait_written(before + rng.choice([0, 1, 1, 30]))
                await trio.sleep(rng.uniform(0, 0.25))  # a batch and a bit
                await sink.end(signal.SIGKILL)
            nursery.cancel_scope.cancel()
        await sink.start()
        sink.kadoa.publish()
        await sink.wait_written(len(sink.kadoa.published))
        await sink.end(signal.SIGTERM)
        assert Counter(written(sink.path)) == Counter(event.id for event in sink.kadoa.published)


@pytest.mark.sockets
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["notifier", "database_sink", "service"])
async def test_program_that_is_stopped_at_sigterm_ends_with_code_0_and_repeats_nothing(
    name: str, tmp_path: Path
) -> None:
    posted: list[str] = []
    printed: list[Running] = []

    async def chat(stream: trio.abc.Stream) -> None:
        data = await read_head(stream)
        while b"}" not in data:
            data += await stream.receive_some()
        posted.append(data.partition(b'{"text":"')[2].split()[0].decode())
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def handled() -> list[str]:
        """Give the workflows of the events that were handled."""
        match name:
            case "notifier":
                return posted
            case "service":
                return [line.split()[0] for one in printed for line in one.out.decode().splitlines()]
            case _:
                with contextlib.closing(sqlite3.connect(tmp_path / "sink.db")) as database:
                    return [row[0] for row in database.execute("SELECT workflow FROM events")]

    async with open_simulated_kadoa(loopback=True) as kadoa, serving(chat) as port:
        env = {
            **environment_without("KADOA_"),
            **kadoa.environment,
            "CHAT_WEBHOOK_URL": f"http://127.0.0.1:{port}/hook",
            "NO_PROXY": "127.0.0.1",
            "PYTHONUNBUFFERED": "1",
        }
        for number in range(2):
            async with running([sys.executable, str(EXAMPLES / f"{name}.py")], env=env, cwd=tmp_path) as program:
                printed.append(program)
                await kadoa.wait_subscribed(number + 1)
                publish(kadoa, 1)
                await program.until(lambda: len(handled()) == len(kadoa.published))
                publish(kadoa, 10)
                if number:
                    await program.until(lambda: len(handled()) == len(kadoa.published))
                assert await program.end(signal.SIGTERM) == 0
            assert program.err == b""
            if not number:
                publish(kadoa, 3)  # while no program runs
        assert Counter(handled()) == Counter(f"wf_{one}" for one in range(len(kadoa.published)))


def publish(kadoa: SimulatedKadoa, count: int) -> None:
    for _ in range(count):
        kadoa.publish("workflow_failed", workflow_id=f"wf_{len(kadoa.published)}")


# ---- PostgreSQL ------------------------------------------------------------------------------------------------------


@pytest.fixture
def postgres() -> Iterator[tuple[str, Callable[[str], list[Any]]]]:
    """Give a connection string with a schema of its own, and a function that runs a query there."""
    given = os.environ.get("KADOA_TRIO_TEST_POSTGRES")
    if not given:
        pytest.skip("needs a PostgreSQL server: set KADOA_TRIO_TEST_POSTGRES to its connection string")
    psycopg = pytest.importorskip("psycopg", reason="needs psycopg")
    from psycopg.conninfo import make_conninfo

    schema = f"kadoa_trio_{uuid.uuid4().hex}"
    dsn = make_conninfo(given, options=f"-c search_path={schema}")
    with psycopg.connect(dsn, autocommit=True) as database:
        database.execute(f"CREATE SCHEMA {schema}")
        try:
            yield dsn, lambda query: database.execute(query).fetchall()
        finally:
            database.execute(f"DROP SCHEMA {schema} CASCADE")


@pytest.mark.sockets
async def test_postgres_sink_writes_each_event_once_over_three_runs(
    postgres: tuple[str, Callable[[str], list[Any]]],
) -> None:
    (dsn, query), module = postgres, load("postgres_sink")
    async with open_simulated_kadoa(loopback=True) as kadoa:
        with kadoa.as_default(), trio.fail_after(120):
            for turn in range(3):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(module.main, dsn)
                    await kadoa.wait_subscribed(turn + 1)
                    kadoa.publish_many(20)
                    while len(query("SELECT id FROM events")) < len(kadoa.published):  # noqa: ASYNC110  # no event
                        await trio.sleep(0.02)
                    if turn == 1:
                        nursery.cancel_scope.cancel()  # as a crash
                    else:
                        signal.raise_signal(signal.SIGTERM)
                kadoa.publish_many(2)  # while no program runs
        assert Counter(row[0] for row in query("SELECT id FROM events")) == Counter(
            event.id for event in kadoa.published[:-2]
        )


@pytest.mark.sockets
async def test_second_postgres_sink_makes_one_of_both_end_and_writes_nothing_twice(
    postgres: tuple[str, Callable[[str], list[Any]]],
) -> None:
    (dsn, query), module = postgres, load("postgres_sink")
    async with open_simulated_kadoa(loopback=True) as kadoa:
        with (
            kadoa.as_default(),
            trio.fail_after(120),
            pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="another process")),
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(module.main, dsn)
                await kadoa.wait_subscribed(1)
                kadoa.publish_many(5)
                while len(query("SELECT id FROM events")) < 5:  # noqa: ASYNC110  # no event
                    await trio.sleep(0.02)
                nursery.start_soon(module.main, dsn)
                while True:
                    kadoa.publish_many(5)
                    await trio.sleep(0.1)
        ids = [row[0] for row in query("SELECT id FROM events")]
        assert len(ids) == len(set(ids)) >= 5
