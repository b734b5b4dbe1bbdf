"""Files in directories that others may write to, and locks of the operating system that end with their process.

No symbolic link is followed in the last component of a path, only regular files
are used, and only files that this library has written are truncated.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ._redact import presentable

_FLAGS: Final = (
    getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)  # opening must not block if the file is replaced by a FIFO
    | getattr(os, "O_BINARY", 0)
)
_MAX_OWNER: Final = 300
"""Maximum length of the text in a lock file, in bytes."""
_OWNER_PREFIX: Final = b"process "


def open_file(path: Path, flags: int) -> int:
    """Open a regular file, and return its descriptor; a file that is created can be used by its owner only.

    Raises:
        OSError: the file cannot be opened, or is a symbolic link, a FIFO, a
            device or anything else that is not a regular file.
    """
    # Before it is opened, because opening a device may have effects.
    with contextlib.suppress(FileNotFoundError):
        _require_regular(path, os.lstat(path))
    file = os.open(path, flags | _FLAGS, 0o600)
    try:
        _require_regular(path, os.fstat(file))
    except BaseException:
        os.close(file)
        raise
    return file


def _require_regular(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise OSError(None, "is a symbolic link, which is not followed", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(None, "is not a regular file", str(path))


def sync_directory(path: Path) -> None:
    """Make the creation, renaming or removal of files in the directory *path* survive a power loss."""
    if sys.platform == "win32":  # pragma: no cover
        return
    directory = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def identity() -> str:
    """Describe this process, for the text of a lock file."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now(UTC).isoformat(timespec='seconds')}"


# ---- locks ---------------------------------------------------------------------------------------------------------

# flock() and not fcntl(), because a POSIX lock is dropped when anything in the process opens and closes the file (a
# backup, for example), and does not exclude two stores of one process. But a flock belongs to the open file description,
# which a forked child shares, so the lock would outlive its owner. So the child closes its copies at once, and `release`
# unlocks before it closes, for children that were forked by C code without the hooks.
_open_locks: dict[int, FileLock] = {}
_forks = 0


class FileLock:
    """An exclusive lock, released by `release` or by the end of its process. The file names the holder.

    Two locks in one process exclude each other, too. A forked child holds
    no lock of its parent.

    Args:
        path: the lock file; created when the lock is taken.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self._file: int | None = None

    def take(self, *, force: bool = False) -> str | None:
        """Take the lock without waiting; return None, or the description of its holder.

        Args:
            force: take it even if another process holds it. That process's
                lock is then on a file that has no name.

        Raises:
            OSError: the lock file cannot be used.
        """
        while True:
            forks = _forks
            file = open_file(self.path, os.O_RDWR | os.O_CREAT)
            _open_locks[file] = self
            keep = False
            try:
                locked = _try_lock(file)
                if not locked and not force:
                    return _read_owner(file) or "a process that has not written its name"
                # Another process may have removed the file or taken its place since it was opened.
                if self._is_at_path(file):
                    if locked and forks == _forks:
                        _write_owner(file, self.path)
                        self._file = file
                        keep = True
                        return None
                    # A child that was forked before the file was in `_open_locks` shares it, so try again with a new one.
                    if not locked:
                        self.path.unlink(missing_ok=True)
            finally:
                if not keep:
                    _close_lock(file)

    def held(self) -> bool:
        """Return whether this process holds the lock, and the lock file is still at its path."""
        return self._file is not None and self._is_at_path(self._file)

    def release(self, *, remove: bool = False) -> None:
        """Release the lock, if it is held.

        Args:
            remove: remove the lock file, too.
        """
        file, self._file = self._file, None
        if file is None:
            return
        try:
            # While it is locked, so that a process that opened the file before sees that it is not at its path.
            if remove and self._is_at_path(file):
                with contextlib.suppress(OSError):
                    self.path.unlink()
        finally:
            _close_lock(file)

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.lstat(self.path))
        except FileNotFoundError:
            return False


def _close_lock(file: int) -> None:
    _open_locks.pop(file, None)
    with contextlib.suppress(OSError):
        _unlock(file)
    os.close(file)


def _read_text(file: int) -> bytes:
    os.lseek(file, 0, os.SEEK_SET)
    return os.read(file, _MAX_OWNER)


def _read_owner(file: int) -> str:
    # Other users may have written the text.
    return presentable(_read_text(file).decode(errors="replace"), _MAX_OWNER)


def _write_owner(file: int, path: Path) -> None:
    """Write the holder of the lock; to be called when it is locked."""
    text = _read_text(file)
    if (text and not text.startswith(_OWNER_PREFIX)) or os.fstat(file).st_nlink > 1:
        raise OSError(None, "is not a lock file of this library", str(path))
    os.ftruncate(file, 0)
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, identity().encode()[:_MAX_OWNER])


if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    _BEYOND_TEXT: Final = 1_000
    """The byte that is locked, so that the text can be read."""

    def _try_lock(file: int) -> bool:
        try:
            os.lseek(file, _BEYOND_TEXT, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: int) -> None:
        os.lseek(file, _BEYOND_TEXT, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)

    def _before_fork() -> None:
        global _forks
        _forks += 1

    def _after_fork_in_child() -> None:
        for file, lock in list(_open_locks.items()):
            lock._file = None
            with contextlib.suppress(OSError):
                os.close(file)
        _open_locks.clear()

    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
