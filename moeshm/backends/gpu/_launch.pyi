"""Types of the extension; the behaviour is documented in `_launch.pyx`."""

from ctypes import Structure

class Driver:
    def __init__(
        self, copy_in: int, copy_out: int, launch: int, launch_overlapping: int, stream: int
    ) -> None: ...

class CommandList:
    def __init__(self, driver: Driver) -> None: ...
    def copy_in(self, to: int, source: int, nbytes: int) -> None: ...
    def copy_out(self, to: int, source: int, nbytes: int) -> None: ...
    def launch(
        self,
        function: int,
        grid: int,
        block: int,
        shared_bytes: int,
        call: Structure,
        route: Structure,
    ) -> None: ...
    def enqueue(self) -> tuple[int, int] | None: ...
