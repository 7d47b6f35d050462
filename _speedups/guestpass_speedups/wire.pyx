# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, auto_pickle=False
"""What runs for every read and every write of a tunnel. The rest of it is Python: `guestpass.mux.link.Link`.

Theory of operation
===================

    transport ─▶ get_buffer, buffer_updated ─▶ WebSocket._parse ─▶ Session.receive_raw
    transport ◀─ _write_frames, once a turn ◀─ WebSocket.cover ◀── Session.fill_at

On a tunnel with little traffic nothing is shared between requests: each pays for a read and a write of the tunnel at
either end, and with these in Python they cost more than all that the session does. What is rare is called by name:
`_faulty` when anything raises, `_after_read` when there is more to do than to go on, `_received_raw` before the
upgrade.

**One buffer for all reads, and one for all writes, of a thread.** The former is emptied before the loop's next
callback. The latter is for transports that have taken everything when `write` returns, which TLS does: it encrypts or
copies. So a message is filled, masked and encrypted where it lies. Other transports keep what they are given, and get
bytes.
"""

import threading

from cpython.buffer cimport PyBUF_READ, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.time cimport monotonic
from libc.stdint cimport uint8_t

from guestpass_speedups.session cimport FILL_SPACE, Session
from guestpass_speedups.websocket cimport HEADER_MAX, WebSocket

cdef extern from *:
    """
    #include <stdlib.h>
    #if defined(__GLIBC__)
    #include <malloc.h>
    static void gp_keep_freed(int trim, int map) {
        mallopt(M_TRIM_THRESHOLD, trim);
        mallopt(M_MMAP_THRESHOLD, map);
    }
    #else
    static void gp_keep_freed(int trim, int map) { (void) trim; (void) map; }
    #endif
    """
    void gp_keep_freed(int trim, int map) noexcept

cdef enum:
    # Of freed memory the process keeps so much at the end of its heap. Bodies come in pieces of 64 KiB, go in bursts;
    # glibc's own 128 KiB (or twice the largest piece that it mapped) means that the end is given back and faulted in
    # again all the time: a twentieth of a gateway's time with bodies of 1 MB.
    KEPT = 16777216
    # From this size on memory is mapped, and given back at once.
    MAPPED = 1048576
    # What one read may bring. It stays in the processor's cache: with 256 KiB the kernel's copying takes twice as long.
    READ_SIZE = 65536
    # Bytes of frames written per turn of the loop: enough to make system calls cheap, little enough that what becomes
    # urgent meanwhile (a reset, a small response) waits behind no more than a millisecond of 1 Gbit/s.
    FILL_SIZE = 131072

_buffers = threading.local()


def keep_freed_memory():
    """For a process whose business is tunnels: see KEPT. Does nothing where the C library is not glibc."""
    gp_keep_freed(KEPT, MAPPED)


cdef object CLOCK = None


def _use_clock(clock):
    """For tests: what tunnels take for the monotonic time, seconds; None: the real one."""
    global CLOCK
    CLOCK = clock


cdef inline double now_() except? -1:
    return monotonic() if CLOCK is None else CLOCK()


cdef class Wire:
    """See above. Subclasses are protocols of asyncio."""

    def _connect(self, transport, call_soon, bint copies):
        """From `connection_made`. `copies`: `transport.write` has taken all of its argument when it returns."""
        self._transport = transport
        self._write = transport.write
        self._call_soon = call_soon
        if not hasattr(_buffers, "read"):
            _buffers.read = bytearray(READ_SIZE)
            _buffers.write = bytearray(HEADER_MAX + FILL_SPACE)
        self._storage = _buffers.read
        self._out = _buffers.write if copies else None

    def _disconnect(self):
        self._transport = None
        self._write = None
        self._call_soon = None

    # -- to be overridden ------------------------------------------------------------------------------------

    def _faulty(self, exc):
        """Reading or writing raised `exc`: the end of the tunnel."""
        raise NotImplementedError

    def _after_read(self):
        """An end is due, or the WebSocket has something to say."""
        raise NotImplementedError

    def _received_raw(self, data):
        """What came while `_raw` was set."""
        raise NotImplementedError

    # -- in --------------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint):
        return self._storage

    def buffer_updated(self, Py_ssize_t size):
        if self.guard is not None:
            self.guard()
        if self.end is not None:
            return
        if self._raw:
            self._received_raw(bytes(memoryview(self._storage)[:size]))
        else:
            self._read(<uint8_t *> PyByteArray_AS_STRING(self._storage), size)

    def _received(self, buffer, Py_ssize_t size):
        """The first `size` bytes of a writable buffer, as if they had been read."""
        cdef Py_buffer view
        if self._raw:
            self._received_raw(bytes(memoryview(buffer)[:size]))
            return
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            if size < 0 or size > view.len:
                raise ValueError("size is beyond the buffer")
            self._read(<uint8_t *> view.buf, size)
        finally:
            PyBuffer_Release(&view)

    cdef int _read(self, uint8_t *data, Py_ssize_t size) except -1:
        cdef WebSocket websocket = None
        cdef Py_ssize_t start = 0
        cdef Py_ssize_t length
        self._receiving = True
        try:
            websocket = <WebSocket?> self._websocket
            length = websocket._parse(data, size, data, &start)
            if length:
                self.bytes_received += <uint64_t> length
                (<Session?> self.session).receive_raw(data + start, length, now_())
        except Exception as exc:
            self._faulty(exc)
        finally:
            self._receiving = False
        if websocket is None or self._end_due is not None or websocket._replies or websocket.close_code is not None:
            self._after_read()
        return 0

    # -- out -------------------------------------------------------------------------------------------------

    def pause_writing(self):
        self._paused = True

    def resume_writing(self):
        self._paused = False
        if self.session.has_output:
            self.output_ready()

    def output_ready(self):
        """The session has something to send: once in a turn it is written."""
        if not self._flush_due and self.end is None:
            self._flush_due = True
            self._call_soon(self._flush)

    def _flush(self):
        cdef bint written
        self._flush_due = False
        if self.guard is not None:
            self.guard()
        if self._paused or self._transport is None or self.end is not None:
            return
        try:
            written = self._write_frames()
        except Exception as exc:
            self._faulty(exc)
            return
        if written and not self._paused and (<Session> self.session)._has_output():
            self.output_ready()

    def _write_frames(self):
        """One message of what the session has; whether it had something."""
        cdef Session session = <Session?> self.session
        cdef WebSocket websocket = <WebSocket?> self._websocket
        cdef Py_ssize_t size
        cdef uint8_t *out
        cdef uint8_t *message
        if self._out is None:
            whole = websocket.wrap_output(session, FILL_SIZE, now_())
            size = len(whole)
            if size:
                self._write(whole)
        else:
            out = <uint8_t *> PyByteArray_AS_STRING(self._out) + HEADER_MAX
            size = session.fill_at(out, FILL_SIZE, now_())
            try:
                if size:
                    message = websocket.cover(out, size)
                    size += out - message
                    self._write(PyMemoryView_FromMemory(<char *> message, size, PyBUF_READ))
            finally:
                session.filled()        # its callbacks may write to another tunnel: the buffer is free by now
        if size == 0:
            return False
        self.bytes_sent = session.bytes_out
        self._written += <uint64_t> size
        return True
