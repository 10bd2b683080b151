"""`python -m tests.bench.traces`: what traces cost each run.

User CPU time of the API, of a worker's supervisor and of its executors, for no-ops that are submitted one by one.
Rounds without traces alternate with rounds in which a share of the requests begins one; a line for each pair, and at
the end the median, the least and the greatest ratio.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
from pathlib import Path

import psutil

from backcast.local import postgres
from tests.bench.worker import of_worker
from tests.support import databases
from tests.support.otlp import Collector
from tests.support.stack import Stack, stack
from tests.support.waiting import until

CALLERS = 16
WARM = 300


def spent(product: Stack) -> dict[str, float]:
    """Milliseconds of the user, by process."""
    api, worker = (psutil.Process(part.process.pid) for part in product.parts)
    (supervisor, _), (executors, _) = of_worker(worker)
    users = {"api": api.cpu_times().user, "supervisor": supervisor, "executors": executors}
    return {name: 1000 * seconds for name, seconds in users.items()}


async def work(product: Stack, runs: int) -> None:
    async def call() -> None:
        for _ in range(runs // CALLERS):
            await product.submit("echo", value=1)

    await asyncio.gather(*[call() for _ in range(CALLERS)])

    async def look() -> bool:
        [pool] = (await product.http.get("/v1/pools")).raise_for_status().json()["items"]
        return pool["ready"] + pool["running"] == 0

    await until(look)
    await asyncio.sleep(2)  # for the spans


async def measured(runs: int, folder: Path, sample: float) -> dict[str, float]:
    with postgres.running(folder / "postgres") as server, Collector() as collector:
        url = databases.create(server)
        env = {"BACKCAST_TRACING__ENDPOINT": collector.url, "BACKCAST_TRACING__SAMPLE": str(sample)} if sample else {}
        async with stack(url, folder, BACKCAST_WORKER__SLOTS="10", **env) as product:
            await product.up("api", "worker")
            await work(product, WARM)
            before, spans = spent(product), len(collector.spans)
            await work(product, runs)
            after = spent(product)
            figures = {name: (after[name] - before[name]) / runs for name in after}
            return {**figures, "spans": (len(collector.spans) - spans) / runs}


def main(runs: int, pairs: int, sample: float) -> None:
    ratios = dict[str, list[float]]()
    for _ in range(pairs):
        rounds = list[dict[str, float]]()
        for share in (0.0, sample):
            with tempfile.TemporaryDirectory(prefix="backcast-bench-", dir="/dev/shm") as folder:  # not on a disk
                rounds.append(asyncio.run(measured(runs, Path(folder), share)))
        off, on = rounds
        print(json.dumps({"off": off, "on": on}), flush=True)
        for name in ("api", "supervisor", "executors"):
            ratios.setdefault(name, []).append(on[name] / off[name])
    print(
        {
            name: (round(statistics.median(all_), 3), round(min(all_), 3), round(max(all_), 3))
            for name, all_ in ratios.items()
        }
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=4_000)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--sample", type=float, default=0.1)
    given = parser.parse_args()
    main(given.runs, given.pairs, given.sample)
