"""``kadoa-trio demo``: the client survives faults of a simulated Kadoa on loopback, and every event is counted."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections import Counter
from datetime import UTC, datetime

import attrs
import trio

from .._client import Realtime, open_realtime
from .._settings import RetryPolicy, Timeouts
from ..notices import AttemptStarted, Lost, Notice, Stable
from ..testing import PublishedEvent, SimulatedConnection, SimulatedKadoa, open_simulated_kadoa
from ._board import Board
from ._output import colours, say
from ._watch import drawing

_RATE = 100
_PATIENCE = 20.0
_HEIGHT = 24


@attrs.define(eq=False)
class Account:
    """The events that were sent and received, and the lines that are shown meanwhile."""

    board: Board | None
    """None prints line by line."""
    started: float = attrs.field(factory=trio.current_time)
    published: list[PublishedEvent] = attrs.field(factory=list)
    received: list[str] = attrs.field(factory=list)
    complete: trio.Event = attrs.field(factory=trio.Event)
    last: str | None = None

    def say(self, who: str, what: str) -> None:
        line = f"{trio.current_time() - self.started:6.2f} s  {who:<7}  {what}"
        if self.board is None:
            print(line, flush=True)
        elif who != "client":
            self.board.caption(line, "bold" if who == "server" else "")


async def demo(seconds: float, *, plain: bool) -> int:
    """Run the demo for about *seconds*; return 0 if every event arrived once and in order, else 1."""
    drawn = not plain and sys.stdout.isatty() and colours(1)
    # All times are about 60 times shorter than those of Kadoa.
    async with (
        open_simulated_kadoa(loopback=True, heartbeat_interval=0.25) as kadoa,
        open_realtime(
            kadoa.api_key,
            endpoints=kadoa.endpoints,
            timeouts=Timeouts(heartbeat=1.0, stable_after=0.5, token=1.0, handshake=1.0, overlap=2.0),
            retry=RetryPolicy(first=0.1, initial=0.1, maximum=1.0, attempts_per_minute=600),
        ) as realtime,
    ):
        account = Account(Board(trio.current_time()) if drawn else None)
        account.say("demo", f"a simulated Kadoa listens on {kadoa.endpoints.websocket}; the client is open")
        await realtime.wait_live()
        if account.board is None:
            await _run(account, kadoa, realtime, seconds)
        else:
            async with drawing(account.board, realtime, screen=False, height=_HEIGHT):
                await _run(account, kadoa, realtime, seconds)
        return _verdict(account, kadoa, realtime)


async def _run(account: Account, kadoa: SimulatedKadoa, realtime: Realtime, seconds: float) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_show_notices, account, realtime)
        nursery.start_soon(_consume, account, realtime)
        await _trouble(account, kadoa, seconds)
        account.last = account.published[-1].id
        if account.received and account.received[-1] == account.last:
            account.complete.set()
        with trio.move_on_after(_PATIENCE):
            await account.complete.wait()
        # Repeated events would arrive now.
        await trio.sleep(0.3)
        nursery.cancel_scope.cancel(reason="the demo has ended")


async def _consume(account: Account, realtime: Realtime) -> None:
    async for event in realtime.events:
        account.received.append(event.id)
        if account.board is not None:
            account.board.event(event, trio.current_time(), time.time())
        if event.id == account.last:
            account.complete.set()


async def _show_notices(account: Account, realtime: Realtime) -> None:
    async for notice in realtime.notices:
        if account.board is not None:
            account.board.notice(notice, trio.current_time())
        if not isinstance(notice, (AttemptStarted, Stable)):
            account.say("client", _line(notice))


def _line(notice: Notice) -> str:
    return f"! {notice}" if isinstance(notice, Lost) and not notice.expected else f"  {notice}"


async def _publish(account: Account, kadoa: SimulatedKadoa, seconds: float) -> None:
    """Publish at a steady rate for *seconds*."""
    until = trio.current_time() + seconds
    while trio.current_time() < until:
        account.published.append(kadoa.publish(timestamp=datetime.now(UTC)))
        await trio.sleep(1 / _RATE)


async def _trouble(account: Account, kadoa: SimulatedKadoa, seconds: float) -> None:
    """Publish all the time, and let one fault after the other happen."""
    rng = random.Random()
    scenes = (_drain, _silence, _reset_under_load, _drain_and_die, _failing_tokens, _replacement_dies)
    span = seconds / (len(scenes) + 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_publish, account, kadoa, seconds)
        for scene in scenes:
            await trio.sleep(span * rng.uniform(0.8, 1.0))
            await scene(account, kadoa)
        kadoa.heal()


async def _newest(kadoa: SimulatedKadoa) -> SimulatedConnection:
    """Wait until a connection is subscribed: on a slow machine, the client is still recovering from the last scene."""
    with trio.fail_after(_PATIENCE):
        while not any(connection.subscribed for connection in kadoa.connections):
            await kadoa.wait_subscribed(len(kadoa.subscribed) + 1)
    return kadoa.newest


async def _drain(account: Account, kadoa: SimulatedKadoa) -> None:
    account.say("server", "# is deployed anew: sends a drain notice, and closes with 1001 one second later")
    (await _newest(kadoa)).drain(300, close_after=1.0)


async def _silence(account: Account, kadoa: SimulatedKadoa) -> None:
    account.say("server", "# loses its power: the connection stays open, and nothing arrives")
    (await _newest(kadoa)).go_silent()


async def _reset_under_load(account: Account, kadoa: SimulatedKadoa) -> None:
    account.say("server", "# resets every connection in the middle of the stream")
    for connection in list(kadoa.connections):
        connection.reset()


async def _drain_and_die(account: Account, kadoa: SimulatedKadoa) -> None:
    account.say("server", "# sends a drain notice with a delay of five seconds, and resets the connection after 0.2")
    connection = await _newest(kadoa)
    connection.drain(5_000)
    await trio.sleep(0.2)
    connection.reset()


async def _failing_tokens(account: Account, kadoa: SimulatedKadoa) -> None:
    account.say("server", "# answers three token requests with 503, and closes the connection")
    kadoa.heal()
    connection = await _newest(kadoa)
    kadoa.faults.token_status, kadoa.faults.token_failures = 503, 3
    connection.close(1011, "simulated crash")


async def _replacement_dies(account: Account, kadoa: SimulatedKadoa) -> None:
    account.say("server", "# sends a drain notice, and resets the replacement as soon as it has subscribed")
    kadoa.heal()
    connection = await _newest(kadoa)
    kadoa.faults.accept_then_reset = True
    made = len(kadoa.subscribed)
    connection.drain(100, close_after=1.5)
    with trio.move_on_after(3):
        await kadoa.wait_subscribed(made + 1)
    kadoa.heal()


def _verdict(account: Account, kadoa: SimulatedKadoa, realtime: Realtime) -> int:
    published = [event.id for event in account.published]
    place = {event_id: number for number, event_id in enumerate(published)}
    counts = Counter(account.received)
    lost = sum(event_id not in counts for event_id in published)
    repeated = sum(count - 1 for count in counts.values())
    numbers = [place.get(event_id, -1) for event_id in account.received]
    out_of_order = sum(later < earlier for earlier, later in itertools.pairwise(numbers))
    statistics = realtime.statistics()
    perfect = not (lost or repeated or out_of_order or statistics.gap_count)
    print(
        f"\npublished     {len(published)}\nreceived      {len(account.received)}\nlost          {lost}\n"
        f"repeated      {repeated} (the server sent {statistics.repeated} events again; the client dropped them)\n"
        f"out of order  {out_of_order}\npossible gaps {statistics.gap_count}\n"
        f"connections   {statistics.opened}, at most {kadoa.max_open_connections} at once, "
        f"{statistics.attempts} attempts\n"
        f"\n{'PERFECT: every event once, and in order.' if perfect else 'NOT PERFECT.'}",
        flush=True,
    )
    if not perfect:
        say("the demo found a fault of the client; please report it, with the output above")
    return 0 if perfect else 1
