"""The logs of runs: what their code logs and prints, kept in the store beside the results."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from backcast.ledger import maintenance
from backcast.ledger.connection import Ledger
from backcast.models import log_key, uuid7
from backcast.steward import orphans
from backcast.store import Missing, Store
from tests.integration.test_ledger import submit
from tests.support import ended as homes
from tests.support.stack import Stack, prefect_server, stack
from tests.support.waiting import until

TOKEN = "a secret of the tasks"


@pytest.fixture
async def product(database: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(database, tmp_path, APP_TOKEN=TOKEN) as running:
        await running.up("api", "worker")
        yield running


async def logs(product: Stack, run_id: object) -> list[dict[str, Any]]:
    answer = await product.http.get(f"/v1/runs/{run_id}/logs")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/jsonl"), answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def written(name: str, call: int) -> list[tuple[str, str, str]]:
    """Level, logger and first line of the message, as `sample_tasks.chatter` writes them."""
    return [
        ("INFO", "tests.app", f"call {call} of {name}"),
        ("INFO", "prefect.task_runs", "by Prefect"),
        ("INFO", "stdout", "printed, in parts"),
        ("INFO", "stderr", "to stderr"),
        ("INFO", "stdout", "the token is ***"),
        ("ERROR", "tests.app", "an error"),
        ("INFO", "stdout", "without an end"),
    ]


def short(lines: list[dict[str, Any]], attempt: int) -> list[tuple[str, str, str]]:
    return [
        (line["level"], line["logger"], line["message"].splitlines()[0]) for line in lines if line["attempt"] == attempt
    ]


@pytest.mark.parametrize("task", ["chatter", "chatter_in_a_thread"])
async def test_what_a_task_logs_and_prints(product: Stack, task: str) -> None:
    run_id = await product.submit(task, name=task, fails=1)
    assert await product.result(run_id) == 2
    lines = await logs(product, run_id)
    for attempt in (1, 2):
        assert short(lines, attempt) == written(task, attempt)
    [caught, _] = [line["message"] for line in lines if line["message"].startswith("an error")]
    assert "LookupError: caught" in caught
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    assert "call 1 of" not in product.parts[-1].text, "the log of the worker is as it was"


async def test_a_run_that_fails_or_dies_has_its_log(product: Stack) -> None:
    run_id = await product.submit("chatter", name="f", fails=9)
    assert (await product.ended(run_id))["state"] == "failed"
    assert {line["attempt"] for line in await logs(product, run_id)} == {1, 2, 3, 4}
    dying = await product.submit("log_and_die", name="d")
    await product.state(dying, "running")

    async def lines() -> list[dict[str, Any]]:
        return await logs(product, dying)

    assert [line["message"] for line in await until(lines)] == ["the last words"], "while it runs"
    product.release("d")
    assert (await product.ended(dying))["error"]["code"] == "executor_died"
    assert {line["message"] for line in await lines()} == {"the last words"}


async def test_a_run_that_logs_nothing_stores_nothing(product: Stack) -> None:
    run_id = await product.submit("echo", value=1)
    assert await product.result(run_id) == 1
    assert await logs(product, run_id) == []
    assert not (product.folder / "store" / "logs").exists()
    unknown = await product.http.get(f"/v1/runs/{uuid7()}/logs")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_run")


async def test_a_log_is_bounded_and_what_it_lacks_is_counted(product: Stack) -> None:
    run_id = await product.submit("print_a_lot", lines=10_010)
    await product.result(run_id)
    lines = await logs(product, run_id)
    assert [line["message"] for line in lines[:10_000]] == [f"line {n}" for n in range(10_000)]
    assert [line["message"] for line in lines[10_000:]] == ["10 further lines were dropped"]


async def test_with_prefects_history_it_has_the_same_lines(database: str, tmp_path: Path) -> None:
    async with prefect_server(tmp_path) as prefect:
        env = {"BACKCAST_PREFECT__HISTORY": "true", "BACKCAST_PREFECT__API_URL": prefect.url, "APP_TOKEN": TOKEN}
        async with stack(database, tmp_path, **env) as own:
            await own.up("api", "worker")
            run_id, quiet = await own.submit("chatter", name="p"), await own.submit("echo", value=1)
            assert await own.result(run_id) == 1
            assert await own.result(quiet) == 1
            assert short(await logs(own, run_id), 1) == written("p", 1)
            assert await logs(own, quiet) == []


async def test_logs_are_removed_after_their_run(ledger: Ledger, store: Store) -> None:
    kept = (await submit(ledger)).run.id
    await homes.end(ledger, "failed")
    removed = uuid7()
    for run_id in (kept, removed):
        await store.put(log_key(run_id, 1), b"{}\n")

    async def has(run_id: UUID) -> bool:
        try:
            return await store.get(log_key(run_id, 1)) == b"{}\n"
        except Missing:
            return False

    await orphans.sweep(ledger, store, timedelta(days=1))
    assert await has(removed), "it may be of a run that an older backup lacks"
    await orphans.sweep(ledger, store, timedelta(0))
    assert (await has(kept), await has(removed)) == (True, False)
    await maintenance.remove(ledger, "ended", [kept])
    await orphans.sweep(ledger, store, timedelta(0))
    assert not await has(kept)
