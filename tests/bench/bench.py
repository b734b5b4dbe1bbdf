"""Events per second through `realtime.events`, as a ratio to a bare trio-websocket loop that only decodes JSON.

A server process sends frames that are encoded beforehand, as fast as they are
read. Both clients run in this process, one after the other, for several
rounds; the ratio compares the best rounds. ``--memory`` sends a million events
and prints the peak memory after the first tenth and at the end.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import resource
import socket
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import orjson
import trio
import trio_websocket

from kadoa_trio import Endpoints, SQLiteCursorStore, open_realtime
from kadoa_trio.testing import open_simulated_kadoa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from _loopback import frame, upgrade

BUFFER = 256 * 1024


def serve(ready: Connection, count: int, size: int) -> None:
    """Answer token requests, and send *count* events of about *size* bytes on each WebSocket."""
    listener = socket.create_server(("127.0.0.1", 0))
    ready.send(listener.getsockname()[1])
    padding = "x" * max(size - 190, 1)
    blocks: list[bytes] = []
    block = bytearray()
    for number in range(count):
        block += frame(
            (
                f'{{"eventType":"workflow_finished","id":"9b0e1f64-{number:012d}","timestamp":"2025-01-15T10:31:00.000Z",'
                f'"_cursor":"1742-{number}","message":{{"id":"job-456","workflowId":"wf_123","note":"{padding}"}}}}'
            ).encode()
        )
        if len(block) >= BUFFER or number == count - 1:
            blocks.append(bytes(block))
            block.clear()
    while True:
        connection, _address = listener.accept()
        with connection:
            connection.settimeout(60)
            head = b""
            while b"\r\n\r\n" not in head:
                data = connection.recv(65536)
                if not data:
                    break
                head += data
            if head.startswith(b"POST"):
                body = b'{"access_token":"token","team_id":"team-1"}'
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
                )
            elif head:
                try:
                    connection.sendall(upgrade(head))
                    connection.recv(65536)  # the subscription
                    for data in blocks:
                        connection.sendall(data)
                    connection.recv(65536)  # the close frame
                except OSError:
                    pass


async def bare(port: int, count: int, *, buffer: int = 4096) -> float:
    """Receive and decode. 4 KiB is the default receive buffer of trio-websocket."""
    async with trio_websocket.open_websocket_url(
        f"ws://127.0.0.1:{port}/?access_token=token", receive_buffer_size=buffer
    ) as ws:
        began = time.perf_counter()
        await ws.send_message('{"action":"subscribe","channel":"team-1"}')
        for _ in range(count):
            orjson.loads(await ws.get_message())
        return count / (time.perf_counter() - began)


async def ours(port: int, count: int, *, read: bool = False, store: str | None = None, acks: bool = False) -> float:
    """Receive through the client. Acknowledgements go to another server, because this one answers between rounds only."""
    http, ws = f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}"
    async with (
        open_simulated_kadoa(loopback=True) as kadoa,
        open_realtime(
            "key",
            endpoints=Endpoints(public_api=http, websocket=ws, realtime_api=kadoa.endpoints.realtime_api),
            acknowledge=acks,
            cursor_store=None if store is None else SQLiteCursorStore(store),
        ) as realtime,
    ):
        began = time.perf_counter()
        number = 0
        async for event in realtime.events:
            if read:
                _ = event.message
            number += 1
            if number == count // 10:
                print(f"    peak memory after {number:,} events: {peak():,.1f} MB") if count >= 1_000_000 else None
            if number == count:
                break
        return count / (time.perf_counter() - began)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(count: int, size: int, rounds: int) -> None:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, count, size), daemon=True)
    process.start()
    port = here.recv()
    names = ["bare", "bare, large buffer", "ours", "ours, message read", "ours, SQLite", "ours, SQLite, acks"]
    results: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in results}
    for _ in range(rounds):
        for name in results:
            before = time.process_time()
            if name.startswith("bare"):
                buffer = BUFFER if "large" in name else 4096
                results[name].append(trio.run(lambda buffer=buffer: bare(port, count, buffer=buffer)))
            else:
                with tempfile.TemporaryDirectory() as folder:
                    store = f"{folder}/positions.db" if "SQLite" in name else None
                    run = functools.partial(ours, port, count, read="read" in name, store=store, acks="acks" in name)
                    results[name].append(trio.run(run))
            cpu[name].append((time.process_time() - before) / count * 1e6)
    best = max(results["bare"])
    for name, rates in results.items():
        print(
            f"{size:>9,} B  {name:20} {max(rates):>10,.0f} events/s  {min(cpu[name]):8.1f} µs CPU per event"
            f"  ratio {max(rates) / best:.2f} (median {statistics.median(rates) / statistics.median(results['bare']):.2f})"
        )
    process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    if arguments.memory:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, 1_000_000, 450), daemon=True)
        process.start()
        trio.run(ours, here.recv(), 1_000_000)
        print(f"    peak memory after 1,000,000 events: {peak():,.1f} MB")
        process.terminate()
        return
    measure(30_000, 450, arguments.rounds)
    measure(300, 500_000, arguments.rounds)


if __name__ == "__main__":
    main()
