"""Requests: the meaning of every answer, limits of time and size, and the API key in no error and no log.

Answers come from httpx's mock transport if only their meaning matters, and from
real servers on the loopback interface if the bytes matter. After every test, no
log record of any logger at any level has the key.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import logging
import socket as stdlib_socket
import ssl
import struct
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest
import trio
import trio.testing
from _loopback import chain, everything_said, read_head, server_tls, serving, trusting_tls
from _memory import MemoryServers
from _processes import finished

from kadoa_trio import Timeouts, __version__, open_forwarder, open_realtime
from kadoa_trio._errors import (
    AttemptError,
    AuthenticationError,
    ConfigurationError,
    ForeignError,
    InternalError,
    KadoaError,
    ProtocolError,
    RequestRefusedError,
)
from kadoa_trio._net import _api
from kadoa_trio._net._answers import describe, parse_retry_after
from kadoa_trio._net._api import KadoaApi, Token, open_api
from kadoa_trio._net._http import (
    _BYTES_A_CHUNK,
    _CHUNKS,
    CHUNKS_AT_ONCE,
    MAX_ANSWER,
    HttpClient,
    default_ssl_context,
    open_http,
    secret_of_query,
)
from kadoa_trio._redact import Secret, censor, presentable
from kadoa_trio._settings import Endpoints, Settings
from kadoa_trio.workspace import open_notifications

KEY = "tk-0f8b1c2d-s3cr3t/k3y+for=tests"
NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
GOOD = json.dumps({"access_token": "t0k3n", "team_id": "team-1"}).encode()


def assert_no_secret(text: str) -> None:
    for start in range(len(KEY) - 11):
        assert KEY[start : start + 12] not in text


def assert_clean(error: BaseException) -> None:
    """Fail if the error, or an exception that it refers to, shows the key or belongs to a library underneath."""
    assert_no_secret(everything_said(error))
    for one in chain(error):
        assert isinstance(one, (KadoaError, ForeignError)), one


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(1)
    for name in ("httpx", "httpcore.http11", "httpcore.connection"):
        assert logging.getLogger(name).isEnabledFor(logging.DEBUG)
    yield caplog
    for record in caplog.get_records("call"):
        assert_no_secret(record.getMessage() + repr(record.args) + repr(record.exc_info) + str(record.exc_text))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@attrs.frozen
class MockNetwork:
    http_transport: object | None
    settlement_observer: None = None

    async def open_stream(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        raise AssertionError("the token request opened a stream")


Answer = Callable[[httpx.Request], httpx.Response]


def mocked(answer: Answer, **options: Any) -> Settings:
    return Settings(endpoints=Endpoints(network=MockNetwork(httpx.MockTransport(answer))), **options)


def plain(port: int, **options: Any) -> Settings:
    return Settings(endpoints=Endpoints(public_api=f"http://127.0.0.1:{port}"), **options)


@pytest.fixture(autouse=True, params=["h11", "httpx"])
def client_of_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Request tokens by either of the two ways. Kept connections need neither a `Network` nor some kinds of proxies."""
    if request.param == "httpx":
        monkeypatch.setattr(_api, "can_keep", lambda _address, _settings: False)
    return str(request.param)


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[KadoaApi]:
    with trio.fail_after(20):
        async with open_api(api_key=Secret(KEY), settings=settings, wall_clock=lambda: NOW) as client:
            yield client


async def failure(settings: Settings) -> KadoaError:
    """Fetch a token, which must fail, and give the error; it is clean."""
    async with opened(settings) as client:
        with pytest.raises(KadoaError) as caught:
            await client.fetch_token()
    assert_clean(caught.value)
    return caught.value


def saying(status: int, body: bytes = b"", **headers: str) -> Answer:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _request: httpx.Response(status, content=body, headers=fields)


def answering(data: bytes) -> Callable[[trio.abc.Stream], Any]:
    async def handler(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(data)
        # Until the client goes: closing with unread bytes would reset the connection.
        await stream.receive_some()

    return handler


# --- the requests, and a success ---


async def test_request_is_the_documented_one() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=GOOD)

    async with opened(mocked(answer)) as client:
        assert await client.fetch_token() == Token(Secret("t0k3n"), "team-1")
    (request,) = seen
    assert (request.method, str(request.url)) == ("POST", "https://api.kadoa.com/v4/oauth2/token")
    assert request.headers["x-api-key"] == KEY
    assert request.headers["content-type"] == "application/json"
    assert request.read() == b""


async def test_every_request_names_the_client_and_those_with_the_key_as_the_sdks_do() -> None:
    heads: dict[bytes, list[bytes]] = {}

    async def handler(stream: trio.abc.Stream) -> None:
        while True:
            lines = (await read_head(stream)).partition(b"\r\n\r\n")[0].lower().split(b"\r\n")
            heads[lines[0].split()[1]] = lines[1:]
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD))

    async with serving(handler) as port:
        url = f"http://127.0.0.1:{port}"
        async with opened(Settings(endpoints=Endpoints(public_api=url, realtime_api=url))) as client:
            await client.fetch_token()
            await client.call("GET", "/channels")
            await client.acknowledge("e")
    client_line = f"kadoa-trio/{__version__}".encode()
    for lines in heads.values():
        assert [line for line in lines if line.startswith(b"user-agent:")] == [b"user-agent: " + client_line]
    token, call, acknowledgement = heads.values()
    for lines in (token, call):
        assert {b"x-sdk-language: python", b"x-sdk-version: " + client_line} < set(lines)
    assert not any(line.startswith((b"x-sdk", b"x-api-key")) for line in acknowledgement)


async def test_every_token_is_a_fresh_one_over_one_connection() -> None:
    heads: list[bytes] = []

    async def handler(stream: trio.abc.Stream) -> None:
        while True:
            heads.append(await read_head(stream))
            body = json.dumps({"access_token": f"t{len(heads)}", "team_id": "team-1"}).encode()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    async with serving(handler) as port, opened(plain(port)) as client:
        assert [(await client.fetch_token()).access_token.reveal() for _ in range(3)] == ["t1", "t2", "t3"]
    assert all(KEY.encode() in head for head in heads)


async def test_token_over_tls() -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
    async with serving(answering(data), tls=server_tls("127.0.0.1")) as port:
        endpoints = Endpoints(public_api=f"https://127.0.0.1:{port}")
        async with opened(Settings(endpoints=endpoints, ssl_context=trusting_tls())) as client:
            assert await client.fetch_token() == Token(Secret("t0k3n"), "team-1")
        error = await failure(Settings(endpoints=endpoints))
    assert isinstance(error, AttemptError)
    assert "certificate refused" in error.reason


def test_token_and_client_hide_their_secrets() -> None:
    assert "hush" not in repr(Token(Secret("hush"), "team-1"))
    assert KEY not in repr(
        KadoaApi(HttpClient(httpx.AsyncClient(), (Secret(KEY),), lambda: NOW), Secret(KEY), Settings())
    )


# --- the meaning of answers ---


@pytest.mark.parametrize("status", [401, 403])
async def test_401_and_403_are_an_authentication_error(status: int) -> None:
    error = await failure(mocked(saying(status, b'{"error": "no such key"}')))
    assert isinstance(error, AuthenticationError)
    assert (error.step, error.status, error.server_message) == ("token", status, "no such key")


@pytest.mark.parametrize("status", [400, 402, 404, 405, 409, 410, 418, 422, 451, 499])
async def test_every_other_4xx_is_a_refused_request(status: int) -> None:
    error = await failure(mocked(saying(status, b'{"message": "not like this"}')))
    assert isinstance(error, RequestRefusedError)
    assert (error.status, error.server_message) == (status, "not like this")


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599, 300, 301, 302, 304, 307])
async def test_every_other_status_is_an_attempt_error(status: int) -> None:
    error = await failure(mocked(saying(status, b"busy", retry_after="7")))
    assert type(error) is AttemptError
    assert (error.step, error.status, error.retry_after) == ("token", status, 7.0)
    assert error.reason == f"HTTP {status}: busy"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b"5",
        b"{}",
        b"\xff",
        b"[" * 60_000,
        b'{"access_token": "t"}',
        b'{"team_id": "t"}',
        b'{"access_token": "", "team_id": "t"}',
        b'{"access_token": "t", "team_id": ""}',
        b'{"access_token": 5, "team_id": "t"}',
        b'{"access_token": "t", "team_id": ["t"]}',
        b'{"access_token": "t", "team_id": null}',
        b'{"access_token": "\\ud800", "team_id": "t"}',
        b'{"data": {"access_token": "t", "team_id": "t"}}',
    ],
)
async def test_success_without_the_documented_json_is_a_protocol_error(body: bytes) -> None:
    error = await failure(mocked(saying(200, body)))
    assert isinstance(error, ProtocolError)
    assert (error.step, error.status) == ("token", 200)


TOKEN = "t0k3n-77aa55cc/9a"


@pytest.mark.parametrize("team_id", [KEY, f"team {KEY}", TOKEN, f"{TOKEN}-team"])
async def test_team_that_shows_the_key_or_the_token_is_refused(team_id: str) -> None:
    body = json.dumps({"access_token": TOKEN, "team_id": team_id}).encode()
    error = await failure(mocked(saying(200, body)))
    assert isinstance(error, ProtocolError)
    assert (error.step, error.status) == ("token", 200)
    assert TOKEN not in everything_said(error)


@pytest.mark.parametrize("team_id", ["team-1", KEY[:-1], TOKEN[:12], "t"])
async def test_team_that_shares_some_characters_is_accepted(team_id: str) -> None:
    body = json.dumps({"access_token": TOKEN, "team_id": team_id}).encode()
    async with opened(mocked(saying(200, body))) as client:
        assert (await client.fetch_token()).team_id == team_id


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("9" * 20, 1e20),
        ("Tue, 24 Nov 2026 12:01:30 GMT", 90.0),
        ("Tue, 24 Nov 2026 13:01:30 +0100", 90.0),
        *[
            (odd, None)
            for odd in (
                None,
                "",
                "-1",
                "1.5",
                "soon",
                "nan",
                "inf",
                "1e3",
                "\u0661",
                "Tue, 24 Nov 2026 11:59:59 GMT",
                "Tue, 99 Nov 2026 11:59:59 GMT",
                "Tue, 24 Nov 99999999999 11:59:59 GMT",
            )
        ],
    ],
)
def test_retry_after_is_seconds_from_now_or_none(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, NOW) == seconds


async def test_retry_after_date_is_measured_against_the_given_clock() -> None:
    when = (NOW + timedelta(seconds=42)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    error = await failure(mocked(saying(503, retry_after=when)))
    assert isinstance(error, AttemptError)
    assert error.retry_after == 42.0


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"error": {"message": "deep"}}', "deep"),
        (b'{"error": ["no", "words"]}', ""),
        (b'{"detail": "a\\n\\u001b[31mb\\u202ec"}', "a [31mb c"),
        (b"plain \xff words", "plain \ufffd words"),
        (b"<html>nothing that the status has not said</html>", ""),
        (b'{"message": "' + b"x" * 5_000 + b'"}', "x" * 200),
        (b'{"message": "the key ' + KEY.encode() + b' is wrong"}', "the key [secret] is wrong"),
        (b'{"message": "the key ' + KEY[:14].encode() + b'... is wrong"}', "the key [secret]... is wrong"),
    ],
)
async def test_message_of_the_server_is_made_safe(body: bytes, shown: str) -> None:
    error = await failure(mocked(saying(401, body)))
    assert isinstance(error, AuthenticationError)
    assert error.server_message == shown


def test_cutting_a_text_shows_no_part_of_a_secret() -> None:
    for padding in range(20, 60):
        assert_no_secret(presentable("x" * padding + KEY, 64, Secret(KEY)))
    assert censor("", Secret(KEY)) == ""
    assert censor("nothing to hide", Secret(KEY), Secret("")) == "nothing to hide"


# --- faults of the network ---


@pytest.mark.parametrize(
    "fault",
    [
        httpx.ConnectError(f"refused {KEY}"),
        httpx.ReadError(""),
        httpx.RemoteProtocolError(f"Illegal header value {KEY.encode()!r}"),
        httpx.LocalProtocolError(f"Illegal header value {KEY.encode()!r}"),
        httpx.ConnectTimeout("slow"),
        httpx.ProxyError(f"http://user:{KEY}@proxy"),
        httpx.DecodingError("odd"),
        httpx.UnsupportedProtocol("odd"),
        httpx.InvalidURL(f"odd {KEY}"),
        OSError(101, f"unreachable {KEY}"),
    ],
    ids=lambda fault: type(fault).__name__,
)
async def test_every_fault_of_the_library_becomes_a_scrubbed_attempt(fault: Exception) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise fault from ValueError(f"beneath: {KEY}")

    error = await failure(mocked(answer))
    assert type(error) is AttemptError
    assert error.step == "token"
    assert error.reason
    assert isinstance(error.__cause__, ForeignError)
    assert type(fault).__name__ in error.__cause__.type_name
    assert error.__context__ is None


async def test_closed_port_and_unknown_name_are_attempts() -> None:
    with stdlib_socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        error = await failure(plain(free.getsockname()[1]))
    assert type(error) is AttemptError
    assert "refused" in error.reason.lower()


async def test_reset_is_an_attempt() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        assert isinstance(stream, trio.SocketStream)
        await read_head(stream)
        stream.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with serving(handler) as port:
        error = await failure(plain(port))
    assert type(error) is AttemptError
    assert isinstance(error.__cause__, ForeignError)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
        b"SSH-2.0-OpenSSH_9.6 " + KEY.encode() + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
    ],
    ids=["closed", "cut", "no-http", "endless-head"],
)
async def test_broken_answer_is_an_attempt(data: bytes) -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(data)

    async with serving(handler) as port:
        error = await failure(plain(port))
    assert type(error) is AttemptError
    assert error.reason


# --- limits of time and size ---


@pytest.mark.parametrize("stage", ["never answers", "body never comes", "drips the head", "drips the body"])
async def test_slow_server_meets_one_deadline_for_the_whole(stage: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"

    async def handler(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        if "body" in stage:
            await stream.send_all(head)
        while "drips" in stage:
            # Faster than any time-out for one operation.
            await stream.send_all(b" " if "body" in stage else head[:1])
            await trio.sleep(0.02)
        await stream.receive_some()

    async with serving(handler) as port:
        started = trio.current_time()
        error = await failure(plain(port, timeouts=Timeouts(token=0.2)))
        assert 0.19 < trio.current_time() - started < 5
    assert type(error) is AttemptError
    assert str(error) == "token: no answer within 0.2 s"


async def test_refusal_whose_body_stalls_is_known_by_its_status() -> None:
    async with serving(answering(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 500\r\n\r\nno")) as port:
        error = await failure(plain(port, timeouts=Timeouts(token=0.2)))
    assert isinstance(error, AuthenticationError)
    assert error.server_message == "no"


async def test_endless_answer_is_read_to_the_limit_only() -> None:
    sent = 0

    async def handler(stream: trio.abc.Stream) -> None:
        nonlocal sent
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        while sent < 200 * MAX_ANSWER:
            await stream.send_all(b" " * MAX_ANSWER)
            sent += MAX_ANSWER

    async with serving(handler) as port:
        error = await failure(plain(port))
    assert isinstance(error, ProtocolError)
    # What the kernel's buffers swallowed is not ours; without a limit all of it would have gone.
    assert sent < 200 * MAX_ANSWER


async def test_answer_in_tiny_chunks_is_read_a_little_at_a_time_and_not_for_ever() -> None:
    # Chunks that arrive together are read without waiting: other tasks must run between them.
    turns = sent = 0

    async def handler(stream: trio.abc.Stream) -> None:
        nonlocal sent
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while sent < 100_000:
            await stream.send_all(b"1\r\nx\r\n" * 1_000)
            sent += 1_000

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with serving(handler) as port, trio.open_nursery() as nursery:
        nursery.start_soon(other)
        error = await failure(plain(port))
        nursery.cancel_scope.cancel()
    assert isinstance(error, ProtocolError)
    assert turns >= (_CHUNKS + MAX_ANSWER // _BYTES_A_CHUNK) // CHUNKS_AT_ONCE
    assert sent < 100_000


def test_tls_error_of_a_programs_own_code_is_described() -> None:
    assert describe(ssl.SSLError("mine")) == "TLS failed: unknown"
    assert describe(ssl.SSLCertVerificationError("mine")) == "certificate refused: no reason given"


def bomb(size: int) -> bytes:
    """Compress *size* zeros twice: a few hundred bytes."""
    data = b"\0" * size
    for _ in range(2):
        data = gzip.compress(data, 9)
    return data


class CountedBody(httpx.AsyncByteStream):
    """A body that counts how often a part of it was asked for."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.reads = 0
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.reads += 1
        yield self.content

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("encoding", ["gzip, gzip", "gzip", "DEFLATE", "br", "zstd", "identity, gzip", "x-odd", ";"])
async def test_compressed_answer_is_refused_unread(encoding: str) -> None:
    body = CountedBody(bomb(1_000_000))

    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=body, headers={"content-encoding": encoding})

    error = await failure(mocked(answer))
    assert isinstance(error, ProtocolError)
    assert f"compressed (Content-Encoding: {encoding})" in error.reason
    assert (body.reads, body.closed) == (0, True)


async def test_compressed_refusal_is_known_by_its_status() -> None:
    body = CountedBody(gzip.compress(b'{"error": "no such key"}'))

    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(401, stream=body, headers={"content-encoding": "gzip"})

    error = await failure(mocked(answer))
    assert isinstance(error, AuthenticationError)
    assert (error.status, error.server_message, body.reads) == (401, "", 0)


@pytest.mark.parametrize("encoding", ["identity", "", " Identity ,"])
async def test_uncompressed_answer_may_have_a_content_encoding(encoding: str) -> None:
    async with opened(mocked(saying(200, GOOD, content_encoding=encoding))) as client:
        assert (await client.fetch_token()).team_id == "team-1"


async def test_compressed_answer_to_an_acknowledgement_is_a_success() -> None:
    body = CountedBody(bomb(1_000_000))

    def answer(_request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=body, headers={"content-encoding": "gzip, gzip"})

    async with opened(mocked(answer)) as client:
        await client.acknowledge("e1")
    assert body.reads == 0


@pytest.mark.parametrize("status", [200, 401, 500])
async def test_decompression_bomb_takes_no_memory(status: int) -> None:
    size = 100_000_000
    data = bomb(size)
    assert len(data) < size / 10_000
    head = b"HTTP/1.1 %d X\r\nContent-Encoding: gzip, gzip\r\nContent-Length: %d\r\n\r\n" % (status, len(data))
    async with serving(answering(head + data)) as port, opened(plain(port)) as client:
        tracemalloc.start()
        try:
            with pytest.raises(KadoaError) as caught:
                await client.fetch_token()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert_clean(caught.value)
    assert peak < size / 20


async def test_redirect_is_not_followed() -> None:
    visits: list[bytes] = []

    async def elsewhere(stream: trio.abc.Stream) -> None:
        visits.append(await read_head(stream))

    async with serving(elsewhere) as other:
        location = f"http://127.0.0.1:{other}/{KEY}".encode()
        for status in (b"301 Moved", b"302 Found", b"307 Temporary Redirect", b"308 Permanent Redirect"):
            data = b"HTTP/1.1 " + status + b"\r\nLocation: " + location + b"\r\nContent-Length: 0\r\n\r\n"
            async with serving(answering(data)) as port:
                error = await failure(plain(port))
            assert type(error) is AttemptError
            assert error.status == int(status[:3])
    assert visits == []


async def test_cancelled_request_ends_at_once_and_the_client_still_works() -> None:
    waiting = trio.Event()
    gone = trio.Event()

    async def handler(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        if not waiting.is_set():
            waiting.set()
            try:
                await stream.receive_some()
            finally:
                gone.set()
        else:
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD))

    async with serving(handler) as port, opened(plain(port)) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.fetch_token)
            await waiting.wait()
            nursery.cancel_scope.cancel()
        await gone.wait()
        assert await client.fetch_token() == Token(Secret("t0k3n"), "team-1")


async def test_fetching_is_a_checkpoint() -> None:
    async with opened(mocked(saying(200, GOOD))) as client:
        with trio.testing.assert_checkpoints():
            await client.fetch_token()


async def test_cookies_of_a_server_are_not_sent_back(client_of_tokens: str) -> None:
    heads: list[bytes] = []

    async def handler(stream: trio.abc.Stream) -> None:
        while True:
            heads.append(await read_head(stream))
            cookie = b"Set-Cookie: c%d=%s; Path=/" % (len(heads), b"x" * 100)
            head = b"HTTP/1.1 200 OK\r\n%s\r\nContent-Length: %d\r\n\r\n" % (cookie, len(GOOD))
            await stream.send_all(head + GOOD)

    async with serving(handler) as port, opened(plain(port)) as client:
        for _ in range(5):
            await client.fetch_token()
        if client_of_tokens == "httpx":
            assert not list(client._http.pool().cookies.jar)
    assert len(heads) == 5
    assert not any(b"cookie:" in head.lower() for head in heads)
    assert not any(b"cookie" in head.lower() for head in heads)


async def test_request_with_a_body_sends_it_once_and_whole() -> None:
    bodies: list[bytes] = []

    async def handler(stream: trio.abc.Stream) -> None:
        head, _, body = (await read_head(stream)).partition(b"\r\n\r\n")
        assert b"content-length: 11" in head.lower()
        assert b"transfer-encoding" not in head.lower()
        while len(body) < 11:
            body += await stream.receive_some()
        bodies.append(body)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with serving(handler) as port:
        settings = Settings(endpoints=Endpoints(realtime_api=f"http://127.0.0.1:{port}"))
        async with opened(settings) as client:
            await client.acknowledge("e")
    assert bodies == [b'{"id": "e"}']


@pytest.mark.filterwarnings("always::ResourceWarning")
async def test_cancelled_request_leaves_no_generator_to_the_garbage_collector(
    autojump_clock: trio.testing.MockClock, recwarn: pytest.WarningsRecorder
) -> None:
    async def slow() -> None:
        await trio.sleep(0.1)

    async def answer(stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    servers = MemoryServers(answer, answer, before_write=slow)
    endpoints = Endpoints(realtime_api="http://127.0.0.1:1", network=servers)
    async with servers.running(), opened(Settings(endpoints=endpoints)) as client:
        for instant in range(1, 60):
            # The head is written at 0.1 s, the body at 0.2 s, the end of the body at 0.3 s.
            with trio.move_on_after(instant / 200) as scope:
                await client.acknowledge("e1")
            assert scope.cancelled_caught
    gc.collect()
    await trio.lowlevel.checkpoint()
    assert [str(one.message) for one in recwarn] == []


# --- proxies and certificates ---


async def refuse_to_be_asked(stream: trio.abc.Stream) -> None:
    raise AssertionError(await read_head(stream))


@pytest.mark.sockets
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_loopback_is_reached_directly_with_any_proxy_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, host: str
) -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
    async with serving(refuse_to_be_asked) as proxy, serving(answering(data)) as port:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy}")
        for realtime_api in (f"http://{host}:{port}", "https://realtime.kadoa.com"):
            endpoints = Endpoints(public_api=f"http://{host}:{port}", realtime_api=realtime_api)
            async with opened(Settings(endpoints=endpoints)) as client:
                assert (await client.fetch_token()).team_id == "team-1"


@pytest.mark.sockets
async def test_other_hosts_are_reached_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    async def proxy(stream: trio.abc.Stream) -> None:
        asked.append(await read_head(stream))
        await stream.send_all(b"HTTP/1.1 502 No\r\nContent-Length: 0\r\n\r\n")

    async with serving(proxy) as port:
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{port}")
        endpoints = Endpoints(public_api="https://far.example", realtime_api="http://127.0.0.1:1")
        error = await failure(Settings(endpoints=endpoints))
    assert asked[0].startswith(b"CONNECT far.example:443 ")
    assert KEY.encode() not in asked[0]
    assert isinstance(error, AttemptError)


@pytest.mark.parametrize("calls", [True, False])
async def test_proxy_that_only_httpx_needs_shows_at_once_if_httpx_is_needed(
    monkeypatch: pytest.MonkeyPatch, calls: bool, client_of_tokens: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "gopher://unusable")
    needed = calls or client_of_tokens == "httpx"
    expected = pytest.raises(ConfigurationError, match="proxy") if needed else contextlib.nullcontext()
    with expected:
        async with open_api(api_key=Secret(KEY), settings=Settings(), calls=calls):
            pass


@pytest.mark.parametrize(
    "opening",
    [
        lambda: open_forwarder("https://far.example/hook"),
        lambda: open_notifications(KEY),
        lambda: open_realtime(KEY, repair_gaps=True),
    ],
    ids=["forwarder", "notifications", "repair"],
)
async def test_unusable_proxy_is_an_error_of_opening(
    monkeypatch: pytest.MonkeyPatch, opening: Callable[[], AbstractAsyncContextManager[object]]
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "gopher://unusable")
    with pytest.raises(ConfigurationError, match="proxy"):
        async with opening():
            pytest.fail("opened")


async def test_proxy_is_not_read_if_all_endpoints_are_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://unusable")
    local = "http://[::1]:1"
    async with opened(Settings(endpoints=Endpoints(public_api=local, realtime_api=local, websocket="ws://[::1]:1"))):
        pass


@pytest.fixture
def _fresh_context() -> Iterator[None]:
    default_ssl_context.cache_clear()
    yield
    default_ssl_context.cache_clear()


@pytest.mark.usefixtures("_fresh_context")
@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
@pytest.mark.parametrize("there", [False, True])
async def test_unusable_certificates_of_the_environment_are_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, there: bool
) -> None:
    path = tmp_path / "odd\x1b[31mname"
    if there:
        path.write_text("no certificate")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setenv(variable, str(path))
    with pytest.raises(ConfigurationError, match=f"the environment variable {variable} names") as caught:
        async with open_api(api_key=Secret(KEY), settings=Settings(), wall_clock=lambda: NOW):
            pytest.fail("opened")
    assert str(caught.value).isprintable()
    assert_clean(caught.value)


# --- secrets, and clients that cannot be opened ---


async def test_key_that_the_server_repeats_is_censored_in_the_logs(
    logs: pytest.LogCaptureFixture, client_of_tokens: str
) -> None:
    data = b"HTTP/1.1 400 Bad " + KEY.encode() + b"\r\nX-Echo: " + KEY.encode() + b"\r\nContent-Length: 0\r\n\r\n"
    async with serving(answering(data)) as port:
        await failure(plain(port))
    said = "\n".join(record.getMessage() for record in logs.records)
    # The records exist, so that the search for the key means something.
    if client_of_tokens == "httpx":
        assert "X-Echo" in said
        assert "[secret]" in said
    assert_no_secret(said)


async def test_records_outside_of_our_requests_pass_untouched(logs: pytest.LogCaptureFixture) -> None:
    async with opened(mocked(saying(200, GOOD))) as client:
        await client.fetch_token()
        logging.getLogger("httpx").info("about %s", "access_token")
    assert ("about %s", ("access_token",)) in [(record.msg, record.args) for record in logs.records]


@pytest.mark.parametrize("key", ["", " ", f" {KEY}", f"{KEY}\n", f"{KEY}\r\nx: y", f"{KEY}é", f"{KEY}\x00"])
async def test_key_that_a_header_cannot_hold_is_refused_and_not_shown(key: str) -> None:
    given = Secret(key)
    del key  # the traceback shows this frame, too
    with pytest.raises(ConfigurationError) as caught:
        async with open_api(api_key=given, settings=mocked(saying(200, GOOD)), wall_clock=lambda: NOW):
            pytest.fail("opened")
    assert_clean(caught.value)


async def test_unusable_proxy_is_a_configuration_error_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", f"gopher://user:{KEY}@proxy")
    with pytest.raises(ConfigurationError) as caught:
        async with open_api(api_key=Secret(KEY), settings=Settings(), wall_clock=lambda: NOW):
            pytest.fail("opened")
    assert_clean(caught.value)


async def test_unexpected_exception_of_the_library_is_a_bug_without_its_traceback() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise LookupError(f"odd {KEY}")

    error = await failure(mocked(answer))
    assert isinstance(error, InternalError)
    assert "please report it" in str(error)


@pytest.mark.parametrize("query", ["key=a b^c d", "key=wörd", 'k="a" {b}', "key=my%20key", "key=a+b c&v=1"])
async def test_query_of_a_webhook_is_hidden_as_it_is_sent(query: str) -> None:
    url = f"http://127.0.0.1:1/hook?{query}"
    async with open_http(hosts={"127.0.0.1"}, secure=False, secrets=(secret_of_query(Secret(url)),)) as client:
        assert client.censor(f"POST {httpx.URL(url)} failed") == "POST http://127.0.0.1:1/hook?[secret] failed"
        assert client.censor(f"POST {url} failed") == "POST http://127.0.0.1:1/hook?[secret] failed"


async def test_error_in_the_block_comes_out_bare() -> None:
    with pytest.raises(ZeroDivisionError):
        async with opened(mocked(saying(200, GOOD))):
            raise ZeroDivisionError


def test_default_authorities_are_those_of_httpx(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
    own, expected = default_ssl_context.__wrapped__(), httpx.create_ssl_context()
    assert own.get_ca_certs(binary_form=True) == expected.get_ca_certs(binary_form=True)
    assert (own.verify_mode, own.check_hostname, own.options) == (
        expected.verify_mode,
        expected.check_hostname,
        expected.options,
    )
    assert own.minimum_version == expected.minimum_version


async def test_client_that_makes_no_request_by_httpx_does_not_import_it() -> None:
    script = (
        "import sys, trio\n"
        "from kadoa_trio import ConnectionFailedError, Endpoints, Timeouts, open_realtime\n"
        "async def main():\n"
        "    nowhere = 'http://127.0.0.1:9'\n"
        "    endpoints = Endpoints(public_api=nowhere, websocket='ws://127.0.0.1:9', realtime_api=nowhere)\n"
        "    try:\n"
        "        async with open_realtime('key', endpoints=endpoints, timeouts=Timeouts(connect=0.1)):\n"
        "            raise SystemExit('opened')\n"
        "    except ConnectionFailedError:\n"
        "        print('httpx' in sys.modules)\n"
        "trio.run(main)\n"
    )
    done = await finished([sys.executable, "-c", script])
    assert done.stdout.decode().strip() == "False", done.stderr.decode()
