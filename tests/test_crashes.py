"""Real processes, sockets and SQLite files: a consumer that is killed at random instants under load loses nothing."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from kadoa_trio import Position
from kadoa_trio.testing import SimulatedKadoa, open_simulated_kadoa

CONSUMER = Path(__file__).parent / "crash_consumer.py"
KILLS = 50
BACKLOG = 200
"""Maximum events that are published and not handled, so that a slow machine leaves no more for the last run."""
PATIENCE = 60
"""Maximum time for each step of a process, in seconds."""

pytestmark = [
    pytest.mark.sockets,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals"),
]


class Service:
    """A consumer whose process ends and is started again, many times."""

    def __init__(self, kadoa: SimulatedKadoa, folder: Path, starter: trio.Process) -> None:
        self.kadoa = kadoa
        self.effects = folder / "effects"
        self.store = folder / "positions.db"
        self.starter = starter
        self.process = 0
        self.handled: list[str] = []
        """The ids in the file of effects, in its order."""
        self.known: set[str] = set()
        self._read = 0
        self._said = b""

    async def _line(self) -> str:
        assert self.starter.stdout is not None
        while b"\n" not in self._said:
            data = await self.starter.stdout.receive_some()
            assert data, "the starter has ended"
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    async def begin(self) -> None:
        """Start a process; do not wait until it has subscribed."""
        assert self.starter.stdin is not None
        await self.starter.stdin.send_all(b"\n")
        self.process = int(await self._line())

    async def start(self) -> None:
        """Start a process, and wait until it has subscribed."""
        made = len(self.kadoa.subscribed)
        await self.begin()
        await self.kadoa.wait_subscribed(made + 1)

    async def end(self, how: signal.Signals) -> None:
        """Send the process a signal, and wait until it has ended."""
        os.kill(self.process, how)
        assert await self._line() == "ended"

    def look(self) -> None:
        """Read the ids that were handled since the last call."""
        with self.effects.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        ids = whole.decode().splitlines()
        self.handled += ids
        self.known.update(ids)

    async def wait_count(self, count: int) -> None:
        """Wait until *count* events were handled, repeated ones included."""
        self.look()
        while len(self.handled) < count:
            await trio.sleep(0.002)  # another process writes it
            self.look()

    async def wait_handled(self, event_id: str | None) -> None:
        while event_id not in self.known:
            await trio.sleep(0.002)
            self.look()

    async def publish(self) -> None:
        """Publish until cancelled, as fast as events are handled."""
        rng = random.Random(7)
        while True:
            self.look()
            if len(self.kadoa.published) - len(self.known) < BACKLOG:
                self.kadoa.publish_many(rng.randint(1, 4))
            await trio.sleep(0.005)

    def covered(self) -> set[str | None]:
        """Return the ids of the events that the last completed save covers."""
        with contextlib.closing(sqlite3.connect(self.store)) as connection:
            ((text,),) = connection.execute("SELECT position FROM positions").fetchall()
        position = Position.from_json(text)
        ids: set[str | None] = {*position.settled, *position.recent}
        for event in self.kadoa.published:
            if position.cursor is None:
                break
            ids.add(event.id)
            if event.cursor == position.cursor:
                break
        return ids


@asynccontextmanager
async def open_service(folder: Path) -> AsyncIterator[Service]:
    """Open a simulated Kadoa and a service. A test that fails shows what the processes wrote to stderr."""
    said = folder / "stderr"
    (folder / "effects").touch()
    async with open_simulated_kadoa(loopback=True) as kadoa:
        with said.open("wb") as stderr:
            starter = await trio.lowlevel.open_process(
                [sys.executable, str(CONSUMER), str(folder / "effects"), str(folder / "positions.db")],
                env={**os.environ, **kadoa.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        service = Service(kadoa, folder, starter)
        try:
            try:
                yield service
            finally:
                assert starter.stdin is not None
                assert starter.stdout is not None
                with trio.CancelScope(shield=True, deadline=trio.current_time() + PATIENCE):
                    await starter.stdin.aclose()
                    await starter.wait()
                    await starter.stdout.aclose()
        except BaseException as exc:
            exc.add_note(f"stderr of the processes: {said.read_text()!r}")
            raise


@pytest.mark.timeout(300)
async def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    rng = random.Random()
    async with open_service(tmp_path) as service:
        kadoa = service.kadoa
        with trio.fail_after(PATIENCE):
            await service.start()
            # Before the server has sent a cursor, no client can resume.
            await service.wait_handled(kadoa.publish().id)
            await service.end(signal.SIGTERM)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.publish)
            for number in range(KILLS):
                service.look()
                before, covered = len(service.handled), service.covered()
                with trio.fail_after(PATIENCE):
                    # The instant of the kill depends on the events that were handled, not on the speed of the machine.
                    if number % 5 == 4:
                        await service.begin()
                        for _ in range(rng.randrange(100)):
                            await trio.sleep(0.001)
                    else:
                        await service.start()
                        await service.wait_count(before + rng.randrange(60))
                        await trio.sleep(rng.uniform(0, 0.06))  # a save and a bit
                    await service.end(signal.SIGKILL)
                # Only events that the last completed save did not cover come again.
                service.look()
                assert not covered & set(service.handled[before:])
            nursery.cancel_scope.cancel()
        with trio.fail_after(PATIENCE):
            last = kadoa.publish()
            await service.start()
            await service.wait_handled(last.id)
            await service.end(signal.SIGTERM)
        assert {event.id for event in kadoa.published} - service.known == set()
        repeated = len(service.handled) - len(service.known)
        print(f"{len(kadoa.published)} events, {KILLS} kills, {repeated} repeated, 0 lost")
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_orderly_end_repeats_at_most_what_was_in_hand(how: signal.Signals, tmp_path: Path) -> None:
    async with open_service(tmp_path) as service:
        kadoa = service.kadoa
        with trio.fail_after(2 * PATIENCE):
            await service.start()
            await service.wait_handled(kadoa.publish().id)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.publish)
                for _ in range(4):
                    await service.wait_count(len(service.handled) + 50)
                    await service.end(how)
                    await service.start()
                nursery.cancel_scope.cancel()
            await service.wait_handled(kadoa.publish().id)
            await service.end(signal.SIGTERM)
        service.look()
        published = [event.id for event in kadoa.published]
        if how == signal.SIGTERM:
            assert service.handled == published  # nothing repeated, and in order
        else:
            assert service.known == set(published)
            assert len(service.handled) - len(published) <= 4  # the one that was in hand, each time
    if how == signal.SIGTERM:
        assert (tmp_path / "stderr").read_text() == ""
