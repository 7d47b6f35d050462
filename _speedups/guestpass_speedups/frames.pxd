# Wire format of one frame, as C: constants and the (un)packing of big-endian integers. Text:
# guestpass/mux/SPEC.md, 2.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    # memcpy and a byte swap compile to one instruction (movbe, or mov + bswap) and are indifferent to
    # alignment.
    """
    #include <stdint.h>
    #include <string.h>
    #if defined(_MSC_VER)
    #include <stdlib.h>
    #define gp_swap16 _byteswap_ushort
    #define gp_swap32 _byteswap_ulong
    #define gp_swap64 _byteswap_uint64
    #elif __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    #define gp_swap16 __builtin_bswap16
    #define gp_swap32 __builtin_bswap32
    #define gp_swap64 __builtin_bswap64
    #else
    #define gp_swap16(x) (x)
    #define gp_swap32(x) (x)
    #define gp_swap64(x) (x)
    #endif
    static inline uint16_t get_u16(const unsigned char *p) {
        uint16_t v; memcpy(&v, p, 2); return gp_swap16(v);
    }
    static inline uint32_t get_u32(const unsigned char *p) {
        uint32_t v; memcpy(&v, p, 4); return gp_swap32(v);
    }
    static inline uint64_t get_u64(const unsigned char *p) {
        uint64_t v; memcpy(&v, p, 8); return gp_swap64(v);
    }
    static inline void put_u16(unsigned char *p, uint16_t v) { v = gp_swap16(v); memcpy(p, &v, 2); }
    static inline void put_u32(unsigned char *p, uint32_t v) { v = gp_swap32(v); memcpy(p, &v, 4); }
    static inline void put_u64(unsigned char *p, uint64_t v) { v = gp_swap64(v); memcpy(p, &v, 8); }
    static inline void put_header(
            unsigned char *p, uint32_t length, uint8_t type, uint8_t flags, uint32_t stream) {
        put_u16(p, (uint16_t)length); p[2] = type; p[3] = flags; put_u32(p + 4, stream);
    }

    /* SPEC.md, 2.: payload length at least, at most; whether the frame is the tunnel's own (stream id 0). */
    typedef struct { uint16_t least; uint16_t most; uint8_t tunnel; } Shape;
    static const Shape SHAPES[13] = {
        {0, 16368, 0},  /* DATA */
        {4, 65535, 0},  /* OPEN */
        {2, 65535, 0},  /* HEAD */
        {0, 32768, 0},  /* TRAILERS */
        {8, 8, 0},      /* CREDIT */
        {4, 4, 0},      /* RESET */
        {0, 0, 0},      /* RESET_ACK */
        {8, 8, 1},      /* PING */
        {8, 8, 1},      /* PONG */
        {8, 8, 1},      /* GOAWAY */
        {0, 16384, 1},  /* HELLO */
        {0, 16384, 1},  /* AUTH */
        {0, 65535, 1},  /* INFO */
    };
    """
    ctypedef struct Shape:
        uint16_t least
        uint16_t most
        uint8_t tunnel
    const Shape[13] SHAPES

    uint16_t get_u16(const unsigned char *p) noexcept nogil
    uint32_t get_u32(const unsigned char *p) noexcept nogil
    uint64_t get_u64(const unsigned char *p) noexcept nogil
    void put_u16(unsigned char *p, uint16_t v) noexcept nogil
    void put_u32(unsigned char *p, uint32_t v) noexcept nogil
    void put_u64(unsigned char *p, uint64_t v) noexcept nogil
    void put_header(
        unsigned char *p, uint32_t length, uint8_t type, uint8_t flags, uint32_t stream) noexcept nogil

cdef enum:
    HEADER_SIZE = 8
    MAX_DATA = 16368        # with both headers (8 + 8) one TLS record of 16 KiB
    MAX_PAYLOAD = 65535     # what the length field holds
    MAX_FRAME = 65543
    MAX_HEAD = 32768        # nginx takes 4 × 8 KiB, Node 16 KiB; more is refused before it costs anything
    MAX_HANDSHAKE = 16384   # HELLO and AUTH are some hundred bytes; an unauthenticated peer may not hold more
    MAX_STREAM_ID = 0x3FFFFFFF

    FLAG_FIN = 1
    FLAG_INTERIM = 2

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
    N_TYPES = 13


cdef inline const char *check_header(uint32_t length, uint8_t kind, uint32_t stream) noexcept nogil:
    """NULL when the table allows this header, else the reason for PROTOCOL_ERROR."""
    if stream >> 31:
        return b"bit 31 of a stream id is set"
    if kind >= N_TYPES:
        return NULL
    if length < SHAPES[kind].least:
        return b"frame is too short for its type"
    if length > SHAPES[kind].most:
        return b"frame is too long for its type"
    if SHAPES[kind].tunnel:
        if stream != 0:
            return b"tunnel frame with a stream id"
    elif stream == 0:
        return b"stream frame without a stream id"
    return NULL
