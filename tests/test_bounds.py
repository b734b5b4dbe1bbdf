"""What a server can make the client keep, log and do has a limit, whatever it sends.

Work is counted (calls, frames, scheduler steps, bytes), never timed.
"""

from __future__ import annotations

import itertools
import json
import logging
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
import trio.testing
from _receiving import receiving

from kadoa_trio import AdmissionPaused, FrameIgnored, Lost, Notice, Realtime, Retrying
from kadoa_trio._ledger import RECENT_IDS
from kadoa_trio._notices import MAX_NOTICE_TEXT, MAX_NOTICES, NOTICE_INTERVAL, NOTICES_AT_ONCE, Draining, Reporter
from kadoa_trio._wire import Ignored, decode

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
            reporter.publish(kind, **values)
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
            for _ in range(100):
                kadoa.newest.send_raw("null")
            await trio.sleep(1)
        ignored = found(realtime, FrameIgnored)
        assert len(ignored) == NOTICES_AT_ONCE + 99 // NOTICE_INTERVAL
        assert [notice.suppressed for notice in ignored[:NOTICES_AT_ONCE]] == [0] * NOTICES_AT_ONCE
        assert [notice.suppressed for notice in ignored[NOTICES_AT_ONCE:]] == [995, *[999] * 8]
        records = [record for record in caplog.records if "ignored a frame" in record.getMessage()]
        assert [record.getMessage() for record in records] == list(map(str, ignored))
        assert "; 999 more frames of this kind were ignored since" in str(ignored[-1])
        statistics = realtime.statistics()
        assert (statistics.ignored, statistics.notices_dropped) == (10_000, 0)


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
    async with pair(max_unsettled=10) as (kadoa, realtime):
        kadoa.publish_many(200)
        events = realtime.events
        for _ in range(150):  # a consumer that is behind: an event a second, and the next one takes its place
            await events.receive()
            await trio.sleep(1)
        (notice,) = found(realtime, AdmissionPaused)
        assert (notice.unsettled, notice.suppressed) == (10, 0)
        assert realtime.statistics().pauses == 1
        for _ in range(50):
            await events.receive()
        events.settle()
        kadoa.publish_many(20)
        await trio.sleep(1)
        (notice,) = found(realtime, AdmissionPaused)
        assert realtime.statistics().pauses == 2


async def test_pauses_in_quick_succession_are_reported_at_a_limited_rate(autojump_clock: Any, pair: Any) -> None:
    async with pair(max_unsettled=1) as (kadoa, realtime):
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
        reporter.publish(Lost, generation=1, how="reset")
    finally:
        log.removeFilter(fail)
    assert len(found(reporter, Lost)) == 1
    reporter.close()
    reporter.publish(Lost, generation=2, how="reset")
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
