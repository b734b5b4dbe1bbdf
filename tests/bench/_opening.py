"""How long the first client takes to open: a script for a fresh process, which imports nothing before the clocks run.

``python -P _opening.py FOLDER PORT``: FOLDER holds the package, PORT is the server's.
"""

import sys
import time

began, began_cpu = time.perf_counter(), time.process_time()
sys.path.insert(0, sys.argv[1])

import trio  # noqa: E402

from kadoa_trio import Endpoints, open_realtime  # noqa: E402

imported, imported_cpu = time.perf_counter(), time.process_time()


async def main() -> list[tuple[float, float]]:
    """Open two clients, one after the other; return how long each took, on both clocks."""
    http = f"http://127.0.0.1:{sys.argv[2]}"
    endpoints = Endpoints(public_api=http, websocket=f"ws://127.0.0.1:{sys.argv[2]}/idle", realtime_api=http)
    taken = []
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        async with open_realtime("key", endpoints=endpoints):
            taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return taken


(first, first_cpu), (second, second_cpu) = trio.run(main)

import json  # noqa: E402

print(
    json.dumps(
        {
            "import": imported - began,
            "import_cpu": imported_cpu - began_cpu,
            "first": first,
            "first_cpu": first_cpu,
            "second": second,
            "second_cpu": second_cpu,
        }
    )
)
