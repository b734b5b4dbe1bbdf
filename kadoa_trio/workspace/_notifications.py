"""Kadoa's notifications API: channels, settings, test events, the log of what was sent.

Shapes are those of Kadoa's OpenAPI description, 3.0.0. Where it leaves a
shape open, several shapes are read.
"""

from __future__ import annotations

import json
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar, final
from urllib.parse import quote

import attrs

from .._contexts import async_context
from .._errors import ConfigurationError, ProtocolError
from .._events import read_time, structure, write_time
from .._net._api import KadoaApi, open_api
from .._redact import Secret, hidden
from .._settings import Endpoints, read_key, settings_of

WEBSOCKET: Final = "WEBSOCKET"
"""The type of the channel that sends to WebSockets. A workspace has maximum one."""

MAX_LOG_ROWS: Final = 100
"""Maximum number of rows that one call for the log returns; Kadoa's API description allows no more."""
MAX_LOG_ANSWER: Final = 64 * 1024 * 1024
"""Maximum length of a page of the log, in bytes: each row may carry a whole event."""

_T = TypeVar("_T")


@final
@attrs.frozen(kw_only=True)
class Channel:
    """A destination of a workspace's notifications, such as a WebSocket, a webhook or a mailbox."""

    id: str
    name: str | None = None
    channel_type: str | None = None
    """``"WEBSOCKET"``, ``"WEBHOOK"``, ``"EMAIL"``, ``"SLACK"``, or another."""
    config: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    """The channel's options; those of some types hold addresses and secrets."""

    @property
    def is_websocket(self) -> bool:
        """Whether realtime clients receive from this channel."""
        return self.channel_type is not None and self.channel_type.upper() == WEBSOCKET


@final
@attrs.frozen(kw_only=True)
class Setting:
    """The channels that an event type is sent to, for a workflow or for the whole workspace."""

    id: str
    event_type: str
    workflow_id: str | None = None
    """None for the whole workspace. A workflow's own setting replaces the workspace's."""
    enabled: bool = True
    channel_ids: tuple[str, ...] | None = None
    """None if the answer does not name them."""
    event_configuration: Mapping[str, Any] | None = attrs.field(default=None, repr=False)


@final
@attrs.frozen(kw_only=True)
class LogEntry:
    """One row of the notification log: one attempt to send an event to a channel.

    An event has one row for each channel and attempt, failed ones included. A
    field that is missing or unreadable is None; `raw` has the whole row.
    """

    id: str | None = None
    """The id of the row, not of the event."""
    event_id: str | None = None
    event_type: str | None = None
    event_status: str | None = None
    """The result of the attempt, such as ``"SENT"`` or ``"FAILED"``."""
    workflow_id: str | None = None
    channel_config: Any = attrs.field(default=None, repr=False)
    """The channel. Its shape is not documented; that of some types holds addresses and secrets."""
    payload: Any = attrs.field(default=None, repr=False)
    """The event's payload, or the whole event; which one is not documented."""
    created_at: datetime | None = None
    raw: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    """The row as parsed JSON; empty if it is no object."""


@final
@attrs.frozen(kw_only=True)
class LogPage:
    """A page of the log, in the order of the server."""

    entries: tuple[LogEntry, ...]
    has_more: bool
    total: int | None = None
    """The number of rows of all pages, as the server counts them."""


@final
class Notifications:
    """The notifications API for one API key. Made by `open_notifications`.

    Every call is one request of maximum 30 seconds, which is not repeated.
    Cancellation abandons the request, and a change may have been made.

    Every call raises:

    * `AuthenticationError`: the key was refused;
    * `RequestRefusedError`: any other 4xx, where repeating the request is of no
      use; with Kadoa's own message;
    * `ProtocolError`: the answer is not what is documented;
    * `AttemptError`: everything that may pass, the network included.
    """

    def __init__(self, api: KadoaApi) -> None:
        self._api = api

    def __repr__(self) -> str:
        return "<Notifications>"

    async def channels(self) -> tuple[Channel, ...]:
        """Return the workspace's channels."""
        return _read(_channels, await self._api.call("GET", "/channels"))

    async def create_channel(
        self, name: str, channel_type: str = WEBSOCKET, config: Mapping[str, Any] | None = None
    ) -> Channel:
        """Create a channel, and return it."""
        # Under no name when something is raised, because a webhook's configuration may hold its secret.
        body = Secret(json.dumps({"name": name, "channelType": channel_type, "config": dict(config or {})}))
        del config
        return _read(_channel, await self._api.call("POST", "/channels", body=body))

    async def settings(self) -> tuple[Setting, ...]:
        """Return all settings, of the workspace and of its workflows."""
        return _read(_settings, await self._api.call("GET", "/settings"))

    async def create_setting(
        self,
        event_type: str,
        channel_ids: Sequence[str],
        *,
        workflow_id: str | None = None,
        enabled: bool = True,
        event_configuration: Mapping[str, Any] | None = None,
    ) -> Setting:
        """Send an event type to channels, and return the setting.

        There may be one setting for an event type and a workflow: Kadoa
        refuses a second one with 400, and any for a workflow that is linked
        to a template with 409.
        """
        body: dict[str, object] = {
            "eventType": event_type,
            "eventConfiguration": dict(event_configuration or {}),
            "enabled": enabled,
            "channelIds": list(channel_ids),
        }
        if workflow_id is not None:
            body["workflowId"] = workflow_id
        return _read(_the_setting, await self._api.call("POST", "/settings", body=body))

    async def update_setting(
        self, setting: Setting, *, channel_ids: Sequence[str] | None = None, enabled: bool | None = None
    ) -> Setting:
        """Change a setting, and return it as it is now.

        Args:
            setting: as it was read. Its other fields are sent again unchanged.
            channel_ids: all its channels after the change; None leaves them.
            enabled: whether it takes effect after the change; None leaves this.

        Raises:
            ValueError: its channels are neither given nor known, so that the change could remove them.
        """
        channels = setting.channel_ids if channel_ids is None else tuple(channel_ids)
        if channels is None:
            raise ValueError(
                "the channels of the setting are not known, so that the change could remove them; pass all of them as channel_ids"
            )
        body = {
            "eventType": setting.event_type,
            "eventConfiguration": dict(setting.event_configuration or {}),
            "enabled": setting.enabled if enabled is None else enabled,
            "channelIds": list(channels),
        }
        return _read(_the_setting, await self._api.call("PUT", f"/settings/{quote(setting.id, safe='')}", body=body))

    async def event_types(self) -> tuple[str, ...]:
        """Return the names of the event types that Kadoa knows."""
        data = await self._api.call("GET", "/event-types")
        names = []
        for n, row in enumerate(_rows(data, "eventTypes", "event_types", "types")):
            name = row.get("type", row.get("eventType")) if isinstance(row, dict) else row
            if not isinstance(name, str):
                raise ProtocolError("notifications", f"eventTypes[{n}] has no name")
            names.append(name)
        return tuple(names)

    async def send_test(self, event_type: str, *, workflow_id: str | None = None) -> str | None:
        """Ask Kadoa to send a mock event to all channels that get this type, people's mailboxes included.

        Returns:
            The id of the event, if the answer names one, with the API key
            replaced. That it is the id on the WebSocket is not documented.
        """
        body = {"eventType": event_type}
        if workflow_id is not None:
            body["workflowId"] = workflow_id
        event_id = (await self._api.call("POST", "/test", body=body)).get("eventId")
        return self._api.censor(event_id) if isinstance(event_id, str) else None

    async def log(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        event_type: str | None = None,
        workflow_id: str | None = None,
        offset: int = 0,
        limit: int = MAX_LOG_ROWS,
    ) -> LogPage:
        """Read one page of the log.

        Args:
            since: an aware time; None for the beginning of the log.
            until: an aware time; None for now.
            event_type: only rows of this event type; None for all.
            workflow_id: only rows of this workflow; None for all.
            offset: number of rows before the page; for the next page, add the
                number of entries of this one.
            limit: maximum number of rows of the page, 1 to 100.

        Raises:
            ValueError: *limit* or *offset* is not a whole number or out of its
                range, or a time is not aware.
        """
        if type(limit) is not int or not 1 <= limit <= MAX_LOG_ROWS:
            raise ValueError(f"limit must be a whole number from 1 to {MAX_LOG_ROWS}")
        if type(offset) is not int or not 0 <= offset <= sys.maxsize:
            raise ValueError(f"offset must be a whole number from 0 to {sys.maxsize}")
        params = {"limit": str(limit), "offset": str(offset)}
        for name, time in (("startDate", since), ("endDate", until)):
            if time is not None:
                if time.tzinfo is None:
                    raise ValueError("since and until must be aware times")
                params[name] = write_time(time)
        for name, value in (("eventType", event_type), ("workflowId", workflow_id)):
            if value is not None:
                params[name] = value
        data = await self._api.call("GET", "/logs", params=params, limit=MAX_LOG_ANSWER)
        entries = tuple(map(_log_entry, _rows(data, "events")))
        pagination = data.get("pagination")
        known = pagination if isinstance(pagination, dict) else {}
        total, more = known.get("total"), known.get("hasMore")
        if not isinstance(total, int) or isinstance(total, bool):
            total = None
        if not isinstance(more, bool):
            more = len(entries) >= limit if total is None else offset + len(entries) < total
        return LogPage(entries=entries, has_more=more and bool(entries), total=total)


@async_context
async def open_notifications(
    api_key: str | None = None,
    *,
    endpoints: Endpoints | None = None,
    ssl_context: ssl.SSLContext | None = None,
    allow_insecure: bool = False,
) -> AsyncIterator[Notifications]:
    """Open Kadoa's notifications API. Entering makes no request; leaving closes the connections.

    Example::

        async with open_notifications() as notifications:
            for channel in await notifications.channels():
                print(channel.name, channel.channel_type)

    Args:
        api_key: Kadoa's API key; None reads ``KADOA_API_KEY``.
        endpoints: where Kadoa is; None reads the environment.
        ssl_context: for the API; default as for `open_realtime`.
        allow_insecure: as for `open_realtime`.

    Raises:
        ConfigurationError: an option cannot be used, or there is no key.
    """
    key = hidden(api_key)
    del api_key  # a traceback shows the names of this frame
    settings = settings_of(endpoints=endpoints, ssl_context=ssl_context, allow_insecure=allow_insecure)
    async with open_api(api_key=read_key(key), settings=settings) as api:
        yield Notifications(api)


def find_websocket(channels: Iterable[Channel]) -> Channel | None:
    """Find the channel that realtime clients receive from; a workspace has maximum one."""
    return next((channel for channel in channels if channel.is_websocket), None)


def check_event_types(event_types: Sequence[str]) -> tuple[str, ...]:
    """Return event types without repetitions.

    Raises:
        ConfigurationError: there is none, or one is no string or empty.
    """
    check_names("event types", event_types)
    if not event_types:
        raise ConfigurationError("name at least one event type")
    return tuple(dict.fromkeys(event_types))


def check_names(name: str, values: Iterable[str]) -> None:
    """Refuse what is not a collection of non-empty strings."""
    if (
        isinstance(values, str)
        or not isinstance(values, Iterable)
        or not all(isinstance(one, str) and one for one in values)
    ):
        raise ConfigurationError(f"{name} must be a collection of non-empty strings")


def _read(parse: Callable[[dict[str, object]], _T], data: dict[str, object]) -> _T:
    """Parse an answer. The traceback of a fault shows none of it, because it may hold the secrets of channels."""
    fault: ProtocolError
    try:
        return parse(data)
    except ProtocolError as exc:
        fault = exc
    del data
    raise fault.with_traceback(None)


def _channels(data: dict[str, object]) -> tuple[Channel, ...]:
    return tuple(_one(Channel, row, f"channels[{n}]") for n, row in enumerate(_rows(data, "channels")))


def _channel(data: dict[str, object]) -> Channel:
    return _one(Channel, data.get("channel", data), "channel")


def _settings(data: dict[str, object]) -> tuple[Setting, ...]:
    return tuple(_setting(row, f"settings[{n}]") for n, row in enumerate(_rows(data, "settings")))


def _the_setting(data: dict[str, object]) -> Setting:
    return _setting(data.get("settings", data), "settings")


def _rows(data: Mapping[str, object], *names: str) -> list[Any]:
    for name in (*names, "data"):
        rows = data.get(name)
        if isinstance(rows, list):
            return rows
    raise ProtocolError("notifications", f"the answer has no list of {names[0]}")


def _one(kind: type[_T], row: object, name: str) -> _T:
    fault = ""
    try:
        return structure(row, kind, name)
    except ValueError as exc:
        fault = str(exc)
    raise ProtocolError("notifications", fault)


def _log_entry(row: object) -> LogEntry:
    """Read a row of the log field by field, because one odd field, or one odd row, must not hide the others."""
    if not isinstance(row, dict):
        return LogEntry()
    return LogEntry(
        id=_text(row.get("id")),
        event_id=_text(row.get("eventId")),
        event_type=_text(row.get("eventType")),
        event_status=_text(row.get("eventStatus")),
        workflow_id=_text(row.get("workflowId")),
        channel_config=row.get("channelConfig"),
        payload=row.get("payload"),
        created_at=read_time(row.get("createdAt")),
        raw=row,
    )


def _text(value: object) -> str | None:
    """Read a string, or a whole number instead of one, as `decode` reads ids."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def _setting(row: object, name: str) -> Setting:
    if isinstance(row, dict) and "channelIds" not in row and isinstance(row.get("channels"), list):
        # The API takes ids, and may answer with whole channels.
        ids = [channel.get("id") if isinstance(channel, dict) else channel for channel in row["channels"]]
        row = {**row, "channelIds": ids}
    setting = _one(Setting, row, name)
    try:
        setting.id.encode()  # it goes into a URL
    except UnicodeEncodeError:
        readable = False
    else:
        readable = True
    if not readable:
        raise ProtocolError("notifications", f"{name}.id: not valid Unicode")
    return setting
