"""Removes runs, results, cached values and history that are older than they are kept.

Nothing is locked, and nothing is urgent. A run that has ended stays ended: a fact that was true when a page was read is
true when its objects are removed, even by a steward that was stopped in between and no longer leads.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from backcast.errors import LedgerFault, LedgerUnavailable, Unavailable
from backcast.history.sink import Sink
from backcast.ledger import ended, events, maintenance, operations
from backcast.ledger.connection import REFUSED, Ledger
from backcast.models import is_cached_value
from backcast.steward import orphans
from backcast.store import Store

log = logging.getLogger("backcast.steward")

_EXACT_BELOW = timedelta(days=7)
"""Runs that are kept for less than this are removed one by one when their time is over, and not with the day."""
DELETED_AT_ONCE = 200
"""Prefect's runs deleted before a pause of twice the time that this took: a third of a core of its server at most."""


@dataclass
class Retention:
    ledger: Ledger
    store: Store
    keep: timedelta | None
    """How long runs, results and cached values are kept after they ended; None: for ever."""
    keep_failed: timedelta | None = None
    """How long runs that did not complete are kept, if longer."""
    keep_keys: timedelta | None = None
    """How long an Idempotency-Key is remembered; None: as long as runs are."""
    _unknown: int = field(default=0, init=False)
    """Results of unknown runs that the log has reported."""

    async def __call__(self) -> None:
        """Every step, whatever becomes of the others; the first error is raised last."""
        failed = None
        for step in self._steps():
            try:
                await step
            except (Unavailable, LedgerFault, *REFUSED) as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _steps(self) -> Iterator[Awaitable[object]]:
        yield ended.make_ahead(self.ledger)
        yield self._stored()  # before the rows go, if it can: the results of lost attempts have a known run until then
        if self.keep is not None:
            yield self._old_runs(self.keep, self._longest)
            yield maintenance.remove_empty_batches(self.ledger, self.keep)
            yield maintenance.remove_retries_of_removed_runs(self.ledger, self.keep)
            yield events.remove_of_removed_runs(self.ledger, self.keep)
            yield operations.remove_old(self.ledger, self.keep)
        if self.keep_keys is not None:
            yield maintenance.remove_old_keys(self.ledger, self.keep_keys)
        elif self.keep is not None:
            yield maintenance.remove_keys_of_removed_runs(self.ledger, self.keep)
        yield maintenance.remove_stale_flights(self.ledger)

    async def _stored(self) -> None:
        await self.store.check()
        if await orphans.is_ours(self.ledger, self.store):
            if self.keep is not None:
                await self._old_cache(self.keep)
            await self._sweep()

    @property
    def _longest(self) -> timedelta:
        return max(self.keep or timedelta(), self.keep_failed or timedelta())

    async def _sweep(self) -> None:
        unknown = await orphans.sweep(self.ledger, self.store, self.keep and self._longest)
        if unknown > self._unknown:
            log.warning(
                "%d results belong to runs that the ledger does not know: was it restored from an older backup?"
                " They are kept for as long as any result",
                unknown,
            )
        self._unknown = unknown

    async def _old_runs(self, completed: timedelta, others: timedelta) -> None:
        """Objects first: while the store is away, the rows that name them stay. A request in between is answered that
        the result is gone. Results of lost attempts, which no row names, are orphans."""
        keep = {"ended_completed": completed, "ended_otherwise": others}
        await self._one_by_one("ended_late", others)
        for table, age in keep.items():
            if age < _EXACT_BELOW:
                await self._one_by_one(table, age)
        try:
            await ended.drop_retired(self.ledger)
            for partition in await ended.partitions(self.ledger):
                if partition.age > (age := keep[partition.table]) + ended.TAKES_RUNS:
                    async for keys in ended.objects(self.ledger, partition):
                        await self.store.delete(keys)
                    await ended.drop(self.ledger, partition)
                    log.info("removed %s: its runs ended more than %s ago", partition.name, age)
        except LedgerUnavailable as error:  # a reader stops this and nothing else
            log.warning("days of history that are old stay until the next sweep: %s", error.reason or error)

    async def _one_by_one(self, table: str, keep: timedelta) -> None:
        removed = 0
        async for runs in maintenance.old_runs(self.ledger, table, keep):
            if not runs:
                continue
            await self.store.delete(key for keys in runs.values() for key in keys)
            await maintenance.remove(self.ledger, table, list(runs))
            removed += len(runs)
        if removed:
            log.info("removed %d runs that ended more than %s ago", removed, keep)

    async def _old_cache(self, keep: timedelta) -> None:
        """By age only: a value that is used or renewed at this moment is computed once more."""
        before = await self.store.now() - keep
        async for objects in self.store.pages("cache"):
            await self.store.delete(each.key for each in objects if is_cached_value(each.key) and each.changed < before)


async def expire_history(sink: Sink, keep: timedelta) -> None:
    """Remove this ledger's old runs from Prefect, and no others: the server may have many users. The pace leaves the
    server free for other work."""
    before, deleted = datetime.now(UTC) - keep, 0
    if sink.tag is None:  # not known yet: the next time will do
        return
    while True:
        began = time.monotonic()
        page = await sink.server.delete_ended(sink.tag, before, DELETED_AT_ONCE)
        deleted += page
        if page < DELETED_AT_ONCE:
            break
        await asyncio.sleep(2 * (time.monotonic() - began))
    if deleted:
        log.info("removed %d runs of this ledger from Prefect that ended more than %s ago", deleted, keep)
