"""A simulated Kadoa for tests: in memory on Trio's virtual clock, or on loopback for any client.

::

    async with open_simulated_kadoa() as kadoa:
        async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime:
            kadoa.publish(workflow_failed(reason="The page has changed"))
            event = await realtime.events.receive()
"""

from ._builders import Draft as Draft
from ._builders import difference as difference
from ._builders import make_event as make_event
from ._builders import other_event as other_event
from ._builders import workflow_data_change as workflow_data_change
from ._builders import workflow_failed as workflow_failed
from ._builders import workflow_finished as workflow_finished
from ._builders import workflow_recovered as workflow_recovered
from ._connection import SimulatedConnection as SimulatedConnection
from ._dead_letters import MemoryDeadLetters as MemoryDeadLetters
from ._faults import FaultKind as FaultKind
from ._model import Faults as Faults
from ._model import PublishedEvent as PublishedEvent
from ._schedule import Schedule as Schedule
from ._schedule import ScheduledFault as ScheduledFault
from ._simulator import SimulatedKadoa as SimulatedKadoa
from ._simulator import open_simulated_kadoa as open_simulated_kadoa
from ._workspace import Workspace as Workspace

__all__ = [
    "Draft",
    "FaultKind",
    "Faults",
    "MemoryDeadLetters",
    "PublishedEvent",
    "Schedule",
    "ScheduledFault",
    "SimulatedConnection",
    "SimulatedKadoa",
    "Workspace",
    "difference",
    "make_event",
    "open_simulated_kadoa",
    "other_event",
    "workflow_data_change",
    "workflow_failed",
    "workflow_finished",
    "workflow_recovered",
]
