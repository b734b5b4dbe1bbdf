"""Clients that are broken on purpose: the tester must catch each of them within a stated number of seeds.

A mutation counts as caught when a program breaks a promise with it and breaks
none without it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import attrs
import trio

import kadoa_trio._backoff as backoff
import kadoa_trio._client as client
import kadoa_trio._engine._acks as acks
import kadoa_trio._engine._admission as admission
import kadoa_trio._engine._buffer as buffer
import kadoa_trio._engine._ledger as ledger
import kadoa_trio._engine._supervisor as supervisor
import kadoa_trio._net._api as api

from ._program import ALL, of_seed
from ._world import PROMISES, execute

Patch = tuple[Any, str, Any]

PLAIN = frozenset(
    {
        "drains",
        "closes",
        "resets",
        "token_faults",
        "handshake_faults",
        "opaque",
        "some_cursors",
        "crash",
        "leave",
        "stop",
    }
)
"""What every mutation is looked for with, and what it needs besides."""


@attrs.frozen
class Mutation:
    """A way to break the client."""

    make: Callable[[], list[Patch]]
    within: int
    """Seeds within which it must be caught."""
    promises: frozenset[str]
    """What it breaks."""
    features: frozenset[str] = PLAIN


MUTATIONS: dict[str, Mutation] = {}


def _mutation(
    within: int, promises: str, *more: str
) -> Callable[[Callable[[], list[Patch]]], Callable[[], list[Patch]]]:
    def register(make: Callable[[], list[Patch]]) -> Callable[[], list[Patch]]:
        features = PLAIN | set(more)
        broken = frozenset(promises.split(", "))
        assert features <= ALL
        assert broken <= set(PROMISES)
        MUTATIONS[make.__name__] = Mutation(make, within, broken, features)
        return make

    return register


def _with_timeouts(**changed: float) -> list[Patch]:
    real = client.settings_of

    def settings_of(**options: Any) -> Any:
        settings = real(**options)
        return attrs.evolve(settings, timeouts=attrs.evolve(settings.timeouts, **changed))

    return [(client, "settings_of", settings_of)]


@_mutation(30, "once")
def repeated_ids_are_handed_out() -> list[Patch]:
    return [(ledger.Ledger, "knows", lambda self, event_id: False)]


@_mutation(30, "crash-safe")
def the_position_is_the_resume_cursor() -> list[Patch]:
    real = ledger.Ledger.settled_position

    def settled_position(self: ledger.Ledger, *args: Any) -> ledger.Position:
        return attrs.evolve(real(self, *args), cursor=self.resume_cursor)

    return [(ledger.Ledger, "settled_position", settled_position)]


@_mutation(60, "lossless", "no_cursors", "silence")
def possible_gaps_are_not_reported() -> list[Patch]:
    return [(admission.Admission, "report_gaps", lambda self, gaps: None)]


@_mutation(60, "not deaf", "silence")
def silence_is_not_noticed() -> list[Patch]:
    return _with_timeouts(heartbeat=10_000.0)


@_mutation(60, "bounded")
def attempts_come_without_waits() -> list[Patch]:
    return [
        (backoff.Backoff, "delay", lambda self, retry_after=None: 0.0),
        (backoff.Backoff, "earliest", lambda self, now: now),
    ]


@_mutation(100, "not deaf")
def a_long_retry_after_is_obeyed() -> list[Patch]:
    real = backoff.Backoff.delay
    return [(backoff.Backoff, "delay", lambda self, retry_after=None: max(real(self, retry_after), retry_after or 0.0))]


@_mutation(60, "not deaf", "short_lives", "paged")
def a_replay_moves_no_cursor() -> list[Patch]:
    return [(ledger.Ledger, "_is_replayed", lambda self, source, entry, event_id, one: False)]


@_mutation(30, "order")
def neighbours_are_swapped() -> list[Patch]:
    real = buffer.Buffer.put

    def put(self: Any, event: Any, entry: Any) -> None:
        real(self, event, entry)
        growing = self._growing
        if growing is not None and len(growing) > 1:
            growing[-1], growing[-2] = growing[-2], growing[-1]

    return [(buffer.Buffer, "put", put)]


@_mutation(60, "crash-safe", "slow", "stalls")
def events_are_settled_when_they_are_received() -> list[Patch]:
    real = buffer.Buffer._taken

    def taken(self: Any, buffered: Any) -> Any:
        self._ledger.settle(buffered.entry)
        for observer in self._observers:
            observer.settled(buffered.event)
        return real(self, buffered)

    return [(buffer.Buffer, "_taken", taken)]


@_mutation(60, "crash-safe, lossless", "failing", "workers")
def a_failed_delivery_is_settled() -> list[Patch]:
    return [(buffer.Buffer, "retry", lambda self, taken, after=None: self.settle_many(taken))]


@_mutation(60, "not deaf")
def a_drained_connection_gets_no_replacement() -> list[Patch]:
    real = supervisor.Supervisor._needs_replacement

    async def needs_replacement(self: Any, newest: Any) -> float:
        earliest = await real(self, newest)
        if newest.draining:
            await trio.sleep_forever()
        return earliest

    return [(supervisor.Supervisor, "_needs_replacement", needs_replacement)]


@_mutation(30, "crash-safe, cursor kept, lossless")
def the_cursor_is_not_sent() -> list[Patch]:
    real = ledger.Ledger.open

    def opened(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options)

    return [(ledger.Ledger, "open", opened)]


@_mutation(60, "crash-safe, lossless", "live_first", "unpromised")
def a_new_connection_leads_at_once() -> list[Patch]:
    real = ledger.Ledger.open

    def opened(self: Any, generation: int, *args: Any, **options: Any) -> Any:
        cursor = real(self, generation, *args, **options)
        source = self._sources[generation]
        self._leader = source
        self._line = source.line
        return cursor

    return [(ledger.Ledger, "open", opened)]


@_mutation(100, "bounded")
def any_number_of_sockets() -> list[Patch]:
    return [(supervisor, "MAX_SOCKETS", 99)]


@_mutation(100, "bounded", "store_faults")
def leaving_takes_its_time() -> list[Patch]:
    return [(client, "LEAVE_TIMEOUT", 60.0)]


@_mutation(60, "bounded", "small_buffers", "stalls", "slow")
def there_is_always_space() -> list[Patch]:
    return [(buffer.Buffer, "has_space", lambda self, size: True)]


@_mutation(60, "bounded")
def fifty_acknowledgements_at_once() -> list[Patch]:
    return [(acks, "ACKNOWLEDGEMENTS_IN_FLIGHT", 50)]


@_mutation(60, "patient", "token_4xx")
def refusals_have_no_grace() -> list[Patch]:
    def refused(self: Any, exc: Exception) -> float:
        raise exc

    return [(supervisor.Supervisor, "_refused", refused)]


@_mutation(10, "discreet")
def the_token_is_logged() -> list[Patch]:
    real = api.KadoaApi.fetch_token

    async def fetch_token(self: Any) -> Any:
        token = await real(self)
        logging.getLogger("kadoa_trio.http").warning("got %s", token.access_token.reveal())
        return token

    return [(api.KadoaApi, "fetch_token", fetch_token)]


@contextlib.contextmanager
def applied(name: str) -> Iterator[None]:
    """Break the client for the length of a block."""
    with contextlib.ExitStack() as stack:
        for target, attribute, replacement in MUTATIONS[name].make():
            stack.enter_context(mock.patch.object(target, attribute, replacement))
        yield


def caught(name: str) -> tuple[int, str] | None:
    """Give the first seed that catches a mutation, and what it says; None if none does in the stated number."""
    mutation = MUTATIONS[name]
    for seed in range(mutation.within):
        program = of_seed(seed, mutation.features)
        with applied(name):
            violation = execute(program).violation
        if violation is not None and violation.promise in mutation.promises and execute(program).violation is None:
            return seed, str(violation)
    return None


def report() -> int:
    """Try all mutations, and print what catches them."""
    missed = 0
    for name, mutation in MUTATIONS.items():
        started = time.monotonic()
        found = caught(name)
        seconds = time.monotonic() - started
        if found is None:
            missed += 1
            print(f"MISSED {name}: not within {mutation.within} seeds ({seconds:.1f} s)", flush=True)
        else:
            print(
                f"caught {name}: seed {found[0]} of {mutation.within} ({seconds:.1f} s): {found[1][:150]}", flush=True
            )
    return 1 if missed else 0
