"""Kadoa's notifications API: channels, settings, test events and the log, in memory, on virtual time."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trio
from _loopback import everything_said

from kadoa_trio import (
    AttemptError,
    AuthenticationError,
    ConfigurationError,
    ProtocolError,
    RequestRefusedError,
)
from kadoa_trio.testing import SimulatedKadoa, open_simulated_kadoa
from kadoa_trio.workspace import (
    Notifications,
    Setting,
    open_notifications,
)


@asynccontextmanager
async def workspace(*, empty: bool = False) -> AsyncIterator[tuple[SimulatedKadoa, Notifications]]:
    async with (
        open_simulated_kadoa() as kadoa,
        open_notifications(kadoa.api_key, endpoints=kadoa.endpoints) as notifications,
    ):
        if empty:
            kadoa.workspace.clear()
        yield kadoa, notifications


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


async def test_id_of_a_test_event_shows_no_key() -> None:
    async with workspace() as (kadoa, notifications):
        for sent, shown in ((kadoa.api_key, "[secret]"), (f"e-{kadoa.api_key[:9]}", "e-[secret]"), ("e1", "e1")):
            kadoa.faults.api_body = json.dumps({"data": {"eventId": sent}}).encode()
            assert await notifications.send_test("workflow_failed") == shown


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
        for wrong in (
            *({"limit": limit} for limit in (0, 101, 1.5, True, "5", math.nan)),
            *({"offset": offset} for offset in (-1, 0.0, math.nan, 10**5000)),
            {"since": datetime(2026, 1, 1)},
        ):
            with pytest.raises(ValueError, match=r"must be a whole number|aware times"):
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
        b'{"data":{"channels":[7],"settings":[{"id":"\\ud800","eventType":"y"}]}}',
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
