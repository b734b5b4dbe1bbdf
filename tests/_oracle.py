"""Plain wsproto as the oracle of the frame filter, for the tests and for the fuzzer.

`compare` runs the same bytes through wsproto alone, and through a `FrameFilter`
with a second wsproto behind it, and fails if a program could see a difference.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import wsproto.frame_protocol
from wsproto.connection import CLIENT, Connection, ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Message, Ping, Pong, TextMessage

from kadoa_trio._net._frames import (
    FRAMES_AT_ONCE,
    MAX_FRAGMENTS,
    MESSAGES_AT_ONCE,
    FrameFilter,
    Passed,
    Refused,
    RefusedReason,
)

Seen: TypeAlias = tuple[Any, ...]
"""What a program sees: a message, a ping, a pong, the server's close frame, a failure, or a refusal."""

LIMIT = 64 << 20
INVALID_TEXT = 1007
WHOLE, FRAGMENTED = "whole message", "fragmented message"


def wire(
    payload: bytes = b"",
    opcode: int = 1,
    *,
    final: bool = True,
    reserved: int = 0,
    mask: bytes = b"",
    form: int = 0,
    length: int | None = None,
) -> bytes:
    """Make a frame, as a server sends it or should not send it.

    *form* is 126 or 127 for a length in 2 or 8 bytes, whatever it is; *length*
    announces another length than that of the payload.
    """
    length = len(payload) if length is None else length
    form = form or (length if length < 126 else 126 if length < 1 << 16 else 127)
    extended = {126: length.to_bytes(8, "big")[6:], 127: length.to_bytes(8, "big")}.get(form, b"")
    header = bytes([final << 7 | reserved << 4 | opcode, bool(mask) << 7 | form])
    return header + extended + mask + payload


class Library:
    """wsproto's client side.

    wsproto has no limits. With the limits of a filter, the oracle stops at the
    header that a filter must refuse.
    """

    def __init__(self, max_message_size: int | None = None, max_fragments: int | None = None) -> None:
        self._connection = Connection(CLIENT)
        self._limits = max_message_size, max_fragments
        self._decoder: Any = self._connection._proto._frame_decoder
        self._messages: Any = self._connection._proto._message_decoder
        self._parse_header, self._decoder.parse_header = self._decoder.parse_header, self._header
        self._process_frame, self._messages.process_frame = self._messages.process_frame, self._data_frame
        self._parts: list[Any] = []
        self.is_over = False
        self.fragments = 0
        """Number of frames of the newest message."""
        self.frames = 0
        """Number of frames of which a part was in the last piece."""
        self.payload = 0
        """Bytes of all messages, without those of a frame that is no part of one."""
        self.is_within = False
        """Whether a frame, or a fragmented message, is in progress."""

    def receive(self, data: bytes) -> list[Seen]:
        """Give what the program sees of these bytes."""
        self.frames = 0 if self._decoder.header is None else 1
        self._connection.receive_data(data)
        seen: list[Seen] = []
        try:
            for event in self._connection.events():
                seen += self._see(event)
        except Stopped as exc:
            self.is_over = True
            seen.append(("refused", *exc.args))
        begun = self._decoder.header is not None or len(self._decoder.buffer) > 0
        self.is_within = begun or self._messages.opcode is not None
        return seen

    def _see(self, event: object) -> Iterator[Seen]:
        match event:
            case TextMessage() | BytesMessage():
                assert isinstance(event, Message)
                self._parts.append(event.data)
                if event.message_finished:
                    kind = WHOLE if self.fragments == 1 else FRAGMENTED
                    yield kind, type(event.data)().join(self._parts)
                    self._parts = []
            case Ping(payload=payload):
                yield "ping", bytes(payload)
            case Pong(payload=payload):
                yield "pong", bytes(payload)
            case CloseConnection(code=code, reason=reason):
                self.is_over = True
                if self._connection.state is ConnectionState.REMOTE_CLOSING:
                    yield "close", code, reason
                else:
                    # The words for invalid UTF-8 hold a place, which depends on how the bytes were cut.
                    yield "failed", code, None if code == INVALID_TEXT else reason
            case _:
                raise AssertionError(event)

    def _header(self) -> bool:
        if not self._parse_header():
            return False
        self.frames += 1
        header, max_size, max_fragments = self._decoder.header, *self._limits
        if header.opcode.iscontrol():
            return True
        is_new = self._messages.opcode is None
        is_continuation = header.opcode is wsproto.frame_protocol.Opcode.CONTINUATION
        if is_new is is_continuation:
            return True  # wsproto fails when the first byte of the payload has arrived
        self.fragments = 1 if is_new else self.fragments + 1
        if is_new and header.fin and max_size is not None and header.payload_len > max_size:
            raise Stopped(RefusedReason.TOO_LARGE, header.payload_len)
        if max_fragments is not None and self.fragments > max_fragments:
            raise Stopped(RefusedReason.TOO_MANY_FRAGMENTS, header.payload_len)
        return True

    def _data_frame(self, frame: Any) -> Any:
        done = self._process_frame(frame)
        self.payload += len(frame.payload)
        return done


class Stopped(Exception):
    """The oracle stops where a filter refuses."""


class Filtered:
    """A filter with a wsproto behind it, and checks of what the filter promises."""

    def __init__(self, max_message_size: int = LIMIT, max_fragments: int = MAX_FRAGMENTS) -> None:
        self.filter = FrameFilter(max_message_size, max_fragments=max_fragments)
        self.library = Library()
        self.payload = 0
        self.takes: list[object] = []
        """What the filter has returned."""

    def receive(self, data: bytes | bytearray) -> list[Seen]:
        """Give what the program sees of these bytes."""
        seen: list[Seen] = []
        self.filter.feed(data)
        assert self.filter.payload == 0
        while (taken := self.filter.take()) is not None:
            self.takes.append(taken)
            match taken:
                case Passed():
                    seen += self._pass(taken)
                case Refused():
                    seen.append(("refused", taken.reason, taken.length))
                case messages:
                    assert 0 < len(messages) <= MESSAGES_AT_ONCE
                    assert {type(message) for message in messages} <= {str, bytes}
                    assert not self.library.is_over
                    assert not self.library.is_within
                    seen += [(WHOLE, message) for message in messages]
        assert self.filter.take() is None
        assert len(self.filter._data) < 10
        self.payload += self.filter.payload
        assert 0 <= self.filter.payload <= len(data)
        return seen

    def _pass(self, piece: Passed) -> list[Seen]:
        assert type(piece.data) is bytes
        assert piece.data
        seen = self.library.receive(piece.data)
        assert self.library.frames <= FRAMES_AT_ONCE
        delivered = [at for at, one in enumerate(seen) if one[0] == FRAGMENTED]
        assert delivered == ([len(seen) - 1] if piece.completes else [])
        assert not any(one[0] == WHOLE for one in seen), "the library got a message that the filter could have taken"
        return seen


def compare(
    chunks: Iterable[bytes | bytearray], max_message_size: int = LIMIT, max_fragments: int = MAX_FRAGMENTS
) -> list[Seen]:
    """Give what a program sees of these bytes; fail if it sees something else behind the filter."""
    chunks = list(chunks)
    alone = Library(max_message_size, max_fragments)
    expected = alone.receive(b"".join(chunks))
    filtered = Filtered(max_message_size, max_fragments)
    seen = [one for chunk in chunks for one in filtered.receive(chunk)]
    failed = bool(expected) and expected[-1][:2] == ("failed", INVALID_TEXT)
    if failed and filtered.filter.missing:
        # The one difference: the filter waits for the end of an invalid text, and the stream has ended before.
        assert seen == expected[:-1]
        assert is_invalid(bytes(filtered.filter._collected))
        return expected
    assert seen == expected
    if not failed:
        assert filtered.payload == alone.payload
    return expected


def is_invalid(text: bytes) -> bool:
    """Whether no text begins with these bytes."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text)
    except UnicodeDecodeError:
        return True
    return False


def cut(data: bytes, *places: int) -> list[bytes]:
    """Cut data at these places."""
    ends = sorted({min(place, len(data)) for place in places} | {len(data)})
    return [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
