"""A service that reports its state: alerts from notices and from its health, metrics from statistics."""

import logging

import trio

from kadoa_trio import Realtime, open_realtime, stopping_on_signals
from kadoa_trio.notices import Failed, Lost, PossibleGap

PATIENCE = 120.0
"""Maximum time without health before an alert, in seconds. Single lost connections are normal."""


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
                pass  # watch_health() reports outages
            case _ if notice.level >= logging.ERROR:
                await alert(str(notice))


async def watch_health(realtime: Realtime) -> None:
    healthy_at = trio.current_time()
    while True:
        health = realtime.health()
        if health.healthy:
            healthy_at = trio.current_time()
        elif trio.current_time() - healthy_at >= PATIENCE:
            await alert(f"not healthy for {PATIENCE:.0f} s: {health}")
        await trio.sleep(10)


async def print_metrics(realtime: Realtime) -> None:
    while True:
        health, client, channel = realtime.health(), realtime.statistics(), realtime.events.statistics()
        print(
            f"live={int(health.live)} received={client.received} settled={client.settled}"
            f" redelivered={client.redelivered} dead={client.dead} buffered={channel.buffered_events}"
            f" unsettled={channel.unsettled} oldest_unsettled_age={health.oldest_unsettled_age or 0:.0f}"
            f" unsaved={client.unsaved} lost={client.lost} gaps={client.gap_count} save_failures={client.save_failures}"
        )
        await trio.sleep(15)


async def main() -> None:
    async with open_realtime() as realtime, stopping_on_signals(realtime), trio.open_nursery() as nursery:
        for task in (watch_notices, watch_health, print_metrics):
            nursery.start_soon(task, realtime)
        async for event in realtime.events:
            print(event.type, event.id)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
