"""The forwarder by itself: bodies, order, retries, dead letters that survive a crash in any place."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec
import pytest
import trio
from _loopback import read_head, serving

from kadoa_trio import (
    ConfigurationError,
    DeadLetterError,
    Event,
    FailedForward,
    RetryPolicy,
    __version__,
    _forward,
    _letters,
    open_forwarder,
    webhook_body,
)
from kadoa_trio._errors import AttemptError
from kadoa_trio._files import FileLock
from kadoa_trio._net._wire import decode

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
async def test_only_2xx_ends_the_attempts_and_each_failure_is_reported() -> None:
    endpoint = Endpoint(500, 404, 301, 0, 201)
    reported: list[FailedForward] = []
    async with serving(endpoint) as port:
        with trio.fail_after(60):
            async with open_forwarder(
                f"http://127.0.0.1:{port}/?secret=word", retry=QUICK, timeout=0.5, on_failure=reported.append
            ) as forwarder:
                assert "word" not in repr(forwarder)
                assert await forwarder.forward(event(1))
                assert await forwarder.forward(event(2))
    assert endpoint.ids == ["e1"] * 5 + ["e2"]
    assert [one.why for one in reported] == ["HTTP 500", "HTTP 404", "HTTP 301", "no answer within 0.5 s"]
    assert [one.attempt for one in reported] == [1, 2, 3, 4]
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
async def test_torn_last_line_does_not_damage_the_next_letter(tmp_path: Path) -> None:
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
async def test_replay_cancelled_at_any_letter_loses_none(tmp_path: Path, cut: int) -> None:
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


# ---- whatever an event holds ---------------------------------------------------------------------------------------


class Recorder:
    """An endpoint that takes everything but the ids in `refused`, without requests."""

    address = "http://127.0.0.1:1/"

    def __init__(self, *refused: str) -> None:
        self.refused = set(refused)
        self.headers: list[str] = []
        self.bodies: list[bytes] = []

    async def post(self, event_type: str, content: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.headers.append(event_type)
        self.bodies.append(content)
        if self.ids[-1] in self.refused:
            raise AttemptError("forward", "HTTP 500")

    @property
    def ids(self) -> list[str]:
        return [json.loads(body)["id"] for body in self.bodies]


def typed(event_type: str, message: str = "{}") -> Event:
    """Make an event of any type, with a payload of any text."""
    frame = f'{{"eventType": {json.dumps(event_type)}, "id": "e1", "message": {message}}}'
    return Event("e1", event_type, None, None, "id", frame)


ODD_TYPES = ["größe", "a\r\nX-Evil: 1", "nul\0", " spaces ", "two words", "", "100%", "e2%41", "\x7f", "\u2028", "😀"]


@pytest.mark.sockets
@pytest.mark.parametrize("event_type", ODD_TYPES, ids=ascii)
async def test_type_that_a_header_cannot_hold_is_posted_encoded(event_type: str) -> None:
    heads: list[bytes] = []

    async def handler(stream: trio.abc.Stream) -> None:
        head = await read_head(stream)
        heads.append(head)
        body = head.partition(b"\r\n\r\n")[2]
        while not body.endswith(b"}"):
            body += await stream.receive_some()
        assert json.loads(body)["eventType"] == event_type
        await stream.send_all(b"HTTP/1.1 200 X\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")

    async with serving(handler) as port, open_forwarder(f"http://127.0.0.1:{port}/", retry=QUICK) as forwarder:
        with trio.fail_after(60):
            assert await forwarder.forward(typed(event_type))
    (head,) = heads
    (line,) = (line for line in head.split(b"\r\n") if line.lower().startswith(b"x-kadoa-event:"))
    assert unquote(line.partition(b":")[2].strip().decode()) == event_type
    assert b"\nX-Evil:" not in head
    assert f"user-agent: kadoa-trio/{__version__}".encode() in head.lower()
    assert b"x-api-key" not in head.lower()
    assert b"x-sdk" not in head.lower()


@pytest.mark.parametrize("event_type", ["x" * 100_000, "é" * 100_000, "😀" * 300, "\ud800" * 300, "%" * 300])
def test_long_type_is_cut_in_the_header(event_type: str) -> None:
    header = _forward._header(event_type)
    assert 244 < len(header) <= 256
    assert event_type.startswith(unquote(header, errors="surrogatepass"))


def test_documented_types_are_in_the_header_as_they_are() -> None:
    for event_type in ("workflow_finished", "workflow_data_change", "Some.Other-type:1/2~(x)"):
        assert _forward._header(event_type) == event_type


@pytest.mark.parametrize("path", ["\ud800", "a\0b", "", ".", "/", None, b"letters", 5])
async def test_path_that_names_no_file_is_refused_at_once(path: Any) -> None:
    async with open_forwarder("http://127.0.0.1:1/") as forwarder:
        with pytest.raises(ConfigurationError, match=r"^path must be"):
            await forwarder.replay(path)
    if path is not None:
        with pytest.raises(ConfigurationError, match=r"^dead_letters must be"):
            async with open_forwarder("http://127.0.0.1:1/", dead_letters=path):
                pass


async def test_body_is_strict_json_whatever_was_received(tmp_path: Path) -> None:
    message = '{"a": [NaN, -Infinity, 1e999, 1.5, 12345678901234567890123], "b\\ud800": "x\\udfff", "c": "é😀\u2028"}'
    meant = {"a": [None, None, None, 1.5, 12345678901234567890123], "b\ufffd": "x\ufffd", "c": "é😀\u2028"}
    path = tmp_path / "dead"
    async with open_forwarder("http://127.0.0.1:1/", max_attempts=1, dead_letters=path) as forwarder:
        forwarder._webhook = refusing = Recorder("e1")  # type: ignore[assignment]
        assert not await forwarder.forward(typed("x\ud800", message))
        (line,) = path.read_bytes().splitlines()
        assert msgspec.json.decode(line)["event"]["eventType"] == "x\ufffd"
        forwarder._webhook = recorder = Recorder()  # type: ignore[assignment]
        await forwarder.replay(path)
    assert refusing.bodies == recorder.bodies  # a letter holds what was posted
    msgspec.json.decode(recorder.bodies[0], type=dict)  # strict
    assert json.loads(recorder.bodies[0])["data"] == meant


def test_payload_that_is_nested_too_deeply_is_null() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    body = {"eventType": "x", "id": "e", "timestamp": deep, "data": deep}
    assert json.loads(_forward.strict_json(body)) == {"eventType": "x", "id": "e", "data": None}


# ---- a replay beside a running forward -----------------------------------------------------------------------------


async def replay_into(recorder: Recorder, path: Path) -> None:
    async with open_forwarder("http://127.0.0.1:1/") as forwarder:
        forwarder._webhook = recorder  # type: ignore[assignment]
        await forwarder.replay(path)


async def put_aside_quietly(path: Path, *numbers: int) -> None:
    async with open_forwarder("http://127.0.0.1:1/", max_attempts=1, dead_letters=path) as forwarder:
        forwarder._webhook = Recorder(*(f"e{number}" for number in numbers))  # type: ignore[assignment]
        for number in numbers:
            assert not await forwarder.forward(event(number))


async def test_letter_that_is_appended_during_a_replay_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The append pauses between opening the file and writing; the replay must not get past it.
    path = tmp_path / "dead"
    await put_aside_quietly(path, 1)
    paused, go = threading.Event(), threading.Event()
    came = trio.Event()
    token = trio.lowlevel.current_trio_token()
    real_open, real_take = _letters.open_file, FileLock.take

    def open_file(file: Path, flags: int) -> int:
        descriptor = real_open(file, flags)
        if file == path and flags & os.O_APPEND and not paused.is_set():
            paused.set()
            assert go.wait(60)
        return descriptor

    def take(self: FileLock, *, force: bool = False) -> str | None:
        owner = real_take(self, force=force)
        if owner is not None:
            token.run_sync_soon(came.set)
        return owner

    monkeypatch.setattr(_letters, "open_file", open_file)
    monkeypatch.setattr(FileLock, "take", take)
    recorder = Recorder()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:

            async def replay() -> None:
                await replay_into(recorder, path)
                came.set()

            nursery.start_soon(put_aside_quietly, path, 2)
            await trio.to_thread.run_sync(paused.wait, 60)
            nursery.start_soon(replay)
            await came.wait()  # the replay waits for the append, or is over
            go.set()
        if path.exists():
            await replay_into(recorder, path)
    assert recorder.ids == ["e1", "e2"]
    assert os.listdir(tmp_path) == []


async def test_appends_and_replays_beside_each_other_lose_no_letter(tmp_path: Path) -> None:
    path = tmp_path / "dead"
    recorder = Recorder()
    left = 4
    with trio.fail_after(100):
        await put_aside_quietly(path, 999)
        async with trio.open_nursery() as nursery:

            async def put(first: int) -> None:
                nonlocal left
                await put_aside_quietly(path, *range(first, first + 25))
                left -= 1

            for number in range(4):
                nursery.start_soon(put, number * 100)
            while left or path.exists():
                if path.exists():
                    await replay_into(recorder, path)
                await trio.lowlevel.checkpoint()
    assert sorted(recorder.ids) == sorted(
        ["e999", *(f"e{number * 100 + step}" for number in range(4) for step in range(25))]
    )
    assert os.listdir(tmp_path) == []


async def test_second_replay_is_refused_and_posts_nothing(tmp_path: Path) -> None:
    path = tmp_path / "dead"
    await put_aside_quietly(path, 1)
    second = Recorder()

    class Slow(Recorder):
        async def post(self, event_type: str, content: bytes) -> None:
            with pytest.raises(DeadLetterError, match=f"another replay of it is running, in process {os.getpid()}"):
                await replay_into(second, path)
            await super().post(event_type, content)

    first = Slow()
    with trio.fail_after(60):
        await replay_into(first, path)
    assert (first.ids, second.ids) == (["e1"], [])
    assert os.listdir(tmp_path) == []


async def test_lock_that_is_held_for_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_letters, "_LOCK_TIMEOUT", 0.05)
    lock = FileLock(tmp_path / "dead.lock")
    assert lock.take() is None
    with trio.fail_after(60), pytest.raises(DeadLetterError, match=rf"process {os.getpid()} .* has held the lock"):
        await put_aside_quietly(tmp_path / "dead", 1)
    lock.release(remove=True)
    assert os.listdir(tmp_path) == []


class Crash(BaseException):
    pass


async def test_replay_killed_at_any_file_operation_loses_no_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:  # and nothing is done after it
                raise Crash
            return real(*args, **options)

        return operation

    for owner, name in ((_letters, "open_file"), (_letters, "sync_directory"), (os, "replace"), (os, "fsync")):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    for name in ("rename", "unlink"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    with trio.fail_after(100):
        for cut in range(1_000):
            folder = tmp_path / str(cut)
            folder.mkdir()
            path = folder / "dead"
            left = 10**9
            await put_aside_quietly(path, 1, 2, 3)
            with path.open("a") as file:
                file.write("torn {")
            first, second = Recorder("e2"), Recorder()
            left = cut
            crashed = False
            try:
                await replay_into(first, path)
            except Crash:
                crashed = True
            left = 10**9
            if path.exists() or path.with_name("dead.replaying").exists():
                await replay_into(second, path)
            taken = [one for one in first.ids if one != "e2"] + second.ids
            assert set(taken) == {"e1", "e2", "e3"}, cut
            assert len(taken) <= 4, cut
            assert "torn {" in path.read_text().splitlines(), cut
            if not crashed:
                break
    assert cut > 20


# ---- what lies at the paths ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files")
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
@pytest.mark.parametrize(
    "name", ["dead", "dead.lock", "dead.replaying", "dead.replaying.lock", "dead.replayed", "dead.replayed.new"]
)
async def test_link_or_special_file_is_refused_and_left_alone(name: str, kind: str, tmp_path: Path) -> None:
    path, victim, place = tmp_path / "dead", tmp_path / "victim", tmp_path / name
    victim.write_text('{"event":{"eventType":"x","id":"e9"}}\n')
    before = victim.read_bytes()
    if name != "dead":
        await put_aside_quietly(path, 1)
    if kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(victim if kind == "link" else tmp_path / "new")
    recorder = Recorder()
    why = "is not a regular file" if kind == "fifo" else "is a symbolic link"
    with trio.fail_after(60):
        with pytest.raises(DeadLetterError, match=f"{place}.*: {why}"):
            await replay_into(recorder, path)
        if name in ("dead", "dead.lock"):
            with pytest.raises(DeadLetterError, match=f"{place}: {why}"):
                await put_aside_quietly(path, 2)
    assert victim.read_bytes() == before
    assert not (tmp_path / "new").exists()
    assert stat.S_ISFIFO(place.lstat().st_mode) if kind == "fifo" else place.is_symlink()
    place.unlink()
    if name != "dead":
        await replay_into(recorder, path)
        assert set(recorder.ids) == {"e1"}


@pytest.mark.parametrize("name", ["dead.replayed", "dead.replayed.new"])
async def test_file_that_is_no_count_is_refused_and_left_alone(name: str, tmp_path: Path) -> None:
    await put_aside_quietly(tmp_path / "dead", 1)
    (tmp_path / name).write_text("a diary")
    with pytest.raises(DeadLetterError, match=f"{name}: is not a count of this library"):
        await replay_into(Recorder(), tmp_path / "dead")
    assert (tmp_path / name).read_text() == "a diary"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
async def test_letters_can_be_read_by_their_user_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        await put_aside_quietly(tmp_path / "dead", 1)
        (tmp_path / "dead").rename(tmp_path / "dead.replaying")
        await put_aside_quietly(tmp_path / "dead", 2)
        with pytest.raises(Crash):
            await replay_into(Dying(), tmp_path / "dead")
    finally:
        os.umask(old)
    assert {one.name for one in tmp_path.iterdir()} == {"dead", "dead.replaying"}
    assert {stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()} == {0o600}


class Dying(Recorder):
    async def post(self, event_type: str, content: bytes) -> None:
        raise Crash
