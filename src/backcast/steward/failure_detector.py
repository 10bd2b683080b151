"""Decides when a worker's silence means its death."""

from dataclasses import dataclass, field
from uuid import UUID

from backcast.ledger.fleet import Fleet

ROUND = 1.0
"""Seconds between two checks of the leases."""


@dataclass
class FailureDetector:
    """After any pause of our own, or of the database, every heartbeat is old. So the steward must have watched without
    a gap for a whole lease, and a mass death must be seen twice."""

    lease: float
    watching_since: float = 0.0
    _last: float = field(default=0.0, init=False)
    _last_at: float = field(default=0.0, init=False)
    _database_started: float | None = field(default=None, init=False)
    _presumed_dead: frozenset[UUID] = field(default_factory=frozenset[UUID], init=False)

    def may_requeue(self, fleet: Fleet, now: float) -> bool:
        """`now` is a monotonic clock, in seconds, read after the query: a result from before a pause is old. The
        database's clock shows two things that ours may not: that the machine slept, or that a clock was set."""
        limit = max(3 * ROUND, self.lease / 3)
        gap = now - self._last > limit or fleet.at - self._last_at > limit
        if gap or fleet.database_started != self._database_started:
            self.watching_since, self._presumed_dead = now, frozenset()
        self._last, self._last_at, self._database_started = now, fleet.at, fleet.database_started
        if now - self.watching_since < self.lease or not fleet.dead:
            return False
        if len(fleet.dead) > max(1, (fleet.alive + len(fleet.dead)) // 4) and fleet.dead != self._presumed_dead:
            self._presumed_dead = fleet.dead  # more than a quarter at once: believed if the next check shows the same
            return False
        return True
