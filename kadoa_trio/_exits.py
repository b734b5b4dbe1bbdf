"""Leaving a block that hides a nursery: which exception the user gets, and clean-up that Ctrl-C cannot cut short."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVarTuple

import trio

_Args = TypeVarTuple("_Args")


@trio.lowlevel.enable_ki_protection
async def clean_up(deadline: float, function: Callable[[*_Args], Awaitable[object]], *args: *_Args) -> None:
    """Await ``function(*args)``. Only *deadline*, on Trio's clock, cancels it.

    A shield is not enough in the main task, because each checkpoint there,
    shielded or not, may raise `KeyboardInterrupt`. So the clean-up runs in a
    task of its own, and a Ctrl-C meanwhile is raised when that task has ended.
    """
    crash: BaseException | None = None
    with trio.CancelScope(shield=True):
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                nursery.start_soon(_shielded, deadline, function, *args)
        except BaseExceptionGroup as group:
            crash = pick(group)
    if crash is not None:
        raise crash


@trio.lowlevel.enable_ki_protection
async def _shielded(deadline: float, function: Callable[[*_Args], Awaitable[object]], *args: *_Args) -> None:
    with trio.CancelScope(shield=True, deadline=deadline):
        await function(*args)


def pick(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one exception of *group* that the user gets.

    A `KeyboardInterrupt` or `SystemExit` if there is one, else an exception
    that is not a cancellation, else the cancellation.
    """
    leaves = list(_leaves(group))
    for kinds in ((KeyboardInterrupt, SystemExit), (Exception,)):
        for leaf in leaves:
            if isinstance(leaf, kinds) and not isinstance(leaf, trio.Cancelled):
                return leaf
    return leaves[0]


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc
