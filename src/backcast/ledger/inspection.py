"""Inspects a database for `backcast check`: what a session can't set, and whether a role may do all that a part does.
Nothing is changed.
"""

import contextlib
from datetime import timedelta
from uuid import UUID

from backcast.errors import ConfigurationError, UnknownRun
from backcast.ledger import (
    claims,
    figures,
    fleet,
    history,
    lanes,
    listing,
    recovery,
    runs,
    settlement,
    submissions,
    task_types,
)
from backcast.ledger.connection import Ledger
from backcast.ledger.rights import require
from backcast.ledger.settlement import Settlement

OLDEST = 15
"""Major version of PostgreSQL."""
_NOBODY = UUID(int=0)


async def settings(ledger: Ledger) -> None:
    """Raise `ConfigurationError` if the database can't keep what is stored, or ignores what a session sets."""
    row = await ledger.fetchrow(  # before there is a schema; quote_all_identifiers quotes its name
        """select current_setting('server_version_num')::int / 10000 as version, current_setting('server_encoding') as
                  encoding, current_setting('transaction_isolation') as isolation,
                  btrim(current_setting('search_path'), '"') as schema"""
    )
    assert row is not None
    if row["version"] < OLDEST:
        raise ConfigurationError(f"PostgreSQL {row['version']} is too old: use {OLDEST} or newer.")
    if row["encoding"] != "UTF8":
        raise ConfigurationError(f"The database's encoding, {row['encoding']}, has no room for every text: use UTF8.")
    if row["isolation"] != "read committed" or row["schema"] != "backcast":
        raise ConfigurationError(
            f"Settings of a session are not kept (isolation {row['isolation']}, schema {row['schema']}): connect to"
            " PostgreSQL itself, or make the pooler keep sessions."
        )


async def rights(ledger: Ledger, part: str) -> None:
    """Whether this role may do what the part does. Also makes calls of every kind, none of which finds a row.

    Raises:
        ConfigurationError: a right is missing.
        LedgerFault: the database refuses a statement.
    """
    await require(ledger, part)
    for call in _CALLS[part]:
        await call(ledger)


async def _submit(ledger: Ledger) -> None:
    await task_types.all_(ledger)
    await ledger.fetch(submissions.INSERT, *[[] for _ in submissions.New._fields[:-1]], None)
    await listing.find(ledger, limit=1)
    with contextlib.suppress(UnknownRun):
        await runs.cancel(ledger, _NOBODY)


async def _execute(ledger: Ledger) -> None:
    await claims.claim(ledger, pool="", cursor=0, limit=1, worker_id=_NOBODY, lease=timedelta(seconds=1))
    for lane in (None, ""):
        nothing = Settlement(id=_NOBODY, fence=0, state="failed", lane=lane)
        await settlement.settle(ledger, _NOBODY, [nothing])
    async with ledger.session() as connection:
        await fleet.beat(connection, _NOBODY, busy=0, draining=False, settled=0)


async def _recover(ledger: Ledger) -> None:
    await recovery.requeue(ledger, timedelta(seconds=1), [])
    await history.waiting(ledger, _NOBODY, _NOBODY, limit=1)
    await figures.backlog(ledger)


async def _promote(ledger: Ledger) -> None:
    await lanes.promote(ledger, [""])


_CALLS = {"api": (_submit, _promote), "worker": (_execute, _promote), "steward": (_recover, _promote)}
