"""A real pseudo-terminal for a command, and what its screen shows."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import sys
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pyte
import trio
from _processes import running


class Terminal:
    """A screen of a size that can change, and the process that draws on it."""

    def __init__(self, columns: int, lines: int) -> None:
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._master, self.slave = pty.openpty()
        self._size(columns, lines)
        os.set_blocking(self._master, False)
        self.process: trio.Process | None = None
        self.raw = bytearray()

    def _size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns: int, lines: int) -> None:
        """Change the size, as a window does."""
        self._size(columns, lines)
        self.screen.resize(lines, columns)
        self.screen.reset()
        assert self.process is not None
        self.process.send_signal(signal.SIGWINCH)

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    @property
    def shown(self) -> str:
        """Everything on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    async def read(self) -> None:
        """Draw what the process writes until it ends."""
        while True:
            await trio.lowlevel.wait_readable(self._master)
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the other end is closed: that is how Linux says so
                return
            if not data:
                return
            self.raw += data
            self._stream.feed(data)

    async def process_ended(self) -> int:
        """Wait for the process, and return its exit code."""
        assert self.process is not None
        return await self.process.wait()

    async def drained(self) -> None:
        """Wait until nothing more comes, after the process has ended."""
        while True:
            seen = len(self.raw)
            await trio.sleep(0.05)
            if len(self.raw) == seen:
                return

    async def wait(self, condition: Callable[[str], bool]) -> str:
        """Wait until the screen shows what is wanted, and return it; fail if the process ends before."""
        assert self.process is not None
        while not condition(self.shown):  # noqa: ASYNC110  # a screen has no event
            if self.process.returncode is not None:
                await self.drained()
                assert condition(self.shown), f"it has ended with {self.process.returncode}"
            await trio.sleep(0.02)
        return self.shown

    def close(self) -> None:
        os.close(self._master)


@asynccontextmanager
async def terminal(
    arguments: list[str], environment: dict[str, str], *, columns: int = 80, lines: int = 24
) -> AsyncIterator[Terminal]:
    """Run ``kadoa-trio`` in a pseudo-terminal for the length of a block."""
    one = Terminal(columns, lines)
    slave = one.slave

    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": "", **environment}
    arguments = [sys.executable, "-m", "kadoa_trio", *arguments]
    try:
        async with running(arguments, env=environment, stdin=slave, stdout=slave, stderr=slave, tty=True) as run:
            one.process = run.process
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.read)
                yield one
                nursery.cancel_scope.cancel()
    except BaseException as exc:
        exc.add_note(f"the screen:\n{one.shown}")
        raise
    finally:
        os.close(slave)
        one.close()
