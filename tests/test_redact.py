"""Secrets show nothing, and foreign text is made safe: in one line, printable, short."""

from __future__ import annotations

import copy
import enum
import pickle
import types
import typing
from datetime import UTC, datetime
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kadoa_trio.notices
from kadoa_trio import CursorStoreError, FailedForward, Gap, GapReason, MemoryCursorStore, Position, open_realtime
from kadoa_trio._redact import Secret, censor, presentable
from kadoa_trio.cli._output import say
from kadoa_trio.notices import Notice
from kadoa_trio.testing import open_simulated_kadoa

VALUE = "hush-hush/secret word+é"
HOSTILE = "\x1b]0;owned\x07\r\nkadoa-trio: connection 9: live\u202e\u2028\x00" * 20_000


# --- the type ---


def test_secret_shows_nothing() -> None:
    secret = Secret(VALUE)
    for shown in (repr(secret), str(secret), f"{secret}", f"{secret:>40}", "%s %r" % (secret, secret), repr([secret])):  # noqa: UP031
        assert "hush" not in shown
    assert secret.reveal() == VALUE
    assert not hasattr(secret, "__dict__")


def test_secret_cannot_be_pickled_or_copied() -> None:
    for function in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            function(Secret(VALUE))


def test_secrets_are_equal_by_value() -> None:
    assert Secret("a") == Secret("a", "other spelling")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a")}) == 1


@pytest.mark.parametrize(
    "echo",
    [
        "hush-hush/secret word+é",
        "hush-hush%2Fsecret%20word%2B%C3%A9",
        "hush-hush%2fsecret%20word%2b%c3%a9",
        "hush-hush/secret%20word+%C3%A9",
        "hush-hush%2Fsecret+word%2B%C3%A9",
        "hush-hush/secret word+\\u00e9",
        "hush-hush/secret word+\\xc3\\xa9",
        "hush-hush/secret word+\u00c3\u00a9",
    ],
)
def test_every_spelling_of_a_secret_is_replaced(echo: str) -> None:
    assert censor(f"before {echo} after", Secret(VALUE)) == "before [secret] after"


def test_secret_given_encoded_is_replaced_decoded() -> None:
    assert censor("is <my key> known?", Secret("my%20key")) == "is <[secret]> known?"


def test_value_of_fewer_than_4_characters_is_not_replaced() -> None:
    assert censor("a bad day for abcd", Secret("", "a", "bad", "abcd")) == "a bad day for [secret]"
    assert censor("a bad day", Secret("a"), Secret("bad")) == "a bad day"


@given(st.text(), st.text(min_size=4), st.text())
def test_no_secret_survives(before: str, value: str, after: str) -> None:
    if value not in "[secret]" and "\0" not in value:
        assert value not in censor(before + value + after, Secret(value)).replace("[secret]", "\0")


# --- foreign text ---


@given(st.text(), st.integers(1, 50))
def test_presentable_text_is_one_printable_line_of_bounded_length(text: str, limit: int) -> None:
    shown = presentable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit


def build(kind: Any, texts: str) -> Any:
    """Make a value of an annotated type, with *texts* for every string in it."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = [one for one in typing.get_args(kind) if one is not type(None)]
        return build(str if str in options else options[0], texts)
    if origin in (tuple, list, frozenset):
        return origin([build(typing.get_args(kind)[0], texts)] * 2)
    if kind is str:
        return texts
    if kind is datetime:
        return datetime(2026, 11, 24, tzinfo=UTC)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(iter(kind))
    if kind in (bool, int, float):
        return kind(1)
    if attrs.has(kind):
        return build_attrs(kind, texts)
    raise AssertionError(f"how is a {kind} made? A new kind of field needs a line here")


def build_attrs(kind: Any, texts: str) -> Any:
    hints = typing.get_type_hints(kind)
    return kind(**{field.alias: build(hints[field.name], texts) for field in attrs.fields(kind) if field.init})


def kinds_of_notices() -> list[type[Notice]]:
    found: list[type[Notice]] = []
    waiting: list[type[Notice]] = [Notice]
    while waiting:
        one = waiting.pop()
        waiting += one.__subclasses__()
        # Classes with slots are made twice; the first one is of no module any more.
        if vars(kadoa_trio.notices).get(one.__name__) is one:
            found.append(one)
    return sorted(found, key=lambda one: one.__name__)


def test_notices_are_found() -> None:
    assert {"Lost", "Resumed", "FrameIgnored", "CursorDropped"} <= {one.__name__ for one in kinds_of_notices()}


@pytest.mark.parametrize("kind", kinds_of_notices(), ids=lambda kind: kind.__name__)
def test_text_of_a_notice_is_one_printable_line_of_bounded_length(kind: type[Notice]) -> None:
    shown = str(build_attrs(kind, HOSTILE))
    assert shown.isprintable()
    assert len(shown) <= 1_000


def test_failed_forward_is_one_printable_line_of_bounded_length() -> None:
    shown = str(build_attrs(FailedForward, HOSTILE))
    assert shown.isprintable()
    assert len(shown) <= 1_000


def test_built_values_hold_the_hostile_text() -> None:
    gap = build_attrs(Gap, HOSTILE)
    assert gap.cursor == HOSTILE
    assert gap.reason is next(iter(GapReason))


async def test_refused_consumer_is_named_in_one_printable_line() -> None:
    store = MemoryCursorStore()
    await store.open(HOSTILE, "default")
    with pytest.raises(Exception, match="another client in this process") as caught:
        await store.open(HOSTILE, "default")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1_000


async def test_team_of_a_saved_position_is_named_in_one_printable_line(autojump_clock: Any) -> None:
    async with open_simulated_kadoa() as kadoa:
        store = MemoryCursorStore()
        session = await store.open(kadoa.team_id, "default")
        await session.save(Position(team=HOSTILE, cursor="1-0"))
        await session.aclose()
        with pytest.raises(CursorStoreError, match="owned") as caught:
            async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, cursor_store=store):
                pass
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1_000


def test_command_prints_one_printable_line_of_bounded_length(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    said = capsys.readouterr().err
    assert said.endswith("\n")
    assert said[:-1].isprintable()
    assert len(said) < 2_100
