"""Receive only the events of one type and of two workflows."""

import trio

from kadoa_trio import WorkflowFailed, open_realtime


async def main() -> None:
    async with open_realtime(event_types={"workflow_failed"}, workflow_ids={"wf_123", "wf_124"}) as realtime:
        async for event in realtime.events:
            match event.message:
                case WorkflowFailed(reason=reason):
                    print(event.workflow_id, "failed:", reason)


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
