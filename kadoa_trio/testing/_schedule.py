"""Schedules of faults: written as text, drawn from a seed or by Hypothesis, and played on a server."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final, final

import attrs
import trio

from .._checks import check_delay, check_seconds
from ._faults import FAULTS, FaultKind, FaultTarget, check_kind, chosen_kinds, describe_faults

_MAX_FAULTS: Final = 1_000_000


@final
@attrs.frozen
class ScheduledFault:
    """A fault at a time of a schedule.

    Raises:
        ValueError: the kind is unknown, or a time is negative or not finite.

    The kinds:
    """

    at: float
    """Seconds from the beginning of the schedule."""
    kind: FaultKind
    """What happens; see above."""
    seconds: float = 1.0
    """Duration of the fault, in seconds; without effect for kinds that have no duration."""

    def __attrs_post_init__(self) -> None:
        check_kind(self.kind)
        check_delay("at", self.at)
        check_delay("seconds", self.seconds)

    def __str__(self) -> str:
        duration = "" if FAULTS[self.kind].seconds is None else f" {self.seconds:g}"
        return f"{self.at:g} {self.kind}{duration}"


ScheduledFault.__doc__ = f"{inspect.cleandoc(ScheduledFault.__doc__ or '')}\n\n{describe_faults()}\n"


def _by_time(faults: Iterable[ScheduledFault]) -> tuple[ScheduledFault, ...]:
    listed = list(faults) if isinstance(faults, Iterable) else [faults]
    if not all(isinstance(fault, ScheduledFault) for fault in listed):
        raise TypeError("faults must be a collection of ScheduledFault objects; Schedule.parse() reads a string")
    return tuple(sorted(listed, key=lambda fault: fault.at))


@final
@attrs.frozen
class Schedule:
    """Faults in the order of their times."""

    faults: tuple[ScheduledFault, ...] = attrs.field(default=(), converter=_by_time)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read a schedule: ``"10 drain, 25 reset, 40 outage 5"`` - time, kind, and duration, in seconds.

        ``str()`` of a schedule returns a text that `parse` reads.

        Raises:
            ValueError: the text is not a schedule; the error names the part.
            TypeError: *text* is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"a schedule must be a string, not {type(text).__name__}")
        faults = []
        for part in filter(None, (part.strip() for part in text.replace(";", ",").split(","))):
            words = part.split()
            try:
                if not 2 <= len(words) <= 3:
                    raise ValueError("expected a time and a kind, and optionally a duration")
                kind: Any = words[1]
                faults.append(ScheduledFault(float(words[0]), kind, *map(float, words[2:])))
            except ValueError as exc:
                raise ValueError(f"{part!r}: {exc}") from None
        return cls(tuple(faults))

    @classmethod
    def chaos(
        cls, seed: int, *, seconds: float, every: float = 10.0, kinds: Iterable[FaultKind] | None = None
    ) -> Schedule:
        """Draw a random schedule; the same seed draws the same schedule.

        Args:
            seed: of the random generator.
            seconds: length of the schedule, in seconds.
            every: mean time between two faults, in seconds.
            kinds: the kinds to draw from; None for all but ``forget``, after
                which no client can be complete.

        Raises:
            ValueError: *seconds* is negative or not finite, *every* is not
                positive or not finite, *seconds* is more than a million times
                *every*, or *kinds* names no kind or an unknown one.
        """
        check_delay("seconds", seconds)
        check_seconds("every", every)
        if seconds / every > _MAX_FAULTS:
            raise ValueError(f"seconds must be maximum {_MAX_FAULTS:,} times every, because each fault takes memory")
        rng = random.Random(seed)
        chosen = chosen_kinds(kinds)
        faults = []
        now = rng.expovariate(1 / every)
        while now < seconds:
            faults.append(ScheduledFault(round(now, 3), rng.choice(chosen), round(rng.uniform(0.1, every / 2), 3)))
            now += rng.expovariate(1 / every)
        return cls(tuple(faults))

    def __str__(self) -> str:
        return ", ".join(map(str, self.faults))

    @property
    def length(self) -> float:
        """When the last fault ends, in seconds from the beginning."""
        return max(
            (fault.at + (0 if FAULTS[fault.kind].seconds is None else fault.seconds) for fault in self.faults),
            default=0.0,
        )

    @trio.lowlevel.enable_ki_protection
    async def play(self, kadoa: FaultTarget) -> None:
        """Let the faults happen, each at its time from now; return when the last one has ended.

        A fault of the newest connection does nothing while no connection is
        subscribed. Cancellation ends the faults that last.
        """
        start = trio.current_time()
        lasting: Counter[FaultKind] = Counter()
        try:
            async with trio.open_nursery() as nursery:
                for fault in self.faults:
                    await trio.sleep_until(start + fault.at)
                    FAULTS[fault.kind].begin(kadoa, fault.seconds)
                    if FAULTS[fault.kind].state:
                        lasting[fault.kind] += 1
                        nursery.start_soon(_end_later, kadoa, fault, lasting)
        finally:
            for kind in +lasting:
                FAULTS[kind].end(kadoa)


@trio.lowlevel.enable_ki_protection
async def _end_later(kadoa: FaultTarget, fault: ScheduledFault, lasting: Counter[FaultKind]) -> None:
    await trio.sleep(fault.seconds)
    lasting[fault.kind] -= 1
    if not lasting[fault.kind]:
        FAULTS[fault.kind].end(kadoa)
