"""Which HTTP proxy the environment names for a host, and the tunnel through it: ``CONNECT``.

httpx reads ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` for the API; this
module reads the same for WebSockets, tokens and acknowledgements, so that all
go the same way. A proxy's credentials are sent in one header and nowhere else.
"""

from __future__ import annotations

import base64
import ssl
from collections.abc import Callable
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import attrs
import h11
import trio

from .._redact import Secret, presentable
from .._urls import is_loopback, port_of

_SCHEMES: Final = {"wss": "https", "ws": "http"}
_MAX_HEAD: Final = 64 * 1024


class ProxyError(OSError):
    """The proxy did not open the tunnel."""


@attrs.frozen
class Proxy:
    """An HTTP proxy."""

    host: str
    port: int
    secure: bool
    """Whether the connection to the proxy uses TLS."""
    authorization: Secret | None = attrs.field(default=None, repr=False)
    """The value of ``Proxy-Authorization``."""

    def __str__(self) -> str:
        return f"{presentable(self.host, 100)}:{self.port}"


def find_proxy(scheme: str, host: str) -> Proxy | None:
    """Return the proxy that the environment names for a host; None for the direct way.

    Loopback addresses are reached directly. SOCKS proxies are not supported
    and are ignored.
    """
    if not is_proxied(scheme, host):
        return None
    proxies = getproxies()
    parts = _parse(proxies.get(_SCHEMES.get(scheme, scheme)) or proxies.get("all"))
    if parts is None or parts.scheme not in ("http", "https"):
        return None
    return Proxy(parts.hostname or "", port_of(parts), parts.scheme == "https", _authorization(parts))


def is_proxied(scheme: str, host: str) -> bool:
    """Return whether the environment names a proxy for a host, be it one that `find_proxy` ignores."""
    if is_loopback(host) or proxy_bypass(host):
        return False
    proxies = getproxies()
    return bool(proxies.get(_SCHEMES.get(scheme, scheme)) or proxies.get("all"))


def proxy_secrets() -> tuple[Secret, ...]:
    """Return the credentials of the proxies that the environment names, because a proxy may repeat them."""
    proxies = getproxies()
    found = (_parse(proxies.get(name)) for name in ("http", "https", "all"))
    secrets = (None if parts is None else _authorization(parts) for parts in found)
    return tuple(dict.fromkeys(secret for secret in secrets if secret is not None))


def _parse(url: str | None) -> SplitResult | None:
    if not url:
        return None
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        name, _port = parts.hostname, parts.port
    except ValueError:
        return None  # httpx refuses it
    return parts if name else None


def _authorization(parts: SplitResult) -> Secret | None:
    if parts.username is None:
        return None
    password = unquote(parts.password or "")
    credentials = f"{unquote(parts.username)}:{password}"
    # The environment may hold bytes that are not UTF-8.
    encoded = base64.b64encode(credentials.encode(errors="surrogateescape")).decode()
    return Secret(f"Basic {encoded}", encoded, password, parts.password or "")


async def open_tunnel(
    proxy: Proxy, host: str, port: int, default_context: Callable[[], ssl.SSLContext]
) -> trio.abc.Stream:
    """Open a byte stream to *host* and *port* through a proxy.

    Being cancelled closes what is open so far.

    Raises:
        OSError: the proxy cannot be reached, or refused.
        trio.BrokenResourceError: it broke the connection.
    """
    stream: trio.abc.Stream = await trio.open_tcp_stream(proxy.host, proxy.port)
    done = False
    try:
        if proxy.secure:
            stream = trio.SSLStream(stream, default_context(), server_hostname=proxy.host, https_compatible=True)
        await _connect(stream, proxy, host, port)
        done = True
    finally:
        if not done:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)
    return stream


async def _connect(stream: trio.abc.Stream, proxy: Proxy, host: str, port: int) -> None:
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
    try:
        # Never bound to a name: it holds the credentials, and what is raised here shows this frame.
        await stream.send_all(_ask(http, target.encode("ascii"), proxy.authorization))
    except h11.LocalProtocolError:
        sent = False
    else:
        sent = True
    if not sent:
        raise ProxyError(f"the proxy {proxy} cannot be asked for {presentable(target, 100)}")
    status: int | None = None
    try:
        while status is None:
            event = http.next_event()
            if event is h11.NEED_DATA:
                http.receive_data(bytes(await stream.receive_some(4096)))
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif not isinstance(event, h11.InformationalResponse):
                break
    except h11.RemoteProtocolError:
        status = None
    if status is None:
        raise ProxyError(f"the proxy {proxy} closed the connection or does not speak HTTP")
    if not 200 <= status < 300:
        raise ProxyError(f"the proxy {proxy} answered HTTP {status}")
    if http.trailing_data[0]:
        raise ProxyError(f"the proxy {proxy} sent data before it was asked for any")


def _ask(http: h11.Connection, target: bytes, authorization: Secret | None) -> bytes:
    headers = [(b"Host", target)]
    if authorization is not None:
        headers.append((b"Proxy-Authorization", authorization.reveal().encode("ascii")))
    request = h11.Request(method=b"CONNECT", target=target, headers=headers)
    return (http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b"")
