from libc.stdint cimport uint8_t, uint64_t


cdef class Wire:
    cdef public object session          # a Session, from `connection_made` on
    cdef public object end              # why the tunnel ended; None: it has not
    cdef public uint64_t bytes_received
    cdef public uint64_t bytes_sent     # tunnel bytes without WebSocket and TLS framing
    cdef public object guard            # called before what was read is looked at, and before anything is written
    cdef public object _transport
    cdef public object _websocket       # a WebSocket
    cdef public object _end_due         # an end that was decided while the session was busy
    cdef public bint _paused            # writing, by the transport
    cdef public bint _receiving
    cdef public bint _raw               # what is read is not WebSocket frames yet: `_received_raw`
    cdef public uint64_t _written       # bytes handed to the transport
    cdef object _call_soon
    cdef object _write
    cdef bytearray _storage
    cdef bytearray _out                 # None: the transport keeps what it is given
    cdef bint _flush_due

    cdef int _read(self, uint8_t *data, Py_ssize_t size) except -1
