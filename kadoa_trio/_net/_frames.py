"""Cuts whole messages out of the bytes of a WebSocket, before the WebSocket library sees them.

Sans-I/O: bytes in, messages and bytes for the library out.

A library handles each frame as an event of its own, which costs about twenty
times what reading it costs. But nearly every frame of a feed is one whole text
message without a mask. `FrameFilter` takes these, between frames and outside of
a fragmented message. Everything else it passes on as it is: fragments, pings,
pongs, the close frame, and the first frame that breaks the protocol with all
that follows. So what the library gets is a sequence of frames that is valid as
far as the server's is, and the library answers pings, closes, and words the
errors.

Which frames break the protocol: RFC 6455, sections 5.2 to 5.5. For the client
of a connection without extensions these are reserved bits, reserved opcodes,
masks, lengths that are not minimal or have their highest bit set, control
frames that are fragmented or longer than 125 bytes, a continuation of nothing,
a new message inside of a fragmented one, and text that is not UTF-8.
"""

from __future__ import annotations

import enum
from typing import Final

import attrs

MAX_FRAGMENTS: Final = 131_072
"""Maximum number of fragments (WebSocket frames) of one message; with more the connection is closed.

The specification (RFC 6455, section 5.4) has no limit, not even for empty ones. At the default `Limits.message_size`
of 64 Mi it leaves each fragment 512 bytes on average, and servers send fragments of 4 KiB and more.
"""
MESSAGES_AT_ONCE: Final = 256
"""Maximum number of messages that are taken at once: other tasks run after them."""
FRAMES_AT_ONCE: Final = 64
"""Maximum number of frames that are passed on at once. The library handles them without a checkpoint, at 25 µs each."""

_FINAL: Final = 0x80
_RESERVED: Final = 0x70
_OPCODE: Final = 0x0F
_CONTROL: Final = 0x08
_TEXT: Final = 0x1
_BINARY: Final = 0x2
_CLOSE: Final = 0x8
_PONG: Final = 0xA
_WHOLE_TEXT: Final = _FINAL | _TEXT
_WHOLE_BINARY: Final = _FINAL | _BINARY
_TWO_BYTES: Final = 126
_EIGHT_BYTES: Final = 127
_EXTENDED: Final = {_TWO_BYTES: (2, 126), _EIGHT_BYTES: (8, 1 << 16)}
"""Lengths that stand for more bytes: how many, and the least length that needs them."""
_MAX_CONTROL: Final = 125
_MAX_LENGTH: Final = 1 << 63


@attrs.frozen
class Passed:
    """Bytes for the library."""

    data: bytes | bytearray
    completes: bool
    """Whether the library delivers a message after them: the bytes end with its last frame."""


class RefusedBecause(enum.Enum):
    """Why nothing more of a connection is taken."""

    TOO_LARGE = "a message over the maximum size"
    TOO_MANY_FRAGMENTS = "a message of too many fragments"


@attrs.frozen
class Refused:
    """The connection is to be closed. What came with it, and comes after it, is dropped."""

    reason: RefusedBecause


class _State(enum.Enum):
    FRAMES = enum.auto()
    """Frames are cut and passed on."""
    BROKEN = enum.auto()
    """The protocol is broken, or the server has closed: everything is passed on."""
    REFUSED = enum.auto()
    """Everything is dropped."""


class FrameFilter:
    """Takes the bytes that a server has sent; gives messages, and bytes for the library, in their order.

    Held are the bytes of the last `feed`, and the payload of one message of
    maximum *max_message_size* bytes.

    Text that is not UTF-8 is found when its frame is complete, and then passed
    on. A library alone would find it earlier, and so also in a frame that never
    becomes complete.

    Args:
        max_message_size: maximum bytes of a message in one frame; a larger one
            is refused when its header has come. The sizes of fragmented ones
            are the library's business.
        max_fragments: maximum fragments of a message.
    """

    def __init__(self, max_message_size: int, max_fragments: int = MAX_FRAGMENTS) -> None:
        self._max_message_size = max_message_size
        self._max_fragments = max_fragments
        self._state = _State.FRAMES
        self._data: bytes | bytearray = b""
        # Up to where it was taken.
        self._at = 0
        # The frame of a message that is still arriving: its header, then its payload.
        self._pieces: list[bytes | bytearray] = []
        # Bytes of the current frame that are still to be passed on; whether they are of a message, and end it.
        self._left = 0
        self._is_message = False
        self._completes = False
        self._fragments = 0
        self._refused: Refused | None = None
        self.missing: int = 0
        """Bytes that are missing of the message that is arriving; 0 for none."""
        self.arrived: int = 0
        """Bytes of the last `feed` that are a part of a message: of one that arrives in parts, or of a fragment.

        Known when `take` has returned None.
        """

    def feed(self, data: bytes | bytearray) -> None:
        """Add bytes. Only after `take` has returned None."""
        rest = self._data[self._at :]
        self._data = rest + data if rest else data
        self._at = 0
        self.arrived = 0

    def take(self) -> list[str | bytes] | Passed | Refused | None:
        """Take what comes next; None if more bytes are needed.

        Returns:
            Messages, maximum `MESSAGES_AT_ONCE`; or bytes for the library, with
            maximum `FRAMES_AT_ONCE` frames, and the last bytes of maximum one
            message; or that the connection is to be closed.
        """
        if self._state is _State.FRAMES:
            if not self._left:
                messages = self._take_messages()
                if messages:
                    return messages
            if self._state is _State.FRAMES:
                return self._pass_frames()
        return self._take_rest()

    def _take_messages(self) -> list[str | bytes]:
        """Take whole messages, up to a frame that must be passed on or is not complete."""
        messages: list[str | bytes] = []
        if self.missing and not self._collect(messages):
            return messages
        if self._fragments:
            return messages
        data, at, limit = self._data, self._at, self._max_message_size
        size = len(data)
        while at + 1 < size:
            first, length = data[at], data[at + 1]
            if first != _WHOLE_TEXT and first != _WHOLE_BINARY:
                break
            start = at + 2
            if length >= _TWO_BYTES:
                if length == _TWO_BYTES:
                    start += 2
                    if start > size:
                        break
                    length = data[at + 2] << 8 | data[at + 3]
                    if length < _TWO_BYTES:
                        break
                elif length == _EIGHT_BYTES:
                    start += 8
                    if start > size:
                        break
                    length = int.from_bytes(data[at + 2 : start], "big")
                    if length < 1 << 16 or length >= _MAX_LENGTH:
                        break
                else:
                    break
            end = start + length
            if end > size or length > limit:
                if length > limit:
                    self._refuse(RefusedBecause.TOO_LARGE)
                else:
                    self._pieces = [data[at:start], data[start:]]
                    self.missing = end - size
                    self.arrived += size - start
                    at = size
                break
            try:
                messages.append(data[start:end].decode() if first == _WHOLE_TEXT else bytes(data[start:end]))
            except UnicodeDecodeError:
                self._state = _State.BROKEN
                break
            at = end
            if len(messages) == MESSAGES_AT_ONCE:
                break
        self._at = at
        return messages

    def _collect(self, messages: list[str | bytes]) -> bool:
        """Continue with the message that is arriving; return whether it is complete and could be taken."""
        piece = self._data[self._at : self._at + self.missing]
        self._at += len(piece)
        self.missing -= len(piece)
        self.arrived += len(piece)
        self._pieces.append(piece)
        if self.missing:
            return False
        (header, *payload), self._pieces = self._pieces, []
        message = b"".join(payload)
        try:
            messages.append(message.decode() if header[0] == _WHOLE_TEXT else message)
        except UnicodeDecodeError:
            self._data, self._at = header + message + self._data[self._at :], 0
            self._state = _State.BROKEN
            return False
        return True

    def _pass_frames(self) -> Passed | Refused | None:
        """Pass on frames, up to one that is to be taken, or is not complete, or completes a message."""
        data, begin = self._data, self._at
        at, size, frames = begin, len(data), 0
        while True:
            passed = min(self._left, size - at)
            at += passed
            self._left -= passed
            if self._is_message:
                self.arrived += passed
            if self._left or self._completes or frames == FRAMES_AT_ONCE:
                break
            start = self._read_header(at)
            if start == at:
                break
            frames += 1
            at = start
        self._at = at
        if at == begin:
            return None if self._state is _State.FRAMES else self._take_rest()
        completes = self._completes and not self._left
        if completes:
            self._completes = False
        return Passed(data[begin:at], completes)

    def _read_header(self, at: int) -> int:
        """Read the header of a frame that is to be passed on; return its end, or *at* if there is none."""
        data = self._data
        if at + 1 >= len(data):
            return at
        first, length = data[at], data[at + 1]
        final, opcode = first & _FINAL, first & _OPCODE
        if opcode & _CONTROL:
            valid = final and length <= _MAX_CONTROL and opcode <= _PONG and not first & _RESERVED
        else:
            # Only the first fragment of a message has an opcode.
            valid = opcode <= _BINARY and bool(opcode) != bool(self._fragments) and not first & _RESERVED
        start = at + 2
        if valid and length in _EXTENDED:
            more, least = _EXTENDED[length]
            start += more
            if start > len(data):
                return at
            length = int.from_bytes(data[at + 2 : start], "big")
            valid = least <= length < _MAX_LENGTH
        elif length > _EIGHT_BYTES:
            valid = False  # a mask
        if not valid or opcode == _CLOSE:
            self._state = _State.BROKEN
            return at
        self._is_message = not opcode & _CONTROL
        if self._is_message:
            if final and opcode:
                return at  # a whole message, which is to be taken
            if self._fragments == self._max_fragments:
                self._refuse(RefusedBecause.TOO_MANY_FRAGMENTS)
                return at
            self._fragments = 0 if final else self._fragments + 1
            self._completes = bool(final)
        self._left = length
        return start

    def _refuse(self, reason: RefusedBecause) -> None:
        self._state = _State.REFUSED
        self._refused = Refused(reason)

    def _take_rest(self) -> Passed | Refused | None:
        """Take what comes when frames are no longer looked at."""
        rest = self._data[self._at :]
        self._at = len(self._data)
        if self._state is _State.REFUSED:
            refused, self._refused = self._refused, None
            return refused
        return Passed(rest, completes=False) if rest else None
