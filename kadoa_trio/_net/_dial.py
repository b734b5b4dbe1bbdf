"""Opens byte streams to Kadoa: TCP, through a proxy where the environment names one, and TLS."""

from __future__ import annotations

import math
import socket
from urllib.parse import quote, urlsplit

import attrs
import trio

from .._settings import Settings
from .._urls import DEFAULT_PORTS, port_of
from ._http import default_ssl_context
from ._proxy import Proxy, find_proxy, open_tunnel


@attrs.frozen
class Address:
    """Where a URL leads."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Address:
        """Read the address of a URL."""
        parts = urlsplit(url)
        return cls(parts.scheme, parts.hostname or "", port_of(parts))

    @property
    def secure(self) -> bool:
        """Whether TLS is used."""
        return self.scheme in ("wss", "https")

    @property
    def host_header(self) -> str:
        """The value of the ``Host`` header (RFC 9110, section 7.2; RFC 6455, section 4.1)."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == DEFAULT_PORTS[self.scheme] else f"{name}:{self.port}"

    def find_proxy(self) -> Proxy | None:
        """Return the proxy that the environment names for it; None for the direct way."""
        return find_proxy(self.scheme, self.host)


def target_of(url: str) -> str:
    """Return the path of a URL as a request has it, with what it may not hold quoted."""
    return quote(urlsplit(url).path, safe="/%:@!$&'()*+,;=~") or "/"


async def open_stream(address: Address, settings: Settings) -> trio.abc.Stream:
    """Open a byte stream to *address*, by TLS if its scheme asks for it. Being cancelled closes what is open so far.

    Raises:
        OSError, UnicodeError, trio.BrokenResourceError, ConfigurationError: as for `open_tcp` and `start_tls`.
    """
    stream = await open_tcp(address, settings)
    if not address.secure:
        return stream
    try:
        return await start_tls(stream, address, settings)
    except BaseException:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)
        raise


async def open_tcp(address: Address, settings: Settings) -> trio.abc.Stream:
    """Open a byte stream to *address*: by the endpoints' own network, through a proxy, or directly.

    Being cancelled closes what is open so far.

    Raises:
        OSError: the host or the proxy cannot be reached, or the proxy refused.
        UnicodeError: the name of the host cannot be encoded.
        trio.BrokenResourceError: the proxy broke the connection.
    """
    network = settings.endpoints.network
    if network is not None:
        return await network.open_stream(address.host, address.port)
    proxy = address.find_proxy()
    if proxy is not None:
        return await open_tunnel(
            proxy, address.host, address.port, lambda: settings.ssl_context or default_ssl_context()
        )
    stream = await trio.open_tcp_stream(address.host, address.port)
    # A second line behind the heartbeat: the system, too, gives up a peer that no longer answers.
    idle = math.ceil(min(max(settings.timeouts.heartbeat, 1), 600))
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", idle),
        ("TCP_KEEPINTVL", max(1, idle // 3)),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 2 * idle * 1000),
    ):
        if hasattr(socket, name):
            stream.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return stream


async def start_tls(stream: trio.abc.Stream, address: Address, settings: Settings) -> trio.SSLStream[trio.abc.Stream]:
    """Make the TLS handshake with *address* over a stream, and return the stream above it.

    If this fails or is cancelled, *stream* must be closed by the caller.

    Raises:
        trio.BrokenResourceError: the handshake failed; its cause says why.
        ConfigurationError: the certificates that the environment names cannot be used.
    """
    context = settings.ssl_context or default_ssl_context()
    # As httpx does, also for a context that is the program's. What is sent is HTTP/1.1 or begins as such.
    context.set_alpn_protocols(["http/1.1"])
    # https_compatible: servers end the stream without TLS's close notification, and so do we.
    tls = trio.SSLStream(stream, context, server_hostname=address.host, https_compatible=True)
    await tls.do_handshake()
    return tls
