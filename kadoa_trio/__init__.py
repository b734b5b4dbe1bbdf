"""Kadoa's realtime events for Trio programs.

::

    async with open_realtime() as realtime:
        async for event in realtime.events:
            ...

Here are the words that a program uses every day. `kadoa_trio.notices` has
what the client reports of itself, `kadoa_trio.consuming` the classes of
batches, deliveries and dead letters, `kadoa_trio.workspace` Kadoa's side
(channels, settings, diagnosis), `kadoa_trio.testing` a simulated Kadoa.
"""

# A map of the package; each line builds on those above it:
#
#   _contexts    context managers that Ctrl-C cannot leave half entered or half left
#   _exits       which exception leaves a block that hides a nursery; clean-up that runs to its end
#   _redact      secrets, and what of foreign text may be shown
#   _errors      every exception, and whose fault it is
#   _checks      refuses options of a wrong type or value
#   _events      events and the classes of their payloads
#   _urls        default ports, addresses of this machine, what a URL must not hold
#   _settings    endpoints, timeouts, limits, when to try again
#   _backoff     how long to wait before the next attempt, or the next post of a webhook
#   _position    how far a program has come, and where events may be missing
#   notices      public: what the client reports of itself
#   _files       opened without following links, and locks
#   _webhooks    events in the shape of webhooks, as strict JSON
#   _dead_letters  where a program puts events that it cannot handle
#   _letters     files of letters that can be replayed while others are added
#   _stores      cursor stores: where a position outlives a process
#   _net         everything that talks to Kadoa
#   workspace    public: channels, settings, the log, plans, diagnosis
#   _dead_letter_file  dead letters in a file
#   _forward     posts events to a webhook
#   _engine      what keeps the stream whole
#   _client      open_realtime
#   _signals     an orderly end at SIGTERM and SIGINT
#   consuming    public: the classes and protocols of consuming
#   testing      public: the simulated Kadoa and its kit
#   cli          the command
#
# _net, each building on those above it:
#
#   _proxy       which HTTP proxy the environment names, and CONNECT
#   _censor      secrets out of the log records of the libraries underneath
#   _answers     what HTTP answers and network faults mean, in words
#   _wire        frames to objects and back
#   _http        one request, its limits and refusals; the only import of httpx
#   _dial        TCP, proxy, TLS
#   _kept        requests over connections that are kept: acknowledgements
#   _api         Kadoa's endpoints: token, acknowledge, notifications
#   _frames      cuts whole messages out of the bytes of a WebSocket; no I/O
#   _socket      one WebSocket; the only import of trio_websocket
#
# _engine, each building on those above it:
#
#   _cursors     the order of cursors, where they show one
#   _ledger      ids, where to resume, what is settled; no I/O, no clock
#   _reporter    the one state, and where notices are published
#   _phase       the life of a connection as data
#   _delays      what waits for a time
#   _buffer      the events that wait to be received
#   _admission   the only place where events are admitted
#   _channel     the handles to receive from
#   _process     a loop with workers, order within a key, retries and dead letters
#   _saver       loads the position, and saves it behind the events
#   _health      whether the client and its program are well
#   _acks        acknowledgements of settled events
#   _repair      fills possible gaps from the notification log
#   _team        whose stream it is, checked with each token
#   _cursor_check  whether the server refuses the cursor, or is faulty
#   _connection  one connection, from its token to its end
#   _supervisor  the succession of connections

from ._client import Realtime as Realtime
from ._client import RealtimeStatistics as RealtimeStatistics
from ._client import open_realtime as open_realtime
from ._dead_letter_file import DeadLetterFile as DeadLetterFile
from ._engine._buffer import EventChannelStatistics as EventChannelStatistics
from ._engine._channel import EventChannel as EventChannel
from ._engine._process import process as process
from ._errors import AttemptError as AttemptError
from ._errors import AuthenticationError as AuthenticationError
from ._errors import ConfigurationError as ConfigurationError
from ._errors import ConnectionFailedError as ConnectionFailedError
from ._errors import ConsumerOwnedError as ConsumerOwnedError
from ._errors import CursorStoreError as CursorStoreError
from ._errors import DeadLetterError as DeadLetterError
from ._errors import ForeignError as ForeignError
from ._errors import InternalError as InternalError
from ._errors import KadoaError as KadoaError
from ._errors import MessageTooLargeError as MessageTooLargeError
from ._errors import OwnershipLostError as OwnershipLostError
from ._errors import ProtocolError as ProtocolError
from ._errors import RequestRefusedError as RequestRefusedError
from ._events import Difference as Difference
from ._events import Event as Event
from ._events import FieldChange as FieldChange
from ._events import Message as Message
from ._events import OtherMessage as OtherMessage
from ._events import WorkflowDataChange as WorkflowDataChange
from ._events import WorkflowFailed as WorkflowFailed
from ._events import WorkflowFinished as WorkflowFinished
from ._events import WorkflowRecovered as WorkflowRecovered
from ._forward import FailedForward as FailedForward
from ._forward import Forwarder as Forwarder
from ._forward import open_forwarder as open_forwarder
from ._position import Gap as Gap
from ._position import GapReason as GapReason
from ._position import Position as Position
from ._settings import Endpoints as Endpoints
from ._settings import Limits as Limits
from ._settings import Network as Network
from ._settings import RetryPolicy as RetryPolicy
from ._settings import Timeouts as Timeouts
from ._signals import stopping_on_signals as stopping_on_signals
from ._stores import CursorSession as CursorSession
from ._stores import CursorStore as CursorStore
from ._stores import MemoryCursorStore as MemoryCursorStore
from ._stores import SQLiteCursorStore as SQLiteCursorStore
from ._version import __version__ as __version__
from ._webhooks import webhook_body as webhook_body

__all__ = [
    "AttemptError",
    "AuthenticationError",
    "ConfigurationError",
    "ConnectionFailedError",
    "ConsumerOwnedError",
    "CursorSession",
    "CursorStore",
    "CursorStoreError",
    "DeadLetterError",
    "DeadLetterFile",
    "Difference",
    "Endpoints",
    "Event",
    "EventChannel",
    "EventChannelStatistics",
    "FailedForward",
    "FieldChange",
    "ForeignError",
    "Forwarder",
    "Gap",
    "GapReason",
    "InternalError",
    "KadoaError",
    "Limits",
    "MemoryCursorStore",
    "Message",
    "MessageTooLargeError",
    "Network",
    "OtherMessage",
    "OwnershipLostError",
    "Position",
    "ProtocolError",
    "Realtime",
    "RealtimeStatistics",
    "RequestRefusedError",
    "RetryPolicy",
    "SQLiteCursorStore",
    "Timeouts",
    "WorkflowDataChange",
    "WorkflowFailed",
    "WorkflowFinished",
    "WorkflowRecovered",
    "__version__",
    "open_forwarder",
    "open_realtime",
    "process",
    "stopping_on_signals",
    "webhook_body",
]
