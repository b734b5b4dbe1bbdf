"""A service with several workers. It resumes where its last run stopped, and ends in order at SIGTERM and Ctrl-C."""

import trio

from kadoa_trio import EventChannel, open_realtime, stopping_on_signals


async def work(events: EventChannel) -> None:
    async with events:
        async for delivery in events.deliveries():
            # The end of the block settles the event. If the block fails, the event is delivered again.
            async with delivery:
                print("attempt", delivery.attempt, "at", delivery.event)


async def main() -> None:
    async with (
        open_realtime(cursor_store="positions.db", consumer="workers") as realtime,
        stopping_on_signals(realtime),
        trio.open_nursery() as nursery,
    ):
        for _ in range(4):
            nursery.start_soon(work, realtime.events.clone())


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
