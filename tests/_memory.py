"""HTTP and WebSocket servers in memory, for clients under virtual time: what passes is bytes, and httpx's own pool."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpcore
import httpx
import trio
import trio.testing
from _loopback import Handler


class MemoryServers:
    """A `kadoa_trio.Network`: each stream that is opened has a server of its own.

    Args:
        answer: serves the HTTP endpoints.
        websocket: serves the WebSocket.
        before_write: called before each write of a request, to hold it up.
    """

    def __init__(
        self, answer: Handler, websocket: Handler, *, before_write: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._answer = answer
        self._websocket = websocket
        self._before_write = before_write
        self._nursery: trio.Nursery | None = None
        self.http_transport = _Transport(_Backend(self))
        self.settlement_observer = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as self._nursery:
            yield
            self._nursery.cancel_scope.cancel()

    async def open_stream(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        return self._serve(self._websocket)

    def _serve(self, handler: Handler) -> trio.abc.HalfCloseableStream:
        client, server = trio.testing.memory_stream_pair()
        assert self._nursery is not None
        self._nursery.start_soon(self._run, handler, server)
        return client

    @staticmethod
    async def _run(handler: Handler, stream: trio.abc.Stream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                await handler(stream)


class _Transport(httpx.AsyncHTTPTransport):
    def __init__(self, backend: httpcore.AsyncNetworkBackend) -> None:
        self._pool = httpcore.AsyncConnectionPool(network_backend=backend)


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self, servers: MemoryServers) -> None:
        self._servers = servers

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        await trio.lowlevel.checkpoint()
        return _Stream(self._servers._serve(self._servers._answer), self._servers._before_write)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, stream: trio.abc.Stream, before_write: Callable[[], Awaitable[None]] | None) -> None:
        self._stream = stream
        self._before_write = before_write

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except trio.BrokenResourceError as exc:
            raise httpcore.ReadError(str(exc)) from exc

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._before_write is not None:
            await self._before_write()
        try:
            await self._stream.send_all(buffer)
        except trio.BrokenResourceError as exc:
            raise httpcore.WriteError(str(exc)) from exc

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        return None
