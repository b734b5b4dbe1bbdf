"""A service with several workers. It resumes where its last run stopped, and shuts down in order."""

import signal

import trio

from kadoa_trio import EventChannel, Realtime, SQLiteCursorStore, open_realtime


async def work(events: EventChannel) -> None:
    async with events:
        while True:
            try:
                # The end of the block settles the event. If the block fails, the event is delivered again.
                async with events.delivery() as delivery:
                    print("attempt", delivery.attempt, "at", delivery.event)
            except trio.EndOfChannel:
                return


async def stop_at_sigterm(realtime: Realtime, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            realtime.stop()  # the workers handle the buffered events


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
