"""Options: a value that cannot be used is refused before anything is sent, with what was given and what is wanted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kadoa_trio import ConfigurationError, Limits, RetryPolicy, Timeouts


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Timeouts(heartbeat=0),
            r"Timeouts\.heartbeat must be a positive, finite number of seconds, not 0 \(int\)",
        ),
        (lambda: Timeouts(heartbeat=float("nan")), r"Timeouts\.heartbeat .*, not nan \(float\)"),
        (
            lambda: Limits(buffered_events=0),
            r"Limits\.buffered_events must be a whole number from 1 to .*, not 0 \(int\)",
        ),
        (lambda: Limits(dedupe_window=10), r"Limits\.dedupe_window \(10\) must be at least .* \(11000\)"),
        (lambda: RetryPolicy(attempts_per_minute=0), r"RetryPolicy\.attempts_per_minute must be a whole number"),
    ],
)
def test_number_that_cannot_work_is_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        make()
