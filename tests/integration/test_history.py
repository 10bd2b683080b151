"""Prefect's own server shows every run. While it is away, no caller and no worker is affected."""

import asyncio
import contextlib
import json
import sys
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from backcast.history import reconciliation
from backcast.history.delivery import Delivery, Undelivered
from backcast.history.sink import Sink
from backcast.ledger import provisioning
from backcast.ledger.connection import Ledger
from backcast.ledger.history import Entry
from backcast.local import postgres
from backcast.models import uuid7
from backcast.settings import Prefect
from tests.support import ended
from tests.support.stack import Stack, free_port, prefect_server, stack
from tests.support.waiting import until


async def seen(url: str, run_id: str, state: str) -> dict[str, Any]:
    """The run as Prefect has it, once it is in this state."""
    async with httpx.AsyncClient() as client:

        async def look() -> dict[str, Any]:
            answer = await client.get(f"{url}/task_runs/{run_id}")
            return dict(answer.json()) if answer.status_code == 200 else {}

        return await until(look, lambda run: run.get("state_type") == state)


async def logs(url: str, run_id: str) -> list[str]:
    async with httpx.AsyncClient() as client:

        async def look() -> list[str]:
            wanted = {"logs": {"task_run_id": {"any_": [run_id]}}, "sort": "TIMESTAMP_ASC"}
            return [log["message"] for log in (await client.post(f"{url}/logs/filter", json=wanted)).json()]

        return await until(look, lambda found: len(found) >= 2)


async def test_prefect_shows_every_run(database: str, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    async with stack(database, tmp_path, BACKCAST_PREFECT__HISTORY="true", BACKCAST_PREFECT__API_URL=url) as product:
        # The worker starts and works without any Prefect server.
        await product.up("api", "worker")
        before = await product.submit("echo", value=1)
        await product.result(before)
        async with prefect_server(tmp_path, port=port) as server:
            await check(product, url, before)
            server.kill()
            during = [await product.submit("echo", value=n) for n in range(30)]
            for run_id in during:
                await product.result(run_id)
        async with prefect_server(tmp_path, port=port) as server:
            for run_id in during:
                await seen(url, run_id, "COMPLETED")


async def check(product: Stack, url: str, before: str) -> None:
    echoed = await seen(url, before, "COMPLETED")
    ours = await product.run(before)
    assert echoed["name"] == "echo"
    assert list(echoed["task_inputs"]) == ["value"]
    times = [ours["started_at"], echoed["start_time"], echoed["end_time"], ours["finished_at"]]
    assert times == sorted(times, key=_seconds), "claimed, begun, ended, recorded"
    talked = await product.submit("talk", words="hello")
    await product.result(talked)
    await seen(url, talked, "COMPLETED")
    assert await logs(url, talked) == ["logged: hello", "printed: hello"]
    failed = await product.submit("fail", kind="usage")
    await product.ended(failed)
    assert "as asked" in (await seen(url, failed, "FAILED"))["state"]["message"]
    retried = await product.submit("flaky", name="h", fails=2)
    await product.result(retried)
    assert (await seen(url, retried, "COMPLETED"))["run_count"] == 3
    running = await product.submit("linger", name="for ever")
    await seen(url, running, "RUNNING")
    await product.http.post(f"/v1/runs/{running}/cancel")
    await seen(url, running, "CANCELLED")


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


async def test_prefect_also_shows_runs_that_no_worker_has_published(
    database: str, tmp_path: Path, ledger: Ledger
) -> None:
    """Runs that wait, that are cancelled while they wait, and that fail before their first attempt."""
    async with prefect_server(tmp_path) as server:
        env = {"BACKCAST_PREFECT__HISTORY": "true", "BACKCAST_PREFECT__API_URL": server.url}
        async with stack(database, tmp_path, BACKCAST_UNKNOWN_AFTER="PT1S", **env) as product:
            await product.up("api", "worker", "steward")
            product.parts[1].kill()
            await ledger.execute(
                """insert into task_types (name, pool, version, description, input_schema, output_schema, retries,
                                           max_attempts)
                   select 'gone', pool, version, '', '{}', '{}', 0, 1 from task_types limit 1"""
            )
            done, cancelled, gone = [
                await product.submit("echo", value=1),
                await product.submit("echo", value=2),
                await product.submit("gone"),
            ]
            waiting = await seen(server.url, done, "SCHEDULED")
            assert waiting["name"] == "echo"
            assert list(waiting["task_inputs"]) == ["value"]
            await seen(server.url, cancelled, "SCHEDULED")
            await product.http.post(f"/v1/runs/{cancelled}/cancel")
            await seen(server.url, cancelled, "CANCELLED")
            await product.start("worker").ready()
            completed = await seen(server.url, done, "COMPLETED")
            assert completed["id"] == done
            failed = await seen(server.url, gone, "FAILED")
            assert "deploy one whose BACKCAST_TASKS names" in failed["state"]["message"]


class _Behind:
    """A sink whose server shows one more end at each look, once it was asked; what it gets first may be lost."""

    def __init__(self, *, loses_first: int = 0, remembers: int = 0) -> None:
        """`remembers`: of those that it loses, it comes to show so many, one now and then."""
        self.loses, self.got, self.shown = loses_first, list[UUID](), set[UUID]()
        self._waiting, self._later, self._remembers, self._looks = list[UUID](), list[UUID](), remembers, 0
        self.server = self

    def record(self, entry: Entry) -> None:
        self.got.append(entry.id)
        if self.loses:
            self.loses -= 1
            if len(self._later) < self._remembers:
                self._later.append(entry.id)
        else:
            self._waiting.append(entry.id)

    async def count(self, runs: list[UUID], _kind: str) -> int:
        self._looks += 1
        if self._waiting:
            self.shown.add(self._waiting.pop(0))
        elif self._later and self._looks % 5 == 0:
            self.shown.add(self._later.pop(0))
        return len(self.shown.intersection(runs))

    async def states(self, runs: list[UUID]) -> dict[UUID, str | None]:
        return {run: "COMPLETED" if run in self.shown else None for run in runs}


async def test_a_server_that_is_behind_gets_no_end_again_and_one_that_lost_some_does(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciliation, "PATIENCE", (0.5,) * 3)
    monkeypatch.setattr(reconciliation, "LOOK_EVERY", 0.05)
    runs = [uuid7(50.0) for _ in range(20)]  # at the first of the ages, and at no other
    await ledger.execute(
        """insert into runs (id, task, pool, owner, state, max_attempts, input, metadata)
           select unnest($1::uuid[]), 't', 'default', 'o', 'queued', 1, '{}', '{}'""",
        runs,
    )
    await ended.end(ledger, "completed")
    behind = _Behind()
    await reconciliation.Reconciliation(ledger, behind, None).reconcile()  # type: ignore[arg-type]
    assert behind.shown == set(runs)
    assert len(behind.got) == len(runs), "although it took longer than the patience for all of them"
    await ledger.execute("delete from cursors")
    losing = _Behind(loses_first=5)
    await reconciliation.Reconciliation(ledger, losing, None).reconcile()  # type: ignore[arg-type]
    assert losing.shown == set(runs)
    assert len(losing.got) == len(runs) + 5, "only those that it has lost"
    await ledger.execute("delete from cursors")
    forgetful = _Behind(loses_first=len(runs), remembers=1000)
    monkeypatch.setattr(reconciliation, "PACE", 0.3)
    await reconciliation.Reconciliation(ledger, forgetful, None).reconcile()  # type: ignore[arg-type]
    assert forgetful.shown == set(runs)
    assert len(forgetful.got) > len(runs), "it is not waited for as long as it shows one more now and then"


async def flushed(sink: Sink) -> bool:  # Prefect may refuse any write with 503; the sink keeps it and sends it again
    await sink._flush()
    return True


PLAIN = """
from prefect import task
@task
def plain() -> int:
    return 1
plain()
"""


async def test_retention_removes_our_history_and_nobody_elses(database: str, tmp_path: Path) -> None:
    async with (
        prefect_server(tmp_path) as server,
        stack(database, tmp_path, BACKCAST_PREFECT__API_URL=server.url, BACKCAST_PREFECT__HISTORY="true") as product,
    ):
        env = product.environment(PREFECT_API_URL=server.url)
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", PLAIN, env=env)
        assert await process.wait() == 0
        await product.up("api", "worker")
        ours = [await product.submit("echo", value=1), await product.submit("parent")]
        for run in ours:
            await seen(server.url, run, "COMPLETED")

        async def names() -> list[str]:
            async with httpx.AsyncClient() as client:
                answer = await client.post(f"{server.url}/task_runs/filter", json={"sort": "END_TIME_DESC"})
                return sorted(run["name"].partition("-")[0] for run in answer.raise_for_status().json())

        await until(names, lambda found: found == ["child", "echo", "parent", "plain"])
        keep = {"BACKCAST_STEWARD__KEEP_HISTORY": "0", "BACKCAST_STEWARD__SWEEP": "1"}
        steward = product.start("steward", **keep)
        await until(names, lambda found: found == ["plain"])
        await until(lambda: asyncio.to_thread(lambda: steward.text), lambda text: "of this ledger from Prefect" in text)


async def test_a_task_delays_another_one_as_in_plain_prefect(database: str, tmp_path: Path) -> None:
    """A process that serves it with plain Prefect runs it; what plain Prefect allows in flows only fails here too."""
    async with (
        prefect_server(tmp_path) as server,
        stack(database, tmp_path, BACKCAST_PREFECT__API_URL=server.url, BACKCAST_PREFECT__HISTORY="true") as product,
    ):
        await product.up("api", "worker")
        serve = "from tests.support.sample_tasks import delayed; delayed.serve()"
        product.spawn("serve", [sys.executable, "-c", serve], "", PREFECT_API_URL=server.url)
        order = {"item": "tea", "quantity": 1, "due": "2030-01-01"}
        for task, year in (("delaying", 2031), ("delaying_in_a_thread", 2032)):
            run = await product.result(await product.submit(task, order=order))
            await seen(server.url, run, "COMPLETED")
            assert (tmp_path / f"calls-tea-{year}").read_text() == "."
        for method in ("submit", "map"):
            run = await product.ended(await product.submit("calling", method=method))
            assert "outside of a flow, please" in run["error"]["detail"]


async def test_runs_in_prefect_can_be_read_and_deleted(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    old, young, waiting, late, unknown = (uuid7() for _ in range(5))

    def entry(run: UUID, state: Any, at: datetime) -> Entry:
        return Entry(run, "t", state, ["x"], "why", at, at, None if state == "scheduled" else at, 1)

    async with prefect_server(tmp_path) as server:
        sink = Sink(Prefect(api_url=server.url))
        sink.tag = "backcast:this ledger"
        sink.record(entry(old, "failed", now - timedelta(days=2)))
        sink.record(entry(young, "completed", now))
        sink.record(entry(waiting, "scheduled", now - timedelta(days=2)))
        sink.record(entry(late, "expired", now - timedelta(days=3)))
        others = {uuid7(): None, uuid7(): "backcast:another ledger"}
        for run, tag in others.items():
            other = Sink(Prefect(api_url=server.url))
            other.tag = tag
            other.record(entry(run, "completed", now - timedelta(days=2)))
            await until(partial(flushed, other))
            await other.aclose(1)
        stamp = now.isoformat()
        for line in ("first", "second"):
            sink.keep_log(
                {
                    "name": "n",
                    "level": 20,
                    "message": line,
                    "timestamp": stamp,
                    "task_run_id": str(old),
                }
            )

        await until(partial(flushed, sink))
        ids = [old, young, waiting, late, unknown]
        wanted = dict(zip(ids, ["FAILED", "COMPLETED", "SCHEDULED", "CANCELLED", None], strict=True))
        await until(lambda: sink.server.states(ids), lambda states: states == wanted)
        expired = await seen(server.url, str(late), "CANCELLED")
        assert expired["state"]["message"] == "Expired: why"
        assert await logs(server.url, str(old)) == ["first", "second"]

        async def deleted(limit: int) -> int:
            return await until(
                lambda: sink.server.delete_ended(str(sink.tag), now - timedelta(days=1), limit),
                lambda count: count is not None,
            )

        assert await deleted(1) == 1, "no more than the limit"
        assert await deleted(100) == 1
        wanted |= {old: None, late: None}
        assert await sink.server.states(ids) == wanted, "a waiting run has not ended"
        kept = dict.fromkeys(others, "COMPLETED")
        await until(lambda: sink.server.states(list(others)), lambda states: states == kept)
        assert await deleted(100) == 0, "none of another ledger, and none of nobody's"

        async def lines() -> int:
            async with httpx.AsyncClient() as client:
                question = {"logs": {"task_run_id": {"any_": [str(old)]}}}
                return len((await client.post(f"{server.url}/logs/filter", json=question)).json())

        await until(lines, lambda count: count == 0)
        server.kill()
        with pytest.raises(httpx.HTTPError):
            await sink.server.states(ids)
        with pytest.raises(httpx.HTTPError):
            await sink.server.delete_ended(str(sink.tag), now, 1)
        await sink.aclose(1)


async def test_what_prefect_refuses_is_found(server: postgres.Postgres, tmp_path: Path) -> None:
    """By an answer of 422 or of 503; and Prefect takes the probes."""
    provisioning.create_database(server.url(), "prefect_that_refuses")
    async with prefect_server(tmp_path, server.url("prefect_that_refuses")) as prefect:
        sink = Sink(Prefect(api_url=prefect.url))
        lines, events = Delivery(sink.server, "/logs/"), Delivery(sink.server, "/events")
        good = {"name": "n", "level": 20, "message": "good", "timestamp": datetime.now(UTC).isoformat()}
        surrogate = json.dumps(good | {"message": "\ud800"}).encode()
        batch = [b"{}", json.dumps(good).encode(), surrogate]

        async def refused(path: Delivery, batch: list[bytes]) -> list[tuple[bytes, str]]:
            with contextlib.suppress(Undelivered):  # it is busy
                return [(body, words[:3]) for body, words in await path.send(batch)]
            return []

        found = await until(partial(refused, lines, batch))
        assert [body for body, _ in found] == [b"{}", surrogate]
        assert found[0][1] == "422"
        assert await until(partial(refused, events, [b"{}"])) == [(b"{}", "422")]
        await sink.aclose(1)


async def test_text_that_prefect_cant_take_costs_its_neighbours_nothing(
    server: postgres.Postgres, database: str, tmp_path: Path
) -> None:
    provisioning.create_database(server.url(), "prefect_of_odd_text")
    async with (
        prefect_server(tmp_path, server.url("prefect_of_odd_text")) as prefect,
        stack(database, tmp_path, BACKCAST_PREFECT__API_URL=prefect.url, BACKCAST_PREFECT__HISTORY="true") as product,
    ):
        await product.up("api", "worker")
        kinds = ["surrogate", "plain", "nul", "plain", "long", "plain"]
        ran = [(kind, await product.submit("oddly", kind=kind)) for kind in kinds]
        talked = [await product.submit("talk", words=f"hello {n}") for n in range(10)]
        for kind, run in ran:
            assert await product.result(run) == kind
            shown = await seen(prefect.url, run, "COMPLETED")
            assert shown["name"]
            assert (shown["name"] == "plain") == (kind == "plain")
        for n, run in enumerate(talked):
            await product.result(run)
            assert await logs(prefect.url, run) == [f"logged: hello {n}", f"printed: hello {n}"]
        worker = product.parts[1]
        metrics = (await product.http.get(f"{worker.url}/metrics")).text
        assert "backcast_history_spooled_bytes 0.0" in metrics
        assert 'backcast_history_dropped_total{why="refused"}' not in metrics
