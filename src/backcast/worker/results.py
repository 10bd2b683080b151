"""Turns the result of an attempt into the settlement that the ledger records; a value is stored first.

Decides what counts against `max_attempts`, what is tried again, and how long an absent store is retried. Knows nothing
of slots or batches.
"""

import asyncio
import logging
import time
from functools import partial
from uuid import UUID

from backcast.errors import StoreUnavailable
from backcast.ledger.claims import Claim
from backcast.ledger.fleet import Held
from backcast.ledger.settlement import INLINE_RESULT, Settlement
from backcast.models import Failed, Problem, Reason, Retry, Succeeded, result_key
from backcast.process import tracing
from backcast.process.outages import Outage, backoff
from backcast.protocol import Attempt
from backcast.settings import Settings
from backcast.store import Store

log = logging.getLogger("backcast.worker")


def stopped(claim: Claim, reason: Reason | None, retries: int) -> Settlement | None:
    """The settlement of an attempt that was stopped; none when another worker has the run."""
    match reason:
        case "lost":
            return None
        case "cancelled":  # the ledger sees the request and makes the run cancelled
            return _failed(claim, None, retries)
        case "released" | None:
            return released(claim.id, claim, retries, has_started=True)


def released(run_id: UUID, held: Claim | Held, retries: int | None = None, *, has_started: bool = False) -> Settlement:
    """The run is ready again at once, as if this worker had never claimed it, but for the retries that it has made."""
    retries = held.retries_used if retries is None else retries
    return Settlement(
        id=run_id,
        fence=held.fence,
        lane=held.lane,
        task=held.task if isinstance(held, Claim) else "",
        state="queued",
        counts=retries - held.retries_used,
        retries_used=retries,
        has_started=has_started,
    )


def _failed(claim: Claim, error: Problem | None, retries: int, traceback: str = "") -> Settlement:
    return Settlement(
        id=claim.id,
        fence=claim.fence,
        lane=claim.lane,
        task=claim.task,
        state="failed",
        error=error,
        traceback=traceback,
        counts=1 + retries - claim.retries_used,
        retries_used=retries,
    )


class Results:
    """Makes settlements, and stores the values among them."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._patience = settings.store.patience.total_seconds()
        self._outage = Outage(partial(log.warning, "can't store results, trying again: %s"))
        self.is_hurried = False
        """Set while the worker drains: an absent store is not waited for."""

    async def settlement(self, claim: Claim, attempt: Attempt, reason: Reason | None = None) -> Settlement | None:
        """`reason`: why it was stopped, if it was. None: there is nothing to record, another worker has the run."""
        match attempt.result:
            case None:
                return stopped(claim, reason, attempt.retries)
            case Failed(problem, traceback):
                return _failed(claim, problem, attempt.retries, traceback)
            case Retry(problem, counts=True) if claim.losses + 1 >= claim.max_attempts:
                return _failed(claim, problem, attempt.retries)
            case Retry(problem, delay, retries, behind, route, counts, traceback):
                return Settlement(
                    id=claim.id,
                    fence=claim.fence,
                    lane=claim.lane,
                    task=claim.task,
                    state="scheduled" if delay > 0 or route else "queued",
                    delay=delay,
                    flight=behind,
                    route=route,
                    error=problem,
                    traceback=traceback,
                    retries_used=retries,
                    counts=retries - claim.retries_used + counts,
                )
            case Succeeded(body):
                return await self._stored(claim, body, attempt.retries)

    async def _stored(self, claim: Claim, body: bytes, retries: int) -> Settlement | None:
        """Store a value, and keep trying for `store.patience`: computing it again may be expensive, so that counts."""
        key = result_key(claim.id, claim.fence)
        give_up, delays = time.monotonic() + self._patience, backoff(0.5, 10.0)
        while True:
            try:
                with tracing.span("store", size=len(body)):
                    await self._store.put(key, body, is_copied=len(body) <= INLINE_RESULT)
            except StoreUnavailable as error:
                self._outage.failed(error)
                if time.monotonic() > give_up or self.is_hurried:
                    again = Retry.after_outage(error, retries, counts=not self.is_hurried)
                    return await self.settlement(claim, Attempt(again, retries))
                await asyncio.sleep(next(delays))
            else:
                self._outage.ended()
                return Settlement(
                    id=claim.id,
                    fence=claim.fence,
                    lane=claim.lane,
                    task=claim.task,
                    state="completed",
                    result=body.decode() if len(body) <= INLINE_RESULT else None,
                    result_key=key,
                    counts=1 + retries - claim.retries_used,
                    retries_used=retries,
                )
