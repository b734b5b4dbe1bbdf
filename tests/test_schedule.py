"""Schedules of faults: written and read, drawn from a seed, and played on a client that must lose nothing."""

from __future__ import annotations

from typing import Any, get_args

import attrs
import pytest
import trio
from _receiving import survive
from hypothesis import given
from hypothesis import strategies as st

from kadoa_trio.cli import main
from kadoa_trio.testing import FaultKind, Faults, Schedule, ScheduledFault, open_simulated_kadoa
from kadoa_trio.testing._faults import FAULTS, HARMLESS

faults = st.builds(
    ScheduledFault,
    st.integers(0, 10_000).map(float),
    st.sampled_from(list(FAULTS)),
    st.integers(0, 100).map(float),
)


@given(st.lists(faults, max_size=10))
def test_schedule_reads_what_it_writes(drawn: list[ScheduledFault]) -> None:
    schedule = Schedule(tuple(drawn))
    assert str(Schedule.parse(str(schedule))) == str(schedule)
    assert [fault.at for fault in schedule.faults] == sorted(fault.at for fault in drawn)


@pytest.mark.parametrize(
    "text", ["drain", "x drain", "1 quake", "1 drain 2 3", "-1 drain", "1 drain -1", "nan reset", "inf eof"]
)
def test_unreadable_schedule_names_the_part(text: str) -> None:
    with pytest.raises(ValueError, match=text.split()[0].lstrip("-")):
        Schedule.parse(f"5 reset, {text}")


def test_kinds_are_those_of_the_table() -> None:
    assert set(get_args(FaultKind)) == set(FAULTS)


@pytest.mark.parametrize("kind", FAULTS)
def test_fault_does_something_is_documented_listed_and_read(
    kind: FaultKind, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = FAULTS[kind]
    assert fault.state or fault.server or fault.newest
    assert set(fault.state) <= {field.name for field in attrs.fields(Faults)}
    assert not fault.state or fault.seconds is not None
    assert f"* ``{kind}``: {fault.does}" in (ScheduledFault.__doc__ or "")
    assert main(["simulate", "--help"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert f" {kind} {fault.does}" in listed
    text = f"3 {kind} 2" if fault.seconds is not None else f"3 {kind}"
    assert str(Schedule.parse(text)) == text
    assert Schedule.parse(text).length == (3 if fault.seconds is None else 5)


@pytest.mark.parametrize("kind", FAULTS)
async def test_fault_changes_the_server_for_its_duration(autojump_clock: Any, pair: Any, kind: FaultKind) -> None:
    async with pair() as (kadoa, _realtime):
        kadoa.publish()
        fault, connection = FAULTS[kind], kadoa.newest
        fault.begin(kadoa, 3.0)
        assert {name: getattr(kadoa.faults, name) for name in fault.state} == fault.state
        await trio.sleep(1)
        changed = [kadoa.faults != Faults(), connection.draining, not connection.open, connection.silent]
        assert any([*changed, kadoa.stream.forgotten])
        fault.end(kadoa)
        assert kadoa.faults == Faults()


def test_same_seed_draws_the_same_chaos() -> None:
    one = Schedule.chaos(7, seconds=3600)
    assert one == Schedule.chaos(7, seconds=3600)
    assert one != Schedule.chaos(8, seconds=3600)
    assert 200 < len(one.faults) < 600
    assert {fault.kind for fault in Schedule.chaos(1, seconds=600, kinds=["drain"]).faults} == {"drain"}
    assert {fault.kind for fault in one.faults} == set(FAULTS) - {"forget"}


async def test_cancelled_schedule_leaves_nothing_broken(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        with trio.move_on_after(5):
            await kadoa.play(Schedule.parse("1 outage 60, 2 tokens 60, 3 hang 60, 3 handshakes 60, 4 stillborn 60"))
        assert kadoa.faults == Faults()


async def test_overlapping_faults_of_a_kind_last_as_long_as_the_longest(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa, trio.open_nursery() as nursery:
        nursery.start_soon(kadoa.play, Schedule.parse("1 tokens 10, 2 tokens 2"))
        await trio.sleep(6)
        assert kadoa.faults.token_status == 503
        await trio.sleep(6)
        assert kadoa.faults.token_status is None


@pytest.mark.parametrize("kind", HARMLESS)
def test_client_loses_nothing_in_any_fault(kind: Any) -> None:
    survive(Schedule(tuple(ScheduledFault(float(at), kind, 7.0) for at in (1, 40, 45))))
