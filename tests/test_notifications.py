"""The notifications API, setting up a workspace, and the diagnosis; mostly in memory, on virtual time."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trio
from _loopback import accept, everything_said, frame, read_head, server_tls, serving, trusting_tls

from kadoa_trio import (
    AttemptError,
    AuthenticationError,
    ConfigurationError,
    Endpoints,
    ProtocolError,
    RequestRefusedError,
)
from kadoa_trio.testing import SimulatedKadoa, open_simulated_kadoa
from kadoa_trio.workspace import (
    AddChannel,
    CreateChannel,
    CreateSetting,
    Diagnosis,
    DiagnosisStep,
    EnableSetting,
    Notifications,
    Setting,
    SetupError,
    Verdict,
    apply_plan,
    diagnose,
    open_notifications,
    plan_streaming,
)

EVENTS = ["workflow_failed", "workflow_finished"]


@asynccontextmanager
async def workspace(*, empty: bool = False) -> AsyncIterator[tuple[SimulatedKadoa, Notifications]]:
    async with (
        open_simulated_kadoa() as kadoa,
        open_notifications(kadoa.api_key, endpoints=kadoa.endpoints) as notifications,
    ):
        if empty:
            kadoa.workspace.clear()
        yield kadoa, notifications


# ---- the API -------------------------------------------------------------------------------------------------------


async def test_channels_and_settings_are_read_and_made() -> None:
    async with workspace(empty=True) as (_kadoa, notifications):
        assert await notifications.channels() == ()
        made = await notifications.create_channel("mine")
        assert made.is_websocket
        assert made.name == "mine"
        assert await notifications.channels() == (made,)
        setting = await notifications.create_setting("workflow_failed", [made.id], workflow_id="wf_1")
        assert (setting.event_type, setting.workflow_id, setting.enabled) == ("workflow_failed", "wf_1", True)
        assert setting.channel_ids == (made.id,)
        assert await notifications.settings() == (setting,)
        changed = await notifications.update_setting(setting, enabled=False)
        assert not changed.enabled
        assert changed.channel_ids == (made.id,)
        assert "workflow_failed" in await notifications.event_types()


async def test_test_event_arrives_on_the_socket(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime), open_notifications(kadoa.api_key, endpoints=kadoa.endpoints) as api:
        event_id = await api.send_test("workflow_failed", workflow_id="wf_5")
        event = await realtime.events.receive()
        assert (event.id, event.workflow_id) == (event_id, "wf_5")


@pytest.mark.parametrize("total", [True, False])
async def test_log_is_read_by_pages_and_filters(total: bool) -> None:
    async with workspace() as (kadoa, notifications):
        kadoa.faults.log_without_total = not total
        sent = kadoa.publish_many(7)
        rows = kadoa.stream.log(kadoa.faults, trio.current_time(), None, None)
        found = []
        offset = 0
        while True:
            page = await notifications.log(offset=offset, limit=3)
            assert page.total == (len(rows) if total else None)
            found += page.entries
            offset += len(page.entries)
            if not page.has_more:
                break
        assert [entry.id for entry in found] == [row["id"] for row in rows]
        # One row for each channel and try.
        sockets = [entry for entry in found if entry.channel_config == {"channelType": "WEBSOCKET"}]
        ids = dict.fromkeys(entry.event_id for entry in reversed(sockets))
        assert list(ids) == [event.id for event in sent]
        assert len(sockets) > 7
        assert {entry.event_status for entry in found} == {"SENT", "FAILED"}
        assert found[0].created_at is not None
        assert found[0].payload["workflowId"] == "wf_123"
        now = datetime.now(UTC)
        assert (await notifications.log(since=now + timedelta(hours=1))).entries == ()
        assert len((await notifications.log(until=now + timedelta(hours=1))).entries) == min(len(rows), 100)
        mails = await notifications.log(event_type="credits_low")
        assert {entry.event_type for entry in mails.entries} == {"credits_low"}
        for wrong in ({"limit": 0}, {"limit": 101}, {"offset": -1}, {"since": datetime(2026, 1, 1)}):
            with pytest.raises(ValueError):
                await notifications.log(**wrong)  # type: ignore[arg-type]


async def test_odd_row_of_the_log_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [7, {"id": 5, "eventId": None, "createdAt": "soon", "eventType": ["x"]}, {"id": "a", "eventId": "e"}]
    async with workspace() as (kadoa, notifications):
        monkeypatch.setattr(type(kadoa.stream), "log", lambda *_: rows)
        page = await notifications.log()
        assert [entry.id for entry in page.entries] == [None, "5", "a"]
        assert [entry.event_id for entry in page.entries] == [None, None, "e"]
        assert [entry.created_at for entry in page.entries] == [None, None, None]
        assert page.entries[1].raw == rows[1]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, AuthenticationError),
        (403, AuthenticationError),
        (400, RequestRefusedError),
        (404, RequestRefusedError),
        (409, RequestRefusedError),
        (429, AttemptError),
        (503, AttemptError),
        (302, AttemptError),
    ],
)
async def test_refusals_have_their_kinds(status: int, kind: type[Exception]) -> None:
    async with workspace() as (kadoa, notifications):
        kadoa.faults.api_status = status
        for call in (
            notifications.channels,
            notifications.settings,
            notifications.event_types,
            lambda: notifications.create_channel("x"),
            lambda: notifications.send_test("workflow_failed"),
        ):
            with pytest.raises(kind) as caught:
                await call()
            said = everything_said(caught.value)
            assert kadoa.api_key not in said
            assert caught.value.step == "notifications"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b'{"data":{"channels":5,"settings":5}}',
        b'{"data":{"channels":[{"name":"no id"}],"settings":[{"id":"x"}]}}',
        b'{"data":{"channels":[7],"settings":[{"id":"x","eventType":"y","enabled":"yes"}]}}',
        b"[" * 100_000,
    ],
)
async def test_odd_answers_are_protocol_errors(body: bytes) -> None:
    async with workspace() as (kadoa, notifications):
        kadoa.faults.api_body = body
        for call in (notifications.channels, notifications.settings):
            with pytest.raises(ProtocolError):
                await call()


async def test_odd_field_is_named_by_its_path() -> None:
    async with workspace() as (kadoa, notifications):
        kadoa.faults.api_body = b'{"data":{"settings":[{"id":"a","eventType":"b"},{"id":"a","eventType":7}]}}'
        with pytest.raises(ProtocolError, match=r"settings\[1\]\.eventType: expected a string, not a number"):
            await notifications.settings()


@pytest.mark.parametrize(
    "shape", ['{"channels":["c1","c2"]}', '{"channels":[{"id":"c1"},{"id":"c2"}]}', '{"channelIds":["c1","c2"]}']
)
async def test_channels_of_a_setting_are_read_in_every_shape(shape: str) -> None:
    async with workspace() as (kadoa, notifications):
        row = {"id": "s", "eventType": "workflow_failed", **json.loads(shape)}
        kadoa.faults.api_body = json.dumps({"data": {"settings": [row]}}).encode()
        (setting,) = await notifications.settings()
        assert setting.channel_ids == ("c1", "c2")


async def test_setting_with_unknown_channels_is_not_overwritten() -> None:
    async with workspace() as (_kadoa, notifications):
        with pytest.raises(ValueError, match="channels of the setting are not known"):
            await notifications.update_setting(Setting(id="s", event_type="workflow_failed"), enabled=True)


async def test_no_key_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KADOA_API_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="KADOA_API_KEY"):
        async with open_notifications():
            pass


# ---- setting up ----------------------------------------------------------------------------------------------------


async def test_plan_for_a_new_workspace_makes_everything_and_then_nothing() -> None:
    async with workspace(empty=True) as (kadoa, notifications):
        plan = await plan_streaming(notifications, EVENTS)
        assert plan.steps == (CreateChannel(), CreateSetting(EVENTS[0]), CreateSetting(EVENTS[1]))
        assert kadoa.workspace.channels == []  # planning changes nothing
        channel = await apply_plan(notifications, plan)
        assert channel is not None
        again = await plan_streaming(notifications, EVENTS)
        assert again.steps == ()
        assert again.channel == channel
        assert len(again.in_place) == 2
        assert again.warnings == ()


async def test_plan_leaves_the_other_channels_of_a_setting() -> None:
    async with workspace(empty=True) as (kadoa, notifications):
        mail = kadoa.workspace.add_channel("EMAIL")
        kadoa.workspace.add_setting("workflow_failed", [mail], "wf_1")
        plan = await plan_streaming(notifications, ["workflow_failed"], ["wf_1", "wf_2"])
        assert [type(step) for step in plan.steps] == [CreateChannel, AddChannel, CreateSetting]
        # Somebody adds one between the plan and its step.
        slack = kadoa.workspace.add_channel("SLACK")
        kadoa.workspace.settings[0]["channelIds"] = [mail, slack]
        channel = await apply_plan(notifications, plan)
        assert channel is not None
        assert kadoa.workspace.settings[0]["channelIds"] == [mail, slack, channel.id]
        assert kadoa.workspace.streams("workflow_failed", "wf_2")


async def test_disabled_setting_stays_disabled_without_enable() -> None:
    async with workspace() as (kadoa, notifications):
        setting = kadoa.workspace.find("workflow_failed", None)
        assert setting is not None
        setting["enabled"] = False
        plan = await plan_streaming(notifications, ["workflow_failed"])
        assert plan.steps == ()
        assert "disabled" in plan.warnings[0]
        plan = await plan_streaming(notifications, ["workflow_failed"], enable=True)
        assert [type(step) for step in plan.steps] == [EnableSetting]
        await apply_plan(notifications, plan)
        assert setting["enabled"] is True


async def test_workflow_whose_setting_replaces_the_workspaces_is_named() -> None:
    async with workspace() as (kadoa, notifications):
        mail = kadoa.workspace.add_channel("EMAIL")
        kadoa.workspace.add_setting("workflow_failed", [mail], "wf_77")
        plan = await plan_streaming(notifications, ["workflow_failed"])
        assert plan.steps == ()
        assert "wf_77" in plan.warnings[0]


async def test_channel_and_setting_that_others_make_meanwhile_are_used() -> None:
    async with workspace(empty=True) as (kadoa, notifications):
        plan = await plan_streaming(notifications, ["workflow_failed"])
        other = kadoa.workspace.add_channel("WEBSOCKET")
        mail = kadoa.workspace.add_channel("EMAIL")
        kadoa.workspace.add_setting("workflow_failed", [mail])
        channel = await apply_plan(notifications, plan)
        assert channel is not None
        assert channel.id == other
        assert kadoa.workspace.settings[0]["channelIds"] == [mail, other]


async def test_template_and_refusals_are_explained() -> None:
    async with workspace() as (kadoa, notifications):
        kadoa.workspace.linked_workflows.add("wf_1")
        plan = await plan_streaming(notifications, ["workflow_failed"], ["wf_1"])
        with pytest.raises(SetupError, match="linked to a template") as caught:
            await apply_plan(notifications, plan)
        assert isinstance(caught.value.__cause__, RequestRefusedError)
        plan = await plan_streaming(notifications, ["no_such_event"])
        with pytest.raises(SetupError, match="does not know the event type"):
            await apply_plan(notifications, plan)


@pytest.mark.parametrize("events", [[], "workflow_failed", [""], [5]])
async def test_odd_event_types_are_refused_before_any_request(events: Any) -> None:
    async with workspace() as (kadoa, notifications):
        kadoa.faults.api_status = 500
        with pytest.raises(ConfigurationError):
            await plan_streaming(notifications, events)


# ---- the diagnosis -------------------------------------------------------------------------------------------------

NAMES = ["key", "token", "channel", "dns", "tcp", "tls", "handshake", "subscription", "heartbeat", "test event"]


def verdicts(diagnosis: Diagnosis) -> dict[str, str]:
    assert [step.name for step in diagnosis.steps] == NAMES
    for step in diagnosis.steps:
        assert step.seconds >= 0
        assert step.verdict is not Verdict.FAILED or step.advice, f"{step} says nothing to do"
    return {step.name: step.verdict.value for step in diagnosis.steps}


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
