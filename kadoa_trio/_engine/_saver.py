"""Loads the position before the first subscription; saves it in the background after settlements, and on leaving.

Write-behind: one save at a time, then the newest position. Nothing waits for
a save, except that admission pauses when too many settled events are unsaved.

Nothing is saved before the saved position was taken up, or was known to be
absent: a start that is cut short or fails leaves the store as it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

import trio

from .._errors import CursorStoreError, OwnershipLostError
from .._events import Event
from .._position import Position
from .._redact import presentable
from .._stores import CursorSession, CursorStore
from ..notices import FirstStart, PositionNotSaved, PositionSaved, Resumed
from ._buffer import Buffer
from ._ledger import Ledger
from ._reporter import Reporter

SAVE_INTERVAL = 0.05
"""Minimum time between the starts of two saves, in seconds. One save covers everything that was settled meanwhile."""
IDS_A_SAVE = 1_000
"""The minimum time grows by itself for each this many ids beside the cursor: the time to write them is lost to events."""
SAVE_RETRIES = 0.1, 10.0
"""The first and the longest wait after a failed save, in seconds; the wait doubles between."""
LIFE_INTERVAL = 60.0
"""How often the last time of life is saved while nothing else is, in seconds."""
SAVE_TIMEOUT = 10.0
"""Maximum duration of a save, in seconds; a save that takes longer counts as failed."""

_T = TypeVar("_T")
_Args = TypeVarTuple("_Args")


class Saver:
    """Owns the position of one consumer for as long as a client is open.

    Args:
        store: where positions are saved.
        consumer: the name under which this one is saved.
        ledger: makes the position.
        buffer: limits the settled events that no save covers.
        reporter: publishes what goes wrong.
    """

    def __init__(self, store: CursorStore, consumer: str, ledger: Ledger, buffer: Buffer, reporter: Reporter) -> None:
        self._store = store
        self._consumer = consumer
        self._ledger = ledger
        self._reporter = reporter
        self._buffer = buffer
        self._session: CursorSession | None = None
        self._opened = trio.Event()
        self._saved_count = 0
        self._saved: Position | None = None
        self._wake = trio.Event()
        self._lost: OwnershipLostError | None = None
        self.saves: int = 0
        """Saves that succeeded."""
        self.failures: int = 0
        """Saves that failed."""
        self.failing: str | None = None
        """Why the newest save failed; None if it succeeded."""
        # `Limits.unsaved` holds from the first event on.
        buffer.saved(0)

    @property
    def unsaved(self) -> int:
        """How many events were settled since the position that was saved last."""
        return self._ledger.settled_count - self._saved_count

    def settled(self, event: Event) -> None:
        """Save some time soon: an event was settled."""
        self._wake.set()

    def position_changed(self) -> None:
        """Save some time soon: the position has changed without a settlement."""
        self._wake.set()

    def position(self) -> Position:
        """Return the position as it is now."""
        return self._ledger.settled_position(self._reporter.moment())

    async def open(self, team: str) -> None:
        """Become the owner and resume from the saved position; without one, save a first one.

        Before anything is subscribed to: a crash at any time after that finds
        a position, and so knows since when events may be missing.

        Cancelled or failed, it has saved nothing, or the first position of a
        first start.

        Raises:
            CursorStoreError: the store cannot be used, another client owns
                the consumer, or the saved position cannot be taken up.
        """
        session = self._session = await self._guarded(self._store.open, team, self._consumer)
        position = await self._load(session, team)
        if position is None:
            self._ledger.note_start(self._reporter.moment())
            self._ledger.team = team
            await self._bounded("saved", session.save, self.position())
            self._reporter.publish(FirstStart(consumer=self._consumer))
        else:
            self._ledger.restore(position)
            self._ledger.team = team
            self._reporter.publish(Resumed(cursor=position.cursor, last_life=position.last_life))
        self._opened.set()

    async def _load(self, session: CursorSession, team: str) -> Position | None:
        whose = f"the position of consumer {self._consumer!r} of team {presentable(team, 80)}"
        try:
            position = await self._bounded("loaded", session.load)
        except OwnershipLostError:
            raise
        except CursorStoreError as exc:
            raise CursorStoreError(
                f"{whose} was not loaded ({exc}); it is left as it is, and the client does not start. Open the client "
                "with another consumer= to begin without it"
            ) from exc
        if position is not None and not isinstance(position, Position):
            raise CursorStoreError(
                f"{self._store!r} has loaded {type(position).__name__} for {whose}, not a Position; it is left as it is"
            )
        if position is not None and position.team not in (None, team):
            other = presentable(str(position.team), 80)
            raise CursorStoreError(
                f"{whose}, to which the API key belongs, is a position in the stream of team {other}; it is left as "
                f"it is, and the client does not start. Use a key of team {other}, or another consumer="
            )
        return position

    async def run(self) -> None:
        """Save whenever something has changed, until cancelled.

        Raises:
            OwnershipLostError: somebody else saves here now.
        """
        await self._opened.wait()
        failures = 0
        while True:
            with trio.move_on_after(LIFE_INTERVAL):
                await self._wake.wait()
            started = trio.current_time()
            try:
                await self._save()
            except OwnershipLostError as exc:
                self._lost = exc
                raise
            except CursorStoreError as exc:
                first, longest = SAVE_RETRIES
                delay = min(first * 2.0 ** min(failures, 60), longest)
                failures += 1
                self.failures += 1
                self.failing = str(exc)
                self._wake.set()
                self._reporter.publish(PositionNotSaved(why=str(exc), delay=delay, unsaved=self.unsaved))
                await trio.sleep(delay)
            else:
                self.failing = None
                if failures:
                    self._reporter.publish(PositionSaved(failures=failures))
                failures = 0
                ids = 0 if self._saved is None else len(self._saved.settled)
                await trio.sleep_until(started + SAVE_INTERVAL * (1 + ids / IDS_A_SAVE))

    async def _save(self) -> None:
        assert self._session is not None
        self._wake = trio.Event()
        count, position = self._ledger.settled_count, self.position()
        if position == self._saved:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._bounded("saved", self._session.save, position)
        except BaseException:
            # Cancelled, or failed: it is as if it had not been tried.
            self._wake.set()
            raise
        self.saves += 1
        self._saved, self._saved_count = position, count
        self._buffer.saved(count)

    async def finish(self, deadline: float) -> CursorStoreError | None:
        """Save for the last time and give the ownership up, by *deadline* on Trio's clock.

        Nothing is saved if no position was taken up. To be called under a
        shield. Returns what went wrong now; what `run` has raised is not
        repeated.
        """
        session = self._session
        if session is None:
            return None
        fault: CursorStoreError | None = None
        if self._opened.is_set() and self._lost is None:
            with trio.CancelScope(deadline=deadline) as scope:
                try:
                    await self._save_last()
                except OwnershipLostError as exc:
                    fault = exc
                except CursorStoreError as exc:
                    fault = CursorStoreError(
                        f"the last position was not saved, so that {self.unsaved} settled events will be delivered "
                        f"again: {exc}"
                    )
                    fault.__cause__ = exc
            if scope.cancelled_caught:
                fault = CursorStoreError(
                    f"the last position was not saved, so that {self.unsaved} settled events may be delivered again: "
                    f"saving into {self._store!r} did not end in time and was abandoned"
                )
        # A little longer for a store that had to be abandoned: its lock is free at once.
        with trio.CancelScope(deadline=max(deadline, trio.current_time() + 0.1)):
            try:
                await self._guarded(session.aclose)
            except CursorStoreError as exc:
                fault = fault or exc
        return fault

    async def _save_last(self) -> None:
        try:
            await self._save()
        except OwnershipLostError:
            raise
        except CursorStoreError as exc:
            # Once more: a store whose file was lost makes it again.
            self.failures += 1
            self._reporter.publish(PositionNotSaved(why=str(exc), delay=0.0, unsaved=self.unsaved))
            await self._save()
            self._reporter.publish(PositionSaved(failures=1))

    async def _bounded(self, what: str, function: Callable[[*_Args], Awaitable[_T]], *args: *_Args) -> _T:
        """Call the store, within `SAVE_TIMEOUT`."""
        with trio.move_on_after(SAVE_TIMEOUT):
            return await self._guarded(function, *args)
        raise CursorStoreError(f"{self._store!r} has not {what} within {SAVE_TIMEOUT:g} s")

    async def _guarded(self, function: Callable[[*_Args], Awaitable[_T]], *args: *_Args) -> _T:
        """Call the store. Whatever a store of somebody's own raises is a fault of the store."""
        try:
            return await function(*args)
        except CursorStoreError:
            raise
        except Exception as exc:
            raise CursorStoreError(f"{self._store!r} failed: {type(exc).__name__}: {exc}") from exc
