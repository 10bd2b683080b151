"""Removes what is too old, and stored objects that nobody will ask for. Decides why each removal is safe while all
others go on; what is never decided here is whether a run has ended.

Nothing is locked and nothing is in a hurry: a run that has ended stays ended, so what was true of it when a page was
read is true when its objects are removed, even by a steward that was stopped in between and leads no more.
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
"""Seconds after which an input whose run is not there has no run: its submit is over, whichever way."""
SIGNATURE = "ledger/id"
"""The object that says whose store this is."""
DELETED_AT_ONCE = 200
"""Prefect's runs removed before it gets a rest, twice as long as that took: a third of a core of its server at most."""


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
        """Whether the store is this ledger's alone: the runs of another one are unknown here, their objects would look
        like orphans. The first ledger to sweep a store signs it; of two that do so at once, one will not sweep."""
        ours = str(await cursors.identity(self.ledger)).encode()
        try:
            owner = await self.store.get(SIGNATURE)
        except Missing:
            await self.store.put(SIGNATURE, ours)
            owner = await self.store.get(SIGNATURE)
        if owner != ours:
            log.error(
                "the store belongs to another ledger, so nothing is swept: give each its own bucket or prefix, or"
                " remove the object %s to hand the store over to this one",
                SIGNATURE,
            )
        return owner == ours

    async def _old_runs(self, keep: timedelta) -> None:
        """Objects first: while the store is away, the rows that name them stay. A caller who comes in between is told
        that the result is gone. Results of lost attempts, which no row names, are orphans."""
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
        """By age only: if a value is used or renewed at this moment, it is computed once more."""
        before = datetime.now(UTC) - keep
        async for objects in self.store.pages("cache"):
            await self.store.delete(each.key for each in objects if each.changed < before)

    async def _orphans(self, kind: str) -> None:
        """Objects that no run needs.

        A result is stored while its run is running, and read by the next attempt only while it has not ended; the
        ledger is asked after the object was seen. So if the run has ended and names another, or is gone, nobody can
        come to name this one: a worker that still holds it will be refused.

        An input is stored before its run is recorded: one without a run may belong to a submit that is under way, but
        not for an hour.
        """
        removed = 0
        async for objects in self.store.pages(kind):
            youngest = uuid7(SUBMITTED_WITHIN)
            candidates = {key: run for key, run in _runs(objects) if kind == "results" or run < youngest}
            if candidates and (orphans := await maintenance.orphans(self.ledger, candidates)):
                await self.store.delete(orphans)
                removed += len(orphans)
        if removed:
            log.info("removed %d objects from %s that no run needs", removed, kind)


def _runs(objects: list[Object]) -> Iterator[tuple[str, UUID]]:
    """The keys that are ours, `results/<run>/<fence>.json` and `inputs/<run>.json`, with their runs' ids."""
    for each in objects:
        try:
            yield each.key, UUID(each.key.split("/")[1].removesuffix(".json"))
        except ValueError:
            continue


async def expire_history(sink: Sink, keep: timedelta) -> None:
    """Remove Prefect's old runs, at a pace that leaves its server to those who need it."""
    before = datetime.now(UTC) - keep
    while True:
        began = time.monotonic()
        if await sink.delete_ended(before, DELETED_AT_ONCE) < DELETED_AT_ONCE:
            return
        await asyncio.sleep(2 * (time.monotonic() - began))
