"""`Prefer: wait=N` against a real API process: bounded, woken by the ledger, ended with its client or its server."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import asyncpg
import httpx
import pytest

from backcast.ledger import claims, fleet, runs, settlement
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Settlement
from backcast.local import postgres
from backcast.models import TaskType, uuid7
from tests.integration.test_ledger import LEASE
from tests.support import ended
from tests.support.stack import Stack, stack
from tests.support.waiting import PATIENCE, until

MOST = 20
WAIT = {"Prefer": "wait=50"}
TASKS = [TaskType(name=name, pool="default", input_schema={}) for name in ("echo", "create_structured_output")]


@pytest.fixture
async def worker(ledger: Ledger) -> UUID:
    worker = uuid7()
    await fleet.register(ledger, worker, pool="default", host="h", version="1", slots=10, tasks=TASKS)
    return worker


@pytest.fixture
async def served(database: str, worker: UUID, tmp_path: Path) -> AsyncIterator[Stack]:
    limits = {"BACKCAST_API__MAX_WAITS": str(MOST), "BACKCAST_DATABASE__POOL": "2"}
    async with stack(database, tmp_path, **limits) as running:
        await running.up("api")
        running.http.timeout = httpx.Timeout(PATIENCE, pool=None)
        yield running


async def end(ledger: Ledger, worker: UUID, *, limit: int = 100) -> None:
    """Complete queued runs, as a worker does."""
    for claim in await claims.claim(ledger, pool="default", cursor=0, limit=limit, worker_id=worker, lease=LEASE):
        done = Settlement(id=claim.id, fence=claim.fence, state="completed", result="1", result_key="results/x")
        assert (await settlement.settle(ledger, worker, [done])).accepted


async def held(ledger: Ledger) -> bool:
    """Whether a process listens for ends: then it holds a wait, which has been read as not ended."""
    rows = await ledger.fetch("select query from pg_stat_activity where application_name = 'backcast-api'")
    return any(row["query"].startswith(runs.MARK) for row in rows)


async def test_many_wait_and_others_submit_meanwhile(served: Stack, ledger: Ledger, worker: UUID) -> None:
    ids = [await served.submit("echo") for _ in range(MOST)]
    waits = [asyncio.create_task(served.http.get(f"/v1/runs/{run_id}", headers=WAIT)) for run_id in ids]
    await until(lambda: held(ledger))
    for _ in range(50):
        await served.submit("echo")
    await end(ledger, worker)
    for wait in waits:
        answer = await wait
        assert (answer.json()["state"], answer.headers["preference-applied"]) == ("completed", "wait=50")


@pytest.mark.parametrize("path", ["/v1/tasks/echo/runs", "/tasks"])
async def test_a_submission_may_wait_for_its_end(served: Stack, ledger: Ledger, worker: UUID, path: str) -> None:
    body = {"input": {}} if path != "/tasks" else {"payload": "1", "target_type": "int"}
    waiting = asyncio.create_task(served.http.post(path, json=body, headers=WAIT))
    await until(lambda: held(ledger))
    await end(ledger, worker)
    answer = await waiting
    assert answer.headers["preference-applied"] == "wait=50"
    status = (await served.http.get(answer.headers["location"], headers=WAIT)).json()
    if path == "/tasks":
        assert answer.status_code == 202
        assert status == {**answer.json(), "status": "completed", "result": 1}
    else:
        assert (answer.status_code, answer.json()["state"]) == (200, "completed")
        assert status == answer.json()
    at_once = await served.http.post(path, json=body, headers={"Prefer": "wait=0"})
    assert (at_once.status_code, at_once.headers["preference-applied"]) == (202, "wait=0")


@pytest.mark.parametrize("verb", ["cancel", "expire"])
async def test_every_end_wakes(served: Stack, ledger: Ledger, worker: UUID, verb: str) -> None:
    run_id = await served.submit("echo")
    waiting = asyncio.create_task(served.http.get(f"/v1/runs/{run_id}", headers=WAIT))
    await until(lambda: held(ledger))
    if verb == "cancel":
        await served.http.post(f"/v1/runs/{run_id}/cancel")
    else:  # without a word from the process that does it
        await ended.end(ledger, "expired")
    assert (await waiting).json()["state"] in ("cancelled", "expired")


async def test_new_waits_do_not_delay_the_poll(served: Stack, ledger: Ledger, worker: UUID) -> None:
    first = await served.submit("echo")
    waiting = asyncio.create_task(served.http.get(f"/v1/runs/{first}", headers=WAIT))
    await until(lambda: held(ledger))
    await ended.end(ledger, "expired", "id = $1", UUID(first))  # without a word
    others = list[asyncio.Task[httpx.Response]]()
    began = time.monotonic()
    while not waiting.done() and time.monotonic() < began + 30:
        other = await served.submit("echo")
        others.append(asyncio.create_task(served.http.get(f"/v1/runs/{other}", headers={"Prefer": "wait=2"})))
        await asyncio.sleep(0.3)
    assert waiting.done(), "it would be answered after 50 s"
    await asyncio.gather(*others)


async def test_more_waits_than_may_be_are_answered_at_once_until_a_client_leaves(served: Stack, ledger: Ledger) -> None:
    run_id = await served.submit("echo")
    path = f"/v1/runs/{run_id}"

    async def applied() -> bool:
        answer = await served.http.get(path, headers={"Prefer": "wait=1"})
        return "preference-applied" in answer.headers

    async with httpx.AsyncClient(base_url=served.http.base_url, timeout=PATIENCE) as leaving:
        waits = [asyncio.create_task(leaving.get(path, headers=WAIT)) for _ in range(MOST + 1)]
        [one], _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        assert (one.result().json()["state"], one.result().headers["retry-after"]) == ("queued", "1")
        assert not await applied()
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    await until(applied)


async def test_a_stop_answers_those_who_wait(served: Stack, ledger: Ledger) -> None:
    run_id = await served.submit("echo")
    waiting = asyncio.create_task(served.http.get(f"/v1/runs/{run_id}", headers=WAIT))
    await until(lambda: held(ledger))
    [api] = served.parts
    api.signal(signal.SIGTERM)
    assert (await waiting).json()["state"] == "queued"
    await api.ended()


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/tasks/echo/runs", {"input": {}}), ("/tasks", {"payload": "1", "target_type": "int"})],
)
async def test_a_recorded_run_is_answered_without_the_database(
    served: Stack, ledger: Ledger, server: postgres.Postgres, path: str, body: dict[str, object]
) -> None:
    waiting = asyncio.create_task(served.http.post(path, json=body, headers=WAIT))
    await until(lambda: held(ledger))
    [[name]] = await ledger.fetch("select current_database()")
    admin = await asyncpg.connect(server.url())
    await admin.execute(f'alter database "{name}" allow_connections false')
    await admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", name)
    await admin.close()
    [api] = served.parts
    api.signal(signal.SIGTERM)
    answer = await waiting
    assert (answer.status_code, "location" in answer.headers) == (202, True), answer.text
    await api.ended()


async def test_a_lost_connection_is_opened_again(served: Stack, ledger: Ledger, worker: UUID) -> None:
    run_id = await served.submit("echo")
    waiting = asyncio.create_task(served.http.get(f"/v1/runs/{run_id}", headers=WAIT))
    await until(lambda: held(ledger))
    with contextlib.suppress(Exception):
        await ledger.fetch(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'backcast-api'"
        )
    await end(ledger, worker)
    assert (await waiting).json()["state"] == "completed"
