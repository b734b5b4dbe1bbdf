"""Requests to Kadoa's HTTP side: the only module that imports httpx.

What is shared with the WebSocket handshake stands here too, since a refused
handshake is an HTTP answer: the TLS context, ``Retry-After``, the words for a
network fault, and how text from a server is made safe to show.

httpx's exceptions hold the request and with it the API key; none of them is
kept or chained. Its loggers, and those of the library below it, repeat what
the server sent, so records made during our requests are censored.
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
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeGuard, cast
from urllib.parse import urlsplit

import attrs
import trio

from ._contexts import async_context, sync_context
from ._errors import (
    AttemptError,
    AuthenticationError,
    ConfigurationError,
    ForeignError,
    KadoaError,
    ProtocolError,
    RequestRefusedError,
    Step,
    scrub,
    scrubbed,
)
from ._events import parse_json
from ._settings import CLOSE_TIMEOUT, Settings

MAX_ANSWER = 64 * 1024
"""An answer longer than this is not read further, in bytes. The documented one has a few hundred."""
LOG_PAGE = 100
"""Rows that are asked for at once; the API's description allows no more."""
LOG_TIMEOUT = 30.0
"""For a page of the log as a whole, in seconds."""
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
_FRAGMENT: Final = 8
_FOREIGN_LOGGERS: Final = (
    "httpx",
    "httpcore.connection",
    "httpcore.http11",
    "httpcore.http2",
    "httpcore.proxy",
    "httpcore.socks",
    "trio-websocket",
)
_secrets_in_use: ContextVar[tuple[str, ...]] = ContextVar("_secrets_in_use", default=())


@attrs.frozen
class Token:
    """An access token, good for one connection attempt, and the channel to subscribe to."""

    access_token: str = attrs.field(repr=False)
    team_id: str


@attrs.frozen
class LogPage:
    """A page of the notification log."""

    rows: list[dict[str, object]]
    has_more: bool


@attrs.define(eq=False)
class HttpClient:
    """A pool of HTTP connections that speaks for one API key. Made by `open_http`."""

    _client: httpx.AsyncClient = attrs.field(repr=False)
    _api_key: str = attrs.field(repr=False)
    _settings: Settings = attrs.field(repr=False)
    _wall_clock: Callable[[], datetime] = attrs.field(repr=False)

    async def fetch_token(self) -> Token:
        """Trade the API key for a fresh access token.

        The whole of it, reading the answer included, takes no longer than
        ``token_timeout``. Cancellation abandons the request.

        Raises:
            AuthenticationError: 401 or 403.
            RequestRefusedError: any other 4xx that repeating cannot mend.
            ProtocolError: a success, but not the documented JSON.
            AttemptError: everything that may pass: the network, a hang, 408,
                425, 429, 3xx, 5xx.
        """
        timeout = self._settings.token_timeout
        url = self._settings.endpoints.public_api.rstrip("/") + "/v4/oauth2/token"
        answer, fault = await self._request("POST", url, timeout=timeout, limit=MAX_ANSWER, with_key=True)
        token = _parse_token(self._body("token", answer, fault, timeout, final=True))
        if token is None:
            raise ProtocolError("token", "the answer is not the documented JSON", status=_status(answer))
        return token

    async def acknowledge(self, event_id: str) -> None:
        """Acknowledge an event. Sent without the key, as Kadoa's SDKs do.

        Raises:
            AttemptError: it was refused, or the network failed.
        """
        timeout = self._settings.token_timeout
        url = self._settings.endpoints.realtime_api.rstrip("/") + "/api/v1/events/ack"
        answer, fault = await self._request(
            "POST", url, timeout=timeout, limit=MAX_ANSWER, content=json.dumps({"id": event_id}).encode()
        )
        self._body("acknowledge", answer, fault, timeout, final=False)

    async def fetch_log(self, start: datetime, end: datetime, offset: int) -> LogPage:
        """Read a page of at most 100 rows of the notification log, between two times.

        Raises:
            ProtocolError: a success, but not the documented JSON.
            AttemptError: it was refused, or the network failed.
        """
        timeout = LOG_TIMEOUT
        url = self._settings.endpoints.public_api.rstrip("/") + "/v5/notifications/logs"
        params = {
            "startDate": iso(start),
            "endDate": iso(end),
            "limit": str(LOG_PAGE),
            "offset": str(offset),
        }
        # A row may carry a whole event.
        limit = max(MAX_ANSWER, self._settings.max_message_size)
        answer, fault = await self._request("GET", url, timeout=timeout, limit=limit, with_key=True, params=params)
        page = _parse_log(self._body("log", answer, fault, timeout, final=False))
        if page is None:
            raise ProtocolError("log", "the answer is not the documented JSON", status=_status(answer))
        return page

    async def call(
        self, method: str, path: str, *, params: dict[str, str] | None = None, body: object = None
    ) -> dict[str, object]:
        """Call the notifications API, and give the ``data`` of its answer.

        Args:
            method: the HTTP method.
            path: below ``/v5/notifications``.
            params: of the query.
            body: sent as JSON; None sends none.

        Raises:
            AuthenticationError, RequestRefusedError, ProtocolError,
                AttemptError: as for `fetch_token`.
        """
        url = f"{self._settings.endpoints.public_api.rstrip('/')}/v5/notifications{path}"
        answer, fault = await self._request(
            method,
            url,
            timeout=API_TIMEOUT,
            limit=MAX_API_ANSWER,
            with_key=True,
            content=None if body is None else json.dumps(body).encode(),
            params=params,
        )
        data = _parse_object(self._body("notifications", answer, fault, API_TIMEOUT, final=True))
        if data is None:
            raise ProtocolError("notifications", "the answer is not a JSON object", status=_status(answer))
        return data

    async def post(self, url: str, event_type: str, content: bytes, timeout: float) -> None:
        """Post a webhook, without the key.

        Raises:
            AttemptError: the answer was no 2xx, or there was none.
        """
        answer, fault = await self._request(
            "POST", url, timeout=timeout, limit=MAX_ANSWER, content=content, headers={"x-kadoa-event": event_type}
        )
        self._body("forward", answer, fault, timeout, final=False)

    @trio.lowlevel.enable_ki_protection
    async def _request(
        self,
        method: str,
        url: str,
        *,
        timeout: float,
        limit: int,
        with_key: bool = False,
        content: bytes | None = None,
        params: dict[str, str] | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[_Answer | None, Exception | None]:
        """Make a request, and give what was read of the answer, and what went wrong. Raises no `Exception`."""
        import httpx

        await trio.lowlevel.checkpoint()  # whatever the transport does
        # Uncompressed, so that a small answer cannot grow into a large one here.
        sent = {"content-type": "application/json", "accept-encoding": "identity", **headers}
        if with_key:
            sent["x-api-key"] = self._api_key
        answer: _Answer | None = None
        # httpx's own time-outs are per operation: a server that sends a byte a second never meets one.
        with censored_logs(self._api_key), trio.move_on_after(timeout):
            try:
                async with self._client.stream(method, url, headers=sent, content=content, params=params) as response:
                    answer = _Answer(response.status_code, response.headers.get("retry-after"), limit)
                    await answer.read(response)
            except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, UnicodeError) as exc:
                return answer, exc
        return answer, None

    def _body(
        self, step: Step, answer: _Answer | None, fault: Exception | None, timeout: float, *, final: bool
    ) -> bytes:
        """Give the body of a success, and raise what anything else means; where nothing is *final*, as an attempt.

        To be called outside of every ``except``: an exception raised in there would hold httpx's as its context.
        """
        if answer is not None and answer.status >= 300:
            raise self._refusal(step, answer, final=final)
        if fault is not None:
            raise AttemptError(step, describe(fault, self._api_key)) from copy_of(fault, self._api_key)
        if answer is None or not answer.complete:
            raise AttemptError(step, f"no answer within {timeout:g} s")
        return bytes(answer.body)

    def _refusal(self, step: Step, answer: _Answer, *, final: bool) -> KadoaError:
        status = answer.status
        message = server_message(bytes(answer.body), self._api_key)
        if final and status in (401, 403):
            return AuthenticationError(step, status, message)
        if final and 400 <= status < 500 and status not in _TEMPORARY_4XX:
            return RequestRefusedError(step, status, message)
        reason = f"HTTP {status}: {message}" if message else f"HTTP {status}"
        retry_after = parse_retry_after(answer.retry_after, self._wall_clock())
        return AttemptError(step, reason, status=status, retry_after=retry_after)


@attrs.define(eq=False)
class _Answer:
    """What has been read of an answer so far; it outlives the deadline that cuts the reading."""

    status: int
    retry_after: str | None
    limit: int
    body: bytearray = attrs.field(factory=bytearray)
    complete: bool = False

    async def read(self, response: httpx.Response) -> None:
        grace = trio.CancelScope()
        if self.status >= 300:
            grace.deadline = trio.current_time() + REFUSAL_GRACE
        with grace:
            async for chunk in response.aiter_bytes():
                self.body += chunk[: self.limit - len(self.body)]
                if len(self.body) >= self.limit:
                    # Leaving the loop would leave httpx's generators to the garbage collector; a cancellation ends them.
                    self.complete = True
                    grace.cancel(reason="the answer is longer than any that is documented")
            self.complete = True


def _status(answer: _Answer | None) -> int | None:
    return None if answer is None else answer.status


@async_context
async def open_http(
    *, api_key: str, settings: Settings, wall_clock: Callable[[], datetime]
) -> AsyncIterator[HttpClient]:
    """Open an `HttpClient`; leaving closes its connections.

    Args:
        api_key: the account's key. It goes into one header and nowhere else.
        settings: the client's options.
        wall_clock: gives the time that a ``Retry-After`` date is measured against.

    Raises:
        ConfigurationError: the key cannot stand in a header, or the proxy
            that the environment names cannot be used.
    """
    # h11 refuses such a key with an error that shows it.
    if not api_key or not api_key.isascii() or not api_key.isprintable() or api_key != api_key.strip():
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
    async with _open_client(context, cast("httpx.AsyncBaseTransport | None", transport)) as client:
        yield HttpClient(client, api_key, settings, wall_clock)


@async_context
async def open_webhooks(
    *, settings: Settings, secret: str, direct: bool, wall_clock: Callable[[], datetime]
) -> AsyncIterator[HttpClient]:
    """Open an `HttpClient` without a key, for `HttpClient.post`.

    Args:
        settings: the client's options.
        secret: what is kept out of logs and errors, as the key is elsewhere. It is sent nowhere.
        direct: whether to leave the environment's proxy out of it.
        wall_clock: gives the time that a ``Retry-After`` date is measured against.
    """
    context = settings.ssl_context or default_ssl_context()
    async with _open_client(context, None, direct=direct) as client:
        yield HttpClient(client, secret, settings, wall_clock)


@async_context
async def _open_client(
    context: ssl.SSLContext, transport: httpx.AsyncBaseTransport | None, *, direct: bool = False
) -> AsyncIterator[httpx.AsyncClient]:
    import httpx

    client: httpx.AsyncClient | None = None
    with contextlib.suppress(ValueError, ImportError, httpx.InvalidURL):
        client = httpx.AsyncClient(
            transport=transport,
            verify=context,
            trust_env=not direct,
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
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_TIMEOUT):
            await client.aclose()


@functools.cache
def default_ssl_context() -> ssl.SSLContext:
    """Return the TLS context for both sides of Kadoa: httpx's, so that both trust the same authorities."""
    import httpx

    context = httpx.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _parse_token(body: bytes) -> Token | None:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    access_token, team_id = data.get("access_token"), data.get("team_id")
    if _usable(access_token) and _usable(team_id):
        return Token(access_token, team_id)
    return None


def _parse_log(body: bytes) -> LogPage | None:
    try:
        data = parse_json(body)
    except (ValueError, RecursionError):
        return None
    if isinstance(data, dict) and isinstance(data.get("data"), dict):
        data = data["data"]
    rows = data.get("events") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        return None
    pagination = data.get("pagination")
    has_more = isinstance(pagination, dict) and pagination.get("hasMore") is True
    return LogPage([row for row in rows if isinstance(row, dict)], has_more and bool(rows))


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


def server_message(body: bytes, *secrets: str) -> str:
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


def presentable(text: str, limit: int, *secrets: str) -> str:
    """Make text from a server safe to show: one line, printable, short, without secrets.

    A server may repeat the credential that it refuses, cut or in part, so
    that any longer run of characters of a secret is replaced.
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: limit * 10]).split())
    return censor(text, *secrets)[:limit]


def censor(text: str, *secrets: str) -> str:
    """Replace *secrets* in *text*, and every run of eight or more characters of one."""
    text = scrub(text, *secrets)
    for secret in secrets:
        if len(secret) < _FRAGMENT or len(text) < _FRAGMENT:
            continue
        kept: list[str] = []
        start = 0
        while start < len(text):
            end = start + _FRAGMENT
            if text[start:end] in secret and end <= len(text):
                while end < len(text) and text[start : end + 1] in secret:
                    end += 1
                kept.append("[secret]")
                start = end
            else:
                kept.append(text[start])
                start += 1
        text = "".join(kept)
    return re.sub(r"(\[secret\])+", "[secret]", text)


def copy_of(exc: BaseException, *secrets: str) -> ForeignError:
    """Copy what may be kept of a foreign exception; *secrets* go in their escaped spelling, too."""
    return scrubbed(exc, *secrets, *(repr(secret)[1:-1] for secret in secrets))


def describe(exc: BaseException, *secrets: str) -> str:
    """Say in a few words what a network fault was, from the innermost error that knows."""
    words: list[str] = []
    for inner in _leaves(exc):
        if isinstance(inner, ssl.SSLCertVerificationError):
            words.append(f"certificate refused: {inner.verify_message}")
        elif isinstance(inner, ssl.SSLError):
            words.append(f"TLS failed: {(inner.reason or inner.strerror or 'unknown').replace('_', ' ').lower()}")
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
def censored_logs(*secrets: str) -> Iterator[None]:
    """Keep *secrets* out of what libraries underneath log in this task (and tasks that it starts) in the block."""
    for name in _FOREIGN_LOGGERS:
        logging.getLogger(name).addFilter(_CENSOR)  # adds it once only
    reset = _secrets_in_use.set(secrets)
    try:
        yield
    finally:
        _secrets_in_use.reset(reset)
