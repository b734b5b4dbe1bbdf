"""What all tests share: Hypothesis profiles, and a client beside a simulated Kadoa."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import attrs
import pytest
from _loopback import everything_said
from hypothesis import HealthCheck, settings

from kadoa_trio import Realtime, open_realtime
from kadoa_trio.testing import SimulatedKadoa, open_simulated_kadoa

# Machines that run tests are shared: no timing decides one.
settings.register_profile("default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _environment_stays_as_it_is() -> Iterator[None]:
    """Fail a test that leaves a variable of the environment changed: a later one in the same process would suffer for it."""
    before = dict(os.environ)
    yield
    changed = {name for name, _ in before.items() ^ os.environ.items()} - {"PYTEST_CURRENT_TEST"}
    assert not changed  # their names only, because the values may be secrets


class Pair(Protocol):
    def __call__(self, **options: Any) -> AbstractAsyncContextManager[tuple[SimulatedKadoa, Realtime]]: ...


@pytest.fixture
def pair() -> Pair:
    """Open a client beside a Kadoa in memory."""

    @asynccontextmanager
    async def opened(**options: Any) -> AsyncIterator[tuple[SimulatedKadoa, Realtime]]:
        async with (
            open_simulated_kadoa() as kadoa,
            open_realtime(kadoa.api_key, endpoints=kadoa.endpoints, **options) as realtime,
        ):
            await kadoa.wait_subscribed(1)
            yield kadoa, realtime

    return opened


@attrs.define(repr=False)  # it stands in the frames that it searches
class Leaks:
    """Searches what a test has made for the secrets that it names. A run of 12 characters of one counts."""

    secrets: list[str] = attrs.field(factory=list)

    def guard(self, *secrets: str) -> None:
        """Search for these from now on, and in every log record of the test."""
        self.secrets += secrets

    def search(self, *texts: str) -> None:
        """Fail if a text holds a secret."""
        for text in texts:
            for secret in self.secrets:
                size = min(len(secret), 12)
                for start in range(len(secret) - size + 1):
                    at = text.find(secret[start : start + size])
                    assert at < 0, text[max(0, at - 300) : at + 100]

    def search_exception(self, exc: BaseException) -> None:
        """Fail if an exception, or a traceback of one in its chain with local variables, holds a secret."""
        self.search(everything_said(exc))


@pytest.fixture
def leaks(caplog: pytest.LogCaptureFixture) -> Iterator[Leaks]:
    """Search exceptions, and after the test every log record of any logger at any level, for secrets."""
    caplog.set_level(1)
    found = Leaks()
    yield found
    for record in caplog.get_records("call"):
        found.search(record.getMessage(), str(vars(record)))
    assert found.secrets, "the test names no secret"
