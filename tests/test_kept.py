"""Kept connections: when one is used again, and what every odd server costs.

Answers mean the same as through httpx, and a test compares both. Servers are
in memory, under virtual time; those that need a socket or TLS are on the
loopback interface.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import logging
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock
from urllib.parse import quote

import h11
import pytest
import trio
import trio.testing
from _loopback import Handler, chain, read_head, server_tls, serving, trusting_tls
from _memory import MemoryServers
from conftest import Leaks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_proxy import HttpProxy

from kadoa_trio import Endpoints, Timeouts
from kadoa_trio._errors import AttemptError, ForeignError, InternalError, KadoaError
from kadoa_trio._net import _api
from kadoa_trio._net._api import KadoaApi, open_api
from kadoa_trio._net._dial import Address
from kadoa_trio._net._http import _BYTES_A_CHUNK, _CHUNKS, CHUNKS_AT_ONCE, MAX_ANSWER
from kadoa_trio._net._kept import KEPT_FOR, KeptConnections, can_keep, keep_connections
from kadoa_trio._redact import Secret
from kadoa_trio._settings import Settings

KEY = "tk-0f8b1c2d-s3cr3t/k3y+for=tests"
PASSWORD = "pr0xy-pass/word-of-nobody"
LOCAL = {"public_api": "http://127.0.0.1:1", "realtime_api": "http://127.0.0.1:1"}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")

Clock = trio.testing.MockClock


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


async def read_request(stream: trio.abc.Stream) -> tuple[bytes, str]:
    """Read one acknowledgement and nothing behind it: the head, and the id that is acknowledged."""
    head, _, body = (await read_head(stream)).partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    assert length is not None
    while len(body) < int(length[1]):
        body += await stream.receive_some()
    assert len(body) == int(length[1]), "a request came before the answer of the one before it"
    return head, json.loads(body)["id"]


class Server:
    """Answers acknowledgements; each stream with *answer*, which is given the stream and the number of the request on it.

    An answer of None closes the stream.
    """

    def __init__(self, *answers: bytes | None, close: bool = False) -> None:
        self.answers = answers
        self.close = close
        self.streams = 0
        self.ended = 0
        self.all_ended = trio.Event()
        self.heads: list[bytes] = []
        self.ids: list[str] = []

    async def __call__(self, stream: trio.abc.Stream) -> None:
        self.streams += 1
        try:
            for number in range(1_000_000):
                head, event_id = await read_request(stream)
                self.heads.append(head)
                self.ids.append(event_id)
                answer = self.answers[min(number, len(self.answers) - 1)]
                if answer is None:
                    return
                await stream.send_all(answer)
                if self.close:
                    return
        finally:
            self.ended += 1
            if self.ended == self.streams:
                self.all_ended.set()


@asynccontextmanager
async def in_memory(handler: Handler, *, secure: bool = False, **options: Any) -> AsyncIterator[KadoaApi]:
    """Open an API client whose acknowledgements go to *handler* over kept connections in memory."""
    servers = MemoryServers(handler, handler)
    addresses = {**LOCAL, "realtime_api": "https://127.0.0.1:1"} if secure else LOCAL
    settings = Settings(endpoints=Endpoints(network=servers, **addresses), **options)
    with mock.patch.object(_api, "can_keep", return_value=True):
        async with servers.running(), open_api(api_key=Secret(KEY), settings=settings) as api:
            yield api


@asynccontextmanager
async def on_loopback(url: str, **options: Any) -> AsyncIterator[KadoaApi]:
    settings = Settings(endpoints=Endpoints(public_api="http://127.0.0.1:1", realtime_api=url), **options)
    with trio.fail_after(60):
        async with open_api(api_key=Secret(KEY), settings=settings) as api:
            yield api


def connections(api: KadoaApi) -> KeptConnections:
    kept = api._connections()
    assert kept is not None
    return kept


def idle(api: KadoaApi) -> int:
    return len(connections(api)._idle)


async def failure(api: KadoaApi) -> AttemptError:
    """Acknowledge, which must fail, and give the error; it is clean."""
    with pytest.raises(KadoaError) as caught:
        await api.acknowledge("e")
    assert type(caught.value) is AttemptError
    assert caught.value.step == "acknowledge"
    for one in chain(caught.value):
        assert isinstance(one, (KadoaError, ForeignError)), one
    return caught.value


# --- which connections are used ---


async def test_one_after_the_other_share_a_connection(autojump_clock: Clock) -> None:
    server = Server(OK)
    async with in_memory(server) as api:
        for number in range(50):
            await api.acknowledge(f"e{number}")
        assert idle(api) == 1
    assert server.ids == [f"e{number}" for number in range(50)]
    assert server.streams == 1


async def test_each_at_once_has_a_connection_of_its_own_and_the_last_used_is_used_first(autojump_clock: Clock) -> None:
    server = Server(OK)
    async with in_memory(server) as api:
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(api.acknowledge, f"e{number}")
            for _ in range(4):
                await trio.sleep(KEPT_FOR / 5)
                await api.acknowledge("one")
            assert api._kept is not None
            used = [connection.idle_since for connection in api._kept._idle]
            assert [trio.current_time() - at for at in used] == [pytest.approx(KEPT_FOR * 4 / 5)] * 3 + [0]
        assert server.streams == idle(api) == 4
    assert len(server.ids) == 40


async def test_request_is_that_of_httpx(autojump_clock: Clock) -> None:
    seen: list[tuple[bytes, dict[bytes, bytes]]] = []

    async def handler(stream: trio.abc.Stream) -> None:
        while True:
            head, event_id = await read_request(stream)
            assert event_id == "\u00e9\u2028\U0001f600"
            line, *lines = head.split(b"\r\n")
            fields = dict(one.lower().split(b": ", 1) for one in lines)
            fields.pop(b"connection", None)  # keep-alive is the default of HTTP/1.1
            seen.append((line, fields))
            await stream.send_all(OK)

    servers = MemoryServers(handler, handler)
    url = "http://127.0.0.1:81/a b/caf\u00e9/%20?".rstrip("?")
    settings = Settings(endpoints=Endpoints(network=servers, public_api="http://127.0.0.1:1", realtime_api=url))
    async with servers.running(), open_api(api_key=Secret(KEY), settings=settings) as api:
        await api.acknowledge("\u00e9\u2028\U0001f600")
        api._kept = keep_connections(_api._acknowledge_url(settings), settings, lambda: ())
        await api.acknowledge("\u00e9\u2028\U0001f600")
        await api._kept.aclose()
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (OK, True),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\nX-After: 1\r\n\r\n", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, True),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 16 + OK, True),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}", False),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % MAX_ANSWER + b" " * MAX_ANSWER, False),
        (OK + OK, False),
        (OK + b"\r\n", False),
    ],
    ids=lambda value: value[:60] if isinstance(value, bytes) else str(value),
)
async def test_connection_is_kept_behind_an_answer_that_has_ended_and_behind_no_other(
    autojump_clock: Clock, answer: bytes, kept: bool
) -> None:
    server = Server(answer)
    async with in_memory(server) as api:
        for _ in range(3):
            await api.acknowledge("e")
            assert idle(api) == kept
    assert server.ids == ["e"] * 3
    assert server.streams == (1 if kept else 3)


async def test_answer_without_a_length_ends_with_the_stream(autojump_clock: Clock) -> None:
    server = Server(b"HTTP/1.1 200 OK\r\n\r\n{}", close=True)
    async with in_memory(server) as api:
        await api.acknowledge("e")
        await api.acknowledge("e")
    assert server.streams == 2


# --- connections that a server closes ---


async def test_server_that_closes_after_each_answer_without_saying_so_costs_one_more_connection_each(
    autojump_clock: Clock,
) -> None:
    server = Server(OK, close=True)
    async with in_memory(server) as api:
        for number in range(5):
            await api.acknowledge(f"e{number}")
    assert server.ids == [f"e{number}" for number in range(5)]
    assert server.streams == 5


async def test_request_that_a_kept_connection_took_no_more_is_sent_once_more_on_a_new_one(
    autojump_clock: Clock,
) -> None:
    server = Server(OK, None)  # the second request on a stream is read and not answered
    async with in_memory(server) as api:
        for number in range(3):
            await api.acknowledge(f"e{number}")
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(api.acknowledge, "many")
        assert server.ids[:5] == ["e0", "e1", "e1", "e2", "e2"]
        before = server.streams
        # Four are kept, and none of them takes a second one: the request goes to one of them, then to a new one.
        await api.acknowledge("last")
        assert server.ids[-2:] == ["last", "last"]
        assert server.streams == before + 1


async def test_request_is_sent_twice_at_most(autojump_clock: Clock) -> None:
    server = Server(OK, None)
    async with in_memory(server) as api:
        await api.acknowledge("e")
        server.answers = (None,)
        error = await failure(api)
        assert error.reason == "the server closed the connection without an answer"
        assert (server.ids, server.streams) == (["e", "e", "e"], 2)
        # Nothing is kept, so the next one is sent once.
        await failure(api)
        assert (len(server.ids), server.streams) == (4, 3)


async def test_answer_of_a_server_that_does_not_read_the_request_is_read(autojump_clock: Clock) -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await stream.send_all(ANSWERS["retry after"])

    async with in_memory(handler) as api:
        kept = connections(api)
        opened = kept._open

        async def late() -> trio.abc.Stream:
            stream = await opened()
            await trio.testing.wait_all_tasks_blocked()  # the server has closed it: sending fails
            return stream

        kept._open = late
        error = await failure(api)
        assert (error.status, error.retry_after) == (429, 120.0)


async def test_request_that_was_answered_in_part_is_not_sent_again(autojump_clock: Clock) -> None:
    for part in (b"H", b"HTTP/1.1 100 Continue\r\n\r\n", OK[:-1]):
        server = Server(OK, part)
        async with in_memory(server) as api:
            await api.acknowledge("e")
            server.close = True
            server.answers = (part,)
            await failure(api)
            assert (len(server.ids), server.streams, idle(api)) == (2, 1, 0)


async def test_connection_is_closed_when_it_is_not_used(autojump_clock: Clock) -> None:
    server = Server(OK)
    async with in_memory(server) as api, trio.open_nursery() as nursery:
        nursery.start_soon(api.close_idle)
        for _ in range(3):
            async with trio.open_nursery() as inner:
                inner.start_soon(api.acknowledge, "e")
                inner.start_soon(api.acknowledge, "e")
            for _ in range(4):
                await trio.sleep(KEPT_FOR - 1)
                await api.acknowledge("e")  # one of them stays in use
            assert (server.streams - server.ended, idle(api)) == (1, 1)
            await trio.sleep(KEPT_FOR - 0.1)
            assert (server.streams - server.ended, idle(api)) == (1, 1)
            await trio.sleep(0.2)
            assert (server.streams - server.ended, idle(api)) == (0, 0)
            await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert server.streams == 6


async def test_first_connection_of_a_client_is_closed_when_it_is_not_used(autojump_clock: Clock) -> None:
    server = Server(OK)
    async with in_memory(server) as api, trio.open_nursery() as nursery:
        nursery.start_soon(api.close_idle)
        await trio.testing.wait_all_tasks_blocked()  # it runs before there is anything to close
        await api.acknowledge("e")
        await trio.sleep(KEPT_FOR + 0.1)
        assert (server.streams, server.ended) == (1, 1)
        nursery.cancel_scope.cancel()


async def test_connection_that_was_not_used_for_long_is_not_used_again(autojump_clock: Clock) -> None:
    # Without the task that closes it: it may run late, because the program has blocked the event loop.
    server = Server(OK)
    async with in_memory(server) as api:
        await api.acknowledge("e")
        await trio.sleep(KEPT_FOR)
        await api.acknowledge("e")
        assert (server.streams, server.ended) == (2, 1)


async def test_leaving_closes_all(autojump_clock: Clock) -> None:
    server = Server(OK)
    async with serving(server) as port:
        async with on_loopback(f"http://127.0.0.1:{port}") as api:
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(api.acknowledge, "e")
            assert idle(api) == server.streams > 0
        with trio.fail_after(20):
            await server.all_ended.wait()


@pytest.mark.sockets
async def test_answer_that_nobody_asked_for_is_not_that_of_the_next_request() -> None:
    # Servers announce so that they close an idle connection (RFC 9110, section 15.5.9).
    late = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    answered = trio.Event()
    ids: list[str] = []

    async def handler(stream: trio.abc.Stream) -> None:
        ids.append((await read_request(stream))[1])
        await stream.send_all(OK)
        await answered.wait()
        await stream.send_all(late)
        await stream.receive_some()

    async with serving(handler) as port, on_loopback(f"http://127.0.0.1:{port}") as api:
        await api.acknowledge("e1")
        answered.set()
        assert api._kept is not None
        await trio.lowlevel.wait_readable(api._kept._idle[0]._socket)
        await api.acknowledge("e2")
    assert ids == ["e1", "e2"]


# --- the meaning of answers ---

JSON = b'{"error": "no such event"}'
ANSWERS = {
    "200": OK,
    "200 in chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "200 until the end": b"HTTP/1.1 200 OK\r\n\r\n{}",
    "201": b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n",
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + OK,
    "upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n" + OK,
    "compressed": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 500\r\n\r\n" + gzip.compress(b"{}"),
    "compressed twice": b"HTTP/1.1 200 OK\r\nContent-Encoding: identity\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b",
    "compressed 500": b"HTTP/1.1 500 No\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(JSON),
    "too large": b"HTTP/1.1 200 OK\r\nContent-Length: 500000\r\n\r\n" + b" " * 200_000,
    "too large 500": b"HTTP/1.1 500 No\r\nContent-Length: 500000\r\n\r\n" + b"x" * 200_000,
    "nothing": b"",
    "cut head": b"HTTP/1.1 200 OK\r\nContent-",
    "cut body": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
    "cut chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n",
    "cut 503": b"HTTP/1.1 503 No\r\nContent-Length: 500\r\nRetry-After: 7\r\n\r\nbusy",
    "no HTTP": b"SSH-2.0-OpenSSH_9.6 " + KEY.encode() + b"\r\n\r\n",
    "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80\x00\x04\x00\x01\x00\x00\x00\x05\x00\xff",
    "odd length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "odd chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n",
    "odd header": b"HTTP/1.1 200 OK\r\nX \x00: 1\r\n\r\n{}",
    "retry after": b"HTTP/1.1 429 No\r\nContent-Length: 0\r\nRetry-After: 120\r\n\r\n",
    "gateway": b"HTTP/1.1 502 Bad\r\nContent-Length: 6\r\n\r\n<html>",
    "key": b"HTTP/1.1 500 No\r\nContent-Length: %d\r\n\r\nthe key %s is bad" % (len(KEY) + 15, KEY.encode()),
    **{
        str(status): b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(JSON), JSON)
        for status in (300, 301, 302, 307, 400, 401, 403, 404, 408, 410, 425, 429, 500, 503, 599)
    },
    "304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
}


async def outcome(api: KadoaApi) -> tuple[object, ...]:
    """Acknowledge, and give all that a caller sees; of a fault of the network not the library's words."""
    error: AttemptError | None = None
    try:
        await api.acknowledge("e")
    except AttemptError as exc:
        error = exc
    if error is None:
        return ("accepted",)
    assert KEY not in str(error)
    assert error.reason.isprintable()
    reason = error.reason if error.status or "within" in error.reason else ""
    return type(error), error.status, error.retry_after, reason


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("then", ["closes", "hangs"])
async def test_every_answer_means_what_it_means_through_httpx(autojump_clock: Clock, name: str, then: str) -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await read_request(stream)
        await stream.send_all(ANSWERS[name])
        if then == "hangs":
            await trio.sleep_forever()

    servers = MemoryServers(handler, handler)
    settings = Settings(endpoints=Endpoints(network=servers, **LOCAL))
    async with servers.running(), open_api(api_key=Secret(KEY), settings=settings) as api:
        began = trio.current_time()
        through_httpx = await outcome(api), trio.current_time() - began
        api._kept = keep_connections(_api._acknowledge_url(settings), settings, lambda: api.secrets)
        began = trio.current_time()
        assert (await outcome(api), pytest.approx(trio.current_time() - began)) == through_httpx
        await api._kept.aclose()


@settings(max_examples=60)
@given(
    name=st.sampled_from(["200 in chunks", "interim", "key", "cut body", "503", "odd chunk"]),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    pause=st.booleans(),
)
async def test_pieces_of_an_answer_do_not_matter(name: str, cuts: list[int], pause: bool) -> None:
    whole = ANSWERS[name]
    places = [0, *sorted(cuts), len(whole)]

    async def handler(stream: trio.abc.Stream) -> None:
        await read_request(stream)
        for start, end in itertools.pairwise(places):
            if whole[start:end]:
                await stream.send_all(whole[start:end])
            if pause:
                await trio.testing.wait_all_tasks_blocked()

    async def at_once(stream: trio.abc.Stream) -> None:
        await read_request(stream)
        await stream.send_all(whole)

    found = []
    for one in (at_once, handler):
        async with in_memory(one) as api:
            found.append(await outcome(api))
    assert found[0] == found[1]


async def test_words_of_a_fault_name_it(autojump_clock: Clock) -> None:
    words = {
        "nothing": "the server closed the connection without an answer",
        "cut head": "the server closed the connection without an answer",
        "cut body": "received 1 bytes, expected 500",
        "no HTTP": r"illegal status line.*SSH-2.0-OpenSSH_9.6 \[secret\]",
    }
    for name, text in words.items():
        async with in_memory(Server(ANSWERS[name], close=True)) as api:
            assert re.search(text, (await failure(api)).reason), name
    async with in_memory(Server(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 17 + OK)) as api:
        assert (await failure(api)).reason == "more than 16 interim answers"
    async with in_memory(Server(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000)) as api:
        assert "too long" in (await failure(api)).reason
        assert idle(api) == 0


async def test_refusal_is_read_to_its_end_and_keeps_the_connection(autojump_clock: Clock) -> None:
    server = Server(ANSWERS["503"])
    async with in_memory(server) as api:
        for _ in range(3):
            error = await failure(api)
            assert (error.status, error.reason) == (503, "HTTP 503: no such event")
    assert server.streams == 1


async def test_bug_is_an_internal_error_and_closes_the_connection(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(_self: object) -> None:
        raise LookupError(f"odd {KEY}")

    server = Server(OK)
    for place in ((h11.Connection, "next_event"), (h11.Connection, "start_next_cycle")):
        async with in_memory(server) as api:
            with monkeypatch.context() as patch:
                patch.setattr(*place, bug)
                with pytest.raises(InternalError, match="please report it") as caught:
                    await api.acknowledge("e")
            assert KEY not in str(caught.value)
            assert idle(api) == 0
            await trio.testing.wait_all_tasks_blocked()
            assert server.ended == server.streams


# --- limits of time and size ---


@pytest.mark.parametrize("stage", ["never opens", "never answers", "body never comes", "drips the head", "drips"])
async def test_slow_server_meets_one_deadline_for_the_whole(autojump_clock: Clock, stage: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n"
    ended = 0

    async def handler(stream: trio.abc.Stream) -> None:
        nonlocal ended
        try:
            if "opens" not in stage:
                await read_request(stream)
            if stage in ("body never comes", "drips"):
                await stream.send_all(head)
            while "drips" in stage:
                # Faster than any time-out for one operation.
                await stream.send_all(b" " if stage == "drips" else head[:1])
                await trio.sleep(1 / 20)
            while await stream.receive_some():
                pass
        finally:
            ended += 1

    async with in_memory(handler, secure=stage == "never opens", timeouts=Timeouts(token=4)) as api:
        error = await failure(api)
        assert trio.current_time() == pytest.approx(4)
        assert str(error) == "acknowledge: no answer within 4 s"
        assert idle(api) == 0
        await trio.sleep(1)
        assert ended == 1


async def test_second_attempt_has_no_time_of_its_own(autojump_clock: Clock) -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        await read_request(stream)
        if trio.current_time():
            await trio.sleep_forever()
        await stream.send_all(OK)
        await read_request(stream)
        await trio.sleep(3)

    async with in_memory(handler) as api:
        await api.acknowledge("e")
        await trio.sleep(1)
        await failure(api)
        assert trio.current_time() == pytest.approx(11)


async def test_body_of_a_refusal_is_not_waited_for(autojump_clock: Clock) -> None:
    async with in_memory(Server(ANSWERS["cut 503"])) as api:
        error = await failure(api)
        assert trio.current_time() == pytest.approx(1)
        assert (error.status, error.retry_after, error.reason) == (503, 7.0, "HTTP 503: busy")
        assert idle(api) == 0


async def test_endless_body_is_read_to_the_limit_only(autojump_clock: Clock) -> None:
    taken = 0

    async def handler(stream: trio.abc.Stream) -> None:
        nonlocal taken
        await read_request(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await stream.send_all(b" " * 1024)
            await trio.testing.wait_all_tasks_blocked()
            taken += 1024

    async with in_memory(handler) as api:
        await api.acknowledge("e")
        assert idle(api) == 0
        assert taken <= MAX_ANSWER + 1024
        answer = await connections(api).post(b'{"id": "e"}', 10)
        assert (len(answer.body), answer.complete) == (MAX_ANSWER, True)


@pytest.mark.parametrize("flood", ["chunks", "headers"])
async def test_answer_in_tiny_pieces_lets_other_tasks_run(autojump_clock: Clock, flood: str) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100_000
    headers = b"HTTP/1.1 200 OK\r\n" + b"a:\r\n" * 100_000
    async with in_memory(Server(chunks if flood == "chunks" else headers)) as api, trio.open_nursery() as nursery:
        nursery.start_soon(other)
        answer = await connections(api).post(b'{"id": "e"}', 10)
        nursery.cancel_scope.cancel()
    most = _CHUNKS + MAX_ANSWER // _BYTES_A_CHUNK
    assert (answer.complete, answer.chunks) == ((True, most) if flood == "chunks" else (False, 0))
    # A head is read at once, but in pieces, and up to its limit only.
    assert turns >= most // CHUNKS_AT_ONCE


# --- cancellation ---


class SlowStream(trio.abc.HalfCloseableStream):
    """The client's end of a connection, where each step takes a second; sending takes one before and one behind it."""

    def __init__(self, inner: trio.abc.HalfCloseableStream) -> None:
        self.inner = inner
        self.closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(1)
        await self.inner.send_all(data)
        await trio.sleep(1)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        await trio.sleep(1)
        return await self.inner.receive_some(max_bytes)

    async def send_eof(self) -> None:
        await self.inner.send_eof()

    async def aclose(self) -> None:
        self.closed = True
        await self.inner.aclose()


class SlowServers(MemoryServers):
    def __init__(self, handler: Handler) -> None:
        super().__init__(handler, handler)
        self.streams: list[SlowStream] = []

    async def open_stream(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        await trio.sleep(1)
        self.streams.append(SlowStream(await super().open_stream(host, port)))
        return self.streams[-1]


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("kept", [False, True])
async def test_cancellation_at_each_step_closes_the_connection(autojump_clock: Clock, kept: bool, secure: bool) -> None:
    answers = (b"HTTP/1.1 100 Continue\r\n\r\n", *(OK[at : at + 10] for at in range(0, len(OK), 10)))
    tls = server_tls("127.0.0.1")

    async def handler(stream: trio.abc.Stream) -> None:
        if secure:
            stream = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
        while True:
            await read_request(stream)
            for part in answers:
                await stream.send_all(part)
                await trio.sleep(1)

    servers = SlowServers(handler)
    scheme = "https" if secure else "http"
    endpoints = Endpoints(network=servers, public_api="http://127.0.0.1:1", realtime_api=f"{scheme}://127.0.0.1:1")
    settings = Settings(endpoints=endpoints, timeouts=Timeouts(token=100), ssl_context=trusting_tls())
    async with servers.running():
        connections = keep_connections(f"{scheme}://127.0.0.1:1/ack", settings, lambda: ())
        content = b'{"id": "e"}'
        for instants in itertools.count():
            if kept:
                assert (await connections.post(content, 100)).complete
            with trio.move_on_after(instants / 2) as scope:
                assert (await connections.post(content, 100)).complete
            if not scope.cancelled_caught:
                break
            # The one that was cancelled is closed, and no other is left behind.
            assert len(connections._idle) == 0
            assert all(stream.closed for stream in servers.streams)
            # The next request is not answered with what is left of the answer to this one.
            assert (await connections.post(content, 100)).complete
            await connections.aclose()
        assert [stream.closed for stream in servers.streams[-1:]] == [False]
        await connections.aclose()
        assert all(stream.closed for stream in servers.streams)
    # Two instants a second, and a second for each piece of the answer at least.
    assert instants > 2 * len(answers)


async def test_acknowledging_is_a_checkpoint(autojump_clock: Clock) -> None:
    async with in_memory(Server(OK)) as api:
        for _ in range(2):
            with trio.testing.assert_checkpoints():
                await api.acknowledge("e")
        with trio.CancelScope() as scope:
            scope.cancel()
            await api.acknowledge("e")
        assert scope.cancelled_caught
        assert idle(api) == 0


# --- proxies, TLS, secrets ---


@pytest.mark.parametrize(
    ("environment", "url", "expected"),
    [
        ({}, "https://realtime.kadoa.com", True),
        ({}, "http://far.example", True),
        ({}, "https://caf\u00e9.example", False),
        ({"https_proxy": "http://p:1"}, "https://realtime.kadoa.com", True),
        ({"https_proxy": "https://p:1"}, "https://realtime.kadoa.com", True),
        ({"all_proxy": "p"}, "https://realtime.kadoa.com", True),
        ({"all_proxy": "socks5://p:1"}, "https://realtime.kadoa.com", False),
        ({"all_proxy": "socks5://p:1", "no_proxy": "kadoa.com"}, "https://realtime.kadoa.com", True),
        ({"all_proxy": "socks5://p:1"}, "http://127.0.0.1:1", True),
        ({"all_proxy": "socks5://p:1"}, "http://[::1]:1", True),
        ({"http_proxy": "http://p:1"}, "http://far.example", False),
        ({"http_proxy": "http://p:1"}, "http://localhost:1", True),
        ({"http_proxy": "http://p:1"}, "https://realtime.kadoa.com", True),
        ({"https_proxy": "http://p:1"}, "http://far.example", True),
    ],
)
def test_what_only_httpx_can_do_is_left_to_httpx(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str, expected: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert can_keep(Address.of(url), Settings()) == expected
    network = MemoryServers(Server(OK), Server(OK))
    assert not can_keep(Address.of(url), Settings(endpoints=Endpoints(network=network, **LOCAL)))


@pytest.mark.sockets
async def test_loopback_is_reached_directly_with_any_proxy_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse_to_be_asked(stream: trio.abc.Stream) -> None:
        raise AssertionError(await read_head(stream))

    server = Server(OK)
    async with serving(refuse_to_be_asked) as proxy, serving(server) as port:
        for name in VARIABLES[:3]:
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy}")
        async with on_loopback(f"http://localhost:{port}") as api:
            await api.acknowledge("e")
            assert idle(api) == 1
    assert server.ids == ["e"]


@pytest.mark.sockets
async def test_plain_request_to_another_host_goes_to_the_proxy_as_httpx_sends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(OK)
    async with serving(server) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy}")
        async with on_loopback("http://far.example", allow_insecure=True) as api:
            await api.acknowledge("e")
    assert server.heads[0].startswith(b"POST http://far.example/api/v1/events/ack HTTP/1.1\r\n")


@pytest.mark.sockets
@pytest.mark.parametrize("secure_proxy", [False, True])
async def test_secure_requests_share_a_tunnel_through_the_proxy(
    monkeypatch: pytest.MonkeyPatch, secure_proxy: bool
) -> None:
    tls = server_tls("far.example", "localhost")
    server = Server(OK)
    async with serving(server, tls=tls) as port:
        proxy = HttpProxy(port)
        async with serving(proxy, tls=tls if secure_proxy else None) as at:
            scheme = "https" if secure_proxy else "http"
            monkeypatch.setenv("https_proxy", f"{scheme}://me:{quote(PASSWORD, safe='')}@localhost:{at}")
            async with on_loopback("https://far.example:8443", ssl_context=trusting_tls()) as api:
                for number in range(5):
                    await api.acknowledge(f"e{number}")
    assert server.ids == [f"e{number}" for number in range(5)]
    (head,) = proxy.heads
    assert head.startswith(b"CONNECT far.example:8443 HTTP/1.1\r\n")
    assert b"authorization: basic " + base64.b64encode(f"me:{PASSWORD}".encode()).lower() in head.lower()
    # The credentials are the proxy's business.
    assert not any(b"authorization" in one.lower() for one in server.heads)


@pytest.mark.sockets
async def test_certificate_is_checked_and_http_1_is_asked_for() -> None:
    chosen: list[str | None] = []
    tls = server_tls("127.0.0.1")
    tls.set_alpn_protocols(["h2", "http/1.1"])
    server = Server(OK)

    async def handler(stream: trio.abc.Stream) -> None:
        assert isinstance(stream, trio.SSLStream)
        chosen.append(stream.selected_alpn_protocol())
        await server(stream)

    own = trusting_tls()
    own.set_alpn_protocols(["h2", "http/1.1"])  # the program's own context
    async with serving(handler, tls=tls) as port:
        async with on_loopback(f"https://127.0.0.1:{port}", ssl_context=own) as api:
            await api.acknowledge("e")
        async with on_loopback(f"https://127.0.0.1:{port}", ssl_context=ssl.create_default_context()) as api:
            assert "certificate refused" in (await failure(api)).reason
    assert (chosen, server.ids) == (["http/1.1"], ["e"])


@pytest.mark.sockets
async def test_closed_port_is_an_attempt() -> None:
    async with serving(Server(OK)) as port:
        pass
    async with on_loopback(f"http://127.0.0.1:{port}") as api:
        assert "refused" in (await failure(api)).reason.lower()


@pytest.mark.sockets
async def test_no_fault_of_a_server_or_proxy_shows_a_secret(monkeypatch: pytest.MonkeyPatch, leaks: Leaks) -> None:
    quoted = quote(PASSWORD, safe="")
    encoded = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    leaks.guard(KEY, PASSWORD, quoted, encoded)
    said = f"{KEY} {PASSWORD} {quoted} {encoded}".encode()

    async def refuses(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        head = b"HTTP/1.1 407 %s\r\nX-Echo: %s\r\nContent-Length: %d\r\n\r\n%s" % (said, said, len(said), said)
        await stream.send_all(head)

    async def babbles(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(said + b"\r\n\r\n")

    for proxy in (refuses, babbles):
        async with serving(proxy) as at:
            monkeypatch.setenv("https_proxy", f"http://me:{quoted}@localhost:{at}")
            async with on_loopback("https://far.example") as api:
                leaks.search(repr(api), repr(api._kept))
                error = await failure(api)
                assert f"the proxy localhost:{at}" in error.reason
                leaks.search_exception(error)
    monkeypatch.setenv("https_proxy", f"http://me:{quoted}@localhost:1")
    for answer in (
        b"HTTP/1.1 500 %s\r\nX-Echo: %s\r\nContent-Length: %d\r\n\r\n%s" % (said, said, len(said), said),
        said + b"\r\n\r\n",
        b"HTTP/1.1 500 No\r\n%s\r\n\r\n" % said,
        b"HTTP/1.1 500 No\r\nContent-Encoding: %s\r\n\r\n" % said,
        b"HTTP/1.1 200 No\r\nContent-Length: %s\r\n\r\n" % said,
        b"HTTP/1.1 200 No\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n" % said,
    ):
        async with serving(Server(answer)) as port, on_loopback(f"http://127.0.0.1:{port}") as api:
            leaks.search_exception(await failure(api))


async def test_what_a_network_logs_while_it_connects_is_censored(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture, leaks: Leaks
) -> None:
    leaks.guard(KEY)
    async with in_memory(Server(OK)) as api:
        kept = connections(api)
        opened = kept._open

        async def talkative() -> trio.abc.Stream:
            logging.getLogger("dialler").info("connecting for %s", KEY)
            return await opened()

        kept._open = talkative
        await api.acknowledge("e")
    assert "connecting for [secret]" in caplog.text


@pytest.mark.sockets
async def test_acknowledging_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(Server(OK)) as port, on_loopback(f"http://127.0.0.1:{port}") as api:
        caplog.clear()
        await api.acknowledge("e")
        assert caplog.records == []
