"""How a claimed run becomes an attempt: its input is fetched, what another attempt has computed is not computed again,
and the engine does the rest. Decides nothing about slots, and nothing about what an attempt's end means.
"""

import json
import logging
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol
from uuid import UUID

from backcast.errors import LedgerUnavailable, Unavailable, UsageError
from backcast.ledger import claims, fleet, flights
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.models import JSON, Attempt, Failed, Problem, Retry, Succeeded, TaskType
from backcast.store import Missing, Store
from backcast.worker import results

log = logging.getLogger("backcast.worker")

FOLLOW = 5.0
"""Seconds after which a run that waits for another's value looks by itself; the landing is the usual way."""
SAME = Problem(
    code="same_value",
    title="Another run computes the same",
    detail="The task is cached, and a run with the same cache key is under way: this one takes its value.",
)


class Engine(Protocol):
    """What executes: see `engine.Engine`."""

    @property
    def types(self) -> list[TaskType]: ...

    @property
    def threads_abandoned(self) -> int: ...

    async def execute(self, name: str, run_id: UUID, given: dict[str, JSON], *, retries: int) -> Attempt: ...

    def cache_key(self, name: str, run_id: UUID, given: dict[str, JSON]) -> str | None: ...


class Usage(Protocol):
    """What one answer of the model took: see `llm.Usage`."""

    @property
    def model(self) -> str: ...

    @property
    def input_tokens(self) -> int: ...

    @property
    def output_tokens(self) -> int: ...


Meter = Callable[[], AbstractContextManager[Sequence[Usage]]]


class Execution:
    def __init__(
        self, ledger: Ledger, store: Store, engine: Engine, meter: Meter, *, pool: str, worker_id: UUID
    ) -> None:
        self._ledger, self._store, self._engine, self._meter = ledger, store, engine, meter
        self._pool, self._worker_id = pool, worker_id
        self._names = {task.name for task in engine.types}
        self._flights: dict[UUID, tuple[str, int]] = {}

    async def attempt(self, claim: Claim) -> Attempt:
        """Make one attempt. Raises nothing but `CancelledError`, whose message is a `models.Reason`."""
        try:
            if claim.task not in self._names:
                return await self._unknown(claim)
            if claim.is_suspect:
                await claims.begin(self._ledger, self._worker_id, claim)
            if claim.lost_fence == claim.fence - 1 and (left := await self._left_behind(claim)) is not None:
                return left
            text = claim.input
            if text is None:
                assert claim.input_key is not None
                text = await self._store.get(claim.input_key)
            given = json.loads(text)
            key = self._engine.cache_key(claim.task, claim.id, given)
            if key is not None:
                self._flights[claim.id] = key, claim.fence
                if not await flights.take(self._ledger, key, claim):
                    return Retry(SAME, delay=FOLLOW, retries=claim.retries_used, behind=key)
            with self._meter() as used:
                attempt = await self._engine.execute(claim.task, claim.id, given, retries=claim.retries_used)
            if not used or not isinstance(attempt, Succeeded):
                return attempt
            tokens = {kind: sum(getattr(one, kind) for one in used) for kind in ("input_tokens", "output_tokens")}
            return replace(attempt, usage={"model": used[-1].model, **tokens})
        except Unavailable as error:
            # Spread, or all that met the same outage come back at the same moment.
            return Retry(results.problem(error), delay=random.uniform(2.5, 7.5), retries=claim.retries_used)  # noqa: S311
        except Missing:
            return Failed(
                results.problem(UsageError("The stored input is gone: submit the run again.", code="input_lost"))
            )
        except (ValueError, RecursionError) as error:
            return Failed(
                results.problem(UsageError(f"The stored input can't be read: {error}", code="unreadable_input"))
            )

    async def _left_behind(self, claim: Claim) -> Attempt | None:
        """What the attempt before stored, before its worker was lost. It becomes an object of this attempt: the lost
        worker may still be there, and removes its own when it is refused."""
        try:
            body = await self._store.get(results.result_key(claim.id, claim.fence - 1))
            json.loads(body)
        except (Missing, ValueError):  # nothing, or not all of it: not every store keeps only what it got whole
            return None
        log.info("run %s was computed before its worker was lost", claim.id)
        return Succeeded(body)

    async def _unknown(self, claim: Claim) -> Attempt:
        """A run of our pool whose task we don't have, as in the middle of a deployment: leave it to a worker that has
        it, wait a little for one to come, then fail it with a sentence."""
        if await fleet.serves(self._ledger, self._pool, claim.task):
            return Retry(results.ELSEWHERE, delay=1.0, retries=claim.retries_used)
        if claim.losses + 1 < claim.max_attempts:
            return Retry(results.UNKNOWN, delay=5.0, retries=claim.retries_used)
        return Failed(results.UNKNOWN)

    async def settled(self, runs: Collection[UUID]) -> None:
        """To be told once the ends of these runs' attempts are recorded: those who wait for their values go on."""
        landed = [(flight[0], run, flight[1]) for run in runs if (flight := self._flights.pop(run, None)) is not None]
        if landed:
            try:
                await flights.land(self._ledger, landed)
            except LedgerUnavailable:
                log.info("%d runs ended without telling those that wait for their values", len(landed))
