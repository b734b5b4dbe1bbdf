"""The wait before the next attempt: full jitter between a minimum and a maximum."""

from __future__ import annotations

import random

import attrs

from ._settings import RetryPolicy


def jitter(policy: RetryPolicy, failures: int, rng: random.Random) -> float:
    """Draw the wait after *failures* in a row, from 1 on, in seconds: full jitter between 0 and a span that doubles."""
    # The exponent is cut so that weeks of failures do not overflow a float.
    return rng.uniform(0, min(policy.maximum, policy.initial * 2.0 ** min(failures - 1, 60)))


@attrs.define(eq=False)
class Backoff:
    """Counts failures and attempts, and computes the wait before the next attempt. Reads no clock."""

    policy: RetryPolicy
    rng: random.Random
    failures: int = 0
    """Attempts that failed, and connections that ended before they were stable, in a row."""
    _begun: list[float] = attrs.field(factory=list)

    def failed(self) -> None:
        """Record a failed attempt, or a connection that ended before it was stable."""
        self.failures += 1

    def stable(self) -> None:
        """Record that a connection has become stable: the failures in a row are counted from 0 again."""
        self.failures = 0

    def delay(self, retry_after: float | None = None) -> float:
        """Draw the wait before the next attempt, in seconds.

        A server's ``Retry-After`` is the minimum, up to ``retry_after_limit``.
        """
        policy = self.policy
        delay = jitter(policy, self.failures, self.rng) if self.failures else self.rng.uniform(0, policy.first)
        if retry_after is not None and retry_after > 0:
            delay = max(delay, min(retry_after, policy.retry_after_limit))
        return delay

    def begin(self, now: float) -> None:
        """Record that an attempt begins at *now*, on the caller's clock, in seconds."""
        self._begun.append(now)
        while len(self._begun) > self.policy.attempts_per_minute:
            del self._begun[0]

    def earliest(self, now: float) -> float:
        """Return when the next attempt may begin without breaking ``attempts_per_minute``."""
        if len(self._begun) < self.policy.attempts_per_minute:
            return now
        return max(now, self._begun[0] + 60.0)
