"""Servers on the loopback interface that misbehave byte by byte, and a certificate authority for them.

The servers write the wire themselves: a library on their side would refuse to
send most of what these tests are about.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import re
import ssl
import struct
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import trio
import trustme

Handler = Callable[[trio.abc.Stream], Awaitable[object]]

CLOSE_1000 = b"\x88\x02\x03\xe8"


@asynccontextmanager
async def serving(handler: Handler, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Serve *handler* on a port that the system chooses, and give the port; its streams are closed behind it."""

    async def serve(stream: trio.abc.Stream) -> None:
        # What a client does to its server is no fault of the server here.
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                if isinstance(stream, trio.SSLStream):
                    await stream.do_handshake()
                await handler(stream)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        served: list[trio.abc.Listener[trio.abc.Stream]] = [
            listener if tls is None else trio.SSLListener(listener, tls, https_compatible=True)
            for listener in listeners
        ]
        nursery.start_soon(trio.serve_listeners, serve, served)
        port: int = listeners[0].socket.getsockname()[1]
        yield port
        nursery.cancel_scope.cancel()


async def read_head(stream: trio.abc.Stream) -> bytes:
    """Read an HTTP request up to its blank line."""
    head = b""
    while b"\r\n\r\n" not in head:
        data = await stream.receive_some()
        if not data:
            raise trio.BrokenResourceError
        head += data
    return head


def upgrade(head: bytes) -> bytes:
    """Give the answer that accepts the WebSocket request *head*."""
    match = re.search(rb"Sec-WebSocket-Key: (\S+)", head, re.IGNORECASE)
    assert match is not None
    accept = base64.b64encode(hashlib.sha1(match[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


async def accept(stream: trio.abc.Stream, then: bytes = b"") -> bytes:
    """Accept the WebSocket request, send *then* in the same breath, and give the request's head."""
    head = await read_head(stream)
    await stream.send_all(upgrade(head) + then)
    return head


def frame(payload: bytes, opcode: int = 1, *, final: bool = True) -> bytes:
    """Build a frame as a server sends it."""
    first = opcode | (0x80 if final else 0)
    if len(payload) < 126:
        return struct.pack("!BB", first, len(payload)) + payload
    if len(payload) < 1 << 16:
        return struct.pack("!BBH", first, 126, len(payload)) + payload
    return struct.pack("!BBQ", first, 127, len(payload)) + payload


def close_frame(code: int, reason: str = "") -> bytes:
    """Build a close frame."""
    return frame(struct.pack("!H", code) + reason.encode(), opcode=8)


@functools.cache
def authority() -> trustme.CA:
    """Give the certificate authority of this test run."""
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def server_tls(*names: str) -> ssl.SSLContext:
    """Give a server's TLS context with a certificate for *names*."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert(*names, key_type=trustme.KeyType.ECDSA).configure_cert(context)
    return context


def trusting_tls() -> ssl.SSLContext:
    """Give a client's TLS context that trusts the authority."""
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return context


def chain(exc: BaseException) -> Iterator[BaseException]:
    """Walk everything that an exception keeps alive by cause, context and membership of a group."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [exc]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions


def everything_said(exc: BaseException) -> str:
    """Join all that can be got out of an exception's chain: texts, arguments, attributes, notes, and what a renderer
    of tracebacks shows of the frames and their local variables."""
    return "\n".join(
        f"{one} {one!r} {one.args!r} {vars(one)!r} {getattr(one, '__notes__', ())!r} {rendered(one)}"
        for one in chain(exc)
    )


def rendered(exc: BaseException) -> str:
    """Render a traceback with the local variables of its frames, as tools that report errors do."""
    return "".join(traceback.TracebackException.from_exception(exc, capture_locals=True).format())
