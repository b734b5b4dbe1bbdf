"""The life of a connection: its table of phases, and that connections follow it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import trio

from kadoa_trio._engine._connection import Connection
from kadoa_trio._engine._phase import TRANSITIONS, Phase, PhaseError, check_transition
from kadoa_trio.testing import Faults


@pytest.mark.parametrize(("before", "after"), list(itertools.product(Phase, Phase)), ids=lambda phase: phase.name)
def test_only_the_transitions_of_the_table_are_possible(before: Phase, after: Phase) -> None:
    if after in TRANSITIONS[before]:
        check_transition(before, after)
    else:
        with pytest.raises(PhaseError, match=f"from {before.name} to {after.name}"):
            check_transition(before, after)


def test_phases_only_go_forward_and_each_ends_in_closed() -> None:
    assert set(TRANSITIONS) == set(Phase)
    for before, following in TRANSITIONS.items():
        assert all(after > before for after in following)
        assert following or before is Phase.CLOSED
    # What was open is not closed before the ledger knows that it has ended.
    assert all(Phase.CLOSED not in TRANSITIONS[phase] for phase in Phase if Phase.SUBSCRIBING <= phase < Phase.ENDED)


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Phase]]:
    """Record the phases that each connection enters, by its generation."""
    recorded: dict[int, list[Phase]] = {}
    enter = Connection._enter

    def watched(self: Connection, phase: Phase) -> None:
        enter(self, phase)
        recorded.setdefault(self.generation, []).append(phase)

    monkeypatch.setattr(Connection, "_enter", watched)
    return recorded


async def test_connections_go_through_the_phases(lives: dict[int, list[Phase]], autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        await realtime.wait_live()
        await trio.sleep(20)
        kadoa.newest.drain(100, close_after=1)
        await kadoa.wait_subscribed(2)
        kadoa.publish()
        await trio.sleep(5)
        kadoa.newest.reset()
        await kadoa.wait_subscribed(3)
        kadoa.publish()
        await trio.sleep(1)
        kadoa.faults = Faults(token_status=503)
        kadoa.newest.reset()
        await trio.sleep(1)
    opened = [Phase.HANDSHAKE, Phase.SUBSCRIBING, Phase.SUBSCRIBED, Phase.LIVE]
    assert lives[1] == [*opened, Phase.STABLE, Phase.ENDED, Phase.CLOSED]
    assert lives[2] == [*opened, Phase.ENDED, Phase.CLOSED]
    assert lives[3] == [*opened, Phase.ENDED, Phase.CLOSED]
    assert lives[4] == [Phase.CLOSED]


async def test_waiting_for_a_phase_ends_with_a_later_one(autojump_clock: Any, pair: Any) -> None:
    async with pair() as (kadoa, realtime):
        await realtime.wait_live()
        (connection,) = realtime._assembly.supervisor._open
        assert connection.is_live
        with trio.move_on_after(5) as scope:
            await connection.wait_phase(Phase.STABLE)
        assert scope.cancelled_caught
        kadoa.newest.reset()
        with trio.fail_after(5):
            await connection.wait_phase(Phase.STABLE)
        assert connection.ended
        assert not connection.was(Phase.STABLE)
        assert not connection.is_live
