"""Plans that set a workspace up for realtime events, and their steps."""

from __future__ import annotations

from typing import Any

import pytest
from test_notifications import workspace

from kadoa_trio import (
    ConfigurationError,
    RequestRefusedError,
)
from kadoa_trio.workspace import (
    AddChannel,
    CreateChannel,
    CreateSetting,
    EnableSetting,
    SetupError,
    apply_plan,
    plan_streaming,
)

EVENTS = ["workflow_failed", "workflow_finished"]


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


@pytest.mark.parametrize("events", [[], "workflow_failed", [""], [5], None, 5])
async def test_odd_event_types_are_refused_before_any_request(events: Any) -> None:
    async with workspace() as (kadoa, notifications):
        kadoa.faults.api_status = 500
        with pytest.raises(ConfigurationError):
            await plan_streaming(notifications, events)


@pytest.mark.parametrize("workflows", [None, "wf_1", b"wf_1", 5, [""], [5]])
async def test_odd_workflow_ids_are_refused_before_any_request(workflows: Any) -> None:
    async with workspace() as (_kadoa, notifications):
        with pytest.raises(ConfigurationError, match="workflow_ids must be"):
            await plan_streaming(notifications, EVENTS, workflows)


@pytest.mark.parametrize("plan", [None, [], "plan"])
async def test_what_is_no_plan_is_not_applied(plan: Any) -> None:
    async with workspace() as (_kadoa, notifications):
        with pytest.raises(TypeError, match="plan must be a StreamingPlan, not"):
            await apply_plan(notifications, plan)
