"""Sets a workspace up for realtime events, as its dashboard does by hand.

A plan is made from the workspace as it is, and then its steps are applied. A
plan for a workspace that has everything has no steps, and applying a plan a
second time changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, final

import attrs
import trio

from .._errors import RequestRefusedError, SetupError
from ._notifications import WEBSOCKET, Channel, Notifications, Setting, check_event_types, check_names, find_websocket

CHANNEL_NAME: Final = "Realtime (WebSocket)"
"""The name of a channel that a plan creates."""

_DUPLICATE: Final = (400, 409)


@final
@attrs.frozen
class CreateChannel:
    """Create the workspace's WebSocket channel."""

    name: str = CHANNEL_NAME

    def __str__(self) -> str:
        return f"make the WebSocket channel {self.name!r}"


@final
@attrs.frozen
class CreateSetting:
    """Send an event type to the WebSocket channel."""

    event_type: str
    workflow_id: str | None = None

    def __str__(self) -> str:
        return f"send {self.event_type} of {_place(self.workflow_id)} to the WebSocket channel"


@final
@attrs.frozen
class AddChannel:
    """Add the WebSocket channel to a setting. The setting's other channels stay."""

    setting: Setting

    def __str__(self) -> str:
        setting = self.setting
        return (
            f"add the WebSocket channel to the setting for {setting.event_type} of {_place(setting.workflow_id)}, "
            f"beside its {len(setting.channel_ids or ())} others"
        )


@final
@attrs.frozen
class EnableSetting:
    """Enable a setting. All of its channels take effect, not only the WebSocket."""

    setting: Setting

    def __str__(self) -> str:
        return f"enable the setting for {self.setting.event_type} of {_place(self.setting.workflow_id)}"


SetupStep = CreateChannel | CreateSetting | AddChannel | EnableSetting
"""Every kind of step of a plan."""


def _place(workflow_id: str | None) -> str:
    return "the whole workspace" if workflow_id is None else f"workflow {workflow_id}"


@final
@attrs.frozen(kw_only=True)
class StreamingPlan:
    """What a workspace needs so that events reach realtime clients, and warnings about its settings."""

    channel: Channel | None
    """The WebSocket channel that exists; None if there is none."""
    steps: tuple[SetupStep, ...]
    """The steps, in order; empty when everything is in place."""
    in_place: tuple[Setting, ...] = ()
    """The settings that already send what was asked for."""
    warnings: tuple[str, ...] = ()
    """What the plan does not change although it stops events from reaching realtime clients."""


async def plan_streaming(
    notifications: Notifications,
    event_types: Sequence[str],
    workflow_ids: Sequence[str] = (),
    *,
    enable: bool = False,
) -> StreamingPlan:
    """Plan what has to change so that event types reach realtime clients. Changes nothing.

    Args:
        notifications: the workspace's notifications API.
        event_types: such as ``"workflow_failed"``; at least one.
        workflow_ids: only for these workflows; none for the whole workspace.
        enable: enable settings that are disabled. Without it they stay
            disabled, with a warning, because enabling one starts its other
            channels, too.

    Raises:
        ConfigurationError: no event type is named, or what is given is not a
            collection of non-empty strings.
        KadoaError: what `Notifications` raises.
    """
    types = check_event_types(event_types)
    check_names("workflow_ids", workflow_ids)
    channel = find_websocket(await notifications.channels())
    settings = await notifications.settings()
    steps: list[SetupStep] = []
    warnings: list[str] = []
    in_place: list[Setting] = []
    if channel is None:
        steps.append(CreateChannel())
    for workflow_id in dict.fromkeys(workflow_ids) if workflow_ids else (None,):
        for event_type in types:
            setting = find_setting(settings, event_type, workflow_id)
            if setting is None:
                steps.append(CreateSetting(event_type, workflow_id))
                continue
            has_channel = channel is not None and channel.id in (setting.channel_ids or ())
            if setting.channel_ids is None:
                warnings.append(
                    f"the channels of the setting for {event_type} of {_place(workflow_id)} are not in the API's answer: "
                    "add the WebSocket channel in the dashboard"
                )
                continue
            if not has_channel:
                steps.append(AddChannel(setting))
            if not setting.enabled and enable:
                steps.append(EnableSetting(setting))
            elif not setting.enabled:
                warnings.append(
                    f"the setting for {event_type} of {_place(workflow_id)} is disabled, so that nothing is sent; "
                    "enabling it starts its other channels, too"
                )
            if has_channel and setting.enabled:
                in_place.append(setting)
    if not workflow_ids:
        warnings += _hidden(settings, types, channel)
    return StreamingPlan(
        channel=channel, steps=tuple(steps), in_place=tuple(in_place), warnings=tuple(dict.fromkeys(warnings))
    )


def _hidden(settings: Sequence[Setting], types: Sequence[str], channel: Channel | None) -> list[str]:
    """Warn of workflows whose own settings replace the workspace's and do not send to the WebSocket channel."""
    return [
        f"workflow {setting.workflow_id} has a setting of its own for {setting.event_type}, which replaces the "
        "workspace's and does not send to the WebSocket channel; name that workflow to add it"
        for setting in settings
        if setting.workflow_id is not None
        and setting.event_type in types
        and (channel is None or channel.id not in (setting.channel_ids or ()))
    ]


def find_setting(settings: Sequence[Setting], event_type: str, workflow_id: str | None) -> Setting | None:
    """Find the setting for an event type at exactly this level."""
    for setting in settings:
        if setting.event_type == event_type and setting.workflow_id == workflow_id:
            return setting
    return None


async def apply_plan(notifications: Notifications, plan: StreamingPlan) -> Channel | None:
    """Apply the steps of a plan, in order.

    Each step reads the settings again, so that it removes no channel that
    was added since the plan was made.

    Returns:
        The WebSocket channel.

    Raises:
        TypeError: *plan* is not a plan.
        SetupError: Kadoa refused a step.
        KadoaError: what else `Notifications` raises. The steps before are
            done; a new plan has those that are left.
    """
    if not isinstance(plan, StreamingPlan):
        raise TypeError(f"plan must be a StreamingPlan, not {type(plan).__name__}")
    channel = plan.channel
    await trio.lowlevel.checkpoint()  # also when there is nothing to do
    for step in plan.steps:
        failed: RequestRefusedError | None = None
        try:
            if isinstance(step, CreateChannel):
                channel = await _create_channel(notifications, step)
            else:
                assert channel is not None, "a plan without a channel begins by creating it"
                await _apply_to_setting(notifications, step, channel)
        except RequestRefusedError as exc:
            failed = exc
        if failed is not None:
            raise SetupError(_explain(step, failed)) from failed
    return channel


async def _create_channel(notifications: Notifications, step: CreateChannel) -> Channel:
    refused: RequestRefusedError | None = None
    try:
        return await notifications.create_channel(step.name, WEBSOCKET)
    except RequestRefusedError as exc:
        refused = exc
    # Another program may have made it meanwhile; a workspace has one only.
    channel = find_websocket(await notifications.channels())
    if channel is None:
        raise refused
    return channel


async def _apply_to_setting(
    notifications: Notifications, step: CreateSetting | AddChannel | EnableSetting, channel: Channel
) -> None:
    if isinstance(step, CreateSetting):
        refused: RequestRefusedError | None = None
        try:
            await notifications.create_setting(step.event_type, [channel.id], workflow_id=step.workflow_id)
        except RequestRefusedError as exc:
            refused = exc
        if refused is None:
            return
        there = find_setting(await notifications.settings(), step.event_type, step.workflow_id)
        if there is None or refused.status not in _DUPLICATE:
            raise refused
        await _add(notifications, there, channel)
        return
    # Read again, because what others have added since the plan must stay.
    there = find_setting(await notifications.settings(), step.setting.event_type, step.setting.workflow_id)
    setting = step.setting if there is None else there
    if isinstance(step, AddChannel):
        await _add(notifications, setting, channel)
    elif not setting.enabled:
        await notifications.update_setting(setting, enabled=True)


async def _add(notifications: Notifications, setting: Setting, channel: Channel) -> None:
    if setting.channel_ids is None:
        raise SetupError(
            "the API's answer does not name the channels of a setting: add the WebSocket channel in the dashboard"
        )
    if channel.id not in setting.channel_ids:
        await notifications.update_setting(setting, channel_ids=(*setting.channel_ids, channel.id))


def _explain(step: SetupStep, refused: RequestRefusedError) -> str:
    said = f" Kadoa said: {refused.server_message}" if refused.server_message else ""
    if refused.status == 409 and not isinstance(step, CreateChannel):
        # Documented for workflows that are linked to a template.
        workflow_id = step.workflow_id if isinstance(step, CreateSetting) else step.setting.workflow_id
        return (
            f"could not {step}: {_place(workflow_id)} is linked to a template (HTTP 409), which has the notification "
            f"settings. Change them there, or unlink the workflow.{said}"
        )
    if refused.status == 400 and isinstance(step, CreateSetting):
        return (
            f"could not {step}: Kadoa says that it exists already, or that it does not know the event type or the "
            f"workflow (HTTP 400).{said}"
        )
    return f"could not {step} (HTTP {refused.status}).{said}"
