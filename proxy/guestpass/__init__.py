"""Guestpass shares a private web application with one person, by email address, through a tunnel that only dials out.

Plugins import `guestpass.plugin`; everything else is used through the `guestpass` command and the HTTP API.
"""

from guestpass._version import VERSION as __version__

__all__ = ["__version__"]
