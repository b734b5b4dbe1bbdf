"""The frame filter: a program behind it sees what it would see behind wsproto alone.

wsproto is the oracle: `compare` runs the same bytes with and without the
filter. The limits, which wsproto does not have, have named tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from _oracle import (
    LIMIT,
    WHOLE,
    compare,
    cut,
    wire,
)
from hypothesis import event, given
from hypothesis import strategies as st

from kadoa_trio._net._frames import (
    FRAMES_AT_ONCE,
    MAX_FRAGMENTS,
    MESSAGES_AT_ONCE,
    FrameFilter,
)

TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10
END = wire(b"end")
SIZES = [0, 1, 2, 3, 124, 125, 126, 127, 128, 300]
BIG_SIZES = [65_534, 65_535, 65_536, 65_537]
INVALID = [b"\xff", b"\x80", b"\xc0\x80", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xf0\x9f\x98"]
CODES = [0, 999, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 1015, 1016]
CODES += [2999, 3000, 3999, 4000, 4999, 5000, 65_535]


def take_all(data: bytes, max_message_size: int = LIMIT, max_fragments: int = MAX_FRAGMENTS) -> list[object]:
    """Give everything that a filter returns for these bytes."""
    filtered = FrameFilter(max_message_size, max_fragments=max_fragments)
    filtered.feed(data)
    return list(iter(filtered.take, None))


# What breaks the protocol, and what ends it. Each of these is the last frame that wsproto reads.
INVALID_FRAMES = {
    **{f"reserved bit {bit}": wire(b"abc", reserved=bit) for bit in (1, 2, 4)},
    "reserved bit of a ping": wire(b"abc", PING, reserved=2),
    "reserved bit of a long text": wire(b"a" * 300, reserved=4),
    "reserved bits of an invalid opcode": wire(b"abc", 3, reserved=7),
    "masked text": wire(b"abc", mask=b"mask"),
    "masked long text": wire(b"a" * 126, mask=b"mask"),
    "masked empty text": wire(mask=b"\0\0\0\0"),
    "masked ping": wire(b"abc", PING, mask=b"mask"),
    **{f"opcode {opcode}": wire(b"abc", opcode) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "opcode 3 without content": wire(b"", 3),
    "2 bytes for the length 125": wire(b"a" * 125, form=126),
    "2 bytes for the length 0": wire(form=126),
    "8 bytes for the length 125": wire(b"a" * 125, form=127),
    "8 bytes for the length 0": wire(form=127),
    "8 bytes for the length 65535": wire(b"a" * 3, form=127, length=65_535),
    "highest bit of a length": wire(b"a" * 3, length=1 << 63),
    "highest length": wire(b"a" * 3, length=(1 << 64) - 1),
    "fragmented ping": wire(b"abc", PING, final=False),
    "fragmented close": wire(b"", CLOSE, final=False),
    "ping of 126 bytes": wire(b"a" * 126, PING),
    "ping of 65,536 bytes": wire(b"a" * 9, PING, form=127, length=65_536),
    "close of 126 bytes": wire(b"\x03\xe8" + b"a" * 124, CLOSE),
    "continuation of nothing": wire(b"abc", CONTINUATION),
    "empty continuation of nothing": wire(b"", CONTINUATION),
    "continuation of nothing that is not final": wire(b"abc", CONTINUATION, final=False),
    "text within a message": wire(b"a", final=False) + wire(b"b"),
    "binary within a message": wire(b"a", final=False) + wire(b"b", BINARY),
    "empty text within a message": wire(b"a", final=False) + wire(b""),
    "fragment of a text within a message": wire(b"a", final=False) + wire(b"b", final=False),
    "text that is too large within a message": wire(b"a", final=False) + wire(b"b" * 9, length=1 << 40),
    **{f"text with {bad!r}": wire(b"good " + bad) for bad in INVALID},
    "invalid text of 126 bytes": wire(b"a" * 125 + b"\xff"),
    "invalid text of 65,536 bytes": wire(b"a" * 65_535 + b"\xff"),
    "invalid text in the last fragment": wire(b"a", final=False) + wire(b"\xff", CONTINUATION),
    "invalid text in the first fragment": wire(b"\xff", final=False) + wire(b"b", CONTINUATION),
    "character cut by the end of a message": wire(b"a", final=False) + wire(b"\xe2\x82", CONTINUATION),
    "character cut by an empty last fragment": wire(b"\xe2\x82", final=False) + wire(b"", CONTINUATION),
}
CLOSE_FRAMES = {
    "close": wire(b"", CLOSE),
    **{f"close {code}": wire(code.to_bytes(2, "big") + b"why", CLOSE) for code in CODES},
    "close with a reason of 123 bytes": wire(b"\x03\xe8" + b"r" * 123, CLOSE),
    "close with half a code": wire(b"\x03", CLOSE),
    "close with an invalid reason": wire(b"\x03\xe8\xff", CLOSE),
    "close within a message": wire(b"a", final=False) + wire(b"\x03\xe8", CLOSE),
}
LAST_FRAMES = INVALID_FRAMES | CLOSE_FRAMES

GOOD = {
    "text": wire(b"abc"),
    "empty text": wire(b""),
    "text of 125 bytes": wire(b"a" * 125),
    "text of 126 bytes": wire(b"a" * 126),
    "text of 127 bytes": wire(b"a" * 127),
    "text of all lengths of characters": wire("aé€😀".encode()),
    "binary": wire(b"\xff\0", BINARY),
    "empty binary": wire(b"", BINARY),
    "binary of 126 bytes": wire(b"\xff" * 126, BINARY),
    "ping": wire(b"?", PING),
    "empty pong": wire(b"", PONG),
    "ping of 125 bytes": wire(b"a" * 125, PING),
    "text in fragments, with a ping and a pong between": (
        wire(b"a", final=False)
        + wire(b"?", PING)
        + wire(b"b", CONTINUATION, final=False)
        + wire(b"", PONG)
        + wire(b"c", CONTINUATION)
    ),
    "binary in fragments": wire(b"\xff", BINARY, final=False) + wire(b"\xfe", CONTINUATION),
    "empty fragments": wire(b"", final=False) + wire(b"", CONTINUATION, final=False) + wire(b"", CONTINUATION),
    "cut characters": (
        wire(b"\xe2", final=False)
        + wire(b"\x82", CONTINUATION, final=False)
        + wire(b"\xac\xf0\x9f", CONTINUATION, final=False)
        + wire(b"\x98\x80", CONTINUATION)
    ),
    "fragment of 126 bytes": wire(b"a" * 126, final=False) + wire(b"b", CONTINUATION),
}


# What wsproto says, in random streams.


def times(count: int) -> Callable[[bytes], bytes]:
    return lambda one: one * count


counts = st.sampled_from([2, 3, FRAMES_AT_ONCE - 1, FRAMES_AT_ONCE, FRAMES_AT_ONCE + 1, 130, MESSAGES_AT_ONCE + 1, 600])
sizes = st.sampled_from(SIZES) | st.integers(0, 40)
texts = st.builds(lambda unit, size: (unit * size).encode(), st.sampled_from(["a", "é", "€", "😀", "a€"]), sizes)
invalid_texts = st.builds(lambda before, bad, after: before + bad + after, texts, st.sampled_from(INVALID), texts)
payloads = texts | st.binary(max_size=20) | invalid_texts
controls = st.builds(wire, st.binary(max_size=125), st.sampled_from([PING, PONG]))
whole = st.builds(wire, texts) | st.builds(wire, payloads, st.just(BINARY))


@st.composite
def big(draw: st.DrawFn) -> bytes:
    """A frame at the border of two lengths of headers."""
    size, unit = draw(st.sampled_from(BIG_SIZES)), draw(st.sampled_from(["a", "é", "€"])).encode()
    content = (unit * size)[:size]  # the last character may be cut
    return wire(content, draw(st.sampled_from([TEXT, TEXT, BINARY, CONTINUATION])), final=draw(st.booleans()))


@st.composite
def fragmented(draw: st.DrawFn) -> bytes:
    """A message in fragments, which may cut characters, with pings and pongs between them."""
    opcode = draw(st.sampled_from([TEXT, BINARY]))
    content = draw(texts | invalid_texts if opcode == TEXT else payloads)
    pieces = cut(content, *draw(st.lists(st.integers(0, len(content)), min_size=1, max_size=6)))
    pieces += [b""] * draw(st.integers(0, 2))
    frames = [
        wire(piece, CONTINUATION if at else opcode, final=at == len(pieces) - 1) for at, piece in enumerate(pieces)
    ]
    return b"".join(one + draw(st.just(b"") | controls) for one in frames[:-1]) + frames[-1]


odd_frames = st.builds(
    wire,
    payloads,
    st.integers(0, 15),
    final=st.booleans(),
    reserved=st.sampled_from([0, 0, 0, 1, 2, 4, 7]),
    mask=st.sampled_from([b"", b"", b"\0\0\0\0", b"mask"]),
    form=st.sampled_from([0, 0, 0, 126, 127]),
    length=st.none() | st.sampled_from([*SIZES, *BIG_SIZES, 1 << 40, 1 << 63, (1 << 64) - 1]),
)
closes = st.builds(
    lambda code, reason: wire(code.to_bytes(2, "big") + reason, CLOSE),
    st.sampled_from(CODES) | st.integers(0, 0xFFFF),
    st.binary(max_size=123) | st.sampled_from([b"", b"bye", "é".encode()]),
) | st.builds(wire, st.binary(max_size=1), st.just(CLOSE))
good = st.one_of(whole, whole, controls, fragmented(), st.sampled_from(sorted(GOOD.values())))
runs = st.builds(lambda one, count: one * count, st.one_of(whole, controls, st.just(b"\x00\x00")), counts)
parts = st.one_of(
    good, good, good, good, runs, big(), odd_frames, closes, st.binary(max_size=12), st.builds(wire, invalid_texts)
)


@st.composite
def chunks(draw: st.DrawFn) -> list[bytes | bytearray]:
    """A stream, cut anywhere."""
    stream = b"".join(draw(st.lists(good | runs, max_size=6))) + b"".join(draw(st.lists(parts, max_size=6)))
    stream = stream[: len(stream) - draw(st.sampled_from([0, 0, 0, 1, 2, 5, 50]))]
    every_byte = len(stream) <= 2_000 and draw(st.booleans())
    places = range(len(stream)) if every_byte else draw(st.lists(st.integers(0, len(stream)), max_size=20))
    kind = draw(st.sampled_from([bytes, bytes, bytearray]))
    return [kind(one) for one in cut(stream, *places)]


@given(
    chunks(),
    st.sampled_from([LIMIT, LIMIT, LIMIT, LIMIT, 1, 3, 124, 125, 126, 200, 65_534, 65_535, 65_536]),
    st.sampled_from([MAX_FRAGMENTS, MAX_FRAGMENTS, MAX_FRAGMENTS, 1, 2, 3, 100]),
)
def test_program_behind_the_filter_sees_what_wsproto_says(
    chunks: list[bytes | bytearray], max_message_size: int, max_fragments: int
) -> None:
    for one in compare(chunks, max_message_size, max_fragments):
        event(f"{one[0]} {one[1] if one[0] in ('failed', 'refused') else ''}")


# What wsproto says, wherever a stream is cut.


@pytest.mark.parametrize("name", LAST_FRAMES)
def test_last_frame_cut_at_every_byte(name: str) -> None:
    stream = wire(b"first") + LAST_FRAMES[name] + END
    size = min(len(stream), 200)
    for place in [*range(size), *range(len(stream) - 20, len(stream))]:
        expected = compare(cut(stream, place))
        assert expected[0] == (WHOLE, "first")
        assert expected[-1][0] in ("close", "failed", "ping")
        assert (WHOLE, "end") not in expected
    compare(cut(stream, *range(size)))


def test_good_frames_cut_at_every_byte() -> None:
    stream = b"".join(GOOD.values()) + END
    for place in range(len(stream) + 1):
        assert compare(cut(stream, place))[-1] == (WHOLE, "end")
    compare(cut(stream, *range(len(stream))))


def test_good_frames_cut_at_every_two_bytes() -> None:
    stream = b"".join(one for one in GOOD.values() if len(one) < 40) + END
    for places in itertools.combinations(range(len(stream)), 2):
        compare(cut(stream, *places))


def test_large_frames_cut_around_their_borders() -> None:
    for opcode, size in itertools.product((TEXT, BINARY), BIG_SIZES):
        frames = [
            wire(b"a"),
            wire(b"a" * size, opcode),
            wire(b"b" * size, opcode, final=False),
            wire(b"c" * size, CONTINUATION),
            END,
        ]
        stream = b"".join(frames)
        for border in itertools.accumulate(map(len, frames[:-1])):
            for place in range(border - 3, border + 12):
                compare(cut(stream, place))
        compare(cut(stream, *range(0, len(stream), 4_096)))
