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


WANTED = "must be a wss:// or ws:// URL with a host, and with a port from 1 to 65535 if it has one"
UNWANTED = "must hold no credentials or fragment"


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("wss://x/path", None),
        ("ws://x:1", None),
        ("wss://x?key=secret", None),
        ("wss://[::1", "is not a URL"),
        ("wss://x:port", "is not a URL"),
        ("wss://x:99999", "is not a URL"),
        ("https://x", WANTED),
        ("wss://", WANTED),
        ("x", WANTED),
        ("", WANTED),
        ("wss://x:0", WANTED),
        (5, "must be a wss:// or ws:// URL, not int"),
        ("wss://x y", WANTED),
        ("wss://x/a b", None),
        ("wss://x\n", "must hold no control characters, and no spaces at its ends"),
        (" wss://x", "must hold no control characters, and no spaces at its ends"),
        ("wss://me@x", UNWANTED),
        ("wss://:secret@x", UNWANTED),
        ("wss://x#part", UNWANTED),
    ],
)
def test_fault_of_a_url_names_what_is_wrong_and_repeats_nothing(url: object, fault: str | None) -> None:
    assert fault_of_url(url, "wss", "ws") == fault
