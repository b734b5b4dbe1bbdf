"""A program and a simulated Kadoa with a fault, on virtual time."""

import trio
import trio.testing

from kadoa_trio import open_realtime
from kadoa_trio.testing import open_simulated_kadoa


async def main() -> list[str]:
    handled = []
    async with open_simulated_kadoa() as kadoa, open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime:
        await kadoa.wait_subscribed(1)
        kadoa.publish("workflow_failed")
        handled.append((await realtime.events.receive()).type)
        await trio.sleep(3600)
        kadoa.newest.reset()
        kadoa.publish("workflow_recovered")
        handled.append((await realtime.events.receive()).type)
    return handled


if __name__ == "__main__":
    print(
        trio.run(
            main, clock=trio.testing.MockClock(autojump_threshold=0), restrict_keyboard_interrupt_to_checkpoints=True
        )
    )
