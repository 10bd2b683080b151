"""The worker as a real process, with real signals: every accepted run is finished, with exactly one outcome."""

import asyncio
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from backcast.client import AsyncClient
from backcast.ledger import claims
from backcast.ledger.connection import Ledger
from backcast.local import postgres
from backcast.models import uuid7
from backcast.process.metrics import WorkerMetrics
from backcast.process.stop import Stop
from backcast.settings import Settings
from backcast.settings import Store as StoreSettings
from backcast.store import open_store
from backcast.worker.executors import Executors
from backcast.worker.loop import Worker
from tests.integration.test_ledger import LEASE
from tests.support import databases
from tests.support.runs import FINAL
from tests.support.s3 import s3_server
from tests.support.stack import Stack, stack
from tests.support.waiting import PATIENCE, until


@pytest.fixture
async def product(database: str, tmp_path: Path) -> AsyncIterator[Stack]:
    """An API and a worker."""
    async with stack(database, tmp_path) as running:
        await running.up("api", "worker")
        yield running


def calls(product: Stack, name: str) -> int:
    """How often a sample task of this name was called."""
    path = product.folder / f"calls-{name}"
    return path.stat().st_size if path.exists() else 0


async def test_tasks_run_and_return(product: Stack) -> None:
    async def check(expected: object, task: str, **given: object) -> None:
        assert await product.result(await product.submit(task, **given)) == expected

    order = {"item": "x", "quantity": 1, "due": "2024-01-01"}
    await asyncio.gather(
        check({"a": [1, None, "é"]}, "echo", value={"a": [1, None, "é"]}),
        check("x" * 40_000, "echo", value="x" * 40_000),
        check("y" * 100_000, "echo", value="y" * 100_000),
        check(0.1, "nap", seconds=0.1),
        check(0.1, "block", seconds=0.1),
        check({**order, "due": "2025-02-03"}, "reorder", order=order, on="2025-02-03"),
        check([1], "unserialisable", kind="set"),
    )
    files = {path.name.partition("~")[2] for path in (product.folder / "store" / "results").iterdir()}
    assert files == {"1.json"}, "every result is in the store, under its fence"


async def test_a_task_makes_runs_of_other_tasks(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path) as product:
        keys = "a-key-of-the-api, another-key-of-the-api"
        await product.up("api", BACKCAST_API__KEYS=keys)
        product.http.headers["Authorization"] = "Bearer another-key-of-the-api"
        given = {"BACKCAST_URL": str(product.http.base_url), "BACKCAST_API_KEY": keys}
        await product.start("worker", **given).ready()
        assert await product.result(await product.submit("delegate", value={"a": 1})) == {"a": 1}


async def test_task_types_come_from_signatures_and_docstrings(product: Stack) -> None:
    task = (await product.http.get("/v1/tasks/reorder")).json()
    assert task["description"].startswith("Change the date of an order.")
    assert task["input_schema"]["properties"]["on"]["description"] == "the new date"
    assert task["input_schema"]["required"] == ["order", "on"]
    assert task["output_schema"]["properties"]["quantity"] == {"title": "Quantity", "type": "integer"}
    answer = await product.http.post("/v1/tasks/reorder/runs", json={"input": {"order": {}, "on": "x"}})
    assert answer.status_code == 422
    flaky = (await product.http.get("/v1/tasks/flaky")).json()
    assert (flaky["retries"], flaky["timeout"]) == (3, None)


async def test_failures_have_their_codes(product: Stack) -> None:
    async def check(code: str, task: str, attempts: int, **given: object) -> None:
        run = await product.ended(await product.submit(task, **given))
        assert (run["state"], run["error"]["code"], run["attempts"]) == ("failed", code, attempts), run

    await asyncio.gather(
        check("unusable_input", "fail", 1, kind="usage", name="u"),
        check("task_failed", "fail", 1, kind="fatal", name="f"),
        check("task_failed", "fail", 4, kind="plain", name="p"),
        check("timeout", "too_slow", 1),
        check("unserialisable_result", "unserialisable", 1, kind="bytes"),
        check("unserialisable_result", "unserialisable", 1, kind="object"),
        check("unserialisable_result", "unserialisable", 1, kind="nan"),
        check("unserialisable_result", "unserialisable", 1, kind="surrogate"),
    )
    assert (calls(product, "u"), calls(product, "f"), calls(product, "p")) == (1, 1, 4)


async def test_retries_are_durable_and_counted(product: Stack) -> None:
    later, at_once = await asyncio.gather(
        product.submit("flaky", name="a", fails=2), product.submit("flaky_at_once", name="b", fails=2)
    )
    assert await product.result(later) == 3
    assert await product.result(at_once) == 3
    run = await product.run(later)
    assert (run["attempts"], run["error"]) == (3, None), "the error of an earlier attempt is not shown"


async def test_a_retry_waits_in_the_database_and_survives_its_worker(product: Stack, ledger: Ledger) -> None:
    run_id = await product.submit("fail", kind="plain", name="z")
    await until(lambda: asyncio.to_thread(calls, product, "z"))
    product.parts[1].kill()
    await ledger.execute("update workers set heartbeat_at = now() - interval '1 minute'")
    steward = product.start("steward")
    worker = product.start("worker")
    await asyncio.gather(steward.ready(), worker.ready())
    run = await product.ended(run_id)
    assert (run["state"], run["error"]["code"]) == ("failed", "task_failed")


async def test_cached_tasks_share_results_and_each_run_has_its_own(product: Stack) -> None:
    first = await product.submit("counted", name="c", payload={"a": 1})
    assert await product.result(first) == 1
    second = await product.submit("counted", name="c", payload={"a": 1})
    assert await product.result(second) == 1, "a hit"
    assert await product.result(await product.submit("counted", name="c", payload={"a": 2})) == 2
    for run in (first, second):
        assert (product.folder / "store" / "results" / f"{run}~1.json").read_text() == "1"


@pytest.mark.parametrize("text", ["a\0b", "".join(map(chr, range(32, 8000)))])
async def test_a_cache_key_may_be_any_text(product: Stack, text: str) -> None:
    calls = product.folder / "calls-keyed"
    calls.unlink(missing_ok=True)
    for _ in range(2):
        assert await product.result(await product.submit("keyed", text=text)) == len(text)
    assert calls.read_text() == "."
    await product.result(await product.submit("echo", value=1))


async def test_a_running_run_is_cancelled_within_seconds(product: Stack) -> None:
    run_id = await product.submit("linger", name="for ever")
    await product.state(run_id, "running")
    assert (await product.http.post(f"/v1/runs/{run_id}/cancel")).status_code == 200
    run = await product.state(run_id, "cancelled")
    assert run["error"] is None


async def test_a_blocked_loop_does_not_cost_the_lease(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path, BACKCAST_LEASE="4", BACKCAST_WORKER__STALL=str(PATIENCE)) as product:
        await product.up("api", "worker", "steward")
        blocking = await product.submit("block_the_loop", seconds=8)
        other = await product.submit("nap", seconds=0.1)
        assert await product.result(blocking) == 8
        assert await product.result(other) == 0.1
        assert (await product.run(blocking))["attempts"] == 1


async def test_an_input_that_was_damaged_fails_with_a_code(product: Stack, ledger: Ledger) -> None:
    product.parts[1].signal(signal.SIGSTOP)
    damaged, lost = await product.submit("echo", value=1), await product.submit("echo", value="x" * 70_000)
    await ledger.execute("update runs set input = '{' where id = $1", UUID(damaged))
    for path in (product.folder / "store" / "inputs").iterdir():
        path.unlink()
    product.parts[1].signal(signal.SIGCONT)
    codes = [(await product.ended(run))["error"]["code"] for run in (damaged, lost)]
    assert codes == ["unreadable_input", "input_lost"]


async def test_sigterm_finishes_short_runs_and_releases_the_rest(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path, BACKCAST_WORKER__GRACE="PT15S", BACKCAST_WORKER__SLOTS="4") as product:
        await product.up("api", "worker")
        worker = product.parts[1]
        short = [await product.submit("linger", name="short") for _ in range(2)]
        long = [await product.submit(task, name="long") for task in ("linger", "linger_in_a_thread")]
        waiting = await product.submit("nap", seconds=0.1, name="waiting")
        for run in (*short, *long):
            await product.state(run, "running")
        worker.signal(signal.SIGTERM)
        await until(lambda: asyncio.to_thread(lambda: worker.text), lambda text: "draining" in text)
        product.release("short")
        assert await worker.ended() == 0
        for run in short:
            assert (await product.run(run))["state"] == "completed"
        for run in (*long, waiting):
            back = await product.run(run)
            assert (back["state"], back["attempts"]) == ("queued", 0)
        product.release("long")
        await product.start("worker").ready()
        for run in (*long, waiting):
            await product.result(run)


async def test_free_slots_are_filled_whatever_each_owner_has(product: Stack) -> None:
    """Ten slots, an owner with one run and another with nine: a fair share that is not used up goes to the other."""
    worker = product.parts[1]
    worker.signal(signal.SIGSTOP)
    runs = []
    for owner in ("few", *["many"] * 9):
        body = {"input": {"name": "ten"}, "owner": owner}
        runs.append((await product.http.post("/v1/tasks/linger/runs", json=body)).json()["id"])
    worker.signal(signal.SIGCONT)

    async def running() -> int:
        return sum([(await product.run(run))["state"] == "running" for run in runs])

    await until(running, lambda seen: seen == 10)


async def test_a_run_whose_claims_answer_was_lost_is_released(product: Stack, ledger: Ledger) -> None:
    """As when the connection breaks after the commit: in the ledger the worker has a run that it does not know of."""
    worker = product.parts[1]
    await product.result(await product.submit("echo", value=0))
    [row] = await ledger.fetch("select id from workers")
    worker.signal(signal.SIGSTOP)
    run_id = await product.submit("echo", value=1)
    [lost] = await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=row["id"], lease=LEASE)
    assert str(lost.id) == run_id
    worker.signal(signal.SIGCONT)
    assert await product.result(run_id) == 1
    assert (await product.run(run_id))["attempts"] == 1
    assert "the answer to its claim was lost" in worker.text


async def test_a_second_signal_releases_runs_at_once(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path, BACKCAST_WORKER__GRACE="PT1H") as product:
        await product.up("api", "worker")
        worker = product.parts[1]
        run_id = await product.submit("linger", name="for ever")
        await product.state(run_id, "running")
        worker.signal(signal.SIGINT)
        await until(lambda: asyncio.to_thread(lambda: worker.text), lambda text: "draining" in text)
        worker.signal(signal.SIGINT)
        assert await worker.ended() == 0
        assert (await product.run(run_id))["state"] == "queued"


async def test_probes_and_metrics(product: Stack) -> None:
    worker = product.parts[1]
    await product.result(await product.submit("echo", value=1))
    async with httpx.AsyncClient(base_url=worker.url) as client:
        assert (await client.get("/livez")).status_code == 200

        async def figures() -> str:
            return (await client.get("/metrics")).text

        # A run is completed in the ledger before its worker counts it.
        ended = 'backcast_attempts_total{outcome="succeeded",task="echo"} 1.0'
        text = await until(figures, lambda text: ended in text)
        assert "backcast_worker_slots 10.0" in text
        (product.folder / "store").rename(product.folder / "gone")
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")


async def test_a_lost_store_delays_results_and_loses_none(product: Stack) -> None:
    (product.folder / "store").rename(product.folder / "gone")
    runs = [await product.submit("nap", seconds=0.01, name="n") for _ in range(20)]
    await until(lambda: asyncio.to_thread(calls, product, "n"), lambda n: n == 20)
    states = {(await product.run(run))["state"] for run in runs}
    assert states == {"running"}, "not completed before it is stored"
    (product.folder / "gone").rename(product.folder / "store")
    for run in runs:
        await product.result(run)
    assert calls(product, "n") == 20, "nothing was computed twice"


async def test_a_result_that_can_not_be_stored_is_computed_a_bounded_number_of_times(
    database: str, tmp_path: Path
) -> None:
    patience = {"BACKCAST_STORE__PATIENCE": "0.1", "BACKCAST_MAX_ATTEMPTS": "2"}
    async with stack(database, tmp_path, **patience) as product:
        await product.up("api", "worker")
        (tmp_path / "store").rename(tmp_path / "gone")
        run = await product.ended(await product.submit("nap", seconds=0.01, name="n"))
        assert (run["state"], run["error"]["code"], run["attempts"]) == ("failed", "store_unavailable", 2), run
        assert calls(product, "n") == 2


async def test_executors_share_the_slots_and_are_replaced_after_so_many_runs(database: str, tmp_path: Path) -> None:
    recycling = {"BACKCAST_WORKER__MAX_RUNS_PER_PROCESS": "6", "BACKCAST_WORKER__PROCESSES": "2"}
    async with stack(database, tmp_path, **recycling, BACKCAST_WORKER__SLOTS="4") as product:
        await product.up("api", "worker")
        lingering = [await product.submit("linger", name="long") for _ in range(2)]
        for run in lingering:
            await product.state(run, "running")
        pids = set[int]()

        async def all_are_replaced() -> bool:
            pids.add(await product.result(await product.submit("who")))
            return len(pids) > 4

        await until(all_are_replaced)
        product.release("long")
        for run in lingering:
            await product.result(run)
            assert (await product.run(run))["attempts"] == 1, "an executor ends when its runs have"


async def test_everything_waits_for_the_database(tmp_path: Path) -> None:
    """Started before there is a database, and through a crash of it: no process exits, no run is lost."""
    data = tmp_path / "pg"
    postgres.prepare(data)
    async with stack(postgres.url(data, "backcast"), tmp_path) as product:
        api, worker, steward = (product.start(name) for name in ("api", "worker", "steward"))
        for part in (api, worker):
            await part.ready("/livez")
            assert (await product.http.get(f"{part.url}/readyz")).status_code == 503
        with postgres.running(data) as database:
            databases.create(database)
            await asyncio.gather(*[part.ready() for part in (api, worker, steward)])
            product.http.base_url = httpx.URL(api.url)
            runs = [await product.submit("linger", name="db") for _ in range(5)]
            await product.state(runs[0], "running")
        answer = await product.http.get(f"/v1/runs/{runs[0]}")
        assert (answer.status_code, answer.json()["code"]) == (503, "ledger_unavailable")
        product.release("db")
        with postgres.running(data):
            for run in runs:
                await product.result(run)


async def test_a_run_that_kills_its_worker_gets_through_on_a_later_attempt(
    database: str, tmp_path: Path, ledger: Ledger
) -> None:
    async with stack(database, tmp_path) as product:
        await product.up("api", "steward", "worker")
        run_id = await product.submit("kill_worker", name="k", times=2)

        async def look() -> dict[str, Any]:
            if product.parts[-1].process.poll() is not None:
                await ledger.execute("update workers set heartbeat_at = now() - interval '1 minute'")
                product.start("worker")
            return await product.run(run_id)

        run = await until(look, lambda run: run["state"] in FINAL, timeout=2 * PATIENCE)
        assert (run["state"], run["attempts"]) == ("completed", 3)


async def test_the_worker_that_dispatches_is_replaced(database: str, tmp_path: Path, ledger: Ledger) -> None:
    """Without a steward, runs that become due are started by the rest of the pool."""
    async with stack(database, tmp_path) as product:
        await product.up("api")
        for _ in range(3):
            await product.up("worker")
        [first] = await ledger.fetch("select id from workers order by id limit 1")
        for part in product.parts[1:3]:
            part.signal(signal.SIGSTOP)
        await ledger.execute("update workers set heartbeat_at = now() - interval '1 minute' where id = $1", first["id"])
        soon = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
        body = {"input": {"value": 1}, "run_at": soon}
        answer = await product.http.post("/v1/tasks/echo/runs", json=body)
        assert await product.result(answer.json()["id"]) == 1


async def test_idle_workers_send_few_statements_over_few_connections(
    database: str, server: postgres.Postgres, tmp_path: Path, ledger: Ledger
) -> None:
    """A heartbeat a second each; one of a pool dispatches too, by five statements."""
    name = database.partition("?")[0].rpartition("/")[2]
    await ledger.execute(f'alter database "{name}" set log_min_duration_statement = 0')
    async with stack(database, tmp_path) as product:
        await product.up("api", "worker", "worker", "worker")
        for run in [await product.submit("echo", value=n) for n in range(50)]:
            await product.result(run)

        async def sessions() -> set[int]:
            rows = await ledger.fetch(
                "select pid from pg_stat_activity where application_name = 'backcast-worker'"
                " and datname = current_database()"
            )
            return {row["pid"] for row in rows}

        pids = await until(sessions, lambda pids: len(pids) <= 4 * 3)  # the first ones try what they have reached
        log, began = server.data.with_name(f"{server.data.name}.log"), time.monotonic()
        before = log.stat().st_size
        await asyncio.sleep(5)
        with log.open("rb") as lines:
            lines.seek(before)
            sent = re.findall(r"\[(\d+)\] LOG:  duration: .* execute ", lines.read().decode())
        seconds = time.monotonic() - began
        assert seconds < sum(int(pid) in pids for pid in sent) <= 11 * (seconds + 1)


async def test_two_stewards_are_safe(database: str, tmp_path: Path, ledger: Ledger) -> None:
    async with stack(database, tmp_path) as product:
        await product.up("steward", "steward")
        first, second = product.parts

        async def leading() -> list[bool]:
            texts = [await asyncio.to_thread(lambda p=part: p.text) for part in (first, second)]
            return ["leading" in text for text in texts]

        found = await until(leading, lambda seen: any(seen))
        assert sum(found) == 1
        (first if found[0] else second).kill()
        await until(leading, lambda seen: all(seen))


async def test_the_whole_product_over_s3(database: str, tmp_path: Path) -> None:
    """Results, large inputs and cache records in a bucket; a lost bucket is waited for and reported."""
    (tmp_path / "s3").mkdir()
    with s3_server(tmp_path / "s3") as s3:
        env = {
            "BACKCAST_STORE__URL": "s3://results/team",
            "BACKCAST_STORE__ENDPOINT": s3.url,
            "BACKCAST_STORE__ACCESS_KEY": s3.access_key,
            "BACKCAST_STORE__SECRET_KEY": s3.secret_key,
            "BACKCAST_STORE__TIMEOUT": f"{PATIENCE:g}",
        }
        async with stack(database, tmp_path, **env) as product:
            made = product.spawn("setup", [sys.executable, "-m", "backcast", "setup"], "")
            assert await made.ended() == 0, made.text
            await product.up("api", "worker")
            large = "x" * 100_000
            run = await product.submit("echo", value=large)
            assert await product.result(run) == large
            other = await product.start("api", BACKCAST_STORE__PUBLIC_ENDPOINT=s3.url).ready()
            answer = await product.http.get(f"{other.url}/v1/runs/{run}/result")
            assert (answer.status_code, answer.headers["location"].startswith(s3.url)) == (307, True)
            async with AsyncClient(other.url) as client:
                assert await client.result(run) == large
            for _ in range(2):
                assert await product.result(await product.submit("counted", name="s3", payload=1)) == 1
            s3.stop()
            waiting = await product.submit("nap", seconds=0, name="away")
            await until(lambda: asyncio.to_thread(calls, product, "away"))
            assert (await product.run(waiting))["state"] == "running"
            answer = await product.http.get("/readyz")
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
            s3.start()
            await product.result(waiting)
            assert calls(product, "away") == 1


async def test_a_worker_whose_executors_nobody_replaces_any_more_ends(ledger: Ledger, tmp_path: Path) -> None:
    settings, metrics, worker_id = Settings(), WorkerMetrics(), uuid7()
    store = open_store(StoreSettings(url=f"file://{tmp_path}/store"))
    executors = Executors(settings.model_copy(update={"max_result": None}), store, metrics, worker_id)
    await executors.run()  # a bug: it should go on for ever
    with pytest.raises(ExceptionGroup, match="TaskGroup"):
        await Worker(settings, ledger, store, executors, metrics, worker_id).run(Stop())
