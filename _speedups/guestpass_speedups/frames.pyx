"""Frame codec of the tunnel. Wire format: guestpass/mux/SPEC.md, section 2.

    bytes 0-1  payload length     DATA <= 16,368, other frames <= 65,535
    byte  2    type               FrameType; 13 and up are skipped by receivers
    byte  3    flags              Flag.FIN = 1, Flag.INTERIM = 2
    bytes 4-7  stream id          bit 31 zero; 0 = the tunnel

The session (session.pyx) reads and writes frames in place with the inline functions of frames.pxd; what is
visible from Python here serves tests, tools and other implementations of the same page. The table of lengths
and ids, SHAPES in frames.pxd, is the one that the session checks headers by.
"""

from enum import IntEnum, IntFlag

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcpy


class FrameType(IntEnum):
    DATA = 0
    OPEN = 1
    HEAD = 2
    TRAILERS = 3
    CREDIT = 4
    RESET = 5
    RESET_ACK = 6
    PING = 7
    PONG = 8
    GOAWAY = 9
    HELLO = 10
    AUTH = 11
    INFO = 12


class Flag(IntFlag):
    FIN = 1
    INTERIM = 2


def encode_frame(unsigned char kind, unsigned char flags, unsigned int stream, bytes payload not None):
    """One frame as bytes. Checks only that the length fits its field: tests write broken ones. ValueError."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(payload)
    if size > MAX_PAYLOAD:
        raise ValueError(f"payload of {size} bytes does not fit a frame")
    cdef bytes frame = PyBytes_FromStringAndSize(NULL, HEADER_SIZE + size)
    cdef unsigned char *out = <unsigned char *> PyBytes_AS_STRING(frame)
    put_header(out, <uint32_t> size, kind, flags, stream)
    memcpy(out + HEADER_SIZE, PyBytes_AS_STRING(payload), size)
    return frame


def decode_header(const unsigned char[::1] data not None):
    """(payload length, type, flags, stream id) of the 8 bytes at the start of `data`.

    Raises ValueError when there are fewer than 8 bytes, or when SPEC.md, 2. does not allow the header.
    """
    if data.shape[0] < HEADER_SIZE:
        raise ValueError("a frame header has 8 bytes")
    cdef uint32_t length = get_u16(&data[0])
    cdef uint32_t stream = get_u32(&data[4])
    cdef const char *reason = check_header(length, data[2], stream)
    if reason != NULL:
        raise ValueError((<bytes> reason).decode())
    return length, data[2], data[3], stream


def split_frames(bytes data not None):
    """([(type, flags, stream id, payload), …], rest): whole frames at the start of `data`.

    Raises as decode_header.
    """
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    cdef const unsigned char *p = <const unsigned char *> PyBytes_AS_STRING(data)
    cdef list frames = []
    while size - at >= HEADER_SIZE:
        length, kind, flags, stream = decode_header(data[at : at + HEADER_SIZE])
        if size - at - HEADER_SIZE < get_u16(p + at):
            break
        frames.append((kind, flags, stream, data[at + HEADER_SIZE : at + HEADER_SIZE + length]))
        at += HEADER_SIZE + get_u16(p + at)
    return frames, data[at:]
