"""Leaving a block that hides a nursery: which exception the user gets, and clean-up that Ctrl-C cannot cut short."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TypeVarTuple

import trio

from ._contexts import async_context

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
            async with trio.open_nursery(strict_exception_groups=True) as nursery:  # noqa: ASYNC112  # see above
                nursery.start_soon(_shielded, deadline, function, *args)
        except BaseExceptionGroup as group:
            crash = pick(group)
    if crash is not None:
        raise crash


@trio.lowlevel.enable_ki_protection
async def _shielded(deadline: float, function: Callable[[*_Args], Awaitable[object]], *args: *_Args) -> None:
    with trio.CancelScope(shield=True, deadline=deadline):
        await function(*args)


@async_context
async def hidden_nursery(reason: str) -> AsyncIterator[trio.Nursery]:
    """Open a nursery that does not show: one exception leaves the block, and never a group of the nursery's.

    Leaving cancels its tasks. What surfaces:

    * `KeyboardInterrupt`, `SystemExit` or another exception of one of its tasks;
    * else the exception of the block, as it is, groups included;
    * else a cancellation from outside.

    Args:
        reason: why its tasks are cancelled when the block is left.
    """
    error: BaseException | None = None
    crash: BaseException | None = None
    try:
        # Strict whatever the run says, so that there is one shape to take apart.
        async with trio.open_nursery(strict_exception_groups=True) as nursery:
            # The nursery must not see the block's exception, or it would wrap it. Nothing is swallowed: see the last line.
            try:
                yield nursery
            except BaseException as exc:  # noqa: ASYNC103  # raised again, outside of the nursery
                error = exc
            # Last: whatever awaits after this is cancelled, and its Cancelled would stand in for the block's exception.
            nursery.cancel_scope.cancel(reason=reason)
    except BaseExceptionGroup as group:
        # A Cancelled in here is the caller's, and comes second to an exception of the block.
        crash = pick(group)
    if crash is not None and (error is None or not isinstance(crash, trio.Cancelled)):
        raise crash
    if error is not None:
        raise error


def pick(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one exception of *group* that the user gets.

    A `KeyboardInterrupt` or `SystemExit` if there is one, else an exception
    that is not a cancellation, else the cancellation.
    """
    found = list(leaves(group))
    for kinds in ((KeyboardInterrupt, SystemExit), (Exception,)):
        for leaf in found:
            if isinstance(leaf, kinds) and not isinstance(leaf, trio.Cancelled):
                return leaf
    return found[0]


def leaves(exc: BaseException) -> Iterator[BaseException]:
    """Give the exceptions of a group and of the groups in it; an exception that is no group gives itself."""
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from leaves(inner)
    else:
        yield exc
