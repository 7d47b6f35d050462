# C interface of the gateway's side of the fast lane. Theory of operation: upstream.pyx.

from cpython.object cimport PyObject
from cython cimport final
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from guestpass_speedups.http1 cimport Chunked, ResponseHead, Span
from guestpass_speedups.session cimport Session, Stream

cdef class Services
cdef class Pool
cdef class UpstreamConnection


@final
cdef class UpstreamStream(Stream):
    cdef readonly Pool pool
    cdef UpstreamConnection connection      # while an exchange is under way on it
    cdef bytes head                         # for the service; until the final response head
    cdef Span proto                         # X-Forwarded-Proto and -Host in it: together the share's origin
    cdef Span host
    cdef uint8_t phase                      # a Phase
    cdef bint to_head                       # the method is HEAD
    cdef bint safe                          # may be sent twice
    cdef bint retried
    cdef bint upgrade
    cdef bint chunked                       # the request body is
    cdef bint request_sent                  # whole, as far as the connection's queue
    cdef bint stopped                       # the rest of the request body is not wanted
    cdef uint16_t interim
    cdef int64_t left                       # of the request body's Content-Length; -1: it has none
    cdef uint64_t unconsumed                # body bytes that the service has not taken yet
    cdef double since                       # the service last took a part of the request
    cdef list held                          # body that came before it can be passed on
    cdef bint held_fin
    cdef bytes held_trailers

    cdef bint begin(self, Pool pool, const unsigned char *head, Py_ssize_t size, bint fin) except -1
    cdef int start(self, UpstreamConnection connection, double now) except -1
    cdef int _pass_held(self) except -1
    cdef int _pass_on(self, bytes data, bint fin, bytes trailers) except -1
    cdef int _body(self, const unsigned char *data, Py_ssize_t size, bint fin, bytes trailers) except -1
    cdef int drained(self, double now) except -1
    cdef int fault(self, uint32_t code, str text) except -1
    cdef int responded(self) except -1


cdef class UpstreamConnection:
    cdef readonly Pool pool
    cdef UpstreamStream stream              # the exchange that has it
    cdef object transport
    cdef object write
    cdef int fd                             # for writing past the transport; -1: never
    cdef bint spilled                       # the transport may have something waiting
    cdef object quiet                       # poll() of the socket
    cdef list out                           # of the request; leaves in one write
    cdef Py_ssize_t out_size
    cdef bytes partial                      # of a response head
    cdef bytes trailers
    cdef Chunked body
    cdef uint64_t left                      # of the response's Content-Length
    cdef double idle_since
    cdef uint32_t searched
    cdef uint8_t state                      # a Reading
    cdef uint8_t looks
    cdef bint whole                         # the read that is under way goes into the pool's `piece`
    cdef bint half_close                    # it can be closed in one direction only (not with TLS)
    cdef readonly bint idle
    cdef bint lost
    cdef bint ended                         # the service has sent FIN
    cdef bint used                          # has carried an exchange before this one
    cdef bint keep_alive
    cdef bint flush_due
    cdef bint finish_due                    # FIN to the service, when `out` is empty
    cdef bint begun                         # of the answer at least a byte has come
    cdef bint spoken                        # of the request at least the head was written
    cdef bint reading_paused                # as far as this side wants
    cdef bint pause_due                     # TLS: the transport is to be told
    cdef bint paused                        # TLS: … and was
    cdef bint writing_paused

    cdef int send(self, bytes data) except -1
    cdef int queue(self, bytes data) except -1
    cdef int _flush_soon(self) except -1
    cdef int _flush(self) except -1
    cdef bint is_quiet(self) except -1
    cdef bint spotless(self) except -1
    cdef int close_(self) except -1
    cdef int abort_(self) except -1
    cdef int _resume(self) except -1
    cdef UpstreamStream _detach(self)
    cdef int _no_response(self, str text) except -1
    cdef int _broken(self, str text) except -1
    cdef int _end(self) except -1
    cdef int _read_piece(self, Py_ssize_t size) except -1
    cdef int _received(self, const unsigned char *data, Py_ssize_t size) except -1
    cdef Py_ssize_t _read_head(self, const unsigned char *data, Py_ssize_t size, Py_ssize_t at) except -1
    cdef int _final_head(self, const unsigned char *head, uint16_t status) except -1
    cdef int _read_length(self, const unsigned char *data, Py_ssize_t size) except -1
    cdef int _read_chunks(self, const unsigned char *data, Py_ssize_t size, Py_ssize_t at) except -1
    cdef int _pass_on(self, bytes data, bint fin) except -1
    cdef int _finish(self, bint reusable) except -1


cdef class Pool:
    cdef readonly str name
    cdef readonly set streams
    cdef readonly list connections          # unused ones, the latest used last
    cdef object waiting                     # streams, in order; of these, `fresh` want a new connection only
    cdef object fresh
    cdef readonly int connecting
    cdef bytes service                      # the name as it comes in OPEN
    cdef bytes host
    cdef bytes origin
    cdef bint guarded                       # there are rules: ask `admits`
    cdef bint ticking
    cdef readonly bint closed
    cdef bytearray buffer
    cdef object view
    cdef PyObject *piece                    # owned: bytes of size READ that nobody has seen, or NULL
    cdef object piece_view
    cdef object loop
    cdef double response
    cdef double idle
    cdef double unsafe_idle
    cdef double half_closed
    cdef int interim
    cdef Py_ssize_t idle_connections

    cdef object empty_piece(self)
    cdef object take_piece(self, Py_ssize_t size)
    cdef UpstreamConnection take(self, bint safe, double now)
    cdef int wait(self, UpstreamStream stream) except -1
    cdef int forget(self, UpstreamStream stream) except -1
    cdef int release(self, UpstreamConnection connection) except -1
    cdef int live(self, UpstreamStream stream) except -1


cdef class Services:
    cdef dict pools
    cdef Pool last                          # the one that was asked for last

    cdef Pool find(self, const unsigned char *name, Py_ssize_t size)


cdef class UpstreamSession(Session):
    cdef public Services services
