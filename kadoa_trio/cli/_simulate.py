"""``kadoa-trio simulate``: a simulated Kadoa on this machine, with scheduled faults, for any client."""

from __future__ import annotations

import itertools
import math
import random
import shlex
from datetime import UTC, datetime

import attrs
import click
import trio

from .._events import EVENT_TYPES
from ..testing import Schedule, SimulatedKadoa, open_simulated_kadoa
from ._output import say

_TYPES = tuple(EVENT_TYPES)
API_KEY = "simulated-api-key"
"""The API key of the simulated Kadoa: not a secret, and the same in every run, so that a client survives a restart."""


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
    """Serve until cancelled, or for *seconds*."""
    async with open_simulated_kadoa(loopback=True, heartbeat_interval=heartbeat, port=port) as kadoa:
        kadoa.api_key = API_KEY
        for name, value in kadoa.environment.items():
            click.echo(f"export {name}={shlex.quote(value)}")
        if env_file is not None:
            lines = "".join(f"{name}={value}\n" for name, value in kadoa.environment.items())
            await trio.Path(env_file).write_text(lines)
        say("set these variables for any Kadoa client; Ctrl-C ends the simulation")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_say_subscriptions, kadoa)
            if rate:
                nursery.start_soon(_publish, kadoa, rate)
            nursery.start_soon(_play, kadoa, schedule, repeat)
            with trio.move_on_after(math.inf if seconds is None else seconds):
                await trio.sleep_forever()
            nursery.cancel_scope.cancel(reason="the duration has passed")
    return 0


async def _publish(kadoa: SimulatedKadoa, rate: float) -> None:
    rng = random.Random()
    while True:
        await trio.sleep(rng.expovariate(rate))
        kadoa.publish(rng.choice(_TYPES), workflow_id=f"wf_{rng.randrange(1, 6)}", timestamp=datetime.now(UTC))


async def _say_subscriptions(kadoa: SimulatedKadoa) -> None:
    for number in itertools.count(1):
        connection = await kadoa.wait_subscribed(number)
        cursor = "without a cursor" if connection.last_cursor is None else f"from {connection.last_cursor}"
        say(f"connection {number}: subscribed {cursor}; {len(kadoa.published)} events published so far")


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
        # A pause, because a schedule whose faults are all at 0 s would be repeated without end.
        await trio.sleep(1.0)
