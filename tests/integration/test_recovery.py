"""Lost workers: their runs go on, their stored results are taken over, and a run that kills its workers is found. Also
single flight."""

import asyncio
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from backcast.ledger import claims, dispatch, fleet, flights, recovery, settlement, task_types
from backcast.ledger.claims import Claim
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Settlement
from backcast.models import TaskType, uuid7
from backcast.settings import Store as StoreSettings
from backcast.store import open_store
from tests.integration.test_ledger import LEASE, claim, register, silence, submit
from tests.support.ended import end
from tests.support.stack import Stack, stack
from tests.support.waiting import until


async def lose(ledger: Ledger, worker: UUID) -> dict[UUID, str]:
    """The worker falls silent, and the steward recovers its runs."""
    await silence(ledger, worker)
    return await recovery.requeue(ledger, LEASE)


async def losses(ledger: Ledger) -> dict[UUID, int]:
    return {
        row["id"]: row["n"] for row in await ledger.fetch("select id, attempts_used - retries_used as n from all_runs")
    }


async def take(ledger: Ledger, worker: UUID, limit: int, prefetch: int = 0) -> list[Claim]:
    return await claims.claim(
        ledger, pool="default", cursor=0, limit=limit, prefetch=prefetch, worker_id=worker, lease=LEASE
    )


async def test_the_first_loss_counts_against_every_run_that_had_started(ledger: Ledger) -> None:
    made = [(await submit(ledger, value=n)).run.id for n in range(5)]
    worker = await register(ledger)
    taken = {c.id: c.prefetched for c in await take(ledger, worker, limit=3, prefetch=2)}
    assert sorted(taken.values()) == [False, False, False, True, True]
    assert set((await lose(ledger, worker)).values()) == {"queued"}
    assert await losses(ledger) == {run: 0 if taken[run] else 1 for run in made}
    second = await register(ledger)
    assert await take(ledger, second, limit=0, prefetch=5) == [], "a run that was ever lost waits for a free slot"
    again = await take(ledger, second, limit=2, prefetch=3)
    assert [c.prefetched for c in again] == [False, False]


async def test_a_loss_counts_against_the_run_with_most_losses_only(ledger: Ledger) -> None:
    killer = (await submit(ledger)).run.id
    for round_ in range(1, 3):
        others = [(await submit(ledger, value=n)).run.id for n in range(3)]
        worker = await register(ledger)
        assert len(await claim(ledger, worker)) == 4
        await lose(ledger, worker)
        counted = await losses(ledger)
        assert counted[killer] == round_
        assert {counted[run] for run in others} == {1 if round_ == 1 else 0}
        await end(ledger, "cancelled", "id <> $1", killer)
    [quarantined] = await claim(ledger, await register(ledger))
    assert quarantined.is_quarantined, "its third worker must be its own"
    assert quarantined.lost_fence == 2


@pytest.mark.parametrize(
    ("used", "most", "quarantined"),
    [(0, 3, False), (1, 3, False), (2, 3, True), (1, 2, True), (0, 1, False), (2, 9, True)],
)
@pytest.mark.parametrize("lost", [None, 1])
def test_a_run_with_two_losses_is_quarantined(used: int, most: int, quarantined: bool, lost: int | None) -> None:
    found = Claim(uuid7(), "t", 1, "{}", None, 0, used, most, 0, lost_fence=lost)
    assert found.has_many_losses is quarantined
    assert found.is_quarantined is (quarantined and lost is not None)


async def test_a_first_loss_beside_a_run_that_has_lost_executors_counts_against_nobody(ledger: Ledger) -> None:
    crashing, killer = (await submit(ledger)).run.id, (await submit(ledger)).run.id
    await ledger.execute("update runs set attempts_used = 2 where id = $1", crashing)
    worker = await register(ledger)
    taken = {each.id: each for each in await claim(ledger, worker)}
    assert not any(each.is_quarantined or each.prefetched for each in taken.values()), "it need not wait for others"
    await lose(ledger, worker)
    assert await losses(ledger) == {crashing: 2, killer: 0}, "it is the likelier one"
    again = {each.id: each for each in await claim(ledger, await register(ledger))}
    assert again[crashing].is_quarantined, "the next loss is its own"


async def registered(ledger: Ledger, task: str) -> UUID:
    worker = uuid7()
    tasks = [TaskType(name=task, pool="default", input_schema={})]
    await fleet.register(ledger, worker, pool="default", host="h", version="1", slots=10, tasks=tasks)
    return worker


async def test_the_runs_of_a_lost_worker_are_executed_within_the_slots_of_others(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path, BACKCAST_LEASE="2") as product:
        await product.up("api", "steward")
        large = await product.start("worker", BACKCAST_WORKER__SLOTS="100").ready()
        there = tmp_path / "now-crowd"
        runs = [await product.submit("linger_among", name="crowd") for _ in range(100)]

        async def present() -> int:
            return len(list(there.iterdir())) if there.exists() else 0

        await until(present, lambda count: count == 100)
        await product.start("worker", BACKCAST_WORKER__SLOTS="10").ready()
        own = [await product.submit("linger_among", name="own") for _ in range(5)]
        for run in own:
            await product.state(run, "running")
        large.kill()
        shutil.rmtree(there)
        await until(present, lambda count: count >= 5)
        product.release("own")
        assert max([await product.result(run) for run in own]) <= 5
        product.release("crowd")
        assert 5 < max([await product.result(run) for run in runs]) <= 10


async def test_a_quarantined_run_runs_alone(database: str, ledger: Ledger, tmp_path: Path) -> None:
    async with stack(database, tmp_path) as product:
        await product.up("api", BACKCAST_WORKER__SLOTS="5")
        await task_types.register(ledger, [TaskType(name="crowded", pool="default", input_schema={})])
        made = [await product.submit("crowded", name="c", seconds=0.2) for _ in range(40)]
        await ledger.execute(
            "update runs set attempts_used = 2, lost_fence = 0 where id = any($1)",
            [UUID(run) for run in made[10:40:10]],
        )
        await product.up("worker", BACKCAST_WORKER__SLOTS="5")
        present = [await product.result(run) for run in made]
    assert [present[n] for n in (10, 20, 30)] == [1, 1, 1]
    assert max(present) > 1, "the others ran together"


async def test_the_stored_result_of_a_lost_worker_is_not_computed_again(
    database: str, ledger: Ledger, tmp_path: Path
) -> None:
    async with stack(database, tmp_path) as product:
        await product.up("api")
        await task_types.register(ledger, [TaskType(name="nap", pool="default", input_schema={})])
        run_id = await product.submit("nap", seconds=0, name="adopted")
        lost = await registered(ledger, "nap")
        [claimed] = await claim(ledger, lost)
        store = open_store(StoreSettings(url=f"file://{tmp_path}/store"))
        await store.put(f"results/{run_id}/1.json", b"[42]")
        await lose(ledger, lost)
        await product.up("worker")
        assert await product.result(run_id) == [42]
        assert not (product.folder / "calls-adopted").exists()
        # The lost worker is still there, is refused, and removes its object: no run may need that object.
        late = Settlement(id=claimed.id, fence=1, state="completed", result_key=f"results/{run_id}/1.json")
        assert (await settlement.settle(ledger, lost, [late])).accepted == set()
        await store.delete([f"results/{run_id}/1.json"])
        [row] = await ledger.fetch("select result_key, attempts_used from all_runs")
        assert await store.get(row["result_key"]) == b"[42]"
        await store.aclose()


async def test_an_incomplete_object_is_not_taken(database: str, ledger: Ledger, tmp_path: Path) -> None:
    """A store may keep an empty object of a worker that was killed while it sent one."""
    async with stack(database, tmp_path) as product:
        await product.up("api")
        await task_types.register(ledger, [TaskType(name="nap", pool="default", input_schema={})])
        store = open_store(StoreSettings(url=f"file://{tmp_path}/store"))
        made = [await product.submit("nap", seconds=0) for _ in range(2)]
        lost = await registered(ledger, "nap")
        await claim(ledger, lost)
        for run_id, body in zip(made, (b"", b'{"half'), strict=True):
            await store.put(f"results/{run_id}/1.json", body)
        await store.aclose()
        await lose(ledger, lost)
        await product.up("worker")
        assert [await product.result(run_id) for run_id in made] == [0, 0]


async def test_a_result_from_before_a_retry_is_not_taken(database: str, ledger: Ledger, tmp_path: Path) -> None:
    async with stack(database, tmp_path) as product:
        await product.up("api")
        await task_types.register(ledger, [TaskType(name="nap", pool="default", input_schema={})])
        run_id = await product.submit("nap", seconds=0, name="retried")
        first = await registered(ledger, "nap")
        [claimed] = await claim(ledger, first)
        store = open_store(StoreSettings(url=f"file://{tmp_path}/store"))
        await store.put(f"results/{run_id}/1.json", b"[42]")
        await store.aclose()
        await settlement.settle(ledger, first, [Settlement(id=claimed.id, fence=1, state="queued", retries_used=1)])
        await product.up("worker")
        assert await product.result(run_id) == 0


async def count(product: Stack, name: str) -> int:
    path = product.folder / f"calls-{name}"
    return await asyncio.to_thread(lambda: path.stat().st_size if path.exists() else 0)


async def test_identical_runs_of_a_cached_task_compute_once(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path) as product:
        await product.up("api", "worker", "worker", BACKCAST_WORKER__SLOTS="3")
        made = [await product.submit("counted_slowly", name="same") for _ in range(30)]
        other = await product.submit("counted_slowly", name="other")
        quick = await product.submit("echo", value="not held up: a waiting follower holds no slot")
        assert await product.result(quick)
        product.release("same")
        product.release("other")
        assert [await product.result(run) for run in made] == [1] * 30
        assert await product.result(other) == 1
        assert (await count(product, "same"), await count(product, "other")) == (1, 1)
        assert {(await product.run(run))["attempts"] for run in made} <= {1, 0}


async def test_followers_go_on_when_the_computing_worker_is_killed(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path) as product:
        await product.up("api", "steward", "worker")
        first = await product.submit("stuck_once", name="killed")
        await until(lambda: count(product, "killed"), lambda n: n == 1)
        await product.up("worker")
        followers = [await product.submit("stuck_once", name="killed") for _ in range(5)]
        next(part for part in product.parts if part.name == "worker").kill()
        assert [await product.result(run) for run in [first, *followers]] == [2] * 6


async def test_flights(ledger: Ledger) -> None:
    for n in range(3):
        await submit(ledger, value=n)
    worker = await register(ledger)
    first, second, third = await claim(ledger, worker, limit=3)
    taken = await asyncio.gather(*[flights.take(ledger, "k", c) for c in (first, second, third)])
    assert sorted(taken) == [False, False, True]
    leader, follower, _ = sorted((first, second, third), key=lambda c: not taken[(first, second, third).index(c)])
    waits = Settlement(id=follower.id, fence=1, state="scheduled", delay=600, counts=False, flight="k")
    await settlement.settle(ledger, worker, [waits])
    await flights.land(ledger, [("k", follower.id, 1)])
    assert await claim(ledger, worker) == [], "the flight goes on: only its own attempt can land it"
    failed = Settlement(id=leader.id, fence=1, state="failed")
    await settlement.settle(ledger, worker, [failed])
    await flights.land(ledger, [("k", leader.id, 1)])
    [again] = await claim(ledger, worker)
    assert again.id == follower.id
    assert await flights.take(ledger, "k", again), "and may compute it itself"


async def test_no_follower_is_left_behind_when_a_landing_crosses_it(ledger: Ledger) -> None:
    """The follower parks itself after the landing looked for followers: it then sees that the flight is gone."""
    await submit(ledger)
    worker = await register(ledger)
    [follower] = await claim(ledger, worker)
    waits = Settlement(id=follower.id, fence=1, state="scheduled", delay=600, counts=False, flight="gone")
    await settlement.settle(ledger, worker, [waits])
    await flights.land(ledger, [("gone", follower.id, 1)])
    assert [c.id for c in await claim(ledger, worker)] == [follower.id]


async def test_a_flight_is_taken_over_when_its_attempt_is_over(ledger: Ledger) -> None:
    await submit(ledger, value=1)
    await submit(ledger, value=2)
    worker = await register(ledger)
    first, second = await claim(ledger, worker, limit=2)
    assert await flights.take(ledger, "k", first)
    await settlement.settle(ledger, worker, [Settlement(id=first.id, fence=1, state="failed")])
    await ledger.execute("update flights set taken_at = now() + interval '1 hour'")  # its first seconds last
    assert not await flights.take(ledger, "k", second), "not at once: the view of the other attempt may be old"
    await ledger.execute("update flights set taken_at = now() - interval '1 minute'")
    assert await flights.take(ledger, "k", second)


async def test_a_deadline_ends_a_run_that_has_not_started(ledger: Ledger) -> None:
    far = datetime.now(UTC) + timedelta(hours=1)
    late, later = (await submit(ledger, deadline=far)).run.id, (await submit(ledger, deadline=far)).run.id
    worker = await register(ledger)
    [running] = await claim(ledger, worker, limit=1)
    await ledger.execute("update runs set deadline = now()")
    assert await claim(ledger, worker) == []
    await dispatch.dispatch_due(ledger)
    await settlement.settle(ledger, worker, [Settlement(id=running.id, fence=1, state="completed", result_key="k")])
    states = {row["id"]: row["state"] for row in await ledger.fetch("select id, state from all_runs")}
    assert states == {running.id: "completed", ({late, later} - {running.id}).pop(): "expired"}


async def test_a_loss_does_not_count_against_a_quarantined_run_that_waits(ledger: Ledger) -> None:
    quarantined, killer = (await submit(ledger)).run.id, (await submit(ledger)).run.id
    await ledger.execute("update runs set attempts_used = 2, lost_fence = 0 where id = $1", quarantined)
    worker = await register(ledger)
    taken = {c.id: c for c in await claim(ledger, worker)}
    assert taken[quarantined].is_quarantined
    await lose(ledger, worker)
    assert await losses(ledger) == {quarantined: 2, killer: 1}, "it had not begun"
    second = await register(ledger)
    again = {c.id: c for c in await claim(ledger, second)}
    await claims.begin(ledger, second, again[quarantined])
    states = await lose(ledger, second)
    assert (states[quarantined], states[killer]) == ("failed", "queued")


async def test_runs_of_an_unknown_worker_go_on(ledger: Ledger) -> None:
    """As when its row was removed while one of its claims was under way."""
    run_id = (await submit(ledger)).run.id
    worker = await register(ledger)
    await claim(ledger, worker)
    await ledger.execute("delete from workers")
    assert await recovery.requeue(ledger, LEASE) == {run_id: "queued"}
