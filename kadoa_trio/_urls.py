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


def fault_of_url(url: object, *schemes: str) -> str | None:
    """Say why a URL cannot be used, without repeating any of it; None for a URL that can be used.

    Args:
        url: what was given as a URL; somebody may have put a secret into it.
        schemes: the schemes that are allowed.
    """
    wanted = " or ".join(f"{scheme}://" for scheme in schemes)
    if not isinstance(url, str):
        return f"must be a {wanted} URL, not {type(url).__name__}"
    # urlsplit drops line breaks, tabs, and spaces at the ends. Spaces in the path are quoted when it is sent.
    if not url.isprintable() or url != url.strip():
        return "must hold no control characters, and no spaces at its ends"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme not in schemes or not host or " " in host or port == 0:
        return f"must be a {wanted} URL with a host, and with a port from 1 to 65535 if it has one"
    if parts.username is not None or parts.password is not None or parts.fragment:
        return "must hold no credentials or fragment"
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
