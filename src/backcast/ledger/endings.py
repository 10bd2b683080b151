"""Learns which of the runs that somebody waits for have ended, on a connection of its own."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from functools import partial
from uuid import UUID

from backcast.ledger.connection import ENDED, Ledger
from backcast.ledger.runs import COLUMNS, shown
from backcast.models import Run

POLL = 1.0
"""Seconds after which it looks without a notification, because notifications may be lost."""
BURDEN = 10.0
"""Looking may keep the database busy for one tenth of the time."""

# Probes of the primary key; it locks nothing. All waits of a process share one statement.
MARK = "/* ended */"
_ENDED = f"{MARK} select {COLUMNS} from all_runs where id = any($1::uuid[]) and finished_at is not null"  # noqa: S608  # a constant


def _set(look: asyncio.Event, *_: object) -> None:
    look.set()


async def watch(
    ledger: Ledger,
    wanted: Callable[[], Collection[UUID]],
    found: Callable[[Run], None],
    look: asyncio.Event,
    *,
    idle: float,
) -> None:
    """Call `found` with each wanted run that has ended: at once when `look` is set or a process reports ends, else at
    the next poll. Returns after `idle` seconds in which none was wanted.

    Raises:
        LedgerUnavailable: the connection is lost.
    """
    async with ledger.session() as connection:
        await connection.add_listener(ENDED, partial(_set, look))
        needed = time.monotonic()
        while wanted() or time.monotonic() - needed < idle:
            look.clear()  # before the look: what ends from here on sets it again
            if ids := list(wanted()):
                needed = began = time.monotonic()
                for row in await connection.fetch(_ENDED, ids):
                    found(shown(row))
                await asyncio.sleep(max(0.005, BURDEN * (time.monotonic() - began)))
            else:
                await connection.fetchval("select 1")  # a connection that is lost in silence is noticed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL):
                    await look.wait()
