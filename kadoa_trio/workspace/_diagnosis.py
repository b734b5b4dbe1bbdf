"""Finds out why no events arrive: each step of a connection by itself, with a verdict and advice."""

from __future__ import annotations

import enum
import math
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Final, final
from urllib.parse import urlsplit

import attrs
import trio

from .._checks import check_callable, check_seconds, check_text
from .._contexts import check_in_trio
from .._errors import AttemptError, AuthenticationError, ConfigurationError, KadoaError, RequestRefusedError
from .._events import Event
from .._net._answers import describe
from .._net._api import KadoaApi, Token, open_api
from .._net._dial import Address, open_tcp, start_tls
from .._net._socket import Socket, SocketEnded, open_socket
from .._net._wire import Heartbeat, decode, subscribe
from .._redact import Secret, hidden, presentable
from .._settings import Endpoints, Settings, Timeouts, fits_header, read_key, settings_of
from .._urls import port_of
from ._notifications import Notifications, find_websocket

_BLOCKED: Final = (
    "A firewall or proxy in between may block it: allow {host} on port {port}, with WebSocket upgrades where it serves "
    "them."
)
_CHECK_DNS: Final = "Check the endpoint's name, the machine's DNS and its network."
_SECOND_EVENT: Final = 2.0
"""Time to wait for the mock event after another event of its type has come, in seconds."""


class Verdict(enum.Enum):
    """The result of a step of a diagnosis."""

    OK = "ok"
    WARNING = "warning"
    """It works, but something about it may stop events."""
    FAILED = "failed"
    SKIPPED = "skipped"
    """It needs a step that has failed, or it was not asked for, or it does not apply."""


@final
@attrs.frozen(kw_only=True)
class DiagnosisStep:
    """One step of a diagnosis: what was found, and what to do about it."""

    name: str
    verdict: Verdict
    seconds: float
    """Duration of the step, in seconds."""
    detail: str
    """What was found, as text without secrets."""
    advice: str = ""
    """What to do next; empty if there is nothing to do."""


@final
@attrs.frozen(kw_only=True)
class Diagnosis:
    """The result of `diagnose`: all steps, in order."""

    steps: tuple[DiagnosisStep, ...]

    @property
    def ok(self) -> bool:
        """Whether no step failed."""
        return all(step.verdict is not Verdict.FAILED for step in self.steps)

    @property
    def first_failure(self) -> DiagnosisStep | None:
        """The first step that failed; None if none did."""
        return next((step for step in self.steps if step.verdict is Verdict.FAILED), None)


@attrs.frozen
class _Result:
    """The result of a step function."""

    verdict: Verdict
    detail: str
    advice: str = ""
    blocks: bool = False
    """Whether the steps that need this one are skipped."""


def _ok(detail: str) -> _Result:
    return _Result(Verdict.OK, detail)


def _warning(detail: str, advice: str) -> _Result:
    return _Result(Verdict.WARNING, detail, advice)


def _failed(detail: str, advice: str) -> _Result:
    return _Result(Verdict.FAILED, detail, advice, blocks=True)


def _not_needed(why: str) -> _Result:
    return _Result(Verdict.SKIPPED, why)


@attrs.define(eq=False, repr=False)
class _Examination:
    """The steps of a diagnosis, with what they use and what they leave for later steps."""

    settings: Settings
    given_key: Secret | None
    test_event: str | None
    workflow_id: str | None
    event_timeout: float
    opened: AsyncExitStack
    """Closes what the steps have opened."""
    address: Address = attrs.field(init=False)
    blocked: str = attrs.field(init=False)
    """The advice for a WebSocket endpoint that cannot be reached."""
    secrets: list[Secret] = attrs.field(init=False, factory=list)
    """What servers, proxies and the environment may repeat."""
    # Each is set by the step that its users need.
    notifications: Notifications = attrs.field(init=False)
    api: KadoaApi = attrs.field(init=False)
    token: Token = attrs.field(init=False)
    stream: trio.abc.Stream = attrs.field(init=False)
    socket: Socket = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.address = Address.of(self.settings.endpoints.websocket)
        self.blocked = _BLOCKED.format(host=self.address.host, port=self.address.port)

    @property
    def has_own_network(self) -> bool:
        return self.settings.endpoints.network is not None

    def advice(self, exc: KadoaError) -> str:
        """Say what to do about a fault."""
        text = str(exc)
        if isinstance(exc, (AuthenticationError, RequestRefusedError)) and exc.status == 407:
            return "A proxy asks for credentials: put them into HTTPS_PROXY, as http://user:password@host:port."
        if isinstance(exc, AuthenticationError):
            if not exc.server_message:
                return (
                    "The answer has no message of Kadoa's, so a proxy or firewall in between may have sent it. "
                    "If there is none, make a new key in Kadoa and put it into KADOA_API_KEY."
                )
            if exc.step == "handshake":
                return "The key is accepted and the token made from it is not: check that both endpoints belong to the same Kadoa."
            return "Compare the key with the one in Kadoa (Settings, API keys), or make a new one."
        if "certificate refused" in text:
            return (
                "If a proxy of your organisation decrypts TLS, trust its authority (SSL_CERT_FILE or ssl_context). If not, "
                "an attacker may be in between."
            )
        if "the name does not resolve" in text:
            return "Check the endpoint's name, the machine's DNS and its network."
        if isinstance(exc, AttemptError) and exc.status == 429:
            return "Too many requests with this key: wait a minute, and look for other programs that use it."
        if isinstance(exc, AttemptError) and exc.status is not None and exc.status >= 500:
            return "Kadoa, or a gateway in front of it, has a fault. Try again, and see Kadoa's status page."
        if isinstance(exc, AttemptError) and exc.step in ("token", "notifications"):
            api = urlsplit(self.settings.endpoints.public_api)
            return _BLOCKED.format(host=api.hostname, port=port_of(api))
        return self.blocked

    # ---- the steps ---------------------------------------------------------------------------------------------

    async def check_key(self) -> _Result:
        try:
            key = read_key(self.given_key)
        except ConfigurationError as exc:
            return _failed(str(exc), "Make one in Kadoa (Settings, API keys) and put it into KADOA_API_KEY.")
        if not fits_header(key):
            return _failed(
                "the API key is not printable ASCII, or has spaces around it",
                "Copy it again, without the line break at its end.",
            )
        self.secrets.append(key)
        # Opened in this step, because loading the library and the certificates must not count as the token request's time.
        self.api = await self.opened.enter_async_context(open_api(api_key=key, settings=self.settings))
        self.notifications = Notifications(self.api)
        source = "KADOA_API_KEY" if self.given_key is None else "the program"
        return _ok(f"{len(key.reveal())} characters, from {source}")

    async def get_token(self) -> _Result:
        self.token = await self.api.fetch_token()
        self.secrets.append(self.token.access_token)
        return _ok(f"from {self.settings.endpoints.public_api}, for team {self.token.team_id}")

    async def check_channel(self) -> _Result:
        channel = find_websocket(await self.notifications.channels())
        if channel is None:
            return _failed(
                "no WebSocket channel is configured in this workspace, so no event is sent to any WebSocket",
                "Run `kadoa-trio setup --event workflow_finished`, or add the channel in the dashboard under "
                "Notifications.",
            )
        settings = await self.notifications.settings()
        types = sorted({one.event_type for one in settings if one.enabled and channel.id in (one.channel_ids or ())})
        if not types:
            return _failed(
                f"the WebSocket channel {channel.name or channel.id!r} exists, and no event type is sent to it",
                "Run `kadoa-trio setup --event workflow_finished`, or choose event types in the dashboard.",
            )
        shown = ", ".join(types[:5]) + (f" and {len(types) - 5} more" if len(types) > 5 else "")
        return _ok(f"{channel.name or channel.id}: {shown}")

    async def resolve(self) -> _Result:
        if self.has_own_network:
            return _not_needed("the endpoints have a network of their own")
        host, timeout = self.address.host, self.settings.timeouts.handshake
        proxy = self.address.find_proxy()
        if proxy is not None:
            self.blocked = (
                f"The environment names the proxy {proxy}: it must allow CONNECT to {host}:{self.address.port}. "
                f"{self.blocked}"
            )
            return _not_needed(f"the proxy {proxy} resolves names")
        with trio.move_on_after(timeout):
            try:
                found = await trio.socket.getaddrinfo(host, self.address.port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as exc:
                return _failed(f"{host}: {describe(exc)}", _CHECK_DNS)
            addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
            return _ok(f"{host} is {', '.join(addresses[:3])}")
        return _failed(f"{host}: no answer within {timeout:g} s", _CHECK_DNS)

    async def connect_tcp(self) -> _Result:
        if self.has_own_network:
            return _not_needed("the endpoints have a network of their own")
        port, timeout = self.address.port, self.settings.timeouts.handshake
        with trio.move_on_after(timeout):
            try:
                self.stream = await open_tcp(self.address, self.settings)
            except (OSError, trio.BrokenResourceError) as exc:
                return _failed(f"port {port}: {describe(exc)}", self.blocked)
            self.opened.push_async_callback(_close, self.stream)
            return _ok(f"port {port} answers")
        return _failed(f"port {port}: no answer within {timeout:g} s", self.blocked)

    async def shake_hands_in_tls(self) -> _Result:
        if self.has_own_network:
            return _not_needed("the endpoints have a network of their own")
        timeout = self.settings.timeouts.handshake
        try:
            if not self.address.secure:
                return _not_needed("the endpoint is plain ws://")
            with trio.move_on_after(timeout):
                try:
                    tls = await start_tls(self.stream, self.address, self.settings)
                except trio.BrokenResourceError as exc:
                    reason = describe(exc)
                    return _failed(reason, self.advice(AttemptError("tls", reason)))
                return _ok(_tls_in_words(tls))
            return _failed(f"no answer within {timeout:g} s", self.blocked)
        finally:
            await _close(self.stream)  # noqa: ASYNC102  # shielded in there; the WebSocket opens its own

    async def open_websocket(self) -> _Result:
        self.socket = await self.opened.enter_async_context(
            open_socket(
                self.settings.endpoints.websocket,
                token=self.token.access_token,
                settings=self.settings,
                on_bytes=lambda _count: None,
            )
        )
        return _ok("the WebSocket is open")

    async def subscribe(self) -> _Result:
        with trio.move_on_after(self.settings.timeouts.handshake):
            try:
                await self.socket.send(subscribe(self.token.team_id, None))
            except SocketEnded as exc:
                return _ended(exc)
            return _ok(f"to the channel of team {self.token.team_id}")
        return _failed("could not be sent", self.blocked)

    async def hear_a_frame(self) -> _Result:
        timeout = self.settings.timeouts.heartbeat
        with trio.move_on_after(timeout):
            try:
                first = decode(await self.socket.receive())
            except SocketEnded as exc:
                return _ended(exc)
            what = "a heartbeat" if isinstance(first, Heartbeat) else f"a frame ({type(first).__name__.lower()})"
            return _ok(f"{what} came")
        return _failed(
            f"no frame within {timeout:g} s",
            "The connection is open and no data arrives: a proxy may buffer, or the server may have a fault.",
        )

    async def receive_test_event(self) -> _Result:
        wanted = self.test_event
        if wanted is None:
            return _not_needed("not asked for")
        sent = await self.notifications.send_test(wanted, workflow_id=self.workflow_id)
        other: Event | None = None
        with trio.move_on_after(self.event_timeout) as waiting:
            while True:
                try:
                    frame = decode(await self.socket.receive())
                except SocketEnded as exc:
                    return _ended(exc)
                if not isinstance(frame, Event):
                    continue
                if frame.id == sent:
                    return _ok(f"{wanted} {sent} came")
                if frame.type == wanted and sent is None:
                    return _ok(f"a {wanted} event came; Kadoa's answer names no id to compare with")
                if frame.type == wanted:
                    # It may be a real event, and the mock event may follow it.
                    other = frame
                    waiting.deadline = min(waiting.deadline, trio.current_time() + _SECOND_EVENT)
        if other is not None:
            # That the API's id is the socket's is not documented.
            return _warning(
                f"a {wanted} event came with another id than the API's answer names ({other.id}, not {sent})",
                "It may be a real event of this moment, or the two ids always differ.",
            )
        return _failed(
            f"Kadoa accepted the test event and did not send it within {self.event_timeout:g} s",
            f"Check that {wanted} is sent to the WebSocket channel: `kadoa-trio setup --event {wanted} --dry-run`.",
        )


_STEPS: Final[tuple[tuple[str, tuple[str, ...], Callable[[_Examination], Awaitable[_Result]]], ...]] = (
    ("key", (), _Examination.check_key),
    ("token", ("key",), _Examination.get_token),
    ("channel", ("token",), _Examination.check_channel),
    ("dns", (), _Examination.resolve),
    ("tcp", ("dns",), _Examination.connect_tcp),
    ("tls", ("tcp",), _Examination.shake_hands_in_tls),
    ("handshake", ("token", "tls"), _Examination.open_websocket),
    ("subscription", ("handshake",), _Examination.subscribe),
    ("heartbeat", ("subscription",), _Examination.hear_a_frame),
    ("test event", ("heartbeat",), _Examination.receive_test_event),
)
"""The steps in order: the name, the steps that it needs, and what does it."""


@trio.lowlevel.enable_ki_protection  # the exit stack is not protected by itself
async def diagnose(
    api_key: str | None = None,
    *,
    endpoints: Endpoints | None = None,
    test_event: str | None = "workflow_finished",
    workflow_id: str | None = None,
    heartbeat_timeout: float = 30.0,
    event_timeout: float = 30.0,
    on_step: Callable[[DiagnosisStep], None] | None = None,
    ssl_context: ssl.SSLContext | None = None,
    allow_insecure: bool = False,
) -> Diagnosis:
    """Check everything that a connection needs, one step after the other.

    The steps: ``key``, ``token``, ``channel``, ``dns``, ``tcp``, ``tls``,
    ``handshake``, ``subscription``, ``heartbeat``, ``test event``. A step
    that needs one that has failed is skipped, and the others are done anyway,
    so that a blocked WebSocket and a refused key are two findings.

    Example::

        diagnosis = await diagnose(on_step=print)
        if (step := diagnosis.first_failure) is not None:
            print(step.detail, step.advice)

    Args:
        api_key: Kadoa's API key; None reads ``KADOA_API_KEY``.
        endpoints: where Kadoa is; None reads the environment.
        test_event: the type of the mock event that Kadoa is asked to send at
            the end. It is sent to every channel that gets this type, people's
            mailboxes included. None for no mock event.
        workflow_id: the workflow that the mock event is about.
        heartbeat_timeout: maximum time until the first frame, in seconds.
        event_timeout: maximum time until the mock event, in seconds.
        on_step: called after each step. It must be quick, and not raise.
        ssl_context: for both the API and the WebSocket.
        allow_insecure: as for `open_realtime`.

    Cancellation abandons the diagnosis. Faults are results of steps, not exceptions.

    Raises:
        ConfigurationError: an option cannot be used, or the proxy or the
            certificates that the environment names cannot be used.
    """
    given = hidden(api_key)
    del api_key  # a traceback shows the names of this frame
    check_in_trio("diagnose")
    check_seconds("heartbeat_timeout", heartbeat_timeout)
    check_seconds("event_timeout", event_timeout)
    check_callable("on_step", on_step)
    for name, value in (("test_event", test_event), ("workflow_id", workflow_id)):
        if value is not None:
            check_text(name, value)
    settings = settings_of(
        endpoints=endpoints,
        timeouts=Timeouts(heartbeat=heartbeat_timeout, max_age=math.inf),
        ssl_context=ssl_context,
        allow_insecure=allow_insecure,
    )
    steps: list[DiagnosisStep] = []
    blocked: set[str] = set()
    async with AsyncExitStack() as opened:
        examination = _Examination(settings, given, test_event, workflow_id, event_timeout, opened)
        for name, needs, function in _STEPS:
            began = trio.current_time()
            missing = [one for one in needs if one in blocked]
            if missing:
                result = _Result(Verdict.SKIPPED, f"needs the step {missing[0]!r}", blocks=True)
            else:
                try:
                    result = await function(examination)
                except ConfigurationError:
                    raise  # the proxy or the certificates that the environment names
                except KadoaError as exc:
                    result = _failed(str(exc), examination.advice(exc))
            if result.blocks:
                blocked.add(name)
            step = DiagnosisStep(
                name=name,
                verdict=result.verdict,
                seconds=trio.current_time() - began,
                # Both may hold text from servers, proxies and the environment.
                detail=presentable(result.detail, 500, *examination.secrets),
                advice=presentable(result.advice, 500, *examination.secrets),
            )
            steps.append(step)
            if on_step is not None:
                on_step(step)
    return Diagnosis(steps=tuple(steps))


async def _close(stream: trio.abc.Stream) -> None:
    with trio.CancelScope(shield=True):
        await trio.aclose_forcefully(stream)


def _tls_in_words(tls: trio.SSLStream[trio.abc.Stream]) -> str:
    certificate = tls.getpeercert() or {}
    issuer = dict(pair[0] for pair in certificate.get("issuer", ()))
    by = issuer.get("organizationName") or issuer.get("commonName") or "an unnamed authority"
    return f"{tls.version()}, certificate by {by}"


def _ended(exc: SocketEnded) -> _Result:
    end = exc.end
    code = f" with {end.code}" if end.code is not None else ""
    said = f": {end.detail}" if end.detail else ""
    return _failed(
        f"the server ended the connection{code}{said}",
        "If the reason does not help, try again in a minute: servers close connections when they restart.",
    )
