"""One client's connection, on the simulated server's side."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, cast

import trio
import trio_websocket

from .._checks import check_delay, check_rate
from ._model import Faults, PublishedEvent, Stream
from ._streams import FaultyStream

_CLOSE_TIMEOUT = 5.0
_MAX_REASON = 123  # RFC 6455, section 5.5: a control frame holds 125 bytes, two of them for the code

_Action = Callable[[trio_websocket.WebSocketConnection], Awaitable[object]]


class Server(Protocol):
    """What a connection needs of its server. `SimulatedKadoa` is one; its users do not call the methods."""

    faults: Faults
    stream: Stream
    team_id: str
    heartbeat_interval: float
    handshakes: int

    def _start(self, async_fn: Callable[..., Awaitable[object]], *args: object) -> None:
        """Run a task that outlives the connection."""

    def _spend(self, counter: str, faulty: bool) -> bool:
        """Return whether a request meets a fault, and count it in the field *counter* of `Faults`."""
        ...

    def _token_is_good(self, path: str) -> bool:
        """Return whether the path of a handshake holds a valid token.

        Raises:
            ValueError: it is not the path of a URL.
        """
        ...

    def _connection_subscribed(self, connection: SimulatedConnection) -> None:
        """Take note of a connection that has subscribed."""

    def _connection_ended(self, connection: SimulatedConnection) -> None:
        """Take note of the end of a connection. Called once for each."""


class SimulatedConnection:
    """A WebSocket that a client has opened. Made by `SimulatedKadoa`; every fault is a method."""

    def __init__(self, kadoa: Server, number: int, stream: FaultyStream) -> None:
        self._kadoa = kadoa
        self._stream = stream
        self._scope = trio.CancelScope()
        self._send, self._receive = trio.open_memory_channel[_Action](10_000_000)
        self._waiting: list[PublishedEvent] | None = None
        self.number = number
        """The number of this connection, counted from 1 over all connections."""
        self.opened_at: float = trio.current_time()
        self.subscribed: bool = False
        self.last_cursor: str | None = None
        """The cursor that the client subscribed with."""
        self.received: list[Any] = []
        """Every message that the client has sent, parsed; one that is not JSON is as it was sent."""
        self.sent: list[PublishedEvent] = []
        """Every event that was sent; repeated events are listed again."""
        self.draining: bool = False
        self.open: bool = True
        self.client_close_code: int | None = None
        """The close code that the client sent, if it closed first."""

    def __repr__(self) -> str:
        return f"<SimulatedConnection {self.number}{'' if self.open else ', ended'}>"

    @property
    def silent(self) -> bool:
        """Whether `go_silent` was called."""
        return self._stream.silent

    # ---- what tests do -----------------------------------------------------------------------------------------

    def drain(
        self,
        retry_after_ms: Any = 500,
        *,
        close_after: float | None = None,
        deadline_at: Any = "2026-03-22T14:05:30.000Z",
        resume_supported: Any = True,
        omit: tuple[str, ...] = (),
    ) -> None:
        """Send a drain notice, as Kadoa does before a deployment.

        Args:
            retry_after_ms: the field ``retryAfterMs``; any JSON value.
            close_after: close the connection with 1001 after this time, in
                seconds; None to leave it open.
            deadline_at: the field ``deadlineAt``; any JSON value.
            resume_supported: the field ``resumeSupported``; any JSON value.
            omit: fields to leave out, by their names on the wire.

        Raises:
            ValueError: *close_after* is negative or not finite.
            TypeError: a field is not JSON.
        """
        if close_after is not None:
            check_delay("close_after", close_after)
        self.draining = True
        notice = {
            "type": "control.draining",
            "connectionId": f"simulated-{self.number}",
            "retryAfterMs": retry_after_ms,
            "deadlineAt": deadline_at,
            "resumeSupported": resume_supported,
        }
        self.send_raw(json.dumps({name: value for name, value in notice.items() if name not in omit}))
        if close_after is not None:
            self._kadoa._start(self._close_later, close_after)

    @trio.lowlevel.enable_ki_protection
    async def _close_later(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self.close(1001, "Server shutting down")

    def close(self, code: int = 1001, reason: str = "Server shutting down") -> None:
        """Send what is queued, then a close frame.

        Raises:
            ValueError: a close frame cannot hold the code or the reason.
        """
        if type(code) is not int or not 0 <= code <= 65_535:
            raise ValueError("code must be a whole number from 0 to 65535")
        if not isinstance(reason, str) or len(reason.encode()) > _MAX_REASON:
            raise ValueError(f"reason must be a string of maximum {_MAX_REASON} bytes in UTF-8")

        async def close(ws: trio_websocket.WebSocketConnection) -> None:
            with trio.move_on_after(_CLOSE_TIMEOUT):
                await ws.aclose(code, reason)
            self._scope.cancel(reason="closed")

        self._queue(close)

    def reset(self) -> None:
        """Break the connection immediately, as a TCP reset does."""
        self._forget()
        self._stream.reset()
        self._scope.cancel(reason="reset")

    def eof(self) -> None:
        """Close the stream without a close frame."""
        self._forget()
        self._scope.cancel(reason="eof")

    def go_silent(self) -> None:
        """Stop sending and reading, and leave the connection open, as a host without power does."""
        self._stream.go_silent()

    def send_raw(self, message: str | bytes) -> None:
        """Send a message unchanged.

        Raises:
            TypeError: *message* is neither a string nor bytes.
            ValueError: UTF-8 cannot encode it.
        """
        if not isinstance(message, (str, bytes)):
            raise TypeError(f"message must be a string or bytes, not {type(message).__name__}")
        if isinstance(message, str):
            message.encode()
        self._queue(lambda ws: ws.send_message(message))

    def send_heartbeat(self) -> None:
        """Send a heartbeat."""
        self.send_raw(json.dumps({"type": "heartbeat", "timestamp": int(trio.current_time() * 1000)}))

    def send_slowly(self, event: PublishedEvent, *, bytes_per_second: float) -> None:
        """Send an event over a slow link. Everything that is sent later waits for it.

        Raises:
            ValueError: *bytes_per_second* is not positive or not finite.
        """
        check_rate("bytes_per_second", bytes_per_second)

        async def send(ws: trio_websocket.WebSocketConnection) -> None:
            self._stream.rate = bytes_per_second
            try:
                await ws.send_message(event.frame)
            finally:
                self._stream.rate = None

        self.sent.append(event)
        self._queue(send)

    def deliver(self, event: PublishedEvent) -> None:
        """Send an event, for example a second time or out of order."""
        self.sent.append(event)
        self.send_raw(event.frame)

    def hold(self) -> None:
        """Hold live events back until `release`."""
        if self._waiting is None:
            self._waiting = []

    def release(self) -> None:
        """Send the events that were held back."""
        waiting, self._waiting = self._waiting, None
        for event in waiting or ():
            self.deliver(event)

    # ---- what the server does ----------------------------------------------------------------------------------

    def live(self, event: PublishedEvent) -> None:
        """Send a newly published event, if the client has subscribed."""
        if not self.subscribed or not self.open:
            return
        if self._waiting is not None:
            self._waiting.append(event)
        else:
            self.deliver(event)

    def _queue(self, action: _Action) -> None:
        if self.open:
            self._send.send_nowait(action)

    def _forget(self) -> None:
        if self.open:
            self.open = False
            self._kadoa._connection_ended(self)

    async def serve(self) -> None:
        """Serve the connection until it ends. No behaviour of the client raises."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    # Caught inside of the nursery, which would wrap the exception.
                    with contextlib.suppress(
                        trio_websocket.ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError
                    ):
                        await self._handshake(nursery)
                    self._scope.cancel(reason="the connection has ended")
        finally:
            self._forget()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._stream)

    async def _handshake(self, nursery: trio.Nursery) -> None:
        kadoa, faults = self._kadoa, self._kadoa.faults
        guarded = _Guarded(nursery, self._scope)
        request = await trio_websocket.wrap_server_stream(
            cast("trio.Nursery", guarded), cast("trio.SocketStream", self._stream), 1, 64 * 1024 * 1024, 64 * 1024
        )
        kadoa.handshakes += 1
        if kadoa._spend("handshake_failures", faults.handshake_hang or faults.handshake_status is not None):
            if faults.handshake_hang:
                await trio.sleep_forever()
            assert faults.handshake_status is not None
            headers = [(name.encode(), value.encode()) for name, value in faults.handshake_headers.items()]
            await request.reject(faults.handshake_status, extra_headers=headers, body=b'{"error":"simulated"}')
            return
        try:
            good = kadoa._token_is_good(request.path)
        except ValueError:
            await request.reject(400, body=b'{"error":"the request cannot be read"}')
            return
        if not good:
            await request.reject(401, body=b'{"error":"invalid access token"}')
            return
        ws = await request.accept()
        nursery.start_soon(self._write, ws)
        nursery.start_soon(self._beat)
        try:
            while True:
                self._take(await ws.get_message())
        except trio_websocket.ConnectionClosed as exc:
            if exc.reason is not None:
                self.client_close_code = exc.reason.code

    def _take(self, message: str | bytes) -> None:
        try:
            frame = json.loads(message)
        except (ValueError, RecursionError):
            frame = message
        self.received.append(frame)
        if isinstance(frame, Mapping) and frame.get("action") == "subscribe":
            cursor = frame.get("lastCursor")
            if frame.get("channel") != self._kadoa.team_id:
                self.close(1008, "unknown channel")
            elif cursor is not None and not isinstance(cursor, str):
                self.close(1008, "invalid cursor")
            else:
                self._subscribe(cursor)

    def _subscribe(self, cursor: str | None) -> None:
        kadoa, faults = self._kadoa, self._kadoa.faults
        self.last_cursor = cursor
        kadoa._connection_subscribed(self)
        if faults.accept_then_reset:
            self.reset()
        elif faults.accept_then_close is not None:
            self.close(faults.accept_then_close, "simulated")
        elif cursor is not None and faults.refuse_cursors and faults.refuse_cursors_after:
            self.send_heartbeat()
            kadoa._start(self._refuse_later, faults.refuse_cursors_after)
        elif cursor is not None and faults.refuse_cursors:
            self.close(1008, "unknown cursor")
        else:
            self.subscribed = True
            if cursor is not None and not faults.ignore_cursors:
                replay = list(kadoa.stream.after(cursor, extra=faults.replay_extra))
                if faults.replay_late is None:
                    self._replay(replay)
                else:
                    kadoa._start(self._replay_later, faults.replay_late, replay)

    @trio.lowlevel.enable_ki_protection
    async def _replay_later(self, seconds: float, replay: list[PublishedEvent]) -> None:
        await trio.sleep(seconds)
        self._replay(replay)

    @trio.lowlevel.enable_ki_protection
    async def _refuse_later(self, seconds: float) -> None:
        await trio.sleep(seconds)
        if self.open:
            self.close(1008, "unknown cursor")

    def _replay(self, replay: list[PublishedEvent]) -> None:
        if self.open:
            for event in replay:
                self.deliver(event)

    @trio.lowlevel.enable_ki_protection
    async def _write(self, ws: trio_websocket.WebSocketConnection) -> None:
        try:
            async for action in self._receive:
                await action(ws)
        except (trio_websocket.ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    @trio.lowlevel.enable_ki_protection
    async def _beat(self) -> None:
        while True:
            await trio.sleep(self._kadoa.heartbeat_interval)
            if not self._kadoa.faults.no_heartbeats:
                self.send_heartbeat()


class _Guarded:
    """Replaces the nursery of trio-websocket's reader task, whose exceptions the client causes."""

    def __init__(self, nursery: trio.Nursery, scope: trio.CancelScope) -> None:
        self._nursery = nursery
        self._scope = scope

    def start_soon(self, async_fn: Callable[..., Awaitable[object]], *args: object, name: object = None) -> None:
        self._nursery.start_soon(self._run, async_fn, args)

    @trio.lowlevel.enable_ki_protection
    async def _run(self, async_fn: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        try:
            await async_fn(*args)
        except Exception:  # a client may break a connection in any way
            pass
        finally:
            # Without a deadline, the handshake would wait for a client that has gone before it sent a request.
            self._scope.deadline = min(self._scope.deadline, trio.current_time() + _CLOSE_TIMEOUT)
