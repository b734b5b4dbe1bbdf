"""Which exception leaves a block that hides a nursery."""

from __future__ import annotations

from collections.abc import Iterator

import trio


def pick(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Pick the one exception of *group* that is to surface.

    A `KeyboardInterrupt` or `SystemExit` first, then anything that is not a
    cancellation, then the cancellation.
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
