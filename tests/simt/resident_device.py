"""A device of the shim on which a resident kernel runs beside the host."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from moeshm.backends.gpu.device import Features
from moeshm.errors import DeviceError

from .device import FEATURES, SimtDevice

#: Far more than it takes a kernel that ends to write what is waited for.
_MOST_LOOKS = 20


class ResidentDevice(SimtDevice):
    """Everything is done in order: what comes behind a resident kernel waits for its end."""

    def __init__(self, features: Features = FEATURES) -> None:
        super().__init__(features)
        self._kernel: threading.Thread | None = None
        self._error: BaseException | None = None
        #: Looks since the last kernel began, when none was there.
        self._n_looks = 0

    def do(self, command: Callable[..., None], *arguments: Any) -> None:
        """At once, but for resident kernels."""
        self._join()
        if command == self.launch and arguments[0].name == "resident":
            kept = [
                type(each).from_buffer_copy(each) if isinstance(each, ctypes.Structure) else each
                for each in arguments
            ]
            self._n_looks = 0
            self._kernel = threading.Thread(target=self._run, args=(command, *kept))
            self._kernel.start()
        else:
            command(*arguments)

    def wait(self) -> None:
        """As `Device.wait`."""
        self._join()
        self._check_kernels()

    def check(self) -> None:
        """As `Device.check`; whoever waits for what no kernel will do is told so."""
        self._check_kernels()
        kernel = self._kernel
        if kernel is None or not kernel.is_alive():
            self._n_looks += 1
            if self._n_looks > _MOST_LOOKS:
                raise DeviceError("no kernel is there, and somebody waits for one")

    def _check_kernels(self) -> None:
        if self._error is not None:
            raise DeviceError(str(self._error)) from self._error

    def _run(self, command: Callable[..., None], *arguments: Any) -> None:
        try:
            command(*arguments)
        except BaseException as error:
            self._error = error

    def _join(self) -> None:
        if self._kernel is not None:
            self._kernel.join()
            self._kernel = None
