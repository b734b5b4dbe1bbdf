"""The fixture ``simulated_kadoa``, as a pytest plugin.

Installed as a top-level module, outside of the package: pytest imports every
plugin at every start, and importing the package would cost each run of each
test suite more than 0.1 seconds, even if the suite does not use the fixture.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

try:
    # Costs nothing: pytest has already loaded pytest-trio, which is a plugin itself, if it is installed.
    from pytest_trio import trio_fixture as _fixture  # type: ignore[import-untyped,unused-ignore]  # it has no types
except ImportError:
    _fixture = pytest.fixture


@_fixture  # type: ignore[untyped-decorator,unused-ignore]  # pytest-trio has no types
async def simulated_kadoa() -> AsyncIterator[Any]:  # noqa: ASYNC900  # a fixture
    """A simulated Kadoa in memory, used by all clients that are opened without endpoints and API key.

    Needs pytest-trio. Request the fixture ``autojump_clock``, too, to run in
    virtual time.
    """
    from kadoa_trio.testing import open_simulated_kadoa

    async with open_simulated_kadoa() as kadoa:
        with kadoa.as_default():
            yield kadoa  # noqa: ASYNC119  # pytest-trio finishes its fixtures
