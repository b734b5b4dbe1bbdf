"""Requests to Kadoa's HTTP side: the only module that imports httpx.

What is shared with the WebSocket handshake stands here too, since a refused
handshake is an HTTP answer: the TLS context, ``Retry-After``, the words for a
network fault, and how text from a server is made safe to show.

httpx's exceptions hold the request and with it the API key; none of them is
kept or chained. Its loggers, and those of the library below it, repeat what
the server sent, so records made during our requests are censored.

No answer is ever decompressed: none is asked to be compressed, and one that
is compressed all the same is not read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeGuard, cast
from urllib.parse import parse_qsl, urlsplit

import attrs
import trio

from .._contexts import async_context, sync_context
from .._errors import (
    AttemptError,
    AuthenticationError,
    ConfigurationError,
    ForeignError,
    InternalError,
    KadoaError,
    ProtocolError,
    RequestRefusedError,
    Step,
    scrubbed,
)
from .._events import parse_json
from .._exits import clean_up
from .._redact import Secret, censor, presentable
from .._settings import CLOSE_TIMEOUT, Endpoints, Settings, fits_header, is_loopback
from ._proxy import proxy_secrets

MAX_ANSWER = 64 * 1024
"""An answer longer than this is not read further, in bytes. The documented one has a few hundred."""
LOG_PAGE = 100
"""Rows that are asked for at once; the API's description allows no more."""
API_TIMEOUT = 30.0
"""For a call of the notifications API as a whole, in seconds."""
MAX_API_ANSWER = 8 * 1024 * 1024
"""For a call of the notifications API, in bytes: the settings of some ten thousand workflows."""
REFUSAL_GRACE = 1.0
"""How long the body of a refusal is waited for, in seconds: the status has said what matters."""

if TYPE_CHECKING:
    # ASYNC127 names httpx2 as the maintained fork; httpx is what projects have installed, and only this module imports
    # it: where it is used, since it costs as much as everything else together, also for who only wants an exception.
    import httpx

_TEMPORARY_4XX: Final = frozenset({408, 425, 429})
_CHUNKS, _BYTES_A_CHUNK = 256, 512
"""Maximum chunks of an answer: so many, and one more for each so many bytes of its limit. Servers send 4 KiB and more."""
_CHUNKS_AT_ONCE: Final = 32
"""Chunks of an answer that are read before other tasks run."""
_TOKENS_KEPT: Final = 8
"""Tokens that the client keeps out of its own reports: those of its sockets, and of the attempts just before."""
_FOREIGN_LOGGERS: Final = (
    "httpx",
    "httpcore.connection",
    "httpcore.http11",
    "httpcore.http2",
    "httpcore.proxy",
    "httpcore.socks",
    "trio-websocket",
)
_secrets_in_use: ContextVar[tuple[Secret, ...]] = ContextVar("_secrets_in_use", default=())


@attrs.frozen
class Token:
    """An access token, good for one connection attempt, and the channel to subscribe to."""

    access_token: Secret
    team_id: str


@attrs.define(eq=False)
class HttpClient:
    """A pool of HTTP connections that speaks for one API key. Made by `open_http`."""

    _client: httpx.AsyncClient = attrs.field(repr=False)
    _api_key: Secret = attrs.field(repr=False)
    _settings: Settings = attrs.field(repr=False)
    _wall_clock: Callable[[], datetime] = attrs.field(repr=False)
    _secrets: tuple[Secret, ...] = attrs.field(init=False, repr=False)
    _tokens: deque[Secret] = attrs.field(init=False, repr=False, factory=lambda: deque(maxlen=_TOKENS_KEPT))

    def __attrs_post_init__(self) -> None:
        self._secrets = (self._api_key, *proxy_secrets())

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """What a server may repeat of what it was sent or has given: key, proxy password, the newest tokens."""
        return (*self._secrets, *self._tokens)

    def censor(self, text: str) -> str:
        """Replace the API key and the newest tokens in *text*: a server may repeat them in its frames."""
        return censor(text, *self.secrets)

    async def fetch_token(self) -> Token:
        """Trade the API key for a fresh access token.

        The whole of it, reading the answer included, takes no longer than
        `Timeouts.token`. Cancellation abandons the request.

        Raises:
            AuthenticationError: 401 or 403.
            RequestRefusedError: any other 4xx that repeating cannot mend.
            ProtocolError: a success, but not the documented JSON.
            AttemptError: everything that may pass: the network, a hang, 408,
                425, 429, 3xx, 5xx.
        """
        timeout = self._settings.timeouts.token
        url = self._settings.endpoints.public_api.rstrip("/") + "/v4/oauth2/token"
        answer = await self._request("POST", url, timeout=timeout, limit=MAX_ANSWER, with_key=True)
        token = _parse_token(self._body("token", answer, timeout, final=True), self._api_key)
        if token is None:
            raise ProtocolError("token", "the answer is not the documented JSON", status=answer.status)
        self._tokens.append(token.access_token)
        return token

    async def acknowledge(self, event_id: str) -> None:
        """Acknowledge an event. Sent without the key, as Kadoa's SDKs do.

        Raises:
            AttemptError: it was refused, or the network failed.
        """
        timeout = self._settings.timeouts.token
        url = self._settings.endpoints.realtime_api.rstrip("/") + "/api/v1/events/ack"
        answer = await self._request(
            "POST", url, timeout=timeout, limit=MAX_ANSWER, content=json.dumps({"id": event_id}).encode()
        )
        self._check("acknowledge", answer, timeout, final=False)

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, str] | None = None,
        body: object = None,
        limit: int = MAX_API_ANSWER,
    ) -> dict[str, object]:
        """Call the notifications API, and give the ``data`` of its answer.

        Args:
            method: the HTTP method.
            path: below ``/v5/notifications``.
            params: of the query.
            body: sent as JSON; a `Secret` is JSON already; None sends none.
            limit: maximum length of the answer, in bytes.

        Raises:
            AuthenticationError, RequestRefusedError, ProtocolError,
                AttemptError: as for `fetch_token`.
        """
        url = f"{self._settings.endpoints.public_api.rstrip('/')}/v5/notifications{path}"
        answer = await self._request(
            method,
            url,
            timeout=API_TIMEOUT,
            limit=limit,
            with_key=True,
            content=_as_json(body),
            params=params,
        )
        data = _parse_object(self._body("notifications", answer, API_TIMEOUT, final=True))
        if data is None:
            raise ProtocolError("notifications", "the answer is not a JSON object", status=answer.status)
        return data

    async def post(self, url: Secret, event_type: str, content: bytes, timeout: float) -> None:
        """Post a webhook, without the key. What a success says beside its status does not matter, and is not decoded.

        Raises:
            AttemptError: the answer was no 2xx, or there was none.
        """
        answer = await self._request(
            "POST", url, timeout=timeout, limit=MAX_ANSWER, content=content, headers={"x-kadoa-event": event_type}
        )
        self._check("forward", answer, timeout, final=False)

    @trio.lowlevel.enable_ki_protection
    async def _request(
        self,
        method: str,
        url: str | Secret,
        *,
        timeout: float,
        limit: int,
        with_key: bool = False,
        content: bytes | None = None,
        params: dict[str, str] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> _Answer:
        """Make a request, and give what came of it. Raises no `Exception`."""
        import httpx

        await trio.lowlevel.checkpoint()  # whatever the transport does
        answer = _Answer(limit)
        # httpx's own time-outs are per operation: a server that sends a byte a second never meets one.
        with censored_logs(*self.secrets), trio.move_on_after(timeout):
            try:
                # Never bound to a name: it holds the key, or a webhook's secret.
                response = await self._client.send(
                    self._build(method, url, with_key, content, params, headers), stream=True
                )
                try:
                    await answer.read(response, *self.secrets)
                finally:
                    await response.aclose()
            except Exception as exc:
                answer.fault = describe(exc, *self.secrets)
                answer.cause = scrubbed(exc, *self.secrets)
                known = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, UnicodeError)
                answer.is_bug = not isinstance(exc, known)
        return answer

    def _build(
        self,
        method: str,
        url: str | Secret,
        with_key: bool,
        content: bytes | None,
        params: dict[str, str] | None,
        headers: Mapping[str, str],
    ) -> httpx.Request:
        request = self._client.build_request(
            method,
            url.reveal() if isinstance(url, Secret) else url,
            # Uncompressed, so that a small answer cannot grow into a large one here.
            headers={"content-type": "application/json", "accept-encoding": "identity", **headers},
            content=content,
            params=params,
        )
        request.stream = _body_type()(content or b"")
        if with_key:
            request.headers["x-api-key"] = self._api_key.reveal()
        return request

    def _check(self, step: Step, answer: _Answer, timeout: float, *, final: bool) -> None:
        """Raise what anything but a success means; where nothing is *final*, as an attempt.

        To be called outside of every ``except``: an exception raised in there would hold httpx's as its context.
        """
        if answer.status is not None and answer.status >= 300:
            raise self._refusal(step, answer, answer.status, final=final)
        if answer.is_bug:
            raise InternalError(
                f"a request failed by a bug of the client's own ({answer.fault}); please report it"
            ) from answer.cause
        if answer.fault is not None:
            raise AttemptError(step, answer.fault) from answer.cause
        if not answer.complete:
            raise AttemptError(step, f"no answer within {timeout:g} s")

    def _body(self, step: Step, answer: _Answer, timeout: float, *, final: bool) -> bytes:
        """Give the body of a success; raises as `_check` does."""
        self._check(step, answer, timeout, final=final)
        if answer.encoding:
            raise ProtocolError(
                step,
                f"the answer was not read because it is compressed (Content-Encoding: {answer.encoding}), and the "
                "request asked for identity",
                status=answer.status,
            )
        return bytes(answer.body)

    def _refusal(self, step: Step, answer: _Answer, status: int, *, final: bool) -> KadoaError:
        message = server_message(bytes(answer.body), *self.secrets)
        if final and status in (401, 403):
            return AuthenticationError(step, status, message)
        if final and 400 <= status < 500 and status not in _TEMPORARY_4XX:
            return RequestRefusedError(step, status, message)
        reason = f"HTTP {status}: {message}" if message else f"HTTP {status}"
        retry_after = parse_retry_after(answer.retry_after, self._wall_clock())
        return AttemptError(step, reason, status=status, retry_after=retry_after)


@attrs.define(eq=False)
class _Answer:
    """What has been read of an answer so far; it outlives the deadline that cuts the reading.

    Its repr shows the status only: a server may repeat what it was sent.
    """

    limit: int = attrs.field(repr=False)
    status: int | None = None
    retry_after: str | None = attrs.field(default=None, repr=False)
    encoding: str = attrs.field(default="", repr=False)
    """The ``Content-Encoding``, if it is one that was not asked for; the body is not read then."""
    body: bytearray = attrs.field(factory=bytearray, repr=False)
    complete: bool = False
    fault: str | None = attrs.field(default=None, repr=False)
    cause: ForeignError | None = attrs.field(default=None, repr=False)
    is_bug: bool = False

    async def read(self, response: httpx.Response, *secrets: Secret) -> None:
        self.status = response.status_code
        self.retry_after = response.headers.get("retry-after")
        self.encoding = unwanted_encoding(response.headers.get("content-encoding"), *secrets)
        if self.encoding:
            self.complete = True
            return
        grace = trio.CancelScope()
        if self.status >= 300:
            grace.deadline = trio.current_time() + REFUSAL_GRACE
        chunks, most = 0, _CHUNKS + self.limit // _BYTES_A_CHUNK
        with grace:
            # As it was sent: httpx's own methods decompress, without a limit.
            async for chunk in cast("AsyncIterable[bytes]", response.stream):
                self.body += chunk[: self.limit - len(self.body)]
                chunks += 1
                if not chunks % _CHUNKS_AT_ONCE:
                    # Chunks that arrived together are read without waiting, and each costs as much as an event.
                    # A cancellation must be raised in httpx's generators, which it ends; see below.
                    await trio.lowlevel.cancel_shielded_checkpoint()
                if len(self.body) >= self.limit or chunks >= most:
                    # Leaving the loop would leave httpx's generators to the garbage collector; a cancellation ends them.
                    self.complete = True
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


@functools.cache
def _body_type() -> Callable[[bytes], httpx.AsyncByteStream]:
    import httpx

    class Body(httpx.AsyncByteStream):
        def __init__(self, content: bytes) -> None:
            self._content = content

        def __aiter__(self) -> AsyncIterator[bytes]:
            return _Once(self._content)

    return Body


def _as_json(body: object) -> bytes | None:
    if body is None:
        return None
    return (body.reveal() if isinstance(body, Secret) else json.dumps(body)).encode()


def unwanted_encoding(value: str | None, *secrets: Secret) -> str:
    """Give the value of a ``Content-Encoding`` header, made safe to show, unless the body is sent as it is."""
    names = {name.strip().lower() for name in (value or "").split(",")}
    return presentable(value or "", 60, *secrets) or "?" if names - {"", "identity"} else ""


@async_context
async def open_http(
    *, api_key: Secret, settings: Settings, wall_clock: Callable[[], datetime]
) -> AsyncIterator[HttpClient]:
    """Open an `HttpClient`; leaving closes its connections.

    Args:
        api_key: the account's key. It goes into one header and nowhere else.
        settings: the client's options.
        wall_clock: gives the time that a ``Retry-After`` date is measured against.

    Raises:
        ConfigurationError: the key cannot stand in a header, or the proxy or
            the certificates that the environment names cannot be used.
    """
    # h11 refuses such a key with an error that shows it.
    if not fits_header(api_key):
        raise ConfigurationError("the API key must be printable ASCII, without spaces around it")
    network = settings.endpoints.network
    transport = None if network is None else network.http_transport
    secure = urlsplit(settings.endpoints.public_api).scheme == "https"
    context: ssl.SSLContext
    if transport is not None or not secure:
        # Loading the certificate authorities takes some 30 ms; this context trusts nobody and takes none.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    else:
        context = settings.ssl_context or default_ssl_context()
    direct, loopback = _loopback_hosts(settings.endpoints)
    async with _open_client(
        context, cast("httpx.AsyncBaseTransport | None", transport), direct=direct, loopback=loopback
    ) as client:
        yield HttpClient(client, api_key, settings, wall_clock)


@async_context
async def open_webhooks(
    *, settings: Settings, url: Secret, direct: bool, wall_clock: Callable[[], datetime]
) -> AsyncIterator[HttpClient]:
    """Open an `HttpClient` without a key, for `HttpClient.post`.

    Args:
        settings: the client's options.
        url: where webhooks go. Its query is kept out of logs and errors, as the key is elsewhere.
        direct: whether to leave the environment's proxy out of it.
        wall_clock: gives the time that a ``Retry-After`` date is measured against.

    Raises:
        ConfigurationError: the proxy or the certificates that the environment names cannot be used.
    """
    context = settings.ssl_context or default_ssl_context()
    async with _open_client(context, None, direct=direct) as client:
        yield HttpClient(client, _secret_of_query(url), settings, wall_clock)


def _secret_of_query(url: Secret) -> Secret:
    """Give the query of a URL, where webhooks have their secrets, in all of its spellings, and each of its values."""
    import httpx

    query = urlsplit(url.reveal()).query
    also = [value for _name, value in parse_qsl(query)]
    with contextlib.suppress(httpx.InvalidURL, UnicodeError):  # the request will say so
        also.append(httpx.URL(url.reveal()).query.decode("ascii"))  # as it is sent, and logged
    return Secret(query, *also)


def _loopback_hosts(endpoints: Endpoints) -> tuple[bool, frozenset[str]]:
    """Tell whether all of the HTTP endpoints are on this machine, and which ones are.

    They are reached directly, as the WebSocket is (`find_proxy`): a proxy
    would be sent the key in the clear, and could not reach them anyway.
    """
    hosts = {urlsplit(url).hostname or "" for url in (endpoints.public_api, endpoints.realtime_api)}
    local = frozenset(host for host in hosts if is_loopback(host))
    return local == hosts, local


@async_context
async def _open_client(
    context: ssl.SSLContext,
    transport: httpx.AsyncBaseTransport | None,
    *,
    direct: bool = False,
    loopback: frozenset[str] = frozenset(),
) -> AsyncIterator[httpx.AsyncClient]:
    import httpx

    client: httpx.AsyncClient | None = None
    with contextlib.suppress(ValueError, ImportError, httpx.InvalidURL):
        client = httpx.AsyncClient(
            transport=transport,
            verify=context,
            trust_env=not direct,
            # None is httpx's own transport without a proxy; a host is more specific than a scheme, and wins.
            mounts={f"all://[{host}]" if ":" in host else f"all://{host}": None for host in loopback},
            # None is kept: nothing needs one, and a jar that only grows ends in a 431.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            follow_redirects=False,
            timeout=None,  # noqa: S113  # our own, around the whole request
        )
    if client is None:
        # Without the original's text: it shows the proxy's URL, which may hold a password.
        raise ConfigurationError("the proxy that the environment names (HTTPS_PROXY, ALL_PROXY, ...) cannot be used")
    try:
        yield client
    finally:
        # Shielded: a Cancelled from in here would stand in for the exception of the caller's block.
        await clean_up(trio.current_time() + CLOSE_TIMEOUT, client.aclose)


@functools.cache
def default_ssl_context() -> ssl.SSLContext:
    """Return the TLS context for both sides of Kadoa: httpx's, so that both trust the same authorities.

    Raises:
        ConfigurationError: ``SSL_CERT_FILE`` or ``SSL_CERT_DIR`` names something that cannot be used.
    """
    import httpx

    file, directory = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    context: ssl.SSLContext | None = None
    why = ""
    try:
        if not file and directory:
            os.listdir(directory)  # OpenSSL takes one that is not there, and then trusts nobody
        context = httpx.create_ssl_context()
    except OSError as exc:  # ssl.SSLError is one
        why = describe(exc)
    if context is None:
        name, value = ("SSL_CERT_FILE", file) if file else ("SSL_CERT_DIR", directory)
        if not value:
            raise ConfigurationError(f"the certificate authorities that httpx comes with cannot be loaded: {why}")
        raise ConfigurationError(
            f"the environment variable {name} names certificate authorities that cannot be loaded "
            f"({presentable(value, 200)}: {why}); correct it, unset it, or pass ssl_context"
        )
    context.set_alpn_protocols(["http/1.1"])
    return context


def _parse_token(body: bytes, api_key: Secret) -> Token | None:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    access_token, team_id = data.get("access_token"), data.get("team_id")
    if _usable(access_token) and _usable(team_id):
        # The key goes with it: the WebSocket's server knows it as well, and may repeat it.
        return Token(Secret(access_token, api_key.reveal()), team_id)
    return None


def _parse_object(body: bytes) -> dict[str, object] | None:
    try:
        answer = parse_json(body) if body else {}  # some calls have nothing to say
    except (ValueError, RecursionError):
        return None
    if isinstance(answer, dict) and "data" in answer:
        # A list stands alone where others stand under a name.
        answer = answer["data"] if isinstance(answer["data"], dict) else {"data": answer["data"]}
    return answer if isinstance(answer, dict) else None


def iso(time: datetime) -> str:
    """Write a time as Kadoa does, in UTC and milliseconds."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _usable(value: object) -> TypeGuard[str]:
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        # A lone surrogate is valid JSON, but can be sent nowhere.
        return False
    return True


def parse_retry_after(value: str | None, now: datetime) -> float | None:
    """Read a ``Retry-After`` header: seconds, or a date that is measured against *now*.

    Returns:
        Seconds; None when the header is missing, unreadable or in the past.
    """
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        seconds = (when - now).total_seconds()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return seconds if seconds >= 0 else None


def server_message(body: bytes, *secrets: Secret) -> str:
    """Find what a refusal says in words, made safe to show: at most 200 characters."""
    message: object = None
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        text = body[:1000].decode(errors="replace").strip()
        # A gateway's HTML page says nothing that its status has not said.
        message = "" if text.startswith("<") else text
    for key in ("error", "message", "detail", "error_description"):
        if isinstance(message, dict) and key in message:
            message = message[key]
    return presentable(message, 200, *secrets) if isinstance(message, str) else ""


def describe(exc: BaseException, *secrets: Secret) -> str:
    """Say in a few words what a network fault was, from the innermost error that knows."""
    words: list[str] = []
    for inner in _leaves(exc):
        if isinstance(inner, ssl.SSLCertVerificationError):
            # Raised by a program's own code, an SSLError lacks the attributes that OpenSSL's have.
            words.append(f"certificate refused: {getattr(inner, 'verify_message', None) or 'no reason given'}")
        elif isinstance(inner, ssl.SSLError):
            reason = getattr(inner, "reason", None) or inner.strerror or "unknown"
            words.append(f"TLS failed: {str(reason).replace('_', ' ').lower()}")
        elif isinstance(inner, socket.gaierror):
            words.append(f"the name does not resolve: {inner.strerror}")
        elif isinstance(inner, OSError) and inner.errno:
            words.append(os.strerror(inner.errno))
        else:
            words.append(re.sub(r"\s+", " ", str(inner)) or type(inner).__name__)
    return presentable("; ".join(dict.fromkeys(words)), 300, *secrets)


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    elif (below := exc.__cause__ or exc.__context__) is not None:
        # The context, too: the library below httpx does not always name a cause.
        yield from _leaves(below)
    else:
        yield exc


class _Censor(logging.Filter):
    """Takes the secrets in use out of the records of the libraries underneath.

    They log, at DEBUG, what the server sent, and a server may repeat what it
    was sent. Records that are not made in one of our own requests or readers
    pass untouched.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        secrets = _secrets_in_use.get()
        if secrets:
            record.msg = censor(record.getMessage(), *secrets)
            record.args = None
            record.exc_info = record.exc_text = None
        return True


_CENSOR: Final = _Censor()


@sync_context
def censored_logs(*secrets: Secret) -> Iterator[None]:
    """Keep *secrets* out of what libraries underneath log in this task (and tasks that it starts) in the block."""
    for name in _FOREIGN_LOGGERS:
        logging.getLogger(name).addFilter(_CENSOR)  # adds it once only
    reset = _secrets_in_use.set(secrets)
    try:
        yield
    finally:
        _secrets_in_use.reset(reset)
