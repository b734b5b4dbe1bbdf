"""The faults that a schedule can name. `FAULTS` is the one list of them.

`FaultKind`, `Schedule.parse`, `Schedule.chaos`, the strategies, the help of
``kadoa-trio simulate`` and the documentation of `ScheduledFault` follow this
table. To add a fault: add its name to `FaultKind` and its entry to `FAULTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Protocol

import attrs

from ._connection import SimulatedConnection
from ._model import Faults


class FaultTarget(Protocol):
    """The server that a schedule is played on: what a fault can change."""

    faults: Faults
    connections: list[SimulatedConnection]

    def forget(self) -> None:
        """Drop every event that was published so far: no replay contains it."""
        ...


FaultKind = Literal[
    "drain", "close", "reset", "eof", "silence", "forget", "outage", "tokens", "handshakes", "hang", "stillborn"
]
"""The name of a fault; `ScheduledFault` describes each."""


@attrs.frozen(kw_only=True)
class Fault:
    """What one kind of fault does."""

    does: str
    """What the fault does, as one sentence for users."""
    seconds: str | None = None
    """What the duration of the fault is; None for a fault without a duration."""
    state: Mapping[str, Any] = attrs.field(factory=dict)
    """The fields of `Faults` that are set for the duration, and their values."""
    server: Callable[[FaultTarget], None] | None = None
    """Called once with the server."""
    newest: Callable[[SimulatedConnection, float], None] | None = None
    """Called once with the newest subscribed connection and the duration; not called if there is no such connection."""
    loses_events: bool = False
    """Whether no client can be complete after the fault, so that random schedules leave it out."""

    def begin(self, kadoa: FaultTarget, seconds: float) -> None:
        """Let the fault happen."""
        self._set(kadoa, self.state)
        if self.server is not None:
            self.server(kadoa)
        newest = next((one for one in reversed(kadoa.connections) if one.subscribed), None)
        if newest is not None and self.newest is not None:
            self.newest(newest, seconds)

    def end(self, kadoa: FaultTarget) -> None:
        """End a fault that has a state."""
        healthy = Faults()
        self._set(kadoa, {name: getattr(healthy, name) for name in self.state})

    def _set(self, kadoa: FaultTarget, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(kadoa.faults, name, value)


def _reset_all(kadoa: FaultTarget) -> None:
    for connection in list(kadoa.connections):
        connection.reset()


FAULTS: Final[Mapping[FaultKind, Fault]] = {
    "drain": Fault(
        does="Sends a drain notice on the newest connection.",
        seconds="time until the connection is closed with 1001",
        newest=lambda connection, seconds: connection.drain(min(500, seconds * 500), close_after=seconds),
    ),
    "close": Fault(
        does="Closes the newest connection with 1011.",
        newest=lambda connection, _seconds: connection.close(1011, "simulated crash"),
    ),
    "reset": Fault(
        does="Breaks the newest connection, as a TCP reset does.",
        newest=lambda connection, _seconds: connection.reset(),
    ),
    "eof": Fault(
        does="Ends the newest connection without a close frame.",
        newest=lambda connection, _seconds: connection.eof(),
    ),
    "silence": Fault(
        does="Stops sending and reading on the newest connection, which stays open.",
        newest=lambda connection, _seconds: connection.go_silent(),
    ),
    "forget": Fault(
        does="Drops every event that was published so far: no replay contains it.",
        server=lambda kadoa: kadoa.forget(),
        loses_events=True,
    ),
    "outage": Fault(
        does="Resets all connections, and refuses new ones.",
        seconds="length of the outage",
        state={"refuse_connections": True},
        server=_reset_all,
    ),
    "tokens": Fault(
        does="Answers token requests with 503.",
        seconds="length of the fault",
        state={"token_status": 503},
    ),
    "handshakes": Fault(
        does="Answers WebSocket handshakes with 503.",
        seconds="length of the fault",
        state={"handshake_status": 503},
    ),
    "hang": Fault(
        does="Never answers token requests.",
        seconds="length of the fault",
        state={"token_hang": True},
    ),
    "stillborn": Fault(
        does="Sends a drain notice, and resets every new connection as soon as it has subscribed.",
        seconds="length of the fault, after which the drained connection is closed, too",
        state={"accept_then_reset": True},
        newest=lambda connection, seconds: connection.drain(100, close_after=seconds),
    ),
}
"""Every fault that a schedule can name."""

HARMLESS: Final[tuple[FaultKind, ...]] = tuple(sorted(kind for kind, fault in FAULTS.items() if not fault.loses_events))
"""The faults that random schedules are drawn from."""


def check_kind(kind: str) -> None:
    """Refuse what is not the name of a fault, with a `ValueError`."""
    if kind not in FAULTS:
        raise ValueError(f"unknown fault {kind!r}; known are {', '.join(sorted(FAULTS))}")


def chosen_kinds(kinds: Iterable[FaultKind] | None) -> Sequence[FaultKind]:
    """Return the kinds to draw from, in a stable order: *kinds*, or the harmless ones for None.

    Raises:
        ValueError: *kinds* names no kind, or an unknown one.
    """
    if kinds is None:
        return HARMLESS
    chosen = set(kinds)
    if not chosen or isinstance(kinds, str):
        raise ValueError("kinds must be a collection of one or more kinds of faults, or None for the harmless ones")
    for kind in chosen:
        check_kind(kind)
    return sorted(chosen)


def describe_faults(item: str = "* ``{kind}``: {does}", duration: str = " Duration: {seconds}.") -> str:
    """List the faults as text: *item* for each, followed by *duration* if the fault has one."""
    return "\n".join(
        item.format(kind=kind, does=fault.does)
        + ("" if fault.seconds is None else duration.format(seconds=fault.seconds))
        for kind, fault in FAULTS.items()
    )
