"""Keeps the logs of this worker's runs in the store, as `logs/<run id>/<fence>.jsonl`: at the end of each attempt, now
and then before, and at once when somebody reads them. A run that logs nothing has no object, and costs nothing.
"""

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from backcast.errors import StoreUnavailable
from backcast.ledger.claims import Claim
from backcast.models import LOGS_KEPT, log_key
from backcast.process.background import OnDemand
from backcast.process.outages import Outage
from backcast.protocol import Line
from backcast.store import Store
from backcast.worker.reports import attempt_number

log = logging.getLogger("backcast.worker")

EVERY = 10.0
"""Seconds after which the log of a running attempt is stored again, if it has grown."""
MOST, MOST_IN_ALL = 3 * 1024 * 1024, 64 * 1024 * 1024
"""Bytes of an attempt and of all attempts that are kept in memory. Executors send a third of the first."""


@dataclass(slots=True)
class _Log:
    text: bytearray = field(default_factory=bytearray)
    stored: int = 0
    """How much of it the store has."""
    storing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Logs:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._logs = dict[tuple[UUID, int], _Log]()
        self._size = 0
        self._read = set[UUID]()
        self._storing = OnDemand("store the logs that are read", self._store_read)
        self._outage = Outage(partial(log.warning, "can't store the logs of runs: %s"))

    def put(self, claim: Claim, lines: Sequence[Line]) -> None:
        """Take lines of an attempt; those for which there is no room are left out."""
        kept = self._logs.setdefault((claim.id, claim.fence), _Log())
        for line in lines:
            text = b'%b, "attempt": %d}\n' % (line.text[:-1].encode(), attempt_number(claim, line.retries))
            if len(kept.text) + len(text) <= MOST and self._size + len(text) <= MOST_IN_ALL:
                kept.text += text
                self._size += len(text)

    async def stored(self, run: UUID, fence: int) -> None:
        """Store the log of an attempt that is over. The end of the run does not wait for a store that is away."""
        if (kept := self._logs.get((run, fence))) is None:
            return
        await self._put(run, fence, kept)
        if fence > LOGS_KEPT:
            await self._delete(log_key(run, fence - LOGS_KEPT))
        self._size -= len(kept.text)
        del self._logs[run, fence]

    async def run(self) -> None:
        """Store the logs of running attempts now and then: a reader sees them, and a lost worker leaves them behind."""
        while True:
            await asyncio.sleep(EVERY)
            for (run, fence), kept in list(self._logs.items()):
                await self._put(run, fence, kept)

    def read(self, runs: Collection[UUID]) -> None:
        """Store the logs of those of these runs that are here: somebody reads them."""
        if here := {run for run, _ in self._logs if run in runs}:
            self._read |= here
            self._storing.ask()

    async def _store_read(self) -> None:
        runs, self._read = self._read, set[UUID]()
        logs = [(run, fence, kept) for (run, fence), kept in self._logs.items() if run in runs]
        await asyncio.gather(*(self._put(*each) for each in logs))

    async def _put(self, run: UUID, fence: int, kept: _Log) -> None:
        async with kept.storing:  # an older state must not replace a newer one
            if (size := len(kept.text)) == kept.stored:
                return
            try:
                # Not worth a wait for the disk of a folder.
                await self._store.put(log_key(run, fence), bytes(kept.text), is_copied=True)
            except StoreUnavailable as error:
                self._outage.failed(error)
            else:
                self._outage.ended()
                kept.stored = size

    async def _delete(self, key: str) -> None:
        try:
            await self._store.delete([key])
        except StoreUnavailable as error:
            self._outage.failed(error)
