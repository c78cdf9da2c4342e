"""Types of the extension; the behaviour is documented in `_mailbox.pyx`."""

from ...dtypes import Array
from .device import Bytes

MAILBOX_BYTES: int
FINISHED: int
ENDED: int

def set_pairs(address: int, ids: Array, weights: Array, addresses: Array) -> None: ...

class Mailbox:
    def __init__(self, memory: Bytes) -> None: ...
    @property
    def n_posted(self) -> int: ...
    @property
    def n_finished(self) -> int: ...
    @property
    def n_ended(self) -> int: ...
    def post(self, address: int) -> int | None: ...
