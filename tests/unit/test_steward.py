"""The failure detector: no pause of the steward or of the database may make it take the fleet's runs."""

from uuid import UUID

import pytest

from backcast.ledger.fleet import Fleet
from backcast.models import uuid7
from backcast.steward.failure_detector import FailureDetector

A, B, C = uuid7(), uuid7(), uuid7()
APART = 1_000_000.0
"""The database's clock is unrelated to ours."""


def seen(
    detector: FailureDetector, second: float, *dead: UUID, alive: int = 3, started: float = 1.0, jump: float = 0.0
) -> bool:
    return detector.may_requeue(Fleet(alive, frozenset(dead), started, at=APART + second + jump), second)


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


def test_a_mass_death_needs_a_second_look(detector: FailureDetector) -> None:
    assert not seen(detector, 121, A, B, C, alive=1)
    assert not seen(detector, 122, A, B, alive=2), "some came back: not the same set"
    assert seen(detector, 123, A, B, alive=2)
