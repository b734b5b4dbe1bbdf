"""The filter of frames against wsproto alone: the same messages, pings, pongs, closes and faults, in the same order."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage

from kadoa_trio._net._frames import (
    FRAMES_AT_ONCE,
    MESSAGES_AT_ONCE,
    FrameFilter,
    Passed,
    Refused,
    RefusedBecause,
)

MAX = 200_000
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(
    payload: bytes, opcode: int = TEXT, *, final: bool = True, bits: int = 0, mask: bool = False, long: int = 0
) -> bytes:
    """Build a frame, also one that breaks the protocol; *long* is the number of bytes of its length."""
    size = len(payload)
    long = long or (0 if size < 126 else 2 if size < 1 << 16 else 8)
    head = {0: bytes([size & 0x7F]), 2: struct.pack("!BH", 126, size & 0xFFFF), 8: struct.pack("!BQ", 127, size)}[long]
    masked = bytes([head[0] | (0x80 if mask else 0)]) + head[1:] + (b"\0\0\0\0" if mask else b"")
    return bytes([(0x80 if final else 0) | bits | opcode]) + masked + payload


class Library:
    """wsproto's side of a client, and what it has reported: each whole message in one piece, then what ends it."""

    def __init__(self) -> None:
        self._connection = Connection(ConnectionType.CLIENT)
        self._parts: list[Any] = []
        self.said: list[object] = []
        self.messages = 0
        self.over = False

    def receive(self, data: bytes | bytearray) -> None:
        if self.over:
            return
        self._connection.receive_data(bytes(data))
        for one in self._connection.events():
            if isinstance(one, TextMessage | BytesMessage):
                self._parts.append(one.data)
                if one.message_finished:
                    self.said.append(type(one.data)().join(self._parts))
                    self._parts = []
                    self.messages += 1
            elif isinstance(one, Ping | Pong):
                self.said.append((type(one), bytes(one.payload)))
            else:
                assert isinstance(one, CloseConnection)
                self.said.append((CloseConnection, one.code, one.reason))
                self.over = True


def alone(chunks: Iterable[bytes]) -> list[object]:
    library = Library()
    for chunk in chunks:
        library.receive(chunk)
    return library.said


def filtered(chunks: Iterable[bytes | bytearray], max_message_size: int = MAX) -> tuple[list[object], int]:
    """Give what filter and library report together, and how many messages the filter took."""
    one, library, taken = FrameFilter(max_message_size), Library(), 0
    for chunk in chunks:
        one.feed(chunk)
        while (piece := one.take()) is not None:
            if isinstance(piece, list):
                assert 0 < len(piece) <= MESSAGES_AT_ONCE
                assert not library.over
                assert all(type(message) in (str, bytes) for message in piece)
                library.said.extend(piece)
                taken += len(piece)
            elif isinstance(piece, Passed):
                assert piece.data
                before = library.messages
                library.receive(piece.data)
                if library.messages - before != piece.completes:
                    # The library has failed, such as at a fragment that is not UTF-8. It brings no message any more, and
                    # the reader waits for one before it takes what follows.
                    assert library.over
                    if piece.completes:
                        return library.said, taken
            else:
                library.said.append(piece.reason)
    return library.said, taken


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    bounds = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds) if end > start]


sizes = st.sampled_from([0, 1, 124, 125, 126, 127]) | st.integers(0, 300)
texts = st.builds(lambda unit, size: (unit * size)[:size], st.text(min_size=1, max_size=9), sizes).map(str.encode)
noise = st.binary(max_size=20)


@st.composite
def fragmented(draw: st.DrawFn) -> bytes:
    """A message in fragments, which may be cut inside of a character, with control frames between them."""
    opcode = draw(st.sampled_from([TEXT, BINARY]))
    whole = draw(texts) + draw(
        st.just(b"") | st.sampled_from([b"\xff", b"\xc3", b"\xe2\x82"])
        if draw(st.integers(0, 5)) == 0
        else st.just(b"")
    )
    parts = cut(whole, draw(st.lists(st.integers(0, 600), max_size=4))) or [b""]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), b"")
    out = bytearray()
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        out += frame(part, opcode if number == 0 else 0, final=last)
        if not last and draw(st.integers(0, 2)) == 0:
            out += frame(draw(noise), draw(st.sampled_from([PING, PONG])))
    return bytes(out)


good = st.one_of(
    texts.map(frame),
    texts.map(frame),
    st.binary(max_size=300).map(lambda data: frame(data, BINARY)),
    noise.map(lambda data: frame(data, PING)),
    noise.map(lambda data: frame(data, PONG)),
    fragmented(),
)
bad = st.one_of(
    st.builds(frame, noise, st.integers(0, 15), final=st.booleans(), bits=st.sampled_from([0, 0x10, 0x20, 0x40, 0x70])),
    st.builds(frame, noise, st.sampled_from([TEXT, BINARY, PING]), mask=st.just(True)),
    st.builds(frame, noise, st.sampled_from([TEXT, BINARY, PONG, 0]), long=st.sampled_from([2, 8])),
    st.just(frame(b"x" * 200, PING)),
    st.just(b"\x81\x7f\xff\xff\xff\xff\xff\xff\xff\xff"),
    st.sampled_from([b"\xff", b"abc\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"]).map(frame),
    st.binary(min_size=1, max_size=30),
    st.builds(lambda code, reason: frame(struct.pack("!H", code) + reason, CLOSE), st.integers(0, 5000), noise),
    noise.map(lambda data: frame(data, CLOSE)),
)


@st.composite
def feeds(draw: st.DrawFn) -> bytes:
    frames = draw(st.lists(good, max_size=12))
    if draw(st.booleans()):
        frames.insert(draw(st.integers(0, len(frames))), draw(bad))
    data = b"".join(frames)
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 3)) == 0 else data


@settings(max_examples=400, deadline=None)
@given(feeds(), st.lists(st.integers(0, 1 << 20), max_size=20), st.booleans())
@example(frame(b"a") + frame(b"\xff") + frame(b"b"), [], False)
@example(frame(b"a", final=False) + frame(b"b", PING) + frame(b"c", 0) + frame(b"d"), [1, 3, 4], True)
def test_filter_and_library_report_what_the_library_alone_does(data: bytes, places: list[int], array: bool) -> None:
    chunks = cut(data, places)
    said, taken = filtered([bytearray(chunk) for chunk in chunks] if array else chunks)
    event(f"taken: {min(taken, 3)}, all: {min(len(said), 3)}")
    expected = alone(chunks)
    if said and said[-1] is RefusedBecause.TOO_LARGE:
        assert said[:-1] == expected[: len(said) - 1]
    elif said != expected:
        # Text that is not UTF-8, in a frame that never becomes complete: the library alone finds it earlier.
        *before, last = expected
        assert isinstance(last, tuple)
        assert last[:2] == (CloseConnection, 1007)
        assert said == before


SAMPLE = b"".join(
    [
        frame(b"one"),
        frame("zwei €".encode()),
        frame(b"\0\xff", BINARY),
        frame(b"p", PING),
        frame(b"x" * 126),
        frame(b"ab", final=False),
        frame(b"q", PONG),
        frame(b"", 0, final=False),
        frame("\N{GREEK SMALL LETTER PI}".encode()[:1], 0, final=False),
        frame("\N{GREEK SMALL LETTER PI}".encode()[1:], 0),
        frame(b""),
        frame(b"three"),
        frame(struct.pack("!H", 1001) + b"bye", CLOSE),
        frame(b"after"),
    ]
)


@pytest.mark.parametrize("size", [125, 126, 127, 65_535, 65_536, 65_537])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_messages_of_every_length_of_header(size: int, opcode: int) -> None:
    data = frame(b"a") + frame(b"x" * size, opcode) + frame(b"b")
    expected = alone([data])
    assert len(expected) == 3
    for place in (*range(16), size // 2, size, *range(len(data) - 6, len(data) + 1)):
        assert filtered([data[:place], data[place:]]) == (expected, 3)


def test_cut_at_every_byte_is_the_same() -> None:
    expected = alone([SAMPLE])
    assert len(expected) == 10
    for first in range(len(SAMPLE) + 1):
        said, taken = filtered([SAMPLE[:first], SAMPLE[first:]])
        assert (said, taken) == (expected, 6)
    assert filtered(SAMPLE[n : n + 1] for n in range(len(SAMPLE)))[0] == expected


BROKEN = {
    "reserved bit": frame(b"x", bits=0x40),
    "reserved opcode": frame(b"x", 3),
    "reserved control opcode": frame(b"x", 11),
    "mask": frame(b"x", mask=True),
    "mask of a long one": frame(b"x" * 200, mask=True),
    "two bytes for a short length": frame(b"x", long=2),
    "eight bytes for a short length": frame(b"x", long=8),
    "highest bit of a length": b"\x81\x7f\xff" + bytes(7),
    "fragmented ping": frame(b"", PING, final=False),
    "long ping": frame(b"x" * 126, PING),
    "continuation of nothing": frame(b"x", 0),
    "message in a message": frame(b"x", final=False) + frame(b"y"),
    "no UTF-8": frame(b"\xc3\x28"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_nothing_is_taken_after_a_frame_that_breaks_the_protocol(broken: bytes) -> None:
    for chunks in ([frame(b"a") + broken + frame(b"b")], [frame(b"a"), broken, frame(b"b")]):
        said, taken = filtered(chunks)
        assert taken == 1
        assert said == alone(chunks)
        assert isinstance(said[-1], tuple)
        assert said[-1][0] is CloseConnection


def everything(one: FrameFilter) -> list[Any]:
    return list(iter(one.take, None))


def test_large_message_is_refused_by_its_header() -> None:
    for opcode in (TEXT, BINARY):
        one = FrameFilter(1_000)
        header = frame(b"x" * 1_001, opcode)[:4]
        one.feed(frame(b"a") + header)
        assert everything(one) == [["a"], Refused(RefusedBecause.TOO_LARGE)]
        one.feed(b"x" * 5_000 + frame(b"b"))
        assert everything(one) == []
        assert (one.missing, one.arrived) == (0, 0)
    assert filtered([frame(b"x" * 1_000)], 1_000) == (["x" * 1_000], 1)


def test_message_that_arrives_in_pieces_is_counted_and_joined() -> None:
    one = FrameFilter(MAX)
    whole = frame(b"x" * 100_000) + frame(b"y")
    arrived = 0
    for start in range(0, len(whole), 4_096):
        one.feed(whole[start : start + 4_096])
        taken = everything(one)
        if start + 4_096 < 100_010:
            assert taken == []
            arrived += one.arrived
            assert one.arrived == min(start + 4_096, 4_096) - (10 if start == 0 else 0)
            assert one.missing == 100_000 - arrived
    assert taken == [["x" * 100_000, "y"]]
    assert arrived + one.arrived == 100_000
    assert one.missing == 0


def test_fragments_are_counted_and_controls_are_not() -> None:
    one = FrameFilter(MAX)
    one.feed(frame(b"abc", final=False) + frame(b"ping", PING) + frame(b"de", 0)[:3])
    assert everything(one) == [
        Passed(frame(b"abc", final=False) + frame(b"ping", PING) + frame(b"de", 0)[:3], completes=False)
    ]
    assert one.arrived == 4
    one.feed(b"e" + frame(b"f"))
    assert everything(one) == [Passed(b"e", completes=True), ["f"]]


def test_too_many_fragments_are_refused() -> None:
    one = FrameFilter(MAX, max_fragments=3)
    fragments = frame(b"", final=False) + frame(b"", 0, final=False) * 2
    one.feed(fragments + frame(b"", 0) + frame(b"x"))
    assert everything(one) == [Passed(fragments, completes=False), Refused(RefusedBecause.TOO_MANY_FRAGMENTS)]
    assert filtered([fragments[:-2] + frame(b"", 0) + frame(b"x")]) == (["", "x"], 1)


def test_pieces_are_bounded() -> None:
    one = FrameFilter(MAX)
    one.feed(frame(b"x") * (2 * MESSAGES_AT_ONCE + 1))
    assert [len(piece) for piece in everything(one)] == [MESSAGES_AT_ONCE, MESSAGES_AT_ONCE, 1]
    one.feed(frame(b"x", PING) * (2 * FRAMES_AT_ONCE + 1))
    assert [len(piece.data) // 3 for piece in everything(one)] == [FRAMES_AT_ONCE, FRAMES_AT_ONCE, 1]
