"""`moeshm worker` on a GPU that computes nothing, and is lost in a call of a certain size.

`python -m tests.crash.lost_gpu_worker OPTIONS`, as of `moeshm worker`.
"""

from __future__ import annotations

import sys

from moeshm.backends.gpu import cupy_device
from moeshm.backends.gpu.abi import Call
from moeshm.cli import main
from moeshm.errors import DeviceError, DeviceLost
from tests.simt.device import IdleDevice

#: Tokens of a call that fails alone, and of one with which the device is lost.
FAILING, FATAL = 5, 7


class FragileDevice(IdleDevice):
    """Stays lost."""

    name = "cuda:0"

    def __init__(self) -> None:
        super().__init__()
        self._is_lost = False
        self.on_launch = self._on_launch

    def _on_launch(self, kernel: str, call: Call) -> None:
        self._is_lost |= call.n_tokens == FATAL
        if self._is_lost:
            raise DeviceLost("cuda:0 (a card) is lost: illegal address; start it anew")
        if call.n_tokens == FAILING:
            raise DeviceError(f"cuda:0 (a card): {kernel} cannot be launched")


if __name__ == "__main__":
    setattr(cupy_device, "open_device", lambda _name: FragileDevice())  # noqa: B010
    sys.argv[1:1] = ["worker"]
    main()
