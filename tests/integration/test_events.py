"""What runs report while they run, and the streams of events: each state once and in order, from any place, from any
API process.
"""

import asyncio
import itertools
import json
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from backcast.client import AsyncClient
from backcast.ledger import events, recovery, runs, settlement
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.ledger.events import Event, Report
from backcast.models import Progress, uuid7
from backcast.steward.retention import Retention
from backcast.store import Store
from tests.integration.test_ledger import LEASE, claim, completed, register, silence, submit
from tests.support import ended as homes
from tests.support.stack import Stack, stack
from tests.support.streams import Sent, all_of
from tests.support.streams import events as stream
from tests.support.waiting import until

STREAMS = 20


@pytest.fixture
async def served(database: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(database, tmp_path, BACKCAST_API__MAX_STREAMS=str(STREAMS)) as running:
        await running.up("api")
        yield running


@pytest.fixture
async def product(served: Stack) -> Stack:
    await served.up("worker")
    return served


def of_run(run_id: object) -> str:
    return f"/v1/runs/{run_id}/events"


def names(sent: list[Sent]) -> list[str]:
    return [each.name for each in sent if each.name != "progress"]


def outputs(sent: list[Sent]) -> list[Any]:
    return [each.data["data"] for each in sent if each.name == "output"]


async def kept(ledger: Ledger) -> int:
    [row] = await ledger.fetch("select count(*) from events")
    return int(row["count"])


# -- what tasks report ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "given"),
    [("report", {"way": "loop"}), ("report", {"way": "thread"}), ("report_in_thread", {})],
)
async def test_a_task_reports_from_its_loop_and_its_threads(product: Stack, task: str, given: dict[str, Any]) -> None:
    run_id = await product.submit(task, steps=5, **given)
    assert await product.result(run_id) == 5
    sent = await all_of(product.http, of_run(run_id))
    assert names(sent) == ["queued", "started", *["output"] * 5, "ended"]
    assert outputs(sent) == [{"step": n} for n in range(1, 6)]
    assert sent[-1].data["result"] == 5
    progress = (await product.run(run_id))["progress"]
    assert (progress["fraction"], progress["attempt"]) == (1.0, 1)
    [shown] = [each.data for each in sent if each.name == "progress"]
    assert shown == progress


async def test_a_run_that_lasts_shows_what_it_reports(product: Stack) -> None:
    run_id = await product.submit("report_and_linger", name="a")
    run = await until(lambda: product.run(run_id), lambda run: run["progress"] is not None)
    assert (run["state"], run["progress"]["message"]) == ("running", "page 12 of 30")
    following = stream(product.http, of_run(run_id))
    seen = [await anext(following) for _ in range(4)]
    assert [each.name for each in seen if isinstance(each, Sent)] == ["queued", "started", "progress", "output"]
    product.release("a")
    sent = [each async for each in following if isinstance(each, Sent)]
    assert (outputs(sent), sent[-1].name, sent[-1].data["result"]) == (["last"], "ended", "a")
    assert names(await all_of(product.http, of_run(run_id))) == ["queued", "started", "output", "output", "ended"]


async def test_a_run_that_reports_nothing_writes_nothing(product: Stack, ledger: Ledger) -> None:
    run_id = await product.submit("echo", value=1)
    assert await product.result(run_id) == 1
    assert (await kept(ledger), (await product.run(run_id))["progress"]) == (0, None)
    assert names(await all_of(product.http, of_run(run_id))) == ["queued", "started", "ended"]


async def test_text_with_any_separator_is_one_line(product: Stack) -> None:
    value = "a\x85b\u2028c\u2029d\x0be\x0cf\x1cg\r\nh"
    run_id = await product.submit("echo", value=value)
    assert await product.result(run_id) == value
    assert (await all_of(product.http, of_run(run_id)))[-1].data["result"] == value
    async with AsyncClient(str(product.http.base_url)) as client:
        [*_, end] = [event async for event in client.stream(run_id)]
    assert (end.name, end.data["result"]) == ("ended", value)


async def test_what_an_attempt_emits_is_bounded_and_the_rest_is_counted(product: Stack, ledger: Ledger) -> None:
    run_id = await product.submit("report", steps=1200)
    assert await product.result(run_id) == 1200
    sent = await all_of(product.http, of_run(run_id))
    assert outputs(sent) == [{"step": n} for n in range(1, 1001)]
    assert [each.data["data"] for each in sent if each.name == "dropped"] == [200]
    assert await kept(ledger) == 1001


@pytest.mark.parametrize("task", ["report_and_fail", "report_and_fail_at_once"])
async def test_every_reader_sees_each_state_once_and_in_order(product: Stack, task: str) -> None:
    """Whether it comes first or late, and from whatever event it goes on, on whatever API process."""
    run_id = await product.submit(task, name=task, fails=2)
    early = await all_of(product.http, of_run(run_id))
    attempt = ["started", "output", "retrying"]
    assert names(early) == ["queued", *attempt, *attempt, "started", "output", "ended"]
    assert outputs(early) == [1, 2, 3]
    assert [each.data["attempt"] for each in early[1:-1]] == [1, 1, 1, 2, 2, 2, 3, 3]
    ids = [each.id for each in early]
    assert len(set(ids)) == len(ids)

    other = product.start("api")
    await other.ready()
    async with httpx.AsyncClient(base_url=other.url, timeout=product.http.timeout) as elsewhere:
        assert [each.id for each in await all_of(elsewhere, of_run(run_id))] == ids
        for place, last in enumerate(ids[:-1], 1):
            assert [each.id for each in await all_of(elsewhere, of_run(run_id), last=last)] == ids[place:]
        done = await elsewhere.get(of_run(run_id), headers={"Last-Event-ID": ids[-1]})
        assert done.status_code == 204


# -- the ledger -------------------------------------------------------------------------------------------------------


def report(claimed: Claim, *numbers: int, fraction: float = 0.5) -> Report:
    at = datetime.now(UTC)
    emitted = [Event(1, claimed.fence, number, at, "output", "1") for number in numbers]
    return Report(claimed.id, claimed.fence, Progress(fraction=fraction, at=at, attempt=1), 1, emitted)


async def test_a_worker_that_has_lost_a_run_reports_nothing_of_it(ledger: Ledger) -> None:
    lost, worker = await register(ledger), await register(ledger)
    run = (await submit(ledger)).run
    [before] = await claim(ledger, lost)
    await events.record(ledger, lost, [report(before, 1, fraction=0.1)])
    await silence(ledger, lost)
    await recovery.requeue(ledger, LEASE)
    await events.record(ledger, lost, [report(before, 2)])
    [after] = await claim(ledger, worker)
    await events.record(ledger, lost, [report(before, 2)])
    await events.record(ledger, lost, [report(before._replace(fence=after.fence), 2)])
    await events.record(ledger, worker, [report(before, 2)])
    assert await kept(ledger) == 1
    progress = (await runs.get(ledger, run.id)).progress
    assert progress is not None
    assert progress.fraction == 0.1
    await settlement.settle(ledger, worker, [completed(after)])
    await events.record(ledger, worker, [report(after, 1)])
    assert await kept(ledger) == 1, "no event comes after the end"


async def test_reports_that_are_sent_again_are_recorded_once(ledger: Ledger) -> None:
    worker = await register(ledger)
    for _ in range(5):
        await submit(ledger)
    reports = [report(claimed, 1, 2) for claimed in await claim(ledger, worker)]
    again = [events.record(ledger, worker, order) for order in (reports, reports[::-1]) for _ in range(10)]
    await asyncio.gather(*again)
    assert await kept(ledger) == 10


async def test_reports_race_with_settlements_and_cancels(ledger: Ledger) -> None:
    """Neither waits for the other for ever, and nothing is recorded after the end."""
    worker = await register(ledger)
    for _ in range(30):
        await submit(ledger)
    held = await claim(ledger, worker, 30)

    async def reporting() -> None:
        for number in range(1, 20):
            await events.record(ledger, worker, [report(each, number) for each in reversed(held)])

    async def settling() -> None:
        for start in range(0, 30, 10):
            await settlement.settle(ledger, worker, [completed(each) for each in held[start : start + 10]])

    cancelling = [runs.cancel(ledger, each.id) for each in held]
    await asyncio.gather(reporting(), settling(), *cancelling)
    recorded = await kept(ledger)
    await events.record(ledger, worker, [report(each, 100) for each in held])
    assert await kept(ledger) == recorded


async def test_the_events_of_a_run_are_bounded_whatever_its_attempts(ledger: Ledger) -> None:
    worker = await register(ledger)
    await submit(ledger)
    [claimed] = await claim(ledger, worker)
    await events.record(ledger, worker, [report(claimed, *range(1, events.MOST + 1))])
    await events.record(ledger, worker, [report(claimed, events.MOST + 1)])
    assert await kept(ledger) == events.MOST


async def test_events_are_removed_with_their_run(ledger: Ledger, store: Store) -> None:
    worker = await register(ledger)
    ids = [(await submit(ledger)).run.id for _ in range(2)]
    held = await claim(ledger, worker)
    await events.record(ledger, worker, [report(each, 1) for each in held])
    old = uuid7(ago=10 * 86_400)
    await ledger.execute("update events set run_id = $1 where run_id = $2", old, ids[0])
    await homes.end(ledger, "failed")
    await Retention(ledger, store, timedelta(days=9))()
    assert await kept(ledger) == 1, "of the run that is left"


# -- streams ----------------------------------------------------------------------------------------------------------


async def test_what_waits_has_a_stream_that_ends_with_the_process(served: Stack, ledger: Ledger) -> None:
    await register(ledger)
    run = (await submit(ledger)).run
    following = stream(served.http, of_run(run.id))
    first = await anext(following)
    assert isinstance(first, Sent)
    assert first.name == "queued"
    assert await anext(following) == ":", "a comment, after 15 s"
    [api] = served.parts
    api.signal(signal.SIGTERM)
    assert [each async for each in following] == ["retry: 1000"]
    await api.ended()


async def test_a_stream_ends_with_its_time(database: str, ledger: Ledger, tmp_path: Path) -> None:
    run = (await submit(ledger)).run
    async with stack(database, tmp_path, BACKCAST_API__LONGEST_STREAM="0.5") as running:
        await running.up("api")
        sent = [each async for each in stream(running.http, of_run(run.id))]
        assert sent[1:] == ["retry: 1000"]


async def test_more_streams_than_may_be_are_refused_until_a_reader_leaves(served: Stack, ledger: Ledger) -> None:
    run = (await submit(ledger)).run
    readers = [stream(served.http, of_run(run.id)) for _ in range(STREAMS)]
    for reader in readers:
        await anext(reader)
    refused = await served.http.get(of_run(run.id))
    assert (refused.status_code, refused.json()["code"]) == (503, "too_many_streams")
    await readers[0].aclose()  # type: ignore[attr-defined]

    async def served_again() -> bool:
        async with served.http.stream("GET", of_run(run.id)) as answer:
            return answer.status_code == 200

    await until(served_again)


async def test_a_change_of_state_that_nobody_reports_is_seen(served: Stack, ledger: Ledger) -> None:
    worker = await register(ledger)
    run = (await submit(ledger)).run
    following = stream(served.http, of_run(run.id))
    await anext(following)
    [claimed] = await claim(ledger, worker)
    started = await anext(following)
    assert isinstance(started, Sent)
    assert (started.name, started.data["attempt"]) == ("started", 1)
    await homes.end(ledger, "failed", "id = $1", claimed.id)
    ended = await anext(following)
    assert isinstance(ended, Sent)
    assert (ended.name, ended.data["run"]["state"]) == ("ended", "failed")
    assert [each async for each in following] == []


async def test_streams_outlast_an_outage_of_the_connection(served: Stack, ledger: Ledger) -> None:
    worker = await register(ledger)
    run = (await submit(ledger)).run
    following = stream(served.http, of_run(run.id))
    await anext(following)
    await ledger.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'backcast-api'"
    )
    [claimed] = await claim(ledger, worker)
    await settlement.settle(ledger, worker, [completed(claimed)])
    assert names([each async for each in following if isinstance(each, Sent)]) == ["started", "ended"]


async def test_head_and_unknown_ids_are_answered_at_once(served: Stack, ledger: Ledger) -> None:
    run = (await submit(ledger)).run
    head = await served.http.head(of_run(run.id))
    assert (head.status_code, head.content, head.headers["content-type"][:17]) == (200, b"", "text/event-stream")
    for path, code in ((of_run(uuid7()), "unknown_run"), (f"/v1/batches/{uuid7()}/events", "unknown_batch")):
        answer = await served.http.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, code)


async def test_a_reader_that_takes_nothing_is_cut_off(database: str, ledger: Ledger, tmp_path: Path) -> None:
    worker = await register(ledger)
    run = (await submit(ledger)).run
    [claimed] = await claim(ledger, worker)
    large = json.dumps("x" * 16_000)
    for first in range(1, 1001, 100):
        some = report(claimed, *range(first, first + 100))
        some.events = [replace(each, data=large) for each in some.events]
        await events.record(ledger, worker, [some])
    async with stack(database, tmp_path, BACKCAST_API__MAX_STREAMS="1") as running:
        await running.up("api")
        url = running.http.base_url
        with socket.create_connection((url.host, url.port or 80)) as stuck:
            stuck.sendall(f"GET {of_run(run.id)} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

            async def status() -> int:
                async with running.http.stream("GET", of_run(run.id)) as answer:
                    return answer.status_code

            await until(status, lambda code: code == 503)
            await until(status, lambda code: code == 200)
        assert "ASGI" not in running.parts[0].text, "uvicorn has nothing to complain of"


# -- batches ----------------------------------------------------------------------------------------------------------


async def test_a_batch_has_a_stream(product: Stack) -> None:
    lines = [{"task": "echo", "input": {"value": n}} for n in range(5)]
    lines += [{"task": "report_and_linger", "input": {"name": "b"}}]
    body = "\n".join(map(json.dumps, lines))
    made = await product.http.post("/v1/batches", content=body, headers={"Content-Type": "application/jsonl"})
    path = f"/v1/batches/{made.json()['id']}/events"
    following = stream(product.http, path)
    sent = list[Sent]()

    def listed() -> dict[str, str]:
        items = [item for each in sent if each.name == "runs" for item in each.data["items"]]
        found = {item["id"]: item["state"] for item in items}
        assert len(found) == len(items), "each once"
        return found

    while len(listed()) < 5:
        sent.append(await anext(following))  # type: ignore[arg-type]
    place = sent[-1].id
    product.release("b")
    sent += [each async for each in following if isinstance(each, Sent)]
    assert set(listed().values()) == {"completed"}
    assert len(listed()) == 6
    assert (sent[-1].name, sent[-1].data["states"]) == ("ended", {"completed": 6})
    counts = [each.data["states"] for each in sent if each.name == "states"]
    assert all(before != after for before, after in itertools.pairwise(counts))
    rest = await all_of(product.http, path, last=place)
    assert [len(each.data["items"]) for each in rest if each.name == "runs"] == [1]
    assert UUID(rest[-1].data["id"])
    assert (await product.http.get(path, headers={"Last-Event-ID": "end"})).status_code == 204
