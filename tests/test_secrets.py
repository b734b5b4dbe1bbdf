"""No fault of any server or proxy gets a secret out of the client.

Each fault is met by a whole client, with servers that repeat what they were
sent. Then everything that a program can see is searched: the exception and
its chain, a traceback of each with the local variables of all frames, the
notices, the state, and every log record of any logger at any level.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trio
from _loopback import accept, close_frame, everything_said, frame, read_head, rendered, serving
from _memory import MemoryServers
from conftest import Leaks

from kadoa_trio import (
    AuthenticationError,
    ConfigurationError,
    ConnectionFailedError,
    DeadLetterError,
    Endpoints,
    FailedForward,
    KadoaError,
    Limits,
    MessageTooLargeError,
    RequestRefusedError,
    RetryPolicy,
    Timeouts,
    open_forwarder,
    open_realtime,
)
from kadoa_trio._net._wire import decode
from kadoa_trio.workspace import diagnose, open_notifications

KEY = "tk-0f8b1c2d-s3cr3t/k3y+for=tests"
TOKEN = "eyJ0b2tlbiI6IjEifQ.s3cr3t/t0k3n+with=odd&chars"
PASSWORD = "pr0xy-pass/word-of-nobody"
WORD = "wörd with spaces & more"
GOOD = json.dumps({"access_token": TOKEN, "team_id": "team-1"}).encode()
LOCAL = {"public_api": "http://127.0.0.1:1", "realtime_api": "http://127.0.0.1:1", "websocket": "ws://127.0.0.1:1"}

Handler = Callable[[trio.abc.Stream], Awaitable[object]]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(autouse=True)
def _guarded(leaks: Leaks) -> Iterator[None]:
    leaks.guard(KEY, TOKEN, quote(TOKEN, safe=""))
    yield
    assert logging.getLogger("httpx").isEnabledFor(logging.DEBUG)


# --- servers that repeat what they were sent ---


def says(status: bytes, body: bytes, *headers: bytes) -> Handler:
    """Answer every request alike."""

    async def answer(stream: trio.abc.Stream) -> None:
        while True:
            await read_head(stream)
            lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers]
            await stream.send_all(b"\r\n".join(lines) + b"\r\n\r\n" + body)

    return answer


async def resets(stream: trio.abc.Stream) -> None:
    await read_head(stream)


async def echoes(stream: trio.abc.Stream) -> None:
    await stream.send_all(await read_head(stream))
    await trio.sleep_forever()


async def hangs(stream: trio.abc.Stream) -> None:
    await trio.sleep_forever()


async def refuses(stream: trio.abc.Stream) -> None:
    raise trio.BrokenResourceError


async def cuts(stream: trio.abc.Stream) -> None:
    """Answer with a part of what is announced."""
    await read_head(stream)
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + GOOD)


def sends(*frames: bytes) -> Handler:
    """Accept the WebSocket, send frames, and answer nothing more."""

    async def websocket(stream: trio.abc.Stream) -> None:
        await accept(stream, b"".join(frames))
        await trio.sleep_forever()

    return websocket


good_token = says(b"200 OK", GOOD)
LIVE = frame(b'{"type":"heartbeat"}')
KEY_ECHO = json.dumps({"error": f"the key {KEY} is refused"}).encode()
ECHO = json.dumps({"error": f"the tokens {TOKEN} and {quote(TOKEN, safe='')} of {KEY} are refused"}).encode()

FAULTS: dict[str, tuple[Handler, Handler, type[KadoaError]]] = {
    "token 401": (says(b"401 " + KEY.encode(), KEY_ECHO, b"X-Key: " + KEY.encode()), hangs, AuthenticationError),
    "token 500": (says(b"500 " + KEY.encode(), KEY_ECHO), hangs, ConnectionFailedError),
    "token of no team": (says(b"200 OK", json.dumps({"access_token": TOKEN}).encode()), hangs, ConnectionFailedError),
    "token that is no JSON": (says(b"200 OK", KEY_ECHO[1:]), hangs, ConnectionFailedError),
    "token compressed": (
        says(b"200 OK", gzip.compress(KEY_ECHO), b"Content-Encoding: gzip, " + KEY.encode()),
        hangs,
        ConnectionFailedError,
    ),
    "token answer cut": (cuts, hangs, ConnectionFailedError),
    "token echoed": (echoes, hangs, ConnectionFailedError),
    "token hangs": (hangs, hangs, ConnectionFailedError),
    "token reset": (resets, hangs, ConnectionFailedError),
    "no connection": (good_token, refuses, ConnectionFailedError),
    "handshake 401": (good_token, says(b"401 " + TOKEN.encode(), ECHO), AuthenticationError),
    "handshake 500": (good_token, says(b"500 No", ECHO, b"X-Token: " + TOKEN.encode()), ConnectionFailedError),
    "handshake echoed": (good_token, echoes, ConnectionFailedError),
    "handshake hangs": (good_token, hangs, ConnectionFailedError),
    "handshake reset": (good_token, resets, ConnectionFailedError),
    "close with a reason": (good_token, sends(close_frame(4001, f"bad {TOKEN}")), ConnectionFailedError),
    "close with the key": (good_token, sends(close_frame(4001, f"bad {KEY}")), ConnectionFailedError),
    "rubbish": (good_token, sends(b"\xff\xff"), ConnectionFailedError),
    "message too large": (
        good_token,
        sends(LIVE, frame(b'"' + TOKEN.encode() * 100 + b'"')),
        MessageTooLargeError,
    ),
}


async def failure(leaks: Leaks, **options: Any) -> KadoaError:
    """Open a client, which must fail, and search the error. The notices are searched as log records."""
    with pytest.raises(KadoaError) as caught:
        async with open_realtime(KEY, **options) as realtime:
            async for event in realtime.events:
                leaks.search(repr(event))
    leaks.search_exception(caught.value)
    return caught.value


# The servers speak no TLS: a secure address is the fault of a TLS handshake that fails.
@pytest.mark.parametrize(
    ("fault", "secure"),
    [*((fault, False) for fault in FAULTS), *((f"handshake {how}", True) for how in ("echoed", "hangs", "reset"))],
)
async def test_no_fault_shows_a_secret(autojump_clock: Any, leaks: Leaks, fault: str, secure: bool) -> None:
    answer, websocket, kind = FAULTS[fault]
    servers = MemoryServers(answer, websocket)
    addresses = {**LOCAL, "websocket": "wss://127.0.0.1:1"} if secure else LOCAL
    async with servers.running():
        error = await failure(
            leaks,
            endpoints=Endpoints(network=servers, **addresses),
            limits=Limits(message_size=2_000),
            timeouts=Timeouts(connect=12),
            retry=RetryPolicy(initial=3, maximum=3),
        )
    assert isinstance(error, kind)


async def test_user_error_in_the_block_shows_no_secret(autojump_clock: Any, leaks: Leaks) -> None:
    servers = MemoryServers(good_token, sends(LIVE))
    async with servers.running():
        for opened in (
            open_realtime(KEY, endpoints=Endpoints(network=servers, **LOCAL)),
            open_notifications(KEY, endpoints=Endpoints(network=servers, **LOCAL)),
        ):
            with pytest.raises(ZeroDivisionError) as caught:
                async with opened:
                    raise ZeroDivisionError
            leaks.search_exception(caught.value)


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}", f"{KEY}é", KEY.encode()])
async def test_unusable_key_is_in_no_traceback(leaks: Leaks, key: Any) -> None:
    given = [key]  # under no name of a frame of this test
    del key
    for open_one in (open_realtime, open_notifications):
        with pytest.raises(ConfigurationError) as caught:
            async with open_one(given[0], endpoints=Endpoints(**LOCAL)):
                pytest.fail("it opened")
        tb = caught.value.__traceback__
        assert tb is not None
        leaks.search_exception(caught.value.with_traceback(tb.tb_next))  # without this frame
    found = await diagnose(given[0], endpoints=Endpoints(**LOCAL))
    assert found.first_failure is not None
    assert found.first_failure.name == "key"
    leaks.search(repr(found))


@pytest.mark.parametrize("name", ["public_api", "websocket", "realtime_api"])
@pytest.mark.parametrize("address", [f"wss://me:{PASSWORD}@x", f"https://x/?key={PASSWORD}", f"https://x/#{PASSWORD}"])
async def test_secret_in_an_address_is_in_no_traceback(leaks: Leaks, name: str, address: str) -> None:
    leaks.guard(PASSWORD)
    endpoints = Endpoints(**{name: address})
    del address
    leaks.search(repr(endpoints))
    with pytest.raises(ConfigurationError) as caught:
        async with open_realtime(KEY, endpoints=endpoints):
            pytest.fail("it opened")
    leaks.search_exception(caught.value)


async def test_token_in_the_type_of_a_frame_is_not_logged(
    autojump_clock: Any, leaks: Leaks, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [
        {"type": TOKEN},
        {"type": f"control.{TOKEN}"},
        {"type": f"control.{KEY}"},
        {"type": "control.draining", "deadlineAt": TOKEN, "connectionId": TOKEN, "retryAfterMs": 30_000},
    ]
    servers = MemoryServers(good_token, sends(*(frame(json.dumps(one).encode()) for one in frames)))
    async with servers.running(), open_realtime(KEY, endpoints=Endpoints(network=servers, **LOCAL)) as realtime:
        await trio.sleep(5)
        notices = []
        while realtime.notices.statistics().current_buffer_used:
            notices.append(await realtime.notices.receive())
        leaks.search(repr(notices), *map(str, notices), repr(realtime.statistics()))
    # The records exist, so that the search means something.
    assert sum("ignored a frame" in record.getMessage() for record in caplog.records) == 3
    assert "control.[secret]" in caplog.text


async def test_diagnosis_shows_no_secret(autojump_clock: Any, leaks: Leaks) -> None:
    for answer, websocket, _kind in FAULTS.values():
        servers = MemoryServers(answer, websocket)
        async with servers.running():
            found = await diagnose(KEY, endpoints=Endpoints(network=servers, **LOCAL), test_event=None)
        leaks.search(repr(found))
        assert not found.ok or websocket not in (refuses, hangs)


@pytest.mark.parametrize("row", [{"config": {"secret": PASSWORD}}, {"id": "c1", "config": PASSWORD}, PASSWORD])
async def test_configuration_of_a_channel_is_in_no_traceback(autojump_clock: Any, leaks: Leaks, row: object) -> None:
    leaks.guard(PASSWORD)
    body = json.dumps({"data": {"channels": [row], "channel": row, "settings": [row]}}).encode()
    del row
    for answer in (says(b"200 OK", body), says(b"500 No", b"")):
        servers = MemoryServers(answer, hangs)
        async with servers.running(), open_notifications(KEY, endpoints=Endpoints(network=servers, **LOCAL)) as opened:
            for call in (
                opened.channels,
                opened.settings,
                # The configuration itself is under no name of a frame of this test.
                lambda opened=opened: opened.create_channel("mine", "WEBHOOK", {"secret": PASSWORD}),
            ):
                with pytest.raises(KadoaError) as caught:
                    await call()
                tb = caught.value.__traceback__
                assert tb is not None
                leaks.search_exception(caught.value.with_traceback(tb.tb_next))  # without this frame: it has the answer


# --- over real sockets: proxies and webhooks ---


async def echoing_proxy(stream: trio.abc.Stream) -> None:
    """Refuse, and repeat the credentials in every place."""
    lines = (await read_head(stream)).split(b"\r\n")
    (sent,) = [line for line in lines if line.lower().startswith(b"proxy-authorization")]
    value = sent.split(b": ")[1] + b" " + PASSWORD.encode()
    await stream.send_all(b"HTTP/1.1 407 %s\r\nX-Echo: %s\r\nContent-Length: 4\r\n\r\nnope" % (value, value))


@pytest.mark.sockets
async def test_password_that_a_proxy_repeats_is_not_shown(
    leaks: Leaks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quoted = quote(PASSWORD, safe="")
    authorization = "bWU6cHIweHktcGFzcy93b3JkLW9mLW5vYm9keQ"
    leaks.guard(PASSWORD, quoted, authorization)
    async with serving(echoing_proxy) as port:
        for scheme, name in (("https", "HTTPS_PROXY"), ("http", "HTTP_PROXY")):
            monkeypatch.setenv(name, f"http://me:{quoted}@127.0.0.1:{port}")
            with trio.fail_after(60):
                error = await failure(
                    leaks,
                    endpoints=Endpoints(public_api=f"{scheme}://far.example", websocket="wss://far.example"),
                    allow_insecure=True,
                    timeouts=Timeouts(connect=0.2),
                )
                assert isinstance(error, (ConnectionFailedError, RequestRefusedError))
                # The WebSocket's own way.
                found = await diagnose(
                    KEY,
                    endpoints=Endpoints(public_api=f"{scheme}://far.example", websocket="wss://far.example"),
                    allow_insecure=True,
                    test_event=None,
                )
                leaks.search(repr(found))
    assert "X-Echo" in caplog.text


async def echoing_webhook(stream: trio.abc.Stream) -> None:
    """Refuse, and repeat the request line, decoded and as it came."""
    target = (await read_head(stream)).split(b" ")[1]
    body = b'{"error": "%s, %s: %s"}' % (target, WORD.encode(), json.dumps(WORD)[1:-1].encode())
    await stream.send_all(
        b"HTTP/1.1 500 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (target, len(body), body)
    )


@pytest.mark.sockets
@pytest.mark.parametrize("encoded", [False, True])
async def test_secret_of_a_webhook_is_in_no_dead_letter_log_or_error(
    leaks: Leaks, tmp_path: Path, encoded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # An httpx that encodes a part of it: each spelling is a leak.
    leaks.guard(WORD.split("&")[0], quote(WORD.split("&")[0]), json.dumps(WORD)[1:9], "rd%20with%20spaces")
    failures: list[FailedForward] = []
    event = decode('{"eventType":"workflow_finished","id":"e1","message":{}}')
    query = f"v=1&key={quote(WORD, safe='') if encoded else WORD.replace('&', '')}"
    async with serving(echoing_webhook) as port:
        with trio.fail_after(60):
            async with open_forwarder(
                f"http://127.0.0.1:{port}/hook?{query}",
                max_attempts=1,
                dead_letters=tmp_path / "dead",
                on_failure=failures.append,
            ) as forwarder:
                assert not await forwarder.forward(event)  # type: ignore[arg-type]
                leaks.search(repr(forwarder))
    letter = (tmp_path / "dead").read_text(encoding="utf-8")
    assert "[secret]" in letter
    leaks.search(letter, json.dumps(json.loads(letter), ensure_ascii=False), repr(failures), str(failures[0]))
    assert "HTTP Request: POST" in caplog.text


async def test_errors_of_a_forwarder_show_no_secret(leaks: Leaks, tmp_path: Path) -> None:
    leaks.guard(PASSWORD)
    urls = [f"http://127.0.0.1/?key={PASSWORD}", f"http://me:{PASSWORD}@x", f"http://x/#{PASSWORD}", f"{PASSWORD}://x"]
    for number in range(len(urls)):
        with pytest.raises((ConfigurationError, ZeroDivisionError)) as caught:
            async with open_forwarder(urls[number]):
                raise ZeroDivisionError
        text = everything_said(caught.value).replace(rendered(caught.value), "")
        tb = caught.value.__traceback__
        assert tb is not None
        caught.value.__traceback__ = tb.tb_next  # this frame has the URLs
        leaks.search(text, rendered(caught.value))
    event = decode('{"eventType":"workflow_finished","id":"e1","message":{}}')
    async with serving(says(b"500 No", b"")) as port:
        url = f"http://127.0.0.1:{port}/?key={PASSWORD}"
        with pytest.raises(DeadLetterError) as failed:
            async with open_forwarder(url, max_attempts=1, dead_letters=tmp_path / "no" / "such") as forwarder:
                del url, urls
                await forwarder.forward(event)  # type: ignore[arg-type]
    leaks.search_exception(failed.value)
