"""From a command to an exit code: signals, errors in one line, and closed pipes.

0 success, 1 error, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import click
import trio

from .._errors import AuthenticationError, ConfigurationError, KadoaError
from .._exits import pick
from ._output import say

Command = Callable[[], Awaitable[int]]


def run(command: Command) -> int:
    """Run a command in Trio until it ends or a signal ends it; return the exit code."""
    try:
        return trio.run(_until_signal, command)
    except BaseExceptionGroup as group:
        fault = pick(group)
    except BaseException as exc:  # noqa: ASYNC103  # raised again, below
        fault = exc
    return explain(fault)


async def _until_signal(command: Command) -> int:
    # Signals are received as events, because Python may raise KeyboardInterrupt in a place that swallows it.
    code: int | None = None
    caught: list[int] = []
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, signals, nursery.cancel_scope, caught)
            code = await command()
            nursery.cancel_scope.cancel(reason="the command has ended")
    if code is None:
        return 128 + caught[0]
    return code


async def _watch(signals: AsyncIterator[int], scope: trio.CancelScope, caught: list[int]) -> None:
    async for number in signals:
        caught.append(number)
        # Leaving takes up to some seconds: the last position is saved. A second signal ends the process immediately.
        signal.signal(number, signal.SIG_DFL)
        scope.cancel(reason=signal.Signals(number).name)
        return


def explain(fault: BaseException) -> int:
    """Print an error in one line, and return the exit code. Raises errors that only a bug can cause."""
    match fault:
        case KeyboardInterrupt():
            return 130
        case click.exceptions.Exit():
            return fault.exit_code
        case click.Abort():
            return 130
        case click.ClickException():
            fault.show(sys.stderr)
            return fault.exit_code
        case ConfigurationError():
            say(str(fault))
            return 2
        case AuthenticationError():
            say(f"{fault}. Check KADOA_API_KEY; `kadoa-trio doctor` tests each step of a connection.")
            return 1
        case KadoaError():
            say(str(fault))
            return 1
        case BrokenPipeError():
            # `| head` has closed the pipe. Python would print a second error when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
        case OSError():
            say(str(fault))
            return 1
    raise fault
