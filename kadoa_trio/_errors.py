"""Every exception of the client, and whose fault each one is.

The tree::

    KadoaError
    ├── ConfigurationError (also a ValueError)   the caller: an option, a missing key, a plain endpoint
    ├── AuthenticationError                      the account: the key or its token is refused
    ├── RequestRefusedError                      the account or the caller: any other 4xx on a request
    ├── SetupError                               the workspace: streaming could not be set up as asked
    ├── DeadLetterError                          the machine: an event could not be put aside
    ├── MessageTooLargeError                     the caller's limit is smaller than the server's message
    ├── ConnectionFailedError                    the world: no connection within `Timeouts.connect`
    ├── CursorStoreError                         the machine: a cursor store cannot be used or did not save
    │   ├── ConsumerOwnedError                   the operator: another client owns the consumer
    │   └── OwnershipLostError                   the operator: another client has taken the consumer over
    ├── AttemptError                             the world: one attempt at a connection failed
    │   └── ProtocolError                        the server: it answered, but not with what is documented
    └── InternalError                            us: a bug, please report it

An `AttemptError` is what the client retries; programs meet it as the
``__cause__`` of a `ConnectionFailedError` and inside notices. Everything else
is final. Channel conditions (closed, end of channel, busy) are Trio's own
exceptions, with Trio's meaning.

Exceptions of the libraries underneath hold requests, and with them the key, so
they are never chained. `ForeignError` is the scrubbed copy in ``__cause__``.
"""

from __future__ import annotations

from typing import Literal

from ._redact import Secret, presentable

Step = Literal["token", "connect", "tls", "handshake", "subscribe", "acknowledge", "notifications", "forward"]
"""A step of an attempt at a connection, or a request beside it."""


class KadoaError(Exception):
    """Base class of every exception that this package defines."""


class ConfigurationError(KadoaError, ValueError):
    """An option, an endpoint or a value in the environment cannot be used.

    Raised when a client is opened, before anything is sent.
    """


class AuthenticationError(KadoaError):
    """The API key, or the access token made from it, was refused.

    Attributes:
        step: ``"token"`` or ``"notifications"`` when the API refused the key,
            ``"handshake"`` when the WebSocket endpoint refused the token.
        status: the HTTP status, 401 or 403.
        server_message: the server's message. Maximum 200 characters.
    """

    def __init__(self, step: Step, status: int, server_message: str = "") -> None:
        super().__init__(step, status, server_message)
        self.step = step
        self.status = status
        self.server_message = server_message

    def __str__(self) -> str:
        what = "the access token" if self.step == "handshake" else "the API key"
        text = f"Kadoa refused {what} (HTTP {self.status} on the {self.step})"
        return f"{text}: {self.server_message}" if self.server_message else text


class RequestRefusedError(KadoaError):
    """A request was refused, and repeating it is of no use.

    Attributes:
        step: ``"token"``, or ``"notifications"`` for a call of `open_notifications`.
        status: the HTTP status, a 4xx that is neither 401, 403 nor a
            temporary one (408, 425, 429).
        server_message: the server's message. Maximum 200 characters.
    """

    def __init__(self, step: Step, status: int, server_message: str = "") -> None:
        super().__init__(step, status, server_message)
        self.step = step
        self.status = status
        self.server_message = server_message

    def __str__(self) -> str:
        text = f"Kadoa refused the {self.step} request (HTTP {self.status})"
        return f"{text}: {self.server_message}" if self.server_message else text


class MessageTooLargeError(KadoaError):
    """The server keeps sending a message larger than `Limits.message_size`.

    Raised when two connections in a row received it with no event delivered
    in between, because every later connection would receive it again.

    Attributes:
        limit: the value of `Limits.message_size`, in characters.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"the server sends a message of more than {self.limit:,} characters; "
            "open the client with a larger Limits.message_size to receive it"
        )


class ConnectionFailedError(KadoaError):
    """No connection was established within `Timeouts.connect`.

    ``__cause__`` is the `AttemptError` of the last attempt.

    Attributes:
        attempts: how many attempts were made.
        seconds: how long all attempts took, in seconds.
    """

    def __init__(self, attempts: int, seconds: float, last: str) -> None:
        super().__init__(attempts, seconds, last)
        self.attempts = attempts
        self.seconds = seconds
        self.last = last

    def __str__(self) -> str:
        times = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return f"no connection to Kadoa after {times} in {self.seconds:.1f} s; the last one: {self.last}"


class CursorStoreError(KadoaError):
    """A cursor store could not be opened or read, or the last position could not be saved.

    Events that are settled and not saved are delivered again in the next run; none is lost.
    """


class ConsumerOwnedError(CursorStoreError):
    """Another running client owns the position of this team and consumer. The text names it.

    Each of two clients with one position would cause the other to miss events.
    """


class OwnershipLostError(CursorStoreError):
    """Another client has taken the position over, so this one can no longer save it, and ends.

    This happens to a process that was frozen for a long time, when another
    one was started by force meanwhile.
    """


class SetupError(KadoaError):
    """Kadoa refused a step of a `StreamingPlan`; the steps before it are done.

    The text has the reason, as far as it is known. ``__cause__`` is the error of the request.
    """


class DeadLetterError(KadoaError):
    """A file of dead letters cannot be read or written. The current event is not settled."""


class AttemptError(KadoaError):
    """One attempt at a connection failed in a way that may pass.

    Attributes:
        step: the step that failed.
        reason: what happened, as text.
        status: the HTTP status; None if there was none.
        retry_after: the delay before the next attempt that the server asked
            for, in seconds; None if it asked for none.
    """

    def __init__(
        self,
        step: Step,
        reason: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(step, reason)
        self.step = step
        self.reason = reason
        self.status = status
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.step}: {self.reason}"


class ProtocolError(AttemptError):
    """The server's answer is not what Kadoa's protocol documents."""


class InternalError(KadoaError):
    """A bug of the client. Please report it.

    ``__cause__`` is the error that showed it.
    """


class ForeignError(Exception):
    """A scrubbed copy of an exception from a library underneath.

    The original is dropped, because it may hold a request, a URL or headers,
    and with them the API key or an access token.

    Attributes:
        type_name: the original's qualified class name.
        text: its text, in one printable line without secrets. Maximum 500 characters.
        errno: its ``errno``, for an `OSError` that had one.
    """

    def __init__(self, type_name: str, text: str, errno: int | None = None) -> None:
        super().__init__(type_name, text, errno)
        self.type_name = type_name
        self.text = text
        self.errno = errno

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}" if self.text else self.type_name


def scrubbed(exc: BaseException, *secrets: Secret) -> ForeignError:
    """Copy a foreign exception and its causes, without secrets."""
    errno = exc.errno if isinstance(exc, OSError) else None
    kind = type(exc)
    copy = ForeignError(f"{kind.__module__}.{kind.__qualname__}", presentable(str(exc), 500, *secrets), errno)
    if exc.__cause__ is not None and exc.__cause__ is not exc:
        copy.__cause__ = scrubbed(exc.__cause__, *secrets)
    return copy
