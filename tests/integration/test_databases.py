"""Databases as they are: with the defaults of another application, behind a pooler, with a right or a column missing,
and with connections that end without a word.
"""

import asyncio
import sys
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from backcast import provision
from backcast.errors import LedgerFault
from backcast.ledger import connection
from backcast.ledger.connection import Ledger
from backcast.settings import Settings
from tests.chaos.proxy import CLEAR, Link, Weather
from tests.support.pgbouncer import BINARY, pgbouncer
from tests.support.stack import Stack, stack
from tests.support.waiting import PATIENCE, until

pooled = pytest.mark.skipif(BINARY is None, reason="the package pgbouncer is not installed")

DEFAULTS = {
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "statement_timeout": "'5s'",
    "lock_timeout": "'1ms'",
    "idle_session_timeout": "'2s'",
    "idle_in_transaction_session_timeout": "'5s'",
    "transaction_timeout": "'5s'",
    "timezone": "'Asia/Kathmandu'",
    "datestyle": "'SQL, DMY'",
    "intervalstyle": "sql_standard",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "search_path": "'nowhere, pg_catalog'",
    "standard_conforming_strings": "off",
    "transform_null_equals": "on",
    "enable_indexscan": "off",
    "synchronous_commit": "off",
    "lc_messages": "'C'",
    "plan_cache_mode": "force_custom_plan",
    "client_encoding": "'latin1'",
    "client_min_messages": "error",
    "row_security": "off",
    "array_nulls": "off",
    "quote_all_identifiers": "on",
    "xmlbinary": "hex",
    "enable_bitmapscan": "off",
    "enable_partition_pruning": "off",
    "debug_parallel_query": "on",
    "work_mem": "'64kB'",
    "default_statistics_target": "1",
    "exit_on_error": "on",
}


def configured(database: str, folder: Path) -> Settings:
    return Settings.model_validate(
        {"database": {"url": database}, "store": {"url": f"file://{folder}/store"}, "setup": {"patience": PATIENCE}}
    )


async def make_role(admin: asyncpg.Connection, name: str) -> None:
    """Make a role that may use every table and function, but owns none."""
    await admin.execute(
        f"""do $$ begin create role {name} login; exception when duplicate_object then null; end $$;
            grant usage on schema backcast to {name};
            grant all on all tables in schema backcast to {name};
            grant execute on all functions in schema backcast to {name}"""
    )


async def works(product: Stack) -> None:
    """Submitting, claiming, retrying, waiting for a time and for a lane, listing, cancelling."""
    assert (await product.http.put("/v1/lanes/narrow", json={"max_running": 1})).status_code == 200
    flaky = await product.submit("flaky", name="database", fails=1)
    narrow = [
        (await product.http.post("/v1/tasks/echo/runs", json={"input": {"value": n}, "lane": "narrow"})).json()["id"]
        for n in range(3)
    ]
    assert await product.result(flaky) == 2
    assert [await product.result(run) for run in narrow] == [0, 1, 2]
    answer = await product.http.post("/v1/tasks/echo/runs", json={"input": {"value": 1}, "run_at": "2999-01-01T00:00Z"})
    assert answer.json()["run_at"].startswith("2999-01-01T00:00:00")
    cancelled = await product.http.post(f"/v1/runs/{answer.json()['id']}/cancel")
    assert cancelled.json()["state"] == "cancelled"
    assert len((await product.http.get("/v1/runs")).json()["items"]) == 5


async def test_defaults_of_another_application_change_nothing(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    admin = await asyncpg.connect(database)
    name = await admin.fetchval("select current_database()")
    known = {row["name"] for row in await admin.fetch("select name from pg_settings")}
    for setting, value in DEFAULTS.items():
        if setting.lower() in known or setting in ("timezone", "datestyle", "intervalstyle"):
            await admin.execute(f'alter database "{name}" set {setting} = {value}')
    await admin.close()
    async with stack(database, tmp_path) as product:
        await product.up("api", "worker", "steward")
        await works(product)
        run = await product.submit("linger", name="for ever")
        await product.state(run, "running")
        product.parts[1].kill()
        product.start("worker")
        product.release("for ever")
        assert await product.result(run) is not None
        for part in product.parts[:1] + product.parts[2:]:
            assert part.process.poll() is None
            assert "Traceback" not in part.text
        lines: list[str] = []
        assert await asyncio.to_thread(provision.check, configured(database, tmp_path), lines.append), lines
        await asyncio.to_thread(provision.prepare, configured(database, tmp_path), lines.append)
    ledger = Ledger(database)
    row = await ledger.fetchrow("select current_setting('synchronous_commit') as durable")
    assert row is not None
    assert row["durable"] == "on", "a 202 means that the run is on the disk"
    await ledger.aclose()


@pooled
async def test_a_pooler_that_keeps_no_sessions_is_named_by_every_command(database: str, tmp_path: Path) -> None:
    for ignored in ("extra_float_digits", "extra_float_digits,search_path,statement_timeout,options"):
        with pgbouncer(database, tmp_path, pool_mode="transaction", ignore_startup_parameters=ignored) as url:
            async with stack(url, tmp_path) as product:
                for _ in range(2):
                    commands = [product.start(name) for name in ("api", "worker", "steward")]
                    once = [[sys.executable, "-m", "backcast", name] for name in ("setup", "check")]
                    commands += [product.spawn(command[-1], command, "") for command in once]
                    for part in commands:
                        assert await part.ended() != 0, f"{part.name}: {part.text}"
                        assert "pool_mode = session" in part.text, f"{part.name}: {part.text}"
                        assert "Traceback" not in part.text
    admin = await asyncpg.connect(database)
    assert await admin.fetchval("select current_setting('statement_timeout')") == "0", "and nothing is left set"
    await admin.close()


@pooled
async def test_a_pooler_that_keeps_sessions_is_fine(database: str, tmp_path: Path) -> None:
    with pgbouncer(database, tmp_path, pool_mode="session") as url:
        async with stack(url, tmp_path) as product:
            lines: list[str] = []
            await asyncio.to_thread(provision.prepare, configured(url, tmp_path), lines.append)
            assert await asyncio.to_thread(provision.check, configured(url, tmp_path), lines.append), lines
            await product.up("api", "worker", "steward")
            await works(product)


@pytest.mark.parametrize(
    ("sql", "found", "words"),
    [
        ("revoke update on backcast.runs from clerk", "runs: update (state)", "permission denied for table runs"),
        ("revoke select on backcast.lanes from clerk", "lanes: select", "permission denied for table lanes"),
        ("revoke usage on schema backcast from clerk", "permission denied for schema backcast", ""),
        ("alter table backcast.runs rename column fence to sense", 'column "fence"', ""),
        ("alter table backcast.task_types rename column history to past", 'column "history"', ""),
    ],
)
async def test_a_missing_right_or_column_is_a_fault_and_no_outage(
    database: str, tmp_path: Path, sql: str, found: str, words: str
) -> None:
    admin = await asyncpg.connect(database)
    await make_role(admin, "clerk")
    await admin.execute(sql)
    await admin.close()
    as_clerk, lines = database.replace("postgres@", "clerk@"), list[str]()
    assert not await asyncio.to_thread(provision.check, configured(as_clerk, tmp_path), lines.append)
    assert any(line.startswith("FAILED database") and found in line for line in lines), lines
    async with stack(as_clerk, tmp_path) as product:
        worker = product.start("worker")

        async def told() -> bool:
            return (words or found) in worker.text

        await until(told)
        assert "can't be used right now" not in worker.text
        assert "waiting for the database" not in worker.text


async def test_a_database_that_does_not_let_the_role_in_yet_is_waited_for(database: str, tmp_path: Path) -> None:
    """As between the two steps of `backcast setup`: it makes the roles first, and lets them in last."""
    admin = await asyncpg.connect(database)
    name = await admin.fetchval("select current_database()")
    await make_role(admin, "early")
    await admin.execute(f'revoke connect on database "{name}" from public')
    async with stack(database.replace("postgres@", "early@"), tmp_path) as product:
        worker = product.start("worker")

        async def waits() -> bool:
            return "waiting for the database: The database has no schema of this release" in worker.text

        await worker.does(waits)
        await admin.execute(f'grant connect on database "{name}" to early')
        await worker.ready()
    await admin.close()


async def test_a_connection_that_is_lost_in_silence_is_opened_again(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LISTENS_FOR", 0.1)
    where = urlsplit(database)
    socket = f"{parse_qs(where.query)['host'][0]}/.s.PGSQL.5432"
    link, direct, ready = await Link(socket).open(), Ledger(database), asyncio.Event()
    ledger = Ledger(f"postgresql://postgres@127.0.0.1:{link.port}{where.path}", timeout=timedelta(seconds=1))
    listening = asyncio.create_task(ledger.listen("default", lambda _: ready.set()))

    async def heard() -> bool:
        direct.wake("default")
        await asyncio.wait({asyncio.create_task(ready.wait())}, timeout=1)
        return ready.is_set()

    await until(heard)
    link.become(Weather(hang=True))
    ready.clear()
    fresh = await Link(socket).open()
    ledger._url = ledger._url.replace(str(link.port), str(fresh.port))  # the way round the firewall
    await until(heard)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    link.become(CLEAR)
    for each in (link, fresh, ledger, direct):
        await each.aclose()


async def test_an_error_of_a_trigger_opens_no_connection(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a name that is not there may mean that the schema is missing, which another connection finds out."""
    await ledger.fetch("select 1")
    opened = list[str]()
    monkeypatch.setattr(ledger, "_connect", lambda: opened.append("a connection"))
    with pytest.raises(LedgerFault, match="as asked"):
        await ledger.execute("do $$ begin raise exception 'as asked'; end $$")
    assert opened == []
