"""`python -m tests.bench.scale`: the cost of the ledger's statements on an empty system, a backlog, and a long history.

Measures three databases on one real PostgreSQL that syncs, in turns, so that the machine's noise hits all alike. Prints
the times, the pages that each statement touches (which have no noise), and how long a fair share lets a first run wait.
Asserts nothing.
"""

import argparse
import asyncio
import contextlib
import hashlib
import platform
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
from rich.console import Console
from rich.table import Table

from backcast.errors import LedgerUnavailable
from backcast.ledger import claims, dispatch, fleet, listing, provisioning, runs, settlement, submissions
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.ledger.migration import migrate
from backcast.ledger.settlement import Settlement
from backcast.local import postgres
from backcast.models import State, Submission, TaskType, uuid7

LEASE = timedelta(hours=1)
OWNERS = 100
POOLS = {"one": 1, "many": OWNERS}
"""Pools and how many owners have runs in them; each pool has half of the backlog."""
DAYS = 29
"""Of the history."""
FEW = 1000
"""Ended runs of the empty system, so that its pages are full too."""
SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "8GB", "checkpoint_timeout": "15min", "max_connections": "50"}
EXPLAINED = "&session_preload_libraries=auto_explain" + "".join(
    f"&auto_explain.log_{what}" for what in ("min_duration=0", "analyze=on", "buffers=on", "timing=off")
)

# Ids as if they had been made, one every `$2` seconds up to `$3` seconds ago; about 300 bytes a row.
_MADE = """
select (lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7' || substr(hash, 1, 3) || '8'
        || substr(hash, 4, 15))::uuid as id, n, pool, owner, at
  from (select n, md5(n::text) as hash, now() - make_interval(secs => $3::float8 + ($1::bigint - n) * $2::float8) as at,
               case when n % 2 = 0 then 'one' else 'many' end as pool,
               case when n % 2 = 0 then 'solo' else 'o' || (n / 2 % 100) end as owner
          from generate_series($4::bigint, $5::bigint) n) given"""
_QUEUED = f"""
insert into runs (id, task, pool, owner, state, max_attempts, input, metadata, created_at, run_at)
select id, 'cast_' || pool, pool, owner, 'queued', 3,
       '{{"payload": "' || repeat(md5(n::text), 3) || '", "target": "int"}}', '{{}}', at, at
  from ({_MADE}) made"""
_ENDED = f"""
insert into ended (id, task, pool, owner, priority, state, run_at, fence, attempts_used, retries_used, max_attempts,
                   worker_id, signature, input, metadata, created_at, started_at, finished_at, result, result_key,
                   error)
select id, 'cast_' || pool, pool, owner, 0, state, at, 1, 1, 0, 3, id, '',
       '{{"payload": "' || repeat(md5(n::text), 3) || '", "target": "int"}}', '{{}}', at, at, at,
       case when state = 'completed' then '{{"value": ' || n || '}}' end,
       case when state = 'completed' then 'results/' || id || '/1.json' end,
       case when state = 'failed' then '{{"code": "task_failed", "title": "t", "detail": "d"}}'::json end
  from (select *, case when n % 100 < 94 then 'completed' when n % 100 < 97 then 'failed'
                       when n % 100 < 99 then 'cancelled' else 'expired' end as state from ({_MADE}) given_) made"""


async def fill(url: str, count: int, *, ago: float, ended: bool, every: float = 0.25) -> None:
    """Make `count` runs, one every so many seconds, the last one `ago` seconds ago."""
    connection = await asyncpg.connect(url, server_settings={"search_path": "backcast"}, command_timeout=None)
    if ended:
        days = max(DAYS, int((ago + count * every) / 86_400)) + 1
        await connection.execute(f"select make_partitions(current_date - {days}, current_date - {int(ago / 86_400)})")
    for first in range(1, count + 1, 250_000):
        last = min(first + 249_999, count)
        await connection.execute(_ENDED if ended else _QUEUED, count, every, ago, first, last)
    await connection.execute(f"vacuum (analyze) {'ended' if ended else 'runs'}")
    await connection.execute("checkpoint")
    await connection.close()


def task(pool: str) -> TaskType:
    return TaskType(name=f"cast_{pool}", pool=pool, input_schema={"type": "object"})


class Place:
    """A database with a worker in each of its pools."""

    def __init__(self, url: str) -> None:
        self.ledger = Ledger(url, pool=2, timeout=timedelta(minutes=5))
        self.workers: dict[str, UUID] = {}
        self.claims: dict[str, list[Claim]] = defaultdict(list)
        self.last: UUID | None = None
        self._cursor = 0

    async def begin(self) -> None:
        for pool in POOLS:
            self.workers[pool] = uuid7()
            await fleet.register(
                self.ledger, self.workers[pool], pool=pool, host="h", version="1", slots=10, tasks=[task(pool)]
            )

    async def top_up(self) -> None:
        """Fill each pool with enough runs to claim, also on the empty system."""
        for pool, owners in POOLS.items():
            row = await self.ledger.fetchrow(
                "select count(*) from (select from runs where pool = $1 and state = 'queued' limit 40) q", pool
            )
            for n in range(0 if row is None else 40 - row[0]):
                await self.submit(pool, f"o{n % owners}" if owners > 1 else "solo")

    async def submit(self, pool: str = "many", owner: str = "o7") -> None:
        submitted = await submissions.submit(
            self.ledger,
            task(pool),
            Submission(owner=owner),
            input_text='{"payload": "%s", "target": "int"}' % ("x" * 96),
            input_hash=hashlib.sha256(b"x").digest(),
        )
        self.last = submitted.run.id

    async def claim(self, pool: str, limit: int) -> None:
        taken = await claims.claim(
            self.ledger, pool=pool, cursor=self._cursor, limit=limit, worker_id=self.workers[pool], lease=LEASE
        )
        assert len(taken) == limit
        self._cursor = taken[-1].owner_key
        self.claims[pool] += taken

    async def settle(self) -> None:
        for pool, taken in self.claims.items():
            if some := taken[:10]:
                await settlement.settle(self.ledger, self.workers[pool], [_completed(claim) for claim in some])
                del taken[:10]
                return

    async def status(self) -> None:
        assert self.last is not None
        await runs.get(self.ledger, self.last)


def _completed(claim: Claim) -> Settlement:
    key = f"results/{claim.id}/{claim.fence}.json"
    return Settlement(id=claim.id, fence=claim.fence, lane=claim.lane, state="completed", result="1", result_key=key)


Statement = Callable[[Place], Awaitable[object]]
STATEMENTS: dict[str, Statement] = {
    "submit": lambda at: at.submit(),
    "claim 1 of 1 owner": lambda at: at.claim("one", 1),
    "claim 10 of 1 owner": lambda at: at.claim("one", 10),
    "claim 1 of 100 owners": lambda at: at.claim("many", 1),
    "claim 10 of 100 owners": lambda at: at.claim("many", 10),
    "settle 10": lambda at: at.settle(),
    "status": lambda at: at.status(),
    "list newest": lambda at: listing.find(at.ledger, limit=50),
    "list an owner": lambda at: listing.find(at.ledger, limit=50, owner="o7"),
    "list completed": lambda at: listing.find(at.ledger, limit=50, state=State.COMPLETED),
    "list queued": lambda at: listing.find(at.ledger, limit=50, state=State.QUEUED),
    "list failed": lambda at: listing.find(at.ledger, limit=50, state=State.FAILED),
    "list expired": lambda at: listing.find(at.ledger, limit=50, state=State.EXPIRED),
    "list running": lambda at: listing.find(at.ledger, limit=50, state=State.RUNNING),
    "list an owner's failed": lambda at: listing.find(at.ledger, limit=50, owner="o7", state=State.FAILED),
    "list a task": lambda at: listing.find(at.ledger, limit=50, task="cast_many"),
    "dispatch due runs (poll)": lambda at: dispatch.dispatch_due(at.ledger),
}


async def measure(urls: dict[str, str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by statement and place."""
    places = {name: Place(url) for name, url in urls.items()}
    times: dict[str, dict[str, list[float]]] = {name: {place: [] for place in places} for name in STATEMENTS}
    for place in places.values():
        await place.begin()
    for _ in range(rounds):
        for place in places.values():
            await place.top_up()
        for name, statement in STATEMENTS.items():
            for at, place in places.items():
                if len(times[name][at]) >= 3 and statistics.median(times[name][at]) > 1000:
                    continue  # so slow a statement needs no more rounds
                began = time.perf_counter()
                with contextlib.suppress(LedgerUnavailable):  # it timed out: the time-out is its time
                    await statement(place)
                times[name][at].append((time.perf_counter() - began) * 1000)
        for place in places.values():
            while any(place.claims.values()):
                await place.settle()
    for place in places.values():
        await place.ledger.aclose()
    return times


async def explain(url: str, log: Path) -> dict[str, tuple[int, str]]:
    """Pages touched by each statement, and its plan, as the server logged them for a connection of the product."""
    place = Place(url + EXPLAINED)
    await place.begin()
    await place.top_up()
    seen: dict[str, tuple[int, str]] = {}
    for name, statement in STATEMENTS.items():
        before = log.stat().st_size
        with contextlib.suppress(LedgerUnavailable):
            await statement(place)  # a first time, so that catalogues are read and plans are made
            before = log.stat().st_size
            await statement(place)
        pages, plans = 0, list[str]()
        with log.open("rb") as file:
            file.seek(before)
            text = file.read().decode()
        for found in re.finditer(r"plan:\n((?:\t.*\n)+)", text):
            plan = found[1]
            if "pg_notify" in plan:
                continue
            plans.append(plan)
            for line in plan.splitlines():
                if touched := re.match(r"\t(?:  )?Buffers: shared(?: hit=(\d+))?(?: read=(\d+))?", line):
                    pages += int(touched[1] or 0) + int(touched[2] or 0)
                    break
        seen[name] = (pages, "\n".join(plans))
    while any(place.claims.values()):
        await place.settle()
    await place.ledger.aclose()
    return seen


async def fairness(url: str) -> str:
    """One owner has 100,000 runs in the queue, then 100 others submit one each; one worker with ten slots."""
    ledger = Ledger(url)
    worker = uuid7()
    await fleet.register(ledger, worker, pool="many", host="h", version="1", slots=10, tasks=[task("many")])
    connection = await asyncpg.connect(url, server_settings={"search_path": "backcast"})
    await connection.execute(
        """insert into runs (id, task, pool, owner, state, max_attempts, input, metadata)
           select uuidv7(), 'cast_many', 'many', 'bulk', 'queued', 3, '{}', '{}'
             from generate_series(1, 100000)"""
    )
    await connection.execute("vacuum (analyze) runs")
    await connection.close()
    lines: list[str] = []
    for each in (1, 10):
        for n in range(OWNERS):
            await submissions.submit(
                ledger, task("many"), Submission(owner=f"small{each}.{n}"), input_text="{}", input_hash=b""
            )
        cursor, position, waits, calls = 0, 0, list[int](), 0
        while len(waits) < OWNERS:
            taken = await claims.claim(ledger, pool="many", cursor=cursor, limit=each, worker_id=worker, lease=LEASE)
            keys = [claim.owner_key for claim in taken]
            cursor, calls = max(keys, key=lambda key: (key - cursor - 1) % 2**64), calls + 1
            for claim in taken:
                position += 1
                if (await runs.get(ledger, claim.id)).owner.startswith(f"small{each}."):
                    waits.append(position)
            await settlement.settle(ledger, worker, [_completed(claim) for claim in taken])
        lines.append(
            f"{each} at a time: all {OWNERS} had their turn after {position} runs claimed ({calls} claims), "
            f"median {statistics.median(waits):.0f}, last {waits[-1]}; the bulk owner got {position - OWNERS} of them"
        )
    await ledger.aclose()
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queued", type=int, default=1_000_000)
    parser.add_argument("--history", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--keep", type=Path, help="a folder for the server, filled once and used again")
    parser.add_argument("--plans", type=Path, help="a file for the plans of the largest system")
    args = parser.parse_args()
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as folder:
        data = (args.keep or Path(folder)) / "data"
        filled = data.exists()
        with postgres.running(data, settings=SETTINGS) as server:
            urls = {}
            for name in ("empty", "backlog", "history", "fair"):
                provisioning.create_database(server.url(), name)
                migrate(server.url(name))
                urls[name] = server.url(name)
            if not filled:
                began = time.monotonic()
                asyncio.run(fill(urls["empty"], FEW, ago=60, ended=True))
                for name in ("backlog", "history"):
                    if name == "history":
                        asyncio.run(
                            fill(urls[name], args.history, ago=60, ended=True, every=DAYS * 86_400 / args.history)
                        )
                    asyncio.run(fill(urls[name], args.queued, ago=60, ended=False))
                console.print(f"filled in {time.monotonic() - began:.0f} s")
            fair = asyncio.run(fairness(urls.pop("fair")))
            log = data.with_name("data.log")
            times = asyncio.run(measure(urls, args.rounds))
            explained = {name: asyncio.run(explain(url, log)) for name, url in urls.items()}
            version = asyncio.run(_version(server.url()))
    table = Table(
        title=f"{args.queued:,} queued, {args.history:,} ended; ms: median (p10–p90); pages touched; {version}"
    )
    for column in ("statement", *urls, "backlog ÷ empty", "history ÷ empty", "pages"):
        table.add_column(column, justify="left" if column == "statement" else "right")
    for name, by_place in times.items():
        medians = {place: statistics.median(some) for place, some in by_place.items()}
        table.add_row(
            name,
            *[_spread(some) for some in by_place.values()],
            *[f"{medians[place] / medians['empty']:.2f}" for place in ("backlog", "history")],
            " / ".join(f"{explained[place][name][0]:,}" for place in urls),
        )
    console.print(table)
    console.print(fair)
    if args.plans:
        args.plans.write_text("\n".join(f"== {name}\n{plan}" for name, (_, plan) in explained["history"].items()))


def _spread(times: list[float]) -> str:
    tenths = statistics.quantiles(times, n=10) if len(times) > 1 else times * 9
    return f"{statistics.median(times):.2f} ({tenths[0]:.2f}–{tenths[-1]:.2f})"


async def _version(url: str) -> str:
    connection = await asyncpg.connect(url)
    server = await connection.fetchval("show server_version")
    await connection.close()
    return f"PostgreSQL {server}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
