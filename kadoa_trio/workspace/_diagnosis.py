"""Finds out why no events come: every step of a connection by itself, with a verdict and what to do next."""

from __future__ import annotations

import enum
import math
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Final, final
from urllib.parse import urlsplit

import attrs
import trio

from .._checks import check_callable, check_seconds, check_text
from .._contexts import check_in_trio, sync_context
from .._errors import AttemptError, AuthenticationError, ConfigurationError, KadoaError, RequestRefusedError
from .._events import Event
from .._net._http import Token, default_ssl_context, describe, open_http
from .._net._proxy import find_proxy, open_tunnel
from .._net._socket import Socket, SocketEnded, open_socket
from .._net._wire import Heartbeat, decode, subscribe
from .._redact import Secret, hidden, presentable
from .._settings import Endpoints, Settings, Timeouts, fits_header, read_key, settings_of
from ._notifications import Notifications

_BLOCKED: Final = "A firewall or proxy in between may block it: allow {host} on port {port}, with WebSocket upgrades where it serves them."


_SECOND_LOOK: Final = 2.0


class Verdict(enum.Enum):
    """How a step of a diagnosis came out."""

    OK = "ok"
    WARNING = "warning"
    """It works, and something about it may keep events away."""
    FAILED = "failed"
    SKIPPED = "skipped"
    """It needs a step that has failed, or was not asked for."""


@final
@attrs.frozen(kw_only=True)
class DiagnosisStep:
    """One step, and what to do about it."""

    name: str
    verdict: Verdict
    seconds: float
    """How long it took."""
    detail: str
    """What was found, in words. Holds no secret."""
    advice: str = ""
    """The next thing to do; empty where there is nothing to be done."""


@final
@attrs.frozen(kw_only=True)
class Diagnosis:
    """All steps, in order."""

    steps: tuple[DiagnosisStep, ...]

    @property
    def ok(self) -> bool:
        """Whether no step failed."""
        return all(step.verdict is not Verdict.FAILED for step in self.steps)

    @property
    def first_failure(self) -> DiagnosisStep | None:
        """The step to look at."""
        return next((step for step in self.steps if step.verdict is Verdict.FAILED), None)


class _Found(Exception):  # not an error: the verdict of a step
    def __init__(self, detail: str, advice: str = "", verdict: Verdict = Verdict.OK) -> None:
        super().__init__(detail, advice, verdict)
        self.detail, self.advice, self.verdict = detail, advice, verdict


def _failed(detail: str, advice: str) -> _Found:
    return _Found(detail, advice, Verdict.FAILED)


class _Doctor:
    def __init__(self, settings: Settings, on_step: Callable[[DiagnosisStep], None] | None) -> None:
        self.settings = settings
        self.steps: list[DiagnosisStep] = []
        self.secrets: list[Secret] = []
        self._on_step = on_step
        url = urlsplit(settings.endpoints.websocket)
        self.secure = url.scheme == "wss"
        self.host = url.hostname or ""
        self.port = url.port or (443 if self.secure else 80)

    def ssl_context(self) -> ssl.SSLContext:
        return self.settings.ssl_context or default_ssl_context()

    def add(self, name: str, verdict: Verdict, seconds: float, detail: str, advice: str) -> None:
        # Both repeat what servers, proxies and the environment say.
        step = DiagnosisStep(
            name=name,
            verdict=verdict,
            seconds=seconds,
            detail=presentable(detail, 500, *self.secrets),
            advice=presentable(advice, 500, *self.secrets),
        )
        self.steps.append(step)
        if self._on_step is not None:
            self._on_step(step)

    def skip(self, name: str, why: str) -> None:
        self.add(name, Verdict.SKIPPED, 0.0, why, "")

    @sync_context
    def step(self, name: str) -> Iterator[None]:
        """Time a step; it says what it has found by raising `_Found`, as it also does when it has failed."""
        began = trio.current_time()
        try:
            yield
        except _Found as found:
            self.add(name, found.verdict, trio.current_time() - began, found.detail, found.advice)
        except KadoaError as exc:
            self.add(name, Verdict.FAILED, trio.current_time() - began, str(exc), self.advice(exc))
        else:
            raise AssertionError("a step says what it has found")

    @property
    def healthy(self) -> bool:
        return self.steps[-1].verdict in (Verdict.OK, Verdict.WARNING)

    def advice(self, exc: KadoaError) -> str:
        """Say what to do about a fault."""
        text = str(exc)
        if isinstance(exc, (AuthenticationError, RequestRefusedError)) and exc.status == 407:
            return "A proxy wants credentials: put them into HTTPS_PROXY, as http://user:password@host:port."
        if isinstance(exc, AuthenticationError):
            if not exc.server_message:
                return (
                    "The answer has none of Kadoa's words, so that a proxy or firewall in between may have given it. "
                    "If there is none, make a new key in Kadoa and put it into KADOA_API_KEY."
                )
            if exc.step == "handshake":
                return "The key is good and the token made from it is not: check that both endpoints are of one Kadoa."
            return "Compare the key with the one in Kadoa (Settings, API keys), or make a new one."
        if "certificate refused" in text:
            return (
                "If a proxy of your organisation reads TLS, trust its authority (SSL_CERT_FILE or ssl_context); else "
                "somebody may be in between."
            )
        if "the name does not resolve" in text:
            return "Check the endpoint's name, the machine's DNS and its network."
        if isinstance(exc, AttemptError) and exc.status == 429:
            return "Too many requests with this key: wait a minute, and look for other programs that use it."
        if isinstance(exc, AttemptError) and exc.status is not None and exc.status >= 500:
            return "Kadoa, or a gateway before it, has a fault of its own. Try again; see Kadoa's status page."
        if isinstance(exc, AttemptError) and exc.step in ("token", "notifications"):
            api = urlsplit(self.settings.endpoints.public_api)
            return _BLOCKED.format(host=api.hostname, port=api.port or (443 if api.scheme == "https" else 80))
        return _BLOCKED.format(host=self.host, port=self.port)


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
    """Go through everything that a connection needs, one step after the other.

    The steps: ``key``, ``token``, ``channel``, ``dns``, ``tcp``, ``tls``,
    ``handshake``, ``subscription``, ``heartbeat``, ``test event``. A step
    that needs one that has failed is skipped, the others are done all the
    same, so that a blocked WebSocket is told from a refused key.

    Example::

        diagnosis = await diagnose(on_step=print)
        if (step := diagnosis.first_failure) is not None:
            print(step.detail, step.advice)

    Args:
        api_key: Kadoa's API key; None reads ``KADOA_API_KEY``.
        endpoints: where Kadoa is; None reads the environment.
        test_event: the type of the mock event that Kadoa is asked to send at
            the end. It goes to every channel of that type, people's mailboxes
            included. None sends nothing.
        workflow_id: the workflow that the mock event is about.
        heartbeat_timeout: how long a first frame is waited for, in seconds.
        event_timeout: how long the mock event is waited for, in seconds.
        on_step: called after each step. It must be quick, and not raise.
        ssl_context: for both the API and the WebSocket.
        allow_insecure: as for `open_realtime`.

    Cancellation abandons the diagnosis. Faults are steps, not exceptions.

    Raises:
        ConfigurationError: an endpoint, a number, or what the environment says
            about proxies and certificates cannot be used.
    """
    given = hidden(api_key)
    del api_key  # whatever is raised through this frame shows its names
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
    doctor = _Doctor(settings, on_step)
    key: Secret | None = None
    with doctor.step("key"):
        try:
            key = read_key(given)
        except ConfigurationError as exc:
            raise _failed(str(exc), "Make one in Kadoa (Settings, API keys) and put it into KADOA_API_KEY.") from None
        if not fits_header(key):
            key = None
            raise _failed(
                "the API key is not printable ASCII, or has spaces around it", "Copy it again, without a line's end."
            )
        doctor.secrets.append(key)
        source = "KADOA_API_KEY" if given is None else "the program"
        raise _Found(f"{len(key.reveal())} characters, from {source}")
    token: Token | None = None
    if key is None:
        for name in ("token", "channel"):
            doctor.skip(name, "needs a key")
        await _reach(doctor)
        _skip_rest(doctor, 0)
        return Diagnosis(steps=tuple(doctor.steps))
    async with open_http(api_key=key, settings=settings, wall_clock=_utc_now) as http:
        notifications = Notifications(http)
        with doctor.step("token"):
            token = await http.fetch_token()
            doctor.secrets.append(token.access_token)
            raise _Found(f"from {settings.endpoints.public_api}, for team {token.team_id}")
        if token is None:
            doctor.skip("channel", "needs a token")
        else:
            with doctor.step("channel"):
                raise await _look_at_channel(notifications)
        reachable = await _reach(doctor)
        if token is None or not reachable:
            _skip_rest(doctor, 0)
        else:
            await _listen(doctor, notifications, token, test_event, workflow_id, event_timeout)
    return Diagnosis(steps=tuple(doctor.steps))


def _skip_rest(doctor: _Doctor, begin: int) -> None:
    for name in ("handshake", "subscription", "heartbeat", "test event")[begin:]:
        doctor.skip(name, "needs the steps before it")


async def _look_at_channel(notifications: Notifications) -> _Found:
    channel = next((one for one in await notifications.channels() if one.is_websocket), None)
    if channel is None:
        return _failed(
            "no WebSocket channel is configured in this workspace: no event is sent to any WebSocket",
            "Run `kadoa-trio setup --event workflow_finished`, or add the channel in the dashboard under Notifications.",
        )
    sent = [one for one in await notifications.settings() if one.enabled and channel.id in (one.channel_ids or ())]
    if not sent:
        return _failed(
            f"the WebSocket channel {channel.name or channel.id!r} is there, and no event type is sent to it",
            "Run `kadoa-trio setup --event workflow_finished`, or choose event types in the dashboard.",
        )
    types = sorted({one.event_type for one in sent})
    shown = ", ".join(types[:5]) + (f" and {len(types) - 5} more" if len(types) > 5 else "")
    return _Found(f"{channel.name or channel.id}: {shown}")


async def _reach(doctor: _Doctor) -> bool:
    """Go as far as TLS by hand; return whether that worked."""
    settings, host, port = doctor.settings, doctor.host, doctor.port
    if settings.endpoints.network is not None:
        for name in ("dns", "tcp", "tls"):
            doctor.skip(name, "the endpoints bring a network of their own")
        return True
    blocked = _BLOCKED.format(host=host, port=port)
    proxy = find_proxy("wss" if doctor.secure else "ws", host)
    if proxy is not None:
        blocked = f"The environment names the proxy {proxy}: it must allow CONNECT to {host}:{port}. " + blocked
        doctor.skip("dns", f"the proxy {proxy} resolves names")
        return await _reach_by(doctor, blocked, lambda: open_tunnel(proxy, host, port, doctor.ssl_context))
    with doctor.step("dns"):
        try:
            with trio.fail_after(settings.timeouts.handshake):
                found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:
            raise _failed(
                f"{host}: {describe(exc)}", "Check the endpoint's name, the machine's DNS and its network."
            ) from None
        except trio.TooSlowError:
            raise _failed(
                f"{host}: no answer within {settings.timeouts.handshake:g} s",
                "Check the machine's DNS and its network.",
            ) from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        raise _Found(f"{host} is {', '.join(addresses[:3])}")
    if not doctor.healthy:
        doctor.skip("tcp", "needs an address")
        doctor.skip("tls", "needs a connection")
        return False
    return await _reach_by(doctor, blocked, lambda: trio.open_tcp_stream(host, port))  # noqa: ASYNC105  # awaited there


async def _reach_by(doctor: _Doctor, blocked: str, dial: Callable[[], Awaitable[trio.abc.Stream]]) -> bool:
    settings, host, port = doctor.settings, doctor.host, doctor.port
    stream: trio.abc.Stream | None = None
    try:
        with doctor.step("tcp"):
            try:
                with trio.fail_after(settings.timeouts.handshake):
                    stream = await dial()
            except (OSError, trio.BrokenResourceError) as exc:
                raise _failed(f"port {port}: {describe(exc)}", blocked) from None
            except trio.TooSlowError:
                raise _failed(f"port {port}: no answer within {settings.timeouts.handshake:g} s", blocked) from None
            raise _Found(f"port {port} answers")
        if stream is None:
            doctor.skip("tls", "needs a connection")
            return False
        if not doctor.secure:
            doctor.skip("tls", "the endpoint is plain ws://")
            return True
        with doctor.step("tls"):
            tls = trio.SSLStream(stream, doctor.ssl_context(), server_hostname=host, https_compatible=True)
            try:
                with trio.fail_after(settings.timeouts.handshake):
                    await tls.do_handshake()
            except trio.BrokenResourceError as exc:
                reason = describe(exc)
                raise _failed(reason, doctor.advice(AttemptError("tls", reason))) from None
            except trio.TooSlowError:
                raise _failed(f"no answer within {settings.timeouts.handshake:g} s", blocked) from None
            raise _Found(_tls_in_words(tls))
        return doctor.healthy
    finally:
        if stream is not None:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)


def _tls_in_words(tls: trio.SSLStream[trio.abc.Stream]) -> str:
    certificate = tls.getpeercert() or {}
    issuer = dict(pair[0] for pair in certificate.get("issuer", ()))
    by = issuer.get("organizationName") or issuer.get("commonName") or "an unnamed authority"
    return f"{tls.version()}, certificate by {by}"


async def _listen(
    doctor: _Doctor,
    notifications: Notifications,
    token: Token,
    test_event: str | None,
    workflow_id: str | None,
    event_timeout: float,
) -> None:
    began = trio.current_time()
    fault: KadoaError | None = None
    try:
        async with open_socket(
            doctor.settings.endpoints.websocket,
            token=token.access_token,
            settings=doctor.settings,
            on_bytes=lambda _count: None,
        ) as opened:
            doctor.add("handshake", Verdict.OK, trio.current_time() - began, "the WebSocket is open", "")
            await _subscribe(doctor, opened, token.team_id)
            await _hear(doctor, opened)
            await _test(doctor, opened, notifications, test_event, workflow_id, event_timeout)
            return
    except (AttemptError, AuthenticationError) as exc:
        fault = exc
    doctor.add("handshake", Verdict.FAILED, trio.current_time() - began, str(fault), doctor.advice(fault))
    _skip_rest(doctor, 1)


async def _subscribe(doctor: _Doctor, opened: Socket, team_id: str) -> None:
    with doctor.step("subscription"):
        with trio.move_on_after(doctor.settings.timeouts.handshake):
            try:
                await opened.send(subscribe(team_id, None))
            except SocketEnded as exc:
                raise _ended(exc) from None
            raise _Found(f"to the channel of team {team_id}")
        raise _failed("could not be sent", _BLOCKED.format(host=doctor.host, port=doctor.port))


async def _hear(doctor: _Doctor, opened: Socket) -> None:
    if not doctor.healthy:
        doctor.skip("heartbeat", "needs a subscription")
        return
    timeout = doctor.settings.timeouts.heartbeat
    with doctor.step("heartbeat"):
        with trio.move_on_after(timeout):
            try:
                first = decode(await opened.receive())
            except SocketEnded as exc:
                raise _ended(exc) from None
            what = "a heartbeat" if isinstance(first, Heartbeat) else f"a frame ({type(first).__name__.lower()})"
            raise _Found(f"{what} came")
        raise _failed(
            f"no frame within {timeout:g} s",
            "The connection is open and nothing comes through it: a proxy that buffers, or a sick server.",
        )


async def _test(
    doctor: _Doctor,
    opened: Socket,
    notifications: Notifications,
    test_event: str | None,
    workflow_id: str | None,
    timeout: float,
) -> None:
    if test_event is None:
        doctor.skip("test event", "not asked for")
    elif not doctor.healthy:
        doctor.skip("test event", "needs a live connection")
    else:
        with doctor.step("test event"):
            raise await _await_event(opened, notifications, test_event, workflow_id, timeout)


def _ended(exc: SocketEnded) -> _Found:
    end = exc.end
    code = f" with {end.code}" if end.code is not None else ""
    said = f": {end.reason}" if end.reason else ""
    return _failed(
        f"the server ended the connection{code}{said}",
        "If the words do not help, try again in a minute: servers close connections when they restart.",
    )


async def _await_event(
    opened: Socket, notifications: Notifications, test_event: str, workflow_id: str | None, timeout: float
) -> _Found:
    sent = await notifications.send_test(test_event, workflow_id=workflow_id)
    other: Event | None = None
    with trio.move_on_after(timeout) as waiting:
        while True:
            try:
                frame = decode(await opened.receive())
            except SocketEnded as exc:
                return _ended(exc)
            if not isinstance(frame, Event):
                continue
            if frame.id == sent:
                return _Found(f"{test_event} {sent} came")
            if frame.type == test_event and sent is None:
                return _Found(f"a {test_event} event came; Kadoa named no id to compare")
            if frame.type == test_event:
                # Perhaps a real one; the other may be a step behind it.
                other = frame
                waiting.deadline = min(waiting.deadline, trio.current_time() + _SECOND_LOOK)
    if other is not None:
        # That the API's id is the socket's is not documented.
        return _Found(
            f"a {test_event} event came, with another id than the API named ({other.id}, not {sent})",
            "It may be a real one that came at this moment; or the two ids differ always.",
            Verdict.WARNING,
        )
    return _failed(
        f"Kadoa took the test event and did not send it within {timeout:g} s",
        f"Check that {test_event} goes to the WebSocket channel: `kadoa-trio setup --event {test_event} --dry-run`.",
    )


def _utc_now() -> datetime:
    return datetime.now(UTC)
