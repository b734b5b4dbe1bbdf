"""Kadoa's HTTP endpoints: access tokens, acknowledgements, and the notifications API.

Shapes are those of Kadoa's OpenAPI description, 3.0.0.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Final, TypeGuard
from urllib.parse import urlsplit

import attrs
import trio

from .._contexts import async_context
from .._errors import AttemptError, ConfigurationError, ProtocolError, Step, scrubbed
from .._events import parse_json
from .._exits import clean_up
from .._redact import MIN_SECRET, Secret, presentable
from .._settings import CLOSE_TIMEOUT, Settings, fits_header
from ._dial import Address
from ._http import USER_AGENT, HttpClient, open_http, utc_now
from ._kept import KeptConnections, can_keep, keep_connections, post_once

API_TIMEOUT: Final = 30.0
"""Maximum duration of a call of the notifications API, in seconds."""
MAX_API_ANSWER: Final = 8 * 1024 * 1024
"""Maximum length of an answer of the notifications API, in bytes: the settings of about ten thousand workflows."""

# Kadoa's SDKs send both with the API key (github.com/kadoa-org/kadoa-sdks: createSdkHeaders in
# sdks/node/src/client/wiring.ts). There the version is a number alone. Here it names the client, because the number
# would be taken for a version of Kadoa's own Python SDK.
_CALLER: Final = {"x-sdk-language": "python", "x-sdk-version": USER_AGENT}


@attrs.frozen
class Token:
    """An access token, good for one connection attempt, and the channel to subscribe to."""

    access_token: Secret
    team_id: str


@attrs.define(eq=False)
class KadoaApi:
    """Kadoa's HTTP endpoints, for one API key. Made by `open_api`."""

    _http: HttpClient = attrs.field(repr=False)
    _credential: Secret | Callable[[], Awaitable[str]] = attrs.field(repr=False)
    """The key, or what gives it."""
    _settings: Settings = attrs.field(repr=False)
    _kept: KeptConnections | None = attrs.field(init=False, default=None, repr=False)
    """For acknowledgements, once there was one."""

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """What a server may repeat: the key, proxy credentials, and the newest tokens."""
        return self._http.secrets

    def censor(self, text: str) -> str:
        """Replace the secrets in *text*: a server may repeat them in its frames."""
        return self._http.censor(text)

    async def fetch_token(self) -> Token:
        """Trade the API key, which is asked for if it may change, for a fresh access token.

        The whole request, reading the answer included, takes no longer than
        `Timeouts.token`. Cancellation abandons it.

        Raises:
            AuthenticationError: 401 or 403.
            RequestRefusedError: any other 4xx, where repeating the request is of no use.
            ProtocolError: a success, but not the documented JSON, or a team
                whose id shows the key or the token.
            AttemptError: everything that may pass: the network, no answer in
                time, 408, 425, 429, 3xx, 5xx; the function that gives the key
                has failed.
        """
        key = await self._key("token")
        url, timeout = _token_url(self._settings), self._settings.timeouts.token
        headers: dict[str, str | Secret] = {"x-api-key": key, **_CALLER}
        if can_keep(Address.of(url), self._settings):
            # The next token may be hours away, so that no connection is kept for it.
            answer = await post_once(url, self._settings, self._secrets, headers, timeout)
            self._http.conclude("token", answer, timeout, final=True)
        else:
            headers["connection"] = "close"
            answer = await self._http.request("token", "POST", url, timeout=timeout, headers=headers)
        token = _parse_token(answer.content("token"), key)
        if token is None:
            raise ProtocolError("token", "the answer is not the documented JSON", status=answer.status)
        self._http.remember(token.access_token)
        return token

    async def _key(self, step: Step) -> Secret:
        """Return the key as it is now."""
        if isinstance(self._credential, Secret):
            return self._credential
        timeout = self._settings.timeouts.token
        key: Secret | None = None
        with trio.move_on_after(timeout):
            try:
                given = self._credential()
                key = Secret(given if isinstance(given, str) else await given)
                del given  # a traceback shows the names of this frame
            except Exception as exc:
                why = presentable(f"{type(exc).__name__}: {exc}", 300, *self._http.secrets)
                raise AttemptError(step, f"the function given as api_key has failed: {why}") from scrubbed(
                    exc, *self._http.secrets
                )
        if key is None:
            raise AttemptError(step, f"the function given as api_key has returned no key within {timeout:g} s")
        if not isinstance(key.reveal(), str) or not fits_header(key):
            raise AttemptError(
                step, "the function given as api_key has not returned printable ASCII without spaces around it"
            )
        self._http.use(key)
        return key

    async def acknowledge(self, event_id: str) -> None:
        """Acknowledge an event, without the key, as Kadoa's SDKs do.

        Raises:
            AttemptError: Kadoa refused it, or the network failed.
        """
        content, timeout = json.dumps({"id": event_id}).encode(), self._settings.timeouts.token
        kept = self._connections()
        if kept is None:
            url = _acknowledge_url(self._settings)
            await self._http.request("acknowledge", "POST", url, timeout=timeout, content=content, final=False)
        else:
            self._http.conclude("acknowledge", await kept.post(content, timeout), timeout, final=False)

    def _connections(self) -> KeptConnections | None:
        """Return the connections for acknowledgements, which are made when they are first needed; None for httpx's."""
        if self._kept is None:
            url = _acknowledge_url(self._settings)
            if can_keep(Address.of(url), self._settings):
                self._kept = keep_connections(url, self._settings, self._secrets)
        return self._kept

    def _secrets(self) -> tuple[Secret, ...]:
        return self._http.secrets

    async def aclose(self) -> None:
        """Close the connections for acknowledgements. There must be no request."""
        if self._kept is not None:
            await self._kept.aclose()

    async def close_idle(self) -> None:
        """Close connections for acknowledgements while they are not used, until cancelled."""
        kept = self._connections()
        if kept is not None:
            await kept.close_idle()

    async def call(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, str] | None = None,
        body: object = None,
        limit: int = MAX_API_ANSWER,
    ) -> dict[str, object]:
        """Call the notifications API, and return the ``data`` of its answer.

        Args:
            method: the HTTP method.
            path: below ``/v5/notifications``.
            params: of the query.
            body: sent as JSON; a `Secret` is JSON already; None sends none.
            limit: maximum length of the answer, in bytes.

        Raises:
            AuthenticationError, RequestRefusedError, ProtocolError,
                AttemptError: as for `fetch_token`.
        """
        answer = await self._http.request(
            "notifications",
            method,
            f"{self._settings.endpoints.public_api.rstrip('/')}/v5/notifications{path}",
            timeout=API_TIMEOUT,
            limit=limit,
            headers={"x-api-key": await self._key("notifications"), **_CALLER},
            content=body if isinstance(body, Secret) else b"" if body is None else json.dumps(body).encode(),
            params=params,
        )
        data = _parse_object(answer.content("notifications"))
        if data is None:
            raise ProtocolError("notifications", "the answer is not a JSON object", status=answer.status)
        return data


@async_context
async def open_api(
    *,
    api_key: Secret | Callable[[], Awaitable[str]],
    settings: Settings,
    calls: bool = True,
    wall_clock: Callable[[], datetime] = utc_now,
) -> AsyncIterator[KadoaApi]:
    """Open a `KadoaApi`; leaving closes its connections. Entering makes no request.

    Args:
        api_key: the account's key, which goes into one header and nowhere
            else; or a function that gives it, which is awaited for each use.
        settings: the client's options.
        calls: whether `KadoaApi.call` may be used. If not, httpx is imported only if the environment's proxies need it.
        wall_clock: gives the time that a ``Retry-After`` date is measured against.

    Raises:
        ConfigurationError: a header cannot hold the key, or the proxy or the
            certificates that the environment names cannot be used.
    """
    # h11 refuses such a key with an error that shows it.
    if isinstance(api_key, Secret) and not fits_header(api_key):
        raise ConfigurationError("the API key must be printable ASCII, without spaces around it")
    endpoints = settings.endpoints
    urls = [urlsplit(url) for url in (endpoints.public_api, endpoints.realtime_api)]
    async with open_http(
        hosts={url.hostname or "" for url in urls},
        secure=any(url.scheme == "https" for url in urls),
        secrets=(api_key,) if isinstance(api_key, Secret) else (),
        ssl_context=settings.ssl_context,
        transport=None if endpoints.network is None else endpoints.network.http_transport,
        wall_clock=wall_clock,
        at_once=calls or not can_keep(Address.of(_token_url(settings)), settings),
    ) as http:
        api = KadoaApi(http, api_key, settings)
        try:
            yield api
        finally:
            # Shielded, because a Cancelled from here would replace the exception of the caller's block.
            await clean_up(trio.current_time() + CLOSE_TIMEOUT, api.aclose)  # noqa: ASYNC102  # shielded in there


def _token_url(settings: Settings) -> str:
    return f"{settings.endpoints.public_api.rstrip('/')}/v4/oauth2/token"


def _acknowledge_url(settings: Settings) -> str:
    return f"{settings.endpoints.realtime_api.rstrip('/')}/api/v1/events/ack"


def _parse_token(body: bytes, api_key: Secret) -> Token | None:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    access_token, team_id = data.get("access_token"), data.get("team_id")
    # The team's id is shown and saved.
    if _is_text(access_token) and _is_text(team_id) and not _shows(team_id, access_token, api_key):
        # With the key: the WebSocket's server knows the key as well, and may repeat it.
        return Token(Secret(access_token, api_key.reveal()), team_id)
    return None


def _shows(team_id: str, access_token: str, api_key: Secret) -> bool:
    """Whether *team_id* holds the whole key or the whole token.

    A part proves nothing, because the forms of keys and tokens are not
    documented: either may hold the id.
    """
    return any(len(secret) >= MIN_SECRET and secret in team_id for secret in (access_token, api_key.reveal()))


def _parse_object(body: bytes) -> dict[str, object] | None:
    try:
        answer = parse_json(body) if body else {}  # the answers of some calls are empty
    except (ValueError, RecursionError):
        return None
    if isinstance(answer, dict) and "data" in answer:
        # Some answers have a list there, where others have an object with the list under a name.
        answer = answer["data"] if isinstance(answer["data"], dict) else {"data": answer["data"]}
    return answer if isinstance(answer, dict) else None


def _is_text(value: object) -> TypeGuard[str]:
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        # A lone surrogate is valid JSON, but UTF-8 cannot encode it.
        return False
    return True
