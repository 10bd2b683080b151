"""The task types that workers have registered: the API validates inputs by them, lists and documents them."""

import json
from collections.abc import Sequence
from typing import Any

import asyncpg

from backcast.errors import NoWorkerYet, UnknownTask
from backcast.ledger import reading
from backcast.ledger.connection import Ledger
from backcast.models import TaskType


async def register(ledger: Ledger, tasks: Sequence[TaskType]) -> None:
    """Register tasks; the latest registration of a name counts."""
    # In name order, so that two workers that register the same tasks lock them in the same order.
    for task in sorted(tasks, key=lambda task: task.name):
        await ledger.execute(
            """insert into task_types (name, pool, version, description, input_schema, output_schema, retries, timeout,
                                       max_attempts, lane, history)
               values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
               on conflict (name) do update set pool = excluded.pool, version = excluded.version,
                   description = excluded.description, input_schema = excluded.input_schema,
                   output_schema = excluded.output_schema, retries = excluded.retries, timeout = excluded.timeout,
                   max_attempts = excluded.max_attempts, lane = excluded.lane,
                   history = excluded.history, updated_at = now()""",
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
        )


def _task(row: asyncpg.Record) -> TaskType:
    """Any row can be read. A schema that can't takes every input."""
    given: dict[str, Any] = dict(row)
    for name in ("input_schema", "output_schema"):
        schema = reading.loaded(row[name])
        given[name] = schema if isinstance(schema, dict) else {}
    return TaskType(**given)


# `least` alone would ignore a null: every task would have a time-out.
_TASK_COLUMNS = """name, pool, version, description, input_schema, output_schema, retries, max_attempts, lane, history,
    case when timeout is not null then least(timeout, interval '1000 years') end as timeout"""


async def get(ledger: Ledger, name: str) -> TaskType:
    """Raises `UnknownTask`, or `NoWorkerYet` while no task is known at all."""
    row = await ledger.fetchrow(f"select {_TASK_COLUMNS} from task_types where name = $1", name)  # noqa: S608
    if row is None:
        if await ledger.fetchrow("select 1 from task_types limit 1") is None:
            raise NoWorkerYet("No worker has registered its tasks yet: start one, or wait for the first to be ready.")
        raise UnknownTask(
            f"No worker has registered a task {name!r}: see GET /v1/tasks, or start a worker that has it."
        )
    return _task(row)


async def all_(ledger: Ledger) -> list[TaskType]:
    rows = await ledger.fetch(f"select {_TASK_COLUMNS} from task_types order by name")  # noqa: S608  # a constant
    return [_task(row) for row in rows]
