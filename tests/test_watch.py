"""The full-screen view: in real pseudo-terminals of several sizes, and its parts without a terminal."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

import pytest
import trio

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are Unix's", allow_module_level=True)

from _terminal import terminal

from kadoa_trio.cli._board import Board
from kadoa_trio.testing import open_simulated_kadoa


@pytest.mark.sockets
@pytest.mark.parametrize(("columns", "lines"), [(120, 40), (40, 10), (10, 2)])
async def test_watch_fits_every_size_and_restores_the_terminal(columns: int, lines: int) -> None:
    async with (
        open_simulated_kadoa(loopback=True, heartbeat_interval=0.2) as kadoa,
        terminal(["watch"], kadoa.environment, columns=columns, lines=lines) as one,
    ):
        await kadoa.wait_subscribed(1)
        shown = await one.wait(lambda text: " LIVE " in text)
        assert len(shown.splitlines()) <= lines
        assert b"\x1b[?1049h" in one.raw  # the alternate screen
        one.press_ctrl_c()
        assert await one.process_ended() == 130
        await one.drained()
        assert one.raw.rstrip().count(b"\x1b[?1049l") == 1
        assert b"\x1b[?25h" in one.raw  # the cursor is visible again
        assert b"Traceback" not in one.raw
        assert kadoa.api_key.encode() not in one.raw


@pytest.mark.sockets
async def test_watch_shows_what_happens_and_follows_the_window() -> None:
    async with (
        open_simulated_kadoa(loopback=True, heartbeat_interval=0.2) as kadoa,
        terminal(["watch"], kadoa.environment, columns=100, lines=30) as one,
    ):
        await kadoa.wait_subscribed(1)
        for _ in range(3):
            kadoa.publish("workflow_failed", workflow_id="wf_42", timestamp=datetime.now(UTC))
        kadoa.newest.drain(100, close_after=1.0)
        await kadoa.wait_subscribed(2)
        shown = await one.wait(lambda text: "replaced by connection 2" in text and "REPLACING" not in text)
        assert "3 events" in shown
        assert shown.count("wf_42") == 3
        assert "latency" in shown
        assert "2 connections, 1 drains, 0 lost" in shown
        assert "▒" in shown  # the overlap, above the row of the replacement
        one.resize(60, 12)
        shown = await one.wait(lambda text: " LIVE " in text and "…" in text)
        assert all(len(line) <= 60 for line in shown.splitlines())
        one.press_ctrl_c()
        assert await one.process_ended() == 130


@pytest.mark.sockets
async def test_watch_respects_no_color() -> None:
    async with (
        open_simulated_kadoa(loopback=True, heartbeat_interval=0.2) as kadoa,
        terminal(["watch"], {**kadoa.environment, "NO_COLOR": "1"}) as one,
    ):
        await one.wait(lambda text: " LIVE " in text)
        for colour in range(30, 38):
            assert f"\x1b[{colour}m".encode() not in one.raw
            assert f";{colour}m".encode() not in one.raw


@pytest.mark.sockets
async def test_demo_draws_in_a_terminal_and_is_perfect() -> None:
    async with terminal(["demo", "--seconds", "6"], {}, columns=100, lines=44) as one:
        shown = await one.wait(lambda text: "PERFECT" in text)
        assert await one.process_ended() == 0
        assert "lost          0" in shown


async def test_board_survives_any_size(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        board = Board(trio.current_time())
        await trio.sleep(5)
        kadoa.publish_many(40)
        for _ in range(40):
            board.event(await realtime.events.receive(), trio.current_time(), 0.0)
        kadoa.newest.drain(100, close_after=1)
        await trio.sleep(200)
        kadoa.newest.reset()
        await trio.sleep(20)
        while True:
            try:
                board.notice(realtime.notices.receive_nowait(), trio.current_time())
            except trio.WouldBlock:
                break
        for width in (1, 7, 20, 33, 80, 200):
            for height in (1, 2, 3, 5, 8, 13, 24, 60):
                lines = board.lines(realtime, trio.current_time(), width, height)
                assert len(lines) == height
                assert all(line.cell_len <= width for line in lines)
        text = "\n".join(str(line) for line in board.lines(realtime, trio.current_time(), 80, 30))
        assert "40 events" in text
        assert "lost (broken" in text


async def test_boards_memory_is_bounded(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        board = Board(trio.current_time())
        kadoa.publish()
        event = await realtime.events.receive()
        for second in range(5_000):
            board.event(event, float(second), 0.0)
        assert len(board.events) <= 200
        assert len(board.arrivals) <= 130  # two minutes at one a second
        assert board.total == 5_000
