"""The forwarder by itself: bodies, order, retries, dead letters that survive a crash in any place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import trio
from _loopback import read_head, serving

from kadoa_trio import (
    ConfigurationError,
    DeadLetterError,
    Event,
    FailedForward,
    RetryPolicy,
    open_forwarder,
    webhook_body,
)
from kadoa_trio._wire import decode

QUICK = RetryPolicy(initial=0.001, maximum=0.002)
"""For real sockets, where time is real."""


def event(number: int, **fields: Any) -> Event:
    frame = {
        "eventType": "workflow_finished",
        "id": f"e{number}",
        "timestamp": "2026-01-01T00:00:00Z",
        "_cursor": f"1-{number}",
        "message": {"id": number},
        **fields,
    }
    found = decode(json.dumps(frame))
    assert isinstance(found, Event)
    return found


def test_body_has_the_shape_of_a_webhook() -> None:
    assert webhook_body(event(1)) == {
        "eventType": "workflow_finished",
        "id": "e1",
        "timestamp": "2026-01-01T00:00:00.000Z",
        "data": {"id": 1},
    }
    assert webhook_body(event(1, message=None, data={"x": 2}))["data"] == {"x": 2}
    assert webhook_body(event(1, timestamp="soon"))["timestamp"] == "soon"


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("ftp://x", {}),
        ("http://", {}),
        ("http://[", {}),
        ("http://user@x", {}),
        ("http://x#y", {}),
        ("http://x", {"timeout": 0}),
        ("http://x", {"max_attempts": 0, "dead_letters": "x"}),
        ("http://x", {"max_attempts": 1}),
    ],
)
async def test_unusable_options_are_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        async with open_forwarder(url, **options):
            pass


class Endpoint:
    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.ids: list[str] = []

    async def __call__(self, stream: trio.abc.Stream) -> None:
        head = await read_head(stream)
        body = head.partition(b"\r\n\r\n")[2]
        while not body.endswith(b"}"):
            body += await stream.receive_some()
        self.ids.append(json.loads(body)["id"])
        status = self.statuses.pop(0) if self.statuses else 200
        if status == 0:
            await trio.sleep_forever()
        await stream.send_all(b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % status)


@pytest.mark.sockets
async def test_only_2xx_is_done_and_failures_are_told() -> None:
    endpoint = Endpoint(500, 404, 301, 0, 201)
    told: list[FailedForward] = []
    async with serving(endpoint) as port:
        with trio.fail_after(60):
            async with open_forwarder(
                f"http://127.0.0.1:{port}/?secret=word", retry=QUICK, timeout=0.5, on_failure=told.append
            ) as forwarder:
                assert "word" not in repr(forwarder)
                assert await forwarder.forward(event(1))
                assert await forwarder.forward(event(2))
    assert endpoint.ids == ["e1"] * 5 + ["e2"]
    assert [one.why for one in told] == ["HTTP 500", "HTTP 404", "HTTP 301", "no answer within 0.5 s"]
    assert [one.attempt for one in told] == [1, 2, 3, 4]
    assert (forwarder.delivered, forwarder.failures, forwarder.dead) == (2, 4, 0)


@pytest.mark.sockets
async def test_cancelled_attempt_puts_nothing_aside(tmp_path: Path) -> None:
    async with serving(Endpoint(0)) as port:
        with trio.fail_after(60):
            async with open_forwarder(
                f"http://127.0.0.1:{port}/", max_attempts=1, dead_letters=tmp_path / "dead"
            ) as forwarder:
                with trio.move_on_after(0.2):
                    await forwarder.forward(event(1))
    assert forwarder.dead == 0
    assert not (tmp_path / "dead").exists()


@pytest.mark.sockets
async def test_stale_count_skips_no_letter(tmp_path: Path) -> None:
    # A crash between the removal of a finished file and that of its count.
    path = tmp_path / "dead"
    with trio.fail_after(60):
        await put_aside(path, 1, 2)
        (tmp_path / "dead.replayed").write_text("2")
        endpoint = Endpoint()
        async with serving(endpoint) as port, open_forwarder(f"http://127.0.0.1:{port}/") as forwarder:
            await forwarder.replay(path)
    assert endpoint.ids == ["e1", "e2"]


@pytest.mark.sockets
async def test_full_disk_is_an_error_and_not_a_lost_event(tmp_path: Path) -> None:
    async with serving(Endpoint(500)) as port:
        with trio.fail_after(60):
            async with open_forwarder(
                f"http://127.0.0.1:{port}/", max_attempts=1, dead_letters=tmp_path / "no" / "such"
            ) as forwarder:
                with pytest.raises(DeadLetterError):
                    await forwarder.forward(event(1))


async def put_aside(path: Path, *numbers: int) -> None:
    """Put events aside by an endpoint that takes none."""
    async with (
        serving(Endpoint(*[500] * len(numbers))) as port,
        open_forwarder(f"http://127.0.0.1:{port}/", max_attempts=1, dead_letters=path) as forwarder,
    ):
        for number in numbers:
            assert not await forwarder.forward(event(number))


@pytest.mark.sockets
async def test_torn_last_line_does_not_swallow_the_next_letter(tmp_path: Path) -> None:
    path = tmp_path / "dead"
    with trio.fail_after(60):
        await put_aside(path, 1)
        path.write_bytes(path.read_bytes()[:-20])  # a crash in the middle of a write
        await put_aside(path, 2)
        endpoint = Endpoint()
        async with serving(endpoint) as port, open_forwarder(f"http://127.0.0.1:{port}/") as forwarder:
            done = await forwarder.replay(path)
    assert endpoint.ids == ["e2"]
    assert (done.delivered, done.remaining, done.unreadable) == (1, 1, 1)
    (kept,) = path.read_text().splitlines()
    assert '"id":"e1"' in kept  # a person may still read what it was


@pytest.mark.sockets
async def test_many_letters_are_replayed(tmp_path: Path) -> None:
    path = tmp_path / "dead"
    letter = {"event": {"eventType": "x", "id": "e", "timestamp": None, "data": "x" * 2_000}}
    path.write_text("".join(json.dumps(letter) + "\n" for _ in range(500)))
    async with serving(Endpoint()) as port, open_forwarder(f"http://127.0.0.1:{port}/") as forwarder:
        with trio.fail_after(100):
            done = await forwarder.replay(path)
    assert (done.delivered, done.remaining) == (500, 0)
    assert os.listdir(tmp_path) == []


@pytest.mark.sockets
@pytest.mark.parametrize("cut", range(6))
async def test_replay_cut_at_any_letter_loses_none(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "dead"
    with trio.fail_after(60):
        await put_aside(path, 1, 2, 3, 4)
        # The endpoint hangs at one of them, and the replay is killed there.
        first = Endpoint(*[200] * cut, 0)
        async with serving(first) as port, open_forwarder(f"http://127.0.0.1:{port}/") as forwarder:
            with trio.move_on_after(0.5):
                await forwarder.replay(path)
        if cut < 4:
            await put_aside(path, 5)  # a running forwarder adds one meanwhile
            second = Endpoint()
            async with serving(second) as port, open_forwarder(f"http://127.0.0.1:{port}/") as forwarder:
                await forwarder.replay(path)
            assert first.ids[:cut] + second.ids == ["e1", "e2", "e3", "e4", "e5"]
        else:
            assert first.ids == ["e1", "e2", "e3", "e4"]
    assert os.listdir(tmp_path) == []
