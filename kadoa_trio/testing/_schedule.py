"""Faults at their times: written down, drawn from a seed, or drawn by Hypothesis; and played."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, Literal, final, get_args

import attrs
import trio

if TYPE_CHECKING:
    from ._simulator import SimulatedKadoa

FaultKind = Literal[
    "drain", "close", "reset", "eof", "silence", "forget", "outage", "tokens", "handshakes", "hang", "stillborn"
]
"""What can go wrong.

* ``drain``: a drain notice on the newest connection, closed with 1001 after its seconds;
* ``close``, ``reset``, ``eof``, ``silence``: the newest connection, with a
  close frame (1011), a TCP reset, an end without a word, or not a word more;
* ``forget``: nothing published so far can be replayed;
* ``outage``: all connections are reset, and none is accepted for its seconds;
* ``tokens``, ``handshakes``: answered with 503 for its seconds;
* ``hang``: token requests are never answered, for its seconds;
* ``stillborn``: a drain, and every connection that subscribes within its
  seconds is reset at once.
"""

_KINDS: Final = frozenset(get_args(FaultKind))
LASTING: Final = frozenset({"drain", "outage", "tokens", "handshakes", "hang", "stillborn"})
"""The kinds that take seconds."""
_FIELDS: Final[dict[str, tuple[str, Any, Any]]] = {
    "outage": ("refuse_connections", True, False),
    "tokens": ("token_status", 503, None),
    "handshakes": ("handshake_status", 503, None),
    "hang": ("token_hang", True, False),
    "stillborn": ("accept_then_reset", True, False),
}


@final
@attrs.frozen
class ScheduledFault:
    """A fault at its time.

    Raises:
        ValueError: the kind is not known, or a number is negative.
    """

    at: float
    """Seconds from the beginning of the schedule."""
    kind: FaultKind
    """``drain``, ``close``, ``reset``, ``eof``, ``silence``, ``forget``, ``outage``, ``tokens``, ``handshakes``, ``hang`` or
    ``stillborn``."""
    seconds: float = 1.0
    """How long it lasts; for a drain, after how long the socket is closed. Without meaning for the other kinds."""

    def __attrs_post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"unknown fault {self.kind!r}; known are {', '.join(sorted(_KINDS))}")
        if not 0 <= self.at < float("inf") or not 0 <= self.seconds < float("inf"):
            raise ValueError("the times of a fault must be finite and not negative")

    def __str__(self) -> str:
        lasting = f" {self.seconds:g}" if self.kind in LASTING else ""
        return f"{self.at:g} {self.kind}{lasting}"


def _by_time(faults: Iterable[ScheduledFault]) -> tuple[ScheduledFault, ...]:
    return tuple(sorted(faults, key=lambda fault: fault.at))


@final
@attrs.frozen
class Schedule:
    """Faults in the order of their times."""

    faults: tuple[ScheduledFault, ...] = attrs.field(default=(), converter=_by_time)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read a schedule: ``"10 drain, 25 reset, 40 outage 5"`` - seconds, kind, and how long.

        ``str()`` writes it in the same way.

        Raises:
            ValueError: it cannot be read; the text says where.
        """
        faults = []
        for part in filter(None, (part.strip() for part in text.replace(";", ",").split(","))):
            words = part.split()
            try:
                if not 2 <= len(words) <= 3:
                    raise ValueError("expected seconds and a kind, and perhaps how long")
                kind: Any = words[1]
                faults.append(ScheduledFault(float(words[0]), kind, *map(float, words[2:])))
            except ValueError as exc:
                raise ValueError(f"{part!r}: {exc}") from None
        return cls(tuple(faults))

    @classmethod
    def chaos(
        cls, seed: int, *, seconds: float, every: float = 10.0, kinds: Iterable[FaultKind] | None = None
    ) -> Schedule:
        """Draw a schedule; the same seed draws the same one.

        Args:
            seed: of the random generator.
            seconds: how long the schedule is.
            every: the mean time between two faults, in seconds.
            kinds: which faults; None for all but ``forget``, after which no
                client can be complete.
        """
        rng = random.Random(seed)
        chosen = sorted(_KINDS - {"forget"} if kinds is None else set(kinds))
        faults = []
        now = rng.expovariate(1 / every)
        while now < seconds:
            kind: Any = rng.choice(chosen)
            faults.append(ScheduledFault(round(now, 3), kind, round(rng.uniform(0.1, every / 2), 3)))
            now += rng.expovariate(1 / every)
        return cls(tuple(faults))

    def __str__(self) -> str:
        return ", ".join(map(str, self.faults))

    @property
    def length(self) -> float:
        """When the last fault is over, in seconds."""
        return max((fault.at + (fault.seconds if fault.kind in LASTING else 0) for fault in self.faults), default=0.0)

    @trio.lowlevel.enable_ki_protection
    async def play(self, kadoa: SimulatedKadoa) -> None:
        """Have the faults, each at its time from now; return when the last one is over.

        Faults of one connection find none sometimes, and then do nothing.
        Being cancelled mends those that last.
        """
        start = trio.current_time()
        lasting: Counter[str] = Counter()
        try:
            async with trio.open_nursery() as nursery:
                for fault in self.faults:
                    await trio.sleep_until(start + fault.at)
                    _strike(kadoa, fault)
                    if fault.kind in _FIELDS:
                        lasting[fault.kind] += 1
                        nursery.start_soon(_end, kadoa, fault, lasting)
        finally:
            for kind in +lasting:
                _mend(kadoa, kind)


def _strike(kadoa: SimulatedKadoa, fault: ScheduledFault) -> None:
    if fault.kind in _FIELDS:
        name, value, _healthy = _FIELDS[fault.kind]
        setattr(kadoa.faults, name, value)
    if fault.kind == "forget":
        kadoa.forget()
    if fault.kind == "outage":
        for connection in list(kadoa.connections):
            connection.reset()
    newest = next((one for one in reversed(kadoa.connections) if one.subscribed), None)
    if newest is None:
        return
    match fault.kind:
        case "drain":
            newest.drain(min(500, fault.seconds * 500), close_after=fault.seconds)
        case "stillborn":
            newest.drain(100, close_after=fault.seconds)
        case "close":
            newest.close(1011, "simulated crash")
        case "reset":
            newest.reset()
        case "eof":
            newest.eof()
        case "silence":
            newest.go_silent()


@trio.lowlevel.enable_ki_protection
async def _end(kadoa: SimulatedKadoa, fault: ScheduledFault, lasting: Counter[str]) -> None:
    await trio.sleep(fault.seconds)
    lasting[fault.kind] -= 1
    if not lasting[fault.kind]:
        _mend(kadoa, fault.kind)


def _mend(kadoa: SimulatedKadoa, kind: str) -> None:
    name, _value, healthy = _FIELDS[kind]
    setattr(kadoa.faults, name, healthy)
