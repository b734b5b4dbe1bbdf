"""A service that resumes where its last run stopped, however that run ended."""

import signal

import trio

from kadoa_trio import Realtime, SQLiteCursorStore, open_realtime


async def stop_at_sigterm(realtime: Realtime, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            realtime.stop()  # the buffered events are still handled


async def main() -> None:
    async with (
        open_realtime(cursor_store=SQLiteCursorStore("positions.db"), consumer="prices") as realtime,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(stop_at_sigterm, realtime)
        async for event in realtime.events:
            print(event.type, event.id)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
