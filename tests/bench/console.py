"""`python -m tests.bench.console`: what open pages of the console cost one API process beside a load.

Batches keep workers busy at a rate, in turns without and with pages that ask for themselves as browsers do: overviews
and lists of runs, one of each per reader. Prints the CPU of the API and of PostgreSQL in each turn, the rate that was
reached and how long pages took. Asserts nothing.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from backcast.local import postgres
from tests.bench.__main__ import cpu
from tests.support import databases
from tests.support.stack import Stack, stack
from tests.support.waiting import until

PAGES = ("/console/", "/console/runs")
EVERY = 3.0
"""Seconds after which an open page asks for itself, as its template has it."""
PIECE = 0.25
"""Seconds between two batches of the load."""


async def load(http: httpx.AsyncClient, rate: int) -> None:
    """Submit `rate` runs a second until it is cancelled, or as many as the API takes."""
    lines = b'{"input": {"value": 1}}\n' * max(1, round(rate * PIECE))
    due = time.monotonic()
    while True:
        answer = await http.post(
            "/v1/batches?task=echo", content=lines, headers={"Content-Type": "application/jsonl"}, timeout=60
        )
        answer.raise_for_status()
        due = max(due + PIECE, time.monotonic() - 1)
        await asyncio.sleep(max(0.0, due - time.monotonic()))


async def read(http: httpx.AsyncClient, page: str, late: float, took: list[float]) -> None:
    """An open page, until it is cancelled; its first request comes after `late` seconds."""
    await asyncio.sleep(late)
    while True:
        began = time.monotonic()
        answer = await http.get(page, headers={"HX-Request": "true"}, timeout=60)
        answer.raise_for_status()
        took.append(time.monotonic() - began)
        await asyncio.sleep(max(0.0, began + EVERY - time.monotonic()))


async def ended(served: Stack) -> int:
    """Runs that the workers have ended since they started."""
    workers = (await served.http.get("/v1/workers")).json()["items"]
    return sum(each["settled"] for each in workers)


async def turn(
    served: Stack, processes: dict[str, psutil.Process], name: str, readers: int, seconds: float
) -> dict[str, float]:
    """The share of a core of each process during a turn."""
    took = list[float]()
    async with httpx.AsyncClient(base_url=served.http.base_url) as http:
        opened = [
            asyncio.create_task(read(http, page, number * EVERY / (readers * len(PAGES)), took))
            for number, page in enumerate(PAGES * readers)
        ]
        await asyncio.sleep(EVERY)
        before, used, began = await ended(served), cpu(processes), time.monotonic()
        took.clear()
        await asyncio.sleep(seconds)
        lasted = time.monotonic() - began
        spent = {part: 100 * (now - used[part]) / lasted for part, now in cpu(processes).items()}
        runs = (await ended(served) - before) / lasted
        for task in opened:
            task.cancel()
        await asyncio.gather(*opened, return_exceptions=True)
    shares = ", ".join(f"{part} {share:.1f} %" for part, share in spent.items())
    pages = f"; {len(took)} pages, {1000 * statistics.median(took):.0f} ms at the median" if took else ""
    print(f"{name}: {runs:.0f} runs/s; of a core: {shares}{pages}", flush=True)
    return spent


async def serve(server: postgres.Postgres, folder: Path, given: argparse.Namespace) -> None:
    env = {"BACKCAST_API__MAX_WAITING": "10000000", "BACKCAST_API__MAX_WAITING_PER_OWNER": "10000000"}
    async with stack(server.url("backcast"), folder, **env) as served:
        await served.up("api", "steward", *["worker"] * given.workers)
        [api] = [part for part in served.parts if part.name == "api"]
        processes = {"API": psutil.Process(api.process.pid), "PostgreSQL": psutil.Process(server.pid)}

        async def is_known() -> bool:
            return (await served.http.get("/v1/tasks/echo")).status_code == 200

        await until(is_known)
        async with httpx.AsyncClient(base_url=served.http.base_url) as http:
            loading = asyncio.create_task(load(http, given.rate)) if given.rate else None
            await asyncio.sleep(given.seconds / 4)
            costs = list[dict[str, float]]()
            for number in range(1, given.turns + 1):
                without = await turn(served, processes, f"{number}, no page", 0, given.seconds)
                having = await turn(
                    served, processes, f"{number}, {given.readers} of each page", given.readers, given.seconds
                )
                costs.append({part: having[part] - without[part] for part in processes})
            if loading is not None:
                loading.cancel()
                await asyncio.gather(loading, return_exceptions=True)
        for part in processes:
            figures = [cost[part] for cost in costs]
            print(
                f"the pages cost {part} {statistics.median(figures):.1f} % of a core at the median"
                f" of {len(figures)} turns ({min(figures):.1f} to {max(figures):.1f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=int, default=2000, help="runs a second")
    parser.add_argument("--readers", type=int, default=1, help="people, each with an overview and a list of runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30, help="of a turn")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="console-bench-") as folder,
        postgres.running(Path(folder) / "data", settings={"max_connections": "100"}) as server,
    ):
        databases.create(server)
        asyncio.run(serve(server, Path(folder), given))


if __name__ == "__main__":
    main()
