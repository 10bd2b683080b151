"""The worker's loop: claims runs into slots, has them executed, stores their results and settles outcomes in batches.
Decides when to stop a run and what to hand back; how a task is executed it leaves to the engine that it is given.

A slot is held by the user's code only. Storing and settling happen after it is free, and what is finished but not yet
settled is bounded, so a store or database that is away stops the claiming, not the worker.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from uuid import UUID

from prometheus_client import CollectorRegistry, Gauge

from backcast.errors import FatalError, LedgerUnavailable
from backcast.ledger import claims, dispatch, fleet
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Ending
from backcast.models import Failed, Reason
from backcast.process import Stop
from backcast.settings import Settings
from backcast.store import Store
from backcast.worker import results
from backcast.worker.execution import Engine, Execution, Meter
from backcast.worker.lease import BEAT, Beat, Lease
from backcast.worker.results import Keeper
from backcast.worker.settler import Settler

log = logging.getLogger("backcast.worker")

UNSETTLED = 200
"""Finished runs that may wait for the store or the database before the worker stops claiming."""
_KEY_SPACE, _HALF = 1 << 64, 1 << 63

AHEAD = 0.1
"""Seconds' worth of runs that are claimed before their slots are free."""
MOST_AHEAD = 50
LONGEST_AHEAD = 1.0
"""Seconds after which a run that was claimed ahead goes back, because a slot has not fallen free as expected."""


@dataclass(slots=True)
class _Held:
    """A run that this worker has claimed and not yet settled."""

    claim: Claim
    since: float = field(default_factory=time.monotonic)
    work: "asyncio.Task[None] | None" = None
    """None while it waits for a slot."""
    is_executing: bool = True
    reason: Reason | None = None
    """Why the execution was stopped, if it was."""

    def stop(self, reason: Reason) -> None:
        if self.work is not None and self.is_executing and self.reason is None:
            self.reason = reason
            self.work.cancel(reason)


def _farthest(cursor: int, owners: list[int]) -> int:
    """The owner served last, going round from `cursor`: where the next claim goes on."""
    return max(owners, key=lambda owner: (owner - cursor - 1) % _KEY_SPACE)


class Worker:
    def __init__(self, settings: Settings, ledger: Ledger, store: Store, engine: Engine, meter: Meter) -> None:
        self._settings = settings
        self._ledger = ledger
        self._store = store
        self._lease = Lease(settings, ledger, engine.types, report=self._report, heard=self._heard)
        self._keeper = Keeper(store, settings)
        self._engine = engine
        self._execution = Execution(ledger, store, engine, meter, pool=settings.worker.pool, worker_id=self._lease.id)
        self._names = sorted(task.name for task in engine.types)
        self._held: dict[UUID, _Held] = {}
        self._ahead: deque[_Held] = deque()
        self._suspects: deque[_Held] = deque()
        self._alone = False
        self._busy = 0
        self._ends: deque[float] = deque()
        self._works: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._draining = False
        self._claims, self._claiming = 0, False
        self.registry = CollectorRegistry()
        self._settler = Settler(ledger, store, self._lease.id, settled=self._recorded, registry=self.registry)
        self._metrics()

    def _metrics(self) -> None:
        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(f"backcast_worker_{name}", text, registry=self.registry).set_function(value)

        gauge("slots", "Runs that may execute at the same time", lambda: self._settings.worker.slots)
        gauge("busy", "Runs that execute now", lambda: self._busy)
        gauge("unsettled", "Runs claimed and not yet settled", lambda: len(self._held))
        gauge("heartbeat_age_seconds", "Since the last heartbeat", lambda: self._lease.age)

    # -- being there ------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Readiness: the lease is good and the store is reachable."""
        if not self._lease.is_good:
            raise LedgerUnavailable("This worker has no lease: its heartbeats do not reach the database.")
        await self._store.check()

    def _report(self) -> Beat:
        claims = None if self._claiming else self._claims  # first: a claim from here on is one more
        fences = {run_id: held.claim.fence for run_id, held in list(self._held.items())}
        return Beat(fences, claims, self._busy, self._draining, self._settler.count)

    def _heard(self, said: Beat, holds: dict[UUID, fleet.Held]) -> None:
        for run_id, fence in said.fences.items():
            ours, theirs = self._held.get(run_id), holds.get(run_id)
            if ours is None or ours.claim.fence != fence:
                continue  # settled, or claimed anew, since it was said
            if theirs is None or theirs.fence != fence:
                ours.stop("lost")
                if self._forget_waiting(ours):
                    del self._held[run_id]
            elif theirs.cancel:
                ours.stop("cancelled")
                self._hand_back(ours)
        if said.claims is None or said.claims != self._claims or self._claiming:
            return  # what we do not know of may just have been claimed
        for run_id, theirs in holds.items():
            if run_id not in said.fences and run_id not in self._held:
                log.warning("handing back %s: the answer to its claim was lost", run_id)
                self._settler.put(results.handed_back(run_id, theirs))

    async def _watch_lease(self) -> None:
        while True:
            await asyncio.sleep(BEAT / 2)
            for held in [held for held in self._ahead if held.since < time.monotonic() - LONGEST_AHEAD]:
                self._hand_back(held)
            if not self._lease.is_good:
                self._hand_back_waiting()
            if not self._lease.is_good and self._busy:
                log.warning(
                    "no heartbeat for two thirds of the lease: stopping %d runs, others may do them", self._busy
                )
                for held in self._held.values():
                    held.stop("handed back")

    # -- claiming ---------------------------------------------------------------------------------------------------

    def _room(self) -> tuple[int, int]:
        """How many runs to claim for free slots, and how many ahead of them.

        Ahead: what will start within the next moment at the pace of the last second, so that a slot that falls free
        need not wait for the database, and no run is kept from a worker that is idle.
        """
        if self._alone or self._suspects or not self._lease.is_good:
            return 0, 0
        bound = UNSETTLED + self._settings.worker.slots - len(self._held)
        free = max(0, min(self._settings.worker.slots - self._taken, bound))
        ahead = min(self._pace - len(self._ahead), bound - free)
        return free, ahead if free or ahead > self._pace // 2 else 0

    @property
    def _taken(self) -> int:
        return self._busy + self._engine.threads_abandoned

    @property
    def _pace(self) -> int:
        """Runs that end within `AHEAD` seconds, judging by the last second."""
        now = time.monotonic()
        while self._ends and self._ends[0] < now - 1.0:
            self._ends.popleft()
        return min(int(len(self._ends) * AHEAD), MOST_AHEAD)

    async def _claim(self) -> None:
        cursor = random.randrange(-_HALF, _HALF)  # noqa: S311  # where to start among the owners
        quiet = False
        while not self._draining:
            self._wake.clear()
            free, ahead = self._room()
            taken: list[Claim] = []
            if free > 0 or ahead > 0:
                self._claiming = True
                try:
                    taken = await claims.claim(
                        self._ledger,
                        pool=self._settings.worker.pool,
                        cursor=cursor,
                        limit=free,
                        ahead=ahead,
                        worker_id=self._lease.id,
                        lease=self._settings.lease,
                    )
                    quiet = False
                except LedgerUnavailable as error:
                    if not quiet:
                        log.warning("can't claim: %s", error)
                    quiet = True
            for claim in taken:
                held = self._held[claim.id] = _Held(claim)
                if claim.is_suspect:
                    self._suspects.append(held)
                elif claim.ahead:
                    self._ahead.append(held)
                else:  # at once, even when an abandoned thread has taken its slot meanwhile: see `recovery.requeue`
                    self._start(held)
            self._fill()
            self._claims, self._claiming = self._claims + 1, False
            if taken:
                cursor = _farthest(cursor, [claim.owner_key for claim in taken])
            # Several, but fewer than asked for: an owner may have had less than its share, and others more than theirs.
            if not 1 < len(taken) < free + ahead:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), self._settings.worker.poll.total_seconds())

    async def _promote(self) -> None:
        while True:
            await asyncio.sleep(self._settings.worker.poll.total_seconds())
            with contextlib.suppress(LedgerUnavailable):
                await dispatch.move_on(self._ledger)

    # -- working ----------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Give free slots to runs that wait here. A suspect runs alone: after the others, and before any new one."""
        if self._draining or self._alone:
            return
        if self._suspects:
            if self._busy == 0:
                self._alone = True
                self._start(self._suspects.popleft())
            return
        while self._ahead and self._taken < self._settings.worker.slots:
            self._start(self._ahead.popleft())

    def _start(self, held: _Held) -> None:
        self._busy += 1
        held.work = asyncio.create_task(self._work(held))
        self._works.add(held.work)
        held.work.add_done_callback(self._works.discard)

    async def _work(self, held: _Held) -> None:
        claim, attempt = held.claim, None
        try:
            attempt = await self._execution.attempt(claim)
        except asyncio.CancelledError:
            if held.work is not None:
                held.work.uncancel()
        except Exception:
            log.exception("run %s could not be executed", claim.id)
            bug = FatalError("The worker failed on this run; its log has the details.", code="internal_error")
            attempt = Failed(results.problem(bug))
        finally:
            held.is_executing = False
            self._busy -= 1
            self._alone = self._alone and not claim.is_suspect
            self._ends.append(time.monotonic())
            self._fill()
            self._wake.set()
        ending = results.stopped(claim, held.reason) if attempt is None else await self._keeper.ending(claim, attempt)
        if ending is None:
            self._forget(claim.id, claim.fence)
        else:
            self._settler.put(ending)

    async def _recorded(self, batch: Collection[Ending]) -> None:
        await self._execution.settled([ending.id for ending in batch])
        for ending in batch:
            self._forget(ending.id, ending.fence)
        self._wake.set()

    def _forget(self, run_id: UUID, fence: int) -> None:
        """What we hold of this attempt; the run may be here again under a higher fence."""
        held = self._held.get(run_id)
        if held is not None and held.claim.fence == fence:
            del self._held[run_id]

    def _hand_back_waiting(self) -> None:
        for held in [*self._ahead, *self._suspects]:
            self._hand_back(held)

    def _hand_back(self, held: _Held) -> None:
        if self._forget_waiting(held):
            self._settler.put(results.handed_back(held.claim.id, held.claim))

    def _forget_waiting(self, held: _Held) -> bool:
        for waiting in (self._ahead, self._suspects):
            if held in waiting:
                waiting.remove(held)
                return True
        return False

    # -- the whole --------------------------------------------------------------------------------------------------

    async def run(self, stop: Stop) -> None:
        """Work until `stop` is asked for, then drain: finish within the grace period, hand back the rest."""
        await self._until(stop, self._lease.register())
        self._lease.start()
        settling = asyncio.create_task(self._settler.run())
        pool = self._settings.worker.pool
        claiming = asyncio.create_task(self._claim())
        others = (self._promote(), self._watch_lease(), self._ledger.listen(pool, self._wake.set))
        loops = [claiming, *(asyncio.create_task(loop) for loop in others)]
        log.info("serving pool %s with %d slots: %s", pool, self._settings.worker.slots, ", ".join(self._names))
        asked = asyncio.create_task(stop.asked.wait())
        # A loop that ends has failed: better to be restarted than to look alive.
        done, _ = await asyncio.wait({asked, settling, *loops}, return_when=asyncio.FIRST_COMPLETED)
        await self._drain(stop, claiming, settling)
        self._lease.stop()
        for task in (asked, settling, *loops):
            task.cancel()
        await asyncio.gather(asked, settling, *loops, return_exceptions=True)
        for task in done:
            if task is not asked:
                task.result()

    async def _drain(self, stop: Stop, claiming: asyncio.Task[None], settling: asyncio.Task[None]) -> None:
        self._draining = self._keeper.is_hurried = True
        self._wake.set()
        await asyncio.wait({claiming}, timeout=5)  # a claim that is under way still brings runs
        self._hand_back_waiting()
        if self._works:
            log.info("draining: %d runs may finish within %s", len(self._works), self._settings.worker.grace)
            now = asyncio.create_task(stop.at_once.wait())
            finished = asyncio.create_task(asyncio.wait(set(self._works)))
            await asyncio.wait(
                {now, finished},
                timeout=self._settings.worker.grace.total_seconds(),
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in (now, finished):
                task.cancel()
        self._hand_back_waiting()
        for held in self._held.values():
            held.stop("handed back")
        if self._works:
            log.info("handing back %d runs", len(self._works))
            await asyncio.wait(set(self._works), timeout=2)
        with contextlib.suppress(TimeoutError, LedgerUnavailable):
            async with asyncio.timeout(5):
                if not settling.done():
                    await self._settler.join()
                await self._lease.give_up()

    async def _until(self, stop: Stop, work: Awaitable[None]) -> None:
        task, asked = asyncio.ensure_future(work), asyncio.create_task(stop.asked.wait())
        done, _ = await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
        for one in (task, asked):
            one.cancel()
        if task in done:
            task.result()
