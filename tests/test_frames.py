"""The frame filter: a program behind it sees what it would see behind wsproto alone.

wsproto is the oracle: `compare` runs the same bytes with and without the
filter. The limits, which wsproto does not have, have named tests.
"""

from __future__ import annotations

import itertools
import sys
import tracemalloc
from collections.abc import Callable

import pytest
from _oracle import (
    FRAGMENTED,
    INVALID_TEXT,
    LIMIT,
    WHOLE,
    Filtered,
    Library,
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
    Passed,
    Refused,
    RefusedReason,
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
    "ping that holds a text": wire(wire(b"abc"), PING),
    "binary that holds a text": wire(wire(b"abc"), BINARY),
    "fragments that hold a text": wire(wire(b"abc"), BINARY, final=False) + wire(wire(b"abc"), CONTINUATION),
}


# What wsproto says, in random streams.


counts = st.sampled_from([2, 3, FRAMES_AT_ONCE - 1, FRAMES_AT_ONCE, FRAMES_AT_ONCE + 1, 130, MESSAGES_AT_ONCE + 1, 600])
sizes = st.sampled_from(SIZES) | st.integers(0, 40)
texts = st.builds(lambda unit, size: (unit * size).encode(), st.sampled_from(["a", "é", "€", "😀", "a€"]), sizes)
invalid_texts = st.builds(lambda before, bad, after: before + bad + after, texts, st.sampled_from(INVALID), texts)
looks_like_frames = st.sampled_from([wire(b"abc"), wire(b""), wire(b"a" * 100), wire(b"?", PING)])
payloads = texts | st.binary(max_size=20) | invalid_texts | looks_like_frames
controls = st.builds(wire, st.binary(max_size=125) | looks_like_frames, st.sampled_from([PING, PONG]))
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
    stream = b"".join(draw(st.lists(good, max_size=6))) + b"".join(draw(st.lists(parts, max_size=6)))
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


@pytest.mark.parametrize("name", GOOD)
def test_good_frame_cut_at_every_byte(name: str) -> None:
    stream = wire(b"first") + GOOD[name] + END
    expected = compare([stream])
    assert (expected[0], expected[-1]) == ((WHOLE, "first"), (WHOLE, "end"))
    for place in range(len(stream)):
        assert compare(cut(stream, place)) == expected
    assert compare(cut(stream, *range(len(stream)))) == expected


@pytest.mark.parametrize("name", [name for name, frames in GOOD.items() if len(frames) < 25])
def test_short_good_frame_cut_at_every_two_bytes(name: str) -> None:
    stream = GOOD[name] + END
    for places in itertools.combinations(range(len(stream)), 2):
        compare(cut(stream, *places))


def test_all_good_frames_in_one_stream() -> None:
    stream = b"".join(GOOD.values()) * 2 + END
    expected = compare([stream])
    assert expected[-1] == (WHOLE, "end")
    for size in (1, 2, 3, 5, 7, 100, 1_000):
        assert compare(cut(stream, *range(0, len(stream), size))) == expected


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


# What the filter takes.


def test_whole_messages_are_taken_and_the_library_gets_only_other_frames() -> None:
    filtered = Filtered()
    ping, pieces = wire(b"?", PING), [wire(b"a", final=False), wire(b"b", CONTINUATION)]
    stream = [wire("é".encode()), wire(b"b" * 300), ping, wire(b"\xff", BINARY), *pieces, wire(b""), END]
    seen = filtered.receive(b"".join(stream))
    assert seen == [
        (WHOLE, "é"),
        (WHOLE, "b" * 300),
        ("ping", b"?"),
        (WHOLE, b"\xff"),
        (FRAGMENTED, "ab"),
        (WHOLE, ""),
        (WHOLE, "end"),
    ]
    assert filtered.takes == [
        ["é", "b" * 300],
        Passed(ping, completes=False),
        [b"\xff"],
        Passed(b"".join(pieces), completes=True),
        ["", "end"],
    ]


@pytest.mark.parametrize("size", [*SIZES, *BIG_SIZES])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_message_of_any_length_is_taken(size: int, opcode: int) -> None:
    content = "a" * size if opcode == TEXT else b"a" * size
    (taken,) = take_all(wire(b"a" * size, opcode) + END)
    assert taken == [content, "end"]


def test_rest_of_a_chunk_follows_a_message_that_was_collected() -> None:
    data = wire(b"a" * 70_000) + END * 3
    filtered = FrameFilter(LIMIT)
    filtered.feed(data[:50_000])
    assert filtered.take() is None
    filtered.feed(data[50_000:])
    assert filtered.take() == ["a" * 70_000, "end", "end", "end"]
    assert filtered.take() is None


def test_messages_of_a_bytearray_are_independent_of_it() -> None:
    data = bytearray(wire(b"text") + wire(b"bytes", BINARY) + wire(b"?", PING) + wire(b"collected", BINARY)[:-1])
    filtered = FrameFilter(LIMIT)
    filtered.feed(data)
    data[:] = b"x" * len(data)
    filtered_data = list(iter(filtered.take, None))
    filtered.feed(bytearray(b"d"))
    assert [*filtered_data, filtered.take()] == [
        ["text"],
        [b"bytes"],
        Passed(wire(b"?", PING), completes=False),
        [b"collected"],
    ]


@pytest.mark.parametrize("name", INVALID_FRAMES)
def test_messages_before_an_invalid_frame_are_taken_and_none_after_it(name: str) -> None:
    last = INVALID_FRAMES[name]
    taken = take_all(END + last + END)
    assert taken[0] == ["end"]
    assert b"".join(one.data for one in taken[1:] if isinstance(one, Passed)) == last + END
    assert not any(one.completes for one in taken if isinstance(one, Passed))


@pytest.mark.parametrize("name", CLOSE_FRAMES)
def test_everything_after_a_close_frame_is_passed_on(name: str) -> None:
    filtered = FrameFilter(LIMIT)
    stream = CLOSE_FRAMES[name] + wire(b"a" * 9, length=LIMIT + 1) + b"\x00\x00" * 1_000 + END
    passed = b""
    for byte in cut(stream, *range(len(stream))):
        filtered.feed(byte)
        passed += b"".join(one.data for one in iter(filtered.take, None) if isinstance(one, Passed))
    assert passed == stream


def test_frames_that_are_passed_on_are_passed_on_as_they_arrive() -> None:
    for stream, header in [
        (wire(b"a" * 70_000, final=False), 10),
        (wire(b"a" * 300, BINARY, final=False), 4),
        (wire(b"a" * 100, PING), 2),
    ]:
        filtered = FrameFilter(LIMIT)
        for at, byte in enumerate(cut(stream, *range(1, 400))):
            filtered.feed(byte)
            taken = filtered.take()
            if at + 1 < header:
                assert taken is None
            else:
                assert taken == Passed(stream[:header] if at + 1 == header else byte, completes=False)
            assert filtered.take() is None
            assert filtered.missing == 0


def test_invalid_text_is_passed_on_whole_when_its_last_byte_has_arrived() -> None:
    invalid = wire(b"\xff" + b"a" * 300)
    filtered = Filtered()
    assert filtered.receive(invalid[:-1]) == []
    assert filtered.filter.missing == 1
    assert filtered.receive(invalid[-1:] + END) == [("failed", INVALID_TEXT, None)]
    assert filtered.takes == [Passed(invalid, completes=False), Passed(END, completes=False)]


def test_end_of_the_stream_within_an_invalid_text_is_an_abnormal_end() -> None:
    unfinished = wire(b"\xff" + b"a" * 300)[:-1]
    assert Filtered().receive(unfinished) == []
    assert Library().receive(unfinished) == [("failed", INVALID_TEXT, None)]


def test_filter_takes_no_message_after_a_fragmented_text_that_is_invalid() -> None:
    filtered = Filtered()
    first, last = wire(b"\xe2\x82", final=False), wire(b"", CONTINUATION)
    assert filtered.receive(first) == []
    assert filtered.receive(last + END) == [("failed", INVALID_TEXT, None)]
    assert filtered.takes == [Passed(first, completes=False), Passed(last + END, completes=False)]


def test_piece_ends_with_the_first_message_that_the_library_delivers() -> None:
    one = wire(b"a", final=False) + wire(b"?", PING) + wire(b"b", CONTINUATION)
    ping = wire(b"!", PING)
    assert take_all(ping + one + one + ping + ping) == [
        Passed(ping + one, completes=True),
        Passed(one, completes=True),
        Passed(ping + ping, completes=False),
    ]


# What the filter counts.


def test_payload_counts_bytes_of_messages_as_they_arrive() -> None:
    filtered = FrameFilter(LIMIT)
    counted = []
    text, fragment = wire("é".encode() * 500), wire(b"a" * 500, final=False)
    for data in (
        wire(b"abc") + wire(b"\xff", BINARY),  # 4
        text[:504],  # 500
        text[504:] + wire(b"?" * 100, PING) + fragment[:54],  # 500 and 50
        fragment[54:] + wire(b"?" * 100, PONG) + wire(b"", CONTINUATION)[:1],  # 450
        wire(b"", CONTINUATION)[1:] + b"\x81",
        b"\x03",
        b"abc",  # 3
        b"",
        wire(b"\x03\xe8bye", CLOSE) + wire(b"abc"),
    ):
        filtered.feed(data)
        assert filtered.payload == 0
        while filtered.take() is not None:
            pass
        counted.append(filtered.payload)
    assert counted == [4, 500, 550, 450, 0, 0, 3, 0, 0]


def test_missing_is_what_the_message_in_progress_lacks() -> None:
    filtered = FrameFilter(LIMIT)
    header = wire(length=70_000)
    for data, missing in [
        (wire(b"abc") + header[:-1], 0),
        (header[-1:], 70_000),
        (b"a" * 60_000, 10_000),
        (b"", 10_000),
        (b"a" * 9_999, 1),
        (b"a" + wire(b"a" * 9, final=False)[:5], 0),
    ]:
        filtered.feed(data)
        while filtered.take() is not None:
            pass
        assert filtered.missing == missing


# Limits.


@pytest.mark.parametrize("limit", [1, 3, 125, 126, 127, 300, 65_535, 65_536, 70_000])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_message_over_the_limit_is_refused_by_its_header(limit: int, opcode: int) -> None:
    taken = ["a" * limit] if opcode == TEXT else [b"a" * limit]
    header = wire(b"", opcode, length=limit + 1)
    filtered = FrameFilter(limit)
    filtered.feed(wire(b"a" * limit, opcode) + wire(b"?", PING) + header[:-1])
    assert filtered.take() == taken
    assert filtered.take() == Passed(wire(b"?", PING), completes=False)
    assert filtered.take() is None
    filtered.feed(header[-1:])
    assert filtered.take() == Refused(RefusedReason.TOO_LARGE, limit + 1)
    assert filtered.take() is None
    assert filtered.missing == 0
    filtered.feed(b"a" * limit + END)
    assert filtered.take() is None
    assert (filtered.payload, filtered._data) == (0, b"")


def test_limit_counts_bytes() -> None:
    text = "é" * 100
    assert take_all(wire(text.encode()), 200) == [[text]]
    assert take_all(wire(text.encode()), 199) == [Refused(RefusedReason.TOO_LARGE, 200)]


def test_frames_before_a_refused_message_are_passed_on_first() -> None:
    before = wire(b"abc") + wire(b"?", PING)
    refused = Refused(RefusedReason.TOO_LARGE, 1 << 62)
    assert take_all(before + wire(b"abc", length=1 << 62) + END) == [
        ["abc"],
        Passed(wire(b"?", PING), completes=False),
        refused,
    ]


@pytest.mark.parametrize("maximum", [1, 2, 1_000])
@pytest.mark.parametrize("opcode", [TEXT, BINARY])
def test_message_has_a_maximum_of_fragments(maximum: int, opcode: int) -> None:
    middle = wire(b"?", PING) + wire(b"", CONTINUATION, final=False)  # pings are no fragments
    most = wire(b"", opcode, final=False) + middle * (maximum - 2)
    if maximum > 1:
        whole = most + wire(b"", CONTINUATION)
        taken = take_all(whole * 3 + END, max_fragments=maximum)
        assert taken[-1] == ["end"]
        assert sum(one.completes for one in taken if isinstance(one, Passed)) == 3
        most += middle[:3]
        most += wire(b"", CONTINUATION, final=False)
    for last in (wire(b"abc", CONTINUATION), wire(b"abc", CONTINUATION, final=False)):
        *taken, refused = take_all(most + last + END, max_fragments=maximum)
        assert b"".join(one.data for one in taken if isinstance(one, Passed)) == most
        assert refused == Refused(RefusedReason.TOO_MANY_FRAGMENTS, 3)


def test_fragment_over_both_limits_is_one_too_many() -> None:
    stream = wire(b"a", final=False) + wire(b"b" * 300, CONTINUATION)
    assert take_all(stream, 100, 1)[-1] == Refused(RefusedReason.TOO_MANY_FRAGMENTS, 300)


def test_empty_fragments_without_end_are_refused() -> None:
    empty = wire(b"", CONTINUATION, final=False)
    *passed, refused = take_all(wire(b"", final=False) + empty * MAX_FRAGMENTS)
    assert refused == Refused(RefusedReason.TOO_MANY_FRAGMENTS, 0)
    assert sum(len(one.data) for one in passed if isinstance(one, Passed)) == 2 * MAX_FRAGMENTS


@pytest.mark.parametrize("one", [b"", b"a", b"a" * 300])
def test_messages_come_in_bounded_lists(one: bytes) -> None:
    taken = take_all(wire(one) * (2 * MESSAGES_AT_ONCE + 1) + END)
    text = one.decode()
    assert taken == [[text] * MESSAGES_AT_ONCE, [text] * MESSAGES_AT_ONCE, [text, "end"]]


def test_list_after_a_collected_message_is_bounded_too() -> None:
    taken = take_all(wire(b"a" * 70_000) + END * MESSAGES_AT_ONCE)
    assert taken == [["a" * 70_000] + ["end"] * (MESSAGES_AT_ONCE - 1), ["end"]]


@pytest.mark.parametrize("one", [wire(b"?", PING), wire(b"", CONTINUATION, final=False)])
def test_frames_come_in_bounded_pieces(one: bytes) -> None:
    first = wire(b"a", final=False)
    data = (first if one[0] == 0 else b"") + one * 3 * FRAMES_AT_ONCE
    sizes = [len(taken.data) for taken in take_all(data) if isinstance(taken, Passed)]
    assert sizes[0] == FRAMES_AT_ONCE * len(one) + (len(first) - len(one) if one[0] == 0 else 0)
    assert max(sizes) <= FRAMES_AT_ONCE * len(one) + 1
    assert sum(sizes) == len(data)


def test_rest_of_a_frame_counts_as_a_frame() -> None:
    ping = wire(b"?", PING)
    filtered = FrameFilter(LIMIT)
    filtered.feed(ping[:2])
    assert filtered.take() == Passed(ping[:2], completes=False)
    filtered.feed(ping[2:] + ping * FRAMES_AT_ONCE)
    assert filtered.take() == Passed(ping[2:] + ping * (FRAMES_AT_ONCE - 1), completes=False)
    assert filtered.take() == Passed(ping, completes=False)


# Memory and time.


def peak(run: Callable[[], object]) -> int:
    """Give the maximum of bytes that this allocated at one time."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_message_in_tiny_pieces_takes_little_more_than_its_size() -> None:
    size = 1 << 19

    def run() -> None:
        filtered = FrameFilter(LIMIT)
        for piece in itertools.chain([wire(length=size)], itertools.repeat(b"a" * 16, size // 16 - 1)):
            filtered.feed(piece)
            assert filtered.take() is None
        assert filtered.missing == 16

    assert peak(run) < 1.2 * size


def test_announced_length_takes_no_memory() -> None:
    filtered = FrameFilter(LIMIT)
    filtered.feed(wire(length=LIMIT))
    assert peak(filtered.take) < 10_000
    assert filtered.missing == LIMIT


def test_fragmented_message_takes_no_memory() -> None:
    chunk = wire(b"a" * 65_526, CONTINUATION, final=False)
    filtered = FrameFilter(LIMIT)
    filtered.feed(wire(b"", final=False))
    assert filtered.take() is not None

    def run() -> None:
        for _ in range(100):
            assert filtered.take() is None
            filtered.feed(chunk)
            assert filtered.take() == Passed(chunk, completes=False)

    assert peak(run) < 3 * len(chunk)


def test_chunk_is_not_held_once_it_was_taken() -> None:
    for chunk in (END * 1_000, wire(b"?" * 100, PING) * 100, wire(b"a" * 70_000) + b"\x81", b"a" * 1_000):
        filtered = FrameFilter(LIMIT)
        before = sys.getrefcount(chunk)
        filtered.feed(chunk)
        while filtered.take() is not None:
            pass
        assert sys.getrefcount(chunk) == before


@pytest.mark.timeout(60)  # copying all of it for each piece would take some minutes
def test_time_for_a_large_message_does_not_grow_with_its_square() -> None:
    filtered = FrameFilter(LIMIT)
    filtered.feed(wire(length=LIMIT))
    piece = b"a" * 4_096
    for _ in range(LIMIT // len(piece)):
        assert filtered.take() is None
        filtered.feed(piece)
    (text,) = filtered.take()
    assert len(text) == LIMIT
