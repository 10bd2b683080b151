"""Figures of the whole ledger, for metrics and for the autoscaler: read only, in a fraction of a second, and at a cost
that does not depend on how many runs have ended. None of these statements locks a row.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from backcast.ledger import reading
from backcast.ledger.connection import Ledger
from backcast.ledger.routing import LIVE
from backcast.process.metrics import Names

MOST = 10_000
"""Runs that are counted by task in each state, and as held in each lane."""
MOST_LANES = 50

Values = Mapping[tuple[str, ...], float]
"""A metric's values, by its labels."""


@dataclass(frozen=True, slots=True)
class Backlog:
    pool: str
    ready: int
    running: int
    oldest_age_seconds: float


# The oldest of each state by runs_by_state, so that a bounded number of rows is read, and a task that is starved is
# among them. A parked run is a scheduled one with a route.
_TASKS = f"""
select task, state, count(*) as runs, max({reading.age("run_at")}) as oldest
  from (values ('queued'), ('running'), ('held'), ('scheduled'), ('paused')) s(name) cross join lateral (
       select task, run_at, case when s.name = 'queued' then 'ready' when s.name = 'scheduled' and route <> ''
                            then 'parked' else s.name end as state
         from runs where state = s.name order by id limit {MOST}) r
 group by 1, 2"""  # noqa: S608  # constants
# Workers and task types are few: both tables are read whole.
_SERVED = f"""
select t.name, coalesce(w.workers, 0) as workers from (select distinct name from task_types) t
  left join (select unnest(w.tasks) as name, count(*) as workers from workers w where {LIVE} group by 1) w using (name)
 order by coalesce(w.workers, 0) = 0, t.name"""  # noqa: S608  # constants
_FLEET = f"""
select pool, count(*) as workers, sum(slots)::float8 as slots, sum(busy)::float8 as busy
  from workers w where {LIVE} group by pool"""  # noqa: S608  # constants
# Held runs by runs_held, a bounded number of each lane; the promoted ones are counted in the lane's row.
_LANES = f"""
select name, max_running, greatest(promoted, 0) as promoted, h.runs as held, {reading.age("h.since")} as oldest
  from (select * from lanes where limited order by name limit {MOST_LANES}) l cross join lateral (
       select count(*) as runs, min(run_at) as since from (
         select run_at from runs where lane = l.name and state = 'held' limit {MOST}) r) h"""  # noqa: S608  # constants
# The size is that of the files: a few for each partition, so for each day that runs are kept.
_DATABASE = """
select pg_database_size(current_database())::float8 as size, (
         select count(*) from pg_inherits where inhparent in ('backcast.ended_completed'::regclass,
                                                              'backcast.ended_otherwise'::regclass)) as partitions"""


async def tasks(ledger: Ledger) -> Mapping[str, Values]:
    """Runs and workers by task. The first tasks have names of their own, those that are served before the others."""
    names = Names()
    workers, runs, oldest = Counter[tuple[str, ...]](), Counter[tuple[str, ...]](), dict[tuple[str, ...], float]()
    for row in await ledger.fetch(_SERVED):
        workers[(names[row["name"]],)] += row["workers"]
    for row in await ledger.fetch(_TASKS):
        name = names[row["task"]]
        runs[name, row["state"]] += row["runs"]
        if row["state"] in ("ready", "parked"):
            oldest[(name,)] = max(oldest.get((name,), 0.0), row["oldest"] or 0.0)
    return {"task_workers": workers, "task_runs": runs, "task_oldest_age_seconds": oldest}


async def pools(ledger: Ledger) -> Mapping[str, Values]:
    """The backlog and the workers of each pool that has, or had, workers."""
    fleet = {row["pool"]: row for row in await ledger.fetch(_FLEET)}
    names = {"backlog_ready": "ready", "backlog_running": "running", "backlog_oldest_age_seconds": "oldest_age_seconds"}
    found = await backlog(ledger)
    values = {metric: {(each.pool,): getattr(each, name) for each in found} for metric, name in names.items()}
    for name in ("workers", "slots", "busy"):
        values[f"pool_{name}"] = {(each.pool,): fleet[each.pool][name] if each.pool in fleet else 0.0 for each in found}
    waiting = await parked(ledger)
    return values | {"runs_parked": {(each.pool,): waiting.get(each.pool, 0) for each in found}}


async def lanes(ledger: Ledger) -> Mapping[str, Values]:
    """The runs of limited lanes."""
    rows = await ledger.fetch(_LANES)
    names = Names(MOST_LANES)
    runs = {(names[row["name"]], state): row[state] for row in rows for state in ("promoted", "held")}
    limits = {(names[row["name"]],): row["max_running"] for row in rows if row["max_running"] is not None}
    oldest = {(names[row["name"]],): row["oldest"] for row in rows if row["oldest"] is not None}
    return {"lane_runs": runs, "lane_max_running": limits, "lane_oldest_age_seconds": oldest}


async def database(ledger: Ledger) -> Mapping[str, Values]:
    row = await ledger.fetchrow(_DATABASE)
    assert row is not None
    return {"database_size_bytes": {(): row["size"]}, "database_partitions": {(): row["partitions"]}}


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
