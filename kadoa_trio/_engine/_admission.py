"""The only place where events are admitted, from a connection or from the notification log."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from .._events import Event
from .._position import Gap
from ..notices import PossibleGap
from ._buffer import Buffer
from ._ledger import Entry, Ledger, Moment
from ._reporter import Reporter


class PositionObserver(Protocol):
    """Takes notice of changes of the position that no settlement brings: possible gaps, a withdrawn promise."""

    def position_changed(self) -> None:
        """Take notice. Cheap, and never a checkpoint."""
        ...


class Admission:
    """Admits events: finds space, drops repeats, and puts what is new into the buffer, in one step.

    Everything is decided again after each wait for space: another connection
    may have brought the event meanwhile, and admission may have ended.

    Args:
        ledger: knows which event is new.
        buffer: where admitted events wait to be received.
        reporter: publishes possible gaps.
        event_types: the types that the program asked for; None for all.
        workflow_ids: the same for workflows.
    """

    def __init__(
        self,
        ledger: Ledger,
        buffer: Buffer,
        reporter: Reporter,
        *,
        event_types: frozenset[str] | None,
        workflow_ids: frozenset[str] | None,
    ) -> None:
        self._ledger = ledger
        self._buffer = buffer
        self._reporter = reporter
        self._event_types = event_types
        self._workflow_ids = workflow_ids
        self._filters = event_types is not None or workflow_ids is not None
        self._observers: list[PositionObserver] = []
        self.last_event_at: datetime | None = None
        """When an event was admitted last, in wall time."""
        self.received: int = 0
        """Events admitted, the filtered ones included."""
        self.filtered: int = 0
        """Events that the program did not ask for. They count as settled."""

    def observe(self, observer: PositionObserver) -> None:
        """Have an observer notified of changes of the position from now on."""
        self._observers.append(observer)

    @property
    def ended(self) -> bool:
        """Whether admission has ended."""
        return self._buffer.closed

    def end(self, fault: Exception | None = None) -> None:
        """Admit nothing from now on; see `Buffer.end`."""
        self._buffer.end(fault)

    def stop(self, *, retry_within: float = 0.0) -> None:
        """End admission in an orderly way; see `Buffer.stop`."""
        self._buffer.stop(retry_within=retry_within)

    # ---- admitting: no checkpoint in any of these ----------------------------------------------------------------

    def try_admit(self, event: Event, generation: int, now: Moment, arrived: Moment, *, apart: bool = False) -> bool:
        """Admit an event of a connection; return False if there is no space for it.

        Args:
            event: the event.
            generation: the connection that delivered it.
            now: the time.
            arrived: a time before which the event cannot have come.
            apart: that connection has ended; the event was held since.
        """
        ledger, buffer = self._ledger, self._buffer
        if ledger.knows(event.id):
            if not apart:
                ledger.repeat(generation, event.id, event.cursor, now, arrived)
            return True
        if buffer.closed:
            return True
        wanted = not self._filters or self._wants(event)
        # A filtered event counts, too: it lies between the oldest unsettled event and the newest one.
        if not buffer.has_space(event.size if wanted else 0):
            return False
        gaps: Sequence[Gap] = ()
        self.last_event_at = now[0]
        if apart:
            entry = ledger.admit_apart(event.id, now)
        else:
            entry, gaps = ledger.admit(generation, event.id, event.cursor, now, arrived)
        if wanted:
            self.received += 1
            buffer.put(event, entry)
        else:
            self._pass_on(event, entry, wanted=False)
        if gaps:
            self.report_gaps(gaps)
        return True

    def admit_many(self, events: Sequence[Event], generation: int, now: Moment, arrived: Moment) -> int:
        """Admit events of a connection that came together, in their order, until there is no space for one.

        Args:
            events: the events.
            generation: the connection that delivered them.
            now: the time.
            arrived: a time before which they cannot have come.

        Returns how many were admitted, or were known: fewer than all if there is no space for the next one.
        """
        buffer, total = self._buffer, len(events)
        # The limits are looked at once for all of them, and again only for those that may not fit.
        fitting, done = buffer.count_fitting(events), 0
        while done < total:
            if done < fitting:
                entries = self._ledger.admit_run(generation, events, range(done, fitting), now, arrived)
                self.last_event_at = now[0]
                self._put_many(events[done : done + len(entries)], entries)
                done += len(entries)
            if done < total:
                if not self.try_admit(events[done], generation, now, arrived):
                    break
                done += 1
        return done

    def _put_many(self, events: Sequence[Event], entries: Sequence[Entry]) -> None:
        if not self._filters:
            self.received += len(entries)
            self._buffer.put_many(events, entries)
            return
        for event, entry in zip(events, entries, strict=True):
            self._pass_on(event, entry, wanted=self._wants(event))

    def try_admit_from_log(self, event: Event) -> bool:
        """Admit an event of the notification log; return False if there is no space for it.

        The caller must have asked `Ledger.knows` since the last checkpoint:
        a known event must not be admitted again.
        """
        wanted = not self._filters or self._wants(event)
        if self._buffer.closed or not self._buffer.has_space(event.size if wanted else 0):
            return False
        self._pass_on(event, self._ledger.admit_from_log(event.id, self._reporter.moment()), wanted=wanted)
        return True

    def _pass_on(self, event: Event, entry: Entry, *, wanted: bool) -> None:
        """Put an admitted event into the buffer, or settle it if the program did not ask for it."""
        self.received += 1
        if wanted:
            self._buffer.put(event, entry)
        else:
            self.filtered += 1
            self._buffer.settle(event, entry)

    def report_gaps(self, gaps: Sequence[Gap]) -> None:
        """Publish possible gaps, and have them saved and repaired."""
        for gap in gaps:
            self._reporter.publish(PossibleGap(gap=gap))
        if gaps:
            self.position_changed()

    def position_changed(self) -> None:
        """Notify the observers that the position has changed without a settlement."""
        for observer in self._observers:
            observer.position_changed()

    # ---- waiting -------------------------------------------------------------------------------------------------

    async def wait_space(self, event: Event) -> None:
        """Wait until there may be space for an event, or admission has ended. Cancellation changes nothing."""
        await self._buffer.wait_space(event.size if not self._filters or self._wants(event) else 0)

    def _wants(self, event: Event) -> bool:
        if self._event_types is not None and event.type not in self._event_types:
            return False
        return self._workflow_ids is None or event.workflow_id is None or event.workflow_id in self._workflow_ids
