"""The consumer of test_crashes.py: it writes the id of each event to a file before it asks for the next one.

Arguments: the path of that file, and the path of the cursor store. On SIGTERM
it stops and ends.

This process is the starter. For each line on stdin it forks a consumer,
because importing the library in a new process takes longer than the test of
one kill. It writes the process id of each consumer, and ``ended`` when the
consumer has ended. At the end of stdin it kills the consumer and ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import traceback
from pathlib import Path

import httpx  # noqa: F401  # here, or each process would import it at its first use
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
    # A script's background process inherits that SIGINT is ignored.
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
                # The test sends nothing while a process runs, so this is the end of stdin.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                return
        print("ended", flush=True)


if __name__ == "__main__":
    serve()
