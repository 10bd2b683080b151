"""Figures of the whole ledger, for metrics and for the autoscaler: read only, and in a fraction of a second."""

from dataclasses import dataclass

from backcast.ledger.connection import Ledger


@dataclass(frozen=True, slots=True)
class Backlog:
    pool: str
    ready: int
    running: int
    oldest_age_seconds: float


async def backlog(ledger: Ledger) -> list[Backlog]:
    return [
        Backlog(**row) for row in await ledger.fetch("select pool, ready, running, oldest_age_seconds from backlog")
    ]


async def parked(ledger: Ledger) -> dict[str, int]:
    """How many runs of each pool wait for a worker that can do them: see `routing`. By runs_routed."""
    rows = await ledger.fetch(
        "select pool, count(*) as runs from runs where route <> '' and state = 'scheduled' group by pool"
    )
    return {row["pool"]: row["runs"] for row in rows}


# The age of the oldest snapshot: vacuum must keep every row that it may still read. Sessions of other roles are
# visible only with the role pg_read_all_stats; slots and prepared transactions always.
_OLDEST_XMIN = """
select greatest(
    (select max(age(backend_xmin)) from pg_stat_activity where pid <> pg_backend_pid()),
    (select max(greatest(age(xmin), age(catalog_xmin))) from pg_replication_slots),
    (select max(age(transaction)) from pg_prepared_xacts), 0) as age"""


async def oldest_xmin_age(ledger: Ledger) -> int:
    """How many transactions have begun since the oldest snapshot that is still held."""
    row = await ledger.fetchrow(_OLDEST_XMIN)
    assert row is not None
    return int(row["age"])
