"""Makes one attempt of a claimed run: fetches its input, reuses a value that was computed already, calls the executor.

Decides nothing about slots, and nothing about how a result is settled.
"""

import json
import logging
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol
from uuid import UUID

from jsonschema import Draft202012Validator

from backcast.errors import LedgerFault, LedgerUnavailable, Unavailable, UsageError
from backcast.ledger import claims, flights, routing
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.models import JSON, AttemptResult, Failed, Problem, Retry, Succeeded, TaskType
from backcast.store import Missing, Store
from backcast.worker import results

log = logging.getLogger("backcast.worker")

FOLLOW = 5.0
"""Seconds after which a run that waits for another one's value tries for itself; usually the flight lands earlier."""
SAME = Problem(
    code="same_value",
    title="Another run computes the same",
    detail="The task is cached, and a run with the same cache key is under way: this one takes its value.",
)


class Executor(Protocol):
    """See `executor.Executor`."""

    @property
    def types(self) -> list[TaskType]: ...

    @property
    def threads_abandoned(self) -> int: ...

    async def execute(self, name: str, run_id: UUID, given: dict[str, JSON], *, retries: int) -> AttemptResult: ...

    def cache_key(self, name: str, run_id: UUID, given: dict[str, JSON]) -> str | None: ...


class Usage(Protocol):
    """The tokens of one answer of the model: see `llm.Usage`."""

    @property
    def model(self) -> str: ...

    @property
    def input_tokens(self) -> int: ...

    @property
    def output_tokens(self) -> int: ...


Meter = Callable[[], AbstractContextManager[Sequence[Usage]]]


class Execution:
    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        executor: Executor,
        meter: Meter,
        *,
        worker_id: UUID,
    ) -> None:
        self._ledger, self._store, self._executor, self._meter = ledger, store, executor, meter
        self._worker_id = worker_id
        self._types = {task.name: task for task in executor.types}
        self._flights: dict[UUID, tuple[str, int]] = {}
        self._used: dict[UUID, Sequence[Usage]] = {}

    async def attempt(self, claim: Claim) -> AttemptResult:
        """Make one attempt. Raises nothing but `CancelledError`, whose message is a `models.Reason`."""
        try:
            if claim.is_quarantined:
                await claims.begin(self._ledger, self._worker_id, claim)
            if claim.lost_fence == claim.fence - 1 and (left := await self._left_behind(claim)) is not None:
                return left
            text = claim.input
            if text is None:
                assert claim.input_key is not None
                text = await self._store.get(claim.input_key)
            given = json.loads(text)
            if not self._fits(claim, given):
                route = routing.version_route(claim.task, claim.signature)
                return Retry(routing.UNFIT_INPUT, delay=0.0, retries=claim.retries_used, route=route)
            key = self._executor.cache_key(claim.task, claim.id, given)
            if key is not None:
                self._flights[claim.id] = key, claim.fence
                if not await flights.take(self._ledger, key, claim):
                    return Retry(SAME, delay=FOLLOW, retries=claim.retries_used, behind=key)
            with self._meter() as used:
                self._used[claim.id] = used
                return await self._executor.execute(claim.task, claim.id, given, retries=claim.retries_used)
        except (Unavailable, LedgerFault) as error:
            # Spread, or all runs that met the same outage come back at the same moment.
            return Retry(Problem.from_error(error), delay=random.uniform(2.5, 7.5), retries=claim.retries_used)  # noqa: S311
        except Missing:
            return _failed(UsageError("The stored input is gone: submit the run again.", code="input_lost"))
        except (ValueError, RecursionError) as error:
            return _failed(UsageError(f"The stored input can't be read: {error}", code="unreadable_input"))

    def usage(self, run: UUID) -> dict[str, JSON] | None:
        """The tokens of the attempt of this run that is over, however it has ended: they are paid for."""
        if not (used := self._used.pop(run, None)):
            return None
        tokens = {kind: sum(getattr(one, kind) for one in used) for kind in ("input_tokens", "output_tokens")}
        return {"model": used[-1].model, **tokens}

    async def _left_behind(self, claim: Claim) -> AttemptResult | None:
        """The value that the attempt before had stored when its worker was lost. It becomes an object of this attempt:
        the lost worker may still run, and removes its own object when its settlement is refused."""
        try:
            body = await self._store.get(results.result_key(claim.id, claim.fence - 1))
            json.loads(body)
        except (Missing, ValueError):  # no object, or not all of it: not every store refuses a cut-off upload
            return None
        log.info("run %s was computed before its worker was lost", claim.id)
        return Succeeded(body)

    def _fits(self, claim: Claim, given: dict[str, JSON]) -> bool:
        """Whether this worker's version of the task accepts an input that was accepted by another version."""
        task = self._types[claim.task]
        if claim.signature in ("", task.signature):
            return True
        return Draft202012Validator(task.input_schema).is_valid(given)

    async def settled(self, runs: Collection[UUID]) -> None:
        """End the flights of these runs, whose results are recorded: the runs that wait for them become ready."""
        landed = [(flight[0], run, flight[1]) for run in runs if (flight := self._flights.pop(run, None)) is not None]
        if landed:
            try:
                await flights.land(self._ledger, landed)
            except (LedgerUnavailable, LedgerFault):
                log.info("%d flights are not landed; the runs behind them become ready by their own time", len(landed))


def _failed(error: UsageError) -> Failed:
    return Failed(Problem.from_error(error))
