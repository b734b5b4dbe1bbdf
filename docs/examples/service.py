"""A service: it handles the events of each workflow in order, resumes after a crash, and reports its health."""

from pathlib import Path

import trio

from kadoa_trio import Event, Realtime, open_realtime, process, stopping_on_signals


async def handle(event: Event) -> None:
    print(event.workflow_id, event.type, event.id)


def write_health(realtime: Realtime) -> None:
    health = realtime.health()
    Path("health").write_text("healthy\n" if health.healthy else f"{health}\n")


async def report_health(realtime: Realtime) -> None:
    while True:
        write_health(realtime)  # a supervisor reads this file, and looks at its age
        await trio.sleep(15)


async def main() -> None:
    async with (
        open_realtime(cursor_store="positions.db", consumer="service") as realtime,
        stopping_on_signals(realtime),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(report_health, realtime)
        # An event that fails is handled again after a wait. The later events of its workflow wait for it.
        await process(realtime.events, handle, key=lambda event: event.workflow_id)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
