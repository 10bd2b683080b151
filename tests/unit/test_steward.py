"""The failure detector: no pause of the steward or of the database may make it take the fleet's runs."""

from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backcast.ledger.fleet import Fleet
from backcast.models import uuid7
from backcast.steward.failure_detector import FailureDetector

A, B, C = uuid7(), uuid7(), uuid7()
APART = 1_000_000.0
"""The database's clock is unrelated to ours."""


def seen(
    detector: FailureDetector, second: float, *dead: UUID, alive: int = 3, started: float = 1.0, jump: float = 0.0
) -> bool:
    found = Fleet(alive, frozenset(dead), started, at=APART + second + jump)
    believed = detector.believed_dead(found, second)
    assert believed <= found.dead
    return bool(believed)


@pytest.fixture
def detector() -> FailureDetector:
    """A detector that has watched for a whole lease of 15 s, up to second 120."""
    detector = FailureDetector(15.0)
    for second in range(100, 121):
        seen(detector, second)
    return detector


def test_a_dead_worker_is_believed_at_once(detector: FailureDetector) -> None:
    assert seen(detector, 121, A)


def test_nothing_is_believed_before_a_whole_lease_was_watched() -> None:
    detector = FailureDetector(15.0)
    assert [seen(detector, 100 + n, A) for n in range(20)].index(True) == 15


def test_after_a_pause_of_the_steward_a_lease_is_waited(detector: FailureDetector) -> None:
    assert not seen(detector, 140, A)
    assert not seen(detector, 141, A)
    assert [seen(detector, 142 + n, A) for n in range(20)].index(True) == 13


def test_a_pause_that_only_the_databases_clock_has_seen_counts(detector: FailureDetector) -> None:
    """As when the machine slept, or the clock was set: our monotonic clock does not show it."""
    assert not any(seen(detector, 121 + n, A, jump=3600) for n in range(15))
    assert seen(detector, 136, A, jump=3600)


def test_after_a_restart_of_the_database_a_lease_is_waited(detector: FailureDetector) -> None:
    assert not seen(detector, 121, A, started=2.0)
    assert not any(seen(detector, 122 + n, A, started=2.0) for n in range(14))
    assert seen(detector, 136, A, started=2.0)


def test_under_churn_each_worker_of_a_mass_death_waits_for_one_look_only(detector: FailureDetector) -> None:
    workers = [uuid7() for _ in range(20)]
    for n in range(1, 20):  # one more dies each second, and the requeued ones are gone from the next look
        dead = frozenset(workers[max(0, n - 2) : n])
        believed = detector.believed_dead(Fleet(1, dead, 1.0, APART + 120 + n), 120.0 + n)
        assert believed == ({workers[n - 2]} if n > 1 else dead)


@settings(max_examples=300, deadline=None)
@given(
    looks=st.lists(st.tuples(st.floats(0.1, 4.9), st.frozensets(st.integers(0, 7))), min_size=1, max_size=40),
    requeues=st.booleans(),
    pause=st.none() | st.integers(0, 39),
)
def test_whatever_comes_and_goes_a_silent_worker_is_believed_within_a_third_of_a_lease(
    looks: list[tuple[float, frozenset[int]]], requeues: bool, pause: int | None
) -> None:
    """Eight workers; `pause` is the look before which the steward stood still."""
    workers, lease = [uuid7() for _ in range(8)], 15.0
    detector, now, watching, gone = FailureDetector(lease), 1000.0, 1000.0, frozenset[UUID]()
    detector.believed_dead(Fleet(8, frozenset(), 1.0, now), now)
    since: dict[UUID, float] = {}
    for number, (seconds, silent) in enumerate(looks):
        now += 3600.0 if number == pause else seconds
        if number == pause:
            watching, since = now, {}
        dead = frozenset(workers[n] for n in silent) - gone
        believed = detector.believed_dead(Fleet(8 - len(dead), dead, 1.0, now), now)
        assert believed <= dead
        if now - watching < lease:
            assert not believed, "nobody is believed dead before a whole lease was watched"
            continue
        since = {worker: since.get(worker, now) for worker in dead}
        if len(dead) <= 2:
            assert believed == dead
        assert all(since[worker] < now for worker in believed) or len(dead) <= 2, "a mass death takes a second look"
        assert {worker for worker in dead if since[worker] < now and now - since[worker] >= lease / 3} <= believed
        gone = (gone | believed) & frozenset(workers[n] for n in silent) if requeues else frozenset()


def test_a_mass_death_needs_a_second_look(detector: FailureDetector) -> None:
    assert not seen(detector, 121, A, B, C, alive=1)
    assert not seen(detector, 122, A, B, alive=2), "some came back: not the same set"
    assert seen(detector, 123, A, B, alive=2)
