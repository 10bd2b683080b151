"""Accepting runs: many at once, more than may wait, in batches, over a database that hangs, is full or read-only."""

import asyncio
import json
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import psutil
import pytest

from backcast.api.app import create_app
from backcast.errors import IdempotencyConflict, InvalidInput, LedgerUnavailable, TooManyWaiting
from backcast.ledger import (
    batches,
    claims,
    dispatch,
    fleet,
    limits,
    provisioning,
    runs,
    settlement,
    submissions,
    task_types,
)
from backcast.ledger.admission import OWNERS, Admission
from backcast.ledger.connection import Ledger
from backcast.ledger.migration import migrate
from backcast.ledger.submissions import New, Submissions, SubmittedRun
from backcast.local import postgres
from backcast.models import Limits, State, Submission, uuid7
from backcast.settings import Api
from backcast.store import Store
from tests.integration.test_api import ECHO, end, problem
from tests.integration.test_ledger import LEASE
from tests.support.waiting import until

JSONL = {"content-type": "application/jsonl"}


@pytest.fixture
async def worker(ledger: Ledger) -> UUID:
    worker = uuid7()
    await fleet.register(ledger, worker, pool="default", host="h", version="1", slots=10, tasks=[ECHO])
    return worker


def over(ledger: Ledger, store: Store, **limits: Any) -> httpx.AsyncClient:
    app = create_app(ledger, store, Api(**limits))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=30)


@pytest.fixture
async def api(ledger: Ledger, store: Store, worker: UUID) -> AsyncIterator[httpx.AsyncClient]:
    async with over(ledger, store, max_batch=2000, max_body=200_000) as client:
        yield client


def new(value: object = 1, *, key: str | None = None, **fields: Any) -> New:
    text = json.dumps({"value": value})
    return submissions.new(
        ECHO,
        Submission(input={"value": value}, **fields),
        input_text=text,
        input_hash=text.encode(),
        idempotency_key=key,
    )


async def count(ledger: Ledger, where: str = "true") -> int:
    row = await ledger.fetchrow(f"select count(*) as n from all_runs where {where}")
    assert row is not None
    return int(row["n"])


# Together


async def test_submissions_that_come_together_share_a_commit(ledger: Ledger) -> None:
    together = Submissions(ledger)
    made = await asyncio.gather(*[together.submit(new(n)) for n in range(1200)])
    assert len({submitted.run.id for submitted in made}) == 1200
    row = await ledger.fetchrow("select count(distinct xmin::text) as commits, count(*) as runs from runs")
    assert row is not None
    assert row["runs"] == 1200
    assert row["commits"] <= 4
    for submitted in made[::100]:
        assert (await runs.get(ledger, submitted.run.id)) == submitted.run


async def test_the_same_key_twice_in_a_group(ledger: Ledger) -> None:
    together = Submissions(ledger)
    first, again, other, elsewhere = await asyncio.gather(
        together.submit(new(1, key="k")),
        together.submit(new(1, key="k")),
        together.submit(new(2, key="k")),
        together.submit(new(2, key="k", owner="ana")),
        return_exceptions=True,
    )
    assert isinstance(first, SubmittedRun)
    assert isinstance(again, SubmittedRun)
    assert (first.fresh, again.fresh, again.run.id) == (True, False, first.run.id)
    assert isinstance(other, IdempotencyConflict)
    assert isinstance(elsewhere, SubmittedRun)
    assert elsewhere.fresh


async def test_processes_that_race_for_many_keys_do_not_lock_each_other_out(ledger: Ledger) -> None:
    processes = [Submissions(ledger) for _ in range(4)]
    keys = [f"k{n}" for n in range(200)]
    orders = [keys, keys[::-1], keys[100:] + keys[:100], keys[1::2] + keys[::2]]
    asked = [process.submit(new(1, key=key)) for process, order in zip(processes, orders, strict=True) for key in order]
    made = await asyncio.gather(*asked)
    assert len({submitted.run.id for submitted in made}) == 200
    assert sum(submitted.fresh for submitted in made) == 200


async def test_a_refused_submission_does_not_fail_the_others_of_its_group(ledger: Ledger) -> None:
    await ledger.execute("alter table runs add constraint no_poison check (input not like '%poison%')")
    together = Submissions(ledger)
    made = await asyncio.gather(
        *[together.submit(new("poison" if n % 3 == 0 else n)) for n in range(9)], return_exceptions=True
    )
    assert [type(one) for one in made] == [InvalidInput, SubmittedRun, SubmittedRun] * 3
    assert await count(ledger) == 6


async def test_a_caller_that_goes_away_does_not_fail_the_others_of_its_group(ledger: Ledger) -> None:
    together = Submissions(ledger)
    asked = [asyncio.create_task(together.submit(new(n))) for n in range(20)]
    await asyncio.sleep(0)
    asked[3].cancel()
    made = await asyncio.gather(*asked, return_exceptions=True)
    assert [isinstance(one, SubmittedRun) for one in made] == [n != 3 for n in range(20)]
    assert (await together.submit(new())).fresh


async def test_a_held_run_is_promoted_when_its_lane_has_room(ledger: Ledger, worker: UUID) -> None:
    await limits.limit(ledger, "gpu", Limits(max_running=2))
    together = Submissions(ledger)
    await asyncio.gather(*[together.submit(new(n, lane="gpu")) for n in range(5)])

    async def promoted() -> tuple[int, int]:
        lane = await limits.get(ledger, "gpu")
        return lane.running + lane.queued, lane.held

    await until(promoted, lambda seen: seen == (2, 3))


# A database in trouble


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop the server and all of its backends by SIGSTOP: connections stay open without an answer."""
    main = psutil.Process(pid)
    family = [main, *main.children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in family:
            process.send_signal(signal.SIGCONT)


async def test_no_request_waits_longer_than_the_time_out_for_a_hung_database(tmp_path: Path, store: Store) -> None:
    with postgres.running(tmp_path / "postgres") as server:
        provisioning.create_database(server.url(), "backcast")
        migrate(server.url("backcast"))
        ledger = Ledger(server.url("backcast"), pool=3, timeout=timedelta(seconds=5))
        await task_types.register(ledger, [ECHO])
        async with over(ledger, store) as api:
            run = (await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}})).json()

            async def ask(n: int) -> httpx.Response:
                match n % 4:
                    case 0:
                        return await api.post("/v1/tasks/echo/runs", json={"input": {"value": n}})
                    case 1:
                        return await api.get(f"/v1/runs/{run['id']}")
                    case 2:
                        return await api.post(f"/v1/runs/{run['id']}/cancel")
                    case _:
                        return await api.get("/readyz")

            assert {answer.status_code for answer in await asyncio.gather(*[ask(n) for n in (0, 1, 3)])} <= {200, 202}
            with stopped(server.pid):
                # Far more than there are connections; none may wait for another one's time-out:
                # one after the other they would take 65 s.
                async with asyncio.timeout(45):
                    for answer in await asyncio.gather(*[ask(n) for n in range(40)]):
                        problem(answer, 503, "ledger_unavailable")
                        assert "within 5 s" in answer.json()["detail"]
                        assert int(answer.headers["retry-after"]) >= 1

            async def healed() -> int:
                return (await api.post("/v1/tasks/echo/runs", json={"input": {"value": "after"}})).status_code

            await until(healed, lambda status: status == 202)
            assert [(await ask(n)).status_code for n in (0, 1, 2, 3)] == [202, 200, 200, 200]
        await ledger.aclose()


async def test_a_full_disk_is_reported_and_heals(api: httpx.AsyncClient, ledger: Ledger) -> None:
    run = (await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}})).json()
    await ledger.execute(
        """create function full_disk() returns trigger language plpgsql as
           $$ begin raise exception 'could not extend file "base/5/16397"' using errcode = '53100'; end $$"""
    )
    await ledger.execute("create trigger no_space before insert or update on runs execute function full_disk()")
    for answer in (
        await api.post("/v1/tasks/echo/runs", json={"input": {"value": 2}}),
        await api.post("/v1/batches?task=echo", content='{"input": {"value": 2}}', headers=JSONL),
        await api.post(f"/v1/runs/{run['id']}/cancel"),
    ):
        found = problem(answer, 503, "ledger_full")
        assert found["title"] == "The database's disk is full"
        assert "base/5" not in answer.text
    assert (await api.get(f"/v1/runs/{run['id']}")).json()["state"] == "queued"
    problem(await api.get("/readyz"), 503, "ledger_full")
    await ledger.execute("drop trigger no_space on runs")
    assert (await api.post("/v1/tasks/echo/runs", json={"input": {"value": 2}})).status_code == 202
    assert (await api.post(f"/v1/runs/{run['id']}/cancel")).json()["state"] == "cancelled"
    assert (await api.get("/readyz")).status_code == 200, "the write that found the disk full has succeeded"
    assert await count(ledger) == 2


async def test_a_read_only_database_is_reported_and_heals(database: str, store: Store) -> None:
    async def read_only(on: bool) -> None:
        admin = await asyncpg.connect(database, server_settings={"default_transaction_read_only": "off"})
        name = await admin.fetchval("select current_database()")
        await admin.execute(f'alter database "{name}" set default_transaction_read_only = {"on" if on else "off"}')
        if on:  # otherwise the sessions stay as they are, as when a name leads to the primary server again
            await admin.execute(
                """select pg_terminate_backend(pid) from pg_stat_activity
                    where datname = current_database() and pid <> pg_backend_pid()"""
            )
        await admin.close()

    ledger = Ledger(database)
    await task_types.register(ledger, [ECHO])
    async with over(ledger, store) as api:

        async def submit() -> httpx.Response:
            return await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}})

        async def read_only_is_reported() -> bool:
            found = problem(await submit(), 503, "ledger_unavailable")
            return "read-only" in str(found["detail"])

        run = (await submit()).json()
        await read_only(True)
        await until(read_only_is_reported)
        found = problem(await api.post(f"/v1/runs/{run['id']}/cancel"), 503, "ledger_unavailable")
        assert "read-only" in str(found["detail"])
        problem(await api.get("/readyz"), 503, "ledger_unavailable")
        assert (await api.get(f"/v1/runs/{run['id']}")).json()["state"] == "queued"

        async def accepts_again() -> int:
            return (await submit()).status_code

        await read_only(False)
        await until(accepts_again, lambda status: status == 202)
        assert (await api.get("/readyz")).status_code == 200
        assert (await api.post(f"/v1/runs/{run['id']}/cancel")).json()["state"] == "cancelled"
    await ledger.aclose()


# More than may wait


async def refused(admission: Admission, owner: str, runs: int = 1) -> TooManyWaiting:
    with pytest.raises(TooManyWaiting) as caught:
        await admission.admit(owner, runs)
    return caught.value


async def test_waiting_runs_are_counted_by_owner_and_in_all(ledger: Ledger, worker: UUID) -> None:
    await limits.limit(ledger, "closed", Limits(max_running=0))
    later = datetime.now(UTC) + timedelta(hours=1)
    rows = [new(), new(run_at=later), new(lane="closed"), new(owner="ana"), new(owner="bob")]
    for row in rows:
        await Submissions(ledger).submit(row)

    async def room(owner: str, most: int, most_per_owner: int, runs: int) -> bool:
        try:
            await Admission(ledger, most=most, most_per_owner=most_per_owner).admit(owner, runs)
        except TooManyWaiting:
            return False
        return True

    assert [await room("default", 100, limit, 2) for limit in (4, 5)] == [False, True]
    assert [await room("ana", 100, limit, 2) for limit in (2, 3)] == [False, True]
    assert [await room("new", limit, 100, 2) for limit in (6, 7)] == [False, True]
    await claims.claim(ledger, pool="default", cursor=0, limit=10, worker_id=worker, lease=LEASE)
    assert [await room("default", 100, limit, 2) for limit in (3, 4)] == [False, True]


async def test_an_owner_at_its_limit_gets_a_time_to_retry(ledger: Ledger, store: Store, worker: UUID) -> None:
    async with over(ledger, store, max_waiting_per_owner=3) as api:

        async def post(owner: str = "ana", **headers: str) -> httpx.Response:
            body = {"input": {"value": 1}, "owner": owner}
            return await api.post("/v1/tasks/echo/runs", json=body, headers=headers)

        first = await post(**{"Idempotency-Key": "k"})
        refusals = list[httpx.Response]()

        async def is_refused() -> bool:
            refusals.append(await post())
            return refusals[-1].status_code == 429

        assert not await is_refused()
        await until(is_refused)
        found = problem(refusals[-1], 429, "too_many_waiting")
        assert "runs of this owner wait, of at most 3" in str(found["detail"])
        assert "none has ended lately" in str(found["detail"])
        assert refusals[-1].headers["retry-after"] == "30"
        assert (await post("bob")).status_code == 202, "others go on"
        assert (await post(**{"Idempotency-Key": "k"})).json()["id"] == first.json()["id"], "a replay is never refused"
        problem(await post(**{"Idempotency-Key": "other"}), 429, "too_many_waiting")

        async def batch(key: str) -> httpx.Response:
            body = '{"input": {"value": 1}}\n' * 2
            headers = JSONL | {"Idempotency-Key": key}
            return await api.post("/v1/batches?task=echo&owner=eve", content=body, headers=headers)

        known = await batch("b")
        assert known.status_code == 202
        problem(await batch("c"), 429, "too_many_waiting")
        assert (await batch("b")).json()["id"] == known.json()["id"]
        lines = '{"input": {"value": 1}}\n' * 4
        problem(await api.post("/v1/batches?task=echo&owner=new", content=lines, headers=JSONL), 422, "invalid_input")

        await claims.claim(ledger, pool="default", cursor=0, limit=10, worker_id=worker, lease=LEASE)

        async def accepted() -> int:
            return (await post()).status_code

        await until(accepted, lambda status: status == 202)


async def test_retry_after_is_how_long_the_fleet_takes(ledger: Ledger, worker: UUID) -> None:
    admission = Admission(ledger, most=1000, most_per_owner=10)
    for _ in range(10):
        await Submissions(ledger).submit(new())
    assert (await refused(admission, "default", 5)).retry_after == timedelta(seconds=30)
    settled = 0

    async def detail() -> str:
        nonlocal settled
        settled += 1000
        await ledger.execute("update workers set settled = $1", settled)
        return (await refused(admission, "default", 5)).detail

    assert "ask again in 1 s" in await until(detail, lambda detail: "end in a second" in detail, every=0.3)
    await ledger.execute("update workers set settled = 0")  # as when the worker that had settled them left
    assert (await refused(admission, "default", 5)).retry_after >= timedelta(seconds=1)


async def test_the_memory_of_owners_is_bounded(ledger: Ledger) -> None:
    admission = Admission(ledger, most=1_000_000, most_per_owner=1000)
    for n in range(OWNERS + 50):
        await admission.admit(f"owner {n}")
    assert len(admission._owners) == OWNERS


async def test_admission_refuses_no_run_because_the_database_is_away(ledger: Ledger) -> None:
    away = Ledger("postgresql://postgres@127.0.0.1:1/none")
    admission = Admission(away, most=100, most_per_owner=2)
    await admission.admit("ana")
    await admission.admit("ana")
    with pytest.raises(LedgerUnavailable):
        await admission.admit("ana")
    await away.aclose()


# Batches


def lines(*given: object) -> str:
    return "".join(json.dumps(line) + "\n" for line in given)


async def test_a_batch_from_submit_to_results(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    sent = [{"task": "echo", "input": {"value": n}, "metadata": {"n": str(n)}} for n in range(250)]
    sent[7]["input"] = {"value": "x" * (submissions.INLINE_INPUT + 1)}
    answer = await api.post("/v1/batches", content="\n" + lines(*sent), headers=JSONL)
    assert answer.status_code == 202, answer.text
    batch = answer.json()
    where = f"/v1/batches/{batch['id']}"
    assert answer.headers["location"] == where
    assert (batch["size"], batch["owner"], batch["states"]) == (250, "default", {"queued": 250})
    assert (await api.get(where)).json() == batch

    pages, cursor = [], None
    while pages == [] or cursor is not None:
        params = {"batch": batch["id"], "limit": 200} | ({"cursor": cursor} if cursor else {})
        page = (await api.get("/v1/runs", params=params)).json()
        pages += page["items"]
        cursor = page["next_cursor"]
    assert [run["metadata"]["n"] for run in pages[::-1]] == [str(n) for n in range(250)]
    assert {run["batch_id"] for run in pages} == {batch["id"]}

    await end(ledger, store, worker, '"small"')  # ten of them
    for claim in await claims.claim(ledger, pool="default", cursor=0, limit=2, worker_id=worker, lease=LEASE):
        key = f"results/{claim.id}/{claim.fence}.json"
        if not await count(ledger, "result is null and state = 'completed'"):
            await store.put(key, json.dumps("large" * 20_000).encode())
        done = settlement.Settlement(id=claim.id, fence=claim.fence, state="completed", result=None, result_key=key)
        assert (await settlement.settle(ledger, worker, [done])).accepted
    results = await api.get(f"{where}/results")
    assert (results.status_code, results.headers["content-type"].partition(";")[0]) == (200, "application/jsonl")
    found = [json.loads(line) for line in results.text.splitlines()]
    assert [item["id"] for item in found] == [run["id"] for run in pages[::-1]]
    completed = [item for item in found if item["state"] == "completed"]
    assert len(completed) == 12
    values = sorted(item["result"][:5] for item in completed if "result" in item)
    assert values == ["large", *["small"] * 10]
    assert [item["error"]["code"] for item in completed if "error" in item] == ["result_gone"]
    assert [item for item in found if item["state"] == "queued" and item.keys() != {"id", "state", "metadata"}] == []

    cancelled = (await api.post(f"{where}/cancel")).json()
    assert cancelled["states"] == {"cancelled": 238, "completed": 12}


async def test_a_batch_is_accepted_whole_or_not_at_all(api: httpx.AsyncClient, ledger: Ledger, tmp_path: Path) -> None:
    large = {"task": "echo", "input": {"value": "x" * (submissions.INLINE_INPUT + 1)}}
    good = {"task": "echo", "input": {"value": 1}}
    body = lines(large, good) + "{\n\n" + lines({"task": "none"}, {"input": {}}, {**good, "input": {"n": -1}}, [1])
    body += (
        lines({**good, "owner": "ana"}, {**good, "priority": 1000}) + '{"task": "echo", "input": {"value": "\\ud800"}}'
    )
    answer = await api.post("/v1/batches", content=body, headers=JSONL)
    found = problem(answer, 422, "invalid_input")
    pointers = [error["pointer"] for error in found["errors"]]  # type: ignore[attr-defined]
    assert pointers == ["/2", "/4/task", "/5/task", "/6/input/n", "/6/input", "/7", "/8/owner", "/9/priority", "/10"]
    assert "Line 3 is wrong" in str(found["detail"])
    assert await count(ledger) == 0
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []

    many = await api.post("/v1/batches", content="{\n" * 1000, headers=JSONL)
    assert len(problem(many, 422, "invalid_input")["errors"]) == 20  # type: ignore[arg-type]


async def test_a_batch_that_does_not_fit_into_memory(
    api: httpx.AsyncClient, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [f"{number} " + "x" * 2000 for number in range(1200)]
    body = lines(*[{"task": "echo", "input": {"value": value}} for value in values])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    large = lines({"task": "echo", "input": {"value": "x" * (submissions.INLINE_INPUT + 1)}})
    problem(await api.post("/v1/batches", content=large + body, headers=JSONL), 503, "no_space")
    assert await count(ledger) == 0
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    assert (await api.post("/v1/batches", content=large, headers=JSONL)).status_code == 202
    monkeypatch.undo()
    answer = await api.post("/v1/batches", content=body, headers=JSONL)
    assert (answer.status_code, answer.json()["size"]) == (202, 1200)
    rows = await ledger.fetch("select input from runs where batch_id = $1 order by id", UUID(answer.json()["id"]))
    assert [json.loads(row["input"])["value"] for row in rows] == values


async def test_a_batch_may_name_task_and_owner_once(api: httpx.AsyncClient, ledger: Ledger) -> None:
    for kind in ("application/x-ndjson", "application/jsonl; charset=utf-8"):
        answer = await api.post(
            "/v1/batches?task=echo&owner=ana", content='{"input":{"value":1}}', headers={"content-type": kind}
        )
        assert (answer.status_code, answer.json()["owner"]) == (202, "ana")
    assert await count(ledger, "owner = 'ana'") == 2


async def test_batches_that_can_not_be_read(api: httpx.AsyncClient) -> None:
    good = '{"task": "echo", "input": {"value": 1}}\n'
    problem(await api.post("/v1/batches", content=good, headers={"content-type": "text/csv"}), 415, "unsupported_body")
    problem(await api.post("/v1/batches", content=" \n\n", headers=JSONL), 422, "invalid_input")
    twice = good + '{"task": "echo", "input": {"value": 1, "value": 2}}\n'
    assert 'duplicate key \\"value\\"' in (await api.post("/v1/batches", content=twice, headers=JSONL)).text
    for line in (good, good.replace("value", "other")):
        answer = await api.post("/v1/batches?on_error=skip", content=line + good + line * 1999, headers=JSONL)
        problem(answer, 413, "body_too_large")
    long = '{"task": "echo", "input": {"value": "' + "x" * 300_000
    problem(await api.post("/v1/batches", content=long, headers=JSONL), 413, "body_too_large")
    for path in (f"/v1/batches/{uuid4()}", "/v1/batches/7", f"/v1/batches/{uuid4()}/results"):
        problem(await api.get(path), 404, "unknown_batch")
    problem(await api.post(f"/v1/batches/{uuid4()}/cancel"), 404, "unknown_batch")


async def test_a_batch_is_safe_to_repeat(api: httpx.AsyncClient, ledger: Ledger) -> None:
    async def post(*values: object) -> httpx.Response:
        body = lines(*[{"task": "echo", "input": {"value": value}} for value in values])
        return await api.post("/v1/batches", content=body, headers=JSONL | {"Idempotency-Key": "k"})

    answers = await asyncio.gather(*[post(1, 2) for _ in range(10)])
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert await count(ledger) == 2
    problem(await post(2, 1), 422, "idempotency_key_reused")
    assert await count(ledger) == 2


_NARROWED = """update task_types set input_schema = '{"required": ["other"]}'"""
_REMOVED = "delete from task_types where name = 'echo'"


@pytest.mark.parametrize(
    ("change", "lines", "status"),
    [
        (_NARROWED, 0, 422),
        (_REMOVED, 0, 404),
        ("delete from task_types", 0, 503),
        (_NARROWED, 30, 422),
        (_REMOVED, 30, 422),
    ],
)
async def test_a_request_is_safe_to_repeat_when_its_task_has_changed(
    ledger: Ledger, store: Store, worker: UUID, change: str, lines: int, status: int
) -> None:
    await task_types.register(ledger, [ECHO.model_copy(update={"name": "another"})])
    path, body = "/v1/tasks/echo/runs", '{"input": {"value": 1}}\n'
    if lines:
        path, body = "/v1/batches?task=echo", body * lines

    async def post(key: str, content: str = body) -> httpx.Response:
        async with over(ledger, store) as api:  # one that has read no task yet
            headers = {"Idempotency-Key": key, "Content-Type": "application/jsonl" if lines else "application/json"}
            return await api.post(path, content=content, headers=headers)

    first = await post("k")
    await ledger.execute(change)
    again = await post("k")
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["idempotent-replayed"] == "true"
    assert [(await post("other")).status_code, (await post("k", body.replace("1", "2"))).status_code] == [status] * 2
    await ledger.execute("delete from runs")
    assert lines or (await post("k")).status_code == status


async def test_batches_are_cancelled_while_they_are_worked_on(
    api: httpx.AsyncClient, ledger: Ledger, worker: UUID
) -> None:
    await limits.limit(ledger, "gpu", Limits(max_running=50))
    body = lines(*[{"task": "echo", "input": {"value": n}, "lane": "gpu"} for n in range(1500)])
    batch = (await api.post("/v1/batches", content=body, headers=JSONL)).json()

    async def work() -> None:
        while taken := await claims.claim(ledger, pool="default", cursor=0, limit=10, worker_id=worker, lease=LEASE):
            done = [
                settlement.Settlement(
                    id=claim.id, fence=claim.fence, state="completed", result="1", result_key="k", lane="gpu"
                )
                for claim in taken
            ]
            await settlement.settle(ledger, worker, done)

    working = [asyncio.create_task(work()) for _ in range(3)]
    found = await batches.cancel(ledger, UUID(batch["id"]))
    await asyncio.gather(*working)
    found = await batches.get(ledger, found.id)
    assert found.states.keys() <= {State.CANCELLED, State.COMPLETED}
    assert sum(found.states.values()) == 1500
    assert (await limits.get(ledger, "gpu")).queued == 0


async def test_while_a_batch_is_read_other_requests_go_on(api: httpx.AsyncClient) -> None:
    body = lines(*[{"task": "echo", "input": {"value": n}} for n in range(2000)])
    batch = asyncio.create_task(api.post("/v1/batches", content=body, headers=JSONL))
    answered = 0
    while not batch.done():
        assert (await api.get("/livez")).status_code == 200
        answered += 1
        await asyncio.sleep(0)  # this transport answers without yielding to the loop
    assert (await batch).status_code == 202
    assert answered > 10


# Lanes and deadlines


async def test_lanes_are_limited_and_lifted(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    assert (await api.get("/v1/lanes")).json() == {"items": []}
    problem(await api.get("/v1/lanes/gpu"), 404, "unknown_lane")
    problem(await api.delete("/v1/lanes/gpu"), 404, "unknown_lane")
    for wrong in ({}, {"max_running": -1}, {"max_per_minute": 0}, {"most": 1}, [], {"max_running": None}):
        problem(await api.put("/v1/lanes/gpu", json=wrong), 422, "invalid_input")
    problem(await api.put(f"/v1/lanes/{'x' * 201}", json={"max_running": 1}), 422, "invalid_input")
    lane = (await api.put("/v1/lanes/gpu", json={"max_running": 1})).json()
    assert lane == {
        "name": "gpu",
        "max_running": 1,
        "max_per_minute": None,
        "running": 0,
        "queued": 0,
        "held": 0,
        "oldest_age_seconds": None,
        "per_minute": 0.0,
        "paused": None,
        "problem": None,
    }
    for n in range(3):
        body = {"input": {"value": n}, "lane": "gpu"}
        assert (await api.post("/v1/tasks/echo/runs", json=body)).json()["lane"] == "gpu"

    async def look() -> dict[str, Any]:
        return dict((await api.get("/v1/lanes/gpu")).json())

    await until(look, lambda lane: (lane["running"] + lane["queued"], lane["held"]) == (1, 2))
    assert [lane["name"] for lane in (await api.get("/v1/lanes")).json()["items"]] == ["gpu"]
    assert (await api.delete("/v1/lanes/gpu")).status_code == 204
    problem(await api.get("/v1/lanes/gpu"), 404, "unknown_lane")
    taken: list[claims.Claim] = []

    async def take() -> int:  # a promotion that began before the end of the limits may hold the lane a moment longer
        taken.extend(await claims.claim(ledger, pool="default", cursor=0, limit=10, worker_id=worker, lease=LEASE))
        return len(taken)

    await until(take, lambda number: number == 3)


async def test_an_expired_run_has_no_result_and_shows_why(api: httpx.AsyncClient, ledger: Ledger) -> None:
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    run = (await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}, "deadline": later})).json()
    await ledger.execute("update runs set deadline = now()")
    await dispatch.dispatch_due(ledger)
    assert (await api.get(f"/v1/runs/{run['id']}")).json()["state"] == "expired"
    found = problem(await api.get(f"/v1/runs/{run['id']}/result"), 409, "no_result")
    assert "deadline" in str(found["detail"])
    status = (await api.get(f"/tasks/{run['id']}/status")).json()
    assert (status["status"], "deadline" in status["message"]) == ("error", True)


async def test_wrong_lines_are_skipped_and_have_their_errors(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    late = {"deadline": "2020-01-01T00:00:00Z"}
    body = (
        lines(
            {"task": "echo", "input": {"value": 1}, "custom_id": "a", "metadata": {"customer": "x"}},
            {"task": "echo", "input": {"n": 1}, "custom_id": "b"},
            {"task": "nope", "input": {}},
            {"task": "echo", "input": {"value": "x" * 100_000}, "custom_id": "late", **late},
            {"task": "echo", "input": {"value": 2}, "custom_id": "a"},
            {"task": "echo", "input": {"value": 3}, "custom_id": "c", "metadata": {"custom_id": "d"}},
            {"task": "echo", "input": {"value": 4}, "custom_id": ""},
            {"task": "echo", "input": {"value": "y" * 100_000}, "custom_id": "large"},
            {"task": "echo", "input": {"value": 5}, "custom_id": "n", "metadata": {str(n): "" for n in range(32)}},
        )
        + "not JSON\n"
    )
    refused = await api.post("/v1/batches", content=body, headers=JSONL)
    problem(refused, 422, "invalid_input")
    assert {error["pointer"].split("/")[1] for error in refused.json()["errors"]} == set("12345689")
    keyed = JSONL | {"Idempotency-Key": "k"}
    batch = (await api.post("/v1/batches?on_error=skip", content=body, headers=keyed)).json()
    assert (batch["size"], batch["skipped"], batch["states"]) == (2, 8, {"queued": 2})
    again = await api.post("/v1/batches?on_error=skip", content=body, headers=keyed)
    assert (again.json()["id"], again.headers["Idempotent-Replayed"]) == (batch["id"], "true")
    problem(await api.post("/v1/batches", content=body, headers=keyed), 422, "invalid_input")
    errors = [json.loads(line) for line in (await api.get(f"/v1/batches/{batch['id']}/errors")).text.splitlines()]
    assert [(error["line"], error["custom_id"]) for error in errors] == [
        (2, "b"), (3, None), (4, "late"), (5, "a"), (6, "c"), (7, ""), (9, "n"), (10, None)
    ]  # fmt: skip
    assert errors[0]["errors"] == [{"pointer": "/input", "detail": "'value' is a required property"}]
    assert "line 1 has it already" in errors[3]["detail"]
    await end(ledger, store, worker, "1")
    results = [json.loads(line) for line in (await api.get(f"/v1/batches/{batch['id']}/results")).text.splitlines()]
    assert [(result["custom_id"], result["result"]) for result in results] == [("a", 1), ("large", 1)]
    assert results[0]["metadata"] == {"customer": "x", "custom_id": "a"}
    found = (await api.get("/v1/runs?metadata.custom_id=a")).json()["items"]
    assert [run["id"] for run in found] == [results[0]["id"]]


async def test_a_batch_of_wrong_lines_only_is_refused_also_when_they_may_be_skipped(api: httpx.AsyncClient) -> None:
    body = lines(*[{"task": "echo", "input": {}} for _ in range(1500)])
    refused = await api.post("/v1/batches?on_error=skip", content=body, headers=JSONL)
    problem(refused, 422, "invalid_input")
    assert len(refused.json()["errors"]) == 20
    right = json.dumps({"task": "echo", "input": {"value": 1}}) + "\n"
    batch = (await api.post("/v1/batches?on_error=skip", content=body + right, headers=JSONL)).json()
    assert (batch["size"], batch["skipped"]) == (1, 1500)
    errors = await api.get(f"/v1/batches/{batch['id']}/errors")
    assert len(errors.text.splitlines()) == 1000
    problem(await api.get(f"/v1/batches/{uuid7()}/errors"), 404, "unknown_batch")
