"""``kadoa-trio setup``, ``send-test`` and ``doctor``: the workspace that sends the events."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click
import trio

from .._redact import Secret, presentable, revealed
from ..workspace._diagnosis import Diagnosis, DiagnosisStep, Verdict, diagnose
from ..workspace._notifications import open_notifications
from ..workspace._streaming import StreamingPlan, apply_plan, plan_streaming
from ._output import colours, say

_MARKS = {
    Verdict.OK: ("✓", "green"),
    Verdict.WARNING: ("!", "yellow"),
    Verdict.FAILED: ("✗", "red"),
    Verdict.SKIPPED: ("-", "bright_black"),
}


async def setup(
    api_key: Secret | None,
    events: Sequence[str],
    workflows: Sequence[str],
    *,
    enable: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Create the missing channel and settings; print what was done, or would be done."""
    async with open_notifications(revealed(api_key)) as notifications:
        plan = await plan_streaming(notifications, events, workflows, enable=enable)
        channel = plan.channel
        if not dry_run:
            channel = await apply_plan(notifications, plan)
    if as_json:
        click.echo(json.dumps(_plan_as_json(plan, dry_run=dry_run, channel=None if channel is None else channel.id)))
        return 0
    for warning in plan.warnings:
        say(f"warning: {presentable(warning, 500)}")
    for setting in plan.in_place:
        where = "the whole workspace" if setting.workflow_id is None else f"workflow {setting.workflow_id}"
        click.echo(f"exists: {presentable(f'{setting.event_type} of {where}', 200)}")
    for step in plan.steps:
        click.echo(f"{'would' if dry_run else 'done:'} {presentable(str(step), 500)}")
    if not plan.steps:
        click.echo("nothing to change")
    return 0


def _plan_as_json(plan: StreamingPlan, *, dry_run: bool, channel: str | None) -> dict[str, object]:
    return {
        "dryRun": dry_run,
        "changed": bool(plan.steps) and not dry_run,
        "channel": channel,
        "steps": [{"step": type(step).__name__, "text": str(step)} for step in plan.steps],
        "inPlace": [{"eventType": one.event_type, "workflowId": one.workflow_id} for one in plan.in_place],
        "warnings": list(plan.warnings),
    }


async def send_test(api_key: Secret | None, event_type: str, workflow: str | None, *, as_json: bool) -> int:
    """Ask Kadoa to send a mock event; print the event's id."""
    async with open_notifications(revealed(api_key)) as notifications:
        event_id = await notifications.send_test(event_type, workflow_id=workflow)
    if as_json:
        click.echo(json.dumps({"eventType": event_type, "workflowId": workflow, "eventId": event_id}))
    else:
        click.echo(presentable(event_id or "(Kadoa returned no id)", 100))
    return 0


async def doctor(
    api_key: Secret | None, *, test_event: str | None, workflow: str | None, timeout: float, as_json: bool
) -> int:
    """Test every step of a connection; the exit code is 1 if one fails."""
    coloured = colours(1)

    def show(step: DiagnosisStep) -> None:
        if as_json:
            return
        mark, colour = _MARKS[step.verdict]
        if coloured:
            mark = click.style(mark, fg=colour)
        took = f"{step.seconds:6.2f} s" if step.verdict is not Verdict.SKIPPED else " " * 8
        click.echo(f"{mark} {step.name:<12} {took}  {presentable(step.detail, 300)}")
        if step.advice:
            click.echo(f"{'':<25}{presentable(step.advice, 500)}")

    if test_event is not None and not as_json:
        say(f"the last step sends a {test_event} test event to all of its channels; --no-test-event prevents this")
    began = trio.current_time()
    diagnosis = await diagnose(
        revealed(api_key),
        test_event=test_event,
        workflow_id=workflow,
        heartbeat_timeout=timeout,
        event_timeout=timeout,
        on_step=show,
    )
    if as_json:
        click.echo(json.dumps(_diagnosis_as_json(diagnosis)))
    else:
        verdict = "all steps succeeded" if diagnosis.ok else "a step failed"
        say(f"{verdict}, after {trio.current_time() - began:.1f} s")
    return 0 if diagnosis.ok else 1


def _diagnosis_as_json(diagnosis: Diagnosis) -> dict[str, object]:
    return {
        "ok": diagnosis.ok,
        "steps": [
            {
                "name": step.name,
                "verdict": step.verdict.value,
                "seconds": round(step.seconds, 4),
                "detail": step.detail,
                "advice": step.advice,
            }
            for step in diagnosis.steps
        ],
    }
