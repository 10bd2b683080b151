"""Inspects a database for `backcast check`: what a session can't set, and whether the role may do all that the
processes do. Nothing is changed.
"""

import contextlib
from datetime import timedelta
from uuid import UUID

from backcast.errors import ConfigurationError, UnknownRun
from backcast.ledger import claims, figures, fleet, history, lanes, recovery, runs, settlement, submissions, task_types
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Settlement

OLDEST = 15
"""Major version of PostgreSQL."""
_NOBODY = UUID(int=0)
_TABLES = ("batches", "cursors", "flights", "lanes", "runs", "task_types", "workers")


async def settings(ledger: Ledger) -> None:
    """Raise `ConfigurationError` if the database can't keep what is stored, or ignores what a session sets."""
    row = await ledger.fetchrow(
        """select current_setting('server_version_num')::int / 10000 as version, current_setting('server_encoding') as
                  encoding, current_setting('transaction_isolation') as isolation, current_schema() as schema"""
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


async def rights(ledger: Ledger) -> None:
    """Make calls of every kind, none of which finds a row. Raises `LedgerFault`, or `ConfigurationError` for a right
    that no such call needs.
    """
    await task_types.all_(ledger)
    await ledger.fetch(submissions.INSERT, *[[] for _ in submissions.New._fields[:-1]], None)
    await claims.claim(ledger, pool="", cursor=0, limit=1, worker_id=_NOBODY, lease=timedelta(seconds=1))
    for lane in (None, ""):
        nothing = Settlement(id=_NOBODY, fence=0, state="failed", lane=lane)
        await settlement.settle(ledger, _NOBODY, [nothing])
    await recovery.requeue(ledger, timedelta(seconds=1), [])
    await lanes.promote(ledger, [""])
    await history.waiting(ledger, _NOBODY, _NOBODY, limit=1)
    await figures.backlog(ledger)
    await runs.find(ledger, limit=1)
    async with ledger.session() as connection:
        await fleet.beat(connection, _NOBODY, busy=0, draining=False, settled=0)
    with contextlib.suppress(UnknownRun):
        await runs.cancel(ledger, _NOBODY)
    rows = await ledger.fetch(
        """select t || ': ' || string_agg(p, ', ') as lacks
             from unnest($1::text[]) t, unnest('{select,insert,update,delete}'::text[]) p
            where not has_table_privilege('backcast.' || t, p) group by t""",
        _TABLES,
    )
    if rows:
        raise ConfigurationError(
            f"The role lacks rights on tables of the schema backcast ({'; '.join(row['lacks'] for row in rows)}): grant"
            " them, or run `backcast setup` as the role that the processes use."
        )
