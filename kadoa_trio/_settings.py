"""The options of a client: endpoints, timeouts, limits, and when to try again. All are checked when they are made."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Final, Protocol
from urllib.parse import urlsplit

import attrs
import trio

from ._checks import check_count, check_flag, check_instance, check_seconds, refusal
from ._errors import ConfigurationError
from ._events import Event
from ._redact import Secret, presentable
from ._urls import fault_of_url, is_loopback

CLOSE_TIMEOUT = 1.0
"""Maximum duration of a closing handshake, in seconds; after it the socket is closed by force."""


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

    @property
    def settlement_observer(self) -> SettlementObserver | None:
        """An object that is notified of each settled event, or None.

        A simulated Kadoa in memory has one, so that tests can wait until an event is settled.
        """
        ...


class SettlementObserver(Protocol):
    """An object that is notified of each event that a program has settled."""

    def settled(self, event: Event) -> None:
        """Record that *event* was settled. Must be quick, must not raise, and must not be a checkpoint."""
        ...


default_endpoints: Final[ContextVar[Endpoints | None]] = ContextVar("kadoa_trio default_endpoints", default=None)
"""The endpoints that `Endpoints.from_environment` gives in place of those of the environment; None for no others.

Environment variables cannot name a Kadoa that exists only in the memory of a test. So a simulated Kadoa sets this
variable for the length of a block (`kadoa_trio.testing.SimulatedKadoa.as_default`), and the code under test opens its
clients without options. It applies to the task that sets it and to tasks that are started inside of the block.
"""


def _without_secrets(url: object) -> str:
    """Format a URL for a repr without secrets: an address that `Endpoints.check` refuses may hold credentials or a token."""
    if not isinstance(url, str):
        return repr(url)
    if any(character in url for character in "@?#"):
        return "[an address with credentials, a query or a fragment]"
    return repr(url)


@attrs.frozen(kw_only=True)
class Endpoints:
    """The addresses of Kadoa. The defaults are Kadoa's own.

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
        """Read the endpoints from *environ* (default `os.environ`). Each one that is not set there is Kadoa's own.

        In a block of `kadoa_trio.testing.SimulatedKadoa.as_default`, without
        *environ*, give the endpoints of that simulated Kadoa.
        """
        default = default_endpoints.get()
        if environ is None and default is not None:
            return default
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
            # The address may hold a secret. It must be in no variable of this frame, and not in the message.
            fault = _fault_of_address(getattr(self, name), schemes, allow_insecure=allow_insecure)
            if fault is not None:
                raise ConfigurationError(f"the endpoint {name} {fault}")
        if self.network is not None and not all(
            hasattr(self.network, name) for name in ("open_stream", "http_transport", "settlement_observer")
        ):
            wanted = "a Network (with open_stream, http_transport and settlement_observer) or None"
            raise refusal("Endpoints.network", wanted, self.network)


def _fault_of_address(url: str, schemes: tuple[str, str], *, allow_insecure: bool) -> str | None:
    fault = fault_of_url(url, *schemes)
    if fault is not None:
        return fault
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.query:
        return "must hold no query"
    if parts.scheme == schemes[1] and not is_loopback(host) and not allow_insecure:
        return (
            f"is plain {parts.scheme}:// to {presentable(host, 100)}: the key and the events would cross the network "
            f"in the clear. Use {schemes[0]}://, or allow_insecure=True"
        )
    return None


def read_key(given: Secret | None) -> Secret:
    """Return the API key: *given*, or that of the environment if it is None.

    Raises:
        ConfigurationError: there is no key, or it is not a string.
    """
    key = Secret(os.environ.get("KADOA_API_KEY", "")) if given is None else given
    if given is None and not key.reveal():
        raise ConfigurationError("no API key: pass api_key, or set the environment variable KADOA_API_KEY")
    if not isinstance(key.reveal(), str):
        raise ConfigurationError(f"the API key must be a string, not {type(key.reveal()).__name__}")
    return key


def fits_header(key: Secret) -> bool:
    """Whether a key can be sent in a header: printable ASCII, not empty, no spaces at its ends."""
    value = key.reveal()
    return bool(value) and value.isascii() and value.isprintable() and value == value.strip()


def _seconds(instance: object, attribute: attrs.Attribute[float], value: object) -> None:
    check_seconds(f"{type(instance).__name__}.{attribute.name}", value)


def _seconds_or_unlimited(instance: object, attribute: attrs.Attribute[float], value: object) -> None:
    check_seconds(f"{type(instance).__name__}.{attribute.name}", value, unlimited=True)


def _count(instance: object, attribute: attrs.Attribute[int], value: object) -> None:
    check_count(f"{type(instance).__name__}.{attribute.name}", value)


@attrs.frozen(kw_only=True)
class Timeouts:
    """How long the client waits, in seconds: for a frame, a connection, an answer.

    Example::

        open_realtime(timeouts=Timeouts(heartbeat=45, connect=math.inf))

    Raises:
        ConfigurationError: a value is not a positive, finite number
            (`math.inf` where the field allows it), or ``max_age`` is less
            than twice ``heartbeat``.
    """

    heartbeat: float = attrs.field(default=30.0, validator=_seconds)
    """Maximum silence on a connection, in seconds; a connection without a frame for longer is lost. Default 30 s.

    Kadoa sends a heartbeat every 15 s, as its earlier documentation and its SDKs say.
    """
    connect: float = attrs.field(default=60.0, validator=_seconds_or_unlimited)
    """Maximum time until the first connection has received a frame, in seconds; `math.inf` for no maximum. Default 60 s.

    A program that cannot connect at its start is most often configured wrongly, so it fails soon. After the first
    connection there is no maximum: the client retries until an outage has ended.
    """
    auth_grace: float = attrs.field(default=300.0, validator=_seconds_or_unlimited)
    """How long refusals of a key or token that was accepted before are retried, in seconds. Default 300 s.

    A short fault of a gateway in front of Kadoa does not end a service that has run for weeks. `math.inf` for no maximum.
    """
    token: float = attrs.field(default=10.0, validator=_seconds)
    """Maximum duration of a token request or an acknowledgement, its answer included, in seconds. Default 10 s.

    Request and answer are small, so a longer wait means that no answer will come.
    """
    handshake: float = attrs.field(default=10.0, validator=_seconds)
    """Maximum duration of TCP, TLS and the WebSocket handshake together, and again of the subscription. Default 10 s.

    These are a few round trips, which take less than 3 s on a satellite link.
    """
    overlap: float = attrs.field(default=60.0, validator=_seconds_or_unlimited)
    """Maximum time that an old connection is read beside a live new one, in seconds. Default 60 s.

    A server that drains a connection closes it before. `math.inf` waits for the server.
    """
    max_age: float = attrs.field(default=21_600.0, validator=_seconds_or_unlimited)
    """Maximum age of a connection, in seconds; then it is replaced, with an overlap. Default 21,600 s (6 h).

    A server may hold a connection and send its heartbeats but have lost the subscription; only a replacement ends that.
    It is opened up to a tenth earlier, at random, so that many clients do not reconnect together. At least twice
    ``heartbeat``; `math.inf` for no maximum.
    """
    stable_after: float = attrs.field(default=10.0, validator=_seconds)
    """How long a connection must live to count as a success, after which the backoff starts over. Default 10 s.

    It also scales how replays are recognized. What a resumed connection delivers moves the resume cursor after three
    times as long without a step back behind it; a replay counts as complete after six times as long without a sign of it.
    """

    def __attrs_post_init__(self) -> None:
        if self.max_age < 2 * self.heartbeat:
            raise ConfigurationError(
                f"Timeouts.max_age ({self.max_age:g} s) must be at least twice Timeouts.heartbeat ({self.heartbeat:g} s), "
                "because a connection that is replaced before its first heartbeat shows nothing"
            )


@attrs.frozen(kw_only=True)
class Limits:
    """How many events and bytes the client reads ahead and holds in memory.

    Example::

        open_realtime(limits=Limits(buffered_events=100))

    Raises:
        ConfigurationError: a value is not a whole number from 1 on, or
            ``dedupe_window`` is less than the sum of ``buffered_events`` and
            ``unsettled``.
    """

    message_size: int = attrs.field(default=64 * 1024 * 1024, validator=_count)
    """Maximum length of a message, in characters. Default 64 Mi, because a data change may carry the whole snapshot.

    A larger message ends the connection, and the client if the next connection meets it, too (`MessageTooLargeError`).
    """
    buffered_events: int = attrs.field(default=1_000, validator=_count)
    """Maximum number of events that wait to be received; with more, the client stops reading. Default 1,000."""
    buffered_bytes: int = attrs.field(default=64 * 1024 * 1024, validator=_count)
    """Maximum size of the events that wait to be received, in bytes. Default 64 Mi, as ``message_size``.

    An event that is larger than this maximum is admitted when the buffer is empty.
    """
    unsettled: int = attrs.field(default=10_000, validator=_count)
    """Maximum distance from the oldest unsettled event to the newest one, in events. Default 10,000.

    Admission pauses there, because the next run may receive all events from the oldest unsettled one on again.
    """
    unsaved: int = attrs.field(default=10_000, validator=_count)
    """Maximum number of events that are settled, or admitted and not yet settled, without a save. Default 10,000.

    Admission pauses there, so that a crash while the store fails repeats no more than this number of events.
    """
    dedupe_window: int = attrs.field(default=50_000, validator=_count)
    """Number of event ids that are remembered, so that a repeated event is dropped. Default 50,000.

    At least the sum of ``buffered_events`` and ``unsettled``.
    """

    def __attrs_post_init__(self) -> None:
        needed = self.buffered_events + self.unsettled
        if self.dedupe_window < needed:
            raise ConfigurationError(
                f"Limits.dedupe_window ({self.dedupe_window}) must be at least the sum of Limits.buffered_events and "
                f"Limits.unsettled ({needed}), because an id that is forgotten while its event is in hand could be "
                "delivered again"
            )


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """When the client tries again, in seconds.

    The wait before attempt *n* after *n* failures in a row is drawn evenly
    from 0 to ``min(maximum, initial * 2**(n - 1))`` ("full jitter"), so that
    the clients of a server that restarts do not come back together. A
    connection counts as a failure unless it was *stable* before it ended
    (`Timeouts.stable_after`).

    Of a policy for events (``redelivery`` of `open_realtime`, ``retry`` of
    `process`), only ``initial`` and ``maximum`` have an effect.

    Raises:
        ConfigurationError: a value is not positive and finite, or
            ``attempts_per_minute`` is not a whole number from 1 on.
    """

    first: float = attrs.field(default=0.2, validator=_seconds)
    """Maximum wait after a *stable* connection was lost, in seconds. Default 0.2 s: most often one server was restarted."""
    initial: float = attrs.field(default=0.5, validator=_seconds)
    """Maximum wait after the first failure, in seconds. Default 0.5 s."""
    maximum: float = attrs.field(default=30.0, validator=_seconds)
    """Maximum wait after any number of failures, in seconds. Default 30 s, so the client is back half a minute after an outage."""
    retry_after_limit: float = attrs.field(default=120.0, validator=_seconds)
    """Maximum wait that a server's ``Retry-After`` can ask for, in seconds. Default 120 s, so that no server can silence the client."""
    attempts_per_minute: int = attrs.field(default=60, validator=_count)
    """Maximum number of attempts that begin within any 60 s. Default 60."""


REDELIVERY = RetryPolicy(initial=0.1)
"""When a failed delivery is repeated, unless the program has its own policy: it may have failed for any reason."""


@attrs.frozen(kw_only=True)
class Settings:
    """The options of `open_realtime` that its parts read, checked. Documented there."""

    endpoints: Endpoints = attrs.field(factory=Endpoints)
    timeouts: Timeouts = attrs.field(factory=Timeouts)
    limits: Limits = attrs.field(factory=Limits)
    retry: RetryPolicy = attrs.field(factory=RetryPolicy)
    redelivery: RetryPolicy = REDELIVERY
    ssl_context: ssl.SSLContext | None = None
    allow_insecure: bool = False

    def __attrs_post_init__(self) -> None:
        self.endpoints.check(allow_insecure=self.allow_insecure)


def settings_of(
    *,
    endpoints: Endpoints | None = None,
    timeouts: Timeouts | None = None,
    limits: Limits | None = None,
    retry: RetryPolicy | None = None,
    redelivery: RetryPolicy | None = None,
    ssl_context: ssl.SSLContext | None = None,
    allow_insecure: bool = False,
) -> Settings:
    """Make the settings of a client from its options as the user gave them; None means the default.

    Raises:
        ConfigurationError: an option is of a wrong type, or an endpoint cannot be used.
    """
    check_instance("endpoints", endpoints, Endpoints)
    check_instance("timeouts", timeouts, Timeouts)
    check_instance("limits", limits, Limits)
    check_instance("retry", retry, RetryPolicy)
    check_instance("redelivery", redelivery, RetryPolicy)
    check_instance("ssl_context", ssl_context, ssl.SSLContext)
    check_flag("allow_insecure", allow_insecure)
    return Settings(
        endpoints=Endpoints.from_environment() if endpoints is None else endpoints,
        timeouts=Timeouts() if timeouts is None else timeouts,
        limits=Limits() if limits is None else limits,
        retry=RetryPolicy() if retry is None else retry,
        redelivery=REDELIVERY if redelivery is None else redelivery,
        ssl_context=ssl_context,
        allow_insecure=allow_insecure,
    )
