"""Items that wait for a time, and one task that releases them. There is no task while nothing waits."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

_T = TypeVar("_T")


class Delays(Generic[_T]):
    """Holds items until they are due, and releases those that are due together in the order in which they were added.

    Args:
        release: called with the items that are due. Must not raise, and must not be a checkpoint.
    """

    def __init__(self, release: Callable[[list[_T]], None]) -> None:
        self._release = release
        self._heap: list[tuple[float, int, _T]] = []
        self._numbers = itertools.count()
        self._nursery: trio.Nursery | None = None
        self._sleep: trio.CancelScope | None = None
        """The sleep of the task; None if there is no task."""

    def __len__(self) -> int:
        return len(self._heap)

    def start(self, nursery: trio.Nursery) -> None:
        """Release items from now on, in a task of *nursery* while any wait."""
        self._nursery = nursery
        self._ensure_running()

    def stop_starting(self) -> None:
        """Start no task from now on, because the nursery is about to end. Items that wait are released no more."""
        self._nursery = None

    def add(self, items: list[_T], due: float) -> None:
        """Release *items* at *due*, on Trio's clock; those that are due already at the task's next step."""
        for item in items:
            heapq.heappush(self._heap, (due, next(self._numbers), item))
        self._ensure_running()

    def clear(self) -> list[_T]:
        """Take out all items that wait, and return them in the order in which they are due."""
        waiting = [item for _, _, item in sorted(self._heap, key=lambda one: one[:2])]
        self._heap.clear()
        self._ensure_running()
        return waiting

    def _ensure_running(self) -> None:
        if self._sleep is not None:
            self._sleep.deadline = self._next_due()
        elif self._heap and self._nursery is not None:
            self._sleep = trio.CancelScope(deadline=self._next_due())
            self._nursery.start_soon(self._run)

    def _next_due(self) -> float:
        # Without any: at once, so that the task ends.
        return self._heap[0][0] if self._heap else -math.inf

    @trio.lowlevel.enable_ki_protection
    async def _run(self) -> None:
        try:
            while self._heap:
                assert self._sleep is not None
                with self._sleep:
                    await trio.sleep_forever()
                self._release_due()
                # A scope can be entered once.
                self._sleep = trio.CancelScope(deadline=self._next_due())
        finally:
            self._sleep = None

    def _release_due(self) -> None:
        now, due = trio.current_time(), []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap))
        if due:
            # By number: what was added together stays together, also if something else was due a little earlier.
            self._release([item for _, number, item in sorted(due, key=lambda one: one[1])])
