"""When silence means death: the steward must not take the fleet's runs after a pause of its own or of the database."""

from uuid import UUID

import pytest

from backcast.ledger.workers import Fleet
from backcast.models import uuid7
from backcast.steward import Vigil

A, B, C = uuid7(), uuid7(), uuid7()


def fleet(*dead: UUID, alive: int = 3, started: float = 1.0) -> Fleet:
    return Fleet(alive=alive, dead=frozenset(dead), database_started=started)


@pytest.fixture
def vigil() -> Vigil:
    """One that has watched for a whole lease of 15 s, up to second 120."""
    vigil = Vigil(15.0)
    for second in range(100, 121):
        vigil.may_requeue(fleet(), second)
    return vigil


def test_a_dead_worker_is_believed_at_once(vigil: Vigil) -> None:
    assert vigil.may_requeue(fleet(A), 121)


def test_nothing_is_believed_before_a_whole_lease_was_watched() -> None:
    vigil = Vigil(15.0)
    assert [vigil.may_requeue(fleet(A), 100 + n) for n in range(20)].index(True) == 15


def test_after_a_pause_of_the_steward_a_lease_is_waited(vigil: Vigil) -> None:
    assert not vigil.may_requeue(fleet(A), 140)
    assert not vigil.may_requeue(fleet(A), 141)
    assert [vigil.may_requeue(fleet(A), 142 + n) for n in range(20)].index(True) == 13


def test_after_a_restart_of_the_database_a_lease_is_waited(vigil: Vigil) -> None:
    assert not vigil.may_requeue(fleet(A, started=2.0), 121)
    assert not any(vigil.may_requeue(fleet(A, started=2.0), 122 + n) for n in range(14))
    assert vigil.may_requeue(fleet(A, started=2.0), 136)


def test_a_mass_death_needs_a_second_look(vigil: Vigil) -> None:
    assert not vigil.may_requeue(fleet(A, B, C, alive=1), 121)
    assert not vigil.may_requeue(fleet(A, B, alive=2), 122), "some came back: not the same set"
    assert vigil.may_requeue(fleet(A, B, alive=2), 123)
