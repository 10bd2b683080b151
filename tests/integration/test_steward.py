"""The steward: the rows and objects that it removes or leaves, the new leader when one dies or freezes, the work that
it makes up after time away, and the ends that it publishes to Prefect for killed processes."""

import json
import signal
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest

from backcast import settings
from backcast.errors import StoreUnavailable
from backcast.ledger import cursors, figures, maintenance, task_types
from backcast.ledger.connection import Ledger
from backcast.models import TaskType, uuid7
from backcast.steward import orphans
from backcast.steward.retention import Retention
from backcast.store import Store, open_store
from tests.support import ended
from tests.support.s3 import S3Server, s3_server
from tests.support.stack import ROOT, Part, Stack, prefect_server, stack
from tests.support.waiting import PATIENCE, until

DAY = 24 * 3600.0
KEEP = timedelta(days=30)
FINAL = ("completed", "failed", "cancelled", "expired")


async def add(ledger: Ledger, state: str, *, ago: float, ended_at: float | None = None, **more: object) -> UUID:
    """A run accepted and (if its state is final) ended so many seconds ago."""
    run = uuid7(ago)
    columns = {"id": run, "state": state, "task": "echo", "pool": "default", "owner": "me", "max_attempts": 3}
    columns |= {"metadata": "{}", "worker_id": uuid7() if state == "running" else None, "fence": 1}
    columns |= {"input": None if "input_key" in more else '{"value": 1}'} | more
    if state == "completed":
        columns.setdefault("result_key", f"results/{run}/1.json")
    if state in FINAL:
        ended_ago = ago if ended_at is None else ended_at
        created = datetime.now(UTC) - timedelta(seconds=ago)
        defaults = {"priority": 0, "run_at": created, "created_at": created, "attempts_used": 1, "retries_used": 0}
        del columns["id"]
        await ended.add(ledger, run, since=ended_ago, **{"signature": "", **defaults, **columns})
        return run
    names = ", ".join(columns)
    places = ", ".join(f"${n}" for n in range(2, len(columns) + 2))
    await ledger.execute(
        f"insert into runs (created_at, {names}) values (now() - make_interval(secs => $1), {places})",
        ago,
        *columns.values(),
    )
    return run


async def runs(ledger: Ledger) -> set[UUID]:
    return {row["id"] for row in await ledger.fetch("select id from all_runs")}


STRANGERS = {
    "results/notes.txt",
    f"results/{uuid7(40 * DAY)}/report.pdf",
    f"inputs/{uuid7(40 * DAY)}/photo.jpg",
    f"results/{uuid4()}/1.json",
}
"""What others may have in a bucket that they share with us."""


async def keys(store: Store) -> set[str]:
    kinds = ("results", "inputs", "cache")
    return {each.key for kind in kinds async for page in store.pages(kind) for each in page}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["folder", "bucket"])
async def store(request: pytest.FixtureRequest, folder: str, s3: S3Server) -> AsyncIterator[Store]:
    given = {"url": folder}
    if request.param == "bucket":
        given = {"url": f"s3://test-{uuid7()}/prefix", "endpoint": s3.url}
        given |= {"access_key": s3.access_key, "secret_key": s3.secret_key}
    opened = open_store(settings.Store.model_validate(given | {"timeout": timedelta(seconds=PATIENCE)}))
    await opened.ensure()
    yield opened
    await opened.aclose()


# -- retention ---------------------------------------------------------------------------------------------------------


async def test_runs_that_ended_long_ago_are_removed_with_their_objects(ledger: Ledger, store: Store) -> None:
    old, kept, named = set[UUID](), set[UUID](), set[str]()
    for state in FINAL:
        old.add(await add(ledger, state, ago=40 * DAY, ended_at=31 * DAY))
        kept.add(await add(ledger, state, ago=40 * DAY, ended_at=29 * DAY))
        kept.add(await add(ledger, state, ago=DAY))
    for state in ("held", "scheduled", "queued", "running"):
        kept.add(await add(ledger, state, ago=40 * DAY))
    for run in old | kept:
        await store.put(f"results/{run}/1.json", b"1")
    large = await add(ledger, "completed", ago=40 * DAY, input_key="inputs/placeholder")
    await ledger.execute("update ended set input_key = 'inputs/' || id || '.json' where id = $1", large)
    await store.put(f"inputs/{large}.json", b"{}")
    await Retention(ledger, store, KEEP)()
    assert await runs(ledger) == kept
    rows = await ledger.fetch("select id, state, result_key from all_runs")
    named = {f"results/{row['id']}/1.json" for row in rows if row["state"] not in FINAL or row["result_key"]}
    assert await keys(store) == named, "a lost attempt may have left an object to a run that goes on"


async def test_more_runs_than_a_page(ledger: Ledger, store: Store) -> None:
    await ledger.execute(
        """insert into runs (id, state, task, pool, owner, max_attempts, metadata, input, created_at)
           select ('01900000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
                  'queued', 'echo', 'default', 'me', 3, '{}', '{}', now() - interval '1 year'
             from generate_series(1, 2500) n"""
    )
    await ended.end(ledger, "failed", "id::text !~ '0$'")
    await ledger.execute("update ended_late set finished_at = now() - interval '1 year'")
    await Retention(ledger, store, KEEP)()
    assert len(await runs(ledger)) == 2500 // 16
    await Retention(ledger, store, None)()
    assert len(await runs(ledger)) == 2500 // 16


async def test_while_the_store_is_away_rows_stay(ledger: Ledger, store: Store, tmp_path: Path) -> None:
    old = await add(ledger, "completed", ago=40 * DAY)
    away = open_store(settings.Store(url=f"file://{tmp_path}/not-mounted"))
    await ledger.execute(
        "insert into batches (id, owner, size, request_hash) values ($1, 'me', 1, '')", uuid7(40 * DAY)
    )
    with pytest.raises(StoreUnavailable):
        await Retention(ledger, away, KEEP)()
    await away.aclose()
    assert await runs(ledger) == {old}
    assert await ledger.fetch("select from batches") == [], "what needs no store goes on"


async def test_the_store_of_another_ledger_is_not_swept(
    ledger: Ledger, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    await Retention(ledger, store, KEEP)()  # signs the store
    theirs = f"results/{await add(ledger, 'cancelled', ago=60)}/1.json"
    await store.put(theirs, b"1")
    await ledger.execute(
        "update cursors set value = gen_random_uuid() where name = 'ledger'"
    )  # now this is another ledger
    await Retention(ledger, store, KEEP)()
    assert await keys(store) == {theirs}
    assert "belongs to another ledger" in caplog.text
    await store.delete(["ledger/id"])  # the remedy that the log names
    await Retention(ledger, store, KEEP)()
    assert await keys(store) == set()


async def test_the_sweep_removes_objects_that_no_run_needs(ledger: Ledger, store: Store) -> None:
    done = await add(ledger, "completed", ago=60, fence=3, result_key="results/x/3.json")
    await ledger.execute("update ended set result_key = 'results/' || id || '/3.json' where id = $1", done)
    cancelled, running = await add(ledger, "cancelled", ago=60), await add(ledger, "running", ago=60, fence=3)
    unknown, submitted = uuid7(40 * DAY), uuid7(40 * DAY)
    needed = {
        f"results/{done}/3.json",
        f"results/{running}/2.json",  # the attempt that follows may take it over
        f"results/{running}/3.json",
        f"results/{unknown}/1.json",  # was stored a moment ago, whatever its id says
        f"inputs/{submitted}.json",  # its submission may be under way
        *STRANGERS,
    }
    removed = {
        f"results/{done}/2.json",
        f"results/{cancelled}/1.json",
    }
    for key in needed | removed:
        await store.put(key, b"1")
    for keep in (None, KEEP):
        await Retention(ledger, store, keep)()
        assert await keys(store) == needed
    await orphans.sweep(
        ledger, store, timedelta(seconds=-5), inputs_after=timedelta(seconds=-5)
    )  # as if time had passed
    assert await keys(store) == needed - {f"results/{unknown}/1.json", f"inputs/{submitted}.json"}


async def test_results_that_a_restored_ledger_does_not_know_stay_and_are_reported(
    ledger: Ledger, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    lost = {f"results/{uuid7(DAY)}/1.json", f"results/{uuid7()}/2.json"}
    for key in lost:
        await store.put(key, b"1")
    retention = Retention(ledger, store, KEEP)
    for _ in range(3):
        await retention()
    assert await keys(store) == lost
    assert caplog.text.count("2 results belong to runs that the ledger does not know") == 1


WRONG = 30 * 3600.0
"""Seconds, more than any patience of the sweep."""


@pytest.mark.parametrize(("api", "steward"), [(0.0, 0.0), (-WRONG, 0.0), (0.0, WRONG), (WRONG, -WRONG)])
async def test_the_input_of_a_slow_batch_stays_whatever_the_clocks_show(
    database: str, tmp_path: Path, ledger: Ledger, api: float, steward: float
) -> None:
    def clock(shift: float) -> dict[str, str]:
        return {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/support/clock", "TEST_CLOCK_SHIFT": str(shift)}

    store = open_store(settings.Store(url=f"file://{tmp_path}/store"))

    async def swept() -> None:
        """Two objects that the sweep removes, one after the other: a whole sweep lies between them."""
        for _ in range(2):
            decoy = f"results/{await add(ledger, 'cancelled', ago=60)}/1.json"
            await store.put(decoy, b"1")
            await until(lambda: keys(store), lambda found, decoy=decoy: decoy not in found)

    async def body() -> AsyncIterator[bytes]:
        yield json.dumps({"task": "echo", "input": {"value": "x" * 100_000}}).encode() + b"\n"
        await until(lambda: keys(store), lambda found: any(key.startswith("inputs/") for key in found))
        await swept()
        yield json.dumps({"task": "echo", "input": {"value": 1}}).encode() + b"\n"

    async with stack(database, tmp_path) as product:
        await product.up("worker")
        await product.up("api", BACKCAST_API__BODY_TIMEOUT="PT1H", **clock(api))
        await product.start("steward", BACKCAST_STEWARD__SWEEP="1", **clock(steward)).ready()
        headers = {"Content-Type": "application/jsonl"}
        answer = await product.http.post("/v1/batches", content=body(), headers=headers)
        assert answer.status_code == 202, answer.text
        await swept()
        for row in await ledger.fetch("select id from all_runs where batch_id is not null"):
            assert await product.result(str(row["id"])) in ("x" * 100_000, 1)
    await store.aclose()


async def test_nothing_is_as_old_as_the_longest_retention(ledger: Ledger, store: Store) -> None:
    longest = settings.Steward.model_validate({"keep_runs": "P36500D"}).keep_runs
    run = await add(ledger, "completed", ago=400 * DAY, ended_at=DAY)
    objects = {f"results/{run}/1.json", "cache/a"}
    for key in objects:
        await store.put(key, b"1")
    for keep_keys in (None, longest):
        await Retention(ledger, store, longest, longest, keep_keys)()
    assert (await runs(ledger), await keys(store)) == ({run}, objects)


async def test_cached_values_are_removed_by_their_age(ledger: Ledger, store: Store) -> None:
    ours, others = f"cache/{'0a' * 32}", {"cache/a", "cache/photo.jpg"}
    for key in (ours, *others):
        await store.put(key, b"1")
    await Retention(ledger, store, None)()
    await Retention(ledger, store, timedelta(minutes=5))()
    assert await keys(store) == {ours, *others}
    await Retention(ledger, store, timedelta(seconds=-5))()
    assert await keys(store) == others


async def test_keys_that_nobody_could_have_made_stop_nothing(ledger: Ledger, s3: S3Server, tmp_path: Path) -> None:
    """A bucket has folders' markers, as other programs make them; and a row names what can be no key."""
    url = f"s3://marked-{uuid7()}"
    store = open_store(
        settings.Store.model_validate(
            {"url": url, "endpoint": s3.url, "access_key": s3.access_key, "secret_key": s3.secret_key}
            | {"fallback": {"url": f"file://{tmp_path}"}}
        )
    )
    await store.ensure()
    bucket = store._place
    for kind in ("cache/", "results/", "inputs/", "logs/"):
        await bucket._call("put_object", Key=kind, Body=b"")  # type: ignore[attr-defined]
    done = await add(ledger, "completed", ago=60, result_key="results/x/1.json")
    await ledger.execute("update ended set result_key = '..' where id = $1", done)
    await Retention(ledger, store, timedelta(seconds=-5))()
    assert await runs(ledger) == set()
    assert "cache/" in await keys(store)
    await store.aclose()


async def test_batches_and_flights_are_removed_with_their_runs(ledger: Ledger, folder: str) -> None:
    store = open_store(settings.Store(url=folder))
    await store.ensure()
    full, empty, young = uuid7(40 * DAY), uuid7(40 * DAY), uuid7(60)
    for batch in (full, empty, young):
        await ledger.execute("insert into batches (id, owner, request_hash, size) values ($1, 'me', '', 1)", batch)
    await add(ledger, "queued", ago=40 * DAY, batch_id=full)
    await add(ledger, "failed", ago=40 * DAY, batch_id=empty)
    flying, landed = await add(ledger, "running", ago=300), await add(ledger, "completed", ago=300)
    for key, run, age in (("a", flying, 300), ("b", landed, 300), ("c", landed, 1), ("d", uuid7(), 300)):
        await ledger.execute(
            "insert into flights values ($1, $2, 1, now() - make_interval(secs => $3))", key, run, float(age)
        )
    await Retention(ledger, store, KEEP)()
    assert {row["id"] for row in await ledger.fetch("select id from batches")} == {full, young}
    assert {row["key"] for row in await ledger.fetch("select key from flights")} == {"a", "c"}
    await store.aclose()


async def test_a_cursor_never_goes_back(ledger: Ledger) -> None:
    late, early = uuid7(), uuid7(60)
    await cursors.move(ledger, "here", late)
    await cursors.move(ledger, "here", early)
    assert await cursors.read(ledger) == {"here": late}


async def test_vacuum_and_figures(ledger: Ledger) -> None:
    await add(ledger, "queued", ago=1)
    assert await figures.oldest_xmin_age(ledger) >= 0
    assert await maintenance.dead_rows(ledger) >= 0
    async with ledger.session() as holder, ledger.session() as connection:
        await holder.execute("begin isolation level repeatable read")
        await holder.execute("select 1 from all_runs limit 1")
        for _ in range(5):
            await ledger.execute("update runs set priority = priority + 1")
        assert await figures.oldest_xmin_age(ledger) >= 5
        await maintenance.vacuum(connection)


# -- leading -----------------------------------------------------------------------------------------------------------


async def metric(part: Part, name: str) -> float | None:
    async with httpx.AsyncClient() as client:
        text = (await client.get(part.metrics_url, timeout=10)).text
    values = [line.split()[-1] for line in text.splitlines() if line.startswith(name)]
    return float(values[0]) if values else None


async def leads(part: Part) -> None:
    await until(lambda: metric(part, "backcast_steward_leading"), lambda value: value == 1)


async def two_stewards(product: Stack) -> tuple[Part, Part]:
    leader = await product.start("steward").ready()
    await leads(leader)
    other = await product.start("steward").ready()
    assert await metric(other, "backcast_steward_leading") == 0
    assert await metric(other, "backcast_backlog_ready") is None, "or a sum would count the backlog twice"
    return leader, other


async def test_when_the_leader_is_killed_the_other_leads(database: str, tmp_path: Path, ledger: Ledger) -> None:
    async with stack(database, tmp_path) as product:
        await product.up("api", "worker")
        leader, other = await two_stewards(product)
        await until(lambda: metric(leader, "backcast_backlog_ready"), lambda value: value == 0)
        leader.kill()
        await leads(other)
        lost = await product.submit("linger", name="lost")
        await product.state(lost, "running")
        product.parts[1].kill()
        product.start("worker")
        product.release("lost")
        assert await product.result(lost) == "lost"
        recovered = 'backcast_runs_recovered_total{state="queued"}'
        await until(lambda: metric(other, recovered), lambda value: value is not None and value >= 1)
        assert (await metric(other, "backcast_workers_lost_total") or 0) >= 1


async def test_a_leader_that_is_stopped_loses_its_lead(database: str, tmp_path: Path, ledger: Ledger) -> None:
    """Its connection would stay for as long as it is stopped. When it goes on, it takes no run from its worker."""
    async with stack(database, tmp_path) as product:
        await product.up("api", "worker")
        leader, other = await two_stewards(product)
        leader.signal(signal.SIGSTOP)
        [stopped] = await ledger.fetch("select now() as at")
        await leads(other)
        running = await product.submit("linger", name="running")
        await product.state(running, "running")
        # For longer than a lease: its last view of every worker is old.
        lease = "select 1 where now() > $1::timestamptz + interval '15 seconds'"
        await until(lambda: ledger.fetchrow(lease, stopped["at"]))
        leader.signal(signal.SIGCONT)
        await until(lambda: metric(leader, "backcast_steward_leading"), lambda value: value == 0)
        await until(lambda: metric(leader, "backcast_backlog_ready"), lambda value: value is None)
        product.release("running")
        assert await product.result(running) == "running"
        rows = await ledger.fetch("select fence, attempts_used from all_runs")
        assert [tuple(row) for row in rows] == [(1, 1)], "no worker was taken for dead"
        other.kill()
        await leads(leader)


async def test_a_steward_that_was_away_catches_up(database: str, tmp_path: Path, ledger: Ledger) -> None:
    sweeps = {"BACKCAST_STEWARD__KEEP_RUNS": "P1D", "BACKCAST_STEWARD__SWEEP": "PT1S"}
    async with stack(database, tmp_path, **sweeps) as product:
        gone = await add(ledger, "completed", ago=3 * DAY)
        due = await add(ledger, "scheduled", ago=2 * 3600)
        late = await add(ledger, "queued", ago=2 * 3600)
        lost = await add(ledger, "running", ago=2 * 3600)
        await ledger.execute("update runs set run_at = now() - interval '1 hour' where id = $1", due)
        await ledger.execute("update runs set deadline = now() - interval '1 hour' where id = $1", late)
        await ledger.execute(
            """insert into workers (id, pool, host, version, tasks, slots, heartbeat_at)
               select worker_id, 'default', 'gone', '', '{}', 1, now() - interval '1 hour' from runs where id = $1""",
            lost,
        )
        await product.start("steward").ready()

        async def states() -> dict[UUID, str]:
            return {row["id"]: row["state"] for row in await ledger.fetch("select id, state from all_runs")}

        await until(states, lambda seen: seen == {due: "queued", late: "expired", lost: "queued"})
        assert gone not in await states()


async def test_churn_does_not_postpone_the_recovery_of_lost_runs(database: str, tmp_path: Path, ledger: Ledger) -> None:
    """More than a quarter of the fleet is silent, and at each look others are too."""

    async def join(*, silent: bool) -> UUID:
        run = await add(ledger, "running", ago=10)
        await ledger.execute(
            """insert into workers (id, pool, host, version, tasks, slots, heartbeat_at)
               select worker_id, 'default', 'here', '', '{}', 1, now() + make_interval(hours => $2) from all_runs
                where id = $1""",
            run,
            -1 if silent else 1,
        )
        return run

    await join(silent=False)
    first = [await join(silent=True) for _ in range(5)]

    async def churn() -> set[str]:
        await join(silent=True)
        return {row["state"] for row in await ledger.fetch("select state from all_runs where id = any($1)", first)}

    async with stack(database, tmp_path, BACKCAST_LEASE="2") as product:
        await product.start("steward").ready()
        await until(churn, lambda states: states == {"queued"}, every=0.2)


async def test_a_sweep_that_fails_is_made_again(database: str, tmp_path: Path, ledger: Ledger) -> None:
    old = await add(ledger, "completed", ago=3 * DAY)
    env = {"BACKCAST_STEWARD__KEEP_RUNS": "P1D", "BACKCAST_STEWARD__SWEEP": "PT1S"}
    async with stack(database, tmp_path, **env) as product:
        (tmp_path / "store").rename(tmp_path / "unmounted")
        steward = await product.start("steward").ready()
        await until(lambda: _text(steward), lambda text: "can't apply retention" in text)
        assert await runs(ledger) == {old}
        (tmp_path / "unmounted").rename(tmp_path / "store")
        await until(lambda: runs(ledger), lambda left: not left)
        assert steward.text.count("can't apply retention") == 1


async def _text(part: Part) -> str:
    return part.text


# -- Prefect's history -------------------------------------------------------------------------------------------------


async def shown(url: str, run: UUID | str) -> dict[str, object]:
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/task_runs/{run}")
        return dict(answer.json()) if answer.status_code == 200 else {}


async def test_prefect_shows_every_end_in_the_end(database: str, tmp_path: Path, ledger: Ledger) -> None:
    """Ends that were never published, because a worker was killed first or no steward ran; and ends that are wrong."""
    async with prefect_server(tmp_path) as server:
        env = {"BACKCAST_PREFECT__HISTORY": "true", "BACKCAST_PREFECT__API_URL": server.url}
        ends = {
            await add(ledger, "completed", ago=3600): "COMPLETED",
            await add(ledger, "failed", ago=3600): "FAILED",
            await add(ledger, "cancelled", ago=3600): "CANCELLED",
            await add(ledger, "expired", ago=3600): "CANCELLED",
            await add(ledger, "completed", ago=3 * DAY, ended_at=DAY): "COMPLETED",  # a run of two days
        }
        quiet_task = TaskType(name="quiet", pool="default", input_schema={}, history=False)
        await task_types.register(ledger, [quiet_task])
        quiet = await add(ledger, "completed", ago=3600, task="quiet")
        removed = await add(ledger, "completed", ago=40 * DAY, ended_at=35 * DAY)
        async with stack(database, tmp_path, **env) as product:
            keep = {"BACKCAST_STEWARD__KEEP_RUNS": "P90D", "BACKCAST_STEWARD__KEEP_HISTORY": "P30D"}
            await product.start("steward", **keep).ready()

            async def types() -> dict[UUID, object]:
                return {run: (await shown(server.url, run)).get("state_type") for run in ends}

            await until(types, lambda seen: seen == ends)
            assert not await shown(server.url, quiet)
            assert not await shown(server.url, removed)


async def test_a_wrong_state_in_prefect_is_corrected(database: str, tmp_path: Path, ledger: Ledger) -> None:
    """A worker that was stopped for long may publish a state of a run that others had ended meanwhile."""
    run = await add(ledger, "completed", ago=3600, ended_at=3500)
    async with prefect_server(tmp_path) as server:
        async with httpx.AsyncClient() as client:
            state = {"type": "CRASHED", "name": "Crashed"}
            body = {"id": str(run), "task_key": "echo", "dynamic_key": "1", "name": "echo", "state": state}

            # The server may refuse any write with 503, or make one after its client has gone; Prefect's own clients
            # send it again. A run that is there is answered with 200.
            async def posted() -> bool:
                return (await client.post(f"{server.url}/task_runs/", json=body)).is_success

            await until(posted)
        await until(lambda: shown(server.url, run), lambda seen: seen.get("state_type") == "CRASHED")
        env = {"BACKCAST_PREFECT__HISTORY": "true", "BACKCAST_PREFECT__API_URL": server.url}
        async with stack(database, tmp_path, **env) as product:
            await product.start("steward").ready()
            right = await until(lambda: shown(server.url, run), lambda seen: seen.get("state_type") == "COMPLETED")
    ended = await ledger.fetchrow("select finished_at from all_runs")
    assert ended is not None
    assert str(right["end_time"])[:19] == ended["finished_at"].isoformat()[:19]
