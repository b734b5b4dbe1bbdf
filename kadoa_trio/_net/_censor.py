"""Keeps secrets out of the log records of the libraries underneath.

httpx, httpcore and trio-websocket log, at DEBUG, what a server sent, and a
server may repeat what it was sent. There is no list of their loggers: every
record that is made while a `censored_logs` block runs, in its task, is
censored, whatever its logger is called. So another library underneath is
covered, too.

Records are censored where they are made, in the factory of records
(`logging.setLogRecordFactory`, which is meant to be chained). Filters are not
enough: a filter on a logger does not see the records of its children, and a filter
on a handler is missing from the handlers that a program adds later. Records
from anywhere else pass untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Final

from .._contexts import sync_context
from .._redact import Secret, censor

_in_use: Final[ContextVar[tuple[Secret, ...]]] = ContextVar("kadoa_trio_secrets_in_use", default=())


class _CensoringFactory:
    """Makes log records as the factory below it does, and censors those that are made in `censored_logs`."""

    def __init__(self, below: Callable[..., logging.LogRecord]) -> None:
        self._below = below

    def __call__(self, *args: object, **options: object) -> logging.LogRecord:
        record = self._below(*args, **options)
        secrets = _in_use.get()
        if secrets:
            try:
                message = record.getMessage()
            except Exception:  # by a handler it would be printed, with its arguments
                message = "[a log record whose message cannot be formatted]"
            record.msg = censor(message, *secrets)
            record.args = None
            record.exc_info = record.exc_text = None
        return record


@sync_context
def censored_logs(*secrets: Secret) -> Iterator[None]:
    """Keep *secrets* out of every log record that this task, and tasks that it starts, make in the block."""
    factory = logging.getLogRecordFactory()
    if not isinstance(factory, _CensoringFactory):
        # It is never taken out, because that could take out a factory that a program has set meanwhile.
        logging.setLogRecordFactory(_CensoringFactory(factory))
    reset = _in_use.set((*_in_use.get(), *secrets))
    try:
        yield
    finally:
        _in_use.reset(reset)
