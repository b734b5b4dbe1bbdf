"""The command ``kadoa-trio``. No logic in here that a program could not call."""

from ._main import main as main

__all__ = ["main"]
