"""Coverage-guided fuzzing of the frame filter, with wsproto as the oracle: needs Python 3.11 and atheris.

::

    python tests/fuzz/frames.py SECONDS [CORPUS] [OPTIONS OF LIBFUZZER]

The corpus is a directory for what the fuzzer finds interesting. A failure is
written to a file ``crash-...``; given in place of the corpus, it is run again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))
with atheris.instrument_imports(include=["kadoa_trio._net._frames", "wsproto.frame_protocol"]):
    from _oracle import LIMIT, compare, cut, wire

SIZES = [0, 1, 124, 125, 126, 127, 65_534, 65_535, 65_536, 65_537]
LENGTHS = [*SIZES, 1 << 40, 1 << 63, (1 << 64) - 1]
OPCODES = [0, 0, 1, 1, 1, 2, 8, 9, 10]
COUNTS = [1, 1, 1, 2, 63, 64, 65, 255, 256, 257]
FILLERS = [b"a", b"\x00", "é".encode(), "😀".encode(), b"\xff"]
MAX_STREAM = 140_000


def content(source: atheris.FuzzedDataProvider, before: bytes) -> bytes:
    """Make a payload: any bytes, what looks like a frame, or one at the border of two forms of header."""
    kind = source.ConsumeIntInRange(0, 7)
    if kind == 0:
        size, unit = source.PickValueInList(SIZES), source.PickValueInList(FILLERS)
        return (unit * size)[:size]  # the last character may be cut
    if kind == 1:
        return before[:125]
    return bytes(source.ConsumeBytes(source.ConsumeIntInRange(0, 40)))


def part(source: atheris.FuzzedDataProvider, before: bytes) -> bytes:
    """Make a frame with maximum one thing that is odd, or any bytes."""
    odd = source.ConsumeIntInRange(0, 15)
    if odd == 0:
        return bytes(source.ConsumeBytes(source.ConsumeIntInRange(1, 40)))
    return wire(
        content(source, before),
        source.ConsumeIntInRange(0, 15) if odd == 1 else source.PickValueInList(OPCODES),
        final=source.ConsumeIntInRange(0, 3) > 0,
        reserved=source.ConsumeIntInRange(1, 7) if odd == 2 else 0,
        mask=b"mask" if odd == 3 else b"",
        form=source.ConsumeIntInRange(126, 127) if odd == 4 else 0,
        length=source.PickValueInList(LENGTHS) if odd == 5 else None,
    )


def run_one(data: bytes) -> None:
    """Compare one stream."""
    source = atheris.FuzzedDataProvider(data)
    max_message_size = source.PickValueInList([LIMIT, LIMIT, LIMIT, 1, 20, 125, 126, 200, 65_535, 65_536])
    max_fragments = source.PickValueInList([131_072, 131_072, 131_072, 1, 2, 5, 100])
    kind = bytearray if source.ConsumeBool() else bytes
    # One part comes many times: messages and frames have a maximum at once.
    repeated, count = source.ConsumeIntInRange(0, 5), source.PickValueInList(COUNTS)
    every_byte = source.ConsumeBool()
    cuts = [(source.ConsumeIntInRange(0, 30), source.ConsumeIntInRange(0, 15)) for _ in range(0 if every_byte else 4)]
    stream = one = b""
    borders = []
    while source.remaining_bytes() and len(stream) < MAX_STREAM:
        one = part(source, one)
        borders.append(len(stream))
        stream += one * (count if len(borders) == repeated and len(one) < 300 else 1)
    if every_byte:
        places = list(range(min(len(stream), 400)))
    else:
        places = [borders[number % len(borders)] + offset for number, offset in cuts if borders]
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
