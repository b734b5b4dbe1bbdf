"""Leaving a client at any instant leaves nothing to the garbage collector."""

from __future__ import annotations

import gc
import json
import random
import warnings
from typing import Any

import pytest
import trio
from _loopback import accept, frame, read_head
from _memory import MemoryServers

from kadoa_trio import Endpoints, open_realtime

LEAVES = 500
GOOD = json.dumps({"access_token": "t0k3n", "team_id": "team-1"}).encode()
LOCAL = {"public_api": "http://127.0.0.1:1", "realtime_api": "http://127.0.0.1:1", "websocket": "ws://127.0.0.1:1"}


def event(number: int) -> bytes:
    body = {"eventType": "workflow_finished", "id": f"e{number}", "_cursor": f"1-{number}", "message": {"id": number}}
    return frame(json.dumps(body).encode())


@pytest.mark.timeout(300)  # some 8 s of an idle machine
async def test_500_leaves_amid_acknowledgements_leave_no_generator(autojump_clock: Any) -> None:
    rng = random.Random(20261124)
    acknowledged = cut = 0

    async def answer(stream: trio.abc.Stream) -> None:
        nonlocal acknowledged, cut
        while True:
            head, _, body = (await read_head(stream)).partition(b"\r\n\r\n")
            if b"/oauth2/" not in head:
                cut += 1
                while not body.endswith(b"}"):
                    data = await stream.receive_some()
                    if not data:
                        return
                    body += data
                await trio.sleep(rng.uniform(0, 0.03))
                cut -= 1
                acknowledged += 1
            said = GOOD if b"/oauth2/" in head else b'{"ok":true}'
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said))
            await trio.sleep(rng.uniform(0, 0.01))
            await stream.send_all(said)

    async def websocket(stream: trio.abc.Stream) -> None:
        await accept(stream)
        for number in range(3):
            await stream.send_all(event(number))
            await trio.sleep(0.01)
        await trio.sleep_forever()

    async def before_write() -> None:
        await trio.sleep(rng.uniform(0, 0.03))

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(LEAVES // 100):
            servers = MemoryServers(answer, websocket, before_write=before_write)
            async with servers.running():
                for _ in range(100):
                    endpoints = Endpoints(network=servers, **LOCAL)
                    async with open_realtime("key-for-tests", endpoints=endpoints) as realtime:
                        with trio.move_on_after(rng.uniform(0, 0.08)):
                            async for _event in realtime.events:
                                pass
                        if rng.random() < 0.5:
                            # By force: what is under way is not waited for.
                            with trio.move_on_after(0):
                                await trio.sleep_forever()
            gc.collect()
            await trio.lowlevel.checkpoint()
    assert [str(one.message) for one in seen] == []
    # The test looks where it says: many were sent, and some were cut short.
    assert acknowledged > LEAVES / 2
    assert cut > 0


async def test_cancelled_client_leaves_no_generator(autojump_clock: Any) -> None:
    rng = random.Random(20261124)

    async def answer(stream: trio.abc.Stream) -> None:
        while True:
            await read_head(stream)
            await trio.sleep(rng.uniform(0, 0.05))
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(GOOD))
            await trio.sleep(rng.uniform(0, 0.05))
            await stream.send_all(GOOD)

    async def websocket(stream: trio.abc.Stream) -> None:
        await trio.sleep(rng.uniform(0, 0.05))
        await accept(stream, event(1))
        await trio.sleep_forever()

    async def before_write() -> None:
        await trio.sleep(rng.uniform(0, 0.05))

    servers = MemoryServers(answer, websocket, before_write=before_write)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        async with servers.running():
            for _ in range(50):
                with trio.move_on_after(rng.uniform(0, 0.4)):
                    async with open_realtime("key-for-tests", endpoints=Endpoints(network=servers, **LOCAL)) as client:
                        async for _event in client.events:
                            pass
        gc.collect()
        await trio.lowlevel.checkpoint()
    assert [str(one.message) for one in seen] == []
