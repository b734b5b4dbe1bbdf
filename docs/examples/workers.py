"""Several workers, each event to one of them, and an orderly end."""

import signal

import trio

from kadoa_trio import EventChannel, Realtime, open_realtime


async def work(events: EventChannel) -> None:
    async with events:
        while True:
            try:
                # Settled at the end of the block; back to the line if the block fails.
                async with events.delivery() as delivery:
                    print("attempt", delivery.attempt, "at", delivery.event)
            except trio.EndOfChannel:
                return


async def stop_at_sigterm(realtime: Realtime) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            realtime.stop()  # the workers finish what is buffered
            return


async def main() -> None:
    async with open_realtime() as realtime, trio.open_nursery() as nursery:
        nursery.start_soon(stop_at_sigterm, realtime)
        async with trio.open_nursery() as workers:
            for _ in range(4):
                workers.start_soon(work, realtime.events.clone())
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
