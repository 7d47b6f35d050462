"""Every error that a person or a script may see.

An error carries a `code` for scripts (snake_case, stable), a message that names the thing, a `hint` with the next
step, and the HTTP status that the API answers with. Foreign exceptions are translated once, where they enter, with
`raise … from exc`.
"""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar


class GuestpassError(Exception):
    """Base of all. `str(error)` is the message without the hint."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self._code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # Without `__init__`, whose parameters are each subclass's own.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    @property
    def error_code(self) -> str:
        return self._code or self.code

    def as_json(self) -> dict[str, str]:
        """The object under `"error"` in `--json` output."""
        return {"code": self.error_code, "message": self.message, "hint": self.hint}


class ConfigError(GuestpassError):
    """A setting is wrong. The message names the file and the key."""

    code = "config_invalid"
    exit_status = 2


class UsageError(GuestpassError):
    """The command line is wrong."""

    code = "usage"
    exit_status = 2


class PortTaken(GuestpassError):
    code = "port_taken"


class StoreError(GuestpassError):
    """The store cannot be opened, is locked, or is of a newer version."""

    code = "store_unavailable"
    status = 503


class Invalid(GuestpassError):
    """A value in a request is not acceptable; nothing was changed."""

    code = "invalid"
    status = 422


class InvalidEmail(Invalid):
    code = "email_invalid"


class NotFound(GuestpassError):
    code = "not_found"
    status = 404


class ShareNotFound(NotFound):
    code = "share_not_found"


class ShareEnded(GuestpassError):
    """Deleted or expired. Visitors see 410."""

    code = "share_ended"
    status = 410


class Conflict(GuestpassError):
    code = "conflict"
    status = 409


class Forbidden(GuestpassError):
    code = "forbidden"
    status = 403


class Unauthorized(GuestpassError):
    code = "unauthorized"
    status = 401


class JoinTokenRejected(GuestpassError):
    """Unknown, used or expired join token."""

    code = "join_token_rejected"
    status = 403


class EdgeUnreachable(GuestpassError):
    code = "edge_unreachable"


class TunnelRefused(GuestpassError):
    """The edge answered the handshake and said no; `code` is its verdict, e.g. `unknown_key`."""

    code = "tunnel_refused"


class NoGateway(GuestpassError):
    """No tunnel to any gateway of the site. Visitors see 503 with Retry-After."""

    code = "no_gateway"
    status = 503


class PluginError(GuestpassError):
    """A plugin is missing, broken or misconfigured. Stops the start, never the first visitor."""

    code = "plugin_invalid"
    exit_status = 2


class PluginFailed(GuestpassError):
    """A plugin that decides raised, overran its deadline or is switched off after repeated failures: the answer is
    no. Visitors see 503 with `error_id`, which stands in the log besides."""

    code = "plugin_failed"
    status = 503

    def __init__(self, message: str, *, error_id: str, hint: str = "", code: str | None = None) -> None:
        super().__init__(message, hint=hint, code=code)
        self.error_id = error_id
