"""Several workers, each event to one of them; goes on where it stood, and ends in order."""

import signal

import trio

from kadoa_trio import EventChannel, Realtime, SQLiteCursorStore, open_realtime


async def work(events: EventChannel) -> None:
    async with events:
        while True:
            try:
                # Settled at the end of the block; back to the line if the block fails.
                async with events.delivery() as delivery:
                    print("attempt", delivery.attempt, "at", delivery.event)
            except trio.EndOfChannel:
                return


async def stop_at_sigterm(realtime: Realtime, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            realtime.stop()  # the workers finish what is buffered


async def main() -> None:
    store = SQLiteCursorStore("positions.db")
    async with open_realtime(cursor_store=store, consumer="workers") as realtime, trio.open_nursery() as nursery:
        await nursery.start(stop_at_sigterm, realtime)
        async with trio.open_nursery() as workers:
            for _ in range(4):
                workers.start_soon(work, realtime.events.clone())
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
