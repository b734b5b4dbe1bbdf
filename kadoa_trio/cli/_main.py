"""The arguments of the commands. Each command is implemented in a module of its own."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from click.shell_completion import get_completion_class

from .._events import EVENT_TYPES
from .._redact import Secret
from .._version import __version__
from ..testing import Schedule
from ..testing._faults import describe_faults
from . import _demo, _forward, _listen, _setup, _simulate, _watch
from ._listen import Source
from ._output import LogFormatter
from ._run import explain, run

_EPILOG = """\b
Exit codes: 0 success, 1 error, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.
Data goes to stdout, messages to stderr. NO_COLOR is respected.
"""
_TYPES = "\n".join(f"  {one.name:<22}{one.documentation}" for one in EVENT_TYPES.values())
_FAULTS = describe_faults("  {kind:<12}{does}", "\n              Duration: {seconds}.")


def run_command(argv: Sequence[str] | None) -> int:
    """Run the command with *argv*, and return its exit code."""
    try:
        # Not standalone, because click would end the process with exit codes of its own.
        code = kadoa_trio_command.main(
            args=None if argv is None else list(argv), prog_name="kadoa-trio", standalone_mode=False
        )
    except BaseException as exc:  # noqa: ASYNC103  # raised again, below
        fault = exc
    else:
        return code if isinstance(code, int) else 0
    return explain(fault)


def _run(function: Callable[..., Awaitable[int]], *args: Any, **options: Any) -> int:
    return run(functools.partial(function, *args, **options))


class _ScheduleType(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.4
    name = "schedule"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Schedule:
        try:
            return value if isinstance(value, Schedule) else Schedule.parse(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EPILOG,
)
@click.version_option(__version__, prog_name="kadoa-trio", message="%(prog)s %(version)s")
@click.option("-v", "--verbose", count=True, help="Log to stderr; -vv logs everything. Logs contain no secret.")
def kadoa_trio_command(verbose: int) -> None:
    """Kadoa's realtime events in a terminal.

    The API key is read from KADOA_API_KEY or --api-key-file. It cannot be
    an argument, because every user of the machine can read arguments.
    """
    if verbose:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LogFormatter(logging.BASIC_FORMAT))
        logging.basicConfig(handlers=[handler], level=logging.DEBUG if verbose > 1 else logging.INFO)
    else:
        # The commands print notices themselves, so the log would repeat them.
        logging.getLogger("kadoa_trio").addHandler(logging.NullHandler())


# ---- options that several commands have ----------------------------------------------------------------------------


_MAX_KEY_FILE = 10_000
"""Maximum length of the file of an API key, in characters."""


class _Number(click.FloatRange):
    """A number in a range; click's own lets NaN pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


def _read_key_file(_ctx: click.Context, _param: click.Parameter, path: str | None) -> Secret | None:
    if path is None:
        return None
    try:
        if path == "-":
            if sys.stdin is None:
                raise click.BadParameter("stdin is closed")
            text = sys.stdin.read(_MAX_KEY_FILE + 1)
        else:
            with open(path, encoding="utf-8") as file:
                text = file.read(_MAX_KEY_FILE + 1)
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not text"
        raise click.BadParameter(f"{path}: {reason}") from None
    long = len(text) > _MAX_KEY_FILE
    key = Secret(text.strip())
    del text
    if long:
        raise click.BadParameter(f"{path} is longer than {_MAX_KEY_FILE} characters")
    if not key.reveal():
        raise click.BadParameter(f"{path} is empty")
    return key


_api_key = click.option(
    "--api-key-file",
    "api_key",
    metavar="PATH",
    callback=_read_key_file,
    help="Read the API key from a file (- for stdin) instead of KADOA_API_KEY.",
)
_types = click.option(
    "--type", "types", multiple=True, metavar="TYPE", help="Receive only events of this type; repeatable."
)
_workflows = click.option(
    "--workflow", "workflows", multiple=True, metavar="ID", help="Receive only events of this workflow; repeatable."
)
_limit = click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Exit after N events.")
_repair = click.option(
    "--repair-gaps", is_flag=True, help="Fill possible gaps with events from Kadoa's notification log."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def _fill_in(**texts: str) -> Callable[[Any], Any]:
    """Fill texts into the docstring of a command, which is its help."""

    def fill(function: Any) -> Any:
        function.__doc__ = inspect.cleandoc(function.__doc__ or "").format(**texts)
        return function

    return fill


def _need_key(api_key: Secret | None) -> None:
    if api_key is None and not os.environ.get("KADOA_API_KEY"):
        raise click.UsageError("no API key: set KADOA_API_KEY, or name a file with --api-key-file")


# ---- commands ------------------------------------------------------------------------------------------------------


@kadoa_trio_command.command()
@_options(_api_key, _types, _workflows)
@click.option("--since-cursor", metavar="CURSOR", help="Resume after this cursor.")
@click.option("--store", metavar="PATH", help="Save the position in this SQLite file, and resume from it.")
@click.option(
    "--consumer", default="default", show_default=True, metavar="NAME", help="Name of the position in the file."
)
@_options(_repair, _limit)
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "text", "json"]),
    default="auto",
    show_default=True,
    help="text is for people; json is one object per line; auto is text in a terminal, json when piped.",
)
def listen(
    api_key: Secret | None,
    types: tuple[str, ...],
    workflows: tuple[str, ...],
    since_cursor: str | None,
    store: str | None,
    consumer: str,
    repair_gaps: bool,
    limit: int | None,
    form: _listen.Format,
) -> int:
    """Print one line per event: text in a terminal, JSON when piped.

    With --store, an event is settled when its line has been written, and
    the next run resumes after the last settled event, even if this run was
    killed. Without --store, read-only: saves no position and acknowledges
    nothing.

    \b
    Examples:
      kadoa-trio listen --type workflow_failed
      kadoa-trio listen --store positions.db --consumer jq | jq .message
      kadoa-trio listen --limit 1 --format text
    """
    _need_key(api_key)
    if since_cursor is not None and store is not None:
        raise click.UsageError("--since-cursor and --store exclude each other: both say where to resume")
    source = Source(
        api_key=api_key,
        types=types,
        workflows=workflows,
        since_cursor=since_cursor,
        store=store,
        consumer=consumer,
        repair_gaps=repair_gaps,
    )
    return _run(_listen.listen, source, limit=limit, form=form)


@kadoa_trio_command.command()
@_options(_api_key, _types, _workflows)
def watch(api_key: Secret | None, types: tuple[str, ...], workflows: tuple[str, ...]) -> int:
    """Show connections, rates, latency, buffer, events and notices in the whole terminal.

    Read-only: saves no position and acknowledges nothing.

    \b
    Example:
      kadoa-trio watch
    """
    _need_key(api_key)
    return _run(_watch.watch, Source(api_key=api_key, types=types, workflows=workflows))


@kadoa_trio_command.command()
@click.argument("url")
@_options(_api_key, _types, _workflows)
@click.option(
    "--store",
    metavar="PATH",
    help="Save the position in this SQLite file. Default: positions.db in the user's application directory.",
)
@click.option("--no-store", is_flag=True, help="Save no position: begin with the events that are sent from now on.")
@click.option("--consumer", metavar="NAME", help="Name of the position in the file. Default: one for each URL.")
@_repair
@click.option(
    "--max-attempts",
    type=click.IntRange(min=1),
    metavar="N",
    help="Write an event to the dead letters after N failed attempts. Default: retry without end.",
)
@click.option(
    "--dead-letters",
    default="dead-letters.jsonl",
    show_default=True,
    metavar="PATH",
    help="File of the dead letters, one JSON object per line.",
)
@click.option(
    "--timeout",
    type=_Number(min=0.1),
    default=30.0,
    show_default=True,
    help="Maximum duration of an attempt, in seconds.",
)
@click.option("--replay", metavar="FILE", help="Post the dead letters of FILE again, and exit.")
@_limit
def forward(
    url: str,
    api_key: Secret | None,
    types: tuple[str, ...],
    workflows: tuple[str, ...],
    store: str | None,
    no_store: bool,
    consumer: str | None,
    repair_gaps: bool,
    max_attempts: int | None,
    dead_letters: str,
    timeout: float,
    replay: str | None,
    limit: int | None,
) -> int:
    """Post every event to URL in the format of Kadoa's webhooks.

    The body is JSON; the header X-Kadoa-Event names the event type. An
    event is settled when the answer is 2xx. Every other answer is retried
    with backoff, in the order of the events. The next run resumes after
    the last settled event.

    \b
    Examples:
      kadoa-trio forward http://localhost:8000/webhook
      kadoa-trio forward http://localhost:8000/webhook --max-attempts 5
      kadoa-trio forward http://localhost:8000/webhook --replay dead-letters.jsonl
    """
    if replay is not None:
        return _run(_forward.replay, replay, url, timeout=timeout, max_attempts=max_attempts)
    _need_key(api_key)
    if store is not None and no_store:
        raise click.UsageError("--store and --no-store exclude each other")
    if store is None and not no_store:
        directory = Path(click.get_app_dir("kadoa-trio"))
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        store = str(directory / "positions.db")
    source = Source(
        api_key=api_key,
        types=types,
        workflows=workflows,
        store=store,
        consumer=consumer or f"forward {urlsplit(url)._replace(query='', fragment='').geturl()}",
        repair_gaps=repair_gaps,
    )
    return _run(
        _forward.forward,
        source,
        url,
        timeout=timeout,
        max_attempts=max_attempts,
        dead_letters=dead_letters,
        limit=limit,
    )


@kadoa_trio_command.command()
@_api_key
@click.option("--event", "events", multiple=True, required=True, metavar="TYPE", help="Event type to send; repeatable.")
@click.option(
    "--workflow",
    "workflows",
    multiple=True,
    metavar="ID",
    help="Send only events of this workflow; repeatable. Default: the whole workspace.",
)
@click.option("--enable", is_flag=True, help="Enable disabled settings, too. This also enables their other channels.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and change nothing.")
@_json
@_fill_in(types=_TYPES)
def setup(
    api_key: Secret | None,
    events: tuple[str, ...],
    workflows: tuple[str, ...],
    enable: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Configure the workspace to send events to realtime clients.

    Creates the WebSocket channel and the settings for the event types,
    where they do not exist, and adds the channel to existing settings.
    Other channels of a setting are not changed. A disabled setting is left
    disabled, with a warning; --enable enables it anyway.

    \b
    Event types:
    {types}

    \b
    Examples:
      kadoa-trio setup --event workflow_failed --event workflow_finished
      kadoa-trio setup --event workflow_data_change --workflow 64f... --dry-run
    """
    _need_key(api_key)
    return _run(_setup.setup, api_key, events, workflows, enable=enable, dry_run=dry_run, as_json=as_json)


@kadoa_trio_command.command("send-test")
@click.argument("event_type", metavar="TYPE")
@_api_key
@click.option("--workflow", metavar="ID", help="Workflow that the event is about.")
@_json
def send_test(event_type: str, api_key: Secret | None, workflow: str | None, as_json: bool) -> int:
    """Ask Kadoa to send a mock event to all channels of its type; print the event's id.

    \b
    Example:
      kadoa-trio send-test workflow_failed
    """
    _need_key(api_key)
    return _run(_setup.send_test, api_key, event_type, workflow, as_json=as_json)


@kadoa_trio_command.command()
@_api_key
@click.option("--event", default="workflow_finished", show_default=True, metavar="TYPE", help="Type of the test event.")
@click.option("--workflow", metavar="ID", help="Workflow that the test event is about.")
@click.option("--no-test-event", is_flag=True, help="Send no test event.")
@click.option(
    "--timeout",
    type=_Number(min=0.1),
    default=30.0,
    show_default=True,
    help="Maximum wait for the first frame, and for the test event, in seconds.",
)
@_json
def doctor(
    api_key: Secret | None, event: str, workflow: str | None, no_test_event: bool, timeout: float, as_json: bool
) -> int:
    """Find out why no events arrive: test every step of a connection.

    Prints for each step its result, its duration, and what to do if it
    failed. The last step asks Kadoa for a test event, which goes to all
    channels of its type, including e-mail; --no-test-event prevents this.

    \b
    Examples:
      kadoa-trio doctor
      kadoa-trio doctor --no-test-event --json
    """
    return _run(
        _setup.doctor,
        api_key,
        test_event=None if no_test_event else event,
        workflow=workflow,
        timeout=timeout,
        as_json=as_json,
    )


@kadoa_trio_command.command()
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on. Default: chosen by the system."
)
@click.option("--rate", type=_Number(min=0, max=10_000), default=1.0, show_default=True, help="Events per second.")
@click.option(
    "--fault", "schedule", type=_ScheduleType(), metavar="SCHEDULE", help='Faults: "10 drain, 25 reset, 40 outage 5".'
)
@click.option("--repeat", is_flag=True, help="Repeat the schedule.")
@click.option(
    "--chaos", type=int, metavar="SEED", help="Random faults for one hour; the same seed draws the same faults."
)
@click.option(
    "--every",
    type=_Number(min=0.1),
    default=10.0,
    show_default=True,
    help="Mean time between two random faults, in seconds.",
)
@click.option(
    "--heartbeat",
    type=_Number(min=0.01),
    default=15.0,
    show_default=True,
    help="Time between two heartbeats, in seconds.",
)
@click.option("--seconds", type=_Number(min=0.1), help="Exit after this time, in seconds. Default: run until Ctrl-C.")
@click.option(
    "--env-file",
    metavar="PATH",
    help="Also write the variables to this file, as NAME=value lines. An existing file is overwritten.",
)
@_fill_in(faults=_FAULTS)
def simulate(
    port: int,
    rate: float,
    schedule: Schedule | None,
    repeat: bool,
    chaos: int | None,
    every: float,
    heartbeat: float,
    seconds: float | None,
    env_file: str | None,
) -> int:
    """Run a simulated Kadoa on this machine, with faults, for any Kadoa client.

    Prints the environment variables that make a client use it. A schedule
    is a list of faults: time, kind, and duration, in seconds.

    \b
    Kinds of faults:
    {faults}

    \b
    Examples:
      kadoa-trio simulate --rate 5 --fault "10 drain, 20 silence, 60 outage 5" --repeat
      kadoa-trio simulate --chaos 7 --env-file kadoa.env
    """
    if schedule is not None and chaos is not None:
        raise click.UsageError("--fault and --chaos exclude each other")
    if chaos is not None:
        schedule = Schedule.chaos(chaos, seconds=3600, every=every)
    return _run(
        _simulate.simulate,
        port=port,
        rate=rate,
        schedule=schedule or Schedule(),
        repeat=repeat,
        heartbeat=heartbeat,
        seconds=seconds,
        env_file=env_file,
    )


@kadoa_trio_command.command()
@click.option("--seconds", type=_Number(6, 3600), default=15.0, show_default=True, help="Duration, in seconds.")
@click.option("--plain", is_flag=True, help="Print line by line, even in a terminal.")
def demo(seconds: float, plain: bool) -> int:
    """Show how the client survives the faults of a simulated Kadoa, on this machine only.

    Runs a simulated Kadoa and a client that is connected to it over real
    sockets, with drains, resets, silent connections and refused tokens. The
    exit code is 0 only if every event arrived once and in order.

    \b
    Example:
      kadoa-trio demo
    """
    return _run(_demo.demo, seconds, plain=plain)


@kadoa_trio_command.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), required=False)
def completion(shell: str | None) -> int:
    """Print a script that lets a shell complete this command.

    \b
    Examples:
      eval "$(kadoa-trio completion bash)"
      kadoa-trio completion fish > ~/.config/fish/completions/kadoa-trio.fish
    """
    shell = shell or os.path.basename(os.environ.get("SHELL", ""))
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError("name the shell: bash, zsh or fish")
    click.echo(kind(kadoa_trio_command, {}, "kadoa-trio", "_KADOA_TRIO_COMPLETE").source())
    return 0
