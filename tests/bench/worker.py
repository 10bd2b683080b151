"""`python -m tests.bench.worker`: what one worker costs per run, and how fast it empties a full queue of no-ops.

For each round: a new database and folder store in memory (/dev/shm), one batch of no-ops that is queued before the
worker may start one. Prefect's server, with `--history`, is one that accepts everything and keeps nothing. Compare two
checkouts by alternating rounds of both (`PYTHONPATH=<checkout> <checkout>/.venv/bin/python tests/bench/worker.py`);
CPU time of the user alone varies least.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil

from backcast.local import postgres
from tests.support import databases
from tests.support.stack import stack
from tests.support.waiting import until

WARM = 500


@asynccontextmanager
async def accepts_everything() -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
            await reader.readexactly(int(length or 0))
            writer.write(b"HTTP/1.1 201 Created\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n[]")

    async def quietly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(quietly, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/api"
    finally:
        server.close()


def of_worker(process: psutil.Process) -> list[tuple[float, float]]:
    """Seconds of the user and of the system: of the supervisor, of its executors."""
    executors = [child.cpu_times() for child in process.children(recursive=True)]
    ours = process.cpu_times()
    return [(ours.user, ours.system), (sum(t.user for t in executors), sum(t.system for t in executors))]


async def measure(runs: int, folder: Path, *, history: bool) -> dict[str, float]:
    async with AsyncExitStack() as servers:
        database = servers.enter_context(postgres.running(folder / "postgres"))
        url = databases.create(database)
        env = {"BACKCAST_WORKER__SLOTS": "10"}
        if history:
            env["BACKCAST_PREFECT__HISTORY"] = "true"
            env["BACKCAST_PREFECT__API_URL"] = await servers.enter_async_context(accepts_everything())
        running = await servers.enter_async_context(stack(url, folder, **env))
        await running.up("api", "worker")
        worker = psutil.Process(running.parts[1].process.pid)

        async def work(count: int) -> float:
            """Seconds from the commit of a batch, which queues all of its runs at once, to the end of the last one."""
            lines = b"".join(b'{"task":"echo","input":{"value":%d}}\n' % n for n in range(count))
            headers = {"content-type": "application/jsonl"}
            posted = await running.http.post("/v1/batches", content=lines, headers=headers)
            start, batch = time.perf_counter(), posted.raise_for_status().json()["id"]

            async def look() -> bool:
                states = (await running.http.get(f"/v1/batches/{batch}")).json()["states"]
                return bool(states == {"completed": count})

            await until(look, every=0.05)
            return time.perf_counter() - start

        await work(WARM)
        before = of_worker(worker)
        took = await work(runs)
        await asyncio.sleep(2)  # for the history
        figures = {"rate": runs / took}
        for name, old, new in zip(("supervisor", "executor"), before, of_worker(worker), strict=True):
            figures[f"{name}_user_ms"] = 1000 * (new[0] - old[0]) / runs
            figures[f"{name}_system_ms"] = 1000 * (new[1] - old[1]) / runs
        return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--history", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="backcast-bench-", dir="/dev/shm") as folder:  # not on a disk
        print(json.dumps(asyncio.run(measure(given.runs, Path(folder), history=given.history))))
