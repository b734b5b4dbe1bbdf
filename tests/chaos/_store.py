"""A cursor store that fails in every way, and keeps what it holds across crashes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from kadoa_trio import ConsumerOwnedError, CursorStoreError, OwnershipLostError, Position

if TYPE_CHECKING:
    from ._world import Run, World


class ChaosStore:
    """A store of one position.

    What a process saves after it has died is not saved.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.value: Position | None = None
        self.covered: frozenset[int] = frozenset()
        """The serials that were settled when the value was made."""
        self.fault: str | None = None
        self.fault_until = 0.0
        self.saves = 0

    def break_for(self, kind: str, seconds: float) -> None:
        if kind == "vanish":
            self.value, self.covered = None, frozenset()
            return
        self.fault, self.fault_until = kind, trio.current_time() + seconds

    def heal(self) -> None:
        self.fault = None

    def current(self, run: Run) -> str | None:
        """Give the fault of now."""
        if self.fault is None or trio.current_time() >= self.fault_until:
            return None
        run.store_failed = True
        return self.fault

    async def open(self, team: str, consumer: str) -> ChaosSession:
        run = self.world.run
        assert run is not None
        await self.meet(run, ("fail", "odd", "hang", "slow", "owned"))
        return ChaosSession(self, run)

    async def meet(self, run: Run, kinds: tuple[str, ...]) -> str | None:
        """Do what the fault of now does to any call; give the fault's name."""
        await trio.lowlevel.checkpoint()
        kind = self.current(run)
        if kind not in kinds:
            return kind
        match kind:
            case "fail":
                raise CursorStoreError("the disk is full")
            case "odd":
                raise KeyError("odd")
            case "hang":
                await trio.sleep_forever()
            case "slow":
                await trio.sleep(1.5)
            case "owned":
                raise ConsumerOwnedError("owned by somebody else")
            case "unreadable":
                raise CursorStoreError("cannot be read")
            case "newer":
                raise ValueError("a position of version 99")
        return kind


class ChaosSession:
    """The store, opened."""

    def __init__(self, store: ChaosStore, run: Run) -> None:
        self._store = store
        self._run = run

    def __repr__(self) -> str:
        return "<ChaosSession>"

    async def load(self) -> Position | None:
        store, run = self._store, self._run
        await store.meet(run, ("fail", "odd", "hang", "slow", "unreadable", "newer"))
        run.starts_from(store.value, store.covered)
        return store.value

    async def save(self, position: Position) -> None:
        store, run = self._store, self._run
        if run.dead:
            await trio.lowlevel.checkpoint()
            return
        covered = run.covered | run.settled_here
        store.world.check_save(run, position, store.value)
        kind = store.current(run)
        if kind == "slow":
            # The commit comes before the answer or after the wait, by turns.
            store.saves += 1
            if store.saves % 2:
                await trio.sleep(1.5)
                self._commit(position, covered)
            else:
                self._commit(position, covered)
                await trio.sleep(1.5)
            return
        if kind == "lie_failed":
            self._commit(position, covered)
            await trio.lowlevel.checkpoint()
            raise CursorStoreError("said to have failed, but was done")
        if kind == "lie_done":
            run.lied_to = True
            await trio.lowlevel.checkpoint()
            return
        if kind == "lost":
            run.doomed = True
            await trio.lowlevel.checkpoint()
            raise OwnershipLostError("taken over")
        await store.meet(run, ("fail", "odd", "hang"))
        self._commit(position, covered)

    def _commit(self, position: Position, covered: frozenset[int]) -> None:
        if not self._run.dead:
            self._store.value, self._store.covered = position, covered
            self._store.saves += 1
            self._run.saved(covered)

    async def aclose(self) -> None:
        if self._store.current(self._run) == "hang":
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
