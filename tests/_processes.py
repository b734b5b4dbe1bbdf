"""Processes of tests: none outlives its block, and one that does not end is killed and says what it wrote to stderr."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

PATIENCE = 240.0
"""How long a process and what a test does with it may take, in seconds: less than the time-out of a test."""

_LAUNCH = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.argv[1] == "tty":
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first terminal that a session's leader opens controls it
os.execv(sys.argv[2], sys.argv[2:])
"""


def launching(arguments: Sequence[str], *, tty: bool = False) -> list[str]:
    """Give a command that runs *arguments* with SIGINT at its default.

    A shell's `&` starts the tests with SIGINT ignored, which every child
    inherits. (Not by ``preexec_fn``, which Python 3.12 warns of beside threads.)

    Args:
        arguments: the command; its first item is a path.
        tty: make standard input, a terminal, the one that controls it. For a leader of a new session.
    """
    if not tty and (sys.platform == "win32" or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN):
        return list(arguments)
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, "tty" if tty else "-", *arguments]


class Running:
    """A process, and what it has written so far to the pipes that are read."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.out = b""
        self.err = b""
        self._reading = 0

    async def read_out(self) -> None:
        """Read standard output until it ends."""
        assert self.process.stdout is not None
        self._reading += 1
        async for data in self.process.stdout:
            self.out += data
        self._reading -= 1

    async def read_err(self) -> None:
        """Read standard error until it ends."""
        assert self.process.stderr is not None
        self._reading += 1
        async for data in self.process.stderr:
            self.err += data
        self._reading -= 1

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait for something that the process does; fail if it ends before."""
        while not condition():  # noqa: ASYNC110  # another process has no event
            assert self.process.returncode is None or self._reading, f"it has ended with {self.process.returncode}"
            await trio.sleep(0.01)

    async def end(self, number: int | None = None) -> int:
        """Send a signal, if there is one, and wait for the end; return the exit code."""
        if number is not None:
            self.process.send_signal(number)
        return await self.process.wait()


@asynccontextmanager
async def running(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
    read_out: bool = True,
    tty: bool = False,
    patience: float = PATIENCE,
) -> AsyncIterator[Running]:
    """Run a process for the length of a block, and kill it behind it.

    Args:
        arguments: the command; its first item is a path.
        env: the environment; None for this process's own.
        cwd: where it runs.
        stdin: as for `subprocess.Popen`; so are *stdout* and *stderr*.
        stdout: if it is a pipe, `Running.out` collects it.
        stderr: if it is a pipe, `Running.err` collects it.
        read_out: False leaves the pipe of standard output to the test.
        tty: give it a session of its own, controlled by the terminal that is its standard input.
        patience: for the block as a whole, in seconds.
    """
    one: Running | None = None
    try:
        with trio.fail_after(patience):
            # Under a shield: a process that was started although its start was cancelled would be nobody's.
            with trio.CancelScope(shield=True):
                process = await trio.lowlevel.open_process(
                    launching(arguments, tty=tty),
                    env=env,
                    cwd=cwd,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=tty,
                )
            one = Running(process)
            try:
                async with trio.open_nursery() as nursery:
                    if process.stdout is not None and read_out:
                        nursery.start_soon(one.read_out)
                    if process.stderr is not None:
                        nursery.start_soon(one.read_err)
                    try:
                        yield one
                    finally:
                        if process.returncode is None:
                            process.kill()
            finally:
                with trio.CancelScope(shield=True):
                    if process.returncode is None:
                        process.kill()
                    await process.wait()
                    for pipe in (process.stdin, process.stdout, process.stderr):
                        if pipe is not None:
                            await pipe.aclose()
    except BaseException as exc:
        said = "" if one is None else one.err.decode(errors="replace")
        exc.add_note(f"stderr of {shlex.join(arguments)}:\n{said or '(nothing)'}")
        raise


async def finished(
    arguments: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run a process until it ends; see `running`."""
    async with running(arguments, env=env, cwd=cwd, stdin=subprocess.PIPE) as one:
        assert one.process.stdin is not None
        with contextlib.suppress(trio.BrokenResourceError):  # it does not read
            await one.process.stdin.send_all(stdin)
        await one.process.stdin.aclose()
        code = await one.process.wait()
    return subprocess.CompletedProcess(list(arguments), code, one.out, one.err)


@contextmanager
def started(arguments: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a process for the length of a block, for tests without Trio; kill it behind it. Its stderr is not redirected."""
    with subprocess.Popen(launching(arguments), text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def environment_without(*prefixes: str) -> dict[str, str]:
    """Give this process's environment without the variables that begin with one of *prefixes*."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
