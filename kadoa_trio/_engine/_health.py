"""Whether the client and its program are well, in words: what `Realtime.health` returns."""

from __future__ import annotations

from datetime import datetime

import attrs
import trio

from .._redact import presentable
from ..notices import State
from ._admission import Admission
from ._buffer import Buffer
from ._ledger import Ledger
from ._reporter import Reporter
from ._saver import Saver

_MAX_REASON = 300


@attrs.frozen(kw_only=True)
class Health:
    """How the client and its program are at one moment. Times are in UTC, by the machine's clock."""

    problems: tuple[str, ...]
    """Why the client or the program is not well, one sentence each; empty if both are."""
    state: State
    state_since: datetime
    live: bool
    """Whether a connection delivers events; also while it is being replaced."""
    last_frame_at: datetime | None
    """When a connection received a frame last, heartbeats included; None before the first one."""
    last_event_at: datetime | None
    """When an event was received last, filtered ones included; None before the first one."""
    last_settled_at: datetime | None
    """When the program settled an event last; None before the first one."""
    unsettled: int
    """The span from the oldest unsettled event to the newest one received, in events."""
    oldest_unsettled: str | None
    """The id of the oldest event that is not settled."""
    oldest_unsettled_age: float | None
    """How long ago that event was received, in seconds."""
    unsaved: int
    """Settled events that no save covers yet; 0 without a cursor store."""
    open_gaps: int
    """Possible gaps that are not repaired, maximum 100."""

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        """Give the problems in one line; ``"live"`` if there is none."""
        return "; ".join(self.problems) or self.state.value


def examine(
    reporter: Reporter, ledger: Ledger, buffer: Buffer, admission: Admission, saver: Saver | None, stuck_after: float
) -> Health:
    """Look at the parts of a client."""
    state, now = reporter.status.state, reporter.wall_clock()
    statistics = buffer.statistics()
    oldest, since = ledger.oldest_unsettled, ledger.oldest_unsettled_since
    age = None if since is None else max(0.0, _clock(since[1]) - since[1])
    live = state in (State.LIVE, State.REPLACING)
    problems: list[str] = []
    if not live:
        seconds = max(0.0, (now - reporter.state_since).total_seconds())
        problems.append(_STATES[state].format(seconds=seconds))
    if oldest is not None and age is not None and age >= stuck_after:
        problems.append(f"event {presentable(oldest, 80)} is not settled for {age:.0f} s")
    if statistics.tasks_waiting_space:
        problems.append(
            f"reading is paused: {statistics.buffered_events} events wait to be received "
            f"(maximum {statistics.max_buffered_events}), {statistics.unsettled} are not settled "
            f"(maximum {statistics.max_unsettled})"
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
