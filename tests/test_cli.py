"""The command, run as users run it: in a process of its own, against a simulated Kadoa on loopback.

Every wait ends at the deadline of the test; no test asserts a duration.
"""

from __future__ import annotations

import json
import math
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import _processes
import msgspec
import pytest
import trio
from _loopback import accept, close_frame, frame, read_head, serving
from _processes import Running, environment_without, finished

from kadoa_trio import Event, Position, SQLiteCursorStore
from kadoa_trio._net._wire import decode
from kadoa_trio.cli import main
from kadoa_trio.cli._output import json_line
from kadoa_trio.testing import Faults, SimulatedKadoa, open_simulated_kadoa

pytestmark = pytest.mark.sockets

COMMANDS = ["completion", "demo", "doctor", "forward", "listen", "send-test", "setup", "simulate", "watch"]


def environment(kadoa: SimulatedKadoa | None = None, **more: str) -> dict[str, str]:
    return {**environment_without("KADOA_"), "TZ": "UTC", **({} if kadoa is None else kadoa.environment), **more}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kadoa_trio", *arguments]


def check(out: bytes, err: bytes, env: dict[str, str]) -> None:
    """Check what is true for every run: no traceback, and no API key in the output."""
    assert b"Traceback" not in err, err.decode()
    key = env.get("KADOA_API_KEY", "").encode()
    assert not key or key not in err + out


async def finish(*arguments: str, env: dict[str, str], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command until it ends."""
    done = await finished(command(*arguments), env=env, stdin=stdin)
    check(done.stdout, done.stderr, env)
    return done


@asynccontextmanager
async def running(*arguments: str, env: dict[str, str], read_out: bool = True) -> AsyncIterator[Running]:
    """Run the command for the duration of a block."""
    async with _processes.running(command(*arguments), env=env, read_out=read_out) as one:
        yield one
    check(one.out, one.err, env)


@pytest.fixture
async def kadoa() -> AsyncIterator[SimulatedKadoa]:
    async with open_simulated_kadoa(loopback=True, heartbeat_interval=0.2) as one:
        yield one


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"Examples?:\n +(eval \"\$\()?kadoa-trio {name}", text), text


def test_help_names_every_command_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"\n  {name}" in text
    assert "130 Ctrl-C" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["listen", "--api-key", "secret"],
        ["listen", "--limit", "0"],
        ["listen", "--since-cursor", "1-0", "--store", "x.db"],
        ["forward"],
        ["forward", "http://127.0.0.1:1", "--store", "x", "--no-store"],
        ["forward", "ftp://127.0.0.1", "--no-store"],
        ["forward", "http://user:word@127.0.0.1", "--no-store"],
        ["setup"],
        ["simulate", "--fault", "ten drain"],
        ["simulate", "--fault", "1 earthquake"],
        ["simulate", "--fault", "1 drain", "--chaos", "1"],
        ["watch"],
        ["nothing"],
        ["--nothing"],
    ],
)
def test_wrong_use_is_2_and_says_why(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KADOA_API_KEY", "key-for-nothing")
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err) > 10
    assert "Traceback" not in said.err


@pytest.mark.parametrize("arguments", [["listen"], ["watch"], ["forward", "http://127.0.0.1:1"], ["send-test", "x"]])
def test_no_key_is_2_and_names_both_ways(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KADOA_API_KEY", raising=False)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "KADOA_API_KEY" in said
    assert "--api-key-file" in said


def test_closed_stdin_holds_no_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python sets it where the shell has closed it: <&-
    assert main(["listen", "--api-key-file", "-"]) == 2
    assert "stdin is closed" in capsys.readouterr().err


async def test_wrong_key_is_1_and_ends_with_the_reason(kadoa: SimulatedKadoa) -> None:
    for arguments in (["listen"], ["setup", "--event", "workflow_failed"], ["send-test", "workflow_failed"]):
        done = await finish(*arguments, env=environment(kadoa, KADOA_API_KEY="wrong-key-12345678"))
        assert done.returncode == 1
        assert done.stdout == b""
        *attempts, line = done.stderr.splitlines()
        assert line.startswith(b"kadoa-trio: Kadoa refused the API key (HTTP 401")
        assert all(b"attempt failed" in attempt for attempt in attempts)


async def test_key_comes_from_a_file_or_stdin(kadoa: SimulatedKadoa, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{kadoa.api_key}\n")
    env = {name: value for name, value in environment(kadoa).items() if name != "KADOA_API_KEY"}
    done = await finish("send-test", "workflow_failed", "--api-key-file", str(tmp_path / "key"), env=env)
    assert done.returncode == 0
    done = await finish(
        "send-test", "workflow_failed", "--api-key-file", "-", env=env, stdin=f"{kadoa.api_key}\n".encode()
    )
    assert done.returncode == 0
    done = await finish("send-test", "workflow_failed", "--api-key-file", str(tmp_path / "no"), env=env)
    assert done.returncode == 2
    assert b"No such file" in done.stderr


def test_completion_is_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "_KADOA_TRIO_COMPLETE" in capsys.readouterr().out


async def test_completion_completes() -> None:
    env = environment(_KADOA_TRIO_COMPLETE="bash_complete", COMP_WORDS="kadoa-trio li", COMP_CWORD="1")
    script = "import sys; from kadoa_trio.cli import main; sys.exit(main())"
    done = await finished([sys.executable, "-c", script], env=env)
    assert done.stdout.split() == [b"plain,listen"]


def test_command_without_its_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("kadoa_trio.cli._")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "click", None)
    assert main(["listen"]) == 2
    assert "kadoa-trio[cli]" in capsys.readouterr().err


# ---- listen --------------------------------------------------------------------------------------------------------


async def test_listen_writes_json_lines_to_a_pipe(kadoa: SimulatedKadoa) -> None:
    async with running("listen", "--limit", "3", env=environment(kadoa)) as run:
        await kadoa.wait_subscribed(1)
        sent = kadoa.publish_many(3)
        assert await run.end() == 0
    assert [json.loads(line) for line in run.out.splitlines()] == [json.loads(event.frame) for event in sent]
    assert b"3 events in" in run.err
    assert kadoa.acknowledged == []  # a command without a position is read-only


@pytest.mark.parametrize(
    ("sent", "written"),
    [
        ("[NaN,-Infinity,1e999,1.5]", "[null,null,null,1.5]"),
        (r'"a\ud800b"', r'"a\ufffdb"'),
        ('"é😀\u2028\u009b"', r'"\u00e9\ud83d\ude00\u2028\u009b"'),
        ('{"a":"b"}', '{"a":"b"}'),
    ],
)
def test_json_line_is_strict_json_in_ascii(sent: str, written: str) -> None:
    event = decode(f'{{"eventType":"x","id":"e1","message":{sent}}}')
    assert isinstance(event, Event)
    assert json_line(event) == f'{{"eventType":"x","id":"e1","message":{written}}}'


async def test_listen_writes_json_that_every_parser_reads(kadoa: SimulatedKadoa) -> None:
    async with running("listen", "--limit", "1", env=environment(kadoa)) as run:
        await kadoa.wait_subscribed(1)
        kadoa.publish("credits_low", {"left": math.inf})
        assert await run.end() == 0
    assert msgspec.json.decode(run.out)["message"] == {"left": None}


async def test_listen_writes_text(kadoa: SimulatedKadoa) -> None:
    async with running("listen", "--limit", "8", "--format", "text", env=environment(kadoa)) as run:
        await kadoa.wait_subscribed(1)
        for kind in ("workflow_finished", "workflow_failed", "workflow_recovered", "workflow_data_change"):
            kadoa.publish(kind, workflow_id="wf_7")
        kadoa.publish("workflow_failed", {"reason": 5})
        kadoa.publish("credits_low", {"left": 3})
        kadoa.publish("workflow_data_change", {"workflowId": "wf_8", "differences": []})
        # A server must not control the terminal: no colours, no new title, no line that looks like one of the command.
        wicked = {
            "workflowId": "wf\x1b[2J",
            "source": "s",
            "reason": "red\x1b[31m\nkadoa-trio: all steps succeeded\u202e",
            "action": "a",
        }
        kadoa.publish("workflow_failed", wicked)
        assert await run.end() == 0
    assert run.out.decode() == GOLDEN_LISTEN


GOLDEN_LISTEN = """\
2026-01-01 00:00:00  workflow_finished     wf_7          job-0
2026-01-01 00:00:01  workflow_failed       wf_7          The page has changed
2026-01-01 00:00:02  workflow_recovered    wf_7          works again: monitored-page.example
2026-01-01 00:00:03  workflow_data_change  wf_7          1 difference: 1 changed
2026-01-01 00:00:04  workflow_failed       -             not typed: message.workflowId: missing; message.source: missing; message.reason: expected a string, not a number; and more
2026-01-01 00:00:05  credits_low           -
2026-01-01 00:00:06  workflow_data_change  wf_8          0 differences
2026-01-01 00:00:07  workflow_failed       wf [2J        red [31m kadoa-trio: all steps succeeded
"""


async def test_listen_filters(kadoa: SimulatedKadoa) -> None:
    arguments = ["listen", "--type", "workflow_failed", "--workflow", "wf_1", "--limit", "1"]
    async with running(*arguments, env=environment(kadoa)) as run:
        await kadoa.wait_subscribed(1)
        kadoa.publish("workflow_finished", workflow_id="wf_1")
        kadoa.publish("workflow_failed", workflow_id="wf_2")
        wanted = kadoa.publish("workflow_failed", workflow_id="wf_1")
        assert await run.end() == 0
    assert json.loads(run.out)["id"] == wanted.id


async def test_listen_with_a_store_resumes_after_the_last_written_line(kadoa: SimulatedKadoa, tmp_path: Path) -> None:
    arguments = ["listen", "--store", str(tmp_path / "p.db"), "--consumer", "test", "--limit", "2"]
    seen: list[str] = []
    for round_ in range(3):
        async with running(*arguments, env=environment(kadoa)) as run:
            await kadoa.wait_subscribed(round_ + 1)
            if round_ == 0:
                kadoa.publish_many(6)
            assert await run.end() == 0
        seen += [json.loads(line)["id"] for line in run.out.splitlines()]
    assert seen == [event.id for event in kadoa.published]
    async with running(*arguments[:-2], env=environment(kadoa)):
        await kadoa.wait_subscribed(4)
        # A command with a position handles what it prints. While it leaves, acknowledgements may be dropped.
        await kadoa.wait_settled(kadoa.publish())


async def test_event_whose_line_was_not_read_is_printed_again_after_a_kill(
    kadoa: SimulatedKadoa, tmp_path: Path
) -> None:
    arguments = ["listen", "--store", str(tmp_path / "p.db")]
    async with running(*arguments, env=environment(kadoa), read_out=False) as run:
        out = run.process.stdout
        assert out is not None
        await kadoa.wait_subscribed(1)
        first = kadoa.publish()
        line = b""
        while not line.endswith(b"\n"):
            line += await out.receive_some()
        large = kadoa.publish("credits_low", {"text": "x" * 2_000_000})  # larger than any pipe
        after = kadoa.publish()
        await out.receive_some(1)  # the large event is being written, and the first one is settled
        await kadoa.wait_settled(first)
        await trio.sleep(0.3)  # an event that was settled too early would be saved by now
        run.process.kill()
        await run.process.wait()
    done = await finish(*arguments, "--limit", "2", env=environment(kadoa))
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [large.id, after.id]


async def test_listen_resumes_from_a_cursor(kadoa: SimulatedKadoa) -> None:
    sent = kadoa.publish_many(5)
    cursor = sent[2].cursor
    assert cursor is not None
    done = await finish("listen", "--since-cursor", cursor, "--limit", "2", env=environment(kadoa))
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [event.id for event in sent[3:]]


async def test_second_listener_of_one_consumer_names_the_owner(kadoa: SimulatedKadoa, tmp_path: Path) -> None:
    arguments = ["listen", "--store", str(tmp_path / "p.db")]
    async with running(*arguments, env=environment(kadoa)) as run:
        await kadoa.wait_subscribed(1)
        done = await finish(*arguments, env=environment(kadoa))
        assert done.returncode == 1
        assert str(run.process.pid).encode() in done.stderr
        assert await run.end(signal.SIGTERM) == 143


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_signal_ends_listen_with_a_summary(kadoa: SimulatedKadoa, number: int, code: int) -> None:
    async with running("listen", env=environment(kadoa)) as run:
        await kadoa.wait_subscribed(1)
        kadoa.publish()
        await run.until(lambda: run.out)
        assert await run.end(number) == code
    assert re.search(rb"kadoa-trio: 1 event in \d+ s; 1 connection; cursor 1742-0\n$", run.err), run.err


async def test_failing_attempts_are_shown_before_the_first_connection(kadoa: SimulatedKadoa) -> None:
    kadoa.faults = Faults(token_status=503)
    async with running("listen", env=environment(kadoa)) as run:
        await run.until(lambda: b"attempt failed" in run.err)
        assert b"503" in run.err
        kadoa.heal()
        await kadoa.wait_subscribed(1)
        kadoa.publish()
        await run.until(lambda: run.out)
        assert await run.end(signal.SIGINT) == 130
    assert len(set(run.err.splitlines())) == len(run.err.splitlines())  # each notice once


async def test_closed_pipe_is_a_clean_end(kadoa: SimulatedKadoa) -> None:
    async with running("listen", env=environment(kadoa), read_out=False) as run:
        assert run.process.stdout is not None
        await kadoa.wait_subscribed(1)
        await run.process.stdout.aclose()
        kadoa.publish_many(2)
        assert await run.end() == 0
    assert b"Broken pipe" not in run.err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports that a pipe's reader has gone")
async def test_closed_pipe_ends_a_quiet_listener(kadoa: SimulatedKadoa) -> None:
    async with running("listen", env=environment(kadoa), read_out=False) as run:
        assert run.process.stdout is not None
        await kadoa.wait_subscribed(1)
        await run.process.stdout.aclose()
        assert await run.end() == 0  # although no event arrived


async def test_slow_reader_does_not_stop_the_client(kadoa: SimulatedKadoa) -> None:
    async with running("listen", "--limit", "3", env=environment(kadoa), read_out=False) as run:
        assert run.process.stdout is not None
        await kadoa.wait_subscribed(1)
        # Larger than any pipe, and the test does not read yet.
        kadoa.publish("credits_low", {"text": "x" * 2_000_000})
        kadoa.publish_many(2)
        beats = len(kadoa.connections[0].received)
        kadoa.newest.drain(100, close_after=0.5)
        await kadoa.wait_subscribed(2)  # the client is alive, and has answered the drain
        assert beats == 1
        await run.read_out()
        assert await run.end() == 0
    assert len(run.out.splitlines()) == 3


async def test_notices_go_to_stderr(kadoa: SimulatedKadoa) -> None:
    async with running("listen", env=environment(kadoa)) as run:
        await kadoa.wait_subscribed(1)
        kadoa.newest.reset()
        await run.until(lambda: b"connection 2: live" in run.err)
        assert await run.end(signal.SIGINT) == 130
    assert run.out == b""
    assert b"connection 1: lost" in run.err


async def test_verbose_log_has_no_secret(kadoa: SimulatedKadoa) -> None:
    async with running("-vv", "listen", "--limit", "1", env=environment(kadoa)) as run:
        await kadoa.wait_subscribed(1)
        kadoa.publish()
        assert await run.end() == 0
    assert b"DEBUG" in run.err
    assert kadoa.api_key.encode() not in run.err
    for token in kadoa._tokens:
        assert token.encode() not in run.err


# ---- forward -------------------------------------------------------------------------------------------------------


class Hook:
    """A webhook endpoint that answers with the statuses that a test sets."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.default = 204
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[bytes] = []

    async def serve(self, stream: trio.abc.Stream) -> None:
        head = await read_head(stream)
        match = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        body = b""
        wanted = int(match[1]) if match else 0
        head, _, body = head.partition(b"\r\n\r\n")
        while len(body) < wanted:
            body += await stream.receive_some()
        self.heads.append(head)
        self.bodies.append(json.loads(body))
        status = self.statuses.pop(0) if self.statuses else self.default
        await stream.send_all(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)

    @property
    def ids(self) -> list[str]:
        return [body["id"] for body in self.bodies]


@asynccontextmanager
async def hooked() -> AsyncIterator[tuple[Hook, str]]:
    hook = Hook()
    async with serving(hook.serve) as port:
        yield hook, f"http://127.0.0.1:{port}/hook"


async def test_forward_posts_webhooks(kadoa: SimulatedKadoa, tmp_path: Path) -> None:
    async with hooked() as (hook, url):
        store = str(tmp_path / "p.db")
        async with running("forward", url, "--store", store, "--limit", "2", env=environment(kadoa)) as run:
            await kadoa.wait_subscribed(1)
            first = kadoa.publish("workflow_failed", workflow_id="wf_1")
            kadoa.publish("workflow_data_change", spelling="webhook")
            assert await run.end() == 0
    sent = json.loads(first.frame)
    assert hook.bodies[0] == {
        "eventType": "workflow_failed",
        "id": sent["id"],
        "timestamp": sent["timestamp"],
        "data": sent["message"],
    }
    assert hook.bodies[1]["data"]["differences"]
    assert b"x-kadoa-event: workflow_failed" in hook.heads[0].lower()
    assert b"content-type: application/json" in hook.heads[0].lower()
    assert kadoa.api_key.encode() not in b"".join(hook.heads)
    assert b"2 delivered, 0 dead letters" in run.err


async def test_forward_retries_in_order_and_resumes_after_a_restart(kadoa: SimulatedKadoa, tmp_path: Path) -> None:
    async with hooked() as (hook, url):
        arguments = ["forward", url, "--store", str(tmp_path / "p.db")]
        hook.statuses = [500, 404, 302]
        async with running(*arguments, env=environment(kadoa)) as run:
            await kadoa.wait_subscribed(1)
            sent = [event.id for event in kadoa.publish_many(3)]
            await run.until(lambda: len(hook.bodies) >= 6)
            # The endpoint refuses the next event until this run ends.
            hook.default = 503
            stuck = kadoa.publish()
            await run.until(lambda: hook.ids[-1] == stuck.id)
            kadoa.publish()
            assert await run.end(signal.SIGINT) == 130
        assert hook.ids[:6] == [sent[0]] * 4 + sent[1:]
        assert b"attempt 1 failed (HTTP 500); again in" in run.err
        tried = len(hook.bodies)
        hook.default = 200
        async with running(*arguments, "--limit", "2", env=environment(kadoa)) as run:
            assert await run.end() == 0
        assert hook.ids[tried:] == [event.id for event in kadoa.published[3:]]


async def test_forward_waits_for_an_endpoint_that_is_down(kadoa: SimulatedKadoa, tmp_path: Path) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    hook = Hook()
    arguments = ["forward", f"http://127.0.0.1:{port}/", "--no-store", "--limit", "1"]
    async with running(*arguments, env=environment(kadoa)) as run:
        await kadoa.wait_subscribed(1)
        event = kadoa.publish()
        await run.until(lambda: b"attempt 2 failed (Connection refused)" in run.err)
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, hook.serve, listeners)
            assert await run.end() == 0
            nursery.cancel_scope.cancel()
    assert hook.ids == [event.id]


async def test_forward_writes_dead_letters_and_replays_them(kadoa: SimulatedKadoa, tmp_path: Path) -> None:
    letters = tmp_path / "dead.jsonl"
    async with hooked() as (hook, url):
        hook.statuses = [500, 500, 200, 500, 500]
        arguments = [
            "forward",
            url,
            "--no-store",
            "--max-attempts",
            "2",
            "--dead-letters",
            str(letters),
            "--limit",
            "3",
        ]
        async with running(*arguments, env=environment(kadoa)) as run:
            await kadoa.wait_subscribed(1)
            sent = [event.id for event in kadoa.publish_many(3)]
            assert await run.end() == 0
        assert b"1 delivered, 2 dead letters, 4 failed attempts" in run.err
        written = [json.loads(line) for line in letters.read_text().splitlines()]
        assert [letter["event"]["id"] for letter in written] == [sent[0], sent[2]]
        assert written[0]["attempts"] == 2
        assert written[0]["why"] == "HTTP 500"
        assert letters.stat().st_mode & 0o077 == 0  # only the user may read events

        # One fails again and stays in the file; a line that is not a letter stays, too.
        with letters.open("a") as file:
            file.write("torn {\n")
        hook.bodies.clear()
        hook.statuses = [500]
        done = await finish("forward", url, "--replay", str(letters), env=environment())
        assert done.returncode == 1
        assert b"1 delivered, 2 left in" in done.stderr
        assert hook.ids == [sent[0], sent[2]]
        assert [line for line in letters.read_text().splitlines() if "torn" in line]
        assert json.loads(letters.read_text().splitlines()[0])["event"]["id"] == sent[0]

        letters.write_text(letters.read_text().replace("torn {\n", ""))
        done = await finish("forward", url, "--replay", str(letters), env=environment())
        assert done.returncode == 0
        assert hook.ids[2:] == [sent[0]]
        assert not letters.exists()
        assert list(tmp_path.iterdir()) == []


async def test_secret_of_the_endpoint_is_in_no_log(kadoa: SimulatedKadoa) -> None:
    async with hooked() as (hook, url):
        hook.statuses = [500]
        arguments = ["-vv", "forward", f"{url}?token=secret-query-of-mine", "--no-store", "--limit", "1"]
        async with running(*arguments, env=environment(kadoa)) as run:
            await kadoa.wait_subscribed(1)
            kadoa.publish()
            assert await run.end() == 0
    assert b"?token=secret-query-of-mine" in hook.heads[0]
    assert b"HTTP Request: POST" in run.err  # the records are there
    assert b"secret-query" not in run.err


async def test_replay_of_a_missing_file_is_1() -> None:
    done = await finish("forward", "http://127.0.0.1:1", "--replay", "/nonexistent/x", env=environment())
    assert done.returncode == 1
    assert b"No such file" in done.stderr


async def test_forward_saves_its_position_for_the_user_by_default(kadoa: SimulatedKadoa, tmp_path: Path) -> None:
    env = environment(kadoa, HOME=str(tmp_path), XDG_CONFIG_HOME=str(tmp_path / "config"))
    async with hooked() as (hook, url):
        async with running("forward", f"{url}?token=secret-query", "--limit", "1", env=env) as run:
            await kadoa.wait_subscribed(1)
            kadoa.publish_many(2)
            assert await run.end() == 0
        async with running("forward", f"{url}?token=secret-query", "--limit", "1", env=env) as run:
            assert await run.end() == 0
    assert hook.ids == [event.id for event in kadoa.published]
    assert b"secret-query" not in run.err
    (database,) = tmp_path.rglob("positions.db")
    with closing(sqlite3.connect(database)) as connection:
        assert "secret-query" not in "".join(connection.iterdump())


# ---- setup, send-test, doctor --------------------------------------------------------------------------------------


async def test_setup_makes_what_is_missing_once(kadoa: SimulatedKadoa) -> None:
    kadoa.workspace.clear()
    arguments = ["setup", "--event", "workflow_failed", "--event", "workflow_finished"]
    planned = await finish(*arguments, "--dry-run", env=environment(kadoa))
    assert planned.returncode == 0
    assert planned.stdout.decode() == GOLDEN_SETUP.replace("done:", "would")
    assert kadoa.workspace.channels == kadoa.workspace.settings == []
    done = await finish(*arguments, env=environment(kadoa))
    assert (done.returncode, done.stdout.decode()) == (0, GOLDEN_SETUP)
    assert kadoa.workspace.streams("workflow_failed", "wf_1")
    again = await finish(*arguments, "--json", env=environment(kadoa))
    report = json.loads(again.stdout)
    assert report["changed"] is False
    assert report["steps"] == []
    assert len(report["inPlace"]) == 2


GOLDEN_SETUP = """\
done: make the WebSocket channel 'Realtime (WebSocket)'
done: send workflow_failed of the whole workspace to the WebSocket channel
done: send workflow_finished of the whole workspace to the WebSocket channel
"""


async def test_setup_explains_a_template(kadoa: SimulatedKadoa) -> None:
    kadoa.workspace.linked_workflows.add("wf_1")
    done = await finish("setup", "--event", "workflow_failed", "--workflow", "wf_1", env=environment(kadoa))
    assert done.returncode == 1
    assert b"linked to a template" in done.stderr


async def test_send_test_reaches_the_socket(kadoa: SimulatedKadoa) -> None:
    async with running("listen", "--limit", "1", env=environment(kadoa)) as run:
        await kadoa.wait_subscribed(1)
        done = await finish("send-test", "workflow_failed", "--workflow", "wf_9", env=environment(kadoa))
        assert await run.end() == 0
    event = json.loads(run.out)
    assert event["id"] == done.stdout.decode().strip()
    assert event["message"]["workflowId"] == "wf_9"


async def test_doctor_succeeds(kadoa: SimulatedKadoa) -> None:
    done = await finish("doctor", env=environment(kadoa))
    assert done.returncode == 0, done.stdout.decode()
    assert re.sub(
        r" \d+\.\d\d s", " 0.00 s", re.sub(r"[0-9a-f-]{36}|\b\d{4,5}\b", "N", done.stdout.decode())
    ) == re.sub(r"\b\d{5}\b", "N", GOLDEN_DOCTOR)


GOLDEN_DOCTOR = """\
✓ key            0.00 s  36 characters, from KADOA_API_KEY
✓ token          0.00 s  from http://127.0.0.1:12345, for team team-1
✓ channel        0.00 s  Websocket 1: workflow_data_change, workflow_failed, workflow_finished, workflow_recovered
✓ dns            0.00 s  127.0.0.1 is 127.0.0.1
✓ tcp            0.00 s  port 12345 answers
- tls                    the endpoint is plain ws://
✓ handshake      0.00 s  the WebSocket is open
✓ subscription   0.00 s  to the channel of team team-1
✓ heartbeat      0.00 s  a heartbeat came
✓ test event     0.00 s  workflow_finished N came
"""


async def diagnosis(kadoa: SimulatedKadoa, *arguments: str, **more: str) -> tuple[int, dict[str, dict[str, str]]]:
    done = await finish("doctor", "--json", "--timeout", "3", *arguments, env=environment(kadoa, **more))
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    return done.returncode, {step["name"]: step for step in report["steps"]}


async def test_doctor_names_the_step_that_failed(kadoa: SimulatedKadoa) -> None:
    code, steps = await diagnosis(kadoa, KADOA_API_KEY="wrong-key-12345678")
    assert code == 1
    assert steps["token"]["verdict"] == "failed"
    assert "invalid API key" in steps["token"]["detail"]
    assert steps["tcp"]["verdict"] == "ok"
    assert steps["handshake"]["verdict"] == "skipped"

    kadoa.workspace.clear()
    code, steps = await diagnosis(kadoa, "--no-test-event")
    assert code == 1
    assert "no WebSocket channel is configured" in steps["channel"]["detail"]
    assert "kadoa-trio setup" in steps["channel"]["advice"]
    assert steps["heartbeat"]["verdict"] == "ok"
    assert steps["test event"]["verdict"] == "skipped"


# ---- simulate, demo ------------------------------------------------------------------------------------------------


async def test_simulate_serves_any_client_and_has_its_faults(tmp_path: Path) -> None:
    env_file = tmp_path / "kadoa.env"
    arguments = ["simulate", "--rate", "50", "--heartbeat", "0.2", "--fault", "0.2 reset, 0.6 drain 0.3", "--repeat"]
    async with running(*arguments, "--env-file", str(env_file), env=environment()) as run:
        await run.until(lambda: b"KADOA_REALTIME_API_URI" in run.out and env_file.exists() and env_file.read_text())
        exported = dict(re.findall(r"export (\w+)=(\S+)", run.out.decode()))
        written = dict(line.split("=", 1) for line in env_file.read_text().splitlines())
        assert written == exported
        done = await finish("listen", "--limit", "150", env=environment(**exported))
        assert done.returncode == 0
        assert await run.end(signal.SIGINT) == 130
    assert len({json.loads(line)["id"] for line in done.stdout.splitlines()}) == 150
    assert b"fault: 0.2 reset" in run.err
    assert b"connection 2: subscribed from" in run.err


@pytest.mark.parametrize(
    "arguments", [["simulate", "--rate", "nan"], ["simulate", "--seconds", "nan"], ["demo", "--seconds", "nan"]]
)
def test_nan_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "is not a number" in capsys.readouterr().err


def test_key_file_without_an_end_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["send-test", "workflow_failed", "--api-key-file", "/dev/zero"]) == 2
    assert "longer than 10000 characters" in capsys.readouterr().err


async def test_closed_standard_output_is_one_line() -> None:
    done = await finished(["/bin/sh", "-c", f"exec {sys.executable} -m kadoa_trio demo >&-"], env=environment())
    assert done.returncode == 2
    assert b"standard output is closed" in done.stderr
    assert b"Traceback" not in done.stderr


async def test_simulate_ends_after_its_seconds() -> None:
    done = await finish("simulate", "--seconds", "0.1", "--chaos", "3", env=environment())
    assert done.returncode == 0


async def test_port_in_use_is_one_line(kadoa: SimulatedKadoa) -> None:
    port = kadoa.endpoints.websocket.rpartition(":")[2]
    done = await finish("simulate", "--port", port, env=environment())
    assert done.returncode == 1
    assert b"ddress already in use" in done.stderr


async def test_demo_is_perfect() -> None:
    done = await finish("demo", "--seconds", "6", env=environment())
    assert done.returncode == 0, done.stdout.decode()
    assert b"PERFECT" in done.stdout
    assert re.search(rb"lost +0\n", done.stdout)


# ---- no text of a server, a file or the environment reaches a terminal unchanged --------------------------------------

HOSTILE = "\x1b]0;owned\x07\x9b31m\r\nkadoa-trio: all steps succeeded\u202e\u2028"


def assert_presentable(written: bytes) -> None:
    """Assert that there is no control character, and no line that looks like one of the command but is not."""
    text = written.decode()
    assert all(character == "\n" or character.isprintable() for character in text), text
    for line in text.splitlines():
        assert re.match(r"kadoa-trio: (?!all steps succeeded)|(DEBUG|INFO|WARNING|ERROR):[\w.-]+:", line), line


@asynccontextmanager
async def hostile_kadoa() -> AsyncIterator[dict[str, str]]:
    """Serve tokens, and connections that are closed with a reason; every text is hostile. Return the environment."""
    event = {"eventType": f"x{HOSTILE}", "id": f"e{HOSTILE}", "_cursor": f"1-1{HOSTILE}", "message": {"id": 1}}
    odd: list[dict[str, object]] = [
        {"type": "control.draining", "retryAfterMs": 60_000, "deadlineAt": HOSTILE, "connectionId": HOSTILE},
        {"type": f"control.{HOSTILE}"},
        {"type": HOSTILE},
        event,
    ]

    async def token(stream: trio.abc.Stream) -> None:
        while True:
            await read_head(stream)
            body = json.dumps({"access_token": "t0k3n", "team_id": f"team{HOSTILE}"}).encode()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    async def websocket(stream: trio.abc.Stream) -> None:
        await accept(stream, b"".join(frame(json.dumps(one).encode()) for one in odd))
        await stream.receive_some()
        await stream.send_all(close_frame(4001, HOSTILE))

    async with serving(token) as api, serving(websocket) as port:
        yield environment(
            KADOA_API_KEY="key-for-tests",
            KADOA_PUBLIC_API_URI=f"http://127.0.0.1:{api}",
            KADOA_REALTIME_API_URI=f"http://127.0.0.1:{api}",
            KADOA_WSS_API_URI=f"ws://127.0.0.1:{port}",
        )


async def test_hostile_words_of_server_and_store_are_made_presentable(tmp_path: Path) -> None:
    path = tmp_path / "positions.db"
    session = await SQLiteCursorStore(path).open(f"team{HOSTILE}", "default")
    await session.save(Position(team=f"team{HOSTILE}", cursor=f"1-0{HOSTILE}"))
    await session.aclose()
    async with hostile_kadoa() as env:
        for verbosity in ((), ("-vv",)):
            async with running(*verbosity, "listen", "--store", str(path), "--limit", "2", env=env) as run:
                await run.until(lambda run=run: b"lost" in run.err)
                await run.end(signal.SIGINT)
            assert_presentable(run.err)
            assert b"resuming at 1-0 ]0;owned" in run.err
            assert (b"ignored a frame" in run.err) == bool(verbosity)


async def test_hostile_words_of_a_webhook_are_made_presentable(tmp_path: Path) -> None:
    async def webhook(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        body = json.dumps({"error": HOSTILE}).encode()
        await stream.send_all(
            b"HTTP/1.1 500 No\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
        )

    async with hostile_kadoa() as env, serving(webhook) as port:
        letters = str(tmp_path / "dead")
        arguments = ["forward", f"http://127.0.0.1:{port}/", "--no-store", "--max-attempts", "1", "--limit", "1"]
        async with running("-vv", *arguments, "--dead-letters", letters, env=env) as run:
            assert await run.end() == 0
    assert_presentable(run.err)
    assert b"attempt 1 failed" in run.err


async def test_hostile_words_of_the_environment_are_made_presentable() -> None:
    env = environment(KADOA_API_KEY="key-for-tests")
    for name, value in (
        ("KADOA_PUBLIC_API_URI", f"http://x{HOSTILE}.example"),
        ("KADOA_WSS_API_URI", "ws://\x9b31m.example"),
        ("SSL_CERT_FILE", f"/{HOSTILE}"),
    ):
        done = await finish("listen", env={**env, name: value})
        assert done.returncode == 2
        assert_presentable(done.stderr)


async def test_hostile_owner_of_a_consumer_is_made_presentable(tmp_path: Path) -> None:
    session = await SQLiteCursorStore(tmp_path / "positions.db").open(f"team{HOSTILE}", "default")
    (lock,) = tmp_path.glob("*.lock")
    lock.write_text(HOSTILE)
    async with hostile_kadoa() as env:
        done = await finish("listen", "--store", str(tmp_path / "positions.db"), env=env)
    assert done.returncode == 1
    assert b"is owned by" in done.stderr
    assert_presentable(done.stderr)
    await session.aclose()


async def test_hostile_words_are_made_presentable_by_the_doctor() -> None:
    async with hostile_kadoa() as env:
        done = await finish("doctor", "--no-test-event", env=env)
    text = (done.stdout + done.stderr).decode()
    assert all(character == "\n" or character.isprintable() for character in text), text
    assert "for team team ]0;owned" in text
