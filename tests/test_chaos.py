"""Random programs against a server that is written from the specification: see `chaos`.

The seeds are fixed, so that a run of today and one of tomorrow test the same.
More of them: ``python -m tests.chaos --seeds 0:20000 --jobs 4``.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from chaos._mutations import MUTATIONS, caught
from chaos._program import ALL, FromHypothesis, Program, generate, of_seed
from chaos._world import execute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NOT_YET: frozenset[str] = frozenset()
"""What servers and programs may do that the client does not bear yet: known defects. To be empty."""
IGNORED: frozenset[str] = frozenset()
"""Promises that are known not to be kept yet. To be empty."""
SEEDS = 32
SHARES = 4


def check(program: Program) -> None:
    result = execute(program, IGNORED)
    assert result.violation is None, f"{result.violation}\n{program}\n" + "\n".join(result.trace)


@pytest.mark.parametrize("share", range(SHARES))
def test_no_program_of_a_seed_breaks_a_promise(share: int) -> None:
    for seed in range(share, SEEDS, SHARES):
        check(of_seed(seed, ALL - NOT_YET))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    return generate(FromHypothesis(draw), ALL - NOT_YET)


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs())
def test_no_drawn_program_breaks_a_promise(program: Program) -> None:
    check(program)


def test_a_seed_gives_the_same_program_and_the_same_run() -> None:
    for seed in range(8):
        program = of_seed(seed)
        assert of_seed(seed) == program
        assert execute(program).trace == execute(program).trace


QUICK = (
    "repeated_ids_are_handed_out",
    "possible_gaps_are_not_reported",
    "silence_is_not_noticed",
    "a_replay_moves_no_cursor",
    "neighbours_are_swapped",
    "events_are_settled_when_they_are_received",
    "there_is_always_space",
    "refusals_have_no_grace",
    "the_token_is_logged",
)
"""Mutations that are caught within seconds. ``python -m tests.chaos --mutations`` tries all of them."""


@pytest.mark.parametrize("mutation", QUICK)
def test_a_client_that_is_broken_on_purpose_is_caught(mutation: str) -> None:
    assert caught(mutation) is not None, f"not caught within {MUTATIONS[mutation].within} seeds"


def test_the_model_shares_no_code_with_the_simulator() -> None:
    for path in (Path(__file__).parent / "chaos").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            assert not [name for name in names if name.startswith("kadoa_trio.testing")], path
