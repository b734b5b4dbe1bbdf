"""Whether the client and its program are well, in words: what `Realtime.health` returns."""

from __future__ import annotations

import trio

from .._redact import presentable
from ..notices import Health, State
from ._admission import Admission
from ._buffer import Buffer
from ._ledger import Ledger
from ._reporter import Reporter
from ._saver import Saver

_MAX_REASON = 300


def examine(
    reporter: Reporter, ledger: Ledger, buffer: Buffer, admission: Admission, saver: Saver | None, stuck_after: float
) -> Health:
    """Look at the parts of a client."""
    state = reporter.status.state
    statistics = buffer.statistics()
    oldest, since = ledger.oldest_unsettled, ledger.oldest_unsettled_since
    age = None if since is None else max(0.0, _clock(since[1]) - since[1])
    live = state in (State.LIVE, State.REPLACING)
    problems: list[str] = []
    if not live:
        # Not by the wall clock, which may be set.
        seconds = 0.0 if reporter.state_clock is None else _clock(reporter.state_clock) - reporter.state_clock
        problems.append(_STATES[state].format(seconds=seconds))
    if oldest is not None and age is not None and age >= stuck_after:
        problems.append(f"event {presentable(oldest, 80)} is not settled for {age:.0f} s")
    if buffer.paused:
        # Not for a full buffer: a program that works off a backlog has one all the time.
        problems.append(
            f"reading is paused: {statistics.unsettled} events are not settled (maximum {statistics.max_unsettled}), "
            f"{0 if saver is None else saver.unsaved} are not saved"
        )
    if saver is not None and saver.failing is not None:
        problems.append(f"the position cannot be saved: {presentable(saver.failing, _MAX_REASON)}")
    return Health(
        problems=tuple(problems),
        state=state,
        state_since=reporter.state_since,
        live=live,
        last_frame_at=reporter.last_frame_at,
        last_event_at=admission.last_event_at,
        last_settled_at=buffer.settled_at,
        unsettled=statistics.unsettled,
        oldest_unsettled=oldest,
        oldest_unsettled_age=age,
        unsaved=0 if saver is None else saver.unsaved,
        open_gaps=len(ledger.gaps),
    )


_STATES = {
    State.CONNECTING: "no connection is live for {seconds:.0f} s; the client is connecting",
    State.STOPPED: "the client was stopped {seconds:.0f} s ago",
    State.FAILED: "the client has failed {seconds:.0f} s ago; receiving from its events raises the fault",
}


def _clock(otherwise: float) -> float:
    """Return Trio's time; after the run there is none."""
    return trio.current_time() if trio.lowlevel.in_trio_run() else otherwise
