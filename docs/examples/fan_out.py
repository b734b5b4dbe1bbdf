"""Several listeners, each of which sees every event."""

import trio

from kadoa_trio import Event, open_realtime


async def count(events: trio.MemoryReceiveChannel[Event]) -> None:
    total = 0
    async for _ in events:
        total += 1
        print("so far:", total)


async def alert(events: trio.MemoryReceiveChannel[Event]) -> None:
    async for event in events:
        if event.type == "workflow_failed":
            print(event.workflow_id, "failed")


async def main() -> None:
    async with open_realtime() as realtime, trio.open_nursery() as nursery:
        listeners = []
        for listener in (count, alert):
            # Without a buffer, sending returns when the listener has received the event.
            send, receive = trio.open_memory_channel[Event](0)
            listeners.append(send)
            nursery.start_soon(listener, receive)
        async for event in realtime.events:
            for send in listeners:
                await send.send(event)
            # The next turn of the loop settles this event: all listeners have received it.


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
