# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, auto_pickle=False
"""The edge's connections with visitors, and the fast lane. What is rare is Python: `guestpass.edge.front`.

Theory of operation
===================

A Connection stays the protocol of its socket for good. It cuts what arrives into requests, and every head passes the
strict scanner (http1.pyx) before anything else sees it. A request then takes one of three ways:

      socket ─▶ buffer_updated ─▶ _feed ─▶ _head ─┬─▶ tunnel()   the first request only; the socket is theirs then
                                                  ├─▶ _fast      OPEN on a tunnel; answers come back to FastStream
                                                  │              (a cookie not known here: admission is asked first)
                                                  └─▶ begin()    aiohttp, through a shim transport (front.py)

**One request at a time.** While one is under way, what came behind its body is held (`held`), and reading pauses
beyond HELD_MAX: so answers leave in order whatever lanes they took. The next request waits until what was written has
drained below the transport's low-water mark, or whoever asks without reading would fill the memory.

**Phases.** HEAD: a request head is awaited. ADMISSION: one has come with a cookie that is not known here; admission is
asked, and when it has answered the head is scanned again and takes its way. FAST, SLOW: under way. OPAQUE, SLOW_OPAQUE:
after 101. LINGER: answered before the request had ended; what still comes is thrown away for a moment, so that the
answer is not destroyed by a reset. GONE: nothing is read or written any more.

**No Python object per header or frame.** Heads are rewritten from one C buffer into another. Two byte strings remain:
the OPEN payload, which the session queues, and what the transport is given. A head waits in HEAD_OUT for the body bytes
that came in the same frame; an answer that is complete is written at once, what is not is queued and leaves in one
`writelines` per turn of the loop.

**Credit** is given for what was handed to a transport that is not paused. While it is paused, bytes are counted in
`unconsumed`, and the gateway stops when the window is full. Reading the tunnel never stops. A window grows only while
the kernel sends what it was given (`moves_on`): a visitor who reads nothing gets the smallest, however much its kernel
and ours have taken. What all windows of one client grow by is bounded (CLIENT_WINDOWS): it may read fast, then stop.

**The access log** costs a branch where it is off. Where it is on, a stream is born with the part of its line that is
known then (`begun`), and whoever ends it appends the line to `Lane.log`, which goes out as one piece.

**Revocation** calls FastStream.end: the socket is reset with what its kernel holds, synchronously. A complete answer
may still wait in the kernel, so each connection leaves a FastTail in the grant that it answered last; the clock takes
it back when the visitor has everything. A connection that is to be closed is closed then, not before.

**The lease** of one worker among several: it may serve until then, in seconds of CLOCK_BOOTTIME, which goes on while
the process or the machine is frozen. It is looked at before anything that was read is relayed and before anything is
written; when it has lapsed, `lapsed` ends every stream first.

**Time limits** need no timer per connection: each kind has one length, so a list in order of entry is in order of
expiry. The clock looks at the first of each, once a second. One does not fit, that the visitor reads: connections with
output that does not leave are in `stuck`, and the clock asks the kernel whether the visitor acknowledged anything. All
that is due at the same time, because it came at the same time, is done a little in each turn of the loop (`_round`):
those whom it is not about do not wait for it.

**Number limits** are counted on objects that are at hand: a Client has its open connections (behind a trusted proxy:
its requests under way), a session's grant its streams, a share's Load the streams of all of its sessions. What is over
a limit, in time or number, goes to `limited` of front.py by the limit's name in `[limits]`.
"""

import asyncio
import time
import weakref
from email.utils import formatdate

from cython cimport final
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.object cimport PyObject
from cpython.time cimport monotonic, time as wall_clock
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.math cimport floor
from libc.string cimport memcmp, memcpy, memmove, memset
from posix.time cimport clock_gettime, timespec

from guestpass_speedups.direct cimport descriptor, gp_send, iovec
from guestpass_speedups.frames cimport MAX_STREAM_ID
from guestpass_speedups.http1 cimport (
    BODY_CHUNKED,
    BODY_LENGTH,
    BODY_NONE,
    CHUNK_DATA,
    CHUNK_END,
    CHUNK_MORE,
    CHUNK_TRAILER,
    E_TOO_LARGE,
    F_AUTHORIZATION,
    F_DATE,
    F_HOST,
    F_MAX_FORWARDS,
    F_ORIGIN,
    F_SEC_FETCH_SITE,
    F_UPGRADE,
    F_X_FORWARDED_FOR,
    FROM_GATEWAY,
    M_DELETE,
    M_GET,
    M_HEAD,
    M_OPTIONS,
    M_PUT,
    TO_HEAD,
    UPGRADE_WEBSOCKET,
    WRITE_ROOM,
    Chunked,
    Fields,
    RequestHead,
    ResponseHead,
    Span,
    error_reason,
    error_status,
    find_bearer,
    find_cookie,
    mark_nominated,
    next_chunk,
    scan_request,
    scan_response,
    span_equals,
    write_request_head,
    write_response_head,
)
from guestpass_speedups.session cimport (
    CANCEL,
    DRAINING,
    PROTOCOL_ERROR,
    REVOKED,
    TIMEOUT,
    UNREACHABLE,
    Budget,
    Session,
    Stream,
)

from guestpass_speedups.session import StreamRefused

cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_BOOTTIME

# ------------------------------------------------------------------------------------------------------------
# Limits

cdef enum:
    # What one read may bring. All connections share the buffer: it is emptied before the loop's next callback.
    READ_BUFFER = 262144
    # Of what a visitor sends ahead of its answer so much is kept; then reading pauses. Two of the largest heads.
    HELD_MAX = 65536
    # An empty buffer of a connection keeps at most so much for the next request.
    HELD_KEPT = 4096
    # Output that waits for the end of the turn is handed over early beyond this: a transport's high-water mark.
    QUEUE_MAX = 65536
    # Forwarded and identity fields of one request: an address, two host names, an assertion of 1 KiB at most.
    INJECT_MAX = 8192
    # Admitted or refused paths that a grant with a scope remembers, and the longest that is worth it: 90 KiB a grant.
    ADMITTED_MAX = 256
    ADMITTED_PATH = 256
    # A message on an upgraded connection up to this size is written at once, as at the gateway (upstream.pyx).
    SMALL = 4096
    # Pieces of output that are handed to the kernel at once.
    PIECES = 64
    # Buckets of the histogram of durations.
    BUCKETS_MAX = 32
    # Lines of the access log that wait for one write: some 250 of them. At full speed that is a hundredth of a second.
    LOG_ROOM = 65536
    # Of a path so much is logged, and so much of it escaped, where a byte is two or six. The fixed rest of a line is
    # below 512, so a line is below PIPE_BUF: see edge/access_log.py.
    LOG_PATH = 2048
    LOG_ESCAPED = 2560

cdef enum:
    # What the clock does in one turn of the loop: connections it looks at, 3 µs each, and ends, 60 µs each.
    LOOKS_AT_ONCE = 256
    ENDS_AT_ONCE = 16

ENDED_AT_ONCE = ENDS_AT_ONCE

cdef double LINGER_SECONDS = 2.0        # answered before the request had ended
# How soon, and then how often, it is looked whether the visitor has all of an answer, before its connection is closed.
cdef double SENT_FIRST = 0.001
cdef double SENT_POLL = 0.05
cdef double HALF_CLOSED_SECONDS = 10.0  # the application's last bytes after a visitor's end (edge/relay.py)
# How exactly the last use of a session is known. Nobody asks for less than a minute.
cdef double USED_SECONDS = 1.0

# What one client's windows may grow by beyond their floors, all together: it may stop reading with all of them full.
# Two of the largest windows.
cdef enum:
    CLIENT_WINDOWS = 33554432

# Connections of one client beyond its limit are told so, and held until the answer has arrived; those beyond this many
# times the limit are cut at once.
cdef enum:
    CUT_FACTOR = 2

HELD_LIMIT = HELD_MAX
CUT_BEYOND = CUT_FACTOR

cdef enum:      # phases
    P_NEW
    P_HEAD
    P_ADMISSION
    P_FAST
    P_OPAQUE
    P_SLOW
    P_SLOW_OPAQUE
    P_LINGER
    P_GONE

PHASES = ("NEW", "HEAD", "ADMISSION", "FAST", "OPAQUE", "SLOW", "SLOW_OPAQUE", "LINGER", "GONE")

cdef enum:      # what a connection waits for
    T_NONE
    T_HEAD
    T_BODY
    T_IDLE
    T_ANSWER
    T_LINGER
    T_HALF_CLOSED
    T_UPGRADE
    N_TIMERS

TIMERS = ("NONE", "HEAD", "BODY", "IDLE", "ANSWER", "LINGER", "HALF_CLOSED", "UPGRADE")

cdef struct TimerList:
    PyObject *first
    PyObject *last
    double seconds

# Scratch of the process, under the GIL: filled and used up before any other code runs.
cdef RequestHead REQUEST
cdef ResponseHead RESPONSE
cdef uint8_t[WRITE_ROOM] REQUEST_OUT
cdef uint8_t[INJECT_MAX] INJECT
# The answer's head that waits for the body bytes of its frame: see Lane.head_for. 256 for Date, framing and Connection.
cdef uint8_t[WRITE_ROOM + 256] HEAD_OUT

# The status in the access log of a request whose visitor went, or was cut off, before the answer began: nginx's.
cdef int VISITOR_WENT = 499
VISITOR_GONE = VISITOR_WENT

cdef bytes CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
cdef const char *HEX = "0123456789abcdef"
cdef const char *TUNNEL_PATH = "/.guestpass/tunnel"
cdef const char *RESERVED_PATHS = "/.guestpass/"
cdef const char *SESSION_COOKIE = "__Host-guestpass"


cdef class Service:
    """Counters of one service's answers."""
    cdef readonly str name
    cdef bytes raw
    cdef uint64_t[6] classes

    def __init__(self, str name):
        self.name = name
        self.raw = name.encode("ascii")

    @property
    def counts(self):
        """(class of status, answers) of every class that came."""
        return [(f"{n}xx", self.classes[n]) for n in range(1, 6) if self.classes[n]]


cdef class Load:
    """What a share has under way. Its grants have it in common; who opens a stream for one of them counts it here."""
    cdef object __weakref__
    cdef public Py_ssize_t streams


cdef class Client:
    """An address, or a network, and what it has open."""
    cdef object __weakref__
    cdef readonly str name
    cdef readonly Py_ssize_t open
    cdef public Py_ssize_t starting  # TLS handshakes under way
    cdef readonly Budget windows    # what the windows of its streams may grow by

    def __init__(self, str name not None):
        self.name = name
        self.windows = Budget(CLIENT_WINDOWS)


cdef class Bucket:
    """A token bucket: `burst` at once, `per_second` on average. Both lanes take from it."""
    cdef readonly double per_second
    cdef readonly double burst
    cdef double level
    cdef double at                  # monotonic; < 0: not used yet
    cdef object __weakref__

    def __init__(self, double per_second, double burst):
        self.per_second = per_second
        self.burst = burst
        self.level = burst
        self.at = -1.0

    @final
    cdef bint has(self, double now) noexcept:
        """Whether a token is there at `now`. The lanes' clocks differ by a turn of the loop: time never runs back."""
        if self.at >= 0 and now > self.at:
            self.level = min(self.burst, self.level + (now - self.at) * self.per_second)
        if now > self.at:
            self.at = now
        return self.level >= 1.0

    def take(self, double now):
        """A token, if there is one at `now` (monotonic)."""
        if not self.has(now):
            return False
        self.level -= 1.0
        return True

    def wait(self):
        """Seconds from the last look until there is a token."""
        return max(0.0, (1.0 - self.level) / self.per_second)


cdef class Entry:
    """What the fast lane knows of a grant. The grant table keeps it beside its digest, under the secret itself."""
    cdef readonly object grant
    cdef readonly bytes secret
    cdef bytes host                 # of the share's origin; Host must be exactly this
    cdef bytes origin
    cdef Service service
    cdef Load load
    cdef bytes who                  # for the access log; None: ask
    cdef bint live
    cdef bint cookie
    cdef double expires             # seconds since the epoch; < 0: never
    cdef double used
    cdef bytes identity             # complete lines
    cdef double identity_until
    cdef tuple sessions             # of the gateway's tunnels
    cdef uint64_t ways              # Lane.ways when `sessions` was looked up; 0: not yet
    cdef dict admitted              # b"METHOD path" → bool; None without a scope
    # What filters said for every request of the session: `guestpass.edge.static`.
    cdef tuple removed              # names of fields that the application is not told
    cdef bytes added                # complete lines
    cdef tuple buckets
    cdef bint networks              # the client's address is limited

    def __init__(self, grant, bytes secret not None, str host not None, str origin not None, Service service not None,
                 bint cookie, bint scoped, tuple removed=(), bytes added=b"", tuple buckets=(), bint networks=False):
        self.grant = grant
        self.secret = secret
        self.host = host.encode("ascii")
        self.origin = origin.encode("ascii")
        self.service = service
        self.load = grant.load
        self.cookie = cookie
        self.expires = -1.0 if grant.expires is None else grant.expires
        self.identity = b""
        self.identity_until = -1.0
        self.sessions = ()
        self.admitted = {} if scoped else None
        self.removed = removed
        self.added = added
        self.buckets = buckets
        self.networks = networks
        self.live = True

    def dropped(self):
        """The grant is no longer in force."""
        self.live = False

    def moved(self):
        """The grant has another gateway."""
        self.ways = 0
        self.who = None


cdef class Lane:
    """What all connections of a worker share. `front.FastLane` has the rest of the methods that are called here.

    `fast` off: every request is aiohttp's. `cookies` and `tokens` are the grant table's own indexes."""
    cdef public bint fast
    cdef readonly set connections
    cdef dict cookies
    cdef dict tokens
    cdef bytes bearer
    cdef dict statuses              # of the answer, by the code of a reset
    cdef readonly dict services
    cdef object loop
    cdef object abort_now
    cdef object unsent
    cdef object resume_reading
    cdef object acknowledged
    cdef object waiting
    cdef object clients             # by name, as long as a connection refers to them
    cdef bint logging               # there is an access log
    cdef bint log_paths
    cdef object log_write
    cdef bytearray log              # never resized
    cdef Py_ssize_t log_size
    cdef double log_second          # `log_stamp` is of this one
    cdef bytes log_stamp
    cdef dict stuck                 # connections with output that the visitor does not take
    cdef double write_seconds
    cdef Py_ssize_t head_bytes
    cdef uint64_t body_bytes
    cdef Py_ssize_t per_client
    cdef Py_ssize_t per_session
    cdef Py_ssize_t per_share
    cdef set tails
    cdef list looks                 # tails and stuck connections that the clock has not looked at yet
    cdef object _timer
    cdef object _rest               # the handle of what the clock has left to do
    cdef bytearray storage          # never resized
    cdef uint8_t *buffer
    cdef double now
    cdef double wall_offset         # seconds since the epoch at monotonic 0; looked at once a second
    cdef bytes date                 # a complete line, of the same look
    cdef uint64_t ways              # rises whenever a tunnel comes, goes, or learns what is well
    cdef list dirty                 # connections with output in their queue
    cdef bint flush_due
    cdef Connection head_for        # whose head waits in HEAD_OUT
    cdef Py_ssize_t head_size
    cdef TimerList[N_TIMERS] timers
    cdef double[BUCKETS_MAX] bounds
    cdef uint64_t[BUCKETS_MAX + 1] buckets
    cdef int n_bounds
    cdef double seconds
    cdef public double lease        # 0: there is none
    cdef public object lapsed

    def __init__(self, *, dict cookies, dict tokens, bytes bearer, dict statuses, buckets, abort_now, unsent,
                 resume_reading, acknowledged, waiting, limits, bint fast):
        """`limits` has the keys of `[limits]` as attributes."""
        cdef int index
        self.fast = fast
        self.cookies = cookies
        self.tokens = tokens
        self.bearer = bearer
        self.statuses = statuses
        self.abort_now = abort_now
        self.unsent = unsent
        self.resume_reading = resume_reading
        self.acknowledged = acknowledged
        self.waiting = waiting
        self.clients = weakref.WeakValueDictionary()
        self.stuck = {}
        self.write_seconds = limits.write_progress_seconds
        self.head_bytes = limits.head_bytes
        self.body_bytes = limits.body_bytes if limits.body_bytes else <uint64_t> -1
        self.per_client = limits.connections_per_client
        self.per_session = limits.streams_per_session
        self.per_share = limits.streams_per_share
        self.tails = set()
        self.looks = []
        self.connections = set()
        self.services = {}
        self.loop = asyncio.get_running_loop()
        self.storage = bytearray(READ_BUFFER)
        self.buffer = <uint8_t *> <char *> self.storage
        self.dirty = []
        self.ways = 1
        self.now = monotonic()
        self._look_at_the_clock()
        self.n_bounds = len(buckets)
        if self.n_bounds > BUCKETS_MAX:
            raise ValueError(f"more than {BUCKETS_MAX} buckets")
        for index in range(self.n_bounds):
            self.bounds[index] = buckets[index]
        self.timers[T_HEAD].seconds = limits.head_seconds
        self.timers[T_BODY].seconds = limits.body_progress_seconds
        self.timers[T_IDLE].seconds = limits.idle_seconds
        self.timers[T_ANSWER].seconds = limits.answer_seconds
        self.timers[T_UPGRADE].seconds = limits.upgrade_idle_seconds
        self.timers[T_LINGER].seconds = LINGER_SECONDS
        self.timers[T_HALF_CLOSED].seconds = HALF_CLOSED_SECONDS
        self._timer = self.loop.call_later(1.0, self._ticked)

    def _ticked(self):
        self._timer = self.loop.call_later(1.0, self._ticked)
        self._look_at_the_clock()
        if self.log_size:
            self.log_flush()
        if self._rest is None:
            self.looks = [*self.tails, *self.stuck]
            self._round()

    def _round(self):
        """Some of what is due, and the rest later."""
        self._rest = None
        if self._due(monotonic(), LOOKS_AT_ONCE, ENDS_AT_ONCE):
            self._rest = self.loop.call_soon(self._round)

    def _look_at_the_clock(self):
        self.wall_offset = wall_clock() - monotonic()
        self.date = f"Date: {formatdate(usegmt=True)}\r\n".encode("ascii")

    def tick(self, double now):
        """Carries out the time limits that have passed at `now` (monotonic)."""
        if self.log_size:
            self.log_flush()
        self.looks = [*self.tails, *self.stuck]
        while self._due(now, LOOKS_AT_ONCE, ENDS_AT_ONCE):
            pass

    @final
    cdef bint _due(self, double now, int looks, int ends) except -1:
        """At most so many looks and ends; whether there is more to do."""
        cdef int kind
        cdef PyObject *first
        cdef Connection connection
        self.now = now
        while self.looks and looks and ends:
            look = self.looks.pop()
            looks -= 1
            if type(look) is FastTail:
                connection = (<FastTail> look).connection
                if connection.tail is look and (
                        connection.transport is None or not self.unsent(connection.transport)):
                    connection._forget_tail()
            elif look in self.stuck and (<Connection> look)._look(now):
                ends -= 1
        for kind in range(1, N_TIMERS):
            while True:
                first = self.timers[kind].first
                if first == NULL or (<Connection> first).due > now:
                    break
                if ends == 0:
                    return True
                ends -= 1
                connection = <Connection> first
                connection._wait(T_NONE)
                connection._expired(kind)
        return len(self.looks) > 0

    def check(self):
        """Whether the lease has lapsed is looked at by whoever is about to relay something."""
        self._check()

    @final
    cdef inline int _check(self) except -1:
        cdef timespec at
        if self.lease != 0:
            clock_gettime(CLOCK_BOOTTIME, &at)
            if at.tv_sec + at.tv_nsec * 1e-9 > self.lease:
                self.lapsed()
        return 0

    def close(self):
        """Stops the clock and cuts every connection."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None
        for connection in list(self.connections):
            (<Connection> connection)._cut(CANCEL)
        if self.log_size:
            self.log_flush()

    def changed(self):
        """A tunnel came or went, or what a gateway reaches has changed."""
        self.ways += 1

    # -- the access log --------------------------------------------------------------------------------------

    def log_to(self, write, bint paths):
        """Each request's line goes to `write`, many at once. `paths`: with its path, without the query."""
        self.log = bytearray(LOG_ROOM)
        self.log_second = -1.0
        self.log_write = write
        self.log_paths = paths
        self.logging = True

    def log_flush(self):
        """Hands over the lines that wait."""
        lines = bytes(memoryview(self.log)[:self.log_size])
        self.log_size = 0
        self.log_write(lines)

    def begun(self, bytes who not None, str client not None, bytes method not None, bytes target not None):
        """As `_begun`, for a request of aiohttp's."""
        return self._begun(
            who, b"aiohttp", client.encode("ascii", "replace"),
            <const uint8_t *> PyBytes_AS_STRING(method), PyBytes_GET_SIZE(method),
            <const uint8_t *> PyBytes_AS_STRING(target), PyBytes_GET_SIZE(target))

    def ended(self, bytes begun not None, int status, uint64_t received, uint64_t sent, double seconds, bint complete):
        """A request of aiohttp's has ended."""
        self.now = monotonic()
        self._ended(begun, status, received, sent, seconds, complete)

    @final
    cdef bytes _begun(self, bytes who, bytes lane, bytes client, const uint8_t *method, Py_ssize_t method_size,
                      const uint8_t *target, Py_ssize_t target_size):
        """The part of a request's line that is known when it begins."""
        cdef uint8_t[LOG_ESCAPED + 6] escaped
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t index
        cdef bytes line = who + b',"lane":"' + lane + b'","client":"' + client + b'","method":"' + (
            PyBytes_FromStringAndSize(<const char *> method, method_size)) + b'"'
        if not self.log_paths:
            return line
        for index in range(min(target_size, LOG_PATH)):
            if target[index] == c"?" or at > LOG_ESCAPED:
                break
            if target[index] == c'"' or target[index] == c"\\":
                escaped[at] = c"\\"
                escaped[at + 1] = target[index]
                at += 2
            elif 0x20 <= target[index] < 0x7f:
                escaped[at] = target[index]
                at += 1
            else:
                memcpy(escaped + at, b"\\u00", 4)
                escaped[at + 4] = HEX[target[index] >> 4]
                escaped[at + 5] = HEX[target[index] & 15]
                at += 6
        return line + b',"path":"' + PyBytes_FromStringAndSize(<const char *> escaped, at) + b'"'

    @final
    cdef int _ended(self, bytes begun, int status, uint64_t received, uint64_t sent, double seconds,
                    bint complete) except -1:
        """Appends the line of a request that has ended at `now`."""
        cdef double when = self.now + self.wall_offset
        cdef double second = floor(when)
        cdef Py_ssize_t at
        cdef uint64_t micros = <uint64_t> (seconds * 1e6) if seconds > 0 else 0
        cdef uint8_t *out
        if self.log_size + PyBytes_GET_SIZE(begun) + 512 > LOG_ROOM:
            self.log_flush()
            if PyBytes_GET_SIZE(begun) + 512 > LOG_ROOM:
                return 0        # never: see LOG_PATH
        if second != self.log_second:
            self.log_second = second
            self.log_stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode("ascii")
        out = <uint8_t *> <char *> self.log
        at = _text(out, self.log_size, b'{"time":"')
        at = _text(out, at, self.log_stamp)
        at = _fraction(out, at, <uint64_t> ((when - second) * 1000), 3)
        at = _text(out, at, b'Z",')
        at = _text(out, at, begun)
        at = _text(out, at, b',"status":')
        at += _digits(out + at, <uint64_t> status, 10)
        at = _text(out, at, b',"bytes_in":')
        at += _digits(out + at, received, 10)
        at = _text(out, at, b',"bytes_out":')
        at += _digits(out + at, sent, 10)
        at = _text(out, at, b',"seconds":')
        at += _digits(out + at, micros // 1000000, 10)
        at = _fraction(out, at, micros % 1000000, 6)
        at = _text(out, at, b',"complete":true}\n' if complete else b',"complete":false}\n')
        self.log_size = at
        return 0

    def client(self, str name not None):
        """What is counted of a client."""
        found = self.clients.get(name)
        if found is None:
            found = self.clients[name] = Client(name)
        return found

    def service(self, str name not None):
        """The counters of a service."""
        found = self.services.get(name)
        if found is None:
            found = self.services[name] = Service(name)
        return found

    @property
    def durations(self):
        """(answers by bucket, not cumulative and with what is beyond the last one; sum of seconds)."""
        return [self.buckets[index] for index in range(self.n_bounds + 1)], self.seconds

    def flush(self):
        """Hands over what the connections have queued. Runs once at the end of a turn."""
        cdef list batch
        self.flush_due = False
        self._check()
        self._give_head()
        batch = self.dirty
        self.dirty = []
        for connection in batch:
            try:
                (<Connection> connection)._flush()
            except Exception as exc:    # the others' answers do not wait for ever
                (<Connection> connection)._cut(CANCEL)
                self.loop.call_exception_handler({"message": "a visitor's connection failed", "exception": exc})

    @final
    cdef int _flush_soon(self, Connection connection) except -1:
        connection.dirty = True
        self.dirty.append(connection)
        return self._schedule()

    @final
    cdef int _schedule(self) except -1:
        if not self.flush_due:
            self.flush_due = True
            self.loop.call_soon(self.flush)
        return 0

    @final
    cdef int _give_head(self) except -1:
        """The head that waits in HEAD_OUT, to its connection's queue."""
        cdef Connection connection = self.head_for
        if connection is None:
            return 0
        self.head_for = None
        connection._enqueue(PyBytes_FromStringAndSize(<const char *> HEAD_OUT, self.head_size))
        if not connection.dirty:
            self._flush_soon(connection)
        return 0

    @final
    cdef int _observe(self, double seconds) except -1:
        cdef int index = 0
        while index < self.n_bounds and seconds > self.bounds[index]:
            index += 1
        self.buckets[index] += 1
        self.seconds += seconds
        return 0

    @final
    cdef Session _pick(self, Entry entry):
        """The least loaded tunnel of the session's gateway that takes streams; None: let the relay see."""
        cdef Session best = None
        cdef Session session
        cdef Py_ssize_t least = 0
        cdef Py_ssize_t load
        if entry.ways != self.ways:
            entry.sessions = self.resolve(entry.grant)
            entry.ways = self.ways
        for item in entry.sessions:
            session = <Session> item
            if session.over or session.goaway_in or session.goaway_out:
                continue
            load = len(session.live)
            if best is None or load < least:
                best = session
                least = load
        if best is not None and best.last_assigned > MAX_STREAM_ID // 2 and best.retiring:
            return None
        return best


cdef class FastTail:
    """The end of the last answer on a connection: `grants.Tail`."""
    cdef Connection connection
    cdef public object grant

    def cut(self):
        """Whether there was something to cut off."""
        cdef Connection connection = self.connection
        if connection.phase == P_GONE or not connection.lane.unsent(connection.transport):
            return False
        connection._drop_stream(REVOKED)
        connection._revoked()
        return True


cdef class FastStream(Stream):
    """One exchange of the fast lane: `grants.LiveStream`."""
    cdef Connection connection      # None when it is over for the visitor
    cdef object grant_
    cdef Load load
    cdef Service service
    cdef uint8_t *raw               # the request's head as it came, until the answer's has come
    cdef Py_ssize_t raw_size
    cdef double started
    cdef bint to_head
    cdef bint upgrade
    cdef bint retryable
    cdef bint answering             # the final head has come
    cdef bint chunked
    cdef bint keep_alive
    cdef int64_t expected           # body bytes; < 0: as many as come
    cdef uint64_t counted
    cdef int status
    cdef bint whole                 # the answer went out to its end
    cdef bytes begun                # of the access log's line; None: there is none to come

    def __dealloc__(self):
        PyMem_Free(self.raw)

    @property
    def grant(self):
        return self.grant_

    @grant.setter
    def grant(self, grant):
        self.grant_ = grant

    def end(self, reason):
        """Nothing more reaches the visitor."""
        cdef Connection connection = self.connection
        self.connection = None
        if connection is not None:
            if self.begun is not None:
                self._log(connection, self.whole)
            self.load.streams -= 1
            connection.stream = None
            connection._revoked()
        self.abandon(REVOKED)

    @final
    cdef int _detach(self) except -1:
        """The visitor's side of this is over."""
        cdef Connection connection = self.connection
        self.connection = None
        self._forget_request()
        if connection is not None:
            if self.begun is not None:
                # Either side may end an upgraded connection; only a revocation breaks it off.
                self._log(connection, self.whole or self.status == 101)
            self.load.streams -= 1
            connection.stream = None
        self.grant_.streams.discard(self)
        return 0

    @final
    cdef int _log(self, Connection connection, bint complete) except -1:
        cdef Lane lane = connection.lane
        lane._ended(self.begun, self.status if self.status else VISITOR_WENT, connection.received, self.counted,
                    lane.now - self.started, complete)
        self.begun = None
        return 0

    @final
    cdef void _forget_request(self) noexcept:
        PyMem_Free(self.raw)
        self.raw = NULL
        self.raw_size = 0

    @final
    cdef int _count(self, int status) except -1:
        cdef Lane lane = self.connection.lane
        if self.session.now > lane.now:
            lane.now = self.session.now     # of the read that brought the answer
        self.service.classes[status // 100] += 1
        self.status = status
        self.whole = status != 101
        if status != 101:
            lane._observe(lane.now - self.started)
        return 0

    # -- what the session calls ------------------------------------------------------------------------------

    cdef int on_head(self, const unsigned char *head, Py_ssize_t size, bint interim, bint fin) except -1:
        cdef Connection connection = self.connection
        cdef Lane lane
        cdef uint32_t searched = 0
        cdef int scanned
        cdef Py_ssize_t written
        cdef bint bodiless
        cdef bint http11
        cdef bint keep_alive
        cdef uint8_t *out = HEAD_OUT
        if connection is None:
            return 0
        lane = connection.lane
        scanned = scan_response(head, size, &RESPONSE, &searched, FROM_GATEWAY | (TO_HEAD if self.to_head else 0))
        if scanned < 0:
            return self._bad(error_reason(scanned))
        if scanned != size:
            return self._bad("the response head is not ended, or goes on")
        if RESPONSE.status == 101 and (interim or not self.upgrade):
            return self._bad("101 without an upgrade")
        if (100 <= RESPONSE.status < 200 and RESPONSE.status != 101) != interim:
            return self._bad("a final status in an interim head, or the other way round")
        http11 = connection.minor >= 1
        if interim and (RESPONSE.status == 100 or not http11):
            return 0    # Expect was answered here, and HTTP/1.0 knows no interim responses
        lane._give_head()
        written = write_response_head(head, &RESPONSE, out)
        if interim:
            memcpy(out + written, b"\r\n", 2)
            lane.head_for = connection
            lane.head_size = written + 2
            return lane._give_head()

        self.answering = True
        self.status = RESPONSE.status
        self._forget_request()
        # What is left of the request must go on coming.
        connection._wait(T_BODY if connection.framing != BODY_NONE and not connection.blocked else T_NONE)
        if self.status == 101:
            memcpy(out + written, b"\r\n", 2)
            written += 2
            self.expected = -1
            self._count(101)
            lane.head_for = connection
            lane.head_size = written
            lane._give_head()
            connection._opaque()
            return self._end_of_body(NULL, 0) if fin else 0
        if self.upgrade and not self.ended:
            self.send_raw(NULL, 0, True)    # declined: there is no body
        if not RESPONSE.fields.present >> F_DATE & 1:   # RFC 9110, 6.6.1
            memcpy(out + written, PyBytes_AS_STRING(lane.date), PyBytes_GET_SIZE(lane.date))
            written += PyBytes_GET_SIZE(lane.date)
        bodiless = self.to_head or self.status == 204 or self.status == 304
        keep_alive = connection.keep_alive and connection.framing == BODY_NONE
        if RESPONSE.has_length:
            self.expected = <int64_t> RESPONSE.content_length
        else:
            self.expected = 0 if fin and not bodiless else -1
        self.chunked = self.expected < 0 and not bodiless and http11
        if self.chunked:
            memcpy(out + written, b"Transfer-Encoding: chunked\r\n", 28)
            written += 28
        elif self.expected >= 0 and self.status != 204:
            memcpy(out + written, b"Content-Length: ", 16)
            written += 16
            written += _digits(out + written, <uint64_t> self.expected, 10)
            memcpy(out + written, b"\r\n", 2)
            written += 2
        else:
            keep_alive = keep_alive and bodiless    # HTTP/1.0: the end of the connection ends the body
        if keep_alive != http11:                    # other than the version's default
            if keep_alive:
                memcpy(out + written, b"Connection: keep-alive\r\n", 24)
                written += 24
            else:
                memcpy(out + written, b"Connection: close\r\n", 19)
                written += 19
        memcpy(out + written, b"\r\n", 2)
        written += 2
        if bodiless:
            self.expected = 0
        if self.expected >= 0:
            self.expects(<uint64_t> self.expected)
        self.keep_alive = keep_alive
        lane.head_for = connection
        lane.head_size = written
        if fin:
            return self._end_of_body(NULL, 0)
        return 0 if self.session.body_follows else lane._schedule()

    cdef int on_data(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1:
        cdef Connection connection = self.connection
        if connection is None:
            return self.consumed(<uint64_t> size)
        self.counted += <uint64_t> size
        if self.expected >= 0 and self.counted > <uint64_t> self.expected:
            return connection._cut(PROTOCOL_ERROR)      # more bytes than the head promised
        if fin:
            return self._end_of_body(data, size)
        if connection.timer == T_UPGRADE:
            if self.session.now > connection.lane.now:
                connection.lane.now = self.session.now
            connection._wait(T_UPGRADE)
        connection._give(data, size, self.chunked, False)
        return 0

    cdef int on_trailers(self, const unsigned char *trailers, Py_ssize_t size) except -1:
        if self.connection is None:
            return 0
        return self._end_of_body(NULL, 0)   # trailers are not passed on: nobody announced them to the visitor

    cdef int on_reset(self, uint32_t code) except -1:
        cdef Connection connection = self.connection
        cdef bytes raw
        cdef bint again
        self.work_ended()
        if connection is None:
            return 0
        if self.answering:
            return connection._cut(CANCEL)
        raw = PyBytes_FromStringAndSize(<const char *> self.raw, self.raw_size)
        # That a gateway could not reach the service did not touch the service; another one may. DRAINING is another
        # worker's, whose way to the gateway has gone.
        again = self.retryable and (
            not self.acknowledged_ or code == DRAINING
            or (code == UNREACHABLE and connection.lane.others(self.grant_))
        )
        if not again:
            self._count(connection.lane.statuses.get(code, 502))
        else:
            self.begun = None           # the relay will tell
        self._detach()
        connection._failed(raw, code, again, self.grant_)
        return 0

    cdef int on_writable(self) except -1:
        cdef Connection connection = self.connection
        if connection is not None and connection.blocked:
            connection.blocked = False
            connection._sync_reading()
        return 0

    cdef bint moves_on(self, uint64_t used) except -1:
        cdef Connection connection = self.connection
        if connection is None or connection.paused:
            return False
        return connection.transport is None or connection.lane.waiting(connection.transport) < used

    cdef int on_closed(self) except -1:
        if self.connection is not None:     # a fault of our own, or an end that nobody announced
            return self.connection._cut(CANCEL)
        return 0

    @final
    cdef int _bad(self, const char *reason) except -1:
        """The gateway's answer is not one: 502."""
        cdef Connection connection = self.connection
        cdef bytes raw = PyBytes_FromStringAndSize(<const char *> self.raw, self.raw_size)
        self._count(502)
        self._detach()
        self.abandon(PROTOCOL_ERROR)
        connection._spoiled(raw, (<bytes> reason).decode("ascii"), self.grant_)
        return 0

    @final
    cdef int _end_of_body(self, const uint8_t *data, Py_ssize_t size) except -1:
        cdef Connection connection = self.connection
        if self.expected >= 0 and self.counted != <uint64_t> self.expected:
            return connection._cut(PROTOCOL_ERROR)      # fewer bytes than the head promised
        connection._give(data, size, self.chunked, True)
        if self.connection is None:         # the write failed
            return 0
        return self._complete()

    @final
    cdef int _complete(self) except -1:
        cdef Connection connection = self.connection
        cdef bint keep_alive = self.keep_alive
        if self.status == 101:
            keep_alive = False
        else:
            self._count(self.status)
        if connection.paused and connection.unconsumed:
            connection.kept = self          # its promise holds until the transport has drained
        connection._leave_tail(self.grant_)
        self._detach()
        if not self.ended:
            self.abandon(CANCEL)            # nobody wants the rest of the request
        return connection._answered(keep_alive)


cdef class Connection:
    """One accepted connection. `front.Front` is the protocol."""
    cdef readonly Lane lane
    cdef readonly object transport
    cdef object _write
    cdef readonly bint secure
    cdef uint8_t phase
    cdef uint8_t timer
    cdef double due
    cdef PyObject *timer_prev
    cdef PyObject *timer_next

    # input
    cdef uint8_t *held
    cdef Py_ssize_t held_size
    cdef Py_ssize_t held_room
    cdef uint32_t searched
    cdef bint busy                  # in `_feed`
    cdef bint fresh                 # no request came yet
    cdef bint blocked               # the stream's queue is full
    cdef bint slow_blocked          # the aiohttp handler asks for a pause
    cdef bint reading_paused        # what the transport was told

    # the request
    cdef uint8_t minor
    cdef readonly bint to_head      # the answer has no body
    cdef bint keep_alive
    cdef uint8_t framing            # of what is left of the body
    cdef uint64_t left
    cdef uint64_t received          # of the body
    cdef Chunked chunked
    cdef bint asked                 # admission was asked about its cookie
    cdef double asked_at
    cdef bytes asking               # its line in the access log, while admission is asked
    cdef bint reframed              # the handler is given chunks of our own
    cdef bint slow_answered

    # the answer
    cdef FastStream stream
    cdef FastStream kept
    cdef FastTail tail
    cdef int fd                     # for writing past the transport; -1: never
    cdef bint spilled               # the transport may have something waiting
    cdef readonly bint paused       # by the transport
    cdef bint dirty
    cdef list queue
    cdef Py_ssize_t queued
    cdef uint64_t unconsumed
    cdef object acked               # while in Lane.stuck: what the visitor had acknowledged, and since when
    cdef double acked_at

    # who
    cdef Entry last
    cdef Client client
    cdef bint counted               # by `client`
    cdef bint named                 # the three below are known
    cdef bint trusted               # the peer may speak for others (`trusted_proxies`)
    cdef bytes speaks_for           # X-Forwarded-For that the two below were made from
    cdef bytes forwarded            # fields before, and between the two mentions of, the host name
    cdef bytes forwarded_end
    cdef bytes logged_as            # the client, in the access log
    cdef Entry inside               # whose networks the client's address was found in
    cdef bytes inside_as            # `forwarded` then: another address makes another one

    def __init__(self, Lane lane not None):
        self.lane = lane
        self.fresh = True

    def __dealloc__(self):
        PyMem_Free(self.held)           # its place in a list of timers was left when the connection was lost

    def __repr__(self):
        return f"<{type(self).__name__} {self.phase_name}>"

    @property
    def phase_name(self):
        return PHASES[self.phase]

    @property
    def time_limit(self):
        """What the connection waits for and until when (monotonic); None: for as long as it takes."""
        return None if self.timer == T_NONE else (TIMERS[self.timer], self.due)

    @property
    def held_bytes(self):
        """Of the visitor's, not handed on yet."""
        return self.held_size

    @property
    def unconsumed_bytes(self):
        """Of the answer, given to a transport that has not drained."""
        return self.unconsumed

    # -- asyncio's calls -------------------------------------------------------------------------------------

    def connection_made(self, transport):
        self.transport = transport
        self._write = transport.write
        self.secure = transport.get_extra_info("sslcontext") is not None
        self.fd = descriptor(transport)
        self.phase = P_HEAD
        self.lane.connections.add(self)
        self.lane.now = monotonic()
        self._wait(T_HEAD)
        self.client = self.arrived()
        if self.client is None or self._counts():
            return
        if self.client.open >= CUT_FACTOR * self.lane.per_client:
            self.limited("connections_per_client", None)
            return
        self._count_in()
        self.framing = BODY_LENGTH      # a request is on its way, and nobody looks at it
        self.left = <uint64_t> -1
        self.limited("connections_per_client", b"")

    def connection_lost(self, exc):
        self.lane.connections.discard(self)
        self.lane.stuck.pop(self, None)
        self._count_out()
        self.client = None
        self._drop_stream(CANCEL)
        self._forget_tail()
        self._gone()
        self.kept = None
        self.last = None
        self._drop_held()
        self.lost(exc)
        self._write = None
        self.fd = -1
        self.transport = None

    def eof_received(self):
        if self.phase == P_OPAQUE and not self.secure:
            # The visitor's end is not the application's: its last bytes still go through.
            if self.stream is not None and not self.stream.ended:
                self.stream.send_raw(NULL, 0, True)
            self._wait(T_HALF_CLOSED)
            return True
        self._drop_stream(CANCEL)
        if self.paused:
            self._watch()                   # the transport closes when its buffer is empty
        if self.phase == P_ADMISSION:
            self._gone()
        if self.phase != P_SLOW_OPAQUE and self.phase != P_SLOW:
            self.phase = P_GONE
        return None

    def get_buffer(self, sizehint):
        return self.lane.storage

    def buffer_updated(self, Py_ssize_t size):
        cdef Lane lane = self.lane
        cdef Py_ssize_t used
        lane._check()
        if self.phase == P_GONE:
            return
        lane.now = monotonic()
        if self.held_size:
            self._hold(lane.buffer, size)
            self._go_on()
            return
        self.busy = True
        try:
            used = self._feed(lane.buffer, size)
        finally:
            self.busy = False
        if used < size and self.phase != P_GONE:
            self._hold(lane.buffer + used, size - used)
        self._sync_reading()

    def pause_writing(self):
        self.paused = True
        self._watch()
        if self.phase == P_SLOW or self.phase == P_SLOW_OPAQUE:
            self.writing(False)

    def resume_writing(self):
        self.paused = False
        self.lane.stuck.pop(self, None)
        self.lane._check()
        self.lane.now = monotonic()
        self._credit()
        if self.phase == P_SLOW or self.phase == P_SLOW_OPAQUE:
            self.writing(True)
        elif self.phase == P_HEAD:
            self._go_on()

    # -- in --------------------------------------------------------------------------------------------------

    @final
    cdef int _hold(self, const uint8_t *data, Py_ssize_t size) except -1:
        cdef Py_ssize_t room
        cdef uint8_t *bigger
        if self.held_size + size > self.held_room:
            room = max(2 * self.held_room, self.held_size + size, 1024)
            bigger = <uint8_t *> PyMem_Realloc(self.held, room)
            if bigger == NULL:
                raise MemoryError
            self.held = bigger
            self.held_room = room
        memcpy(self.held + self.held_size, data, size)
        self.held_size += size
        return 0

    @final
    cdef void _drop_held(self) noexcept:
        self.held_size = 0
        if self.held_room:
            PyMem_Free(self.held)
            self.held = NULL
            self.held_room = 0

    @final
    cdef int _go_on(self) except -1:
        """Looks at what was held; whoever changes the phase calls this."""
        cdef Py_ssize_t used
        if self.busy:
            return 0        # the loop in `_feed` goes on by itself
        if self.held_size:
            self.busy = True
            try:
                used = self._feed(self.held, self.held_size)
            finally:
                self.busy = False
            if self.phase == P_GONE or used >= self.held_size:
                self.held_size = 0
                if self.held_room > HELD_KEPT:
                    self._drop_held()
            elif used:
                self.held_size -= used
                memmove(self.held, self.held + used, self.held_size)
        return self._sync_reading()

    @final
    cdef Py_ssize_t _feed(self, uint8_t *data, Py_ssize_t size) except -1:
        """Handles what it can; returns how much that was. The rest must be held. May change `data` in place."""
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t used
        while at < size:
            if self.phase == P_HEAD:
                if self.paused:
                    break
                used = self._head(data + at, size - at)
                if used == 0:
                    break
                at += used
            elif (self.phase == P_FAST or self.phase == P_SLOW) and self.framing != BODY_NONE:
                at += self._body(data + at, size - at)
            elif self.phase == P_OPAQUE:
                if self.stream is not None and not self.stream.ended:
                    self.received += <uint64_t> (size - at)
                    self._send(data + at, size - at, False)
                at = size
            elif self.phase == P_SLOW_OPAQUE:
                self._wait(T_UPGRADE)
                self.feed(PyBytes_FromStringAndSize(<const char *> data + at, size - at))
                at = size
            elif self.phase == P_LINGER or self.phase == P_GONE:
                at = size
            else:
                break
        return at

    @final
    cdef Py_ssize_t _head(self, const uint8_t *data, Py_ssize_t size) except -1:
        """One request head; 0: more is needed."""
        cdef Lane lane = self.lane
        cdef Py_ssize_t n = scan_request(data, size, &REQUEST, &self.searched, 0)
        cdef bint fresh
        if n == 0 and size <= lane.head_bytes:
            if self.timer != T_HEAD:
                self._wait(T_HEAD)
            return 0
        if n == 0 or n > lane.head_bytes or n == E_TOO_LARGE:
            self._wait(T_NONE)
            self.minor = 1
            self.framing = BODY_NONE
            self.limited("head_bytes", b"")
            return size
        fresh = self.fresh
        self.fresh = False
        if n < 0:
            self._wait(T_NONE)
            self.minor = 1
            self.to_head = _asks_head(data, size)
            self.framing = BODY_NONE
            self.refused(error_status(<int> n), (<bytes> error_reason(<int> n)).decode("ascii"))
            return size
        self.minor = REQUEST.minor
        self.to_head = REQUEST.method_id == M_HEAD
        self.keep_alive = REQUEST.keep_alive
        self.framing = REQUEST.framing
        self.left = REQUEST.content_length
        self.received = 0
        if self.framing == BODY_CHUNKED:
            memset(&self.chunked, 0, sizeof(Chunked))
        if fresh and REQUEST.method_id == M_GET and span_equals(data, REQUEST.target, TUNNEL_PATH, 18):
            return self._hand_over(data, n, size)
        if self.framing == BODY_LENGTH and self.left > lane.body_bytes:
            self._over("body_bytes", data, n, None)
            return n
        if lane.fast and self._fast(data, n, size):
            if self.phase == P_ADMISSION:
                return 0            # it is looked at once more
            self.asked = False
            return n
        self.asked = False
        self._slow(PyBytes_FromStringAndSize(<const char *> data, n), REQUEST.upgrade == UPGRADE_WEBSOCKET)
        return n

    @final
    cdef Py_ssize_t _hand_over(self, const uint8_t *data, Py_ssize_t n, Py_ssize_t size) except -1:
        """The connection is a gateway's from here on."""
        cdef bytes head = PyBytes_FromStringAndSize(<const char *> data, n)
        cdef bytes rest = PyBytes_FromStringAndSize(<const char *> data + n, size - n)
        transport = self.transport
        self._wait(T_NONE)
        self.phase = P_GONE
        self._count_out()
        self.client = None
        self.lane.stuck.pop(self, None)
        self.lane.connections.discard(self)
        self.transport = None
        self._write = None
        self.fd = -1
        self.tunnel(transport, head, rest)
        return size

    @final
    cdef Py_ssize_t _body(self, uint8_t *data, Py_ssize_t size) except -1:
        """What there is of the request's body; returns how much of `data` that was."""
        cdef Py_ssize_t at = 0
        cdef Py_ssize_t joined = 0
        cdef Py_ssize_t take
        cdef Span piece
        cdef int event
        if self.framing == BODY_LENGTH:
            take = size if <uint64_t> size < self.left else <Py_ssize_t> self.left
            self.left -= <uint64_t> take
            if self.left == 0:
                self.framing = BODY_NONE
            self._body_piece(data, take)
            return take
        while True:
            event = next_chunk(&self.chunked, data, size, &at, &piece)
            if event == CHUNK_DATA:
                # Join the pieces in place: a piece never begins before its own end in the joined row.
                if piece.at != joined:
                    memmove(data + joined, data + piece.at, piece.size)
                joined += piece.size
            elif event == CHUNK_TRAILER:
                continue        # nothing of it is passed on
            elif event == CHUNK_MORE:
                if joined:
                    self._body_piece(data, joined)
                return size
            elif event == CHUNK_END:
                self.framing = BODY_NONE
                self._body_piece(data, joined)
                return at
            else:
                self._bad_body(error_status(event), (<bytes> error_reason(event)).decode("ascii"))
                return size

    @final
    cdef int _body_piece(self, const uint8_t *data, Py_ssize_t size) except -1:
        """Some body bytes; the last ones when `framing` is BODY_NONE."""
        cdef bint last = self.framing == BODY_NONE
        cdef bytes piece
        self.received += <uint64_t> size
        if self.received > self.lane.body_bytes:
            return self._broken_off("body_bytes", 413)
        if self.phase == P_FAST:
            self._send(data, size, last)
            return 0
        self._wait(T_NONE if last or self.slow_blocked else T_BODY)
        piece = PyBytes_FromStringAndSize(<const char *> data, size)
        if self.reframed:
            if size:
                piece = b"%x\r\n%b\r\n" % (size, piece)
            if last:
                piece += b"0\r\n\r\n"
        self.feed(piece)
        if last and self.slow_answered and self.phase == P_SLOW:
            self._next()
        return 0

    @final
    cdef int _send(self, const uint8_t *data, Py_ssize_t size, bint last) except -1:
        if self.stream is None:
            return 0
        if not self.stream.send_raw(data, size, last) and not last:
            self.blocked = True
        if self.timer == T_UPGRADE:
            self._wait(T_UPGRADE)
        elif self.timer != T_HALF_CLOSED:
            self._wait_for_body(last)
        return 0

    @final
    cdef int _wait_for_body(self, bint last) except -1:
        """An upload may take as long as it likes, if it only moves: the visitor's turn, or the application's."""
        cdef bint answering = self.stream is not None and self.stream.answering
        if not last and not self.blocked:
            return self._wait(T_BODY)
        return self._wait(T_NONE if answering else T_ANSWER)

    @final
    cdef int _sync_reading(self) except -1:
        """Reading pauses for what cannot be handed on, and only for that."""
        cdef bint pause
        if self.phase == P_GONE or self.transport is None:
            return 0
        pause = (
            self.blocked
            or (self.slow_blocked and (self.phase == P_SLOW or self.phase == P_SLOW_OPAQUE))
            or self.held_size > HELD_MAX
            or (self.phase == P_HEAD and self.paused)
        )
        if pause != self.reading_paused:
            self.reading_paused = pause
            if pause:
                self.transport.pause_reading()
                if self.timer == T_BODY and self.phase == P_SLOW:
                    self._wait(T_NONE)
            else:
                if self.framing != BODY_NONE and (self.phase == P_FAST or self.phase == P_SLOW):
                    self._wait(T_BODY)      # the visitor's turn again
                self.lane.resume_reading(self.transport)
        return 0

    # -- the fast lane ---------------------------------------------------------------------------------------

    @final
    cdef bint _fast(self, const uint8_t *data, Py_ssize_t n, Py_ssize_t size) except -1:
        """Opens a stream for the request in REQUEST, if it may be one of the fast lane's, or asks admission about its
        cookie; else nothing has happened."""
        cdef Lane lane = self.lane
        cdef Fields *fields = &REQUEST.fields
        cdef Entry entry
        cdef Span secret
        cdef Span host
        cdef Session session
        cdef FastStream stream
        cdef Py_ssize_t inject
        cdef Py_ssize_t written
        cdef bint cookie = True
        cdef bint upgrade = REQUEST.upgrade == UPGRADE_WEBSOCKET
        cdef double now
        if data[REQUEST.target.at] != c"/":
            return False
        if REQUEST.method_id == M_OPTIONS and fields.present >> F_MAX_FORWARDS & 1:
            return False            # the relay counts
        if REQUEST.target.size >= 12 and memcmp(data + REQUEST.target.at, RESERVED_PATHS, 12) == 0:
            return False
        if fields.present >> F_AUTHORIZATION & 1 and find_bearer(
                data, fields, PyBytes_AS_STRING(lane.bearer), PyBytes_GET_SIZE(lane.bearer), &secret):
            cookie = False
        elif find_cookie(data, fields, SESSION_COOKIE, 16, &secret) != 1:
            return False
        host = fields.field[fields.first[F_HOST]].value
        entry = self._entry(data, secret, cookie)
        if entry is None:
            return cookie and not self.asked and self._ask(data, secret, host)
        if not span_equals(data, host, PyBytes_AS_STRING(entry.host), PyBytes_GET_SIZE(entry.host)):
            return False
        now = lane.now + lane.wall_offset
        if 0 <= entry.expires <= now:
            return False
        if cookie and not self._same_origin(data, entry):
            return False
        if entry.admitted is not None and not self._admitted(data, entry):
            return False
        if entry.load.streams >= lane.per_share:
            return self._over("streams_per_share", data, n, entry)
        if len(<set> entry.grant.streams) >= lane.per_session:
            return self._over("streams_per_session", data, n, entry)
        session = lane._pick(entry)
        if session is None:
            return False
        if now - entry.used >= USED_SECONDS or now < entry.used:
            entry.used = now
            lane.used(entry.grant, now)
        inject = self._inject(data, entry, now, host)
        if inject < 0 or not self._limits(entry):
            return False
        if self.trusted and self.client is not None and not self._counts():
            return self._over("connections_per_client", data, n, None)
        for name in entry.removed:
            mark_nominated(data, fields, <const uint8_t *> PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
        written = write_request_head(
            data, &REQUEST, REQUEST_OUT, INJECT, inject, PyBytes_AS_STRING(lane.bearer), PyBytes_GET_SIZE(lane.bearer))
        if written < 0:
            return False
        stream = FastStream.__new__(FastStream)
        stream.raw = <uint8_t *> PyMem_Malloc(n)
        if stream.raw == NULL:
            raise MemoryError
        memcpy(stream.raw, data, n)
        stream.raw_size = n
        try:
            session.open_raw(
                stream, <const unsigned char *> PyBytes_AS_STRING(entry.service.raw),
                PyBytes_GET_SIZE(entry.service.raw), True, REQUEST_OUT, written,
                self.framing == BODY_NONE and not upgrade)
        except StreamRefused:
            return False
        for bucket in entry.buckets:
            (<Bucket> bucket).level -= 1.0
        stream.started = self.asked_at if self.asked else lane.now
        stream.service = entry.service
        stream.grant_ = entry.grant
        if lane.logging:
            stream.begun = self._line(data, entry)
        stream.load = entry.load
        stream.load.streams += 1
        stream.connection = self
        if self.client is not None:
            stream.allow(self.client.windows)
        stream.upgrade = upgrade
        stream.to_head = REQUEST.method_id == M_HEAD
        stream.retryable = self.framing == BODY_NONE and not upgrade and (
            REQUEST.method_id == M_GET or REQUEST.method_id == M_HEAD or REQUEST.method_id == M_OPTIONS
            or REQUEST.method_id == M_PUT or REQUEST.method_id == M_DELETE)
        self.stream = stream
        self.phase = P_FAST
        self._wait(T_ANSWER if self.framing == BODY_NONE else T_BODY)
        stream.grant_.streams.add(stream)
        if REQUEST.expect_continue and self.framing != BODY_NONE and n == size:
            self._hand(CONTINUE)
        return True

    @final
    cdef bint _ask(self, const uint8_t *data, Span secret, Span host) except -1:
        """Whether admission is asked about a cookie that the fast lane does not know. The request waits meanwhile, not
        consumed; `admitted` goes on. Whom a trusted proxy speaks for, and what that one may have, aiohttp finds out."""
        cdef Lane lane = self.lane
        if self.trusted if self.named else self.trusts():
            return False
        share = lane.admit(
            self, PyBytes_FromStringAndSize(<const char *> data + host.at, host.size).decode("latin-1"),
            PyBytes_FromStringAndSize(<const char *> data + secret.at, secret.size).decode("latin-1"))
        if share is None:
            return False
        self._wait(T_NONE)
        self.phase = P_ADMISSION
        self.asked_at = lane.now
        if lane.logging:
            self.asking = lane._begun(
                lane.stranger(share), b"fast", self.address.encode("ascii", "replace"),
                data + REQUEST.method.at, REQUEST.method.size, data + REQUEST.target.at, REQUEST.target.size)
        return True

    def admitted(self):
        """Admission has answered: the request that waits is looked at again, by what the grant table has now."""
        if self.phase != P_ADMISSION:
            return
        self.asking = None
        self.asked = True
        self.phase = P_HEAD
        self.lane._check()
        self.lane.now = monotonic()
        try:
            self._go_on()
        except Exception:               # nobody else would ever look at it
            self._cut(CANCEL)
            raise

    @final
    cdef bint _over(self, str limit, const uint8_t *data, Py_ssize_t n, Entry entry) except -1:
        """A request that is not a malformed one is refused; True, as `_fast` returns it."""
        cdef bytes line = self._line(data, entry) if self.lane.logging and entry is not None else None
        cdef int status
        self._wait(T_NONE)
        status = self.limited(limit, PyBytes_FromStringAndSize(<const char *> data, n))
        if entry is not None:
            entry.service.classes[status // 100] += 1
        if line is not None:
            self.lane._ended(line, status, 0, 0, 0.0, True)
        return True

    @final
    cdef bytes _line(self, const uint8_t *data, Entry entry):
        """What the access log knows of the request in REQUEST already."""
        if entry.who is None:
            entry.who = self.lane.who(entry.grant)
        if self.logged_as is None:
            self.logged_as = self.address.encode("ascii", "replace")
        return self.lane._begun(
            entry.who, b"fast", self.logged_as, data + REQUEST.method.at, REQUEST.method.size,
            data + REQUEST.target.at, REQUEST.target.size)

    @final
    cdef bint _counts(self) except -1:
        """Whether the client may have one more open; then it has."""
        if not self.counted:
            if self.client.open >= self.lane.per_client:
                return False
            self._count_in()
        return True

    @final
    cdef void _count_in(self) noexcept:
        self.counted = True
        self.client.open += 1

    @final
    cdef void _count_out(self) noexcept:
        if self.counted:
            self.counted = False
            self.client.open -= 1

    def counts_for(self, Client client not None):
        """The request under way is of this client, says a trusted proxy. Whether it may have one more."""
        self.trusted = True
        self.named = False      # what is kept for the fast lane's next request is about another client
        if client is not self.client:
            self._count_out()
            self.client = client
        return self._counts()

    @final
    cdef Entry _entry(self, const uint8_t *data, Span secret, bint cookie):
        """The grant of this cookie or token. A connection mostly asks for the same one again."""
        cdef Entry entry = self.last
        if (entry is not None and entry.live and entry.cookie == cookie
                and PyBytes_GET_SIZE(entry.secret) == secret.size
                and memcmp(PyBytes_AS_STRING(entry.secret), data + secret.at, secret.size) == 0):
            return entry
        table = self.lane.cookies if cookie else self.lane.tokens
        found = table.get(PyBytes_FromStringAndSize(<const char *> data + secret.at, secret.size))
        if found is None:
            return None
        self.last = entry = <Entry?> found
        return entry if entry.live else None

    @final
    cdef bint _same_origin(self, const uint8_t *data, Entry entry) noexcept:
        """As relay.Relay._same_origin: shares of one domain are same-site, cookies alone prove nothing."""
        cdef Fields *fields = &REQUEST.fields
        cdef Span value
        if not fields.present >> F_UPGRADE & 1 and (
                REQUEST.method_id == M_GET or REQUEST.method_id == M_HEAD or REQUEST.method_id == M_OPTIONS):
            return True
        if fields.present >> F_ORIGIN & 1:
            value = fields.field[fields.first[F_ORIGIN]].value
            return not fields.repeated >> F_ORIGIN & 1 and span_equals(
                data, value, PyBytes_AS_STRING(entry.origin), PyBytes_GET_SIZE(entry.origin))
        if not fields.present >> F_SEC_FETCH_SITE & 1 or fields.repeated >> F_SEC_FETCH_SITE & 1:
            return False
        value = fields.field[fields.first[F_SEC_FETCH_SITE]].value
        return span_equals(data, value, "same-origin", 11) or span_equals(data, value, "none", 4)

    @final
    cdef bint _admitted(self, const uint8_t *data, Entry entry) except -1:
        """Whether the share's scope admits the request. The answer is remembered by method and path."""
        cdef const uint8_t *first = data + REQUEST.method.at
        cdef Py_ssize_t size = REQUEST.target.at + REQUEST.target.size - REQUEST.method.at
        cdef Py_ssize_t index = REQUEST.target.at - REQUEST.method.at
        cdef bytes key
        while index < size and first[index] != c"?":
            index += 1
        key = PyBytes_FromStringAndSize(<const char *> first, index)
        known = entry.admitted.get(key)
        if known is None:
            method, _, path = key.partition(b" ")
            known = self.lane.admits(entry.grant, method.decode("ascii"), path.decode("ascii"))
            if index <= ADMITTED_PATH:
                if len(entry.admitted) >= ADMITTED_MAX:
                    entry.admitted.clear()
                entry.admitted[key] = known
        return known

    @final
    cdef Py_ssize_t _inject(self, const uint8_t *data, Entry entry, double now, Span host) except -2:
        """Forwarded and identity fields, in INJECT; < 0: they do not fit."""
        cdef Fields *fields = &REQUEST.fields
        cdef bytes speaks_for = None
        cdef Py_ssize_t size = 0
        cdef uint32_t index
        if not self.named:
            self.trusted = self.trusts()
        if self.trusted and fields.present >> F_X_FORWARDED_FOR & 1:
            speaks_for = b""
            for index in range(fields.count):
                if fields.field[index].id == F_X_FORWARDED_FOR:
                    if speaks_for:
                        speaks_for += b","
                    speaks_for += PyBytes_FromStringAndSize(
                        <const char *> data + fields.field[index].value.at, fields.field[index].value.size)
        if not self.named or (self.trusted and speaks_for != self.speaks_for):
            self.forwarded, self.forwarded_end = self.forwarding(speaks_for)
            self.speaks_for = speaks_for
            self.named = True
            self.logged_as = None
            if self.trusted:
                self._count_out()
                self.client = self.speaker()
        if now >= entry.identity_until:
            entry.identity, entry.identity_until = self.lane.identity(entry.grant, now)
        if (PyBytes_GET_SIZE(self.forwarded) + PyBytes_GET_SIZE(self.forwarded_end) + 2 * host.size + 64
                + PyBytes_GET_SIZE(entry.identity) + PyBytes_GET_SIZE(entry.added) > INJECT_MAX):
            return -1
        size = _put(size, PyBytes_AS_STRING(self.forwarded), PyBytes_GET_SIZE(self.forwarded))
        size = _put(size, <const char *> data + host.at, host.size)
        size = _put(size, PyBytes_AS_STRING(self.forwarded_end), PyBytes_GET_SIZE(self.forwarded_end))
        size = _put(size, <const char *> data + host.at, host.size)
        size = _put(size, "\"\r\nVia: 1.1 guestpass\r\n", 23)
        size = _put(size, PyBytes_AS_STRING(entry.identity), PyBytes_GET_SIZE(entry.identity))
        return _put(size, PyBytes_AS_STRING(entry.added), PyBytes_GET_SIZE(entry.added))

    @final
    cdef bint _limits(self, Entry entry) except -1:
        """Whether the filters' limits on clients and rates admit the request; the relay says no in words. The client's
        address is looked at once for a connection. Tokens are taken when the stream is open."""
        if entry.networks and not (self.inside is entry and self.inside_as is self.forwarded):
            if not self.within(entry.grant, self.speaks_for):
                return False
            self.inside, self.inside_as = entry, self.forwarded
        for bucket in entry.buckets:
            if not (<Bucket> bucket).has(self.lane.now):
                return False
        return True

    @final
    cdef int _opaque(self) except -1:
        """101 was received: from here on bytes are bytes, those that came behind the request first."""
        self.phase = P_OPAQUE
        self._wait(T_UPGRADE)
        return self._go_on()

    # -- out -------------------------------------------------------------------------------------------------

    @final
    cdef int _give(self, const uint8_t *data, Py_ssize_t size, bint chunked, bint last) except -1:
        """Body bytes to the visitor, behind the head that waits, framed."""
        cdef Lane lane = self.lane
        cdef uint8_t[32] line
        cdef Py_ssize_t head = lane.head_size if lane.head_for is self else 0
        cdef Py_ssize_t line_size = 0
        cdef Py_ssize_t total
        cdef Py_ssize_t sent = 0
        cdef iovec[4] pieces
        cdef int count
        cdef bint now
        cdef bytes out
        cdef char *to
        if chunked and size:
            line_size = _digits(line, <uint64_t> size, 16)
            memcpy(line + line_size, b"\r\n", 2)
            line_size += 2
        total = head + line_size + size + (2 if line_size else 0) + (5 if chunked and last else 0)
        if total:
            self.unconsumed += <uint64_t> size
            if head:
                lane.head_for = None
            if line_size:
                memcpy(line + line_size, "\r\n0\r\n\r\n", 7)
            else:
                memcpy(line, "0\r\n\r\n", 5)
            now = last or (self.phase == P_OPAQUE and size <= SMALL)
            if now and self.queue is None and self._direct():
                # HEAD_OUT, line, data, and what ends a chunk and the chunks.
                count = _piece(pieces, 0, HEAD_OUT, head)
                count = _piece(pieces, count, line, line_size)
                count = _piece(pieces, count, data, size)
                count = _piece(
                    pieces, count, line + line_size, (2 if line_size else 0) + (5 if chunked and last else 0))
                sent = gp_send(self.fd, pieces, count)
                if sent == total:
                    return self._credit()
            out = PyBytes_FromStringAndSize(NULL, total)
            to = PyBytes_AS_STRING(out)
            memcpy(to, HEAD_OUT, head)
            to += head
            memcpy(to, line, line_size)
            to += line_size
            if size:
                memcpy(to, data, size)
            to += size
            if line_size or (chunked and last):
                memcpy(to, line + line_size, (2 if line_size else 0) + (5 if chunked and last else 0))
            if now and self.queue is None:
                return self._spill(out[sent:] if sent > 0 else out)
            self._enqueue(out)
        if last or self.queued > QUEUE_MAX:
            return self._flush()
        if not self.dirty:
            lane._flush_soon(self)
        return 0

    @final
    cdef int _enqueue(self, bytes out) except -1:
        if self.queue is None:
            self.queue = [out]
        else:
            self.queue.append(out)
        self.queued += PyBytes_GET_SIZE(out)
        return 0

    @final
    cdef int _flush(self) except -1:
        """Everything that waits, to the transport."""
        cdef list queue
        if self.lane.head_for is self:
            self.dirty = True           # not to be told of it again
            self.lane._give_head()
        self.dirty = False
        queue = self.queue
        if queue is None:
            return 0
        self.queue = None
        self.queued = 0
        if self.phase == P_GONE:
            return 0
        return self._hand(queue[0] if len(queue) == 1 else queue)

    @final
    cdef bint _direct(self) except -1:
        """Whether the kernel may be given output at once: nothing waits in the transport."""
        if self.fd < 0 or self.phase == P_GONE:
            return False
        if self.spilled:
            self.spilled = self.transport.get_write_buffer_size() != 0 or self.transport.is_closing()
        return not self.spilled

    @final
    cdef int _hand(self, out) except -1:
        """To the kernel, or to the transport: bytes, or a list of them."""
        cdef iovec[PIECES] pieces
        cdef Py_ssize_t sent
        cdef int count = 0
        if self._direct() and (type(out) is bytes or len(<list> out) <= PIECES):
            if type(out) is bytes:
                out = [out]
            for piece in <list> out:
                count = _piece(pieces, count, PyBytes_AS_STRING(<bytes> piece), PyBytes_GET_SIZE(<bytes> piece))
            sent = gp_send(self.fd, pieces, count)
            while sent > 0 and out:
                if sent < PyBytes_GET_SIZE(<bytes> out[0]):
                    out[0] = out[0][sent:]
                    break
                sent -= PyBytes_GET_SIZE(<bytes> out.pop(0))
            if not out:
                return self._credit()
        return self._spill(out)

    @final
    cdef int _spill(self, out) except -1:
        """To the transport."""
        self.spilled = True
        try:
            if type(out) is bytes:
                self._write(out)
            else:
                self.transport.writelines(out)
        except RuntimeError:            # uvloop's, when the socket has failed and nobody was told yet
            self._drop_stream(CANCEL)
            self._gone()
            return 0
        return self._credit()

    @final
    cdef int _credit(self) except -1:
        cdef uint64_t size = self.unconsumed
        if self.paused or size == 0:
            return 0
        self.unconsumed = 0
        self.kept = None
        if self.stream is not None:
            self.stream.consumed(size)
        return 0

    @final
    cdef int _answered(self, bint keep_alive) except -1:
        """The fast lane's answer is complete."""
        self.blocked = False
        if keep_alive:
            return self._next()
        return self._finish()

    @final
    cdef int _next(self) except -1:
        self.phase = P_HEAD
        self.slow_answered = False
        if self.trusted:
            self._count_out()               # the proxy's connection is nobody's between two requests
        self._wait(T_IDLE)
        return self._go_on()

    @final
    cdef int _finish(self) except -1:
        """Close when what was written has left. A visitor that is still sending is heard out for a moment: closing a
        socket that has unread bytes resets it, and the answer may be lost on the way."""
        cdef bint whole = self.framing == BODY_NONE and self.held_size == 0 and not self.busy
        self._flush()
        if self.phase == P_GONE:
            return 0
        self.phase = P_LINGER
        self.blocked = False
        self.held_size = 0
        if whole or self.secure or not self.transport.can_write_eof():
            self._wait(T_NONE)
            self._close_when_sent(SENT_FIRST)
            return 0
        self._wait(T_LINGER)
        self.transport.write_eof()
        return self._sync_reading()

    @final
    cdef int _watch(self) except -1:
        """The visitor has to take something of what was written within the limit."""
        if self not in self.lane.stuck:
            self.lane.stuck[self] = None
            self.acked = None
        return 0

    @final
    cdef bint _look(self, double now) except -1:
        """Whether it was cut, because the visitor took nothing for too long."""
        if self.transport is None or not (self.paused or self.lane.unsent(self.transport)):
            self.lane.stuck.pop(self, None)
            return False
        acked = self.lane.acknowledged(self.transport)
        if acked != self.acked:
            self.acked = acked
            self.acked_at = now
        elif now - self.acked_at >= self.lane.write_seconds:
            self.lane.stuck.pop(self, None)
            self.limited("write_progress_seconds", None)
            return True
        return False

    def _close_when_sent(self, double pause):
        """A closed socket cannot be reset any more: a revocation would come too late for what its kernel has."""
        if self.transport is None or self.phase == P_GONE:
            return
        if self.tail is None or not self.lane.unsent(self.transport):
            self.transport.close()
        else:
            self._watch()
            self.lane.loop.call_later(pause, self._close_when_sent, min(2 * pause, SENT_POLL))

    @final
    cdef int _leave_tail(self, grant) except -1:
        cdef FastTail tail = self.tail
        if tail is not None:
            if tail.grant is grant:
                return 0
            self._forget_tail()
        tail = FastTail.__new__(FastTail)
        tail.connection = self
        tail.grant = grant
        self.tail = tail
        grant.tails[self.transport] = tail
        self.lane.tails.add(tail)
        return 0

    @final
    cdef int _forget_tail(self) except -1:
        cdef FastTail tail = self.tail
        if tail is None:
            return 0
        self.tail = None
        self.lane.tails.discard(tail)
        if tail.grant.tails.get(self.transport) is tail:
            del tail.grant.tails[self.transport]
        return 0

    @final
    cdef int _cut(self, uint32_t code) except -1:
        """The end, now: whoever waits for the rest of an answer sees that it broke off."""
        self._drop_stream(code)
        if self.phase == P_GONE and self.transport is None:
            return 0
        self._gone()
        if self.transport is not None:
            self.transport.abort()
        return 0

    @final
    cdef int _revoked(self) except -1:
        self._gone()
        if self.transport is not None:
            self.lane.abort_now(self.transport)
        return 0

    @final
    cdef int _gone(self) except -1:
        if self.asking is not None:
            self.lane.now = monotonic()
            self.lane._ended(self.asking, VISITOR_WENT, 0, 0, self.lane.now - self.asked_at, False)
            self.asking = None
        self._wait(T_NONE)
        self.phase = P_GONE
        self.queue = None
        if self.lane.head_for is self:
            self.lane.head_for = None
        return 0

    @final
    cdef int _drop_stream(self, uint32_t code) except -1:
        cdef FastStream stream = self.stream
        if stream is None:
            return 0
        stream._detach()
        stream.abandon(code)
        return 0

    @final
    cdef int _failed(self, bytes raw, uint32_t code, bint again, grant) except -1:
        """The stream was reset before an answer. What has had no effect anywhere goes to the relay, which knows how to
        try again."""
        self._wait(T_NONE)
        self.blocked = False
        if again:
            self._slow(raw, False)
        else:
            self.failed(raw, code, grant)
        return self._go_on()

    @final
    cdef int _spoiled(self, bytes raw, str reason, grant) except -1:
        self._wait(T_NONE)
        self.blocked = False
        self.bad_answer(raw, reason, grant)
        return self._go_on()

    @final
    cdef int _bad_body(self, int status, str reason) except -1:
        """The request's body is malformed: its end cannot be known."""
        cdef bint answering = self.stream is not None and self.stream.answering
        if self.phase == P_FAST:
            if self.stream is not None and not answering:
                self.stream.status = status
                self.stream.whole = True
            self._drop_stream(CANCEL)
            if answering:
                return self._cut(CANCEL)
            self._wait(T_NONE)
            self.refused(status, reason)
        else:
            self.bad_body(status, reason)
        return 0

    @final
    cdef int _broken_off(self, str limit, int status) except -1:
        """Nothing more of the request's body is taken, in either lane."""
        cdef FastStream stream = self.stream
        self._wait(T_NONE)
        self.blocked = False
        if stream is None:
            self.limited(limit, b"" if self.phase == P_SLOW else None)
        elif stream.answering:
            self.limited(limit, None)
        else:
            stream._count(status)
            self._drop_stream(CANCEL)
            self.limited(limit, b"")
        return 0

    @final
    cdef int _expired(self, int kind) except -1:
        cdef FastStream stream = self.stream
        cdef bytes raw
        if kind == T_HEAD and self.held_size:
            self.minor = 1
            self.framing = BODY_NONE
            self.limited("head_seconds", b"")
            return 0
        if kind == T_BODY:
            return self._broken_off("body_progress_seconds", 408)
        if kind == T_UPGRADE:
            self.limited("upgrade_idle_seconds", None)
            return 0
        if kind == T_ANSWER and stream is not None:
            self.noted("answer_seconds")
            raw = PyBytes_FromStringAndSize(<const char *> stream.raw, stream.raw_size)
            stream._count(504)
            stream._detach()
            stream.abandon(TIMEOUT)
            return self._failed(raw, TIMEOUT, False, stream.grant_)
        if kind == T_IDLE and self.lane.unsent(self.transport):
            self._watch()                       # it is still reading the last answer
            return self._wait(T_IDLE)
        if kind == T_IDLE:
            self._gone()
            self.transport.close()
            return 0
        if kind == T_LINGER:
            if self.lane.unsent(self.transport):
                self._watch()
                return self._wait(T_LINGER)     # a slow reader
            self.transport.close()
            return 0
        return self._cut(CANCEL)

    # -- the slow lane; called by front.py -------------------------------------------------------------------

    @final
    cdef int _slow(self, bytes head, bint upgrade) except -1:
        self._wait(T_NONE)
        self.phase = P_SLOW
        self.spilled = True             # aiohttp writes to the transport
        self.slow_answered = False
        self.reframed = self.framing == BODY_CHUNKED
        if self.framing != BODY_NONE:
            self._wait(T_BODY)
        self.begin(head, upgrade)
        return 0

    def respond(self, bytes answer not None, bint keep_alive):
        """A whole answer that was made here: nothing of another one is under way. `keep_alive`: what it says."""
        self._enqueue(answer)
        self._flush()
        if self.phase == P_GONE:
            return
        if keep_alive:
            self._next()
        else:
            self._finish()

    @property
    def may_keep_alive(self):
        """Whether the visitor wants the connection to stay, and the request has ended."""
        return self.keep_alive and self.framing == BODY_NONE

    @property
    def http11(self):
        return self.minor >= 1

    def slow_done(self):
        """aiohttp's answer was written to its end, and the connection stays."""
        if self.phase != P_SLOW:
            return
        self.slow_answered = True
        if self.framing == BODY_NONE:
            self._next()

    def slow_upgraded(self):
        """aiohttp has written a 101: what was held behind the request may go to the handler."""
        if self.phase == P_SLOW:
            self.phase = P_SLOW_OPAQUE
            self._wait(T_UPGRADE)
            self._go_on()

    def slow_moved(self):
        """aiohttp has written something."""
        if self.timer == T_UPGRADE:
            self.lane.now = monotonic()
            self._wait(T_UPGRADE)

    def slow_finished(self):
        """aiohttp closes the connection when what it wrote has left."""
        if self.phase == P_SLOW or self.phase == P_SLOW_OPAQUE:
            self._finish()

    def slow_reading(self, bint wanted):
        self.slow_blocked = not wanted
        self._sync_reading()

    def cut(self):
        """Nothing more is written or read."""
        self._cut(CANCEL)

    def cut_now(self):
        """As `cut`, and what the kernel has queued for the visitor is thrown away as well."""
        self._drop_stream(CANCEL)
        self._revoked()

    @property
    def slow(self):
        """A request is with aiohttp."""
        return self.phase == P_SLOW or self.phase == P_SLOW_OPAQUE

    # -- time ------------------------------------------------------------------------------------------------

    @final
    cdef void _unlink(self) noexcept:
        cdef TimerList *timers = &self.lane.timers[self.timer]
        if self.timer_prev != NULL:
            (<Connection> self.timer_prev).timer_next = self.timer_next
        else:
            timers.first = self.timer_next
        if self.timer_next != NULL:
            (<Connection> self.timer_next).timer_prev = self.timer_prev
        else:
            timers.last = self.timer_prev
        self.timer_prev = NULL
        self.timer_next = NULL
        self.timer = T_NONE

    @final
    cdef int _wait(self, uint8_t kind) except -1:
        """From now on `kind` is what the connection waits for."""
        cdef TimerList *timers
        if self.timer != T_NONE:
            self._unlink()
        if kind == T_NONE:
            return 0
        timers = &self.lane.timers[kind]
        self.due = self.lane.now + timers.seconds
        self.timer = kind
        self.timer_prev = timers.last
        self.timer_next = NULL
        if timers.last != NULL:
            (<Connection> timers.last).timer_next = <PyObject *> self
        else:
            timers.first = <PyObject *> self
        timers.last = <PyObject *> self
        return 0


cdef Py_ssize_t _digits(uint8_t *out, uint64_t number, uint64_t base) noexcept:
    """`number` in lower-case digits; how many. `out` has room for 20."""
    cdef uint8_t[20] reverse
    cdef Py_ssize_t size = 0
    cdef Py_ssize_t index
    while True:
        reverse[size] = <uint8_t> (number % base)
        reverse[size] += c"0" if reverse[size] < 10 else c"a" - 10
        size += 1
        number = number // base
        if number == 0:
            break
    for index in range(size):
        out[index] = reverse[size - 1 - index]
    return size


cdef inline bint _asks_head(const uint8_t *data, Py_ssize_t size) noexcept:
    """Whether a request that the scanner refused is of a method whose answers have no body."""
    cdef Py_ssize_t at = 2 if size >= 2 and data[0] == c"\r" and data[1] == c"\n" else 0
    return size - at >= 5 and memcmp(data + at, b"HEAD ", 5) == 0


cdef inline Py_ssize_t _text(uint8_t *out, Py_ssize_t at, bytes text) noexcept:
    memcpy(out + at, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    return at + PyBytes_GET_SIZE(text)


cdef Py_ssize_t _fraction(uint8_t *out, Py_ssize_t at, uint64_t number, int places) noexcept:
    """A point and `number` in so many digits."""
    cdef int place = places
    out[at] = c"."
    while place:
        out[at + place] = c"0" + number % 10
        number = number // 10
        place -= 1
    return at + 1 + places


cdef inline int _piece(iovec *pieces, int count, const void *data, Py_ssize_t size) noexcept:
    if size == 0:
        return count
    pieces[count].iov_base = <void *> data
    pieces[count].iov_len = <size_t> size
    return count + 1


cdef inline Py_ssize_t _put(Py_ssize_t at, const char *data, Py_ssize_t size) noexcept:
    memcpy(INJECT + at, data, size)
    return at + size
