"""URLs of options: ports, addresses of this machine, and what is refused."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from kadoa_trio._urls import fault_of_url, is_loopback, port_of


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("kadoa.localhost", False),
        ("localhost.", False),
        (".localhost", False),
        ("localhost.example", False),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("127.1", False),
    ],
)
def test_loopback_is_a_literal_address_or_localhost_itself(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("url", "port"),
    [
        ("http://x", 80),
        ("https://x", 443),
        ("ws://x", 80),
        ("wss://x", 443),
        ("ws://x:8080", 8080),
        ("wss://[::1]:80", 80),
        ("http://x:0", 80),
    ],
)
def test_port_is_the_urls_own_or_that_of_its_scheme(url: str, port: int) -> None:
    assert port_of(urlsplit(url)) == port


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("wss://x/path", None),
        ("ws://x:1", None),
        ("wss://[::1", "is not a URL"),
        ("wss://x:port", "is not a URL"),
        ("wss://x:99999", "is not a URL"),
        ("https://x", "must be a URL that begins with wss:// or ws://"),
        ("wss://", "must be a URL that begins with wss:// or ws://"),
        ("x", "must be a URL that begins with wss:// or ws://"),
        ("", "must be a URL that begins with wss:// or ws://"),
        ("wss://me@x", "must hold no credentials, query or fragment"),
        ("wss://:secret@x", "must hold no credentials, query or fragment"),
        ("wss://x#part", "must hold no credentials, query or fragment"),
        ("wss://x?key=secret", "must hold no credentials, query or fragment"),
    ],
)
def test_fault_of_a_url_names_what_is_wrong_and_repeats_nothing(url: str, fault: str | None) -> None:
    assert fault_of_url(url, ("wss", "ws")) == fault


def test_query_is_allowed_if_asked_for() -> None:
    assert fault_of_url("http://x?key=secret", ("http", "https"), allow_query=True) is None
    assert fault_of_url("http://x#part", ("http", "https"), allow_query=True) == "must hold no credentials or fragment"
