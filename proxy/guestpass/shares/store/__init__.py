"""What must survive: shares, recipients, sessions, gateways, mail that waits, the audit.

`database.Store` owns the file, its lock and its one thread; each of the other modules holds the statements of one
subject, as functions of a connection, so that a caller can put several into one transaction. `rows` is the only place
that turns rows into domain types.
"""

from guestpass.shares.store.database import Store

__all__ = ["Store"]
