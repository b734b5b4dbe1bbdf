"""Post each failure to a chat. What the chat refuses is posted again, and after ten attempts put into a file."""

import os
from functools import partial

import httpx
import trio

from kadoa_trio import DeadLetterFile, Event, RetryPolicy, WorkflowFailed, open_realtime, process, stopping_on_signals


async def notify(chat: httpx.AsyncClient, event: Event) -> None:
    reason = event.message.reason if isinstance(event.message, WorkflowFailed) else "unknown"
    text = f"{event.workflow_id} has failed: {reason}"
    answer = await chat.post(os.environ["CHAT_WEBHOOK_URL"], json={"text": text})
    if not answer.is_success:  # not raise_for_status(), because its text holds the URL, which is a secret
        raise OSError(f"the chat answered {answer.status_code}")


async def main() -> None:
    types = ["workflow_failed"]
    async with (
        httpx.AsyncClient() as chat,
        open_realtime(event_types=types, cursor_store="positions.db", consumer="notifier") as realtime,
        stopping_on_signals(realtime),
    ):
        await process(
            realtime.events,
            partial(notify, chat),
            retry=RetryPolicy(
                initial=1.0, maximum=60.0
            ),  # waits up to 1 s, 2 s, 4 s ... 60 s: about two minutes in all
            max_attempts=10,
            dead_letters=DeadLetterFile("dead-letters.jsonl"),
        )


if __name__ == "__main__":
    trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
