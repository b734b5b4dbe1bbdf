"""Byte streams that tests can break."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import trio
import trio.testing


class FaultyStream(trio.abc.HalfCloseableStream):
    """The server's end of a connection."""

    def __init__(
        self, inner: trio.abc.HalfCloseableStream, *, prefix: bytes = b"", on_reset: Callable[[], None] | None = None
    ) -> None:
        self._inner = inner
        self._prefix = prefix
        self._on_reset = on_reset
        self._silenced = trio.Event()
        self.rate: float | None = None
        """Maximum rate of sending, in bytes per second; None for no limit."""

    @property
    def silent(self) -> bool:
        return self._silenced.is_set()

    def go_silent(self) -> None:
        """Behave like a host without power: read nothing, and drop everything that is sent."""
        self._silenced.set()

    def reset(self) -> None:
        """Break the connection, as a TCP reset does."""
        if self._on_reset is not None:
            self._on_reset()
        elif isinstance(self._inner, trio.SocketStream):
            self._inner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._inner.socket.close()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.silent:
            await trio.lowlevel.checkpoint()
            return
        if self.rate is None:
            await self._inner.send_all(data)
            return
        step = max(1, int(self.rate / 10))
        for start in range(0, len(data), step):
            await self._inner.send_all(data[start : start + step])
            await trio.sleep(step / self.rate)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._inner.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._prefix:
            await trio.lowlevel.checkpoint()
            taken, self._prefix = self._prefix, b""
            return taken
        data = await self._inner.receive_some(max_bytes)
        if self.silent:
            await trio.sleep_forever()
        return data

    async def aclose(self) -> None:
        await self._inner.aclose()


class BreakableStream(trio.abc.HalfCloseableStream):
    """The client's end of a connection in memory, which `FaultyStream.reset` on the other end breaks."""

    def __init__(self, inner: trio.abc.HalfCloseableStream) -> None:
        self._inner = inner
        self._broken = False
        self._receiving: trio.CancelScope | None = None

    def break_(self) -> None:
        self._broken = True
        if self._receiving is not None:
            self._receiving.cancel(reason="reset")

    def _check(self) -> None:
        if self._broken:
            raise trio.BrokenResourceError("connection reset by peer")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._check()
        await self._inner.send_all(data)
        self._check()

    async def wait_send_all_might_not_block(self) -> None:
        self._check()
        await self._inner.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        self._check()
        await self._inner.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        self._check()
        with trio.CancelScope() as self._receiving:
            data: bytes | bytearray = await self._inner.receive_some(max_bytes)
            return data
        self._check()
        raise AssertionError("only a reset ends the scope")

    async def aclose(self) -> None:
        await self._inner.aclose()


def stream_pair() -> tuple[BreakableStream, FaultyStream]:
    """Make a connection in memory: the client's end and the server's."""
    ours, theirs = trio.testing.memory_stream_pair()
    client = BreakableStream(ours)
    return client, FaultyStream(theirs, on_reset=client.break_)
