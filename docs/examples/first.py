"""Print every event."""

import trio

from kadoa_trio import WorkflowFailed, open_realtime


async def main() -> None:
    async with open_realtime() as realtime:
        async for event in realtime.events:
            match event.message:
                case WorkflowFailed(workflow_id=workflow, reason=reason):
                    print(workflow, "failed:", reason)
                case other:
                    print(event.type, other)


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
