"""Operations: many runs repeated or cancelled by one request, in pages that the steward makes, once each."""

import asyncio
import itertools
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from backcast.errors import StoreUnavailable
from backcast.ledger import claims, lanes, limits, maintenance, operations, runs, selection, submissions
from backcast.ledger.connection import Ledger
from backcast.ledger.operations import Retry, Work
from backcast.models import Limits, Selection, State, Submission, uuid7
from backcast.settings import Store as StoreSettings
from backcast.steward.operations import Operations
from backcast.steward.retention import Retention
from backcast.store import Store, open_store
from tests.integration.test_again import LARGE, ROW
from tests.integration.test_api import ECHO, api, problem, worker
from tests.integration.test_ledger import LEASE
from tests.support import ended as homes
from tests.support.stack import stack
from tests.support.waiting import PATIENCE, until

__all__ = ["api", "worker"]

DAY = 24 * 3600.0


async def add(ledger: Ledger, count: int, **fields: Any) -> list[UUID]:
    """Queued runs of the task `echo`."""
    batch = fields.pop("batch", None)
    rows = [
        submissions.new(ECHO, Submission(**fields), input_text=json.dumps({"value": n}), input_hash=b"", batch_id=batch)
        for n in range(count)
    ]
    for start in range(0, count, 500):
        await ledger.fetch(submissions.INSERT, *submissions.columns(rows[start : start + 500]))
    return [row.id for row in rows]


async def add_ended(ledger: Ledger, count: int, state: str = "failed", **fields: Any) -> list[UUID]:
    ids = await add(ledger, count, **fields)
    await homes.end(ledger, state, "id = any($1)", ids)
    return ids


async def ask(api: httpx.AsyncClient, verb: str, **body: Any) -> dict[str, Any]:
    answer = await api.post(f"/v1/runs/{verb}", json=body)
    assert answer.status_code == (200 if body.get("dry_run") else 202), answer.text
    if answer.status_code == 202:
        assert answer.headers["location"] == f"/v1/operations/{answer.json()['id']}"
        assert answer.headers["retry-after"] == "1"
    return dict(answer.json())


async def seen(api: httpx.AsyncClient, operation: dict[str, Any]) -> dict[str, Any]:
    answer = await api.get(f"/v1/operations/{operation['id']}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def counts(operation: dict[str, Any]) -> tuple[str, int, int, int]:
    return operation["state"], operation["done"], operation["skipped"], operation["failed"]


async def retried(ledger: Ledger) -> list[UUID]:
    """The runs that have been repeated, once for each time."""
    rows = await ledger.fetch("select retry_of from all_runs where retry_of is not null order by retry_of")
    linked = await ledger.fetch("select run_id from retries order by run_id")
    assert [row["retry_of"] for row in rows] == [row["run_id"] for row in linked]
    return [row["retry_of"] for row in rows]


# -- retry -------------------------------------------------------------------------------------------------------------


async def test_the_failed_and_expired_runs_are_repeated(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    fields = {"owner": "ana", "priority": 4, "lane": "wide", "metadata": {"a": "b"}}
    wanted = await add_ended(ledger, 600, **fields) + await add_ended(ledger, 3, "expired", owner="ana")
    for state in ("completed", "cancelled"):
        await add_ended(ledger, 2, state, owner="ana")
    await add(ledger, 2, owner="ana")
    await add_ended(ledger, 2, owner="bo")
    late = uuid7(3 * DAY)
    await homes.add(ledger, late, since=60, **{**ROW, "owner": "ana"})
    wanted.append(late)
    assert await ask(api, "retry", owner="ana", dry_run=True) == {"runs": 604, "more": False}
    assert await retried(ledger) == []
    operation = await ask(api, "retry", owner="ana")
    assert (operation["kind"], *counts(operation)) == ("retry", "running", 0, 0, 0)
    assert {name: value for name, value in operation["filter"].items() if value} == {"owner": "ana"}
    await Operations(ledger, store)()
    after = await seen(api, operation)
    assert counts(after) == ("completed", 604, 0, 0)
    assert after["finished_at"] >= after["created_at"]
    assert await retried(ledger) == sorted(wanted)
    old = (await api.get(f"/v1/runs/{wanted[1]}")).json()
    [new_id] = old["retried_by"]
    new = (await api.get(f"/v1/runs/{new_id}")).json()
    assert {name: new[name] for name in fields} == fields
    assert (new["state"], new["attempts"], new["retry_of"], new["error"]) == ("queued", 0, str(wanted[1]), None)
    assert (await api.get(f"/v1/runs/{new_id}/input")).json() == {"value": 1}
    claimed = await claims.claim(ledger, pool="default", cursor=0, limit=1000, worker_id=worker, lease=LEASE)
    assert len(claimed) == 606, "workers can take them all"


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled", "expired"])
async def test_each_filter_holds(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID, state: str
) -> None:
    batch = uuid7()
    made = dict[tuple[str, str, bool], UUID]()
    for ended, owner, batched in itertools.product(("completed", "failed", "cancelled"), ("a", "b"), (True, False)):
        [made[ended, owner, batched]] = await add_ended(ledger, 1, ended, owner=owner, batch=batch if batched else None)
    for filters in ({"batch": str(batch)}, {"owner": "a"}, {"batch": str(batch), "owner": "a"}, {"task": "echo"}):
        expected = sorted(
            run
            for (ended, owner, batched), run in made.items()
            if ended == state and (batched or "batch" not in filters) and (owner == "a" or "owner" not in filters)
        )
        assert (await ask(api, "retry", state=state, dry_run=True, **filters))["runs"] == len(expected), filters
        await ask(api, "retry", state=state, **filters)
        await Operations(ledger, store)()
        assert await retried(ledger) == expected, filters
        await ledger.execute("delete from runs where retry_of is not null")
        await ledger.execute("delete from retries")
    assert (await ask(api, "retry", state=state, task="other", dry_run=True))["runs"] == 0


async def test_the_filters_of_the_list_choose_the_same_runs(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    hour, now = timedelta(hours=1), datetime.now(UTC)
    error = {"code": "worker_lost", "title": "t", "detail": "The Worker\u0020was lost"}
    run = uuid7(7200)
    row = {**ROW, "error": json.dumps(error), "metadata": json.dumps({"a": "b", "c": "d"}), "lane": "wide"}
    await homes.add(ledger, run, since=5400, **row, worker_id=worker)
    for other in (uuid7(7 * DAY), uuid7(1)):
        await homes.add(ledger, other, since=0.5, **ROW)
    ago = {"created_after": now - 3 * hour, "created_before": now - hour, "ended_after": now - 2 * hour}
    times = {name: at.isoformat() for name, at in (ago | {"ended_before": now - hour}).items()}
    chosen: list[dict[str, Any]] = [
        {"lane": "wide"}, {"worker": str(worker)}, {"error": "worker_lost"}, {"text": "worker WAS"},
        {"metadata": {"a": "b"}}, {"metadata": {"a": "b", "c": "d"}},
        {"created_after": times["created_after"], "created_before": times["created_before"]},
        {"ended_after": times["ended_after"], "ended_before": times["ended_before"]},
        {"owner": "me", "lane": "wide", "error": "worker_lost", **times},
    ]  # fmt: skip
    for filters in chosen:
        assert (await ask(api, "retry", dry_run=True, **filters))["runs"] == 1, filters
        await ask(api, "retry", **filters)
        await Operations(ledger, store)()
    assert await retried(ledger) == [run] * len(chosen)
    for filters in ({"lane": "narrow"}, {"error": "none"}, {"text": "100%"}, {"metadata": {"a": "c"}}):
        assert (await ask(api, "retry", dry_run=True, **filters))["runs"] == 0, filters
    await ledger.execute("delete from runs")
    await add(ledger, 1, lane="wide", metadata={"x": "y"})
    await add(ledger, 2)
    for filters in ({"lane": "wide"}, {"metadata": {"x": "y"}}):
        assert (await ask(api, "cancel", dry_run=True, **filters))["runs"] == 1, filters
    for body in (
        {"error": "\0"},
        {"metadata": {"a": "\0"}},
        {"metadata": {}},
        {"metadata": {str(n): "" for n in range(6)}},
    ):
        problem(await api.post("/v1/runs/retry", json=body), 422, "invalid_input")
    problem(await api.post("/v1/runs/cancel", json={"ended_after": times["ended_after"]}), 422, "invalid_input")


async def test_what_ends_later_is_left_alone(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    before = await add_ended(ledger, 2)
    operation = await ask(api, "retry", task="echo")
    await add_ended(ledger, 2)
    await Operations(ledger, store)()
    assert await retried(ledger) == before
    await homes.end(ledger, "failed")  # the new ones too
    await ledger.execute("update operations set state = 'running', cursor = $1", selection.FIRST)
    await Operations(ledger, store)()
    assert (await seen(api, operation))["done"] == 4, "the same two once more"
    assert set(await retried(ledger)) == set(before)


async def work(ledger: Ledger) -> Work:
    [one] = await operations.running(ledger)
    return one


async def test_a_page_is_made_once_whoever_makes_it(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    """Two stewards that both lead, and one that was stopped after it had read a page."""
    ids = await add_ended(ledger, 900)
    await ask(api, "retry", state="failed")
    at = await work(ledger)
    page = await operations.find(ledger, at, at.cursor)
    again = [Retry(run, uuid7(), None) for run in page.runs]
    assert len(again) == selection.PAGE
    await asyncio.gather(*[Operations(ledger, store)() for _ in range(3)])
    assert not await operations.retry(ledger, at, page, again, failed=0, stored_until=None)
    assert await retried(ledger) == ids


async def test_a_steward_that_dies_repeats_nothing(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    ids = await add_ended(ledger, 3 * selection.PAGE)
    operation = await ask(api, "retry", state="failed")
    for n in range(2):  # a page, and then no more of this steward
        at = await work(ledger)
        page = await operations.find(ledger, at, at.cursor)
        rows = [Retry(run, uuid7(), None) for run in page.runs]
        assert await operations.retry(ledger, at, page, rows, failed=0, stored_until=None)
        assert counts(await seen(api, operation)) == ("running", (n + 1) * selection.PAGE, 0, 0)
    await Operations(ledger, store)()
    assert counts(await seen(api, operation)) == ("completed", len(ids), 0, 0)
    assert await retried(ledger) == ids


async def test_large_inputs_are_copied_and_those_that_are_gone_are_counted(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID, tmp_path: Path
) -> None:
    ids = [(await api.post("/v1/tasks/echo/runs", json={"input": {"value": LARGE}})).json()["id"] for _ in range(3)]
    await homes.end(ledger, "failed")
    await store.delete([f"inputs/{ids[1]}.json"])
    operation = await ask(api, "retry", state="failed")
    await add(ledger, 1, owner="bo")
    other = await ask(api, "cancel", owner="bo")
    away = open_store(StoreSettings(url=f"file://{tmp_path}/not-mounted"))
    with pytest.raises(StoreUnavailable):
        await Operations(ledger, away)()
    await away.aclose()
    assert counts(await seen(api, operation)) == ("running", 0, 0, 0)
    assert (await seen(api, other))["state"] == "completed", "one that can't go on holds up no other"
    await Operations(ledger, store)()
    assert counts(await seen(api, operation)) == ("completed", 2, 0, 1)
    await store.delete(f"inputs/{run}.json" for run in ids)
    for run in await ledger.fetch("select id from runs"):
        assert (await api.get(f"/v1/runs/{run['id']}/input")).json() == {"value": LARGE}
    assert await retried(ledger) == [UUID(ids[0]), UUID(ids[2])]


async def test_inputs_that_were_stored_too_long_ago_are_not_used(
    api: httpx.AsyncClient, ledger: Ledger, worker: UUID
) -> None:
    await add_ended(ledger, 1)
    await ask(api, "retry", state="failed")
    at = await work(ledger)
    page = await operations.find(ledger, at, at.cursor)
    row = await ledger.fetchrow("select now() - interval '1 second' as past")
    assert row is not None
    rows = [Retry(run, uuid7(), "inputs/a.json") for run in page.runs]
    assert not await operations.retry(ledger, at, page, rows, failed=0, stored_until=row["past"])
    assert await work(ledger) == at


async def test_limits_of_lanes_hold_for_repeated_runs(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    await add_ended(ledger, 5, lane="narrow")
    await limits.limit(ledger, "narrow", Limits(max_running=2))
    await ask(api, "retry", state="failed")
    await Operations(ledger, store)()
    found = (await api.get("/v1/lanes/narrow")).json()
    assert (found["queued"], found["held"]) == (2, 3)


async def test_a_pause_holds_for_repeated_runs_and_a_cancel_for_paused_ones(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    await add_ended(ledger, 3)
    assert (await api.post("/v1/tasks/echo/pause", json={})).status_code == 200
    await ask(api, "retry", state="failed")
    await Operations(ledger, store)()
    assert await claims.claim(ledger, pool="default", cursor=0, limit=9, worker_id=worker, lease=LEASE) == []
    assert len(await ledger.fetch("select from runs where state = 'paused'")) == 3
    operation = await ask(api, "cancel", state="queued")
    await Operations(ledger, store)()
    assert (await seen(api, operation))["done"] == 3


async def test_the_failed_and_expired_runs_of_a_batch_are_repeated_as_a_new_batch(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    values = [n if n % 3 else f"{n}{LARGE}" for n in range(300)]
    lines = "\n".join(json.dumps({"task": "echo", "owner": "ana", "input": {"value": value}}) for value in values)
    answer = await api.post("/v1/batches", content=lines, headers={"content-type": "application/jsonl"})
    batch = answer.json()["id"]
    rows = await ledger.fetch("select id from runs order by id")
    for n, state in enumerate(("completed", "cancelled", "expired", "failed")):
        await homes.end(ledger, state, "id = any($1)", [row["id"] for row in rows[n::5]])
    before = (await api.get(f"/v1/batches/{batch}")).json()
    key = {"Idempotency-Key": "k"}
    answers = [await api.post(f"/v1/batches/{batch}/retry", headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202], answers[0].text
    assert "idempotent-replayed" in answers[1].headers
    operation = answers[0].json()
    assert answers[1].json() == operation
    assert answers[0].headers["location"] == f"/v1/operations/{operation['id']}"
    assert operation["filter"]["batch"] == batch
    growing = (await api.get(f"/v1/batches/{operation['batch_id']}")).json()
    assert (growing["size"], growing["operation_id"]) == (0, operation["id"])
    await Operations(ledger, store)()
    assert counts(await seen(api, operation)) == ("completed", 120, 0, 0)
    new = (await api.get(f"/v1/batches/{operation['batch_id']}")).json()
    assert (new["owner"], new["size"], new["states"], new["operation_id"]) == ("ana", 120, {"queued": 120}, None)
    assert (await api.get(f"/v1/batches/{batch}")).json() == before
    text = (await api.get(f"/v1/batches/{operation['batch_id']}/results")).text
    repeated = [(await api.get(f"/v1/runs/{json.loads(line)['id']}")).json()["retry_of"] for line in text.splitlines()]
    assert repeated == [str(row["id"]) for n, row in enumerate(rows) if n % 5 in (2, 3)], "in the order of the old ones"
    again = (await api.post(f"/v1/runs/{rows[3]['id']}/retry")).json()
    assert again["batch_id"] is None
    other = {"Idempotency-Key": "k2"}
    assert (await api.post(f"/v1/batches/{batch}/retry", headers=other)).json()["batch_id"] != operation["batch_id"]
    conflict = await api.post("/v1/runs/retry", json={"batch": batch, "owner": "ana"}, headers=key)
    problem(conflict, 422, "idempotency_key_reused")
    for unknown in (uuid4(), "42"):
        problem(await api.post(f"/v1/batches/{unknown}/retry"), 404, "unknown_batch")


async def test_the_cancel_of_a_batch_of_retries_stops_its_operation(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    old = uuid7()
    await ledger.execute("insert into batches (id, owner, request_hash, size) values ($1, 'ana', '', 0)", old)
    await add_ended(ledger, 2 * selection.PAGE, owner="ana", batch=old)
    operation = (await api.post(f"/v1/batches/{old}/retry")).json()
    new = uuid7(DAY)  # as if it had waited for long, without a run
    for column in ("batches set id", "operations set batch_id"):
        name = column.split()[-1]
        await ledger.execute(f"update {column} = $1 where {name} = $2", new, UUID(operation["batch_id"]))
    await maintenance.remove_empty_batches(ledger, timedelta(0))
    at = await work(ledger)
    page = await operations.find(ledger, at, at.cursor)
    assert await operations.retry(
        ledger, at, page, [Retry(run, uuid7(), None) for run in page.runs], failed=0, stored_until=None
    )
    cancelled = (await api.post(f"/v1/batches/{new}/cancel")).json()
    assert (cancelled["states"], cancelled["operation_id"]) == ({"cancelled": selection.PAGE}, None)
    await Operations(ledger, store)()
    assert counts(await seen(api, operation)) == ("cancelled", selection.PAGE, 0, 0)
    assert (await api.get(f"/v1/batches/{new}")).json() == cancelled


async def test_the_stream_of_a_batch_of_retries_ends_with_the_operation(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    old = uuid7()
    await ledger.execute("insert into batches (id, owner, request_hash, size) values ($1, 'ana', '', 2)", old)
    await add_ended(ledger, 2, owner="ana", batch=old)
    operation = (await api.post(f"/v1/batches/{old}/retry")).json()
    following = asyncio.create_task(api.get(f"/v1/batches/{operation['batch_id']}/events"))
    done, _ = await asyncio.wait({following}, timeout=3)
    assert not done, "it has no runs yet, and has not ended"
    await Operations(ledger, store)()
    await homes.end(ledger, "completed")
    ended = (await asyncio.wait_for(following, PATIENCE)).text.split("event: ended")[1]
    assert '"states":{"completed":2}' in ended


# -- cancel ------------------------------------------------------------------------------------------------------------


async def test_waiting_runs_are_cancelled_and_running_ones_asked_to_stop(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    await limits.limit(ledger, "narrow", Limits(max_running=2))
    queued, held = await add(ledger, 600, owner="ana"), await add(ledger, 5, owner="ana", lane="narrow")
    await lanes.promote(ledger, ["narrow"])
    others = await add(ledger, 3, owner="bo")
    taken = await claims.claim(ledger, pool="default", cursor=0, limit=20, worker_id=worker, lease=LEASE)
    running = {claim.id for claim in taken} - set(others)
    assert await ask(api, "cancel", owner="ana", dry_run=True) == {"runs": 605, "more": False}
    operation = await ask(api, "cancel", owner="ana")
    later = await add(ledger, 1, owner="ana")
    await Operations(ledger, store)()
    assert counts(await seen(api, operation)) == ("completed", 605, 0, 0)
    rows = await ledger.fetch("select id, state, cancel_requested_at is not null as asked from all_runs")
    found = {row["id"]: (row["state"], row["asked"]) for row in rows}
    for run in queued + held:
        assert found[run] == (("running", True) if run in running else ("cancelled", True))
    for run in others + later:
        assert not found[run][1]
    [row] = await ledger.fetch("select promoted from lanes")
    assert row["promoted"] == len([claim for claim in taken if claim.lane is not None])


async def test_a_locked_run_is_come_back_to(api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID) -> None:
    ids = await add(ledger, 2 * selection.PAGE)
    operation = await ask(api, "cancel", state="queued")
    async with ledger.transaction() as busy:
        await busy.execute("select from runs where id = $1 for update", ids[0])
        working = asyncio.create_task(Operations(ledger, store)())
        await until(lambda: ledger.fetch("select from operations where done = $1", len(ids) - 1))
        assert (await seen(api, operation))["state"] == "running"
    await working
    assert counts(await seen(api, operation)) == ("completed", len(ids), 0, 0)


async def test_a_run_that_has_begun_is_not_stopped_when_only_queued_ones_are_meant(
    api: httpx.AsyncClient, ledger: Ledger, worker: UUID
) -> None:
    [run] = await add(ledger, 1)
    operation = await ask(api, "cancel", state="queued")
    at = await work(ledger)
    page = await operations.find(ledger, at, at.cursor)
    assert list(page.runs) == [run]
    await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=worker, lease=LEASE)
    await operations.cancel(ledger, at, page)
    assert counts(await seen(api, operation)) == ("completed", 0, 0, 0)
    assert await ledger.fetch("select from runs where cancel_requested_at is null")
    await ask(api, "cancel", state="running")
    at = await work(ledger)
    await operations.cancel(ledger, at, await operations.find(ledger, at, at.cursor))
    assert await ledger.fetch("select from runs where cancel_requested_at is not null")


async def test_a_bulk_cancel_races_with_claims_and_single_cancels(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    await limits.limit(ledger, "narrow", Limits(max_running=40))
    ids = await add(ledger, 300) + await add(ledger, 300, lane="narrow")
    operation = await ask(api, "cancel", task="echo")

    async def claim() -> None:
        for _ in range(20):
            await claims.claim(ledger, pool="default", cursor=0, limit=5, worker_id=worker, lease=LEASE)

    await asyncio.gather(
        Operations(ledger, store)(),
        Operations(ledger, store)(),
        claim(),
        *[runs.cancel(ledger, run) for run in ids[::40]],
    )
    assert (await seen(api, operation))["state"] == "completed"
    rows = await ledger.fetch("select state, cancel_requested_at is not null as asked, promoted from runs")
    assert all((row["state"], row["asked"]) == ("running", True) for row in rows)
    [row] = await ledger.fetch("select promoted from lanes")
    assert row["promoted"] == sum(each["promoted"] for each in rows)
    assert len(rows) + len(await ledger.fetch("select from ended where state = 'cancelled'")) == len(ids)


# -- the request, and the operation ------------------------------------------------------------------------------------


async def test_a_request_without_a_filter_or_with_a_wrong_one_is_refused(api: httpx.AsyncClient) -> None:
    for verb in ("retry", "cancel"):
        for body in ({}, {"dry_run": True}, {"owner": None}):
            found = problem(await api.post(f"/v1/runs/{verb}", json=body), 422, "invalid_input")
            assert "at least one filter" in str(found["detail"])
        for body in ({"owner": ""}, {"tasks": "echo"}, {"batch": "x"}, {"task": "echo", "dry_run": "yes"}, []):
            problem(await api.post(f"/v1/runs/{verb}", json=body), 422, "invalid_input")
    for verb, state in (("retry", "queued"), ("retry", "running"), ("cancel", "failed"), ("cancel", "held")):
        found = problem(await api.post(f"/v1/runs/{verb}", json={"state": state}), 422, "invalid_input")
        assert [error["pointer"] for error in found["errors"]] == ["/state"]  # type: ignore[attr-defined]
    for verb in ("retry", "cancel"):
        answer = await api.get(f"/v1/runs/{verb}")
        problem(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"
    problem(
        await api.post("/v1/runs/cancel", content="x", headers={"content-type": "text/plain"}), 415, "unsupported_body"
    )


async def test_a_request_may_be_sent_again(api: httpx.AsyncClient, ledger: Ledger) -> None:
    async def send(verb: str, key: str, **body: Any) -> httpx.Response:
        return await api.post(f"/v1/runs/{verb}", json=body, headers={"Idempotency-Key": key})

    answers = await asyncio.gather(*[send("retry", "k", task="echo") for _ in range(10)])
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    problem(await send("retry", "k", task="other"), 422, "idempotency_key_reused")
    problem(await send("cancel", "k", task="echo"), 422, "idempotency_key_reused")
    problem(await send("retry", " ", task="echo"), 422, "invalid_input")
    assert (await send("retry", "k", owner="ana")).json()["id"] != answers[0].json()["id"], "a key of another owner"
    assert len(await operations.running(ledger)) == 2


async def test_an_operation_can_be_stopped(api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID) -> None:
    ids = await add_ended(ledger, 2 * selection.PAGE)
    operation = await ask(api, "retry", state="failed")
    at = await work(ledger)
    page = await operations.find(ledger, at, at.cursor)
    rows = [Retry(run, uuid7(), None) for run in page.runs]
    assert await operations.retry(ledger, at, page, rows, failed=0, stored_until=None)
    for _ in range(2):
        answer = await api.post(f"/v1/operations/{operation['id']}/cancel")
        assert (answer.status_code, *counts(answer.json())) == (200, "cancelled", selection.PAGE, 0, 0)
    assert not await operations.retry(ledger, at, page, rows, failed=0, stored_until=None)
    await Operations(ledger, store)()
    assert await retried(ledger) == ids[: selection.PAGE]
    for path in (f"/v1/operations/{uuid4()}", "/v1/operations/42"):
        problem(await api.get(path), 404, "unknown_operation")
        problem(await api.post(f"{path}/cancel"), 404, "unknown_operation")


async def test_an_operation_that_can_not_be_read_holds_up_no_other(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID, caplog: pytest.LogCaptureFixture
) -> None:
    [run] = await add_ended(ledger, 1)
    newer, good = [await ask(api, "retry", state="failed") for _ in range(2)]
    await ledger.execute("""update operations set filter = '{"newer": 1}' where id = $1""", UUID(newer["id"]))
    assert counts(await seen(api, newer)) == ("running", 0, 0, 0)
    await Operations(ledger, store)()
    assert counts(await seen(api, good)) == ("completed", 1, 0, 0)
    shown = await seen(api, newer)
    assert counts(shown) == ("cancelled", 0, 0, 0)
    assert not any(shown["filter"].values())
    assert newer["id"] in caplog.text
    assert await retried(ledger) == [run]


async def test_operations_take_turns(api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID) -> None:
    await add(ledger, 8 * selection.PAGE, owner="long")
    await add(ledger, 1, owner="short")
    long, short = await ask(api, "cancel", owner="long"), await ask(api, "cancel", owner="short")
    await Operations(ledger, store)()
    rows = await ledger.fetch("select finished_at from ended where owner = 'long' order by finished_at desc limit 1")
    assert (await seen(api, short))["finished_at"] < rows[0]["finished_at"].isoformat()
    assert (await seen(api, long))["done"] == 8 * selection.PAGE


async def test_a_count_is_bounded(ledger: Ledger) -> None:
    await add(ledger, 30)
    row = await ledger.fetchrow("select now() as at")
    assert row is not None

    async def counted(task: str, **bounds: int) -> tuple[int, bool]:
        return await selection.count(ledger, "cancel", Selection(task=task), row["at"], uuid7(-60), rows=7, **bounds)

    assert await counted("echo") == (30, False)
    assert await counted("echo", most=30) == (30, False)
    assert await counted("echo", most=29) == (29, True)
    assert await counted("other", examined=14) == (0, True)


async def test_a_page_reads_by_an_index_and_sorts_nothing(ledger: Ledger) -> None:
    kinds: list[tuple[selection.Kind, State | None]] = [("cancel", None), ("retry", None), ("retry", State.COMPLETED)]
    chosen = [Selection(owner="a"), Selection(batch=uuid7()), Selection(task="a")]
    for (kind, state), one in itertools.product(kinds, chosen):
        sql, values = selection._statement(
            selection._FIND, selection.EXAMINED, kind, one.model_copy(update={"state": state})
        )
        rows = await ledger.fetch(f"explain {sql}", selection.FIRST, uuid7(), datetime.now(UTC), *values)
        plan = "\n".join(row[0] for row in rows)
        walk = plan.split("CTE walk")[1].split("CTE due")[0]
        assert "->  Sort" not in walk, plan
        assert "Seq Scan" not in walk, plan
        column = "owner" if one.owner else "batch_id" if one.batch else "id"
        conditions = [line for line in walk.splitlines() if "Index Cond" in line]
        assert conditions, plan
        assert all(f"(({column} " in line for line in conditions), plan


async def test_old_operations_go(api: httpx.AsyncClient, ledger: Ledger, store: Store) -> None:
    for owner, ago, ended_ago in (("running", 41, None), ("young", 41, 1), ("old", 41, 40), ("new", 0, 0)):
        operation = await ask(api, "cancel", owner=owner)
        await ledger.execute(
            """update operations set id = $2, finished_at = now() - make_interval(days => $3),
                      state = case when $3 is null then state else 'completed' end where id = $1""",
            UUID(operation["id"]),
            uuid7(ago * DAY),
            ended_ago,
        )
    await Retention(ledger, store, timedelta(days=30))()
    rows = await ledger.fetch("select owner from operations")
    assert {row["owner"] for row in rows} == {"running", "young", "new"}


async def test_the_steward_makes_operations(database: str, tmp_path: Path) -> None:
    """In its own process, with the rights of its part."""
    async with stack(database, tmp_path) as product:
        await product.up("api", "worker", "steward")
        failed = [await product.submit("fail", kind="usage", name="n") for _ in range(3)]
        failed.append(await product.submit("fail", kind="usage", name="n" * submissions.INLINE_INPUT))
        for run in failed:
            await product.state(run, "failed")

        async def completed(verb: str, **filters: str) -> dict[str, Any]:
            operation = await ask(product.http, verb, **filters)
            return await until(lambda: seen(product.http, operation), lambda each: each["state"] == "completed")

        assert counts(await completed("retry", task="fail")) == ("completed", 4, 0, 0)
        for run in failed:
            [new] = (await product.run(run))["retried_by"]
            assert (await product.ended(new))["state"] == "failed"
        lines = "\n".join(json.dumps({"task": "fail", "input": {"kind": "usage"}}) for _ in range(2))
        jsonl = {"content-type": "application/jsonl"}
        batch = (await product.http.post("/v1/batches", content=lines, headers=jsonl)).json()["id"]

        async def states(batch: str) -> dict[str, int]:
            return dict((await product.http.get(f"/v1/batches/{batch}")).json()["states"])

        await until(lambda: states(batch), lambda each: each == {"failed": 2})
        operation = (await product.http.post(f"/v1/batches/{batch}/retry")).json()
        await until(lambda: states(operation["batch_id"]), lambda each: each == {"failed": 2})
        later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        answer = await product.http.post("/v1/tasks/echo/runs", json={"input": {"value": 1}, "run_at": later})
        assert counts(await completed("cancel", task="echo")) == ("completed", 1, 0, 0)
        assert (await product.run(answer.json()["id"]))["state"] == "cancelled"
