"""Requests on h11 and Trio streams: acknowledgements over connections that are kept, and tokens.

Through httpx, an acknowledgement costs about 20 times the CPU of its event,
here a fifth of that. And a client that needs no other request need not import
httpx. Addresses, TLS, time-outs and the meaning of answers are those of every
other request. A connection has one request at a time, and is kept after an
answer that was read to its end. It is closed after every other answer, after a
cancellation, and when it was not used for `KEPT_FOR`. `post_once` keeps none.

Acknowledging is idempotent. So a request that a kept connection took no more,
because the server was about to close it (RFC 9112, section 9.3.1), is sent
once more on a new one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import attrs
import h11
import trio

from .._redact import Secret
from .._settings import Settings
from ._censor import censored_logs
from ._dial import Address, open_stream, target_of
from ._http import CHUNKS_AT_ONCE, HEADERS, MAX_ANSWER, Answer
from ._proxy import is_proxied

KEPT_FOR: Final = 5.0
"""Maximum time that a connection is kept without a request, in seconds. It is httpx's; servers close after 5 s and more."""
_MAX_HEAD: Final = 64 * 1024
_MAX_INTERIM: Final = 16
"""Maximum number of interim answers (1xx) before an answer. None is documented."""
_RECEIVE: Final = 4096
_READ: Final = (b"retry-after", b"content-encoding")
_LENGTHS: Final = 16
"""Maximum number of requests of different lengths that are prepared. Kadoa's ids have one length."""


def can_keep(address: Address, settings: Settings) -> bool:
    """Return whether requests to an address can be made here; only httpx can use a `Network` or some kinds of proxies."""
    if settings.endpoints.network is not None or not address.host.isascii():
        return False
    # Of proxies, those with CONNECT: no SOCKS, and no request that the proxy reads.
    return not is_proxied(address.scheme, address.host) or (address.secure and address.find_proxy() is not None)


@attrs.define(eq=False)
class KeptConnections:
    """Connections to one URL, as many as it has requests at once. Made by `keep_connections`."""

    _open: Callable[[], Awaitable[trio.abc.Stream]] = attrs.field(repr=False)
    _prepare: Callable[[int], h11.Request] = attrs.field(repr=False)
    """Makes the head of a request whose body has this number of bytes."""
    _secrets: Callable[[], tuple[Secret, ...]] = attrs.field(repr=False)
    _idle: list[_Connection] = attrs.field(init=False, repr=False, factory=list)
    """Those without a request; the one that was used last is the last."""
    _some_idle: trio.Event = attrs.field(init=False, repr=False, factory=trio.Event)

    @trio.lowlevel.enable_ki_protection
    async def post(self, content: bytes, timeout: float) -> Answer:
        """Post, and return what came of it. Raises no `Exception`. Cancellation closes the connection.

        Args:
            content: the body.
            timeout: maximum duration in all, connecting and reading the answer included, in seconds.
        """
        answer = Answer(MAX_ANSWER)
        with trio.move_on_after(timeout) as scope:
            try:
                kept = await self._take()
                if kept is None or not await self._exchange(kept, content, answer, scope, again=True):
                    await self._exchange(await self._connect(), content, answer, scope, again=False)
            except Exception as exc:
                known = (OSError, UnicodeError, trio.BrokenResourceError, h11.RemoteProtocolError)
                answer.fail(exc, *self._secrets(), is_bug=not isinstance(exc, known))
        return answer

    async def _take(self) -> _Connection | None:
        """Return a connection that was kept; None if there is none that is good."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_good():
                return connection
            await connection.aclose()
        return None

    async def _connect(self) -> _Connection:
        # Only opening is logged, by nobody today: neither h11 nor Trio logs what is sent.
        with censored_logs(*self._secrets()):
            return _Connection(await self._open())

    async def _exchange(
        self, connection: _Connection, content: bytes, answer: Answer, scope: trio.CancelScope, *, again: bool
    ) -> bool:
        """Send a request, and read its answer. Return whether this is so, or it can be tried *again*."""
        reusable = False
        try:
            await connection.send(self._prepare, content)
            reusable = await connection.read(answer, scope, self._secrets)
        except trio.BrokenResourceError:
            if connection.has_answered or not again:
                raise
            return False
        finally:
            if reusable:
                connection.idle_since = trio.current_time()
                self._idle.append(connection)
                if not self._some_idle.is_set():
                    self._some_idle.set()
            else:
                await connection.aclose()  # noqa: ASYNC102  # shielded in there
        return True

    @trio.lowlevel.enable_ki_protection
    async def close_idle(self) -> None:
        """Close the connections that are not used for `KEPT_FOR`, until cancelled."""
        while True:
            await self._some_idle.wait()
            while self._idle:
                due = self._idle[0].idle_since + KEPT_FOR
                if due > trio.current_time():
                    await trio.sleep_until(due)
                else:
                    await self._idle.pop(0).aclose()
            self._some_idle = trio.Event()

    async def aclose(self) -> None:
        """Close all connections. There must be no request."""
        await trio.lowlevel.checkpoint()
        while self._idle:
            await self._idle.pop().aclose()


def keep_connections(url: str, settings: Settings, secrets: Callable[[], tuple[Secret, ...]]) -> KeptConnections:
    """Make a `KeptConnections`; nothing is opened before the first request.

    Args:
        url: with which host a request is made, and for which path.
        settings: the client's options.
        secrets: gives what a server or a proxy may repeat.
    """
    prepare = functools.lru_cache(_LENGTHS)(functools.partial(_prepare, url, {}))
    return KeptConnections(functools.partial(open_stream, Address.of(url), settings), prepare, secrets)


async def post_once(
    url: str,
    settings: Settings,
    secrets: Callable[[], tuple[Secret, ...]],
    headers: Mapping[str, str | Secret],
    timeout: float,
) -> Answer:
    """Post without a body, close the connection, and return what came of it; see `KeptConnections.post`.

    Args:
        url: as for `keep_connections`.
        settings: the client's options.
        secrets: gives what a server or a proxy may repeat; with those of *headers*.
        headers: beside those of every request.
        timeout: maximum duration in all, in seconds.
    """
    prepare = functools.partial(_prepare, url, {**headers, "connection": "close"})
    once = KeptConnections(functools.partial(open_stream, Address.of(url), settings), prepare, secrets)
    return await once.post(b"", timeout)


def _prepare(url: str, headers: Mapping[str, str | Secret], length: int) -> h11.Request:
    own = [(name, value.reveal() if isinstance(value, Secret) else value) for name, value in headers.items()]
    usual = [("Host", Address.of(url).host_header), ("Accept", "*/*"), *HEADERS.items()]
    return h11.Request(method="POST", target=target_of(url), headers=[*usual, *own, ("Content-Length", str(length))])


class _Connection:
    """A stream, and what HTTP/1.1 says of it."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        lowest = stream
        while isinstance(lowest, trio.SSLStream):
            lowest = lowest.transport_stream
        self._socket = lowest.socket if isinstance(lowest, trio.SocketStream) else None
        self.idle_since = 0.0
        """Since when it has no request, on Trio's clock."""
        self.has_answered = False
        """Whether anything has arrived since the last request."""

    def is_good(self) -> bool:
        """Return whether a request may be sent: it is in use, and nothing has arrived that no request has asked for.

        What arrives is the end of the stream, or an answer such as a 408 (RFC 9110, section 15.5.9), which the next
        request would take for its own.
        """
        if trio.current_time() - self.idle_since >= KEPT_FOR:
            return False
        return self._socket is None or not self._socket.is_readable()

    async def send(self, prepare: Callable[[int], h11.Request], content: bytes) -> None:
        """Send a request. A connection that breaks meanwhile may have an answer, so it is `read` that fails."""
        self.has_answered = False
        with contextlib.suppress(trio.BrokenResourceError):
            # Never bound to a name: the request may hold secrets.
            await self._stream.send_all(
                b"".join(
                    (
                        self._http.send(prepare(len(content))) or b"",
                        self._http.send(h11.Data(data=content)) or b"",
                        self._http.send(h11.EndOfMessage()) or b"",
                    )
                )
            )

    async def read(self, answer: Answer, scope: trio.CancelScope, secrets: Callable[[], tuple[Secret, ...]]) -> bool:
        """Read an answer, as far as it is read; return whether the connection can have another request.

        Args:
            answer: gets what is read.
            scope: is cancelled earlier if the answer is a refusal, whose body matters little.
            secrets: gives what a header may repeat.

        Raises:
            trio.BrokenResourceError: the connection ended before an answer, or broke.
            h11.RemoteProtocolError: what came is no answer, or a part of one.
        """
        interim = 0
        while not answer.complete:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                data = await self._stream.receive_some(_RECEIVE)
                if not data and self._http.their_state is h11.SEND_RESPONSE:
                    raise trio.BrokenResourceError("the server closed the connection without an answer")
                self.has_answered = True
                self._http.receive_data(bytes(data))
            elif isinstance(event, h11.Data):
                answer.add(event.data)
                if not answer.chunks % CHUNKS_AT_ONCE:
                    await trio.lowlevel.checkpoint()  # chunks that arrived together are read without waiting
            elif isinstance(event, h11.Response):
                headers = [header for header in event.headers if header[0] in _READ]
                retry_after, encoding = (_join(headers, name) for name in _READ)
                answer.begin(event.status_code, retry_after, encoding, *secrets())
                if answer.deadline() < scope.deadline:
                    scope.deadline = answer.deadline()
            elif isinstance(event, h11.EndOfMessage):
                answer.complete = True
                return self._is_reusable()
            else:
                interim += 1
                if interim > _MAX_INTERIM:
                    raise h11.RemoteProtocolError(f"more than {_MAX_INTERIM} interim answers")
        return False

    def _is_reusable(self) -> bool:
        """Prepare for the next request, if HTTP allows one and nothing has come after the answer."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        if self._http.trailing_data != (b"", False):  # not even the end of the stream
            return False
        self._http.start_next_cycle()
        return True

    async def aclose(self) -> None:
        """Close the stream at once, cancelled or not."""
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._stream)


def _join(headers: list[tuple[bytes, bytes]], name: bytes) -> str | None:
    """Return the values of one name as one (RFC 9110, section 5.3)."""
    values = [value for one, value in headers if one == name]
    return b", ".join(values).decode("latin-1") if values else None
