"""One HTTP request, its limits and its refusals: the only module that imports httpx.

The default TLS context is made here, too: it is as httpx's, and the WebSocket uses
the same, so that both trust the same authorities.

httpx's exceptions hold the request and with it the API key, so none of them is
kept or chained. What is logged during a request is censored.

No answer is ever decompressed: each request asks for an uncompressed answer,
and one that is compressed anyway is not read.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Mapping
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import parse_qsl, urlsplit

import attrs
import certifi
import trio

from .._contexts import async_context
from .._errors import (
    AttemptError,
    ConfigurationError,
    ForeignError,
    InternalError,
    ProtocolError,
    Step,
    scrubbed,
)
from .._exits import clean_up
from .._redact import Secret, censor, presentable
from .._settings import CLOSE_TIMEOUT
from .._urls import is_loopback
from .._version import __version__
from ._answers import REFUSAL_GRACE, describe, parse_retry_after, refusal, server_message, unwanted_encoding
from ._censor import censored_logs
from ._proxy import proxy_secrets

if TYPE_CHECKING:
    # ASYNC127 names httpx2 as the maintained fork; httpx is what projects have installed, and only this module imports
    # it: where it is used, because it costs as much time as everything else together, also in programs that only want
    # an exception.
    import httpx

USER_AGENT: Final = f"kadoa-trio/{__version__}"
"""Names this client to servers, in requests and in WebSocket handshakes."""
HEADERS: Final = MappingProxyType(
    {
        "user-agent": USER_AGENT,
        "content-type": "application/json",
        # Uncompressed, so that a small answer cannot grow into a large one here.
        "accept-encoding": "identity",
    }
)
"""What every request sends."""
MAX_ANSWER: Final = 64 * 1024
"""Maximum length of an answer that is read, in bytes, unless a call has its own. Documented ones have a few hundred."""
_CHUNKS, _BYTES_A_CHUNK = 256, 512
"""Maximum chunks of an answer: this number, and one more per this number of bytes of its limit. Servers send 4 KiB and more."""
CHUNKS_AT_ONCE: Final = 32
"""Maximum chunks of an answer that are read before other tasks run."""
_RECENT_SECRETS: Final = 8
"""Maximum number of secrets from servers that are kept out of texts. The newest ones count."""


def utc_now() -> datetime:
    """Return the wall-clock time, which the date of a ``Retry-After`` is measured against."""
    return datetime.now(UTC)


@attrs.define(eq=False)
class HttpClient:
    """Makes requests over a pool of connections. Made by `open_http`."""

    _make: Callable[[], httpx.AsyncClient] = attrs.field(repr=False)
    """Makes the pool; raises ConfigurationError if the proxy that the environment names cannot be used."""
    _secrets: tuple[Secret, ...] = attrs.field(repr=False)
    _wall_clock: Callable[[], datetime] = attrs.field(repr=False)
    _recent: tuple[Secret, ...] = attrs.field(init=False, repr=False, default=())
    _keys: tuple[Secret, ...] = attrs.field(init=False, repr=False, default=())
    """Of keys that change, the newest."""
    _client: httpx.AsyncClient | None = attrs.field(init=False, repr=False, default=None)

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """What a server may repeat: the secrets that requests hold, proxy credentials, and the newest that servers gave."""
        return (*self._secrets, *self._keys, *self._recent)

    def use(self, key: Secret) -> None:
        """Keep *key*, which requests hold from now on, out of logs and errors until two newer ones are known."""
        if key not in self._keys:
            self._keys = (*self._keys, key)[-2:]

    def pool(self) -> httpx.AsyncClient:
        """Return the pool of connections, which is made when it is first needed: importing httpx takes 50 ms and more.

        Raises:
            ConfigurationError: the proxy that the environment names cannot be used.
        """
        if self._client is None:
            self._client = self._make()
        return self._client

    async def aclose(self) -> None:
        """Close all connections. There must be no request."""
        if self._client is not None:
            await self._client.aclose()

    def remember(self, secret: Secret) -> None:
        """Keep *secret*, which a server gave, out of logs and errors until `_RECENT_SECRETS` newer ones are known."""
        self._recent = (*self._recent, secret)[-_RECENT_SECRETS:]

    def censor(self, text: str) -> str:
        """Replace the secrets in *text*."""
        return censor(text, *self.secrets)

    async def request(
        self,
        step: Step,
        method: str,
        url: str | Secret,
        *,
        timeout: float,
        limit: int = MAX_ANSWER,
        final: bool = True,
        headers: Mapping[str, str | Secret] = MappingProxyType({}),
        content: bytes | Secret = b"",
        params: Mapping[str, str] | None = None,
    ) -> Answer:
        """Make one request, and return its answer, which is a success. Cancellation abandons the request.

        Args:
            step: what the request is for, for errors.
            method: the HTTP method.
            url: with or without a query.
            timeout: maximum duration of the whole request, reading the answer included, in seconds.
            limit: maximum length of the answer that is read, in bytes.
            final: whether a refusal can be final; else each failure is an attempt.
            headers: beside those of every request.
            content: the body.
            params: added to the query.

        Raises:
            AuthenticationError: *final*, and 401 or 403.
            RequestRefusedError: *final*, and any other 4xx but 408, 425 and 429.
            AttemptError: any other failure: the network, a time-out, a status from 300 on.
            InternalError: a bug of the client.
        """
        answer = await self._send(method, url, timeout, limit, headers, content, params)
        return self.conclude(step, answer, timeout, final=final)

    def conclude(self, step: Step, answer: Answer, timeout: float, *, final: bool) -> Answer:
        """Return an answer that is a success, and raise what any other means; see `request`.

        Args:
            step: what was asked for.
            answer: what came of the request.
            timeout: the maximum duration that the request had, in seconds.
            final: whether a refusal can be final.
        """
        # Outside of every ``except``: an exception raised in there would hold httpx's as its context.
        if answer.status is not None and answer.status >= 300:
            message = server_message(bytes(answer.body), *self.secrets)
            retry_after = parse_retry_after(answer.retry_after, self._wall_clock())
            raise refusal(step, answer.status, message, retry_after, final=final)
        if answer.is_bug:
            raise InternalError(
                f"a request failed because of a bug of the client ({answer.fault}); please report it"
            ) from answer.cause
        if answer.fault is not None:
            raise AttemptError(step, answer.fault) from answer.cause
        if not answer.complete:
            raise AttemptError(step, f"no answer within {timeout:g} s")
        return answer

    @trio.lowlevel.enable_ki_protection
    async def _send(
        self,
        method: str,
        url: str | Secret,
        timeout: float,
        limit: int,
        headers: Mapping[str, str | Secret],
        content: bytes | Secret,
        params: Mapping[str, str] | None,
    ) -> Answer:
        """Make a request, and return what came of it. Raises no `Exception`."""
        pool = self.pool()
        import httpx  # in use by now

        await trio.lowlevel.checkpoint()  # whatever the transport does
        answer = Answer(limit)
        # httpx's own time-outs are per operation: a server that sends a byte a second never meets one.
        with censored_logs(*self.secrets), trio.move_on_after(timeout):
            try:
                # Never bound to a name: the request holds secrets.
                response = await pool.send(self._build(method, url, headers, content, params), stream=True)
                try:
                    await answer.read(response, *self.secrets)
                finally:
                    await response.aclose()
            except Exception as exc:
                known = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, UnicodeError)
                answer.fail(exc, *self.secrets, is_bug=not isinstance(exc, known))
        return answer

    def _build(
        self,
        method: str,
        url: str | Secret,
        headers: Mapping[str, str | Secret],
        content: bytes | Secret,
        params: Mapping[str, str] | None,
    ) -> httpx.Request:
        request = self.pool().build_request(
            method,
            url.reveal() if isinstance(url, Secret) else url,
            headers=HEADERS,
            content=_bytes(content),
            params=params,
        )
        request.stream = _body_type()(_bytes(content))
        for name, value in headers.items():
            request.headers[name] = value.reveal() if isinstance(value, Secret) else value
        return request


@attrs.define(eq=False)
class Answer:
    """What has been read of an answer so far; it outlives the deadline that cuts the reading.

    Its repr shows the status only, because a server may repeat what it was sent.
    """

    limit: int = attrs.field(repr=False)
    status: int | None = None
    retry_after: str | None = attrs.field(default=None, repr=False)
    encoding: str = attrs.field(default="", repr=False)
    """The ``Content-Encoding``, if the request did not ask for it; then the body is not read."""
    body: bytearray = attrs.field(factory=bytearray, repr=False)
    chunks: int = attrs.field(default=0, repr=False)
    """Number of chunks that have been read of the body."""
    complete: bool = False
    """Whether all that is read of an answer has been read."""
    fault: str | None = attrs.field(default=None, repr=False)
    cause: ForeignError | None = attrs.field(default=None, repr=False)
    is_bug: bool = False

    def content(self, step: Step) -> bytes:
        """Return the body.

        Raises:
            ProtocolError: the body is compressed.
        """
        if self.encoding:
            raise ProtocolError(
                step,
                f"the answer was not read because it is compressed (Content-Encoding: {self.encoding}), and the "
                "request asked for identity",
                status=self.status,
            )
        return bytes(self.body)

    def begin(self, status: int, retry_after: str | None, encoding: str | None, *secrets: Secret) -> None:
        """Note the head of an answer: its status, and two of its headers. The answer is complete if it is compressed."""
        self.status = status
        self.retry_after = retry_after
        self.encoding = unwanted_encoding(encoding, *secrets)
        self.complete = bool(self.encoding)

    def deadline(self) -> float:
        """Return how long the body is waited for, on Trio's clock."""
        refused = self.status is not None and self.status >= 300
        return trio.current_time() + REFUSAL_GRACE if refused else math.inf

    def add(self, chunk: bytes | bytearray) -> None:
        """Note a chunk of the body. The answer is complete if it has more, or more chunks, than any that is documented."""
        self.body += chunk[: self.limit - len(self.body)]
        self.chunks += 1
        most = _CHUNKS + self.limit // _BYTES_A_CHUNK
        self.complete = len(self.body) >= self.limit or self.chunks >= most

    def fail(self, exc: Exception, *secrets: Secret, is_bug: bool) -> None:
        """Note what went wrong."""
        self.fault = describe(exc, *secrets)
        self.cause = scrubbed(exc, *secrets)
        self.is_bug = is_bug

    async def read(self, response: httpx.Response, *secrets: Secret) -> None:
        """Read what is needed of a response: a compressed body not at all, that of a refusal for `REFUSAL_GRACE`."""
        headers = response.headers
        self.begin(response.status_code, headers.get("retry-after"), headers.get("content-encoding"), *secrets)
        if self.complete:
            return
        with trio.CancelScope(deadline=self.deadline()) as grace:
            # The stream itself, because httpx's own methods decompress, without a limit.
            async for chunk in cast("AsyncIterable[bytes]", response.stream):
                self.add(chunk)
                if not self.chunks % CHUNKS_AT_ONCE:
                    # Chunks that arrived together are read without waiting, and each costs as much as an event.
                    # Shielded, because a cancellation must be raised in httpx's generators, which it ends; see below.
                    await trio.lowlevel.cancel_shielded_checkpoint()
                if self.complete:
                    # Leaving the loop would leave httpx's generators to the garbage collector; a cancellation ends them.
                    grace.cancel(reason="the answer is longer than any that is documented")
            self.complete = True


class _Once:
    """Iterates over one chunk. No generator: a cancelled request would leave it to the garbage collector."""

    def __init__(self, content: bytes) -> None:
        self._left = content

    def __aiter__(self) -> _Once:
        return self

    async def __anext__(self) -> bytes:
        content, self._left = self._left, b""
        if not content:
            raise StopAsyncIteration
        return content


def _bytes(content: bytes | Secret) -> bytes:
    return content.reveal().encode() if isinstance(content, Secret) else content


@functools.cache
def _body_type() -> Callable[[bytes], httpx.AsyncByteStream]:
    import httpx

    class Body(httpx.AsyncByteStream):
        def __init__(self, content: bytes) -> None:
            self._content = content

        def __aiter__(self) -> AsyncIterator[bytes]:
            return _Once(self._content)

    return Body


@async_context
async def open_http(
    *,
    hosts: Collection[str],
    secure: bool,
    secrets: tuple[Secret, ...] = (),
    ssl_context: ssl.SSLContext | None = None,
    transport: object | None = None,
    wall_clock: Callable[[], datetime] = utc_now,
    at_once: bool = True,
) -> AsyncIterator[HttpClient]:
    """Open an `HttpClient`; leaving closes its connections.

    Args:
        hosts: all hosts that requests go to. Those on this machine are reached
            directly, as the WebSocket is (`find_proxy`): a proxy would be sent
            secrets in the clear, and could not reach them anyway.
        secure: whether any of them is reached by TLS.
        secrets: what a server may repeat because requests hold it. Proxy credentials are added.
        ssl_context: for TLS; None for httpx's.
        transport: an ``httpx.AsyncBaseTransport``; None for httpx's own.
        wall_clock: gives the time that a ``Retry-After`` date is measured against.
        at_once: make the pool of connections now, and not for the first request: a proxy that cannot be used shows here.

    Raises:
        ConfigurationError: the certificates that the environment names cannot
            be used; or the proxy, if *at_once*.
    """
    unused = transport is not None or not secure
    ssl_context = _unused_ssl_context() if unused else ssl_context or default_ssl_context()
    local = {host for host in hosts if is_loopback(host)}
    make = functools.partial(
        _make_client,
        ssl_context,
        cast("httpx.AsyncBaseTransport | None", transport),
        local,
        direct=local >= set(hosts),
    )
    http = HttpClient(make, (*secrets, *proxy_secrets()), wall_clock)
    if at_once:
        http.pool()
    try:
        yield http
    finally:
        # Shielded, because a Cancelled from here would replace the exception of the caller's block.
        await clean_up(trio.current_time() + CLOSE_TIMEOUT, http.aclose)  # noqa: ASYNC102  # shielded in there


def _make_client(
    context: ssl.SSLContext, transport: httpx.AsyncBaseTransport | None, local: Collection[str], *, direct: bool
) -> httpx.AsyncClient:
    import httpx

    with contextlib.suppress(ValueError, ImportError, httpx.InvalidURL):
        return httpx.AsyncClient(
            transport=transport,
            verify=context,
            trust_env=not direct,
            # None is httpx's own transport without a proxy; a host is more specific than a scheme, and wins.
            mounts={f"all://[{host}]" if ":" in host else f"all://{host}": None for host in local},
            # No cookie is kept, because no endpoint needs one and a jar that only grows ends in HTTP 431.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            follow_redirects=False,
            timeout=None,  # noqa: S113  # our own, around the whole request
        )
    # Without the original's text: it shows the proxy's URL, which may hold a password.
    raise ConfigurationError("the proxy that the environment names (HTTPS_PROXY, ALL_PROXY, ...) cannot be used")


@functools.cache
def _unused_ssl_context() -> ssl.SSLContext:
    """Return a TLS context for a client that makes no connection by TLS, so that httpx makes none for each.

    It trusts no server. Loading the certificate authorities would take about 30 ms, and each context takes 20 KB and more.
    """
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@functools.cache
def default_ssl_context() -> ssl.SSLContext:
    """Return the TLS context for both sides of Kadoa: as httpx makes its own, so that both trust the same authorities.

    Raises:
        ConfigurationError: ``SSL_CERT_FILE`` or ``SSL_CERT_DIR`` names something that cannot be used.
    """
    file, directory = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    context: ssl.SSLContext | None = None
    why = ""
    try:
        if not file and directory:
            os.listdir(directory)  # OpenSSL accepts a missing directory, and then trusts no server
        context = ssl.create_default_context(
            cafile=file or (None if directory else certifi.where()), capath=None if file else directory
        )
    except OSError as exc:  # ssl.SSLError is one
        why = describe(exc)
    if context is None:
        name, value = ("SSL_CERT_FILE", file) if file else ("SSL_CERT_DIR", directory)
        if not value:
            raise ConfigurationError(f"the certificate authorities of certifi cannot be loaded: {why}")
        raise ConfigurationError(
            f"the environment variable {name} names certificate authorities that cannot be loaded "
            f"({presentable(value, 200)}: {why}); correct it, unset it, or pass ssl_context"
        )
    context.set_alpn_protocols(["http/1.1"])
    return context


def secret_of_query(url: Secret) -> Secret:
    """Return the query of a URL as a secret, in every spelling that httpx sends and logs, and with each of its values."""
    import httpx

    query = urlsplit(url.reveal()).query
    also = [value for _name, value in parse_qsl(query)]
    with contextlib.suppress(httpx.InvalidURL, UnicodeError):  # the request will fail with this
        also.append(httpx.URL(url.reveal()).query.decode("ascii"))
    return Secret(query, *also)
