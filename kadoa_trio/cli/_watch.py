"""``kadoa-trio watch``: the board, live, in the whole terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import click
import trio
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from .._client import Realtime, open_realtime
from .._redact import revealed
from ._board import Board
from ._listen import Source
from ._output import NoticePrinter, Summary

_REFRESH = 0.25


class Picture:
    """The board as an object that rich can print, in the current size of the terminal."""

    def __init__(self, board: Board, realtime: Realtime, *, height: int | None = None) -> None:
        self._board = board
        self._realtime = realtime
        self._height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = self._height or options.height or console.size.height
        yield from self._board.lines(self._realtime, trio.current_time(), options.max_width, height)


async def watch(source: Source) -> int:
    """Show a client until cancelled. An event is settled when it is shown."""
    if not sys.stdout.isatty():
        raise click.UsageError("watch needs a terminal; `kadoa-trio listen` writes to pipes and files")
    summary = Summary()
    printer = NoticePrinter()
    async with open_realtime(revealed(source.api_key), on_notice=printer, **source.options()) as realtime:  # type: ignore[arg-type]  # see options()
        printer.stop()  # the board shows them from here on
        board = Board(trio.current_time())
        try:
            async with drawing(board, realtime, screen=True), trio.open_nursery() as nursery:
                nursery.start_soon(follow_notices, board, realtime)
                async for event in realtime.events:
                    board.event(event, trio.current_time(), time.time())
                    summary.events += 1
                nursery.cancel_scope.cancel(reason="the stream has ended")
        finally:
            summary.say(realtime)
    return 0


async def follow_notices(board: Board, realtime: Realtime) -> None:
    """Record the notices of a client."""
    async for notice in realtime.notices:
        board.notice(notice, trio.current_time())


@asynccontextmanager
async def drawing(board: Board, realtime: Realtime, *, screen: bool, height: int | None = None) -> AsyncIterator[None]:
    """Draw the board four times a second for the duration of a block, then restore the terminal."""
    picture = Picture(board, realtime, height=height)
    with _live(picture, screen=screen) as live:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_refresh, live)
            yield
            nursery.cancel_scope.cancel(reason="the block has ended")
        live.refresh()


@contextmanager
def _live(picture: Picture, *, screen: bool) -> Iterator[Live]:
    # Without rich's own thread, which would read the client while it changes.
    with Live(picture, console=Console(), screen=screen, auto_refresh=False, redirect_stdout=False) as live:
        yield live


async def _refresh(live: Live) -> None:
    while True:
        live.refresh()
        await trio.sleep(_REFRESH)
