"""Hypothesis strategies for handlers of Kadoa's events, and for the faults that a program must survive.

Needs Hypothesis: ``pip install 'kadoa-trio[testing]'``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import attrs
from hypothesis import strategies as st

from .._checks import check_delay, strings_of
from .._events import EVENT_TYPES, WORKFLOW_FIELD, Difference, Event, camel_case
from ._builders import Draft, difference, make_event
from ._faults import FAULTS, FaultKind, chosen_kinds
from ._schedule import Schedule, ScheduledFault

__all__ = ["drafts", "events", "frames", "schedules"]

_TYPES = (*EVENT_TYPES, "credits_low")
# By category and not by codec="utf-8", which gives the same characters: for a codec Hypothesis encodes 1.1 million of
# them. Built at import, because Hypothesis first collects the categories of all characters if its cache on the disk is
# empty. Either takes about a second on a slow machine; within the first draw it would fail the health check.
_characters = st.characters(exclude_categories=["Cs"])
_characters.validate()
_words = st.text(_characters, max_size=20)
_ids = st.text("abcdef0123456789-", min_size=1, max_size=12)
_scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | _words
_json = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3), max_leaves=8
)
_times = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(lambda time: f"{time.isoformat()}Z")
_differences = st.builds(
    lambda kind, key, pair: difference(kind, **{key: pair}),
    st.sampled_from(["changed", "added", "removed"]),
    _ids,
    st.tuples(_json, _json),
)


def _value(kind: Any, name: str) -> st.SearchStrategy[Any]:
    """Draw the JSON of an attribute of a message class, by the attribute's type."""
    if kind is str:
        return _ids if name.endswith("id") else _words
    if kind is datetime:
        return _times
    if kind is Difference:
        return _differences
    if get_origin(kind) is tuple:
        return st.lists(_value(get_args(kind)[0], name), max_size=3)
    if get_origin(kind) is Mapping:
        return st.dictionaries(_words, _json, max_size=3)
    if NoneType in get_args(kind):
        return st.none() | _value(get_args(kind)[0], name)
    assert kind is Any, f"no strategy for {name}: {kind}"
    return _json


def _payloads(kind: type) -> st.SearchStrategy[dict[str, Any]]:
    """Draw payloads that a message class accepts, with all of its fields or without the optional ones."""
    kinds = get_type_hints(kind)
    fields = {field: _value(kinds[field.name], field.name) for field in attrs.fields(kind)}
    return st.fixed_dictionaries(
        {camel_case(field.name): drawn for field, drawn in fields.items() if field.default is attrs.NOTHING},
        optional={
            camel_case(field.name): drawn for field, drawn in fields.items() if field.default is not attrs.NOTHING
        },
    )


_PAYLOADS = {one.name: _payloads(one.message) for one in EVENT_TYPES.values()}


def drafts(types: Collection[str] | None = None, *, odd: bool = False) -> st.SearchStrategy[Draft]:
    """Draw drafts of events, to publish or to make events from.

    Args:
        types: the event types to draw from; None for those with a class and
            one without.
        odd: also draw payloads that differ from their documentation, which a
            handler must survive.

    Raises:
        ValueError: *types* is not a collection of non-empty strings, or empty.
    """
    return _drafts(sorted(strings_of("types", types) or _TYPES), odd)


@st.composite
def _drafts(draw: st.DrawFn, types: Sequence[str], odd: bool) -> Draft:
    kind = draw(st.sampled_from(types))
    if odd and draw(st.booleans()):
        return Draft(kind, draw(_json.filter(lambda payload: payload is not None)))
    payload = draw(_PAYLOADS.get(kind, st.just({})))
    return Draft(kind, {**payload, WORKFLOW_FIELD: draw(_ids)})


def events(types: Collection[str] | None = None, *, odd: bool = False) -> st.SearchStrategy[Event]:
    """Draw events as a client delivers them, to test handlers without a server; see `drafts`."""
    return st.builds(lambda draft, event_id: make_event(draft, id=event_id), drafts(types, odd=odd), _ids)


def frames() -> st.SearchStrategy[str]:
    """Draw frames as a server may send them: events in every spelling, heartbeats, drain notices, and invalid frames."""
    event = st.builds(
        lambda draft, event_id, cursor, kind, payload: json.dumps(
            {
                kind: draft.type,
                "id": event_id,
                "timestamp": "2026-01-01T00:00:00Z",
                "_cursor": cursor,
                payload: draft.message,
            }
        ),
        drafts(odd=True),
        _ids,
        st.none() | st.builds(lambda a, b: f"{a}-{b}", st.integers(0, 10**6), st.integers(0, 100)),
        st.sampled_from(["eventType", "type"]),
        st.sampled_from(["message", "data"]),
    )
    notice = st.builds(
        lambda fields: json.dumps({"type": "control.draining", **fields}),
        st.fixed_dictionaries(
            {}, optional={"retryAfterMs": _scalars, "deadlineAt": _scalars, "resumeSupported": _scalars}
        ),
    )
    return st.one_of(event, notice, st.just('{"type":"heartbeat"}'), _json.map(json.dumps), _words)


def schedules(
    *,
    seconds: float = 300.0,
    max_faults: int = 8,
    kinds: Collection[FaultKind] | None = None,
) -> st.SearchStrategy[Schedule]:
    """Draw schedules of faults, to play with `SimulatedKadoa.play`.

    Args:
        seconds: latest beginning of a fault, in seconds of Trio's clock.
        max_faults: maximum number of faults.
        kinds: the kinds to draw from; None for all but ``forget``, after
            which no client can be complete.

    Raises:
        ValueError: *seconds* is negative or not finite, or *kinds* names no
            kind or an unknown one.
    """
    check_delay("seconds", seconds)
    chosen = st.sampled_from(chosen_kinds(kinds))
    times = st.integers(0, int(seconds)).map(float)

    def fault(at: float, kind: FaultKind, lasting: int) -> ScheduledFault:
        return ScheduledFault(at, kind, 1.0 if FAULTS[kind].seconds is None else float(lasting))

    faults = st.lists(st.builds(fault, times, chosen, st.integers(0, 60)), max_size=max_faults)
    return faults.map(lambda drawn: Schedule(tuple(drawn)))
