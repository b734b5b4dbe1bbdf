"""An orderly end at SIGTERM and SIGINT: `stopping_on_signals`."""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import AsyncIterator
from contextlib import nullcontext

import attrs
import trio

from ._checks import check_delay, refusal
from ._client import Realtime
from ._contexts import async_context
from ._errors import ConfigurationError
from ._exits import hidden_nursery

_log = logging.getLogger("kadoa_trio.client")


@attrs.define(eq=False)
class Stopping:
    """What `stopping_on_signals` gives: whether the program is ending."""

    signal: signal.Signals | None = None
    """The first signal that came; None if none has come."""


@async_context
@trio.lowlevel.enable_ki_protection
async def stopping_on_signals(
    *clients: Realtime, grace: float = 20.0, retry_within: float = 0.0
) -> AsyncIterator[Stopping]:
    """Stop clients at SIGTERM or SIGINT, and let the block finish what was received.

    The first signal calls `Realtime.stop`: loops over the events end when
    what is buffered is handled. If the block has ended by itself *grace*
    seconds later, the program goes on behind the block, and ends with exit
    code 0. If not, or at a second signal, the block is cancelled, and
    `SystemExit` is raised behind it, with 128 and the number of the signal:
    143 for SIGTERM, 130 for SIGINT.

    SIGINT raises no `KeyboardInterrupt` in the block, so that Ctrl-C is as
    orderly as SIGTERM, at any moment. A signal that the process ignores when
    the block is entered stays ignored: a script's ``command &`` has SIGINT
    ignored. The signals are handled as before when the block is left.

    Example::

        async with open_realtime(cursor_store="positions.db") as realtime, stopping_on_signals(realtime):
            async for event in realtime.events:
                ...

    Args:
        clients: the clients to stop, at least one.
        grace: maximum time from the first signal to the cancellation of the
            block, in seconds; `math.inf` for no maximum. Default 20 s, so that
            a supervisor that kills after 30 s leaves time for the last save.
        retry_within: for how long failed events are still delivered again
            after the first signal, in seconds; see `Realtime.stop`. Default 0.

    Yields:
        A `Stopping`, whose ``signal`` says whether a signal has come.

    Raises:
        ConfigurationError: an argument cannot be used.
        RuntimeError: not in the main thread, where alone Python receives signals.
        SystemExit: the block was cancelled.
    """
    if not clients:
        raise ConfigurationError("stopping_on_signals needs the client to stop")
    for client in clients:
        if not isinstance(client, Realtime):
            raise refusal("each client", "what open_realtime gives", client)
    check_delay("grace", grace, unlimited=True)
    check_delay("retry_within", retry_within)
    stopping = Stopping()
    scope = trio.CancelScope()
    code = 0
    handled = [one for one in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(one) is not signal.SIG_IGN]

    @trio.lowlevel.enable_ki_protection
    async def watch(signals: AsyncIterator[int]) -> None:
        nonlocal code
        first = signal.Signals(await anext(signals))
        stopping.signal = first
        code = 128 + first
        _log.info(
            "%s: the client is stopped; the events that were received are handled; a second signal%s ends the block",
            first.name,
            "" if grace == math.inf else f", or {grace:g} s,",
        )
        for client in clients:
            client.stop(retry_within=retry_within)
        reason = f"it has not ended {grace:g} s after {first.name}"
        with trio.move_on_after(grace):
            second = signal.Signals(await anext(signals))
            reason, code = f"{second.name} after {first.name}", 128 + second
        _log.warning(
            "the block is cancelled: %s; events that it has not settled are delivered again to the next run", reason
        )
        scope.cancel(reason=reason)

    # Trio's receiver refuses an empty list.
    with trio.open_signal_receiver(*handled) if handled else nullcontext() as signals:
        async with hidden_nursery("the block of stopping_on_signals has ended") as nursery:
            if signals is not None:
                nursery.start_soon(watch, signals)
            with scope:
                yield stopping
    if scope.cancelled_caught:
        raise SystemExit(code)
