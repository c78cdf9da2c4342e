"""What one call asks of a GPU's driver, prepared once and enqueued at once, without the GIL.

The driver's functions come as addresses: this needs no vendor's headers and no library. Kernels'
arguments are ctypes structs, whose fields are set together.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

import ctypes

cdef enum:
    # Of one `Fields`: what a call changes in its kernels' arguments is 16 values.
    MOST_FIELDS = 16
    # A call takes seven at most: four kernels and a copy out, after two copies in, or a copy in and
    # a conversion, or after `admit` and with a written value at the end.
    MOST_COMMANDS = 8
    # CU_STREAM_WAIT_VALUE_GEQ, which by cuda.h compares in a circle, and hipStreamWaitValueGte,
    # which by HIP's reference compares plain numbers: what is waited for must not wrap.
    WAIT_UNTIL_REACHED = 0
    # CU_STREAM_WRITE_VALUE_DEFAULT: who sees the value sees everything before it on the stream.
    WRITE_IN_ORDER = 0
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
# cuStreamWriteValue32_v2, cuStreamWaitValue32_v2, hipStreamWriteValue32.
ctypedef int (*OnValue)(
    void *stream, uint64_t address, uint32_t value, unsigned int flags) noexcept nogil
# hipStreamWaitValue32.
ctypedef int (*OnMaskedValue)(
    void *stream, uint64_t address, uint32_t value, unsigned int flags, uint32_t mask
    ) noexcept nogil

cdef enum What:
    COPY, LAUNCH, OVERLAPPING_LAUNCH, WRITTEN_VALUE, AWAITED_VALUE

cdef struct Command:
    What what
    Copy copy
    uint64_t to
    uint64_t source
    # Which of the two is the host's; NULL for what is no copy.
    uint64_t *host
    size_t nbytes
    # Of a value, which is at `to`.
    uint32_t value
    void *function
    LaunchConfig config
    void *parameters[2]


cdef class Driver:
    """A driver's functions, by their addresses, and the stream to use them on.

    `launch_overlapping`: cuLaunchKernelEx, for kernels that may start before the one ahead of them
    has ended; 0 has all of them launched by `launch`. `wait_takes_mask`: as HIP's `wait_value`.
    """

    cdef Copy copy_in, copy_out
    cdef Launch launch
    cdef LaunchOverlapping launch_overlapping
    cdef OnValue write_value
    # Of the two, one is NULL.
    cdef OnValue wait_value
    cdef OnMaskedValue wait_masked_value
    cdef LaunchAttribute attribute
    cdef void *stream

    def __init__(self, uint64_t copy_in, uint64_t copy_out, uint64_t launch,
                 uint64_t launch_overlapping, uint64_t write_value, uint64_t wait_value,
                 bint wait_takes_mask, uint64_t stream):
        self.copy_in = <Copy>copy_in
        self.copy_out = <Copy>copy_out
        self.launch = <Launch>launch
        self.launch_overlapping = <LaunchOverlapping>launch_overlapping
        self.write_value = <OnValue>write_value
        self.wait_value = NULL if wait_takes_mask else <OnValue>wait_value
        self.wait_masked_value = <OnMaskedValue>wait_value if wait_takes_mask else NULL
        self.stream = <void *>stream
        self.attribute.id = PROGRAMMATIC_STREAM_SERIALIZATION
        self.attribute.value = 1


cdef class CommandList:
    """Copies, launches and values, enqueued in the order in which they were added, any number of
    times.

    IndexError: more than 8 are added. One thread at a time may use it.
    """

    cdef Driver driver
    cdef Command commands[MOST_COMMANDS]
    cdef int n_commands
    # How often all of it was enqueued: known also to whom an interrupt keeps from hearing of it.
    cdef readonly uint64_t n_enqueued
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
               first, second, bint overlaps=True):
        """Add a launch of `function`, a CUfunction or hipFunction_t.

        `first` and `second`: ctypes structs, its arguments, read whenever this is enqueued.
        `overlaps`: it may start before the kernel ahead of it has ended, where kernels can.
        """
        cdef uint64_t first_address = ctypes.addressof(first)
        cdef uint64_t second_address = ctypes.addressof(second)
        cdef Command *command = self._add(LAUNCH)
        self.kept += (first, second)
        if overlaps and self.driver.launch_overlapping != NULL:
            command.what = OVERLAPPING_LAUNCH
        command.function = <void *>function
        command.config.grid = [grid, 1, 1]
        command.config.block = [block, 1, 1]
        command.config.shared_bytes = shared_bytes
        command.config.attributes = &self.driver.attribute
        command.config.n_attributes = 1
        command.parameters = [<void *>first_address, <void *>second_address]

    def write_value(self, uint64_t address):
        """Add the write of a 32-bit value once all before it is done; its number."""
        self._add(WRITTEN_VALUE).to = address
        return self.n_commands - 1

    def wait_value(self, uint64_t address):
        """Add that what comes next waits until the 32-bit value there has reached one, or is less
        than 2^31 past it; its number."""
        self._add(AWAITED_VALUE).to = address
        return self.n_commands - 1

    def set_value(self, int number, uint64_t address, uint32_t value):
        """Have a write or a wait use this address, as the device has it, and this value from now
        on; IndexError: it is neither."""
        if not 0 <= number < self.n_commands or self.commands[number].what < WRITTEN_VALUE:
            raise IndexError(f"command {number} of {self.n_commands} has no value; pass a number "
                             "that write_value or wait_value returned")
        self.commands[number].to = address
        self.commands[number].value = value

    def enqueue(self, stream=None):
        """Pass everything to the driver. None, or the first that it refused: (index, status).

        What comes after that one is not enqueued. `stream`: the handle of another than the
        driver's; 0 is the default one.
        """
        cdef void *where = self.driver.stream if stream is None else <void *><uint64_t>stream
        cdef int status = 0, index = 0
        with nogil:
            while index < self.n_commands:
                status = enqueue_one(self.driver, &self.commands[index], where)
                if status != 0:
                    break
                index += 1
        if status != 0:
            return index, status
        self.n_enqueued += 1
        return None

    cdef Command *_add_copy(
            self, Copy copy, uint64_t to, uint64_t source, size_t nbytes) except NULL:
        cdef Command *command = self._add(COPY)
        command.copy = copy
        command.to = to
        command.source = source
        command.nbytes = nbytes
        return command

    cdef Command *_add(self, What what) except NULL:
        if self.n_commands == MOST_COMMANDS:
            raise IndexError(f"the list is full with {MOST_COMMANDS} commands; make another one")
        self.commands[self.n_commands].what = what
        self.n_commands += 1
        return &self.commands[self.n_commands - 1]


cdef enum Format:
    UINT64, INT64, UINT32, INT32, FLOAT32

cdef struct Field:
    char *at
    Format format

# What is written into a field.
cdef union Value:
    uint64_t as_uint64
    int64_t as_int64
    uint32_t as_uint32
    int32_t as_int32
    float as_float

cdef dict FORMATS = {
    ctypes.c_uint64: UINT64, ctypes.c_int64: INT64, ctypes.c_uint32: UINT32,
    ctypes.c_int32: INT32, ctypes.c_float: FLOAT32,
}


cdef class Fields:
    """Fields of ctypes structs that are set together, in less time than one by one.

    Made of pairs, a struct and the name of a field of 32 or 64 bits, at most 16. AttributeError: it
    has no such field; TypeError: a field of another kind; IndexError: too many.
    """

    cdef Field fields[MOST_FIELDS]
    cdef Py_ssize_t n_fields
    # What is written to.
    cdef list kept

    def __init__(self, *fields):
        if len(fields) > MOST_FIELDS:
            raise IndexError(f"{len(fields)} fields; {MOST_FIELDS} are the most, make another one")
        self.kept = []
        self.n_fields = 0
        for struct, name in fields:
            self._add(struct, name)

    cdef _add(self, struct, name):
        cdef uint64_t start = ctypes.addressof(struct)
        cdef Py_ssize_t offset = getattr(type(struct), name).offset
        kind = dict(type(struct)._fields_)[name]
        if kind not in FORMATS:
            raise TypeError(f"field {name!r} is {kind.__name__}; pass one of an integer of 32 or "
                            "64 bits, or a c_float")
        self.kept.append(struct)
        self.fields[self.n_fields].at = <char *>start + offset
        self.fields[self.n_fields].format = FORMATS[kind]
        self.n_fields += 1

    def set(self, *values):
        """Set each to the value in its place; TypeError, OverflowError: none of them is set."""
        cdef Value found[MOST_FIELDS]
        cdef Py_ssize_t index
        cdef Field *field
        if len(values) != self.n_fields:
            raise TypeError(f"{len(values)} values for {self.n_fields} fields")
        for index in range(self.n_fields):
            read_value(values[index], self.fields[index].format, &found[index])
        for index in range(self.n_fields):
            field = &self.fields[index]
            memcpy(field.at, &found[index], 8 if field.format <= INT64 else 4)


cdef int read_value(object value, Format format, Value *into) except -1:
    if format == UINT64:
        into.as_uint64 = value
    elif format == INT64:
        into.as_int64 = value
    elif format == UINT32:
        into.as_uint32 = value
    elif format == INT32:
        into.as_int32 = value
    else:
        into.as_float = value
    return 0


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


cdef int enqueue_one(Driver driver, Command *command, void *stream) noexcept nogil:
    cdef LaunchConfig *config = &command.config
    if command.what == COPY:
        return command.copy(command.to, command.source, command.nbytes, stream)
    if command.what == OVERLAPPING_LAUNCH:
        config.stream = stream
        return driver.launch_overlapping(config, command.function, command.parameters, NULL)
    if command.what == WRITTEN_VALUE:
        return driver.write_value(stream, command.to, command.value, WRITE_IN_ORDER)
    if command.what == AWAITED_VALUE:
        return wait_for_value(driver, command, stream)
    return driver.launch(
        command.function, config.grid[0], config.grid[1], config.grid[2],
        config.block[0], config.block[1], config.block[2], config.shared_bytes, stream,
        command.parameters, NULL)


cdef int wait_for_value(Driver driver, Command *command, void *stream) noexcept nogil:
    if driver.wait_masked_value == NULL:
        return driver.wait_value(stream, command.to, command.value, WAIT_UNTIL_REACHED)
    return driver.wait_masked_value(
        stream, command.to, command.value, WAIT_UNTIL_REACHED, 0xFFFFFFFF)
