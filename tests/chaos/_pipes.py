"""A TCP connection in memory, which can be full, half open, ended or reset."""

from __future__ import annotations

from collections.abc import Callable

import trio


class Wire:
    """Both ends of a connection.

    Args:
        window: how many bytes the network holds on the way to the client.
        chunk: how many arrive at once at most; 0 for no limit.
        drop_unread: whether a reset destroys what has arrived and was not read.
        on_closed: called when the client has closed its end.
    """

    def __init__(self, window: int, chunk: int, drop_unread: bool, on_closed: Callable[[], None]) -> None:
        self.window = window
        self.chunk = chunk
        self.drop_unread = drop_unread
        self.on_closed = on_closed
        self.to_client = bytearray()
        self.to_server = bytearray()
        self.is_reset = False
        self.is_finished = False
        """The server has sent its end of stream."""
        self.client_closed = False
        self.client_waits = False
        """The client waits for bytes: it has read all that has arrived."""
        self._client = trio.lowlevel.ParkingLot()
        self._server = trio.lowlevel.ParkingLot()
        self._space = trio.lowlevel.ParkingLot()

    # ---- the server's end --------------------------------------------------------------------------------------

    def reset(self) -> None:
        self.is_reset = True
        self._wake()

    def finish(self) -> None:
        self.is_finished = True
        self._wake()

    def _wake(self) -> None:
        for lot in (self._client, self._server, self._space):
            lot.unpark_all()

    @property
    def is_over(self) -> bool:
        return self.is_reset or self.is_finished or self.client_closed

    def write_now(self, data: bytes) -> None:
        """Put bytes on the way, whatever the window."""
        if not self.is_over:
            self.to_client += data
            self._client.unpark_all()

    async def write(self, data: bytes) -> None:
        """Put bytes on the way as soon as there is space."""
        await trio.lowlevel.checkpoint()
        while len(self.to_client) >= self.window and not self.is_over:
            await self._space.park()
        self.write_now(data)

    async def read(self) -> bytes:
        """Give what the client has sent; nothing means the end."""
        await trio.lowlevel.checkpoint()
        while not self.to_server:
            if self.is_over:
                return b""
            await self._server.park()
        data = bytes(self.to_server)
        self.to_server.clear()
        return data


class ClientStream(trio.abc.HalfCloseableStream):
    """The client's end."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        wire = self._wire
        if wire.client_closed:
            raise trio.ClosedResourceError
        if wire.is_reset:
            raise trio.BrokenResourceError("the connection was reset")
        wire.to_server += data
        wire._server.unpark_all()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        wire = self._wire
        while True:
            if wire.client_closed:
                raise trio.ClosedResourceError
            if wire.is_reset and (wire.drop_unread or not wire.to_client):
                raise trio.BrokenResourceError("the connection was reset")
            if wire.to_client:
                size = min(max_bytes or 65_536, wire.chunk or 65_536)
                data = bytes(wire.to_client[:size])
                del wire.to_client[:size]
                wire._space.unpark_all()
                return data
            if wire.is_finished:
                return b""
            wire.client_waits = True
            try:
                await wire._client.park()
            finally:
                wire.client_waits = False

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        wire = self._wire
        if not wire.client_closed:
            wire.client_closed = True
            wire._wake()
            wire.on_closed()
        await trio.lowlevel.checkpoint()
