"""What one call asks of a GPU's driver, prepared once and enqueued at once, without the GIL.

The driver's functions come as addresses: this needs no vendor's headers and no library.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

import ctypes

cdef enum:
    # Two copies in, or one and a conversion, four kernels and a copy out are the most that a call
    # takes.
    MOST_COMMANDS = 8
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h.
    PROGRAMMATIC_STREAM_SERIALIZATION = 6

# CUlaunchAttribute, of whose value this attribute uses an int.
cdef struct LaunchAttribute:
    uint32_t id
    uint32_t padding
    int32_t value
    uint8_t rest[60]

# CUlaunchConfig.
cdef struct LaunchConfig:
    uint32_t grid[3]
    uint32_t block[3]
    uint32_t shared_bytes
    void *stream
    LaunchAttribute *attributes
    uint32_t n_attributes

# cuMemcpyHtoDAsync, cuMemcpyDtoHAsync and HIP's: addresses of both memories are 64 bits wide.
ctypedef int (*Copy)(uint64_t to, uint64_t source, size_t nbytes, void *stream) noexcept nogil
# cuLaunchKernel and hipModuleLaunchKernel: grid, block, shared bytes.
ctypedef int (*Launch)(
    void *function, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t,
    void *stream, void **parameters, void **extra) noexcept nogil
# cuLaunchKernelEx.
ctypedef int (*LaunchOverlapping)(
    const LaunchConfig *config, void *function, void **parameters, void **extra) noexcept nogil

cdef struct Command:
    # NULL for a launch.
    Copy copy
    uint64_t to
    uint64_t source
    # Which of the two is the host's; NULL for a launch.
    uint64_t *host
    size_t nbytes
    void *function
    LaunchConfig config
    void *parameters[2]


cdef class Driver:
    """A driver's functions, by their addresses, and the stream to use them on.

    `launch_overlapping`: cuLaunchKernelEx, for kernels that may start before the one ahead of them
    has ended; 0 has all of them launched by `launch`.
    """

    cdef Copy copy_in, copy_out
    cdef Launch launch
    cdef LaunchOverlapping launch_overlapping
    cdef LaunchAttribute attribute
    cdef void *stream

    def __init__(self, uint64_t copy_in, uint64_t copy_out, uint64_t launch,
                 uint64_t launch_overlapping, uint64_t stream):
        self.copy_in = <Copy>copy_in
        self.copy_out = <Copy>copy_out
        self.launch = <Launch>launch
        self.launch_overlapping = <LaunchOverlapping>launch_overlapping
        self.stream = <void *>stream
        self.attribute.id = PROGRAMMATIC_STREAM_SERIALIZATION
        self.attribute.value = 1


cdef class CommandList:
    """Copies and launches, enqueued in the order in which they were added, any number of times.

    IndexError: more than 8 are added. One thread at a time may use it.
    """

    cdef Driver driver
    cdef Command commands[MOST_COMMANDS]
    cdef int n_commands
    # What commands point to.
    cdef list kept

    def __init__(self, Driver driver not None):
        self.driver = driver
        self.kept = []

    def copy_in(self, uint64_t to, uint64_t source, size_t nbytes):
        """Add a copy from the host's memory to the device's; its number."""
        cdef Command *command = self._add_copy(self.driver.copy_in, to, source, nbytes)
        command.host = &command.source
        return self.n_commands - 1

    def copy_out(self, uint64_t to, uint64_t source, size_t nbytes):
        """Add a copy from the device's memory to the host's; its number."""
        cdef Command *command = self._add_copy(self.driver.copy_out, to, source, nbytes)
        command.host = &command.to
        return self.n_commands - 1

    def set_host_address(self, int number, uint64_t address):
        """Have a copy use other memory of the host from now on; IndexError: it is no copy."""
        if not 0 <= number < self.n_commands or self.commands[number].host == NULL:
            raise IndexError(f"command {number} of {self.n_commands} is no copy; pass a number "
                             "that copy_in or copy_out returned")
        self.commands[number].host[0] = address

    def launch(self, uint64_t function, uint32_t grid, uint32_t block, uint32_t shared_bytes,
               call, route):
        """Add a launch of `function`, a CUfunction or hipFunction_t.

        `call` and `route`: ctypes structs, its arguments, read whenever this is enqueued.
        """
        cdef uint64_t call_address = ctypes.addressof(call)
        cdef uint64_t route_address = ctypes.addressof(route)
        cdef Command *command = self._add()
        self.kept += (call, route)
        command.function = <void *>function
        command.config.grid = [grid, 1, 1]
        command.config.block = [block, 1, 1]
        command.config.shared_bytes = shared_bytes
        command.config.stream = self.driver.stream
        command.config.attributes = &self.driver.attribute
        command.config.n_attributes = 1
        command.parameters = [<void *>call_address, <void *>route_address]

    def enqueue(self):
        """Pass everything to the driver. None, or the first that it refused: (index, status).

        What comes after that one is not enqueued.
        """
        cdef int status = 0, index = 0
        with nogil:
            while index < self.n_commands:
                status = enqueue_one(self.driver, &self.commands[index])
                if status != 0:
                    break
                index += 1
        return None if status == 0 else (index, status)

    cdef Command *_add_copy(
            self, Copy copy, uint64_t to, uint64_t source, size_t nbytes) except NULL:
        cdef Command *command = self._add()
        command.copy = copy
        command.to = to
        command.source = source
        command.nbytes = nbytes
        return command

    cdef Command *_add(self) except NULL:
        if self.n_commands == MOST_COMMANDS:
            raise IndexError(f"the list is full with {MOST_COMMANDS} commands; make another one")
        self.n_commands += 1
        return &self.commands[self.n_commands - 1]


def address_of(buffer):
    """Where the buffer's memory begins; 0 unless it is contiguous."""
    cdef Py_buffer view
    cdef uint64_t address
    try:
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    except (BufferError, ValueError):
        return 0
    address = <uint64_t>view.buf
    PyBuffer_Release(&view)
    return address


cdef int enqueue_one(Driver driver, Command *command) noexcept nogil:
    cdef LaunchConfig *config = &command.config
    if command.copy != NULL:
        return command.copy(command.to, command.source, command.nbytes, driver.stream)
    if driver.launch_overlapping != NULL:
        return driver.launch_overlapping(config, command.function, command.parameters, NULL)
    return driver.launch(
        command.function, config.grid[0], config.grid[1], config.grid[2],
        config.block[0], config.block[1], config.block[2], config.shared_bytes, driver.stream,
        command.parameters, NULL)
