"""Sans-I/O session of one tunnel: streams, credit, scheduling. Wire format and rules: guestpass/mux/SPEC.md.

Theory of operation
===================

A Session turns received bytes into callbacks (`receive`) and what its owner asked for into bytes (`fill`). It
never touches a socket or a clock: every call that needs the time is given it.

      tunnel bytes ──receive──▶ _parse ─▶ _check ─▶ _frame ─▶ _frame_data, … ─▶ Stream.on_data, … ─▶ handler
      tunnel bytes ◀───fill──── _fill_tunnel, _fill_control, _fill_streams ◀─ queues ◀─ send, reset, …

**Frames are handled in place.** `_parse` walks the caller's buffer. Only a frame that straddles two calls is
put together in `partial`, which grows with what has arrived, not with what a header promises. `cursor` moves
past a frame before the frame is handled: a handler that raises costs its own stream, and parsing goes on
behind it.

**`state_` is what has passed on the wire**, and TABLE (from _ROWS) holds every legal step; an event without a
row ends the tunnel. What is only queued is not in the state: FIN takes effect when `fill` writes it. A local
reset sets `doomed` at once (callbacks stop, output is dropped) and the state follows when RESET is written.
If the peer's RESET comes between the two, ours was never sent and RESET_ACK goes out in its place. An id
whose OPEN is still queued is burned by a RESET in its turn, because ids must rise by one.

**A slot is held until CLOSED.** `live` owns the streams that are not CLOSED, `slots` finds them by id, and
the queues link them with borrowed pointers; `_unlink` takes a stream out of all of these. A stream refers to
its session, never the other way once it is CLOSED, and its handler is let go after `stream_closed`, so
reference counting frees both.

**Three queues.** `control`: streams with a bit in `pending` (RESET, RESET_ACK, CREDIT: one of each at most).
`interactive` and `bulk`: streams that can send *now*, in turn; a stream without credit is in neither, and
CREDIT puts it back. A turn is one full frame. OPENs stand in `interactive` in the order of their ids, and
nothing overtakes them there.

**Credit.** `granted` is the absolute offset up to which the peer may send, `consumed_ + window_` when CREDIT
was last written. The window is promised by the process-wide Budget. After the peer's FIN the promise shrinks
to what is unconsumed, and a Stream gives back what is left when it is freed, so the Budget bounds real
memory. A window grows only while what was consumed moves on (`moves_on`): behind a reader that has stopped, its own
socket takes the first bytes as fast as any. What it grows by is promised by the stream's `allowance` besides, where
it has one: the windows of one visitor do not take what there is for all.

**Callbacks.** From `receive`: at once. From `fill`: after all bytes were written (`due`), since they may call
anything. `receive` and `fill` are not reentrant in themselves; every other method may be called from every
callback."""

from enum import IntEnum

from cython cimport final
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport uint16_t
from libc.string cimport memcpy, memset

from guestpass_speedups.frames cimport (
    AUTH,
    CREDIT,
    DATA,
    FLAG_FIN,
    FLAG_INTERIM,
    GOAWAY,
    HEAD,
    HEADER_SIZE,
    HELLO,
    INFO,
    MAX_DATA,
    MAX_FRAME,
    MAX_HANDSHAKE,
    MAX_HEAD,
    MAX_PAYLOAD,
    MAX_STREAM_ID,
    N_TYPES,
    OPEN,
    PING,
    PONG,
    RESET,
    RESET_ACK,
    TRAILERS,
    check_header,
    get_u16,
    get_u32,
    get_u64,
    put_header,
    put_u16,
    put_u32,
    put_u64,
)

# ------------------------------------------------------------------------------------------------------------
# Limits. Each with its reason; SPEC.md, 6. has the same numbers.

cdef enum:
    # Two WebSocket messages of 16 KiB in flight: enough for a page's small requests at any RTT without one
    # more promise, and 16,384 idle streams promise the default budget exactly.
    C_FLOOR = 32768
    # The window with which a body begins whose size is known. The usual one is small enough to need no more CREDIT;
    # the others double from here.
    C_START_WINDOW = 524288
    # 100 ms at 1.3 Gbit/s. quic-go's 6 MiB for a stream cap it at half a Gbit/s there.
    C_MAX_WINDOW = 16777216
    # An idle stream costs about 1 KiB of ours at each end: 16 MiB a tunnel.
    C_MAX_STREAMS = 16384
    # What a HELLO may announce. Below 1 KiB frames would be mostly headers; above, the numbers make no sense.
    C_LEAST_FLOOR = 1024
    C_MOST_FLOOR = 1073741824
    C_MOST_STREAMS = 1048576
    # A caller stops when this much of a stream waits for its turn: eight frames, so that a turn is always
    # full.
    C_HIGH_WATER = 131072
    C_LOW_WATER = 32768
    # … or when it waits in this many pieces: a piece costs 50 bytes beside its own, and some applications
    # write 2 at a time.
    MAX_PIECES = 2048
    # One turn of a stream: one full DATA frame, 13 µs at 10 Gbit/s.
    QUANTUM = 16376
    # Most pages and API answers are smaller, downloads are not.
    INTERACTIVE_BYTES = 65536
    # 8 quanta fill one write of the transport; then a bulk stream has its turn, so a flood of small ones
    # starves nobody.
    INTERACTIVE_RUN = 131008
    # `fill` never makes more at once: bytes that have left the session cannot be overtaken by control frames.
    FILL_MAX = 131072
    # Frames are not cut smaller than this to fit a limit.
    LEAST_CUT = 512
    # 102 and 103 come in ones and twos; each costs the receiver a head of 32 KiB without credit.
    MAX_INTERIM_HEADS = 32
    # Proof and verdict are two; the rest is for later challenges.
    MAX_AUTH_FRAMES = 8
    # In one round trip a window's quarters are consumed 4 times and one RESET may be sent; doubled for
    # windows that grow.
    CROSSINGS_PER_STREAM = 8
    MAX_CROSSINGS = 1048576
    # Ids left when `retiring` turns true: 90 s at 45,000 requests/s, time for another tunnel and a drain.
    RETIRE_MARGIN = 4194304
    C_BUDGET = 536870912

# A tunnel is idle after PING_IDLE, dead after DEAD_AFTER without a byte: a request that waits in it must fail
# over within 10 s.
cdef double PING_IDLE = 3.0
cdef double DEAD_AFTER = 6.0
# A stream that was silent this long is interactive again (a chart's updates, a chat): no download pauses for
# a second.
cdef double INTERACTIVE_AGAIN = 1.0
# Weight of a new RTT sample, as in RFC 6298.
cdef double RTT_WEIGHT = 0.125

# Token buckets: (burst, rate per second).
cdef double PING_BURST = 20.0           # a correct peer sends one every 3 s; each draws a PONG
cdef double PING_RATE = 2.0
cdef double PING_OUT_BURST = 10.0       # half of what the peer tolerates
cdef double PING_OUT_RATE = 1.0
cdef double INFO_BURST = 20.0           # each costs the owner a JSON document of up to 64 KiB
cdef double INFO_RATE = 2.0
cdef double INFO_OUT_BURST = 10.0       # half of what the peer tolerates
cdef double INFO_OUT_RATE = 1.0
# The burst is max_streams and this much more: all of a tunnel's streams may be revoked in one breath.
cdef double RESET_MARGIN = 1000.0
cdef double RESET_RATE = 1000.0         # nghttp2's 33/s is one browser's (SPEC.md, 6.)
cdef double GLITCH_BURST = 1000.0       # nghttp2's defaults for its glitches
cdef double GLITCH_RATE = 330.0

FLOOR = C_FLOOR
START_WINDOW = C_START_WINDOW
MAX_WINDOW = C_MAX_WINDOW
MAX_STREAMS = C_MAX_STREAMS
HIGH_WATER = C_HIGH_WATER
LOW_WATER = C_LOW_WATER

cdef enum:
    IN_NONE = 0
    IN_INTERACTIVE = 1
    IN_BULK = 2

    PENDING_RESET = 1
    PENDING_RESET_ACK = 2
    PENDING_CREDIT = 4

    DUE_WRITABLE = 1
    DUE_CLOSED = 2

    NO_ROW = 255
    SKIPPED = 13            # counter of frames of unknown type
    FIRST_SLOTS = 64
    # A frame that straddled two reads leaves at most this much behind in `partial`.
    PARTIAL_KEPT = 4096


# ------------------------------------------------------------------------------------------------------------
# States


class ErrorCode(IntEnum):
    """Codes in RESET and GOAWAY frames; the words are the ones of SPEC.md, 11."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    LIMIT_EXCEEDED = 4
    CANCEL = 5
    REVOKED = 6
    REFUSED = 7
    UNREACHABLE = 8
    BAD_UPSTREAM = 9
    TIMEOUT = 10
    AUTH_FAILED = 11
    REPLACED = 12
    DRAINING = 13
    OVERLOADED = 14


STATES = ("IDLE", "OPEN", "HALF_LOCAL", "HALF_REMOTE", "CANCELLING", "RESETTING", "RESETTING_FIN", "CLOSED")

EVENTS = (
    "SEND_OPEN", "SEND_OPEN_FIN", "SEND_BODY", "SEND_FIN", "SEND_CREDIT", "SEND_RESET", "SEND_RESET_ACK",
    "RECV_OPEN", "RECV_OPEN_FIN", "RECV_BODY", "RECV_FIN", "RECV_CREDIT", "RECV_RESET", "RECV_RESET_ACK",
)

# (state, event, next state). BODY is HEAD or DATA without FIN; FIN is the flag on HEAD or DATA, or TRAILERS.
_ROWS = (
    ("IDLE", "SEND_OPEN", "OPEN"),
    ("IDLE", "SEND_OPEN_FIN", "HALF_LOCAL"),
    ("IDLE", "SEND_RESET", "CLOSED"),
    ("IDLE", "RECV_OPEN", "OPEN"),
    ("IDLE", "RECV_OPEN_FIN", "HALF_REMOTE"),
    ("IDLE", "RECV_RESET", "CLOSED"),
    ("OPEN", "SEND_BODY", "OPEN"),
    ("OPEN", "SEND_FIN", "HALF_LOCAL"),
    ("OPEN", "SEND_CREDIT", "OPEN"),
    ("OPEN", "SEND_RESET", "RESETTING"),
    ("OPEN", "RECV_BODY", "OPEN"),
    ("OPEN", "RECV_FIN", "HALF_REMOTE"),
    ("OPEN", "RECV_CREDIT", "OPEN"),
    ("OPEN", "RECV_RESET", "CANCELLING"),
    ("HALF_LOCAL", "SEND_CREDIT", "HALF_LOCAL"),
    ("HALF_LOCAL", "SEND_RESET", "RESETTING_FIN"),
    ("HALF_LOCAL", "RECV_BODY", "HALF_LOCAL"),
    ("HALF_LOCAL", "RECV_FIN", "CLOSED"),
    ("HALF_LOCAL", "RECV_CREDIT", "HALF_LOCAL"),        # it crossed our FIN
    ("HALF_LOCAL", "RECV_RESET", "CANCELLING"),
    ("HALF_REMOTE", "SEND_BODY", "HALF_REMOTE"),
    ("HALF_REMOTE", "SEND_FIN", "CLOSED"),
    ("HALF_REMOTE", "SEND_RESET", "RESETTING"),
    ("HALF_REMOTE", "RECV_CREDIT", "HALF_REMOTE"),
    ("HALF_REMOTE", "RECV_RESET", "CANCELLING"),
    ("CANCELLING", "SEND_RESET_ACK", "CLOSED"),
    ("RESETTING", "RECV_BODY", "RESETTING"),
    ("RESETTING", "RECV_FIN", "RESETTING"),             # the peer still waits for our FIN: it will see RESET
    ("RESETTING", "RECV_CREDIT", "RESETTING"),
    ("RESETTING", "RECV_RESET", "CLOSED"),              # crossed
    ("RESETTING", "RECV_RESET_ACK", "CLOSED"),
    ("RESETTING_FIN", "RECV_BODY", "RESETTING_FIN"),
    ("RESETTING_FIN", "RECV_FIN", "CLOSED"),            # the peer is CLOSED by our FIN and will not answer
    ("RESETTING_FIN", "RECV_CREDIT", "RESETTING_FIN"),
    ("RESETTING_FIN", "RECV_RESET", "CLOSED"),
    ("RESETTING_FIN", "RECV_RESET_ACK", "CLOSED"),
)

TRANSITIONS = {(state, event): after for state, event, after in _ROWS}

cdef uint8_t[8][14] TABLE


def _load_table():
    cdef int state
    cdef int event
    memset(&TABLE[0][0], NO_ROW, sizeof(TABLE))
    for row in _ROWS:
        state = STATES.index(row[0])
        event = EVENTS.index(row[1])
        TABLE[state][event] = STATES.index(row[2])


_load_table()
assert len(STATES) == N_STATES and len(EVENTS) == N_EVENTS


class TunnelError(Exception):
    """The peer broke the protocol: the tunnel must end. Send what `fill` still has (a GOAWAY), then close."""

    def __init__(self, code, reason):
        super().__init__(code, reason)
        self.code = ErrorCode(code)
        self.reason = reason

    def __str__(self):
        return f"{self.code.name}: {self.reason}"


class StreamRefused(Exception):
    """`Session.open` cannot open a stream now; nothing was sent."""

    def __init__(self, code, reason):
        super().__init__(code, reason)
        self.code = ErrorCode(code)
        self.reason = reason

    def __str__(self):
        return f"{self.code.name}: {self.reason}"


# ------------------------------------------------------------------------------------------------------------
# Helpers


cdef void bucket_set(Bucket *bucket, double burst, double rate, double now) noexcept:
    bucket.tokens = burst
    bucket.burst = burst
    bucket.rate = rate
    bucket.filled_at = now


cdef bint bucket_has(Bucket *bucket, double now) noexcept:
    if now > bucket.filled_at:
        bucket.tokens = min(bucket.burst, bucket.tokens + (now - bucket.filled_at) * bucket.rate)
        bucket.filled_at = now
    return bucket.tokens >= 1.0


cdef bint bucket_take(Bucket *bucket, double now) noexcept:
    if not bucket_has(bucket, now):
        return False
    bucket.tokens -= 1.0
    return True


cdef void queue_append(Queue *queue, Stream stream) noexcept:
    stream.ready_next = NULL
    stream.ready_prev = queue.last
    if queue.last != NULL:
        (<Stream> queue.last).ready_next = <PyObject *> stream
    else:
        queue.first = <PyObject *> stream
    queue.last = <PyObject *> stream


cdef void queue_prepend(Queue *queue, Stream stream) noexcept:
    stream.ready_prev = NULL
    stream.ready_next = queue.first
    if queue.first != NULL:
        (<Stream> queue.first).ready_prev = <PyObject *> stream
    else:
        queue.last = <PyObject *> stream
    queue.first = <PyObject *> stream


cdef void queue_remove(Queue *queue, Stream stream) noexcept:
    if stream.ready_prev != NULL:
        (<Stream> stream.ready_prev).ready_next = stream.ready_next
    else:
        queue.first = stream.ready_next
    if stream.ready_next != NULL:
        (<Stream> stream.ready_next).ready_prev = stream.ready_prev
    else:
        queue.last = stream.ready_prev
    stream.ready_prev = NULL
    stream.ready_next = NULL


# Where `fill` builds its bytes. One for the process: it is copied before any other code runs, under the GIL.
cdef unsigned char[196615] SCRATCH


cdef class Budget:
    """Memory for receive windows, shared by all tunnels of a process. `limit` and `promised` in bytes."""

    def __init__(self, uint64_t limit=C_BUDGET):
        self.limit = limit

    def __repr__(self):
        return f"<Budget {self.promised} of {self.limit} bytes promised>"

    cdef bint take_floor(self, uint64_t size) noexcept:
        if self.promised > self.limit or size > self.limit - self.promised:
            return False
        self.promised += size
        return True

    cdef bint take_start(self, uint64_t size) noexcept:
        # Nobody has shown yet that it is needed: only while little is promised, by an edge and to a client.
        cdef uint64_t limit = self.limit // 4
        if self.promised > limit or size > limit - self.promised:
            return False
        self.promised += size
        return True

    cdef bint take_growth(self, uint64_t size) noexcept:
        # The last quarter is for floors: or a few fast streams would shut new ones out.
        cdef uint64_t limit = self.limit - self.limit // 4
        if self.promised > limit or size > limit - self.promised:
            return False
        self.promised += size
        return True

    cdef void give_back(self, uint64_t size) noexcept:
        self.promised -= size


# ------------------------------------------------------------------------------------------------------------
# Stream


cdef class Stream:
    """One exchange. States and transitions: SPEC.md, 3. Made by `Session`, never by hand."""

    def __cinit__(self):
        self.chunks = self.few
        self.ring_size = 3

    def __dealloc__(self):
        self._drop_output()
        if self.chunks != self.few:
            PyMem_Free(self.chunks)
        if self.budget != NULL:
            (<Budget> self.budget).give_back(self.promised)
            Py_DECREF(<Budget> self.budget)
        if self.allowance != NULL:
            (<Budget> self.allowance).give_back(self.allowed)
            Py_DECREF(<Budget> self.allowance)

    def __repr__(self):
        return f"<Stream {self.number} {self.state}>"

    @property
    def id(self):
        return self.number

    @property
    def state(self):
        # A reset that still waits to be written has happened, as far as the owner is concerned.
        if self.doomed and self.state_ < ST_CANCELLING:
            return "RESETTING"
        return STATES[self.state_]

    @property
    def queued(self):
        return self.queued_

    @property
    def acknowledged(self):
        return self.acknowledged_

    @property
    def bytes_sent(self):
        return self.sent

    @property
    def bytes_received(self):
        return self.received

    @property
    def window(self):
        return self.window_

    @property
    def credit(self):
        return self.send_limit - self.sent

    # -- what the session calls ------------------------------------------------------------------------------

    cdef int on_head(self, const unsigned char *head, Py_ssize_t size, bint interim, bint fin) except -1:
        if self.handler is not None:
            self.handler.stream_head(self, PyBytes_FromStringAndSize(<const char *> head, size), interim, fin)
        return 0

    cdef int on_data(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1:
        if self.handler is None:
            return self.consumed(size)      # nobody will: the stream would stall
        return self._hand_on(data, size, fin)

    @final
    cdef int _hand_on(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1:
        self.handler.stream_data(self, PyBytes_FromStringAndSize(<const char *> data, size), fin)
        return 0

    cdef int on_trailers(self, const unsigned char *trailers, Py_ssize_t size) except -1:
        if self.handler is not None:
            self.handler.stream_trailers(self, PyBytes_FromStringAndSize(<const char *> trailers, size))
        return 0

    cdef int on_reset(self, uint32_t code) except -1:
        if self.handler is not None:
            self.handler.stream_reset(self, code)
        else:
            self.work_ended()
        return 0

    cdef int on_writable(self) except -1:
        if self.handler is not None:
            self.handler.stream_writable(self)
        return 0

    cdef int on_closed(self) except -1:
        if self.handler is not None:
            self.handler.stream_closed(self)
        return 0

    cdef bint moves_on(self, uint64_t used) except -1:
        return self.waiting is None or self.waiting() < used

    # -- what the owner calls --------------------------------------------------------------------------------

    def set_allowance(self, Budget allowance not None):
        """The window grows out of this budget, too. Once, before anything has come."""
        self.allow(allowance)

    cdef int allow(self, Budget allowance) except -1:
        if self.allowance != NULL:
            raise RuntimeError("the stream has an allowance already")
        Py_INCREF(allowance)
        self.allowance = <PyObject *> allowance
        return 0

    def send_head(self, bytes head not None, *, bint interim=False, bint fin=False):
        """Gateway: queues a response head. ValueError: over MAX_HEAD bytes; RuntimeError: out of order."""
        self.send_head_raw(
            <const unsigned char *> PyBytes_AS_STRING(head), PyBytes_GET_SIZE(head), interim, fin)

    cdef int send_head_raw(
            self, const unsigned char *head, Py_ssize_t size, bint interim, bint fin) except -1:
        cdef bytes payload
        cdef unsigned char *out
        if size > MAX_HEAD:
            raise ValueError(f"a head of {size} bytes is over the limit of {MAX_HEAD}")
        if self.session is not None and self.session.edge:
            raise RuntimeError("the edge sends its head with open()")
        if self.head_queued:
            raise RuntimeError("the final head was sent already")
        if interim and fin:
            raise RuntimeError("an interim head cannot end the stream")
        if not self._accept_send():
            return 0
        payload = PyBytes_FromStringAndSize(NULL, 2 + size)
        out = <unsigned char *> PyBytes_AS_STRING(payload)
        put_u16(out, <uint16_t> size)
        memcpy(out + 2, head, size)
        self._append(payload, HEAD, FLAG_INTERIM if interim else 0)
        if not interim:
            self.head_queued = True
        if fin:
            self.ended = True
            self.fin_queued = True
        self.session._ready(self)
        return self.session._wake()

    def send(self, bytes data not None, *, bint fin=False):
        """Queues all of `data` (kept, not copied).

        False: more than HIGH_WATER bytes (or 2,048 pieces) wait, stop until `stream_writable`. On a stream
        that was reset, or whose tunnel is gone, data is dropped and the answer is False as well. Raises
        RuntimeError after FIN, and at a gateway before the final head.
        """
        return self.send_bytes(data, fin)

    cdef bint send_bytes(self, bytes data, bint fin) except -1:
        if not self._accept_send():
            return False
        self._check_head()
        if PyBytes_GET_SIZE(data):
            self._append(data, DATA, 0)
            self.queued_ += <uint64_t> PyBytes_GET_SIZE(data)
        if fin:
            self.ended = True
            self.fin_queued = True
        self.session._ready(self)
        if self.queued_ > C_HIGH_WATER or self.ring_count > MAX_PIECES:
            self.want_writable = True
        self.session._wake()
        return not self.want_writable

    cdef bint send_raw(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1:
        return self.send_bytes(PyBytes_FromStringAndSize(<const char *> data, size), fin)

    def send_trailers(self, bytes trailers not None):
        """Ends this direction with trailer fields. Raises as `send` and `send_head`."""
        if PyBytes_GET_SIZE(trailers) > MAX_HEAD:
            raise ValueError(f"trailers of {len(trailers)} bytes are over the limit of {MAX_HEAD}")
        if not self._accept_send():
            return
        self._check_head()
        self._append(trailers, TRAILERS, 0)
        self.ended = True
        self.session._ready(self)
        self.session._wake()

    def consume(self, Py_ssize_t size):
        """`size` more body bytes were handed on *and* drained. Raises ValueError beyond what was received."""
        if size < 0:
            raise ValueError("consume: negative size")
        self.consumed(<uint64_t> size)

    cdef int consumed(self, uint64_t size) except -1:
        if size <= self.received - self.consumed_ and self.consumed_ + size < self.credit_due:
            self.consumed_ += size
            return 0
        return self._consumed(size)

    @final
    cdef int _consumed(self, uint64_t size) except -1:
        if size == 0 or self.doomed or self.state_ == ST_CANCELLING:
            return 0                # after a reset the promise was given back already
        if size > self.received - self.consumed_:
            if self.finished:
                return 0
            raise ValueError(f"consume: {size} bytes of {self.received - self.consumed_} that are unconsumed")
        self.consumed_ += size
        if self.fin_received:
            self._shrink_promise(self.received - self.consumed_)
            return 0
        if self.finished:
            return 0
        if self.consumed_ >= self.credit_due and not self.pending & PENDING_CREDIT:
            if self.granted >= self.body_size:
                self.credit_due = NEVER     # what is to come was granted already
                return 0
            self.credit_due = NEVER         # one will do: it grants by what is consumed when it is written
            self.session._want_control(self, PENDING_CREDIT)
            self.session._wake()
        return 0

    def expect(self, Py_ssize_t size):
        """The peer's body will have `size` bytes, by its head. Raises ValueError for a negative size."""
        if size < 0:
            raise ValueError("expect: negative size")
        self.expects(<uint64_t> size)

    cdef int expects(self, uint64_t size) except -1:
        """A window doubles from the floor, and each doubling takes a round trip: 1 MiB takes six of them, and two by
        this. In whole floors, for a sender takes less for a glitch.
        """
        cdef uint64_t floor, window
        self.body_size = size
        if size <= self.window_ or self.fin_received or self.finished or self.doomed or self.state_ == ST_CANCELLING:
            return 0
        floor = self.session.floor
        window = min(min(size, <uint64_t> C_START_WINDOW) + floor - 1, self.session.max_window) // floor * floor
        if window > self.window_ and self._promise_more(window - self.window_, False):
            self.window_ = window
            if not self.pending:
                self.credit_due = NEVER
                self.session._want_control(self, PENDING_CREDIT)
                self.session._wake()
        return 0

    def reset(self, uint32_t code):
        """Ends the stream from this side. Idempotent; drops what is queued; only `stream_closed` follows.

        After the peer's RESET it means the same as `cancelled`.
        """
        self.abandon(code)

    cdef int abandon(self, uint32_t code) except -1:
        if self.finished or self.doomed or self.session is None:
            return 0
        if self.state_ == ST_CANCELLING:
            return self.work_ended()
        self.doomed = True
        self.reset_code = code
        self._drop_output()
        self._shrink_promise(0)
        if self.state_ != ST_IDLE:      # an id whose OPEN is queued is burned in its turn
            self.session._unready(self)
            self.pending = 0
            self.session._want_control(self, PENDING_RESET)
        return self.session._wake()

    def cancelled(self):
        """The answer to `stream_reset`: local work has really ended. `stream_closed` follows RESET_ACK."""
        self.work_ended()

    cdef int work_ended(self) except -1:
        if self.finished or self.state_ != ST_CANCELLING:
            return 0
        self.session._want_control(self, PENDING_RESET_ACK)
        return self.session._wake()

    # -- within ----------------------------------------------------------------------------------------------

    @final
    cdef int _accept_send(self) except -1:
        """1: may be queued; 0: the stream is gone, drop. Raises RuntimeError when the caller had ended it."""
        if self.finished or self.doomed or self.state_ == ST_CANCELLING or self.session is None:
            return 0
        if self.session.over:
            return 0
        if self.ended:
            raise RuntimeError("this direction of the stream was ended already")
        return 1

    @final
    cdef int _check_head(self) except -1:
        if not self.session.edge and not self.head_queued:
            raise RuntimeError("the response head comes first")
        return 0

    @final
    cdef bint _append(self, object data, uint8_t kind, uint8_t flags) except -1:
        cdef uint32_t index
        cdef uint32_t size
        cdef Chunk *bigger
        cdef Chunk *chunk
        if self.ring_count == self.ring_size:
            size = 8 if self.ring_size < 8 else self.ring_size * 2
            bigger = <Chunk *> PyMem_Malloc(size * sizeof(Chunk))
            if bigger == NULL:
                raise MemoryError
            for index in range(self.ring_count):
                bigger[index] = self.chunks[(self.ring_first + index) % self.ring_size]
            if self.chunks != self.few:
                PyMem_Free(self.chunks)
            self.chunks = bigger
            self.ring_size = size
            self.ring_first = 0
        chunk = &self.chunks[(self.ring_first + self.ring_count) % self.ring_size]
        Py_INCREF(data)
        chunk.data = <PyObject *> data
        chunk.kind = kind
        chunk.flags = flags
        self.ring_count += 1
        return True

    @final
    cdef void _pop(self) noexcept:
        cdef PyObject *data = self.chunks[self.ring_first].data
        self.ring_first += 1
        if self.ring_first == self.ring_size:
            self.ring_first = 0
        self.ring_count -= 1
        self.first_offset = 0
        Py_DECREF(<object> data)

    @final
    cdef void _drop_output(self) noexcept:
        while self.ring_count:
            self._pop()
        self.queued_ = 0
        self.want_writable = False
        if self.chunks != self.few:
            PyMem_Free(self.chunks)
            self.chunks = self.few
            self.ring_size = 3
        self.ring_first = 0

    @final
    cdef bint _sendable(self) noexcept:
        if self.state_ == ST_IDLE:
            return True             # OPEN, or the RESET that burns the id
        if self.doomed or (self.state_ != ST_OPEN and self.state_ != ST_HALF_REMOTE):
            return False
        if self.ring_count == 0:
            return self.fin_queued
        return self.chunks[self.ring_first].kind != DATA or self.sent < self.send_limit

    @final
    cdef void _shrink_promise(self, uint64_t size) noexcept:
        self.credit_due = 0     # there is no more credit to be given
        if self.promised > size:
            (<Budget> self.budget).give_back(self.promised - size)
            self.promised = size
        if self.allowed > size:
            (<Budget> self.allowance).give_back(self.allowed - size)
            self.allowed = size

    @final
    cdef bint _promise_more(self, uint64_t size, bint proven) noexcept:
        """`proven`: the stream was held up by its window."""
        cdef Budget budget = <Budget> self.budget
        cdef Budget allowance
        if self.allowance != NULL:
            allowance = <Budget> self.allowance
            if not (allowance.take_floor(size) if proven else allowance.take_start(size)):
                return False
        if not (budget.take_growth(size) if proven else budget.take_start(size)):
            if self.allowance != NULL:
                allowance.give_back(size)
            return False
        self.promised += size
        if self.allowance != NULL:
            self.allowed += size
        return True


# ------------------------------------------------------------------------------------------------------------
# Session


cdef class Session:
    """`edge=True` opens streams, `edge=False` accepts them. Times are seconds of one monotonic clock."""

    def __cinit__(self):
        self.rtt_ = -1.0
        self.last_tick = -1.0

    def __init__(self, bint edge, handler, Budget budget not None, *, double now,
                 uint32_t max_streams=C_MAX_STREAMS, uint64_t floor=C_FLOOR,
                 uint64_t max_window=C_MAX_WINDOW):
        if self.slots != NULL:
            raise RuntimeError("Session.__init__ was called twice")
        if not C_LEAST_FLOOR <= floor <= C_MOST_FLOOR:
            raise ValueError(f"floor must be {C_LEAST_FLOOR} to {C_MOST_FLOOR} bytes")
        if not 1 <= max_streams <= C_MOST_STREAMS:
            raise ValueError(f"max_streams must be 1 to {C_MOST_STREAMS}")
        self.edge = edge
        self.handler = handler
        self.budget = budget
        self.max_streams = max_streams
        self.peer_max_streams = C_MAX_STREAMS
        self.floor = floor
        self.peer_floor = C_FLOOR
        self.max_window = max(floor, max_window)
        self.now = now
        self.last_received_ = now
        self.goaway_in_last = MAX_STREAM_ID
        self.goaway_out_last = MAX_STREAM_ID
        self.live = set()
        self.due = []
        self.auth_out = []
        bucket_set(&self.pings, PING_BURST, PING_RATE, now)
        bucket_set(&self.pings_out, PING_OUT_BURST, PING_OUT_RATE, now)
        bucket_set(&self.infos, INFO_BURST, INFO_RATE, now)
        bucket_set(&self.infos_out, INFO_OUT_BURST, INFO_OUT_RATE, now)
        bucket_set(&self.resets, max_streams + RESET_MARGIN, RESET_RATE, now)
        bucket_set(&self.glitches, GLITCH_BURST, GLITCH_RATE, now)
        self._slots_resize(FIRST_SLOTS)

    def __dealloc__(self):
        PyMem_Free(self.slots)
        PyMem_Free(self.partial)

    def __repr__(self):
        return f"<Session {'edge' if self.edge else 'gateway'}, {len(self.live)} streams>"

    # -- properties ------------------------------------------------------------------------------------------

    @property
    def has_output(self):
        return self._has_output()

    @property
    def streams(self):
        return len(self.live)

    @property
    def rtt(self):
        return None if self.rtt_ < 0 else self.rtt_

    @property
    def last_received(self):
        return self.last_received_

    @property
    def draining(self):
        return self.goaway_in or self.goaway_out

    @property
    def last_stream(self):
        """Highest id that was opened on the wire: the `last` of a drain's second GOAWAY."""
        return self.last_opened

    @property
    def retiring(self):
        """Ids are about to run out (edge): have the gateway bring up another tunnel, then drain this one."""
        return self.last_assigned > MAX_STREAM_ID - RETIRE_MARGIN

    # -- receiving -------------------------------------------------------------------------------------------

    def receive(self, data, double now):
        """Handles received bytes; keeps no reference to `data`. Raises TunnelError, then and ever after.

        A TunnelError that a SessionHandler raises is treated as the session's own: GOAWAY is ready and it
        goes on up. Any other exception of a SessionHandler ends the session with INTERNAL_ERROR, and goes on
        up as well.
        """
        cdef Py_buffer view
        if type(data) is bytes:
            self.receive_raw(<const unsigned char *> PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), now)
            return
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.receive_raw(<const unsigned char *> view.buf, view.len, now)
        finally:
            PyBuffer_Release(&view)

    cdef int receive_raw(self, const unsigned char *data, Py_ssize_t size, double now) except -1:
        if self.over:
            if self.failure is not None:
                raise TunnelError(self.failure.code, self.failure.reason)
            return 0
        if self.receiving:
            raise RuntimeError("receive is not reentrant")
        self.now = now
        if size:
            self.last_received_ = now
        self.bytes_in += <uint64_t> size
        self.cursor = 0
        self.receiving = True
        try:
            while True:
                # One try for the whole buffer, none per frame; a handler's exception re-enters behind its
                # frame.
                try:
                    self._parse(data, size)
                    break
                except Exception as exc:
                    if not self._recover(exc):
                        raise
                except BaseException:
                    self.calling = NULL
                    self._end(INTERNAL_ERROR, "interrupted")
                    raise
        finally:
            self.receiving = False
            self.called = None
            if self.partial_have == 0 and self.partial_size > PARTIAL_KEPT:
                PyMem_Free(self.partial)
                self.partial = NULL
                self.partial_size = 0
        if self.failure is not None:        # a handler swallowed it
            raise TunnelError(self.failure.code, self.failure.reason)
        return self._wake()

    @final
    cdef bint _recover(self, object exc) except -1:
        """Whether parsing may go on: a stream's handler raised. Else it is the end, and `exc` goes up."""
        cdef Stream stream = <Stream> self.calling if self.calling != NULL else None
        self.calling = NULL
        if isinstance(exc, TunnelError) and (stream is None or self.failure is not None):
            self._end(exc.code, exc.reason)
            return False
        if stream is None:
            self._end(INTERNAL_ERROR, "internal error")
            return False
        try:
            self._handler_failed(stream, exc)
        except BaseException:
            self._end(INTERNAL_ERROR, "internal error")
            raise
        return True

    @final
    cdef int _parse(self, const unsigned char *data, Py_ssize_t size) except -1:
        cdef const unsigned char *frame
        cdef PyObject *stream
        cdef Py_ssize_t left
        cdef Py_ssize_t length
        while self.cursor < size and not self.over:
            left = size - self.cursor
            frame = data + self.cursor
            if self.partial_have or left < HEADER_SIZE:
                self._collect(data, size)
                continue
            length = get_u16(frame)
            # The one kind of frame whose number is not bounded by the number of streams: whole DATA of a live
            # stream, whose header then has nothing wrong but perhaps its length. All else takes the long way.
            if frame[2] == DATA and length <= MAX_DATA and left >= HEADER_SIZE + length:
                stream = self._live(get_u32(frame + 4))
                if stream != NULL:
                    self.cursor += HEADER_SIZE + length
                    self._body(stream, frame[3] & FLAG_FIN, frame + HEADER_SIZE, length)
                    continue
            self._check(frame)
            if left < HEADER_SIZE + length:
                self._collect(data, size)
                continue
            self.cursor += HEADER_SIZE + length
            self._frame(frame)
        return 0

    @final
    cdef Py_ssize_t _collect(self, const unsigned char *data, Py_ssize_t size) except -1:
        """Adds to the frame that straddles, its header, then its payload; handles it when it is whole."""
        cdef Py_ssize_t need = HEADER_SIZE
        cdef Py_ssize_t take
        cdef Py_ssize_t room
        cdef unsigned char *bigger
        if self.partial_have >= HEADER_SIZE:
            need += get_u16(self.partial)
        take = min(need - self.partial_have, size - self.cursor)
        if self.partial_have + take > self.partial_size:
            # Grow with what came, not with what the header claims: a peer pays for our memory byte by byte.
            room = min(max(2 * self.partial_size, self.partial_have + take, 64), MAX_FRAME)
            bigger = <unsigned char *> PyMem_Realloc(self.partial, room)
            if bigger == NULL:
                raise MemoryError
            self.partial = bigger
            self.partial_size = room
        memcpy(self.partial + self.partial_have, data + self.cursor, take)
        self.partial_have += take
        self.cursor += take
        if self.partial_have < need:
            return 0
        if need == HEADER_SIZE:
            self._check(self.partial)
            if get_u16(self.partial):
                return 0
        # `receive` is not reentrant, so nothing overwrites `partial` while the frame is handled.
        self.partial_have = 0
        return self._frame(self.partial)

    @final
    cdef inline int _check(self, const unsigned char *header) except -1:
        cdef const char *reason = check_header(get_u16(header), header[2], get_u32(header + 4))
        if reason != NULL or not self.hello_in:
            return self._check_more(reason, header[2])
        return 0

    @final
    cdef int _check_more(self, const char *reason, uint8_t kind) except -1:
        if reason != NULL:
            return self._fail(PROTOCOL_ERROR, (<bytes> reason).decode())
        if kind != HELLO and kind != GOAWAY:
            return self._fail(PROTOCOL_ERROR, f"the first frame is of type {kind}, not HELLO")
        return 0

    @final
    cdef int _frame(self, const unsigned char *frame) except -1:
        cdef Py_ssize_t size = get_u16(frame)
        cdef uint8_t kind = frame[2]
        cdef uint8_t flags = frame[3]
        cdef uint32_t number = get_u32(frame + 4)
        cdef const unsigned char *payload = frame + HEADER_SIZE
        cdef Stream stream
        if kind >= N_TYPES:
            self.frames_in[SKIPPED] += 1
            return 0
        if kind == DATA:
            return self._frame_data(number, flags, payload, size)
        self.frames_in[kind] += 1
        if kind == CREDIT:
            return self._frame_credit(number, get_u64(payload))
        if kind == HEAD:
            return self._frame_head(number, flags, payload, size)
        if kind == OPEN:
            return self._frame_open(number, flags, payload, size)
        if kind == TRAILERS:
            return self._frame_trailers(number, payload, size)
        if kind == RESET:
            return self._frame_reset(number, get_u32(payload))
        if kind == RESET_ACK:
            stream = self._lookup(number)
            if stream is None:
                return self._not_live(number, kind)
            self._move(stream, EV_RECV_RESET_ACK)
            return self._finish(stream)
        return self._frame_tunnel(kind, payload, size)

    @final
    cdef int _frame_data(
            self, uint32_t number, uint8_t flags, const unsigned char *data, Py_ssize_t size) except -1:
        cdef PyObject *stream = self._live(number)
        if stream == NULL:
            self.frames_in[DATA] += 1
            return self._not_live(number, DATA)
        return self._body(stream, flags & FLAG_FIN, data, size)

    @final
    cdef inline int _body(
            self, PyObject *which, bint fin, const unsigned char *data, Py_ssize_t size) except -1:
        """DATA of a live stream. No reference is taken: `live` has one, and after `_unlink` `called`."""
        cdef Stream stream
        self.frames_in[DATA] += 1
        if size == 0 and not fin:
            self._glitch()
        if not (<Stream> which).head_received:
            self._body_before_head((<Stream> which).number)
        self._move(<Stream> which, EV_RECV_FIN if fin else EV_RECV_BODY)
        self._account(<Stream> which, size, fin)
        if (<Stream> which).doomed:
            self.n_discarded += <uint64_t> size
        elif size or fin:
            self.calling = which
            (<Stream> which).on_data(data, size, fin)
            self.calling = NULL
        if (<Stream> which).state_ == ST_CLOSED and not (<Stream> which).finished:
            stream = <Stream> which
            return self._finish(stream)
        return 0

    @final
    cdef int _body_before_head(self, uint32_t number) except -1:
        return self._fail(PROTOCOL_ERROR, f"DATA or TRAILERS before HEAD on stream {number}")

    @final
    cdef int _frame_open(
            self, uint32_t number, uint8_t flags, const unsigned char *data, Py_ssize_t size) except -1:
        cdef bint fin = flags & FLAG_FIN
        cdef bint interactive
        cdef bint accepted
        cdef const unsigned char *service = data + 1
        cdef const unsigned char *head
        cdef Py_ssize_t service_size = data[0]
        cdef Py_ssize_t head_size
        cdef Py_ssize_t body_size
        cdef Py_ssize_t index
        cdef Stream stream
        if self.edge:
            self._fail(PROTOCOL_ERROR, "OPEN from a gateway")
        if not self.verdict:
            self._fail(PROTOCOL_ERROR, "OPEN before the verdict")
        if number != self.last_opened + 1 or number > MAX_STREAM_ID:
            self._fail(PROTOCOL_ERROR, f"OPEN of stream {number} after {self.last_opened}")
        if number > self.goaway_out_last:
            self.last_opened = number
            return 0
        if len(self.live) >= self.max_streams:
            self._fail(LIMIT_EXCEEDED, f"more than {self.max_streams} live streams")
        if service_size == 0 or 1 + service_size + 3 > size:
            self._fail(PROTOCOL_ERROR, "OPEN: the service name does not fit")
        for index in range(service_size):
            if service[index] < 0x20 or service[index] > 0x7E:
                self._fail(PROTOCOL_ERROR, "OPEN: the service name is not printable ASCII")
        interactive = service[service_size] == 1
        head_size = get_u16(service + service_size + 1)
        if head_size > MAX_HEAD:
            self._fail(LIMIT_EXCEEDED, f"OPEN: a head of {head_size} bytes")
        head = service + service_size + 3
        body_size = size - 1 - service_size - 3 - head_size
        if body_size < 0:
            self._fail(PROTOCOL_ERROR, "OPEN: the head does not fit")
        if <uint64_t> body_size > self.floor:
            self._fail(FLOW_CONTROL_ERROR, f"OPEN: {body_size} body bytes, credit is {self.floor}")

        stream = self.new_stream()
        self.last_opened = number
        self._start(stream, number, interactive)
        stream.acknowledged_ = True
        # Without a body nothing can arrive, so nothing is promised.
        accepted = self.budget.take_floor(<uint64_t> body_size if fin else self.floor)
        if accepted:
            stream.promised = <uint64_t> body_size if fin else self.floor
        self._move(stream, EV_RECV_OPEN_FIN if fin else EV_RECV_OPEN)
        self._account(stream, body_size, fin)
        if not accepted:
            return stream.abandon(OVERLOADED)
        self.calling = <PyObject *> stream
        accepted = self.on_stream_opened(stream, service, service_size, interactive, head, head_size,
                                         fin and body_size == 0)
        if stream.finished:             # the owner aborted the session before it gave us the handler
            self.calling = NULL
            return self._announce_closed(stream)
        if not accepted:
            stream.abandon(REFUSED)
        if body_size and not stream.doomed and not stream.finished:
            stream.on_data(head + head_size, body_size, fin)
        self.calling = NULL
        return 0

    @final
    cdef int _frame_head(
            self, uint32_t number, uint8_t flags, const unsigned char *data, Py_ssize_t size) except -1:
        cdef bint fin = flags & FLAG_FIN
        cdef bint interim = (flags & FLAG_INTERIM) != 0
        cdef Py_ssize_t head_size = get_u16(data)
        cdef Py_ssize_t body_size = size - 2 - head_size
        cdef Stream stream
        if not self.edge:
            self._fail(PROTOCOL_ERROR, "HEAD from an edge")
        stream = self._lookup(number)
        if stream is None:
            return self._not_live(number, HEAD)
        if head_size > MAX_HEAD:
            self._fail(LIMIT_EXCEEDED, f"HEAD: a head of {head_size} bytes")
        if body_size < 0:
            self._fail(PROTOCOL_ERROR, "HEAD: the head does not fit")
        if stream.head_received:
            self._fail(PROTOCOL_ERROR, f"HEAD after the final head on stream {number}")
        if interim and (fin or body_size):
            self._fail(PROTOCOL_ERROR, "HEAD: an interim head has no body and no FIN")
        self._move(stream, EV_RECV_FIN if fin else EV_RECV_BODY)
        self._account(stream, body_size, fin)
        if interim:
            stream.interims += 1
            if stream.interims > MAX_INTERIM_HEADS:
                stream.interims = MAX_INTERIM_HEADS
                stream.abandon(BAD_UPSTREAM)
        else:
            stream.head_received = True
        if stream.doomed:
            self.n_discarded += <uint64_t> body_size
        else:
            self.calling = <PyObject *> stream
            self.body_follows = body_size > 0
            stream.on_head(data + 2, head_size, interim, fin and body_size == 0)
            if body_size and not stream.doomed and not stream.finished:
                stream.on_data(data + 2 + head_size, body_size, fin)
            self.calling = NULL
        if stream.state_ == ST_CLOSED and not stream.finished:
            return self._finish(stream)
        return 0

    @final
    cdef int _frame_trailers(self, uint32_t number, const unsigned char *data, Py_ssize_t size) except -1:
        cdef Stream stream = self._lookup(number)
        if stream is None:
            return self._not_live(number, TRAILERS)
        if not stream.head_received:
            self._body_before_head(number)
        self._move(stream, EV_RECV_FIN)
        self._account(stream, 0, True)
        if not stream.doomed:
            self.calling = <PyObject *> stream
            stream.on_trailers(data, size)
            self.calling = NULL
        if stream.state_ == ST_CLOSED and not stream.finished:
            return self._finish(stream)
        return 0

    @final
    cdef int _frame_credit(self, uint32_t number, uint64_t offset) except -1:
        cdef Stream stream = self._lookup(number)
        if stream is None:
            return self._not_live(number, CREDIT)
        self._move(stream, EV_RECV_CREDIT)
        stream.acknowledged_ = True
        if offset <= stream.send_limit:
            self._fail(
                FLOW_CONTROL_ERROR,
                f"CREDIT of stream {number} does not grow: {stream.send_limit} to {offset}")
        if offset - stream.send_limit < self.peer_floor // 8:
            self._glitch()
        stream.send_limit = offset
        self._ready(stream)
        return 0

    @final
    cdef int _frame_reset(self, uint32_t number, uint32_t code) except -1:
        cdef Stream stream = self._lookup(number)
        if stream is not None and stream.state_ == ST_IDLE:
            stream = None                   # its OPEN is still queued: to the peer there is no such stream
        if stream is None and (self.edge or number != self.last_opened + 1):
            return self._not_live(number, RESET)
        # Resets of streams that this side did not open are work that the peer can order at will.
        if not self.edge and number <= self.goaway_out_last and not bucket_take(&self.resets, self.now):
            self._fail(LIMIT_EXCEEDED, "too many RESETs")
        if stream is None:
            if not self.verdict:
                self._fail(PROTOCOL_ERROR, "RESET before the verdict")
            if number > MAX_STREAM_ID:
                self._fail(PROTOCOL_ERROR, f"RESET of stream {number}")
            self.last_opened = number       # burned: the peer gave up before it sent OPEN
            return 0
        self._move(stream, EV_RECV_RESET)
        stream.acknowledged_ = True
        if stream.state_ == ST_CLOSED:
            return self._finish(stream)
        self._unready(stream)
        if stream.doomed:
            # Our own RESET was not written yet, and never will be: the peer needs an answer to its own.
            stream.pending = 0
            self._want_control(stream, PENDING_RESET_ACK)
            return 0
        stream.pending = 0
        self._drop_control(stream)
        stream._drop_output()
        stream._shrink_promise(0)
        self.calling = <PyObject *> stream
        stream.on_reset(code)
        self.calling = NULL
        return 0

    @final
    cdef int _frame_goaway(self, uint32_t last, uint32_t code) except -1:
        self._glitch()
        self.goaway_in = True
        if self.edge:
            if last > self.goaway_in_last and self.goaway_in_last != MAX_STREAM_ID:
                self._fail(PROTOCOL_ERROR, f"GOAWAY raises its last id from {self.goaway_in_last} to {last}")
            if last < self.goaway_in_last:
                self.goaway_in_last = last
                for stream in sorted([s for s in self.live if (<Stream> s).number > last], key=_by_number):
                    self._orphan(stream, code)
        if self.handler is not None:
            self.handler.goaway_received(last, code)
        return 0

    @final
    cdef int _frame_tunnel(self, uint8_t kind, const unsigned char *data, Py_ssize_t size) except -1:
        cdef double rtt
        if kind == PING:
            if not bucket_take(&self.pings, self.now):
                self._fail(LIMIT_EXCEEDED, "too many PINGs")
            self.pong_pending = True
            self.pong_value = get_u64(data)
        elif kind == PONG:
            if not self.ping_flying or get_u64(data) != self.ping_value:
                return self._glitch()
            self.ping_flying = False
            rtt = max(self.now - self.ping_at, 1e-6)
            self.rtt_ = rtt if self.rtt_ < 0 else self.rtt_ + RTT_WEIGHT * (rtt - self.rtt_)
            self._note_rtt(rtt)
            self.handler.pong_received(rtt)
        elif kind == GOAWAY:
            return self._frame_goaway(get_u32(data), get_u32(data + 4))
        elif kind == HELLO:
            if self.hello_in:
                self._fail(PROTOCOL_ERROR, "a second HELLO")
            self.hello_in = True
            self._want_ping()           # windows cannot grow before an RTT is known
            self.handler.hello_received(PyBytes_FromStringAndSize(<const char *> data, size))
        elif kind == AUTH:
            self.auths_in += 1
            if self.auths_in > MAX_AUTH_FRAMES:
                self._fail(PROTOCOL_ERROR, "too many AUTH frames")
            if not self.edge:
                self.verdict = True
            self.handler.auth_received(PyBytes_FromStringAndSize(<const char *> data, size))
        elif kind == INFO:
            if not bucket_take(&self.infos, self.now):
                self._fail(LIMIT_EXCEEDED, "too many INFO frames")
            self.handler.info_received(PyBytes_FromStringAndSize(<const char *> data, size))
        return 0

    @final
    cdef void _note_rtt(self, double rtt) noexcept:
        cdef uint32_t index
        self.rtts[self.n_rtts % N_RTTS] = rtt
        self.n_rtts += 1
        self.rtt_least = rtt
        for index in range(min(self.n_rtts, <uint32_t> N_RTTS)):
            self.rtt_least = min(self.rtt_least, self.rtts[index])

    @final
    cdef inline int _move(self, Stream stream, int event) except -1:
        cdef uint8_t after = TABLE[stream.state_][event]
        if after == NO_ROW:
            return self._no_row(stream, event)
        stream.state_ = after
        return 0

    @final
    cdef int _no_row(self, Stream stream, int event) except -1:
        if event < EV_RECV_OPEN:
            raise RuntimeError(f"bug: {EVENTS[event]} in state {STATES[stream.state_]}")
        return self._fail(
            PROTOCOL_ERROR, f"{EVENTS[event]} in state {STATES[stream.state_]} of stream {stream.number}")

    @final
    cdef inline int _account(self, Stream stream, Py_ssize_t size, bint fin) except -1:
        """Counts body bytes against credit. Whatever becomes of them, they came."""
        stream.acknowledged_ = True
        if <uint64_t> size > stream.granted - stream.received:
            return self._beyond_credit(stream, size)
        if stream.received == 0:
            stream.epoch_started = self.now
        stream.received += <uint64_t> size
        if fin:
            self._account_fin(stream)
        return 0

    @final
    cdef int _beyond_credit(self, Stream stream, Py_ssize_t size) except -1:
        return self._fail(
            FLOW_CONTROL_ERROR,
            f"stream {stream.number}: {size} bytes from {stream.received}, credit ends at {stream.granted}")

    @final
    cdef void _account_fin(self, Stream stream) noexcept:
        stream.fin_received = True
        if stream.pending == PENDING_CREDIT:
            stream.pending = 0
            self._drop_control(stream)
        stream._shrink_promise(stream.received - stream.consumed_)

    @final
    cdef int _not_live(self, uint32_t number, uint8_t kind) except -1:
        if number > self.last_opened:
            self._fail(PROTOCOL_ERROR, f"frame of type {kind} for stream {number}, which was never opened")
        if number > self.goaway_out_last:
            return 0
        if (kind == CREDIT or kind == RESET) and self.crossings:
            self.crossings -= 1
            self.n_crossed += 1
            return 0
        self.n_stale += 1
        return self._glitch()

    @final
    cdef int _glitch(self) except -1:
        self.n_glitches += 1
        if not bucket_take(&self.glitches, self.now):
            self._fail(LIMIT_EXCEEDED, "too many glitches")
        return 0

    # -- the life of a stream --------------------------------------------------------------------------------

    cdef Stream new_stream(self):
        return Stream.__new__(Stream)

    cdef bint on_stream_opened(self, Stream stream, const unsigned char *service, Py_ssize_t service_size,
                               bint interactive, const unsigned char *head, Py_ssize_t head_size,
                               bint fin) except -1:
        stream.handler = self.handler.stream_opened(
            stream, service[:service_size].decode("ascii"), interactive,
            PyBytes_FromStringAndSize(<const char *> head, head_size), fin)
        return stream.handler is not None

    @final
    cdef int _start(self, Stream stream, uint32_t number, bint interactive) except -1:
        """Links a fresh stream, state IDLE."""
        self._slot_put(number, <PyObject *> stream)
        self.live.add(stream)
        stream.session = self
        Py_INCREF(self.budget)
        stream.budget = <PyObject *> self.budget
        stream.number = number
        stream.interactive = interactive
        stream.head_received = not self.edge    # a gateway gets it in OPEN
        stream.interactive_left = INTERACTIVE_BYTES
        stream.framed_at = self.now
        stream.send_limit = self.peer_floor
        stream.window_ = self.floor
        stream.granted = self.floor
        stream.credit_due = self.floor // 4
        stream.body_size = NEVER
        stream.epoch_started = self.now
        self.n_opened += 1
        return 0

    @final
    cdef int _unlink(self, Stream stream) except -1:
        """CLOSED: out of all queues, the slot is free. `stream_closed` is still to be called."""
        if self.calling == <PyObject *> stream:
            self.called = stream        # `receive` may still need it, should its handler raise after this
        stream.finished = True
        stream.state_ = ST_CLOSED
        self._unready(stream)
        self._drop_control(stream)
        stream._drop_output()
        stream.pending = 0
        self._slot_remove(stream.number)
        if self.slot_mask >= FIRST_SLOTS and 8 * self.slot_count <= self.slot_mask:
            self._slots_resize((self.slot_mask + 1) // 2)
        self.live.discard(stream)
        self.crossings = min(self.crossings + CROSSINGS_PER_STREAM, <uint64_t> MAX_CROSSINGS)
        self.n_closed += 1
        return 0

    @final
    cdef int _finish(self, Stream stream) except -1:
        self._unlink(stream)
        return self._announce_closed(stream)

    @final
    cdef int _announce_closed(self, Stream stream) except -1:
        try:
            stream.on_closed()
        except Exception as exc:
            self._report(stream, exc)
        stream.handler = None       # a handler often knows its stream: break the cycle
        stream.waiting = None
        return 0

    @final
    cdef int _orphan(self, Stream stream, uint32_t code) except -1:
        """The peer will never answer for this stream again: tell the handler, and close without a frame."""
        if stream.finished:
            return 0
        stream._shrink_promise(0)
        if not stream.doomed and stream.state_ != ST_CANCELLING:
            stream.state_ = ST_CANCELLING
            stream._drop_output()
            try:
                stream.on_reset(code)
            except Exception as exc:
                self._report(stream, exc)
        if not stream.finished:
            self._finish(stream)
        return 0

    @final
    cdef int _report(self, Stream stream, object exc) except -1:
        if self.handler is not None:
            self.handler.handler_failed(stream, exc)
        return 0

    @final
    cdef int _handler_failed(self, Stream stream, object exc) except -1:
        """A handler raised in the middle of a frame whose accounts are settled: only its stream ends."""
        self._report(stream, exc)
        if stream.finished:
            return 0
        if stream.state_ == ST_CLOSED:
            return self._finish(stream)
        return stream.abandon(INTERNAL_ERROR)

    @final
    cdef inline PyObject *_live(self, uint32_t number) noexcept:
        """The stream of this id, borrowed, or NULL. Ids rise by 1: nearly always in its home slot."""
        cdef Slot *slot = self.slots + (number & self.slot_mask)
        if slot.number == number:
            return slot.stream
        return self._probe(number)

    @final
    cdef PyObject *_probe(self, uint32_t number) noexcept:
        cdef uint32_t index = number & self.slot_mask
        while self.slots[index].stream != NULL:
            if self.slots[index].number == number:
                return self.slots[index].stream
            index = (index + 1) & self.slot_mask
        return NULL

    @final
    cdef Stream _lookup(self, uint32_t number):
        cdef PyObject *stream = self._live(number)
        return <Stream> stream if stream != NULL else None

    @final
    cdef int _slot_put(self, uint32_t number, PyObject *stream) except -1:
        cdef uint32_t index
        if 2 * (self.slot_count + 1) > self.slot_mask + 1:
            self._slots_resize(2 * (self.slot_mask + 1))
        index = number & self.slot_mask
        while self.slots[index].stream != NULL:
            index = (index + 1) & self.slot_mask
        self.slots[index].number = number
        self.slots[index].stream = stream
        self.slot_count += 1
        return 0

    @final
    cdef void _slot_remove(self, uint32_t number) noexcept:
        # Backward shift instead of tombstones: ids come and go for days, the table must not silt up.
        cdef uint32_t mask = self.slot_mask
        cdef uint32_t hole = number & mask
        cdef uint32_t index
        while self.slots[hole].stream != NULL and self.slots[hole].number != number:
            hole = (hole + 1) & mask
        if self.slots[hole].stream == NULL:
            return
        index = hole
        while True:
            index = (index + 1) & mask
            if self.slots[index].stream == NULL:
                break
            # Move what would no longer be found when probing from its home across the hole.
            if ((index - self.slots[index].number) & mask) >= ((index - hole) & mask):
                self.slots[hole] = self.slots[index]
                hole = index
        self.slots[hole].stream = NULL
        self.slot_count -= 1

    @final
    cdef int _slots_resize(self, uint32_t size) except -1:
        cdef Slot *old = self.slots
        cdef uint32_t old_size = self.slot_mask + 1 if old != NULL else 0
        cdef uint32_t index
        cdef uint32_t at
        cdef Slot *fresh = <Slot *> PyMem_Calloc(size, sizeof(Slot))
        if fresh == NULL:
            raise MemoryError
        for index in range(old_size):
            if old[index].stream != NULL:
                at = old[index].number & (size - 1)
                while fresh[at].stream != NULL:
                    at = (at + 1) & (size - 1)
                fresh[at] = old[index]
        PyMem_Free(old)
        self.slots = fresh
        self.slot_mask = size - 1
        return 0

    # -- queues ----------------------------------------------------------------------------------------------

    @final
    cdef void _ready(self, Stream stream) noexcept:
        if stream.queue != IN_NONE or not stream._sendable():
            return
        if self.now - stream.framed_at >= INTERACTIVE_AGAIN:
            stream.interactive_left = INTERACTIVE_BYTES
        if stream.state_ == ST_IDLE or (stream.interactive and stream.interactive_left > 0):
            stream.queue = IN_INTERACTIVE
            queue_append(&self.interactive, stream)
        else:
            stream.queue = IN_BULK
            queue_append(&self.bulk, stream)

    @final
    cdef void _unready(self, Stream stream) noexcept:
        if stream.queue == IN_INTERACTIVE:
            queue_remove(&self.interactive, stream)
        elif stream.queue == IN_BULK:
            queue_remove(&self.bulk, stream)
        stream.queue = IN_NONE

    @final
    cdef void _want_control(self, Stream stream, uint8_t what) noexcept:
        stream.pending |= what
        if stream.in_control:
            return
        stream.in_control = True
        stream.control_next = NULL
        stream.control_prev = self.control.last
        if self.control.last != NULL:
            (<Stream> self.control.last).control_next = <PyObject *> stream
        else:
            self.control.first = <PyObject *> stream
        self.control.last = <PyObject *> stream

    @final
    cdef void _drop_control(self, Stream stream) noexcept:
        if not stream.in_control:
            return
        stream.in_control = False
        if stream.control_prev != NULL:
            (<Stream> stream.control_prev).control_next = stream.control_next
        else:
            self.control.first = stream.control_next
        if stream.control_next != NULL:
            (<Stream> stream.control_next).control_prev = stream.control_prev
        else:
            self.control.last = stream.control_prev
        stream.control_prev = NULL
        stream.control_next = NULL

    @final
    cdef bint _has_output(self) noexcept:
        if self.over:
            return self.goaway_pending
        if not self.hello_sent:
            return self.hello_out is not None
        return (
            self.interactive.first != NULL
            or self.bulk.first != NULL
            or self.control.first != NULL
            or self.goaway_pending
            or self.pong_pending
            or self.ping_pending
            or len(self.auth_out) > 0
            or (self.info_out is not None and bucket_has(&self.infos_out, self.now))
        )

    @final
    cdef int _wake(self) except -1:
        """Tells the owner, once, that there is output where there was none."""
        if self.notified or self.receiving or self.filling or not self._has_output():
            return 0
        self.notified = True
        return self.on_output_ready()

    cdef int on_output_ready(self) except -1:
        if self.handler is not None:
            self.handler.output_ready()
        return 0

    # -- sending ---------------------------------------------------------------------------------------------

    def fill(self, Py_ssize_t limit, double now):
        """Whole frames, at most about `limit` bytes (and FILL_MAX, 128 KiB); b"" if there is nothing to send.

        Bytes that were returned have been sent, as far as the session is concerned. While `has_output` is
        still true, call again when the transport has room: `output_ready` comes only after the output had run
        dry.
        """
        cdef Py_ssize_t size = self.fill_shared(limit, now)
        cdef bytes out = PyBytes_FromStringAndSize(<const char *> SCRATCH, size) if size else b""
        self.filled()
        return out

    cdef Py_ssize_t fill_shared(self, Py_ssize_t limit, double now) except -1:
        self._not_reentrant()
        return self._fill(SCRATCH, min(limit, FILL_MAX), FILL_SPACE, now)

    cdef const unsigned char *shared(self) noexcept:
        return SCRATCH

    cdef Py_ssize_t fill_at(self, unsigned char *out, Py_ssize_t limit, double now) except -1:
        self._not_reentrant()
        return self._fill(out, min(limit, FILL_MAX), FILL_SPACE, now)

    cdef int filled(self) except -1:
        return self._after_fill()

    def fill_into(self, buffer, double now):
        """As `fill`, into a buffer of at least MAX_FRAME (65,543) bytes, else ValueError. The size used."""
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            if view.len < MAX_FRAME:
                raise ValueError(f"fill_into needs a buffer of {MAX_FRAME} bytes")
            return self.fill_raw(<unsigned char *> view.buf, view.len, view.len, now)
        finally:
            PyBuffer_Release(&view)

    cdef Py_ssize_t fill_raw(self, unsigned char *out, Py_ssize_t limit, Py_ssize_t space,
                             double now) except -1:
        """Frames are started below `limit` and never pass `space`, which must be at least MAX_FRAME."""
        cdef Py_ssize_t size
        self._not_reentrant()
        size = self._fill(out, limit, space, now)
        self._after_fill()
        return size

    @final
    cdef int _not_reentrant(self) except -1:
        if self.filling:
            raise RuntimeError("fill is not reentrant")
        return 0

    @final
    cdef Py_ssize_t _fill(self, unsigned char *out, Py_ssize_t limit, Py_ssize_t space, double now) except -1:
        cdef Py_ssize_t size
        self.now = now
        self.filling = True
        try:
            size = self._fill_tunnel(out, limit, space)
            if self.hello_sent and not self.over:
                size += self._fill_control(out + size, limit - size, space - size)
                if self.control.first == NULL:
                    size += self._fill_streams(out + size, limit - size, space - size)
        finally:
            self.filling = False
        self.bytes_out += <uint64_t> size
        if not self._has_output():
            self.notified = False
        return size

    @final
    cdef Py_ssize_t _fill_tunnel(self, unsigned char *out, Py_ssize_t limit, Py_ssize_t space) except -1:
        """Frames of the tunnel itself, HELLO first of all."""
        cdef Py_ssize_t size = 0
        if self.hello_out is not None and limit > 0:
            size += self._write_tunnel(out, HELLO, self.hello_out)
            self.hello_out = None
            self.hello_sent = True
        while (self.hello_sent and self.auth_out and size < limit
                and space - size >= HEADER_SIZE + MAX_HANDSHAKE):
            size += self._write_tunnel(out + size, AUTH, self.auth_out.pop(0))
        if self.goaway_pending and (self.hello_sent or self.over) and size < limit and space - size >= 16:
            put_header(out + size, 8, GOAWAY, 0, 0)
            put_u32(out + size + 8, self.goaway_out_last)
            put_u32(out + size + 12, self.goaway_out_code)
            self.frames_out[GOAWAY] += 1
            self.goaway_pending = False
            size += 16
        if self.over or not self.hello_sent:
            return size
        if self.pong_pending and size < limit and space - size >= 16:
            put_header(out + size, 8, PONG, 0, 0)
            put_u64(out + size + 8, self.pong_value)
            self.frames_out[PONG] += 1
            self.pong_pending = False
            size += 16
        if self.ping_pending and size < limit and space - size >= 16:
            self.ping_value += 1
            put_header(out + size, 8, PING, 0, 0)
            put_u64(out + size + 8, self.ping_value)
            self.frames_out[PING] += 1
            self.ping_pending = False
            self.ping_flying = True
            self.ping_at = self.now
            size += 16
        if self.info_out is not None and size < limit:
            if (space - size >= HEADER_SIZE + PyBytes_GET_SIZE(self.info_out)
                    and bucket_take(&self.infos_out, self.now)):
                size += self._write_tunnel(out + size, INFO, self.info_out)
                self.info_out = None
        return size

    @final
    cdef Py_ssize_t _write_tunnel(self, unsigned char *out, uint8_t kind, bytes payload) except -1:
        cdef Py_ssize_t size = PyBytes_GET_SIZE(payload)
        put_header(out, <uint32_t> size, kind, 0, 0)
        memcpy(out + HEADER_SIZE, PyBytes_AS_STRING(payload), size)
        self.frames_out[kind] += 1
        return HEADER_SIZE + size

    @final
    cdef Py_ssize_t _fill_control(self, unsigned char *out, Py_ssize_t limit, Py_ssize_t space) except -1:
        """RESET, RESET_ACK and CREDIT. A stream has one of them pending: the former displace CREDIT."""
        cdef Py_ssize_t size = 0
        cdef Stream stream
        while self.control.first != NULL and size < limit and space - size >= 16:
            stream = <Stream> self.control.first
            self._drop_control(stream)
            if stream.pending & PENDING_RESET:
                put_header(out + size, 4, RESET, 0, stream.number)
                put_u32(out + size + 8, stream.reset_code)
                self._move(stream, EV_SEND_RESET)
                self.frames_out[RESET] += 1
                size += 12
            elif stream.pending & PENDING_RESET_ACK:
                put_header(out + size, 0, RESET_ACK, 0, stream.number)
                self._move(stream, EV_SEND_RESET_ACK)
                self.frames_out[RESET_ACK] += 1
                size += 8
                self._close_later(stream)
            elif stream.pending & PENDING_CREDIT:
                self._grant(stream, out + size)
                self.frames_out[CREDIT] += 1
                size += 16
            stream.pending = 0
        return size

    @final
    cdef int _grant(self, Stream stream, unsigned char *out) except -1:
        """Writes CREDIT. Doubles the window first if it limits the stream (quic-go's rule), and nothing else does.

        By the least of the last RTTs: a window that fills queues makes the RTT rise, and must not grow by that.
        """
        cdef double used = <double> (stream.consumed_ - stream.epoch_offset)
        cdef uint64_t more
        cdef double took = self.now - stream.epoch_started
        if self.rtt_least > 0 and took * <double> stream.window_ < 4.0 * used * self.rtt_least:
            more = min(2 * stream.window_, self.max_window) - stream.window_
            if more and stream.moves_on(<uint64_t> used) and stream._promise_more(more, True):
                stream.window_ += more
        stream.epoch_offset = stream.consumed_
        stream.epoch_started = self.now
        stream.granted = stream.consumed_ + stream.window_
        stream.credit_due = stream.consumed_ + stream.window_ // 4
        self._move(stream, EV_SEND_CREDIT)
        put_header(out, 8, CREDIT, 0, stream.number)
        put_u64(out + 8, stream.granted)
        return 0

    @final
    cdef Py_ssize_t _fill_streams(self, unsigned char *out, Py_ssize_t limit, Py_ssize_t space) except -1:
        cdef Py_ssize_t size = 0
        cdef Py_ssize_t wrote
        cdef Stream stream
        cdef uint8_t queue
        while size < limit:
            if self.interactive.first != NULL and (
                    self.bulk.first == NULL or self.interactive_run < INTERACTIVE_RUN):
                stream = <Stream> self.interactive.first
            elif self.bulk.first != NULL:
                stream = <Stream> self.bulk.first
            else:
                break
            queue = stream.queue
            self._unready(stream)
            wrote = self._turn(stream, out + size, limit - size, space - size)
            if wrote == 0:
                stream.queue = queue
                queue_prepend(&self.interactive if queue == IN_INTERACTIVE else &self.bulk, stream)
                break
            size += wrote
            if queue == IN_BULK or self.bulk.first == NULL:
                self.interactive_run = 0
            else:
                self.interactive_run += wrote
            stream.framed_at = self.now
            stream.interactive_left -= wrote
            if stream.state_ == ST_CLOSED:
                self._close_later(stream)
                continue
            self._ready(stream)
            if (stream.want_writable and stream.queued_ <= C_LOW_WATER
                    and stream.ring_count <= MAX_PIECES // 4):
                stream.want_writable = False
                self._call_later(stream, DUE_WRITABLE)
        return size

    @final
    cdef Py_ssize_t _turn(self, Stream stream, unsigned char *out, Py_ssize_t limit,
                          Py_ssize_t space) except -1:
        """One quantum. Only a head over 16 KiB passes it, once in a stream: no deficit is carried over."""
        cdef Py_ssize_t size = 0
        cdef Py_ssize_t wrote
        if limit > QUANTUM:
            limit = QUANTUM
        while size < limit and stream._sendable():
            wrote = self._write_frame(stream, out + size, limit - size, space - size)
            if wrote == 0:
                break
            size += wrote
        return size

    @final
    cdef Py_ssize_t _write_frame(self, Stream stream, unsigned char *out, Py_ssize_t limit,
                                 Py_ssize_t space) except -1:
        """The next frame of a stream that is sendable; 0 when there is no space for it."""
        cdef Chunk chunk
        cdef uint8_t kind = DATA
        cdef uint8_t flags = 0
        cdef Py_ssize_t size = 0            # payload bytes so far
        cdef uint64_t may                   # body bytes that this frame could carry if there were space
        cdef Py_ssize_t body
        cdef Py_ssize_t room
        if stream.doomed:                   # and IDLE: the id must be used up
            if space < 12:
                return 0
            put_header(out, 4, RESET, 0, stream.number)
            put_u32(out + 8, stream.reset_code)
            self.frames_out[RESET] += 1
            self.last_opened = stream.number
            self._move(stream, EV_SEND_RESET)
            return 12
        if stream.ring_count:
            chunk = stream.chunks[stream.ring_first]
            kind = chunk.kind
            flags = chunk.flags
            if kind != DATA:
                size = PyBytes_GET_SIZE(<bytes> chunk.data)
                if space < HEADER_SIZE + size:
                    return 0
                memcpy(out + HEADER_SIZE, PyBytes_AS_STRING(<bytes> chunk.data), size)
                stream._pop()
        elif space < HEADER_SIZE:
            return 0

        if kind == TRAILERS:
            self._move(stream, EV_SEND_FIN)
        else:
            if (stream.queued_ and stream.sent < stream.send_limit and size < MAX_DATA
                    and not flags & FLAG_INTERIM):
                may = min(stream.queued_, stream.send_limit - stream.sent, <uint64_t> (MAX_DATA - size))
                room = min(max(limit - HEADER_SIZE - size, LEAST_CUT), space - HEADER_SIZE - size)
                if kind == DATA and room < LEAST_CUT and <uint64_t> max(room, 0) < may:
                    return 0                # it would be a splinter at the end of the buffer
                body = min(<Py_ssize_t> may, room)
                if body > 0:
                    self._copy_body(stream, out + HEADER_SIZE + size, body)
                    size += body
                    stream.sent += <uint64_t> body
                    stream.queued_ -= <uint64_t> body
            if stream.fin_queued and stream.ring_count == 0:
                flags |= FLAG_FIN
            if kind == OPEN:
                self.last_opened = stream.number
                self._move(stream, EV_SEND_OPEN_FIN if flags & FLAG_FIN else EV_SEND_OPEN)
            else:
                self._move(stream, EV_SEND_FIN if flags & FLAG_FIN else EV_SEND_BODY)
        put_header(out, <uint32_t> size, kind, flags, stream.number)
        self.frames_out[kind] += 1
        return HEADER_SIZE + size

    @final
    cdef int _copy_body(self, Stream stream, unsigned char *out, Py_ssize_t size) except -1:
        cdef PyObject *data
        cdef Py_ssize_t take
        while size:
            data = stream.chunks[stream.ring_first].data
            take = min(size, PyBytes_GET_SIZE(<bytes> data) - stream.first_offset)
            memcpy(out, PyBytes_AS_STRING(<bytes> data) + stream.first_offset, take)
            out += take
            size -= take
            stream.first_offset += take
            if stream.first_offset == PyBytes_GET_SIZE(<bytes> data):
                stream._pop()
        return 0

    @final
    cdef int _close_later(self, Stream stream) except -1:
        # Into `due` first: `_unlink` lets go of the last reference.
        self._call_later(stream, DUE_CLOSED)
        return self._unlink(stream)

    @final
    cdef int _call_later(self, Stream stream, uint8_t what) except -1:
        if stream.due == 0:
            self.due.append(stream)
        stream.due |= what
        return 0

    @final
    cdef int _after_fill(self) except -1:
        """Callbacks that were put off while frames were written."""
        cdef list batch
        cdef Stream stream
        cdef uint8_t what
        if self.due:
            self.filling = True
            try:
                while self.due:
                    batch = self.due
                    self.due = []
                    for stream in batch:
                        what = stream.due
                        stream.due = 0
                        if what & DUE_WRITABLE and not stream.finished and not stream.doomed:
                            try:
                                stream.on_writable()
                            except Exception as exc:
                                self._handler_failed(stream, exc)
                        if what & DUE_CLOSED:
                            self._announce_closed(stream)
            finally:
                self.filling = False
        return self._wake()

    # -- what the owner asks for -----------------------------------------------------------------------------

    def set_peer_limits(self, *, floor, max_streams):
        """From the peer's HELLO, before any stream. Raises TunnelError when the numbers make no sense."""
        if not C_LEAST_FLOOR <= floor <= C_MOST_FLOOR or not 1 <= max_streams <= C_MOST_STREAMS:
            self._fail(PROTOCOL_ERROR, f"HELLO: floor {floor}, max_streams {max_streams}")
        self.peer_floor = floor
        self.peer_max_streams = max_streams

    def send_hello(self, bytes payload not None):
        if self.hello_sent or self.hello_out is not None:
            raise RuntimeError("HELLO is sent once")
        self._check_payload(payload, MAX_HANDSHAKE)
        self.hello_out = payload
        self._wake()

    def send_auth(self, bytes payload not None):
        if self.auths_out == MAX_AUTH_FRAMES:
            raise RuntimeError("too many AUTH frames")
        self._check_payload(payload, MAX_HANDSHAKE)
        self.auths_out += 1
        self.auth_out.append(payload)
        if self.edge:
            self.verdict = True
        self._wake()

    def send_info(self, bytes payload not None):
        """The whole state; displaces one that still waits. More than one a second wait for a later `tick`."""
        self._check_payload(payload, MAX_PAYLOAD)
        self.info_out = payload
        self._wake()

    @final
    cdef int _check_payload(self, bytes payload, Py_ssize_t most) except -1:
        if PyBytes_GET_SIZE(payload) > most:
            raise ValueError(f"a payload of {len(payload)} bytes is over the limit of {most}")
        return 0

    def open(self, str service not None, bytes head not None, handler, *, bint interactive=True,
             bint fin=False, bytes body not None=b""):
        """Opens a stream (edge). Raises StreamRefused, ValueError (name or head that no frame can carry)."""
        cdef Stream stream = Stream.__new__(Stream)
        cdef bytes name
        try:
            name = service.encode("ascii")
        except UnicodeEncodeError:
            raise ValueError("a service name is printable ASCII") from None
        self._prepare(stream, <const unsigned char *> PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name),
                      interactive, <const unsigned char *> PyBytes_AS_STRING(head), PyBytes_GET_SIZE(head))
        stream.handler = handler
        if PyBytes_GET_SIZE(body):
            stream._append(body, DATA, 0)
            stream.queued_ = <uint64_t> PyBytes_GET_SIZE(body)
            stream.want_writable = stream.queued_ > C_HIGH_WATER
        stream.ended = stream.fin_queued = fin
        self._wake()
        return stream

    cdef int open_raw(self, Stream stream, const unsigned char *service, Py_ssize_t service_size,
                      bint interactive, const unsigned char *head, Py_ssize_t head_size, bint fin) except -1:
        """As `open`, with a fresh Stream of the caller's own type; the body follows by `send_raw`."""
        self._prepare(stream, service, service_size, interactive, head, head_size)
        stream.ended = stream.fin_queued = fin
        return self._wake()

    @final
    cdef int _prepare(self, Stream stream, const unsigned char *service, Py_ssize_t service_size,
                      bint interactive, const unsigned char *head, Py_ssize_t head_size) except -1:
        cdef bytes payload
        cdef unsigned char *out
        cdef Py_ssize_t index
        if not self.edge:
            raise RuntimeError("only the edge opens streams")
        if not 1 <= service_size <= 255:
            raise ValueError("a service name has 1 to 255 characters")
        for index in range(service_size):
            if service[index] < 0x20 or service[index] > 0x7E:
                raise ValueError("a service name is printable ASCII")
        if head_size > MAX_HEAD:
            raise ValueError(f"a head of {head_size} bytes is over the limit of {MAX_HEAD}")
        if self.over:
            raise StreamRefused(UNREACHABLE, "the tunnel has ended")
        if self.goaway_in or self.goaway_out:
            raise StreamRefused(DRAINING, "the tunnel is draining")
        if not self.verdict:
            raise StreamRefused(AUTH_FAILED, "the gateway has not been let in yet")
        if self.last_assigned >= MAX_STREAM_ID:
            raise StreamRefused(DRAINING, "the tunnel has used up its stream ids")
        if len(self.live) >= min(self.max_streams, self.peer_max_streams):
            raise StreamRefused(LIMIT_EXCEEDED, f"{len(self.live)} streams are live")
        payload = PyBytes_FromStringAndSize(NULL, 4 + service_size + head_size)
        out = <unsigned char *> PyBytes_AS_STRING(payload)
        out[0] = <unsigned char> service_size
        memcpy(out + 1, service, service_size)
        out[1 + service_size] = interactive
        put_u16(out + 2 + service_size, <uint16_t> head_size)
        memcpy(out + 4 + service_size, head, head_size)
        if not self.budget.take_floor(self.floor):
            raise StreamRefused(OVERLOADED, "the memory budget is promised away")
        stream.promised = self.floor
        self._start(stream, self.last_assigned + 1, interactive)
        self.last_assigned += 1
        stream._append(payload, OPEN, 0)
        self._ready(stream)
        return 0

    def ping(self, double now):
        """Measures the RTT: PING at the next `fill`, unless one is under way or many were sent just now."""
        self.now = now
        self._want_ping()
        self._wake()

    @final
    cdef int _want_ping(self) except -1:
        if self.ping_pending or (self.ping_flying and self.now - self.ping_at < PING_IDLE):
            return 0
        self.ping_pending = bucket_take(&self.pings_out, self.now)
        return 0

    def goaway(self, uint32_t code, last_stream=None):
        """Starts or tightens a drain: streams above `last_stream` will not be served.

        A gateway's default is the highest id that was opened so far; 2**30 - 1 turns nothing away that is
        under way. An edge's `last_stream` means nothing: it opens the streams.
        """
        cdef uint32_t last = MAX_STREAM_ID
        if self.over:
            return
        if not self.edge:
            if last_stream is None:
                last = self.last_opened
            elif last_stream < MAX_STREAM_ID:
                last = max(<uint32_t> last_stream, self.last_opened)    # lower ones are being served already
        self.goaway_out = True
        self.goaway_out_last = min(last, self.goaway_out_last)
        self.goaway_out_code = code
        self.goaway_pending = True
        self._wake()

    def tick(self, double now):
        """Call about once a second. Raises TunnelError(TIMEOUT) after DEAD_AFTER (6 s) without a byte.

        Between ticks more than PING_IDLE (3 s) apart this process itself was not running: then the peer gets
        the time to answer a PING first.
        """
        cdef bint slept = self.last_tick >= 0 and now - self.last_tick > PING_IDLE
        self.last_tick = now
        self.now = now
        if self.over:
            return
        if slept:
            self.last_received_ = now
            self._want_ping()
        elif now - self.last_received_ >= DEAD_AFTER:
            self._fail(TIMEOUT, f"nothing was received for {now - self.last_received_:.1f} s")
        elif now - self.last_received_ >= PING_IDLE or (self.live and now - self.ping_at >= PING_IDLE):
            self._want_ping()
        self._wake()

    def _start_ids_at(self, uint32_t number):
        """For tests of the end of the id space: as if ids up to `number` had been used; on both ends."""
        self.last_opened = number
        self.last_assigned = number

    def abort(self, uint32_t code):
        """The tunnel is gone: each stream gets `stream_reset(code)`, then `stream_closed`."""
        cdef Stream stream
        if self.aborted:
            return
        self.aborted = True
        self.over = True
        if self.failure is None:
            self.goaway_pending = False
        for stream in sorted(self.live, key=_by_number):
            self._orphan(stream, code)
        self.handler = None

    def stats(self):
        """Counters since the start, for metrics and tests."""
        cdef dict counters = {}
        cdef int kind
        for kind in range(N_TYPES):
            counters[f"frames_in_{_TYPE_NAMES[kind]}"] = self.frames_in[kind]
            counters[f"frames_out_{_TYPE_NAMES[kind]}"] = self.frames_out[kind]
        counters["frames_in_unknown"] = self.frames_in[SKIPPED]
        counters["bytes_in"] = self.bytes_in
        counters["bytes_out"] = self.bytes_out
        counters["glitches"] = self.n_glitches
        counters["stale"] = self.n_stale
        counters["crossed"] = self.n_crossed
        counters["discarded_bytes"] = self.n_discarded
        counters["streams_opened"] = self.n_opened
        counters["streams_closed"] = self.n_closed
        return counters

    # -- the end ---------------------------------------------------------------------------------------------

    @final
    cdef int _end(self, uint32_t code, str reason) except -1:
        """No more input; the only output that is left is GOAWAY."""
        if self.over:
            return 0
        self.over = True
        self.failure = TunnelError(code, reason)
        self.goaway_out = True
        self.goaway_out_last = min(self.last_opened, self.goaway_out_last) if not self.edge else 0
        self.goaway_out_code = code
        self.goaway_pending = True
        return 0

    @final
    cdef int _fail(self, uint32_t code, str reason) except -1:
        self._end(code, reason)
        raise TunnelError(code, reason)


def _by_number(stream):
    return (<Stream> stream).number


_TYPE_NAMES = (
    "data", "open", "head", "trailers", "credit", "reset", "reset_ack", "ping", "pong", "goaway", "hello",
    "auth", "info",
)
