"""A program that gets killed: it writes each event's id to a file before it asks for the next one.

Arguments: the file, and that of the cursor store. At SIGTERM it ends in an orderly way.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import trio

from kadoa_trio import Endpoints, RetryPolicy, SQLiteCursorStore, open_realtime


async def main(effects: Path, store: Path) -> None:
    async with (
        open_realtime(
            endpoints=Endpoints.from_environment(),
            cursor_store=SQLiteCursorStore(store),
            stable_after=0.2,
            retry=RetryPolicy(first=0.05, initial=0.05, maximum=0.2, attempts_per_minute=600),
        ) as realtime,
        trio.open_nursery() as nursery,
    ):

        async def stop_at_sigterm(*, task_status: trio.TaskStatus[None]) -> None:
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                task_status.started()
                async for _ in signals:
                    realtime.stop()
                    return

        await nursery.start(stop_at_sigterm)
        with effects.open("ab", buffering=0) as file:
            async for event in realtime.events:
                file.write(event.id.encode() + b"\n")  # the effect
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]))
