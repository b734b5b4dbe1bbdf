"""What all tests share: Hypothesis profiles, and a client beside a simulated Kadoa."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, settings

from kadoa_trio import Realtime, open_realtime
from kadoa_trio.testing import SimulatedKadoa, open_simulated_kadoa

# Machines that run tests are shared: no timing decides one.
settings.register_profile("default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


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
