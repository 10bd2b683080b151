"""The logs of runs: what their code logs and prints, kept in the store beside the results."""

import itertools
import json
import signal
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from backcast.ledger import maintenance
from backcast.ledger.connection import Ledger
from backcast.models import log_key, uuid7
from backcast.steward import orphans
from backcast.store import Missing, Store
from tests.integration.test_ledger import submit
from tests.support import ended as homes
from tests.support.stack import Stack, prefect_server, stack
from tests.support.streams import Sent, all_of
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


class Reader:
    """Reads the lines of a log that goes on."""

    def __init__(self, product: Stack, run_id: object) -> None:
        self._open = product.http.stream("GET", f"/v1/runs/{run_id}/logs", params={"follow": "true"})

    async def __aenter__(self) -> "Reader":
        answer = await self._open.__aenter__()
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/jsonl")
        self._lines = answer.aiter_lines()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._open.__aexit__(*error)

    async def next(self) -> dict[str, Any] | None:
        """The next line; None after the last one."""
        async for line in self._lines:
            if line:
                return json.loads(line)
        return None

    async def rest(self) -> list[dict[str, Any]]:
        """All further lines, to the end of the run."""
        return [json.loads(line) async for line in self._lines if line]


async def test_a_log_that_is_read_is_stored_before_those_that_nobody_reads(product: Stack) -> None:
    """All logs are stored every 10 s, in the order of their first lines; so the second one is stored alone only because
    somebody reads it."""
    quiet, read = [await product.submit("log_when_released", name=name, lines=1000) for name in ("q", "r")]
    for run_id, name in ((quiet, "q"), (read, "r")):
        async with Reader(product, run_id) as reader:
            product.release(f"{name}-0")
            assert (await reader.next() or {})["message"] == "line 0"
    numbers = itertools.count(1)
    async with Reader(product, read) as reader:
        await reader.next()

        async def is_stored_alone() -> bool:
            number = next(numbers)
            product.release(f"q-{number}")
            product.release(f"r-{number}")
            assert (await reader.next() or {})["message"] == f"line {number}"
            return len(await logs(product, quiet)) <= number

        await until(is_stored_alone)
        await product.http.post(f"/v1/runs/{read}/cancel")
        await reader.rest()


async def test_a_log_is_followed_through_all_attempts_to_the_end(product: Stack) -> None:
    dying = await product.submit("log_and_die", name="a")
    async with Reader(product, dying) as reader:
        assert (await reader.next() or {})["message"] == "the last words"
        product.release("a")
        await reader.rest()
    assert (await product.run(dying))["state"] == "failed"
    retrying = await product.submit("report_and_log", name="b", fails=2)
    async with Reader(product, retrying) as reader:
        lines = await reader.rest()
    assert lines == await logs(product, retrying)
    assert [line["attempt"] for line in lines] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    waits = await product.http.post(
        "/v1/tasks/echo/runs", json={"input": {"value": 1}, "run_at": "2099-01-01T00:00:00Z"}
    )
    async with Reader(product, waits.json()["id"]) as reader:
        await product.http.post(f"/v1/runs/{waits.json()['id']}/cancel")
        assert await reader.next() is None
    unknown = await product.http.get(f"/v1/runs/{uuid7()}/logs", params={"follow": "true"})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_run")


async def test_a_log_that_is_not_complete_is_broken_off_when_its_process_ends(product: Stack) -> None:
    run_id = await product.submit("log_when_released", name="b", lines=2)
    async with Reader(product, run_id) as reader:
        product.release("b-0")
        assert await reader.next()
        product.parts[0].signal(signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            await reader.next()
    assert "Traceback" not in product.parts[0].text


@pytest.mark.parametrize("task", ["chatter", "report_and_log"])
async def test_lines_are_events_for_those_who_ask(product: Stack, task: str) -> None:
    """Each once and in order, from whatever event a reader goes on, on whatever API process."""
    run_id = await product.submit(task, name=task, fails=1)
    path = f"/v1/runs/{run_id}/events?logs=true"
    live = await all_of(product.http, path)
    lines = [each.data for each in live if each.name == "log"]
    assert lines == await logs(product, run_id)
    assert len(lines) > 2
    assert [each.name for each in live[:2]] == ["queued", "started"]
    assert live[-1].name == "ended"

    other = product.start("api")
    await other.ready()
    async with httpx.AsyncClient(base_url=other.url, timeout=product.http.timeout) as elsewhere:
        late = await all_of(elsewhere, path)
        assert sorted(each.name for each in late) == sorted(each.name for each in live)
        for sent in (late, live):
            assert len({each.id for each in sent}) == len(sent)
            for place, last in enumerate(sent[:-1], 1):
                rest = await all_of(elsewhere, path, last=last.id)
                assert _seen(rest) == _seen(sent[place:])
    assert not [each for each in await all_of(product.http, path.partition("?")[0]) if each.name == "log"]


def _seen(sent: list[Sent]) -> tuple[list[Any], list[Any]]:
    """Lines and other events: each kind has its order."""
    lines = [each.data for each in sent if each.name == "log"]
    return lines, [(each.name, each.data.get("attempt"), each.data.get("data")) for each in sent if each.name != "log"]


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
