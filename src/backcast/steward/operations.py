"""Makes the operations that callers have asked for: a page of each in turn, at most half of the time."""

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from backcast.errors import LedgerFault, StoreUnavailable
from backcast.ledger import operations, submissions
from backcast.ledger.connection import REFUSED, Ledger
from backcast.ledger.operations import Retry, Work
from backcast.ledger.selection import Page
from backcast.models import input_key, uuid7
from backcast.store import Missing, Store

_LOOKS = 50
"""Pages without a matching run that are read before the cursor moves, and another operation has its turn."""
_PAUSE = 0.01
"""Seconds at least: the runs that it comes back to may be locked for a while."""
_COPIES = 8
"""Large inputs that are copied at the same time: so many are in memory."""


@dataclass(frozen=True, slots=True)
class Operations:
    ledger: Ledger
    store: Store

    async def __call__(self) -> None:
        """Returns when all have ended, but for those that can't go on now; then it raises the reason of one."""
        stuck: dict[UUID, Exception] = {}
        while works := [each for each in await operations.running(self.ledger) if each.id not in stuck]:
            for work in works:
                began = time.monotonic()
                try:
                    await self._turn(work)
                except (*REFUSED, LedgerFault, StoreUnavailable) as error:
                    stuck[work.id] = error
                await asyncio.sleep(max(_PAUSE, time.monotonic() - began))
        for error in stuck.values():
            raise error

    async def _turn(self, work: Work) -> None:
        page = Page({}, work.cursor, is_last=False)
        for _ in range(_LOOKS):
            page = await operations.find(self.ledger, work, page.last)
            if page.runs or page.is_last:
                break
        if work.kind == "cancel":
            await operations.cancel(self.ledger, work, page)
        else:
            await self._retry(work, page)

    async def _retry(self, work: Work, page: Page) -> None:
        # The new ids rise as the old ones do: that is the order of a batch.
        new = dict(zip(page.runs, sorted(uuid7() for _ in page.runs), strict=True))
        retries = [Retry(run, new[run], None) for run, key in page.runs.items() if key is None]
        large = [(run, new[run], key) for run, key in page.runs.items() if key is not None]
        until: datetime | None = None
        copied = list[Retry]()
        if large:
            until = await submissions.stored_until(self.ledger)
            for at in range(0, len(large), _COPIES):
                made = await asyncio.gather(*(self._copied(*each) for each in large[at : at + _COPIES]))
                copied += [each for each in made if each is not None]
        failed = len(large) - len(copied)
        if not await operations.retry(self.ledger, work, page, retries + copied, failed=failed, stored_until=until):
            await self.store.delete(each.input_key for each in copied if each.input_key is not None)

    async def _copied(self, run: UUID, new: UUID, key: str) -> Retry | None:
        """The retry with an input of its own, as the old run's goes with the old run; None: it has gone."""
        own = input_key(new)
        try:
            await self.store.put(own, await self.store.get(key))
        except Missing:
            return None
        return Retry(run, new, own)
