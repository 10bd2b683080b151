"""Runs that are made again: the input that is kept, and the retry of one run."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx

from backcast.api.app import create_app
from backcast.ledger import claims, fleet, runs, submissions
from backcast.ledger.connection import Ledger
from backcast.models import uuid7
from backcast.settings import Api
from backcast.steward.retention import Retention
from backcast.store import Store
from tests.integration.test_api import ECHO, api, end, problem, worker
from tests.integration.test_ledger import LEASE
from tests.support import ended as homes
from tests.support.waiting import until

__all__ = ["api", "worker"]

BASE = "http://localhost"
DAY = 24 * 3600.0
NOW = datetime.now(UTC)
ROW = {"state": "failed", "task": "echo", "pool": "default", "owner": "me", "max_attempts": 3, "metadata": "{}"} | {
    "priority": 0, "run_at": NOW, "created_at": NOW, "attempts_used": 1, "retries_used": 0, "signature": "",
    "fence": 1, "input": "{}",
}  # fmt: skip
LARGE = "x" * (submissions.INLINE_INPUT + 1)


async def submitted(api: httpx.AsyncClient, value: object = 1, **fields: object) -> str:
    answer = await api.post("/v1/tasks/echo/runs", json={"input": {"value": value}, **fields})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def stored_key(ledger: Ledger, run: str) -> str:
    key = (await runs.kept_input(ledger, UUID(run))).key
    assert key is not None
    return key


# -- the input ---------------------------------------------------------------------------------------------------------


async def test_the_input_of_a_run_is_kept_before_and_after_its_end(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    small, large = await submitted(api, {"é\x00": 0.5}), await submitted(api, LARGE)
    for _ in range(2):
        answer = await api.get(f"/v1/runs/{small}/input")
        assert (answer.status_code, answer.json()) == (200, {"value": {"é\x00": 0.5}})
        assert answer.headers["content-type"] == "application/json"
        assert (await api.get(f"/v1/runs/{large}/input")).json() == {"value": LARGE}
        await end(ledger, store, worker, "1")


async def test_an_input_that_is_gone_is_a_problem(api: httpx.AsyncClient, ledger: Ledger, store: Store) -> None:
    run = await submitted(api, LARGE)
    await store.delete([await stored_key(ledger, run)])
    problem(await api.get(f"/v1/runs/{run}/input"), 410, "input_gone")
    for unknown in ("018f0000-0000-7000-8000-000000000000", "42"):
        problem(await api.get(f"/v1/runs/{unknown}/input"), 404, "unknown_run")


# -- the retry of one run ----------------------------------------------------------------------------------------------


async def failed(api: httpx.AsyncClient, ledger: Ledger, worker: UUID, value: object = 1, **fields: object) -> str:
    run = await submitted(api, value, **fields)
    await homes.end(ledger, "failed", "id = $1", UUID(run))
    return run


async def get(api: httpx.AsyncClient, run: str) -> dict[str, Any]:
    answer = await api.get(f"/v1/runs/{run}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def retried(api: httpx.AsyncClient, run: str, **changes: object) -> dict[str, Any]:
    answer = await api.post(f"/v1/runs/{run}/retry", json=changes)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/runs/{answer.json()['id']}"
    return dict(answer.json())


async def test_a_retry_is_a_new_run_with_the_kept_input(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    soon, far = datetime.now(UTC) + timedelta(hours=1), datetime.now(UTC) + timedelta(hours=2)
    fields = {"owner": "ana", "priority": 7, "lane": "narrow", "metadata": {"row": "12"}}
    times = {"run_at": soon.isoformat(), "deadline": far.isoformat()}
    old = await failed(api, ledger, worker, "é", **fields, **times)
    before = await get(api, old)
    answer = await api.post(f"/v1/runs/{old}/retry")  # without a body
    assert answer.status_code == 202, answer.text
    new = answer.json()
    assert new["id"] != old
    assert (new["state"], new["retry_of"], new["retried_by"], new["attempts"]) == ("queued", old, [], 0)
    assert {name: new[name] for name in fields} == fields
    assert new["deadline"] is None
    assert new["run_at"] == new["created_at"], "it does not wait for the time of the old one"
    assert (await api.get(f"/v1/runs/{new['id']}/input")).json() == {"value": "é"}
    assert await get(api, new["id"]) == new
    after = await get(api, old)
    assert after.pop("retried_by") == [new["id"]]
    assert (before.pop("retried_by"), before) == ([], after), "the old one stays as it is"


async def test_a_retry_may_change_all_but_the_owner(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    old = await failed(api, ledger, worker, owner="ana", lane="narrow")
    late = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    changes = {"input": {"value": 2}, "priority": -3, "lane": "wide", "metadata": {"a": "b"}, "deadline": late}
    new = await retried(api, old, **changes)
    assert (new["owner"], new["priority"], new["lane"], new["metadata"]) == ("ana", -3, "wide", {"a": "b"})
    assert datetime.fromisoformat(new["deadline"]) == datetime.fromisoformat(late)
    assert (await api.get(f"/v1/runs/{new['id']}/input")).json() == {"value": 2}
    other = await retried(api, old, task="create_structured_output", input={"data": "x", "target": "int"})
    assert (other["task"], other["lane"]) == ("create_structured_output", None), "the lane was the other task's"
    assert (await get(api, old))["retried_by"] == [new["id"], other["id"]]
    found = problem(await api.post(f"/v1/runs/{old}/retry", json={"owner": "bo"}), 422, "invalid_input")
    assert found["errors"] == [{"pointer": "/owner", "detail": "Extra inputs are not permitted"}]


async def test_the_input_is_checked_against_the_task_as_it_is_now(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    old = await failed(api, ledger, worker, "text")
    narrowed = {**ECHO.input_schema, "properties": {"value": {"type": "integer"}}}
    await ledger.execute("delete from task_types where name = 'echo'")
    await fleet.register(
        ledger, worker, pool="default", host="h", version="2", slots=10,
        tasks=[ECHO.model_copy(update={"input_schema": narrowed})],
    )  # fmt: skip
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(ledger, store, Api())), base_url=BASE) as now:
        found = problem(await now.post(f"/v1/runs/{old}/retry"), 422, "invalid_input")
        assert [error["pointer"] for error in found["errors"]] == ["/input/value"]  # type: ignore[attr-defined]
        assert (await now.post(f"/v1/runs/{old}/retry", json={"input": {"value": 1}})).status_code == 202
        problem(await now.post(f"/v1/runs/{old}/retry", json={"task": "none"}), 404, "unknown_task")


async def test_only_a_run_that_has_ended_is_repeated(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    run = await submitted(api)
    for state in ("queued", "running"):
        found = problem(await api.post(f"/v1/runs/{run}/retry"), 409, "not_finished")
        assert f"is {state}: cancel it, or wait" in str(found["detail"])
        await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=worker, lease=LEASE)
    for unknown in ("018f0000-0000-7000-8000-000000000000", "42"):
        problem(await api.post(f"/v1/runs/{unknown}/retry"), 404, "unknown_run")


async def test_a_retry_may_be_sent_again_and_waited_for(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    old, other = await failed(api, ledger, worker), await failed(api, ledger, worker)
    key = {"Idempotency-Key": "k"}
    answers = await asyncio.gather(*[api.post(f"/v1/runs/{old}/retry", headers=key) for _ in range(10)])
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert (await get(api, old))["retried_by"] == [answers[0].json()["id"]]
    problem(await api.post(f"/v1/runs/{other}/retry", headers=key), 422, "idempotency_key_reused")
    submission = {"input": {"value": 1}}
    problem(await api.post("/v1/tasks/echo/runs", json=submission, headers=key), 422, "idempotency_key_reused")
    waiting = asyncio.create_task(api.post(f"/v1/runs/{other}/retry", headers={"Prefer": "wait=50"}))
    await until(lambda: ledger.fetch("select from runs where retry_of = $1", UUID(other)))
    await end(ledger, store, worker, "1")
    answer = await waiting
    assert (answer.status_code, answer.json()["state"]) == (200, "completed")


async def test_a_retry_has_a_large_input_of_its_own(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    old = await failed(api, ledger, worker, LARGE)
    new = (await retried(api, old))["id"]
    assert await stored_key(ledger, new) == f"inputs/{new}.json"
    await store.delete([await stored_key(ledger, old)])
    assert (await api.get(f"/v1/runs/{new}/input")).json() == {"value": LARGE}
    problem(await api.post(f"/v1/runs/{old}/retry"), 410, "input_gone")
    assert (await api.post(f"/v1/runs/{old}/retry", json={"input": {"value": 1}})).status_code == 202


async def test_a_damaged_input_is_sent_whole(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    old = await failed(api, ledger, worker)
    await ledger.execute("update ended set input = '{' where id = $1", UUID(old))
    found = problem(await api.post(f"/v1/runs/{old}/retry"), 422, "invalid_input")
    assert "send the whole `input`" in str(found["detail"])


async def test_a_retry_of_a_retry_and_many_retries_of_one(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    old = await failed(api, ledger, worker)
    ids = [(await retried(api, old))["id"] for _ in range(runs.RETRIES + 3)]
    assert (await get(api, old))["retried_by"] == ids[3:], "the newest, the newest last"
    await homes.end(ledger, "cancelled", "id = $1", UUID(ids[-1]))
    again = await retried(api, ids[-1])
    assert again["retry_of"] == ids[-1]
    listed = {run["id"]: run for run in (await api.get("/v1/runs", params={"limit": 200})).json()["items"]}
    assert listed[ids[-1]]["retried_by"] == [again["id"]]
    assert listed[again["id"]]["retry_of"] == ids[-1]


async def test_retries_are_listed_for_as_long_as_their_run_is_kept(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    kept = await failed(api, ledger, worker)
    new = await retried(api, kept)
    old, gone = uuid7(40 * DAY), uuid7(41 * DAY)
    await homes.add(ledger, old, since=3600, **ROW)
    for each in (old, gone):
        await ledger.execute("insert into retries select $1, n from unnest($2::uuid[]) n", each, [uuid7(), uuid7()])
    await Retention(ledger, store, timedelta(days=30))()
    rows = await ledger.fetch("select distinct run_id from retries")
    assert {row["run_id"] for row in rows} == {UUID(kept), old}
    assert (await get(api, kept))["retried_by"] == [new["id"]]
