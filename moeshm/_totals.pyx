"""Sums over a client's calls. Each method is one step under the interpreter's lock, and so takes
none of its own."""

cimport cython
from libc.stdint cimport int64_t


@cython.final
cdef class Totals:
    """What `stats.ClientStats` shows of calls; times in ns."""

    cdef int64_t calls, rows, messages, bytes_out, bytes_in
    cdef int64_t pack_ns, wait_ns, compute_ns, unpack_ns

    def sent(self, int64_t messages, int64_t rows, int64_t bytes_out, int64_t pack_ns):
        """A call left."""
        self.calls += 1
        self.messages += messages
        self.rows += rows
        self.bytes_out += bytes_out
        self.pack_ns += pack_ns

    def received(self, int64_t bytes_in, int64_t wait_ns, int64_t compute_ns, int64_t unpack_ns):
        """Replies came."""
        self.bytes_in += bytes_in
        self.wait_ns += wait_ns
        self.compute_ns += compute_ns
        self.unpack_ns += unpack_ns

    def taken(self, int64_t bytes_in):
        """An output was taken from a slab."""
        self.bytes_in += bytes_in

    def read(self):
        """`(calls, rows, messages, bytes_out, bytes_in, pack_ns, wait_ns, compute_ns,
        unpack_ns)`."""
        return (self.calls, self.rows, self.messages, self.bytes_out, self.bytes_in,
                self.pack_ns, self.wait_ns, self.compute_ns, self.unpack_ns)
