"""Drafts of events with sensible payloads: what a test does not care about, it does not say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, final

import attrs

from .._events import Event
from .._net._wire import decode

WORKFLOW = "wf_123"
_numbers = itertools.count(1)


@final
@attrs.frozen
class Draft:
    """An event that has not been published: its type and its payload as JSON."""

    type: str
    message: Any


def workflow_finished(*, workflow_id: str = WORKFLOW, id: str = "job-1", **fields: Any) -> Draft:
    """Draft a ``workflow_finished``; *fields* are added to the payload as they stand."""
    return Draft("workflow_finished", {"id": id, "workflowId": workflow_id, **fields})


def workflow_failed(
    *,
    workflow_id: str = WORKFLOW,
    workflow_name: str = "Prices",
    source: str = "monitored-page.example",
    reason: str = "The page has changed",
    action: str = "Review the workflow",
    **fields: Any,
) -> Draft:
    """Draft a ``workflow_failed``; *fields* are added to the payload as they stand."""
    return Draft(
        "workflow_failed",
        {
            "workflowId": workflow_id,
            "workflowName": workflow_name,
            "source": source,
            "reason": reason,
            "action": action,
            **fields,
        },
    )


def workflow_recovered(
    *,
    workflow_id: str = WORKFLOW,
    workflow_name: str = "Prices",
    source: str = "monitored-page.example",
    **fields: Any,
) -> Draft:
    """Draft a ``workflow_recovered``; *fields* are added to the payload as they stand."""
    return Draft(
        "workflow_recovered", {"workflowId": workflow_id, "workflowName": workflow_name, "source": source, **fields}
    )


def workflow_data_change(
    *,
    workflow_id: str = WORKFLOW,
    id: str = "change-1",
    differences: Sequence[Mapping[str, Any]] | None = None,
    data: Sequence[Any] = (),
    url: str = "https://monitored-page.example",
    **fields: Any,
) -> Draft:
    """Draft a ``workflow_data_change``, by default of one price; *fields* are added to the payload as they stand."""
    found = [difference("changed", price=(24.99, 29.99))] if differences is None else list(differences)
    return Draft(
        "workflow_data_change",
        {
            "id": id,
            "workflowId": workflow_id,
            "data": list(data),
            "differences": found,
            "url": url,
            "createdAt": "2026-01-01T00:00:00Z",
            **fields,
        },
    )


def difference(type: str, **fields: Any) -> dict[str, Any]:
    """Make a difference of a data change: ``difference("changed", price=(24.99, 29.99))``.

    A pair is the value before and the value now; anything else is the value now.
    """
    changes = []
    for key, value in fields.items():
        if isinstance(value, tuple) and len(value) == 2:
            changes.append({"key": key, "value": value[1], "previousValue": value[0]})
        else:
            changes.append({"key": key, "value": value})
    return {"type": type, "fields": changes}


def other_event(type: str, **fields: Any) -> Draft:
    """Draft an event of any other type."""
    return Draft(type, dict(fields))


def make_event(
    draft: Draft, *, id: str | None = None, cursor: str | None = None, timestamp: datetime | None = None
) -> Event:
    """Make an `Event` as a client would receive it, for handlers that are tested without a server.

    Args:
        draft: what the event says.
        id: None for a new one.
        cursor: None for none.
        timestamp: aware; None for some time in 2026.
    """
    number = next(_numbers)
    when = timestamp or datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    frame = {
        "eventType": draft.type,
        "id": id or f"made-{number}",
        "timestamp": when.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "message": draft.message,
    }
    if cursor is not None:
        frame["_cursor"] = cursor
    event = decode(json.dumps(frame))
    assert isinstance(event, Event), "a draft has a type and a payload"
    return event


def documented(event_type: str, workflow_id: str | None, number: int) -> Draft:
    """Draft the event that is published where a test names only its type."""
    workflow = workflow_id or WORKFLOW
    match event_type:
        case "workflow_finished":
            return workflow_finished(workflow_id=workflow, id=f"job-{number}")
        case "workflow_failed":
            return workflow_failed(workflow_id=workflow)
        case "workflow_recovered":
            return workflow_recovered(workflow_id=workflow)
        case "workflow_data_change":
            return workflow_data_change(
                workflow_id=workflow, id=f"change-{number}", data=[{"id": "record-1", "price": 29.99}]
            )
    return other_event(event_type, workflowId=workflow)
