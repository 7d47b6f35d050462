"""The tunnel: SPEC.md is the wire format; `link` drives one over a socket, `stream` is one exchange inside it."""
