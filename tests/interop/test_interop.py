"""Other clients, unmodified, against the simulated Kadoa, to show that the simulator speaks Kadoa's protocol.

Run by ``nox -s interop``, which installs Kadoa's official Python SDK from the
package index. Not part of the test suite: kadoa_trio's own client would share
the simulator's errors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from kadoa_trio.testing import SimulatedKadoa, open_simulated_kadoa

HERE = Path(__file__).resolve().parent
PATIENCE = 60


class Client:
    """A client in a process of its own, and what it has reported."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.reported: list[dict[str, Any]] = []
        self.err = b""

    async def listen(self) -> None:
        assert self.process.stdout is not None
        line = b""
        async for data in self.process.stdout:
            *lines, line = (line + data).split(b"\n")
            self.reported += [json.loads(line) for line in lines]

    async def read_err(self) -> None:
        assert self.process.stderr is not None
        async for data in self.process.stderr:
            self.err += data

    def all(self, kind: str) -> list[Any]:
        return [one[kind] for one in self.reported if kind in one]

    @property
    def ids(self) -> list[str]:
        return [event["id"] for event in self.all("event")]

    async def until(self, condition: Callable[[], Any]) -> None:
        while not condition():  # noqa: ASYNC110  # another process has no event
            assert self.process.returncode is None, self.err.decode()
            await trio.sleep(0.02)


@asynccontextmanager
async def client(name: str, kadoa: SimulatedKadoa) -> AsyncIterator[Client]:
    with trio.fail_after(PATIENCE):
        process = await trio.lowlevel.open_process(
            [sys.executable, str(HERE / f"{name}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **kadoa.environment},
        )
        one = Client(process)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.listen)
                nursery.start_soon(one.read_err)
                yield one
                nursery.cancel_scope.cancel()
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


@pytest.fixture
async def kadoa() -> AsyncIterator[SimulatedKadoa]:
    async with open_simulated_kadoa(loopback=True, heartbeat_interval=0.2) as one:
        yield one


def ids(kadoa: SimulatedKadoa) -> list[str]:
    return [event.id or "" for event in kadoa.published]


async def test_official_sdk_receives_is_drained_resumes_and_acknowledges(kadoa: SimulatedKadoa) -> None:
    async with client("sdk_client", kadoa) as sdk:
        await kadoa.wait_subscribed(1)
        await sdk.until(lambda: sdk.all("connected") == [True])
        for kind in ("workflow_finished", "workflow_failed", "workflow_recovered", "workflow_data_change"):
            kadoa.publish(kind)
        await sdk.until(lambda: len(sdk.ids) == 4)
        assert sdk.all("event") == [json.loads(event.frame) for event in kadoa.published]

        last = kadoa.published[-1].cursor
        kadoa.newest.drain(200, close_after=1.0)
        replacement = await kadoa.wait_subscribed(2)
        assert replacement.last_cursor == last
        kadoa.publish_many(5)
        await sdk.until(lambda: len(set(sdk.ids)) == 9)
        old = kadoa.subscribed[0]
        await sdk.until(lambda: not old.open)

        # An outage, and events that are published meanwhile.
        kadoa.newest.reset()
        kadoa.publish_many(3)
        back = await kadoa.wait_subscribed(3)
        assert back.last_cursor == kadoa.published[8].cursor
        await sdk.until(lambda: len(sdk.ids) == 12)
        assert sdk.ids == ids(kadoa)
        await kadoa.wait_settled()
        assert set(kadoa.acknowledged) == set(ids(kadoa))
        assert all(frame["action"] == "subscribe" for one in kadoa.subscribed for frame in one.received)


async def test_official_sdk_receives_nothing_after_its_replacement_dies(kadoa: SimulatedKadoa) -> None:
    # As the documentation's comparison states; kadoa_trio's client opens another connection here.
    async with client("sdk_client", kadoa) as sdk:
        await kadoa.wait_subscribed(1)
        kadoa.publish()
        await sdk.until(lambda: len(sdk.ids) == 1)
        kadoa.newest.drain(200, close_after=1.0)
        await kadoa.wait_subscribed(2)
        kadoa.subscribed[1].reset()
        await sdk.until(lambda: not kadoa.subscribed[0].open)  # the old connection is closed, as announced
        for _ in range(20):
            kadoa.publish()
            await trio.sleep(0.1)  # its own delay is 0.3 s
        assert len(kadoa.subscribed) == 2
        assert len(sdk.ids) == 1


async def test_documented_custom_client_receives_is_drained_and_resumes(kadoa: SimulatedKadoa) -> None:
    async with client("custom_client", kadoa) as custom:
        await kadoa.wait_subscribed(1)
        kadoa.publish_many(3)
        await custom.until(lambda: len(custom.ids) == 3)
        kadoa.newest.drain(200, close_after=1.0)
        replacement = await kadoa.wait_subscribed(2)
        assert custom.all("draining") == [200]
        assert replacement.last_cursor == kadoa.published[2].cursor
        await custom.until(lambda: custom.all("closed"))
        assert custom.all("closed") == [[1001, "Server shutting down"]]
        kadoa.publish_many(3)
        await custom.until(lambda: len(custom.ids) == 6)
        assert custom.ids == ids(kadoa)
        # The library reports the announced end as an error, too; there is no other error.
        assert all("1001" in error for error in custom.all("error"))


async def test_official_sdk_reads_the_simulated_workspace(kadoa: SimulatedKadoa) -> None:
    script = (
        "import json; from kadoa_sdk import KadoaClient, KadoaClientConfig\n"
        "from openapi_client import ApiClient, Configuration, NotificationsApi\n"
        "import os\n"
        "configuration = Configuration(host=os.environ['KADOA_PUBLIC_API_URI'],"
        " api_key={'ApiKeyAuth': os.environ['KADOA_API_KEY']})\n"
        "api = NotificationsApi(ApiClient(configuration))\n"
        "channels = api.v5_notifications_channels_get().data.channels\n"
        "settings = api.v5_notifications_settings_get().data.settings\n"
        "types = api.v5_notifications_event_types_get().data.event_types\n"
        "print(json.dumps([[c.channel_type for c in channels], [[s.event_type, s.channels[0].id] for s in settings],"
        " [t.type for t in types]]))\n"
    )
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(
            [sys.executable, "-c", script], capture_stdout=True, env={**os.environ, **kadoa.environment}
        )
    channels, settings, types = json.loads(done.stdout)
    assert channels == ["WEBSOCKET"]
    assert ["workflow_failed", kadoa.workspace.channels[0]["id"]] in settings
    assert "credits_low" in types
