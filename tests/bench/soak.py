"""`python -m tests.bench.soak`: a full queue, again and again, beside a long history and beside next to none.

Two products on one PostgreSQL that syncs, with their own worker, steward and API, work in turns, so that the machine's
noise hits both alike. While a queue is worked off, a client submits, asks and lists by the API. Prints a line a round,
and medians. Asserts nothing.
"""

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import psutil
from rich.console import Console
from rich.table import Table

from backcast.ledger.connection import CHANNEL
from backcast.local import postgres
from tests.bench.__main__ import Connection, cpu
from tests.bench.scale import DAYS, FEW, SETTINGS, fill
from tests.support import databases
from tests.support.stack import Stack, stack

EVERY = 0.1
"""Seconds between two requests of each kind."""
QUEUE = """
insert into runs (id, task, pool, owner, state, max_attempts, input, metadata)
select uuidv7(), 'echo', 'default', 'o' || n % 20, 'queued', 3, '{"value": 1}', '{}'
  from generate_series(1, $1::int) n"""
VACUUMS = """
select vacuum_count + autovacuum_count as vacuums, total_vacuum_time + total_autovacuum_time as ms, n_dead_tup as dead
  from pg_stat_user_tables where relid = 'runs'::regclass"""
SIZES = """
select pg_size_pretty(pg_total_relation_size('runs')) as runs,
       pg_size_pretty(sum(pg_total_relation_size(oid))) as ended, count(*) as partitions
  from pg_class where relkind = 'r' and relname ~ '^ended'"""

Figures = dict[str, list[float]]


class Place:
    """One of the two products."""

    def __init__(self, product: Stack, database: asyncpg.Connection) -> None:
        self.product, self.database = product, database
        self.figures: Figures = defaultdict(list)
        self.dead = 0

    async def round(self, runs: int, server: psutil.Process) -> str:
        """Queue so many runs, and wait for their ends."""
        await self.database.execute("analyze runs")  # of next to no rows: the worst statistics
        await self.database.execute(QUEUE, runs)
        await self.database.execute("checkpoint")
        before, began = cpu({"postgres": server})["postgres"], await self.database.fetchval("select clock_timestamp()")
        vacuums = await self.database.fetchrow(VACUUMS)
        await self.database.execute("select pg_notify($1, 'default')", CHANNEL)
        asking = asyncio.create_task(self._ask())
        while left := await self.database.fetchval("select count(*) from runs where owner <> 'asking'"):
            self.dead = max(self.dead, (await self.database.fetchrow(VACUUMS))["dead"])
            await asyncio.sleep(0.1 if left < 1000 else 0.5)
        spent = 1000 * (cpu({"postgres": server})["postgres"] - before) / runs
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
        took = await self.database.fetchval(
            "select extract(epoch from max(finished_at) - $1)::float8 from ended_completed where finished_at > $1"
            " and owner <> 'asking'",
            began,
        )
        after = await self.database.fetchrow(VACUUMS)
        count, milliseconds = after["vacuums"] - vacuums["vacuums"], after["ms"] - vacuums["ms"]
        self.figures["runs/s"].append(runs / took)
        self.figures["PostgreSQL, CPU ms per run"].append(spent)
        if count:
            self.figures["vacuum of runs, ms"].append(milliseconds / count)
        return f"{runs / took:.0f} /s, {spent:.3f} ms, {count} vacuums of {milliseconds / max(count, 1):.0f} ms"

    async def _ask(self) -> None:
        connection = await Connection.open(str(self.product.http.base_url).rstrip("/"))
        while True:
            made = await self._timed(
                connection, "submit", "POST", "/v1/tasks/echo/runs", {"input": {"value": 1}, "owner": "asking"}
            )
            await self._timed(connection, "status", "GET", f"/v1/runs/{made['id']}")
            await self._timed(connection, "list newest", "GET", "/v1/runs?limit=50")
            await self._timed(connection, "list failed", "GET", "/v1/runs?limit=50&state=failed")
            await self._timed(connection, "list an owner", "GET", "/v1/runs?limit=50&owner=o7")
            await asyncio.sleep(EVERY)

    async def _timed(self, connection: Connection, name: str, method: str, path: str, body: object = None) -> object:
        began = time.perf_counter()
        answer = await connection.ask(method, path, body)
        self.figures[f"{name}, ms"].append(1000 * (time.perf_counter() - began))
        return answer


async def measure(rounds: int, runs: int, history: int, data: Path, folder: Path) -> Table:
    filled = data.exists()
    async with AsyncExitStack() as stacks:
        server = stacks.enter_context(postgres.running(data, settings=SETTINGS))
        places = dict[str, Place]()
        for name, rows in (("none", FEW), ("history", history)):
            if not filled:
                databases.create(server, name)
                began = time.monotonic()
                await fill(server.url(name), rows, ago=60, ended=True, every=DAYS * 86_400 / max(rows, 1))
                print(f"{name}: {rows:,} ended runs in {time.monotonic() - began:.0f} s", flush=True)
            home = folder / name
            home.mkdir()
            product = await stacks.enter_async_context(
                stack(server.url(name), home, BACKCAST_BUILTIN_TASKS="false", BACKCAST_STEWARD__KEEP_RUNS="P60D")
            )
            await product.up("api", "worker", "steward")
            database = await asyncpg.connect(server.url(name), server_settings={"search_path": "backcast"})
            places[name] = Place(product, database)
        postmaster = psutil.Process(server.pid)
        for place in places.values():  # to warm up
            await place.round(1000, postmaster)
            place.figures.clear()
        for n in range(2 * rounds):
            name = list(places)[(n + n // 2) % 2]  # a b b a: what grows hits both alike
            print(f"{name}: {await places[name].round(runs, postmaster)}", flush=True)
        for name, place in places.items():
            print(f"{name}: at most {place.dead:,} dead rows;", dict(await place.database.fetchrow(SIZES)))
            await place.database.close()
    return _table({name: place.figures for name, place in places.items()}, history)


def _table(places: dict[str, Figures], history: int) -> Table:
    table = Table(title=f"beside {history:,} ended runs and beside none: median (p99)", title_justify="left")
    for column in ("", *places, "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name in places["none"]:
        medians = [statistics.median(each[name]) for each in places.values()]
        most = [sorted(each[name])[int(len(each[name]) * 0.99)] for each in places.values()]
        both = [f"{middle:.3g} ({high:.3g})" for middle, high in zip(medians, most, strict=True)]
        table.add_row(name, *both, f"{medians[1] / medians[0]:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each product")
    parser.add_argument("--runs", type=int, default=30_000, help="in the queue")
    parser.add_argument("--history", type=int, default=20_000_000)
    parser.add_argument("--keep", type=Path, help="a folder for the server, filled once and used again")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-bench-") as folder:
        data = (given.keep or Path(folder)) / "data"
        Console(width=120).print(asyncio.run(measure(given.rounds, given.runs, given.history, data, Path(folder))))


if __name__ == "__main__":
    main()
