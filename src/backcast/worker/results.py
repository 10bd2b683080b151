"""How the end of an attempt becomes the ending that the ledger records; a result is stored before it is one.

Decides what is charged, what waits and for how long a store that is away is tried; knows nothing of slots or batches.
"""

import asyncio
import logging
import random
import time
from uuid import UUID

from backcast.errors import BackcastError, FatalError, StoreUnavailable
from backcast.ledger.claims import Claim
from backcast.ledger.fleet import Held
from backcast.ledger.settlement import INLINE_RESULT, Ending
from backcast.models import Attempt, Failed, Problem, Reason, Retry, Succeeded
from backcast.settings import Settings
from backcast.store import Store

log = logging.getLogger("backcast.worker")

ELSEWHERE = Problem(
    code="task_elsewhere",
    title="This worker does not have the task",
    detail="The worker that claimed this run does not have its task, another one of the pool does: it goes back.",
)
UNKNOWN = Problem(
    code="unknown_task",
    title="No worker has this task",
    detail="The worker that claimed this run does not have its task: start one whose BACKCAST_TASKS names its module.",
)


def result_key(run_id: UUID, fence: int) -> str:
    """Where an attempt stores its result: attempts never share an object."""
    return f"results/{run_id}/{fence}.json"


def problem(error: BackcastError) -> Problem:
    return Problem(code=error.code, title=error.title, detail=error.detail)


def stopped(claim: Claim, reason: Reason | None) -> Ending | None:
    """The ending of an attempt that was stopped; none when the run is no longer ours to speak for."""
    match reason:
        case "lost":
            return None
        case "cancelled":  # settle sees the request and makes the outcome cancelled
            return _failed(claim, None)
        case "handed back" | None:
            return handed_back(claim.id, claim)


def handed_back(run_id: UUID, held: Claim | Held) -> Ending:
    """The run is ready again at once, as if this worker had never had it."""
    return Ending(
        id=run_id, fence=held.fence, lane=held.lane, state="queued", charged=False, retries_used=held.retries_used
    )


def _failed(claim: Claim, error: Problem | None) -> Ending:
    return Ending(
        id=claim.id,
        fence=claim.fence,
        lane=claim.lane,
        state="failed",
        error=error,
        retries_used=claim.retries_used,
    )


class Keeper:
    """Makes endings, and stores the results among them."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._patience = settings.store.patience.total_seconds()
        self._largest = settings.max_result
        self._is_away = False
        self.is_hurried = False
        """Set while the worker drains: a store that is away is not waited for."""

    async def ending(self, claim: Claim, attempt: Attempt) -> Ending:
        match attempt:
            case Failed(reason):
                return _failed(claim, reason)
            case Retry(reason, delay, retries, behind):
                return Ending(
                    id=claim.id,
                    fence=claim.fence,
                    lane=claim.lane,
                    state="scheduled" if delay > 0 else "queued",
                    delay=delay,
                    flight=behind,
                    error=reason,
                    retries_used=retries,
                    charged=retries > claim.retries_used or reason is UNKNOWN,
                )
            case Succeeded(body) if len(body) > self._largest:
                error = FatalError(
                    f"The result has {len(body)} bytes of JSON, more than the {self._largest} allowed: return less, or"
                    " store it yourself and return its address.",
                    code="result_too_large",
                )
                return _failed(claim, problem(error))
            case Succeeded():
                return await self._stored(claim, attempt)

    async def _stored(self, claim: Claim, attempt: Succeeded) -> Ending:
        """Store a result, for as long as it takes within reason: computing it again may be dear."""
        key = result_key(claim.id, claim.fence)
        give_up, delay = time.monotonic() + self._patience, 0.5
        while True:
            try:
                await self._store.put(key, attempt.body, is_copied=len(attempt.body) <= INLINE_RESULT)
            except StoreUnavailable as error:
                if not self._is_away:
                    log.warning("can't store results, trying on: %s", error)
                self._is_away = True
                if time.monotonic() > give_up or self.is_hurried:
                    again = Retry(problem(error), delay=random.uniform(2.5, 7.5), retries=claim.retries_used)  # noqa: S311
                    return await self.ending(claim, again)
                await asyncio.sleep(delay)
                delay = min(delay * 2, 10.0)
            else:
                self._is_away = False
                return Ending(
                    id=claim.id,
                    fence=claim.fence,
                    lane=claim.lane,
                    state="completed",
                    result=attempt.body.decode() if len(attempt.body) <= INLINE_RESULT else None,
                    result_key=key,
                    usage=attempt.usage,
                    retries_used=claim.retries_used,
                )
