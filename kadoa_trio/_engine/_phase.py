"""The life of a connection as data: its phases, and which one may follow which.

`TRANSITIONS` is the whole truth: the connection may enter no other phase, and
the state diagram of the documentation is drawn from it. A drain notice is not
a phase: it may come in `LIVE` and in `STABLE`, and changes neither.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final


@enum.unique
class Phase(enum.IntEnum):
    """Where a connection is in its life. Later phases are larger."""

    TOKEN = 1
    """The access token is requested."""
    HANDSHAKE = 2
    """TCP, TLS and the WebSocket handshake."""
    SUBSCRIBING = 3
    """The socket is open, and the subscription is being sent."""
    SUBSCRIBED = 4
    """The subscription was sent; no frame has come."""
    LIVE = 5
    """A frame has come: the server is there."""
    STABLE = 6
    """The connection has been live for ``stable_after``, without the time in which it was not read."""
    ENDED = 7
    """The connection is not read any more; its socket may still be closing."""
    CLOSED = 8
    """Nothing is left of the connection."""


TRANSITIONS: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.TOKEN: frozenset({Phase.HANDSHAKE, Phase.CLOSED}),
    Phase.HANDSHAKE: frozenset({Phase.SUBSCRIBING, Phase.CLOSED}),
    Phase.SUBSCRIBING: frozenset({Phase.SUBSCRIBED, Phase.ENDED}),
    Phase.SUBSCRIBED: frozenset({Phase.LIVE, Phase.ENDED}),
    Phase.LIVE: frozenset({Phase.STABLE, Phase.ENDED}),
    Phase.STABLE: frozenset({Phase.ENDED}),
    Phase.ENDED: frozenset({Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
}
"""From each phase, the phases that may follow."""


class PhaseError(RuntimeError):
    """A connection cannot enter a phase after its present one: a fault of the library."""


def check_transition(before: Phase, after: Phase) -> None:
    """Check that *after* may follow *before*.

    Raises:
        PhaseError: it may not.
    """
    if after not in TRANSITIONS[before]:
        raise PhaseError(f"a connection cannot go from {before.name} to {after.name}")
