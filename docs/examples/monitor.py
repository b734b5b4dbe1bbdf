"""A service that reports its state: alerts from notices, metrics from statistics."""

import logging

import trio

from kadoa_trio import Realtime, open_realtime
from kadoa_trio.notices import Failed, Lost, PossibleGap, State

MAX_OUTAGE = 120.0
"""Maximum outage without an alert, in seconds. Single lost connections are normal."""


async def alert(text: str) -> None:
    print("ALERT", text)
    await trio.lowlevel.checkpoint()


async def watch_notices(realtime: Realtime) -> None:
    async for notice in realtime.notices:
        match notice:
            case PossibleGap():
                await alert(str(notice))
            case Failed():
                await alert(str(notice))
            case Lost():
                pass  # watch_state() reports outages
            case _ if notice.level >= logging.ERROR:
                await alert(str(notice))


async def watch_state(realtime: Realtime) -> None:
    while True:
        with trio.move_on_after(MAX_OUTAGE) as waiting:
            await realtime.wait_live()
        if waiting.cancelled_caught:
            await alert(f"no connection to Kadoa for {MAX_OUTAGE:.0f} s")
        await trio.sleep(10)


async def print_metrics(realtime: Realtime) -> None:
    while True:
        client, channel = realtime.statistics(), realtime.events.statistics()
        print(
            f"live={int(client.state in (State.LIVE, State.REPLACING))} received={client.received}"
            f" buffered={channel.buffered_events} unsettled={channel.unsettled} unsaved={client.unsaved}"
            f" lost={client.lost} gaps={client.gap_count} save_failures={client.save_failures}"
        )
        await trio.sleep(15)


async def main() -> None:
    async with open_realtime() as realtime, trio.open_nursery() as nursery:
        for task in (watch_notices, watch_state, print_metrics):
            nursery.start_soon(task, realtime)
        async for event in realtime.events:
            print(event.type, event.id)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
