"""`webhook` (revoker): asks another system whether a session may start or go on, and lets it end sessions at any time.

*Asked* when a session starts and when its grant is rebuilt, not on every request: `session.check` is posted, signed,
and answered within `timeout` (two seconds) with 200 and `{"admit": true}`, or `{"admit": false, "message": "…"}` with
words for the visitor. Anything else, no answer included, refuses the session: this decides, so it fails closed.

*Told* at `/.guestpass/hooks/NAME`, where `push` is set: a message signed with the same secret, of type `session.end`
with `data.session`, or `address.sign-out` with `data.email`. 204 says that it is done, on disk and on every
connection. A message that comes again is not carried out again.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from pydantic import Field

from guestpass.plugin import (
    Denied,
    Host,
    Incoming,
    InvalidEmail,
    Reply,
    Revocation,
    Revoker,
    Session,
    Share,
    canonical_address,
)
from guestpass_plugins.webhook import TOLERANCE, Endpoint, Signer, in_rfc3339, new_id, send

__all__ = ["Webhook"]

REASON = "webhook"
MAX_MESSAGE = 300


class Webhook(Revoker):
    class Config(Endpoint):
        timeout: float = Field(default=2.0, gt=0, le=2.5)  # the edge itself gives a Revoker three seconds
        push: bool = False

    async def start(self, host: Host) -> None:
        await super().start(host)
        self._signer = Signer(self.config.secret)
        self._one_at_a_time = asyncio.Lock()
        if self.config.push:
            host.logger.info("sessions can be ended at %s", host.route("", self.told))

    async def check(self, share: Share, session: Session) -> Revocation | None:
        """Raises NotSent, or ValueError for an answer that is none: the edge takes both as a refusal."""
        data = {
            "share": {"id": share.id, "name": share.name, "site": share.site, "service": share.service}
            | {"owner": share.owner},
            "session": {
                "id": session.id,
                "email": session.email,
                "kind": str(session.kind),
                "provider": session.provider,
                "created": in_rfc3339(session.created),
                "client": session.client,
            },
        }
        response = await send(
            *(self.host, self.config, self._signer, "session.check", data, new_id(), self.host.now())
        )
        answer: Any = orjson.loads(response.body)
        if not isinstance(answer, dict) or not isinstance(answer.get("admit"), bool):
            raise ValueError('the answer is not of the form {"admit": true}')
        if answer["admit"]:
            return None
        message = answer.get("message")
        raise Denied(
            message[:MAX_MESSAGE] if isinstance(message, str) and message else "You cannot open this now."
        )

    # ── being told ───────────────────────────────────────────────────────────────────────────────────────────────

    async def told(self, call: Incoming) -> Reply:
        message_id = self._signer.verify(call, self.host.now())
        if message_id is None:
            return _problem(401, "the signature does not hold, or is of another time")
        try:
            message: Any = orjson.loads(call.body)
            kind, data = message["type"], message["data"]
            if kind == "session.end":
                target = str(data["session"])
            elif kind == "address.sign-out":
                target = canonical_address(data["email"])
            else:
                return _problem(400, "type is neither session.end nor address.sign-out")
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError, InvalidEmail) as exc:
            return _problem(400, f"the message is malformed: {type(exc).__name__}")
        async with self._one_at_a_time:
            if await self.host.storage.get(f"told {message_id}") is None:
                await self._carry_out(kind, target)
                await self.host.storage.set(f"told {message_id}", kind, ttl=3 * TOLERANCE)
        return Reply(204)

    async def _carry_out(self, kind: str, target: str) -> None:
        if kind == "address.sign-out":
            await self.host.sign_out(target, REASON, tokens=True)
            return
        await self.host.end_session(target, REASON)


def _problem(status: int, detail: str) -> Reply:
    return Reply(status, orjson.dumps({"detail": detail}))
