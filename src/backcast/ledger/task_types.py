"""The task types that workers have registered: the API validates inputs by them, lists and documents them.

A task has a row per pool and version of its input schema: during a deployment, the old and the new version are live.
"""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import asyncpg

from backcast.errors import NoWorkerYet, UnknownPool, UnknownTask
from backcast.ledger import reading
from backcast.ledger.connection import Ledger
from backcast.ledger.routing import HAS_VERSION, LIVE
from backcast.models import TaskType


async def register(ledger: Ledger, tasks: Sequence[TaskType]) -> None:
    """Register these versions of tasks, or renew them."""
    # In name order, so that two workers that register the same tasks lock them in the same order.
    for task in sorted(tasks, key=lambda task: task.name):
        await ledger.execute(
            """insert into task_types (name, pool, version, description, input_schema, output_schema, retries, timeout,
                                       max_attempts, lane, history, signature)
               values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
               on conflict (name, pool, signature) do update set version = excluded.version,
                   description = excluded.description, input_schema = excluded.input_schema,
                   output_schema = excluded.output_schema, retries = excluded.retries, timeout = excluded.timeout,
                   max_attempts = excluded.max_attempts, lane = excluded.lane,
                   history = excluded.history, seen_at = now()""",
            task.name,
            task.pool,
            task.version,
            task.description,
            json.dumps(task.input_schema),
            json.dumps(task.output_schema),
            task.retries,
            task.timeout,
            task.max_attempts,
            task.lane,
            task.history,
            task.signature,
        )


def _task(row: asyncpg.Record) -> TaskType:
    """Any row can be read. A schema that can't takes every input."""
    given: dict[str, Any] = dict(row)
    del given["is_live"]
    for name in ("input_schema", "output_schema"):
        schema = reading.loaded(row[name])
        given[name] = schema if isinstance(schema, dict) else {}
    return TaskType(**given)


# The newest live version comes first; when none is live, as at zero replicas, the one that was live last. Workers that
# are alive are few, and so are the versions of a task. `least` alone would ignore a null.
_VERSIONS = f"""
select name, pool, version, description, input_schema, output_schema, retries, max_attempts, lane, history,
       case when timeout is not null then least(timeout, interval '1000 years') end as timeout, is_live
  from task_types t cross join lateral (
  select exists (select from workers w where {HAS_VERSION} and {LIVE}) as is_live) live
 {{where}} order by name, is_live desc, case when is_live then registered_at else seen_at end desc"""  # noqa: S608  # a constant


async def versions(ledger: Ledger, name: str) -> list[TaskType]:
    """The versions of a task for which an input is accepted, the newest first: those of live workers, or the latest.

    Raises `UnknownTask`, or `NoWorkerYet` while no task is known at all."""
    rows = await ledger.fetch(_VERSIONS.format(where="where t.name = $1"), name)
    if not rows:
        if await ledger.fetchrow("select 1 from task_types limit 1") is None:
            raise NoWorkerYet("No worker has registered its tasks yet: start one, or wait for the first to be ready.")
        raise UnknownTask(
            f"No worker has registered a task {name!r}: see GET /v1/tasks, or start a worker that has it."
        )
    return [_task(row) for row in rows if row["is_live"]] or [_task(rows[0])]


async def get(ledger: Ledger, name: str) -> TaskType:
    """The newest live version, or the latest. Raises as `versions`."""
    return (await versions(ledger, name))[0]


async def all_(ledger: Ledger) -> list[TaskType]:
    """Each task in its newest live version, or the latest."""
    newest = dict[str, TaskType]()
    for row in await ledger.fetch(_VERSIONS.format(where="")):
        newest.setdefault(row["name"], _task(row))
    return list(newest.values())


async def pools(ledger: Ledger) -> set[str]:
    """The pools that have, or had, workers."""
    rows = await ledger.fetch("select pool from task_types union select pool from workers")
    return {row["pool"] for row in rows}


async def require_pool(ledger: Ledger, name: str) -> None:
    """Raises `UnknownPool`."""
    if name not in (known := await pools(ledger)):
        raise UnknownPool(f"There is no pool {name!r}; known are: {', '.join(sorted(known)) or 'none'}.")


async def renew(ledger: Ledger) -> None:
    """Note which versions workers have. Their rows count, not their heartbeats: after an outage of the database, all
    workers look silent, and a worker registers only once."""
    await ledger.execute(
        f"""update task_types t set seen_at = now() where seen_at < now() - interval '1 minute'
                and exists (select from workers w where {HAS_VERSION})"""  # noqa: S608  # a constant
    )


async def remove_unseen(ledger: Ledger, keep: timedelta) -> None:
    """Remove the versions that no worker has had for `keep`, see `renew`."""
    await renew(ledger)
    await ledger.execute("delete from task_types where seen_at < now() - $1::interval", keep)
