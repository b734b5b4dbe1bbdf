"""Drafts of events with documented payloads: a test names only the fields that it is about.

Every event type of ``kadoa_trio._events.EVENT_TYPES`` has a builder here, with
the name of the type; `BUILDERS` lists them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, final

import attrs

from .._checks import check_text
from .._events import WORKFLOW_FIELD, Event

WORKFLOW: Final = "wf_123"
_MAX_WORKFLOW_ID: Final = 256
_numbers = itertools.count(1)


@final
@attrs.frozen
class Draft:
    """An event that has not been published: its type, and its payload as JSON."""

    type: str
    message: Any


def workflow_finished(*, workflow_id: str = WORKFLOW, id: str = "job-1", **fields: Any) -> Draft:
    """Draft a ``workflow_finished``; *fields* are added to the payload unchanged."""
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
    """Draft a ``workflow_failed``; *fields* are added to the payload unchanged."""
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
    """Draft a ``workflow_recovered``; *fields* are added to the payload unchanged."""
    return Draft(
        "workflow_recovered", {"workflowId": workflow_id, "workflowName": workflow_name, "source": source, **fields}
    )


def workflow_data_change(
    *,
    workflow_id: str = WORKFLOW,
    id: str = "change-1",
    differences: Sequence[Mapping[str, Any]] | None = None,
    data: Sequence[Any] | None = None,
    url: str = "https://monitored-page.example",
    **fields: Any,
) -> Draft:
    """Draft a ``workflow_data_change``, by default of one price; *fields* are added to the payload unchanged."""
    found = [difference("changed", price=(24.99, 29.99))] if differences is None else list(differences)
    records = [{"id": "record-1", "price": 29.99}] if data is None else list(data)
    return Draft(
        "workflow_data_change",
        {
            "id": id,
            "workflowId": workflow_id,
            "data": records,
            "differences": found,
            "url": url,
            "createdAt": "2026-01-01T00:00:00Z",
            **fields,
        },
    )


BUILDERS: Final[Mapping[str, Callable[..., Draft]]] = {
    builder.__name__: builder
    for builder in (workflow_finished, workflow_failed, workflow_recovered, workflow_data_change)
}
"""The builder of each event type that has a class."""


def difference(type: str, **fields: Any) -> dict[str, Any]:
    """Make a difference for a data change: ``difference("changed", price=(24.99, 29.99))``.

    A pair is the previous value and the value now; anything else is the value now.
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
    draft: Draft | str, *, id: str | None = None, cursor: str | None = None, timestamp: datetime | None = None
) -> Event:
    """Make an `Event` as a client would receive it, to test a handler without a server.

    Args:
        draft: the type and the payload of the event; or the name of an event
            type, which has its documented payload, as in
            `SimulatedKadoa.publish`.
        id: the event's id; None for a new one.
        cursor: the event's cursor; None for none.
        timestamp: an aware time; None for a time in 2026, later than that of
            the previous call.

    Raises:
        TypeError: *draft* is neither a draft nor a string.
        ValueError: the type is not a non-empty string that UTF-8 can encode.
    """
    number = next(_numbers)
    if isinstance(draft, str):
        draft = documented(draft, None, number)
    elif not isinstance(draft, Draft):
        raise TypeError(
            f"draft must be a draft, such as workflow_failed(), or the name of an event type, not {type(draft).__name__}"
        )
    check_text("the type of an event", draft.type)
    event_id = id or f"made-{number}"
    when = timestamp or datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=number)
    time = when.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    frame = {"eventType": draft.type, "id": event_id, "timestamp": time, "message": draft.message}
    if cursor is not None:
        frame["_cursor"] = cursor
    return Event(event_id, draft.type, time, cursor, "id", json.dumps(frame), _workflow_of(draft.message))


def _workflow_of(message: Any) -> str | None:
    workflow_id = message.get(WORKFLOW_FIELD) if isinstance(message, Mapping) else None
    if isinstance(workflow_id, str) and 0 < len(workflow_id) <= _MAX_WORKFLOW_ID:
        return workflow_id
    return None


def documented(event_type: str, workflow_id: str | None, number: int) -> Draft:
    """Draft the event that is published where a test names only its type; *number* makes its payload's id unique."""
    workflow = workflow_id or WORKFLOW
    builder = BUILDERS.get(event_type)
    if builder is None:
        return other_event(event_type, workflowId=workflow)
    draft = builder(workflow_id=workflow)
    if "id" in draft.message:
        draft.message["id"] = f"{draft.message['id'].removesuffix('-1')}-{number}"
    return draft
