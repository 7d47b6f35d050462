r"""RFC 6455 framing for a tunnel: binary messages whose boundaries mean nothing. Sans-I/O.

How it works
------------

A tunnel is a stream of bytes that happens to travel in binary messages, so payload is handed on as it arrives: no
message is ever collected, and a message may be of any length or cut into any fragments. What one read brought is
turned into one contiguous run of payload bytes:

    read buffer   | header | payload ...... | header | payload .. |
                            \                          \
    result                   | payload ...... payload .. |          (in the same buffer, unmasked)

`feed_into` does that in place, in the buffer that the transport has read into; the first payload stays where it is,
so that the usual read (one message) moves nothing. `feed` does the same for bytes that nobody may change.

Strict as RFC 6455 section 5 wants it: reserved bits and opcodes, the direction of masking, the shortest form of a
length, control frames whole and of at most 125 bytes. Text messages are refused, the tunnel has none. A ping is
answered once per read, for the latest one (5.5.3 allows that), so a flood of pings queues nothing.

    WARNING. What `feed_into` returns is a view of the caller's buffer: it is gone with the next read.
"""

from os import urandom

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove

from guestpass_speedups.session cimport Session

# Opcodes, RFC 6455 section 5.2.
cdef enum:
    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA

cdef enum:
    FIN_BIT = 0x80
    RSV_BITS = 0x70
    OPCODE_BITS = 0x0F
    MASK_BIT = 0x80
    CONTROL_BIT = 0x08
    CONTROL_MAX = 125  # RFC 6455 section 5.5
    # Masking keys drawn at a time: a system call for 1,024 frames instead of one for each.
    RANDOM_POOL = 4096

# Close codes, RFC 6455 section 7.4.1.
NORMAL = 1000
GOING_AWAY = 1001
PROTOCOL_ERROR = 1002
UNSUPPORTED_DATA = 1003


class WebSocketError(Exception):
    """The peer broke RFC 6455. `code` is the close code to send."""

    def __init__(self, code, reason):
        super().__init__(reason)
        self.code = code
        self.reason = reason


cdef void mask_bytes(
    uint8_t* target, const uint8_t* source, Py_ssize_t size, uint32_t key, unsigned phase
) noexcept nogil:
    """XOR with the masking key, whose byte 0 applies `phase` bytes before `source`. In place when both are the same.

    `key` holds the four bytes in memory order. Eight bytes at a time; the compiler makes vectors of that.
    """
    cdef uint8_t bytes_of_key[4]
    cdef uint8_t turned[8]
    cdef uint64_t wide, word
    cdef Py_ssize_t i = 0
    cdef int k
    memcpy(bytes_of_key, &key, 4)
    for k in range(8):
        turned[k] = bytes_of_key[(phase + <unsigned>k) & 3]
    memcpy(&wide, turned, 8)
    while i + 8 <= size:
        memcpy(&word, source + i, 8)
        word ^= wide
        memcpy(target + i, &word, 8)
        i += 8
    while i < size:
        target[i] = source[i] ^ turned[i & 7]
        i += 1


cdef class WebSocket:
    """One end of a connection after the opening handshake."""

    def __init__(self, bint client):
        self.client = client
        self.close_code = None
        self.close_sent = False
        self._have = 0
        self._need = 2
        self._left = 0
        self._in_payload = False
        self._fragmented = False
        self._replies = b""
        self._random = b""
        self._random_used = 0

    def feed(self, data):
        """Payload bytes of what was read. `data` stays as it is. Raises WebSocketError."""
        cdef Py_buffer view
        cdef bytes out
        cdef Py_ssize_t size, start = 0
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            out = PyBytes_FromStringAndSize(NULL, view.len)
            size = self._parse(<const uint8_t*> view.buf, view.len, <uint8_t*> PyBytes_AS_STRING(out), &start)
        finally:
            PyBuffer_Release(&view)
        return out[start:start + size]

    def feed_into(self, buffer, Py_ssize_t size):
        """The same for the first `size` bytes of a writable memoryview, in place: a view of its payload bytes, which
        is valid until the buffer is written to again. Raises WebSocketError."""
        cdef Py_buffer view
        cdef Py_ssize_t length, start = 0
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            if size < 0 or size > view.len:
                raise ValueError("size is beyond the buffer")
            length = self._parse(<const uint8_t*> view.buf, size, <uint8_t*> view.buf, &start)
        finally:
            PyBuffer_Release(&view)
        return buffer[start:start + length]

    def wrap(self, payload):
        """One binary message. One copy."""
        cdef Py_buffer view
        PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
        try:
            return self._frame(BINARY, <const uint8_t*> view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    def wrap_output(self, Session session not None, Py_ssize_t limit, double now):
        """One binary message of what `session.fill(limit, now)` would give, b"" if there is nothing to send.

        One copy, where `wrap` of `fill` makes two."""
        cdef Py_ssize_t size
        cdef bytes message
        if self.client and self._random_used + 4 > PyBytes_GET_SIZE(self._random):
            self._draw()        # first: the system call lets other threads run, and their sessions share the buffer
        size = session.fill_shared(limit, now)
        message = self._frame(BINARY, session.shared(), size) if size else b""
        session.filled()
        return message

    def close(self, int code=NORMAL, bytes reason=b""):
        """A close frame, once: b"" if one was sent before. `reason` is UTF-8; cut to what fits."""
        cdef bytes payload
        if self.close_sent:
            return b""
        self.close_sent = True
        payload = code.to_bytes(2, "big") + reason[:CONTROL_MAX - 2]
        return self._frame(CLOSE, <const uint8_t*> PyBytes_AS_STRING(payload), PyBytes_GET_SIZE(payload))

    def take_replies(self):
        """What must be written in answer to control frames: a pong, the answer to a close frame, or b""."""
        cdef bytes replies = self._replies
        self._replies = b""
        return replies

    cdef uint32_t _new_key(self) except? 0:
        """RFC 6455 section 5.3: unpredictable, fresh for every frame."""
        cdef uint32_t key
        if self._random_used + 4 > PyBytes_GET_SIZE(self._random):
            self._draw()
        memcpy(&key, PyBytes_AS_STRING(self._random) + self._random_used, 4)
        self._random_used += 4
        return key

    cdef int _draw(self) except -1:
        self._random = urandom(RANDOM_POOL)
        self._random_used = 0
        return 0

    cdef int _header_of(self, uint8_t *header, int opcode, Py_ssize_t size, uint32_t *key) except -1:
        """The header of a frame into `header`, its length; the masking key into `key`."""
        cdef int length = 2, k
        header[0] = <uint8_t> (FIN_BIT | opcode)
        if size <= 125:
            header[1] = <uint8_t> size
        elif size <= 0xFFFF:
            header[1] = 126
            header[2] = <uint8_t> (size >> 8)
            header[3] = <uint8_t> (size & 0xFF)
            length = 4
        else:
            header[1] = 127
            for k in range(8):
                header[2 + k] = <uint8_t> ((<uint64_t> size >> (8 * (7 - k))) & 0xFF)
            length = 10
        if self.client:
            header[1] |= MASK_BIT
            key[0] = self._new_key()
            memcpy(header + length, key, 4)
            length += 4
        return length

    cdef uint8_t *cover(self, uint8_t *payload, Py_ssize_t size) except NULL:
        cdef uint8_t header[HEADER_MAX]
        cdef uint32_t key = 0
        cdef int length = self._header_of(header, BINARY, size, &key)
        memcpy(payload - length, header, length)
        if self.client:
            mask_bytes(payload, payload, size, key, 0)
        return payload - length

    cdef bytes _frame(self, int opcode, const uint8_t* payload, Py_ssize_t size):
        cdef uint8_t header[HEADER_MAX]
        cdef uint32_t key = 0
        cdef int length = self._header_of(header, opcode, size, &key)
        cdef bytes out = PyBytes_FromStringAndSize(NULL, length + size)
        cdef uint8_t* target = <uint8_t*> PyBytes_AS_STRING(out)
        memcpy(target, header, length)
        if self.client:
            mask_bytes(target + length, payload, size, key, 0)
        elif size:
            memcpy(target + length, payload, size)
        return out

    cdef Py_ssize_t _parse(self, const uint8_t* source, Py_ssize_t size, uint8_t* target, Py_ssize_t* start) except -1:
        """Move the payload of `source` to one run in `target` (which may be the same memory), beginning at `start`.

        Returns the length of the run. It never writes beyond what it has read.
        """
        cdef Py_ssize_t at = 0, length = 0, chunk
        cdef bint begun = False
        start[0] = 0
        while at < size:
            if self.close_code is not None:
                return length  # after a close frame nothing counts (RFC 6455 section 5.5.1)
            if not self._in_payload:
                chunk = min(<Py_ssize_t> (self._need - self._have), size - at)
                memcpy(self._header + self._have, source + at, chunk)
                self._have += <int> chunk
                at += chunk
                if self._have == self._need:
                    self._header_complete()
                continue
            chunk = size - at
            if <uint64_t> chunk > self._left:
                chunk = <Py_ssize_t> self._left
            if self._opcode & CONTROL_BIT:
                if self.client:
                    memcpy(self._control + self._control_size, source + at, chunk)
                else:
                    mask_bytes(self._control + self._control_size, source + at, chunk, self._key, self._phase)
                self._control_size += <int> chunk
            else:
                if not begun:
                    begun = True
                    start[0] = at
                if not self.client:
                    mask_bytes(target + start[0] + length, source + at, chunk, self._key, self._phase)
                elif target + start[0] + length != source + at:
                    memmove(target + start[0] + length, source + at, chunk)
                length += chunk
            self._phase = (self._phase + <unsigned> (chunk & 3)) & 3
            self._left -= <uint64_t> chunk
            at += chunk
            if self._left == 0:
                self._payload_complete()
        return length

    cdef int _header_complete(self) except -1:
        """Called whenever `_need` bytes are there: asks for more, or starts the payload."""
        cdef int first = self._header[0], second = self._header[1], length_bytes = 0, k
        cdef int opcode = first & OPCODE_BITS
        cdef bint masked = (second & MASK_BIT) != 0
        cdef uint64_t length = second & 0x7F
        if self._have == 2:
            if first & RSV_BITS:
                raise WebSocketError(PROTOCOL_ERROR, "a reserved bit is set in a WebSocket frame")
            if masked == self.client:
                raise WebSocketError(
                    PROTOCOL_ERROR, f"a {'server' if self.client else 'client'}'s WebSocket frame has the wrong masking"
                )
            if opcode & CONTROL_BIT:
                if opcode != CLOSE and opcode != PING and opcode != PONG:
                    raise WebSocketError(PROTOCOL_ERROR, f"WebSocket opcode {opcode} is reserved")
                if not first & FIN_BIT or length > CONTROL_MAX:
                    raise WebSocketError(PROTOCOL_ERROR, "a WebSocket control frame is fragmented or too long")
            elif opcode == CONTINUATION:
                if not self._fragmented:
                    raise WebSocketError(PROTOCOL_ERROR, "a WebSocket continuation continues nothing")
            elif opcode == TEXT:
                raise WebSocketError(UNSUPPORTED_DATA, "a tunnel has no text messages")
            elif opcode != BINARY:
                raise WebSocketError(PROTOCOL_ERROR, f"WebSocket opcode {opcode} is reserved")
            elif self._fragmented:
                raise WebSocketError(PROTOCOL_ERROR, "a WebSocket message begins inside another one")
        if length == 126:
            length_bytes = 2
        elif length == 127:
            length_bytes = 8
        self._need = 2 + length_bytes + (4 if masked else 0)
        if self._have < self._need:
            return 0
        if length_bytes:
            length = 0
            for k in range(length_bytes):
                length = length << 8 | self._header[2 + k]
            if length >> 63 or length <= (125 if length_bytes == 2 else 0xFFFF):
                raise WebSocketError(PROTOCOL_ERROR, "the length of a WebSocket frame is not in its shortest form")
        if masked:
            memcpy(&self._key, self._header + 2 + length_bytes, 4)
        self._opcode = opcode
        self._message_ends = (first & FIN_BIT) != 0
        self._left = length
        self._phase = 0
        self._control_size = 0
        self._in_payload = True
        self._have = 0
        self._need = 2
        if length == 0:
            self._payload_complete()
        return 0

    cdef int _payload_complete(self) except -1:
        self._in_payload = False
        if self._opcode & CONTROL_BIT:
            return self._control_complete()
        self._fragmented = not self._message_ends
        return 0

    cdef int _control_complete(self) except -1:
        cdef int code
        if self._opcode == PING:
            self._replies = self._frame(PONG, self._control, self._control_size)
        elif self._opcode == CLOSE:
            if self._control_size == 0:
                self.close_code = 1005  # "no code present", never on the wire
            else:
                code = self._control[0] << 8 | self._control[1] if self._control_size >= 2 else 0
                # RFC 6455 section 7.4.2 and the IANA registry: what may stand in a frame.
                if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
                    raise WebSocketError(PROTOCOL_ERROR, "a WebSocket close frame has no valid code")
                self.close_code = code
            self._replies = self.close(NORMAL if self.close_code == 1005 else self.close_code)
        return 0
