"""A server as Kadoa's pages describe one: an event log, connections, replays, and the HTTP side.

Where the pages are silent, every behaviour that they allow is one of the
program's choices (`Style`), since nothing may depend on one of them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
from collections import deque
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

import attrs
import httpx
import trio

from ._pipes import ClientStream, Wire
from ._program import GARBAGE, Style

if TYPE_CHECKING:
    from ._world import World

BASE: Final = datetime(2026, 3, 1, tzinfo=UTC)
KEY: Final = "tk-S3CR3TKEY-0123456789"
TEAM: Final = "team-1"
SECRETS: Final = ("S3CR3TKEY", "S3CR3TTOKEN")
LIFE_OF_A_CONNECTION: Final = 5 * 3_600.0
"""A connection may be replaced for its age after this many seconds."""
STUCK: Final = 3
"""Connections in a row that may resume from one cursor although each could have moved it."""
STUCK_TIME: Final = 50.0
"""A connection can move it this many seconds after the first one: what that one brought counts as replayed 30 s later."""
LONGEST_ID: Final = 256
"""A longer id, in characters, is replaced by one of the client's."""
FIRST_WAIT: Final = 0.55
"""A first wait of the backoff, in seconds, and a little more."""
SHORT_REFUSAL: Final = 60.0
"""A cursor may not be given up for a refusal that is shorter than this, in seconds."""
_TYPES: Final = ("workflow_finished", "workflow_failed", "workflow_data_change", "credits_low")
_NOTICE: Final = -1
"""Stands where the serial of an event would, for a notice whose reading matters."""
FILTER: Final = frozenset({"workflow_finished", "workflow_failed"})


def iso(seconds: float) -> str:
    return (BASE + timedelta(seconds=seconds)).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@attrs.define(eq=False)
class Item:
    """An event of the server's log."""

    serial: int
    sent_at: float
    wall: datetime
    """The time of the client's clock."""
    frame: bytes
    id: str | None
    """What `Event.id` must be; None where the client makes an id of its own."""
    cursor: str | None
    type: str
    row: dict[str, Any]
    exempt: str = ""
    """Why nobody can be blamed for its loss."""

    @property
    def has_id(self) -> bool:
        return self.id is not None


def frame(payload: bytes, opcode: int = 1) -> bytes:
    """Write a WebSocket frame as a server sends it (RFC 6455, 5.2)."""
    first = 0x80 | opcode
    if len(payload) < 126:
        return struct.pack("!BB", first, len(payload)) + payload
    if len(payload) < 1 << 16:
        return struct.pack("!BBH", first, 126, len(payload)) + payload
    return struct.pack("!BBQ", first, 127, len(payload)) + payload


class Conn:
    """A connection, as the server sees it."""

    def __init__(self, server: Server, number: int) -> None:
        style = server.style
        self.server = server
        self.number = number
        self.run = server.world.run
        self.wire = Wire(style.window, style.chunk, style.drop_unread, self._client_closed)
        self.token_number = 0
        self.cursor: str | None = None
        self.subscribed = False
        self.effective = False
        """Its subscription has taken effect."""
        self.live = False
        """It is sent live events."""
        self.live_at = 0.0
        self.live_from = 0
        """The server's log at that time."""
        self.first_frame_at: float | None = None
        self.last_frame_at = 0.0
        self.silent = False
        self.deaf = False
        self.draining = False
        self.closing = False
        self.spoiled = False
        self.refused = False
        self.queue: deque[tuple[bytes, int | None]] = deque()
        self.waiting: list[Item] = []
        """Live events that wait for the end of the replay."""
        self.replaying = False
        self.place: dict[int, int] = {}
        """Serials that were put on the wire, in order."""
        self.fresh = 0
        """Events that no connection of this process had brought before."""
        self.brought: set[int] = set()
        """Replayed events past the cursor."""
        self.changed = trio.lowlevel.ParkingLot()
        self.scope = trio.CancelScope()
        self._buffer = bytearray()

    def __repr__(self) -> str:
        return f"conn {self.number}"

    # ---- state -------------------------------------------------------------------------------------------------

    @property
    def open(self) -> bool:
        return not self.wire.is_over

    @property
    def is_well(self) -> bool:
        """Whether the server serves it as documented."""
        return (
            self.live
            and not (self.wire.is_reset or self.wire.is_finished)
            and not (self.silent or self.closing or self.spoiled)
            and (bool(self.wire.to_client) or trio.current_time() - self.last_frame_at < 29.0)
        )

    @property
    def healthy(self) -> bool:
        """Whether it is open on both ends, and well."""
        return self.open and self.is_well

    # ---- sending -----------------------------------------------------------------------------------------------

    def put(self, payload: bytes, serial: int | None = None, opcode: int = 1) -> None:
        self.queue.append((frame(payload, opcode), serial))
        self.changed.unpark_all()

    def put_item(self, item: Item) -> None:
        self.put(item.frame, item.serial)
        if self.server.style.duplicates and item.serial % 3 == 0:
            self.put(item.frame, item.serial)

    def put_live(self, item: Item) -> None:
        if not self.live or self.deaf or self.closing:
            return
        if self.replaying and self.server.style.order == "before":
            self.waiting.append(item)
        else:
            self.put_item(item)

    def heartbeat(self) -> None:
        self.put(json.dumps({"type": "heartbeat", "timestamp": int(trio.current_time() * 1000)}).encode())

    def close(self, code: int | None, reason: str = "", *, flush: bool = True) -> None:
        """Send a close frame, after what is queued or in place of it."""
        if self.closing or not self.open:
            return
        if code == 1006:  # cannot be sent: the stream just ends
            self.closing = True
            self.wire.finish()
            return
        if not flush:
            self.queue.clear()
        payload = b"" if code is None else struct.pack("!H", code) + reason.encode()[:123]
        self.put(payload, None, 8)
        self.closing = True
        self.server.nursery.start_soon(self._linger)

    async def _linger(self) -> None:
        await trio.sleep(5)
        self.wire.finish()

    def reset(self) -> None:
        if self.open:
            self.wire.reset()
            self.scope.cancel()

    async def _pump(self) -> None:
        while True:
            while not self.queue:
                await self.changed.park()
            data, serial = self.queue.popleft()
            if self.silent:
                continue
            await self.wire.write(data)
            now = trio.current_time()
            if self.first_frame_at is None and data[0] == 0x81:
                self.first_frame_at = now
            self.last_frame_at = now
            if serial == _NOTICE:
                while not (self.wire.client_waits and not self.wire.to_client) and not self.wire.is_over:  # noqa: ASYNC110  # of virtual time
                    await trio.sleep(0.001 if self.wire.client_waits else 0.05)
                if not self.wire.is_over:
                    self.server.announced()
            elif serial is not None and serial not in self.place:
                self.place[serial] = len(self.place)
                if self.run is not None and serial not in self.run.brought:
                    self.run.brought.add(serial)
                    self.fresh += serial not in self.server.world.handed_ever

    async def _beat(self) -> None:
        if self.server.style.heartbeat:
            while True:
                await trio.sleep(self.server.style.heartbeat)
                if self.effective and not self.closing:
                    self.heartbeat()

    # ---- receiving ---------------------------------------------------------------------------------------------

    async def head(self) -> bytes:
        while b"\r\n\r\n" not in self._buffer:
            data = await self.wire.read()
            if not data:
                return b""
            self._buffer += data
        head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        self._buffer = bytearray(rest)
        return head

    async def _frame(self) -> tuple[int, bytes] | None:
        """Read a frame of the client: masked, never fragmented here."""
        buffer = self._buffer
        while True:
            if len(buffer) >= 2:
                size, at = buffer[1] & 0x7F, 2
                if size == 126 and len(buffer) >= 4:
                    size, at = struct.unpack("!H", buffer[2:4])[0], 4
                if (size < 126 or at == 4) and len(buffer) >= at + 4 + size:
                    mask = buffer[at : at + 4]
                    payload = bytes(byte ^ mask[place % 4] for place, byte in enumerate(buffer[at + 4 : at + 4 + size]))
                    opcode = buffer[0] & 0x0F
                    del buffer[: at + 4 + size]
                    return opcode, payload
            data = await self.wire.read()
            if not data:
                return None
            buffer += data

    async def serve(self) -> None:
        """Read until the end, and answer."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump)
                nursery.start_soon(self._beat)
                while (received := await self._frame()) is not None:
                    opcode, payload = received
                    if self.silent:
                        continue
                    if opcode == 1 and not self.subscribed:
                        self.subscribed = True
                        nursery.start_soon(self.server.subscribe, self, json.loads(payload))
                    elif opcode == 9:
                        self.put(payload, None, 10)
                    elif opcode == 8:
                        if not self.closing:
                            self.server.client_closes(self)
                            self.wire.write_now(frame(payload, 8))
                        self.closing = True
                        self.wire.finish()
                nursery.cancel_scope.cancel()
        self.wire.finish()
        self.server.ended(self)

    def _client_closed(self) -> None:
        if self.subscribed and not (self.closing or self.wire.is_reset or self.wire.is_finished):
            self.server.client_closes(self)
        self.closing = True


class Server:
    """The model."""

    def __init__(self, world: World, style: Style) -> None:
        self.world = world
        self.style = style
        self.nursery: trio.Nursery = None  # type: ignore[assignment]  # set by the world
        self.log: list[Item] = []
        self.conns: list[Conn] = []
        self.cursors: dict[str, tuple[int, int]] = {}
        """Cursor: the first and the last serial that carry it."""
        self.foreign: list[dict[str, Any]] = []
        self.transport = Transport(self)
        self.tokens: dict[str, int] = {}
        self.calm = False
        self.faults: dict[str, tuple[float, Any]] = {}
        """Name: until when, and what."""
        self.boundary = 0
        self.unpromised_at: float | None = None
        self.refusals: list[list[float]] = []
        """Spans in which resumptions were refused."""
        self.last_token = ""
        self.attempts: deque[float] = deque()
        self.last_attempt = 0.0
        self.answers: list[tuple[float, str]] = []
        """What token requests and handshakes were answered: the time, and "refused" or "other"."""
        self.attempt_due: tuple[float, float] | None = None
        self.same_cursor: list[Conn] = []
        self.acknowledging = 0
        self.connections = 0
        self.went_deaf = False
        self.jumped = 0.0

    # ---- the network -------------------------------------------------------------------------------------------

    async def open_stream(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        fault = self.fault("connect")
        if fault == "refuse":
            raise ConnectionRefusedError(111, "Connection refused")
        if fault == "hang":
            await trio.sleep_forever()
        conn = Conn(self, len(self.conns) + 1)
        self.conns.append(conn)
        self.connections += 1
        sockets = [one for one in self.conns if not one.wire.client_closed and one.run is conn.run]
        if len(sockets) > 3:
            self.world.fail("bounded", f"{len(sockets)} sockets are open at once: {sockets}")
        self.nursery.start_soon(self._accept, conn)
        return ClientStream(conn.wire)

    settlement_observer = None

    @property
    def http_transport(self) -> object:
        return self.transport

    def fault(self, name: str) -> Any:
        until, what = self.faults.get(name, (0.0, None))
        return what if trio.current_time() < until else None

    async def _accept(self, conn: Conn) -> None:
        head = await conn.head()
        if not head:
            conn.wire.finish()
            return
        target = head.split(b" ", 2)[1].decode()
        token = parse_qs(urlsplit(target).query).get("access_token", [""])[0]
        conn.token_number = self.tokens.get(token, 0)
        fault = self.fault("handshake")
        if fault is not None:
            kind, retry_after = fault
            self.answers.append((trio.current_time(), "refused" if kind in ("401", "403") else "other"))
            if kind == "hang":
                while await conn.wire.read():
                    pass
                conn.wire.finish()
            elif kind == "reset":
                conn.wire.reset()
            elif kind == "close":
                conn.wire.finish()
            elif kind == "garbage":
                conn.wire.write_now(b"SSH-2.0-OpenSSH_9.6\r\n")
                conn.wire.finish()
            else:
                extra = "" if retry_after is None else f"Retry-After: {retry_after}\r\n"
                body = f"refused {token}" if self.world.program.options.debug else "refused"
                conn.wire.write_now(f"HTTP/1.1 {kind} Odd\r\n{extra}Content-Length: {len(body)}\r\n\r\n{body}".encode())
                conn.wire.finish()
            return
        if not conn.token_number:
            self.world.fail("structured", "the client opened a connection with a token that was never given out")
        match = re.search(rb"Sec-WebSocket-Key: (\S+)", head, re.IGNORECASE)
        assert match is not None
        accept = base64.b64encode(hashlib.sha1(match[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        conn.wire.write_now(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )
        self.answers.append((trio.current_time(), "other"))
        lives = self.fault("lives")
        if lives is not None:
            self.nursery.start_soon(self._end_soon, conn, *lives)
        await conn.serve()

    async def _end_soon(self, conn: Conn, seconds: float, how: str) -> None:
        await trio.sleep(seconds)
        if how == "reset":
            conn.reset()
        else:
            conn.close(1011)

    # ---- subscriptions -----------------------------------------------------------------------------------------

    async def subscribe(self, conn: Conn, message: dict[str, Any]) -> None:
        world, style = self.world, self.style
        if message.get("action") != "subscribe" or message.get("channel") != TEAM:
            world.fail("structured", f"not the documented subscription: {message}")
        cursor = conn.cursor = message.get("lastCursor")
        world.trace(f"{conn} subscribes from {cursor} ({self.cursors.get(cursor or '')})")
        if cursor is not None and cursor not in self.cursors:
            world.fail("lossless", f"the client resumes from {cursor!r}, which the server never sent")
            return
        world.subscribed(conn)
        if style.lag:
            # No heartbeat before that: a client could not know that it is not subscribed yet.
            await trio.sleep(style.lag)
        conn.effective = True
        if style.greets:
            conn.heartbeat()
        now = trio.current_time()
        start: int | None = None
        if cursor is not None:
            how = self.fault("refuse")
            first, last = self.cursors[cursor]
            start = first if style.cursors == "grouped" else last + 1
            held_from = self.held_from
            if how is not None or (start < held_from and style.on_forgotten == "refuse"):
                how = how or (1008, False)
                conn.refused = True
                if how[1]:
                    conn.heartbeat()
                if how[0] == "reset":
                    await trio.sleep(0.05)
                    conn.reset()
                else:
                    conn.close(how[0], self.reason())
                self._note_refusal(now)
                return
            if self._is_unpromised(now) and last < self.boundary:
                world.trace(f"{conn}: no replay was promised, and there is none")
                start = None
        conn.live = True
        conn.live_at, conn.live_from = now, len(self.log)
        world.registered()
        if start is None:
            return
        if start < self.held_from:
            for item in self.log[start : self.held_from]:
                item.exempt = item.exempt or "forgotten by the server, and left out of the replay without a word"
            start = self.held_from
        wanted = start
        start = max(self.held_from, start - style.coarse - style.inclusive)
        items = self.log[start:]
        world.trace(f"{conn} is owed {len(items)} events from {start}")
        if items:
            conn.replaying = True
            await self._replay(conn, items, wanted)
        if self.fault("sick") is not None:
            conn.close(1011, "sick")

    def reason(self) -> str:
        return f"go away {self.last_token}" if self.world.program.options.debug else "go away"

    def _note_refusal(self, now: float) -> None:
        if self.refusals and now - self.refusals[-1][1] < 45:
            self.refusals[-1][1] = now
        else:
            self.refusals.append([now, now])

    @property
    def held_from(self) -> int:
        retention = self.style.retention
        return max(0, len(self.log) - retention) if retention else 0

    def _is_unpromised(self, now: float) -> bool:
        if self.unpromised_at is None:
            return False
        for conn in self.conns:
            begun = conn.first_frame_at
            if begun is not None and conn.live_at > self.unpromised_at and conn.last_frame_at - begun > 9.0:
                self.unpromised_at = None
                return False
        return True

    async def _replay(self, conn: Conn, items: list[Item], wanted: int) -> None:
        style = self.style
        if style.order == "live_first" and not self.calm:
            await trio.sleep(style.replay_delay)
        page = style.page or len(items)
        for place in range(0, len(items), page):
            if place and not self.calm:
                await trio.sleep(style.pause)
            for item in items[place : place + page]:
                conn.put_item(item)
                if item.serial >= wanted:
                    conn.brought.add(item.serial)
        conn.replaying = False
        for item in conn.waiting:
            conn.put_item(item)
        conn.waiting.clear()

    # ---- what happens ------------------------------------------------------------------------------------------

    def emit(self, size: int = 0) -> Item:
        """Put one more event into the log, and send it to every live connection."""
        style, serial, now = self.style, len(self.log), trio.current_time()
        cursor = self._cursor(serial)
        event_id: object = f"id-{serial:05d}"
        if style.odd_ids and serial % 2:
            kinds: tuple[object, ...] = (serial + 10_000_000, "x" * 3_000 + str(serial), f"ünï-{serial}-\u202e")
            if style.cursors != "grouped":
                # Without an id of its own the cursor names an event, so that it must be its own.
                kinds += (None, "", ..., "\ud800lone", True, [serial])
            event_id = kinds[serial // 2 % len(kinds)]
        event_type = _TYPES[serial % len(_TYPES)]
        body: dict[str, object] = {"n": serial, "workflowId": f"wf-{serial % 3}"}
        if size:
            body["data"] = "é" * (size // 2)
        message: dict[str, object] = {"eventType": event_type, "timestamp": iso(now), "message": body}
        if style.spellings and serial % 3 == 1:
            message = {"type": event_type, "timestamp": int((BASE.timestamp() + now) * 1000), "message": body}
        elif style.spellings and serial % 3 == 2:
            message = {"eventType": event_type, "timestamp": iso(now), "data": body}
        if event_id is not ...:
            message["id"] = event_id
        if cursor is not None:
            message["_cursor"] = cursor
        expected: str | None = None
        if isinstance(event_id, str) and event_id and "\ud800" not in event_id and len(event_id) <= LONGEST_ID:
            expected = event_id
        elif isinstance(event_id, int) and not isinstance(event_id, bool):
            expected = str(event_id)
        row = {
            "id": f"row-{serial}",
            "workflowId": body["workflowId"],
            "eventType": event_type,
            "eventStatus": "SENT",
            "channelConfig": {"id": "channel-1", "channelType": "WEBSOCKET"},
            "channelType": "WEBSOCKET",
            "channelId": "channel-1",
            "payload": body,
            "eventId": expected,
            "createdAt": iso(now),
        }
        text = json.dumps(message, ensure_ascii=not size or event_id == "\ud800lone").encode()
        item = Item(serial, now, self.world.wall(), text, expected, cursor, event_type, row)
        if cursor is not None:
            first, _ = self.cursors.get(cursor, (serial, serial))
            self.cursors[cursor] = (first, serial)
        self.log.append(item)
        if style.foreign_rows:
            self.foreign.append(
                row
                | {
                    "id": f"mail-{serial}",
                    "eventId": f"foreign-{serial}",
                    "eventStatus": "FAILED",
                    "channelConfig": {"id": "channel-2", "channelType": "EMAIL"},
                    "channelType": "EMAIL",
                    "channelId": "channel-2",
                    "payload": {"n": -1 - serial},
                }
            )
        healthy = [conn for conn in self.conns if conn.healthy]
        deaf = bool(healthy) and all(conn.deaf for conn in healthy)
        if deaf and (style.cursors == "none" or self.world.anchor is None):
            item.exempt = "sent while the server had lost the subscription, and no cursor can bring it back"
        for conn in self.conns:
            conn.put_live(item)
        return item

    def _cursor(self, serial: int) -> str | None:
        kind = self.style.cursors
        if kind == "none" or (kind == "some" and serial % 3 == 2):
            return None
        if kind == "opaque":
            return f"c{serial * 7_919 % 1_000_003:x}"
        number = serial // 3 if kind == "grouped" else serial
        return f"{1742 + number // 12}-{number % 12}"

    def chosen(self, which: str) -> list[Conn]:
        """Give the open connections that a step names."""
        opened = [conn for conn in self.conns if conn.open and conn.subscribed]
        if which == "newest":
            return opened[-1:]
        if which == "oldest":
            return opened[:1]
        return opened

    def reset(self, which: str) -> None:
        for conn in self.chosen(which):
            self._will_break(conn)
            conn.reset()

    def close(self, code: int | None, flush: bool, which: str) -> None:
        for conn in self.chosen(which):
            if code != 1001:
                self._will_break(conn)
            conn.close(code, self.reason(), flush=flush)

    def drain(self, advice: object, promised: bool | None, which: str) -> list[Conn]:
        notice: dict[str, object] = {"type": "control.draining", "connectionId": "12-34-5"}
        if advice is not None:
            notice["retryAfterMs"] = advice
        if promised is not None:
            notice["resumeSupported"] = promised
        notice["deadlineAt"] = iso(trio.current_time() + 10)
        conns = [conn for conn in self.chosen(which) if conn.live and not conn.closing]
        for conn in conns:
            conn.draining = True
            conn.put(json.dumps(notice).encode(), _NOTICE if promised is False else None)
        return conns

    def announced(self) -> None:
        """Note that a client has read that no resumption is promised."""
        self.boundary = len(self.log)
        self.unpromised_at = trio.current_time()

    def garbage(self, kind: int) -> None:
        text = GARBAGE[kind]
        if self.world.program.options.debug and kind % 2:
            text = json.dumps({"type": self.last_token, "x": 1})
        for conn in self.chosen("all"):
            if "draining" in text:
                conn.draining = True
            conn.put(text.encode())

    def heal(self) -> None:
        """End all faults: from now on the server is well."""
        self.calm = True
        self.faults.clear()

    # ---- checks ------------------------------------------------------------------------------------------------

    def _will_break(self, conn: Conn) -> None:
        """Note when the next attempt is due, where this connection made progress and is the only one."""
        now = trio.current_time()
        if (
            conn.fresh
            and conn.healthy
            and not (conn.draining or conn.replaying)
            and conn.wire.client_waits
            and not conn.wire.to_client
            and conn.run is not None
            and conn.run.waiting  # else it may be the client that waits for space
            and conn.token_number == len(self.tokens)
            and sum(one.open for one in self.conns) == 1
            and not any(end > now - 120 for _, end in self.refusals)
            and not any(until > now for until, _ in self.faults.values())
            and len(self.attempts) < 40
            and self.world.is_up(conn.run)
        ):
            self.attempt_due = (now, now + FIRST_WAIT + 2 * self.style.latency)

    def client_closes(self, conn: Conn) -> None:
        """Look at a connection that the client ends."""
        world, now = self.world, trio.current_time()
        world.trace(f"{conn}: the client closes it")
        if (
            conn.is_well
            and not conn.draining
            and not conn.deaf
            and conn.number == max((one.number for one in self.conns if one.live), default=0)
            and conn.token_number == len(self.tokens)
            and world.is_up(conn.run)
            and self.style.heartbeat
            and now - conn.live_at < LIFE_OF_A_CONNECTION
            and not any(end > now - 400 for _, end in self.refusals)
        ):
            world.fail("not deaf", f"the client gave up {conn}, which was healthy and the newest")

    def ended(self, conn: Conn) -> None:
        """Look at a connection that has ended: does the client get ahead?"""
        style = self.style
        if not conn.subscribed:
            return
        if (
            style.cursors != "ordered"
            or conn.cursor is None
            or conn.refused
            or not conn.brought
            or conn.wire.to_client
            or (self.same_cursor and self.same_cursor[-1].cursor != conn.cursor)
            or (self.same_cursor and self.same_cursor[-1].run is not conn.run)
            or trio.current_time() - conn.live_at < 1.0
        ):
            self.same_cursor = []
            return
        self.same_cursor.append(conn)
        # What an earlier one brought and the server has forgotten since tells the client nothing about this replay.
        firsts = [next(old for old in self.same_cursor if old.brought & one.brought) for one in self.same_cursor]
        chances = [
            one.live_at - first.live_at > STUCK_TIME for one, first in zip(self.same_cursor, firsts, strict=True)
        ]
        if sum(chances) >= STUCK:
            self.world.fail(
                "not deaf",
                f"{len(self.same_cursor)} connections in a row resumed from {conn.cursor}, although each brought a "
                "part of the replay, in order: no progress is kept",
            )

    def attempt(self) -> None:
        """Look at an attempt that begins."""
        now = trio.current_time()
        self.last_attempt = now
        self.attempts.append(now)
        while self.attempts[0] <= now - 60:
            self.attempts.popleft()
        if len(self.attempts) > 60:
            self.world.fail("bounded", f"{len(self.attempts)} attempts within 60 s")
        if self.attempt_due is not None:
            broken, due = self.attempt_due
            self.attempt_due = None
            if now > due:
                self.world.fail(
                    "backoff",
                    f"a connection that had delivered new events broke; the next attempt came after {now - broken:.2f} s",
                )


class _Hanging(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'{"acc'
        await trio.sleep_forever()


class Transport(httpx.AsyncBaseTransport):
    """The HTTP side."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.requests = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        server = self._server
        path = request.url.path
        self.requests += 1
        try:
            if path == "/v4/oauth2/token":
                server.attempt()
            if server.style.latency:
                await trio.sleep(server.style.latency)
            if path == "/v4/oauth2/token":
                return await self._token(request)
            if path == "/api/v1/events/ack":
                return await self._acknowledge(request)
            if request.headers.get("x-api-key") != KEY:
                return httpx.Response(401)
            if path == "/v5/notifications/logs":
                return self._logs(request)
            return self._notifications(request, path)
        finally:
            self.requests -= 1

    async def _token(self, request: httpx.Request) -> httpx.Response:
        server = self._server
        fault = server.fault("token")
        now = trio.current_time()
        if fault is not None:
            kind, retry_after = fault
            refused = kind.startswith("4") and kind not in ("408", "425", "429")
            server.answers.append((now, "refused" if refused else "other"))
            if kind == "hang":
                if retry_after is not None:
                    return httpx.Response(200, stream=_Hanging())
                await trio.sleep_forever()
            if kind == "reset":
                raise httpx.ConnectError("connection refused", request=request)
            if kind == "garbage":
                return httpx.Response(200, content=b"<html>hello</html>")
            headers = {} if retry_after is None else {"retry-after": str(retry_after)}
            text = f"no {KEY} {server.last_token}" if server.world.program.options.debug else "no"
            return httpx.Response(int(kind), headers=headers, content=json.dumps({"error": text}).encode())
        server.answers.append((now, "other"))
        number = len(server.tokens) + 1
        token = f"S3CR3TTOKEN-{number:06d}-abcdefghijkl"
        server.tokens[token] = number
        server.last_token = token
        return httpx.Response(200, json={"access_token": token, "team_id": TEAM})

    async def _acknowledge(self, request: httpx.Request) -> httpx.Response:
        server = self._server
        server.acknowledging += 1
        try:
            if server.acknowledging > 4:
                server.world.fail("bounded", f"{server.acknowledging} acknowledgements at once")
            await trio.sleep(0.3)
            return httpx.Response(200, json={})
        finally:
            server.acknowledging -= 1

    def _logs(self, request: httpx.Request) -> httpx.Response:
        server = self._server
        params = request.url.params
        start = datetime.fromisoformat(params.get("startDate", "2000-01-01T00:00:00Z"))
        end = datetime.fromisoformat(params.get("endDate", "2100-01-01T00:00:00Z"))
        seen = trio.current_time() - server.style.log_lag
        rows = [item.row for item in server.log if item.sent_at <= seen] + server.foreign
        rows = [row for row in rows if start <= datetime.fromisoformat(row["createdAt"]) <= end]
        rows.sort(key=lambda row: row["createdAt"], reverse=True)
        offset, limit = int(params.get("offset", "0")), int(params.get("limit", "50"))
        page = rows[offset : offset + limit]
        pagination = {"total": len(rows), "limit": limit, "offset": offset, "hasMore": offset + limit < len(rows)}
        return httpx.Response(200, json={"data": {"events": page, "pagination": pagination}, "status": "success"})

    def _notifications(self, request: httpx.Request, path: str) -> httpx.Response:
        channels = [
            {"id": "channel-1", "name": "socket", "channelType": "WEBSOCKET", "config": {}},
            {"id": "channel-2", "name": "mail", "channelType": "EMAIL", "config": {}},
        ]
        settings = [
            {
                "id": f"setting-{place}",
                "eventType": event_type,
                "eventConfiguration": {},
                "enabled": True,
                "workflowId": None,
                "channelIds": ["channel-1"],
            }
            for place, event_type in enumerate(_TYPES)
        ]
        if request.method == "GET" and path.endswith("/channels"):
            return httpx.Response(200, json={"data": {"channels": channels}})
        if request.method == "GET" and path.endswith("/settings"):
            return httpx.Response(200, json={"data": {"settings": settings}})
        if request.method == "GET" and path.endswith("/event-types"):
            return httpx.Response(200, json={"data": {"eventTypes": [{"eventType": one} for one in _TYPES]}})
        if request.method == "POST" and path.endswith("/test"):
            return httpx.Response(200, json={"data": {"eventId": self._server.emit().id}})
        return httpx.Response(404, json={"error": "no such thing"})
