"""Starts the product's real processes as a user does, signals them, and ends them by their pid."""

import asyncio
import contextlib
import itertools
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from backcast.settings import Store as StoreSettings
from backcast.store import open_store
from tests.support.roles import role_url
from tests.support.runs import Runs
from tests.support.waiting import PATIENCE, until

ROOT = Path(__file__).parents[2]


def _ports() -> Iterator[int]:
    """Ports that no other process of tests takes, and that the kernel gives to no connection: a block belongs to
    the process that holds its first one."""
    for first in range(10_000, 32_000, 200):
        holder = socket.socket()
        try:
            holder.bind(("127.0.0.1", first))
        except OSError:
            holder.close()
            continue
        with holder:
            yield from itertools.cycle(range(first + 1, first + 200))


_free_ports = _ports()


def free_port() -> int:
    return next(filter(_is_free, _free_ports))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass
class Part:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    url: str
    metrics_url: str
    """Where it serves its metrics: the API on a port of its own."""

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    async def ready(self, path: str = "/readyz") -> "Part":
        async with httpx.AsyncClient() as client:

            async def look() -> bool:
                return (await client.get(self.url + path, timeout=10)).status_code == 200

            return await self.does(look)

    async def does(self, look: Callable[[], Awaitable[bool]]) -> "Part":
        """Wait until `look` answers true; the error after the deadline shows the log."""

        async def alive() -> bool:
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}"
            return await look()

        try:
            await until(alive)
        except AssertionError as error:
            raise AssertionError(f"{self.name} is not ready: {error}\n{self.text}") from None
        return self

    def kill(self) -> None:
        """SIGKILL for the whole group: no process of it can clean up."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self, *, timeout: float = PATIENCE) -> int:
        async def look() -> int | None:
            return self.process.poll()

        code = await until(look, lambda code: code is not None, timeout=timeout)
        assert code is not None
        return code


@dataclass
class Stack(Runs):
    """A database, a folder, and the parts that a test starts over them."""

    database: str
    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    http: httpx.AsyncClient = field(default_factory=lambda: httpx.AsyncClient(timeout=PATIENCE))

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "default",
            "BACKCAST_DATABASE__URL": self.database,
            "BACKCAST_STORE__URL": f"file://{self.folder}/store",
            "BACKCAST_PREFECT__HISTORY": "false",
            "BACKCAST_API__METRICS_PORT": "0",
            "BACKCAST_TASKS": "tests.support.sample_tasks",
            "PREFECT_HOME": str(self.folder / "prefect"),
            **self.env,
            **more,
        }

    def spawn(self, name: str, command: list[str], url: str, metrics_url: str | None = None, **more: str) -> Part:
        log = self.folder / f"{name}-{len(self.parts)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                env=self.environment(**more),
                cwd=self.folder,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        part = Part(name, process, log, url, f"{metrics_url or url}/metrics")
        self.parts.append(part)
        return part

    def start(self, name: str, port: int | None = None, **more: str) -> Part:
        """Start `backcast <name>` with the database role of its part; its port is free unless given."""
        port = port or free_port()
        ours = {f"BACKCAST_{name.upper()}__PORT": str(port), "BACKCAST_DATABASE__URL": role_url(self.database, name)}
        url = metrics_url = f"http://127.0.0.1:{port}"
        if name == "api":
            ours["BACKCAST_API__METRICS_PORT"] = str(metrics := free_port())
            metrics_url = f"http://127.0.0.1:{metrics}"
        settings = {**ours, **self.env, **more}
        return self.spawn(name, [sys.executable, "-m", "backcast", name], url, metrics_url, **settings)

    async def up(self, *names: str, **more: str) -> None:
        """Start these parts and wait for them; the first `api` becomes the client's."""
        parts = [self.start(name, **more) for name in names]
        await asyncio.gather(*[part.ready() for part in parts])
        for part in parts:
            if part.name == "api":
                self.http.base_url = httpx.URL(part.url)

    def release(self, name: str) -> None:
        """Let the sample tasks end that linger under this name."""
        (self.folder / f"release-{name}").touch()

    async def state(self, run_id: str, state: str, *, timeout: float = PATIENCE) -> dict[str, Any]:
        return await until(lambda: self.run(run_id), lambda run: run["state"] == state, timeout=timeout)

    def stop(self) -> None:
        for part in self.parts:
            part.kill()


@contextlib.asynccontextmanager
async def stack(database: str, folder: Path, **env: str) -> AsyncIterator[Stack]:
    running = Stack(database, folder, env)
    store = open_store(StoreSettings(url=f"file://{folder}/store"))
    await store.ensure()
    await store.aclose()
    try:
        yield running
    finally:
        await running.http.aclose()
        running.stop()


async def takes_writes(prefect: str) -> bool:
    """Whether the Prefect server with this API takes a write. Its health page answers while its own services still keep
    each other from the database; writes are then refused with 503."""
    name = f"ready_{secrets.token_hex(8)}"
    with contextlib.suppress(httpx.HTTPError):
        async with httpx.AsyncClient(base_url=prefect, trust_env=False, timeout=10) as client:
            made = await client.post("/variables/", json={"name": name, "value": 1})
            return made.is_success and (await client.delete(f"/variables/name/{name}")).is_success
    return False


@contextlib.asynccontextmanager
async def prefect_server(folder: Path, database: str | None = None, port: int | None = None) -> AsyncIterator[Part]:
    """A stock Prefect server that has taken a write, on SQLite unless a database is given."""
    port = port or free_port()
    stage = Stack("", folder)
    url = f"http://127.0.0.1:{port}/api"
    env = {
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_HOME": str(folder / "prefect-server"),
        "PYTHONWARNINGS": "ignore",
    }
    if database is not None:
        env["PREFECT_API_DATABASE_CONNECTION_URL"] = database.replace("postgresql://", "postgresql+asyncpg://")
    prefect = str(Path(sys.executable).with_name("prefect"))
    command = [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    part = stage.spawn("prefect", command, url, **env)
    try:
        yield await part.does(lambda: takes_writes(url))
    finally:
        part.kill()
