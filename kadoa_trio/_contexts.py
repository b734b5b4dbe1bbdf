"""Decorators like those of `contextlib` for context managers that Ctrl-C cannot leave half entered or half left.

Trio raises `KeyboardInterrupt` between any two instructions that are not
protected from it, and the methods of contextlib's context managers are not
protected:

* A `KeyboardInterrupt` at the first instruction of ``__aexit__`` leaves the
  generator suspended in its block, with its nursery and its sockets open.
* An async generator that is garbage-collected in the user's frame runs the
  callback of Trio's weak reference there. Python prints and drops a
  `KeyboardInterrupt` that is raised in such a callback (see
  `sys.unraisablehook`). Each traceback through contextlib's frames holds a
  reference to the generator.

So entering and leaving are protected here as a whole, and the reference to
the generator is dropped before ``__aexit__`` returns. A Ctrl-C during them is
raised by the main task's next checkpoint, which may be inside of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Generic, ParamSpec, TypeVar, cast

import trio

_P = ParamSpec("_P")
_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


def async_context(function: Callable[_P, AsyncIterator[_T]]) -> Callable[_P, AbstractAsyncContextManager[_T]]:
    """Make a function that returns an async context manager of an async generator function which yields once."""

    @functools.wraps(function)
    def make(*args: _P.args, **options: _P.kwargs) -> AbstractAsyncContextManager[_T]:
        return _AsyncContext(function.__name__, cast("AsyncGenerator[_T, None]", function(*args, **options)))

    return make


def sync_context(function: Callable[_P, Iterator[_T]]) -> Callable[_P, AbstractContextManager[_T]]:
    """Make a function that returns a context manager of a generator function which yields once."""
    unprotected = contextlib.contextmanager(function)

    @functools.wraps(function)
    def make(*args: _P.args, **options: _P.kwargs) -> AbstractContextManager[_T]:
        return _Context(unprotected(*args, **options))

    return make


def check_in_trio(name: str) -> None:
    """Refuse to run the function *name* outside of Trio, where it would fail at its first checkpoint.

    Raises:
        RuntimeError: no task of Trio calls this, but one of asyncio, or none.
    """
    if not trio.lowlevel.in_trio_task():
        raise RuntimeError(
            f"{name} needs Trio: call it in an async function that trio.run(...) runs. asyncio.run(...) and other event "
            "loops cannot run it. See 'Use the client from asyncio' in the documentation"
        )


class _AsyncContext(AbstractAsyncContextManager[_T_co], Generic[_T_co]):
    def __init__(self, name: str, generator: AsyncGenerator[_T_co, None]) -> None:
        self._name = name
        self._generator: AsyncGenerator[_T_co, None] | None = generator
        self._entered = False

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> _T_co:
        if self._entered:
            raise RuntimeError("a context manager of kadoa_trio can be entered once; make another one")
        check_in_trio(self._name)
        self._entered = True
        assert self._generator is not None
        yielded = False
        try:
            value = await anext(self._generator)
            yielded = True
        except StopAsyncIteration:
            raise RuntimeError("the generator of a context manager did not yield") from None
        finally:
            if not yielded:
                self._generator = None
        return value

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        generator, self._generator = self._generator, None
        if generator is None:
            raise RuntimeError("a context manager of kadoa_trio was left twice")
        try:
            # The generator shields and bounds what it awaits in its clean-up, where that is needed.
            return await self._leave(generator, exc)  # noqa: ASYNC102
        except BaseException as raised:  # noqa: ASYNC103  # unless Python raises it itself behind this method
            if raised is not exc:
                raise
            # As contextlib does: the traceback of the block, without this method's frames, which say nothing.
            raised.__traceback__ = traceback
            return False  # noqa: ASYNC104  # False has Python raise it again
        finally:
            del generator  # a frame in a traceback must hold no reference to it

    @staticmethod
    async def _leave(generator: AsyncGenerator[_T_co, None], exc: BaseException | None) -> bool:
        try:
            if exc is None:
                await anext(generator)
            else:
                await generator.athrow(exc)
        except StopAsyncIteration as stop:
            return (
                exc is not None and stop is not exc
            )  # the generator has handled an exception that it does not raise again
        except RuntimeError as raised:
            # PEP 479: a StopIteration or StopAsyncIteration that passes through a generator becomes a RuntimeError.
            if isinstance(exc, (StopIteration, StopAsyncIteration)) and raised.__cause__ is exc:
                return False
            raise
        finally:
            await generator.aclose()
            del generator
        raise RuntimeError("the generator of a context manager yielded twice")


class _Context(AbstractContextManager[_T_co], Generic[_T_co]):
    def __init__(self, inner: AbstractContextManager[_T_co]) -> None:
        self._inner = inner

    @trio.lowlevel.enable_ki_protection
    def __enter__(self) -> _T_co:
        return self._inner.__enter__()

    @trio.lowlevel.enable_ki_protection
    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return self._inner.__exit__(kind, exc, traceback)
