from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    HEADER_MAX = 14     # 2 + 8 (length) + 4 (masking key)


cdef void mask_bytes(
    uint8_t* target, const uint8_t* source, Py_ssize_t size, uint32_t key, unsigned phase
) noexcept nogil

cdef class WebSocket:
    cdef readonly bint client
    cdef readonly object close_code
    cdef readonly bint close_sent
    # Header of the frame that is being read, and how much of it is there.
    cdef uint8_t _header[14]
    cdef int _have
    cdef int _need
    # Payload of the frame that is being read.
    cdef uint64_t _left
    cdef uint32_t _key
    cdef unsigned _phase
    cdef int _opcode
    cdef bint _in_payload
    cdef bint _fragmented
    cdef bint _message_ends
    cdef uint8_t _control[125]
    cdef int _control_size
    cdef bytes _replies
    # Random bytes for masking keys, drawn in bulk.
    cdef bytes _random
    cdef Py_ssize_t _random_used

    cdef int _draw(self) except -1
    cdef uint32_t _new_key(self) except? 0
    cdef Py_ssize_t _parse(self, const uint8_t* source, Py_ssize_t size, uint8_t* target, Py_ssize_t* start) except -1
    cdef int _header_complete(self) except -1
    cdef int _payload_complete(self) except -1
    cdef int _control_complete(self) except -1
    # One binary message of `size` bytes where they lie, masked in place; where it begins, at most HEADER_MAX before.
    cdef uint8_t *cover(self, uint8_t *payload, Py_ssize_t size) except NULL
    cdef int _header_of(self, uint8_t *header, int opcode, Py_ssize_t size, uint32_t *key) except -1
    cdef bytes _frame(self, int opcode, const uint8_t* payload, Py_ssize_t size)
