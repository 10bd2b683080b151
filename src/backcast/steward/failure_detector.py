"""Decides when a worker's silence means its death."""

from dataclasses import dataclass, field
from uuid import UUID

from backcast.ledger.fleet import Fleet

ROUND = 1.0
"""Seconds between two checks of the leases."""


@dataclass
class FailureDetector:
    """After any pause of our own, or of the database, every heartbeat is old. So the steward must have watched without
    a gap for a whole lease, and when more than a quarter of the fleet is silent, each worker must be seen so twice.

    Each worker is judged by itself: further deaths do not postpone it. While workers that were silent come back, the
    others get more time, as the pause may just be over; but never more than a third of a lease."""

    lease: float
    watching_since: float = 0.0
    _last: float = field(default=0.0, init=False)
    _last_at: float = field(default=0.0, init=False)
    _database_started: float | None = field(default=None, init=False)
    _silent: dict[UUID, float] = field(default_factory=dict[UUID, float], init=False)
    """Since when each silent worker has been seen silent."""
    _believed: frozenset[UUID] = field(default_factory=frozenset[UUID], init=False)

    def believed_dead(self, fleet: Fleet, now: float) -> frozenset[UUID]:
        """The workers whose runs may be requeued. `now` is a monotonic clock, in seconds, read after the query: a
        result from before a pause is old. The database's clock shows two things that ours may not: that the machine
        slept, or that a clock was set."""
        third = self.lease / 3
        limit = max(3 * ROUND, third)
        gap = now - self._last > limit or fleet.at - self._last_at > limit
        if gap or fleet.database_started != self._database_started:
            self.watching_since, self._silent, self._believed = now, {}, frozenset()
        self._last, self._last_at, self._database_started = now, fleet.at, fleet.database_started
        if now - self.watching_since < self.lease:
            return frozenset()
        recovering = bool(self._silent.keys() - self._believed - fleet.dead)  # those believed dead have lost their runs
        self._silent = {worker: self._silent.get(worker, now) for worker in fleet.dead}
        if len(fleet.dead) <= max(1, (fleet.alive + len(fleet.dead)) // 4):
            self._believed = fleet.dead
        else:
            least = third if recovering else 0.0
            self._believed = frozenset(w for w, since in self._silent.items() if since < now and now - since >= least)
        return self._believed
