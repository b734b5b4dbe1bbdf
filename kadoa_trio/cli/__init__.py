"""The command ``kadoa-trio``. Programs can do all of this with the library; the command adds text and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with *argv* (default: that of the process), and return its exit code."""
    if sys.stdout is None:  # closed by the shell
        print("kadoa-trio: standard output is closed; use >/dev/null to see nothing", file=sys.stderr)
        return 2
    try:
        from ._main import run_command
    except ModuleNotFoundError as exc:
        if exc.name not in ("click", "rich"):
            raise
        print(
            f"kadoa-trio: the command needs {exc.name}, which is not installed: pip install 'kadoa-trio[cli]'",
            file=sys.stderr,
        )
        return 2
    return run_command(argv)
