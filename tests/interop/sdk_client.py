"""Kadoa's official Python SDK, used as in its documentation: prints a JSON line for each callback."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from kadoa_sdk import KadoaClient, KadoaClientConfig


def report(kind: str, value: Any) -> None:
    print(json.dumps({kind: value}), flush=True)


async def main() -> None:
    client = KadoaClient(KadoaClientConfig())  # key and endpoints come from the environment
    realtime = await client.connect_realtime({"heartbeat_interval": 200, "reconnect_delay": 300})
    realtime.on_event(lambda event: report("event", event))
    realtime.on_connection(lambda connected, _reason=None: report("connected", connected))
    realtime.on_error(lambda error: report("error", str(error)))
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await realtime.close_async()


asyncio.run(main())
