"""Routes runs to the workers that can do them, while not all workers of a pool have the same tasks.

A run begins on its pool's route '', which every worker claims from. A worker that lacks the run's task puts it on the
route of the task ("extract"), with others that would be in its way next; one whose version of the task refuses the
input, on that of the version which accepted it ("extract@1f0c…"). Workers register the routes that lead to them. A run
whose route leads nowhere waits as `scheduled` for `unknown_after`: it counts in no lane, no claim meets it, and no
attempt is counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from backcast.ledger import ended, lanes, waiting
from backcast.ledger.connection import Ledger
from backcast.models import Problem, TaskType

AT_ONCE = 1000
"""Runs moved by one statement."""
LIVE = "w.heartbeat_at > now() - interval '1 minute' and not w.draining"
"""Whether the worker `w` takes runs, as far as anyone can know."""

UNKNOWN_TASK = Problem(
    code="unknown_task",
    title="No worker has this task",
    detail="The pool's workers do not have it: deploy one whose BACKCAST_TASKS names its module. The run waits for it,"
    " uncounted, for BACKCAST_UNKNOWN_AFTER, and then fails.",
)
UNFIT_INPUT = Problem(
    code="unfit_input",
    title="No worker has a version of the task that accepts this input",
    detail="The input was accepted by another version of the task: deploy one that accepts it. The run waits for it,"
    " uncounted, for BACKCAST_UNKNOWN_AFTER, and then fails; submit it again in the present form.",
)


HAS_VERSION = "w.pool = t.pool and t.name || '@' || t.signature = any(w.routes)"
"""Whether the worker `w` has the version `t` of a task: `version_route` in SQL."""


def version_route(task: str, signature: str) -> str:
    return f"{task}@{signature}"


def routes_to(tasks: Iterable[TaskType]) -> list[str]:
    """The routes that lead to a worker with these tasks."""
    return [route for task in tasks for route in (task.name, version_route(task.name, task.signature))]


# A loose index scan over runs_routed, which is empty unless workers differ: one probe then.
_ROUTES = f"""
with recursive r(pool, route) as (
  (select pool, route from runs where route <> '' and state in ('queued', 'scheduled') order by pool, route limit 1)
  union all
  select x.pool, x.route from r cross join lateral (
    select pool, route from runs where route <> '' and state in ('queued', 'scheduled')
       and (runs.pool, runs.route) > (r.pool, r.route) order by pool, route limit 1) x)
select pool, route, (
         select w.pool from workers w where r.route = any(w.routes) and {LIVE}
          order by w.pool <> r.pool, w.pool limit 1) as leads_to,
       exists (select from runs q where q.pool = r.pool and q.route = r.route and q.state = 'queued') as is_ready,
       exists (select from runs q where q.pool = r.pool and q.route = r.route and q.route <> ''
                  and q.state = 'scheduled') as is_parked
  from r"""  # noqa: S608  # a constant


@dataclass(frozen=True, slots=True)
class Route:
    pool: str
    route: str
    leads_to: str | None
    """A pool with a live worker for it, this pool if there is one here."""
    is_ready: bool
    is_parked: bool


# Puts ready runs on the route of their task, unless they are on one, and parks those whose route leads nowhere. Lanes
# first, then runs, as everywhere; a run that is locked is being claimed, cancelled or expired. `is not distinct from`
# can't be looked up in an index, so that the rows are found by their ids and not by a walk through runs_ready. A worker
# that registers meanwhile is not seen, and has them queued again by its next `apply`.
_ROUTED = "coalesce(nullif(r.route, ''), r.task)"
_PUT = f"""
with few as materialized ({{few}}),
lane as materialized (
  select name from lanes where name = any(array(select lane from few)) order by name for update),
free as materialized (
  select id, lane, promoted, {_ROUTED} as routed from runs r
   where id = any(array(select id from few)) and (pool, route, state) is not distinct from ($1, $2, 'queued')
     and (select count(*) from lane) >= 0 for update skip locked),
nowhere as materialized (
  select routed from (select distinct routed from free) f
   where not exists (select from workers w where f.routed = any(w.routes) and {LIVE})),
uncounted as (
  update lanes set promoted = greatest(lanes.promoted - n, -1000000000)
    from (select lane, count(*) as n from free where promoted and routed = any(array(select routed from nowhere))
           group by lane) f
   where lanes.name = f.lane returning name),
parked as (
  update runs r set state = 'scheduled', route = {_ROUTED}, promoted = false, parked_at = now(),
         error = case when {_ROUTED} = task then $3::json else $4::json end
   where id = any(array(select id from free where routed = any(array(select routed from nowhere)))) returning id),
put as (
  update runs r set route = {_ROUTED}
   where id = any(array(select id from free where routed <> all(array(select routed from nowhere)))) and route = ''
  returning route)
select (select count(*) from parked) as parked, array(select distinct route from put) as routes,
       array(select name from uncounted) as lanes"""  # noqa: S608  # constants
_PARK = _PUT.format(
    few=f"select id, lane from runs where pool = $1 and route = $2 and state = 'queued' limit {AT_ONCE}"  # noqa: S608
)
# The rows that these owners' next claims would look at first, by runs_ready: so one statement reads a bounded number of
# rows, and those that it leaves are runs that this worker can do.
_CLEAR = _PUT.format(
    few=f"""
  select r.id, r.lane from unnest($5::bigint[]) o(owner_key) cross join lateral (
    select id, lane, task from runs
     where pool = $1 and route = $2 and state = 'queued' and owner_key = o.owner_key
       and (deadline is null or deadline > now())
     order by priority desc, run_at, id limit {AT_ONCE} / cardinality($5::bigint[]) + 1) r
   where r.task <> all((select tasks from workers where id = $6)::text[])"""  # noqa: S608  # a constant
)

# As when a scheduled run becomes due. A run whose pool has no worker for it follows its task to another pool.
_UNPARK = f"""
with few as materialized (
  select id from runs where pool = $1 and route = $2 and route <> '' and state = 'scheduled'
   limit {AT_ONCE} for update skip locked)
update runs r set pool = $3, parked_at = null,
       state = {waiting.ready("r", pool="$3")}
 where id = any(array(select id from few)) returning state, lane"""  # noqa: S608  # constants
_MOVE = f"""
with few as materialized (
  select id from runs where pool = $1 and route = $2 and state = 'queued' limit {AT_ONCE} for update skip locked)
update runs set pool = $3 where id = any(array(select id from few)) returning id"""  # noqa: S608  # a constant


# Only while a worker has been alive for a minute: after an outage of everything, the worker that has the task may start
# last. By runs_parked.
_FAIL = f"""
with late as materialized (
  select id from runs where route <> '' and state = 'scheduled' and parked_at <= now() - $1::interval
     and exists (select from workers w where w.pool = runs.pool and {LIVE}
                    and w.started_at < now() - least($1, interval '1 minute'))
   limit {AT_ONCE} for update skip locked),
gone as (delete from runs where id = any(array(select id from late)) returning *),
{ended.moved(state="'failed'")}
select id from moved"""  # noqa: S608


_PROBLEMS = UNKNOWN_TASK.model_dump_json(), UNFIT_INPUT.model_dump_json()


async def clear(ledger: Ledger, pool: str, owners: Sequence[int], worker_id: UUID) -> bool:
    """Put the next ready runs of these owners (by owner key) on routes if this worker lacks their tasks: those of a
    removed task then cost the pool a statement for a thousand of them. Returns whether there were any."""
    row = await ledger.fetchrow(_CLEAR, pool, "", *_PROBLEMS, owners, worker_id)
    assert row is not None
    for route in row["routes"]:
        ledger.wake(pool, route)
    await lanes.try_promote(ledger, row["lanes"])
    return bool(row["parked"] or row["routes"])


async def apply(ledger: Ledger) -> list[Route]:
    """Queue the routed runs for which a worker has come, in whichever pool, and park those for which none is left.
    Returns the routes."""
    routes = [Route(**row) for row in await ledger.fetch(_ROUTES)]
    for found in routes:
        name = found.pool, found.route
        if found.leads_to is None:
            await _park(ledger, *name) if found.is_ready else None
            continue
        moves = found.is_ready and found.leads_to != found.pool
        if moves:
            while len(await ledger.fetch(_MOVE, *name, found.leads_to)) == AT_ONCE:
                pass
        if found.is_parked:
            await _unpark(ledger, *name, found.leads_to)
        if found.is_parked or moves:
            ledger.wake(found.leads_to, found.route)
    return routes


async def _park(ledger: Ledger, pool: str, route: str) -> None:
    while row := await ledger.fetchrow(_PARK, pool, route, *_PROBLEMS):
        await lanes.try_promote(ledger, row["lanes"])
        if row["parked"] < AT_ONCE:
            break


async def _unpark(ledger: Ledger, pool: str, route: str, to: str) -> None:
    while rows := await ledger.fetch(_UNPARK, pool, route, to):
        await lanes.try_promote(ledger, {row["lane"] for row in rows if row["state"] == "held"})
        if len(rows) < AT_ONCE:
            break


async def fail_late(ledger: Ledger, *, unknown_after: timedelta) -> int:
    """Fail parked runs for which no worker came in time; returns how many."""
    failed = 0
    while rows := await ended.fetch(ledger, _FAIL, unknown_after):
        failed += len(rows)
        ledger.report_ends()
    return failed


_NEW_VERSIONS = f"""
select given.task, given.route from unnest($2::text[], $3::text[]) as given(task, route)
 where not exists (select from workers w where w.pool = $1 and given.route = any(w.routes) and w.id <> $4 and {LIVE})"""  # noqa: S608
# By runs_routed. Only workers with the new version claim them; if it refuses the input too, the run is parked again.
_RECONSIDER = f"""
with few as materialized (
  select id from runs where pool = $1 and task = $2 and route not in (task, $3)
     and route <> '' and state = 'scheduled'
   limit {AT_ONCE} for update skip locked)
update runs set route = $3 where id = any(array(select id from few)) returning id"""  # noqa: S608  # a constant


async def new_versions(ledger: Ledger, worker_id: UUID, pool: str, tasks: Sequence[TaskType]) -> dict[str, str]:
    """Those of these tasks that no other live worker of the pool has in this version, with the version's route."""
    routes = [version_route(task.name, task.signature) for task in tasks]
    rows = await ledger.fetch(_NEW_VERSIONS, pool, [task.name for task in tasks], routes, worker_id)
    return {row["task"]: row["route"] for row in rows}


async def reconsider(ledger: Ledger, pool: str, versions: Mapping[str, str]) -> None:
    """Give parked inputs that other versions of these tasks have refused to these versions."""
    for task, route in versions.items():
        while len(await ledger.fetch(_RECONSIDER, pool, task, route)) == AT_ONCE:
            pass


# Pools without a live worker, where no claim puts runs on routes.
_MOVED = f"""
select o.name, o.pool as old, n.pool as new from (select distinct name, pool from task_types) o
 cross join lateral (select w.pool from workers w where o.name = any(w.tasks) and {LIVE} order by w.pool limit 1) n
 where n.pool <> o.pool and not exists (select from workers w where w.pool = o.pool and {LIVE})"""  # noqa: S608
# One statement per state, each by the index of its state: this reads all waiting runs of the pool.
_FOLLOW = f"""
with few as materialized (
  select id from runs where pool = $1 and task = $2 and state = '{{state}}' limit {AT_ONCE} for update skip locked)
update runs r set pool = $3, state = {{after}} where id = any(array(select id from few)) returning id"""  # noqa: S608  # constants


Move = tuple[str, str, str]
"""A task, the pool that it has left, and the one that serves it."""


async def follow(ledger: Ledger, known: dict[Move, int]) -> int:
    """Move the waiting runs of tasks that are now served by another pool, and by no worker of their own; returns how
    many. The old registration goes an hour later, when no submission can be under way that knows only it.

    `known` counts the calls that have found a move. Runs stay behind in its first minutes, and a look for them costs
    much if the pool keeps a large backlog of other tasks: so the 1st, 2nd, 4th, 8th … call looks."""
    moved = 0
    moves = [(row["name"], row["old"], row["new"]) for row in await ledger.fetch(_MOVED)]
    for gone in known.keys() - set(moves):
        del known[gone]
    for move in moves:
        known[move] = known.get(move, 0) + 1
        if known[move].bit_count() > 1:
            continue
        name, old, new = move
        for state in ("queued", "held", "scheduled", "paused"):
            after = waiting.ready("r", pool="$3") if state == "paused" else "state"
            while rows := await ledger.fetch(_FOLLOW.format(state=state, after=after), old, name, new):
                moved += len(rows)
        ledger.wake(new)
        await ledger.execute(
            "delete from task_types where name = $1 and pool = $2 and seen_at < now() - interval '1 hour'", name, old
        )
    return moved
