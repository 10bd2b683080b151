"""`python -m tests.bench.retention`: how long others wait while a day of history goes.

Fills one old day, then drops it as the steward does, while a client submits, ends and reads runs, one after the other.
Prints the time of each step, and the client's longest waits. Asserts nothing.
"""

import argparse
import asyncio
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

from backcast.ledger import ended, provisioning
from backcast.ledger.migration import migrate
from backcast.local import postgres
from tests.bench.scale import SETTINGS, Place, fill

AGO = 40 * 86_400.0
KEEP = timedelta(days=30)


class Client:
    def __init__(self, place: Place) -> None:
        self._place = place
        self.longest = 0.0
        self.runs = 0

    async def work(self) -> None:
        at = self._place
        while True:
            for step in (partial(at.submit, "one", "solo"), partial(at.claim, "one", 1), at.settle, at.status):
                began = time.monotonic()
                await step()
                self.longest = max(self.longest, time.monotonic() - began)
            self.runs += 1

    def report(self, when: str) -> None:
        print(f"{when}: {self.runs:,} runs, the longest statement took {1000 * self.longest:.0f} ms", flush=True)
        self.longest = self.runs = 0


async def measure(count: int, url: str) -> None:
    place = Place(url)
    await place.begin()
    began = time.monotonic()
    await fill(url, count, ago=AGO, ended=True, every=3600 / count)
    print(f"{count:,} runs of one hour in {time.monotonic() - began:.0f} s", flush=True)
    client = Client(place)
    working = asyncio.create_task(client.work())
    await asyncio.sleep(5)
    client.report("before")
    for partition in await ended.partitions(place.ledger):
        if partition.age > KEEP:
            began, keys = time.monotonic(), 0
            async for page in ended.objects(place.ledger, partition):
                keys += len(page)
            listed = time.monotonic()
            client.report("while its objects are listed")
            await ended.drop(place.ledger, partition)
            print(
                f"{partition.name}: {keys:,} objects listed in {listed - began:.0f} s,"
                f" dropped in {time.monotonic() - listed:.3f} s"
            )
            client.report("while it goes")
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await place.ledger.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5_000_000)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="retention-bench-") as folder,
        postgres.running(Path(folder) / "data", settings=SETTINGS) as server,
    ):
        provisioning.create_database(server.url(), "backcast")
        migrate(server.url("backcast"))
        asyncio.run(measure(given.runs, server.url("backcast")))


if __name__ == "__main__":
    main()
