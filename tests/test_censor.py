"""Log records of the libraries underneath: whatever their loggers are called, no record made in our requests has a secret.

No test here has a list of logger names to be censored. They are found: by
making requests and opening WebSockets, and by asking the logging module for
every logger that exists then.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import httpx
import pytest
import trio
from _loopback import close_frame, frame, read_head, server_tls, serving, trusting_tls, upgrade
from test_proxy import HttpProxy

from kadoa_trio import Endpoints
from kadoa_trio._errors import KadoaError
from kadoa_trio._net import _censor
from kadoa_trio._net._api import open_api
from kadoa_trio._net._censor import censored_logs
from kadoa_trio._net._http import open_http
from kadoa_trio._net._socket import SocketEnded, open_socket
from kadoa_trio._redact import Secret
from kadoa_trio._settings import Settings

KEY = "tk-0f8b1c2d-s3cr3t/k3y+for=tests"
TOKEN = "eyJ0b2tlbiI6IjEifQ.s3cr3t/t0k3n+with=odd&chars"
LIBRARIES = {"httpx", "httpcore", "trio-websocket"}
"""The first names of the loggers that a real run must show, so that its silence about secrets means something."""


def has_secret(text: str) -> bool:
    return any(secret[start : start + 12] in text for secret in (KEY, TOKEN) for start in range(len(secret) - 11))


@pytest.fixture(autouse=True)
def factory() -> Iterator[Callable[..., logging.LogRecord]]:
    """Put the factory of records back that a test began with."""
    before = logging.getLogRecordFactory()
    yield before
    logging.setLogRecordFactory(before)


class Recorder(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self.emit = records.append  # type: ignore[method-assign]


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    """Give the list that every record of every logger goes to."""
    caplog.set_level(1)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    found: list[logging.LogRecord] = []
    handler = Recorder(found)
    logging.getLogger().addHandler(handler)
    yield found
    logging.getLogger().removeHandler(handler)


# --- real requests and WebSockets ---


async def repeats(stream: trio.abc.Stream) -> None:
    """Serve HTTP, and repeat the secrets in the status line, in a header and in the body; or serve one WebSocket."""
    while True:
        head = await read_head(stream)
        if b"upgrade: websocket" in head.lower():
            if b"refuse" in head:
                await stream.send_all(b"HTTP/1.1 401 %s\r\nX-Echo: %s\r\n\r\n" % (TOKEN.encode(), head.split()[1]))
                return
            await stream.send_all(upgrade(head) + frame(TOKEN.encode()) + close_frame(4001, TOKEN))
            await trio.sleep_forever()
        body = json.dumps({"access_token": TOKEN, "team_id": "team-1", "data": {"key": KEY}}).encode()
        echo = KEY.encode() + b" " + head.split()[1]
        await stream.send_all(
            b"HTTP/1.1 200 %s\r\nX-Echo: %s\r\nContent-Length: %d\r\n\r\n%s" % (echo, echo, len(body), body)
        )


async def talk(port: int, *, secure: bool = False, host: str = "127.0.0.1") -> None:
    """Make every kind of request, and open WebSockets: one that is refused, and one that is closed by the server."""
    http, ws = ("https", "wss") if secure else ("http", "ws")
    url = f"{http}://{host}:{port}"
    websocket = f"{ws}://{host}:{port}"
    endpoints = Endpoints(public_api=url, realtime_api=url, websocket=websocket)
    settings = Settings(endpoints=endpoints, ssl_context=trusting_tls() if secure else None)
    async with open_api(api_key=Secret(KEY), settings=settings) as api:
        token = await api.fetch_token()
        await api.acknowledge("e1")
        await api.call("GET", "/channels", params={"key": KEY})
        secrets = api.secrets
    query = Secret(f"{KEY}&{TOKEN}", KEY, TOKEN)
    async with open_http(hosts={host}, secure=secure, secrets=(query,), ssl_context=settings.ssl_context) as client:
        await client.request("forward", "POST", Secret(f"{url}/hook?{KEY}"), timeout=30, content=b"{}")
    for path in ("/refuse", "/"):
        with pytest.raises((KadoaError, SocketEnded)):
            async with open_socket(
                websocket + path, token=token.access_token, settings=settings, on_bytes=len, also=secrets
            ) as opened:
                while True:
                    await opened.receive()


async def talk_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Talk to servers on the loopback interface: in the clear, by TLS, and by TLS through a proxy."""
    with trio.fail_after(100):
        async with serving(repeats) as port:
            await talk(port)
        async with serving(repeats, tls=server_tls("localhost", "far.example")) as port:
            await talk(port, secure=True, host="localhost")
            async with serving(HttpProxy(port)) as proxy:
                monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy}")
                await talk(port, secure=True, host="far.example")


@pytest.mark.sockets
async def test_every_logger_that_is_used_during_requests_is_censored(
    records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    await talk_in_every_way(monkeypatch)
    spoke = {record.name for record in records}
    assert {name.partition(".")[0] for name in spoke} >= LIBRARIES
    for record in records:
        assert not has_secret(f"{record.getMessage()} {vars(record)}"), record.name
    # Secrets were there, in the records of each kind of library.
    hidden = {record.name.partition(".")[0] for record in records if "[secret]" in record.getMessage()}
    assert hidden >= {"httpx", "httpcore"}


@pytest.mark.sockets
async def test_search_finds_a_secret_if_one_logger_is_left_out(
    records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _censor._CensoringFactory.__call__

    def leaky(self: Any, name: str, *args: Any, **options: Any) -> logging.LogRecord:
        return self._below(name, *args, **options) if name == "httpcore.http11" else whole(self, name, *args, **options)

    monkeypatch.setattr(_censor._CensoringFactory, "__call__", leaky)
    await talk_in_every_way(monkeypatch)
    assert {record.name for record in records if has_secret(record.getMessage())} == {"httpcore.http11"}


@pytest.mark.sockets
async def test_every_logger_that_exists_is_censored_within_a_request(
    records: list[logging.LogRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    await talk_in_every_way(monkeypatch)
    found = {name for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)}
    assert {name.partition(".")[0] for name in found} >= LIBRARIES
    with censored_logs(Secret(KEY)):
        for name in {*found, "root"}:
            logger = logging.getLogger(name)
            # As the logger makes it, whatever its class and level.
            record = logger.makeRecord(name, logging.DEBUG, "file", 1, "sent %s", (KEY,), None)
            assert record.getMessage() == "sent [secret]", name


# --- libraries that do not exist yet ---


@attrs.frozen
class NewNetwork:
    """A network whose libraries log all that they send, under names that nobody has seen."""

    http_transport: httpx.MockTransport
    inner: trio.abc.HalfCloseableStream
    settlement_observer: None = None

    async def open_stream(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        logging.getLogger("trio_websocket2.dial").debug("dialling for %s", TOKEN)
        await trio.lowlevel.checkpoint()
        return self.inner


class Talkative(trio.abc.HalfCloseableStream):
    """A stream that logs the request, and then breaks."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        logging.getLogger(f"wsproto{len(data)}").info("sending %r", bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        logging.getLogger("wsproto2").warning("%s has ended", TOKEN)
        return b""

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_successor_of_a_library_is_censored_whatever_its_loggers_are_called(
    records: list[logging.LogRecord],
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        logging.getLogger("httpx2").info("HTTP Request: %s", request.headers["x-api-key"])
        # One that is made in the request, and one that does not pass its records on.
        logging.getLogger(f"httpcore2.http{id(request)}").debug("headers=%r", request.headers.raw)
        return httpx.Response(200, content=json.dumps({"access_token": TOKEN, "team_id": "t"}).encode())

    network = NewNetwork(httpx.MockTransport(answer), Talkative())
    settings = Settings(endpoints=Endpoints(network=network))
    async with open_api(api_key=Secret(KEY), settings=settings) as api:
        token = (await api.fetch_token()).access_token
        with pytest.raises(KadoaError):
            async with open_socket("ws://localhost", token=token, settings=settings, on_bytes=len):
                pytest.fail("it opened")
    ours = [record for record in records if "2" in record.name or record.name.startswith("wsproto")]
    assert {record.name.rstrip("0123456789") for record in ours} >= {
        "httpx",
        "httpcore2.http",
        "trio_websocket2.dial",
        "wsproto",
    }
    for record in ours:
        assert "[secret]" in record.getMessage()
        assert not has_secret(f"{record.getMessage()} {vars(record)}"), record.name


# --- a program's own logging ---


def test_records_outside_of_a_block_are_untouched(records: list[logging.LogRecord]) -> None:
    logger = logging.getLogger("program")
    error = ValueError("odd")
    with censored_logs(Secret(KEY)):
        logger.info("inside %s", KEY, exc_info=error)
    logger.info("about %s", KEY, exc_info=error)
    inside, outside = records
    assert (inside.msg, inside.args, inside.exc_info) == ("inside [secret]", None, None)
    assert (outside.msg, outside.args) == ("about %s", (KEY,))
    assert outside.exc_info is not None
    assert outside.exc_info[1] is error


async def test_other_tasks_are_untouched_and_tasks_of_a_block_are_not(records: list[logging.LogRecord]) -> None:
    logger = logging.getLogger("program")
    inside, done = trio.Event(), trio.Event()

    async def outside() -> None:
        await inside.wait()
        logger.info("outside %s", KEY)
        done.set()

    async def child() -> None:
        await trio.to_thread.run_sync(logger.info, "in a thread %s", KEY)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(outside)
        with censored_logs(Secret(KEY)):
            inside.set()
            await done.wait()
            async with trio.open_nursery() as inner:
                inner.start_soon(child)
    assert [record.getMessage() for record in records] == [f"outside {KEY}", "in a thread [secret]"]


def test_factory_of_a_program_is_used_before_and_after_ours(records: list[logging.LogRecord]) -> None:
    standard = logging.LogRecord

    def numbered(number: int, below: Callable[..., logging.LogRecord]) -> Callable[..., logging.LogRecord]:
        def make(*args: Any, **options: Any) -> logging.LogRecord:
            record = below(*args, **options)
            setattr(record, f"number{number}", number)
            return record

        return make

    logging.setLogRecordFactory(numbered(1, standard))
    with censored_logs(Secret(KEY)):
        logging.getLogger("library").info("a %s", KEY)
    installed = logging.getLogRecordFactory()
    with censored_logs(Secret(KEY)):
        assert logging.getLogRecordFactory() is installed  # once is enough
    # A program's factory above ours, and one that has thrown ours away.
    for factory in (numbered(2, logging.getLogRecordFactory()), numbered(2, standard)):
        logging.setLogRecordFactory(factory)
        with censored_logs(Secret(KEY)):
            logging.getLogger("library").info("b %s", KEY)
    assert [record.getMessage() for record in records] == ["a [secret]", "b [secret]", "b [secret]"]
    assert [(getattr(one, "number1", 0), getattr(one, "number2", 0)) for one in records] == [(1, 0), (1, 2), (0, 2)]


def test_message_that_cannot_be_formatted_breaks_nothing_and_shows_nothing(records: list[logging.LogRecord]) -> None:
    with censored_logs(Secret(KEY)):
        logging.getLogger("library").info("%d", KEY)
    (record,) = records
    assert record.getMessage() == "[a log record whose message cannot be formatted]"
    assert not has_secret(str(vars(record)))


def test_block_without_secrets_changes_nothing(records: list[logging.LogRecord]) -> None:
    with censored_logs():
        logging.getLogger("library").info("a %s", "b")
    assert (records[0].msg, records[0].args) == ("a %s", ("b",))
