"""Sockets against servers that misbehave.

Real loopback sockets where the system's behaviour matters, memory streams
under virtual time elsewhere. After every test: the token is in no log record
of any logger at any level.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import random
import signal
import socket as stdlib_socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import attrs
import pytest
import trio
import trio.testing
from _loopback import (
    CLOSE_1000,
    accept,
    chain,
    close_frame,
    everything_said,
    frame,
    read_head,
    server_tls,
    serving,
    trusting_tls,
    upgrade,
)

from kadoa_trio import Limits, Timeouts, __version__
from kadoa_trio._errors import AttemptError, AuthenticationError, ForeignError, KadoaError, ProtocolError
from kadoa_trio._net._socket import End, EndReason, Socket, SocketEnded, open_socket
from kadoa_trio._redact import Secret
from kadoa_trio._settings import CLOSE_TIMEOUT, Endpoints, Settings

TOKEN = "eyJ0b2tlbiI6IjEifQ.s3cr3t/t0k3n+with=odd&chars"
QUOTED = quote(TOKEN, safe="")
NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


def assert_no_secret(text: str) -> None:
    for spelling in (TOKEN, QUOTED):
        for start in range(len(spelling) - 11):
            assert spelling[start : start + 12] not in text


PATIENCE = 60.0
"""A bound for what hangs when it fails, in seconds; no claim about time."""


@pytest.fixture(autouse=True)
def logs(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(1)
    assert logging.getLogger("trio-websocket").isEnabledFor(logging.DEBUG)
    yield caplog
    for record in caplog.get_records("call"):
        assert_no_secret(record.getMessage() + repr(record.args) + repr(record.exc_info) + str(record.exc_text))


def no_bytes(_count: int) -> None:
    pass


def dial(port: int, *, secure: bool = False, path: str = "", host: str = "127.0.0.1", **options: Any) -> Any:
    url = f"{'wss' if secure else 'ws'}://{host}:{port}{path}"
    on_bytes = options.pop("on_bytes", no_bytes)
    options.setdefault("timeouts", Timeouts(handshake=PATIENCE))
    settings = Settings(endpoints=Endpoints(websocket=url), **options)
    return open_socket(url, token=Secret(TOKEN), settings=settings, on_bytes=on_bytes, wall_clock=lambda: NOW)


async def opening_fails(opening: AbstractAsyncContextManager[Socket]) -> KadoaError:
    with trio.fail_after(PATIENCE), pytest.raises(KadoaError) as caught:
        async with opening:
            pytest.fail("it opened")
    assert_no_secret(everything_said(caught.value))
    for exc in chain(caught.value):
        assert isinstance(exc, KadoaError | ForeignError)
    return caught.value


async def ends(opened: Socket) -> End:
    with trio.fail_after(PATIENCE), pytest.raises(SocketEnded) as caught:
        await opened.receive()
    assert_no_secret(everything_said(caught.value))
    assert list(chain(caught.value)) == [caught.value]
    return caught.value.end


# Opening.


async def test_request_carries_path_token_host_and_client() -> None:
    heads: list[bytes] = []

    async def handler(stream: trio.abc.Stream) -> None:
        heads.append(await accept(stream, frame(b"hello")))
        await stream.receive_some()  # the client's close frame
        await stream.send_all(CLOSE_1000)

    for path, sent in (("", b"/"), ("/", b"/"), ("/v1/ws", b"/v1/ws"), ("/a b", b"/a%20b"), ("/a%20b", b"/a%20b")):
        async with serving(handler) as port, dial(port, path=path) as opened:
            with trio.fail_after(PATIENCE):
                assert await opened.receive() == "hello"
            head = heads.pop().splitlines()
            assert head[0] == b"GET " + sent + b"?access_token=" + QUOTED.encode() + b" HTTP/1.1"
            fields = [line.lower() for line in head[1:]]
            assert fields.count(b"host: 127.0.0.1:%d" % port) == 1
            assert [line for line in fields if line.startswith(b"user-agent:")] == [
                f"user-agent: kadoa-trio/{__version__}".encode()
            ]
            assert sum(line.startswith(b"sec-websocket-key:") for line in fields) == 1


@pytest.mark.parametrize(
    ("url", "address", "host"),
    [
        ("ws://localhost", ("localhost", 80), b"localhost"),
        ("ws://localhost:80", ("localhost", 80), b"localhost"),
        ("ws://localhost:443", ("localhost", 443), b"localhost:443"),
        ("ws://[::1]", ("::1", 80), b"[::1]"),
        ("ws://[::1]:8080/x", ("::1", 8080), b"[::1]:8080"),
    ],
)
async def test_address_and_host_header(
    url: str, address: tuple[str, int], host: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    network = MemoryNetwork(speak(b""))
    async with network.running(), network.open(url):
        assert network.dialled == [address]
        [line] = [line for line in network.heads[0].splitlines() if line.lower().startswith(b"host:")]
        assert line[5:].strip() == host


async def test_refused_connection() -> None:
    with stdlib_socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        error = await opening_fails(dial(taken.getsockname()[1]))
    assert isinstance(error, AttemptError)
    assert (error.step, error.reason) == ("connect", "Connection refused")
    assert isinstance(error.__cause__, ForeignError)


async def test_name_that_does_not_resolve() -> None:
    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, *args: Any, **kwargs: Any) -> Any:
            raise stdlib_socket.gaierror(stdlib_socket.EAI_NONAME, "Name or service not known")

        async def getnameinfo(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    trio.socket.set_custom_hostname_resolver(Resolver())
    error = await opening_fails(dial(1, host="kadoa.invalid", allow_insecure=True))
    assert isinstance(error, AttemptError)
    assert (error.step, error.reason) == ("connect", "the name does not resolve: Name or service not known")


async def test_name_that_cannot_be_encoded() -> None:
    error = await opening_fails(dial(1, host="x" * 70 + ".invalid", allow_insecure=True))
    assert isinstance(error, AttemptError)
    assert error.step == "connect"


async def test_server_that_never_answers_the_upgrade() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await trio.sleep_forever()

    async with serving(handler) as port:
        error = await opening_fails(dial(port, timeouts=Timeouts(handshake=0.2)))
    assert isinstance(error, AttemptError)
    assert (error.step, error.reason, error.status) == ("handshake", "no answer within 0.2 s", None)


async def test_server_that_sends_an_endless_answer_slowly() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 101 Switching Protocols\r\n")
        while True:
            await stream.send_all(b"X: y\r\n")
            await trio.sleep(0.02)

    async with serving(handler) as port:
        error = await opening_fails(dial(port, timeouts=Timeouts(handshake=0.2)))
    assert isinstance(error, AttemptError)
    assert (error.step, error.reason) == ("handshake", "no answer within 0.2 s")


async def answered(answer: bytes, *, then_close: bool = True) -> KadoaError:
    async def handler(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(answer)
        if not then_close:
            await trio.sleep_forever()

    async with serving(handler) as port:
        return await opening_fails(dial(port, timeouts=Timeouts(handshake=0.4)))


@pytest.mark.parametrize("keep_open", [False, True])
@pytest.mark.parametrize("status", [401, 403])
async def test_refused_token(status: int, keep_open: bool) -> None:
    body = b'{"error": "token expired"}'
    answer = b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)
    error = await answered(answer, then_close=not keep_open)
    assert isinstance(error, AuthenticationError)
    assert (error.step, error.status, error.server_message) == ("handshake", status, "token expired")


@pytest.mark.parametrize("echoed", [TOKEN, QUOTED, TOKEN[:20], TOKEN[10:]])
async def test_token_that_a_refusal_repeats_is_not_shown(echoed: str) -> None:
    body = f"bad token {echoed} refused".encode()
    error = await answered(b"HTTP/1.1 401 No\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    assert isinstance(error, AuthenticationError)
    assert error.server_message == "bad token [secret] refused"


@pytest.mark.parametrize(
    ("status", "retry_after", "seconds"),
    [
        (429, b"Retry-After: 7\r\n", 7.0),
        (503, b"retry-after: Tue, 24 Nov 2026 12:01:30 GMT\r\n", 90.0),
        (503, b"Retry-After: soon\r\n", None),
        (500, b"", None),
        (404, b"", None),
        (302, b"Location: https://elsewhere.invalid/\r\n", None),
    ],
)
async def test_refusal_that_may_pass_is_an_attempt_error(
    status: int, retry_after: bytes, seconds: float | None
) -> None:
    error = await answered(b"HTTP/1.1 %d X\r\n%sContent-Length: 0\r\n\r\n" % (status, retry_after))
    assert type(error) is AttemptError
    assert (error.step, error.status, error.retry_after) == ("handshake", status, seconds)
    assert error.reason == f"HTTP {status}"


async def test_refusal_without_content_length_keeps_its_status() -> None:
    error = await answered(b"HTTP/1.1 503 Busy\r\nRetry-After: 3\r\n\r\nback soon")
    assert isinstance(error, AttemptError)
    assert (error.status, error.retry_after, error.reason) == (503, 3.0, "HTTP 503: back soon")


async def test_refusal_whose_body_stalls_keeps_its_status() -> None:
    error = await answered(b"HTTP/1.1 403 No\r\nContent-Length: 1000\r\n\r\nnot yours", then_close=False)
    assert isinstance(error, AuthenticationError)
    assert (error.status, error.server_message) == (403, "not yours")


async def test_compressed_refusal_is_known_by_its_status() -> None:
    body = gzip.compress(b'{"error": "token expired"}')
    error = await answered(
        b"HTTP/1.1 401 No\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    assert isinstance(error, AuthenticationError)
    assert (error.status, error.server_message) == (401, "")


async def test_refusal_without_end_is_read_to_the_limit_only(autojump_clock: trio.testing.MockClock) -> None:
    sent = 0

    async def server(stream: trio.abc.Stream) -> None:
        nonlocal sent
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 503 Busy\r\nRetry-After: 3\r\n\r\nback soon")
        # Bounded by the client only: it does not take another step before it has read what is there.
        while True:
            await stream.send_all(b" " * 10_000)
            sent += 10_000
            await trio.testing.wait_all_tasks_blocked()

    network = MemoryNetwork(server)
    async with network.running():
        error = await opening_fails(network.open(timeouts=Timeouts(handshake=30)))
    assert isinstance(error, AttemptError)
    assert (error.status, error.retry_after, error.reason) == (503, 3.0, "HTTP 503: back soon")
    assert sent < 200_000
    network.assert_closed()


async def test_compression_that_was_not_offered_is_no_handshake() -> None:
    # With it a message of a few kilobytes could grow into gigabytes.
    async def handler(stream: trio.abc.Stream) -> None:
        answer = upgrade(await read_head(stream)).removesuffix(b"\r\n")
        await stream.send_all(answer + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n")
        await trio.sleep_forever()

    async with serving(handler) as port:
        error = await opening_fails(dial(port))
    assert isinstance(error, ProtocolError)
    assert error.step == "handshake"


async def test_compressed_frame_ends_the_socket() -> None:
    end = await ended_by(bytes([0x81 | 0x40, 3]) + b"abc")
    assert (end.reason, end.code) == (EndReason.PROTOCOL, 1002)


async def test_stalled_refusal_ends_before_the_timeout(autojump_clock: trio.testing.MockClock) -> None:
    async def server(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 503 Busy\r\nContent-Length: 1000\r\n\r\nX")
        await trio.sleep_forever()

    network = MemoryNetwork(server)
    began = trio.current_time()
    async with network.running():
        error = await opening_fails(network.open(timeouts=Timeouts(handshake=30)))
    assert isinstance(error, AttemptError)
    assert error.status == 503
    assert trio.current_time() - began == pytest.approx(1.0)
    network.assert_closed()


@pytest.mark.parametrize("keep_open", [False, True])
@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (b"220 mail.example.com ESMTP\r\n", None, "the server does not speak HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x46\r\n", None, "the server does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK", 200, "HTTP 200: OK"),
        (
            (
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: AAAA\r\n\r\n"
            ),
            101,
            "the server's upgrade is not a WebSocket handshake",
        ),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 101, "the server's upgrade is not a WebSocket handshake"),
    ],
)
async def test_answer_that_is_no_websocket_handshake(
    answer: bytes, status: int | None, reason: str, keep_open: bool
) -> None:
    error = await answered(answer, then_close=not keep_open)
    assert isinstance(error, ProtocolError)
    assert (error.step, error.status, error.reason) == ("handshake", status, reason)


async def test_server_that_echoes_the_request(logs: pytest.LogCaptureFixture) -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await stream.send_all(await read_head(stream))
        await trio.sleep_forever()

    async with serving(handler) as port:
        error = await opening_fails(dial(port))
    assert isinstance(error, ProtocolError)
    # The library has logged it; the fixture searches for the token.
    assert "remote protocol error" in logs.text


async def test_server_that_closes_during_the_handshake() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await read_head(stream)

    async with serving(handler) as port:
        error = await opening_fails(dial(port))
    assert isinstance(error, AttemptError)
    assert error.reason == "the server closed the connection without an answer"


async def test_server_that_resets_during_the_handshake() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        reset(stream)

    async with serving(handler) as port:
        error = await opening_fails(dial(port))
    assert isinstance(error, AttemptError)
    assert (error.step, error.reason) == ("handshake", "Connection reset by peer")


def reset(stream: trio.abc.Stream) -> None:
    assert isinstance(stream, trio.SocketStream)
    stream.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


# TLS.


async def test_tls_with_a_trusted_certificate() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await accept(stream, frame(b"hello") + close_frame(1001, "Server shutting down"))
        await stream.receive_some()

    for host in ("127.0.0.1", "localhost"):
        async with (
            serving(handler, tls=server_tls(host)) as port,
            dial(
                port, secure=True, host=host, ssl_context=trusting_tls(), timeouts=Timeouts(handshake=PATIENCE)
            ) as opened,
        ):
            with trio.fail_after(PATIENCE):
                assert await opened.receive() == "hello"
            assert await ends(opened) == End(EndReason.CLOSED, 1001, "Server shutting down")


async def test_tls_with_an_unknown_authority_is_named() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    async with serving(handler, tls=server_tls("127.0.0.1")) as port:
        # Without a context of the caller's: the default one, too, refuses it.
        error = await opening_fails(dial(port, secure=True, timeouts=Timeouts(handshake=PATIENCE)))
    assert isinstance(error, AttemptError)
    assert error.step == "tls"
    assert error.reason.startswith("certificate refused: ")
    assert "certificate" in str(error.__cause__.__cause__)  # type: ignore[union-attr]


async def test_tls_with_a_certificate_for_another_host_is_named() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    async with serving(handler, tls=server_tls("elsewhere.invalid")) as port:
        error = await opening_fails(
            dial(port, secure=True, host="localhost", ssl_context=trusting_tls(), timeouts=Timeouts(handshake=PATIENCE))
        )
    assert isinstance(error, AttemptError)
    assert error.step == "tls"
    assert "localhost" in error.reason


async def test_tls_to_a_plain_server() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(handler) as port:
        error = await opening_fails(dial(port, secure=True, timeouts=Timeouts(handshake=PATIENCE)))
    assert isinstance(error, AttemptError)
    assert (error.step, error.reason) == ("tls", "TLS failed: wrong version number")


@pytest.mark.parametrize("hang", [False, True])
async def test_tls_handshake_that_does_not_end(hang: bool) -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        if hang:
            await trio.sleep_forever()

    async with serving(handler) as port:
        error = await opening_fails(
            dial(port, secure=True, ssl_context=trusting_tls(), timeouts=Timeouts(handshake=0.2))
        )
    assert isinstance(error, AttemptError)
    assert error.step == "tls"
    assert (error.reason == "no answer within 0.2 s") is hang


async def test_tls_stream_that_ends_without_close_notification() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await accept(stream)
        assert isinstance(stream, trio.SSLStream)
        await trio.aclose_forcefully(stream.transport_stream)

    async with (
        serving(handler, tls=server_tls("127.0.0.1")) as port,
        dial(port, secure=True, ssl_context=trusting_tls(), timeouts=Timeouts(handshake=PATIENCE)) as opened,
    ):
        assert (await ends(opened)).reason is EndReason.LOST


# Ends.


async def ended_by(sent: bytes, *, then: Handler | None = None, **options: Any) -> End:
    """Open a socket to a server that sends *sent*, and leaves TCP open; leaving must be quick."""

    async def handler(stream: trio.abc.Stream) -> None:
        await accept(stream, sent)
        if then is None:
            await trio.sleep_forever()
        else:
            await then(stream)

    async with serving(handler) as port:
        with trio.fail_after(PATIENCE):
            async with dial(port, **options) as opened:
                end = await ends(opened)
                assert await ends(opened) == end
                left = trio.current_time()
        assert trio.current_time() - left < CLOSE_TIMEOUT / 2
        return end


Handler = Callable[[trio.abc.Stream], Awaitable[object]]


@pytest.mark.parametrize(
    ("sent", "end"),
    [
        (CLOSE_1000, End(EndReason.CLOSED, 1000)),
        (frame(b"", opcode=8), End(EndReason.CLOSED, 1005)),
        (close_frame(1001, "Server shutting down"), End(EndReason.CLOSED, 1001, "Server shutting down")),
        (close_frame(4001, "a\x00b\n\x1b[31mc"), End(EndReason.CLOSED, 4001, "a b [31mc")),
        (close_frame(1009, "too large for me"), End(EndReason.CLOSED, 1009, "too large for me")),
        (close_frame(1002, "you broke it"), End(EndReason.CLOSED, 1002, "you broke it")),
        (close_frame(4001, f"bad token {TOKEN[:40]}"), End(EndReason.CLOSED, 4001, "bad token [secret]")),
    ],
)
async def test_close_frame_from_a_server_that_leaves_tcp_open(sent: bytes, end: End) -> None:
    assert await ended_by(sent) == end


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"\xff\xff\xff", 1002),  # reserved bits
        (frame(b"x", opcode=3), 1002),  # reserved opcode
        (frame(b"x", opcode=0), 1002),  # continuation of nothing
        (frame(b"\xff\xfe"), 1007),  # text that is not UTF-8
        (close_frame(1006), 1002),  # a code that must not be sent
        (close_frame(999), 1002),
        (frame(b"x", opcode=8), 1002),  # half a code
        (b"\x81\x81\0\0\0\0x", 1002),  # masked by the server
        (frame(b"x" * 126, opcode=9), 1002),  # a ping too long
    ],
)
async def test_frame_that_breaks_the_protocol(sent: bytes, code: int) -> None:
    end = await ended_by(sent)
    assert (end.reason, end.code) == (EndReason.PROTOCOL, code)
    assert end.detail


@pytest.mark.parametrize("more", [b"", frame(b"y" * 2000), frame(b"y" * 2000) * 5, CLOSE_1000, frame(b"", opcode=9)])
async def test_message_that_is_too_large(more: bytes) -> None:
    end = await ended_by(frame(b"x" * 1001) + more, limits=Limits(message_size=1000))
    assert end == End(EndReason.TOO_LARGE, 1009, "Exceeded maximum message size: 1000 bytes")


async def test_message_in_fragments_that_is_too_large() -> None:
    first, second = frame(b"x" * 600, final=False), frame(b"x" * 600, opcode=0)
    assert (await ended_by(first + second, limits=Limits(message_size=1000))).reason is EndReason.TOO_LARGE


async def test_messages_before_one_that_is_too_large_are_received() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await accept(stream, b"".join(frame(b"%d" % n) for n in range(5)) + frame(b"x" * 1001))
        await trio.sleep_forever()

    async with serving(handler) as port, dial(port, limits=Limits(message_size=1000)) as opened:
        await trio.sleep(0.05)  # so that the reader gets as far as it can; real time, as the bytes are
        for n in range(5):
            assert await opened.receive() == str(n)
        assert (await ends(opened)).reason is EndReason.TOO_LARGE


async def test_messages_before_a_close_frame_are_received() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await accept(stream, b"".join(frame(b"%d" % n) for n in range(5)) + CLOSE_1000)

    async with serving(handler) as port, dial(port) as opened:
        await trio.sleep(0.05)
        for n in range(5):
            assert await opened.receive() == str(n)
        assert (await ends(opened)).reason is EndReason.CLOSED


async def test_end_of_stream_without_a_close_frame() -> None:
    async def close(stream: trio.abc.Stream) -> None:
        await stream.aclose()

    end = await ended_by(b"", then=close)
    assert end == End(EndReason.LOST, 1006, "end of stream without a close frame")


async def test_reset() -> None:
    async def close(stream: trio.abc.Stream) -> None:
        reset(stream)

    end = await ended_by(b"", then=close)
    assert end == End(EndReason.LOST, 1006, "Connection reset by peer")


async def test_end_in_the_middle_of_a_message() -> None:
    async def close(stream: trio.abc.Stream) -> None:
        await stream.aclose()

    assert (await ended_by(frame(b"x" * 1000)[:500], then=close)).reason is EndReason.LOST


async def test_send_after_the_end_raises_how_it_ended() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await accept(stream, close_frame(1001, "bye"))
        await trio.sleep_forever()

    async with serving(handler) as port, dial(port) as opened:
        end = await ends(opened)
        with pytest.raises(SocketEnded) as caught:
            await opened.send("x")
        assert caught.value.end == end
        assert list(chain(caught.value)) == [caught.value]


async def test_send_reaches_the_server() -> None:
    got: list[bytes | bytearray] = []

    async def handler(stream: trio.abc.Stream) -> None:
        await accept(stream)
        data = bytearray()
        while len(data) < 6 + 5:
            data += await stream.receive_some()
        got.append(bytes(b ^ data[2 + n % 4] for n, b in enumerate(data[6:])))
        await stream.send_all(CLOSE_1000)

    async with serving(handler) as port, dial(port) as opened:
        await opened.send("hello")
        await ends(opened)
    assert got == [b"hello"]


# Traffic.


async def test_large_message_shows_its_bytes_while_it_arrives() -> None:
    body = b"x" * 5_000_000
    counts: list[int] = []

    async def handler(stream: trio.abc.Stream) -> None:
        await accept(stream, frame(body))
        await trio.sleep_forever()

    async with serving(handler) as port, dial(port, on_bytes=counts.append) as opened:
        with trio.fail_after(PATIENCE):
            assert await opened.receive() == body.decode()
    assert len(counts) > 5
    assert sum(counts) == len(body)


async def test_ping_is_answered() -> None:
    pongs: list[int] = []

    async def handler(stream: trio.abc.Stream) -> None:
        await accept(stream, frame(b"are you there", opcode=9))
        pongs.append((await stream.receive_some())[0])
        await stream.send_all(CLOSE_1000)

    async with serving(handler) as port, dial(port) as opened:
        await ends(opened)
    assert pongs == [0x8A]


async def test_binary_message() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await accept(stream, frame(b"\x00\xff", opcode=2))
        await trio.sleep_forever()

    async with serving(handler) as port, dial(port) as opened:
        message = await opened.receive()
        assert isinstance(message, bytes | bytearray)
        assert message == b"\x00\xff"


async def test_cancelled_receive_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async def server(stream: trio.abc.Stream) -> None:
        await accept(stream)
        for n in range(200):
            await stream.send_all(frame(b"%d" % n))
            await trio.lowlevel.checkpoint()
        await stream.send_all(CLOSE_1000)

    network = MemoryNetwork(server)
    received: list[str | bytes] = []
    cancelled = rounds = 0
    async with network.running(), network.open() as opened:
        ended = False
        while not ended:
            try:
                # Cancelled after 0, 1, 2, ... steps of the others.
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(cancel_after, scope, rounds % 7)
                        received.append(await opened.receive())
                        nursery.cancel_scope.cancel()
            except* SocketEnded:
                ended = True
            cancelled += scope.cancelled_caught
            rounds += 1
    assert received == [str(n) for n in range(200)]
    assert cancelled


async def cancel_after(scope: trio.CancelScope, steps: int) -> None:
    for _ in range(steps):
        await trio.lowlevel.checkpoint()
    scope.cancel()


# Leaving.


@attrs.define(eq=False)
class TrackedStream(trio.abc.HalfCloseableStream):
    """A memory stream that knows whether it was closed."""

    inner: Any
    received: Callable[[bytes | bytearray], bytes | bytearray] = lambda data: data
    open: bool = True

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data: bytes | bytearray = await self.inner.receive_some(max_bytes)
        return self.received(data)

    async def send_eof(self) -> None:
        await self.inner.send_eof()

    async def aclose(self) -> None:
        self.open = False
        await self.inner.aclose()


class MemoryNetwork:
    """Endpoints that stay in memory: each stream that is opened has a server of its own."""

    http_transport = None
    settlement_observer = None

    def __init__(
        self, server: Handler, received: Callable[[bytes | bytearray], bytes | bytearray] = lambda data: data
    ) -> None:
        self.server = server
        self.received = received
        self.dialled: list[tuple[str, int]] = []
        self.heads: list[bytes] = []
        self.streams: list[TrackedStream] = []
        self.nursery: trio.Nursery | None = None

    async def open_stream(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        self.dialled.append((host, port))
        await trio.lowlevel.checkpoint()
        client, server = trio.testing.memory_stream_pair()
        self.streams.append(TrackedStream(client, self.received))
        assert self.nursery is not None
        self.nursery.start_soon(self._serve, server)
        return self.streams[-1]

    async def _serve(self, stream: trio.abc.Stream) -> None:
        network = self

        class Remembering(TrackedStream):
            async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
                data = await super().receive_some(max_bytes)
                if not network.heads:
                    network.heads.append(bytes(data))
                return data

        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self.server(Remembering(stream))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as self.nursery:
            yield
            self.nursery.cancel_scope.cancel()

    def open(
        self, url: str = "ws://localhost", on_bytes: Callable[[int], None] = no_bytes, **options: Any
    ) -> AbstractAsyncContextManager[Socket]:
        settings = Settings(endpoints=Endpoints(websocket=url, network=self), **options)
        return open_socket(url, token=Secret(TOKEN), settings=settings, on_bytes=on_bytes, wall_clock=lambda: NOW)

    def assert_closed(self) -> None:
        assert [stream.open for stream in self.streams] == [False] * len(self.streams)


def speak(*sent: bytes) -> Handler:
    """Make a server that accepts, sends *sent*, and then neither answers nor closes."""

    async def server(stream: trio.abc.Stream) -> None:
        await accept(stream)
        for data in sent:
            await stream.send_all(data)
        await trio.sleep_forever()

    return server


async def answering(stream: trio.abc.Stream) -> None:
    """Accept, say hello, and answer the close frame."""
    await accept(stream, frame(b"hello"))
    while data := await stream.receive_some():
        if data[0] == 0x88:
            await stream.send_all(CLOSE_1000)
            return


async def test_leaving_makes_the_closing_handshake(autojump_clock: trio.testing.MockClock) -> None:
    network = MemoryNetwork(answering)
    async with network.running():
        async with network.open() as opened:
            assert await opened.receive() == "hello"
        assert trio.current_time() == 0
        network.assert_closed()


async def test_leaving_a_silent_server_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    network = MemoryNetwork(speak())
    async with network.running():
        async with network.open():
            began = trio.current_time()
        assert trio.current_time() - began == pytest.approx(CLOSE_TIMEOUT)
        network.assert_closed()


async def test_leaving_while_unread_messages_arrive(autojump_clock: trio.testing.MockClock) -> None:
    async def server(stream: trio.abc.Stream) -> None:
        await accept(stream)
        while True:
            await stream.send_all(frame(b"x" * 100_000))
            await trio.sleep(0.01)

    network = MemoryNetwork(server)
    async with network.running():
        async with network.open():
            await trio.sleep(1)
            began = trio.current_time()
        assert trio.current_time() - began == pytest.approx(CLOSE_TIMEOUT)
        network.assert_closed()


@pytest.mark.parametrize("sent", [frame(b"p", opcode=9), frame(b"p", opcode=9) * 3 + CLOSE_1000, b"\xff\xff"])
async def test_ping_or_rubbish_while_closing(sent: bytes, autojump_clock: trio.testing.MockClock) -> None:
    async def server(stream: trio.abc.Stream) -> None:
        await accept(stream)
        await stream.receive_some()
        await stream.send_all(sent)
        await trio.sleep_forever()

    network = MemoryNetwork(server)
    async with network.running():
        async with network.open():
            began = trio.current_time()
        assert trio.current_time() - began <= CLOSE_TIMEOUT
        network.assert_closed()


async def test_leaving_when_the_server_reads_nothing() -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await accept(stream)
        await trio.sleep_forever()

    async with serving(handler) as port:
        with trio.fail_after(PATIENCE):
            async with dial(port) as opened:
                with trio.move_on_after(0.1) as scope:
                    await opened.send("x" * 30_000_000)
                assert scope.cancelled_caught


async def test_use_of_a_socket_that_we_closed_is_a_closed_resource_error(
    autojump_clock: trio.testing.MockClock,
) -> None:
    network = MemoryNetwork(answering)
    async with network.running(), network.open() as opened:
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                assert await opened.receive() == "hello"
                with pytest.raises(trio.ClosedResourceError):
                    await opened.receive()

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            await opened.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await opened.receive()
        with pytest.raises(trio.ClosedResourceError):
            await opened.send("x")
        await opened.aclose()
        network.assert_closed()


# What comes out.


async def test_exception_of_the_body_comes_out_as_it_is(autojump_clock: trio.testing.MockClock) -> None:
    network = MemoryNetwork(speak())
    for error in (ValueError("mine"), ExceptionGroup("mine", [ValueError("a"), KeyError("b")])):
        async with network.running():
            with pytest.raises(type(error)) as caught:
                async with network.open():
                    raise error
            assert caught.value is error
            assert error.__context__ is None
            assert error.__cause__ is None
            network.assert_closed()


async def test_context_of_the_bodys_exception_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    network = MemoryNetwork(speak())
    async with network.running():
        with pytest.raises(ValueError, match="second") as caught:
            async with network.open():
                try:
                    raise KeyError("first")
                except KeyError:
                    raise ValueError("second")  # noqa: B904  (the context is the point)
        assert isinstance(caught.value.__context__, KeyError)


async def test_exception_of_the_body_survives_an_outer_cancellation(autojump_clock: trio.testing.MockClock) -> None:
    network = MemoryNetwork(speak())
    async with network.running():
        with trio.CancelScope() as scope, pytest.raises(ValueError, match="mine"):
            async with network.open():
                scope.cancel()
                raise ValueError("mine")
        network.assert_closed()


async def test_outer_cancellation_stays_one(autojump_clock: trio.testing.MockClock) -> None:
    network = MemoryNetwork(speak())
    async with network.running():
        with trio.move_on_after(5) as scope:
            async with network.open() as opened:
                await opened.receive()
        assert scope.cancelled_caught
        # By force, because the reader is cancelled with its caller, so that no task could read the answer to a close frame.
        assert trio.current_time() <= 5 + CLOSE_TIMEOUT
        network.assert_closed()


async def test_deadline_of_the_caller_is_a_cancellation_and_not_a_time_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def server(stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    network = MemoryNetwork(server)
    async with network.running():
        for seconds in (3, 10):  # the second one at the very moment of ours
            with trio.move_on_after(seconds) as scope:
                with suppress(AttemptError):
                    async with network.open(timeouts=Timeouts(handshake=10)):
                        pytest.fail("it opened")
                assert seconds == 10
            assert scope.cancelled_caught or seconds == 10
        network.assert_closed()


@pytest.mark.filterwarnings("ignore:trio.run.*strict_exception_groups=False:trio.TrioDeprecationWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_keyboard_interrupt_wins(strict: bool) -> None:
    async def main(body_raises: bool) -> None:
        network = MemoryNetwork(speak(frame(b"x", final=False)))

        def interrupt(_count: int) -> None:
            # In the reader's task, after the handshake.
            raise KeyboardInterrupt

        async with network.running():
            with pytest.raises(KeyboardInterrupt) as caught:
                async with network.open(on_bytes=interrupt):
                    try:
                        await trio.sleep_forever()
                    finally:
                        if body_raises:
                            raise ValueError("mine")
            network.assert_closed()
            if body_raises:
                assert any(isinstance(exc, ValueError) for exc in chain(caught.value))

    for body_raises in (False, True):
        trio.run(main, body_raises, strict_exception_groups=strict, clock=trio.testing.MockClock(autojump_threshold=0))


def test_ctrl_c_while_the_main_task_closes_the_socket_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    close = TrackedStream.aclose

    @trio.lowlevel.enable_ki_protection
    async def interrupted(self: TrackedStream) -> None:
        if self.open:
            signal.raise_signal(signal.SIGINT)
        await close(self)

    async def main() -> None:
        network = MemoryNetwork(speak(b""))
        async with network.running():
            with pytest.raises(KeyboardInterrupt):
                async with network.open():
                    monkeypatch.setattr(TrackedStream, "aclose", interrupted)

    try:
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        signal.signal(signal.SIGINT, before)


async def test_keyboard_interrupt_of_the_body(autojump_clock: trio.testing.MockClock) -> None:
    network = MemoryNetwork(speak())
    async with network.running():
        with pytest.raises(KeyboardInterrupt):
            async with network.open():
                raise KeyboardInterrupt
        network.assert_closed()


async def test_reader_that_fails_ends_the_socket_only(autojump_clock: trio.testing.MockClock) -> None:
    class Failing(TrackedStream):
        async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
            data, self.later = self.later or await super().receive_some(max_bytes), b""
            if data.startswith(frame(b"boom")):
                raise self.error
            before, boom, after = data.partition(frame(b"boom"))
            self.later = boom + after
            return before

        error: Exception = RuntimeError()
        later: bytes | bytearray = b""

    for error, kind in (
        (ConnectionResetError(104, "reset"), EndReason.LOST),
        (RuntimeError("odd"), EndReason.PROTOCOL),
    ):
        network = MemoryNetwork(speak(frame(b"first"), frame(b"boom")))
        open_stream = network.open_stream

        async def failing(host: str, port: int, open_stream: Any = open_stream, error: Exception = error) -> Any:
            stream = Failing(await open_stream(host, port))
            stream.error = error
            return stream

        network.open_stream = failing  # type: ignore[method-assign]
        async with network.running():
            async with network.open() as opened:
                assert await opened.receive() == "first"
                end = await ends(opened)
                assert (end.reason, end.code) == (kind, None)
                assert end.detail in ("Connection reset by peer", "odd")
            network.assert_closed()


# Every await point, cancelled.


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope after the *n*-th step that the tasks of the client have taken together."""

    def __init__(self, scope: trio.CancelScope, n: int) -> None:
        self.scope, self.n, self.steps = scope, n, 0
        self.tasks: set[trio.lowlevel.Task] = {trio.lowlevel.current_task()}

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        if task.name == "kadoa_trio socket reader":
            self.tasks.add(task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task in self.tasks:
            self.steps += 1
            if self.steps == self.n:
                self.scope.cancel()


@pytest.mark.parametrize("server", [answering, speak(frame(b"hello"))], ids=["polite", "silent"])
@pytest.mark.parametrize("body_raises", [False, True])
def test_every_await_point_cancelled(server: Handler, body_raises: bool) -> None:
    async def once(n: int) -> bool:
        network = MemoryNetwork(server)
        raised = completed = False
        async with network.running():
            await trio.testing.wait_all_tasks_blocked()
            with trio.CancelScope() as scope:
                instrument = CancelAtStep(scope, n)
                trio.lowlevel.add_instrument(instrument)
                began = trio.current_time()
                try:
                    async with network.open() as opened:
                        await opened.send("subscribe")
                        assert await opened.receive() == "hello"
                        if body_raises:
                            raised = True
                            raise ValueError("mine")
                    completed = True
                except ValueError:
                    assert raised
                    completed = True
                finally:
                    trio.lowlevel.remove_instrument(instrument)
                    # Once raised, the user's exception is never replaced: not by a Cancelled, not by anything.
                    assert not raised or isinstance(sys.exception() or ValueError(), ValueError)
                    assert raised == completed or not body_raises
                    assert trio.current_time() - began <= CLOSE_TIMEOUT
                    network.assert_closed()
                    for task in instrument.tasks - {trio.lowlevel.current_task()}:
                        assert task.parent_nursery is None or task not in task.parent_nursery.child_tasks
            assert completed or scope.cancelled_caught
            return instrument.steps < n

    n = 1
    while not trio.run(once, n, clock=trio.testing.MockClock(autojump_threshold=0)):
        n += 1
        assert n < 1000
    assert n > 15


# Whole messages come past the library, fragmented ones from it.


@pytest.mark.parametrize("seed", range(20))
async def test_order_is_kept_between_whole_and_fragmented_messages(seed: int, autojump_clock: Any) -> None:
    rng = random.Random(seed)
    texts = [f"{number}{'x' * rng.choice([0, 200, 70_000])}" for number in range(60)]
    data = bytearray()
    for text in texts:
        if rng.random() < 0.5:
            data += frame(text.encode())
        else:
            place = rng.randrange(len(text))
            data += frame(text[:place].encode(), final=False)
            data += frame(b"?", opcode=9) if rng.random() < 0.3 else b""
            data += frame(text[place:].encode(), opcode=0)
    places = sorted(rng.randrange(len(data)) for _ in range(rng.randrange(30)))
    pieces = [bytes(data[start:end]) for start, end in itertools.pairwise([0, *places, len(data)])]
    network = MemoryNetwork(speak(*pieces, CLOSE_1000))
    received: list[str | bytes] = []
    busy = False

    async def handle(messages: list[str | bytes]) -> None:
        nonlocal busy
        assert not busy
        busy = True
        received.extend(messages)
        await trio.sleep(rng.choice([0, 0.01]))
        busy = False

    async with network.running(), network.open() as opened:
        with trio.fail_after(PATIENCE):
            end = await opened.read(handle)
    assert received == texts
    assert end == End(EndReason.CLOSED, 1000)


async def test_nothing_is_handled_after_stop(autojump_clock: Any) -> None:
    network = MemoryNetwork(speak(frame(b"a"), frame(b"b"), frame(b"c", final=False) + frame(b"d", opcode=0)))
    received: list[str | bytes] = []

    async with network.running(), network.open() as opened:

        async def handle(messages: list[str | bytes]) -> None:
            received.extend(messages)
            opened.stop()
            await trio.sleep(1)

        with trio.move_on_after(5):
            await opened.read(handle)
    assert received == ["a"]
    network.assert_closed()


async def test_large_message_is_refused_when_its_header_has_come(autojump_clock: Any) -> None:
    sent: list[bytes] = []

    async def server(stream: trio.abc.Stream) -> None:
        await accept(stream, frame(b"small") + frame(b"x" * 1_001)[:4])
        async for data in stream:
            sent.append(bytes(data))

    network = MemoryNetwork(server)
    async with network.running(), network.open(limits=Limits(message_size=1_000)) as opened:
        with trio.fail_after(PATIENCE):
            assert await opened.receive() == "small"
        end = await ends(opened)
    assert (end.reason, end.code) == (EndReason.TOO_LARGE, 1009)
    network.assert_closed()
    # The close frame is the first and the only one that the client sends.
    (close,) = [data for data in [b"".join(sent)] if data]
    mask = close[2:6]
    payload = bytes(byte ^ mask[place % 4] for place, byte in enumerate(close[6:]))
    assert payload[:2] == struct.pack("!H", 1009)
