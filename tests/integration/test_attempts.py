"""The attempts of a run, by HTTP: how each ended, with the traceback of the task's code, and none is forgotten."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from backcast.ledger import attempts, recovery, runs, settlement
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Settlement
from backcast.models import Attempts, Problem, Tried
from backcast.worker import results
from tests.integration.test_ledger import LEASE, claim, completed, register, silence, submit
from tests.integration.test_worker import calls
from tests.support.stack import Stack, stack
from tests.support.waiting import until

SECRET = "sk-0123456789abcdef"
FAILED = Problem(code="task_failed", title="The task failed", detail="ValueError: no")


@pytest.fixture
async def product(database: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(database, tmp_path, BACKCAST_WORKER__GRACE="PT0S", SHOP_API_KEY=SECRET) as running:
        await running.up("api", "worker")
        yield running


async def listed(product: Stack, run_id: str) -> list[dict[str, Any]]:
    answer = await product.http.get(f"/v1/runs/{run_id}/attempts")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert [each["number"] for each in found["items"]] == [
        found["left_out"] + n for n in range(1, len(found["items"]) + 1)
    ]
    return list(found["items"])


async def test_a_first_success_is_one_attempt_and_nothing_is_kept(product: Stack, ledger: Ledger) -> None:
    run_id = await product.submit("echo", value=1)
    await product.result(run_id)
    run = await product.run(run_id)
    [only] = await listed(product, run_id)
    assert (only["number"], only["fence"], only["outcome"], only["counts"]) == (1, 1, "succeeded", True)
    assert (only["started_at"], only["ended_at"]) == (run["started_at"], run["finished_at"])
    worker = await ledger.fetchrow("select id, host from workers")
    assert worker is not None
    assert (only["worker_id"], only["host"]) == (str(worker["id"]), worker["host"])
    assert (only["error"], only["traceback"], only["usage"]) == (None, None, None)
    row = await ledger.fetchrow("select attempts from all_runs where id = $1", UUID(run_id))
    assert row is not None
    assert row["attempts"] is None


async def test_retries_are_kept_with_their_tracebacks_and_delays(product: Stack) -> None:
    run_id = await product.submit("flaky", name="f", fails=2)
    await product.result(run_id)
    first, second, last = await listed(product, run_id)
    for number, each in enumerate((first, second), 1):
        assert (each["outcome"], each["error"]["code"]) == ("retrying", "temporarily_failed")
        assert each["error"]["detail"] == f"call {number} of f"
        assert each["retry_delay"] == pytest.approx(0.2, abs=0.1)
        lines = each["traceback"].splitlines()
        assert "sample_tasks.py" in lines[1], "it begins with the task's own code"
        assert lines[-1].endswith(f"TransientError: call {number} of f")
        assert each["started_at"] <= each["ended_at"]
    assert [each["fence"] for each in (first, second, last)] == [1, 2, 3]
    assert (last["outcome"], last["error"], last["traceback"]) == ("succeeded", None, None)
    assert second["ended_at"] <= last["started_at"] <= last["ended_at"]


async def test_retries_that_follow_at_once_are_attempts_of_one_claim(product: Stack) -> None:
    run_id = await product.submit("flaky_at_once", name="o", fails=2)
    await product.result(run_id)
    items = await listed(product, run_id)
    assert [(each["fence"], each["outcome"]) for each in items] == [(1, "retrying")] * 2 + [(1, "succeeded")]
    assert [each["error"] and each["error"]["detail"] for each in items] == [
        "ValueError: call 1 of o",
        "ValueError: call 2 of o",
        None,
    ]
    assert items[0]["ended_at"] == items[1]["started_at"]
    assert items[1]["ended_at"] == items[2]["started_at"]
    failed = await product.submit("flaky_at_once", name="p", fails=9)
    await product.ended(failed)
    assert [each["outcome"] for each in await listed(product, failed)] == ["retrying"] * 3 + ["failed"]


async def test_failures_and_time_outs_show_where_the_code_was(product: Stack) -> None:
    failed, late = await product.submit("fail", kind="fatal"), await product.submit("too_slow")
    await asyncio.gather(product.ended(failed), product.ended(late))
    [attempt] = await listed(product, failed)
    assert (attempt["outcome"], attempt["error"]["code"], attempt["retry_delay"]) == ("failed", "task_failed", None)
    assert "raise {" in attempt["traceback"]
    [attempt] = await listed(product, late)
    assert (attempt["outcome"], attempt["error"]["code"]) == ("timed_out", "timeout")
    assert "await asyncio.sleep(30)" in attempt["traceback"]


async def test_a_long_traceback_is_kept_to_its_end_and_secrets_are_not(product: Stack) -> None:
    message = f"postgres://me:pass@db {SECRET}"
    run_id = await product.submit("deep", message=f"{message} {'é' * 5000}", depth=90)
    run = await product.ended(run_id)
    assert run["error"]["detail"].startswith("ValueError: postgres://me:***@db *** é")
    [attempt] = await listed(product, run_id)
    text = attempt["traceback"]
    assert 6000 < len(text.encode()) <= 8 * 1024
    lines = text.splitlines()
    assert lines[0].startswith("  File "), "whole lines"
    assert lines[-1].startswith("ValueError: postgres://me:***@db *** é")
    assert (lines[-1][-1], "in raises" in lines[-3]) == ("…", True)


async def test_a_running_attempt_is_shown_and_then_cancelled(product: Stack) -> None:
    run_id = await product.submit("linger", name="never")
    await product.state(run_id, "running")
    [attempt] = await listed(product, run_id)
    assert (attempt["number"], attempt["outcome"], attempt["ended_at"]) == (1, "running", None)
    await product.http.post(f"/v1/runs/{run_id}/cancel")
    await product.state(run_id, "cancelled")
    [attempt] = await listed(product, run_id)
    assert (attempt["outcome"], attempt["error"]) == ("cancelled", None)
    assert attempt["ended_at"] is not None


async def test_a_release_is_an_attempt_that_does_not_count(product: Stack) -> None:
    run_id = await product.submit("linger", name="long")
    await until(lambda: asyncio.to_thread(calls, product, "long"))
    product.parts[1].signal(signal.SIGTERM)
    assert await product.parts[1].ended() == 0
    [released] = await listed(product, run_id)
    assert (released["outcome"], released["counts"], released["error"]) == ("released", False, None)
    product.release("long")
    await product.start("worker").ready()
    await product.result(run_id)
    first, last = await listed(product, run_id)
    assert (first, last["outcome"], last["counts"]) == (released, "succeeded", True)
    assert (await product.run(run_id))["attempts"] == 1


async def test_a_run_that_is_released_without_end_fails(product: Stack, ledger: Ledger) -> None:
    product.parts[1].signal(signal.SIGTERM)
    assert await product.parts[1].ended() == 0
    runs = [await product.submit("echo", value=n) for n in range(2)]
    for run, releases in zip(runs, (99, 100), strict=True):
        await ledger.execute(
            "update runs set attempts = json_build_object('left_out', $2::int, 'newest', '[]'::json) where id = $1",
            UUID(run),
            releases,
        )
    await product.start("worker").ready()
    assert await product.result(runs[0]) == 0
    failed = await product.ended(runs[1])
    assert (failed["error"]["code"], failed["attempts"]) == ("released_too_often", 1)
    page = await product.http.get("/problems/released_too_often")
    assert page.status_code == 200


async def test_unknown_runs_and_those_that_have_not_begun(product: Stack) -> None:
    answer = await product.http.get(f"/v1/runs/{uuid4()}/attempts")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_run")
    waiting = await product.http.post(
        "/v1/tasks/echo/runs", json={"input": {"value": 1}, "run_at": "2100-01-01T00:00:00Z"}
    )
    assert await listed(product, waiting.json()["id"]) == []


# -- in the ledger ----------------------------------------------------------------------------------------------------


async def again(ledger: Ledger, worker: UUID, **fields: Any) -> Claim:
    """Claim the only run, and settle it for another attempt at once."""
    [taken] = await claim(ledger, worker)
    settled = Settlement(id=taken.id, fence=taken.fence, state="queued", lane=taken.lane, error=FAILED, **fields)
    assert (await settlement.settle(ledger, worker, [settled])).accepted
    return taken


async def shown(ledger: Ledger, run: UUID) -> Attempts:
    return await attempts.get(ledger, run)


async def test_the_newest_ten_are_kept_and_the_others_counted(ledger: Ledger) -> None:
    worker, run = await register(ledger), (await submit(ledger)).run.id
    for n in range(1, 14):
        await again(ledger, worker, retries_used=n, usage={"model": "m", "input_tokens": n, "output_tokens": 0})
    found = await shown(ledger, run)
    assert found.left_out == 3
    assert [(each.number, each.fence) for each in found.items] == [(n, n) for n in range(4, 14)]
    assert [each.usage and each.usage["input_tokens"] for each in found.items] == list(range(4, 14))
    [taken] = await claim(ledger, worker)
    tried = Tried(FAILED, "", 0.0, 1.0)
    done = completed(taken)._replace(counts=40, retries_used=52, earlier=[tried] * 10)
    assert (await settlement.settle(ledger, worker, [done])).accepted
    found = await shown(ledger, run)
    assert (found.left_out, [each.number for each in found.items]) == (42, list(range(43, 54)))
    assert [each.outcome for each in found.items] == ["retrying"] * 10 + ["succeeded"]


async def test_releases_are_known_to_the_next_claim(ledger: Ledger) -> None:
    worker = await register(ledger)
    await submit(ledger)
    for n in range(12):
        [taken] = await claim(ledger, worker)
        assert taken.releases == n
        released = results.released(taken.id, taken, has_started=True)
        assert (await settlement.settle(ledger, worker, [released])).accepted
    for n in range(1, 3):
        assert (await again(ledger, worker, retries_used=n)).releases == 12, "what counts is no release"
    [taken] = await claim(ledger, worker)
    assert (taken.releases, taken.attempts_used) == (12, 2)


async def test_the_tokens_of_the_last_attempt_are_those_of_no_other(ledger: Ledger) -> None:
    worker, run = await register(ledger), (await submit(ledger)).run.id
    await again(ledger, worker, retries_used=1, usage={"model": "m", "input_tokens": 3, "output_tokens": 1})
    [taken] = await claim(ledger, worker)
    done = completed(taken)._replace(usage={"model": "m", "input_tokens": 5, "output_tokens": 2}, retries_used=1)
    await settlement.settle(ledger, worker, [done])
    assert [each.usage for each in (await shown(ledger, run)).items] == [
        {"model": "m", "input_tokens": 3, "output_tokens": 1},
        {"model": "m", "input_tokens": 5, "output_tokens": 2},
    ]


async def test_lost_attempts_are_kept_whether_they_count_or_not(ledger: Ledger) -> None:
    worker = await register(ledger)
    once, fresh = (await submit(ledger)).run.id, (await submit(ledger)).run.id
    await ledger.execute("update runs set attempts_used = 1 where id = $1", once)  # it had been lost before
    await claim(ledger, worker)
    await silence(ledger, worker)
    await recovery.requeue(ledger, LEASE)
    for run, counts in ((once, True), (fresh, False)):
        [attempt] = (await shown(ledger, run)).items
        assert (attempt.outcome, attempt.counts, attempt.fence) == ("lost", counts, 1)
        assert attempt.error is not None
        assert (attempt.error.code, attempt.host, attempt.worker_id) == ("worker_lost", "h", worker)
    other = await register(ledger)
    await ledger.execute("update runs set attempts_used = 2 where id = $1", once)
    await claim(ledger, other)
    await ledger.execute("update runs set prefetched = false")
    await silence(ledger, other)
    await recovery.requeue(ledger, LEASE)
    assert (await runs.get(ledger, once)).state == "failed"
    assert [each.outcome for each in (await shown(ledger, once)).items] == ["lost", "lost"]


async def test_a_prefetched_run_that_was_lost_or_released_has_made_no_attempt(ledger: Ledger) -> None:
    worker, run = await register(ledger), (await submit(ledger)).run.id
    [taken] = await claim(ledger, worker)
    back = Settlement(id=run, fence=taken.fence, state="queued", counts=0, has_started=False)
    await settlement.settle(ledger, worker, [back])
    await claim(ledger, worker)
    await ledger.execute("update runs set prefetched = true")
    await silence(ledger, worker)
    await recovery.requeue(ledger, LEASE)
    assert (await shown(ledger, run)).items == []


async def test_a_success_after_its_cancel_is_a_cancelled_attempt(ledger: Ledger) -> None:
    worker, run = await register(ledger), (await submit(ledger)).run.id
    [taken] = await claim(ledger, worker)
    await runs.cancel(ledger, run)
    await settlement.settle(ledger, worker, [completed(taken)])
    [attempt] = (await shown(ledger, run)).items
    assert attempt.outcome == "cancelled"


async def test_a_report_sent_twice_is_kept_once(ledger: Ledger) -> None:
    worker, run = await register(ledger), (await submit(ledger)).run.id
    [taken] = await claim(ledger, worker)
    failed = Settlement(id=run, fence=taken.fence, state="failed", error=FAILED)
    await asyncio.gather(*[settlement.settle(ledger, worker, [failed]) for _ in range(5)])
    [attempt] = (await shown(ledger, run)).items
    assert (attempt.outcome, attempt.error) == ("failed", FAILED)


@pytest.mark.parametrize(
    "value",
    [
        "[]",
        "3",
        '{"newest": 1}',
        '{"left_out": "x", "newest": []}',
        '{"left_out": 0, "newest": [1, {"report": 2}]}',
        r'{"left_out": 0, "newest": ["\u0000"]}',
        r'{"left_out": 0, "newest": ["\ud800"]}',
    ],
)
async def test_kept_attempts_that_cannot_be_read_keep_no_run_from_its_end(ledger: Ledger, value: str) -> None:
    worker, run = await register(ledger), (await submit(ledger)).run.id
    await ledger.execute("update runs set attempts = $1", value)
    assert (await shown(ledger, run)).items == []
    await claim(ledger, worker)
    await silence(ledger, worker)
    await recovery.requeue(ledger, LEASE)
    other = await register(ledger)
    [taken] = await claim(ledger, other)
    await settlement.settle(
        ledger,
        other,
        [Settlement(id=run, fence=taken.fence, state="failed", error=FAILED, traceback="\x00 \ud800 \\u0000")],
    )
    assert (await runs.get(ledger, run)).state == "failed"
    assert [each.outcome for each in (await shown(ledger, run)).items][-2:] == ["lost", "failed"]


async def test_a_text_that_shows_escapes_keeps_the_attempts_before_it(ledger: Ledger) -> None:
    run = (await submit(ledger)).run.id
    worker = await register(ledger)
    for _ in range(3):
        [taken] = await claim(ledger, worker)
        quoting = r'ValueError: {"smile": "\ud83d\ude00"}'
        again = Settlement(id=run, fence=taken.fence, state="queued", error=FAILED, traceback=quoting)
        await settlement.settle(ledger, worker, [again])
    assert [each.traceback for each in (await shown(ledger, run)).items] == [quoting] * 3


async def test_the_openapi_document_has_the_route(product: Stack) -> None:
    async with httpx.AsyncClient(base_url=product.http.base_url) as client:
        document = (await client.get("/openapi.json")).json()
    assert "/v1/runs/{run_id}/attempts" in document["paths"]
