"""Ctrl-C at every instruction: each place where CPython looks at signals, while a client is opened, used and left.

CPython runs signal handlers at function entries, after calls and at backward
jumps (`CHECK_EVAL_BREAKER` in its ceval.c). A trace function calls Trio's own
handler there, in the frame that is running: it raises `KeyboardInterrupt`
where Trio does not protect the frame, else the main task's next checkpoint
raises it. Each place of the program is interrupted in a run of its own. The
programs have no nursery of their own: Trio's spawning is not protected in
unprotected code (see docs/known-problems.md).

By default every eleventh place is interrupted, beginning with another one in
each run of the tests; ``KADOA_TRIO_CTRL_C_STRIDE=1`` interrupts all of them.
"""

from __future__ import annotations

import contextlib
import dis
import gc
import inspect
import os
import random
import signal
import sys
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import trio
import trio.testing
from trio._core import _ki  # what Trio's handler asks about a frame has no public name

import kadoa_trio
import kadoa_trio.consuming
import kadoa_trio.testing
import kadoa_trio.workspace
from kadoa_trio import (
    ConsumerOwnedError,
    CursorSession,
    Event,
    MemoryCursorStore,
    Position,
    open_forwarder,
    open_realtime,
    process,
)
from kadoa_trio._contexts import async_context, sync_context
from kadoa_trio._exits import clean_up
from kadoa_trio.testing import PublishedEvent, open_simulated_kadoa
from kadoa_trio.workspace import diagnose, open_notifications

STRIDE = int(os.environ.get("KADOA_TRIO_CTRL_C_STRIDE", "11"))
PROTECTED_STRIDE = 50 * STRIDE
"""There are some 10,000 entries of protected frames, and they differ less."""
Program = Callable[[], Awaitable[object]]
HOUR = 3600.0

_CALLS = {dis.opmap[name] for name in ("PRECALL", "CALL", "CALL_KW", "CALL_FUNCTION_EX") if name in dis.opmap}
# Between PRECALL and CALL nothing is looked at (3.11); nor behind the call of a coroutine function, which is awaited
# next: calls of functions in Python end without a look, and a coroutine's own entry is a place.
_NOT_BEFORE = {dis.opmap["CALL"], dis.opmap["GET_AWAITABLE"]}
_JUMPS = {dis.opmap["JUMP_BACKWARD"]}
_RESUME = dis.opmap["RESUME"]


class CtrlC:
    """Interrupts the *n*-th place; counts the places where it is never reached.

    Args:
        n: which place, from 0.
        protected: count the entries of protected frames, where the interrupt
            waits for a checkpoint, and not the places in unprotected ones.
    """

    def __init__(self, n: int | None, *, protected: bool = False) -> None:
        self.n, self.protected = n, protected
        self.places = 0
        self.where = ""

    def place(self, frame: FrameType) -> None:
        self.places += 1
        if self.places - 1 == self.n:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
            handler = signal.getsignal(signal.SIGINT)
            assert callable(handler)
            handler(signal.SIGINT, frame)

    def entered(self, frame: FrameType, event: str, _argument: Any) -> Any:
        """Trace the entry of a frame: 'call' in the words of sys.settrace."""
        if event != "call" or (frame.f_code.co_filename == __file__ and frame.f_code.co_name == "watched"):
            return None
        if _ki.ki_protection_enabled(frame):
            if self.protected:
                self.place(frame)
            return None
        if self.protected:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        code, at = frame.f_code.co_code, max(frame.f_lasti, 0)
        # Behind an await the evaluation goes on without a look at signals.
        if code[at] != _RESUME or code[at + 1] & 3 < 2:
            self.place(frame)
        previous = -1

        def step(frame: FrameType, event: str, _argument: Any) -> Any:
            nonlocal previous
            if event == "opcode":
                opcode = code[frame.f_lasti]
                if opcode in _JUMPS or (previous in _CALLS and opcode not in _NOT_BEFORE):
                    self.place(frame)
                previous = opcode
            return step

        return step


def run(program: Program, ctrl_c: CtrlC) -> BaseException | None:
    """Run a program with a Ctrl-C in it, and give what `trio.run` raises. A program that hangs is an error of Trio's."""

    async def bound() -> None:
        await trio.sleep(24 * HOUR)
        raise AssertionError(f"hangs after Ctrl-C at {ctrl_c.where}")

    async def watched() -> None:
        trio.lowlevel.spawn_system_task(bound)
        # Opcode events need the attribute in place before settrace (CPython 3.12 and later).
        sys._getframe().f_trace_opcodes = True
        before = sys.gettrace()
        sys.settrace(ctrl_c.entered)
        try:
            await program()
        finally:
            sys.settrace(before)

    try:
        trio.run(watched, clock=trio.testing.MockClock(autojump_threshold=0))
    except BaseException as exc:
        return exc
    return None


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """Collect warnings, and what Python could not raise and only prints."""
    said: list[str] = []
    before = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: said.append(f"{unraisable.err_msg}: {unraisable.exc_value!r}")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
            gc.collect()
            said += [str(one.message) for one in caught]
    finally:
        sys.unraisablehook = before


@pytest.fixture(autouse=True)
def _python_handles_sigint() -> Iterator[None]:
    # A shell's `&` starts this process with SIGINT ignored, and then Trio installs no handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_everywhere(program: Program, *, protected: bool = False) -> None:
    """Interrupt the places of a program in turn, each in a run of its own; fail unless each run ends as it should."""
    run(program, CtrlC(None))  # imports and caches that only the first run meets
    counted = CtrlC(None, protected=protected)
    assert run(program, counted) is None
    stride = (PROTECTED_STRIDE if protected else STRIDE) * SPARSE.get(program, 1)
    faults: list[str] = []
    tried = 0
    gc.collect()
    gc.freeze()
    # Hypothesis has a callback of the garbage collector, which runs inside of any program, and Python drops what is
    # raised there. Each run is collected behind it, in `complaints`.
    gc.disable()
    try:
        for n in range(random.randrange(stride), counted.places, stride):
            ctrl_c = CtrlC(n, protected=protected)
            opened.clear()
            with complaints() as said:
                raised = run(program, ctrl_c)
                kind = None if raised is None else type(raised)
                text = repr(raised)
                del raised
            if not ctrl_c.where:
                continue  # runs differ by a few places: keys and jitter are random
            tried += 1
            said += [f"{store} is still owned" for store in opened if store._owned]
            if kind is not KeyboardInterrupt or said:
                faults.append(f"place {n}, {ctrl_c.where}: {text}, {said}")
    finally:
        gc.enable()
        gc.unfreeze()
    print(f"{program.__name__}: {counted.places} places, {tried} interrupted, {len(faults)} faults")
    assert tried, "the program has too few places"
    assert not faults, "\n".join(faults)


# ---- the programs --------------------------------------------------------------------------------------------------


opened: list[MemoryCursorStore] = []
"""The stores of the run; none of them has an owner when the run has ended."""


async def receive_and_leave() -> None:
    opened.append(MemoryCursorStore())
    async with (
        open_simulated_kadoa() as kadoa,
        open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=opened[-1], repair_gaps=True) as realtime,
    ):
        await kadoa.wait_subscribed(1)
        kadoa.publish_many(4)
        async for _event in realtime.events:
            break
        async with realtime.events.delivery() as delivery:
            assert delivery.attempt == 1
        async with realtime.events.clone() as events:
            await events.receive()
        with realtime.events.clone() as events:
            events.receive_nowait()
        await realtime.wait_live()
        realtime.statistics()
        realtime.stop()


async def ask_the_api() -> None:
    async with (
        open_simulated_kadoa() as kadoa,
        open_notifications(kadoa.api_key, endpoints=kadoa.endpoints) as notifications,
        open_forwarder("http://127.0.0.1:1/hook"),
    ):
        with kadoa.suffering(api_status=None), kadoa.as_default():
            await notifications.channels()


async def leave_with_an_error() -> None:
    with contextlib.suppress(ValueError):
        async with open_simulated_kadoa() as kadoa, open_realtime(kadoa.api_key, endpoints=kadoa.endpoints):
            raise ValueError("the body's own")


async def diagnose_all() -> None:
    async with open_simulated_kadoa() as kadoa:
        found = await diagnose(kadoa.api_key, endpoints=kadoa.endpoints)
        assert found.ok


async def consume_in_every_shape() -> None:
    opened.append(MemoryCursorStore())
    failures = 2

    async def handle(_event: Event) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise ValueError("the handler's own")

    async with (
        open_simulated_kadoa() as kadoa,
        open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=opened[-1]) as realtime,
    ):
        await kadoa.wait_subscribed(1)
        kadoa.publish_many(6)
        async with realtime.events.batch(max_events=2, within=1) as batch:
            batch.settle(batch.events[0])
        async for delivery in realtime.events.deliveries():
            async with delivery:
                delivery.retry(after=0.1)
            break
        realtime.health()
        await trio.sleep(1)
        realtime.stop(retry_within=60)
        done = await process(realtime.events, handle, workers=2, key=lambda event: event.type)
        assert done.handled == 4


SPARSE = {consume_in_every_shape: 5}
"""Programs that take long, and so are interrupted at fewer places: one in so many of the others'."""
PROGRAMS = [receive_and_leave, ask_the_api, leave_with_an_error, diagnose_all, consume_in_every_shape]


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_anywhere_ends_the_program_and_leaves_nothing_behind(program: Program) -> None:
    interrupt_everywhere(program)


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_in_a_protected_frame_ends_the_program_too(program: Program) -> None:
    interrupt_everywhere(program, protected=True)


# ---- leaving, beyond the places of code ------------------------------------------------------------------------------


class InterruptedSession:
    """A session of a store in memory during whose last calls Ctrl-C is pressed."""

    def __init__(self, inner: Any, during: str) -> None:
        self.inner, self.during = inner, during
        self.leaving = False
        self.done: list[str] = []

    async def _call(self, name: str, *arguments: Any) -> Any:
        if self.leaving and name == self.during:
            signal.raise_signal(signal.SIGINT)
            await trio.lowlevel.checkpoint()
        answer = await getattr(self.inner, name)(*arguments)
        if self.leaving:
            self.done.append(name)
        return answer

    async def load(self) -> Position | None:
        return await self._call("load")

    async def save(self, position: Position) -> None:
        await self._call("save", position)

    async def aclose(self) -> None:
        await self._call("aclose")


@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize("during", ["save", "aclose"])
def test_ctrl_c_during_the_last_save_neither_skips_it_nor_leaves_an_owner(during: str, restrict: bool) -> None:
    store = MemoryCursorStore()
    sessions: list[InterruptedSession] = []
    sent: list[PublishedEvent] = []

    class Store:
        async def open(self, team: str, consumer: str) -> CursorSession:
            sessions.append(InterruptedSession(await store.open(team, consumer), during))
            return sessions[0]

    async def main() -> None:
        async with (
            open_simulated_kadoa() as kadoa,
            open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=Store()) as realtime,
        ):
            await kadoa.wait_subscribed(1)
            sent.extend(kadoa.publish_many(3))
            for _ in sent:
                await realtime.events.receive()
            realtime.events.settle()
            sessions[0].leaving = True

    clock = trio.testing.MockClock(autojump_threshold=0)
    with pytest.raises(KeyboardInterrupt):
        trio.run(main, clock=clock, restrict_keyboard_interrupt_to_checkpoints=restrict)
    assert sessions[0].done == ["save", "aclose"]
    assert not store._owned
    position = store.position()
    assert position is not None
    assert position.cursor == sent[-1].cursor


@pytest.mark.parametrize("restrict", [False, True])
def test_ctrl_c_together_with_a_failure_of_the_start_is_no_internal_error(restrict: bool) -> None:
    class Store:
        async def open(self, team: str, consumer: str) -> CursorSession:
            signal.raise_signal(signal.SIGINT)
            raise ConsumerOwnedError("another client owns it")

    async def main() -> None:
        async with (
            open_simulated_kadoa() as kadoa,
            open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=Store()),
        ):
            raise AssertionError("it was opened")

    clock = trio.testing.MockClock(autojump_threshold=0)
    with pytest.raises(KeyboardInterrupt):
        trio.run(main, clock=clock, restrict_keyboard_interrupt_to_checkpoints=restrict)


async def test_clean_up_raises_what_it_meets_and_ends_by_its_deadline(autojump_clock: Any) -> None:
    async def fails() -> None:
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        await clean_up(trio.current_time() + 1, fails)
    with trio.CancelScope() as scope:
        scope.cancel()
        await clean_up(trio.current_time() + 5, trio.sleep_forever)
        assert trio.current_time() == 5
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


# ---- every context manager is one of these ---------------------------------------------------------------------------


def context_managers() -> Iterator[tuple[str, Any]]:
    """Walk the public API: give each function that returns a context manager, and each method of one."""
    for module in (kadoa_trio, kadoa_trio.consuming, kadoa_trio.workspace, kadoa_trio.testing):
        for name in module.__all__:
            one = getattr(module, name)
            if inspect.isfunction(one):
                yield name, one
            elif inspect.isclass(one):
                for attribute in dir(one):
                    yield f"{name}.{attribute}", inspect.getattr_static(one, attribute)


def protected(function: Any) -> bool:
    """Tell whether Trio protects the code of *function* from KeyboardInterrupt."""
    return any(
        ref() is function.__code__ and status for ref, status in _ki._CODE_KI_PROTECTION_STATUS_WMAP._data.items()
    )


def test_every_public_context_manager_is_protected() -> None:
    of_generators, methods = set(), set()
    ours = {async_context(_yields).__code__, sync_context(_yields).__code__}  # type: ignore[attr-defined,arg-type]
    for name, one in context_managers():
        if not inspect.isfunction(one):
            continue
        inner = inspect.unwrap(one)
        if inspect.isasyncgenfunction(inner) or inspect.isgeneratorfunction(inner):
            assert one.__code__ in ours, f"{name} is a context manager of contextlib, which is not protected"
            of_generators.add(name)
        elif name.endswith(("__aexit__", "__exit__")):
            assert protected(one), f"{name} is not protected"
            methods.add(name)
    assert of_generators == {
        "open_realtime", "open_notifications", "open_forwarder", "open_simulated_kadoa", "stopping_on_signals",
        "SimulatedKadoa.suffering", "SimulatedKadoa.as_default",
    }  # fmt: skip
    assert methods == {"Batch.__aexit__", "Delivery.__aexit__", "EventChannel.__aexit__", "EventChannel.__exit__"}


async def _yields() -> AsyncIterator[int]:
    yield 1


# ---- the decorators themselves ---------------------------------------------------------------------------------------


async def test_context_is_entered_and_left_as_contextlibs_is() -> None:
    seen: list[object] = []

    @async_context
    async def one(value: int) -> AsyncIterator[int]:
        try:
            yield value
        except KeyError as exc:
            seen.append(exc)
        finally:
            await trio.lowlevel.checkpoint()
            seen.append("left")

    async with one(1) as value:
        assert value == 1
    async with one(2):
        raise KeyError("handled")
    assert [type(item) for item in seen] == [str, KeyError, str]
    for error in (ValueError("a"), StopAsyncIteration("b"), StopIteration("c"), RuntimeError("d"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            async with one(3):
                raise error
        assert caught.value is error
    manager = one(4)
    async with manager:
        pass
    with pytest.raises(RuntimeError, match="entered once"):
        await manager.__aenter__()
    with pytest.raises(RuntimeError, match="left twice"):
        await manager.__aexit__(None, None, None)


async def test_generator_that_does_not_yield_once_is_an_error() -> None:
    @async_context
    async def never() -> AsyncIterator[int]:
        if not trio.current_time():
            yield 1

    @async_context
    async def twice() -> AsyncIterator[int]:
        yield 1
        yield 2

    with pytest.raises(RuntimeError, match="did not yield"):
        async with never():
            pass
    with pytest.raises(RuntimeError, match="yielded twice"):
        async with twice():
            pass
    with pytest.raises(ValueError, match="mine"):
        async with failing():
            pass


@async_context
async def failing() -> AsyncIterator[int]:
    raise ValueError("mine")
    yield 1


async def test_traceback_of_an_exception_keeps_no_generator() -> None:
    generators: list[weakref.ref[Any]] = []

    @async_context
    async def one() -> AsyncIterator[None]:
        await trio.lowlevel.checkpoint()
        try:
            yield
        except KeyError:
            raise ValueError("instead") from None

    @async_context
    async def outer() -> AsyncIterator[None]:
        async with one():
            yield

    for entering in (one, outer):
        manager = entering()
        generators.append(weakref.ref(manager._generator))  # type: ignore[attr-defined]
        caught: BaseException | None = None
        try:
            async with manager:
                raise KeyError
        except ValueError as exc:
            caught = exc
        assert caught is not None
        assert generators[-1]() is None
