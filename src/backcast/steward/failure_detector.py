"""Decides when a worker's silence means its death."""

from dataclasses import dataclass, field
from uuid import UUID

from backcast.ledger.fleet import Fleet

ROUND = 1.0
"""Seconds between two looks at the leases."""


@dataclass
class FailureDetector:
    """Decides when silence means death. After any pause of our own, or of the database, every heartbeat is old: so
    the steward must have been watching without a gap for a whole lease, and a mass death needs a second look."""

    lease: float
    watching_since: float = 0.0
    _last: float = field(default=0.0, init=False)
    _last_at: float = field(default=0.0, init=False)
    _database_started: float | None = field(default=None, init=False)
    _presumed_dead: frozenset[UUID] = field(default_factory=frozenset[UUID], init=False)

    def may_requeue(self, fleet: Fleet, now: float) -> bool:
        """`now` is a monotonic clock, in seconds, read after the answer: what was asked before a pause is old. The
        database's clock sees what ours may not: that the machine slept, or that somebody has set the clock."""
        limit = max(3 * ROUND, self.lease / 3)
        gap = now - self._last > limit or fleet.at - self._last_at > limit
        if gap or fleet.database_started != self._database_started:
            self.watching_since, self._presumed_dead = now, frozenset()
        self._last, self._last_at, self._database_started = now, fleet.at, fleet.database_started
        if now - self.watching_since < self.lease or not fleet.dead:
            return False
        if len(fleet.dead) > max(1, (fleet.alive + len(fleet.dead)) // 4) and fleet.dead != self._presumed_dead:
            self._presumed_dead = fleet.dead  # more than a quarter at once: look again in a moment before believing it
            return False
        return True
