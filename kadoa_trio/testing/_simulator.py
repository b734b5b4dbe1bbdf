"""The simulated Kadoa: tokens, WebSocket, acknowledgements, notification log; in memory or on loopback."""

from __future__ import annotations

import errno
import json
import os
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import h11
import httpx
import trio

from .._checks import check_flag, check_port, check_seconds
from .._contexts import async_context, sync_context
from .._exits import hidden_nursery
from .._settings import Endpoints, default_endpoints
from ._builders import Draft, documented
from ._connection import SimulatedConnection
from ._model import Faults, PublishedEvent, Send, Spelling, Stream, everywhere
from ._schedule import Schedule
from ._streams import FaultyStream, stream_pair
from ._workspace import Workspace

_MAX_BODY = 1024 * 1024
_MAX_TOKENS = 1_000

_HttpAnswer = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


class SimulatedKadoa:
    """A server that speaks Kadoa's documented protocol. Made by `open_simulated_kadoa`.

    Publishing and faults are plain calls: they take effect immediately and
    never wait for a client.
    """

    def __init__(self, nursery: trio.Nursery, heartbeat_interval: float) -> None:
        self._nursery = nursery
        self._left = False
        self._tokens: dict[str, None] = {}
        self._changed = trio.Event()
        self._settled: set[str | None] = set()
        self._settlement = trio.Event()
        self.heartbeat_interval = heartbeat_interval
        """Seconds between heartbeats."""
        self.api_key: str = "key-" + secrets.token_hex(16)
        """The only API key that the server accepts."""
        self.team_id: str = "team-1"
        """The team that every token is for."""
        self.faults: Faults = Faults()
        """The faults that are in effect."""
        self.stream: Stream = Stream()
        self.workspace: Workspace = Workspace()
        """Channels and settings. They decide where `dispatch` and test events go; `publish` ignores them."""
        self.connections: list[SimulatedConnection] = []
        """The open connections, oldest first."""
        self.subscribed: list[SimulatedConnection] = []
        """Every connection that has subscribed, in order."""
        self.acknowledged: list[str] = []
        """Ids of the acknowledged events, in order."""
        self.token_requests: int = 0
        """Number of token requests."""
        self.log_requests: int = 0
        """Number of requests for the notification log."""
        self.handshakes: int = 0
        """Number of WebSocket handshakes."""
        self.attempt_times: list[float] = []
        """Time of each token request, on Trio's clock."""
        self.max_open_connections: int = 0
        """Maximum number of connections that were open at the same time."""
        self.endpoints: Endpoints = Endpoints()
        """The server's endpoints, to pass to a client."""

    def __repr__(self) -> str:
        return f"<SimulatedKadoa, {len(self.connections)} connections, {len(self.stream.events)} events>"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that make any Kadoa client use this server."""
        return {
            "KADOA_API_KEY": self.api_key,
            "KADOA_PUBLIC_API_URI": self.endpoints.public_api,
            "KADOA_WSS_API_URI": self.endpoints.websocket,
            "KADOA_REALTIME_API_URI": self.endpoints.realtime_api,
        }

    @property
    def published(self) -> list[PublishedEvent]:
        """Every published event, in order."""
        return self.stream.events

    @property
    def newest(self) -> SimulatedConnection:
        """The newest open connection that has subscribed.

        Raises:
            LookupError: no open connection has subscribed.
        """
        for connection in reversed(self.connections):
            if connection.subscribed:
                return connection
        raise LookupError("no connection is subscribed")

    # ---- what tests do -----------------------------------------------------------------------------------------

    def publish(
        self,
        event_type: str | Draft = "workflow_finished",
        message: Any = None,
        *,
        id: str | None = None,
        with_id: bool = True,
        workflow_id: str | None = None,
        timestamp: datetime | None = None,
        spelling: Spelling = "documented",
    ) -> PublishedEvent:
        """Publish an event to every connection that has subscribed.

        Args:
            event_type: a draft, such as ``workflow_failed(reason="...")``, or
                the name of an event type.
            message: the payload; None for the payload of the draft, or for
                the documented payload of the event type.
            id: the event's id; None for a new one.
            with_id: False sends the event without an id.
            workflow_id: the workflow in the documented payload.
            timestamp: the event's time; None for one second after the
                previous event, beginning in 2026.
            spelling: the spelling of the frame.
        """
        event = self._publish(event_type, message, workflow_id, id, with_id, timestamp, spelling)
        # A list: a Ctrl-C while a generator is closed would be swallowed.
        heard = any([connection.subscribed for connection in self.connections])  # noqa: C419  # see above
        at = trio.current_time()
        self.stream.notify(event, everywhere(event.number, heard=heard), at)
        if event.number % 4 == 1:
            mail = self.stream.elsewhere("credits_low", {"remaining": event.number})
            self.stream.notify(mail, [Send("EMAIL", "FAILED"), Send("EMAIL", "SENT")], at)
        return event

    def dispatch(
        self, event_type: str | Draft, message: Any = None, *, workflow_id: str | None = None, id: str | None = None
    ) -> PublishedEvent | None:
        """Publish an event to the channels that the workspace's settings name, the WebSocket or others.

        `publish`, in contrast, sends to the WebSocket whatever the settings are.

        Args:
            event_type: as for `publish`.
            message: as for `publish`.
            workflow_id: the workflow in the documented payload; its settings
                win over the workspace's.
            id: as for `publish`.

        Returns:
            The event, if it went to the WebSocket; else None.
        """
        name = event_type.type if isinstance(event_type, Draft) else event_type
        kinds = self.workspace.channel_types(name, workflow_id)
        event: PublishedEvent | None = None
        if "WEBSOCKET" in kinds:
            event = sent = self._publish(event_type, message, workflow_id, id, True, None, "documented")
        elif kinds:
            draft = event_type if isinstance(event_type, Draft) else documented(name, workflow_id, 0)
            sent = self.stream.elsewhere(name, draft.message if message is None else message, id=id)
        else:
            return None
        # A list: a Ctrl-C while a generator is closed would be swallowed.
        heard = any([connection.subscribed for connection in self.connections])  # noqa: C419  # see above
        sends = []
        for kind in kinds:
            if kind == "WEBSOCKET":
                sends.append(Send(kind, "SENT" if heard else "FAILED"))
            else:
                sends += [Send(kind, "FAILED"), Send(kind, "SENT")]
        self.stream.notify(sent, sends, trio.current_time())
        return event

    def _publish(
        self,
        event_type: str | Draft,
        message: Any,
        workflow_id: str | None,
        id: str | None,
        with_id: bool,
        timestamp: datetime | None,
        spelling: Spelling,
    ) -> PublishedEvent:
        draft = event_type if isinstance(event_type, Draft) else None
        if draft is None and message is None:
            draft = documented(str(event_type), workflow_id, len(self.stream.events))
        if draft is not None:
            event_type, message = draft.type, draft.message if message is None else message
        event = self.stream.publish(
            str(event_type),
            message,
            id=id,
            with_id=with_id,
            with_cursor=not self.faults.without_cursors,
            timestamp=timestamp,
            spelling=spelling,
        )
        for connection in self.connections:
            connection.live(event)
        return event

    def publish_many(self, count: int, event_type: str | Draft = "workflow_finished") -> list[PublishedEvent]:
        """Publish *count* events."""
        return [self.publish(event_type) for _ in range(count)]

    def forget(self) -> None:
        """Drop every event that was published so far: no replay contains it."""
        self.stream.forget()

    def heal(self) -> None:
        """End all faults."""
        self.faults = Faults()

    @sync_context
    def suffering(self, **faults: Any) -> Iterator[None]:
        """Set faults for the duration of a block, such as ``suffering(token_status=503)``."""
        self.faults = Faults(**faults)
        try:
            yield
        finally:
            self.heal()

    @sync_context
    def as_default(self) -> Iterator[None]:
        """Make this server the default of clients that are opened without endpoints and API key, for a block.

        This applies to the task that enters the block, and to tasks that are
        started inside of it (a context variable). The environment variables
        are set, too, for other processes, which reach the server if it is on
        loopback.
        """
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        token = default_endpoints.set(self.endpoints)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            default_endpoints.reset(token)

    @property
    def subscriptions(self) -> list[tuple[int, str | None]]:
        """Connection number and cursor of every subscription, in order."""
        return [(connection.number, connection.last_cursor) for connection in self.subscribed]

    @property
    def settled(self) -> list[PublishedEvent]:
        """The events that a client has settled, in the order of the stream.

        In memory, the server sees each settlement immediately. On loopback,
        it sees acknowledgements only: a client sends at most 1,200 of them per
        second, none if it is opened with ``acknowledge=False``, and does not
        repeat one that was lost in an outage.
        """
        return [event for event in self.stream.events if event.id in self._settled]

    async def wait_settled(self, *events: PublishedEvent) -> None:
        """Wait until *events* are settled; without *events*, all that were published so far. See `settled`."""
        await trio.lowlevel.checkpoint()
        wanted = {event.id for event in (events or self.stream.events)}
        while not wanted <= self._settled:
            await self._settlement.wait()

    async def play(self, schedule: Schedule) -> None:
        """Let the faults of a schedule happen, each at its time from now. Cancellation ends those that last."""
        await schedule.play(self)

    async def wait_subscribed(self, count: int) -> SimulatedConnection:
        """Wait until *count* connections have subscribed since the beginning, and return the last of them."""
        await trio.lowlevel.checkpoint()
        while len(self.subscribed) < count:
            await self._changed.wait()
        return self.subscribed[count - 1]

    # ---- what the server does ----------------------------------------------------------------------------------

    @property
    def _refuses_connections(self) -> bool:
        return self.faults.refuse_connections or self._left

    @trio.lowlevel.enable_ki_protection
    def _start(self, async_fn: Callable[..., Awaitable[object]], *args: object) -> None:
        self._nursery.start_soon(async_fn, *args)

    def _note_settled(self, event_id: str) -> None:
        self._settled.add(event_id)
        self._settlement.set()
        self._settlement = trio.Event()

    def _connection_subscribed(self, connection: SimulatedConnection) -> None:
        self.subscribed.append(connection)
        self._changed.set()
        self._changed = trio.Event()

    def _connection_ended(self, connection: SimulatedConnection) -> None:
        self.connections.remove(connection)

    def _spend(self, counter: str, faulty: bool) -> bool:
        """Return whether this request meets a fault; a limited number of them is counted down."""
        if not faulty:
            return False
        left: int | None = getattr(self.faults, counter)
        if left is None:
            return True
        setattr(self.faults, counter, max(left - 1, 0))
        return left > 0

    def _token_is_good(self, path: str) -> bool:
        asked = parse_qs(urlsplit(path).query).get("access_token", [])
        return len(asked) == 1 and asked[0] in self._tokens

    @trio.lowlevel.enable_ki_protection
    async def _serve_websocket(self, stream: FaultyStream) -> None:
        connection = SimulatedConnection(self, self.handshakes + 1, stream)
        self.connections.append(connection)
        self.max_open_connections = max(self.max_open_connections, len(self.connections))
        await connection.serve()

    async def _answer(self, method: str, target: str, key: str | None, body: bytes) -> _HttpAnswer:
        """Answer a request, with 400 if a part of it cannot be read."""
        try:
            return await self._route(method, target, key, body)
        except (ValueError, TypeError, RecursionError):
            return 400, {}, b'{"error":"the request cannot be read"}'

    async def _route(self, method: str, target: str, key: str | None, body: bytes) -> _HttpAnswer:
        faults = self.faults
        path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
        if (method, path) == ("POST", "/v4/oauth2/token"):
            self.token_requests += 1
            self.attempt_times.append(trio.current_time())
            faulty = faults.token_hang or faults.token_status is not None or faults.token_body is not None
            if self._spend("token_failures", faulty):
                if faults.token_hang:
                    await trio.sleep_forever()
                content = b'{"error":"simulated"}' if faults.token_body is None else faults.token_body
                return faults.token_status or 200, faults.token_headers, content
            if key != self.api_key:
                return 401, {}, b'{"error":"invalid API key"}'
            token = secrets.token_urlsafe(24)
            self._tokens[token] = None
            if len(self._tokens) > _MAX_TOKENS:
                del self._tokens[next(iter(self._tokens))]
            return 200, {}, json.dumps({"access_token": token, "team_id": self.team_id}).encode()
        if (method, path) == ("POST", "/api/v1/events/ack"):
            if faults.ack_hang:
                await trio.sleep_forever()
            if faults.ack_status is not None:
                return faults.ack_status, {}, b'{"error":"simulated"}'
            event = json.loads(body)
            if not isinstance(event, dict) or not isinstance(event.get("id"), str):
                return 400, {}, b'{"error":"no id"}'
            self.acknowledged.append(event["id"])
            self._note_settled(event["id"])
            return 200, {}, b"{}"
        if (method, path) == ("GET", "/v5/notifications/logs"):
            self.log_requests += 1
            if self._spend("log_failures", faults.log_status is not None):
                return faults.log_status or 500, faults.log_headers, b'{"error":"simulated"}'
            if key != self.api_key:
                return 401, {}, b'{"error":"invalid API key"}'
            return 200, {}, self._log(query)
        if path.startswith("/v5/notifications/"):
            if faults.api_status is not None or faults.api_body is not None:
                content = b'{"error":"simulated"}' if faults.api_body is None else faults.api_body
                return faults.api_status or 200, {}, content
            if key != self.api_key:
                return 401, {}, b'{"error":"invalid API key"}'
            status, answer = self.workspace.answer(method, path.removeprefix("/v5/notifications"), body, self._test)
            return status, {}, json.dumps(answer).encode()
        return 404, {}, b'{"error":"not found"}'

    def _test(self, event_type: str, workflow_id: str | None) -> str:
        """Send a mock event to the channels that the workspace's settings name."""
        event_id = str(uuid.uuid4())
        self.dispatch(event_type, workflow_id=workflow_id, id=event_id)
        return event_id

    def _log(self, query: Mapping[str, list[str]]) -> bytes:
        """Answer a request for the notification log."""
        start, end = (
            datetime.fromisoformat(query[name][0]) if name in query else None for name in ("startDate", "endDate")
        )
        limit = min(max(int(query.get("limit", ["50"])[0]), 1), 100)
        offset = max(int(query.get("offset", ["0"])[0]), 0)
        rows = self.stream.log(self.faults, trio.current_time(), start, end)
        for name in ("eventType", "workflowId"):
            if name in query:
                rows = [row for row in rows if row[name] == query[name][0]]
        pagination: dict[str, Any] = {
            "total": len(rows),
            "limit": limit,
            "offset": offset,
            "hasMore": offset + limit < len(rows),
        }
        if self.faults.log_without_total:
            del pagination["total"]
        events = rows[offset : offset + limit]
        return json.dumps({"data": {"events": events, "pagination": pagination}, "status": "success"}).encode()

    async def _listen(self, *, loopback: bool, port: int) -> None:
        if not loopback:
            address, network = "localhost:1", _MemoryNetwork(self)
        else:
            listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
            self._start(trio.serve_listeners, self._serve_tcp, listeners)
            address, network = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}", None
        self.endpoints = Endpoints(
            public_api=f"http://{address}",
            websocket=f"ws://{address}",
            realtime_api=f"http://{address}",
            network=network,
        )

    # ---- on loopback -------------------------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def _serve_tcp(self, stream: trio.SocketStream) -> None:
        faulty = FaultyStream(stream)
        if self.faults.refuse_connections:
            faulty.reset()
            return
        try:
            head = await stream.receive_some(4096)
            served = FaultyStream(stream, prefix=bytes(head))
            if b"upgrade: websocket" in head.lower():
                await self._serve_websocket(served)
            elif head:
                await self._serve_http(served)
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
            pass  # the client has closed the connection
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async def _serve_http(self, stream: FaultyStream) -> None:
        http = h11.Connection(h11.SERVER)
        while True:
            request: h11.Request | None = None
            body = b""
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(bytes(await stream.receive_some(65536)))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += event.data
                    if len(body) > _MAX_BODY:
                        return
                elif isinstance(event, h11.EndOfMessage):
                    break
                else:
                    return
            assert request is not None
            key = next((value.decode("latin-1") for name, value in request.headers if name == b"x-api-key"), None)
            method, target = request.method.decode("ascii"), request.target.decode("ascii")
            status, headers, answer = await self._answer(method, target, key, body)
            fields = {"Content-Type": "application/json", "Content-Length": str(len(answer)), **headers}
            response = h11.Response(status_code=status, headers=list(fields.items()), reason=b"Simulated")
            data = b""
            for part in (response, h11.Data(data=answer), h11.EndOfMessage()):
                data += http.send(part) or b""
            await stream.send_all(data)
            if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                return
            http.start_next_cycle()


class _Identified(Protocol):
    """The part of an event that the server needs in order to recognise it."""

    @property
    def id(self) -> str: ...


class _SettlementObserver:
    """Sees each settlement of a client in memory: acknowledgements come later, and may be lost."""

    def __init__(self, kadoa: SimulatedKadoa) -> None:
        self._kadoa = kadoa

    def settled(self, event: _Identified) -> None:
        self._kadoa._note_settled(event.id)


class _MemoryNetwork(httpx.AsyncBaseTransport):
    """The network of a simulated Kadoa in memory: without sockets, so that virtual time works."""

    def __init__(self, kadoa: SimulatedKadoa) -> None:
        self._kadoa = kadoa
        self.settlement_observer = _SettlementObserver(kadoa)

    @property
    def http_transport(self) -> object:
        return self

    async def open_stream(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        await trio.lowlevel.checkpoint()
        if self._kadoa._refuses_connections:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        client, server = stream_pair()
        self._kadoa._start(self._kadoa._serve_websocket, server)
        return client

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        if self._kadoa._refuses_connections:
            raise httpx.ConnectError("Connection refused", request=request)
        body = await request.aread()
        headers: Mapping[str, str]
        status, headers, answer = await self._kadoa._answer(
            request.method, request.url.raw_path.decode("ascii"), request.headers.get("x-api-key"), body
        )
        return httpx.Response(status, headers=headers, content=answer, request=request)


@async_context
async def open_simulated_kadoa(
    *, loopback: bool = False, heartbeat_interval: float = 15.0, port: int = 0
) -> AsyncIterator[SimulatedKadoa]:
    """Run a simulated Kadoa for the duration of a block.

    Args:
        loopback: listen on a port of 127.0.0.1, for any client. False makes
            the server reachable in memory only, where everything runs on
            Trio's clock: with a `trio.testing.MockClock`, a simulated day
            takes seconds.
        heartbeat_interval: time between two heartbeats, in seconds. Default:
            15, as Kadoa's.
        port: on loopback, the port to listen on; 0 lets the system choose.

    Raises:
        ConfigurationError: an option cannot be used.
        OSError: the port cannot be listened on.
    """
    check_flag("loopback", loopback)
    check_seconds("heartbeat_interval", heartbeat_interval, unlimited=True)
    check_port("port", port)
    async with hidden_nursery("the simulated Kadoa is left") as nursery:
        kadoa = SimulatedKadoa(nursery, heartbeat_interval)
        try:
            await kadoa._listen(loopback=loopback, port=port)
            yield kadoa
        finally:
            kadoa._left = True
