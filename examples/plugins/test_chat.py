from typing import Any

from aiohttp import web
from guestpass.testing import edge_with, use

from chat import Chat


async def test_an_invitation_arrives() -> None:
    received: list[dict[str, Any]] = []

    async def chat(request: web.Request) -> web.Response:
        received.append(await request.json())
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = "http://{}:{}/hook".format(*runner.addresses[0][:2])
    try:
        async with edge_with(use(Chat, url=url)) as edge:
            await edge.new_share("bob@example.org", invite=True)
            await edge.until(lambda: received, "the chat system was told")
            assert received[0]["to"] == "bob@example.org"
            assert edge.faults() == {}
    finally:
        await runner.cleanup()
