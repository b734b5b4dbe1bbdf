"""How long to wait before the next attempt: full jitter, bounded on both sides."""

from __future__ import annotations

import random
from collections import deque

import attrs

from ._errors import ConfigurationError


def _positive(_instance: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigurationError(f"{attribute.name} must be a positive, finite number, not {value!r}")


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """When the client tries again, in seconds.

    The wait before attempt *n* after *n* failures in a row is drawn evenly
    from 0 to ``min(maximum, initial * 2**(n - 1))`` ("full jitter"), so that
    the clients of a server that restarts do not come back together. A
    connection counts as a failure unless it was *stable* before it ended.

    Raises:
        ConfigurationError: a value is not positive and finite, or
            ``attempts_per_minute`` is below 1.
    """

    first: float = attrs.field(default=0.2, validator=_positive)
    """Upper end of the wait after a *stable* connection was lost. Default 0.2 s."""
    initial: float = attrs.field(default=0.5, validator=_positive)
    """Upper end of the wait after the first failure. Default 0.5 s."""
    maximum: float = attrs.field(default=30.0, validator=_positive)
    """Upper end of any wait. Default 30 s, so that an outage of hours ends within half a minute of its end."""
    retry_after_limit: float = attrs.field(default=120.0, validator=_positive)
    """A longer ``Retry-After`` is cut to this. Default 120 s: no server may make the client deaf."""
    attempts_per_minute: int = 60
    """At most this many attempts begin within any 60 s, whatever else happens. Default 60."""

    def __attrs_post_init__(self) -> None:
        if self.attempts_per_minute < 1:
            raise ConfigurationError("attempts_per_minute must be at least 1")


@attrs.define(eq=False)
class Backoff:
    """Counts failures and attempts, and says how long to wait. No clock of its own."""

    policy: RetryPolicy
    rng: random.Random
    failures: int = 0
    """Attempts that failed, and connections that ended before they were stable, in a row."""
    _begun: deque[float] = attrs.field(factory=deque)

    def failed(self) -> None:
        """Record a failed attempt, or a connection that ended before it was stable."""
        self.failures += 1

    def stable(self) -> None:
        """Record that a connection has become stable: the next failure is a first one."""
        self.failures = 0

    def delay(self, retry_after: float | None = None) -> float:
        """Draw the wait before the next attempt, in seconds.

        A server's ``Retry-After`` is a lower bound, itself bounded.
        """
        policy = self.policy
        if self.failures == 0:
            span = policy.first
        else:
            # The exponent is cut so that weeks of failures do not overflow a float.
            span = min(policy.maximum, policy.initial * 2.0 ** min(self.failures - 1, 60))
        delay = self.rng.uniform(0, span)
        if retry_after is not None and retry_after > 0:
            delay = max(delay, min(retry_after, policy.retry_after_limit))
        return delay

    def begin(self, now: float) -> None:
        """Record that an attempt begins at *now* (the clock of the caller, in seconds)."""
        self._begun.append(now)
        while len(self._begun) > self.policy.attempts_per_minute:
            self._begun.popleft()

    def earliest(self, now: float) -> float:
        """Return when the next attempt may begin without breaking ``attempts_per_minute``."""
        if len(self._begun) < self.policy.attempts_per_minute:
            return now
        return max(now, self._begun[0] + 60.0)
