"""`make bench`: a first look at speed, on this machine, with real processes and Prefect's history on.

Prints rates, latencies and CPU per run; asserts nothing, because times on shared machines are noise. For figures beside
other systems use `tests/bench/contestant` with a side-by-side harness (its contestant.toml has the commands).
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from backcast.local import postgres
from tests.support import databases
from tests.support.stack import Stack, prefect_server, stack

CONNECTIONS = 20


@dataclass
class Connection:
    """HTTP/1.1 with keep-alive and nothing else: a full client would cost more than the calls that are measured."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, url: str) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])))

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        self.writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        top = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(top.partition(b"content-length:")[2].split(b"\r\n")[0])
        answer = json.loads(await self.reader.readexactly(length))
        assert b" 20" in top[:14], answer
        return answer


async def submit(connections: list[Connection], task: str, inputs: list[dict[str, Any]]) -> list[str]:
    left, ids = iter(inputs), list[str]()

    async def work(connection: Connection) -> None:
        for given in left:
            ids.append((await connection.ask("POST", f"/v1/tasks/{task}/runs", {"input": given}))["id"])

    await asyncio.gather(*map(work, connections))
    return ids


async def ended(connection: Connection, ids: list[str], every: float = 0.02) -> None:
    for run_id in ids:
        while (await connection.ask("GET", f"/v1/runs/{run_id}"))["state"] != "completed":  # noqa: ASYNC110  # over HTTP
            await asyncio.sleep(every)


def cpu(processes: dict[str, psutil.Process]) -> dict[str, float]:
    """Seconds of each process and its children, the ended ones too."""
    seen = {}
    for name, process in processes.items():
        times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
        seen[name] = sum(t.user + t.system for t in times) + times[0].children_user + times[0].children_system
    return seen


@asynccontextmanager
async def product(folder: Path) -> AsyncIterator[tuple[Stack, dict[str, psutil.Process]]]:
    async with AsyncExitStack() as servers:
        database = servers.enter_context(postgres.running(folder / "postgres"))
        prefect = await servers.enter_async_context(prefect_server(folder))
        url = databases.create(database)
        env = {"BACKCAST_PREFECT__HISTORY": "true", "BACKCAST_PREFECT__API_URL": prefect.url, "BACKCAST_LEASE": "PT15S"}
        async with stack(url, folder, **env) as running:
            await running.up("api", "worker", "steward")
            parts = {part.name: psutil.Process(part.process.pid) for part in (*running.parts, prefect)}
            yield running, parts | {"postgres": psutil.Process(database.pid)}


async def measure(runs: int, folder: Path) -> Table:
    table = Table(title=f"{runs} runs, {CONNECTIONS} connections, 10 slots, history on", title_justify="left")
    for column in ("measure", "figure", "CPU ms per run"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    async with product(folder) as (running, parts):
        url = str(running.http.base_url).rstrip("/")
        connections = [await Connection.open(url) for _ in range(CONNECTIONS)]
        await ended(connections[0], await submit(connections, "echo", [{"value": n} for n in range(100)]))

        before, start = cpu(parts), time.perf_counter()
        ids = await submit(connections, "echo", [{"value": n} for n in range(runs)])
        submitted = time.perf_counter() - start
        await ended(connections[0], ids)
        total = time.perf_counter() - start
        await asyncio.sleep(3)  # for the history to follow
        spent = {name: 1000 * (used - before[name]) / runs for name, used in cpu(parts).items()}
        shares = ", ".join(f"{name} {each:.2f}" for name, each in spent.items())
        table.add_row("submit, workers busy", f"{runs / submitted:.0f} /s", "")
        table.add_row("end to end", f"{runs / total:.0f} /s", f"{sum(spent.values()):.2f} ({shares})")

        trips = []
        for n in range(50):
            start = time.perf_counter()
            await ended(connections[0], await submit(connections[:1], "echo", [{"value": n}]), every=0.002)
            trips.append(1000 * (time.perf_counter() - start))
            await asyncio.sleep(0.1)
        table.add_row("idle round trip, p50 (p95)", f"{statistics.median(trips):.1f} ({sorted(trips)[47]:.1f}) ms", "")

        start = time.perf_counter()
        await ended(connections[0], await submit(connections, "nap", [{"seconds": 0.1}] * 200))
        table.add_row("100 ms tasks, of 100 /s", f"{200 / (time.perf_counter() - start):.1f} /s", "")
        for connection in connections:
            connection.writer.close()
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    with tempfile.TemporaryDirectory(prefix="backcast-bench-") as folder:
        Console(width=120).print(asyncio.run(measure(parser.parse_args().runs, Path(folder))))
