"""URLs: default ports, addresses of this machine, and what a URL of an option must not hold."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import SplitResult, urlsplit

DEFAULT_PORTS: Final = {"http": 80, "ws": 80, "https": 443, "wss": 443}
"""The port of a URL that names none, by its scheme (RFC 9110, section 4.2; RFC 6455, section 3)."""


def port_of(parts: SplitResult) -> int:
    """Return the port that a URL leads to."""
    return parts.port or DEFAULT_PORTS[parts.scheme]


def fault_of_url(url: str, schemes: tuple[str, ...], *, allow_query: bool = False) -> str | None:
    """Say why a URL cannot be used, without repeating any of it; None for a URL that can be used.

    Args:
        url: the URL; somebody may have put a secret into it.
        schemes: the schemes that are allowed.
        allow_query: whether a query is allowed.
    """
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme not in schemes or not host:
        return f"must be a URL that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}"
    if parts.username is not None or parts.password is not None or parts.fragment or (parts.query and not allow_query):
        return f"must hold no credentials{' or' if allow_query else ', query or'} fragment"
    return None


def is_loopback(host: str) -> bool:
    """Return whether *host* is ``localhost`` itself or a literal loopback address.

    Names below ``.localhost`` are not, because a resolver may ask the DNS for
    them (RFC 6761, section 6.3, only says that it should not).
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
