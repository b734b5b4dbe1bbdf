"""WebSockets through an HTTP proxy: when it is used, what it is sent, and how each of its faults is reported."""

from __future__ import annotations

import base64

import pytest
import trio
from _loopback import accept, frame, read_head, server_tls, serving, trusting_tls
from conftest import Leaks

from kadoa_trio import ConfigurationError, Endpoints, Timeouts
from kadoa_trio._errors import AttemptError
from kadoa_trio._net._proxy import Proxy, ProxyError, find_proxy, open_tunnel, proxy_secrets
from kadoa_trio._net._socket import open_socket
from kadoa_trio._redact import Secret, censor
from kadoa_trio._settings import Settings
from kadoa_trio.workspace import diagnose

PASSWORD = "pr0xy-pass/word"  # not a real one
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("environment", "scheme", "host", "expected"),
    [
        ({}, "wss", "realtime.kadoa.com", None),
        ({"https_proxy": "http://p:3128"}, "wss", "realtime.kadoa.com", ("p", 3128, False)),
        ({"https_proxy": "http://p:3128"}, "ws", "realtime.kadoa.com", None),
        ({"http_proxy": "p"}, "ws", "realtime.kadoa.com", ("p", 80, False)),
        ({"https_proxy": "https://p"}, "wss", "realtime.kadoa.com", ("p", 443, True)),
        ({"all_proxy": "http://p:1"}, "wss", "realtime.kadoa.com", ("p", 1, False)),
        ({"https_proxy": "http://p:1", "no_proxy": "kadoa.com"}, "wss", "realtime.kadoa.com", None),
        ({"https_proxy": "http://p:1", "no_proxy": "*"}, "wss", "realtime.kadoa.com", None),
        ({"https_proxy": "http://p:1"}, "wss", "127.0.0.1", None),
        ({"https_proxy": "http://p:1"}, "wss", "localhost", None),
        ({"all_proxy": "socks5://p:1"}, "wss", "realtime.kadoa.com", None),
        ({"https_proxy": "http://p:port"}, "wss", "realtime.kadoa.com", None),
    ],
)
def test_environment_names_the_proxy(
    environment: dict[str, str],
    scheme: str,
    host: str,
    expected: tuple[str, int, bool] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = find_proxy(scheme, host)
    assert (None if found is None else (found.host, found.port, found.secure)) == expected


def test_credentials_are_in_no_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", f"http://me:{PASSWORD.replace('/', '%2F')}@p:3128")
    found = find_proxy("wss", "realtime.kadoa.com")
    assert found is not None
    encoded = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    assert found.authorization == Secret(f"Basic {encoded}")
    assert PASSWORD not in repr(found) + str(found)
    assert "Basic" not in repr(found)


def test_credentials_that_are_no_text_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://me:p\udcff%2Fw@p:3128")
    found = find_proxy("wss", "realtime.kadoa.com")
    assert found is not None
    assert found.authorization == Secret("Basic " + base64.b64encode(b"me:p\xff/w").decode())


def test_all_credentials_of_the_environment_are_known_as_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_secrets() == ()
    monkeypatch.setenv("https_proxy", f"http://me:{PASSWORD.replace('/', '%2F')}@p:3128")
    monkeypatch.setenv("http_proxy", "p")
    monkeypatch.setenv("all_proxy", "socks5://you:other-password@p")
    encoded = [base64.b64encode(one.encode()).decode() for one in (f"me:{PASSWORD}", "you:other-password")]
    text = " ".join([PASSWORD, PASSWORD.replace("/", "%2F"), "other-password", *encoded])
    assert censor(text, *proxy_secrets()) == "[secret] [secret] [secret] [secret] [secret]"


@pytest.mark.parametrize("name", ["public_api", "realtime_api", "websocket"])
def test_plain_address_below_localhost_is_refused(name: str) -> None:
    scheme = "ws" if name == "websocket" else "http"
    with pytest.raises(ConfigurationError, match="in the clear"):
        Settings(endpoints=Endpoints(**{name: f"{scheme}://kadoa.localhost:8000"}))


@pytest.mark.sockets
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"])
async def test_websocket_on_loopback_is_reached_directly(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    async def asked(stream: trio.abc.Stream) -> None:
        raise AssertionError(await read_head(stream))

    async with serving(asked) as proxy, serving(websocket) as port:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy}")
        with trio.fail_after(60):
            async with open_through(f"ws://127.0.0.1:{port}") as socket:
                assert await socket.receive() == '{"type":"heartbeat"}'


class HttpProxy:
    """A proxy that passes bytes on to one port, whatever it was asked for."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.heads: list[bytes] = []

    async def __call__(self, client: trio.abc.Stream) -> None:
        self.heads.append(await read_head(client))
        await client.send_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as server, trio.open_nursery() as nursery:
            nursery.start_soon(self.pass_on, client, server, nursery.cancel_scope)
            nursery.start_soon(self.pass_on, server, client, nursery.cancel_scope)

    @staticmethod
    async def pass_on(source: trio.abc.Stream, sink: trio.abc.Stream, scope: trio.CancelScope) -> None:
        try:
            while data := await source.receive_some(65536):
                await sink.send_all(data)
        except trio.BrokenResourceError:
            pass
        scope.cancel()


async def websocket(stream: trio.abc.Stream) -> None:
    await accept(stream, frame(b'{"type":"heartbeat"}'))
    await trio.sleep_forever()


def open_through(url: str, **options: object):  # type: ignore[no-untyped-def]  # as open_socket
    return open_socket(url, token=Secret("t0k3n"), settings=Settings(**options), on_bytes=lambda _n: None)  # type: ignore[arg-type]


@pytest.mark.sockets
@pytest.mark.parametrize("secure", [False, True])
async def test_websocket_goes_through_a_proxy(monkeypatch: pytest.MonkeyPatch, secure: bool) -> None:
    tls = server_tls("far.example", "localhost")
    async with serving(websocket, tls=tls) as port:
        proxy = HttpProxy(port)
        async with serving(proxy, tls=tls if secure else None) as at:
            scheme = "https" if secure else "http"
            monkeypatch.setenv("https_proxy", f"{scheme}://me:{PASSWORD.replace('/', '%2F')}@localhost:{at}")
            with trio.fail_after(60):
                async with open_through("wss://far.example:8443", ssl_context=trusting_tls()) as socket:
                    assert await socket.receive() == '{"type":"heartbeat"}'
    head = proxy.heads[0]
    assert head.startswith(b"CONNECT far.example:8443 HTTP/1.1\r\n")
    assert b"authorization: basic " + base64.b64encode(f"me:{PASSWORD}".encode()).lower() in head.lower()
    assert b"t0k3n" not in head  # the token is the server's business


@pytest.mark.sockets
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n", "answered HTTP 407"),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 5\r\n\r\nnope!", "answered HTTP 403"),
        (b"HTTP/1.1 200 OK\r\n\r\nsurprise", "sent data before it was asked for any"),
        (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
        (b"", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, "does not speak HTTP"),
    ],
)
async def test_proxy_that_refuses_is_a_failed_attempt(
    monkeypatch: pytest.MonkeyPatch, leaks: Leaks, answer: bytes, words: str
) -> None:
    leaks.guard(PASSWORD, base64.b64encode(f"me:{PASSWORD}".encode()).decode())

    async def refuse(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(answer)

    async with serving(refuse) as at:
        monkeypatch.setenv("https_proxy", f"http://me:{PASSWORD.replace('/', '%2F')}@localhost:{at}")
        with trio.fail_after(60), pytest.raises(AttemptError) as caught:
            async with open_through("wss://far.example"):
                raise AssertionError("it is open")
    assert caught.value.step == "connect"
    assert words in caught.value.reason
    leaks.search_exception(caught.value)


@pytest.mark.sockets
async def test_fault_of_a_tunnel_shows_no_credentials(monkeypatch: pytest.MonkeyPatch, leaks: Leaks) -> None:
    leaks.guard(PASSWORD, base64.b64encode(f"me:{PASSWORD}".encode()).decode())

    async def refuse(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    async with serving(refuse) as at:
        monkeypatch.setenv("https_proxy", f"http://me:{PASSWORD.replace('/', '%2F')}@localhost:{at}")
        proxy = find_proxy("wss", "far.example")
        assert proxy is not None
        # The second one cannot be asked for.
        for host, words in (("far.example", "answered HTTP 403"), ("far\x00example", "cannot be asked for")):
            with trio.fail_after(60), pytest.raises(ProxyError, match=words) as caught:
                await open_tunnel(proxy, host, 443, trusting_tls)
            leaks.search_exception(caught.value)


@pytest.mark.sockets
async def test_proxy_that_hangs_meets_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    async with serving(hang) as at:
        monkeypatch.setenv("https_proxy", f"http://localhost:{at}")
        with trio.fail_after(60), pytest.raises(AttemptError, match=r"no answer within 0\.5 s"):
            async with open_through("wss://far.example", timeouts=Timeouts(handshake=0.5)):
                raise AssertionError("it is open")


@pytest.mark.sockets
async def test_diagnosis_uses_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    async with serving(refuse) as at:
        monkeypatch.setenv("https_proxy", f"http://me:{PASSWORD.replace('/', '%2F')}@localhost:{at}")
        with trio.fail_after(60):
            found = await diagnose("key-for-tests", endpoints=Endpoints(), test_event=None)
    steps = {step.name: step for step in found.steps}
    assert "resolves names" in steps["dns"].detail
    assert "answered HTTP 403" in steps["tcp"].detail
    assert "must allow CONNECT to realtime.kadoa.com:443" in steps["tcp"].advice
    assert not any(PASSWORD in step.detail + step.advice for step in found.steps)


def test_proxy_is_shown_as_host_and_port() -> None:
    assert str(Proxy("p", 3128, False, Secret("Basic x"))) == "p:3128"
