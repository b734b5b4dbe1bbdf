"""``kadoa-trio forward``: post every event to a webhook endpoint, or post dead letters again."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from .._forward import Forwarder, open_forwarder
from ._listen import Source, follow
from ._output import say


async def forward(
    source: Source, url: str, *, timeout: float, max_attempts: int | None, dead_letters: str, limit: int | None
) -> int:
    """Post events to *url* until cancelled or *limit* is reached."""
    async with _open(url, timeout, max_attempts, dead_letters) as forwarder:
        try:
            await follow(source, limit, forwarder.forward)
        finally:
            say(f"{forwarder.delivered} delivered, {forwarder.dead} dead letters, {forwarder.failures} failed attempts")
    if forwarder.dead:
        say(f"`kadoa-trio forward --replay {dead_letters} URL` posts the dead letters again")
    return 0


async def replay(file: str, url: str, *, timeout: float, max_attempts: int | None) -> int:
    """Post dead letters again; the exit code is 1 if some could not be delivered."""
    async with _open(url, timeout, max_attempts, file) as forwarder:
        done = await forwarder.replay(file)
    unreadable = f", {done.unreadable} of them unreadable" if done.unreadable else ""
    say(f"{done.delivered} delivered, {done.remaining} left in {file}{unreadable}")
    return 1 if done.remaining else 0


def _open(
    url: str, timeout: float, max_attempts: int | None, dead_letters: str
) -> AbstractAsyncContextManager[Forwarder]:
    return open_forwarder(
        url,
        timeout=timeout,
        max_attempts=max_attempts,
        dead_letters=dead_letters,
        on_failure=lambda failed: say(str(failed)),
    )
