# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, auto_pickle=False
"""Streams from one worker's visitors to another worker's tunnels.

Theory of operation
===================

Two workers are joined by a Unix socket that speaks the frames of a tunnel. The worker that has the visitor is its edge
and opens streams; the one that holds the tunnel is its gateway, with a SpliceSession. Each stream that it accepts is a
Near; on one of its own tunnels it opens a Far; what comes in at one end leaves at the other:

      visitor's worker ══ Unix socket ══▶ Near ─▶ Far ══ tunnel ══▶ gateway
                       ◀════════════════ Near ◀─ Far ◀═══════════

**Credit is end to end.** A piece is consumed at the end where it came in when the queue of the other end has room;
while it has none, what came is `owed`, and paid when the queue has drained. So a slow visitor stops the application,
and what waits here is a window and a queue a stream.

**Parked.** When no tunnel takes a stream, it may be that the gateway has brought up another one, at another worker, of
which this one has not heard yet. The stream is kept as it came, within its credit, and `go` sends it by another way;
nothing was done with it, so that may be any request.

**Ends.** A reset at one end resets the other. Near acknowledges a reset when Far is really over, so a slot of the
gateway is not taken twice. Far that was lost before anything had come of it says DRAINING: the visitor's worker may
send the request again, by another way.
"""

from cython cimport final
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint32_t, uint64_t

from guestpass_speedups.session cimport CANCEL, DRAINING, ST_CANCELLING, Session, Stream

from guestpass_speedups.session import StreamRefused


cdef class Near(Stream):
    """The end towards the visitor's worker."""
    cdef Far far
    cdef uint64_t owed
    cdef list parked                # the body as it came; None: not parked
    cdef bytes service
    cdef bytes head
    cdef bytes trailers
    cdef bint whole                 # FIN has come

    @property
    def waits(self):
        """It is parked, and wanted."""
        return self.parked is not None and not self.finished and not self.doomed

    def go(self, Session way not None):
        """Sends what was parked by this way. Raises StreamRefused; then it is parked still."""
        cdef Far far = Far.__new__(Far)
        cdef list body = self.parked
        cdef bytes piece
        if not self.waits:
            return
        way.open_raw(far, <const unsigned char *> PyBytes_AS_STRING(self.service), PyBytes_GET_SIZE(self.service),
                     self.interactive, <const unsigned char *> PyBytes_AS_STRING(self.head),
                     PyBytes_GET_SIZE(self.head), self.whole and self.trailers is None and not body)
        self.far = far
        far.near = self
        self.parked = None
        for piece in body:
            far.send_bytes(piece, False)
        if self.trailers is not None:
            far.send_trailers(self.trailers)
        elif self.whole and not far.ended:
            far.send_bytes(b"", True)
        if not far.want_writable:
            self.pay()

    def refuse(self):
        """There is no other way."""
        if self.waits:
            self.parked = None
            self.abandon(DRAINING)

    cdef int on_data(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1:
        cdef Far far = self.far
        if self.parked is not None:
            self.whole = fin
            if size:
                self.parked.append(PyBytes_FromStringAndSize(<const char *> data, size))
        elif far is None or far.send_raw(data, size, fin):
            return self.consumed(<uint64_t> size)
        self.owed += <uint64_t> size
        return 0

    cdef int on_trailers(self, const unsigned char *trailers, Py_ssize_t size) except -1:
        cdef bytes fields = PyBytes_FromStringAndSize(<const char *> trailers, size)
        if self.parked is not None:
            self.whole = True
            self.trailers = fields
        elif self.far is not None:
            self.far.send_trailers(fields)
        return 0

    cdef int on_reset(self, uint32_t code) except -1:
        cdef Far far = self.far
        self.parked = None
        if far is None or far.finished:
            return self.work_ended()
        return far.abandon(code)        # its end acknowledges

    cdef int on_writable(self) except -1:
        return 0 if self.far is None else self.far.pay()

    cdef bint moves_on(self, uint64_t used) except -1:
        return self.far is None or not self.far.want_writable

    cdef int on_closed(self) except -1:
        cdef Far far = self.far
        self.far = None
        self.parked = None
        if far is None:
            return 0
        far.near = None
        # What was complete here may still be on its way there.
        if not far.finished and not (far.ended and far.fin_received):
            far.abandon(CANCEL)
        return 0

    @final
    cdef int pay(self) except -1:
        cdef uint64_t owed = self.owed
        self.owed = 0
        return self.consumed(owed)


cdef class Far(Stream):
    """The end towards the gateway."""
    cdef Near near
    cdef uint64_t owed

    cdef int on_head(self, const unsigned char *head, Py_ssize_t size, bint interim, bint fin) except -1:
        return 0 if self.near is None else self.near.send_head_raw(head, size, interim, fin)

    cdef int on_data(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1:
        cdef Near near = self.near
        if near is None or near.send_raw(data, size, fin):
            return self.consumed(<uint64_t> size)
        self.owed += <uint64_t> size
        return 0

    cdef int on_trailers(self, const unsigned char *trailers, Py_ssize_t size) except -1:
        if self.near is not None:
            self.near.send_trailers(PyBytes_FromStringAndSize(<const char *> trailers, size))
        return 0

    cdef int on_reset(self, uint32_t code) except -1:
        if self.near is not None:
            self.near.abandon(code if self.acknowledged_ else DRAINING)
        return self.work_ended()

    cdef int on_writable(self) except -1:
        return 0 if self.near is None else self.near.pay()

    cdef bint moves_on(self, uint64_t used) except -1:
        return self.near is None or not self.near.want_writable

    cdef int on_closed(self) except -1:
        cdef Near near = self.near
        self.near = None
        if near is None:
            return 0
        near.far = None
        if near.finished:
            return 0
        if near.state_ == ST_CANCELLING:
            return near.work_ended()
        if not (near.ended and near.fin_received):
            near.abandon(CANCEL)
        return 0

    @final
    cdef int pay(self) except -1:
        cdef uint64_t owed = self.owed
        self.owed = 0
        return self.consumed(owed)


cdef class SpliceSession(Session):
    """The end of the worker that holds tunnels. `handler.ways()` gives the sessions of the gateway's tunnels, best
    first; `handler.no_way(stream)` is told of a stream that none takes: `go` or `refuse` it later."""

    cdef Stream new_stream(self):
        return Near.__new__(Near)

    cdef bint on_stream_opened(self, Stream stream, const unsigned char *service, Py_ssize_t service_size,
                               bint interactive, const unsigned char *head, Py_ssize_t head_size,
                               bint fin) except -1:
        cdef Near near = <Near> stream
        cdef Far far
        for way in self.handler.ways():
            far = Far.__new__(Far)
            try:
                (<Session?> way).open_raw(far, service, service_size, interactive, head, head_size, fin)
            except StreamRefused:
                continue
            near.far = far
            far.near = near
            return True
        near.parked = []
        near.whole = fin
        near.service = PyBytes_FromStringAndSize(<const char *> service, service_size)
        near.head = PyBytes_FromStringAndSize(<const char *> head, head_size)
        self.handler.no_way(near)
        return True
