# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, auto_pickle=False
"""The gateway's side of the fast lane: what one stream of a tunnel becomes at a service, HTTP/1.1.

Theory of operation
===================

    OPEN ──▶ UpstreamSession ──▶ UpstreamStream.begin ─ scanned, checked, rewritten ─▶ Pool.take ──┬─▶ service
    DATA ──▶ UpstreamStream.on_data ─ framed ─▶ UpstreamConnection.queue ─ one write per turn ─────┘
    HEAD, DATA ◀── Stream.send ◀── UpstreamConnection.buffer_updated ─ strict scanner ◀─────────────── service

There is no task, no queue and no Python object per header field. A request without a body is written to a pooled
connection from within the tunnel's reading; a response is passed on from within the service's reading. Python runs
when rules other than "everything" are configured (`Pool.admits`), when a connection must be made
(`Pool.start_connecting`), and when something is wrong (`Pool.note`).

**One connection carries one exchange at a time.** It goes back to the pool only when nothing about it is in doubt: the
request was sent whole, the response was framed by Content-Length or chunks and is complete, both sides want to go on,
and not one byte too many came. Everything else closes it: an early response, surplus bytes, a response that ends with
the connection, a cancelled stream.

**Waiting for a connection.** A stream that finds none waits, and a connection is being made for every stream that
waits, never more. Who comes first gets what is there first, be it new or just released; a connection that then has
nobody to serve goes to the pool. A failure is the oldest waiter's, if fewer are being made than streams wait. So a
flood of streams that are reset at once cannot make more connection attempts than there were streams at one time.

**Stale connections.** One from the pool may turn out to be closed by the service in the very moment in which it is
used. An idempotent request without a body is then sent once more, on a new connection, if no byte of a response came;
any other request takes a connection from the pool only if that was in use a moment ago and the kernel has nothing for
it, not even its end.

**Nothing is collected.** What a service sends pauses its reading when more than the stream's high-water mark waits for
the tunnel. What the edge sends is consumed (SPEC.md, 4.) when the connection's write buffer has drained; before there
is a connection, and before the 101 of an upgrade, it is held and not consumed: one floor of credit at most. The
response to a request whose body is still on its way is passed on at once; when it is not a success, the body stops
there (RFC 9112, 9.5).

**Before a write of body** the event loop is given the time to read what the service has sent: one that refuses a body
often answers and resets the connection at once, and a write that fails would close the transport with the answer
unread.

**The end.** A peer's RESET aborts the connection and is acknowledged when that is really gone.
"""

import asyncio
import select
from collections import OrderedDict

from cpython.buffer cimport PyBUF_WRITE
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from cpython.time cimport monotonic
from libc.stdio cimport snprintf
from libc.string cimport memcmp, memcpy, memset

from guestpass_speedups.direct cimport descriptor, gp_send, iovec
from guestpass_speedups.http1 cimport (
    BODY_CHUNKED,
    BODY_LENGTH,
    BODY_NONE,
    CHUNK_DATA,
    CHUNK_END,
    CHUNK_MORE,
    CHUNK_TRAILER,
    F_CONTENT_LENGTH,
    F_CONTENT_LOCATION,
    F_HOST,
    F_LOCATION,
    F_ORIGIN,
    F_REFERER,
    F_REFRESH,
    F_TRAILER,
    F_UPGRADE,
    F_X_FORWARDED_HOST,
    F_X_FORWARDED_PROTO,
    FROM_EDGE,
    HOP_BY_HOP,
    M_DELETE,
    M_GET,
    M_HEAD,
    M_OPTIONS,
    M_PUT,
    NO_FIELD,
    NOMINATED,
    PLAIN,
    TO_HEAD,
    UPGRADE_WEBSOCKET,
    Field,
    Fields,
    RequestHead,
    error_reason,
    next_chunk,
    scan_request,
    scan_response,
)
from guestpass_speedups.frames cimport MAX_HEAD
from guestpass_speedups.session cimport (
    BAD_UPSTREAM,
    PROTOCOL_ERROR,
    REFUSED,
    TIMEOUT,
    UNREACHABLE,
)

cdef extern from "Python.h":
    PyObject *new_bytes "PyBytes_FromStringAndSize"(const char *, Py_ssize_t) except NULL
    int shrink "_PyBytes_Resize"(PyObject **, Py_ssize_t) except -1

cdef enum:
    # A head that is rewritten grows: a space behind every colon, another name in Host, Origin and Referer. What grows
    # beyond twice a head is refused.
    ROOM = 65536
    # Pieces of a request are joined up to this size; above, copying costs more than a vector of buffers.
    JOIN = 8192
    # A message on an upgraded connection up to this size is written at once: it is somebody's key press, not a part of
    # a stream that is worth waiting for.
    SMALL = 4096
    # What one read brings at most. All connections of a service share the buffer: it is emptied before the loop's next
    # callback. A piece of body of this size is no burden to malloc; one of 128 KiB or more is mapped and faulted in.
    READ = 65536
    # Turns of the loop before a write of body when the kernel has something to read: one to see it, one to read it.
    LOOKS = 2

# How often the time of those that wait for an answer is looked at, seconds. Answers take as long as 300 s.
cdef double TICK = 1.0

cdef enum Phase:
    P_NEW
    P_WAITING           # for a connection
    P_ASKED             # the request is on its way, no final head yet
    P_ANSWERED          # the response is under way
    P_SWITCHED          # 101: opaque bytes both ways
    P_DONE              # the response is complete; what still comes of the request is dropped
    P_OVER              # reset, by either side

cdef enum Reading:
    R_NOTHING           # unused: whatever comes is wrong
    R_HEAD
    R_LENGTH
    R_CHUNKS
    R_UNTIL_CLOSE
    R_OPAQUE

# Heads are scanned into these and written into OUT; nothing else runs between (the GIL).
cdef RequestHead REQUEST
cdef ResponseHead RESPONSE
cdef unsigned char[65536] OUT
cdef Py_ssize_t used = 0
cdef bint full = False

POLL = hasattr(select, "poll")


cdef inline void put(const void *data, Py_ssize_t size) noexcept:
    global used, full
    if size > ROOM - used:
        full = True
        return
    memcpy(OUT + used, data, size)
    used += size


cdef inline bint origin_ends(const unsigned char *url, Py_ssize_t size, Py_ssize_t at) noexcept:
    """Whether an origin that is a prefix of `url` is its whole origin."""
    return size == at or url[at] == c"/" or url[at] == c"?" or url[at] == c"#"


cdef Py_ssize_t names_origin(const unsigned char *url, Py_ssize_t size, const unsigned char *data,
                             Span proto, Span host) noexcept:
    """The size of the origin `proto://host` (spans of `data`) with which `url` begins; 0 when it does not."""
    cdef Py_ssize_t length = proto.size + 3 + host.size
    if (
        size >= length
        and memcmp(url, data + proto.at, proto.size) == 0
        and memcmp(url + proto.size, b"://", 3) == 0
        and memcmp(url + proto.size + 3, data + host.at, host.size) == 0
        and origin_ends(url, size, length)
    ):
        return length
    return 0


cdef inline unsigned char lower(unsigned char byte) noexcept:
    return byte + 32 if c"A" <= byte <= c"Z" else byte


cdef inline bint same(const unsigned char *data, const char *text, Py_ssize_t size) noexcept:
    """In any case of letters."""
    cdef Py_ssize_t i
    for i in range(size):
        if lower(data[i]) != lower(<unsigned char> text[i]):
            return False
    return True


cdef Py_ssize_t own_origin(const unsigned char *url, Py_ssize_t size, bytes host) noexcept:
    """The size of the origin with which `url` begins, if that is the service's own: its name as the service knows it,
    behind http://, https:// or only //. A service that is told X-Forwarded-Proto may say https of itself where it is
    reached by http."""
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t length = PyBytes_GET_SIZE(host)
    if size >= 5 and same(url, b"http:", 5):
        at = 5
    elif size >= 6 and same(url, b"https:", 6):
        at = 6
    if length == 0 or size - at < 2 + length or url[at] != c"/" or url[at + 1] != c"/":
        return 0
    if not same(url + at + 2, PyBytes_AS_STRING(host), length) or not origin_ends(url, size, at + 2 + length):
        return 0
    return at + 2 + length


cdef Py_ssize_t refresh_url(const unsigned char *value, Py_ssize_t size) noexcept:
    """Where the URL of a Refresh begins, as the HTML standard reads `5; url="/x"`; `size` when there is none."""
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t after
    while at < size and (c"0" <= value[at] <= c"9" or value[at] == c"." or value[at] == c" " or value[at] == c"\t"):
        at += 1
    if at < size and (value[at] == c";" or value[at] == c","):
        at += 1
    while at < size and (value[at] == c" " or value[at] == c"\t"):
        at += 1
    if size - at >= 4 and same(value + at, b"url", 3):
        after = at + 3
        while after < size and (value[after] == c" " or value[after] == c"\t"):
            after += 1
        if after < size and value[after] == c"=":
            at = after + 1
            while at < size and (value[at] == c" " or value[at] == c"\t"):
                at += 1
    if at < size and (value[at] == c"\"" or value[at] == c"'"):
        at += 1
    return at


cdef inline void put_line(const unsigned char *data, Field *field) noexcept:
    if field.flags & PLAIN:
        put(data + field.name.at, <Py_ssize_t> field.name.size + field.value.size + 4)
        return
    put(data + field.name.at, field.name.size)
    put(b": ", 2)
    put(data + field.value.at, field.value.size)
    put(b"\r\n", 2)


cdef inline void put_changed(const unsigned char *data, Field *field, bytes start, Py_ssize_t skip) noexcept:
    """A field whose value begins with `start` in place of its first `skip` bytes."""
    put(data + field.name.at, field.name.size)
    put(b": ", 2)
    put(PyBytes_AS_STRING(start), PyBytes_GET_SIZE(start))
    put(data + field.value.at + skip, field.value.size - skip)
    put(b"\r\n", 2)


cdef inline bint passes(Field *field) noexcept:
    # Trailer is end to end; that the edge drops it is the edge's business.
    return not field.flags & NOMINATED and (not field.flags & HOP_BY_HOP or field.id == F_TRAILER)


cdef bytes reason_of(int error):
    return <bytes> error_reason(error)


cdef bint trailers_hold(const unsigned char *data, Py_ssize_t size):
    """Whether field lines and the empty line are well-formed and none of them belongs to a head."""
    cdef Chunked body
    cdef Span piece
    cdef Py_ssize_t at = 0
    cdef int event
    memset(&body, 0, sizeof(body))
    if next_chunk(&body, <const uint8_t *> b"0\r\n", 3, &at, &piece) != CHUNK_MORE:
        return False
    at = 0
    while True:
        event = next_chunk(&body, data, size, &at, &piece)
        if event != CHUNK_TRAILER:
            return event == CHUNK_END and at == size


# ------------------------------------------------------------------------------------------------------------
# Streams


cdef class UpstreamStream(Stream):
    """One exchange with a service. Made by `UpstreamSession`."""

    @property
    def held_bytes(self):
        """Body bytes from the edge that the service has not taken."""
        return self.unconsumed

    def end(self, uint32_t code):
        """Give it up: the connection is cut, the edge is told."""
        self.fault(code, "")

    cdef bint begin(self, Pool pool, const unsigned char *head, Py_ssize_t size, bint fin) except -1:
        """Takes the request head; False: refused."""
        global used, full
        cdef RequestHead *request = &REQUEST
        cdef UpstreamConnection connection
        cdef Fields *fields = &request.fields
        cdef Field *field
        cdef uint32_t searched = 0
        cdef uint32_t i
        cdef Py_ssize_t skip
        cdef Span proto, host
        cdef double now
        cdef int result = scan_request(head, size, request, &searched, FROM_EDGE)
        if result <= 0 or result != size or request.minor != 1 or head[0] == c"\r":
            pool.note(REFUSED, reason_of(result).decode("ascii") if result < 0 else "its head is malformed")
            return False
        if pool.guarded and not pool.admits(
                PyBytes_FromStringAndSize(<const char *> head + request.method.at, request.method.size),
                PyBytes_FromStringAndSize(<const char *> head + request.target.at, request.target.size)):
            pool.note(REFUSED, "its method or path is not among what this gateway exposes")
            return False

        self.pool = pool
        self.upgrade = request.upgrade == UPGRADE_WEBSOCKET
        self.to_head = request.method_id == M_HEAD
        self.left = <int64_t> request.content_length if fields.present >> F_CONTENT_LENGTH & 1 else -1
        if self.left >= 0:
            self.expects(<uint64_t> self.left)
        self.request_sent = fin
        self.chunked = not fin and not self.upgrade and self.left < 0
        self.safe = (fin or self.upgrade) and request.method_id in (M_GET, M_HEAD, M_OPTIONS, M_PUT, M_DELETE)
        if fin and self.left > 0:
            pool.note(PROTOCOL_ERROR, "the body is missing")
            self.phase = P_OVER
            self.abandon(PROTOCOL_ERROR)
            return True

        proto.size = host.size = 0
        if PyBytes_GET_SIZE(pool.host) and fields.first[F_X_FORWARDED_PROTO] != NO_FIELD \
                and fields.first[F_X_FORWARDED_HOST] != NO_FIELD:
            proto = fields.field[fields.first[F_X_FORWARDED_PROTO]].value
            host = fields.field[fields.first[F_X_FORWARDED_HOST]].value
        used = 0
        full = False
        put(head + request.method.at, <Py_ssize_t> request.method.size + 1 + request.target.size)
        put(b" HTTP/1.1\r\n", 11)
        for i in range(fields.count):
            field = &fields.field[i]
            if not passes(field):
                continue
            if field.id == F_HOST and PyBytes_GET_SIZE(pool.host):
                put_changed(head, field, pool.host, field.value.size)
                continue
            if proto.size and host.size:
                if field.id == F_ORIGIN or field.id == F_REFERER:
                    skip = names_origin(head + field.value.at, field.value.size, head, proto, host)
                    if skip and (field.id == F_REFERER or skip == field.value.size):
                        put_changed(head, field, pool.origin, skip)
                        continue
                elif field.id == F_X_FORWARDED_PROTO and field == &fields.field[fields.first[F_X_FORWARDED_PROTO]]:
                    self.proto.at = <uint32_t> used + field.name.size + 2
                    self.proto.size = proto.size
                elif field.id == F_X_FORWARDED_HOST and field == &fields.field[fields.first[F_X_FORWARDED_HOST]]:
                    self.host.at = <uint32_t> used + field.name.size + 2
                    self.host.size = host.size
            put_line(head, field)
        if self.upgrade:
            put(b"Connection: Upgrade\r\nUpgrade: websocket\r\n", 41)
        elif self.chunked:
            put(b"Transfer-Encoding: chunked\r\n", 28)
        put(b"\r\n", 2)
        if full:
            pool.note(REFUSED, "its head is too large")
            return False
        self.head = PyBytes_FromStringAndSize(<const char *> OUT, used)
        if not (self.proto.size and self.host.size):
            self.proto.size = self.host.size = 0

        now = monotonic()
        pool.live(self)
        connection = pool.take(self.safe, now)
        if connection is None:
            pool.wait(self)
        else:
            self.start(connection, now)
        return True

    cdef int start(self, UpstreamConnection connection, double now) except -1:
        """Sends what there is of the request on a connection that is nobody's."""
        self.connection = connection
        connection.stream = self
        connection.state = R_HEAD
        connection.begun = False
        connection.spoken = False
        self.phase = P_ASKED
        self.since = now
        if self.request_sent or self.upgrade:
            connection.spoken = True
            connection.send(self.head)
        else:
            connection.queue(self.head)
            self._pass_held()
        return 0

    cdef int _pass_held(self) except -1:
        cdef list held = self.held
        cdef Py_ssize_t i
        cdef Py_ssize_t count
        if held is None:
            return 0
        self.held = None
        count = len(held)
        for i in range(count):
            self._pass_on(held[i], self.held_fin and i + 1 == count, self.held_trailers)
        return 0

    cdef int _pass_on(self, bytes data, bint fin, bytes trailers) except -1:
        """A piece of body to the service."""
        cdef char[24] line
        cdef int length
        cdef UpstreamConnection connection = self.connection
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef bytes framed
        if size:
            if self.chunked:
                length = snprintf(line, 24, b"%llx\r\n", <unsigned long long> size)
                framed = PyBytes_FromStringAndSize(NULL, length + size + 2)
                memcpy(PyBytes_AS_STRING(framed), line, length)
                memcpy(PyBytes_AS_STRING(framed) + length, PyBytes_AS_STRING(data), size)
                memcpy(PyBytes_AS_STRING(framed) + length + size, b"\r\n", 2)
                connection.queue(framed)
            elif self.upgrade and size <= SMALL and not connection.out and not connection.lost \
                    and not connection.writing_paused and not connection.transport.is_closing():
                connection.send(data)
                if not connection.writing_paused:
                    self.drained(self.since)
            else:
                connection.queue(data)
        if fin:
            self.request_sent = True
            if self.chunked:
                connection.queue(b"0\r\n" + trailers if trailers is not None else b"0\r\n\r\n")
            elif self.upgrade:
                connection.finish_due = True
                connection._flush_soon()
        return 0

    cdef int _body(self, const unsigned char *data, Py_ssize_t size, bint fin, bytes trailers) except -1:
        cdef bytes piece
        if self.phase == P_OVER:
            return 0
        if self.phase == P_DONE:
            return self.consumed(<uint64_t> size)
        self.unconsumed += <uint64_t> size
        if self.stopped:
            return 0                # held up, and forgotten when the response is complete
        if not self.upgrade and self.left >= 0:
            if size > self.left:
                return self.fault(PROTOCOL_ERROR, "the body is longer than its Content-Length")
            self.left -= size
            if fin and self.left:
                return self.fault(PROTOCOL_ERROR, "the body is shorter than its Content-Length")
        piece = PyBytes_FromStringAndSize(<const char *> data, size)
        if self.connection is None or (self.upgrade and self.phase != P_SWITCHED):
            if self.held is None:
                self.held = []
            self.held.append(piece)
            self.held_fin = fin
            self.held_trailers = trailers
            return 0
        return self._pass_on(piece, fin, trailers)

    cdef int drained(self, double now) except -1:
        """What was passed on has left the connection's buffer."""
        cdef uint64_t size = self.unconsumed
        self.since = now
        if size and self.held is None and not self.stopped:
            self.unconsumed = 0
            self.consumed(size)
        return 0

    cdef int responded(self) except -1:
        """The response is complete; the connection is no longer this stream's."""
        cdef uint64_t size = self.unconsumed
        self.phase = P_DONE
        self.head = None
        self.held = None
        self.unconsumed = 0
        if size:
            # Take the rest and forget it, until the edge, which has the response, ends it. A RESET from here could
            # overtake the response's last bytes.
            self.consumed(size)
        return 0

    cdef int fault(self, uint32_t code, str text) except -1:
        """The exchange is given up from this side."""
        cdef UpstreamConnection connection = self.connection
        if self.phase == P_OVER:
            return 0
        if text:
            self.pool.note(code, text)
        if self.phase == P_WAITING:
            self.pool.forget(self)
        self.phase = P_OVER
        self.held = None
        if connection is not None:
            connection._detach()
            connection.abort_()
        return self.abandon(code)

    # -- what the session calls ------------------------------------------------------------------------------

    cdef int on_data(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1:
        return self._body(data, size, fin, None)

    cdef int on_trailers(self, const unsigned char *trailers, Py_ssize_t size) except -1:
        if self.phase != P_OVER and self.phase != P_DONE and not trailers_hold(trailers, size):
            return self.fault(PROTOCOL_ERROR, "the trailers are malformed")
        return self._body(trailers, 0, True, PyBytes_FromStringAndSize(<const char *> trailers, size))

    cdef int on_reset(self, uint32_t code) except -1:
        cdef UpstreamConnection connection = self.connection
        if self.phase == P_WAITING:
            self.pool.forget(self)
        self.phase = P_OVER
        self.held = None
        if connection is not None and connection.lost:
            connection._detach()            # its end was the service's; the visitor's was still to come
            connection = None
        if connection is None:
            return self.work_ended()
        return connection.abort_()          # `connection_lost` acknowledges

    cdef int on_writable(self) except -1:
        if self.connection is not None:
            return self.connection._resume()
        return 0

    cdef int on_closed(self) except -1:
        cdef UpstreamConnection connection = self.connection
        if self.pool is not None:
            self.pool.streams.discard(self)
        if self.phase == P_WAITING:
            self.pool.forget(self)
        if connection is not None and (self.doomed or self.phase != P_SWITCHED):
            connection.abort_()     # given up; else its last bytes may still be on their way to the service
        if connection is not None and connection.lost:
            connection._detach()
        return 0


# ------------------------------------------------------------------------------------------------------------
# Connections


cdef class UpstreamConnection:
    """One connection to a service. asyncio needs `Connection`, below."""

    def __init__(self, Pool pool not None, *, bint half_close=True):
        self.pool = pool
        self.half_close = half_close
        self.out = []

    # -- asyncio's calls -------------------------------------------------------------------------------------

    def connection_made(self, transport):
        self.transport = transport
        self.write = transport.write
        self.fd = descriptor(transport)

    def get_buffer(self, sizehint):
        # Nothing but body can come: it is read where it stays until it is framed.
        self.whole = self.state == R_UNTIL_CLOSE or (self.state == R_LENGTH and self.left >= READ)
        return self.pool.empty_piece() if self.whole else self.pool.view

    def buffer_updated(self, Py_ssize_t size):
        if self.whole:
            self.whole = False
            self._read_piece(size)
            return
        self._received(<const unsigned char *> PyByteArray_AS_STRING(self.pool.buffer), size)

    def eof_received(self):
        self.ended = True
        self._end()
        return self.half_close

    def connection_lost(self, exc):
        cdef UpstreamStream stream = self.stream
        self.lost = True
        if self.idle:
            self.idle = False
            self.pool.connections.remove(self)
        if stream is not None:
            if stream.phase == P_OVER:
                self._detach()
                stream.work_ended()
            elif exc is not None:
                self._broken("the connection was cut off")
            elif not self.ended:
                self.ended = True
                self._end()
            elif stream.phase == P_SWITCHED and stream.request_sent:
                self._detach()
        self.transport = None
        self.write = None
        self.fd = -1
        self.out.clear()

    def pause_writing(self):
        self.writing_paused = True

    def resume_writing(self):
        self.writing_paused = False
        if self.stream is not None and self.stream.phase != P_OVER:
            self.stream.drained(monotonic())

    # -- the request -----------------------------------------------------------------------------------------

    cdef int send(self, bytes data) except -1:
        """Written now: to the kernel if nothing waits in the transport."""
        cdef iovec piece
        cdef Py_ssize_t sent
        if self.fd >= 0 and self.spilled:
            self.spilled = self.transport.get_write_buffer_size() != 0
        if self.fd >= 0 and not self.spilled:
            piece.iov_base = PyBytes_AS_STRING(data)
            piece.iov_len = <size_t> PyBytes_GET_SIZE(data)
            sent = gp_send(self.fd, &piece, 1)
            if sent == PyBytes_GET_SIZE(data):
                return 0
            if sent > 0:
                data = data[sent:]
        self.spilled = True
        self.write(data)
        return 0

    cdef int queue(self, bytes data) except -1:
        """Written at the end of the loop's turn, together with what else comes until then."""
        self.out.append(data)
        self.out_size += PyBytes_GET_SIZE(data)
        return self._flush_soon()

    cdef int _flush_soon(self) except -1:
        if not self.flush_due:
            self.flush_due = True
            self.looks = 0
            self.pool.loop.call_soon(self._flush_now)
        return 0

    def _flush_now(self):
        self.flush_due = False
        self._flush()

    cdef int _flush(self) except -1:
        cdef list out = self.out
        cdef UpstreamStream stream = self.stream
        if stream is None or stream.phase == P_OVER or self.lost:
            gone = bool(out)
            out.clear()
            self.out_size = 0
            if stream is None or stream.phase != P_SWITCHED:
                return 0
            if gone:
                return stream.fault(BAD_UPSTREAM, "an upgraded connection was cut off")
            self._detach()          # the service has ended both directions, now the visitor has ended his
            return 0
        if stream.stopped:
            out.clear()
            self.out_size = 0
        if out:
            if self.spoken and stream.phase != P_SWITCHED and self.looks < LOOKS:
                if self.looks or not self.is_quiet():
                    self.looks += 1
                    self.flush_due = True
                    self.pool.loop.call_soon(self._flush_now)
                    return 0
            if self.transport.is_closing():
                # Cut off on its side: `connection_lost` is on its way.
                return 0
            self.spoken = True
            if len(out) == 1:
                data = out[0]
                out.clear()
                self.send(data)
            elif self.out_size <= JOIN:
                data = b"".join(out)
                out.clear()
                self.send(data)
            else:
                self.out = []
                self.spilled = True
                self.transport.writelines(out)
            self.out_size = 0
            if not self.writing_paused:
                stream.drained(monotonic())
        if self.finish_due and self.transport is not None and not self.transport.is_closing():
            self.finish_due = False
            if self.half_close:
                self.transport.write_eof()
                if self.ended:
                    self._detach()
                    self.close_()
            elif self.ended:
                self._detach()
                self.close_()
            else:
                self.pool.loop.call_later(self.pool.half_closed, self.transport.abort)
        return 0

    # -- state -----------------------------------------------------------------------------------------------

    cdef bint is_quiet(self) except -1:
        """Whether the kernel has nothing for us, not even the end: what the event loop has not seen yet."""
        if self.quiet is None:
            sock = self.transport.get_extra_info("socket")
            if sock is None or not POLL:
                return True
            poll = select.poll()
            poll.register(sock.fileno(), select.POLLIN)
            self.quiet = poll.poll
        return not self.quiet(0)

    cdef bint spotless(self) except -1:
        """Open, with nothing to read: fit for another exchange."""
        return not self.lost and not self.ended and self.transport is not None and not self.transport.is_closing()

    cdef int close_(self) except -1:
        if self.idle:
            self.idle = False
            self.pool.connections.remove(self)
        if self.transport is not None:
            self.transport.close()
        return 0

    cdef int abort_(self) except -1:
        """Close without sending what is queued."""
        if self.idle:
            self.idle = False
            self.pool.connections.remove(self)
        if self.transport is not None:
            self.transport.abort()
        return 0

    def close(self):
        self.close_()

    cdef int _resume(self) except -1:
        if self.reading_paused and self.transport is not None:
            self.reading_paused = False
            if self.half_close:
                self.transport.resume_reading()
            elif self.paused:
                self.paused = False
                self.transport.resume_reading()
        return 0

    cdef UpstreamStream _detach(self):
        """The exchange is over, as far as this connection is concerned."""
        cdef UpstreamStream stream = self.stream
        if stream is not None:
            stream.connection = None
        self.stream = None
        self.state = R_NOTHING
        self.partial = None
        self.trailers = None
        self.used = True
        return stream

    # -- the response ----------------------------------------------------------------------------------------

    cdef int _no_response(self, str text) except -1:
        """The connection ended before the first byte of a response."""
        cdef bint reused = self.used
        cdef UpstreamStream stream = self.stream
        if stream.safe and reused:          # the second time it is on a new connection
            self._detach()
            self.abort_()
            stream.retried = True
            return self.pool.wait(stream)
        return stream.fault(BAD_UPSTREAM, text)

    cdef int _broken(self, str text) except -1:
        """The connection was cut off while it served an exchange."""
        cdef UpstreamStream stream = self.stream
        if self.state == R_HEAD and not self.begun:
            return self._no_response(text)
        if self.state == R_OPAQUE:
            text = "an upgraded connection was cut off"
        elif self.state != R_HEAD:
            text += " inside the response"
        return stream.fault(BAD_UPSTREAM, text)

    cdef int _end(self) except -1:
        """The service has ended its direction."""
        cdef UpstreamStream stream = self.stream
        if stream is None:
            return self.close_()
        if stream.phase == P_OVER:
            return 0
        if self.state == R_HEAD:
            if not self.begun:
                return self._no_response("the connection was closed without an answer")
            return stream.fault(BAD_UPSTREAM, "the connection was closed inside the response head")
        if self.state == R_LENGTH:
            return stream.fault(
                BAD_UPSTREAM, f"the connection was closed {self.left} bytes before the response's end")
        if self.state == R_CHUNKS:
            return stream.fault(BAD_UPSTREAM, "the response broke off")
        if self.state == R_UNTIL_CLOSE:
            stream.send_bytes(b"", True)
            return self._finish(False)
        if self.state == R_OPAQUE:
            stream.send_bytes(b"", True)
            if stream.request_sent and not self.finish_due:
                self._detach()
                self.close_()
        return 0

    cdef int _read_piece(self, Py_ssize_t size) except -1:
        """The pool's `piece` was read into."""
        cdef UpstreamStream stream = self.stream
        cdef bytes body
        if stream is None:
            return self.close_()
        if stream.phase == P_OVER:
            return 0
        body = self.pool.take_piece(size)
        if self.state == R_LENGTH:
            self.left -= <uint64_t> size        # at least READ when the read began
            if self.left == 0:
                stream.send_bytes(body, True)
                return self._finish(True)
        return self._pass_on(body, False)

    cdef int _received(self, const unsigned char *data, Py_ssize_t size) except -1:
        """What was read; `data` is good until this returns."""
        cdef Py_ssize_t at = 0
        cdef UpstreamStream stream = self.stream
        cdef bytes whole
        if stream is None:
            return self.close_()            # nobody asked
        if stream.phase == P_OVER:
            return 0
        if self.state == R_HEAD:
            if not self.spoken:
                # A 408 for an idle connection, say: nobody's answer.
                return self._no_response("the service spoke before it was asked")
            self.begun = True
            if self.partial is not None:
                whole = self.partial + PyBytes_FromStringAndSize(<const char *> data, size)
                self.partial = None
                data = <const unsigned char *> PyBytes_AS_STRING(whole)
                size = PyBytes_GET_SIZE(whole)
            while self.state == R_HEAD:
                at = self._read_head(data, size, at)
                if at < 0:
                    return 0
            if self.state == R_NOTHING:
                return self._finish(at == size)
            if at == size:
                return 0
        if self.state == R_LENGTH:
            return self._read_length(data + at, size - at)
        if self.state == R_CHUNKS:
            return self._read_chunks(data, size, at)
        if self.state == R_UNTIL_CLOSE or self.state == R_OPAQUE:
            return self._pass_on(PyBytes_FromStringAndSize(<const char *> data + at, size - at), False)
        return 0

    cdef Py_ssize_t _read_head(self, const unsigned char *data, Py_ssize_t size, Py_ssize_t at) except -1:
        """Where the head that begins at `at` ends; -2 when that is not to be known yet, or any more."""
        global used, full
        cdef UpstreamStream stream = self.stream
        cdef const unsigned char *head = data + at
        cdef ResponseHead *response = &RESPONSE
        cdef Fields *fields = &response.fields
        cdef Field *field
        cdef const unsigned char *known
        cdef const unsigned char *url
        cdef char[3] line
        cdef uint32_t i
        cdef Py_ssize_t skip, before
        cdef int result
        cdef uint16_t status
        if size == at:
            return -2
        result = scan_response(head, size - at, response, &self.searched, TO_HEAD if stream.to_head else 0)
        if result == 0:
            self.partial = PyBytes_FromStringAndSize(<const char *> head, size - at)
            return -2
        if result < 0:
            stream.fault(BAD_UPSTREAM, reason_of(result).decode("ascii"))
            return -2
        status = response.status
        if status == 101 and not stream.upgrade:
            stream.fault(BAD_UPSTREAM, "the service switched protocols unasked")
            return -2
        if 100 <= status < 200 and status != 101:
            stream.interim += 1
            if stream.interim > self.pool.interim:
                stream.fault(BAD_UPSTREAM, f"more than {self.pool.interim} interim responses")
                return -2

        used = 0
        full = False
        put(b"HTTP/1.1 ", 9)
        line[0] = <char> (c"0" + status // 100)     # 100 to 999
        line[1] = <char> (c"0" + status // 10 % 10)
        line[2] = <char> (c"0" + status % 10)
        put(line, 3)
        if response.has_reason:
            put(b" ", 1)
            put(head + response.reason.at, response.reason.size)
        put(b"\r\n", 2)
        for i in range(fields.count):
            field = &fields.field[i]
            if not passes(field):
                continue
            if stream.proto.size and (
                    field.id == F_LOCATION or field.id == F_CONTENT_LOCATION or field.id == F_REFRESH):
                url = head + field.value.at
                before = refresh_url(url, field.value.size) if field.id == F_REFRESH else 0
                skip = own_origin(url + before, field.value.size - before, self.pool.host)
                if skip:
                    known = <const unsigned char *> PyBytes_AS_STRING(stream.head)
                    put(head + field.name.at, field.name.size)
                    put(b": ", 2)
                    put(url, before)
                    put(known + stream.proto.at, stream.proto.size)
                    put(b"://", 3)
                    put(known + stream.host.at, stream.host.size)
                    put(url + before + skip, field.value.size - before - skip)
                    put(b"\r\n", 2)
                    continue
            put_line(head, field)
        if status == 101:
            put(b"Connection: Upgrade\r\n", 21)
            for i in range(fields.count):
                if fields.field[i].id == F_UPGRADE:
                    put_line(head, &fields.field[i])
        put(b"\r\n", 2)
        if full or used > MAX_HEAD:
            stream.fault(BAD_UPSTREAM, "the response head is too large")
            return -2
        if 100 <= status < 200 and status != 101:
            stream.send_head_raw(OUT, used, True, False)
            return at + result
        self._final_head(head, status)
        return at + result

    cdef int _final_head(self, const unsigned char *head, uint16_t status) except -1:
        """RESPONSE is final and OUT is what the edge gets of it."""
        cdef UpstreamStream stream = self.stream
        cdef ResponseHead *response = &RESPONSE
        cdef bint fin = status != 101 and response.framing == BODY_NONE
        self.keep_alive = response.keep_alive and response.minor == 1
        if status == 101:
            self.state = R_OPAQUE
        elif fin:
            self.state = R_NOTHING
        elif response.framing == BODY_LENGTH:
            self.left = response.content_length
            self.state = R_LENGTH
        elif response.framing == BODY_CHUNKED:
            memset(&self.body, 0, sizeof(self.body))
            self.state = R_CHUNKS
        else:
            self.state = R_UNTIL_CLOSE
        stream.head = None
        stream.send_head_raw(OUT, used, False, fin)
        if status == 101:
            stream.phase = P_SWITCHED
            return stream._pass_held()
        stream.phase = P_ANSWERED
        if status >= 300 and not stream.request_sent:
            stream.stopped = True           # the rest of the body is not wanted (RFC 9112, 9.5)
        return 0

    cdef int _read_length(self, const unsigned char *data, Py_ssize_t size) except -1:
        cdef Py_ssize_t take = size
        cdef bytes body
        if <uint64_t> size > self.left:
            take = <Py_ssize_t> self.left
        self.left -= <uint64_t> take
        body = PyBytes_FromStringAndSize(<const char *> data, take)
        if self.left:
            return self._pass_on(body, False)
        self.stream.send_bytes(body, True)
        return self._finish(take == size)

    cdef int _read_chunks(self, const unsigned char *data, Py_ssize_t size, Py_ssize_t at) except -1:
        cdef UpstreamStream stream = self.stream
        cdef PyObject *made = NULL
        cdef Py_ssize_t have = 0
        cdef Span piece
        cdef bytes body = b""
        cdef bytes part
        cdef int event
        while True:
            event = next_chunk(&self.body, data, size, &at, &piece)
            if event == CHUNK_DATA:
                # All chunks of one read become one piece: applications write few bytes at a time.
                if made == NULL:
                    made = new_bytes(NULL, size - <Py_ssize_t> piece.at)
                memcpy(PyBytes_AS_STRING(<bytes> made) + have, data + piece.at, piece.size)
                have += piece.size
            elif event == CHUNK_TRAILER:
                part = PyBytes_FromStringAndSize(<const char *> data + piece.at, piece.size)
                self.trailers = part if self.trailers is None else self.trailers + part
            else:
                break
        if made != NULL:
            shrink(&made, have)
            body = <bytes> made
            Py_DECREF(body)
        if event < 0:
            return stream.fault(BAD_UPSTREAM, reason_of(event).decode("ascii"))
        if event == CHUNK_MORE:
            return self._pass_on(body, False) if have else 0
        if self.trailers is not None and self.trailers != b"\r\n":
            if have:
                stream.send_bytes(body, False)
            stream.send_trailers(self.trailers)
        else:
            stream.send_bytes(body, True)
        return self._finish(at == size)

    cdef int _pass_on(self, bytes data, bint fin) except -1:
        if not self.stream.send_bytes(data, fin) and not self.reading_paused and self.transport is not None:
            self.reading_paused = True
            if self.half_close:
                self.transport.pause_reading()
            elif not self.pause_due:
                # aiofastnet (1.2) forgets what it has decrypted, or is about to, when a TLS transport is paused from
                # within a read: nothing wakes it up for that after resuming. Outside of one there is nothing left.
                self.pause_due = True
                self.pool.loop.call_soon(self._pause_now)
        return 0

    def _pause_now(self):
        self.pause_due = False
        if self.reading_paused and not self.paused and self.transport is not None:
            self.paused = True
            self.transport.pause_reading()

    cdef int _finish(self, bint reusable) except -1:
        """The response is complete. `reusable`: it was framed, and not one byte more came."""
        cdef UpstreamStream stream = self._detach()
        # A request for an upgrade that was declined has no body: it was sent whole.
        reusable = reusable and self.keep_alive and (stream.request_sent or stream.upgrade) and not self.out
        stream.responded()
        if reusable:
            self._resume()
            return self.pool.release(self)
        self.out.clear()
        return self.close_()


class Connection(UpstreamConnection, asyncio.BufferedProtocol):
    """`UpstreamConnection` as event loops know protocols."""

    __slots__ = ()


# ------------------------------------------------------------------------------------------------------------
# Services


cdef class Pool:
    """One service: its connections, the streams that use it or wait for it. Subclass it and say how to connect."""

    def __init__(self, str name not None, *, bytes host not None, bytes origin not None, bint guarded, limits,
                 loop=None):
        """`host`, `origin`: what the service is called in Host and Origin; empty: as the visitor calls it. `guarded`:
        `admits` is to be asked. `limits`: see gateway/upstream.py. `loop`: by default the
        one that runs when the first stream comes."""
        self.loop = loop
        self.buffer = bytearray(READ)
        self.view = memoryview(self.buffer)
        self.name = name
        self.service = name.encode("ascii")
        self.host = host
        self.origin = origin
        self.guarded = guarded
        self.response = limits.response
        self.idle = limits.idle
        self.unsafe_idle = limits.unsafe_idle
        self.half_closed = limits.half_closed
        self.interim = limits.interim
        self.idle_connections = limits.idle_connections
        self.streams = set()
        self.connections = []
        self.waiting = OrderedDict()
        self.fresh = OrderedDict()

    def __dealloc__(self):
        if self.piece != NULL:
            Py_DECREF(<object> self.piece)

    # -- pieces of body --------------------------------------------------------------------------------------

    cdef object empty_piece(self):
        """A writable view of `piece`."""
        if self.piece == NULL:
            self.piece = new_bytes(NULL, READ)
            self.piece_view = PyMemoryView_FromMemory(PyBytes_AS_STRING(<bytes> self.piece), READ, PyBUF_WRITE)
        return self.piece_view

    cdef object take_piece(self, Py_ssize_t size):
        """The first `size` bytes of `piece`: itself, if they are most of it."""
        cdef PyObject *piece = self.piece
        if size < READ // 2:
            return PyBytes_FromStringAndSize(PyBytes_AS_STRING(<bytes> piece), size)
        self.piece = NULL
        self.piece_view = None
        if size < READ:
            shrink(&piece, size)
        body = <object> piece
        Py_DECREF(body)
        return body

    # -- to be overridden ------------------------------------------------------------------------------------

    def admits(self, bytes method not None, bytes target not None):
        """Whether this side is willing to pass the request on."""
        raise NotImplementedError

    def start_connecting(self):
        """Make one connection; then call `connected` or `not_connected`, once."""
        raise NotImplementedError

    def note(self, int code, str text not None):
        """Why a stream is about to be reset with `code`."""
        raise NotImplementedError

    # -- connections -----------------------------------------------------------------------------------------

    cdef UpstreamConnection take(self, bint safe, double now):
        """An unused connection, the latest used first. `safe`: the request may be sent twice."""
        cdef UpstreamConnection connection
        while self.connections:
            connection = <UpstreamConnection> self.connections[len(self.connections) - 1]
            if not safe and (now - connection.idle_since > self.unsafe_idle or not connection.is_quiet()):
                return None
            self.connections.pop()
            connection.idle = False
            if connection.spotless():
                return connection
            connection.close_()
        return None

    cdef int release(self, UpstreamConnection connection) except -1:
        """Takes a connection back that may serve another exchange."""
        cdef UpstreamStream stream
        if not connection.spotless():
            return connection.close_()
        if self.waiting:
            stream = self.waiting.popitem(False)[0]
            return stream.start(connection, monotonic())
        if self.closed:
            return connection.close_()
        connection.idle = True
        connection.idle_since = monotonic()
        self.connections.append(connection)
        return 0

    cdef int wait(self, UpstreamStream stream) except -1:
        """No connection for it: it is served by the first that comes, or by the first new one."""
        stream.phase = P_WAITING
        if stream.retried:
            self.fresh[stream] = None
        else:
            self.waiting[stream] = None
        if self.connecting < len(self.waiting) + len(self.fresh):
            self.connecting += 1
            self.start_connecting()
        return 0

    cdef int forget(self, UpstreamStream stream) except -1:
        self.waiting.pop(stream, None)
        self.fresh.pop(stream, None)
        return 0

    def connected(self, UpstreamConnection connection not None):
        cdef UpstreamStream stream
        self.connecting -= 1
        if self.fresh and connection.spotless():
            stream = self.fresh.popitem(False)[0]
            stream.start(connection, monotonic())
            return
        if not connection.spotless() and len(self.waiting) + len(self.fresh) > self.connecting:
            # Closed as soon as it was made: as if it never had been.
            connection.close_()
            self._fail_one(UNREACHABLE)
            return
        self.release(connection)

    def not_connected(self):
        self.connecting -= 1
        if len(self.waiting) + len(self.fresh) > self.connecting:
            self._fail_one(UNREACHABLE)

    def _fail_one(self, uint32_t code):
        cdef UpstreamStream stream
        if self.fresh:
            stream = next(iter(self.fresh))
        else:
            stream = next(iter(self.waiting))
        stream.fault(code, "")

    def sweep(self):
        """Closes what was not used for too long, and what is too much."""
        cdef double now = monotonic()
        cdef UpstreamConnection connection
        cdef Py_ssize_t surplus = len(self.connections) - self.idle_connections
        for connection in self.connections[:]:      # the longest unused come first
            if now - connection.idle_since > self.idle:
                connection.close_()
            elif surplus > 0 and now - connection.idle_since > TICK:
                connection.close_()
            surplus -= 1

    def close(self):
        """No connection is kept any more; streams go on."""
        cdef UpstreamConnection connection
        self.closed = True
        for connection in self.connections[:]:
            connection.close_()

    # -- time ------------------------------------------------------------------------------------------------

    cdef int live(self, UpstreamStream stream) except -1:
        self.streams.add(stream)
        if not self.ticking:
            self.ticking = True
            if self.loop is None:
                self.loop = asyncio.get_running_loop()
            self.loop.call_later(min(TICK, self.response / 4), self._tick)
        return 0

    def _tick(self):
        """Looks after those that wait for an answer."""
        cdef UpstreamStream stream
        cdef double now = monotonic()
        cdef list late = []
        for stream in self.streams:
            if stream.phase == P_ASKED and now - stream.since > self.response:
                late.append(stream)
        for stream in late:
            stream.fault(TIMEOUT, "no answer in time")
        if self.streams:
            self.loop.call_later(min(TICK, self.response / 4), self._tick)
        else:
            self.ticking = False


cdef class Services:
    """What a gateway's sessions may reach, by name."""

    def __cinit__(self):
        self.pools = {}

    def use(self, pools):
        """These from now on: name → Pool."""
        self.pools = {name.encode("ascii"): pool for name, pool in pools.items()}
        self.last = None

    def unknown(self, bytes service not None):
        """A stream for a service that is not here is about to be refused."""

    cdef Pool find(self, const unsigned char *name, Py_ssize_t size):
        cdef Pool pool = self.last
        if pool is not None and PyBytes_GET_SIZE(pool.service) == size \
                and memcmp(PyBytes_AS_STRING(pool.service), name, size) == 0:
            return pool
        key = PyBytes_FromStringAndSize(<const char *> name, size)
        pool = self.pools.get(key)
        if pool is None:
            self.unknown(key)
        else:
            self.last = pool
        return pool


cdef class UpstreamSession(Session):
    """A gateway's session whose streams go to `services`; its handler's `stream_opened` is never called."""

    cdef Stream new_stream(self):
        return UpstreamStream.__new__(UpstreamStream)

    cdef bint on_stream_opened(self, Stream stream, const unsigned char *service, Py_ssize_t service_size,
                               bint interactive, const unsigned char *head, Py_ssize_t head_size,
                               bint fin) except -1:
        cdef Pool pool = self.services.find(service, service_size) if self.services is not None else None
        if pool is None or not (<UpstreamStream> stream).begin(pool, head, head_size, fin):
            (<UpstreamStream> stream).phase = P_OVER
            return False
        return True
