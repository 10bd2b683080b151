"""Background work: an error that nobody expected ends none of it, and the log shows it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import asyncpg
import pytest

from backcast.ledger import fleet, limits, provisioning, submissions
from backcast.ledger.connection import CHANNEL, Ledger
from backcast.ledger.migration import migrate
from backcast.local import postgres
from backcast.models import Limits, Submission, TaskType, uuid7
from tests.chaos.proxy import Link
from tests.integration.test_steward import add, leads
from tests.support import databases
from tests.support.roles import give_roles
from tests.support.stack import Part, stack
from tests.support.waiting import until

ECHO = TaskType(name="echo", pool="default", input_schema={"type": "object"})


async def prints(part: Part, words: str) -> None:
    async def look() -> str:
        assert part.process.poll() is None, part.text
        return part.text

    await until(look, lambda text: words in text)


async def break_table(ledger: Ledger, table: str, event: str, body: str = "raise exception 'as asked'") -> None:
    """Let every statement of this kind fail with an error that the code does not know, until `mend_table`."""
    function = f"$$ begin {body}; return null; end $$"
    await ledger.execute(f"create function broken() returns trigger language plpgsql as {function}")
    await ledger.execute(f"create trigger broken before {event} on {table} for each row execute function broken()")


async def mend_table(ledger: Ledger) -> None:
    await ledger.execute("drop function broken cascade")


@pytest.fixture
async def link(database: str) -> AsyncIterator[Link]:
    """A way to the database over TCP, which can be cut."""
    link = await Link(f"{parse_qs(urlsplit(database).query)['host'][0]}/.s.PGSQL.5432").open()
    yield link
    await link.aclose()


async def test_an_api_and_a_steward_say_what_they_wait_for(tmp_path: Path) -> None:
    prepared = tmp_path / "data"
    postgres.prepare(prepared)
    url = postgres.url(prepared, "backcast")
    async with stack(url, tmp_path) as product:
        (tmp_path / "store").rename(tmp_path / "unmounted")
        api, steward = product.start("api"), product.start("steward")
        await prints(api, "can't answer all requests yet, trying again: The database can't be used right now")
        await prints(steward, "waiting for the database: ")
        with postgres.running(prepared):
            await asyncio.to_thread(provisioning.create_database, postgres.url(prepared, "postgres"), "backcast")
            await asyncio.to_thread(migrate, url)
            await asyncio.to_thread(give_roles, url)
            await prints(api, "trying again: The folder of the store is not there")
            (tmp_path / "unmounted").rename(tmp_path / "store")
            await prints(api, "ready: the database and the store answer")
            await prints(steward, "leading")
            await api.ready()


async def test_a_notification_that_failed_is_not_the_last_one(tmp_path: Path) -> None:
    """As when a client that listens sits in a transaction until the server's queue is full."""
    with postgres.running(tmp_path / "data", settings={"max_notify_queue_pages": "64"}) as server:
        url = databases.create(server)
        sleeper, witness = await asyncpg.connect(url), await asyncpg.connect(url)
        await sleeper.execute("listen other; begin; select 1")
        fill = "do $$ begin for n in 1..1000 loop perform pg_notify('other', n || repeat('x', 7900)); end loop; end $$"
        with pytest.raises(asyncpg.ProgramLimitExceededError):
            await witness.execute(fill)
        async with stack(url, tmp_path) as product:
            await product.up("api")
            ledger = Ledger(url)
            await fleet.register(ledger, uuid7(), pool="default", host="h", version="1", slots=1, tasks=[ECHO])
            await ledger.aclose()
            await product.submit("echo")
            await prints(product.parts[0], "can't notify by PostgreSQL, trying again: too many notifications")
            await sleeper.close()
            heard: list[object] = []
            await witness.add_listener(CHANNEL, lambda *given: heard.append(given[-1]))

            async def submit() -> list[object]:
                await product.submit("echo")
                return heard

            assert (await until(submit))[0] == "default"
        await witness.close()


async def test_a_promotion_that_failed_is_not_the_last_one(database: str, tmp_path: Path, ledger: Ledger) -> None:
    await fleet.register(ledger, uuid7(), pool="default", host="h", version="1", slots=1, tasks=[ECHO])
    await limits.limit(ledger, "narrow", Limits(max_running=10))
    async with stack(database, tmp_path) as product:
        await product.up("api")

        async def states() -> set[str]:
            answer = await product.http.post("/v1/tasks/echo/runs", json={"input": {}, "lane": "narrow"})
            assert answer.status_code == 202
            return {row["state"] for row in await ledger.fetch("select state from all_runs")}

        await break_table(ledger, "lanes", "update")
        assert await states() == {"held"}
        await prints(product.parts[0], "can't promote from the lanes of new runs, trying again: ")
        await mend_table(ledger)
        await until(states, lambda seen: "queued" in seen)
        assert product.parts[0].text.count("RaiseError: as asked") == 1, "the reason is there, and once"


async def test_a_steward_leads_again_after_an_error(database: str, tmp_path: Path, ledger: Ledger) -> None:
    await break_table(ledger, "cursors", "insert")
    async with stack(database, tmp_path) as product:
        steward = product.start("steward")
        await prints(steward, "RaiseError: as asked")
        await mend_table(ledger)
        await leads(steward)


@pytest.mark.parametrize(("state", "words"), [("running", "can't claim"), ("completed", "can't settle")])
async def test_a_worker_outlasts_an_error_that_nobody_expected(
    database: str, tmp_path: Path, ledger: Ledger, state: str, words: str
) -> None:
    at = ("runs", "update") if state == "running" else ("ended", "insert")
    await break_table(ledger, *at, f"if new.state <> '{state}' then return new; end if; raise 'as asked'")
    async with stack(database, tmp_path) as product:
        await product.up("api", "worker")
        run = await product.submit("echo", value=1)
        await prints(product.parts[1], words)
        await mend_table(ledger)
        assert await product.result(run) == 1
        assert (await product.run(run))["attempts"] == 1


@pytest.mark.parametrize("error", ["'as asked'", "numeric_value_out_of_range"])
async def test_an_outcome_that_is_not_taken_holds_up_no_other(
    database: str, tmp_path: Path, ledger: Ledger, error: str
) -> None:
    body = f"if new.input::text not like '%666%' then return new; end if; raise {error}"
    await break_table(ledger, "ended", "insert", body)
    async with stack(database, tmp_path) as product:
        await product.up("api", "worker")
        refused = await product.submit("echo", value=666)
        await prints(product.parts[1], "can't settle a run, trying again: ")
        assert [await product.result(await product.submit("echo", value=n)) for n in range(3)] == [0, 1, 2]
        assert (await product.run(refused))["state"] == "running"
        await mend_table(ledger)
        ended = await product.ended(refused)
        assert (ended["state"], ended["attempts"]) == ("completed" if "asked" in error else "failed", 1)


async def test_a_slow_dispatch_does_not_delay_the_recovery_of_lost_runs(
    database: str, tmp_path: Path, ledger: Ledger
) -> None:
    """Each round of dispatching takes longer than the pauses after which a steward does not trust the heartbeats."""
    await break_table(
        ledger, "runs", "update of state", "if old.state <> 'scheduled' then return new; end if; perform pg_sleep(4)"
    )
    due, lost = await add(ledger, "scheduled", ago=60), await add(ledger, "running", ago=60)

    async def states() -> dict[UUID, str]:
        return {row["id"]: row["state"] for row in await ledger.fetch("select id, state from all_runs")}

    async with stack(database, tmp_path, BACKCAST_LEASE="2") as product:
        product.start("steward")
        await until(states, lambda seen: seen == {due: "scheduled", lost: "queued"})


async def test_a_submission_that_meets_a_bug_fails_and_the_next_one_does_not(database: str) -> None:
    class Faulty(Ledger):
        is_faulty = True

        async def fetch(self, sql: str, *values: object) -> list[asyncpg.Record]:
            if self.is_faulty:
                raise ZeroDivisionError
            return await super().fetch(sql, *values)

    ledger = Faulty(database)
    group = submissions.Submissions(ledger)
    rows = [submissions.new(ECHO, Submission(input={}), input_text="{}", input_hash=b"") for _ in range(3)]
    found = await asyncio.gather(*map(group.submit, rows), return_exceptions=True)
    assert [type(each) for each in found] == [ZeroDivisionError] * 3
    ledger.is_faulty = False
    assert (await group.submit(rows[0])).fresh
    await ledger.aclose()
