"""A server in a process of its own, so that its cost is not in the client's: ``python -m tests.bench._server FOLDER``.

It prints its two ports, for plain connections and for TLS with the certificate
in FOLDER, as JSON. What it does is in the path of each request:

=======================================  ======================================
request                                  what it does
=======================================  ======================================
``POST .../v4/oauth2/token``             gives a token
``POST /throttle/RATE/v4/oauth2/token``  the same, at most RATE times a second; else 429 with ``Retry-After: 1``
``POST .../api/v1/events/ack``           counts an acknowledgement
``GET /go``                              lets the feed that waits begin
``GET /counts``                          gives what was counted
WebSocket ``/feed/...``                  sends events; see `Feed`
WebSocket ``/idle``                      sends a heartbeat, again and again
=======================================  ======================================
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
import ssl
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs
import trio

BLOCK: Final = 256 * 1024
"""Frames are sent in pieces of about this many bytes."""
MAX_ENCODED: Final = 256 * 1024 * 1024
"""Maximum size of a feed that is encoded as a whole beforehand, in bytes; a larger one is encoded while it is sent."""
CERTIFICATE: Final = "server.pem"
AUTHORITY: Final = "authority.pem"
HEARTBEAT: Final = 15.0
"""Seconds between two heartbeats, as Kadoa's server sends them."""
_CLOSE: Final = b"\x88\x02\x03\xe8"


@attrs.frozen
class Feed:
    """Which events a WebSocket brings: first `warm`, then, after ``GET /go``, `count` more."""

    size: int = 450
    """Length of an event's frame without its header, in bytes."""
    warm: int = 1_000
    count: int = 45_000
    rate: int = 0
    """Events per second after the start, each with the time at which it was sent; 0 for as many as the client takes."""
    id_field: str = "id"
    """How the field with the id is named. The official SDK acknowledges no event that has no ``id``."""

    @property
    def path(self) -> str:
        """The path that asks for this feed."""
        return f"/feed/{self.size}/{self.warm}/{self.count}/{self.rate}/{self.id_field}"

    @classmethod
    def of(cls, path: str) -> Feed:
        """Read a feed from its path."""
        size, warm, count, rate, id_field = path.split("/")[2:]
        return cls(int(size), int(warm), int(count), int(rate), id_field)

    def frames(self) -> Frames:
        """Give what encodes its events."""
        return Frames(self.size, self.id_field)


class Frames:
    """Encodes events, each in a frame of the same length."""

    def __init__(self, size: int, id_field: str = "id") -> None:
        begin = f'{{"eventType":"workflow_finished","{id_field}":"%012d-%020d","timestamp":"2025-01-15T10:31:00.000Z",'
        end = '"_cursor":"%013d-0","message":{"id":"job-456","workflowId":"wf_123","note":"%s"}}'
        padding = size - len((begin + end) % (0, 0, 0, ""))
        payload = (begin + end).replace("%s", "x" * max(padding, 0)).encode()
        length = max(size, size - padding)
        head = struct.pack("!BBH", 0x81, 126, length) if length < 1 << 16 else struct.pack("!BBQ", 0x81, 127, length)
        self._frame = head.replace(b"%", b"%%") + payload
        self.size: int = len(head) + length
        """Length of a frame, in bytes."""

    def encode(self, number: int, sent: int = 0) -> bytes:
        """Encode the event with a number, which stands in its id beside the time at which it was sent."""
        return self._frame % (number, sent, 1_742_000_000_000 + number)

    def blocks(self, first: int, count: int) -> Iterator[bytes]:
        """Encode *count* events from *first* on, in pieces of about `BLOCK` bytes."""
        step = max(1, BLOCK // self.size)
        for begin in range(first, first + count, step):
            yield b"".join(map(self.encode, range(begin, min(begin + step, first + count))))


class Server:
    """Answers what the module's docstring lists."""

    def __init__(self) -> None:
        self.counts = {"tokens": 0, "refused": 0, "acks": 0, "sockets": 0}
        self._go = trio.Event()
        self._granted: list[float] = []

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one connection."""
        try:
            async with stream:
                await self._serve(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client has left

    async def _serve(self, stream: trio.abc.Stream) -> None:
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                more = await stream.receive_some(65536)
                if not more:
                    return
                data += more
            head, _, data = data.partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            _method, target, _version = first.split(" ")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            path = target.partition("?")[0]
            if "sec-websocket-key" in headers:
                await stream.send_all(upgrade(headers["sec-websocket-key"]))
                await self._serve_socket(stream, path)
                return
            length = int(headers.get("content-length", 0))
            while len(data) < length:
                more = await stream.receive_some(65536)
                if not more:
                    return
                data += more
            data = data[length:]
            await stream.send_all(self._answer(path))

    def _answer(self, path: str) -> bytes:
        status, extra, body = "200 OK", "", b"{}"
        if path.endswith("/events/ack"):
            self.counts["acks"] += 1
        elif path.endswith("/oauth2/token"):
            if path.startswith("/throttle/") and not self._grant(int(path.split("/")[2])):
                self.counts["refused"] += 1
                status, extra = "429 Too Many Requests", "Retry-After: 1\r\n"
            else:
                self.counts["tokens"] += 1
                body = b'{"access_token":"token","team_id":"team-1"}'
        elif path == "/go":
            self._go.set()
        elif path == "/counts":
            body = json.dumps(self.counts).encode()
        else:
            status = "404 Not Found"
        head = f"HTTP/1.1 {status}\r\n{extra}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def _grant(self, rate: int) -> bool:
        now = trio.current_time()
        self._granted = [at for at in self._granted if now - at < 1]
        if len(self._granted) >= rate:
            return False
        self._granted.append(now)
        return True

    async def _serve_socket(self, stream: trio.abc.Stream, path: str) -> None:
        self.counts["sockets"] += 1
        await stream.receive_some(65536)  # the subscription
        async with trio.open_nursery() as nursery:
            if path == "/idle":
                nursery.start_soon(self._beat, stream)
            else:
                nursery.start_soon(self._feed, stream, Feed.of(path))
            async for data in stream:
                if data[0] == 0x88:
                    break
            nursery.cancel_scope.cancel()
        await stream.send_all(_CLOSE)

    @staticmethod
    async def _beat(stream: trio.abc.Stream) -> None:
        text = b'{"type":"heartbeat","timestamp":1742034600000}'
        # The first one at once, because the client waits for a frame; the others spread over the time between.
        delay = 0.0
        while True:
            await trio.sleep(delay)
            delay = HEARTBEAT if delay else random.uniform(0, HEARTBEAT)
            await stream.send_all(bytes([0x81, len(text)]) + text)

    async def _feed(self, stream: trio.abc.Stream, feed: Feed) -> None:
        frames = feed.frames()
        blocks: Iterator[bytes] | list[bytes] = frames.blocks(feed.warm, feed.count)
        if feed.size * feed.count <= MAX_ENCODED and not feed.rate:
            blocks = list(blocks)
        go = self._go = trio.Event()
        for block in frames.blocks(0, feed.warm):
            await stream.send_all(block)
        await go.wait()
        if feed.rate:
            began = trio.current_time()
            for number in range(feed.count):
                await trio.sleep_until(began + number / feed.rate)
                await stream.send_all(frames.encode(feed.warm + number, time.monotonic_ns()))
        else:
            for block in blocks:
                await stream.send_all(block)
        await trio.sleep(HEARTBEAT)
        await self._beat(stream)  # some loops wait for acknowledgements


def upgrade(key: str) -> bytes:
    """Accept a WebSocket (RFC 6455, section 4.2.2)."""
    accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def allow_many_files() -> None:
    """Let this process open as many sockets as the system allows."""
    with contextlib.suppress(ImportError):
        import resource

        _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def main(folder: Path) -> None:
    """Serve until standard input ends, which it does when the process that started this one is gone."""
    allow_many_files()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / CERTIFICATE)
    server = Server()

    async def serve_tls(stream: trio.SocketStream) -> None:
        await server.serve(trio.SSLStream(stream, tls, server_side=True, https_compatible=True))

    async with trio.open_nursery() as nursery:
        ports = []
        for handler in (server.serve, serve_tls):
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=4_096)
            nursery.start_soon(trio.serve_listeners, handler, listeners)
            ports.append(listeners[0].socket.getsockname()[1])
        print(json.dumps(ports), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
