"""`python -m tests.bench.many`: how long it takes to repeat and to cancel 100,000 runs, and how long others wait.

A steward makes the operations, while a client submits, claims, settles and reads runs, one after the other. Prints the
time of each operation, and the client's longest waits. Asserts nothing.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from backcast.ledger import operations, provisioning
from backcast.ledger.connection import Ledger
from backcast.ledger.migration import migrate
from backcast.ledger.selection import Kind
from backcast.local import postgres
from backcast.models import Selection, State
from backcast.settings import Store as StoreSettings
from backcast.steward.operations import Operations
from backcast.store import open_store
from tests.bench.retention import Client
from tests.bench.scale import SETTINGS, Place, fill

COMPLETED = 0.94
"""The share of completed runs that `fill` makes."""


async def measure(count: int, url: str, folder: Path) -> None:
    place, ledger = Place(url), Ledger(url, pool=5)
    await place.begin()
    await fill(url, int(count / COMPLETED), ago=1, ended=True, every=0.05)
    store = open_store(StoreSettings(url=f"file://{folder}"))
    await store.ensure()
    client = Client(place)
    working = asyncio.create_task(client.work())
    await asyncio.sleep(5)
    client.report("before")
    steps: list[tuple[Kind, State]] = [("retry", State.COMPLETED), ("cancel", State.QUEUED)]
    for kind, state in steps:
        chosen = Selection(state=state)
        began = time.monotonic()
        matched, _ = await operations.matching(ledger, kind, chosen)
        print(f"{kind}: {matched:,} runs counted in {time.monotonic() - began:.2f} s", flush=True)
        recorded = await operations.record(ledger, kind, chosen, owner="", key=None)
        began = time.monotonic()
        await Operations(ledger, store)()
        done = (await operations.get(ledger, recorded.operation.id)).done
        print(f"{kind}: {done:,} runs in {time.monotonic() - began:.1f} s")
        client.report(f"during the {kind}")
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await store.aclose()
    await ledger.aclose()
    await place.ledger.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="many-bench-") as folder,
        postgres.running(Path(folder) / "data", settings=SETTINGS) as server,
    ):
        provisioning.create_database(server.url(), "backcast")
        migrate(server.url("backcast"))
        asyncio.run(measure(given.runs, server.url("backcast"), Path(folder) / "store"))


if __name__ == "__main__":
    main()
