"""One WebSocket to Kadoa: the only module that imports trio_websocket.

The library's own ``open_websocket`` is not used, because it does not bound
a server that never answers the upgrade, loses the status of a refusal and the
cause of a bad certificate, and hangs on leaving when the server leaves TCP open.
What is used is ``wrap_client_stream``, over a stream and in a nursery that are
ours:

* `_WatchedStream` records what the library does not report (the status line of
  a refusal, the cause of a broken stream, which side sent a close frame), and
  we close it, by force in the end;
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
the reader fails                      nothing; `Socket.receive` raises
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
from ._http import USER_AGENT, utc_now
from ._proxy import proxy_secrets

_Args = TypeVarTuple("_Args")

MAX_FRAGMENTS = 131_072
"""Maximum number of fragments (WebSocket frames) of one message; with more the connection is closed.

The specification (RFC 6455, section 5.4) has no limit, not even for empty ones. At the default `Limits.message_size`
of 64 Mi it leaves each fragment 512 bytes on average, and servers send fragments of 4 KiB and more.
"""
_RECEIVE_BUFFER: Final = 256 * 1024
# Small during the handshake: a refusal's body may come in pieces of a byte, each of which is an event of the library.
_HANDSHAKE_BUFFER: Final = 4 * 1024
_MAX_HEAD: Final = 32 * 1024
"""Maximum bytes of the answer to the upgrade that are read, with the body of a refusal."""
_BLANK_LINE: Final = re.compile(rb"\n\r?\n")  # as h11 finds the end of a head
# The library handles all frames of a piece at once, mostly without a checkpoint, at about 25 µs each.
_FRAMES_AT_ONCE: Final = 64
_MAX_FRAME_HEADER: Final = 10
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


@attrs.define(eq=False)
class Socket:
    """An open WebSocket. Made by `open_socket`."""

    _connection: trio_websocket.WebSocketConnection = attrs.field(repr=False)
    _stream: _WatchedStream = attrs.field(repr=False)
    _reader: _Reader = attrs.field(repr=False)
    _too_large: str = attrs.field(repr=False)
    _closed: bool = False

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

    async def receive(self) -> str | bytes:
        """Receive the next message. Cancellation loses none.

        Raises:
            SocketEnded: everything has been received, and the socket has ended.
            trio.ClosedResourceError: we have closed it.
        """
        try:  # not contextlib.suppress, which would cost as much as decoding the message
            return await self._connection.get_message()
        except trio_websocket.ConnectionClosed:
            pass
        # Outside of the handler, because the library's error holds the server's text uncensored.
        if self._closed:
            raise trio.ClosedResourceError
        if self._connection.closed is None:
            # The reader is failing, and sets `fault` in its next step.
            await self._reader.ended.wait()
        if self._connection.closed is not None and self._connection.closed.code in _MADE_UP:
            # Either an invalid frame, or a real close frame that the reader answers in its next step.
            with trio.move_on_after(_ANSWER_GRACE):
                await self._reader.ended.wait()
        raise SocketEnded(self._end(answered=self._stream.close_sent))

    async def aclose(self) -> None:
        """Close the socket: by a closing handshake of maximum `CLOSE_TIMEOUT`, then by force. May be called twice."""
        self._closed = True
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
                watched = _WatchedStream(stream, on_bytes, opening)
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
    watched.opened()
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


class _FrameCounter:
    """Counts frames, fragments and bytes of messages, from the frame headers that arrive (RFC 6455, section 5.2)."""

    def __init__(self) -> None:
        self.too_many = False
        """Whether a message had more than `MAX_FRAGMENTS`."""
        self.payload = 0
        """Bytes of messages in the last piece."""
        self._header = b""
        # Bytes of the current frame's payload that are still to come.
        self._left = 0
        self._is_message = False
        self._fragments = 0

    def cut(self, data: bytes | bytearray, start: int) -> int:
        """Return the end of a piece of *data* that begins at *start* and has `_FRAMES_AT_ONCE` frames, or fewer."""
        end, size, frames = start, len(data), 0
        self.payload = 0
        while end < size:
            if not self._left:
                if frames == _FRAMES_AT_ONCE or self.too_many:
                    break
                frames += 1
                end = self._begin(data, end)
            taken = min(self._left, size - end)
            self._left -= taken
            end += taken
            if self._is_message:
                self.payload += taken
        return end

    def _begin(self, data: bytes | bytearray, start: int) -> int:
        """Read the header at *start*, or the part of it that has arrived, and return its end."""
        known = len(self._header)
        header = self._header + data[start : start + _MAX_FRAME_HEADER - known]
        length = header[1] & 0x7F if len(header) > 1 else 0
        end = {126: 4, 127: 10}.get(length, 2)
        if len(header) < end:
            self._header = header
            return len(data)
        self._header = b""
        self._left = length if end == 2 else int.from_bytes(header[2:end], "big")
        final, opcode = header[0] & 0x80, header[0] & 0x0F
        self._is_message = opcode < 8
        if self._is_message:
            # Only the first fragment of a message has an opcode.
            self._fragments = 1 if opcode else self._fragments + 1
            self.too_many = self._fragments > MAX_FRAGMENTS
            if final:
                self._fragments = 0
        return start + end - known


@attrs.define(eq=False, repr=False)
class _WatchedStream(trio.abc.Stream):
    """The stream that trio-websocket gets. It records what the library does not report.

    No repr shows its fields, because what a server has sent may hold the token.
    """

    _inner: trio.abc.Stream
    _on_bytes: Callable[[int], None]
    _opening: trio.CancelScope
    _headers: bytes = _HEADERS
    """Headers that are still to be added to the request: ``wrap_client_stream`` takes none."""
    _is_open: bool = False
    _frames: _FrameCounter | None = None
    """None before the upgrade."""
    _chunk: bytes | bytearray = b""
    _given: int = 0
    """Number of bytes of the chunk that the library has got."""
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

    def opened(self) -> None:
        self._is_open = True
        self.head.clear()

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

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Receive a piece of what has arrived, of maximum `_FRAMES_AT_ONCE` frames."""
        if self._given < len(self._chunk) and not self.closed:
            # Let other tasks run between the pieces: a chunk of 256 KiB may hold 131,072 empty frames.
            await trio.lowlevel.checkpoint()
            return self._next_piece()
        self._chunk, self._given = b"", 0
        if self._frames is None and not self._is_open and len(self.head) >= _MAX_HEAD:
            # Report the end of the stream, because the library would store a refusal of any length.
            await trio.lowlevel.checkpoint()
            return b""
        try:
            data = await self._inner.receive_some(max_bytes if self._frames is not None else _HANDSHAKE_BUFFER)
        except trio.BrokenResourceError as exc:
            self.broken = self.broken or exc
            raise
        if self._frames is None:
            return self._receive_answer(data)
        self._chunk = data
        return self._next_piece()

    def _receive_answer(self, data: bytes | bytearray) -> bytes | bytearray:
        if self._is_open:
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
            self._frames = _FrameCounter()
            self._chunk, self._given = data, len(data) - len(body)
            return data[: self._given]
        # A refusal: do not wait for its body until the time-out.
        self._opening.deadline = min(self._opening.deadline, trio.current_time() + REFUSAL_GRACE)
        return data

    def _next_piece(self) -> bytes | bytearray:
        frames, chunk, start = self._frames, self._chunk, self._given
        assert frames is not None
        self._given = frames.cut(chunk, start)
        if frames.payload:
            self._on_bytes(frames.payload)
        if frames.too_many:
            self.protocol_fault = f"a message of more than {MAX_FRAGMENTS:,} fragments"
            raise trio.BrokenResourceError(self.protocol_fault)
        return chunk if self._given - start == len(chunk) else chunk[start : self._given]

    async def aclose(self) -> None:
        self.closed = True
        await self._inner.aclose()
