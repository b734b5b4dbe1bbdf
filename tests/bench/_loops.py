"""The loops that are compared: each receives the events of a feed, and measures the part after the start of it.

Each runs in a fresh process (see `_worker`), which imports no client but the one
that its loop uses. The first events of a feed warm the loop up; the clocks are
started when they were received, and the server sends the others then.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import itertools
import os
import socket
import ssl
import statistics
import tempfile
import time
import unittest.mock
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from ._server import AUTHORITY, Feed

if TYPE_CHECKING:
    from kadoa_trio import EventChannel, Realtime

RECEIVE_BUFFER: Final = 64 * 1024
"""Receive buffer of the bare loop, in bytes; trio-websocket's own default of 4 KiB makes it slower."""


class Unavailable(Exception):
    """The client that is measured lacks what a loop needs."""


@attrs.frozen
class Servers:
    """Where the servers are."""

    folder: str
    """Holds the certificate of the authority."""
    port: int
    tls_port: int
    ack_port: int
    """The server of acknowledgements, in another process than that of the events."""

    def websocket(self, path: str, *, tls: bool = False) -> str:
        """Give the address of a WebSocket."""
        return f"wss://127.0.0.1:{self.tls_port}{path}" if tls else f"ws://127.0.0.1:{self.port}{path}"

    def context(self) -> ssl.SSLContext:
        """Give a TLS context that trusts the authority."""
        return ssl.create_default_context(cafile=str(Path(self.folder) / AUTHORITY))


def ask(port: int, path: str) -> bytes:
    """Make a request of a server, and return the body of the answer. It blocks, for less than a millisecond."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as one:
        one.sendall(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        return one.recv(65536).partition(b"\r\n\r\n")[2]


class Meter:
    """Measures the events of a feed after its start."""

    def __init__(self, servers: Servers, feed: Feed) -> None:
        self._servers = servers
        self.feed = feed
        self._cpu = self._wall = 0.0
        self.result: dict[str, Any] = {}

    def start(self) -> None:
        """Let the server send, and start the clocks."""
        gc.collect()
        ask(self._servers.port, "/go")
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self, last: str | None = None) -> None:
        """Stop the clocks. The id of the last event, where there is one, shows that every event has come."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        if last is not None:
            number = int(last.partition("-")[0])
            assert number == self.feed.warm + self.feed.count - 1, f"the last event is number {number}"
        self.result = {"events": self.feed.count, "cpu": cpu, "wall": wall}

    def latencies(self, samples: list[tuple[str, int]]) -> None:
        """Record how long after its sending each event was received: from its id, and the time of receipt in ns."""
        microseconds = sorted((at - int(name.partition("-")[2])) / 1_000 for name, at in samples)
        self.result |= {"p50": statistics.median(microseconds), "p99": microseconds[len(microseconds) * 99 // 100]}


# ---- the bare loop ---------------------------------------------------------------------------------------------------


async def bare(servers: Servers, feed: Feed, *, tls: bool = False) -> dict[str, Any]:
    """Receive with trio-websocket, and decode with orjson; nothing else."""
    import orjson
    import trio_websocket

    meter = Meter(servers, feed)
    async with trio_websocket.open_websocket_url(
        servers.websocket(feed.path, tls=tls) + "?access_token=token",
        ssl_context=servers.context() if tls else None,
        receive_buffer_size=RECEIVE_BUFFER,
    ) as ws:
        await ws.send_message('{"action":"subscribe","channel":"team-1"}')
        for _ in range(feed.warm):
            orjson.loads(await ws.get_message())
        meter.start()
        if feed.rate:
            samples = []
            for _ in range(feed.count):
                event = orjson.loads(await ws.get_message())
                samples.append((event["id"], time.monotonic_ns()))
            meter.stop(event["id"])
            meter.latencies(samples)
        else:
            for _ in range(feed.count):
                event = orjson.loads(await ws.get_message())
            meter.stop(event["id"])
    return meter.result


# ---- the client ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def client(
    servers: Servers, feed: Feed, *, tls: bool = False, store: bool = False, acknowledge: bool = False
) -> AsyncIterator[Realtime]:
    """Open the client on a feed."""
    from kadoa_trio import Endpoints, open_realtime

    endpoints = Endpoints(
        public_api=f"http://127.0.0.1:{servers.port}",
        websocket=servers.websocket(feed.path, tls=tls),
        realtime_api=f"http://127.0.0.1:{servers.ack_port}",
    )
    with tempfile.TemporaryDirectory() as folder:
        async with open_realtime(
            "key",
            endpoints=endpoints,
            acknowledge=acknowledge,
            cursor_store=f"{folder}/positions.db" if store else None,
            ssl_context=servers.context() if tls else None,
        ) as realtime:
            yield realtime


async def events(servers: Servers, feed: Feed, **options: bool) -> dict[str, Any]:
    """Receive with ``async for``."""
    meter = Meter(servers, feed)
    async with client(servers, feed, **options) as realtime:
        await skip(realtime.events, feed.warm)
        meter.start()
        left = feed.count
        if feed.rate:
            samples = []
            async for event in realtime.events:
                samples.append((event.id, time.monotonic_ns()))
                left -= 1
                if not left:
                    break
            meter.stop(event.id)
            meter.latencies(samples)
        else:
            async for event in realtime.events:  # noqa: B007  # the last one is used
                left -= 1
                if not left:
                    break
            meter.stop(event.id)
    return meter.result


async def skip(channel: EventChannel, count: int) -> None:
    """Receive the events that warm the loop up, and settle them."""
    for _ in range(count):
        await channel.receive()
    channel.settle()


async def typed(servers: Servers, feed: Feed) -> dict[str, Any]:
    """Receive with ``async for``, and read the payload of each event as an object of its class."""
    from kadoa_trio import WorkflowFinished

    meter = Meter(servers, feed)
    async with client(servers, feed) as realtime:
        for _ in range(feed.warm):
            assert isinstance((await realtime.events.receive()).message, WorkflowFinished)
        meter.start()
        left = feed.count
        async for event in realtime.events:
            _ = event.message
            left -= 1
            if not left:
                break
        meter.stop(event.id)
    return meter.result


async def workers(servers: Servers, feed: Feed) -> dict[str, Any]:
    """Receive with four tasks, each with a handle of its own."""
    import trio

    meter = Meter(servers, feed)
    left = feed.count

    async def work(channel: EventChannel, stop: Callable[[], None]) -> None:
        nonlocal left
        async with channel:
            async for _ in channel:
                left -= 1
                if not left:
                    stop()

    async with client(servers, feed) as realtime:
        await skip(realtime.events, feed.warm)
        meter.start()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(work, realtime.events.clone(), nursery.cancel_scope.cancel)
        meter.stop()
    return meter.result


async def batches(servers: Servers, feed: Feed) -> dict[str, Any]:
    """Receive in batches of at most 1,000 events, without waiting for more, and look at each event."""
    meter = Meter(servers, feed)
    async with client(servers, feed) as realtime:
        channel = realtime.events
        if not hasattr(channel, "batch"):
            raise Unavailable("this client hands over no batches")
        for left, measured in ((feed.warm, False), (feed.count, True)):
            if measured:
                meter.start()
            while left > 0:
                async with channel.batch(max_events=min(left, 1_000), within=0) as batch:
                    for event in batch:
                        last = event
                        left -= 1
        meter.stop(last.id)
    return meter.result


async def processed(servers: Servers, feed: Feed) -> dict[str, Any]:
    """Handle with `process`, eight workers and sixteen keys."""
    import trio

    import kadoa_trio

    if not hasattr(kadoa_trio, "process"):
        raise Unavailable("this client has no process()")
    meter = Meter(servers, feed)
    left = feed.warm + feed.count
    scope = trio.CancelScope()

    async def handle(_event: object) -> None:
        nonlocal left
        left -= 1
        if left == feed.count:
            meter.start()
        elif not left:
            scope.cancel()

    async with client(servers, feed) as realtime:
        with scope:
            await kadoa_trio.process(realtime.events, handle, workers=8, key=lambda event: event.id[-1])
        meter.stop()
    return meter.result


async def memory(servers: Servers, feed: Feed) -> dict[str, Any]:
    """Receive as a service does, with a store and acknowledgements, and record the peak of the memory.

    Raises:
        Unavailable: the system does not show the peak.
    """
    meter = Meter(servers, feed)
    async with client(servers, feed, store=True, acknowledge=True) as realtime:
        await skip(realtime.events, feed.warm)
        meter.start()
        left = feed.count
        tenth = left - left // 10
        early = 0.0
        async for event in realtime.events:  # noqa: B007  # the last one is used
            left -= 1
            if left == tenth:
                early = memory_of("VmHWM")
            if not left:
                break
        meter.stop(event.id)
        return meter.result | {"early": early, "peak": memory_of("VmHWM")}


def memory_of(field: str) -> float:
    """Read a field of this process's memory, in MB. Unlike getrusage's, its peak is not that of the parent process."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise Unavailable("the system has no /proc/self/status")
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


async def acknowledged(servers: Servers, feed: Feed, *, acknowledge: bool) -> dict[str, Any]:
    """Receive a feed of a rate, and wait until everything is acknowledged, or nothing more is."""
    import trio

    async def wait_sent() -> None:
        sent = -1
        while acknowledge and sent < realtime.statistics().acknowledged:
            sent = realtime.statistics().acknowledged
            await trio.sleep(0.3)

    meter = Meter(servers, feed)
    async with client(servers, feed, acknowledge=acknowledge) as realtime:
        await skip(realtime.events, feed.warm)
        await wait_sent()
        before = realtime.statistics().acknowledged
        meter.start()
        left = feed.count
        async for event in realtime.events:  # noqa: B007  # the last one is used
            left -= 1
            if not left:
                break
        realtime.events.settle()
        at_end = realtime.statistics().acknowledged - before
        await wait_sent()
        meter.stop(event.id)
        return meter.result | {
            "at_end": at_end,
            "acknowledged": realtime.statistics().acknowledged - before,
            "dropped": realtime.statistics().acknowledgements_dropped,
        }


# ---- Kadoa's official SDK --------------------------------------------------------------------------------------------


def official(servers: Servers, feed: Feed, *, silenced: bool = False) -> dict[str, Any]:
    """Receive with Kadoa's official SDK, unmodified, as its documentation shows it.

    Args:
        servers: where the servers are.
        feed: the events.
        silenced: replace its function that sends an acknowledgement by one that does nothing.

    Raises:
        Unavailable: it is not installed.
    """
    environment = {
        "KADOA_API_KEY": "key",
        "KADOA_PUBLIC_API_URI": f"http://127.0.0.1:{servers.port}",
        "KADOA_WSS_API_URI": servers.websocket(feed.path),
        "KADOA_REALTIME_API_URI": f"http://127.0.0.1:{servers.ack_port}",
    }
    try:
        sdk = importlib.import_module("kadoa_sdk")
    except ImportError:
        raise Unavailable("kadoa-sdk is not installed; see nox -s bench-peers") from None
    meter = Meter(servers, feed)
    samples: list[tuple[str, int]] = []

    async def main() -> None:
        reached = asyncio.Event()
        counts = itertools.count(1)
        last: dict[str, Any] = {}

        def listen(event: dict[str, Any]) -> None:
            nonlocal last
            last = event
            if feed.rate:
                samples.append((event[feed.id_field], time.monotonic_ns()))
            number = next(counts)
            if number == feed.warm or number == feed.warm + feed.count:
                reached.set()

        async def acknowledge_nothing(_event_id: str) -> None:
            pass

        kadoa = sdk.KadoaClient(sdk.KadoaClientConfig())
        realtime = await kadoa.connect_realtime()
        if silenced:
            realtime._acknowledge_event = acknowledge_nothing
        realtime.on_event(listen)
        await reached.wait()
        reached.clear()
        samples.clear()
        meter.start()
        await reached.wait()
        meter.stop(last[feed.id_field])
        await realtime.close_async()

    with unittest.mock.patch.dict(os.environ, environment):
        asyncio.run(main())
    if feed.rate:
        meter.latencies(samples)
    return meter.result
