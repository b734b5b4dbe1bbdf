"""Gaps repaired from the notification log."""

from __future__ import annotations

from typing import Any

from kadoa_trio._wire import event_from_log


def test_payload_with_an_id_and_a_type_of_its_own_is_not_taken_for_the_event() -> None:
    payload = {"id": "change-1", "type": "snapshot", "data": [], "workflowId": "wf_1"}
    event = event_from_log({"eventType": "workflow_data_change", "eventId": "e1", "payload": payload})
    assert event is not None
    assert (event.id, event.type, event.workflow_id) == ("e1", "workflow_data_change", "wf_1")


def test_row_that_is_nested_too_deeply_is_no_event() -> None:
    payload: Any = []
    for _ in range(100_000):
        payload = [payload]
    assert event_from_log({"eventType": "x", "eventId": "e1", "payload": payload}) is None
