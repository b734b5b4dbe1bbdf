"""A program that gets killed: it writes each event's id to a file before it asks for the next one.

Arguments: the file, and that of the cursor store. At SIGTERM it ends in an orderly way.

For each line on stdin it starts such a process, by forking: importing the
library anew takes longer than what is tested. It writes the number of each
process, and ``ended`` when that is over. At the end of stdin it kills the
process and ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import traceback
from pathlib import Path

import httpx  # noqa: F401  # imported at its first use otherwise, by each process
import trio

from kadoa_trio import Endpoints, RetryPolicy, SQLiteCursorStore, Timeouts, open_realtime


async def main(effects: Path, store: Path) -> None:
    async with (
        open_realtime(
            endpoints=Endpoints.from_environment(),
            cursor_store=SQLiteCursorStore(store),
            timeouts=Timeouts(stable_after=0.2),
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


def consume() -> None:
    # Inherited from a script's background, SIGINT would be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        trio.run(main, Path(sys.argv[1]), Path(sys.argv[2]), restrict_keyboard_interrupt_to_checkpoints=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    while os.read(0, 1):
        child = os.fork()
        if not child:
            consume()
        print(child, flush=True)
        while not os.waitpid(child, os.WNOHANG)[0]:
            if select.select([0], [], [], 0.005)[0]:
                # Nothing is sent while a process runs: the test has ended.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                return
        print("ended", flush=True)


if __name__ == "__main__":
    serve()
