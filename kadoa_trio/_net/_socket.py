"""One WebSocket to Kadoa: the only module that imports trio_websocket.

The library's own ``open_websocket`` is not used, because it does not bound
a server that never answers the upgrade, loses the status of a refusal and the
cause of a bad certificate, and hangs on leaving when the server leaves TCP open.
What is used is ``wrap_client_stream``, over a stream and in a nursery that are
ours:

* `_WatchedStream` records what the library does not report (the status line of
  a refusal, the cause of a broken stream, which side sent a close frame), and
  we close it, by force in the end. It takes whole messages out of what arrives
  (`_frames`), and gives them to the handler in the library's reader task;
* instead of a nursery the library gets a `_Reader`, which starts its reader task
  and notices its end. An error of the reader ends the socket only.

What surfaces from ``async with open_socket(...)``:

====================================  =======================================
what happens                          what comes out
====================================  =======================================
opening fails                         `AttemptError`, `ProtocolError` or
                                      `AuthenticationError`, bare
the body raises, groups included      the same exception object
the body is cancelled                 its ``Cancelled``
the reader fails                      nothing; `Socket.read` returns the
                                      `End`, `Socket.receive` raises it in
                                      `SocketEnded`
closing fails                         nothing; the stream is closed by force
``KeyboardInterrupt`` in any task     it, bare, with the body's error as its
                                      context
====================================  =======================================
"""

from __future__ import annotations

import contextlib
import enum
import http.client
import io
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Final, TypeVarTuple, cast
from urllib.parse import quote

import attrs
import trio
import trio_websocket
from wsproto.utilities import LocalProtocolError

from .._contexts import async_context
from .._errors import AttemptError, AuthenticationError, KadoaError, ProtocolError, Step, scrubbed
from .._exits import clean_up, hidden_nursery
from .._redact import Secret, presentable
from .._settings import CLOSE_TIMEOUT, Settings
from ._answers import (
    REFUSAL_GRACE,
    describe,
    parse_retry_after,
    refusal_reason,
    server_message,
    unwanted_encoding,
)
from ._censor import censored_logs
from ._dial import Address, open_tcp, start_tls, target_of
from ._frames import MAX_FRAGMENTS, MESSAGES_AT_ONCE, FrameFilter, Passed, RefusedReason
from ._http import USER_AGENT, utc_now
from ._proxy import proxy_secrets

_Args = TypeVarTuple("_Args")

_RECEIVE_BUFFER: Final = 64 * 1024
"""Bytes that are read at once: more of small messages brings nothing, and what is read is held beyond the limits."""
_LARGE_BUFFER: Final = 1024 * 1024
"""The same while that many bytes of one message are missing."""
# Small during the handshake: a refusal's body may come in pieces of a byte, each of which is an event of the library.
_HANDSHAKE_BUFFER: Final = 4 * 1024
_MAX_HEAD: Final = 32 * 1024
"""Maximum bytes of the answer to the upgrade that are read, with the body of a refusal."""
_BLANK_LINE: Final = re.compile(rb"\n\r?\n")  # as h11 finds the end of a head
_MAX_REASON: Final = 123
_HEADERS: Final = f"User-Agent: {USER_AGENT}\r\n".encode()
_HTTP: Final = b"HTTP/"
_ABNORMAL: Final = 1006
_TOO_LARGE: Final = 1009
# Codes that wsproto sets itself for a frame that breaks the protocol.
_MADE_UP: Final = frozenset({1002, 1007})
_ANSWER_GRACE: Final = 0.1
# A client's close frame: the last fragment of opcode 8.
_CLOSE_FRAME: Final = 0x88


class EndReason(enum.Enum):
    """Why a connection is not read any more. The last three are given by the code that reads the socket."""

    CLOSED = "closed by the server"
    """A close frame came from the server."""
    LOST = "broken"
    """The stream ended or broke without a close frame."""
    TOO_LARGE = "a message over Limits.message_size"
    """The client closed with code 1009."""
    PROTOCOL = "the server broke the WebSocket protocol"
    SILENT = "no frame within Timeouts.heartbeat"
    RETIRED = "retired"
    LEFT = "left"


@attrs.frozen
class End:
    """How a connection ended."""

    reason: EndReason
    code: int | None = None
    """The close code; 1005 means a close frame without one (RFC 6455, section 7.4.1)."""
    detail: str = ""
    """The words of the server or of the system. Maximum 123 printable characters."""

    def __str__(self) -> str:
        code = f" with {self.code}" if self.code is not None and self.reason is EndReason.CLOSED else ""
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.reason.value}{code}{detail}"


class SocketEnded(Exception):
    """The socket has ended, and everything that came before its end was received.

    Attributes:
        end: how it ended.
    """

    def __init__(self, end: End) -> None:
        super().__init__(end)
        self.end = end


@async_context
async def open_socket(
    url: str,
    *,
    token: Secret,
    settings: Settings,
    on_bytes: Callable[[int], None],
    wall_clock: Callable[[], datetime] = utc_now,
    also: tuple[Secret, ...] = (),
) -> AsyncIterator[Socket]:
    """Open a WebSocket, within `Timeouts.handshake`; leaving closes it.

    Leaving takes no longer than `CLOSE_TIMEOUT`, cancelled or not, and leaves
    neither a task nor an open stream. The module's docstring lists what surfaces.

    Args:
        url: a ``ws`` or ``wss`` URL without a query.
        token: the access token. It goes into the query of the request.
        settings: the client's options.
        on_bytes: called with the number of bytes of messages as they arrive.
            Frame headers, pings and pongs do not count. It must not raise.
        wall_clock: gives the time that a ``Retry-After`` date is measured against.
        also: other secrets that texts must not show, such as earlier tokens.

    Raises:
        AuthenticationError: the upgrade was answered with 401 or 403.
        ProtocolError: the upgrade was answered, but not with an upgrade or a refusal.
        AttemptError: any other failure to open.
        ConfigurationError: the certificates that the environment names cannot be used.
    """
    async with hidden_nursery("the socket is closed") as nursery:
        opened = await _establish(nursery, url, token, settings, on_bytes, wall_clock, also)
        try:
            yield opened
        finally:
            # In a task of its own, because a Cancelled raised while closing would replace a Ctrl-C in the main task.
            await clean_up(math.inf, opened.aclose)  # noqa: ASYNC102  # shielded in there


Handler = Callable[[list[str | bytes]], Awaitable[None]]
"""Takes messages in their order, one or more at a time, out of the list. While it waits, nothing is read."""


@attrs.define(eq=False)
class Socket:
    """An open WebSocket. Made by `open_socket`.

    Its messages are either given to a handler by `read`, or returned one by
    one by `receive`.
    """

    _connection: trio_websocket.WebSocketConnection = attrs.field(repr=False)
    _stream: _WatchedStream = attrs.field(repr=False)
    _reader: _Reader = attrs.field(repr=False)
    _too_large: str = attrs.field(repr=False)
    _closed: bool = False
    # For `receive`: what the reader has brought, and the wait that this ends.
    _brought: list[str | bytes] = attrs.field(factory=list, init=False, repr=False)
    _taken: trio.Event = attrs.field(factory=trio.Event, init=False, repr=False)
    _waiting: trio.CancelScope | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._stream.opened(self._bring, self._refuse)

    async def send(self, text: str) -> None:
        """Send *text* as one message.

        A cancelled send may have sent a part of it: close the socket then.

        Raises:
            SocketEnded: the socket has ended.
            trio.ClosedResourceError: we have closed it.
        """
        with contextlib.suppress(trio_websocket.ConnectionClosed, LocalProtocolError):
            await self._connection.send_message(text)
            return
        if self._closed:
            raise trio.ClosedResourceError
        # `answered` cannot be read from the stream here: the reader may be about to answer a close frame.
        raise SocketEnded(self._end(answered=True))

    async def read(self, handle: Handler) -> End:
        """Give each message to *handle*, in their order, until the socket has ended and everything was handled.

        Most calls of *handle* come from the reader's task: so a message costs
        no switch of tasks. They go on when this is cancelled, until `stop`;
        it may be called again then. *handle* must not raise an `Exception`.
        """
        self._stream.handle = handle
        if self._brought:  # before this call
            brought, self._brought = self._brought, []
            await handle(brought)
            self._taken.set()
        while True:
            message = await self._next_of_library()
            if message is None:
                return await self._find_end()
            if self._stream.handle is not None:
                await handle([message])
            self._stream.handled()

    def stop(self) -> None:
        """Have no handler called any more, and drop what comes. A call that has begun is not ended."""
        self._stream.handle = None
        self._stream.handled()
        self._brought.clear()
        self._taken.set()

    async def receive(self) -> str | bytes:
        """Receive the next message. Cancellation loses none.

        Raises:
            SocketEnded: everything has been received, and the socket has ended.
            trio.ClosedResourceError: we have closed it.
        """
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise trio.ClosedResourceError
        while not self._brought:
            with trio.CancelScope() as self._waiting:
                message = await self._next_of_library()
                if message is None:
                    raise SocketEnded(await self._find_end())
                self._stream.handled()
                return message
        message = self._brought.pop(0)
        if not self._brought:
            self._taken.set()
        return message

    async def _bring(self, messages: list[str | bytes]) -> None:
        """Have `receive` return messages, and wait until it has returned them all."""
        self._brought += messages
        self._taken = trio.Event()
        if self._waiting is not None:
            self._waiting.cancel(reason="the reader has brought messages")
        await self._taken.wait()

    async def _next_of_library(self) -> str | bytes | None:
        """Receive the next message that the library delivers; None if the socket has ended.

        Raises:
            trio.ClosedResourceError: we have closed it.
        """
        try:
            return await self._connection.get_message()
        except trio_websocket.ConnectionClosed:
            pass
        # Outside of the handler, because the library's error holds the server's text uncensored.
        if self._closed:
            raise trio.ClosedResourceError
        return None

    async def _find_end(self) -> End:
        if self._connection.closed is None:
            # The reader is failing, and sets `fault` in its next step.
            await self._reader.ended.wait()
        if self._connection.closed is not None and self._connection.closed.code in _MADE_UP:
            # Either an invalid frame, or a real close frame that the reader answers in its next step.
            with trio.move_on_after(_ANSWER_GRACE):
                await self._reader.ended.wait()
        return self._end(answered=self._stream.close_sent)

    async def _refuse(self) -> None:
        """Close the socket because a message is too large. Runs in the reader's task, which cannot wait for the answer."""
        with trio.move_on_after(CLOSE_TIMEOUT) as scope:
            self._stream.on_close_sent = scope
            await self._connection.aclose(_TOO_LARGE, self._too_large)

    async def aclose(self) -> None:
        """Close the socket: by a closing handshake of maximum `CLOSE_TIMEOUT`, then by force. May be called twice."""
        self._closed = True
        self.stop()
        handshake = trio.move_on_after(CLOSE_TIMEOUT)
        try:
            if not self._reader.ended.is_set():
                with handshake:
                    self._reader.on_end = handshake
                    # The library fails if a ping comes meanwhile, for example. The stream is closed below in any case.
                    with contextlib.suppress(Exception):
                        await self._connection.aclose()
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._stream)

    def _end(self, *, answered: bool) -> End:
        closed, fault = self._connection.closed, self._reader.fault
        secrets = self._reader.secrets
        if self._stream.close_code == _TOO_LARGE and (closed is None or closed.code != _TOO_LARGE):
            # Even if the server's own close frame has crossed ours: the message is lost.
            return End(EndReason.TOO_LARGE, _TOO_LARGE, self._too_large)
        if closed is not None and closed.code != _ABNORMAL:
            reason = presentable(closed.reason or "", _MAX_REASON, *secrets)
            if closed.code == _TOO_LARGE and closed.reason == self._too_large:
                return End(EndReason.TOO_LARGE, closed.code, reason)
            # For an invalid frame the library makes a close event of its own, which it does not answer.
            real = answered or closed.code not in _MADE_UP
            return End(EndReason.CLOSED if real else EndReason.PROTOCOL, closed.code, reason)
        if closed is None and fault is not None:
            reason = describe(fault, *secrets)[:_MAX_REASON]
            foreign = isinstance(fault, OSError | trio.BrokenResourceError | trio.ClosedResourceError)
            return End(EndReason.LOST if foreign else EndReason.PROTOCOL, None, reason)
        if self._stream.protocol_fault is not None:
            return End(EndReason.PROTOCOL, None, self._stream.protocol_fault)
        broken = self._stream.broken
        reason = "end of stream without a close frame" if broken is None else describe(broken, *secrets)
        return End(EndReason.LOST, _ABNORMAL, reason[:_MAX_REASON])


async def _establish(
    nursery: trio.Nursery,
    url: str,
    token: Secret,
    settings: Settings,
    on_bytes: Callable[[int], None],
    wall_clock: Callable[[], datetime],
    also: tuple[Secret, ...],
) -> Socket:
    address = Address.of(url)
    timeout = settings.timeouts.handshake
    opening = trio.move_on_after(timeout)
    reader = _Reader(nursery, (token, *proxy_secrets(), *also), on_end=opening)
    step: Step = "connect"
    stream: trio.abc.Stream | None = None
    watched: _WatchedStream | None = None
    connection: trio_websocket.WebSocketConnection | None = None
    fault: Exception | None = None
    try:
        # The logs of the reader, too, for as long as it runs: a task has the context of the one that starts it.
        with censored_logs(*reader.secrets), opening:
            try:
                stream = await open_tcp(address, settings)
                if address.secure:
                    step = "tls"
                    stream = await start_tls(stream, address, settings)
                step = "handshake"
                watched = _WatchedStream(stream, on_bytes, opening, settings.limits.message_size)
                connection = await trio_websocket.wrap_client_stream(
                    cast("trio.Nursery", reader),
                    cast("trio.SocketStream", watched),
                    address.host_header,
                    # Never bound to a name, because a traceback shows the names of this frame.
                    f"{target_of(url)}?access_token={quote(token.reveal(), safe='')}",
                    # No queue in the library, because it drops the queue when a message is too large.
                    message_queue_size=0,
                    max_message_size=settings.limits.message_size,
                    receive_buffer_size=_RECEIVE_BUFFER,
                )
            except (OSError, UnicodeError, trio.BrokenResourceError) as exc:
                fault = exc
        # Before the clean-up, in which the reader ends.
        answered = watched is not None and (reader.ended.is_set() or watched.has_answered)
    finally:
        if connection is None and stream is not None:
            await clean_up(math.inf, trio.aclose_forcefully, stream)  # noqa: ASYNC102  # shielded in there
    # Raised outside of every ``except``, because the originals may hold the token.
    if fault is not None:
        raise AttemptError(step, describe(fault, *reader.secrets)) from scrubbed(fault, *reader.secrets)
    if connection is None or watched is None:
        if watched is not None and answered:
            raise _handshake_failure(watched, reader, wall_clock)
        raise AttemptError(step, f"no answer within {timeout:g} s")
    too_large = f"Exceeded maximum message size: {settings.limits.message_size} bytes"
    return Socket(connection, watched, reader, too_large)


def _handshake_failure(stream: _WatchedStream, reader: _Reader, wall_clock: Callable[[], datetime]) -> KadoaError:
    """Make the error for an upgrade that failed, from what was received and from the reader's fault."""
    answer = _parse_head(bytes(stream.head))
    if answer is not None and answer[0] != 101:
        status, headers, body = answer
        if isinstance(reader.fault, trio_websocket.ConnectionRejected) and reader.fault.body:
            body = reader.fault.body
        compressed = unwanted_encoding(headers.get("Content-Encoding"))
        message = "" if compressed else server_message(body, *reader.secrets)
        if status in (401, 403):
            return AuthenticationError("handshake", status, message)
        retry_after = parse_retry_after(headers.get("Retry-After"), wall_clock())
        kind = ProtocolError if status < 300 else AttemptError
        return kind("handshake", refusal_reason(status, message), status=status, retry_after=retry_after)
    if answer is None and (not stream.head or stream.head.startswith(_HTTP)):
        if stream.broken is not None:
            cause = scrubbed(stream.broken, *reader.secrets)
            failure = AttemptError("handshake", describe(stream.broken, *reader.secrets))
            failure.__cause__ = cause
            return failure
        return AttemptError("handshake", "the server closed the connection without an answer")
    if answer is not None:
        return ProtocolError("handshake", "the server's upgrade is not a WebSocket handshake", status=101)
    return ProtocolError("handshake", "the server does not speak HTTP")


def _parse_head(head: bytes) -> tuple[int, http.client.HTTPMessage, bytes] | None:
    """Return status, headers and the beginning of the body of an HTTP answer; None if the bytes are no whole head."""
    match = re.match(rb"HTTP/1\.[01] ([1-5]\d\d)[^\r\n]*\r?\n", head)
    blank = _BLANK_LINE.search(head)
    if match is None or blank is None:
        return None
    try:
        headers = http.client.parse_headers(io.BytesIO(head[match.end() : blank.end()]))
    except http.client.HTTPException:
        return None
    return int(match[1]), headers, head[blank.end() :]


@attrs.define(eq=False)
class _Reader:
    """Runs trio-websocket's reader task; given to the library instead of a nursery.

    In a real nursery, a reader that fails (a refused upgrade, a frame that
    does not parse, a ping while we close) would cancel the whole nursery, and
    one that ends before the upgrade would leave its opener waiting.
    """

    _nursery: trio.Nursery = attrs.field(repr=False)
    secrets: tuple[Secret, ...] = attrs.field(repr=False)
    on_end: trio.CancelScope = attrs.field(repr=False)
    """The scope that is cancelled when the reader ends."""
    ended: trio.Event = attrs.field(factory=trio.Event, repr=False)
    fault: Exception | None = attrs.field(default=None, repr=False)
    """The library's error. It may hold the token, if the server repeated it."""

    def start_soon(self, async_fn: Callable[[*_Args], Awaitable[object]], *args: *_Args, name: object = None) -> None:
        self._nursery.start_soon(self._run, async_fn, args, name="kadoa_trio socket reader")

    @trio.lowlevel.enable_ki_protection
    async def _run(self, async_fn: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> None:
        try:
            await async_fn(*args)
        except Exception as exc:
            self.fault = exc
        finally:
            self.ended.set()
            self.on_end.cancel(reason="the socket's reader has ended")


@attrs.define(eq=False, repr=False)
class _WatchedStream(trio.abc.Stream):
    """The stream that trio-websocket gets. It records what the library does not report.

    No repr shows its fields, because what a server has sent may hold the token.
    """

    _inner: trio.abc.Stream
    _on_bytes: Callable[[int], None]
    _opening: trio.CancelScope
    _max_message_size: int
    _headers: bytes = _HEADERS
    """Headers that are still to be added to the request: ``wrap_client_stream`` takes none."""
    _is_open: trio.Event = attrs.field(factory=trio.Event)
    _frames: FrameFilter | None = None
    """None before the upgrade."""
    _pending: trio.Event | None = None
    """Set when the message that the library has got was handled."""
    _given: int = 0
    """Number of messages given to the handler since other tasks could run."""
    handle: Handler | None = None
    """Gets the messages; None drops them."""
    _refuse: Callable[[], Awaitable[None]] | None = None
    on_close_sent: trio.CancelScope | None = None
    """The scope that is cancelled when a close frame was sent."""
    head: bytearray = attrs.field(factory=bytearray)
    """What was received before the socket was open: the answer to the upgrade, if the server speaks HTTP."""
    close_sent: bool = False
    """Whether a close frame was sent, or its sending was tried."""
    close_code: int | None = None
    """The code in that close frame."""
    broken: trio.BrokenResourceError | None = None
    protocol_fault: str | None = None
    """Why we gave the connection up, where the library would not have."""
    closed: bool = False
    """Whether it was closed on our side."""

    @property
    def has_answered(self) -> bool:
        """Whether a whole head was received, or something that is no HTTP."""
        return not self.head.startswith(_HTTP[: len(self.head)]) or _parse_head(bytes(self.head)) is not None

    def opened(self, handle: Handler, refuse: Callable[[], Awaitable[None]]) -> None:
        self.handle, self._refuse = handle, refuse
        self._is_open.set()
        self.head.clear()

    def handled(self) -> None:
        """Read on: the message that the library has delivered was handled."""
        if self._pending is not None:
            self._pending.set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._headers:
            # The request, which the library sends whole: ours come after its first line.
            line, end, headers = bytes(data).partition(b"\r\n")
            data, self._headers = line + end + self._headers + headers, b""
        # A close frame? The library sends one frame at a time.
        if data and data[0] == _CLOSE_FRAME:
            self.close_sent = True
            if len(data) >= 8:
                # Two bytes of header and four of mask, then the code.
                self.close_code = (data[6] ^ data[2]) << 8 | data[7] ^ data[3]
        try:
            await self._inner.send_all(data)
        except trio.BrokenResourceError as exc:
            self.broken = self.broken or exc
            raise
        if self.close_sent and self.on_close_sent is not None:
            self.on_close_sent.cancel(reason="the close frame was sent")

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive the next bytes that are for the library; give the messages before them to the handler."""
        frames = self._frames
        if frames is None:
            return await self._receive_answer()
        if self._pending is not None:
            # The library has delivered a message. Those behind it must not overtake it.
            await self._pending.wait()
            self._pending = None
        while not self.closed:
            piece = frames.take()
            if piece is None:
                if frames.payload:
                    self._on_bytes(frames.payload)
                size = _RECEIVE_BUFFER if frames.missing <= _RECEIVE_BUFFER else min(frames.missing, _LARGE_BUFFER)
                data = await self._receive(size)
                if not data:
                    return data
                frames.feed(data)
            elif isinstance(piece, list):
                await self._give(piece)
            elif isinstance(piece, Passed):
                # Let other tasks run between the pieces: a chunk may hold thousands of empty frames.
                await trio.lowlevel.checkpoint()
                if piece.completes:
                    self._pending = trio.Event()
                return piece.data
            elif piece.reason is RefusedReason.TOO_LARGE:
                await self._is_open.wait()
                assert self._refuse is not None
                await self._refuse()
            else:
                self.protocol_fault = f"a message of more than {MAX_FRAGMENTS:,} fragments"
                raise trio.BrokenResourceError(self.protocol_fault)
        raise trio.ClosedResourceError

    async def _give(self, messages: list[str | bytes]) -> None:
        if not self._is_open.is_set():
            await self._is_open.wait()
        self._given += len(messages)
        if self.handle is not None:
            await self.handle(messages)
        if self._given >= MESSAGES_AT_ONCE:
            # Let other tasks run: there may be more, and perhaps nothing has waited.
            self._given = 0
            await trio.lowlevel.checkpoint()

    async def _receive(self, size: int) -> bytes | bytearray:
        try:
            return await self._inner.receive_some(size)
        except trio.BrokenResourceError as exc:
            self.broken = self.broken or exc
            raise

    async def _receive_answer(self) -> bytes | bytearray:
        """Receive a part of the answer to the upgrade. The library gets nothing that follows it."""
        if not self._is_open.is_set() and len(self.head) >= _MAX_HEAD:
            # Report the end of the stream, because the library would store a refusal of any length.
            await trio.lowlevel.checkpoint()
            return b""
        data = await self._receive(_HANDSHAKE_BUFFER)
        if self._is_open.is_set():
            # The library has accepted a head that we cannot read.
            self._on_bytes(len(data))
            return data
        self.head += data
        answer = _parse_head(bytes(self.head))
        if answer is None:
            return data
        status, _headers, body = answer
        if status == 101:
            # Frames that came with the answer follow in the next call.
            self._frames = FrameFilter(self._max_message_size, max_fragments=MAX_FRAGMENTS)
            if body:
                self._frames.feed(body)
            return data[: len(data) - len(body)]
        # A refusal: do not wait for its body until the time-out.
        self._opening.deadline = min(self._opening.deadline, trio.current_time() + REFUSAL_GRACE)
        return data

    async def aclose(self) -> None:
        self.closed = True
        await self._inner.aclose()
