"""The classes and protocols of consuming that programs name in annotations, or implement.

What programs call every day (`process`, `stopping_on_signals`,
`DeadLetterFile`) is in `kadoa_trio` itself.
"""

from ._dead_letters import DeadLetter as DeadLetter
from ._dead_letters import DeadLetters as DeadLetters
from ._engine._channel import Batch as Batch
from ._engine._channel import Deliveries as Deliveries
from ._engine._channel import Delivery as Delivery
from ._engine._process import FailedAttempt as FailedAttempt
from ._engine._process import Processed as Processed
from ._letters import Replayed as Replayed
from ._signals import Stopping as Stopping

__all__ = [
    "Batch",
    "DeadLetter",
    "DeadLetters",
    "Deliveries",
    "Delivery",
    "FailedAttempt",
    "Processed",
    "Replayed",
    "Stopping",
]
