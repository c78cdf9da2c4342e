"""Types of the extension; the behaviour is documented in `_launch.pyx`."""

from ctypes import Structure

class Driver:
    def __init__(
        self,
        copy_in: int,
        copy_out: int,
        launch: int,
        launch_overlapping: int,
        write_value: int,
        wait_value: int,
        wait_takes_mask: bool,
        stream: int,
    ) -> None: ...

class CommandList:
    def __init__(self, driver: Driver) -> None: ...
    def copy_in(self, to: int, source: int, nbytes: int) -> int: ...
    def copy_out(self, to: int, source: int, nbytes: int) -> int: ...
    def set_host_address(self, number: int, address: int) -> None: ...
    def launch(
        self,
        function: int,
        grid: int,
        block: int,
        shared_bytes: int,
        first: Structure,
        second: Structure,
        overlaps: bool = True,
    ) -> None: ...
    def write_value(self, address: int) -> int: ...
    def wait_value(self, address: int) -> int: ...
    def set_value(self, number: int, address: int, value: int) -> None: ...
    def enqueue(self, stream: int | None = None) -> tuple[int, int] | None: ...

def address_of(buffer: object) -> int: ...
