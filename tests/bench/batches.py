"""`python -m tests.bench.batches`: the memory of an API process while batches come in and results go out.

A client sends batches of lines of 1 KB as streams, the small one first, and reads their results. Prints the largest
resident size of the API process during each, and the times. Asserts nothing.
"""

import argparse
import asyncio
import json
import re
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from backcast.ledger import fleet
from backcast.ledger.connection import Ledger
from backcast.local import postgres
from backcast.models import TaskType, uuid7
from tests.support import databases
from tests.support.stack import Stack, stack

ECHO = TaskType(name="echo", pool="default", input_schema={"type": "object"})


async def lines(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        line = {"task": "echo", "custom_id": str(number), "input": {"value": f"{number:07}" + "x" * 900}}
        yield json.dumps(line).encode() + b"\n"


def _largest(pid: int) -> int:
    """MiB since the last reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) >> 10


def _reset(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


async def measure(served: Stack, counts: list[int]) -> None:
    [api] = served.parts
    pid = api.process.pid
    for count in counts:
        _reset(pid)
        began = time.monotonic()
        headers = {"Content-Type": "application/jsonl"}
        answer = await served.http.post("/v1/batches", content=lines(count), headers=headers, timeout=300)
        assert answer.status_code == 202, answer.text
        print(f"{count:,} lines in: {time.monotonic() - began:.1f} s, {_largest(pid)} MiB", flush=True)
        _reset(pid)
        began, size = time.monotonic(), 0
        where = f"/v1/batches/{answer.json()['id']}/results"
        async with served.http.stream("GET", where, timeout=300) as results:
            async for piece in results.aiter_bytes():
                size += len(piece)
        print(
            f"  {size >> 10:,} KiB of results out: {time.monotonic() - began:.1f} s, {_largest(pid)} MiB",
            flush=True,
        )


async def serve(url: str, folder: Path, counts: list[int]) -> None:
    ledger = Ledger(url)
    await fleet.register(ledger, uuid7(), pool="default", host="h", version="1", slots=1, tasks=[ECHO])
    async with stack(url, folder) as served:
        served.env["BACKCAST_DATABASE__TIMEOUT"] = "PT30S"
        await served.up("api")
        await measure(served, counts)
    await ledger.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, nargs="*", default=[1000, 50_000])
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="batches-bench-") as folder,
        postgres.running(Path(folder) / "data", settings={"max_connections": "50"}) as server,
    ):
        databases.create(server)
        asyncio.run(serve(server.url("backcast"), Path(folder), given.lines))


if __name__ == "__main__":
    main()
