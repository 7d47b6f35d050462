"""`webhook` (notifier): hands invitations and codes to another system that delivers them: chat, SMS, a mail service.

The receiver gets what the mail would have held, links and codes included, so it is trusted as the mail server is. 2xx
says that it took the message; the edge sends it again after anything else, under the same `webhook-id`, while the
message is worth delivering. 422 says that this address can never be reached, which the owner sees as a bounce.
"""

from __future__ import annotations

from guestpass.plugin import Host, Message, NotDelivered, Notifier
from guestpass_plugins.notify.letter import KEY_PURPOSE, identity_of
from guestpass_plugins.webhook import Endpoint, NotSent, Signer, in_rfc3339, send

__all__ = ["Webhook"]

UNREACHABLE = 422


class Webhook(Notifier):
    class Config(Endpoint):
        domains: tuple[str, ...] = ()

    async def start(self, host: Host) -> None:
        await super().start(host)
        self._signer = Signer(self.config.secret)
        self._key = host.derive_key(KEY_PURPOSE)

    def accepts(self, message: Message) -> bool:
        domain = message.to.rpartition("@")[2]
        return not self.config.domains or domain in self.config.domains

    async def deliver(self, message: Message) -> str:
        data = {
            "to": message.to,
            "subject": message.subject,
            "text": message.text,
            "html": message.html,
            "share": message.share_id,
            "expires": None if message.expires is None else in_rfc3339(message.expires),
        }
        # Made of the message itself, so that it is the same when the edge tries again, even after a restart.
        message_id = "msg_" + identity_of(message, self._key)
        try:
            response = await send(
                self.host,
                self.config,
                self._signer,
                f"message.{message.kind}",
                data,
                message_id,
                self.host.now(),
            )
        except NotSent as exc:
            raise NotDelivered(str(exc), permanent=exc.status == UNREACHABLE) from exc
        return f"taken by the webhook ({response.status})"
