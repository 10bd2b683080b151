"""`python -m tests.bench.routes`: the rate of a task beside runs of a task that its pool no longer has.

A worker does batches of no-ops, in turns alone and beside such runs, so that the machine's noise hits both alike. The
runs of a batch become ready in one commit. Prints the rates, and the CPU time of worker, steward and PostgreSQL, which
other people's processes disturb less. Asserts nothing.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import asyncpg
import psutil

from backcast.ledger import provisioning
from backcast.ledger.connection import CHANNEL
from backcast.ledger.migration import migrate
from backcast.local import postgres
from tests.bench.__main__ import cpu
from tests.support.stack import stack
from tests.support.waiting import until

# `mixed`: one owner, in any order; `apart`: an owner each; `behind`: one owner, all of the others first.
FILL = """
insert into runs (id, task, pool, owner, state, max_attempts, input, metadata, run_at)
select uuidv7(), task, 'default', case when $3 = 'apart' then task else 'one' end, 'queued', 3, '{"value": 1}',
       '{}', case when $3 = 'behind' then now() - make_interval(secs => (task = 'gone')::int) else now() end
  from (select case when n <= $1 then 'echo' else 'gone' end as task from generate_series(1, $1::int + $2::int) n
         order by random()) given"""
LEFT = "select count(*) from runs where task = 'echo' and state in ('queued', 'running')"
TOOK = "select extract(epoch from max(finished_at) - $1)::float8 from ended where task = 'echo'"


async def measure(rounds: int, runs: int, others: int, how: str, folder: Path) -> None:
    with ExitStack() as servers:
        database = servers.enter_context(postgres.running(folder / "postgres"))
        provisioning.create_database(database.url(), "backcast")
        migrate(database.url("backcast"))
        url = database.url("backcast")
        async with stack(url, folder, BACKCAST_BUILTIN_TASKS="false", BACKCAST_LEASE="PT15S") as running:
            await running.up("worker", "steward")
            parts = {part.name: psutil.Process(part.process.pid) for part in running.parts}
            parts["postgres"] = psutil.Process(database.pid)
            connection = await asyncpg.connect(url, server_settings={"search_path": "backcast"})
            found: dict[int, list[tuple[float, float]]] = {0: [], others: []}
            for n in range(-1, 2 * rounds):  # the first one only warms up
                beside = 0 if n < 0 else (0, others)[(n + n // 2) % 2]  # a b b a: what grows hits both alike
                await connection.execute("truncate runs, ended")
                await connection.execute("vacuum (analyze) runs")
                await asyncio.sleep(1)
                before = cpu(parts)
                await connection.execute(FILL, runs, beside, how)
                ready = await connection.fetchval("select clock_timestamp()")
                await connection.execute("select pg_notify($1, 'default')", CHANNEL)
                await until(lambda: connection.fetchval(LEFT), lambda left: left == 0, timeout=120, every=0.1)
                took = await connection.fetchval(TOOK, ready)
                spent = sum(used - before[name] for name, used in cpu(parts).items())
                if n >= 0:
                    found[beside].append((runs / took, 1000 * spent / runs))
                    print(
                        f"{how} {beside:5} others: {runs / took:6.0f} /s, {1000 * spent / runs:.3f} ms CPU", flush=True
                    )
            await connection.close()
    for place, name in enumerate(("rate", "CPU")):
        alone, beside_ = ([each[place] for each in found[key]] for key in (0, others))
        ratios = sorted(b / a for a, b in zip(alone, beside_, strict=True))
        middle = statistics.median(beside_) / statistics.median(alone)
        print(f"{how} {name} beside/alone: medians {middle:.3f}, pairs {' '.join(f'{each:.2f}' for each in ratios)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3000)
    parser.add_argument("--others", type=int, default=2000)
    parser.add_argument("--how", choices=["mixed", "apart", "behind"], default="mixed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="routes-bench-") as folder:
        start = time.monotonic()
        asyncio.run(measure(given.rounds, given.runs, given.others, given.how, Path(folder)))
        print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
