"""Kadoa's realtime events for Trio programs.

::

    async with open_realtime() as realtime:
        async for event in realtime.events:
            ...
"""

# The rooms, each building on those above it:
#
#   _contexts    context managers that Ctrl-C cannot leave half entered or half left
#   _redact      secrets, and what of foreign text may be shown
#   _errors      every exception, and whose fault it is
#   _backoff     how long to wait before the next attempt
#   _settings    endpoints and limits, checked once
#   _events      events and the classes of their payloads
#   _wire        frames to objects and back
#   _cursors     the order of cursors, where they show one
#   _ledger      ids, where to resume, what is settled; no I/O, no clock
#   _notices     what the client tells about itself, and the one state
#   _files       opened without following links, and locks
#   _letters     files of dead letters
#   _stores      cursor stores: where a position outlives a process
#   _keeper      takes the position up, and saves it behind the events
#   _exits       which exception leaves a block that hides a nursery
#   _http        requests to Kadoa and to webhooks; the only import of httpx
#   _notifications  channels, settings, test events, the log
#   _streaming   sets a workspace up for realtime events
#   _forward     posts events to a webhook
#   _proxy       through an HTTP proxy, as the environment asks
#   _socket      one WebSocket; the only import of trio_websocket
#   _channel     the buffer of events, and the handles to receive from
#   _acks        acknowledgements of settled events
#   _repair      fills possible gaps from the notification log
#   _cursor_check  does the server refuse the cursor, or is it sick?
#   _connection  one generation, from its token to its end
#   _supervisor  the succession of connections
#   _client      open_realtime
#   _diagnosis   why no events come, step by step
#
# testing and cli are packages of their own, on top of these.

from ._backoff import RetryPolicy as RetryPolicy
from ._channel import Delivery as Delivery
from ._channel import EventChannel as EventChannel
from ._channel import EventChannelStatistics as EventChannelStatistics
from ._client import Realtime as Realtime
from ._client import RealtimeStatistics as RealtimeStatistics
from ._client import open_realtime as open_realtime
from ._diagnosis import Diagnosis as Diagnosis
from ._diagnosis import DiagnosisStep as DiagnosisStep
from ._diagnosis import Verdict as Verdict
from ._diagnosis import diagnose as diagnose
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
from ._errors import SetupError as SetupError
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
from ._forward import Replayed as Replayed
from ._forward import open_forwarder as open_forwarder
from ._forward import webhook_body as webhook_body
from ._ledger import Gap as Gap
from ._ledger import GapReason as GapReason
from ._ledger import Position as Position
from ._notices import AcknowledgementsResting as AcknowledgementsResting
from ._notices import AdmissionPaused as AdmissionPaused
from ._notices import AttemptStarted as AttemptStarted
from ._notices import Connected as Connected
from ._notices import ConnectionAged as ConnectionAged
from ._notices import ConnectionStatus as ConnectionStatus
from ._notices import CursorAccepted as CursorAccepted
from ._notices import CursorDropped as CursorDropped
from ._notices import CursorOnTrial as CursorOnTrial
from ._notices import Draining as Draining
from ._notices import EventLoopBlocked as EventLoopBlocked
from ._notices import Failed as Failed
from ._notices import FirstStart as FirstStart
from ._notices import FrameIgnored as FrameIgnored
from ._notices import GapRemains as GapRemains
from ._notices import GapRepaired as GapRepaired
from ._notices import HeldEventsReleased as HeldEventsReleased
from ._notices import Lost as Lost
from ._notices import Notice as Notice
from ._notices import PositionNotSaved as PositionNotSaved
from ._notices import PositionSaved as PositionSaved
from ._notices import PossibleGap as PossibleGap
from ._notices import Refused as Refused
from ._notices import Replaced as Replaced
from ._notices import Resumed as Resumed
from ._notices import Retrying as Retrying
from ._notices import Stable as Stable
from ._notices import State as State
from ._notices import Stopped as Stopped
from ._notices import Subscribed as Subscribed
from ._notifications import Channel as Channel
from ._notifications import LogEntry as LogEntry
from ._notifications import LogPage as LogPage
from ._notifications import Notifications as Notifications
from ._notifications import Setting as Setting
from ._notifications import open_notifications as open_notifications
from ._settings import Endpoints as Endpoints
from ._settings import Network as Network
from ._stores import CursorSession as CursorSession
from ._stores import CursorStore as CursorStore
from ._stores import MemoryCursorStore as MemoryCursorStore
from ._stores import SQLiteCursorStore as SQLiteCursorStore
from ._streaming import AddChannel as AddChannel
from ._streaming import CreateChannel as CreateChannel
from ._streaming import CreateSetting as CreateSetting
from ._streaming import EnableSetting as EnableSetting
from ._streaming import SetupStep as SetupStep
from ._streaming import StreamingPlan as StreamingPlan
from ._streaming import apply_plan as apply_plan
from ._streaming import plan_streaming as plan_streaming
from ._version import __version__ as __version__

__all__ = [
    "AcknowledgementsResting",
    "AddChannel",
    "AdmissionPaused",
    "AttemptError",
    "AttemptStarted",
    "AuthenticationError",
    "Channel",
    "ConfigurationError",
    "Connected",
    "ConnectionAged",
    "ConnectionFailedError",
    "ConnectionStatus",
    "ConsumerOwnedError",
    "CreateChannel",
    "CreateSetting",
    "CursorAccepted",
    "CursorDropped",
    "CursorOnTrial",
    "CursorSession",
    "CursorStore",
    "CursorStoreError",
    "DeadLetterError",
    "Delivery",
    "Diagnosis",
    "DiagnosisStep",
    "Difference",
    "Draining",
    "EnableSetting",
    "Endpoints",
    "Event",
    "EventChannel",
    "EventChannelStatistics",
    "EventLoopBlocked",
    "Failed",
    "FailedForward",
    "FieldChange",
    "FirstStart",
    "ForeignError",
    "Forwarder",
    "FrameIgnored",
    "Gap",
    "GapReason",
    "GapRemains",
    "GapRepaired",
    "HeldEventsReleased",
    "InternalError",
    "KadoaError",
    "LogEntry",
    "LogPage",
    "Lost",
    "MemoryCursorStore",
    "Message",
    "MessageTooLargeError",
    "Network",
    "Notice",
    "Notifications",
    "OtherMessage",
    "OwnershipLostError",
    "Position",
    "PositionNotSaved",
    "PositionSaved",
    "PossibleGap",
    "ProtocolError",
    "Realtime",
    "RealtimeStatistics",
    "Refused",
    "Replaced",
    "Replayed",
    "RequestRefusedError",
    "Resumed",
    "RetryPolicy",
    "Retrying",
    "SQLiteCursorStore",
    "Setting",
    "SetupError",
    "SetupStep",
    "Stable",
    "State",
    "Stopped",
    "StreamingPlan",
    "Subscribed",
    "Verdict",
    "WorkflowDataChange",
    "WorkflowFailed",
    "WorkflowFinished",
    "WorkflowRecovered",
    "__version__",
    "apply_plan",
    "diagnose",
    "open_forwarder",
    "open_notifications",
    "open_realtime",
    "plan_streaming",
    "webhook_body",
]
