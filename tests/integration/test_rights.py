"""The rights of each part's database role: enough for all that the part does, and nothing else.

All tests that start processes (`tests.support.stack`) start them with these roles, so they show the first half.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest

from backcast import provision
from backcast.errors import ConfigurationError
from backcast.ledger import inspection, provisioning
from backcast.ledger.connection import NEWEST, Ledger
from backcast.ledger.rights import PROCESSES, RIGHTS
from tests.integration.test_databases import configured, works
from tests.support.roles import give_roles, role_url
from tests.support.stack import stack

Connection = psycopg.Connection[tuple[str, ...]]


@pytest.fixture
def admin(database: str) -> Iterator[Connection]:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("set search_path to backcast")
        yield connection


def test_every_table_is_some_parts(admin: Connection) -> None:
    """A migration that makes a table or view states here which parts may do what with it."""
    made = admin.execute(
        "select relname from pg_class where relnamespace = 'backcast'::regnamespace"
        " and (relkind = 'p' or relkind in ('r', 'v', 'm', 'f', 'S') and not relispartition)"
        " union all select oid::regprocedure::text from pg_proc"
        " where pronamespace = 'backcast'::regnamespace and prosecdef"
    )
    assert {name for rights in RIGHTS.values() for name in rights} == {name for (name,) in made}


async def test_each_process_works_with_the_role_of_its_part(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path) as product:
        await product.up("api", "worker", "steward")
        await works(product)
        with psycopg.connect(database) as admin:
            sessions = admin.execute(
                "select distinct application_name, usename from pg_stat_activity"
                " where application_name like 'backcast-%' and datname = current_database()"
            ).fetchall()
        assert set(sessions) == {(f"backcast-{part}", f"backcast_{part}") for part in PROCESSES}
        for part in product.parts:
            assert "permission denied" not in part.text


NOBODYS: list[LiteralString] = [
    "create table backcast.mine (id int)",
    "create temporary table mine (id int)",
    "create schema mine",
    "create function backcast.mine() returns int language sql return 1",
    "create index on backcast.runs (owner)",
    "alter table backcast.runs add column mine int",
    "alter table backcast.runs disable trigger all",
    "drop table backcast.runs",
    "drop view backcast.backlog",
    "truncate backcast.runs",
    "update backcast.alembic_version set version_num = '9'",
    "update backcast.runs set input = '1'",
    "update backcast.runs set owner = 'me'",
    "create role mine",
    "alter role postgres password 'mine'",
    "alter role current_user superuser",
    "grant postgres to current_user",
    "set role postgres",
    "create database mine",
    "create extension pg_trgm",
    "alter system set log_statement = 'all'",
    "copy backcast.runs (id) from program 'true'",
    "select pg_read_file('postgresql.conf')",
]
"""What no part may do."""

REFUSED: dict[str, list[LiteralString]] = {
    "api": [
        "delete from backcast.ended",
        "delete from backcast.retries",
        "update backcast.operations set done = 9",
        "update backcast.ended set result = '1'",
        "select backcast.drop_retired()",
        "delete from backcast.lanes",
        "delete from backcast.batches",
        "update backcast.runs set fence = 9",
        "insert into backcast.task_types default values",
        "update backcast.workers set draining = true",
        "select * from backcast.cursors",
        "select * from backcast.flights",
    ],
    "worker": [
        "delete from backcast.ended",
        "update backcast.ended set result = '1'",
        "select backcast.retire_partition('ended_completed_20260101')",
        "delete from backcast.lanes",
        "delete from backcast.task_types",
        "delete from backcast.cursors",
        "insert into backcast.runs default values",
        "insert into backcast.lanes (name) values ('mine')",
        "update backcast.lanes set max_running = 9",
        "update backcast.runs set max_attempts = 9",
        "update backcast.cursors set value = '00000000-0000-0000-0000-000000000000'",
        "select result from backcast.ended",
        "select result from backcast.all_runs",
        "select owner, metadata from backcast.all_runs",
        "select * from backcast.batches",
        "select * from backcast.operations",
    ],
    "steward": [
        "insert into backcast.runs (worker_id) values (null)",
        "update backcast.operations set filter = '{}'",
        "update backcast.ended set result = '1'",
        "update backcast.runs set fence = 9",
        "delete from backcast.lanes",
        "delete from backcast.cursors",
        "update backcast.lanes set max_running = 9",
        "insert into backcast.workers default values",
        "update backcast.task_types set pool = 'mine'",
    ],
}


@pytest.mark.parametrize("part", PROCESSES)
def test_a_role_may_do_nothing_else(database: str, admin: Connection, part: str) -> None:
    name = admin.info.dbname
    admin.execute(f'revoke all on database "{name}" from public')  # as for a database that the setup has made
    give_roles(database)
    with psycopg.connect(role_url(database, part), autocommit=True) as connection:
        assert [sql for sql in NOBODYS + REFUSED[part] if not _is_refused(connection, sql)] == []


def _is_refused(connection: Connection, sql: LiteralString) -> bool:
    try:
        connection.execute(sql)
    except psycopg.errors.InsufficientPrivilege:
        return True
    return False


async def test_the_rights_of_an_older_release_go(database: str, admin: Connection) -> None:
    admin.execute("grant all on all tables in schema backcast to backcast_worker")
    admin.execute("grant create on schema backcast to backcast_worker")
    admin.execute("grant update (owner) on runs to backcast_steward")
    give_roles(database)
    rights = "select has_table_privilege(%s, 'ended', 'delete'), has_schema_privilege(%s, 'backcast', 'create')"
    assert admin.execute(rights, ["backcast_worker"] * 2).fetchone() == (False, False)
    row = admin.execute("select has_column_privilege('backcast_steward', 'runs', 'owner', 'update')").fetchone()
    assert row == (False,)


async def test_an_older_release_leaves_the_rights_of_a_newer_schema(database: str, admin: Connection) -> None:
    """As after a roll-back: the newer pods still serve."""
    admin.execute("grant insert on runs to backcast_worker")
    admin.execute("update alembic_version set version_num = '9999'")
    give_roles(database)
    assert admin.execute("select has_table_privilege('backcast_worker', 'runs', 'insert')").fetchone() == (True,)


async def test_parts_may_share_a_role_and_the_owner_keeps_its_own(database: str, admin: Connection) -> None:
    both = role_url(database, "worker")
    report = provisioning.grant(database, {"worker": both, "steward": both, "api": database.replace("@", ":any@", 1)})
    assert report == "Rights are granted to backcast_worker."
    for part, url in (("worker", both), ("steward", both), ("api", database)):
        ledger = Ledger(url)
        await inspection.rights(ledger, part)
        await ledger.aclose()
    give_roles(database)


@pytest.mark.parametrize(
    ("part", "sql", "words"),
    [
        ("api", "revoke update (cancel_requested_at) on runs from backcast_api", "runs: update (cancel_requested_at)"),
        ("worker", "revoke delete on flights from backcast_worker", "flights: delete"),
        ("steward", "revoke maintain on runs from backcast_steward", "runs: maintain"),
        ("steward", "revoke select on backlog from backcast_steward", "backlog: select"),
    ],
)
async def test_check_names_the_right_that_a_part_lacks(
    database: str, admin: Connection, tmp_path: Path, part: str, sql: str, words: str
) -> None:
    admin.execute(sql)
    known = {f"{each}_url": role_url(database, each) for each in PROCESSES}
    it = configured(database, tmp_path)
    it = it.model_copy(update={"setup": it.setup.model_validate(known)})
    lines: list[str] = []
    assert not await asyncio.to_thread(provision.check, it, lines.append)
    failed = [line for line in lines if line.startswith("FAILED database")]
    assert len(failed) == 1, lines
    assert failed[0].startswith(f"FAILED database: the {part} may do what it does: The role lacks rights that the")
    assert words in failed[0]
    lines.clear()
    own = configured(role_url(database, part), tmp_path)  # as in a pod of the part
    assert not await asyncio.to_thread(provision.check, own, lines.append, [part])
    assert [words in line for line in lines if line.startswith("FAILED database")] == [True], lines


def test_a_role_that_is_not_there_is_named(database: str) -> None:
    url = database.replace("//postgres@", "//absent:any@")
    with pytest.raises(ConfigurationError, match=r"no role absent: create it, or let BACKCAST_SETUP__ADMIN_URL"):
        provisioning.grant(database, {"worker": url})


def test_the_schema_is_the_newest_that_the_rights_are_for(admin: Connection) -> None:
    assert admin.execute("select version_num from alembic_version").fetchone() == (NEWEST,)
