"""`moeshm worker` on a GPU that computes nothing, and is lost in a call of a certain size.

`python -m tests.crash.lost_gpu_worker OPTIONS`, as of `moeshm worker`.
"""

from __future__ import annotations

import sys

from moeshm.backends.gpu import cupy_device
from moeshm.backends.gpu.abi import Call
from moeshm.backends.gpu.device import Memory
from moeshm.cli import main
from moeshm.errors import DeviceError, DeviceLost
from tests.simt.device import IdleDevice

#: Tokens of a call that fails alone, of one with which the device is lost, and of one after which
#: it is lost when more memory is asked for.
FAILING, FATAL, LAST = 5, 7, 9


class FragileDevice(IdleDevice):
    """Stays lost."""

    name = "cuda:0"

    def __init__(self) -> None:
        super().__init__()
        self._is_lost = self._is_full = False
        self.on_launch = self._on_launch

    def allocate(self, nbytes: int) -> Memory:
        """As `Device.allocate`."""
        self._is_lost |= self._is_full
        self._check()
        return super().allocate(nbytes)

    def _on_launch(self, kernel: str, call: Call) -> None:
        self._is_lost |= call.n_tokens == FATAL
        self._is_full |= call.n_tokens == LAST
        self._check()
        if call.n_tokens == FAILING:
            raise DeviceError(f"cuda:0 (a card): {kernel} cannot be launched")

    def _check(self) -> None:
        if self._is_lost:
            raise DeviceLost("cuda:0 (a card) is lost: illegal address; start it anew")


if __name__ == "__main__":
    setattr(cupy_device, "open_device", lambda _name: FragileDevice())  # noqa: B010
    sys.argv[1:1] = ["worker"]
    main()
