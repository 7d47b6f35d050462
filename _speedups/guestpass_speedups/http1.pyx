r"""Strict scanner for HTTP/1.1 (RFC 9112): heads of requests and responses, chunked bodies. Sans-I/O.

Theory of operation
===================

A head is scanned in one pass over the caller's bytes, into a scratch struct of offsets. Nothing is allocated, no
Python object is made, nothing is copied:

    data    GET /x HTTP/1.1\r\nHost: a.b\r\nX-Y:  z \r\n\r\n
            ^^^ ^^             ^^^^  ^^^  ^^^   ^
    head    method, target     field[0]   field[1]          size, framing, keep_alive, …

**Strict means: nothing that two parsers could read differently.** One CRLF per line, names are tokens with the colon
right behind, no folding, no control characters, one Host, one Content-Length in its shortest form or one
`Transfer-Encoding: chunked`, never both. What is refused has an error with the status to answer; the connection is
over then, because nobody knows where the next message begins. The scanner stands before *both* lanes of the edge, so
what it accepts must also be what llhttp accepts and understands in the same way
(tests/speedups/test_http1_differential.py). That is why methods that llhttp does not know are 501, why some fields may
not be repeated in a request (aiohttp refuses them), and why a tab in Connection is refused (llhttp does not take it for
white space).

**Partial heads.** A head that is not complete yet returns 0 and leaves in `searched` how far no empty line was found.
The next call looks only at what is new, for an empty line; when it is there, or the limit is reached, the head is
scanned from its beginning. So a head that comes byte by byte costs two scans and one search, and a connection that
waits for the rest of a head holds four bytes of state. What was wrong in the first bytes is refused with the first
bytes.

**Known names** are found by their length, then compared in words of eight bytes; `first` then answers "which field is
Host" without a search. Each field carries flags that say whether it passes on: hop-by-hop, named by Connection,
reserved, dropped. `write_request_head` and `write_response_head` copy what passes in runs of lines that are already
in the form they would be written in (PLAIN), as `headers.request_head` and `headers.response_head` of the edge do.

**Chunked bodies** are decoded by a state machine that takes input of any size; body bytes are never touched, only
their place is told.
"""

from http import HTTPStatus

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memchr, memcmp, memcpy, memset

cdef extern from *:
    # Eight bytes at a time where the compiler and the byte order allow it; the loops after are for the rest, and for
    # all of it elsewhere. The subtraction borrows only out of a byte that is a hit itself, so the lowest hit is one.
    """
    #include <stdint.h>
    #include <string.h>
    #if defined(__GNUC__) && defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    #define GP_WORDS 1
    #define GP_EACH(byte) (0x0101010101010101ULL * (byte))
    #endif

    /* The first byte that is a control character (a tab is one) or DEL; `end` if there is none. */
    static inline const uint8_t *gp_find_control(const uint8_t *p, const uint8_t *end) {
    #ifdef GP_WORDS
        while (end - p >= 8) {
            uint64_t word, del, hit;
            memcpy(&word, p, 8);
            del = word ^ GP_EACH(0x7f);
            hit = (((word - GP_EACH(0x20)) & ~word) | ((del - GP_EACH(0x01)) & ~del)) & GP_EACH(0x80);
            if (hit)
                return p + (__builtin_ctzll(hit) >> 3);
            p += 8;
        }
    #endif
        while (p < end && *p >= 0x20 && *p != 0x7f)
            p++;
        return p;
    }

    /* Whether a token equals `lower`, which has only letters, digits and "-": no other byte of a token becomes one of
       these with bit 5 set. */
    static inline int gp_same_name(const uint8_t *p, const uint8_t *lower, size_t size) {
        size_t i = 0;
    #ifdef GP_WORDS
        for (; i + 8 <= size; i += 8) {
            uint64_t a, b;
            memcpy(&a, p + i, 8);
            memcpy(&b, lower + i, 8);
            if ((a | GP_EACH(0x20)) != b)
                return 0;
        }
    #endif
        for (; i < size; i++)
            if ((p[i] | 0x20) != lower[i])
                return 0;
        return 1;
    }
    """
    const uint8_t *gp_find_control(const uint8_t *p, const uint8_t *end) noexcept nogil
    bint gp_same_name(const uint8_t *p, const uint8_t *lower, size_t size) noexcept nogil

# ------------------------------------------------------------------------------------------------------------
# Tables, filled at import. Bytes by what they may be part of:

cdef enum:
    IN_TOKEN = 1
    IN_TARGET = 2       # visible ASCII but "#": a fragment is never sent
    IN_VALUE = 4        # field value and reason: tab, visible ASCII, space, obs-text
    IN_QUOTED = 8       # inside a quoted string of a chunk extension, but for '"' and the backslash
    IN_HOST = 16        # letters, digits, "-" and "."
    IS_ALNUM = 32

cdef enum:
    TAB = 0x09
    LF = 0x0A
    CR = 0x0D
    SP = 0x20
    LONGEST_NAME = 32
    LONGEST_METHOD = 16
    N_RESERVED = 29
    N_RESERVED_PREFIXES = 14

cdef uint8_t[256] CLASS
cdef uint8_t[256] LOWER
cdef uint8_t[256] FOLD          # lower case with every non-alphanumeric as "-"
cdef uint8_t[256] DIGIT         # value of a hexadecimal digit; 255 for other bytes

# The order is the one of FieldId.
_NAMES = (
    b"", b"host", b"connection", b"content-length", b"transfer-encoding", b"expect", b"upgrade", b"cookie",
    b"authorization", b"origin", b"referer", b"sec-fetch-site", b"x-forwarded-for", b"x-forwarded-proto",
    b"x-forwarded-host", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-authentication-info", b"te", b"trailer", b"content-type", b"content-range", b"content-location", b"etag",
    b"server", b"user-agent", b"max-forwards", b"sec-websocket-key1", b"sec-websocket-protocol", b"accept", b"date",
    b"location", b"set-cookie", b"cache-control", b"alt-svc", b"nel", b"report-to", b"reporting-endpoints",
    b"strict-transport-security", b"service-worker-allowed", b"public-key-pins", b"expect-ct", b"clear-site-data",
    b"refresh",
)

# RFC 9110, 7.6.1 and the edge's headers.py.
_HOP_BY_HOP = (
    F_CONNECTION, F_KEEP_ALIVE, F_PROXY_CONNECTION, F_PROXY_AUTHENTICATE, F_PROXY_AUTHORIZATION,
    F_PROXY_AUTHENTICATION_INFO, F_TE, F_TRAILER, F_TRANSFER_ENCODING, F_UPGRADE,
)

# These speak for the domain or outlive the share: headers.DROPPED_FROM_RESPONSES.
_DROPPED = (
    F_ALT_SVC, F_NEL, F_REPORT_TO, F_REPORTING_ENDPOINTS, F_STRICT_TRANSPORT_SECURITY, F_SERVICE_WORKER_ALLOWED,
    F_PUBLIC_KEY_PINS, F_EXPECT_CT, F_CLEAR_SITE_DATA,
)

# headers.RESERVED and RESERVED_PREFIXES: the edge's word to an application, or another proxy's that it may believe.
_RESERVED = (
    b"forwarded", b"forwarded-for", b"x-forwarded", b"x-real-ip", b"x-client-ip", b"client-ip",
    b"true-client-ip", b"x-cluster-client-ip", b"cf-connecting-ip", b"cf-connecting-ipv6", b"fastly-client-ip",
    b"fly-client-ip", b"x-proxyuser-ip", b"front-end-https", b"x-url-scheme", b"x-scheme", b"proxy",
    b"x-client-cert", b"remote-user", b"x-remote-user", b"x-authenticated-user", b"x-authenticated-email",
    b"x-auth-user", b"x-http-method-override", b"x-http-method", b"x-method-override", b"x-host",
    b"x-http-host-override", b"x-script-name",
)
_RESERVED_PREFIXES = (
    b"x-guestpass-", b"x-forwarded-", b"x-auth-request-", b"x-webauth-", b"x-remote-", b"x-ssl-", b"cf-access-",
    b"x-goog-authenticated-user-", b"x-goog-iap-", b"x-amzn-oidc-", b"x-ms-client-principal", b"x-original-",
    b"x-rewrite-", b"x-envoy-",
)
# headers.OUR_RESPONSE_PREFIX
cdef const char *OUR_RESPONSE_PREFIX = b"x-guestpass-"

# Cookies of these prefixes are ours on every origin (headers.OUR_COOKIE_PREFIXES).
cdef const char *SESSION_PREFIX = b"__host-guestpass"
cdef const char *FLOW_PREFIX = b"__host-gp-"

# In the order of MethodId; then what llhttp knows besides. CONNECT and TRACE are refused, RTSP's and ICE's unknown.
_METHODS = (
    b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH",
    b"ACL", b"BIND", b"CHECKOUT", b"COPY", b"LINK", b"LOCK", b"M-SEARCH", b"MERGE", b"MKACTIVITY", b"MKCALENDAR",
    b"MKCOL", b"MOVE", b"NOTIFY", b"PROPFIND", b"PROPPATCH", b"PURGE", b"QUERY", b"REBIND", b"REPORT", b"SEARCH",
    b"SUBSCRIBE", b"UNBIND", b"UNLINK", b"UNLOCK", b"UNSUBSCRIBE",
)

# (code, status to answer, reason). For a response the visitor is told 502, whatever stands here.
_ERRORS = (
    (E_REQUEST_LINE, 400, b"the request line is malformed"),
    (E_METHOD_REFUSED, 405, b"the method is not proxied"),
    (E_METHOD_UNKNOWN, 501, b"the method is unknown"),
    (E_TARGET, 400, b"the request target is not an absolute path"),
    (E_TARGET_TOO_LONG, 414, b"the request target is too long"),
    (E_VERSION, 505, b"the version is neither HTTP/1.1 nor HTTP/1.0"),
    (E_TOO_LARGE, 431, b"the header is too large"),
    (E_LINE_END, 400, b"a line does not end in CRLF"),
    (E_FIELD, 400, b"a header field is malformed"),
    (E_HOST, 400, b"Host is missing, repeated or malformed"),
    (E_LENGTH, 400, b"Content-Length is repeated or malformed"),
    (E_CODING, 400, b"Transfer-Encoding is other than chunked, or beside Content-Length"),
    (E_EXPECT_REPEATED, 400, b"Expect is repeated"),
    (E_EXPECT_UNKNOWN, 417, b"the expectation is unknown"),
    (E_REPEATED, 400, b"a header field that may come only once is repeated"),
    (E_CONNECTION, 400, b"Connection is malformed, or names what belongs to the whole way"),
    (E_UPGRADE, 400, b"an upgrade that cannot be one: not a GET of HTTP/1.1 without a body, or a 101 without Upgrade"),
    (E_OLD_WEBSOCKET, 400, b"this draft of WebSocket is not supported"),
    (E_STATUS_LINE, 502, b"the status line is malformed"),
    (E_BODILESS, 502, b"a response without a body announces one"),
    (E_CHUNK_SIZE, 400, b"a chunk size is malformed"),
    (E_CHUNK_EXTENSION, 400, b"a chunk extension is malformed or too long"),
    (E_CHUNK_END, 400, b"a chunk does not end where it should"),
    (E_TRAILER, 400, b"a trailer field is malformed, forbidden or too long"),
)

cdef struct Known:
    uint8_t[LONGEST_NAME] text
    uint8_t size
    uint8_t id

cdef struct Method:
    uint8_t[LONGEST_METHOD] text
    uint8_t size
    uint8_t id

cdef Known[N_FIELD_IDS] KNOWN               # by length
cdef uint8_t[LONGEST_NAME + 2] OF_LENGTH    # KNOWN[OF_LENGTH[n]:OF_LENGTH[n + 1]] have n bytes
cdef Known[N_RESERVED] RESERVED_NAMES
cdef Known[N_RESERVED_PREFIXES] RESERVED_STARTS
cdef bint[256] BEGINS_RESERVED             # first letters, in any case: most names that browsers send have others
cdef Method[40] METHODS
cdef int N_METHODS
cdef uint8_t[N_FIELD_IDS] REQUEST_FLAGS
cdef uint8_t[N_FIELD_IDS] RESPONSE_FLAGS
cdef int[N_ERRORS] ERROR_STATUS
cdef const char *ERROR_REASON[N_ERRORS]
cdef const char *PHRASE[600]               # standard reasons; the objects live in _PHRASES
cdef uint8_t[600] PHRASE_SIZE
_PHRASES = {status.value: status.phrase.encode("ascii") for status in HTTPStatus}

cdef uint64_t ONE = 1
cdef uint64_t ONCE_IN_REQUEST = (
    ONE << F_HOST | ONE << F_CONTENT_LENGTH | ONE << F_TRANSFER_ENCODING | ONE << F_EXPECT | ONE << F_UPGRADE
    # … and what aiohttp takes only once.
    | ONE << F_CONTENT_LOCATION | ONE << F_CONTENT_RANGE | ONE << F_CONTENT_TYPE | ONE << F_ETAG
    | ONE << F_MAX_FORWARDS | ONE << F_SERVER | ONE << F_USER_AGENT
)


cdef void set_known(Known *known, bytes text, int number) noexcept:
    memset(known, 0, sizeof(Known))
    memcpy(known.text, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    known.size = <uint8_t> PyBytes_GET_SIZE(text)
    known.id = <uint8_t> number


cdef int fill_tables() except -1:
    global N_METHODS
    cdef int i, n, at
    for i in range(256):
        CLASS[i] = 0
        LOWER[i] = <uint8_t> (i + 32 if 65 <= i <= 90 else i)
        DIGIT[i] = 255
        if 48 <= i <= 57 or 65 <= i <= 90 or 97 <= i <= 122:
            CLASS[i] |= IN_TOKEN | IN_HOST | IS_ALNUM
            FOLD[i] = LOWER[i]
        else:
            FOLD[i] = ord("-")
        if 0x21 <= i <= 0x7e and i != ord("#"):
            CLASS[i] |= IN_TARGET
        if i == TAB or 0x20 <= i <= 0x7e or i >= 0x80:
            CLASS[i] |= IN_VALUE
            if i != ord('"') and i != ord("\\"):
                CLASS[i] |= IN_QUOTED
    for i in b"!#$%&'*+-.^_`|~":
        CLASS[i] |= IN_TOKEN
    for i in b"-.":
        CLASS[i] |= IN_HOST
    for i in range(16):
        DIGIT[b"0123456789abcdef"[i]] = <uint8_t> i
        DIGIT[b"0123456789ABCDEF"[i]] = <uint8_t> i

    at = 0
    for n in range(LONGEST_NAME + 1):
        OF_LENGTH[n] = <uint8_t> at
        for i, text in enumerate(_NAMES):
            if i and len(text) == n:
                set_known(&KNOWN[at], text, i)
                at += 1
    OF_LENGTH[LONGEST_NAME + 1] = <uint8_t> at
    if (
        at != N_FIELD_IDS - 1 or len(_NAMES) != N_FIELD_IDS
        or len(_RESERVED) != N_RESERVED or len(_RESERVED_PREFIXES) != N_RESERVED_PREFIXES
    ):
        raise ImportError("the tables of http1 disagree with their sizes")
    for i, text in enumerate(_RESERVED):
        set_known(&RESERVED_NAMES[i], text, 0)
    for i, text in enumerate(_RESERVED_PREFIXES):
        set_known(&RESERVED_STARTS[i], text, 0)
    for text in _RESERVED + _RESERVED_PREFIXES:
        BEGINS_RESERVED[text[0]] = BEGINS_RESERVED[text.upper()[0]] = True
    for i, text in enumerate(_NAMES):
        if is_reserved(<const uint8_t *> PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text)):
            REQUEST_FLAGS[i] |= RESERVED
    for i in _HOP_BY_HOP:
        REQUEST_FLAGS[i] |= HOP_BY_HOP
        RESPONSE_FLAGS[i] |= HOP_BY_HOP
    for i in _DROPPED:
        RESPONSE_FLAGS[i] |= DROPPED
    N_METHODS = <int> len(_METHODS)
    for i, text in enumerate(_METHODS):
        memset(&METHODS[i], 0, sizeof(Method))
        memcpy(METHODS[i].text, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
        METHODS[i].size = <uint8_t> PyBytes_GET_SIZE(text)
        METHODS[i].id = <uint8_t> min(i, <int> M_OTHER)
    for code, status, reason in _ERRORS:
        ERROR_STATUS[-code] = status
        ERROR_REASON[-code] = PyBytes_AS_STRING(reason)
    for status, text in _PHRASES.items():
        if status < 600:
            PHRASE[status] = PyBytes_AS_STRING(text)
            PHRASE_SIZE[status] = <uint8_t> len(text)
    return 0


fill_tables()


cdef int error_status(int error) noexcept nogil:
    return ERROR_STATUS[-error]


cdef const char *error_reason(int error) noexcept nogil:
    return ERROR_REASON[-error]


# ------------------------------------------------------------------------------------------------------------
# Words and lists


cdef inline Span span_of(const uint8_t *data, const uint8_t *start, const uint8_t *stop) noexcept nogil:
    cdef Span span
    span.at = <uint32_t> (start - data)
    span.size = <uint32_t> (stop - start)
    return span


cdef inline bint is_blank(uint8_t byte) noexcept nogil:
    return byte == SP or byte == TAB


cdef inline bint starts_with(const uint8_t *p, Py_ssize_t size, const char *lower, Py_ssize_t length) noexcept nogil:
    """In any case of letters."""
    cdef Py_ssize_t i
    if size < length:
        return False
    for i in range(length):
        if LOWER[p[i]] != <uint8_t> lower[i]:
            return False
    return True


cdef bint span_is(const uint8_t *data, Span span, const char *lower, Py_ssize_t size) noexcept nogil:
    return <Py_ssize_t> span.size == size and starts_with(data + span.at, size, lower, size)


cdef bint span_equals(const uint8_t *data, Span span, const char *exact, Py_ssize_t size) noexcept nogil:
    return <Py_ssize_t> span.size == size and memcmp(data + span.at, exact, size) == 0


cdef inline bint next_part(
    const uint8_t **rest, const uint8_t *stop, uint8_t separator, const uint8_t **start, const uint8_t **end
) noexcept nogil:
    """The next element of a list, without blanks around it; False after the last. `rest` is NULL then."""
    cdef const uint8_t *p = rest[0]
    cdef const uint8_t *q
    if p == NULL:
        return False
    q = <const uint8_t *> memchr(p, separator, stop - p)
    if q == NULL:
        q = stop
        rest[0] = NULL
    else:
        rest[0] = q + 1
    while p < q and is_blank(p[0]):
        p += 1
    while q > p and is_blank((q - 1)[0]):
        q -= 1
    start[0] = p
    end[0] = q
    return True


cdef inline uint8_t find_known(const uint8_t *name, Py_ssize_t size) noexcept nogil:
    """The FieldId of a token."""
    cdef int i, stop
    if size > LONGEST_NAME:
        return F_OTHER
    i = OF_LENGTH[size]
    stop = OF_LENGTH[size + 1]
    while i < stop:
        if (name[0] | 0x20) == KNOWN[i].text[0] and gp_same_name(name, KNOWN[i].text, size):
            return KNOWN[i].id
        i += 1
    return F_OTHER


cdef bint is_reserved_in_response(const uint8_t *name, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i
    if size < 12:
        return False
    for i in range(12):
        if FOLD[name[i]] != <uint8_t> OUR_RESPONSE_PREFIX[i]:
            return False
    return True


cdef bint is_reserved(const uint8_t *name, Py_ssize_t size) noexcept nogil:
    cdef uint8_t[LONGEST_NAME] folded
    cdef Py_ssize_t i, length = min(size, LONGEST_NAME)
    cdef int k
    for i in range(length):
        folded[i] = FOLD[name[i]]
    for k in range(N_RESERVED_PREFIXES):
        if length >= RESERVED_STARTS[k].size and memcmp(RESERVED_STARTS[k].text, folded, RESERVED_STARTS[k].size) == 0:
            return True
    for k in range(N_RESERVED):
        if RESERVED_NAMES[k].size == size and memcmp(RESERVED_NAMES[k].text, folded, size) == 0:
            return True
    return False


# ------------------------------------------------------------------------------------------------------------
# Fields


cdef inline bint has_end(const uint8_t *data, Py_ssize_t size, uint32_t *searched) noexcept nogil:
    """Whether a line ends at `searched` or later and the next one is empty. Moves `searched` to where the next call
    has to begin."""
    cdef const uint8_t *p = data + searched[0]
    cdef const uint8_t *end = data + size
    while p < end:
        p = <const uint8_t *> memchr(p, LF, end - p)
        if p == NULL:
            break
        if end - p >= 2 and p[1] == LF:
            return True
        if end - p < 3:  # undecided
            searched[0] = <uint32_t> (p - data)
            return False
        if p[1] == CR and p[2] == LF:
            return True
        p += 1
    searched[0] = <uint32_t> size
    return False


cdef inline int unfinished(Py_ssize_t size, uint32_t *searched) noexcept nogil:
    """What a scan returns that came to the end of its bytes."""
    if size >= MAX_HEAD:
        searched[0] = 0
        return E_TOO_LARGE
    # An empty line that has begun may end with the next byte: "\n\r", then "\n".
    searched[0] = <uint32_t> (size - 2 if size > 2 else 1) if size else 0
    return 0


cdef inline void clear_fields(Fields *fields) noexcept nogil:
    fields.present = 0
    fields.repeated = 0
    fields.total = 0
    fields.count = 0
    memset(fields.first, NO_FIELD, N_FIELD_IDS)


cdef int scan_fields(
    const uint8_t *data, const uint8_t **at, const uint8_t *end, Fields *fields, bint request, Py_ssize_t longest
) noexcept nogil:
    """Field lines and the empty line, from `at` on. 1: complete, `at` is behind; 0: `end` came first; < 0: an Error."""
    cdef const uint8_t *p = at[0]
    cdef const uint8_t *start
    cdef const uint8_t *colon
    cdef const uint8_t *value
    cdef const uint8_t *stop
    cdef Field *field
    cdef uint64_t bit
    cdef uint8_t number
    while True:
        if p == end:
            return 0
        if p[0] == CR:
            if p + 1 == end:
                return 0
            if p[1] != LF:
                return E_LINE_END
            at[0] = p + 2
            return 1
        if fields.count == MAX_FIELDS:
            return E_TOO_LARGE
        start = p
        while p < end and CLASS[p[0]] & IN_TOKEN:
            p += 1
        if p == end:
            return 0
        colon = p
        if colon[0] != c":" or colon == start:
            return E_LINE_END if colon[0] == LF else E_FIELD
        p += 1
        while p < end and is_blank(p[0]):
            p += 1
        value = p
        while True:
            p = gp_find_control(p, end)
            if p == end or p[0] != TAB:
                break
            p += 1
        if p == end:
            return 0
        if p[0] != CR:
            return E_LINE_END if p[0] == LF else E_FIELD
        if p + 1 == end:
            return 0
        if p[1] != LF:
            return E_LINE_END
        if p - start > longest:
            return E_TOO_LARGE
        stop = p
        while stop > value and is_blank((stop - 1)[0]):
            stop -= 1
        number = find_known(start, colon - start)
        field = &fields.field[fields.count]
        field.name = span_of(data, start, colon)
        field.value = span_of(data, value, stop)
        field.id = number
        field.flags = REQUEST_FLAGS[number] if request else RESPONSE_FLAGS[number]
        if value - colon == 2 and colon[1] == SP and stop == p:
            field.flags |= PLAIN
        if number != F_OTHER:
            bit = ONE << number
            if fields.present & bit:
                fields.repeated |= bit
            else:
                fields.present |= bit
                fields.first[number] = <uint8_t> fields.count
        elif request:
            if BEGINS_RESERVED[start[0]] and is_reserved(start, colon - start):
                field.flags |= RESERVED
        elif LOWER[start[0]] == c"x" and is_reserved_in_response(start, colon - start):
            field.flags |= RESERVED
        fields.total += <uint32_t> (colon - start + stop - value + 4)
        fields.count += 1
        p += 2


cdef enum:      # what Connection says of the connection itself
    SAYS_CLOSE = 1
    SAYS_KEEP_ALIVE = 2
    SAYS_UPGRADE = 4


cdef int read_connection(const uint8_t *data, Fields *fields, uint8_t minor) noexcept nogil:
    """SAYS_* of all Connection fields; marks the fields that they name. E_CONNECTION when that cannot be.

    Proxy-Connection is read like llhttp reads it, but for an upgrade, which nobody asks for in that way.
    """
    cdef const uint8_t *rest
    cdef const uint8_t *stop
    cdef const uint8_t *start
    cdef const uint8_t *end
    cdef int said, says = 0
    cdef uint32_t i, elements = 0
    if not has(fields, F_CONNECTION) and not has(fields, F_PROXY_CONNECTION):
        return 0
    for i in range(fields.count):
        if fields.field[i].id != F_CONNECTION and fields.field[i].id != F_PROXY_CONNECTION:
            continue
        rest = data + fields.field[i].value.at
        stop = rest + fields.field[i].value.size
        if memchr(rest, TAB, stop - rest) != NULL:  # llhttp does not take it for white space
            return E_CONNECTION
        while next_part(&rest, stop, c",", &start, &end):
            elements += 1
            if elements > MAX_NOMINATED:
                return E_CONNECTION
            said = 0
            if end - start == 10 and starts_with(start, 10, b"keep-alive", 10):
                said = SAYS_KEEP_ALIVE
            elif end - start == 7 and starts_with(start, 7, b"upgrade", 7):
                said = SAYS_UPGRADE
            elif end - start == 5 and starts_with(start, 5, b"close", 5):
                said = SAYS_CLOSE
            says |= said
            if fields.field[i].id == F_PROXY_CONNECTION:
                if said == SAYS_UPGRADE:
                    return E_CONNECTION
            elif end > start and said != SAYS_KEEP_ALIVE and said != SAYS_UPGRADE:  # those two never pass on anyway
                mark_nominated(data, fields, start, end - start)
    if minor == 0 and says & SAYS_CLOSE and says & SAYS_KEEP_ALIVE:
        return E_CONNECTION  # close has precedence (RFC 9112, 9.3), but llhttp would go on
    return says


cdef void mark_nominated(const uint8_t *data, Fields *fields, const uint8_t *name, Py_ssize_t size) noexcept nogil:
    cdef uint32_t i
    cdef Py_ssize_t k
    cdef const uint8_t *p
    for i in range(fields.count):
        if <Py_ssize_t> fields.field[i].name.size != size:
            continue
        p = data + fields.field[i].name.at
        k = 0
        while k < size and LOWER[p[k]] == LOWER[name[k]]:
            k += 1
        if k == size:
            fields.field[i].flags |= NOMINATED


cdef inline int read_length(const uint8_t *data, const Fields *fields, uint64_t *length) noexcept nogil:
    """1: there is a Content-Length; 0: there is none; E_LENGTH."""
    cdef Span value
    cdef const uint8_t *p
    cdef uint32_t i
    length[0] = 0
    if not has(fields, F_CONTENT_LENGTH):
        return 0
    value = value_of(fields, F_CONTENT_LENGTH)
    p = data + value.at
    if is_repeated(fields, F_CONTENT_LENGTH) or value.size == 0 or value.size > 18:
        return E_LENGTH
    if p[0] == c"0" and value.size > 1:
        return E_LENGTH
    for i in range(value.size):
        if not c"0" <= p[i] <= c"9":
            return E_LENGTH
        length[0] = length[0] * 10 + (p[i] - <uint8_t> c"0")
    return 1


cdef inline int read_coding(const uint8_t *data, const Fields *fields, uint8_t minor) noexcept nogil:
    """1: the body is chunked; 0: it is not; E_CODING."""
    cdef Span value
    if not has(fields, F_TRANSFER_ENCODING):
        return 0
    value = value_of(fields, F_TRANSFER_ENCODING)
    if is_repeated(fields, F_TRANSFER_ENCODING) or minor == 0 or not span_is(data, value, b"chunked", 7):
        return E_CODING
    if data[value.at + 7] != CR:  # llhttp takes "chunked", tab, CRLF for something else
        return E_CODING
    return 1


# ------------------------------------------------------------------------------------------------------------
# Requests


cdef int scan_request(
    const uint8_t *data, Py_ssize_t size, RequestHead *head, uint32_t *searched, unsigned options
) noexcept nogil:
    cdef Py_ssize_t limit = min(size, MAX_HEAD)
    cdef const uint8_t *p = data
    cdef int result
    if searched[0] and size < MAX_HEAD and not has_end(data, size, searched):
        return 0
    clear_fields(&head.fields)
    result = scan_request_line(data, &p, data + limit, head, options)
    if result > 0:
        result = scan_fields(
            data, &p, data + limit, &head.fields, True, MAX_HEAD if options & FROM_EDGE else MAX_LINE
        )
    if result == 0:
        return unfinished(size, searched)
    searched[0] = 0
    if result > 0:
        result = finish_request(data, head, options)
    if result < 0:
        return result
    head.size = <uint32_t> (p - data)
    return <int> head.size


cdef int scan_request_line(
    const uint8_t *data, const uint8_t **at, const uint8_t *end, RequestHead *head, unsigned options
) noexcept nogil:
    cdef const uint8_t *p = at[0]
    cdef const uint8_t *start
    cdef Py_ssize_t i, size
    # RFC 9112, 2.2: some clients send an empty line after the body of the request before.
    if p < end and p[0] == CR:
        if end - p < 2:
            return 0
        if p[1] != LF:
            return E_LINE_END
        p += 2

    start = p
    while p < end and CLASS[p[0]] & IN_TOKEN and p - start <= LONGEST_METHOD:
        p += 1
    if p == end:
        return 0
    if p[0] != SP or p == start:
        return E_METHOD_UNKNOWN if p - start > LONGEST_METHOD else E_REQUEST_LINE
    size = p - start
    head.method = span_of(data, start, p)
    if (size == 7 and memcmp(start, b"CONNECT", 7) == 0) or (size == 5 and memcmp(start, b"TRACE", 5) == 0):
        return E_METHOD_REFUSED
    i = 0
    while i < N_METHODS and not (METHODS[i].size == size and memcmp(METHODS[i].text, start, size) == 0):
        i += 1
    if i == N_METHODS:
        return E_METHOD_UNKNOWN
    head.method_id = METHODS[i].id

    p += 1
    start = p
    while p < end and CLASS[p[0]] & IN_TARGET:
        p += 1
    if p - start > MAX_LINE and not options & FROM_EDGE:
        return E_TARGET_TOO_LONG
    if p > start and start[0] != c"/" and start[0] != c"*":
        return E_TARGET
    if p == end:
        return 0
    if p[0] != SP or p == start:
        return E_TARGET
    if start[0] == c"*" and (p - start != 1 or head.method_id != M_OPTIONS):
        return E_TARGET
    head.target = span_of(data, start, p)

    p += 1
    size = min(end - p, 5)
    if memcmp(p, b"HTTP/", size) != 0:
        return E_REQUEST_LINE
    if end - p < 8:
        return 0
    if p[6] != c"." or not c"0" <= p[5] <= c"9" or not c"0" <= p[7] <= c"9":
        return E_REQUEST_LINE
    if p[5] != c"1" or p[7] > c"1":
        return E_VERSION
    head.minor = p[7] - <uint8_t> c"0"
    p += 8
    if p == end:
        return 0
    if p[0] != CR:
        return E_LINE_END if p[0] == LF else E_REQUEST_LINE
    if p + 1 == end:
        return 0
    if p[1] != LF:
        return E_LINE_END
    at[0] = p + 2
    return 1


cdef bint is_host(const uint8_t *p, Py_ssize_t size) noexcept nogil:
    """A name with labels of letters, digits and hyphens, or an IPv6 literal; an optional port (headers.HOST)."""
    cdef const uint8_t *end = p + size
    cdef const uint8_t *start = p
    if size and p[0] == c"[":
        p += 1
        start = p
        while p < end and (DIGIT[p[0]] != 255 or p[0] == c":" or p[0] == c"."):
            p += 1
        if p == start or p == end or p[0] != c"]":
            return False
        p += 1
    else:
        while p < end and CLASS[p[0]] & IN_HOST:
            p += 1
        if p == start or not CLASS[start[0]] & IS_ALNUM or not CLASS[(p - 1)[0]] & IS_ALNUM:
            return False
    if p == end:
        return True
    if p[0] != c":" or not 2 <= end - p <= 6:
        return False
    p += 1
    while p < end and c"0" <= p[0] <= c"9":
        p += 1
    return p == end


cdef int finish_request(const uint8_t *data, RequestHead *head, unsigned options) noexcept nogil:
    """What the fields say together."""
    cdef Fields *fields = &head.fields
    cdef uint64_t repeated = fields.repeated & ONCE_IN_REQUEST
    cdef Span value
    cdef int says, has_length, chunked
    if fields.total > <uint32_t> (MAX_HEAD if options & FROM_EDGE else MAX_HEAD - HEAD_RESERVE):
        return E_TOO_LARGE
    if not has(fields, F_HOST) or repeated >> F_HOST & 1:
        return E_HOST
    value = value_of(fields, F_HOST)
    if not is_host(data + value.at, value.size):
        return E_HOST
    has_length = read_length(data, fields, &head.content_length)
    if has_length < 0:
        return has_length
    chunked = read_coding(data, fields, head.minor)
    if chunked < 0 or (chunked and (has_length or options & FROM_EDGE)):
        return E_CODING
    if repeated >> F_EXPECT & 1:
        return E_EXPECT_REPEATED
    if repeated:
        return E_REPEATED
    if has(fields, F_SEC_WEBSOCKET_KEY1):
        return E_OLD_WEBSOCKET

    says = read_connection(data, fields, head.minor)
    if says < 0:
        return says
    if (
        fields.field[fields.first[F_HOST]].flags & NOMINATED
        or (has_length and fields.field[fields.first[F_CONTENT_LENGTH]].flags & NOMINATED)
    ):
        return E_CONNECTION
    head.keep_alive = not says & SAYS_CLOSE and (head.minor == 1 or says & SAYS_KEEP_ALIVE)
    head.framing = BODY_CHUNKED if chunked else BODY_LENGTH if head.content_length else BODY_NONE

    head.expect_continue = False
    if has(fields, F_EXPECT) and head.minor == 1:  # RFC 9110, 10.1.1: ignored in HTTP/1.0
        if not span_is(data, value_of(fields, F_EXPECT), b"100-continue", 12):
            return E_EXPECT_UNKNOWN
        head.expect_continue = True

    head.upgrade = UPGRADE_NONE
    if says & SAYS_UPGRADE and has(fields, F_UPGRADE) and value_of(fields, F_UPGRADE).size:
        if span_is(data, value_of(fields, F_UPGRADE), b"websocket", 9):
            if head.method_id != M_GET or head.minor == 0 or head.framing != BODY_NONE:
                return E_UPGRADE
            head.upgrade = UPGRADE_WEBSOCKET
        else:
            head.upgrade = UPGRADE_OTHER
    return 1


# ------------------------------------------------------------------------------------------------------------
# Responses


cdef int scan_response(
    const uint8_t *data, Py_ssize_t size, ResponseHead *head, uint32_t *searched, unsigned options
) noexcept nogil:
    cdef Py_ssize_t limit = min(size, MAX_HEAD)
    cdef const uint8_t *p = data
    cdef int result
    if searched[0] and size < MAX_HEAD and not has_end(data, size, searched):
        return 0
    clear_fields(&head.fields)
    result = scan_status_line(data, &p, data + limit, head, options)
    if result > 0:
        result = scan_fields(data, &p, data + limit, &head.fields, False, MAX_HEAD)
    if result == 0:
        return unfinished(size, searched)
    searched[0] = 0
    if result > 0:
        result = finish_response(data, head, options)
    if result < 0:
        return result
    head.size = <uint32_t> (p - data)
    return <int> head.size


cdef int scan_status_line(
    const uint8_t *data, const uint8_t **at, const uint8_t *end, ResponseHead *head, unsigned options
) noexcept nogil:
    cdef const uint8_t *p = at[0]
    cdef const uint8_t *start
    cdef Py_ssize_t size = min(end - p, 7)
    if memcmp(p, b"HTTP/1.", size) != 0:
        return E_STATUS_LINE
    if end - p < 12:
        return 0
    if p[7] != c"1" and (p[7] != c"0" or options & FROM_GATEWAY):
        return E_STATUS_LINE
    head.minor = p[7] - <uint8_t> c"0"
    if p[8] != SP or not (c"1" <= p[9] <= c"5" and c"0" <= p[10] <= c"9" and c"0" <= p[11] <= c"9"):
        return E_STATUS_LINE
    head.status = (p[9] - <uint16_t> c"0") * 100 + (p[10] - <uint16_t> c"0") * 10 + (p[11] - <uint16_t> c"0")
    p += 12
    if p == end:
        return 0
    head.has_reason = p[0] == SP
    if head.has_reason:
        p += 1
    start = p
    while head.has_reason:
        p = gp_find_control(p, end)
        if p == end or p[0] != TAB:
            break
        p += 1
    if p == end:
        return 0
    head.reason = span_of(data, start, p)
    if p[0] != CR:
        return E_LINE_END if p[0] == LF else E_STATUS_LINE
    if p + 1 == end:
        return 0
    if p[1] != LF:
        return E_LINE_END
    at[0] = p + 2
    return 1


cdef int finish_response(const uint8_t *data, ResponseHead *head, unsigned options) noexcept nogil:
    """What the fields say together: RFC 9112, 6.3."""
    cdef Fields *fields = &head.fields
    cdef int says, has_length, chunked
    has_length = read_length(data, fields, &head.content_length)
    if has_length < 0:
        return has_length
    head.has_length = has_length
    # In a tunnel the end of the stream is the end of the body, and Transfer-Encoding means nothing (SPEC.md, 2.3).
    chunked = 0 if options & FROM_GATEWAY else read_coding(data, fields, head.minor)
    if chunked < 0 or (chunked and has_length):
        return E_CODING
    if head.status < 200:
        if chunked or head.content_length:
            return E_BODILESS
    elif head.status == 204 and chunked:
        return E_BODILESS
    says = read_connection(data, fields, head.minor)
    if says < 0:
        return says
    if has(fields, F_SEC_WEBSOCKET_KEY1):
        return E_OLD_WEBSOCKET
    head.upgrade = UPGRADE_NONE
    if head.status == 101:
        if says & SAYS_UPGRADE and has(fields, F_UPGRADE) and value_of(fields, F_UPGRADE).size:
            head.upgrade = UPGRADE_OTHER
            if not is_repeated(fields, F_UPGRADE) and span_is(data, value_of(fields, F_UPGRADE), b"websocket", 9):
                head.upgrade = UPGRADE_WEBSOCKET
        elif not options & FROM_GATEWAY:
            return E_UPGRADE
    if head.status < 200 or head.status == 204 or head.status == 304 or options & TO_HEAD:
        head.framing = BODY_NONE
    elif chunked:
        head.framing = BODY_CHUNKED
    elif not has_length:
        head.framing = BODY_UNTIL_CLOSE
    else:
        head.framing = BODY_LENGTH if head.content_length else BODY_NONE
    head.keep_alive = (
        not says & SAYS_CLOSE and (head.minor == 1 or says & SAYS_KEEP_ALIVE) and head.framing != BODY_UNTIL_CLOSE
    )
    return 1


# ------------------------------------------------------------------------------------------------------------
# Chunked bodies: RFC 9112, 7.1. The grammar of extensions is kept without the optional white space.

cdef enum:
    IN_SIZE                 # digits; 0, so that a zeroed Chunked begins here
    IN_EXTENSION            # behind ";"
    IN_EXTENSION_NAME
    IN_EXTENSION_EQUALS     # behind "="
    IN_EXTENSION_VALUE
    IN_EXTENSION_QUOTED
    IN_EXTENSION_ESCAPE
    IN_EXTENSION_UNQUOTED   # behind the closing '"'
    IN_SIZE_LF
    IN_DATA
    IN_DATA_CR
    IN_DATA_LF
    IN_TRAILER_LINE         # at its beginning
    IN_TRAILER_NAME
    IN_TRAILER_VALUE
    IN_TRAILER_LF
    IN_LAST_LF
    ENDED


cdef int next_chunk(
    Chunked *body, const uint8_t *data, Py_ssize_t size, Py_ssize_t *at, Span *piece
) noexcept nogil:
    cdef Py_ssize_t start
    cdef int result
    while body.state < IN_TRAILER_LINE:
        if at[0] == size:
            return CHUNK_MORE
        if body.state == IN_DATA:
            start = at[0]
            piece.at = <uint32_t> start
            piece.size = <uint32_t> min(<uint64_t> (size - start), body.left)
            at[0] += piece.size
            body.left -= piece.size
            if body.left == 0:
                body.state = IN_DATA_CR
            return CHUNK_DATA
        result = chunk_line_byte(body, data[at[0]])
        if result < 0:
            return result
        at[0] += 1
    if body.state == ENDED:
        return CHUNK_END
    start = at[0]
    while body.state != ENDED:
        if at[0] == size:
            break
        result = trailer_byte(body, data[at[0]])
        if result < 0:
            return result
        at[0] += 1
    if at[0] == start:
        return CHUNK_MORE
    piece.at = <uint32_t> start
    piece.size = <uint32_t> (at[0] - start)
    return CHUNK_TRAILER


cdef inline int chunk_line_byte(Chunked *body, uint8_t byte) noexcept nogil:
    """A byte of a size line, or of the CRLF behind a chunk."""
    cdef int state = body.state
    if state == IN_SIZE:
        if DIGIT[byte] != 255:
            if body.digits == MAX_CHUNK_DIGITS:
                return E_CHUNK_SIZE
            body.digits += 1
            body.left = body.left << 4 | DIGIT[byte]
        elif body.digits == 0:
            return E_CHUNK_SIZE
        elif byte == CR:
            body.state = IN_SIZE_LF
        elif byte == c";":
            body.line = body.digits
            body.state = IN_EXTENSION
        else:
            return E_CHUNK_SIZE
        return 0
    if state == IN_SIZE_LF:
        if byte != LF:
            return E_CHUNK_SIZE
        body.state = IN_DATA if body.left else IN_TRAILER_LINE
        body.digits = 0
        body.line = 0
        return 0
    if state == IN_DATA_CR:
        if byte != CR:
            return E_CHUNK_END
        body.state = IN_DATA_LF
        return 0
    if state == IN_DATA_LF:
        if byte != LF:
            return E_CHUNK_END
        body.state = IN_SIZE
        return 0
    body.line += 1
    body.extensions += 1
    if body.line >= MAX_CHUNK_LINE or body.extensions > MAX_EXTENSIONS:
        return E_CHUNK_EXTENSION
    if state == IN_EXTENSION_QUOTED:
        if byte == c'"':
            body.state = IN_EXTENSION_UNQUOTED
        elif byte == c"\\":
            body.state = IN_EXTENSION_ESCAPE
        elif not CLASS[byte] & IN_QUOTED:
            return E_CHUNK_EXTENSION
    elif state == IN_EXTENSION_ESCAPE:
        if not CLASS[byte] & IN_VALUE:
            return E_CHUNK_EXTENSION
        body.state = IN_EXTENSION_QUOTED
    elif CLASS[byte] & IN_TOKEN and state != IN_EXTENSION_UNQUOTED:
        if state == IN_EXTENSION:
            body.state = IN_EXTENSION_NAME
        elif state == IN_EXTENSION_EQUALS:
            body.state = IN_EXTENSION_VALUE
    elif state == IN_EXTENSION:
        return E_CHUNK_EXTENSION
    elif state == IN_EXTENSION_EQUALS:
        if byte != c'"':
            return E_CHUNK_EXTENSION
        body.state = IN_EXTENSION_QUOTED
    elif byte == c"=" and state == IN_EXTENSION_NAME:
        body.state = IN_EXTENSION_EQUALS
    elif byte == c";":
        body.state = IN_EXTENSION
    elif byte == CR:
        body.state = IN_SIZE_LF
    else:
        return E_CHUNK_EXTENSION
    return 0


cdef int trailer_byte(Chunked *body, uint8_t byte) noexcept nogil:
    """A byte of the trailer section, checked as a field line is."""
    cdef int number
    body.line += 1
    if body.line > MAX_TRAILERS:
        return E_TRAILER
    if body.state == IN_TRAILER_LINE:
        if byte == CR:
            body.state = IN_LAST_LF
            return 0
        body.fields += 1
        if body.fields > MAX_TRAILER_FIELDS:
            return E_TRAILER
        body.name_size = 0
        body.state = IN_TRAILER_NAME
        # A name has one byte at least.
        if not CLASS[byte] & IN_TOKEN:
            return E_TRAILER
    if body.state == IN_TRAILER_NAME:
        if CLASS[byte] & IN_TOKEN:
            if body.name_size < LONGEST_NAME:
                body.name[body.name_size] = byte
            if body.name_size <= LONGEST_NAME:
                body.name_size += 1
            return 0
        if byte != c":":
            return E_TRAILER
        number = find_known(body.name, body.name_size)
        # RFC 9110, 6.5.1: what frames, routes, authenticates or says how to take the body cannot come after it. That
        # is every name we know, but for three that a server may learn only as it sends.
        if number != F_OTHER and not (
            body.response and (number == F_DATE or number == F_ETAG or number == F_SERVER)
        ):
            return E_TRAILER
        body.state = IN_TRAILER_VALUE
    elif body.state == IN_TRAILER_VALUE:
        if byte == CR:
            body.state = IN_TRAILER_LF
        elif not CLASS[byte] & IN_VALUE:
            return E_TRAILER
    elif byte != LF:
        return E_TRAILER
    else:
        body.state = ENDED if body.state == IN_LAST_LF else IN_TRAILER_LINE
    return 0


# ------------------------------------------------------------------------------------------------------------
# What edge/headers.py does


cdef int find_cookie(
    const uint8_t *data, const Fields *fields, const char *name, Py_ssize_t size, Span *value
) noexcept nogil:
    cdef const uint8_t *rest
    cdef const uint8_t *stop
    cdef const uint8_t *start
    cdef const uint8_t *end
    cdef uint32_t i
    cdef int found = 0
    if not has(fields, F_COOKIE):
        return 0
    for i in range(fields.first[F_COOKIE], fields.count):
        if fields.field[i].id != F_COOKIE:
            continue
        rest = data + fields.field[i].value.at
        stop = rest + fields.field[i].value.size
        while next_part(&rest, stop, c";", &start, &end):
            if end - start > size and start[size] == c"=" and memcmp(start, name, size) == 0:
                found += 1
                value[0] = span_of(data, start + size + 1, end)
    return found


cdef inline const uint8_t *bearer_credentials(const uint8_t *data, Span value) noexcept nogil:
    """Where the token of an Authorization field begins (headers.split_credentials); NULL for another scheme."""
    cdef const uint8_t *p = data + value.at
    cdef const uint8_t *end = p + value.size
    if not starts_with(p, value.size, b"bearer", 6) or value.size == 6 or not is_blank(p[6]):
        return NULL
    p += 7
    while p < end and is_blank(p[0]):
        p += 1
    return p


cdef bint find_bearer(
    const uint8_t *data, const Fields *fields, const char *prefix, Py_ssize_t size, Span *token
) noexcept nogil:
    cdef Span value
    cdef const uint8_t *start
    cdef const uint8_t *end
    if not has(fields, F_AUTHORIZATION) or is_repeated(fields, F_AUTHORIZATION):
        return False
    value = value_of(fields, F_AUTHORIZATION)
    start = bearer_credentials(data, value)
    end = data + value.at + value.size
    if start == NULL or end - start < size or memcmp(start, prefix, size) != 0:
        return False
    token[0] = span_of(data, start, end)
    return True


cdef bint is_our_bearer(const uint8_t *data, Span value, const char *prefix, Py_ssize_t size) noexcept nogil:
    """Whether an Authorization field carries a token of ours, in any case of letters: it stays at the edge."""
    cdef const uint8_t *start = bearer_credentials(data, value)
    return start != NULL and starts_with(start, data + value.at + value.size - start, prefix, size)


cdef inline bint is_our_cookie(const uint8_t *pair, Py_ssize_t size) noexcept nogil:
    return starts_with(pair, size, SESSION_PREFIX, 16) or starts_with(pair, size, FLOW_PREFIX, 10)


cdef inline uint8_t *put(uint8_t *out, const void *source, Py_ssize_t size) noexcept nogil:
    memcpy(out, source, size)
    return out + size


cdef Py_ssize_t write_cookie(const uint8_t *data, Span value, uint8_t *out) noexcept nogil:
    cdef const uint8_t *rest = data + value.at
    cdef const uint8_t *stop = rest + value.size
    cdef const uint8_t *start
    cdef const uint8_t *end
    cdef uint8_t *p = out
    while next_part(&rest, stop, c";", &start, &end):
        if start == end or is_our_cookie(start, end - start):
            continue
        if p != out:
            p = put(p, b"; ", 2)
        p = put(p, start, end - start)
    return p - out


cdef Py_ssize_t write_set_cookie(const uint8_t *data, Span value, uint8_t *out) noexcept nogil:
    cdef const uint8_t *rest = data + value.at
    cdef const uint8_t *stop = rest + value.size
    cdef const uint8_t *start
    cdef const uint8_t *end
    cdef const uint8_t *name
    cdef const uint8_t *name_end
    cdef uint8_t *p = out
    cdef bint first = True
    while next_part(&rest, stop, c";", &start, &end):
        if first:
            # "=__Host-…" is a cookie without a name that a browser would send back as one of ours.
            name = start
            while name < end and (name[0] == c"=" or is_blank(name[0])):
                name += 1
            if is_our_cookie(name, end - name):
                return -1
            first = False
        else:
            name_end = <const uint8_t *> memchr(start, c"=", end - start)
            if name_end == NULL:
                name_end = end
            while name_end > start and is_blank((name_end - 1)[0]):
                name_end -= 1
            if name_end - start == 6 and starts_with(start, 6, b"domain", 6):
                continue
            p = put(p, b"; ", 2)
        p = put(p, start, end - start)
    return p - out


cdef Py_ssize_t write_cache_control(const uint8_t *data, const Fields *fields, uint8_t *out) noexcept nogil:
    cdef const uint8_t *rest
    cdef const uint8_t *stop
    cdef const uint8_t *start
    cdef const uint8_t *end
    cdef const uint8_t *name_end
    cdef uint8_t *p = put(out, b"private", 7)   # taken back when the application has said as much
    cdef uint32_t i
    cdef Py_ssize_t size
    cdef bint private = False
    if not has(fields, F_CACHE_CONTROL):
        return 7
    for i in range(fields.first[F_CACHE_CONTROL], fields.count):
        if fields.field[i].id != F_CACHE_CONTROL or fields.field[i].flags & NOMINATED:
            continue
        rest = data + fields.field[i].value.at
        stop = rest + fields.field[i].value.size
        while next_part(&rest, stop, c",", &start, &end):
            if start == end:
                continue
            name_end = <const uint8_t *> memchr(start, c"=", end - start)
            if name_end == NULL:
                name_end = end
            size = name_end - start
            if (size == 6 and starts_with(start, 6, b"public", 6)) or (
                size == 8 and starts_with(start, 8, b"s-maxage", 8)
            ):
                continue
            size = end - start
            if (size == 7 and starts_with(start, 7, b"private", 7)) or (
                size == 8 and starts_with(start, 8, b"no-store", 8)
            ):
                private = True
            p = put(p, b", ", 2)
            p = put(p, start, size)
    size = p - out
    if private:
        size -= 9
        for i in range(<uint32_t> size):  # the two overlap
            out[i] = out[i + 9]
    return size


cdef inline uint8_t *put_field(uint8_t *out, const uint8_t *data, const Field *field) noexcept nogil:
    out = put(out, data + field.name.at, field.name.size)
    out = put(out, b": ", 2)
    out = put(out, data + field.value.at, field.value.size)
    return put(out, b"\r\n", 2)


cdef Py_ssize_t write_request_head(
    const uint8_t *data, const RequestHead *head, uint8_t *out,
    const uint8_t *inject, Py_ssize_t inject_size, const char *bearer, Py_ssize_t bearer_size,
) noexcept nogil:
    cdef const Field *field
    cdef const uint8_t *run = NULL      # lines that pass as they are and lie side by side
    cdef const uint8_t *run_end = NULL
    cdef uint8_t *p = out
    cdef Py_ssize_t size
    cdef uint32_t i
    p = put(p, data + head.method.at, head.method.size)
    p = put(p, b" ", 1)
    p = put(p, data + head.target.at, head.target.size)
    p = put(p, b" HTTP/1.1\r\n", 11)
    for i in range(head.fields.count):
        field = &head.fields.field[i]
        if field.flags & (HOP_BY_HOP | NOMINATED | RESERVED) or field.id == F_EXPECT:
            continue
        if field.id == F_AUTHORIZATION and is_our_bearer(data, field.value, bearer, bearer_size):
            continue
        if field.flags & PLAIN and field.id != F_COOKIE:
            if data + field.name.at != run_end:
                p = put(p, run, run_end - run) if run != run_end else p
                run = data + field.name.at
            run_end = data + field.value.at + field.value.size + 2
            continue
        p = put(p, run, run_end - run) if run != run_end else p
        run = run_end
        if field.id != F_COOKIE:
            p = put_field(p, data, field)
            continue
        size = write_cookie(data, field.value, p + field.name.size + 2)
        if size:
            p = put(p, data + field.name.at, field.name.size)
            p = put(p, b": ", 2) + size
            p = put(p, b"\r\n", 2)
    p = put(p, run, run_end - run) if run != run_end else p
    if head.upgrade == UPGRADE_WEBSOCKET:
        p = put(p, b"Connection: Upgrade\r\nUpgrade: websocket\r\n", 41)
    if p - out + inject_size + 2 > MAX_HEAD:
        return E_TOO_LARGE
    p = put(p, inject, inject_size)
    p = put(p, b"\r\n", 2)
    return p - out


cdef Py_ssize_t write_response_head(const uint8_t *data, const ResponseHead *head, uint8_t *out) noexcept nogil:
    cdef const Field *field
    cdef const uint8_t *run = NULL
    cdef const uint8_t *run_end = NULL
    cdef uint8_t *p = put(out, b"HTTP/1.1 ", 9)
    cdef Py_ssize_t size
    cdef uint32_t i
    p[0] = <uint8_t> (c"0" + head.status // 100)
    p[1] = <uint8_t> (c"0" + head.status // 10 % 10)
    p[2] = <uint8_t> (c"0" + head.status % 10)
    p[3] = SP
    p += 4
    if head.has_reason:
        p = put(p, data + head.reason.at, head.reason.size)
    elif PHRASE[head.status] != NULL:
        p = put(p, PHRASE[head.status], PHRASE_SIZE[head.status])
    p = put(p, b"\r\n", 2)
    for i in range(head.fields.count):
        field = &head.fields.field[i]
        if field.flags & (HOP_BY_HOP | NOMINATED | RESERVED | DROPPED) or field.id == F_CONTENT_LENGTH:
            continue
        if field.id == F_CACHE_CONTROL:
            continue
        if field.flags & PLAIN and field.id != F_SET_COOKIE:
            if data + field.name.at != run_end:
                p = put(p, run, run_end - run) if run != run_end else p
                run = data + field.name.at
            run_end = data + field.value.at + field.value.size + 2
            continue
        p = put(p, run, run_end - run) if run != run_end else p
        run = run_end
        if field.id != F_SET_COOKIE:
            p = put_field(p, data, field)
            continue
        size = write_set_cookie(data, field.value, p + field.name.size + 2)
        if size >= 0:
            p = put(p, data + field.name.at, field.name.size)
            p = put(p, b": ", 2) + size
            p = put(p, b"\r\n", 2)
    p = put(p, run, run_end - run) if run != run_end else p
    if head.status == 101:
        p = put(p, b"Connection: Upgrade\r\nUpgrade: websocket\r\n", 41)
    elif head.status >= 200:
        p = put(p, b"Cache-Control: ", 15)
        p += write_cache_control(data, &head.fields, p)
        p = put(p, b"\r\n", 2)
    return p - out


# ------------------------------------------------------------------------------------------------------------
# From Python: for tests, tools, and code that is not on the fast path


class BadHttp(ValueError):
    """What the scanner refuses. `code` is the Error of http1.pxd, `status` what to answer to a visitor."""

    def __init__(self, code):
        self.code = code
        self.status = error_status(code)
        self.reason = (<bytes> error_reason(code)).decode("ascii")
        super().__init__(self.reason)


_FRAMING = ("none", "length", "chunked", "close")
_UPGRADE = (None, "websocket", "other")


cdef RequestHead request_scratch
cdef ResponseHead response_scratch


cdef class Request:
    """A request head as Python objects."""

    cdef readonly int size
    cdef readonly bytes method
    cdef readonly bytes target
    cdef readonly int minor
    cdef readonly list fields
    cdef readonly list flags
    cdef readonly str framing
    cdef readonly object content_length
    cdef readonly bint keep_alive
    cdef readonly object upgrade
    cdef readonly bint expect_continue


cdef class Response:
    """A response head as Python objects."""

    cdef readonly int size
    cdef readonly int status
    cdef readonly object reason
    cdef readonly int minor
    cdef readonly list fields
    cdef readonly list flags
    cdef readonly str framing
    cdef readonly object content_length
    cdef readonly bint keep_alive
    cdef readonly object upgrade


cdef inline bytes cut(const uint8_t *data, Span span):
    return PyBytes_FromStringAndSize(<const char *> data + span.at, span.size)


cdef list field_list(const uint8_t *data, const Fields *fields):
    cdef uint32_t i
    return [(cut(data, fields.field[i].name), cut(data, fields.field[i].value)) for i in range(fields.count)]


cdef list flag_list(const Fields *fields):
    cdef uint32_t i
    return [fields.field[i].flags for i in range(fields.count)]


def parse_request(bytes data not None, bint from_edge=False):
    """The Request at the start of `data`; None when it is not complete. Raises BadHttp."""
    cdef const uint8_t *p = <const uint8_t *> PyBytes_AS_STRING(data)
    cdef uint32_t searched = 0
    cdef RequestHead *head = &request_scratch
    cdef Request request
    cdef int result = scan_request(p, PyBytes_GET_SIZE(data), head, &searched, FROM_EDGE if from_edge else 0)
    if result < 0:
        raise BadHttp(result)
    if result == 0:
        return None
    request = Request.__new__(Request)
    request.size = result
    request.method = cut(p, head.method)
    request.target = cut(p, head.target)
    request.minor = head.minor
    request.fields = field_list(p, &head.fields)
    request.flags = flag_list(&head.fields)
    request.framing = _FRAMING[head.framing]
    request.content_length = head.content_length
    request.keep_alive = head.keep_alive
    request.upgrade = _UPGRADE[head.upgrade]
    request.expect_continue = head.expect_continue
    return request


def parse_response(bytes data not None, bint to_head=False, bint from_gateway=False):
    """The Response at the start of `data`; None when it is not complete. Raises BadHttp."""
    cdef const uint8_t *p = <const uint8_t *> PyBytes_AS_STRING(data)
    cdef uint32_t searched = 0
    cdef ResponseHead *head = &response_scratch
    cdef Response response
    cdef unsigned options = (TO_HEAD if to_head else 0) | (FROM_GATEWAY if from_gateway else 0)
    cdef int result = scan_response(p, PyBytes_GET_SIZE(data), head, &searched, options)
    if result < 0:
        raise BadHttp(result)
    if result == 0:
        return None
    response = Response.__new__(Response)
    response.size = result
    response.status = head.status
    response.reason = cut(p, head.reason) if head.has_reason else None
    response.minor = head.minor
    response.fields = field_list(p, &head.fields)
    response.flags = flag_list(&head.fields)
    response.framing = _FRAMING[head.framing]
    response.content_length = head.content_length if head.has_length else None
    response.keep_alive = head.keep_alive
    response.upgrade = _UPGRADE[head.upgrade]
    return response


def resume(data, uint32_t searched, bint response=False):
    """(result, searched) of one call of scan_request or scan_response, as C code sees them. `data` is a buffer."""
    cdef Py_buffer view
    cdef int result
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if response:
            result = scan_response(<const uint8_t *> view.buf, view.len, &response_scratch, &searched, 0)
        else:
            result = scan_request(<const uint8_t *> view.buf, view.len, &request_scratch, &searched, 0)
    finally:
        PyBuffer_Release(&view)
    return result, searched


def request_for_gateway(bytes data not None, bytes inject not None, bytes bearer_prefix not None):
    """The head for OPEN, made of the complete head at the start of `data`. Raises BadHttp."""
    cdef const uint8_t *p = <const uint8_t *> PyBytes_AS_STRING(data)
    cdef uint32_t searched = 0
    cdef bytearray out = bytearray(WRITE_ROOM)
    cdef Py_ssize_t size = scan_request(p, PyBytes_GET_SIZE(data), &request_scratch, &searched, 0)
    if size > 0:
        size = write_request_head(
            p, &request_scratch, <uint8_t *> out,
            <const uint8_t *> PyBytes_AS_STRING(inject), PyBytes_GET_SIZE(inject),
            PyBytes_AS_STRING(bearer_prefix), PyBytes_GET_SIZE(bearer_prefix),
        )
    if size < 0:
        raise BadHttp(size)
    return bytes(out[:size])


def response_for_visitor(bytes data not None):
    """Status line and fields for the visitor, made of the complete head of a gateway in `data`. Raises BadHttp."""
    cdef const uint8_t *p = <const uint8_t *> PyBytes_AS_STRING(data)
    cdef uint32_t searched = 0
    cdef bytearray out = bytearray(WRITE_ROOM)
    cdef Py_ssize_t size = scan_response(p, PyBytes_GET_SIZE(data), &response_scratch, &searched, FROM_GATEWAY)
    if size > 0:
        size = write_response_head(p, &response_scratch, <uint8_t *> out)
    if size < 0:
        raise BadHttp(size)
    return bytes(out[:size])


def cookies_named(bytes data not None, bytes name not None):
    """(how often a cookie of this name came, its last value or None) in the complete request head `data`."""
    cdef const uint8_t *p = <const uint8_t *> PyBytes_AS_STRING(data)
    cdef uint32_t searched = 0
    cdef Span value
    cdef int result = scan_request(p, PyBytes_GET_SIZE(data), &request_scratch, &searched, 0)
    if result < 0:
        raise BadHttp(result)
    result = find_cookie(p, &request_scratch.fields, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name), &value)
    return result, cut(p, value) if result else None


def bearer_token(bytes data not None, bytes prefix not None):
    """The bearer token that begins with `prefix` in the complete request head `data`, or None."""
    cdef const uint8_t *p = <const uint8_t *> PyBytes_AS_STRING(data)
    cdef uint32_t searched = 0
    cdef Span token
    cdef int result = scan_request(p, PyBytes_GET_SIZE(data), &request_scratch, &searched, 0)
    if result < 0:
        raise BadHttp(result)
    if find_bearer(p, &request_scratch.fields, PyBytes_AS_STRING(prefix), PyBytes_GET_SIZE(prefix), &token):
        return cut(p, token)
    return None


def reserved(bytes name not None, bint response=False):
    """Whether only the edge may say this name to an application (to a visitor, with `response`)."""
    cdef const uint8_t *p = <const uint8_t *> PyBytes_AS_STRING(name)
    if response:
        return bool(is_reserved_in_response(p, PyBytes_GET_SIZE(name)))
    return bool(is_reserved(p, PyBytes_GET_SIZE(name)))


def field_id(bytes name not None):
    """The number of a known name, 0 for others. `name` is a token."""
    return find_known(<const uint8_t *> PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name)) if name else 0


def repeat(bytes data not None, int loops, bint response=False, bint write=False):
    """Scan the complete head `data` so many times, and write it for the next hop: for benchmarks. Raises BadHttp."""
    cdef const uint8_t *p = <const uint8_t *> PyBytes_AS_STRING(data)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    cdef Py_ssize_t result = 0
    cdef uint32_t searched = 0
    cdef bytearray room = bytearray(WRITE_ROOM)
    cdef uint8_t *out = <uint8_t *> room
    cdef int _
    for _ in range(loops):
        if response:
            result = scan_response(p, size, &response_scratch, &searched, 0)
            if write and result > 0:
                result = write_response_head(p, &response_scratch, out)
        else:
            result = scan_request(p, size, &request_scratch, &searched, 0)
            if write and result > 0:
                result = write_request_head(p, &request_scratch, out, p, 0, b"gp_", 3)
        if result <= 0:
            raise BadHttp(<int> result)


cdef class ChunkedDecoder:
    """A chunked body, fed in pieces of any size."""

    cdef Chunked _body
    cdef readonly bytes trailers
    cdef readonly bint ended

    def __cinit__(self, bint response=False):
        memset(&self._body, 0, sizeof(Chunked))
        self._body.response = response
        self.trailers = b""
        self.ended = False

    def feed(self, data):
        """(body bytes, how much of the buffer `data` belongs to this body). Raises BadHttp."""
        cdef Py_buffer view
        cdef Py_ssize_t at = 0
        cdef Span piece
        cdef list pieces = []
        cdef int event
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            while True:
                event = next_chunk(&self._body, <const uint8_t *> view.buf, view.len, &at, &piece)
                if event < 0:
                    raise BadHttp(event)
                if event == CHUNK_DATA:
                    pieces.append(cut(<const uint8_t *> view.buf, piece))
                elif event == CHUNK_TRAILER:
                    self.trailers += cut(<const uint8_t *> view.buf, piece)
                else:
                    self.ended = event == CHUNK_END
                    return b"".join(pieces), at
        finally:
            PyBuffer_Release(&view)
