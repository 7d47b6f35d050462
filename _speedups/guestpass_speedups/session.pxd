# C interface of the session, for code that handles frames without Python objects (a fast lane).
#
# +----------------------------------------------------------------------------------------------------------+
# | BUFFER LIFETIME. Every `const unsigned char *` that a virtual method below is given points into the      |
# | buffer that `receive` was called with (or into the session's reassembly buffer). It is valid until the   |
# | method returns, and not one instruction longer. Copy, or write it to a transport that copies.            |
# +----------------------------------------------------------------------------------------------------------+
#
# Subclass Stream and override on_*; subclass Session and override new_stream and on_stream_opened (gateway),
# or give your own Stream to open_raw (edge). The defaults build bytes and call the Python handler. A method
# that raises has its stream reset with INTERNAL_ERROR, as a Python handler has.

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    NEVER = 0x7FFFFFFFFFFFFFFF

cdef enum State:    # SPEC.md, 3.; the order is the one of STATES
    ST_IDLE
    ST_OPEN
    ST_HALF_LOCAL
    ST_HALF_REMOTE
    ST_CANCELLING
    ST_RESETTING
    ST_RESETTING_FIN
    ST_CLOSED
    N_STATES

cdef enum Event:    # the order is the one of EVENTS
    EV_SEND_OPEN
    EV_SEND_OPEN_FIN
    EV_SEND_BODY
    EV_SEND_FIN
    EV_SEND_CREDIT
    EV_SEND_RESET
    EV_SEND_RESET_ACK
    EV_RECV_OPEN
    EV_RECV_OPEN_FIN
    EV_RECV_BODY
    EV_RECV_FIN
    EV_RECV_CREDIT
    EV_RECV_RESET
    EV_RECV_RESET_ACK
    N_EVENTS

cdef enum:
    N_RTTS = 8          # half a minute of a busy tunnel
    FILL_SPACE = 196615  # FILL_MAX + MAX_FRAME: a frame is started below the limit and may pass it

cdef enum Code:     # ErrorCode, as C
    NO_ERROR
    PROTOCOL_ERROR
    INTERNAL_ERROR
    FLOW_CONTROL_ERROR
    LIMIT_EXCEEDED
    CANCEL
    REVOKED
    REFUSED
    UNREACHABLE
    BAD_UPSTREAM
    TIMEOUT
    AUTH_FAILED
    REPLACED
    DRAINING
    OVERLOADED

# One queued piece of a stream's output. `data` is an owned reference to bytes.
cdef struct Chunk:
    PyObject *data
    uint8_t kind            # a frame type: OPEN, HEAD, DATA, TRAILERS
    uint8_t flags           # FLAG_INTERIM

# A queue of streams, linked through the streams themselves; the pointers are borrowed (Session.live owns).
cdef struct Queue:
    PyObject *first
    PyObject *last

cdef struct Bucket:
    double tokens
    double burst
    double rate
    double filled_at

# One slot of the table id -> stream; `stream` is borrowed.
cdef struct Slot:
    uint32_t number
    PyObject *stream


cdef class Budget:
    cdef public uint64_t limit
    cdef readonly uint64_t promised

    cdef bint take_floor(self, uint64_t size) noexcept
    cdef bint take_start(self, uint64_t size) noexcept
    cdef bint take_growth(self, uint64_t size) noexcept
    cdef void give_back(self, uint64_t size) noexcept


cdef class Session


cdef class Stream:
    cdef public object handler
    cdef public object context
    cdef public object waiting      # () → bytes that were consumed and have not moved on; None: nobody knows
    cdef readonly Session session

    cdef PyObject *budget           # owned; no Python attribute, so that __dealloc__ may still use it
    cdef PyObject *allowance        # owned, or NULL: the Budget of whoever this stream is for
    cdef uint32_t number
    cdef uint32_t reset_code
    cdef uint8_t state_             # a State: what has passed on the wire, and nothing that is only queued
    cdef uint8_t pending            # control frames to be written: PENDING_*
    cdef uint8_t due                # callbacks to be made after `fill`: DUE_*
    cdef uint8_t queue              # which queue it is linked in: IN_*
    cdef uint8_t in_control
    cdef uint8_t interims
    cdef bint interactive
    cdef bint doomed                # reset locally; callbacks are over, RESET is pending or was sent
    cdef bint finished              # CLOSED, unlinked, slot free
    cdef bint fin_queued
    cdef bint ended                 # FIN or TRAILERS was accepted from the caller: no more sends
    cdef bint fin_received
    cdef bint head_queued           # final head accepted from the caller (gateway)
    cdef bint head_received         # final head received (edge)
    cdef bint acknowledged_
    cdef bint want_writable

    # output
    cdef Chunk *chunks              # a ring; starts as `few`
    cdef Chunk few[3]
    cdef uint32_t ring_size
    cdef uint32_t ring_first
    cdef uint32_t ring_count
    cdef Py_ssize_t first_offset    # bytes of the first chunk that were framed already
    cdef uint64_t queued_
    cdef uint64_t sent
    cdef uint64_t send_limit
    cdef int64_t interactive_left
    cdef double framed_at

    # input
    cdef uint64_t received
    cdef uint64_t granted
    cdef uint64_t consumed_
    cdef uint64_t window_
    cdef uint64_t promised          # `window_` until FIN, then what is unconsumed; 0 after a reset
    cdef uint64_t allowed           # of that, by `allowance`
    cdef uint64_t credit_due        # `consumed_` at which CREDIT is due; 0 when no more will be given
    cdef uint64_t body_size         # what the peer will send in all (`expects`); NEVER: nobody knows
    cdef uint64_t epoch_offset
    cdef double epoch_started

    # links
    cdef PyObject *ready_prev
    cdef PyObject *ready_next
    cdef PyObject *control_prev
    cdef PyObject *control_next

    # What the session calls; override these. Never called after the stream was reset locally, but for
    # on_closed.
    cdef int on_head(self, const unsigned char *head, Py_ssize_t size, bint interim, bint fin) except -1
    cdef int on_data(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1
    cdef int on_trailers(self, const unsigned char *trailers, Py_ssize_t size) except -1
    cdef int on_reset(self, uint32_t code) except -1
    cdef int on_writable(self) except -1
    cdef int on_closed(self) except -1
    # Whether what was consumed also moves on: of the last `used` bytes less waits further down. Called before a window
    # grows, while output is made: it looks, and changes nothing.
    cdef bint moves_on(self, uint64_t used) except -1

    # What the owner calls.
    cdef int send_head_raw(self, const unsigned char *head, Py_ssize_t size, bint interim, bint fin) except -1
    cdef bint send_bytes(self, bytes data, bint fin) except -1      # as `send`: kept, not copied
    cdef bint send_raw(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1
    cdef int consumed(self, uint64_t size) except -1
    cdef int expects(self, uint64_t size) except -1
    cdef int abandon(self, uint32_t code) except -1
    cdef int work_ended(self) except -1

    cdef int _check_head(self) except -1
    cdef bint _append(self, object data, uint8_t kind, uint8_t flags) except -1
    cdef void _pop(self) noexcept
    cdef void _drop_output(self) noexcept
    cdef bint _sendable(self) noexcept
    cdef int _hand_on(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1
    cdef int _consumed(self, uint64_t size) except -1
    cdef void _shrink_promise(self, uint64_t size) noexcept
    cdef bint _promise_more(self, uint64_t size, bint proven) noexcept
    cdef int allow(self, Budget allowance) except -1
    cdef int _accept_send(self) except -1


cdef class Session:
    cdef readonly bint edge
    cdef public object handler
    cdef readonly Budget budget
    cdef readonly object failure        # the TunnelError that ended it, or None
    cdef bint over                      # failed or aborted: nothing is received any more
    cdef bint aborted
    cdef double now

    # streams
    cdef set live                       # owns the streams that are not CLOSED
    cdef Slot *slots                    # open addressing by id; ids rise by 1: the low bits hash perfectly
    cdef uint32_t slot_mask
    cdef uint32_t slot_count
    cdef uint32_t last_opened           # highest id on the wire: sent (edge) or received (gateway)
    cdef uint32_t last_assigned         # edge: highest id given to a stream, on the wire or not yet
    cdef uint32_t max_streams
    cdef uint32_t peer_max_streams
    cdef uint64_t floor
    cdef uint64_t peer_floor
    cdef uint64_t max_window

    # receiving
    cdef PyObject *calling              # the stream whose handler runs: exceptions are its fault (borrowed)
    cdef Stream called                  # the same, owned, once it was unlinked by its own handler
    cdef Py_ssize_t cursor
    cdef unsigned char *partial
    cdef Py_ssize_t partial_size
    cdef Py_ssize_t partial_have
    cdef bint receiving
    cdef bint body_follows              # during `on_head`: `on_data` is called next, for bytes of the same frame
    cdef bint hello_in
    cdef uint8_t auths_in
    cdef bint verdict                   # the edge has spoken: streams may be opened
    cdef double last_received_
    cdef double last_tick
    cdef uint32_t goaway_in_last
    cdef bint goaway_in

    # sending
    cdef bint filling
    cdef bint notified
    cdef bytes hello_out
    cdef bint hello_sent
    cdef list auth_out
    cdef uint8_t auths_out
    cdef bytes info_out
    cdef bint goaway_pending
    cdef bint goaway_out
    cdef uint32_t goaway_out_last
    cdef uint32_t goaway_out_code
    cdef bint pong_pending
    cdef uint64_t pong_value
    cdef bint ping_pending
    cdef bint ping_flying
    cdef uint64_t ping_value
    cdef double ping_at
    cdef double rtt_                    # smoothed; < 0: none yet
    cdef double rtt_least               # of the last N_RTTS; 0: none yet
    cdef double rtts[N_RTTS]
    cdef uint32_t n_rtts
    cdef Queue interactive
    cdef Queue bulk
    cdef Queue control
    cdef Py_ssize_t interactive_run     # bytes written from `interactive` since a bulk stream had its turn
    cdef list due                       # streams with callbacks to be made after `fill`

    # limits
    cdef Bucket pings
    cdef Bucket pings_out
    cdef Bucket infos
    cdef Bucket infos_out
    cdef Bucket resets
    cdef Bucket glitches
    cdef uint64_t crossings             # CREDIT and RESET for CLOSED ids that are still nobody's fault

    # counters
    cdef uint64_t frames_in[14]
    cdef uint64_t frames_out[14]
    cdef uint64_t bytes_in
    cdef readonly uint64_t bytes_out
    cdef uint64_t n_glitches
    cdef uint64_t n_stale
    cdef uint64_t n_crossed
    cdef uint64_t n_discarded
    cdef uint64_t n_opened
    cdef uint64_t n_closed

    # Override these two in a gateway's fast lane.
    cdef Stream new_stream(self)
    cdef bint on_stream_opened(self, Stream stream, const unsigned char *service, Py_ssize_t service_size,
                               bint interactive, const unsigned char *head, Py_ssize_t head_size,
                               bint fin) except -1
    cdef int on_output_ready(self) except -1

    # What the owner calls.
    cdef int receive_raw(self, const unsigned char *data, Py_ssize_t size, double now) except -1
    cdef Py_ssize_t fill_raw(self, unsigned char *out, Py_ssize_t limit, Py_ssize_t space,
                             double now) except -1
    # As fill_raw, into a buffer that all sessions of the process share: copy `shared()` before any other code
    # runs, then call `filled`, which makes the callbacks.
    cdef Py_ssize_t fill_shared(self, Py_ssize_t limit, double now) except -1
    cdef const unsigned char *shared(self) noexcept
    # As fill_shared, into the caller's own FILL_SPACE bytes.
    cdef Py_ssize_t fill_at(self, unsigned char *out, Py_ssize_t limit, double now) except -1
    cdef int filled(self) except -1
    cdef int open_raw(self, Stream stream, const unsigned char *service, Py_ssize_t service_size,
                      bint interactive, const unsigned char *head, Py_ssize_t head_size, bint fin) except -1

    # Within.
    cdef int _end(self, uint32_t code, str reason) except -1
    cdef int _fail(self, uint32_t code, str reason) except -1
    cdef int _wake(self) except -1
    cdef bint _has_output(self) noexcept
    cdef int _not_reentrant(self) except -1
    cdef Py_ssize_t _fill(self, unsigned char *out, Py_ssize_t limit, Py_ssize_t space, double now) except -1
    cdef int _prepare(self, Stream stream, const unsigned char *service, Py_ssize_t service_size,
                      bint interactive, const unsigned char *head, Py_ssize_t head_size) except -1
    cdef bint _recover(self, object exc) except -1
    cdef int _parse(self, const unsigned char *data, Py_ssize_t size) except -1
    cdef Py_ssize_t _collect(self, const unsigned char *data, Py_ssize_t size) except -1
    cdef inline int _check(self, const unsigned char *header) except -1
    cdef int _frame(self, const unsigned char *frame) except -1
    cdef inline int _body(self, PyObject *which, bint fin, const unsigned char *data,
                          Py_ssize_t size) except -1
    cdef int _frame_data(self, uint32_t number, uint8_t flags, const unsigned char *data,
                         Py_ssize_t size) except -1
    cdef int _frame_open(self, uint32_t number, uint8_t flags, const unsigned char *data,
                         Py_ssize_t size) except -1
    cdef int _frame_head(self, uint32_t number, uint8_t flags, const unsigned char *data,
                         Py_ssize_t size) except -1
    cdef int _frame_trailers(self, uint32_t number, const unsigned char *data, Py_ssize_t size) except -1
    cdef int _frame_credit(self, uint32_t number, uint64_t offset) except -1
    cdef int _frame_reset(self, uint32_t number, uint32_t code) except -1
    cdef int _frame_goaway(self, uint32_t last, uint32_t code) except -1
    cdef int _frame_tunnel(self, uint8_t kind, const unsigned char *data, Py_ssize_t size) except -1
    cdef int _no_row(self, Stream stream, int event) except -1
    cdef int _beyond_credit(self, Stream stream, Py_ssize_t size) except -1
    cdef void _account_fin(self, Stream stream) noexcept
    cdef int _check_more(self, const char *reason, uint8_t kind) except -1
    cdef int _body_before_head(self, uint32_t number) except -1
    cdef inline int _move(self, Stream stream, int event) except -1
    cdef inline int _account(self, Stream stream, Py_ssize_t size, bint fin) except -1
    cdef void _note_rtt(self, double rtt) noexcept
    cdef int _not_live(self, uint32_t number, uint8_t kind) except -1
    cdef int _glitch(self) except -1
    cdef inline PyObject *_live(self, uint32_t number) noexcept
    cdef PyObject *_probe(self, uint32_t number) noexcept
    cdef Stream _lookup(self, uint32_t number)
    cdef int _start(self, Stream stream, uint32_t number, bint interactive) except -1
    cdef int _unlink(self, Stream stream) except -1
    cdef int _finish(self, Stream stream) except -1
    cdef int _announce_closed(self, Stream stream) except -1
    cdef int _orphan(self, Stream stream, uint32_t code) except -1
    cdef int _report(self, Stream stream, object exc) except -1
    cdef int _handler_failed(self, Stream stream, object exc) except -1
    cdef void _ready(self, Stream stream) noexcept
    cdef void _unready(self, Stream stream) noexcept
    cdef void _want_control(self, Stream stream, uint8_t what) noexcept
    cdef void _drop_control(self, Stream stream) noexcept
    cdef Py_ssize_t _fill_tunnel(self, unsigned char *out, Py_ssize_t limit, Py_ssize_t space) except -1
    cdef Py_ssize_t _fill_control(self, unsigned char *out, Py_ssize_t limit, Py_ssize_t space) except -1
    cdef Py_ssize_t _fill_streams(self, unsigned char *out, Py_ssize_t limit, Py_ssize_t space) except -1
    cdef Py_ssize_t _turn(self, Stream stream, unsigned char *out, Py_ssize_t limit,
                          Py_ssize_t space) except -1
    cdef Py_ssize_t _write_frame(self, Stream stream, unsigned char *out, Py_ssize_t limit,
                                 Py_ssize_t space) except -1
    cdef Py_ssize_t _write_tunnel(self, unsigned char *out, uint8_t kind, bytes payload) except -1
    cdef int _copy_body(self, Stream stream, unsigned char *out, Py_ssize_t size) except -1
    cdef int _close_later(self, Stream stream) except -1
    cdef int _call_later(self, Stream stream, uint8_t what) except -1
    cdef int _want_ping(self) except -1
    cdef int _check_payload(self, bytes payload, Py_ssize_t most) except -1
    cdef int _grant(self, Stream stream, unsigned char *out) except -1
    cdef int _after_fill(self) except -1
    cdef int _slot_put(self, uint32_t number, PyObject *stream) except -1
    cdef void _slot_remove(self, uint32_t number) noexcept
    cdef int _slots_resize(self, uint32_t size) except -1
