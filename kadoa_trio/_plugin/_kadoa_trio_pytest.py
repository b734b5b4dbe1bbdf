"""The fixture ``simulated_kadoa``, as a pytest plugin.

A module of its own at the top of what is installed, and not in the package:
pytest imports every plugin at every start, and importing the package would
cost each run of each suite some tenths of a second, also where nothing of it
is used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

try:
    # Loaded already where it is installed: it is a plugin, too.
    from pytest_trio import trio_fixture as _fixture  # type: ignore[import-untyped,unused-ignore]  # it has no types
except ImportError:
    _fixture = pytest.fixture


@_fixture  # type: ignore[untyped-decorator,unused-ignore]  # pytest-trio has no types
async def simulated_kadoa() -> AsyncIterator[Any]:  # noqa: ASYNC900  # a fixture
    """A simulated Kadoa in memory, which clients that are opened without endpoints and key talk to.

    Needs pytest-trio. Together with its ``autojump_clock`` everything runs in
    virtual time.
    """
    from kadoa_trio.testing import open_simulated_kadoa

    async with open_simulated_kadoa() as kadoa:
        with kadoa.as_default():
            yield kadoa  # noqa: ASYNC119  # pytest-trio finishes its fixtures
