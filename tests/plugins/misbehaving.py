"""Plugins of every kind that do one thing wrong, for the share of their kind only: `/bad/KIND`."""

import asyncio
import ctypes
import os
import sys
import time

from guestpass.plugin import (
    Authenticator,
    BackendChooser,
    Notifier,
    Observer,
    PluginConfig,
    RequestFilter,
    Revoker,
)

KEPT = []


async def misbehave(how):
    if how == "raises":
        raise ValueError("a bug")
    if how == "waits":
        await asyncio.Event().wait()
    if how == "exits":
        sys.exit(3)
    if how == "leaks":
        KEPT.append(bytearray(1 << 20))
        KEPT.append(asyncio.ensure_future(asyncio.Event().wait()))
        raise ValueError("a bug, with what it leaks")
    if how == "stalls":
        time.sleep(0.7)
    if how == "blocks":
        time.sleep(60)
    if how == "dies":
        os._exit(3)
    if how == "crashes":
        ctypes.string_at(0)
    if how == "forks":
        if os.fork() == 0:
            time.sleep(60)
        time.sleep(60)
    if how == "devours":
        KEPT.append(bytearray(1 << 40))


class Config(PluginConfig):
    how: str


class BadAuthenticator(Authenticator):
    Config = Config
    interactive = False

    async def identify(self, request):
        if request.share.path == "/bad/authenticator":
            await misbehave(self.config.how)


class BadRevoker(Revoker):
    Config = Config

    async def check(self, share, session):
        if share.path == "/bad/revoker":
            await misbehave(self.config.how)


class BadChooser(BackendChooser):
    Config = Config

    async def choose(self, choice):
        if choice.share.path == "/bad/backend-chooser":
            await misbehave(self.config.how)


class BadFilter(RequestFilter):
    Config = Config

    async def compile(self, share, session):
        if share.path == "/bad/request-filter":
            await misbehave(self.config.how)


class BadNotifier(Notifier):
    Config = Config

    async def deliver(self, message):
        if message.to.startswith("bad"):
            await misbehave(self.config.how)
        return "delivered"


class BadObserver(Observer):
    Config = Config

    shares = 0

    async def on_event(self, event):
        self.shares += event.type == "share.created"
        if self.shares > 1:  # the first is the other session's
            await misbehave(self.config.how)
