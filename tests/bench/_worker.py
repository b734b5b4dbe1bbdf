"""The process in which one thing is measured: ``python -m tests.bench._worker TASK`` prints the result as JSON.

A task is ``{"package": folder or null, "servers": ..., "what": name, "patience": seconds, ...}``; see `LOOPS`.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from . import _loops
from ._loops import Servers, Unavailable
from ._server import Feed

LOOPS: Final[Mapping[str, Callable[[Servers, Feed], Awaitable[dict[str, Any]]]]] = {
    "bare": _loops.bare,
    "bare, TLS": functools.partial(_loops.bare, tls=True),
    "events": _loops.events,
    "events, TLS": functools.partial(_loops.events, tls=True),
    "events, SQLite": functools.partial(_loops.events, store=True),
    "events, acknowledged": functools.partial(_loops.events, acknowledge=True),
    "typed": _loops.typed,
    "workers": _loops.workers,
    "batches": _loops.batches,
    "process": _loops.processed,
}
"""What receives a feed in Trio, by name."""

SILENCED: Final = "official, silenced"


def do(task: dict[str, Any]) -> dict[str, Any]:
    """Do a task, and return its result, or the reason why it cannot be done."""
    options = dict(task)
    package = options.pop("package")
    if package is not None:
        sys.path.insert(0, package)
    what, patience = options.pop("what"), options.pop("patience")
    servers, feed = Servers(**options.pop("servers")), Feed(**options.pop("feed", {}))
    try:
        # Imported where they are used: some of them import the client, and the bare loop does without.
        if what.startswith("official"):
            return _loops.official(servers, feed, silenced=what == SILENCED)
        import trio

        async def measure() -> dict[str, Any]:
            with trio.fail_after(patience):
                return await _measure(what, servers, feed, options)

        return trio.run(measure)
    except Unavailable as exc:
        return {"skipped": str(exc)}


async def _measure(what: str, servers: Servers, feed: Feed, options: dict[str, Any]) -> dict[str, Any]:
    match what:
        case "idle":
            from ._idle import idle

            return await idle(servers, **options)
        case "stages":
            from ._stages import stages

            return await stages(servers, feed)
        case "memory":
            return await _loops.memory(servers, feed)
        case "acknowledged":
            return await _loops.acknowledged(servers, feed, **options)
    return await LOOPS[what](servers, feed)


if __name__ == "__main__":
    print(json.dumps(do(json.loads(sys.argv[1]))))
