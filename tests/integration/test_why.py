"""Why a run is where it is, by HTTP: each cause has its code, its sentence and its figures."""

import math
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from backcast.api.app import create_app
from backcast.ledger import (
    claims,
    connection,
    dispatch,
    fleet,
    flights,
    limits,
    pauses,
    routing,
    runs,
    settlement,
)
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Settlement
from backcast.models import Limits, PauseKind, PauseRequest, Problem, TaskType, uuid7
from backcast.settings import Api
from backcast.store import Store
from backcast.worker.execution import SAME
from tests.integration.test_api import problem
from tests.integration.test_ledger import LEASE
from tests.support.waiting import until

TASK = TaskType(name="extract", pool="gpu", input_schema={"type": "object"}, retries=4)
REFUSED = Problem(code="temporarily_failed", title="It failed", detail="The provider answered 529.")


@pytest.fixture
async def api(ledger: Ledger, store: Store) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(ledger, store, Api()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture
async def worker(ledger: Ledger) -> UUID:
    return await register(ledger)


async def register(ledger: Ledger, task: TaskType = TASK, **fields: Any) -> UUID:
    worker = uuid7()
    given = {"pool": "gpu", "host": "node-1", "version": "1", "slots": 2, "tasks": [task], **fields}
    await fleet.register(ledger, worker, **given)
    return worker


async def submit(api: httpx.AsyncClient, **fields: Any) -> str:
    answer = await api.post("/v1/tasks/extract/runs", json={"input": {}, **fields})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def why(api: httpx.AsyncClient, run: str) -> dict[str, Any]:
    answer = await api.get(f"/v1/runs/{run}/why")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["sentence"].endswith("."), found
    assert None not in found.values()
    return found


async def word(api: httpx.AsyncClient, run: str) -> str | None:
    """The short form in the list's row, which is the run's own too."""
    [row] = [row for row in (await api.get("/v1/runs")).json()["items"] if row["id"] == run]
    assert row["why"] == (await api.get(f"/v1/runs/{run}")).json()["why"]
    return row["why"]


async def claim(ledger: Ledger, worker: UUID, limit: int = 1, **fields: Any) -> list[Claim]:
    return await claims.claim(ledger, pool="gpu", cursor=0, limit=limit, worker_id=worker, lease=LEASE, **fields)


async def settle(ledger: Ledger, worker: UUID, claim: Claim, **fields: Any) -> None:
    done = Settlement(id=claim.id, fence=claim.fence, lane=claim.lane, **fields)
    assert (await settlement.settle(ledger, worker, [done])).accepted


async def promoted(ledger: Ledger, run: str) -> None:
    """Wait until the API's promotion has taken this run."""
    await until(lambda: ledger.fetchrow("select id from runs where id = $1 and promoted", UUID(run)))


async def busy(ledger: Ledger, *, recent: float = 0.0) -> None:
    await ledger.execute("update workers set busy = slots, recent = $1, heartbeat_at = now()", recent)


async def recent(ledger: Ledger, table: str) -> float:
    row = await ledger.fetchrow(f"select recent from {table}")
    assert row is not None
    return float(row["recent"])


def faded(count: float, *, since: float, fewer: float = 0.0) -> float:
    """What a count has faded to at most, `fewer` seconds after `since` by our monotonic clock, in an answer with its
    three digits."""
    return count * math.exp(-(time.monotonic() - since + fewer) / 60) * 0.994


def is_estimate(found: dict[str, Any], seconds: float, since: float) -> bool:
    """The estimate grows while the count fades."""
    return seconds * 0.994 <= found["estimate_seconds"] <= seconds / faded(1.0, since=since) + 0.1


async def test_ready(api: httpx.AsyncClient, worker: UUID) -> None:
    run = await submit(api)
    found = await why(api, run)
    assert (found["code"], found["pool"], found["slots"]) == ("ready", "gpu", 2)
    assert await word(api, run) == "ready"


async def test_no_worker(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    run = await submit(api)
    await ledger.execute("update workers set heartbeat_at = now() - interval '5 minutes'")
    await ledger.execute("update task_types set seen_at = now() - interval '1 hour'")
    found = await why(api, run)
    assert found["code"] == "no_worker"
    assert found["sentence"].startswith(
        "No live worker of the pool 'gpu' serves the task 'extract'; the last one was seen "
    )
    seen = datetime.fromisoformat(found["last_seen_at"])
    assert timedelta(minutes=4) < datetime.now(UTC) - seen < timedelta(minutes=30)
    await ledger.execute("update workers set heartbeat_at = now(), draining = true")
    assert (await why(api, run))["code"] == "no_worker"
    await ledger.execute("delete from workers")
    await register(ledger, TaskType(name="other", pool="gpu", input_schema={}))
    assert (await why(api, run))["code"] == "no_worker"


async def test_parked_without_a_worker_or_a_version(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    run = await submit(api)
    [taken] = await claim(ledger, worker)
    route = routing.version_route("extract", "0ld")
    unfit = {"state": "scheduled", "route": route, "counts": 0, "error": routing.UNFIT_INPUT}
    await settle(ledger, worker, taken, **unfit)
    found = await why(api, run)
    assert (found["code"], found["error"]["code"], await word(api, run)) == (
        "unknown_version",
        "unfit_input",
        "unknown_version",
    )
    await ledger.execute("update workers set routes = routes || $1::text", route)
    assert (await why(api, run))["code"] == "ready"
    other = await submit(api)
    await ledger.execute("update workers set tasks = '{}', routes = '{}'")
    await claim(ledger, worker)
    found = await why(api, other)
    assert (found["code"], await word(api, other)) == ("no_worker", "no_worker")
    assert found["since"]


@pytest.mark.parametrize(("kind", "name"), [("task", "extract"), ("lane", "narrow"), ("pool", "gpu")])
async def test_paused(api: httpx.AsyncClient, ledger: Ledger, worker: UUID, kind: str, name: str) -> None:
    run = await submit(api, lane="narrow")
    until = datetime(2100, 1, 2, 3, 4, 5, tzinfo=UTC)
    await pauses.pause(ledger, PauseKind(kind), name, PauseRequest(reason="the prompt is bad", by="ana", until=until))
    found = await why(api, run)
    assert found["code"] == "paused"
    assert found["sentence"] == (
        f"The {kind} '{name}' is paused by ana because: the prompt is bad. The run waits until 2100-01-02T03:04:05Z."
    )
    assert (found["pause"]["kind"], found["pause"]["name"], found["until"]) == (kind, name, "2100-01-02T03:04:05Z")
    assert await word(api, run) == "paused"
    await ledger.execute("update pauses set until = now() - interval '1 second'")
    assert (await why(api, run))["code"] == "ready"


async def test_a_pause_without_words_and_end(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    run = await submit(api)
    await ledger.execute(
        "insert into pauses (kind, name, reason, by, release) values ('task', 'extract', '', '', false)"
    )  # the run is queued still
    found = await why(api, run)
    assert found["sentence"] == "The task 'extract' is paused. The run waits until somebody resumes it."


async def test_lane_full(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    await limits.limit(ledger, "narrow", Limits(max_running=1))
    await promoted(ledger, await submit(api, lane="narrow"))
    second, third = [await submit(api, lane="narrow") for _ in range(2)]
    other = await submit(api, lane="narrow", owner="other")
    first = await submit(api, lane="narrow", priority=9)
    began = time.monotonic()
    await ledger.execute("update lanes set recent = 6, refilled_at = now()")  # six in a minute
    found = await why(api, third)
    assert (found["code"], found["lane"], found["max_running"], found["running"]) == ("lane_full", "narrow", 1, 1)
    assert (found["runs_before"], found["owners"]) == (2, 1)
    assert is_estimate(found, 40, began), "two of its owner and one of the other start earlier"
    assert "at its limit, 1 of 1 runs; 2 runs of its owner are before it, and 1 other owners" in found["sentence"]
    for run, before in ((second, 1), (first, 0), (other, 0)):
        assert (await why(api, run))["runs_before"] == before
    assert await word(api, third) == "lane"
    await limits.limit(ledger, "narrow", Limits(max_running=0))
    assert "estimate_seconds" not in await why(api, third)


async def test_lane_rate(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    await limits.limit(ledger, "slow", Limits(max_per_minute=2))
    await promoted(ledger, await submit(api, lane="slow"))
    await ledger.execute("update lanes set tokens = -100000")
    second, third = [await submit(api, lane="slow") for _ in range(2)]
    found = await why(api, third)
    assert (found["code"], found["max_per_minute"], found["runs_before"]) == ("lane_rate", 2, 1)
    assert found["estimate_seconds"] == 60
    await limits.lift(ledger, "slow")
    await ledger.execute("update runs set state = 'held', promoted = false where id = $1", UUID(second))
    assert (await why(api, second))["code"] == "ready"


async def test_a_lane_counts_its_promotions_of_the_last_minute(
    api: httpx.AsyncClient, ledger: Ledger, worker: UUID
) -> None:
    await limits.limit(ledger, "wide", Limits(max_running=10))
    began = time.monotonic()
    for _ in range(5):
        await promoted(ledger, await submit(api, lane="wide"))
    assert faded(5, since=began) <= await recent(ledger, "lanes") <= 5
    began = time.monotonic()
    await ledger.execute("update lanes set recent = 4, refilled_at = now() - interval '1 minute'")
    await promoted(ledger, await submit(api, lane="wide"))
    assert 1 + faded(4, since=began, fewer=60) <= await recent(ledger, "lanes") <= 1 + 4 / math.e


async def test_behind(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    mine = [await submit(api, owner="me") for _ in range(3)]
    for n in range(2):
        await submit(api, owner=f"other-{n}")
    urgent = await submit(api, owner="me", priority=5)
    began = time.monotonic()
    await busy(ledger, recent=60)  # one in a second
    found = await why(api, mine[2])
    assert (found["code"], found["slots"], found["runs_before"], found["owners"]) == ("behind", 2, 3, 2)
    assert is_estimate(found, 6, began), "five start earlier"
    assert "at the present pace it starts in about" in found["sentence"]
    assert is_estimate(await why(api, urgent), 3, began)
    await busy(ledger, recent=0)
    assert "estimate_seconds" not in await why(api, mine[2])


async def test_counts_have_a_bound(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    await ledger.execute(
        """insert into runs (id, task, pool, owner, state, max_attempts, metadata, input, run_at)
           select gen_random_uuid(), 'extract', 'gpu', case when n <= 10500 then 'me' else 'o' || n end, 'queued', 3,
                  '{}', '{}', now() - interval '1 hour' from generate_series(1, 12000) n"""
    )
    run = await submit(api, owner="me")
    await busy(ledger)
    found = await why(api, run)
    assert found["runs_before"] == 10_000
    assert found["owners"] in (1000, 1001)
    assert "more than 10,000 runs of its owner are before it, and more than 1,000 other owners" in found["sentence"]


async def test_it_takes_three_statements_at_most(
    api: httpx.AsyncClient, ledger: Ledger, worker: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await submit(api)
    sent: list[str] = []

    async def counted(self: Ledger, sql: str, *values: Any) -> Any:
        sent.append(sql)
        rows = await self.fetch(sql, *values)
        return rows[0] if rows else None

    monkeypatch.setattr(connection.Ledger, "fetchrow", counted)
    await busy(ledger)
    assert (await why(api, run))["code"] == "behind"
    assert len(sent) == 3


async def test_scheduled(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    run = await submit(api, run_at="2100-01-01T00:00:00Z")
    found = await why(api, run)
    assert (found["code"], found["until"]) == ("scheduled", "2100-01-01T00:00:00Z")
    assert "2100-01-01T00:00:00Z" in found["sentence"]
    assert await word(api, run) == "scheduled"
    await ledger.execute("update runs set run_at = now() - interval '1 second'")
    assert (await why(api, run))["code"] == "ready"


async def test_retry_wait(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    run = await submit(api)
    for n in (1, 2):
        [taken] = await claim(ledger, worker)
        await settle(ledger, worker, taken, state="scheduled", delay=3600, error=REFUSED, retries_used=n)
        if n == 1:
            await ledger.execute("update runs set run_at = now()")
            await dispatch.dispatch_due(ledger)
    found = await why(api, run)
    assert (found["code"], found["attempt"], found["attempts"], found["error"]["code"]) == (
        "retry_wait",
        2,
        5,
        "temporarily_failed",
    )
    assert found["until"] in (await api.get(f"/v1/runs/{run}")).json()["run_at"]
    assert "attempt 2 of 5 has failed: temporarily_failed, The provider answered 529." in found["sentence"]
    assert found["since"] < found["until"]
    assert await word(api, run) == "retry"


async def test_an_attempt_that_could_not_start_waits_too(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    run = await submit(api)
    [taken] = await claim(ledger, worker)
    await settle(ledger, worker, taken, state="scheduled", delay=5, error=REFUSED, counts=0)
    found = await why(api, run)
    assert (found["code"], found["attempt"]) == ("retry_wait", 0)
    assert "it could not start" in found["sentence"]


async def test_same_value(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    first, second = await submit(api), await submit(api)
    one, two = await claim(ledger, worker, 2)
    assert (str(one.id), str(two.id)) == (first, second)
    assert await flights.take(ledger, "key", one)
    await settle(ledger, worker, two, state="scheduled", delay=5, error=SAME, counts=0, flight="key")
    found = await why(api, second)
    assert (found["code"], found["run_id"]) == ("same_value", first)
    assert first in found["sentence"]
    assert await word(api, second) == "same_value"
    await ledger.execute("delete from flights")
    assert "another run" in (await why(api, second))["sentence"]


async def test_released(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    run = await submit(api)
    [taken] = await claim(ledger, worker)
    await settle(ledger, worker, taken, state="queued", counts=0)
    await fleet.retire(ledger, worker)
    other = await register(ledger, host="node-2")
    found = await why(api, run)
    assert (found["code"], found["worker_id"], found["host"]) == ("released", str(worker), "node-1")
    assert "The worker on node-1 has stopped and released it" in found["sentence"]
    [taken] = await claim(ledger, other)
    await settle(ledger, other, taken, state="queued", counts=1, retries_used=1, error=REFUSED)
    assert (await why(api, run))["code"] == "ready"


async def test_running_with_its_progress_and_stopping(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    run = await submit(api)
    [taken] = await claim(ledger, worker)
    found = await why(api, run)
    assert (found["code"], found["worker_id"], found["host"]) == ("running", str(worker), "node-1")
    assert (found["attempt"], found["attempts"]) == (1, 5)
    assert found["since"] == (await api.get(f"/v1/runs/{run}")).json()["started_at"]
    assert await word(api, run) is None
    await ledger.execute(
        """update runs set progress = '{"fraction": 0.4, "message": "page 12 of 30", "attempt": 1, "fence": 1, "seq": 1,
              "at": "2026-01-01T00:00:00Z"}'"""
    )
    found = await why(api, run)
    assert found["progress"]["fraction"] == 0.4
    assert "last progress: 40%, page 12 of 30" in found["sentence"]
    await ledger.execute("update runs set prefetched = true")
    assert (await why(api, run))["code"] == "ready"
    await runs.cancel(ledger, taken.id)
    found = await why(api, run)
    assert (found["code"], found["host"]) == ("stopping", "node-1")


async def test_ended(api: httpx.AsyncClient, ledger: Ledger, worker: UUID) -> None:
    completed, failed, running, waiting = [await submit(api) for _ in range(4)]
    late = await submit(api, deadline=(datetime.now(UTC) + timedelta(hours=1)).isoformat())
    await ledger.execute("update runs set created_at = created_at - interval '1 hour'")
    await api.post(f"/v1/runs/{waiting}/cancel")
    taken = {str(each.id): each for each in await claim(ledger, worker, 3)}
    await ledger.execute("update runs set started_at = started_at - interval '10 minutes' where state = 'running'")
    done = {"result": "1", "result_key": "results/1.json"}
    await settle(ledger, worker, taken[completed], state="completed", **done)
    await settle(ledger, worker, taken[failed], state="failed", error=REFUSED)
    await api.post(f"/v1/runs/{running}/cancel")
    await settle(ledger, worker, taken[running], state="failed")
    await ledger.execute("update runs set deadline = now()")
    await dispatch.dispatch_due(ledger)
    for run, code in ((completed, "completed"), (failed, "failed"), (running, "cancelled")):
        found = await why(api, run)
        assert (found["code"], found["host"], found["attempt"]) == (code, "node-1", 1)
        assert found["waited_seconds"] == pytest.approx(3000, abs=300)
        assert found["ran_seconds"] == pytest.approx(600, abs=120)
        assert re.search(r"It waited for \d+ min and ran for \d+ min\.", found["sentence"])
        assert await word(api, run) is None
    found = await why(api, failed)
    assert found["error"]["code"] == "temporarily_failed"
    assert "It has failed: temporarily_failed, The provider answered 529." in found["sentence"]
    for run, code in ((waiting, "cancelled"), (late, "expired")):
        found = await why(api, run)
        assert (found["code"], found["waited_seconds"]) == (code, pytest.approx(3600, abs=300))
        assert "ran_seconds" not in found


async def test_unknown_runs(api: httpx.AsyncClient) -> None:
    problem(await api.get(f"/v1/runs/{uuid4()}/why"), 404, "unknown_run")
    problem(await api.get("/v1/runs/42/why"), 404, "unknown_run")


async def test_a_heartbeat_keeps_the_pace_of_the_last_minute(ledger: Ledger, worker: UUID) -> None:
    async def beat(settled: int) -> float:
        async with ledger.session() as connection:
            await fleet.beat(connection, worker, busy=0, draining=False, settled=settled)
        return await recent(ledger, "workers")

    began = time.monotonic()
    assert await beat(10) == 10
    second = await beat(10)
    assert faded(10, since=began) <= second <= 10
    began = time.monotonic()
    await ledger.execute("update workers set recent = 10, heartbeat_at = now() - interval '1 minute'")
    third = await beat(30)
    assert 20 + faded(10, since=began, fewer=60) <= third <= 20 + 10 / math.e
    for odd in ("'NaN'", "'Infinity'", "-1", "1e-300", "1e300"):
        await ledger.execute(f"update workers set recent = {odd}")
        assert await beat(30) == 0
    for odd in ("'infinity'", "'-infinity'", "'9999-01-01'", "'4713-01-01 BC'"):
        await ledger.execute(f"update workers set recent = 5, heartbeat_at = {odd}")
        await beat(30)
