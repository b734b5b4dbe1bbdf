"""What each stage of an event costs, in isolation, on the real modules; each is median µs of CPU per event.

The stages use the modules of the client below its public interface. One that
does not find what it needs is left out, and the reason takes its place.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import trio

from ._loops import RECEIVE_BUFFER, Meter, Servers, events
from ._server import Feed, Frames

BLOCK: Final = 500
"""Events that are timed together. They go through the buffer together, too, which takes 1,000."""
TOGETHER: Final = 125
"""Events of 450 bytes that are received, and admitted, at once: about 64 KiB."""
WARM_BLOCKS: Final = 110
"""Blocks before the first one that counts: past the window of remembered ids."""
STAGES: Final = ("receive", "cut frames", "decode", "admit", "hand over", "settle", "checkpoint")
_KEY: Final = "dGhlIHNhbXBsZSBub25jZQ=="


async def stages(servers: Servers, feed: Feed) -> dict[str, Any]:
    """Measure all stages, and the whole in place.

    Returns:
        ``stages``: µs or the reason why there is none, by name; ``whole``: µs.
    """
    done: dict[str, float | str] = {}
    received = done["receive"] = await _receive(servers, feed)
    try:
        done["cut frames"] = max(await _cut(servers, feed) - received, 0.0)
    except (AttributeError, ImportError, TypeError) as exc:
        done["cut frames"] = f"not measured: {exc}"
    try:
        done |= _admit_to_settle(feed)
    except (AttributeError, ImportError, TypeError) as exc:
        done |= dict.fromkeys(("decode", "admit", "hand over", "settle"), f"not measured: {exc}")
    done["checkpoint"] = await _checkpoint()
    whole = await events(servers, feed)
    return {"stages": {name: done[name] for name in STAGES}, "whole": whole["cpu"] / whole["events"] * 1e6}


async def _receive(servers: Servers, feed: Feed) -> float:
    """Receive the bytes of a feed from a Trio stream, and drop them."""
    request = f"GET {feed.path} HTTP/1.1\r\nHost: localhost\r\nSec-WebSocket-Key: {_KEY}\r\n\r\n"
    size = feed.frames().size
    meter = Meter(servers, feed)
    async with await trio.open_tcp_stream("127.0.0.1", servers.port) as stream:
        await stream.send_all(request.encode())
        await stream.receive_some()
        await stream.send_all(b"subscribe")
        for part, measured in ((feed.warm, False), (feed.count, True)):
            if measured:
                meter.start()
            left = size * part
            while left > 0:
                left -= len(await stream.receive_some(RECEIVE_BUFFER))
        meter.stop()
    return float(meter.result["cpu"]) / feed.count * 1e6


async def _cut(servers: Servers, feed: Feed) -> float:
    """Receive the messages of a feed from the client's socket, and drop them."""
    from kadoa_trio._net._socket import open_socket
    from kadoa_trio._redact import Secret
    from kadoa_trio._settings import Settings

    meter = Meter(servers, feed)
    left = feed.warm

    async with open_socket(
        servers.websocket(feed.path), token=Secret("token"), settings=Settings(), on_bytes=lambda _count: None
    ) as one:
        await one.send("subscribe")
        socket: Any = one
        if not hasattr(socket, "read"):
            for _ in range(feed.warm):
                await socket.receive()
            meter.start()
            for _ in range(feed.count):
                await socket.receive()
        else:
            done = trio.Event()

            async def handle(messages: list[Any]) -> None:
                nonlocal left
                left -= len(messages)
                if left <= 0:
                    done.set()
                await trio.lowlevel.checkpoint()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(socket.read, handle)
                await done.wait()
                done, left = trio.Event(), feed.count
                meter.start()
                await done.wait()
                nursery.cancel_scope.cancel()
        meter.stop()
    return float(meter.result["cpu"]) / feed.count * 1e6


def _admit_to_settle(feed: Feed) -> dict[str, float]:
    """Decode, admit, hand over and settle, each for a block of events at a time."""
    from kadoa_trio._engine._admission import Admission
    from kadoa_trio._engine._buffer import Buffer
    from kadoa_trio._engine._channel import EventChannel
    from kadoa_trio._engine._ledger import Ledger
    from kadoa_trio._engine._reporter import Reporter
    from kadoa_trio._net._wire import decode
    from kadoa_trio._settings import Settings

    settings = Settings()
    reporter = Reporter(lambda: datetime.now(UTC))
    ledger = Ledger(settings.limits.dedupe_window, stable_after=settings.timeouts.stable_after)
    buffer = Buffer(settings, ledger, reporter, random.Random(1))
    admission = Admission(ledger, buffer, reporter, event_types=None, workflow_ids=None)
    # One handle for each event of a block: to ask a handle for the next event settles the one before.
    channels = [EventChannel(buffer) for _ in range(BLOCK)]
    ledger.open(1, reporter.moment())
    ledger.live(1, reporter.moment())
    times: dict[str, list[float]] = {"decode": [], "admit": [], "hand over": [], "settle": []}

    def timed(stage: str, action: Callable[[Sequence[Any]], list[Any] | None], items: Sequence[Any]) -> list[Any]:
        began = time.process_time()
        made = action(items)
        times[stage].append((time.process_time() - began) / BLOCK * 1e6)
        return made or []

    def decode_all(messages: Sequence[str]) -> list[Any]:
        return [decode(message) for message in messages]

    def admit_all(decoded: Sequence[Any]) -> None:
        moment = reporter.moment()
        if hasattr(admission, "admit_many"):
            # In the lists of the client: what is received at once.
            for start in range(0, len(decoded), TOGETHER):
                admission.admit_many(decoded[start : start + TOGETHER], 1, moment, moment)
        else:
            for event in decoded:
                admission.try_admit(event, 1, moment, moment)

    def hand_over(channels: Sequence[EventChannel]) -> None:
        for channel in channels:
            channel.receive_nowait()

    def settle(channels: Sequence[EventChannel]) -> None:
        for channel in channels:
            channel.settle()

    gc.collect()
    warm = min(WARM_BLOCKS, feed.count // 100)  # less for a test of the benchmarks only
    for messages in _messages(feed, warm + max(feed.count // BLOCK, 1)):
        timed("admit", admit_all, timed("decode", decode_all, messages))
        timed("hand over", hand_over, channels)
        timed("settle", settle, channels)
    assert not ledger.unsettled
    return {stage: statistics.median(taken[warm:]) for stage, taken in times.items()}


def _messages(feed: Feed, blocks: int) -> Iterator[list[str]]:
    """Make the messages of a feed, in blocks."""
    frames = Frames(feed.size)
    head = frames.size - feed.size
    for block in range(blocks):
        yield [frames.encode(number)[head:].decode() for number in range(block * BLOCK, (block + 1) * BLOCK)]


async def _checkpoint() -> float:
    """Make a full checkpoint, in the only task."""
    taken = []
    for _ in range(20):
        began = time.process_time()
        for _ in range(BLOCK):
            await trio.lowlevel.checkpoint()
        taken.append((time.process_time() - began) / BLOCK * 1e6)
    return statistics.median(taken)
