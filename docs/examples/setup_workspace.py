"""Configure a workspace to send events to realtime clients."""

import trio

from kadoa_trio.workspace import apply_plan, open_notifications, plan_streaming


async def main() -> None:
    async with open_notifications() as notifications:
        plan = await plan_streaming(notifications, ["workflow_failed", "workflow_finished"])
        for step in plan.steps:
            print("will", step)
        for warning in plan.warnings:
            print("but", warning)
        await apply_plan(notifications, plan)


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
