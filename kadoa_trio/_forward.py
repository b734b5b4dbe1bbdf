"""Posts events to a webhook endpoint, one after the other, until the endpoint accepts each one.

For webhook code behind a firewall: requests have the shape of Kadoa's own
webhooks, the envelope with its payload under ``data``, and the event type in
the header ``X-Kadoa-Event``.

Every event can be posted, whatever it holds. The header has every byte of the
type's UTF-8 that is not visible ASCII, and ``%``, as ``%XX``, and is cut at 256
characters; the body has the type unchanged. The body is strict JSON: ``NaN``,
infinities and floats beyond a double's range are null, lone surrogates are
U+FFFD, and a payload that is nested too deeply to be written is null.
"""

from __future__ import annotations

import os
import random
import ssl
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, final
from urllib.parse import quote_from_bytes, urlsplit

import attrs
import trio

from ._backoff import Backoff
from ._checks import check_callable, check_count, check_seconds
from ._contexts import async_context
from ._errors import AttemptError, ConfigurationError
from ._events import Event, write_time
from ._letters import LetterFile, Replayed, body_of_letter, file_of
from ._net._http import HttpClient, open_http, secret_of_query
from ._redact import Secret, presentable
from ._settings import Endpoints, RetryPolicy, settings_of
from ._urls import fault_of_url
from ._webhooks import strict_json, webhook_body

_MAX_HEADER: Final = 256
"""Maximum length of the event type in the header, in characters, because servers refuse long headers."""
_VISIBLE: Final = "".join(map(chr, range(0x21, 0x7F))).replace("%", "")


@final
@attrs.frozen(kw_only=True)
class FailedForward:
    """One attempt to post an event failed."""

    event_id: str
    event_type: str
    attempt: int
    """The number of this attempt for the event, from 1."""
    why: str
    delay: float | None
    """Seconds until the next attempt; None if the event is a dead letter now."""

    def __str__(self) -> str:
        then = "put aside" if self.delay is None else f"again in {self.delay:.2f} s"
        event = f"{presentable(self.event_type, 80)} {presentable(self.event_id, 80)}"
        return f"{event}: attempt {self.attempt} failed ({presentable(self.why, 300)}); {then}"


@attrs.frozen
class _Webhook:
    """The endpoint that events are posted to, without Kadoa's API key."""

    http: HttpClient = attrs.field(repr=False)
    url: Secret
    timeout: float

    @property
    def address(self) -> str:
        """The URL without its query, which may hold the endpoint's secret."""
        return urlsplit(self.url.reveal())._replace(query="").geturl()

    async def post(self, event_type: str, content: bytes) -> None:
        """Post an event once. The body of a success is not decoded.

        Raises:
            AttemptError: the status is not 2xx, or there is no answer.
        """
        await self.http.request(
            "forward",
            "POST",
            self.url,
            timeout=self.timeout,
            headers={"x-kadoa-event": event_type},
            content=content,
            final=False,
        )


@final
class Forwarder:
    """Posts events to one endpoint. Made by `open_forwarder`.

    Maximum one task at a time may use it, so that events stay in order.
    """

    def __init__(
        self,
        webhook: _Webhook,
        *,
        policy: RetryPolicy,
        max_attempts: int | None,
        dead_letters: Path | None,
        on_failure: Callable[[FailedForward], None] | None,
    ) -> None:
        self._webhook = webhook
        self._backoff = Backoff(policy, random.Random())
        self._max_attempts = max_attempts
        self._dead_letters = None if dead_letters is None else LetterFile(dead_letters)
        self._on_failure = on_failure
        self.delivered: int = 0
        """Number of events that the endpoint accepted."""
        self.dead: int = 0
        """Number of events that were put aside as dead letters."""
        self.failures: int = 0
        """Number of attempts that failed."""

    def __repr__(self) -> str:
        return f"<Forwarder to {self._webhook.address}>"

    async def forward(self, event: Event) -> bool:
        """Post an event until the endpoint answers 2xx, or put it aside after ``max_attempts``.

        After a cancellation, the endpoint may or may not have got the event.

        Returns:
            Whether the endpoint accepted it; False if it is a dead letter now.

        Raises:
            DeadLetterError: it could not be put aside.
        """
        return await self._deliver(webhook_body(event), self._max_attempts, self._dead_letters)

    async def replay(self, path: str | os.PathLike[str]) -> Replayed:
        """Post the dead letters of a file again, in order; those that fail again stay in the file.

        Each letter gets ``max_attempts``, or one attempt if none was given.
        Forwarders may add letters to the file meanwhile; this replay or the
        next one posts them. After a crash the next replay continues with the
        letters that are left: none is lost, and maximum one is posted twice.

        Raises:
            ConfigurationError: *path* cannot be the path of a file.
            DeadLetterError: the file cannot be read or written, or another
                replay of it is running.
        """
        letters = LetterFile(file_of("path", path))

        async def deliver(line: bytes) -> bool | None:
            body = body_of_letter(line)
            return None if body is None else await self._deliver(body, self._max_attempts or 1, letters)

        return await letters.replay(deliver)

    async def _deliver(self, body: dict[str, Any], limit: int | None, dead_letters: LetterFile | None) -> bool:
        content = strict_json(body)
        header = _header(str(body["eventType"]))
        attempt = 0
        while True:
            attempt += 1
            retry_after: float | None = None
            try:
                await self._webhook.post(header, content)
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
                    "failedAt": write_time(datetime.now(UTC)),
                    "url": self._webhook.address,
                    "attempts": attempt,
                    "why": why,
                }
                # The event exactly as it was posted.
                await dead_letters.append(strict_json(letter)[:-1] + b',"event":' + content + b"}")
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


@async_context
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
    """Open a `Forwarder` to a webhook endpoint. Entering makes no request; leaving closes the connections.

    Example::

        async with open_realtime() as realtime, open_forwarder("http://localhost:8000/hook") as forwarder:
            async for event in realtime.events:
                await forwarder.forward(event)

    Args:
        url: ``http`` or ``https``, without credentials.
        timeout: maximum duration of one attempt, in seconds. Default 30.
        retry: when a failed event is tried again; default ``RetryPolicy()``.
            ``attempts_per_minute`` has no effect here.
        max_attempts: number of attempts before an event is put aside; None
            for no maximum.
        dead_letters: the file for events that are put aside, one JSON object
            per line; required with *max_attempts*.
        on_failure: called after each failed attempt. It must be quick, and not raise.
        ssl_context: for an ``https`` endpoint.

    Raises:
        ConfigurationError: an option cannot be used.
    """
    target = Secret(url)
    del url  # a traceback shows the names of this frame
    fault = fault_of_url(target.reveal(), "https", "http")
    if fault is not None:
        raise ConfigurationError(f"the endpoint to forward to {fault}")
    check_seconds("timeout", timeout)
    if max_attempts is not None:
        check_count("max_attempts", max_attempts)
        if dead_letters is None:
            raise ConfigurationError("max_attempts needs dead_letters, the file for events that could not be posted")
    check_callable("on_failure", on_failure)
    letters = None if dead_letters is None else file_of("dead_letters", dead_letters)
    settings = settings_of(endpoints=Endpoints(), retry=retry, ssl_context=ssl_context)
    async with open_http(
        hosts={urlsplit(target.reveal()).hostname or ""},
        secure=urlsplit(target.reveal()).scheme == "https",
        secrets=(secret_of_query(target),),
        ssl_context=settings.ssl_context,
    ) as http:
        yield Forwarder(
            _Webhook(http, target, timeout),
            policy=settings.retry,
            max_attempts=max_attempts,
            dead_letters=letters,
            on_failure=on_failure,
        )


def _header(event_type: str) -> str:
    """Write an event type for an HTTP header."""
    text = event_type[:_MAX_HEADER]
    # Cut whole characters. One has maximum 12 characters when it is encoded.
    while len(encoded := quote_from_bytes(text.encode(errors="surrogatepass"), _VISIBLE)) > _MAX_HEADER:
        text = text[: -max(1, (len(encoded) - _MAX_HEADER) // 12)]
    return encoded
