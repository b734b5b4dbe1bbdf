"""Hypothesis strategies for handlers of Kadoa's events, and for the faults that they live through.

Needs Hypothesis: ``pip install 'kadoa-trio[testing]'``.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, get_args

from hypothesis import strategies as st

from .._events import Event
from ._builders import Draft, difference, make_event
from ._schedule import LASTING, FaultKind, Schedule, ScheduledFault

__all__ = ["drafts", "events", "frames", "schedules"]

_TYPES = ("workflow_finished", "workflow_failed", "workflow_recovered", "workflow_data_change", "credits_low")
# By category and not by codec="utf-8", which gives the same characters: for a codec Hypothesis encodes 1.1 million of
# them. And built here: where its cache on the disk is empty, Hypothesis first collects the categories of all characters.
# Either takes about a second of a slow machine, and as a part of the first draw it would fail the health check.
_characters = st.characters(exclude_categories=["Cs"])
_characters.validate()
_words = st.text(_characters, max_size=20)
_ids = st.text("abcdef0123456789-", min_size=1, max_size=12)
_scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | _words
_json = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3), max_leaves=8
)


@st.composite
def drafts(draw: st.DrawFn, types: Collection[str] | None = None, *, odd: bool = False) -> Draft:
    """Draw drafts of events, to be published or made into events.

    Args:
        draw: Hypothesis's own.
        types: only of these event types; None for the documented ones and one without a class.
        odd: also with payloads that are not as documented, which a service
            may send and a handler must survive.
    """
    kind = draw(st.sampled_from(sorted(types or _TYPES)))
    if odd and draw(st.booleans()):
        return Draft(kind, draw(_json.filter(lambda payload: payload is not None)))
    fields: dict[str, Any] = {"workflowId": draw(_ids)}
    match kind:
        case "workflow_finished":
            fields["id"] = draw(_ids)
        case "workflow_failed":
            fields |= {name: draw(_words) for name in ("source", "reason", "action")}
        case "workflow_recovered":
            fields |= {name: draw(_words) for name in ("workflowName", "source")}
        case "workflow_data_change":
            kinds = st.sampled_from(["changed", "added", "removed"])
            one = st.builds(
                lambda kind, key, pair: difference(kind, **{key: pair}), kinds, _ids, st.tuples(_json, _json)
            )
            fields |= {
                "id": draw(_ids),
                "data": draw(st.lists(_json, max_size=2)),
                "differences": draw(st.lists(one, max_size=3)),
            }
    return Draft(kind, fields)


def events(types: Collection[str] | None = None, *, odd: bool = False) -> st.SearchStrategy[Event]:
    """Draw events as a client hands them out, for handlers that are tested without a server; see `drafts`."""
    return st.builds(lambda draft, event_id: make_event(draft, id=event_id), drafts(types, odd=odd), _ids)


def frames() -> st.SearchStrategy[str]:
    """Draw frames as a server may send them: events in every spelling, heartbeats, drain notices, and nonsense."""
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


@st.composite
def schedules(
    draw: st.DrawFn,
    *,
    seconds: float = 300.0,
    max_faults: int = 8,
    kinds: Collection[FaultKind] | None = None,
) -> Schedule:
    """Draw schedules of faults, to be played with `SimulatedKadoa.play`.

    Args:
        draw: Hypothesis's own.
        seconds: no fault begins later, in seconds of Trio's clock.
        max_faults: how many there are at most.
        kinds: only of these; None for all but ``forget``, after which no
            client can be complete.
    """
    chosen = st.sampled_from(sorted(set(get_args(FaultKind)) - {"forget"} if kinds is None else kinds))
    times = st.integers(0, int(seconds)).map(float)

    def fault(at: float, kind: FaultKind, lasting: int) -> ScheduledFault:
        return ScheduledFault(at, kind, float(lasting) if kind in LASTING else 1.0)

    return Schedule(tuple(draw(st.lists(st.builds(fault, times, chosen, st.integers(0, 60)), max_size=max_faults))))
