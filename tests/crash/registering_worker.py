"""`moeshm worker` on a GPU that computes nothing, and tells its log of the memory it registers.

`python -m tests.crash.registering_worker FD OPTIONS`, with options as of `moeshm worker`. A GATED
call is not over before a byte came from the pipe FD.
"""

from __future__ import annotations

import logging
import os
import sys

from moeshm.backends.gpu import cupy_device
from moeshm.backends.gpu.abi import Call
from moeshm.backends.gpu.device import Registration
from moeshm.cli import main
from tests.crash.lost_gpu_worker import FragileDevice

#: Tokens of a call that waits.
GATED = 11
#: What the log says.
REGISTERED, UNREGISTERED, COMPUTING, COMPUTED = "registered ", "unregistered ", "computing", "done"

_log = logging.getLogger("moeshm")


class TellingDevice(FragileDevice):
    """Whoever unmaps memory that is registered fails."""

    def __init__(self, gate: int) -> None:
        super().__init__()
        self._gate = gate

    def register(self, address: int, nbytes: int, *, read_only: bool) -> Registration:
        """As `Device.register`."""
        registration = super().register(address, nbytes, read_only=read_only)
        _log.info("%s%d", REGISTERED, nbytes)
        return registration

    def unregister(self, address: int) -> None:
        """What `Registration.close` does."""
        nbytes = self.registered[address]
        super().unregister(address)
        _log.info("%s%d", UNREGISTERED, nbytes)

    def _on_launch(self, kernel: str, call: Call) -> None:
        super()._on_launch(kernel, call)
        if call.n_tokens == GATED and kernel == "decode_down":
            _log.info(COMPUTING)
            os.read(self._gate, 1)
            _log.info(COMPUTED)


if __name__ == "__main__":
    gate = int(sys.argv.pop(1))
    setattr(cupy_device, "open_device", lambda _name: TellingDevice(gate))  # noqa: B010
    sys.argv[1:1] = ["worker"]
    main()
