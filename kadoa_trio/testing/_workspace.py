"""The simulated workspace: its channels and settings, and the calls that change them. No I/O."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import attrs

from ._builders import BUILDERS

KNOWN_TYPES = (
    *BUILDERS,
    "workflow_started",
    "workflow_sample_finished",
    "workflow_export_completed",
    "workflow_validation_anomaly_change",
    "workflow_health_degraded",
    "system_maintenance",
    "service_degradation",
    "credits_low",
    "free_trial_ending",
)
"""The event types that the API lists."""

Answer = tuple[int, Mapping[str, Any]]


@attrs.define(eq=False)
class Workspace:
    """Channels and settings.

    A new workspace has a WebSocket channel, and one setting for each event type with a builder that sends it there.
    """

    channels: list[dict[str, Any]] = attrs.field(factory=list)
    settings: list[dict[str, Any]] = attrs.field(factory=list)
    linked_workflows: set[str] = attrs.field(factory=set)
    """Ids of workflows that are linked to a template, so that their settings cannot be changed."""
    tests: list[tuple[str, str | None]] = attrs.field(factory=list)
    """Type and workflow of every test event that was requested."""
    _numbers: itertools.count[int] = attrs.field(factory=lambda: itertools.count(1))

    def __attrs_post_init__(self) -> None:
        channel = self.add_channel("WEBSOCKET")
        for event_type in BUILDERS:
            self.add_setting(event_type, [channel])

    def clear(self) -> None:
        """Remove all channels and settings, as in a workspace that was never set up."""
        self.channels.clear()
        self.settings.clear()

    def add_channel(self, channel_type: str, name: str | None = None) -> str:
        """Add a channel, and return its id."""
        number = next(self._numbers)
        channel = {
            "id": f"channel-{number}",
            "name": name or f"{channel_type.capitalize()} {number}",
            "channelType": channel_type,
            "config": {},
            "createdAt": _now(),
            "updatedAt": _now(),
        }
        self.channels.append(channel)
        return str(channel["id"])

    def add_setting(
        self, event_type: str, channel_ids: list[str], workflow_id: str | None = None, *, enabled: bool = True
    ) -> str:
        """Add a setting, and return its id."""
        setting: dict[str, Any] = {
            "id": f"setting-{next(self._numbers)}",
            "workflowId": workflow_id,
            "eventType": event_type,
            "eventConfiguration": {},
            "enabled": enabled,
            "channelIds": channel_ids,
            "createdAt": _now(),
            "updatedAt": _now(),
        }
        self.settings.append(setting)
        return str(setting["id"])

    def find(self, event_type: str, workflow_id: str | None) -> dict[str, Any] | None:
        """Return the setting for an event type at exactly this level."""
        for setting in self.settings:
            if setting["eventType"] == event_type and setting["workflowId"] == workflow_id:
                return setting
        return None

    def streams(self, event_type: str, workflow_id: str | None) -> bool:
        """Return whether an event would go to the WebSocket; a workflow's setting wins over the workspace's."""
        return "WEBSOCKET" in self.channel_types(event_type, workflow_id)

    def channel_types(self, event_type: str, workflow_id: str | None) -> list[str]:
        """Return the types of the channels that an event would go to."""
        setting = self.find(event_type, workflow_id) or self.find(event_type, None)
        if setting is None or not setting["enabled"]:
            return []
        return [channel["channelType"] for channel in self.channels if channel["id"] in setting["channelIds"]]

    # ---- the API -----------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, content: bytes, send_test: Callable[[str, str | None], str]) -> Answer:
        """Answer a call; *path* is relative to ``/v5/notifications``."""
        try:
            body = json.loads(content) if content else {}
        except (ValueError, RecursionError):
            return _refuse(400, "the body is not JSON")
        if not isinstance(body, dict):
            return _refuse(400, "the body is not an object")
        match method, path.strip("/").split("/"):
            case "GET", ["channels"]:
                return _success({"channels": self.channels})
            case "POST", ["channels"]:
                return self._create_channel(body)
            case "GET", ["settings"]:
                return _success({"settings": [self._shown(setting) for setting in self.settings]})
            case "POST", ["settings"]:
                return self._create_setting(body)
            case "PUT", ["settings", setting_id]:
                return self._update_setting(setting_id, body)
            case "GET", ["event-types"]:
                return _success({"eventTypes": [{"type": name, "category": "simulated"} for name in KNOWN_TYPES]})
            case "POST", ["test"]:
                if body.get("eventType") not in KNOWN_TYPES:
                    return _refuse(400, "unknown event type")
                self.tests.append((body["eventType"], body.get("workflowId")))
                return _success({"eventId": send_test(body["eventType"], body.get("workflowId"))})
        return _refuse(404, "not found")

    def _create_channel(self, body: Mapping[str, Any]) -> Answer:
        kind, name = body.get("channelType"), body.get("name")
        if not isinstance(kind, str) or not isinstance(name, str):
            return _refuse(400, "name and channelType are required")
        if kind == "WEBSOCKET" and any(channel["channelType"] == kind for channel in self.channels):
            return _refuse(400, "only one WebSocket channel is allowed per workspace")
        self.add_channel(kind, name)
        return _success({"channel": self.channels[-1]}, 201)

    def _create_setting(self, body: Mapping[str, Any]) -> Answer:
        event_type, workflow_id, channels = body.get("eventType"), body.get("workflowId"), body.get("channelIds")
        if event_type not in KNOWN_TYPES:
            return _refuse(400, "unknown event type")
        if workflow_id in self.linked_workflows:
            return _refuse(409, "the workflow is linked to a template")
        if self.find(event_type, workflow_id) is not None:
            return _refuse(400, "a setting for this event type exists")
        if not isinstance(channels, list) or not self._known(channels):
            return _refuse(400, "unknown channel")
        self.add_setting(event_type, channels, workflow_id, enabled=bool(body.get("enabled", True)))
        return _success({"settings": self._shown(self.settings[-1])}, 201)

    def _update_setting(self, setting_id: str, body: Mapping[str, Any]) -> Answer:
        setting = next((one for one in self.settings if one["id"] == setting_id), None)
        if setting is None:
            return _refuse(404, "no such setting")
        if setting["workflowId"] in self.linked_workflows:
            return _refuse(409, "the workflow is linked to a template")
        if not self._known(body.get("channelIds", [])):
            return _refuse(400, "unknown channel")
        for name in ("channelIds", "enabled", "eventConfiguration"):
            if name in body:
                setting[name] = body[name]
        setting["updatedAt"] = _now()
        return _success({"settings": self._shown(setting)})

    def _known(self, channel_ids: list[Any]) -> bool:
        return set(channel_ids) <= {channel["id"] for channel in self.channels}

    def _shown(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        shown = {name: value for name, value in setting.items() if name != "channelIds"}
        shown["channels"] = [channel for channel in self.channels if channel["id"] in setting["channelIds"]]
        return shown


def _success(data: Mapping[str, Any], status: int = 200) -> Answer:
    return status, {"data": data, "status": "success", "message": "ok"}


def _refuse(status: int, why: str) -> Answer:
    return status, {"status": "error", "error": why}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
