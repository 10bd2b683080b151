"""Checks after the storm: each accepted run by itself, then ledger, store and Prefect against each other.

Every check returns one sentence for each violation, and none when it holds.
"""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import asyncpg
import httpx
from s3fs import S3FileSystem

from tests.chaos.load import Case, Load
from tests.chaos.world import BUCKET, NARROW, WORKERS, World
from tests.support.waiting import until

KNOWN_MISSING: frozenset[str] = frozenset()
"""Checks that are reported and do not fail: promises that the product does not keep yet."""
_AT_ONCE = 20
_PAGE = 200
"""Runs: Prefect's own limit for a page."""

Row = dict[str, Any]

_ROWS = """
select id::text, task, k.key, state, fence, attempts_used, retries_used, max_attempts, lost_fence, worker_id::text,
       error->>'code' as code, error->>'detail' as detail, cancel_requested_at, run_at, started_at, finished_at,
       result_key, input_key, batch_id::text, retry_of::text, metadata->>'wave' as wave,
       case when metadata->>'wave' is not null then input end as input
  from backcast.all_runs r left join backcast.idempotency_keys k on k.run_id = r.id"""

# A change after a final state, a second final state, a fence that fell or a claim that did not raise it by one, and
# an attempt with two workers. A run's rows are in the order in which its row lock was taken.
_AUDIT = """
with runs as (
  select *, state in ('completed', 'failed', 'cancelled', 'expired') as final, lag(state) over run as was,
         lag(state) over run in ('completed', 'failed', 'cancelled', 'expired') as was_final,
         lag(fence) over run as fence_was from audit.changes window run as (partition by id order by n))
select id::text, format('changed from %s to %s after it had ended', was, state) as wrong from runs where was_final
union all
select id::text, format('fence %s after %s', fence, fence_was) from runs
 where fence < fence_was or state = 'running' and fence <> fence_was + 1
union all
select id::text, format('ended %s times', count(*) filter (where final and not coalesce(was_final, false)))
  from runs
 group by id having count(*) filter (where final and not coalesce(was_final, false)) <> 1
union all
select id::text, format('attempt %s ran on %s workers', fence, count(distinct worker_id)) from runs
 where state = 'running' group by id, fence having count(distinct worker_id) > 1"""


async def settled(world: World, *, timeout: float) -> list[str]:
    """Every accepted run comes to an end in this time."""

    async def look() -> list[asyncpg.Record]:
        return await world.sql(
            "select state, count(*), min(id::text) as first from backcast.all_runs where finished_at is null"
            " group by state"
        )

    try:
        await until(look, lambda rows: not rows, timeout=timeout, every=0.5)
    except AssertionError as error:
        return [str(error)]
    return []


async def rows(world: World) -> dict[str, Row]:
    return {row["id"]: dict(row) for row in await world.sql(_ROWS)}


def accepted(load: Load, ledger: dict[str, Row]) -> list[str]:
    wrong = [f"refused: {answer}" for answer in load.refused]
    ids = {case.id: case for case in load.cases}
    wrong += [
        f"{case.key}: accepted as {case.id}, but not in the ledger" for case in load.cases if case.id not in ledger
    ]
    # An earlier request may be recorded after the refusal of its repetition, and after its deadline: it only expires.
    late = {
        i for i, row in ledger.items() if row["key"] in load.late and row["state"] == "expired" and not row["fence"]
    }
    unknown = ledger.keys() - ids.keys() - late
    wrong += [f"{run_id}: in the ledger, but its client got another id" for run_id in unknown]
    for i, row in ledger.items():
        if i in ids and ids[i].key != (row["key"] or ""):
            wrong.append(f"{i}: its key is {row['key']}")
        if i in ids and row["wave"] is None and ids[i].retry_of != row["retry_of"]:
            wrong.append(f"{i}: repeats {row['retry_of']}, not {ids[i].retry_of}")
    return wrong


def outcomes(cases: list[Case], ledger: dict[str, Row]) -> list[str]:
    wrong: list[str] = []
    for case in cases:
        row = ledger.get(case.id)
        if row is None:
            continue
        # An answered cancellation counts: a run that had ended stays as it was, any other ends as cancelled.
        ended_before = case.cancelled in ("completed", "failed", "cancelled", "expired")
        ends = case.ends
        if (case.may_expire and row["state"] == "expired") or (case.may_cancel and row["state"] == "cancelled"):
            ends = row["state"]
        must = ends if case.cancelled is None else case.cancelled if ended_before else "cancelled"
        if (row["state"], row["code"] if must == "failed" else None) != (must, case.code if must == "failed" else None):
            cancellation = f", its cancellation was answered with {case.cancelled}" if case.cancelled else ""
            wrong.append(f"{case.id}: must be {must} {case.code or ''}{cancellation}")
        if (at := case.options.get("run_at")) and row["started_at"] and row["started_at"].isoformat() < at:
            wrong.append(f"{case.id}: started before {at}")
    return wrong


def bounded(ledger: dict[str, Row]) -> list[str]:
    """No run is lost or retried more often than its task allows."""
    retries = {"stumble": 5, "refuse": 2, "chant": 3}
    return [
        f"{run_id}: too many attempts"
        for run_id, row in ledger.items()
        if row["attempts_used"] - row["retries_used"] > row["max_attempts"]
        or row["retries_used"] > retries.get(row["task"], 0)
    ]


def slots(world: World) -> list[str]:
    """No worker executes more runs at once than it has slots."""
    limits = {str(pid): (name, WORKERS[name][0]) for name in WORKERS for pid in world.processes[name].pids}
    changes = dict[str, list[tuple[float, int]]]()
    for path in (world.folder / "slots").iterdir():
        own = [(float(at), int(change)) for at, change in map(str.split, path.read_text().splitlines())]
        own.append((own[-1][0], -sum(change for _, change in own)))  # what the end of the process has ended
        changes.setdefault(path.name.partition("-")[0], []).extend(own)
    wrong: list[str] = []
    for pid, own in changes.items():
        name, limit = limits[pid]
        reached = max(itertools.accumulate(change for _, change in sorted(own)))
        wrong += [f"{name} executed {reached} runs at once, {limit} may"] if reached > limit else []
    return wrong


async def audited(world: World) -> list[str]:
    return [f"{row['id']}: {row['wrong']}" for row in await world.sql(_AUDIT)]


_LANE = """
with changes as (
  select n, state = 'running' as runs, coalesce(lag(state) over (partition by id order by n) = 'running', false) as ran
    from audit.changes where id in (select id from backcast.all_runs where lane = $1)),
running as (select sum(runs::int - ran::int) over (order by n) as count from changes)
select (select max(count) from running) as most, promoted from backcast.lanes where name = $1"""


async def lanes(world: World) -> list[str]:
    """The limit held at every moment, and the lane counts no run any more."""
    name, limit = NARROW
    [row] = await world.sql(_LANE, name)
    wrong = [f"{row['most']} runs of the lane ran at once, {limit} may"] if (row["most"] or 0) > limit else []
    return wrong + ([f"the lane still counts {row['promoted']} runs"] if row["promoted"] else [])


_STARTED = """
select c.id::text, c.began from audit.changes c join backcast.all_runs r on r.id = c.id
 where c.state = 'running' and c.began between $3 and $4 and case $1 when 'task' then r.task else r.lane end = $2"""


async def paused(world: World) -> list[str]:
    """No claim that began while something was paused has taken a run of it."""
    return [
        f"{row['id']}: began at {row['began']:%H:%M:%S.%f}, while the {pause[0]} {pause[1]} was paused"
        for pause in world.pauses
        for row in await world.sql(_STARTED, *pause)
    ] + ([] if world.pauses else ["nothing was paused"])


async def values(world: World, cases: list[Case], ledger: dict[str, Row]) -> list[str]:
    """The API answers every completed run with its value."""
    wrong: list[str] = []
    left = iter([case for case in cases if ledger.get(case.id, {}).get("state") == "completed"])
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:

        async def take() -> None:
            for case in left:
                api = world.apis[hash(case.key) % len(world.apis)]
                answer = await until(
                    partial(client.get, f"{api}/v1/runs/{case.id}/result"), lambda answer: answer.status_code != 503
                )  # 503 asks for another try, and so many at once may keep the store from answering in time
                if answer.status_code != 200 or _parsed(answer.content) != case.value:
                    wrong.append(
                        f"{case.id}: the API has {answer.status_code} {answer.text[:200]!r}, not {case.value!r:.200}"
                    )

        await asyncio.gather(*[take() for _ in range(_AT_ONCE)])
    return wrong


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body  # equal to no value


class Bucket:
    """The bucket, read without the product's own code."""

    def __init__(self, world: World) -> None:
        self._s3 = S3FileSystem(
            endpoint_url=world.s3.url, key=world.s3.access_key, secret=world.s3.secret_key, use_listings_cache=False
        )

    async def keys(self, kind: str) -> set[str]:
        found: Any = await asyncio.to_thread(self._s3.find, f"{BUCKET}/runs/{kind}")
        return {key.removeprefix(f"{BUCKET}/runs/") for key in found}

    async def read(self, keys: list[str]) -> dict[str, bytes]:
        paths = [f"{BUCKET}/runs/{key}" for key in keys]
        found: Any = await asyncio.to_thread(self._s3.cat, paths, on_error="omit")
        return {path.removeprefix(f"{BUCKET}/runs/"): body for path, body in found.items()}


async def stored(bucket: Bucket, cases: list[Case], ledger: dict[str, Row]) -> list[str]:
    """Every completed run's object is there and is its value."""
    wrong: list[str] = []
    wanted = {ledger[case.id]["result_key"]: case for case in cases if ledger.get(case.id, {}).get("result_key")}
    for page in _pages(list(wanted), 500):
        found = await bucket.read(page)
        for key in page:
            if key not in found:
                wrong.append(f"{wanted[key].id}: its object {key} is missing")
            elif _parsed(found[key]) != wanted[key].value:
                wrong.append(f"{wanted[key].id}: its object {key} is {found[key][:200]!r}")
    return wrong


async def swept(bucket: Bucket, ledger: dict[str, Row], *, timeout: float) -> list[str]:
    """The bucket has no result that its run does not name, once the steward's sweep has run. (An input without a run
    stays for an hour: its submission might still be under way.)"""
    named = {row["result_key"] for row in ledger.values()}

    async def look() -> list[str]:
        return sorted(await bucket.keys("results") - named)

    try:
        await until(look, lambda orphans: not orphans, timeout=timeout, every=1)
    except AssertionError:
        return [f"{key.split('/')[1].removesuffix('.json')}: {key} belongs to no run" for key in await look()]
    return []


async def shown(world: World, ledger: dict[str, Row], *, timeout: float) -> list[str]:
    """Prefect's server comes to show every run in the state that the ledger has."""
    left = {
        run_id: "CANCELLED" if row["state"] == "expired" else row["state"].upper() for run_id, row in ledger.items()
    }
    seen: dict[str, str | None] = {}
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:

        async def look() -> int:
            for page in _pages(list(left), _PAGE):
                wanted = {"task_runs": {"id": {"any_": page}}, "limit": _PAGE}
                answer = await client.post(f"{world.prefect}/task_runs/filter", json=wanted)
                assert answer.status_code == 200, answer.text
                seen.update(dict.fromkeys(page) | {run["id"]: run["state_type"] for run in answer.json()})
            for run_id in [run_id for run_id, state in left.items() if seen[run_id] == state]:
                del left[run_id]
            return len(left)

        try:
            await until(look, lambda wrong: wrong == 0, timeout=timeout, every=1)
        except AssertionError as error:
            if not left:
                return [str(error)]
    return [f"{run_id}: Prefect shows {seen.get(run_id)}, not {state}" for run_id, state in left.items()]


def _pages(items: list[str], size: int) -> Iterable[list[str]]:
    return (items[at : at + size] for at in range(0, len(items), size))


async def explained(world: World, ledger: dict[str, Row], wrong: list[str], *, most: int = 8) -> list[str]:
    """The first of these sentences, each with its run's row in the ledger and the changes that led to it."""
    lines: list[str] = []
    for sentence in wrong[:most]:
        lines.append(sentence)
        run_id = sentence.partition(":")[0]
        if row := ledger.get(run_id):
            lines.append("    " + ", ".join(f"{name}={value}" for name, value in row.items() if value is not None))
            changes = await world.sql("select * from audit.changes where id = $1::text::uuid order by n", run_id)
            for at, state, fence, worker, by in (
                [c[k] for k in ("at", "state", "fence", "worker_id", "by")] for c in changes
            ):
                lines.append(f"    {at:%H:%M:%S.%f} {state:<9} fence {fence} worker {worker} by {by}")
    return [*lines, f"… and {len(wrong) - most} more"] if len(wrong) > most else lines


def executions(world: World, cases: list[Case], ledger: dict[str, Row]) -> dict[str, Any]:
    """How much work was repeated: attempts by fence, calls of the user's code by file."""
    calls = {path.name: path.stat().st_size for path in (world.folder / "calls").iterdir()}
    steady = [case for case in cases if case.task not in ("stumble", "refuse", "square", "chant")]
    return {
        "attempts": dict(sorted(Counter(row["fence"] for row in ledger.values()).items())),
        "calls of tasks that do not retry": dict(sorted(Counter(calls.get(case.key, 0) for case in steady).items())),
        "calls of cached tasks": sum(
            calls.get(key, 0) for key in {c.input["key"] for c in cases if c.task == "square"}
        ),
        "runs of cached tasks": sum(1 for case in cases if case.task == "square"),
    }
