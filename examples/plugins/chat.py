"""chat: a Notifier for Guestpass."""

from __future__ import annotations

from guestpass.plugin import Message, NotDelivered, Notifier, PluginConfig


class Chat(Notifier):
    """Hand messages to a chat system, by its webhook, for the addresses of one domain."""

    class Config(PluginConfig):
        url: str = ""
        domain: str = "example.org"

    def accepts(self, message: Message) -> bool:
        return bool(self.config.url) and message.to.endswith(f"@{self.config.domain}")

    async def deliver(self, message: Message) -> str:
        body = {"to": message.to, "text": f"{message.subject}\n\n{message.text}"}
        async with self.host.http.post(self.config.url, json=body) as answer:
            if answer.status >= 400:
                # 4xx is about this message, and stays; 5xx is about the chat system, and passes.
                raise NotDelivered(f"the chat system said {answer.status}", permanent=answer.status < 500)
        return "handed to the chat system"
