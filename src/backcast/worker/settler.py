"""Sends settlements to the ledger, in batches and until they are recorded; a result that was refused is removed."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from uuid import UUID

import asyncpg
from prometheus_client import CollectorRegistry, Counter

from backcast.errors import LedgerUnavailable, StoreUnavailable
from backcast.ledger import settlement
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Ending
from backcast.models import Problem
from backcast.store import Store

log = logging.getLogger("backcast.worker")

MOST = 200
"""Endings in one statement."""


class Settler:
    """`settled` is awaited with the runs of each batch, once they are recorded or refused."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        worker_id: UUID,
        *,
        settled: Callable[[Collection[Ending]], Awaitable[None]],
        registry: CollectorRegistry,
    ) -> None:
        self._ledger, self._store, self._worker_id, self._settled = ledger, store, worker_id, settled
        self._waiting: asyncio.Queue[Ending] = asyncio.Queue()
        self.count = 0
        """Runs that have ended here."""
        self._ended = Counter("backcast_worker_attempts", "Attempts that ended, by how", ["ending"], registry=registry)

    def put(self, ending: Ending) -> None:
        self._waiting.put_nowait(ending)

    async def join(self) -> None:
        """Return when nothing is left to be recorded."""
        await self._waiting.join()

    async def run(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty() and len(batch) < MOST:
                batch.append(self._waiting.get_nowait())
            try:
                await self._settle(batch)
            finally:
                for _ in batch:
                    self._waiting.task_done()

    async def _settle(self, batch: list[Ending]) -> None:
        settled, delay = None, 0.1
        while settled is None:
            try:
                settled = await settlement.settle(self._ledger, self._worker_id, batch)
            except LedgerUnavailable as error:  # its fate is unknown; the fence makes it safe to send again
                if delay == 0.1:  # the first time
                    log.warning("can't settle %d runs, trying on: %s", len(batch), error)
                await asyncio.sleep(delay)
                delay = min(delay * 2, 2.0)
            except asyncpg.PostgresError as error:  # one ending that the database refuses must not hold up the others
                log.error("the database refused an ending: %s", error)  # its text says it all
                if len(batch) > 1:
                    for ending in batch:
                        await self._settle([ending])
                    return
                refused = Problem(code="unstorable_outcome", title="The outcome can't be recorded", detail=str(error))
                batch = [replace(batch[0], state="failed", result=None, result_key=None, usage=None, error=refused)]
        self.count += sum((e.id, e.fence) in settled.accepted and e.state in ("completed", "failed") for e in batch)
        await self._settled(batch)
        for ending in batch:
            attempt = ending.id, ending.fence
            recorded = attempt in settled.accepted and attempt not in settled.cancelled
            self._ended.labels(ending.state if recorded else "dropped").inc()
            if ending.result_key is not None and not recorded:
                with contextlib.suppress(StoreUnavailable):
                    await self._store.delete([ending.result_key])
