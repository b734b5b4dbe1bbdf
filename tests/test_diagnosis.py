"""The diagnosis: each fault is found at its step, and steps are skipped if one that they need has failed."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
import trio
import trio.testing
from _loopback import accept, frame, read_head, server_tls, serving, trusting_tls

from kadoa_trio import (
    ConfigurationError,
    Endpoints,
)
from kadoa_trio.testing import open_simulated_kadoa
from kadoa_trio.workspace import (
    Diagnosis,
    DiagnosisStep,
    Verdict,
    _diagnosis,
    diagnose,
)

NAMES = ["key", "token", "channel", "dns", "tcp", "tls", "handshake", "subscription", "heartbeat", "test event"]


def verdicts(diagnosis: Diagnosis) -> dict[str, str]:
    assert [step.name for step in diagnosis.steps] == NAMES
    for step in diagnosis.steps:
        assert step.seconds >= 0
        assert step.verdict is not Verdict.FAILED or step.advice, f"{step} says nothing to do"
    return {step.name: step.verdict.value for step in diagnosis.steps}


def test_steps_need_earlier_steps_only() -> None:
    assert [name for name, _needs, _function in _diagnosis._STEPS] == NAMES
    for place, (name, needs, _function) in enumerate(_diagnosis._STEPS):
        assert set(needs) <= set(NAMES[:place]), name


async def test_skipped_step_names_the_step_that_it_needs(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        with kadoa.suffering(handshake_status=502):
            diagnosis = await diagnose(kadoa.api_key, endpoints=kadoa.endpoints)
    details = {step.name: step.detail for step in diagnosis.steps if step.verdict is Verdict.SKIPPED}
    assert details == {
        **dict.fromkeys(("dns", "tcp", "tls"), "the endpoints have a network of their own"),
        "subscription": "needs the step 'handshake'",
        "heartbeat": "needs the step 'subscription'",
        "test event": "needs the step 'heartbeat'",
    }


async def test_cancelled_diagnosis_leaves_no_connection_open(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        for faults in ({"token_hang": True}, {"no_heartbeats": True}):
            with kadoa.suffering(**faults):
                with trio.move_on_after(1) as scope:
                    await diagnose(kadoa.api_key, endpoints=kadoa.endpoints)
                assert scope.cancelled_caught
        assert kadoa.handshakes == 1
        # Its client has closed the connection.
        await trio.testing.wait_all_tasks_blocked()
        assert kadoa.connections == []


async def test_healthy_kadoa_passes_every_step(autojump_clock: Any) -> None:
    reported: list[DiagnosisStep] = []
    async with open_simulated_kadoa() as kadoa:
        diagnosis = await diagnose(kadoa.api_key, endpoints=kadoa.endpoints, on_step=reported.append)
        assert diagnosis.ok
        assert diagnosis.first_failure is None
        assert tuple(reported) == diagnosis.steps
        found = verdicts(diagnosis)
        assert {found[name] for name in ("dns", "tcp", "tls")} == {"skipped"}
        assert {found[name] for name in NAMES if name not in ("dns", "tcp", "tls")} == {"ok"}
        assert kadoa.workspace.tests == [("workflow_finished", None)]
        assert not any(kadoa.api_key in step.detail + step.advice for step in reported)


@pytest.mark.parametrize(
    ("faults", "step", "words"),
    [
        ({"token_status": 401, "token_body": b'{"error":"no such key"}'}, "token", "no such key"),
        ({"token_status": 403, "token_body": b"<html>Blocked by policy</html>"}, "token", "proxy or firewall"),
        ({"token_status": 407, "token_body": b"<html>Proxy</html>"}, "token", "credentials"),
        ({"token_status": 503}, "token", "status page"),
        ({"token_status": 429}, "token", "Too many requests"),
        ({"token_hang": True}, "token", "no answer within 10 s"),
        ({"api_status": 500}, "channel", "HTTP 500"),
        ({"handshake_status": 401}, "handshake", "both endpoints belong to the same Kadoa"),
        ({"handshake_status": 502}, "handshake", "status page"),
        ({"handshake_hang": True}, "handshake", "no answer within 10 s"),
        ({"accept_then_close": 1008}, "heartbeat", "ended the connection with 1008: simulated"),
        ({"no_heartbeats": True}, "heartbeat", "no frame within 30 s"),
    ],
)
async def test_fault_is_found_at_its_step(autojump_clock: Any, faults: dict[str, Any], step: str, words: str) -> None:
    async with open_simulated_kadoa() as kadoa:
        with kadoa.suffering(**faults):
            diagnosis = await diagnose(kadoa.api_key, endpoints=kadoa.endpoints)
        verdicts(diagnosis)
        failure = diagnosis.first_failure
        assert failure is not None
        assert failure.name == step
        assert words in failure.detail + failure.advice


async def test_missing_channel_and_missing_event_types_are_different_findings(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        kadoa.workspace.settings.clear()
        failure = (await diagnose(kadoa.api_key, endpoints=kadoa.endpoints, test_event=None)).first_failure
        assert failure is not None
        assert "no event type is sent to it" in failure.detail
        kadoa.workspace.channels.clear()
        diagnosis = await diagnose(kadoa.api_key, endpoints=kadoa.endpoints)
        failure = diagnosis.first_failure
        assert failure is not None
        assert "no WebSocket channel is configured" in failure.detail
        assert verdicts(diagnosis)["test event"] == "failed"


async def test_event_with_another_id_than_the_api_named_is_a_warning(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa, trio.open_nursery() as nursery:
        kadoa.workspace.settings.clear()  # the test event does not come

        @nursery.start_soon
        async def another_one() -> None:
            while not kadoa.workspace.tests:  # noqa: ASYNC110  # it has no event
                await trio.sleep(1)
            kadoa.publish("workflow_finished")

        found = verdicts(await diagnose(kadoa.api_key, endpoints=kadoa.endpoints))
        assert found["test event"] == "warning"


@pytest.mark.parametrize("key", ["", "with space ", "ключ", "line\n"])
async def test_unusable_key_does_not_stop_the_network_steps(
    key: str, monkeypatch: pytest.MonkeyPatch, autojump_clock: Any
) -> None:
    monkeypatch.setenv("KADOA_API_KEY", key)
    async with open_simulated_kadoa() as kadoa:
        found = verdicts(await diagnose(endpoints=kadoa.endpoints))
        assert found["key"] == "failed"
        assert found["token"] == found["channel"] == found["handshake"] == "skipped"
        assert kadoa.token_requests == 0


async def test_wrong_option_is_an_error_and_not_a_step() -> None:
    with pytest.raises(ConfigurationError):
        await diagnose("key", event_timeout=0)
    with pytest.raises(ConfigurationError):
        await diagnose("key", endpoints=Endpoints(websocket="http://x"))


# Real sockets, where the way itself is what fails.


async def kadoa_in_tls(stream: trio.abc.Stream) -> None:
    head = await read_head(stream)
    if head.startswith(b"POST /v4"):
        body = b'{"access_token":"t","team_id":"team"}'
    else:
        body = b'{"data":{"channels":[{"id":"c","channelType":"WEBSOCKET"}],"settings":[]}}'
    await stream.send_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


async def socket_in_tls(stream: trio.abc.Stream) -> None:
    await accept(stream, frame(b'{"type":"heartbeat"}'))
    await trio.sleep_forever()


@pytest.mark.sockets
async def test_tls_step_names_the_authority_or_the_fault() -> None:
    tls = server_tls("localhost")
    async with serving(kadoa_in_tls, tls=tls) as api, serving(socket_in_tls, tls=tls) as ws:
        endpoints = Endpoints(public_api=f"https://localhost:{api}", websocket=f"wss://localhost:{ws}")
        with trio.fail_after(60):
            found = await diagnose("key-for-tests", endpoints=endpoints, ssl_context=trusting_tls(), test_event=None)
            steps = {step.name: step for step in found.steps}
            assert "certificate by trustme" in steps["tls"].detail
            assert steps["heartbeat"].verdict is Verdict.OK
            # As behind a proxy that reads TLS with an authority of its own.
            found = await diagnose(
                "key-for-tests", endpoints=endpoints, ssl_context=ssl.create_default_context(), test_event=None
            )
            steps = {step.name: step for step in found.steps}
            assert steps["token"].verdict is steps["tls"].verdict is Verdict.FAILED
            assert "trust its authority" in steps["tls"].advice


@pytest.mark.sockets
async def test_blocked_websocket_fails_at_tcp_and_not_at_the_token() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    closed = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    async with open_simulated_kadoa(loopback=True) as kadoa:
        endpoints = Endpoints(public_api=kadoa.endpoints.public_api, websocket=f"ws://127.0.0.1:{closed}")
        with trio.fail_after(60):
            found = await diagnose(kadoa.api_key, endpoints=endpoints)
        failure = found.first_failure
        assert failure is not None
        assert failure.name == "tcp"
        assert "Connection refused" in failure.detail
        assert f"port {closed}" in failure.advice
        assert verdicts(found)["token"] == "ok"


@pytest.mark.sockets
async def test_blocked_api_fails_at_the_token_with_the_apis_address() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    closed = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    async with serving(socket_in_tls) as ws:
        endpoints = Endpoints(public_api=f"http://127.0.0.1:{closed}", websocket=f"ws://127.0.0.1:{ws}")
        with trio.fail_after(60):
            failure = (await diagnose("key-for-tests", endpoints=endpoints)).first_failure
        assert failure is not None
        assert failure.name == "token"
        assert f"allow 127.0.0.1 on port {closed}" in failure.advice


@pytest.mark.sockets
async def test_html_page_instead_of_an_upgrade_fails_the_handshake() -> None:
    async def page(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>")

    async with open_simulated_kadoa(loopback=True) as kadoa, serving(page) as port:
        endpoints = Endpoints(public_api=kadoa.endpoints.public_api, websocket=f"ws://127.0.0.1:{port}")
        with trio.fail_after(60):
            failure = (await diagnose(kadoa.api_key, endpoints=endpoints)).first_failure
        assert failure is not None
        assert failure.name == "handshake"
        assert "firewall or proxy" in failure.advice
