"""Many clients in one process, opened 1,000 in a second, and then idle but for heartbeats."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import trio

from ._loops import RECEIVE_BUFFER, Servers, memory_of
from ._server import allow_many_files

OPENED_A_SECOND: Final = 1_000
PATIENCE: Final = 300.0

OnLive = Callable[[], None]


async def idle(servers: Servers, *, kind: str, count: int, throttle: int, seconds: float) -> dict[str, Any]:
    """Open *count* clients or bare sockets, and measure them while nothing comes but heartbeats.

    Args:
        servers: where the servers are.
        kind: "client" or "bare".
        count: how many.
        throttle: the server refuses more token requests than this in a second.
        seconds: how long to measure.
    """
    allow_many_files()
    failures: list[str] = []
    attempts = [0]
    open_one = (
        functools.partial(_client, servers, throttle, attempts)
        if kind == "client"
        else functools.partial(_bare, servers)
    )
    async with trio.open_nursery() as nursery:
        # One before: what is imported and made once is not part of what each one takes.
        await _open_all(nursery, 1, open_one, failures)
        await trio.sleep(0.1)
        gc.collect()
        first = memory_of("VmRSS")
        cpu, wall = time.process_time(), time.perf_counter()
        await _open_all(nursery, count, open_one, failures)
        opening = {"opening_cpu": time.process_time() - cpu, "opening": time.perf_counter() - wall}
        await trio.sleep(min(seconds, 12))  # until every connection is stable
        cpu = time.process_time()
        await trio.sleep(seconds)
        cpu = time.process_time() - cpu
        # After a minute and more, as for weeks after that: nothing of the opening is left.
        gc.collect()
        memory = memory_of("VmRSS") - first
        nursery.cancel_scope.cancel()
    return opening | {
        "kb_each": memory * 1024 / count,
        "cpu_ms_each_hour": cpu * 1_000 / (count + 1) * 3_600 / seconds,
        "failures": failures[:10],
        "attempts": attempts[0],
    }


async def _open_all(
    nursery: trio.Nursery, count: int, open_one: Callable[[OnLive], Awaitable[None]], failures: list[str]
) -> None:
    done = trio.Event()
    left = count

    def on_live() -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    async def one(delay: float) -> None:
        await trio.sleep(delay)
        try:
            await open_one(on_live)
        except Exception as exc:  # counted: a failure is a result
            failures.append(repr(exc))
            on_live()

    for number in range(count):
        nursery.start_soon(one, number / OPENED_A_SECOND)
    with trio.fail_after(PATIENCE):
        await done.wait()


async def _client(servers: Servers, throttle: int, attempts: list[int], on_live: OnLive) -> None:
    from kadoa_trio import Endpoints, open_realtime

    endpoints = Endpoints(
        public_api=f"http://127.0.0.1:{servers.port}/throttle/{throttle}",
        websocket=servers.websocket("/idle"),
        realtime_api=f"http://127.0.0.1:{servers.ack_port}",
    )
    async with open_realtime("key", endpoints=endpoints) as realtime:
        await realtime.wait_live()
        attempts[0] += realtime.statistics().attempts
        on_live()
        async for _ in realtime.events:
            raise AssertionError("the server sends no event")


async def _bare(servers: Servers, on_live: OnLive) -> None:
    import orjson
    import trio_websocket

    address = servers.websocket("/idle") + "?access_token=token"
    async with trio_websocket.open_websocket_url(address, receive_buffer_size=RECEIVE_BUFFER) as ws:
        await ws.send_message('{"action":"subscribe","channel":"team-1"}')
        orjson.loads(await ws.get_message())
        on_live()
        while True:
            orjson.loads(await ws.get_message())
