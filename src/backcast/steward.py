"""The steward's loop: gives the runs of dead workers to others, and keeps the tables fit. One leader by advisory lock;
without it work goes on, only losses wait."""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg
from prometheus_client import CollectorRegistry, Counter, Gauge

from backcast.errors import LedgerUnavailable
from backcast.ledger import Ledger, runs, workers
from backcast.mirror import Mirror
from backcast.models import uuid7
from backcast.process import Stop, configure_logging, probes
from backcast.settings import Settings

log = logging.getLogger("backcast.steward")

ROUND = 1.0
"""Seconds between two looks at the leases."""
VACUUM_EVERY = 2.0
DEAD_ROWS = 5000
FORGET_WORKERS_AFTER = timedelta(hours=1)
WAITS_AFTER = 2.0
"""Seconds after which a run that no worker has taken is shown as waiting; most never are, and cost nothing."""
LOOK_BACK = 60.0
WAITING_PAGE = 200
"""Waiting runs told of in one round: a backlog must not keep Prefect's server from the runs that end. What has been
taken by a worker when its turn comes is not told of at all."""
ENDED_PAGE = 2000
"""Ended runs told of in one round; more than end in one transaction."""
_LOCK = "backcast.steward"


@dataclass
class Vigil:
    """Decides when silence means death. After any pause of our own, or of the database, every heartbeat is old: so
    the steward must have been watching without a gap for a whole lease, and a mass death needs a second look."""

    lease: float
    watching_since: float = 0.0
    _last: float = field(default=0.0, init=False)
    _database_started: float | None = field(default=None, init=False)
    _suspects: frozenset[UUID] = field(default_factory=frozenset[UUID], init=False)

    def may_requeue(self, fleet: workers.Fleet, now: float) -> bool:
        """`now` is a monotonic clock, in seconds."""
        gap = now - self._last > max(3 * ROUND, self.lease / 3)
        if gap or fleet.database_started != self._database_started:
            self.watching_since, self._suspects = now, frozenset()
        self._last, self._database_started = now, fleet.database_started
        if now - self.watching_since < self.lease or not fleet.dead:
            return False
        if len(fleet.dead) > max(1, (fleet.alive + len(fleet.dead)) // 4) and fleet.dead != self._suspects:
            self._suspects = fleet.dead  # more than a quarter at once: look again in a moment before believing it
            return False
        return True


@dataclass
class Chronicle:
    """Tells Prefect what its engine can't: which runs wait, and how those ended that never reached an engine or whose
    worker died. Looks back a minute when it begins; telling twice does no harm."""

    ledger: Ledger
    mirror: Mirror
    _accepted: UUID = field(default_factory=lambda: uuid7(LOOK_BACK), init=False)
    _ended: datetime = field(default_factory=lambda: datetime.now(UTC) - timedelta(seconds=LOOK_BACK), init=False)

    async def go_on(self) -> None:
        until = uuid7(WAITS_AFTER)
        waiting = await runs.waiting(self.ledger, self._accepted, until, limit=WAITING_PAGE)
        self._accepted = waiting[-1].id if len(waiting) == WAITING_PAGE else until
        ended = await runs.ended_badly(self.ledger, self._ended, limit=ENDED_PAGE)
        if ended:  # a full page may end inside a batch with one time: that batch again
            self._ended = ended[-1].at - timedelta(microseconds=len(ended) == ENDED_PAGE)
        for run in (*waiting, *ended):
            self.mirror.tell(run)


class Steward:
    def __init__(self, ledger: Ledger, lease: timedelta, mirror: Mirror) -> None:
        self._ledger, self._lease, self._mirror = ledger, lease, mirror
        self._leading = False
        self._last_round = 0.0
        self.registry = CollectorRegistry()
        Gauge("backcast_steward_leading", "1 for the leader", registry=self.registry).set_function(
            lambda: float(self._leading)
        )
        self._requeued = Counter(
            "backcast_runs_lost",
            "Runs taken from dead workers, by what became of them",
            ["state"],
            registry=self.registry,
        )

    async def check(self) -> None:
        """Readiness: leading, or waiting to; either way the database answered lately."""
        if time.monotonic() - self._last_round > 10 * ROUND:
            raise LedgerUnavailable("The steward's rounds do not reach the database.")

    async def run(self) -> None:
        """Lead when nobody else does, for ever."""
        quiet = False
        while True:
            try:
                async with self._ledger.session() as connection:
                    quiet = False
                    await self._lead(connection)
            except LedgerUnavailable as error:
                if not quiet:
                    log.warning("waiting for the database: %s", error)
                quiet = True
            self._leading = False
            await asyncio.sleep(ROUND)

    async def _lead(self, connection: asyncpg.Connection) -> None:
        vigil, vacuumed, forgotten = Vigil(self._lease.total_seconds()), 0.0, 0.0
        chronicle = Chronicle(self._ledger, self._mirror)
        while True:
            now = time.monotonic()
            if not self._leading:  # held by the session, so it falls to another steward when this one dies
                got = await connection.fetchval("select pg_try_advisory_lock(hashtext($1))", _LOCK)
                if got:
                    log.info("leading")
                self._leading = bool(got)
            if self._leading:
                fleet = await workers.fleet(connection, self._lease)
                if vigil.may_requeue(fleet, now):
                    await self._requeue()
                if now - vacuumed > VACUUM_EVERY:
                    vacuumed = now
                    await workers.vacuum(connection, dead_rows=DEAD_ROWS)
                if now - forgotten > 60:
                    forgotten = now
                    await workers.forget_dead(self._ledger, FORGET_WORKERS_AFTER)
                if self._mirror.is_enabled:
                    await chronicle.go_on()
            await runs.promote(self._ledger)
            self._last_round = now
            await asyncio.sleep(ROUND)

    async def _requeue(self) -> None:
        states = await runs.requeue(self._ledger, self._lease)
        for state in sorted(set(states.values())):
            count = sum(1 for value in states.values() if value == state)
            self._requeued.labels(state).inc(count)
            log.warning("%d runs of dead workers are now %s", count, state)


async def _serve(settings: Settings) -> None:
    stop = Stop()
    ledger = Ledger(settings.database.url.get_secret_value(), pool=2, name="backcast-steward")
    mirror = Mirror(settings.prefect)
    steward = Steward(ledger, settings.lease, mirror)
    async with probes(settings.steward.host, settings.steward.port, ready=steward.check, registry=steward.registry):
        running, mirroring = asyncio.create_task(steward.run()), asyncio.create_task(mirror.run())
        asked = asyncio.create_task(stop.asked.wait())
        await asyncio.wait({running, asked}, return_when=asyncio.FIRST_COMPLETED)
        for task in (asked, mirroring, running):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    await mirror.aclose(timeout=2)
    await ledger.aclose()


def main(settings: Settings) -> None:
    """Run a steward until SIGTERM or SIGINT."""
    configure_logging(settings.log_level)
    asyncio.run(_serve(settings))
