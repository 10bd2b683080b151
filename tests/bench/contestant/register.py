"""Migrates the database and registers the tasks, because the benchmark submits before the first worker has started."""

import asyncio

from backcast.ledger import task_types
from backcast.ledger.connection import Ledger
from backcast.ledger.migration import migrate
from backcast.models import TaskType
from backcast.settings import load
from backcast.store import open_store

settings = load()
url = settings.database.url.get_secret_value()
migrate(url)


async def main() -> None:
    ledger = Ledger(url)
    for name in ("noop", "sleep"):
        schema = {"type": "object", "properties": {"n": {"type": "integer"}, "seconds": {"type": "number"}}}
        task = TaskType(name=name, pool="default", input_schema=schema)
        await task_types.register(ledger, [task])
    await ledger.aclose()
    store = open_store(settings.store)
    await store.ensure()
    await store.aclose()


asyncio.run(main())
