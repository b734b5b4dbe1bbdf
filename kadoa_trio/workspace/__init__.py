"""Kadoa's side of the stream: notification channels, settings, the log, plans that set a workspace up, diagnosis."""

from .._errors import SetupError as SetupError
from ._diagnosis import Diagnosis as Diagnosis
from ._diagnosis import DiagnosisStep as DiagnosisStep
from ._diagnosis import Verdict as Verdict
from ._diagnosis import diagnose as diagnose
from ._notifications import Channel as Channel
from ._notifications import LogEntry as LogEntry
from ._notifications import LogPage as LogPage
from ._notifications import Notifications as Notifications
from ._notifications import Setting as Setting
from ._notifications import open_notifications as open_notifications
from ._streaming import AddChannel as AddChannel
from ._streaming import CreateChannel as CreateChannel
from ._streaming import CreateSetting as CreateSetting
from ._streaming import EnableSetting as EnableSetting
from ._streaming import SetupStep as SetupStep
from ._streaming import StreamingPlan as StreamingPlan
from ._streaming import apply_plan as apply_plan
from ._streaming import plan_streaming as plan_streaming

__all__ = [
    "AddChannel",
    "Channel",
    "CreateChannel",
    "CreateSetting",
    "Diagnosis",
    "DiagnosisStep",
    "EnableSetting",
    "LogEntry",
    "LogPage",
    "Notifications",
    "Setting",
    "SetupError",
    "SetupStep",
    "StreamingPlan",
    "Verdict",
    "apply_plan",
    "diagnose",
    "open_notifications",
    "plan_streaming",
]
