"""Explains where a run is, and what it waits for: one sentence, and the figures behind it.

It reads at most three statements, by indexes; they lock nothing, and none counts beyond 10,000 rows. Each sees its own
moment, so a run that moves meanwhile may be shown where it just was.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg

from backcast.errors import UnknownRun
from backcast.ledger import attempts, pace, pauses, reading, routing, runs, waiting
from backcast.ledger.connection import Ledger
from backcast.models import Problem, Run, State, Why

MOST, MOST_OWNERS = 10_000, 1000
"""Runs and owners that are counted."""

# By primary keys. The version of the task may have gone; then another one has the number of its retries.
_RUN = f"""
select {runs.COLUMNS}, pool, worker_id, cancel_requested_at is not null as is_asked, attempts as kept, live.*,
       now() as at, finished_at is null and {waiting.paused("all_runs")} as is_paused,
       (select host from workers w where w.id = all_runs.worker_id) as host,
       (select t.retries from task_types t where t.name = all_runs.task and t.pool = all_runs.pool
         order by t.signature = all_runs.signature desc limit 1) as retries,
       case when live.flight is not null then (select f.run_id from flights f where f.key = live.flight) end as flown_by
  from all_runs left join lateral (
       select route, flight, prefetched, owner_key, {reading.time("parked_at")} from runs l where l.id = all_runs.id
       ) live on true where id = $1"""  # noqa: S608  # constants

# All workers, of which there are few, and the row of the lane.
_FIGURES = f"""
select workers, slots, busy, per_second, l.*, {reading.time("seen_at")} from (
  select count(*) filter (where can and alive) as workers, sum(slots) filter (where can and alive) as slots,
         sum(busy) filter (where can and alive) as busy,
         coalesce(sum({pace.faded("recent", "heartbeat_at")}) filter (where can and alive), 0) / 60 as per_second,
         greatest(max(heartbeat_at) filter (where can),
                  (select max(seen_at) from task_types where name = $3 and pool = $1)) as seen_at
    from workers w cross join lateral (
         select w.pool = $1 and case when $2 = '' then $3 = any(w.tasks) else $2 = any(w.routes) end as can,
                {routing.LIVE} as alive) is_) f
  left join lateral (
       select max_running, max_per_minute, promoted, {pace.faded("recent", "refilled_at")} / 60 as lane_per_second
         from lanes where name = $4 and limited) l on true"""  # noqa: S608  # constants

# By runs_ready or runs_held: the owner's rows lie in the order in which they start, and the owners side by side.
_PLACE = f"""
with recursive o(owner_key, n) as (
  (select owner_key, 1 from runs where {{these}} order by owner_key limit 1)
  union all
  select x.owner_key, o.n + 1 from o cross join lateral (
    select owner_key from runs where {{these}} and owner_key > o.owner_key order by owner_key limit 1) x
   where o.n <= {MOST_OWNERS})
select (select count(*) from (
          (select 1 from runs where {{these}} and owner_key = $3 and priority > $4 limit {MOST})
          union all
          (select 1 from runs where {{these}} and owner_key = $3 and priority = $4 and (run_at, id) < ($5, $6)
            limit {MOST}) limit {MOST}) b) as before,
       (select count(*) from o where owner_key <> $3) as owners,
       (select count(*) from (select 1 from runs where {{these}} limit {MOST}) q) as waiting"""  # noqa: S608  # constants
_IN_QUEUE = _PLACE.format(these="pool = $1 and route = $2 and state = 'queued'")
_IN_LANE = _PLACE.format(these="lane = $1 and $2::text is not null and state = 'held'")


@dataclass(frozen=True, slots=True)
class _Place:
    """Owners take turns: of each other one, about as many runs start earlier as of its own."""

    before: int
    owners: int
    waiting: int

    @property
    def first(self) -> int:
        """How many runs start earlier, in all."""
        return min(max(self.waiting - 1, 0), (self.before + 1) * (self.owners + 1) - 1)

    def words(self, per_second: float) -> tuple[str, dict[str, Any]]:
        """The end of a sentence, and its figures."""
        number, others = _number(self.before, MOST), _number(self.owners, MOST_OWNERS)
        words = f"{number} runs of its owner are before it, and {others} other owners take turns with it"
        shown: dict[str, Any] = {"runs_before": self.before, "owners": self.owners}
        if per_second > 0.001:
            shown["estimate_seconds"] = (self.first + 1) / per_second
            words += f"; at the present pace it starts in about {_span(shown['estimate_seconds'])}"
        return f"{words}.", shown


async def explain(ledger: Ledger, run_id: UUID) -> Why:
    """Raises `UnknownRun`."""
    row = await ledger.fetchrow(_RUN, run_id)
    if row is None:
        raise UnknownRun.of(run_id)
    run, state = runs.shown(row), row["state"]
    if run.state.is_final:
        return _ended(run, row)
    if state == "running":
        return _running(run, row)
    if row["is_paused"] and (state != "scheduled" or row["route"]):
        for pause in await pauses.on(ledger, task=run.task, lane=run.lane, pool=row["pool"]):
            end = "somebody resumes it" if pause.until is None else _moment(pause.until)
            about = "".join(
                [f" by {pause.by}" if pause.by else "", f" because: {pause.reason}" if pause.reason else ""]
            )
            sentence = f"The {pause.kind} {pause.name!r} is paused{about}{'' if about.endswith('.') else '.'}"
            return Why(
                code="paused",
                sentence=f"{sentence} The run waits until {end}.",
                pause=pause,
                since=pause.since,
                until=pause.until,
            )
    if state == "scheduled" and not row["route"]:
        return _scheduled(run, row)
    if state == "paused":
        return Why(code="ready", sentence="Its pause has ended: it goes on within seconds.")
    return await _waiting(ledger, run, row)


def _ended(run: Run, row: asyncpg.Record) -> Why:
    assert run.finished_at is not None
    began = run.started_at
    ran = None if began is None else max(0.0, (run.finished_at - began).total_seconds())
    waited = max(0.0, ((began or run.finished_at) - run.created_at).total_seconds())
    how = f"It waited for {_span(waited)}" + ("" if ran is None else f" and ran for {_span(ran)}")
    words = {
        State.COMPLETED: f"It has completed. {how}.",
        State.FAILED: f"It has failed{_because(run.error)} {how}.",
        State.CANCELLED: f"It was cancelled. {how}.",
        State.EXPIRED: f"Its deadline passed while it waited. {how}.",
    }
    return Why(
        code=run.state.value,  # type: ignore[arg-type]  # a final one
        sentence=words[run.state],
        since=run.finished_at,
        attempt=run.attempts or None,
        error=run.error,
        worker_id=row["worker_id"] if began else None,
        host=row["host"] if began else None,
        waited_seconds=waited,
        ran_seconds=ran,
    )


def _running(run: Run, row: asyncpg.Record) -> Why:
    where = f"a worker on {row['host']}" if row["host"] else "a worker that is gone"
    since = f"since {_moment(run.started_at)}" if run.started_at else ""
    shown: dict[str, Any] = {"worker_id": row["worker_id"], "host": row["host"], "pool": row["pool"]}
    if row["prefetched"] and not row["is_asked"]:
        sentence = f"It was claimed by {where}, which starts it as soon as a slot is free."
        return Why(code="ready", sentence=sentence, **shown)
    latest = ""
    if run.progress is not None:
        parts = [] if run.progress.fraction is None else [f"{run.progress.fraction:.0%}"]
        latest = (
            f"; its last progress: {', '.join([*parts, *([run.progress.message] if run.progress.message else [])])}"
        )
    shown |= {"since": run.started_at, "attempt": run.attempts, "attempts": _allowed(row), "progress": run.progress}
    if row["is_asked"]:
        sentence = f"It was asked to stop, and runs {since} on {where} until its code ends."
        return Why(code="stopping", sentence=sentence, **shown)
    return Why(code="running", sentence=f"It runs {since} on {where}, in attempt {run.attempts}{latest}.", **shown)


def _scheduled(run: Run, row: asyncpg.Record) -> Why:
    if row["flight"] is not None:
        other = row["flown_by"]
        which = "another run" if other is None else f"the run {other}"
        return Why(
            code="same_value",
            sentence=f"It waits for {which}, which computes the same value.",
            run_id=other,
            until=run.run_at,
        )
    if run.run_at <= row["at"]:
        return Why(code="ready", sentence="Its time has come: it is queued within a second.", until=run.run_at)
    if run.error is None and not run.attempts:
        return Why(code="scheduled", sentence=f"It waits for its time, {_moment(run.run_at)}.", until=run.run_at)
    allowed, kept = _allowed(row), attempts.kept(row["kept"])[0]
    of = f" of {allowed}" if allowed else ""
    first = f"attempt {run.attempts}{of} has failed" if run.attempts else "it could not start"
    return Why(
        code="retry_wait",
        sentence=f"It waits until {_moment(run.run_at)}, as {first}{_because(run.error)}",
        since=kept[-1].ended_at if kept else None,
        until=run.run_at,
        attempt=run.attempts,
        attempts=allowed,
        error=run.error,
    )


async def _waiting(ledger: Ledger, run: Run, row: asyncpg.Record) -> Why:
    """It is ready, held in its lane, or parked."""
    pool, route = row["pool"], row["route"]
    figures = await ledger.fetchrow(_FIGURES, pool, route, run.task, run.lane)
    assert figures is not None
    if not figures["workers"]:
        seen = figures["seen_at"]
        ago = f"the last one was seen {_span((row['at'] - seen).total_seconds())} ago" if seen else "none has ever come"
        is_version = route not in ("", run.task)
        what = "has a version of the task that accepts its input" if is_version else f"serves the task {run.task!r}"
        return Why(
            code="unknown_version" if is_version else "no_worker",
            sentence=f"No live worker of the pool {pool!r} {what}; {ago}. Start one.",
            pool=pool,
            last_seen_at=seen,
            since=row["parked_at"],
            error=run.error if is_version else None,
        )
    if row["state"] == "scheduled":
        return Why(code="ready", sentence="A worker that can do it has come: it is queued within a second.", pool=pool)
    is_held = row["state"] == "held"
    if not is_held and (released := _released(row)) is not None:
        return released
    sql, queue = (_IN_LANE, run.lane) if is_held else (_IN_QUEUE, pool)
    found = await ledger.fetchrow(sql, queue, route, row["owner_key"], run.priority, run.run_at, run.id)
    assert found is not None
    place = _Place(**found)
    if is_held:
        return _held(run, figures, place)
    slots, busy = int(figures["slots"]), int(figures["busy"])
    if place.first < slots - busy:
        return Why(code="ready", sentence="A worker with a free slot is about to take it.", pool=pool, slots=slots)
    words, shown = place.words(figures["per_second"])
    sentence = f"Of the {slots} slots of its task in the pool {pool!r}, {busy} are busy; {words}"
    return Why(code="behind", sentence=sentence, pool=pool, slots=slots, **shown)


def _released(row: asyncpg.Record) -> Why | None:
    """Of a run whose latest attempt ended that way."""
    kept = attempts.kept(row["kept"])[0]
    if not kept or kept[-1].outcome != "released" or kept[-1].worker_id != row["worker_id"]:
        return None
    last = kept[-1]
    where = f"on {last.host}" if last.host else str(last.worker_id)
    return Why(
        code="released",
        sentence=f"The worker {where} has stopped and released it; it waits for a slot of another one.",
        since=last.ended_at,
        worker_id=last.worker_id,
        host=last.host,
        pool=row["pool"],
    )


def _held(run: Run, figures: asyncpg.Record, place: _Place) -> Why:
    limit, rate, taken = figures["max_running"], figures["max_per_minute"], figures["promoted"]
    shown: dict[str, Any] = {"lane": run.lane, "max_running": limit, "max_per_minute": rate, "running": taken}
    if limit is not None and taken >= limit:
        words, more = place.words(figures["lane_per_second"] if limit else 0.0)
        sentence = f"The lane {run.lane!r} is at its limit, {taken} of {limit} runs; {words}"
        return Why(code="lane_full", sentence=sentence, **shown, **more)
    if rate is not None:
        words, more = place.words(min(max(rate, 1e-6), 1e6) / 60)
        sentence = f"The lane {run.lane!r} starts at most {rate:g} runs a minute; {words}"
        return Why(code="lane_rate", sentence=sentence, **shown, **more)
    return Why(code="ready", sentence=f"The lane {run.lane!r} has room: it is queued within a second.", lane=run.lane)


def _allowed(row: asyncpg.Record) -> int | None:
    return None if row["retries"] is None else row["retries"] + 1


def _because(error: Problem | None) -> str:
    return "." if error is None else f": {error.code}, {error.detail.rstrip('.')[:300]}."


def _number(count: int, most: int) -> str:
    return f"{count:,}" if count < most else f"more than {most:,}"


def _span(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s" if seconds >= 10 else f"{max(seconds, 0.0):.1f} s"


def _moment(at: datetime) -> str:
    return f"{at.isoformat(timespec='seconds').removesuffix('+00:00')}Z"
