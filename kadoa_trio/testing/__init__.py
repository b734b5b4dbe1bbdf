"""A Kadoa to test against: in memory on Trio's virtual clock, or on loopback for any client.

::

    async with open_simulated_kadoa() as kadoa:
        async with open_realtime(kadoa.api_key, endpoints=kadoa.endpoints) as realtime:
            kadoa.publish("workflow_failed", {...})
            event = await realtime.events.receive()
"""

from ._connection import SimulatedConnection as SimulatedConnection
from ._model import Faults as Faults
from ._model import PublishedEvent as PublishedEvent
from ._schedule import FaultKind as FaultKind
from ._schedule import Schedule as Schedule
from ._schedule import ScheduledFault as ScheduledFault
from ._simulator import SimulatedKadoa as SimulatedKadoa
from ._simulator import open_simulated_kadoa as open_simulated_kadoa
from ._workspace import Workspace as Workspace

__all__ = [
    "FaultKind",
    "Faults",
    "PublishedEvent",
    "Schedule",
    "ScheduledFault",
    "SimulatedConnection",
    "SimulatedKadoa",
    "Workspace",
    "open_simulated_kadoa",
]
