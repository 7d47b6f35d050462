# C interface of the strict HTTP/1.1 scanner (RFC 9112). Theory of operation: http1.pyx.
#
# +----------------------------------------------------------------------------------------------------------+
# | Spans are offsets into the `data` that a head was scanned from: they are good for as long as those bytes |
# | are, wherever they lie. A head is scratch: one RequestHead and one ResponseHead serve a whole worker, a  |
# | connection keeps only `searched` (4 bytes). What must outlive the call is copied by the caller.          |
# +----------------------------------------------------------------------------------------------------------+
#
# Typical use, with `data` from the first byte of a head (`searched` is 0 there):
#
#     n = scan_request(data, size, &head, &self.searched, 0)
#     if n == 0:    keep the bytes, read more, call again with all of them
#     elif n < 0:   answer error_status(n), error_reason(n), Connection: close; the connection is over
#     else:         the head is data[0:n]; the body, as head.framing says, begins at data[n]; searched is 0 again

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    MAX_HEAD = 32768            # as frames.pxd: a head of more would not fit the tunnel
    HEAD_RESERVE = 2048         # … of which so much is left for what the edge injects
    MAX_LINE = 16384            # one line of a visitor's request: MAX_LINE of edge/app.py
    MAX_FIELDS = 128
    MAX_NOMINATED = 128         # elements of all Connection fields: more cannot name anything
    MAX_CHUNK_DIGITS = 15       # 2^60 - 1 bytes; a 16th digit could overflow somebody's signed 64 bits
    MAX_CHUNK_LINE = 256        # size and extensions of one chunk
    MAX_EXTENSIONS = 16384      # of all chunks of a body (Node's limit after CVE-2024-22019)
    MAX_TRAILERS = 8192
    MAX_TRAILER_FIELDS = 64
    NO_FIELD = 255              # in `first`: there is no such field

# Names that mean something to the edge or the gateway. Any other name is F_OTHER.
cdef enum:      # FieldId
    F_OTHER
    F_HOST
    F_CONNECTION
    F_CONTENT_LENGTH
    F_TRANSFER_ENCODING
    F_EXPECT
    F_UPGRADE
    F_COOKIE
    F_AUTHORIZATION
    F_ORIGIN
    F_REFERER
    F_SEC_FETCH_SITE
    F_X_FORWARDED_FOR
    F_X_FORWARDED_PROTO
    F_X_FORWARDED_HOST
    F_KEEP_ALIVE
    F_PROXY_CONNECTION
    F_PROXY_AUTHENTICATE
    F_PROXY_AUTHORIZATION
    F_PROXY_AUTHENTICATION_INFO
    F_TE
    F_TRAILER
    F_CONTENT_TYPE
    F_CONTENT_RANGE
    F_CONTENT_LOCATION
    F_ETAG
    F_SERVER
    F_USER_AGENT
    F_MAX_FORWARDS
    F_SEC_WEBSOCKET_KEY1
    F_SEC_WEBSOCKET_PROTOCOL
    F_ACCEPT
    F_DATE
    F_LOCATION
    F_SET_COOKIE
    F_CACHE_CONTROL
    F_ALT_SVC
    F_NEL
    F_REPORT_TO
    F_REPORTING_ENDPOINTS
    F_STRICT_TRANSPORT_SECURITY
    F_SERVICE_WORKER_ALLOWED
    F_PUBLIC_KEY_PINS
    F_EXPECT_CT
    F_CLEAR_SITE_DATA
    F_REFRESH
    N_FIELD_IDS

cdef enum:      # MethodId: CONNECT and TRACE are refused, what llhttp does not know is 501
    M_GET
    M_HEAD
    M_POST
    M_PUT
    M_DELETE
    M_OPTIONS
    M_PATCH
    M_OTHER

cdef enum:      # Framing
    BODY_NONE
    BODY_LENGTH             # content_length bytes, at least 1
    BODY_CHUNKED
    BODY_UNTIL_CLOSE        # responses only

cdef enum:      # UpgradeTo
    UPGRADE_NONE
    UPGRADE_WEBSOCKET       # `Upgrade: websocket` and Connection names it; in a GET of HTTP/1.1 without a body
    UPGRADE_OTHER           # some other protocol: RFC 9110, 7.8 lets us ignore it, and we do

# Why a field does not pass on, and what the scanner saw of its line.
cdef enum:      # FieldFlag
    HOP_BY_HOP = 1          # by name, as HOP_BY_HOP of edge/headers.py
    NOMINATED = 2           # Connection names it
    RESERVED = 4            # request: an application might believe it; response: X-Guestpass-*. Folded names
    DROPPED = 8             # response: DROPPED_FROM_RESPONSES of edge/headers.py
    PLAIN = 16              # the line is exactly `name: value\r\n`, so it can be copied as it is

cdef enum:      # ScanOption
    FROM_EDGE = 1           # request at the gateway: the reserve was used already, Transfer-Encoding is refused
    TO_HEAD = 2             # response: the request was HEAD
    FROM_GATEWAY = 4        # response at the edge: HTTP/1.1 only; the stream's end ends a body without a length

cdef struct Span:
    uint32_t at
    uint32_t size

cdef struct Field:
    Span name
    Span value              # without white space around it
    uint8_t id              # FieldId
    uint8_t flags           # FieldFlag

cdef struct Fields:
    uint64_t present        # bit per FieldId
    uint64_t repeated       # … that came more than once
    uint32_t total          # len(name) + len(value) + 4 of all
    uint32_t count
    uint8_t[N_FIELD_IDS] first      # index of the first field of an id, or NO_FIELD
    Field[MAX_FIELDS] field

cdef struct RequestHead:
    uint32_t size           # of the head with its empty line: where the body begins
    Span method
    Span target
    uint8_t method_id
    uint8_t minor           # HTTP/1.minor
    uint8_t framing         # Framing
    uint8_t upgrade         # UpgradeTo
    bint keep_alive
    bint expect_continue    # never with HTTP/1.0
    uint64_t content_length     # with BODY_LENGTH; 0 otherwise
    Fields fields

cdef struct ResponseHead:
    uint32_t size
    uint16_t status
    bint has_reason         # `HTTP/1.1 200` may stand alone; the reason is then the standard one
    Span reason
    uint8_t minor
    uint8_t framing
    uint8_t upgrade         # of a 101: what it changes to
    bint keep_alive         # False with BODY_UNTIL_CLOSE
    bint has_length         # Content-Length was there, as also an answer to HEAD or a 304 has it
    uint64_t content_length
    Fields fields


cdef inline bint has(const Fields *fields, int number) noexcept nogil:
    return fields.present >> number & 1


cdef inline bint is_repeated(const Fields *fields, int number) noexcept nogil:
    return fields.repeated >> number & 1


cdef inline Span value_of(const Fields *fields, int number) noexcept nogil:
    """Of the first field of a FieldId that is there."""
    return fields.field[fields.first[number]].value


# ------------------------------------------------------------------------------------------------------------
# Scanning. > 0: complete, so many bytes; 0: more is needed; < 0: an Error.

cdef enum:      # Error
    E_REQUEST_LINE = -1
    E_METHOD_REFUSED = -2       # CONNECT, TRACE
    E_METHOD_UNKNOWN = -3
    E_TARGET = -4
    E_VERSION = -5
    E_TOO_LARGE = -6
    E_LINE_END = -7
    E_FIELD = -8
    E_HOST = -9
    E_LENGTH = -10
    E_CODING = -11
    E_EXPECT_REPEATED = -12
    E_EXPECT_UNKNOWN = -13
    E_REPEATED = -14
    E_CONNECTION = -15
    E_UPGRADE = -16
    E_OLD_WEBSOCKET = -17
    E_STATUS_LINE = -18
    E_BODILESS = -19
    E_CHUNK_SIZE = -20
    E_CHUNK_EXTENSION = -21
    E_CHUNK_END = -22
    E_TRAILER = -23
    E_TARGET_TOO_LONG = -24
    N_ERRORS = 25

# `searched` belongs to the connection: 0 when a head begins, and again when this has returned other than 0.
cdef int scan_request(
    const uint8_t *data, Py_ssize_t size, RequestHead *head, uint32_t *searched, unsigned options
) noexcept nogil
cdef int scan_response(
    const uint8_t *data, Py_ssize_t size, ResponseHead *head, uint32_t *searched, unsigned options
) noexcept nogil

cdef int error_status(int error) noexcept nogil             # what to tell a visitor; for a response always 502
cdef const char *error_reason(int error) noexcept nogil     # one English clause, NUL-terminated

# ------------------------------------------------------------------------------------------------------------
# Chunked bodies. Zero a Chunked (memset) when a body begins, then set `response` if it is one's; 56 bytes.

cdef enum:      # ChunkEvent
    CHUNK_MORE          # everything is used up, the body goes on
    CHUNK_DATA          # `piece` is body
    CHUNK_TRAILER       # `piece` is a part of the trailer section as it came (checked; lines end in CRLF, the last
    #                     piece holds the empty line): append it to a buffer of MAX_TRAILERS, or ignore it
    CHUNK_END           # the body has ended at `at`; the next message begins there

cdef struct Chunked:
    uint64_t left           # of the chunk
    uint32_t extensions     # bytes so far, all chunks
    uint16_t line           # bytes of the current size line or of the trailer section
    uint8_t state
    uint8_t digits
    uint8_t fields
    uint8_t response        # an ETag and the like are taken as trailers
    uint8_t name_size
    uint8_t[32] name        # of the trailer field that is being read, lower case

# One event; call again until CHUNK_MORE or CHUNK_END. `at` moves on; `piece` is an offset into data. < 0: an Error.
cdef int next_chunk(
    Chunked *body, const uint8_t *data, Py_ssize_t size, Py_ssize_t *at, Span *piece
) noexcept nogil

# ------------------------------------------------------------------------------------------------------------
# What edge/headers.py does, with the same results. `prefix` and `name` are C strings of the given size.

cdef bint span_is(const uint8_t *data, Span span, const char *lower, Py_ssize_t size) noexcept nogil    # any case
cdef bint span_equals(const uint8_t *data, Span span, const char *exact, Py_ssize_t size) noexcept nogil
cdef bint is_reserved(const uint8_t *name, Py_ssize_t size) noexcept nogil
cdef bint is_reserved_in_response(const uint8_t *name, Py_ssize_t size) noexcept nogil

# How often the cookie of exactly this name came; `value` is that of the last. Only 1 is a session: with 2, a sibling
# origin may have tossed one in.
cdef int find_cookie(
    const uint8_t *data, const Fields *fields, const char *name, Py_ssize_t size, Span *value
) noexcept nogil

# Whether the one and only Authorization is a bearer token that begins with `prefix` (lower case).
cdef bint find_bearer(
    const uint8_t *data, const Fields *fields, const char *prefix, Py_ssize_t size, Span *token
) noexcept nogil

# These write a field's value without what is ours and return its size; `out` has room for 2 × value.size.
cdef Py_ssize_t write_cookie(const uint8_t *data, Span value, uint8_t *out) noexcept nogil          # 0: drop
cdef Py_ssize_t write_set_cookie(const uint8_t *data, Span value, uint8_t *out) noexcept nogil      # -1: drop
# All Cache-Control fields as one that no shared cache may store; room for 2 × MAX_HEAD.
cdef Py_ssize_t write_cache_control(const uint8_t *data, const Fields *fields, uint8_t *out) noexcept nogil

# Drops the fields of this name, in any case, from the head that is written.
cdef void mark_nominated(const uint8_t *data, Fields *fields, const uint8_t *name, Py_ssize_t size) noexcept nogil

# The head that goes into OPEN, as headers.request_head: bytes written (≤ MAX_HEAD), or E_TOO_LARGE. `inject` are
# complete lines. `out` has room for WRITE_ROOM bytes.
cdef enum:
    WRITE_ROOM = 2 * MAX_HEAD + 1024

cdef Py_ssize_t write_request_head(
    const uint8_t *data, const RequestHead *head, uint8_t *out,
    const uint8_t *inject, Py_ssize_t inject_size, const char *bearer, Py_ssize_t bearer_size,
) noexcept nogil

# The head for the visitor, as headers.parse_response and headers.response_head: without framing, Connection and the
# empty line, which the caller appends (it knows them last). Interim heads need only the empty line.
cdef Py_ssize_t write_response_head(const uint8_t *data, const ResponseHead *head, uint8_t *out) noexcept nogil
