"""``kadoa-trio simulate``: a Kadoa on this machine, with faults by schedule, for any client."""

from __future__ import annotations

import itertools
import math
import random
import shlex
from datetime import UTC, datetime

import attrs
import click
import trio

from ..testing import Schedule, SimulatedKadoa, open_simulated_kadoa
from ._output import say

_TYPES = ("workflow_finished", "workflow_data_change", "workflow_failed", "workflow_recovered")
API_KEY = "simulated-api-key"
"""The key that the simulated Kadoa takes: no secret, and the same every time, so that a client can stay."""


async def simulate(
    *,
    port: int,
    rate: float,
    schedule: Schedule,
    repeat: bool,
    heartbeat: float,
    seconds: float | None,
    env_file: str | None,
) -> int:
    """Serve until cancelled, or for so many *seconds*."""
    async with open_simulated_kadoa(loopback=True, heartbeat_interval=heartbeat, port=port) as kadoa:
        kadoa.api_key = API_KEY
        for name, value in kadoa.environment.items():
            click.echo(f"export {name}={shlex.quote(value)}")
        if env_file is not None:
            lines = "".join(f"{name}={value}\n" for name, value in kadoa.environment.items())
            await trio.Path(env_file).write_text(lines)
        say("set these in the shell of any Kadoa client; Ctrl-C ends the simulation")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_tell, kadoa)
            if rate:
                nursery.start_soon(_publish, kadoa, rate)
            nursery.start_soon(_play, kadoa, schedule, repeat)
            with trio.move_on_after(math.inf if seconds is None else seconds):
                await trio.sleep_forever()
            nursery.cancel_scope.cancel(reason="the time is over")
    return 0


async def _publish(kadoa: SimulatedKadoa, rate: float) -> None:
    rng = random.Random()
    while True:
        await trio.sleep(rng.expovariate(rate))
        kadoa.publish(rng.choice(_TYPES), workflow_id=f"wf_{rng.randrange(1, 6)}", timestamp=datetime.now(UTC))


async def _tell(kadoa: SimulatedKadoa) -> None:
    for number in itertools.count(1):
        connection = await kadoa.wait_subscribed(number)
        cursor = "without a cursor" if connection.last_cursor is None else f"from {connection.last_cursor}"
        say(f"connection {number}: subscribed {cursor}; {len(kadoa.published)} events so far")


async def _play(kadoa: SimulatedKadoa, schedule: Schedule, repeat: bool) -> None:
    while schedule.faults:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for fault in schedule.faults:
                await trio.sleep_until(began + fault.at)
                say(f"fault: {fault}")
                nursery.start_soon(kadoa.play, Schedule((attrs.evolve(fault, at=0.0),)))
        if not repeat:
            return
        # A schedule that is all at once would be repeated without a breath.
        await trio.sleep(1.0)
