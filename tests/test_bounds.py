"""What a server can make the client keep, log and do has a limit, whatever it sends.

Work is counted (calls, frames, scheduler steps, bytes), never timed.
"""

from __future__ import annotations

import itertools
import json
import logging
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
import trio.testing
import wsproto
from _loopback import CLOSE_1000, accept, frame, read_head, upgrade
from _receiving import receiving
from test_socket import MemoryNetwork, speak

from kadoa_trio import Limits, Realtime, Timeouts, open_realtime
from kadoa_trio._engine._ledger import RECENT_IDS
from kadoa_trio._engine._reporter import MAX_NOTICE_TEXT, MAX_NOTICES, NOTICE_INTERVAL, NOTICES_AT_ONCE, Reporter
from kadoa_trio._errors import AttemptError
from kadoa_trio._net._frames import FRAMES_AT_ONCE, MAX_FRAGMENTS, FrameFilter, Passed, Refused
from kadoa_trio._net._socket import End, EndReason, SocketEnded
from kadoa_trio._net._wire import Ignored, decode
from kadoa_trio.notices import AdmissionPaused, Draining, FrameIgnored, Lost, Notice, Retrying, State
from kadoa_trio.testing import Faults, open_simulated_kadoa

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
MEGABYTE = 1_000_000


def found(source: Realtime | Reporter, kind: type[Notice]) -> list[Any]:
    notices = []
    try:
        while True:
            notices.append(source.notices.receive_nowait())
    except (trio.WouldBlock, trio.EndOfChannel):
        return [notice for notice in notices if isinstance(notice, kind)]


# ---- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts",
    [
        lambda text: (FrameIgnored, {"generation": 1, "kind": text[0], "why": text, "type": text}),
        lambda text: (Draining, {"generation": 1, "delay": 1.0, "deadline": text, "resume_supported": None}),
        lambda text: (Lost, {"generation": 1, "how": text}),
        lambda text: (Retrying, {"generation": 1, "why": text, "delay": 1.0, "failures": 1}),
        lambda text: (AdmissionPaused, {"oldest": text, "unsettled": 1}),
    ],
    ids=["ignored", "draining", "lost", "retrying", "paused"],
)
def test_unread_notices_hold_texts_of_bounded_length(
    facts: Callable[[str], tuple[type[Notice], dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="kadoa_trio")  # pytest keeps every record
    clock = itertools.count(0, NOTICE_INTERVAL)
    reporter = Reporter(lambda: NOW, clock=lambda: next(clock))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(2 * MAX_NOTICES):
            kind, values = facts(chr(0x1F600 + number) + "x" * 50_000)  # as wide as a string can be
            reporter.publish(kind(**values))
            del values
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    kept = found(reporter, kind)
    assert len(kept) == MAX_NOTICES
    assert after - before < MAX_NOTICES * (2 * 4 * MAX_NOTICE_TEXT + 1_000)
    for notice in kept:
        assert len(str(notice)) < MAX_NOTICE_TEXT + 300


async def test_server_of_megabyte_types_costs_little_in_notices(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        await trio.sleep(20)
        found(realtime, Notice)
        for number in range(40):
            kind = "control." if number % 2 else ""
            kadoa.newest.send_raw(json.dumps({"type": f"{kind}{number}" + "x" * MEGABYTE}))
            await trio.sleep(20)  # slowly, so that each has its notice
        ignored = found(realtime, FrameIgnored)
        assert len(ignored) == 40
        assert max(len(notice.type) for notice in ignored) == 256
        assert realtime.statistics().ignored == 40


def test_ignored_type_is_cut_before_it_is_reported() -> None:
    frame = json.dumps({"type": "x" * MEGABYTE})
    tracemalloc.start()
    try:
        kept = [decode(frame) for _ in range(MAX_NOTICES)]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(isinstance(one, Ignored) for one in kept)
    assert held < MAX_NOTICES * 1_000


async def test_position_stays_small_whatever_the_ids_and_cursors(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), receiving(realtime) as received:
        for number in range(RECENT_IDS + 200):
            event = {"eventType": "x", "id": f"{number}-" + "i" * 10_000, "_cursor": f"{number}-" + "c" * 10_000}
            kadoa.newest.send_raw(json.dumps(event))
            if number % 100 == 0:
                await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(30)
        assert len(set(received)) == RECENT_IDS + 200
        assert len(realtime.position.to_json()) < 150 * (RECENT_IDS + 200) + 1_000


async def test_overlong_cursor_does_not_move_the_resume_cursor(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), receiving(realtime) as received:
        kadoa.newest.send_raw('{"eventType":"x","id":"a","_cursor":"1742-0","message":{}}')
        await trio.sleep(30)
        kadoa.newest.send_raw(json.dumps({"eventType": "x", "id": "b", "_cursor": "9" * 2_000, "message": {}}))
        await trio.sleep(1)
        assert received == ["a", "b"]
        assert realtime.statistics().resume_cursor == "1742-0"
        kadoa.newest.reset()
        await kadoa.wait_subscribed(2)
        assert kadoa.subscriptions[-1][1] == "1742-0"


async def test_overlong_id_is_delivered_once(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), receiving(realtime) as received:
        for repeat in range(3):
            event = {"eventType": "x", "id": "i" * MEGABYTE, "message": {"repeat": repeat}}
            kadoa.newest.send_raw(json.dumps(event))
        await trio.sleep(1)
        assert len(received) == 1
        assert realtime.statistics().repeated == 2


# ---- what is reported ----------------------------------------------------------------------------------------------


async def test_garbage_frames_are_reported_at_a_limited_rate_and_all_counted(
    autojump_clock: Any, pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="kadoa_trio")
    async with pair() as (kadoa, realtime):
        await trio.sleep(20)
        found(realtime, Notice)
        caplog.clear()
        for _ in range(100):
            for _ in range(20):
                kadoa.newest.send_raw("null")
            await trio.sleep(1)
        ignored = found(realtime, FrameIgnored)
        assert len(ignored) == NOTICES_AT_ONCE + 99 // NOTICE_INTERVAL
        assert [notice.suppressed for notice in ignored[:NOTICES_AT_ONCE]] == [0] * NOTICES_AT_ONCE
        assert [notice.suppressed for notice in ignored[NOTICES_AT_ONCE:]] == [195, *[199] * 8]
        records = [record for record in caplog.records if "ignored a frame" in record.getMessage()]
        assert [record.getMessage() for record in records] == list(map(str, ignored))
        assert "; 199 more frames of this kind were ignored since" in str(ignored[-1])
        statistics = realtime.statistics()
        assert (statistics.ignored, statistics.notices_dropped) == (2_000, 0)


async def test_each_kind_of_frame_has_a_limit_of_its_own(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        for _ in range(1_000):
            kadoa.newest.send_raw("null")
            kadoa.newest.send_raw('{"type":"control.new"}')
        kadoa.newest.send_raw('{"type":"news"}')
        await trio.sleep(1)
        kinds = [notice.kind for notice in found(realtime, FrameIgnored)]
        assert (kinds.count("malformed"), kinds.count("control"), kinds.count("unknown")) == (5, 5, 1)
        assert realtime.statistics().ignored == 2_001


async def test_after_a_quiet_time_frames_are_reported_at_once_again(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        for round_ in range(3):
            for _ in range(20):
                kadoa.newest.send_raw("null")
            await trio.sleep(NOTICES_AT_ONCE * NOTICE_INTERVAL)
            ignored = found(realtime, FrameIgnored)
            assert [notice.suppressed for notice in ignored] == [15 if round_ else 0, 0, 0, 0, 0]


async def test_pause_is_reported_once_until_admission_has_resumed(autojump_clock: Any, pair: Any) -> None:
    async with pair(limits=Limits(unsettled=10)) as (kadoa, realtime):
        kadoa.publish_many(200)
        events = realtime.events
        for _ in range(150):  # a consumer that is behind: an event a second, and the next one takes its place
            await events.receive()
            await trio.sleep(1)
        (notice,) = found(realtime, AdmissionPaused)
        assert (notice.unsettled, notice.suppressed) == (10, 0)
        assert realtime.statistics().pauses == 1
        for _ in range(50):  # a consumer that is as fast as the reader may be behind and catch up several times
            await events.receive()
        events.settle()
        await trio.sleep(60)
        found(realtime, AdmissionPaused)
        before = realtime.statistics().pauses
        kadoa.publish_many(20)
        await trio.sleep(1)
        (notice,) = found(realtime, AdmissionPaused)
        assert realtime.statistics().pauses == before + 1


async def test_pauses_in_quick_succession_are_reported_at_a_limited_rate(autojump_clock: Any, pair: Any) -> None:
    async with pair(limits=Limits(unsettled=1)) as (kadoa, realtime):
        for _ in range(100):
            kadoa.publish_many(2)
            await trio.testing.wait_all_tasks_blocked()
            await realtime.events.receive()
            await realtime.events.receive()
            realtime.events.settle()
        assert realtime.statistics().pauses == 100
        assert len(found(realtime, AdmissionPaused)) == NOTICES_AT_ONCE
        await trio.sleep(NOTICE_INTERVAL)
        kadoa.publish_many(2)
        await trio.sleep(1)
        (notice,) = found(realtime, AdmissionPaused)
        assert notice.suppressed == 95


def test_publishing_raises_nothing_whatever_the_program_does(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_record: logging.LogRecord) -> bool:
        raise RuntimeError("a filter of the program")

    reporter = Reporter(lambda: NOW, clock=lambda: 0.0)
    log = logging.getLogger("kadoa_trio.client")
    log.addFilter(fail)
    try:
        reporter.publish(Lost(generation=1, how="reset"))
    finally:
        log.removeFilter(fail)
    assert len(found(reporter, Lost)) == 1
    reporter.close()
    reporter.publish(Lost(generation=2, how="reset"))
    assert not found(reporter, Lost)
    assert reporter.status.lost == 2


def test_texts_from_a_server_are_quoted_where_they_are_reported() -> None:
    odd = "\x1b[31m\n2026-01-01 ERROR forged" + "x" * 1_000
    for notice in (
        FrameIgnored(at=NOW, generation=1, kind="unknown", why="why", type=odd),
        AdmissionPaused(at=NOW, oldest=odd, unsettled=10),
    ):
        assert str(notice).isprintable()
        assert len(str(notice)) < 400


# ---- frames of a WebSocket -----------------------------------------------------------------------------------------


class Processing:
    """Counts what the WebSocket library handles, and the most that it handled between two turns of another task."""

    def __init__(self) -> None:
        self.total = self.since = self.most = 0

    def add(self, count: int, cost: int) -> None:
        self.total += count
        self.since += cost
        self.most = max(self.most, self.since)

    def count(self, events: Iterable[object]) -> Iterator[object]:
        for event in events:
            self.add(1, 1)
            yield event

    def take(self, piece: list[str | bytes] | Passed | Refused | None) -> list[str | bytes] | Passed | Refused | None:
        if isinstance(piece, list):
            self.add(
                len(piece), len(piece) // 4
            )  # each costs less than a quarter of what an event of the library costs
        return piece

    async def other_task(self) -> None:
        while True:
            self.since = 0
            await trio.lowlevel.checkpoint()


@pytest.fixture
def processing(monkeypatch: pytest.MonkeyPatch) -> Processing:
    processing, events = Processing(), wsproto.WSConnection.events
    monkeypatch.setattr(wsproto.WSConnection, "events", lambda self: processing.count(events(self)))
    take = FrameFilter.take
    monkeypatch.setattr(FrameFilter, "take", lambda self: processing.take(take(self)))
    return processing


# Trio runs the tasks of a batch in any order: another task may be first in one and last in the next. The end of the
# handshake counts as well.
TWO_PIECES = 2 * FRAMES_AT_ONCE + 1

FLOODS = {
    "empty fragments": (b"\x01\x00", b"\x00\x00", b"\x80\x03end"),
    "empty binary fragments": (b"\x02\x00", b"\x00\x00", b"\x80\x03end"),
    "pings": (b"", b"\x89\x00", b"\x81\x03end"),
    "pongs": (b"", b"\x8a\x00", b"\x81\x03end"),
    "empty messages": (b"", b"\x81\x00", b"\x81\x03end"),
    "empty binary messages": (b"", b"\x82\x00", b"\x81\x03end"),
    "short messages": (b"", b"\x81\x01x", b"\x81\x03end"),
    "tiny fragments": (b"\x01\x00", b"\x00\x01x", b"\x80\x03end"),
}


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("with_the_answer", [True, False])
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
async def test_flood_of_frames_lets_other_tasks_run(
    flood: str, with_the_answer: bool, line_end: bytes, processing: Processing
) -> None:
    first, repeated, last = FLOODS[flood]
    sent = first + repeated * 2_000 + last

    async def server(stream: trio.abc.Stream) -> None:
        head = upgrade(await read_head(stream)).replace(b"\r\n", line_end)
        # The client receives all of it at once, from the memory of the stream.
        for data in (head + sent,) if with_the_answer else (head, sent):
            await stream.send_all(data)
        async for _ in stream:
            with suppress(trio.BrokenResourceError):
                await stream.send_all(CLOSE_1000)  # leaving does not wait for the close timeout

    network = MemoryNetwork(server)
    with trio.fail_after(60):
        async with network.running(), network.open() as opened, trio.open_nursery() as nursery:
            nursery.start_soon(processing.other_task)
            message: str | bytes = ""
            while message[-3:] not in ("end", b"end"):
                message = await opened.receive()
            nursery.cancel_scope.cancel()
    assert processing.total > 2_000
    assert processing.most <= TWO_PIECES


async def test_flood_while_closing_lets_other_tasks_run(processing: Processing) -> None:
    async def server(stream: trio.abc.Stream) -> None:
        await accept(stream, frame(b"hello"))
        await stream.receive_some()  # the client's close frame
        await stream.send_all(b"\x81\x00" * 2_000 + CLOSE_1000)

    network = MemoryNetwork(server)
    with trio.fail_after(60):
        async with network.running(), trio.open_nursery() as nursery:
            nursery.start_soon(processing.other_task)
            async with network.open() as opened:
                assert await opened.receive() == "hello"
            nursery.cancel_scope.cancel()
    assert processing.total > 1_000
    assert processing.most <= TWO_PIECES


@pytest.mark.parametrize(("count", "delivered"), [(1_000, True), (1_001, False)])
@pytest.mark.parametrize("content", [b"", b"x"])
async def test_message_has_a_maximum_of_fragments(
    count: int, delivered: bool, content: bytes, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    monkeypatch.setattr("kadoa_trio._net._socket.MAX_FRAGMENTS", 1_000)
    middle = frame(content, 0, final=False) + b"\x89\x00"  # pings may come between, and are no fragments
    one = frame(b"", 1, final=False) + middle * (count - 2) + frame(b"", 0)
    network = MemoryNetwork(speak(one * 3, frame(b"end")))
    async with network.running(), network.open() as opened:
        with trio.fail_after(60):
            if delivered:
                for _ in range(3):
                    assert await opened.receive() == content.decode() * 998
                assert await opened.receive() == "end"
                return
            with pytest.raises(SocketEnded) as caught:
                await opened.receive()
    assert caught.value.end == End(EndReason.PROTOCOL, None, "a message of more than 1,000 fragments")
    network.assert_closed()


def test_maximum_of_fragments_leaves_room_for_the_largest_message() -> None:
    assert Limits().message_size / MAX_FRAGMENTS <= 512


async def test_client_gives_a_connection_up_that_sends_empty_fragments_for_ever(
    autojump_clock: Any, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kadoa_trio._net._socket.MAX_FRAGMENTS", 5_000)
    async with pair() as (kadoa, realtime):
        await trio.sleep(20)
        found(realtime, Notice)
        await kadoa.newest._stream.send_all(b"\x01\x00" + b"\x00\x00" * 20_000)
        with trio.fail_after(60):
            await kadoa.wait_subscribed(2)
        (lost,) = found(realtime, Lost)
        assert "a message of more than 5,000 fragments" in lost.how


async def test_flood_of_empty_messages_is_no_life(autojump_clock: Any, pair: Any) -> None:
    async with pair(timeouts=Timeouts(heartbeat=20)) as (kadoa, realtime):
        await trio.sleep(5)
        found(realtime, Notice)
        kadoa.faults = Faults(no_heartbeats=True)
        connection = kadoa.newest
        began = trio.current_time()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while trio.current_time() < began + 100 and connection.open:
                await connection._stream.send_all(b"\x81\x00" * 10)
                await trio.sleep(0.1)
        (lost,) = found(realtime, Lost)
        assert "Timeouts.heartbeat" in lost.how
        assert trio.current_time() - began < 25


async def test_empty_messages_do_not_make_a_connection_live(autojump_clock: Any) -> None:
    async with (
        open_simulated_kadoa(heartbeat_interval=1_000) as kadoa,
        open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime,
    ):
        await kadoa.wait_subscribed(1)
        await kadoa.newest._stream.send_all(b"\x81\x00" * 10)
        await trio.sleep(1)
        assert realtime.state is State.CONNECTING


async def test_empty_fragments_and_pings_do_not_hold_the_heartbeat_off(autojump_clock: Any, pair: Any) -> None:
    for sent in (b"\x00\x00" * 600, b"\x89\x00" * 600, (b"\x8a\x7d" + bytes(125)) * 10):
        async with pair() as (kadoa, realtime):
            await trio.sleep(20)
            found(realtime, Notice)
            kadoa.faults = Faults(no_heartbeats=True)
            await kadoa.newest._stream.send_all(b"\x01\x00")
            began = trio.current_time()
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while trio.current_time() < began + 200:
                    await kadoa.newest._stream.send_all(sent)
                    await trio.sleep(5)
                    if kadoa.newest.number > 1:
                        break
            (lost,) = found(realtime, Lost)
            assert "Timeouts.heartbeat" in lost.how
            assert trio.current_time() - began < 40


@pytest.mark.parametrize("body", [b"1\r\nx\r\n" * 20_000, b"x" * 200_000])
async def test_refusal_is_read_in_small_pieces_and_up_to_a_limit(body: bytes, processing: Processing) -> None:
    chunked = b"Transfer-Encoding: chunked" if body.startswith(b"1") else b"Content-Length: 10000000"
    taken = 0

    async def server(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 503 Busy\r\n" + chunked + b"\r\n\r\n" + body)
        await trio.sleep_forever()

    def count(data: bytes | bytearray) -> bytes | bytearray:
        nonlocal taken
        taken += len(data)
        return data

    network = MemoryNetwork(server, received=count)
    with trio.fail_after(60):
        async with network.running(), trio.open_nursery() as nursery:
            nursery.start_soon(processing.other_task)
            with pytest.raises(AttemptError, match="HTTP 503"):
                async with network.open():
                    pytest.fail("it opened")
            nursery.cancel_scope.cancel()
    assert processing.most < 1_000
    assert taken <= 40_000
