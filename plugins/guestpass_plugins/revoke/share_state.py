"""`share-state`: a session lives no longer than its share, its recipient and itself, and no share has more
sessions than its owner allowed. Always on."""

from __future__ import annotations

from guestpass.plugin import Answer, Revocation, Revoker, Session, SessionKind, Share

__all__ = ["ShareState"]

# A browser that got its cookie asks for the page at once.
ARRIVAL_SECONDS = 60.0


class ShareState(Revoker):
    """Deleted, expired, recipient removed, session ended or expired, signed in as it does not take any more, too
    many sessions."""

    def check(self, share: Share, session: Session) -> Answer[Revocation | None]:
        # Not async: what every first request asks is answered at once, where nothing has to be awaited.
        now = self.host.now()
        if share.deleted is not None:
            return Revocation("deleted", share_id=share.id)
        if share.expires is not None and share.expires <= now:
            return Revocation("expired", share_id=share.id)
        recipient = share.recipient(session.email)
        if recipient is None or recipient.id != session.recipient_id:
            return Revocation("recipient_removed", recipient_id=session.recipient_id)
        if session.ended is not None:
            return Revocation("session_ended", session_id=session.id)
        if session.expires is not None and session.expires <= now:
            return Revocation("session_expired", session_id=session.id)
        if session.kind is SessionKind.COOKIE and not share.takes(session.provider):
            return Revocation("sign_in_not_taken", session_id=session.id)
        return None if share.max_sessions is None else self._place(share, session, share.max_sessions)

    async def _place(self, share: Share, session: Session, places: int) -> Revocation | None:
        if await self._earlier(share, session) >= places:
            return Revocation("max_sessions", session_id=session.id)
        return None

    async def _earlier(self, share: Share, session: Session) -> int:
        """Sessions that were there before this one. Only they count: of two that start together the first one
        stays, and whoever is in is not put out by who comes later."""
        return sum(
            (other.created, other.id) < (session.created, session.id) and self._takes_a_place(other)
            for other in await self.host.live_sessions(share.id)
        )

    def _takes_a_place(self, session: Session) -> bool:
        """A token that nobody used does not; nor does a browser's session whose cookie was lost on the way."""
        if session.last_seen > session.created:
            return True
        return session.kind is SessionKind.COOKIE and self.host.now() - session.created < ARRIVAL_SECONDS
