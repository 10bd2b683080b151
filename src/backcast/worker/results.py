"""Turns the result of an attempt into the settlement that the ledger records; a value is stored first.

Decides what counts against `max_attempts`, what is tried again, and how long an absent store is retried. Knows nothing
of slots or batches.
"""

import asyncio
import logging
import random
import time
from functools import partial
from uuid import UUID

from backcast.errors import FatalError, StoreUnavailable
from backcast.ledger.claims import Claim
from backcast.ledger.fleet import Held
from backcast.ledger.settlement import INLINE_RESULT, Settlement
from backcast.models import AttemptResult, Failed, Problem, Reason, Retry, Succeeded
from backcast.process.outages import Outage, backoff
from backcast.settings import Settings
from backcast.store import Store

log = logging.getLogger("backcast.worker")


def result_key(run_id: UUID, fence: int) -> str:
    """The key of the object for an attempt's value: attempts never share one."""
    return f"results/{run_id}/{fence}.json"


def stopped(claim: Claim, reason: Reason | None) -> Settlement | None:
    """The settlement of an attempt that was stopped; none when another worker has the run."""
    match reason:
        case "lost":
            return None
        case "cancelled":  # the ledger sees the request and makes the run cancelled
            return _failed(claim, None)
        case "released" | None:
            return released(claim.id, claim)


def released(run_id: UUID, held: Claim | Held) -> Settlement:
    """The run is ready again at once, as if this worker had never claimed it."""
    return Settlement(
        id=run_id, fence=held.fence, lane=held.lane, state="queued", counts=False, retries_used=held.retries_used
    )


def _failed(claim: Claim, error: Problem | None) -> Settlement:
    return Settlement(
        id=claim.id,
        fence=claim.fence,
        lane=claim.lane,
        state="failed",
        error=error,
        retries_used=claim.retries_used,
    )


class Results:
    """Makes settlements, and stores the values among them."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._patience = settings.store.patience.total_seconds()
        self._largest = settings.max_result
        self._outage = Outage(partial(log.warning, "can't store results, trying again: %s"))
        self.is_hurried = False
        """Set while the worker drains: an absent store is not waited for."""

    async def settlement(self, claim: Claim, result: AttemptResult) -> Settlement:
        match result:
            case Failed(reason):
                return _failed(claim, reason)
            case Retry(reason, delay, retries, behind, route):
                return Settlement(
                    id=claim.id,
                    fence=claim.fence,
                    lane=claim.lane,
                    state="scheduled" if delay > 0 or route else "queued",
                    delay=delay,
                    flight=behind,
                    route=route,
                    error=reason,
                    retries_used=retries,
                    counts=retries > claim.retries_used,
                )
            case Succeeded(body) if len(body) > self._largest:
                error = FatalError(
                    f"The result has {len(body)} bytes of JSON, more than the {self._largest} allowed: return less, or"
                    " store it yourself and return its address.",
                    code="result_too_large",
                )
                return _failed(claim, Problem.from_error(error))
            case Succeeded():
                return await self._stored(claim, result)

    async def _stored(self, claim: Claim, result: Succeeded) -> Settlement:
        """Store a value, and keep trying for `store.patience`: computing it again may be expensive."""
        key = result_key(claim.id, claim.fence)
        give_up, delays = time.monotonic() + self._patience, backoff(0.5, 10.0)
        while True:
            try:
                await self._store.put(key, result.body, is_copied=len(result.body) <= INLINE_RESULT)
            except StoreUnavailable as error:
                self._outage.failed(error)
                if time.monotonic() > give_up or self.is_hurried:
                    delay = random.uniform(2.5, 7.5)  # noqa: S311
                    again = Retry(Problem.from_error(error), delay, claim.retries_used)
                    return await self.settlement(claim, again)
                await asyncio.sleep(next(delays))
            else:
                self._outage.ended()
                return Settlement(
                    id=claim.id,
                    fence=claim.fence,
                    lane=claim.lane,
                    state="completed",
                    result=result.body.decode() if len(result.body) <= INLINE_RESULT else None,
                    result_key=key,
                    retries_used=claim.retries_used,
                )
