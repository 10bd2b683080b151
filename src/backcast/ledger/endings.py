"""Finds those of the runs that somebody waits for which have ended."""

from collections.abc import Collection
from uuid import UUID

import asyncpg

from backcast.ledger.runs import COLUMNS, shown
from backcast.models import Run

# Probes of the primary key; it locks nothing. All waits of a process share one statement.
MARK = "/* ended */"
_ENDED = f"{MARK} select {COLUMNS} from all_runs where id = any($1::uuid[]) and finished_at is not null"  # noqa: S608  # a constant


async def ended(connection: asyncpg.Connection, ids: Collection[UUID]) -> list[Run]:
    return [shown(row) for row in await connection.fetch(_ENDED, list(ids))]
