"""`backcast setup` and `backcast check`, on a PostgreSQL that asks for passwords and on a real S3 server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest

from backcast import provision
from backcast.errors import ConfigurationError, Unavailable
from backcast.ledger import provisioning
from backcast.ledger.rights import PROCESSES
from backcast.local import postgres
from backcast.settings import Settings
from tests.support.s3 import s3_server
from tests.support.waiting import PATIENCE


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL, without a user, of a server that only `postgres` may enter, and only with a password."""
    folder = tmp_path_factory.mktemp("guarded")
    folder.chmod(0o755)
    hba = folder / "hba.conf"
    hba.write_text("local all all trust\n")
    with postgres.running(folder / "data", settings={"hba_file": str(hba), "fsync": "off"}) as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("alter role postgres password 'admin-secret'")
            hba.write_text("local all all scram-sha-256\n")
            connection.execute("select pg_reload_conf()")
        yield server.url("{database}").replace("postgres@", "{user}:{password}@")


def settings(guarded: str, folder: Path, *, password: str = "ours", **setup: Any) -> Settings:
    def url(user: str, password: str, database: str) -> str:
        return guarded.format(user=user, password=password, database=database)

    given = {
        "admin_url": url("postgres", "admin-secret", "postgres"),
        "prefect_url": url("prefect", "theirs", "prefect").replace("://", "+asyncpg://"),
        "scaler_url": url("scaler", "sees", "backcast"),
        **{f"{part}_url": url(f"the_{part}", f"{part}s", "backcast") for part in PROCESSES},
        "patience": PATIENCE,
    }
    return Settings.model_validate(
        {
            "database": {"url": url("backcast", password, "backcast")},
            "store": {"url": f"file://{folder}/store"},
            "setup": given | setup,
        }
    )


async def _refused(url: str, sql: str) -> str:
    connection = await asyncpg.connect(url)
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError) as refused:
            await connection.execute(sql)
        return str(refused.value)
    finally:
        await connection.close()


async def test_roles_databases_schema_and_store_are_made_and_made_again(guarded: str, tmp_path: Path) -> None:
    it, lines = settings(guarded, tmp_path), []
    for _ in range(2):
        await asyncio.gather(*(asyncio.to_thread(provision.prepare, it, lines.append) for _ in range(3)))
    assert "The database backcast of backcast is made." in lines
    assert "The database prefect of prefect was there." in lines
    assert lines.count("The schema is now 0001.") == 1
    assert "Rights are granted to the_api, the_worker, the_steward, scaler." in lines
    assert lines[-1] == f"The store file://{tmp_path}/store is there, and every call works."
    assert await asyncio.to_thread(provision.check, it, lines.append)
    assert not [line for line in lines if line.startswith("FAILED")]

    scaler = it.setup.roles["scaler"]
    connection = await asyncpg.connect(scaler)
    assert await connection.fetch("select ready + running from backcast.backlog where pool = 'default'") == []
    await connection.close()
    assert "runs" in await _refused(scaler, "select * from backcast.all_runs")
    assert "schema backcast" in await _refused(scaler, "create table backcast.mine (id int)")
    for url in (it.database.url.get_secret_value(), *it.setup.roles.values()):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="prefect"):
            await asyncpg.connect(url.replace("/backcast?", "/prefect?"))
    for part in PROCESSES:
        assert "schema backcast" in await _refused(it.setup.roles[part], "create table backcast.mine (id int)")
    theirs = it.setup.prefect_url.get_secret_value()  # type: ignore[union-attr]
    connection = await asyncpg.connect(theirs.replace("+asyncpg", ""))
    await connection.execute("create extension if not exists pg_trgm")  # as Prefect's server does
    await connection.close()


@pytest.mark.parametrize(
    "parameters",
    [
        "sslmode=prefer&channel_binding=prefer&connect_timeout=10&keepalives=1&gssencmode=disable",
        "ssl=prefer&target_session_attrs=read-write&application_name=ours",
    ],
)
async def test_the_parameters_of_one_driver_stop_no_other(guarded: str, tmp_path: Path, parameters: str) -> None:
    it, lines = settings(f"{guarded}&{parameters}", tmp_path, prefect_url=None), list[str]()
    await asyncio.to_thread(provision.prepare, it, lines.append)
    assert await asyncio.to_thread(provision.check, it, lines.append), lines


def test_a_url_that_libpq_refuses_is_not_quoted() -> None:
    with pytest.raises(ConfigurationError, match="The URL of the database at h can't be read by libpq") as refused:
        provisioning.why_not_ready("postgresql://u:hunter%00@h/db")
    assert "hunter" not in str(refused.value)


def test_a_database_is_made_for_every_text_and_none_else_is_taken(tmp_path: Path) -> None:
    """Also on a server whose own databases have no encoding."""
    tmp_path.chmod(0o755)
    with postgres.running(tmp_path / "data", settings={"fsync": "off"}) as server:
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("update pg_database set datistemplate = false where datname = 'template1'")
            connection.execute("drop database template1")
            connection.execute("create database template1 encoding 'SQL_ASCII' locale 'C' template template0")
            connection.execute("create role backcast login password 'ours'")
            connection.execute("create database bare owner backcast")
        given = server.url("{database}").replace("postgres@", "{user}:{password}@")
        it = settings(given, tmp_path)
        provision.prepare(it, lambda _: None)
        assert provision.check(it, lambda _: None)
        bare = given.format(user="backcast", password="ours", database="bare")
        wrong = it.model_copy(update={"database": it.database.model_validate({"url": bare})})
        with pytest.raises(ConfigurationError, match="The database's encoding, SQL_ASCII, has no room"):
            provision.prepare(wrong, lambda _: None)


async def test_a_new_password_is_taken_over(guarded: str, tmp_path: Path) -> None:
    for password in ("first", "second"):
        worker = guarded.format(user="the_worker", password=password, database="backcast")
        it = settings(guarded, tmp_path, password=password, worker_url=worker)
        await asyncio.to_thread(provision.prepare, it, lambda _: None)


async def test_without_an_administrator_the_roles_must_be_there(guarded: str, tmp_path: Path) -> None:
    """Their owner grants them their rights."""
    await asyncio.to_thread(provision.prepare, settings(guarded, tmp_path), lambda _: None)
    admin = await asyncpg.connect(guarded.format(user="postgres", password="admin-secret", database="backcast"))
    await admin.execute("revoke all on all tables in schema backcast from the_worker")
    lines: list[str] = []
    await asyncio.to_thread(provision.prepare, settings(guarded, tmp_path, admin_url=None), lines.append)
    assert "Rights are granted to the_api, the_worker, the_steward, scaler." in lines
    await admin.execute("alter role the_worker password 'another'")
    with pytest.raises(ConfigurationError, match='authentication failed for user "the_worker"'):
        await asyncio.to_thread(provision.prepare, settings(guarded, tmp_path, admin_url=None), lines.append)
    await admin.close()


def test_an_old_volume_with_a_new_password_is_explained(guarded: str, tmp_path: Path) -> None:
    admin = guarded.format(user="postgres", password="new", database="postgres")
    with pytest.raises(ConfigurationError, match=r"password authentication failed .* earlier installation") as refused:
        provision.prepare(settings(guarded, tmp_path, admin_url=admin), lambda _: None)
    assert "new@" not in str(refused.value)


def test_a_database_that_does_not_come_is_explained(tmp_path: Path) -> None:
    away = Settings.model_validate(
        {"database": {"url": "postgresql://u:secret@127.0.0.1:1/d"}, "setup": {"patience": 0.5}}
    )
    lines: list[str] = []
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1 can't be used yet.*refused.*the setting name its address"):
        provision.prepare(away, lines.append)
    assert len(lines) == 1, "the same reason is reported once"
    assert "secret" not in lines[0]


def test_the_prefect_server_waits_until_its_database_is_there(guarded: str, tmp_path: Path) -> None:
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:  # refused: there is no such role yet
            provision.prepare(it, lambda _: None)

    later = guarded.format(user="later", password="pw", database="later").replace("://", "+asyncpg://")
    it = settings(guarded, tmp_path, prefect_url=later)
    provision.await_prefect_database(it, report)
    assert len(lines) == 1


def test_a_bucket_is_made_and_every_call_is_tried(guarded: str, tmp_path: Path) -> None:
    (tmp_path / "s3").mkdir()
    with s3_server(tmp_path / "s3") as s3:
        it = settings(guarded, tmp_path)
        given = {"url": "s3://made/for/us", "endpoint": s3.url, "access_key": s3.access_key, "timeout": PATIENCE}
        good = it.model_copy(update={"store": it.store.model_validate(given | {"secret_key": s3.secret_key})})
        bad = it.model_copy(update={"store": it.store.model_validate(given | {"secret_key": "wrong"})})
        lines: list[str] = []
        assert not provision.check(good, lines.append)
        assert any("made" in line and "does not exist: create it" in line for line in lines)
        provision.prepare(good, lines.append)
        lines.clear()
        assert provision.check(good, lines.append)
        assert [line[:6] for line in lines] == ["ok    "] * 11, lines
        assert not provision.check(bad, lines.append)
        assert any(line.startswith("FAILED store: put") and "access key" in line for line in lines), lines
