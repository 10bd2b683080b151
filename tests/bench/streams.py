"""`python -m tests.bench.streams`: what many streams of events cost one API process, and how late events come.

Each stream follows a run of its own: first while nothing happens, then while each run emits an event a second, recorded
as a worker records them. Prints the memory and the CPU time of the API and of PostgreSQL. Asserts nothing.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import httpx
import psutil

from backcast.ledger import claims, events, fleet, submissions
from backcast.ledger.connection import Ledger
from backcast.ledger.events import Event, Report
from backcast.local import postgres
from backcast.models import Submission, TaskType, uuid7
from tests.bench.__main__ import cpu
from tests.support import databases
from tests.support.stack import Stack, stack
from tests.support.waiting import until

NOOP = TaskType(name="noop", pool="default", input_schema={"type": "object"})


class Readers:
    """Reads streams, and keeps how late each event came."""

    def __init__(self) -> None:
        self.open = 0
        self.late = list[float]()

    async def follow(self, http: httpx.AsyncClient, run_id: UUID) -> None:
        async with http.stream("GET", f"/v1/runs/{run_id}/events") as answer:
            self.open += answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and (sent := json.loads(line[6:]).get("data")) is not None:
                    self.late.append(time.time() - sent)


async def measure(served: Stack, ledger: Ledger, server: postgres.Postgres, streams: int, seconds: float) -> None:
    worker = uuid7()
    await fleet.register(ledger, worker, pool="default", host="h", version="1", slots=streams, tasks=[NOOP])
    for _ in range(streams):
        await submissions.submit(ledger, NOOP, Submission(), input_text="{}", input_hash=b"")
    held = list[claims.Claim]()
    while len(held) < streams:
        held += await claims.claim(
            ledger, pool="default", cursor=0, limit=500, worker_id=worker, lease=submissions.RECORDED_WITHIN
        )
    processes = {"api": psutil.Process(served.parts[0].process.pid), "postgres": psutil.Process(server.pid)}
    before, readers = processes["api"].memory_info().rss, Readers()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=served.http.base_url, timeout=None, limits=limits) as http:
        following = [asyncio.create_task(readers.follow(http, each.id)) for each in held]

        async def all_open() -> bool:
            return readers.open == streams

        await until(all_open)
        await asyncio.sleep(3)

        def show(what: str, used: dict[str, float], took: float) -> None:
            spent = {name: 100 * (now - used[name]) / took for name, now in cpu(processes).items()}
            memory = processes["api"].memory_info().rss
            print(
                f"{streams} streams, {what}: API {spent['api']:.1f} %, PostgreSQL {spent['postgres']:.1f} % of a core;"
                f" API {memory >> 20} MiB, {(memory - before) / streams / 1024:.0f} KiB a stream",
                flush=True,
            )

        used, began = cpu(processes), time.monotonic()
        await asyncio.sleep(seconds)
        show("idle", used, time.monotonic() - began)
        used, began, number = cpu(processes), time.monotonic(), 0
        while time.monotonic() < began + seconds:
            number, at = number + 1, datetime.now(UTC)
            for start in range(0, streams, 100):  # as ten workers or more do
                page = held[start : start + 100]
                emitted = [Event(1, each.fence, number, at, "output", json.dumps(time.time())) for each in page]
                reports = [
                    Report(each.id, each.fence, events=[event]) for each, event in zip(page, emitted, strict=True)
                ]
                await events.record(ledger, worker, reports)
            await asyncio.sleep(max(0.0, began + number - time.monotonic()))
        show("an event a second each", used, time.monotonic() - began)
        await asyncio.sleep(3)
        late = sorted(readers.late)
        print(
            f"{len(late)} of {number * streams} events came; late by {statistics.median(late):.2f} s at the median,"
            f" {late[int(len(late) * 0.99)]:.2f} s at p99",
            flush=True,
        )
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)


async def serve(server: postgres.Postgres, folder: Path, given: argparse.Namespace) -> None:
    ledger = Ledger(server.url("backcast"))
    async with stack(server.url("backcast"), folder) as served:
        await served.up("api")
        await measure(served, ledger, server, given.streams, given.seconds)
    await ledger.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="streams-bench-") as folder,
        postgres.running(Path(folder) / "data", settings={"max_connections": "100"}) as server,
    ):
        databases.create(server)
        asyncio.run(serve(server, Path(folder), given))


if __name__ == "__main__":
    main()
