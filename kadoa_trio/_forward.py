"""Posts events to a webhook endpoint, one after the other, until each one is taken.

For webhook code behind a firewall: what it is sent has the shape of Kadoa's
own webhooks, the envelope with its payload under ``data``, and the event type
in the header ``X-Kadoa-Event``.
"""

from __future__ import annotations

import json
import os
import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final
from urllib.parse import urlsplit

import attrs
import trio

from ._backoff import Backoff, RetryPolicy
from ._errors import AttemptError, ConfigurationError, DeadLetterError
from ._events import Event, parse_json
from ._http import HttpClient, iso, open_webhooks
from ._settings import Settings, is_loopback

_REPLAYING: Final = ".replaying"
_DONE: Final = ".replayed"


@final
@attrs.frozen(kw_only=True)
class FailedForward:
    """One attempt to post an event failed."""

    event_id: str
    event_type: str
    attempt: int
    """Which one it was, from 1."""
    why: str
    delay: float | None
    """When it is tried again, in seconds; None if it was put aside as a dead letter."""

    def __str__(self) -> str:
        then = "put aside" if self.delay is None else f"again in {self.delay:.2f} s"
        return f"{self.event_type} {self.event_id}: attempt {self.attempt} failed ({self.why}); {then}"


@final
@attrs.frozen(kw_only=True)
class Replayed:
    """What became of a file of dead letters."""

    delivered: int
    remaining: int
    """Letters that are in the file again."""
    unreadable: int = 0
    """Of these, lines that are no dead letter."""


@final
class Forwarder:
    """Posts events to one endpoint. Made by `open_forwarder`.

    Used by one task at a time, so that events keep their order.
    """

    def __init__(
        self,
        http: HttpClient,
        url: str,
        *,
        timeout: float,
        policy: RetryPolicy,
        max_attempts: int | None,
        dead_letters: Path | None,
        on_failure: Callable[[FailedForward], None] | None,
    ) -> None:
        self._http = http
        self._url = url
        self._timeout = timeout
        self._backoff = Backoff(policy, random.Random())
        self._max_attempts = max_attempts
        self._dead_letters = dead_letters
        self._on_failure = on_failure
        self.delivered: int = 0
        """Events that the endpoint took."""
        self.dead: int = 0
        """Events that were put aside."""
        self.failures: int = 0
        """Attempts that failed."""

    def __repr__(self) -> str:
        return f"<Forwarder to {_without_query(self._url)}>"

    async def forward(self, event: Event) -> bool:
        """Post an event until a 2xx answers it, or it is put aside. Cancellation leaves it undecided.

        Returns:
            Whether the endpoint took it; False if it is a dead letter now.

        Raises:
            DeadLetterError: it could not be put aside.
        """
        return await self._deliver(webhook_body(event), self._max_attempts, self._dead_letters)

    async def replay(self, path: str | os.PathLike[str]) -> Replayed:
        """Post the dead letters of a file again, in its order; what fails again stays in it.

        Each gets ``max_attempts``, one if none was given. New letters may be
        added to the file meanwhile. After a crash in the middle the next
        replay goes on with what is left, and at most one letter is sent twice.

        Raises:
            DeadLetterError: the file cannot be read or written.
        """
        file = Path(path)
        working, done = (file.with_name(file.name + ending) for ending in (_REPLAYING, _DONE))
        total = Replayed(delivered=0, remaining=0)
        if await _guarded(working.exists):
            # What an earlier replay has left comes first: it is older.
            total = await self._replay_one(working, done, file)
            if not await _guarded(file.exists):
                return total
        await _guarded(_set_aside, file, working, done)
        newer = await self._replay_one(working, done, file)
        return Replayed(
            delivered=total.delivered + newer.delivered, remaining=newer.remaining, unreadable=newer.unreadable
        )

    async def _replay_one(self, working: Path, done: Path, failed: Path) -> Replayed:
        delivered = remaining = unreadable = number = 0
        skip = await _guarded(_read_count, done)
        letters = await _guarded(lambda: working.open(encoding="utf-8", errors="surrogateescape"))
        try:
            while line := await _guarded(letters.readline):
                number += 1
                if number <= skip or not line.strip():
                    continue
                body = _letter(line)
                if body is None:
                    unreadable += 1
                    await _guarded(_append, failed, line.rstrip("\n"))
                elif await self._deliver(body, self._max_attempts or 1, failed):
                    delivered += 1
                else:
                    remaining += 1
                # What is done is not done again after a crash.
                await _guarded(_write_count, done, number)
        finally:
            letters.close()
        await _guarded(_forget, working, done)
        return Replayed(delivered=delivered, remaining=remaining + unreadable, unreadable=unreadable)

    async def _deliver(self, body: dict[str, Any], limit: int | None, dead_letters: Path | None) -> bool:
        content = json.dumps(body, separators=(",", ":")).encode()
        attempt = 0
        while True:
            attempt += 1
            retry_after: float | None = None
            try:
                await self._http.post(self._url, str(body["eventType"]), content, self._timeout)
            except AttemptError as exc:
                why, retry_after = exc.reason, exc.retry_after
            else:
                self._backoff.stable()
                self.delivered += 1
                return True
            self.failures += 1
            self._backoff.failed()
            last = limit is not None and attempt >= limit
            delay = None if last else self._backoff.delay(retry_after)
            if delay is None:
                assert dead_letters is not None
                letter = {
                    "failedAt": iso(datetime.now(UTC)),
                    "url": _without_query(self._url),
                    "attempts": attempt,
                    "why": why,
                    "event": body,
                }
                await _guarded(_append, dead_letters, json.dumps(letter, separators=(",", ":")))
                self.dead += 1
            if self._on_failure is not None:
                self._on_failure(
                    FailedForward(
                        event_id=str(body["id"]),
                        event_type=str(body["eventType"]),
                        attempt=attempt,
                        why=why,
                        delay=delay,
                    )
                )
            if delay is None:
                return False
            await trio.sleep(delay)


@asynccontextmanager
async def open_forwarder(
    url: str,
    *,
    timeout: float = 30.0,
    retry: RetryPolicy | None = None,
    max_attempts: int | None = None,
    dead_letters: str | os.PathLike[str] | None = None,
    on_failure: Callable[[FailedForward], None] | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> AsyncIterator[Forwarder]:
    """Open the way to a webhook endpoint. Entering makes no request; leaving closes the connections.

    Example::

        async with open_realtime() as realtime, open_forwarder("http://localhost:8000/hook") as forwarder:
            async for event in realtime.events:
                await forwarder.forward(event)

    Args:
        url: ``http`` or ``https``, without credentials.
        timeout: for one attempt as a whole, in seconds. Default 30.
        retry: when a failed event is tried again; default ``RetryPolicy()``.
            ``attempts_per_minute`` does not matter here.
        max_attempts: how often an event is tried before it is put aside; None
            for ever.
        dead_letters: the file that events are put aside in, a JSON object a
            line; needed with *max_attempts*.
        on_failure: called after each failed attempt. It must be quick, and not raise.
        ssl_context: for an ``https`` endpoint.

    Raises:
        ConfigurationError: an option cannot be used.
    """
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        raise ConfigurationError("the endpoint to forward to is not a URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigurationError("the endpoint to forward to must be an http:// or https:// URL")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ConfigurationError("the endpoint to forward to must hold no credentials or fragment")
    if not timeout > 0:
        raise ConfigurationError("timeout must be a positive number of seconds")
    if max_attempts is not None and (max_attempts < 1 or dead_letters is None):
        raise ConfigurationError("max_attempts must be at least 1, and needs dead_letters to put events aside in")
    async with open_webhooks(
        settings=Settings(ssl_context=ssl_context),
        secret=parts.query,  # where webhooks have theirs
        direct=is_loopback(host),
        wall_clock=lambda: datetime.now(UTC),
    ) as http:
        yield Forwarder(
            http,
            url,
            timeout=timeout,
            policy=RetryPolicy() if retry is None else retry,
            max_attempts=max_attempts,
            dead_letters=None if dead_letters is None else Path(dead_letters),
            on_failure=on_failure,
        )


def webhook_body(event: Event) -> dict[str, Any]:
    """Return an event in the shape of Kadoa's webhooks: the payload stands under ``data``, and there is no cursor."""
    raw = event.raw
    payload = raw.get("message")
    return {
        "eventType": event.type,
        "id": event.id,
        "timestamp": raw.get("timestamp") if event.timestamp is None else iso(event.timestamp),
        "data": raw.get("data") if payload is None else payload,
    }


def _without_query(url: str) -> str:
    # A query may hold a secret of the endpoint's.
    return urlsplit(url)._replace(query="").geturl()


def _letter(line: str) -> dict[str, Any] | None:
    try:
        letter = parse_json(line)
    except (ValueError, RecursionError):
        return None
    body = letter.get("event") if isinstance(letter, dict) else None
    if isinstance(body, dict) and isinstance(body.get("eventType"), str) and isinstance(body.get("id"), str):
        return body
    return None


async def _guarded(function: Callable[..., Any], *args: Any) -> Any:
    try:
        # Not abandoned when cancelled: a letter is written, or it is not.
        return await trio.to_thread.run_sync(function, *args)
    except (OSError, UnicodeError) as exc:
        raise DeadLetterError(f"the dead letters cannot be kept: {exc}") from exc


def _append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        torn = False
        if size:
            # A crash may have cut the last line: it must not swallow this one.
            file.seek(size - 1)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + line.encode(errors="surrogateescape") + b"\n")
        os.fsync(file.fileno())


# A replay works on a file of its own, so that new letters can be added to the other one meanwhile; how many lines of it
# are done stands beside it. The count means something only while that file is there: it is removed before the next one
# is set aside, and after the last one is gone.


def _set_aside(file: Path, working: Path, done: Path) -> None:
    done.unlink(missing_ok=True)
    os.replace(file, working)


def _forget(working: Path, done: Path) -> None:
    working.unlink()
    done.unlink(missing_ok=True)


def _read_count(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _write_count(path: Path, count: int) -> None:
    # Whole, or not at all.
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as file:
        file.write(str(count))
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
