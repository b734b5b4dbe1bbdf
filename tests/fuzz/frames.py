"""Coverage-guided fuzzing of the frame filter, with wsproto as the oracle: needs Python 3.11 and atheris.

::

    python tests/fuzz/frames.py SECONDS [CORPUS] [OPTIONS OF LIBFUZZER]

The corpus is a directory for what the fuzzer finds interesting. A failure is
written to a file ``crash-...``; given in place of the corpus, it is run again.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))
with atheris.instrument_imports(include=["kadoa_trio._net._frames", "wsproto.frame_protocol"]):
    from _oracle import LIMIT, compare, cut, wire

SIZES = [0, 1, 124, 125, 126, 127, 65_534, 65_535, 65_536, 65_537]
LENGTHS = [*SIZES, 1 << 40, 1 << 63, (1 << 64) - 1]
COUNTS = [1, 1, 1, 2, 63, 64, 65, 255, 256, 257]
FILLERS = [b"a", b"\x00", "é".encode(), "😀".encode(), b"\xff"]
MAX_STREAM = 140_000


def fill(source: atheris.FuzzedDataProvider) -> bytes:
    """Make a payload at the border of two forms of header; its last character may be cut."""
    size, unit = source.PickValueInList(SIZES), source.PickValueInList(FILLERS)
    return (unit * size)[:size]


def part(source: atheris.FuzzedDataProvider) -> bytes:
    """Make a frame, or any bytes."""
    kind = source.ConsumeIntInRange(0, 9)
    if kind == 0:
        return bytes(source.ConsumeBytes(source.ConsumeIntInRange(1, 40)))
    payload = fill(source) if kind == 1 else bytes(source.ConsumeBytes(source.ConsumeIntInRange(0, 40)))
    flags = source.ConsumeIntInRange(0, 0xFFFF)
    odd = kind >= 8
    return wire(
        payload,
        flags & 15 if odd else (0, 1, 1, 1, 2, 8, 9, 10)[flags & 7],
        final=bool(flags & 0x30),
        reserved=flags >> 6 & 7 if odd else 0,
        mask=b"mask" if odd and flags & 0x200 else b"",
        form=(0, 0, 126, 127)[flags >> 10 & 3] if odd else 0,
        length=source.PickValueInList(LENGTHS) if odd and flags & 0x1000 else None,
    )


def run_one(data: bytes) -> None:
    """Compare one stream."""
    source = atheris.FuzzedDataProvider(data)
    max_message_size = source.PickValueInList([LIMIT, LIMIT, LIMIT, 1, 20, 125, 126, 200, 65_535, 65_536])
    max_fragments = source.PickValueInList([131_072, 131_072, 131_072, 1, 2, 5, 100])
    every_byte = source.ConsumeBool()
    places = source.ConsumeIntListInRange(source.ConsumeIntInRange(0, 8), 0, 400)
    kind = bytearray if source.ConsumeBool() else bytes
    # One part comes many times: messages and frames have a maximum at once.
    repeated, count = source.ConsumeIntInRange(0, 5), source.PickValueInList(COUNTS)
    stream = b""
    for number in itertools.count():
        if not source.remaining_bytes() or len(stream) > MAX_STREAM:
            break
        one = part(source)
        stream += one * (count if number == repeated and len(one) < 300 else 1)
    if every_byte and len(stream) < 400:
        places = list(range(len(stream)))
    elif every_byte:
        # From the end, too.
        places = [place if at % 2 else len(stream) - min(place, len(stream)) for at, place in enumerate(places)]
    compare([kind(one) for one in cut(stream, *places)], max_message_size, max_fragments)


def main() -> None:
    seconds, *others = sys.argv[1:] or ["60"]
    options = [
        f"-max_total_time={int(seconds)}",
        "-max_len=300",
        "-len_control=0",
        "-rss_limit_mb=1024",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, *others], run_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
