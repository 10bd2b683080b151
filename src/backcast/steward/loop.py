"""The steward's loop: decides how often each duty of the leader is done; the duties themselves are elsewhere. Without
a leader runs go on, and only those of dead workers wait.

Two leaders at once do no harm: every statement is correct by itself, by the database's clock and the rows' locks. The
belief of a steward that was stopped decides only when a statement is sent.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from datetime import timedelta
from functools import partial
from uuid import UUID

import asyncpg
import httpx

from backcast.errors import LedgerFault, LedgerUnavailable, Unavailable
from backcast.history.reconciliation import Reconciliation
from backcast.history.sink import Sink
from backcast.ledger import (
    dispatch,
    figures,
    fleet,
    leadership,
    limits,
    maintenance,
    recovery,
    routing,
    task_types,
    unusable,
)
from backcast.ledger.connection import REFUSED, Ledger
from backcast.models import uuid7
from backcast.process import background
from backcast.process.metrics import StewardMetrics
from backcast.process.outages import Outage
from backcast.settings import Settings
from backcast.steward.failure_detector import ROUND, FailureDetector
from backcast.steward.operations import Operations
from backcast.steward.pods import Pods
from backcast.steward.retention import Retention, expire_history
from backcast.store import Store

log = logging.getLogger("backcast.steward")

RECONCILE_EVERY = 5.0
VACUUM_EVERY = 2.0
DEAD_ROWS = 5000
MEASURE_EVERY = 5.0
"""Seconds; to count a backlog of a million runs takes a fraction of one."""
MEASURE_DATABASE_EVERY = 60.0
MARK_EVERY = 5.0
ROUTE_EVERY = 5.0
FOLLOW_EVERY = 20.0
"""Seconds at first, see `routing.follow`."""
HOLD_BACK_EVERY = 10.0
OPERATE_EVERY = 1.0
"""Seconds; without an operation it is one probe of an empty index."""
REMOVE_WORKERS_EVERY = 60.0
REMOVE_WORKERS_AFTER = timedelta(hours=1)

_repeat = partial(background.repeat, outages=(Unavailable, httpx.HTTPError))

Duty = tuple[str, Callable[[], Awaitable[object]], float]
"""The duty's name ("can't <name>" in the log), its function, and the seconds between two calls."""


class Steward:
    def __init__(self, settings: Settings, ledger: Ledger, store: Store, sink: Sink, metrics: StewardMetrics) -> None:
        self._settings, self._ledger, self._store, self._sink = settings.steward, ledger, store, sink
        self._lease, self._unknown_after = settings.lease, settings.unknown_after
        self._id = uuid7()
        self._leading = False
        self._last_round = self._last_dispatch = 0.0
        self._refusals = dict[str, Outage]()
        self._moves = dict[routing.Move, int]()
        self._metrics = metrics
        metrics.leading.set_function(lambda: self._leading)
        self._lost = frozenset[UUID]()
        """The workers that were dead in the last round."""

    async def check(self) -> None:
        """Ready: this steward leads or stands by, and the database has answered lately."""
        if time.monotonic() - min(self._last_round, self._last_dispatch) > 10 * ROUND:
            raise LedgerUnavailable("The steward's rounds do not reach the database.")

    # -- leading ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Lead whenever no other steward leads, for ever."""
        outage = Outage(partial(log.warning, "waiting for the database: %s"))
        # Every steward does this, and it may take long: a million runs may be due.
        dispatching = asyncio.create_task(_repeat("dispatch due runs", self._dispatch, ROUND))
        try:
            while True:
                try:
                    async with self._ledger.session() as connection:  # it holds the lead, and its end gives it up
                        outage.ended()
                        while not await leadership.take_lead(connection):
                            await self._round_ends()
                        await self._lead(connection)
                except LedgerUnavailable as error:
                    outage.failed(error)
                except (*REFUSED, LedgerFault) as error:
                    outage.failed(error, exc_info=True)
                await asyncio.sleep(ROUND)
        finally:
            dispatching.cancel()

    async def _lead(self, connection: asyncpg.Connection) -> None:
        """Check the leases each second. All other duties run beside this, so that none of them delays it."""
        detector = FailureDetector(self._lease.total_seconds())
        async with self._at_work():
            while True:
                began = time.monotonic()
                await leadership.beat(connection, self._id)
                self._metrics.beat_seconds.observe(time.monotonic() - began)
                seen = await fleet.observe(connection, self._lease)
                dead = detector.believed_dead(seen, time.monotonic())
                self._metrics.workers_lost.inc(len(dead - self._lost))
                self._lost = dead
                if dead:
                    await self._done(self._requeue(dead), "requeue the runs of lost workers")
                await self._round_ends()

    async def _round_ends(self) -> None:
        self._last_round = time.monotonic()
        await asyncio.sleep(ROUND)

    async def _dispatch(self) -> None:
        routed = await self._done(routing.apply(self._ledger), "route runs")
        dispatching = dispatch.dispatch_due(self._ledger, self._metrics.expired.inc)
        if await self._done(dispatching, "dispatch due runs") and routed:
            self._last_dispatch = time.monotonic()

    async def _done(self, work: Awaitable[object], name: str) -> bool:
        """Whether it was done; if not, the round goes on. The row of a refused value is set aside."""
        outage = self._refusals.setdefault(name, Outage(partial(log.error, f"can't {name}: %s", exc_info=True)))
        try:
            await work
        except (*REFUSED, LedgerFault) as error:
            outage.failed(error)
            await unusable.set_aside(self._ledger, error)
            return False
        outage.ended()
        return True

    async def _requeue(self, dead: Collection[UUID]) -> None:
        states = await recovery.requeue(self._ledger, self._lease, dead)
        for state in sorted(set(states.values())):
            count = sum(1 for value in states.values() if value == state)
            self._metrics.recovered.labels(state).inc(count)
            log.warning("%d runs of lost workers are now %s", count, state)

    # -- the leader's other duties ------------------------------------------------------------------------------------

    def _duties(self) -> list[Duty]:
        keep, keep_history = self._settings.keep_runs, self._settings.keep_history
        every = self._settings.sweep.total_seconds()
        duties: list[Duty] = [
            ("vacuum the tables", self._vacuum, VACUUM_EVERY),
            ("measure the backlog", self._measure, MEASURE_EVERY),
            ("measure the database", self._measure_database, MEASURE_DATABASE_EVERY),
            (
                "remove silent workers",
                partial(maintenance.remove_silent_workers, self._ledger, REMOVE_WORKERS_AFTER),
                REMOVE_WORKERS_EVERY,
            ),
            ("fail runs that no worker can do", self._fail_late, ROUTE_EVERY),
            ("move runs with their tasks", self._follow, FOLLOW_EVERY),
            ("hold runs back", partial(limits.hold_back, self._ledger), HOLD_BACK_EVERY),
            ("repeat or cancel many runs", Operations(self._ledger, self._store), OPERATE_EVERY),
            ("remove old tasks", partial(task_types.remove_unseen, self._ledger, self._settings.keep_tasks), every),
            (
                "apply retention",
                Retention(self._ledger, self._store, keep, self._settings.keep_failed, self._settings.keep_keys),
                every,
            ),
        ]
        if self._settings.deletion_cost:  # made anew: another leader may have marked the pods meanwhile
            duties.append(("mark busy pods", partial(Pods().mark, self._ledger), MARK_EVERY))
        if self._sink.is_enabled:
            reconciliation = Reconciliation(self._ledger, self._sink, keep_history)
            duties.append(("publish new history", reconciliation.publish_new, ROUND))
            duties.append(("reconcile history", reconciliation.reconcile, RECONCILE_EVERY))
            if keep_history is not None:
                duties.append(("remove old history", partial(expire_history, self._sink, keep_history), every))
        return duties

    @contextlib.asynccontextmanager
    async def _at_work(self) -> AsyncIterator[None]:
        """While entered, this steward leads and does the duties of a leader."""
        log.info("leading")
        self._leading = True
        tasks = [asyncio.create_task(_repeat(*duty)) for duty in self._duties()]
        try:
            yield
        finally:
            self._leading = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._metrics.ledger.clear()

    async def _follow(self) -> None:
        await task_types.renew(self._ledger)
        if moved := await routing.follow(self._ledger, self._moves):
            log.info("%d waiting runs have followed their tasks to other pools", moved)

    async def _fail_late(self) -> None:
        if failed := await routing.fail_late(self._ledger, unknown_after=self._unknown_after):
            log.warning("%d runs have failed: no worker that could do them came within %s", failed, self._unknown_after)

    async def _vacuum(self) -> None:
        if await maintenance.dead_rows(self._ledger) > DEAD_ROWS:
            async with self._ledger.session() as connection:
                await maintenance.vacuum(connection)

    async def _measure(self) -> None:
        self._metrics.ledger.show(
            database_oldest_xmin_age_transactions={(): await figures.oldest_xmin_age(self._ledger)},
            database_dead_rows={(): await maintenance.dead_rows(self._ledger)},
            **await figures.pools(self._ledger),
            **await figures.tasks(self._ledger),
            **await figures.lanes(self._ledger),
        )

    async def _measure_database(self) -> None:
        self._metrics.ledger.show(**await figures.database(self._ledger))
