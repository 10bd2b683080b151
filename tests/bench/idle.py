"""`python -m tests.bench.idle`: what many workers cost the database while there is nothing to do.

Runs the claiming half of so many workers in one process, each with its own connections, and no executors. Prints the
statements and the CPU time of PostgreSQL per second. Asserts nothing.
"""

import argparse
import asyncio
import logging
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import asyncpg
import psutil

from backcast.ledger import provisioning
from backcast.ledger.connection import Ledger
from backcast.ledger.migration import migrate
from backcast.local import postgres
from backcast.models import TaskType, uuid7
from backcast.process.metrics import WorkerMetrics
from backcast.process.stop import Stop
from backcast.settings import Settings
from backcast.store import open_store
from backcast.worker.executors import Executors
from backcast.worker.loop import Worker
from tests.bench.__main__ import cpu

SENT = "select sum(calls)::bigint as calls from pg_stat_statements"


class NoExecutors:
    """Ready, and never asked to execute anything."""

    is_ready, left = True, 0

    def __init__(self) -> None:
        self.types = [TaskType(name="noop", pool="default", input_schema={"type": "object"})]
        self.changed = asyncio.Event()


async def measure(workers: int, seconds: float, server: postgres.Postgres, folder: Path) -> None:
    url = server.url("backcast")
    settings = Settings.model_validate({"database": {"url": url}, "store": {"url": f"file://{folder}/store"}})
    store = open_store(settings.store)
    running = list[asyncio.Task[None]]()
    ledgers = list[Ledger]()
    for _ in range(workers):
        ledgers.append(Ledger(url, pool=2, name="backcast-worker"))
        executors = cast("Executors", cast("Any", NoExecutors()))
        worker = Worker(settings, ledgers[-1], store, executors, WorkerMetrics(), uuid7())
        running.append(asyncio.create_task(worker.run(Stop())))
        await asyncio.sleep(0.02)
    await asyncio.sleep(5)
    connection = await asyncpg.connect(url, server_settings={"search_path": "backcast"})
    postmaster = {"postgres": psutil.Process(server.pid)}
    used, sent, began = cpu(postmaster), await connection.fetchval(SENT), time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    statements = (await connection.fetchval(SENT) - sent) / took
    share = 100 * (cpu(postmaster)["postgres"] - used["postgres"]) / took
    sessions = await connection.fetchval(
        "select count(*) from pg_stat_activity where application_name like 'backcast%'"
    )
    alive = await connection.fetchval("select count(*) from workers where heartbeat_at > now() - interval '3 seconds'")
    print(
        f"{workers} workers ({alive} alive): {statements:.0f} statements a second, {share:.1f} % of a core,"
        f" {sessions} sessions",
        flush=True,
    )
    await connection.close()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    for ledger in ledgers:
        await ledger.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 20, 200])
    parser.add_argument("--seconds", type=float, default=20)
    given = parser.parse_args()
    logging.disable()
    with tempfile.TemporaryDirectory(prefix="idle-bench-") as folder:
        settings = {"max_connections": "1200", "shared_preload_libraries": "pg_stat_statements"}
        with postgres.running(Path(folder) / "data", settings=settings) as server:
            provisioning.create_database(server.url(), "backcast")
            migrate(server.url("backcast"))

            async def prepare() -> None:
                connection = await asyncpg.connect(server.url("backcast"))
                await connection.execute("create extension pg_stat_statements schema backcast")
                await connection.close()

            asyncio.run(prepare())
            for workers in given.workers:
                asyncio.run(measure(workers, given.seconds, server, Path(folder)))


if __name__ == "__main__":
    main()
