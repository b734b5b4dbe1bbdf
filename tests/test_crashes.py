"""Real processes, real sockets, SQLite on disk: killed at random instants under load, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from kadoa_trio import Position
from kadoa_trio.testing import SimulatedKadoa, open_simulated_kadoa

CONSUMER = Path(__file__).parent / "crash_consumer.py"
KILLS = 50

pytestmark = [
    pytest.mark.sockets,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals"),
]


class Service:
    """A consumer process that is started again and again."""

    def __init__(self, kadoa: SimulatedKadoa, folder: Path) -> None:
        self.kadoa = kadoa
        self.effects = folder / "effects"
        self.effects.touch()
        self.store = folder / "positions.db"

    async def start(self) -> trio.Process:
        """Start it, and wait until it has subscribed."""
        made = len(self.kadoa.subscribed)
        process = await trio.lowlevel.open_process(
            [sys.executable, str(CONSUMER), str(self.effects), str(self.store)],
            env={**os.environ, **self.kadoa.environment},
            stderr=subprocess.PIPE,
        )
        with trio.move_on_after(30):
            await self.kadoa.wait_subscribed(made + 1)
            return process
        raise AssertionError(await end(process, signal.SIGKILL))

    def handled(self) -> list[str]:
        return self.effects.read_text().splitlines()

    async def wait_handled(self, event_id: str | None) -> None:
        with trio.fail_after(30):
            while event_id not in self.handled():  # noqa: ASYNC110  # another process writes it
                await trio.sleep(0.02)

    def covered(self) -> set[str | None]:
        """Give the events that the last completed save covers."""
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


async def end(process: trio.Process, how: signal.Signals) -> bytes:
    """End the process, and give what it has written to stderr."""
    process.send_signal(how)
    with trio.fail_after(10):
        await process.wait()
    assert process.stderr is not None
    said = b""
    async with process.stderr:
        async for data in process.stderr:
            said += data
    return said


async def publish(kadoa: SimulatedKadoa) -> None:
    rng = random.Random(7)
    while True:
        kadoa.publish_many(rng.randint(1, 4))
        await trio.sleep(0.005)


@pytest.mark.timeout(300)
async def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    rng = random.Random()
    async with open_simulated_kadoa(loopback=True) as kadoa:
        service = Service(kadoa, tmp_path)
        process = await service.start()
        # Before the server has given a cursor, no client can come back to anything.
        first = kadoa.publish()
        await service.wait_handled(first.id)
        await end(process, signal.SIGTERM)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish, kadoa)
            for _ in range(KILLS):
                before, covered = len(service.handled()), service.covered()
                process = await service.start()
                await trio.sleep(rng.uniform(0, 0.5))
                assert await end(process, signal.SIGKILL) == b""
                # Nothing comes again but what the last completed save did not cover.
                assert not covered & set(service.handled()[before:])
            nursery.cancel_scope.cancel()
        last = kadoa.publish()
        process = await service.start()
        await service.wait_handled(last.id)
        assert await end(process, signal.SIGTERM) == b""
        handled = service.handled()
        assert {event.id for event in kadoa.published} - set(handled) == set()
        print(f"{len(kadoa.published)} events, {KILLS} kills, {len(handled) - len(set(handled))} repeated, 0 lost")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_orderly_end_repeats_at_most_what_was_in_hand(how: signal.Signals, tmp_path: Path) -> None:
    async with open_simulated_kadoa(loopback=True) as kadoa:
        service = Service(kadoa, tmp_path)
        process = await service.start()
        await service.wait_handled(kadoa.publish().id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish, kadoa)
            for _ in range(4):
                await trio.sleep(0.2)
                await end(process, how)
                process = await service.start()
            nursery.cancel_scope.cancel()
        await service.wait_handled(kadoa.publish().id)
        await end(process, signal.SIGTERM)
        handled = service.handled()
        published = [event.id for event in kadoa.published]
        if how == signal.SIGTERM:
            assert handled == published  # nothing repeated, and in order
        else:
            assert set(handled) == set(published)
            assert len(handled) - len(published) <= 4  # the one that was in hand, each time
