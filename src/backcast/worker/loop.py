"""Executes the runs of its slots, and decides when one is stopped or released.

Only user code holds a slot. Results are stored and settled after it is free, and the number of finished runs that are
not settled yet is bounded, so an absent store or database stops the claims, not the worker.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection
from functools import partial
from uuid import UUID

from backcast.errors import FatalError, LedgerUnavailable, Unavailable
from backcast.ledger import fleet, routing
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Settlement
from backcast.models import Failed, Problem
from backcast.process import background, tracing
from backcast.process.logs import RUN
from backcast.process.metrics import WorkerMetrics
from backcast.process.stop import Stop
from backcast.protocol import Attempt, Reports
from backcast.settings import Settings
from backcast.store import Store
from backcast.worker import results
from backcast.worker.child import STOP_WITHIN
from backcast.worker.claiming import Claiming
from backcast.worker.execution import Execution
from backcast.worker.executors import Executors
from backcast.worker.lease import BEAT, Heartbeat, Lease
from backcast.worker.logs import Logs
from backcast.worker.reports import Recorder
from backcast.worker.results import Results
from backcast.worker.settler import Settler
from backcast.worker.slots import Held, Slots
from backcast.worker.turns import Turns

log = logging.getLogger("backcast.worker")

LAST_CLAIM = 1.0
"""Seconds beyond the grace period that a drain waits for a claim that is under way."""
LAST_STOPS = STOP_WITHIN + 0.5
"""Seconds for the runs that the end of the grace period stops."""
LAST_SETTLEMENTS = 1.0
"""Seconds at least for what is left to be recorded."""
DRAIN_WITHIN = LAST_CLAIM + LAST_STOPS + LAST_SETTLEMENTS
"""Seconds that a drain may take beyond the grace period, whatever the code of runs, the store or the database do."""

_BUG = Failed(
    Problem.from_error(FatalError("The worker failed on this run; its log has the details.", code="internal_error"))
)


class Worker:
    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        store: Store,
        executors: Executors,
        metrics: WorkerMetrics,
        worker_id: UUID,
    ) -> None:
        """The executors have been started: it is known which tasks they serve."""
        self._settings = settings
        self._ledger = ledger
        self._store = store
        self._lease = Lease(
            settings, ledger, executors.types, worker_id, report=self._report, acknowledged=self._acknowledged
        )
        self._results = Results(store, settings)
        self._executors = executors
        self._execution = Execution(ledger, store, executors, worker_id=self._lease.id)
        self._names = sorted(task.name for task in executors.types)
        self._slots = Slots(settings.worker.slots, lambda: executors.left, self._work)
        turns = Turns(routing.routes_to(executors.types))
        self._claiming = Claiming(settings, ledger, self._slots, turns, metrics, worker_id, may=self._may_claim)
        self._draining = False
        self._drain_asked = asyncio.Event()
        self.ends_at: float | None = None
        """When the drain that is under way has to be over, by the monotonic clock."""
        self._reports = Recorder(ledger, self._lease.id, metrics)
        self._logs = Logs(store)
        executors.reported = self._reported
        self._settler = Settler(ledger, store, self._lease.id, settled=self._recorded, metrics=metrics)
        self._metrics = metrics
        metrics.slots.set(settings.worker.slots)
        metrics.busy.set_function(lambda: self._slots.busy)
        metrics.unsettled.set_function(lambda: len(self._slots.runs))
        metrics.heartbeat_age.set_function(lambda: self._lease.age)

    # -- lease ------------------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Readiness: the lease is good, an executor is there, and the store is reachable."""
        if not self._lease.is_good:
            raise LedgerUnavailable("This worker has no lease: its heartbeats do not reach the database.")
        if not self._executors.is_ready:
            raise Unavailable("This worker has no executor: see its log.")
        if self._executors.left >= self._settings.worker.slots:
            raise Unavailable("All slots of this worker are taken by code that does not end.")
        if (fault := self._claiming.fault) is not None:
            raise LedgerUnavailable("This worker can't claim runs: see its log.", reason=str(fault))
        await self._store.check()

    def _may_claim(self) -> bool:
        return self._lease.is_good and self._executors.is_ready

    def _report(self) -> Heartbeat:
        claims = self._claiming.count  # first: a claim from here on is one more
        fences = {run_id: held.claim.fence for run_id, held in list(self._slots.runs.items())}
        return Heartbeat(fences, claims, self._slots.busy, self._draining, self._settler.count)

    def _acknowledged(self, sent: Heartbeat, beat: fleet.Beat) -> None:
        """Stop the runs that the ledger has given to others, and release those that this worker does not know of."""
        holds = beat.holds
        self._claiming.heard(beat)
        if beat.drain:
            self._drain_asked.set()
        for run_id, fence in sent.fences.items():
            ours, theirs = self._slots.runs.get(run_id), holds.get(run_id)
            if ours is None or ours.claim.fence != fence:
                continue  # settled, or claimed anew, since the heartbeat was sent
            if theirs is None or theirs.fence != fence:
                ours.stop("lost")
                if self._slots.withdraw(ours):
                    self._slots.drop(run_id, fence)
            elif theirs.cancel:
                ours.stop("cancelled")
                self._release(ours)
            elif theirs.paused:
                if theirs.release:
                    ours.stop("released")
                self._release(ours)
        if sent.claims is None or sent.claims != self._claiming.count:
            return  # an unknown run may just have been claimed
        for run_id, theirs in holds.items():
            if run_id not in sent.fences and run_id not in self._slots.runs:
                log.warning("releasing %s: the answer to its claim was lost", run_id)
                self._settler.put(results.released(run_id, theirs))

    async def _watch_executors(self) -> None:
        """Use the slots that get free without the end of a run."""
        while True:
            await self._executors.changed.wait()
            self._executors.changed.clear()
            self._slots.fill()
            self._claiming.wake()

    async def _watch_lease(self) -> None:
        while True:
            await asyncio.sleep(BEAT / 2)
            for held in self._slots.overdue:
                self._release(held)
            if not self._lease.is_good:
                self._release_waiting()
            if not self._lease.is_good and self._slots.busy:
                log.warning(
                    "no heartbeat for two thirds of the lease: stopping %d runs, other workers may do them",
                    self._slots.busy,
                )
                for held in self._slots.runs.values():
                    held.stop("released")

    # -- executing --------------------------------------------------------------------------------------------------

    async def _work(self, held: Held) -> None:
        claim = held.claim
        RUN.set((claim.id, claim.task))
        began = time.monotonic()
        if claim.trace is not None:
            held.spans = tracing.attempt(
                claim.trace,
                waited=claim.waited if claim.fence == 1 else None,  # later ones are after others
                run=claim.id,
                task=claim.task,
                number=claim.fence,
                worker=self._lease.id,
            )
        attempt = Attempt(None, claim.retries_used)
        try:
            if held.reason is None:
                attempt = await self._execution.attempt(claim)
        except asyncio.CancelledError:
            if held.work is not None:
                held.work.uncancel()
        except Exception:
            log.exception("the run could not be executed")
            attempt = Attempt(_BUG, claim.retries_used)
        finally:
            self._metrics.executed(claim.task, time.monotonic() - began)
            self._slots.freed(held)
            self._claiming.wake()
        if held.has_reported:
            await self._kept(claim)
        settlement = await self._settlement(held, attempt)
        if isinstance(attempt.result, Failed):  # its detail may quote the caller's data
            log.info("the run has failed: %s", attempt.result.problem.code)
        if settlement is None:
            self._drop(claim.id, claim.fence, "lost")
            self._execution.forget(claim)
        else:
            if attempt.asked is not None:
                self._metrics.asked(attempt.usage or {}, *attempt.asked)
            if held.spans is not None:
                held.spans.settle()
            if attempt.usage or attempt.tried:
                settlement = settlement._replace(usage=attempt.usage, earlier=attempt.tried)
            self._settler.put(settlement)

    async def _kept(self, claim: Claim) -> None:
        """Record what the run has reported: before its end, which refuses later reports. It is settled all the same."""
        try:
            await self._reports.recorded(claim.id, claim.fence)
            await self._logs.stored(claim.id, claim.fence)
        except Exception:
            log.exception("what the run has reported could not be kept")

    async def _settlement(self, held: Held, attempt: Attempt) -> Settlement | None:
        """However storing the value fails, the run is settled: its lease would never end."""
        try:
            return await self._results.settlement(held.claim, attempt, held.reason)
        except Exception:
            log.exception("the result of the run could not be stored")
            return await self._results.settlement(held.claim, Attempt(_BUG, attempt.retries))

    async def _recorded(self, batch: Collection[Settlement]) -> None:
        await self._execution.settled([settlement.id for settlement in batch])
        for settlement in batch:
            self._drop(settlement.id, settlement.fence, settlement.state)
            if settlement.route:
                self._claiming.reroute()
        self._claiming.wake()

    def _reported(self, run_id: UUID, given: Reports) -> None:
        held = self._slots.runs.get(run_id)
        if held is None or not held.is_executing:  # code that goes on although its run was stopped
            return
        held.has_reported = True
        if given.progress is not None or given.events:
            self._reports.put(held.claim, given)
        if given.lines:
            self._logs.put(held.claim, given.lines)

    def _drop(self, run_id: UUID, fence: int, state: str) -> None:
        held = self._slots.drop(run_id, fence)
        if held is not None and held.spans is not None:
            held.spans.end(state)

    def _release_waiting(self) -> None:
        for held in self._slots.waiting:
            self._release(held)

    def _release(self, held: Held) -> None:
        if self._slots.withdraw(held):
            self._settler.put(results.released(held.claim.id, held.claim))

    # -- start and drain --------------------------------------------------------------------------------------------

    async def run(self, stop: Stop) -> None:
        """Work until `stop` or the ledger asks to, then drain: finish within the grace period, release the rest."""
        if not await self._registered(stop):
            return
        self._lease.start()
        settling = asyncio.create_task(self._settler.run())
        recording = asyncio.create_task(background.keep("record what runs report", self._reports.run))
        storing = asyncio.create_task(background.keep("store the logs of runs", self._logs.run))
        pool = self._settings.worker.pool
        claiming = asyncio.create_task(self._claiming.run())
        listening = partial(self._ledger.listen, pool, self._claiming.ready, self._logs.read)
        others = (
            background.keep("dispatch due runs", self._claiming.keep_dispatching),
            self._watch_lease(),
            background.keep("listen for runs", listening),
            self._watch_executors(),
        )
        loops = [claiming, *(asyncio.create_task(loop) for loop in others)]
        log.info("serving pool %s with %d slots: %s", pool, self._settings.worker.slots, ", ".join(self._names))
        asked = asyncio.create_task(stop.asked.wait())
        drain = asyncio.create_task(self._drain_asked.wait())
        # A loop that ends has failed: the process then ends too, to be restarted and not to look alive.
        failing = {settling, self._executors.failed, *loops}
        done, _ = await asyncio.wait({asked, drain, *failing}, return_when=asyncio.FIRST_COMPLETED)
        await self._drain(stop, claiming, settling)
        await self._lease.stop()
        for task in (asked, drain, settling, recording, storing, *loops):
            task.cancel()
        await asyncio.gather(asked, drain, settling, recording, storing, *loops, return_exceptions=True)
        for task in done - {asked, drain}:
            task.result()

    async def _drain(self, stop: Stop, claiming: asyncio.Task[None], settling: asyncio.Task[None]) -> None:
        self._draining = self._results.is_hurried = True
        self._slots.close()
        self._claiming.close()
        began, grace = time.monotonic(), self._settings.worker.grace.total_seconds()
        self.ends_at = began + grace + DRAIN_WITHIN
        await asyncio.wait({claiming}, timeout=min(5.0, grace + LAST_CLAIM))  # it may still bring runs
        self._release_waiting()
        if self._slots.works:
            log.info(
                "draining: runs that may finish within %s: %d", self._settings.worker.grace, len(self._slots.works)
            )
            now = asyncio.create_task(stop.at_once.wait())
            finished = asyncio.create_task(asyncio.wait(set(self._slots.works)))
            await asyncio.wait(
                {now, finished},
                timeout=max(0.0, began + grace - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in (now, finished):
                task.cancel()
        self._release_waiting()
        for held in self._slots.runs.values():
            held.stop("released")
        if self._slots.works:
            log.info("releasing the runs that are left: %d", len(self._slots.works))
            await asyncio.wait(set(self._slots.works), timeout=LAST_STOPS)
        with contextlib.suppress(TimeoutError, LedgerUnavailable):
            async with asyncio.timeout(max(LAST_SETTLEMENTS, min(5.0, self.ends_at - time.monotonic()))):
                if not settling.done():
                    await self._settler.join()
                await self._lease.give_up()

    async def _registered(self, stop: Stop) -> bool:
        """Register; if `stop` is asked for first, take the registration back."""
        registering, asked = asyncio.create_task(self._lease.register()), asyncio.create_task(stop.asked.wait())
        await asyncio.wait({registering, asked}, return_when=asyncio.FIRST_COMPLETED)
        for task in (registering, asked):
            task.cancel()
        await asyncio.gather(registering, asked, return_exceptions=True)
        if not stop.asked.is_set():
            registering.result()
            return True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._lease.give_up()  # its statement may have been committed without our seeing the answer
        return False
