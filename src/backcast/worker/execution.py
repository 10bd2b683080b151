"""Makes one attempt of a claimed run: fetches its input, reuses a value that was computed already, asks an
executor.

Decides nothing about slots, and nothing about how a result is settled.
"""

import hashlib
import json
import logging
from collections.abc import Collection
from uuid import UUID

from backcast.errors import LedgerFault, LedgerUnavailable, Unavailable, UsageError
from backcast.ledger import claims, flights, routing
from backcast.ledger.claims import Claim
from backcast.ledger.connection import REFUSED, Ledger
from backcast.models import AttemptResult, Failed, Problem, Retry, Succeeded, result_key
from backcast.protocol import Attempt
from backcast.store import Missing, Store
from backcast.targets.inputs import Inputs
from backcast.worker.child import ExecutorEnded
from backcast.worker.executors import Executors

log = logging.getLogger("backcast.worker")

FOLLOW = 5.0
"""Seconds after which a run that waits for another one's value tries for itself; usually the flight lands earlier."""
ALONE_AFTER = 5
"""Attempts that ended for no doing of the run, after which it is executed with nothing beside it if there is room: then
others can't end it any more."""
ENDLESS = 100
"""Such attempts after which it fails."""
RELEASED_TOO_OFTEN = Problem(
    code="released_too_often",
    title="The run was begun again and again, and never came to its end",
    detail=f"{ENDLESS} attempts ended although it did nothing wrong: its workers were stopped before it was done, or"
    " processes beside it ended. Raise BACKCAST_WORKER__GRACE above what the task takes, or cut it into shorter runs.",
)
SAME = Problem(
    code="same_value",
    title="Another run computes the same",
    detail="The task is cached, and a run with the same cache key is under way: this one takes its value.",
)


class Execution:
    def __init__(self, ledger: Ledger, store: Store, executors: Executors, *, worker_id: UUID) -> None:
        self._ledger, self._store, self._executors = ledger, store, executors
        self._worker_id = worker_id
        self._types = {task.name: task for task in executors.types}
        self._flights: dict[UUID, tuple[str, int]] = {}

    async def attempt(self, claim: Claim) -> Attempt:
        """Make one attempt. Raises nothing but `CancelledError`, whose message is a `models.Reason`."""
        try:
            return await self._attempt(claim)
        except ExecutorEnded as ended:
            retry = Retry(ended.problem, 0.0, ended.retries, counts=True)
            return Attempt(retry if ended.fault == "own" else None, ended.retries)
        except (Unavailable, LedgerFault) as error:
            return _unstarted(claim, Retry.after_outage(error, claim.retries_used))
        except Missing:
            error = UsageError("The stored input is gone: submit the run again.", code="input_lost")
            return _unstarted(claim, Failed(Problem.from_error(error)))

    async def _attempt(self, claim: Claim) -> Attempt:
        if claim.releases >= ENDLESS:
            return _unstarted(claim, Failed(RELEASED_TOO_OFTEN))
        if claim.is_quarantined:
            await claims.begin(self._ledger, self._worker_id, claim)
        if claim.lost_fence == claim.fence - 1 and (left := await self._left_behind(claim)) is not None:
            return _unstarted(claim, left)
        if claim.input is not None:
            given = claim.input.encode()
        else:
            assert claim.input_key is not None
            given = await self._store.get(claim.input_key)
        if not self._fits(claim, given):
            route = routing.version_route(claim.task, claim.signature)
            return _unstarted(claim, Retry(routing.UNFIT_INPUT, 0.0, claim.retries_used, route=route))
        if self._executors.is_cached(claim.task):
            key = await self._executors.cache_key(claim.task, claim.id, given, retries=claim.retries_used)
            if key is not None:
                flight = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()  # the key may be any text
                self._flights[claim.id] = flight, claim.fence
                if not await flights.take(self._ledger, flight, claim):
                    return _unstarted(claim, Retry(SAME, FOLLOW, claim.retries_used, behind=flight))
        is_alone = claim.releases >= ALONE_AFTER or claim.has_many_losses
        return await self._executors.execute(claim.task, claim.id, given, retries=claim.retries_used, is_alone=is_alone)

    async def _left_behind(self, claim: Claim) -> AttemptResult | None:
        """The value that the attempt before had stored when its worker was lost. It becomes an object of this attempt:
        the lost worker may still run, and removes its own object when its settlement is refused."""
        try:
            body = await self._store.get(result_key(claim.id, claim.fence - 1))
            json.loads(body)
        except (Missing, ValueError):  # no object, or not all of it: not every store refuses a cut-off upload
            return None
        log.info("run %s was computed before its worker was lost", claim.id)
        return Succeeded(body)

    def _fits(self, claim: Claim, given: bytes) -> bool:
        """Whether this worker's version of the task accepts an input that was accepted by another version."""
        task = self._types[claim.task]
        if claim.signature in ("", task.signature):
            return True
        try:
            return Inputs(task.input_schema).fits(json.loads(given))
        except (ValueError, RecursionError):
            return True  # the executor reports it

    def forget(self, claim: Claim) -> None:
        """Another worker has it."""
        if self._flights.get(claim.id, ("", 0))[1] == claim.fence:
            del self._flights[claim.id]

    async def settled(self, runs: Collection[UUID]) -> None:
        """End the flights of these runs, whose results are recorded: the runs that wait for them become ready."""
        landed = [(flight[0], run, flight[1]) for run in runs if (flight := self._flights.pop(run, None)) is not None]
        if landed:
            try:
                await flights.land(self._ledger, landed)
            except (LedgerUnavailable, LedgerFault, *REFUSED):
                log.info("%d flights are not landed; the runs behind them become ready by their own time", len(landed))


def _unstarted(claim: Claim, result: AttemptResult) -> Attempt:
    """The end of an attempt for which no code of the task was executed."""
    return Attempt(result, claim.retries_used)
