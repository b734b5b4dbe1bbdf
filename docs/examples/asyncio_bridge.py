"""Receive events in an asyncio program: Trio and the client run in a thread of their own."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import trio

from kadoa_trio import Event, SQLiteCursorStore, open_realtime

Item = tuple[Event, Callable[[], None]]
"""An event, and the function that marks the event as handled."""


async def receive_events(**options: Any) -> AsyncGenerator[Event, None]:
    """Yield events. Each turn of the loop marks the previous event as handled.

    The options are those of `open_realtime`. Errors of the client are raised here.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Item | None] = asyncio.Queue(2)  # one event, and None at the end
    started: Future[trio.lowlevel.TrioToken] = Future()
    scope = trio.CancelScope()

    async def receive() -> None:  # runs in Trio's thread
        token = trio.lowlevel.current_trio_token()
        started.set_result(token)
        with scope:
            async with open_realtime(**options) as realtime:
                async for event in realtime.events:
                    handled = trio.Event()
                    item = event, partial(token.run_sync_soon, handled.set)
                    loop.call_soon_threadsafe(queue.put_nowait, item)
                    await handled.wait()  # the next turn of this loop settles the event

    def stop(started: Future[trio.lowlevel.TrioToken]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            started.result().run_sync_soon(scope.cancel)

    # Not in asyncio's own executor, whose threads may all be busy.
    executor = ThreadPoolExecutor(1)
    thread = loop.run_in_executor(executor, trio.run, receive)
    executor.shutdown(wait=False)  # when the thread ends
    thread.add_done_callback(lambda _thread: queue.put_nowait(None))
    try:
        while (received := await queue.get()) is not None:
            event, mark_as_handled = received
            yield event
            mark_as_handled()
    finally:
        started.add_done_callback(stop)  # which never blocks this loop
        await thread  # waits until the last position is saved; raises the client's error, if there is one


async def main() -> None:
    events = receive_events(cursor_store=SQLiteCursorStore("positions.db"))
    async with contextlib.aclosing(events):
        async for event in events:
            print(event.type, event.id)


if __name__ == "__main__":
    asyncio.run(main())
