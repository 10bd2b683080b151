"""Removes runs, results and history that are older than they are kept, and sweeps orphans from the store. Decides why
each removal is safe while everything else goes on; never decides whether a run has ended.

Nothing is locked, and nothing is urgent. A run that has ended stays ended: a fact that was true when a page was read is
true when its objects are removed, even by a steward that was stopped in between and no longer leads.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from backcast.history.sink import Sink
from backcast.ledger import cursors, maintenance
from backcast.ledger.connection import Ledger
from backcast.models import uuid7
from backcast.store import Missing, Object, Store

log = logging.getLogger("backcast.steward")

SUBMITTED_WITHIN = 3600.0
"""Seconds after which an input without a run never gets one: its submission is over, with or without success."""
SIGNATURE = "ledger/id"
"""The object that names the ledger that owns this store."""
DELETED_AT_ONCE = 200
"""Prefect's runs deleted before a pause of twice the time that this took: a third of a core of its server at most."""


@dataclass
class Retention:
    ledger: Ledger
    store: Store
    keep: timedelta | None
    """How long runs, results and cached values are kept after they ended; None: for ever."""

    async def __call__(self) -> None:
        await self.store.check()
        if self.keep is not None:
            await self._old_runs(self.keep)
            await maintenance.remove_empty_batches(self.ledger, self.keep)
        await maintenance.remove_stale_flights(self.ledger)
        if not await self._is_ours():
            return
        if self.keep is not None:
            await self._old_cache(self.keep)
        for kind in ("results", "inputs"):
            await self._orphans(kind)

    async def _is_ours(self) -> bool:
        """Whether the store belongs to this ledger alone. The runs of another ledger are unknown here, so their objects
        would look like orphans. The first ledger that sweeps a store signs it; of two at once, one does not sweep."""
        ours = str(await cursors.identity(self.ledger)).encode()
        try:
            owner = await self.store.get(SIGNATURE)
        except Missing:
            await self.store.put(SIGNATURE, ours)
            owner = await self.store.get(SIGNATURE)
        if owner != ours:
            log.error(
                "the store belongs to another ledger, so nothing is swept: give each its own bucket or prefix, or"
                " remove the object %s to give the store to this one",
                SIGNATURE,
            )
        return owner == ours

    async def _old_runs(self, keep: timedelta) -> None:
        """Objects first: while the store is away, the rows that name them stay. A request in between is answered that
        the result is gone. Results of lost attempts, which no row names, are orphans."""
        removed = 0
        async for runs in maintenance.old_runs(self.ledger, keep):
            if not runs:
                continue
            await self.store.delete(key for keys in runs.values() for key in keys)
            await maintenance.remove(self.ledger, list(runs))
            removed += len(runs)
        if removed:
            log.info("removed %d runs that ended more than %s ago", removed, keep)

    async def _old_cache(self, keep: timedelta) -> None:
        """By age only: a value that is used or renewed at this moment is computed once more."""
        before = datetime.now(UTC) - keep
        async for objects in self.store.pages("cache"):
            await self.store.delete(each.key for each in objects if each.changed < before)

    async def _orphans(self, kind: str) -> None:
        """Remove the objects that no run names.

        A result is stored while its run is running, and the next attempt reads it only before the run has ended; the
        ledger is asked after the object was seen. So if the run has ended and names another object, or is gone, no
        worker can come to name this one: a settlement that does so is refused.

        An input is stored before its run is recorded. One without a run may belong to a submission that is under way,
        but for less than an hour.
        """
        removed = 0
        async for objects in self.store.pages(kind):
            youngest = uuid7(SUBMITTED_WITHIN)
            candidates = {key: run for key, run in _runs(objects) if kind == "results" or run < youngest}
            if candidates and (orphans := await maintenance.orphans(self.ledger, candidates)):
                await self.store.delete(orphans)
                removed += len(orphans)
        if removed:
            log.info("removed %d objects from %s that no run names", removed, kind)


def _runs(objects: list[Object]) -> Iterator[tuple[str, UUID]]:
    """The keys that are ours, `results/<run>/<fence>.json` and `inputs/<run>.json`, each with its run's id."""
    for each in objects:
        try:
            yield each.key, UUID(each.key.split("/")[1].removesuffix(".json"))
        except ValueError:
            continue


async def expire_history(sink: Sink, keep: timedelta) -> None:
    """Remove old runs from Prefect, at a pace that leaves its server free for other work."""
    before = datetime.now(UTC) - keep
    while True:
        began = time.monotonic()
        if await sink.delete_ended(before, DELETED_AT_ONCE) < DELETED_AT_ONCE:
            return
        await asyncio.sleep(2 * (time.monotonic() - began))
