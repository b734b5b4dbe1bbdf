"""What HTTP answers and network faults mean: for requests, and for a WebSocket handshake, whose refusal is an answer."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from .._errors import AttemptError, AuthenticationError, KadoaError, RequestRefusedError, Step
from .._exits import leaves
from .._redact import Secret, presentable

REFUSAL_GRACE: Final = 1.0
"""Maximum time to wait for the body of a refusal, in seconds. The status, which matters, is known before."""
_TEMPORARY_4XX: Final = frozenset({408, 425, 429})


def refusal(step: Step, status: int, message: str, retry_after: float | None, *, final: bool) -> KadoaError:
    """Make the error that an answer without success means.

    Args:
        step: what was asked for.
        status: the HTTP status, from 300 on.
        message: the server's message.
        retry_after: the delay that the server asked for, in seconds.
        final: whether a status can mean that repeating the request is of no use.
    """
    if final and status in (401, 403):
        return AuthenticationError(step, status, message)
    if final and 400 <= status < 500 and status not in _TEMPORARY_4XX:
        return RequestRefusedError(step, status, message)
    return AttemptError(step, refusal_reason(status, message), status=status, retry_after=retry_after)


def refusal_reason(status: int, message: str) -> str:
    """Write a status and the server's words as the reason of an `AttemptError`."""
    return f"HTTP {status}: {message}" if message else f"HTTP {status}"


def unwanted_encoding(value: str | None, *secrets: Secret) -> str:
    """Give the value of a ``Content-Encoding`` header, made safe to show; empty for a body that is not encoded."""
    names = {name.strip().lower() for name in (value or "").split(",")}
    return presentable(value or "", 60, *secrets) or "?" if names - {"", "identity"} else ""


def parse_retry_after(value: str | None, now: datetime) -> float | None:
    """Read a ``Retry-After`` header (RFC 9110, section 10.2.3): seconds, or a date that is measured against *now*.

    Returns:
        Seconds; None when the header is missing, unreadable or in the past.
    """
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        seconds = (when - now).total_seconds()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return seconds if seconds >= 0 else None


def server_message(body: bytes, *secrets: Secret) -> str:
    """Find the message in the body of a refusal, made safe to show. Maximum 200 characters."""
    message: object = None
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        text = body[:1000].decode(errors="replace").strip()
        # A gateway's HTML page adds nothing to the status.
        message = "" if text.startswith("<") else text
    for key in ("error", "message", "detail", "error_description"):
        if isinstance(message, dict) and key in message:
            message = message[key]
    return presentable(message, 200, *secrets) if isinstance(message, str) else ""


def describe(exc: BaseException, *secrets: Secret) -> str:
    """Describe a network fault in a few words, from the innermost errors, which know most. Maximum 300 characters."""
    words: list[str] = []
    for inner in _innermost(exc):
        if isinstance(inner, ssl.SSLCertVerificationError):
            # An SSLError that a program's own code raises lacks the attributes that OpenSSL's errors have.
            words.append(f"certificate refused: {getattr(inner, 'verify_message', None) or 'no reason given'}")
        elif isinstance(inner, ssl.SSLError):
            reason = getattr(inner, "reason", None) or inner.strerror or "unknown"
            words.append(f"TLS failed: {str(reason).replace('_', ' ').lower()}")
        elif isinstance(inner, socket.gaierror):
            words.append(f"the name does not resolve: {inner.strerror}")
        elif isinstance(inner, OSError) and inner.errno:
            words.append(os.strerror(inner.errno))
        else:
            words.append(re.sub(r"\s+", " ", str(inner)) or type(inner).__name__)
    return presentable("; ".join(dict.fromkeys(words)), 300, *secrets)


def _innermost(exc: BaseException) -> Iterator[BaseException]:
    for leaf in leaves(exc):
        # The context, too, because the library below httpx does not always name a cause.
        below = leaf.__cause__ or leaf.__context__
        if below is None:
            yield leaf
        else:
            yield from _innermost(below)
