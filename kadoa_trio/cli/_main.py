"""Arguments and exit codes: 0 done, 1 a fault, 2 used wrongly, 130 Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import trio

from .._errors import AuthenticationError, ConfigurationError, KadoaError
from .._exits import pick
from .._version import __version__
from ._demo import demo
from ._listen import listen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with *argv* (default: that of the process), and return its exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.verbose:
        logging.basicConfig(stream=sys.stderr, level=logging.DEBUG if arguments.verbose > 1 else logging.INFO)
    else:
        # The commands tell what the log would say.
        logging.getLogger("kadoa_trio").addHandler(logging.NullHandler())
    fault: BaseException | None = None
    try:
        if arguments.command == "demo":
            return trio.run(demo, arguments.seconds)
        return trio.run(listen, arguments.type, arguments.workflow, arguments.limit)
    except BaseExceptionGroup as group:
        # The commands have nurseries of their own.
        fault = pick(group)
    except BaseException as exc:  # noqa: ASYNC103  # raised again, below
        fault = exc
    return _explain(fault)


def _explain(fault: BaseException) -> int:
    """Say what went wrong in one line, and return the exit code; what no user can have caused is raised."""
    match fault:
        case KeyboardInterrupt():
            return 130
        case ConfigurationError():
            print(f"kadoa-trio: {fault}", file=sys.stderr)
            return 2
        case AuthenticationError():
            print(f"kadoa-trio: {fault}. Is KADOA_API_KEY right?", file=sys.stderr)
            return 1
        case KadoaError():
            print(f"kadoa-trio: {fault}", file=sys.stderr)
            return 1
        case BrokenPipeError():
            # `| head` has enough. Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    raise fault


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kadoa-trio", description="Kadoa's realtime events in a terminal.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"kadoa-trio {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice: everything (never a secret)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser(
        "demo",
        help="watch the client survive a bad quarter of a minute, on this machine only",
        description="Runs a simulated Kadoa on loopback and the real client against it, through drains, resets, "
        "silences and a failing token endpoint. Exit code 0 only if every event arrived once and in order.",
    )
    one.add_argument("--seconds", type=_seconds, default=15.0, help="how long, at least 6 (default: 15)")
    two = commands.add_parser(
        "listen",
        help="print one JSON line for each event",
        description="Connects to Kadoa and prints one JSON line for each event, until Ctrl-C. The key is read from "
        "KADOA_API_KEY; news of the connection goes to stderr.",
    )
    two.add_argument("--type", action="append", metavar="TYPE", help="only events of this type; can be repeated")
    two.add_argument("--workflow", action="append", metavar="ID", help="only events of this workflow; can be repeated")
    two.add_argument("--limit", type=_count, metavar="N", help="leave after N events")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 6 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("must be between 6 and 3600")
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count
