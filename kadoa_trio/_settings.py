"""What a client is opened with: endpoints and limits, checked once."""

from __future__ import annotations

import math
import os
import ssl
from collections.abc import Iterator, Mapping
from typing import Protocol
from urllib.parse import urlsplit

import attrs
import trio

from ._backoff import RetryPolicy
from ._contexts import sync_context
from ._errors import ConfigurationError
from ._redact import Secret, presentable
from ._urls import fault_of_url, is_loopback

MAX_SOCKETS = 3
"""Sockets open at once: the newest connection, the one that it replaces, and one that will not go."""
MIN_ADVICE, MAX_ADVICE, DEFAULT_ADVICE = 0.1, 30.0, 1.0
"""Bounds of a drain notice's ``retryAfterMs``, and what stands in for one that is missing or unreadable, in seconds.

A notice with ``1e12`` must not make the client deaf, one with 0 must not make a storm.
"""
CLOSE_TIMEOUT = 1.0
"""How long a closing handshake may take before the socket is closed by force, in seconds."""
DRAIN_READ = 0.25
"""How long a retiring connection is read for what it has already received, in seconds."""
MESSAGE_ALLOWANCE = 10.0
"""A message that is still arriving may hold the heartbeat off for this many times ``heartbeat_timeout``.

At 30 s that is 300 s: 64 MiB at 2 Mbit/s take 268 s.
"""
MAX_FRAGMENTS = 131_072
"""Maximum number of fragments (WebSocket frames) of one message; with more the connection is given up.

The specification (RFC 6455, section 5.4) has no limit, not even for empty ones. At the default ``max_message_size``
of 64 MiB it leaves each fragment 512 bytes on average, and servers send fragments of 4 KiB and more.
"""
LEAVE_TIMEOUT = 2.0
"""How long leaving may take in all, in seconds: sockets, the last save, the last acknowledgements."""
SAVE_INTERVAL = 0.05
"""At least so long passes between the starts of two saves, in seconds: what is settled meanwhile is one save."""
IDS_A_SAVE = 1_000
"""For each so many ids beside the cursor, a position is saved that much less often: writing them takes the time of events."""
SAVE_RETRIES = 0.1, 10.0
"""The first and the longest wait after a failed save, in seconds; it doubles between."""
LIFE_INTERVAL = 60.0
"""How often the last time of life is saved while nothing else is, in seconds."""
SAVE_TIMEOUT = 10.0
"""A save that takes longer counts as failed, in seconds."""
MAX_ACKNOWLEDGEMENTS = 10_000
"""Acknowledgements that wait; beyond that the oldest is dropped, and counted."""
ACKNOWLEDGEMENTS_IN_FLIGHT = 4
"""Acknowledgements that are sent at once."""
ACKNOWLEDGEMENTS_PER_SECOND = 200
"""At most so many are sent: each costs twenty times the CPU of its event."""
REFUSALS_BEFORE_REST, ACKNOWLEDGEMENTS_REST = 10, 300.0
"""After so many failures in a row the endpoint is left alone, for so many seconds; then one is tried."""


class Network(Protocol):
    """How a client reaches its endpoints; the default is real sockets.

    `kadoa_trio.testing.SimulatedKadoa` has one that stays in memory.
    """

    async def open_stream(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        """Open a byte stream to *host* and *port*; raise `OSError` when that fails."""
        ...

    @property
    def http_transport(self) -> object | None:
        """An ``httpx.AsyncBaseTransport``, or None for httpx's own."""
        ...


_stand_ins: list[Endpoints] = []


@sync_context
def stand_in(endpoints: Endpoints) -> Iterator[None]:
    """Have `Endpoints.from_environment` give *endpoints* for the length of a block, in the whole process."""
    _stand_ins.append(endpoints)
    try:
        yield
    finally:
        # By identity: those of two simulated Kadoas in memory are equal.
        del _stand_ins[next(place for place, one in enumerate(_stand_ins) if one is endpoints)]


def _without_secrets(url: object) -> str:
    """Write a URL for a repr: an address that `Endpoints.check` refuses may hold credentials or a token."""
    if not isinstance(url, str):
        return repr(url)
    if any(character in url for character in "@?#"):
        return "[an address with credentials, a query or a fragment]"
    return repr(url)


@attrs.frozen(kw_only=True)
class Endpoints:
    """Where Kadoa is. The defaults are Kadoa's own addresses.

    The environment variables are those of Kadoa's official SDKs.
    """

    public_api: str = attrs.field(default="https://api.kadoa.com", repr=_without_secrets)
    """The public API, for tokens. ``KADOA_PUBLIC_API_URI``."""
    websocket: str = attrs.field(default="wss://realtime.kadoa.com", repr=_without_secrets)
    """The WebSocket endpoint. ``KADOA_WSS_API_URI``."""
    realtime_api: str = attrs.field(default="https://realtime.kadoa.com", repr=_without_secrets)
    """The realtime HTTP endpoint. ``KADOA_REALTIME_API_URI``."""
    network: Network | None = attrs.field(default=None, repr=False, eq=False)
    """How to reach them; None for real sockets."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Endpoints:
        """Read the endpoints from *environ* (default `os.environ`); what is not set there is Kadoa's own.

        While a simulated Kadoa is the default (`kadoa_trio.testing.SimulatedKadoa.as_default`),
        its endpoints stand in for `os.environ`.
        """
        if environ is None and _stand_ins:
            return _stand_ins[-1]
        environ = os.environ if environ is None else environ
        own = cls()
        return cls(
            public_api=environ.get("KADOA_PUBLIC_API_URI") or own.public_api,
            websocket=environ.get("KADOA_WSS_API_URI") or own.websocket,
            realtime_api=environ.get("KADOA_REALTIME_API_URI") or own.realtime_api,
        )

    def check(self, *, allow_insecure: bool) -> None:
        """Refuse endpoints that cannot work, or that would send a secret in the clear.

        Raises:
            ConfigurationError: an address is not a URL of its kind, holds
                credentials, a query or a fragment, or is plain ``http``/``ws``
                to a host that is not a loopback address while
                *allow_insecure* is false.
        """
        for name, schemes in (
            ("public_api", ("https", "http")),
            ("websocket", ("wss", "ws")),
            ("realtime_api", ("https", "http")),
        ):
            # The address stays out of this frame's names, and out of the text: somebody may have put a secret into it.
            fault = _fault_of_address(getattr(self, name), schemes, allow_insecure=allow_insecure)
            if fault is not None:
                raise ConfigurationError(f"the endpoint {name} {fault}")


def _fault_of_address(url: str, schemes: tuple[str, str], *, allow_insecure: bool) -> str | None:
    fault = fault_of_url(url, schemes)
    if fault is not None:
        return fault
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == schemes[1] and not is_loopback(host) and not allow_insecure:
        return (
            f"is plain {parts.scheme}:// to {presentable(host, 100)}: the key and the events would cross the network "
            f"in the clear. Use {schemes[0]}://, or say allow_insecure=True"
        )
    return None


def read_key(given: Secret | None) -> Secret:
    """Give the API key: *given*, else that of the environment.

    Raises:
        ConfigurationError: there is none, or it is no string.
    """
    key = Secret(os.environ.get("KADOA_API_KEY", "")) if given is None else given
    if given is None and not key.reveal():
        raise ConfigurationError("no API key: pass api_key, or set the environment variable KADOA_API_KEY")
    if not isinstance(key.reveal(), str):
        raise ConfigurationError(f"the API key must be a string, not {type(key.reveal()).__name__}")
    return key


def fits_header(key: Secret) -> bool:
    """Tell whether a key can stand in a header: printable ASCII, not empty, no spaces around it."""
    value = key.reveal()
    return bool(value) and value.isascii() and value.isprintable() and value == value.strip()


def _seconds(_instance: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not value > 0 or math.isnan(value):
        raise ConfigurationError(f"{attribute.name} must be a positive number of seconds, not {value!r}")


def _count(_instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{attribute.name} must be a whole number of at least 1, not {value!r}")


@attrs.frozen(kw_only=True)
class Settings:
    """The options of `open_realtime` that reach below it, checked. Documented there."""

    endpoints: Endpoints = attrs.field(factory=Endpoints)
    heartbeat_timeout: float = attrs.field(default=30.0, validator=_seconds)
    stable_after: float = attrs.field(default=10.0, validator=_seconds)
    connect_timeout: float = attrs.field(default=60.0, validator=_seconds)
    auth_grace: float = attrs.field(default=300.0, validator=_seconds)
    token_timeout: float = attrs.field(default=10.0, validator=_seconds)
    handshake_timeout: float = attrs.field(default=10.0, validator=_seconds)
    retry: RetryPolicy = attrs.field(factory=RetryPolicy)
    overlap_limit: float = attrs.field(default=60.0, validator=_seconds)
    max_connection_age: float = attrs.field(default=21_600.0, validator=_seconds)
    max_message_size: int = attrs.field(default=64 * 1024 * 1024, validator=_count)
    max_buffered_events: int = attrs.field(default=1_000, validator=_count)
    max_buffered_bytes: int = attrs.field(default=64 * 1024 * 1024, validator=_count)
    max_unsettled: int = attrs.field(default=10_000, validator=_count)
    max_unsaved: int = attrs.field(default=10_000, validator=_count)
    dedupe_window: int = attrs.field(default=50_000, validator=_count)
    ssl_context: ssl.SSLContext | None = None
    allow_insecure: bool = False

    def __attrs_post_init__(self) -> None:
        self.endpoints.check(allow_insecure=self.allow_insecure)
        if self.max_connection_age < 2 * self.heartbeat_timeout:
            raise ConfigurationError(
                f"max_connection_age ({self.max_connection_age:g} s) must be at least twice heartbeat_timeout "
                f"({self.heartbeat_timeout:g} s): a connection that is replaced before its first heartbeat shows nothing"
            )
        needed = self.max_buffered_events + self.max_unsettled
        if self.dedupe_window < needed:
            raise ConfigurationError(
                f"dedupe_window ({self.dedupe_window}) must be at least max_buffered_events + max_unsettled ({needed}): "
                "an id that is forgotten while its event is still in hand could be delivered again"
            )
