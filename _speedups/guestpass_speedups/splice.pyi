"""Streams from one worker's visitors to another worker's tunnels: see splice.pyx."""

from guestpass_speedups.session import Session

class SpliceSession(Session): ...
