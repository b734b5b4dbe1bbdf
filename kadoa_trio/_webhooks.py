"""Events in the shape of Kadoa's webhooks, as JSON that every parser reads: for requests and for dead letters."""

from __future__ import annotations

import json
import math
from typing import Any

from ._events import Event, write_time


def webhook_body(event: Event) -> dict[str, Any]:
    """Return an event in the shape of Kadoa's webhooks: with the payload under ``data``, and without a cursor."""
    raw = event.raw
    payload = raw.get("message")
    return {
        "eventType": event.type,
        "id": event.id,
        "timestamp": raw.get("timestamp") if event.timestamp is None else write_time(event.timestamp),
        "data": raw.get("data") if payload is None else payload,
    }


def strict_json(body: dict[str, Any]) -> bytes:
    """Write JSON that every parser reads, in one line, whatever `parse_json` has accepted."""
    try:
        try:
            return _dump(body)
        except ValueError:  # NaN, or a lone surrogate
            return _dump(_strict(body))
    except RecursionError:
        return _dump(_strict({name: value for name, value in body.items() if isinstance(value, str)} | {"data": None}))


def _dump(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _strict(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case list():
            return [_strict(item) for item in value]
        case dict():
            return {_strict(name): _strict(item) for name, item in value.items()}
        case _:
            return value
