# Writing to a plain socket past its transport, for answers that are complete: no object is made for what the kernel
# takes at once. Only while the transport has nothing waiting, or the order of bytes would be lost; what the kernel does
# not take, and what is wrong, is the transport's. The descriptor is open for as long as the protocol was not told of
# the connection's loss: uvloop and asyncio close it after that.

cdef extern from *:
    """
    #include <Python.h>
    #if defined(__linux__)
    #include <sys/socket.h>
    #include <sys/uio.h>
    #define GP_DIRECT 1
    static Py_ssize_t gp_send(int fd, struct iovec *pieces, size_t count) {
        struct msghdr message;
        if (count == 1)
            return send(fd, pieces->iov_base, pieces->iov_len, MSG_DONTWAIT | MSG_NOSIGNAL);
        memset(&message, 0, sizeof(message));
        message.msg_iov = pieces;
        message.msg_iovlen = count;
        return sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    #else
    #define GP_DIRECT 0
    struct iovec { void *iov_base; size_t iov_len; };
    static Py_ssize_t gp_send(int fd, struct iovec *pieces, size_t count) {
        (void) fd; (void) pieces; (void) count;
        return -1;
    }
    #endif
    """
    struct iovec:
        void *iov_base
        size_t iov_len

    int GP_DIRECT
    Py_ssize_t gp_send(int fd, iovec *pieces, size_t count) noexcept


cdef inline int descriptor(transport) except -2:
    """Of a plain socket's transport; -1: it is to be written to by the transport only."""
    if not GP_DIRECT or transport.get_extra_info("sslcontext") is not None:
        return -1
    sock = transport.get_extra_info("socket")
    return -1 if sock is None else <int> sock.fileno()
