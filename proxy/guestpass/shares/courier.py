"""Delivers mail that waits in the store, in the background.

A message is queued by the transaction that causes it, so it exists exactly when that exists. The courier asks the
first notifier that accepts it, and then either deletes the row (delivered, refused for good, or given up: the text
holds a link or a code) or sets when to try again. A process that dies in between leaves the row: a message may then
be delivered twice, with the same Message-ID, but is never lost.

What became of an invitation is shown at its recipient. A code that bounced is shown there as well: it is the first
that the owner hears of an address to which no invitation was mailed.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence

from sqlalchemy.engine import Connection

from guestpass.errors import GuestpassError
from guestpass.model import Delivery, Event
from guestpass.plugin import Message, NotDelivered, Notifier, settled
from guestpass.shares import rules
from guestpass.shares.store import Store, mail, shares
from guestpass.shares.store.rows import QueuedMail

log = logging.getLogger("guestpass.courier")

# The first retry follows soon, for somebody waits for a code; then each pause doubles. Greylisting servers take the
# second or third attempt after some minutes (RFC 6647, 2.4), full mailboxes take hours.
FIRST_RETRY_SECONDS = 2.0
MAX_RETRY_SECONDS = 1800.0

# A message without an expiry is given up after a day; RFC 5321 (4.5.4.1) speaks of four to five days for mail servers,
# but an owner who watches should hear sooner.
GIVE_UP_SECONDS = 86400.0

# Longer than a mail server's own time-outs for one step, shorter than anybody's patience.
DELIVERY_SECONDS = 60.0

# Deliveries at the same time: a slow server must not hold up the codes behind it.
CONCURRENT = 8

# When the store fails, try again after this.
STORE_PAUSE_SECONDS = 5.0

# What a mail server says is kept for the owner up to this length.
MAX_DETAIL = 500


class Courier:
    """See the module. `start()`, `stop()`."""

    def __init__(
        self,
        store: Store,
        notifiers: Sequence[Notifier],
        *,
        emit: Callable[[Event], None],
        now: Callable[[], float] = time.time,
        first_retry: float = FIRST_RETRY_SECONDS,
    ) -> None:
        self._store = store
        self._notifiers = notifiers
        self._emit = emit
        self._now = now
        self._first_retry = first_retry
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._under_way: dict[int, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Deliver what waits from before, and whatever comes."""
        self._store.on_mail(self._wake.set)
        self._worker = asyncio.create_task(self._work(), name="courier")

    async def stop(self) -> None:
        """Stop at once; what is under way is tried again after the next start."""
        self._store.on_mail(None)
        tasks = [task for task in (self._worker, *self._under_way.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._worker = None

    async def enqueue(self, message: Message) -> None:
        """Durable on return; delivery is not waited for. Raises StoreError."""
        now = self._now()
        await self._store.write(lambda db: mail.insert(db, message, now))
        self._wake.set()

    async def waiting(self) -> int:
        """How many messages wait."""
        return await self._store.read(mail.count)

    # ── The worker ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            try:
                pause = await self._start_due()
            except GuestpassError as exc:
                log.error("mail waits: %s", exc)
                pause = STORE_PAUSE_SECONDS
            except Exception:  # a loop that ended would deliver nothing any more
                log.exception("mail waits")
                pause = STORE_PAUSE_SECONDS
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _start_due(self) -> float | None:
        """Start what is due, as far as there is room; returns after how many seconds to look again."""
        now, free, busy = self._now(), CONCURRENT - len(self._under_way), frozenset(self._under_way)
        if free <= 0:
            return None  # whoever ends wakes us

        def work(db: Connection) -> tuple[list[QueuedMail], float | None]:
            due = mail.due(db, now, free, busy)
            return due, mail.next_due(db, busy | {item.id for item in due})

        due, then = await self._store.read(work)
        for item in due:
            self._under_way[item.id] = asyncio.create_task(
                self._deliver(item), name=f"courier: mail {item.id}"
            )
        return None if then is None else max(then - now, 0.0) if len(due) < free else None

    async def _deliver(self, item: QueuedMail) -> None:
        try:
            await self._try(item)
        except GuestpassError as exc:
            log.error("mail %d: its outcome is not written: %s", item.id, exc)
            await asyncio.sleep(STORE_PAUSE_SECONDS)
        except Exception:  # and not again at once, for ever
            log.exception("mail %d", item.id)
            await asyncio.sleep(STORE_PAUSE_SECONDS)
        finally:
            self._under_way.pop(item.id, None)
            self._wake.set()

    async def _try(self, item: QueuedMail) -> None:
        message, attempts = item.message, item.attempts + 1
        give_up = item.created + GIVE_UP_SECONDS if message.expires is None else message.expires
        if self._now() >= give_up:
            await self._over(item, item.attempts, Delivery.FAILED, "it was not delivered in time")
            return
        notifier = await self._accepting(message)
        if notifier is None:
            await self._over(item, attempts, Delivery.FAILED, "no notifier takes mail for this address")
            return
        try:
            async with asyncio.timeout(DELIVERY_SECONDS):
                receipt: str = await settled(notifier.deliver(message))
        except NotDelivered as exc:
            detail, permanent = exc.detail, exc.permanent
        except TimeoutError:
            detail, permanent = f"no answer within {DELIVERY_SECONDS:.0f} seconds", False
        except Exception:
            error_id = secrets.token_hex(4)
            log.exception("error %s: the notifier %s failed", error_id, notifier.name)
            detail, permanent = f"the notifier {notifier.name} failed (error {error_id})", False
        else:
            await self._over(item, attempts, Delivery.SENT, receipt)
            return
        pause = min(self._first_retry * 2.0 ** min(attempts - 1, 32), MAX_RETRY_SECONDS)
        if permanent:
            await self._over(item, attempts, Delivery.BOUNCED, detail)
        elif self._now() + pause >= give_up:
            await self._over(item, attempts, Delivery.FAILED, detail)
        else:
            await self._again(item, attempts, pause, detail)

    async def _accepting(self, message: Message) -> Notifier | None:
        for notifier in self._notifiers:
            if await settled(notifier.accepts(message)):
                return notifier
        return None

    async def _again(self, item: QueuedMail, attempts: int, pause: float, detail: str) -> None:
        due = self._now() + pause
        said = rules.one_line(detail, MAX_DETAIL)

        def work(db: Connection) -> None:
            mail.again(db, item.id, attempts, due)
            if item.message.kind == "invitation" and item.message.recipient_id is not None:
                shares.set_delivery(db, item.message.recipient_id, Delivery.QUEUED, said)

        await self._store.write(work)
        log.info("mail %d (%s): attempt %d: %s", item.id, item.message.kind, attempts, said)

    async def _over(self, item: QueuedMail, attempts: int, delivery: Delivery, detail: str) -> None:
        message, said = item.message, rules.one_line(detail, MAX_DETAIL)

        def work(db: Connection) -> None:
            mail.delete(db, item.id)
            if message.recipient_id is not None and (
                message.kind == "invitation" or delivery is Delivery.BOUNCED
            ):
                shares.set_delivery(db, message.recipient_id, delivery, said)

        await self._store.write(work)
        if delivery is not Delivery.SENT:
            log.warning("mail %d (%s): %s: %s", item.id, message.kind, delivery, said)
        self._emit(
            Event(
                f"mail.{delivery}",
                self._now(),
                message.to,
                message.share_id,
                detail={"kind": message.kind, "attempts": attempts, "said": said},
            )
        )
