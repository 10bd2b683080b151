"""Learns which of the runs that somebody waits for have ended, on a connection of its own."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from uuid import UUID

from backcast.ledger.connection import ENDED, Ledger
from backcast.ledger.runs import COLUMNS, shown
from backcast.models import Run

POLL = 1.0
"""Seconds after which it looks without a notification, because notifications may be lost."""
BURDEN = 10.0
"""Looking for all may keep the database busy for one tenth of the time. Each new one is looked for once, at once."""

# Probes of the primary key; it locks nothing. All waits of a process share one statement.
MARK = "/* ended */"
_ENDED = f"{MARK} select {COLUMNS} from all_runs where id = any($1::uuid[]) and finished_at is not null"  # noqa: S608  # a constant


async def watch(
    ledger: Ledger,
    wanted: Callable[[], Collection[UUID]],
    new: set[UUID],
    found: Callable[[Run], None],
    look: asyncio.Event,
    *,
    idle: float,
) -> None:
    """Call `found` with each wanted run that has ended, now or later. It looks for those that are `new` as soon as
    `look` is set, for all when a process reports ends, and at each poll. Returns after `idle` seconds in which none was
    wanted.

    Raises:
        LedgerUnavailable: the connection is lost.
    """
    reported = asyncio.Event()
    reported.set()

    def report(*_: object) -> None:
        reported.set()
        look.set()

    async with ledger.session() as connection:
        await connection.add_listener(ENDED, report)
        needed = due = time.monotonic()
        while wanted() or time.monotonic() - needed < idle:
            look.clear()  # before the look: what ends from here on sets it again
            for_all = reported.is_set() or time.monotonic() >= due
            reported.clear()
            if for_all:
                due = time.monotonic() + POLL
            ids = list(wanted() if for_all else new)
            new.clear()
            if ids:
                needed = began = time.monotonic()
                for row in await connection.fetch(_ENDED, ids):
                    found(shown(row))
                if for_all:
                    await asyncio.sleep(max(0.005, BURDEN * (time.monotonic() - began)))
            elif for_all:
                await connection.fetchval("select 1")  # a connection that is lost in silence is noticed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0, due - time.monotonic())):
                    await look.wait()
