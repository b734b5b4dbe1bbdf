"""Options: a value that cannot be used is refused before anything is sent, with what was given and what is wanted."""

from __future__ import annotations

import asyncio
import decimal
import inspect
import math
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from kadoa_trio import (
    ConfigurationError,
    Endpoints,
    Limits,
    MemoryCursorStore,
    Position,
    RetryPolicy,
    SQLiteCursorStore,
    Timeouts,
    open_forwarder,
    open_realtime,
)
from kadoa_trio._checks import check_text
from kadoa_trio.testing import SimulatedKadoa, open_simulated_kadoa
from kadoa_trio.workspace import diagnose, open_notifications

KEY = "key-0123456789"
SECRET = "hunter2-hunter2-hunter2"


class Number:
    """A number as numpy has them: it converts to int and float, and is neither."""

    def __int__(self) -> int:
        return 30

    def __index__(self) -> int:
        return 30

    def __float__(self) -> float:
        return 30.0


class Wordless:
    """An object whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


NOT_OBJECTS = [5, 0, 1.5, True, "text", SECRET, b"bytes", [], {}, object(), Wordless(), Number(), float("nan"), open]
NOT_FLAGS = [0, 1, None, "no", "", "True", b"", [], object(), Wordless(), math.nan]
NOT_TEXTS = ["", b"text", 5, True, 1.5, [], ["text"], object(), Wordless(), "\ud800", Path("text")]
NOT_PATHS = ["\ud800", "", b"text", 5, True, 1.5, [], object(), Wordless(), "nul\0", MemoryCursorStore]
NOT_COLLECTIONS = [
    ["\ud800"],
    "workflow_failed",
    b"bytes",
    5,
    True,
    [],
    {},
    [""],
    [5],
    [None],
    [[]],
    [b"bytes"],
    object(),
    Wordless(),
]
NOT_NUMBERS = [
    0, -1, -0.0, math.nan, -math.inf, True, False, "30", b"30", None, [], Number(), decimal.Decimal(30), 1j, 10**400,
    -(10**5000), object(), Wordless(),
]  # fmt: skip


async def _coroutine(_notice: object) -> None:
    """An async function, where a plain one is wanted."""


WRONG: dict[str, list[Any]] = {
    "api_key": ["", b"key-0123456789", 5, True, [], object(), Wordless(), "line\n", " key", "schlüssel", "\ud800"],
    "endpoints": [
        *NOT_OBJECTS,
        "http://x",
        Endpoints,
        Endpoints(public_api="http://api.example"),
        Endpoints(websocket="ws://realtime.example"),
        Endpoints(public_api=f"https://user:{SECRET}@api.example"),
        Endpoints(websocket=f"wss://realtime.example?access_token={SECRET}"),
        Endpoints(websocket="https://realtime.example"),
        Endpoints(public_api=""),
        Endpoints(public_api=b"https://api.example"),  # type: ignore[arg-type]
        Endpoints(realtime_api=5),  # type: ignore[arg-type]
        Endpoints(websocket=None),  # type: ignore[arg-type]
        Endpoints(public_api="https://api.example:port"),
        Endpoints(public_api="https://api.example:0"),
        Endpoints(public_api="https://api example"),
        Endpoints(public_api=" https://api.example"),
        Endpoints(public_api="https://api.example "),
        Endpoints(websocket="wss://realtime.example/line\n"),
        Endpoints(network=object()),  # type: ignore[arg-type]
        Endpoints(network="memory"),  # type: ignore[arg-type]
    ],
    "event_types": NOT_COLLECTIONS,
    "workflow_ids": NOT_COLLECTIONS,
    "timeouts": [*NOT_OBJECTS, 30, Timeouts, Limits(), {"heartbeat": 30}],
    "limits": [*NOT_OBJECTS, 30, Limits, Timeouts(), {"unsettled": 30}],
    "retry": [*NOT_OBJECTS, 3, RetryPolicy, Timeouts()],
    "redelivery": [*NOT_OBJECTS, 3, RetryPolicy, Timeouts()],
    "on_notice": [1, "print", [], _coroutine],
    "resume_from": ["", b"1-0", 5, True, 1.5, [], object(), Wordless(), Position, Position(cursor=""), Path("1-0")],
    "cursor_store": [*NOT_PATHS, SQLiteCursorStore, MemoryCursorStore],
    "consumer": [*NOT_TEXTS, None],
    "acknowledge": NOT_FLAGS,
    "repair_gaps": NOT_FLAGS,
    "ssl_context": [*NOT_OBJECTS, "cert.pem", ssl.SSLContext, False],
    "allow_insecure": NOT_FLAGS,
}
"""Values that no option of `open_realtime` can have, for each of its parameters."""


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{place}-{type(value).__name__}")
        for name, values in table.items()
        for place, value in enumerate(values)
    ]


def check(error: ConfigurationError, name: str, value: Any) -> None:
    """The error names the option, is short, shows what was given, and no text that may be a secret."""
    text = str(error)
    name = name.replace("endpoints", "endpoint").replace("_", " ").lower()
    assert name in text.replace("_", " ").lower(), text
    assert len(text) < 300
    assert SECRET not in text
    if not isinstance(value, (str, Endpoints, Position, list, dict)):
        given = "None" if value is None else value.__name__ if isinstance(value, type) else type(value).__name__
        assert given in text, text
    assert error.__context__ is None or isinstance(error.__context__, ValueError)


def test_table_has_every_parameter() -> None:
    assert set(WRONG) == set(inspect.signature(open_realtime).parameters)
    assert len(WRONG) == 16


@pytest.mark.parametrize(("name", "value"), cases(WRONG))
async def test_value_that_an_option_cannot_have_is_refused(autojump_clock: Any, name: str, value: Any) -> None:
    options: dict[str, Any] = {"api_key": KEY, name: value}
    with pytest.raises(ConfigurationError) as caught:
        async with open_realtime(**options):
            pytest.fail("it opened")
    check(caught.value, name, value)


@pytest.mark.parametrize("kind", [Timeouts, Limits, RetryPolicy])
def test_field_refuses_what_is_no_number(kind: type) -> None:
    for field in attrs.fields(kind):
        for value in NOT_NUMBERS:
            with pytest.raises(ConfigurationError) as caught:
                kind(**{field.name: value})
            check(caught.value, f"{kind.__name__}.{field.name}", value)


def test_fields_that_may_be_unlimited() -> None:
    unlimited = set()
    for kind in (Timeouts, Limits, RetryPolicy):
        for field in attrs.fields(kind):
            try:
                kind(**{field.name: math.inf})
            except ConfigurationError as exc:
                assert "inf (float)" in str(exc)  # noqa: PT017  # most of the fields
            else:
                unlimited.add(f"{kind.__name__}.{field.name}")
    assert unlimited == {"Timeouts.connect", "Timeouts.auth_grace", "Timeouts.overlap", "Timeouts.max_age"}


def test_fields_have_a_documented_default() -> None:
    for kind in (Timeouts, Limits, RetryPolicy):
        source = inspect.getsource(kind)
        for field in attrs.fields(kind):
            text = source.split(f"    {field.name}: ")[1].split('"""')[1]
            assert "Default" in text, field.name


@pytest.mark.parametrize("make", [str, Path])
async def test_path_as_cursor_store_means_an_sqlite_store(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    path = tmp_path / "positions.db"
    async with open_simulated_kadoa() as kadoa:
        async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=make(path)) as realtime:
            await kadoa.wait_subscribed(1)
            published = kadoa.publish()
            async for event in realtime.events:
                assert event.id == published.id
                break
            realtime.events.settle()
        assert path.exists()
        async with open_realtime(
            kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=SQLiteCursorStore(path)
        ) as realtime:
            assert realtime.position.cursor is not None


# ---- the other entries ---------------------------------------------------------------------------------------------

OF_FORWARDER: dict[str, list[Any]] = {
    "url": [
        "",
        "http://local host",
        "http://localhost/line\n",
        "http://localhost:0",
        "ftp://localhost",
        "http://",
        b"http://localhost",
        5,
        None,
        object(),
        Wordless(),
        f"http://u:{SECRET}@localhost",
    ],
    "timeout": NOT_NUMBERS,
    "retry": WRONG["retry"],
    "max_attempts": [one for one in NOT_NUMBERS if one is not None] + [1.5, math.inf],
    "dead_letters": [one for one in NOT_PATHS if one is not None],
    "on_failure": ["print", 5, True, object(), Wordless(), []],
    "ssl_context": WRONG["ssl_context"],
}
OF_NOTIFICATIONS = {name: WRONG[name] for name in ("api_key", "endpoints", "ssl_context", "allow_insecure")}
OF_DIAGNOSE: dict[str, list[Any]] = {
    "endpoints": WRONG["endpoints"],
    "test_event": NOT_TEXTS,
    "workflow_id": NOT_TEXTS,
    "heartbeat_timeout": NOT_NUMBERS,
    "event_timeout": NOT_NUMBERS,
    "on_step": OF_FORWARDER["on_failure"],
    "ssl_context": WRONG["ssl_context"],
    "allow_insecure": NOT_FLAGS,
}
OF_STORE: dict[str, list[Any]] = {"path": [*NOT_PATHS, None], "take_over": NOT_FLAGS}


@pytest.mark.parametrize(("name", "value"), cases(OF_FORWARDER))
async def test_value_that_a_forwarder_cannot_have_is_refused(name: str, value: Any) -> None:
    options: dict[str, Any] = {"url": "http://localhost/hook", "dead_letters": "letters.jsonl", name: value}
    with pytest.raises(ConfigurationError) as caught:
        async with open_forwarder(**options):
            pytest.fail("it opened")
    check(caught.value, "endpoint to forward to" if name == "url" else name, value)


@pytest.mark.parametrize(("name", "value"), cases(OF_NOTIFICATIONS))
async def test_value_that_notifications_cannot_have_is_refused(name: str, value: Any) -> None:
    options: dict[str, Any] = {"api_key": KEY, name: value}
    with pytest.raises(ConfigurationError) as caught:
        async with open_notifications(**options):
            pytest.fail("it opened")
    check(caught.value, name, value)


@pytest.mark.parametrize(("name", "value"), cases(OF_DIAGNOSE))
async def test_value_that_a_diagnosis_cannot_have_is_refused(name: str, value: Any) -> None:
    options: dict[str, Any] = {"api_key": KEY, name: value}
    with pytest.raises(ConfigurationError) as caught:
        await diagnose(**options)
    check(caught.value, name, value)


@pytest.mark.parametrize("value", WRONG["api_key"], ids=lambda value: type(value).__name__)
async def test_key_that_a_diagnosis_cannot_use_is_its_first_failure(autojump_clock: Any, value: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        diagnosis = await diagnose(value, endpoints=kadoa.endpoints)
    assert diagnosis.first_failure is not None
    assert diagnosis.first_failure.name == "key"


@pytest.mark.parametrize(("name", "value"), cases(OF_STORE))
def test_value_that_a_store_cannot_have_is_refused(name: str, value: Any) -> None:
    options: dict[str, Any] = {"path": "positions.db", name: value}
    with pytest.raises(ConfigurationError) as caught:
        SQLiteCursorStore(**options)
    check(caught.value, name, value)


# ---- outside of Trio -----------------------------------------------------------------------------------------------


async def use_realtime() -> None:
    async with open_realtime(KEY):
        pytest.fail("it opened")


async def use_forwarder() -> None:
    async with open_forwarder("http://localhost/hook"):
        pytest.fail("it opened")


async def use_notifications() -> None:
    async with open_notifications(KEY):
        pytest.fail("it opened")


async def use_diagnose() -> None:
    await diagnose(KEY)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (use_realtime, "open_realtime"),
        (use_forwarder, "open_forwarder"),
        (use_notifications, "open_notifications"),
        (use_diagnose, "diagnose"),
    ],
)
@pytest.mark.parametrize("loop", ["asyncio", "none"])
def test_without_trio_the_error_says_what_is_needed(use: Callable[[], Awaitable[None]], name: str, loop: str) -> None:
    def run() -> None:
        if loop == "asyncio":
            asyncio.run(use())  # type: ignore[arg-type]
        else:
            use().send(None)  # type: ignore[attr-defined]

    with pytest.raises(RuntimeError, match=rf"{name} needs Trio.*trio\.run.*asyncio") as caught:
        run()
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Timeouts(heartbeat=0),
            r"Timeouts\.heartbeat must be a positive, finite number of seconds, not 0 \(int\)",
        ),
        (lambda: Timeouts(heartbeat=float("nan")), r"Timeouts\.heartbeat .*, not nan \(float\)"),
        (
            lambda: Limits(buffered_events=0),
            r"Limits\.buffered_events must be a whole number from 1 to .*, not 0 \(int\)",
        ),
        (lambda: Limits(dedupe_window=10), r"Limits\.dedupe_window \(10\) must be at least .* \(11000\)"),
        (lambda: RetryPolicy(attempts_per_minute=0), r"RetryPolicy\.attempts_per_minute must be a whole number"),
    ],
)
def test_number_that_cannot_work_is_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        make()


def test_empty_text_is_called_empty() -> None:
    with pytest.raises(ConfigurationError, match=r"^consumer must not be empty$"):
        check_text("consumer", "")


# ---- the endpoints of a simulated Kadoa ----------------------------------------------------------------------------


async def test_default_endpoints_apply_to_their_task_and_to_tasks_started_inside_the_block() -> None:
    found: dict[str, Endpoints] = {}
    ready, done = trio.Event(), trio.Event()

    async def read(name: str) -> None:
        await ready.wait()
        found[name] = Endpoints.from_environment()

    def block(kadoa: SimulatedKadoa, name: str) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            with kadoa.as_default():
                await ready.wait()
                found[name] = Endpoints.from_environment()
                await done.wait()

        return run

    async with open_simulated_kadoa() as one, open_simulated_kadoa() as other, trio.open_nursery() as nursery:
        nursery.start_soon(read, "before")
        with one.as_default():
            nursery.start_soon(read, "inside")
            nursery.start_soon(block(other, "beside"))
            await trio.testing.wait_all_tasks_blocked()
            ready.set()
            await trio.testing.wait_all_tasks_blocked()
            assert Endpoints.from_environment() is one.endpoints
            found["thread"] = await trio.to_thread.run_sync(Endpoints.from_environment)
            done.set()
            await trio.testing.wait_all_tasks_blocked()
        assert found["inside"] is found["thread"] is one.endpoints
        assert found["beside"] is other.endpoints
        assert found["before"].network is None
