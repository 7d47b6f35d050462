"""Work for a tunnel's two ends in C, as a fast lane does it: `Stream` and `Session` by their C interface (session.pxd).

No Python object is made for a frame beyond those that `Session` makes itself. What carries the session, `Link`, its
transport and its WebSocket, is the production code.
"""

from libc.stdint cimport uint32_t

from guestpass_speedups.session cimport Session, Stream

cdef bytes REQUEST = b"GET /x HTTP/1.1\r\nhost: a.b\r\naccept: */*\r\n\r\n"
cdef bytes RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-length: 200\r\n\r\n"
cdef enum:
    SIZE = 200
cdef bytes BODY = bytes(SIZE)
cdef bytes PIECE = bytes(64 * 1024)


cdef class WorkStream(Stream):
    """Gateway: sends back what comes; a request for /bulk/SIZE gets so many bytes, in pieces of 64 KiB."""

    cdef Py_ssize_t left

    cdef int on_data(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1:
        self.consumed(<uint32_t> size)
        self.send_raw(data, size, fin)
        return 0

    cdef int on_writable(self) except -1:
        cdef Py_ssize_t size
        while self.left:
            size = min(self.left, <Py_ssize_t> len(PIECE))
            self.left -= size
            if not self.send(PIECE if size == len(PIECE) else PIECE[:size], fin=self.left == 0):
                break
        return 0

    cdef int on_reset(self, uint32_t code) except -1:
        self.left = 0
        return self.work_ended()


cdef class WorkSession(Session):
    """Gateway: every stream is a WorkStream."""

    cdef Stream new_stream(self):
        return WorkStream.__new__(WorkStream)

    cdef bint on_stream_opened(self, Stream stream, const unsigned char *service, Py_ssize_t service_size,
                               bint interactive, const unsigned char *head, Py_ssize_t head_size,
                               bint fin) except -1:
        cdef bytes line
        stream.send_head_raw(RESPONSE, len(RESPONSE), False, False)
        if head[5] == c"b":
            line = head[:head_size]
            (<WorkStream> stream).left = int(line.split(b" ", 2)[1].removeprefix(b"/bulk/"))
            stream.on_writable()
        return True


cdef class Load:
    """Edge: `total` streams, `concurrent` at a time; each opens, sends 200 B and FIN, gets them back, closes.

    A stream that closes has the next one opened. `done` is called when the last one has closed."""

    cdef Session session
    cdef Py_ssize_t left
    cdef Py_ssize_t open
    cdef object done

    def __init__(self, Session session not None, Py_ssize_t total, Py_ssize_t concurrent, done):
        self.session = session
        self.left = total
        self.done = done
        for _ in range(concurrent):
            self.another()

    cdef int another(self) except -1:
        cdef LoadStream stream
        if self.left == 0:
            return 0
        self.left -= 1
        self.open += 1
        stream = LoadStream.__new__(LoadStream)
        stream.load = self
        self.session.open_raw(stream, b"web", 3, True, REQUEST, len(REQUEST), False)
        stream.send_raw(BODY, SIZE, True)
        return 0

    cdef int closed(self, bint whole) except -1:
        self.open -= 1
        if not whole:
            self.left = 0
            self.done(RuntimeError("a stream ended without its 200 bytes"))
        elif self.left:
            self.another()
        elif self.open == 0:
            self.done(None)
        return 0


cdef class LoadStream(Stream):
    cdef Load load
    cdef Py_ssize_t got

    cdef int on_head(self, const unsigned char *head, Py_ssize_t size, bint interim, bint fin) except -1:
        return 0

    cdef int on_data(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1:
        self.got += size
        return self.consumed(<uint32_t> size)

    cdef int on_reset(self, uint32_t code) except -1:
        return self.work_ended()

    cdef int on_closed(self) except -1:
        cdef Load load = self.load
        self.load = None
        return load.closed(self.got == SIZE)


cdef class SinkStream(Stream):
    """Edge: counts and consumes; `done` is called at the end."""

    cdef readonly Py_ssize_t got
    cdef readonly Py_ssize_t last_window
    cdef object done

    cdef int on_head(self, const unsigned char *head, Py_ssize_t size, bint interim, bint fin) except -1:
        return 0

    cdef int on_data(self, const unsigned char *data, Py_ssize_t size, bint fin) except -1:
        self.got += size
        return self.consumed(<uint32_t> size)

    cdef int on_reset(self, uint32_t code) except -1:
        return self.work_ended()

    cdef int on_closed(self) except -1:
        self.last_window = self.window
        self.done(None)
        return 0


def fetch(Session session not None, bytes head not None, done):
    """Opens a SinkStream for a request without a body."""
    cdef SinkStream stream = SinkStream.__new__(SinkStream)
    stream.done = done
    session.open_raw(stream, b"web", 3, False, head, len(head), True)
    return stream
