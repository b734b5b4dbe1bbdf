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
from ._simulator import SimulatedKadoa as SimulatedKadoa
from ._simulator import open_simulated_kadoa as open_simulated_kadoa

__all__ = ["Faults", "PublishedEvent", "SimulatedConnection", "SimulatedKadoa", "open_simulated_kadoa"]
