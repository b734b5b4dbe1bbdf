"""Cuts whole messages out of the bytes of a WebSocket, before the WebSocket library sees them. No I/O.

Nearly every frame of Kadoa's feed is a whole text message. Each costs the
library about 18 µs, and `FrameFilter` less than 0.5 µs. The filter stands
between the stream and the library (client side, after the handshake, without
extensions). It takes a frame out if the frame is

* between messages: no fragmented message is in progress, and
* a whole text or binary message: FIN is set, no reserved bit is set, no mask,
  the shortest form of the length, maximum ``max_message_size`` bytes, and
* valid UTF-8, if it is text.

The library gets every other byte, unchanged and in order. Because only whole
frames between messages are missing, it sees a valid sequence of frames, or one
that breaks the protocol at the same frame, and it answers pings, joins
fragments and words the errors. After a close frame, and after a frame that
breaks the protocol (RFC 6455, sections 5.2 to 5.5 and 8.1), the library gets
everything, because it reads no further message.

What differs from the library alone:

* A message that is too large is refused when its header has arrived. The
  library would read `max_message_size` characters first, and counts characters
  where the filter counts bytes. A fragmented message is counted by the library.
* A message has a maximum of fragments.
* Invalid UTF-8 in a text that is not fragmented is noticed when the whole text
  has arrived. If the stream ends before, the end is abnormal (1006), where the
  library alone might have closed with 1007.
"""

from __future__ import annotations

import codecs
import enum
import struct
from itertools import repeat
from typing import Final, NamedTuple, TypeAlias

import attrs

MAX_FRAGMENTS = 131_072
"""Maximum number of fragments (WebSocket frames) of one message.

The specification (RFC 6455, section 5.4) has no limit, not even for empty ones. At the default `Limits.message_size`
of 64 Mi it leaves each fragment 512 bytes on average, and servers send fragments of 4 KiB and more.
"""
MESSAGES_AT_ONCE = 256
"""Maximum number of messages that one `FrameFilter.take` returns."""
# The library handles all frames of a piece at once, mostly without a checkpoint, at about 25 µs each.
FRAMES_AT_ONCE = 64
"""Maximum number of frames, or parts of frames, in one `Passed`. What follows the last frame that counts is no frame."""

_FIN: Final = 0x80
_MASK: Final = 0x80
_TEXT: Final = 1
_BINARY: Final = 2
_CLOSE: Final = 8
_OPCODES: Final = frozenset({0, _TEXT, _BINARY, _CLOSE, 9, 10})
_MAX_SHORT: Final = 125
_MAX_16_BIT: Final = 0xFFFF
# A text's first two bytes in one number: FIN and the opcode, then the length.
_SHORT_TEXT: Final = (_FIN | _TEXT) << 8
_TEXT_16_BIT: Final = _SHORT_TEXT | 126
_two_numbers: Final = struct.Struct(">HH").unpack_from

Messages: TypeAlias = list[str | bytes]
"""Whole messages, in order: a text is a str, a binary message is bytes. Maximum `MESSAGES_AT_ONCE`."""


@attrs.frozen
class Passed:
    """Bytes for the library, of maximum `FRAMES_AT_ONCE` frames."""

    data: bytes = attrs.field(repr=False)
    completes: bool
    """Whether the piece ends with a message that the library delivers. No other piece holds the end of one."""


class RefusedReason(enum.Enum):
    """Why the filter gave the stream up."""

    TOO_LARGE = "too large"
    TOO_MANY_FRAGMENTS = "too many fragments"


@attrs.frozen
class Refused:
    """A message over a limit. The filter drops everything from its refused frame on."""

    reason: RefusedReason
    length: int
    """What the header of the refused frame announces, in bytes."""


class FrameFilter:
    """Separates whole messages from what the library must see, in the order of the stream.

    Give received bytes to `feed`, then call `take` until it returns None.

    The filter holds maximum one fed chunk and one message of *max_message_size*
    (with an eighth more while it arrives).

    Args:
        max_message_size: maximum size of a message that is not fragmented, in bytes.
        max_fragments: maximum number of fragments of one message. Minimum 1.
    """

    def __init__(self, max_message_size: int, *, max_fragments: int = MAX_FRAGMENTS) -> None:
        self.payload = 0
        """Bytes of messages, without headers and control frames, among the last fed bytes, as far as they were taken."""
        self.missing = 0
        """Bytes that are still missing of the message that is being collected; 0 if there is none."""
        self._max_size = max_message_size
        self._max_short = min(max_message_size, _MAX_SHORT)
        self._max_16_bit = min(max_message_size, _MAX_16_BIT)
        self._max_fragments = max_fragments
        self._data = b""
        # Everything before this place of the data was taken.
        self._at = 0
        self._header = b""
        self._collected = bytearray()
        # Bytes of the last passed frame's payload that are still to come, and what the frame is.
        self._left = 0
        self._is_data = False
        self._is_final = False
        self._fragments = 0
        """Number of fragments that have come of the fragmented message in progress; 0 if there is none."""
        self._decoder: codecs.IncrementalDecoder | None = None
        """Checks the UTF-8 of the fragmented message in progress, if it is text."""
        self._is_over = False
        """Whether the library reads no further message, so that everything is passed on."""
        self._has_refused = False

    def feed(self, data: bytes | bytearray) -> None:
        """Add received bytes; only if `take` has returned None for the bytes before."""
        self.payload = 0
        if not self._has_refused:
            # What is left is an incomplete header of maximum 9 bytes. Adding to b"" copies nothing but a bytearray.
            self._data += data

    def take(self) -> Messages | Passed | Refused | None:
        """Return what comes next in the stream; None if more bytes are needed for that, and always after `Refused`."""
        taken: Messages | Passed | Refused | None
        if self.missing:
            taken = self._collect()
        else:
            if not (self._left or self._fragments or self._is_over):
                messages: Messages = []
                self._cut(messages)
                if messages:
                    return messages
            taken = self._pass()
        if taken is None:
            # Do not hold a chunk while nothing arrives.
            self._data = self._data[self._at :]
            self._at = 0
        return taken

    def _cut(self, messages: Messages) -> None:
        """Move the next texts of maximum 64 KiB to *messages*: as many as are whole, or fit in.

        This loop runs once for each message of a feed, so it calls as little as
        possible. It stops at everything else, which `_pass` judges.
        """
        data, at = self._data, self._at
        size = len(data)
        last = size - 4
        max_short, max_16_bit = _SHORT_TEXT + self._max_short, self._max_16_bit
        read, append = _two_numbers, messages.append
        headers = 0
        try:
            for _ in repeat(None, MESSAGES_AT_ONCE - len(messages)):
                if at > last:
                    break
                head, length = read(data, at)
                if head == _TEXT_16_BIT:
                    if not _MAX_SHORT < length <= max_16_bit:
                        break
                    start = at + 4
                    end = start + length
                elif _SHORT_TEXT <= head <= max_short:
                    start = at + 2
                    end = start + head - _SHORT_TEXT
                else:
                    break
                if end > size:
                    break
                append(data[start:end].decode())
                headers += start - at
                at = end
        except UnicodeDecodeError:
            pass  # `at` is the place of the invalid text
        self.payload += at - self._at - headers
        self._at = at

    def _collect(self) -> Messages | Passed | None:
        """Add what has arrived of the message that is being collected; return the message if it is whole."""
        start = self._at
        end = min(start + self.missing, len(self._data))
        # Not a list that is joined in the end: small pieces would take a multiple of their size, and the join is slower.
        self._collected += self._data[start:end]
        self._at = end
        self.payload += end - start
        self.missing -= end - start
        if self.missing:
            return None
        header, collected = self._header, self._collected
        self._header, self._collected = b"", bytearray()
        messages: Messages
        if header[0] & ~_FIN == _BINARY:
            messages = [bytes(collected)]
        else:
            try:
                messages = [collected.decode()]
            except UnicodeDecodeError:
                self._is_over = True
                return Passed(header + collected, completes=False)
        del collected
        self._cut(messages)
        return messages

    def _pass(self) -> Messages | Passed | Refused | None:
        """Return what the library gets next, or what becomes of the next message if nothing is before it."""
        data, start = self._data, self._at
        frames = 0
        completes = False
        while self._at < len(data) and not completes:
            if not (self._left or self._is_over):
                header = _read_header(data, self._at)
                if header is None or frames == FRAMES_AT_ONCE:
                    break
                is_data = header.opcode < _CLOSE
                # Only the first fragment of a message has an opcode.
                is_first = header.opcode > 0
                if header.length is None or header.opcode == _CLOSE or (is_data and is_first == (self._fragments > 0)):
                    self._is_over = True
                elif is_data and ((is_first and header.is_final) or self._fragments == self._max_fragments):
                    if self._at > start:
                        break
                    return self._begin(header, header.length)
                else:
                    self._enter(header, header.length)
            frames += 1
            completes = self._advance()
        return Passed(data[start : self._at], completes) if self._at > start else None

    def _begin(self, header: _Header, length: int) -> Messages | Passed | Refused | None:
        """Begin to collect a message, or refuse it."""
        if self._fragments or length > self._max_size:
            self._has_refused = True
            self._data, self._at = b"", 0
            return Refused(RefusedReason.TOO_MANY_FRAGMENTS if self._fragments else RefusedReason.TOO_LARGE, length)
        self._header = self._data[self._at : header.end]
        self._at = header.end
        self.missing = length
        return self._collect()

    def _enter(self, header: _Header, length: int) -> None:
        """Begin a frame that is passed on."""
        self._at = header.end
        self._left = length
        self._is_data = header.opcode < _CLOSE
        self._is_final = header.is_final
        if self._is_data:
            self._fragments += 1
            if header.opcode:
                self._decoder = codecs.getincrementaldecoder("utf-8")() if header.opcode == _TEXT else None

    def _advance(self) -> bool:
        """Go to the end of the frame that is passed on, or of the data. Return whether this completes a message."""
        start, size = self._at, len(self._data)
        if self._is_over:
            self._at = size
            return False
        self._at = min(start + self._left, size)
        self._left -= self._at - start
        if not self._is_data:
            return False
        self.payload += self._at - start
        completes = self._is_final and not self._left
        if self._decoder is not None:
            try:
                self._decoder.decode(self._data[start : self._at], completes)
            except UnicodeDecodeError:
                self._is_over = True
                return False
        if completes:
            self._fragments = 0
        return completes


class _Header(NamedTuple):
    end: int
    """The place where the payload begins."""
    opcode: int
    is_final: bool
    length: int | None
    """The length of the payload, in bytes; None if the header alone breaks the protocol."""


def _read_header(data: bytes, start: int) -> _Header | None:
    """Read the header at *start* (RFC 6455, section 5.2); return None if it has not arrived as a whole."""
    size = len(data) - start
    if size < 2:
        return None
    first, length = data[start], data[start + 1]
    is_final, opcode = first >= _FIN, first & ~_FIN
    # The reserved bits stay in `opcode`, and the mask bit in `length`.
    if opcode not in _OPCODES or length >= _MASK or (opcode >= _CLOSE and not (is_final and length <= _MAX_SHORT)):
        return _Header(start + 2, opcode, is_final, None)
    if length <= _MAX_SHORT:
        return _Header(start + 2, opcode, is_final, length)
    whole, minimum = (4, _MAX_SHORT + 1) if length == _MAX_SHORT + 1 else (10, _MAX_16_BIT + 1)
    if size < whole:
        return None
    length = int.from_bytes(data[start + 2 : start + whole], "big")
    return _Header(start + whole, opcode, is_final, length if minimum <= length < 1 << 63 else None)
