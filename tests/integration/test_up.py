"""`backcast up` as a user runs it: started in a shell, called over HTTP, ended by signals; and its PostgreSQL."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import psutil
import psycopg
import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from backcast.ledger import provisioning
from backcast.local import postgres
from backcast.testing import ScriptedModel
from tests.support.runs import FINAL
from tests.support.stack import ROOT, free_port
from tests.support.waiting import PATIENCE, until

KEY = "it's a key of ours"


class Up:
    """One `backcast up` on a free port, with a folder of its own and no ambient settings."""

    def __init__(self, folder: Path, *options: str, tee: bool = False, **environ: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.AsyncClient(base_url=self.url, timeout=PATIENCE)
        self.data = folder / "data"
        self.log = folder / "terminal"
        """What it prints, by `| tee` if that is asked for."""
        self.tee = subprocess.Popen(["tee", self.log], stdin=subprocess.PIPE) if tee else None
        with (self.tee and self.tee.stdin) or self.log.open("ab") as terminal:
            self.process = psutil.Popen(
                [sys.executable, "-m", "backcast", "up", "--data", self.data, "--port", str(self.port), *options],
                env=os.environ | {"HOME": str(folder), "COLUMNS": "200", "PYTHONPATH": str(ROOT)} | environ,
                cwd=folder,
                stdout=terminal,
                stderr=subprocess.STDOUT,
            )

    async def prints(self, pattern: str, *, timeout: float = PATIENCE) -> str:
        async def look() -> str:
            text = self.log.read_text(errors="replace")
            assert self.process.poll() is None or re.search(pattern, text), f"it has ended:\n{text}"
            return text

        return await until(look, lambda text: bool(re.search(pattern, text)), timeout=timeout)

    async def ended(self) -> int:
        async def look() -> int | None:
            return self.process.poll()

        return await until(look, lambda code: code is not None) or 0

    async def get(self, path: str) -> Any:
        answer = await self.http.get(path)
        assert answer.is_success, answer.text
        return answer.json()

    async def submit(self, task: str, **given: object) -> str:
        answer = await self.http.post(f"/v1/tasks/{task}/runs", json={"input": given})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    async def run(
        self, run_id: str, holds: Callable[[dict[str, Any]], bool], *, timeout: float = PATIENCE
    ) -> dict[str, Any]:
        return await until(lambda: self.get(f"/v1/runs/{run_id}"), holds, timeout=timeout)

    def parts(self) -> dict[str, psutil.Process]:
        """Its children by name."""
        found: dict[str, psutil.Process] = {}
        for child in self.process.children():
            try:
                words = child.cmdline()
            except psutil.NoSuchProcess:
                continue  # it has just ended
            if len(words) < 3:
                continue
            name = "postgres" if words[0].endswith("postgres") else words[3 if words[2] == "backcast" else 2]
            found[name] = child
        return found

    async def replaced(self, name: str, pid: int) -> bool:
        """Whether another process has taken the place of a part that was killed."""
        part = self.parts().get(name)
        return part is not None and part.pid != pid


@contextlib.asynccontextmanager
async def up(folder: Path, *options: str, tee: bool = False, **environ: str) -> AsyncIterator[Up]:
    it = Up(folder, *options, tee=tee, **environ)
    try:
        yield it
    finally:
        await it.http.aclose()
        with contextlib.suppress(psutil.NoSuchProcess):
            family = it.process.children(recursive=True)
            it.process.kill()
            psutil.wait_procs(family, timeout=PATIENCE)
        it.process.wait()
        if it.tee is not None:
            it.tee.wait()


@pytest.fixture
def model() -> Iterator[dict[str, str]]:
    """Settings of a provider that answers by script."""
    with ScriptedModel() as provider:
        yield {"BACKCAST_MODEL__API_KEY": "any", "BACKCAST_MODEL__BASE_URL": provider.url}


def is_gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def has_ended(run: dict[str, Any]) -> bool:
    return run["state"] in FINAL


async def test_it_starts_casts_shows_prefect_and_stops(tmp_path: Path, model: dict[str, str]) -> None:
    nowhere = f"127.0.0.1:{free_port()}"  # nothing of ours goes there
    environ = model | {"HTTP_PROXY": f"http://{nowhere}", "PREFECT_SERVER_UI_STATIC_DIRECTORY": "/proc/ui"}
    environ |= {"prefect_server_database_connection_url": f"postgresql+asyncpg://{nowhere}/production"}
    (tmp_path / ".env").write_text("PREFECT_SERVER_API_AUTH_STRING=user:password")
    async with up(tmp_path, **environ) as it:
        text = await it.prints("chairs in the hall” → int → ")
        assert re.search(r"We put (\d+) chairs in the hall” → int → \1 ", text)
        assert f"Console  {it.url}/console" in text
        shown = await it.http.get("/", headers={"Accept": "text/html"}, follow_redirects=True)
        assert (shown.url.path, "chairs in the hall</textarea>" in shown.text) == ("/console/try", True)
        assert "completed" in shown.text
        assert f"API      {it.url}/docs" in text
        assert (await it.http.get("/docs")).status_code == 200
        assert (it.data / "url").read_text() == f"{it.url}\n"

        # The lines to paste, unchanged.
        pasted = re.search(rf"^ *(curl {it.url}/tasks .*)\n *(.*backcast (cast .*))$", text, re.MULTILINE)
        assert pasted
        answer = subprocess.run(pasted[1], shell=True, capture_output=True, check=True).stdout
        path = f"/tasks/{json.loads(answer)['task_run_id']}/status"
        assert (await until(lambda: it.get(path), lambda seen: seen["status"] != "pending"))["result"] == 31
        assert pasted[2] == f"BACKCAST_URL={it.url} backcast {pasted[3]}"
        command = f"BACKCAST_URL={it.url} {sys.executable} -m backcast {pasted[3]}"
        assert subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout == "31\n"

        prefect = re.findall(r"is up: (http\S+)", await it.prints("prefect │ is up: http"))[0]
        assert isinstance((await it.http.get(f"{prefect}/api/admin/version")).json(), str)
        assert "<html" in (await it.http.get(prefect, follow_redirects=True)).text
        for service in (it.url, prefect):
            answer = await it.http.get(f"{service}/api/health", headers={"Origin": "https://evil.example"})
            assert "access-control-allow-origin" not in answer.headers, "no web page may read it"
        assert (await it.http.get("/v1/runs", headers={"Host": "evil.example"})).status_code == 403

        second = subprocess.run(
            [sys.executable, "-m", "backcast", "up", "--data", it.data], capture_output=True, text=True, check=False
        )
        assert second.returncode == 2
        assert f"backcast is already up on {it.data}: stop it, or choose another --data." in second.stderr

        family = it.process.children(recursive=True)
        it.process.send_signal(signal.SIGINT)
        assert await it.ended() == 0
        assert all(map(is_gone, family))
        assert not (it.data / "url").exists()
        assert it.log.read_text().endswith("backcast │ stopped\n")
        assert "Traceback" not in it.log.read_text()


async def test_sigkill_of_each_process_in_turn_loses_nothing(tmp_path: Path) -> None:
    """200 runs of 0.5 s, and every process of the product killed while they are worked on: each has its one outcome."""
    settings = {"BACKCAST_TASKS": "tests.support.sample_tasks"}
    async with up(tmp_path, "--no-model", **settings) as it:
        await it.prints("prefect │ is up")
        runs = [await it.submit("nap", seconds=0.5, name="load") for _ in range(200)]
        for name in ("worker", "api", "steward", "prefect", "postgres", "worker"):
            killed = it.parts()[name]
            killed.kill()
            await until(partial(it.replaced, name, killed.pid))
            await it.prints(rf"{name} │ was killed by SIGKILL; starting it again in 0.5 s")
        await until(lambda: it.get("/readyz"))
        for run_id in runs:
            run = await it.run(run_id, has_ended, timeout=2 * PATIENCE)
            assert run["state"] == "completed", run
            assert (await it.get(f"/v1/runs/{run_id}/result")) == 0.5
        with psycopg.connect(postgres.url(it.data / "postgres", "backcast")) as ledger:
            count, keys = ledger.execute(
                "select count(*), array_agg(result_key) from backcast.all_runs"
            ).fetchone() or (
                0,
                [],
            )
        assert count == 200
        for key in keys:
            kind, run, fence = key.split("/")
            assert (it.data / "store" / kind / f"{run}~{fence}").read_text() == "0.5"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help exists on Linux only")
async def test_the_parts_go_with_it_and_a_new_one_takes_over(tmp_path: Path, model: dict[str, str]) -> None:
    async with up(tmp_path, **model) as first:
        await first.prints(r" → int → \d+ ")
        family = first.process.children(recursive=True)
        first.process.kill()
        async with up(tmp_path, **model) as second:
            await second.prints(r"backcast is up(?s:.*)backcast is up(?s:.*) → int → \d+ ")
            assert all(map(is_gone, family))
            assert len((await second.get("/v1/runs"))["items"]) == 2  # the evidence of the first one is still there
            second.process.send_signal(signal.SIGTERM)
            assert await second.ended() == 0


async def test_running_work_may_finish_and_a_second_ctrl_c_releases_it(tmp_path: Path) -> None:
    tasks = {"BACKCAST_TASKS": "tests.support.sample_tasks"}
    async with up(tmp_path, "--no-model", **tasks) as it:
        await it.prints("backcast is up")
        short, long = await it.submit("linger", name="short"), await it.submit("linger", name="long")
        cast = await it.run(await it.submit("create_structured_output", data="31 chairs", target="int"), has_ended)
        assert (cast["error"]["code"], cast["attempts"]) == ("model_not_set_up", 1)
        for run_id in (short, long):
            await it.run(run_id, lambda run: run["state"] == "running")
        it.process.send_signal(signal.SIGINT)
        await it.prints("draining: running work has 10 s")
        (tmp_path / "release-short").touch()
        await it.run(short, has_ended)
        it.process.send_signal(signal.SIGINT)
        assert await it.ended() == 0
    async with up(tmp_path, "--no-model", **tasks) as it:
        await it.prints("backcast is up(?s:.*)backcast is up")
        again = await it.run(long, lambda run: run["state"] == "running")
        assert again["error"] is None
        assert (await it.get(f"/v1/runs/{short}"))["state"] == "completed"


async def test_running_work_may_finish_when_the_terminal_goes(tmp_path: Path) -> None:
    tasks = {"BACKCAST_TASKS": "tests.support.sample_tasks"}
    async with up(tmp_path, "--no-model", tee=True, **tasks) as it:
        await it.prints("backcast is up")
        run = await it.submit("linger", name="work")
        await it.run(run, lambda run: run["state"] == "running")
        assert it.tee is not None
        it.tee.kill()
        it.tee.wait()
        for _ in range(2):  # the kernel's and the shell's
            it.process.send_signal(signal.SIGHUP)
        (tmp_path / "release-work").touch()
        assert await it.ended() == 0
    async with up(tmp_path, "--no-model", **tasks) as it:
        await it.prints("backcast is up(?s:.*)backcast is up")
        ended = await it.run(run, has_ended)
        assert (ended["state"], ended["attempts"]) == ("completed", 1)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Up]:
    """One with keys, whose port is taken when it starts."""
    environ = {"BACKCAST_TASKS": "tests.support.sample_tasks", "BACKCAST_API__KEYS": f"{KEY},another one of 16"}
    with ScriptedModel() as other:
        async with up(tmp_path_factory.mktemp("up"), "--no-model", "--port", str(other.port), **environ) as it:
            text = await it.prints("backcast is up")
            found = re.search(rf"    api │ port {other.port} is taken, using (\d+)\n", text)
            assert found
            it.url = f"http://127.0.0.1:{found[1]}"
            it.http.base_url, it.http.headers["Authorization"] = httpx.URL(it.url), f"Bearer {KEY}"
            yield it
            it.process.send_signal(signal.SIGTERM)
            assert await it.ended() == 0


@pytest.mark.asyncio(loop_scope="module")
async def test_a_port_that_is_taken_is_replaced_in_one_line(shared: Up) -> None:
    await until(lambda: shared.get("/readyz"))


@pytest.mark.asyncio(loop_scope="module")
async def test_the_lines_to_paste_carry_the_key(shared: Up) -> None:
    text = await shared.prints(r"backcast is up(?s:.*)backcast cast .*\n")
    pasted = re.search(rf"^ *(curl .*{shared.url}/tasks .*)\n *(.*backcast cast .*)$", text, re.MULTILINE)
    assert pasted
    answer = subprocess.run(pasted[1], shell=True, capture_output=True, check=True).stdout
    assert json.loads(answer)["task_run_id"]
    assert shlex.split(pasted[2])[:2] == [f"BACKCAST_API_KEY={KEY}", f"BACKCAST_URL={shared.url}"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_line_that_never_ends_stops_nothing(shared: Up) -> None:
    run = await shared.submit("shout", size=40_000_000)
    assert (await shared.run(run, has_ended))["state"] == "completed"


@pytest.mark.asyncio(loop_scope="module")
async def test_the_death_of_a_worker_is_seen_while_a_process_of_a_task_goes_on(shared: Up) -> None:
    run = await shared.submit("leave_a_process")
    assert (await shared.run(run, has_ended))["state"] == "completed"
    left = psutil.Process(await shared.get(f"/v1/runs/{run}/result"))
    shared.parts()["worker"].kill()
    await shared.prints("worker │ was killed by SIGKILL; starting it again in 0.5 s")
    left.kill()


@contextlib.contextmanager
def _taken(it: Up, name: str, port: int) -> Iterator[None]:
    """Kill a part, and take its port before it is started again."""
    it.process.suspend()
    it.parts()[name].kill()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        give_up = time.monotonic() + PATIENCE
        while True:
            try:
                other.bind(("127.0.0.1", port))
                break
            except OSError:  # the killed one still ends
                assert time.monotonic() < give_up
                time.sleep(0.01)
        other.listen()
        it.process.resume()
        yield


async def test_a_port_that_another_program_takes_later_is_replaced_or_named(tmp_path: Path) -> None:
    async with up(tmp_path, "--no-model") as it:
        await it.prints("backcast is up")
        with contextlib.ExitStack() as others:
            for name in ("worker", "steward"):
                [port] = [
                    each.laddr.port for each in it.parts()[name].net_connections("tcp") if each.status == "LISTEN"
                ]
                others.enter_context(_taken(it, name, port))
                await it.prints(rf"{name} │ another program has taken port {port}, using \d+")
            others.enter_context(_taken(it, "api", it.port))
            assert await it.ended() == 2
        assert f"Another program has taken port {it.port} of api: stop it, or choose another port by --port." in (
            it.log.read_text()
        )


async def test_two_that_start_at_once_keep_to_themselves(tmp_path: Path) -> None:
    tasks = {"BACKCAST_TASKS": "tests.support.sample_tasks"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    async with (
        up(tmp_path / "one", "--no-model", **tasks) as one,
        up(tmp_path / "two", "--no-model", **tasks) as two,
        httpx.AsyncClient() as client,
    ):
        runs, servers = list[str](), list[str]()
        for it in (one, two):
            await it.prints("backcast is up")  # Prefect's servers start last, and take as long as all the rest
        for it in (one, two):
            found = re.search(r"prefect │ is up: (\S+)", await it.prints(r"prefect │ is up: \S+\n"))
            assert found
            servers.append(found[1])
            runs.append(await it.submit("echo", value=1))
            assert (await it.run(runs[-1], has_ended))["state"] == "completed"
            assert [run["id"] for run in (await it.get("/v1/runs"))["items"]] == [runs[-1]]

        async def statuses() -> list[int]:
            return [
                (await client.get(f"{server}/api/task_runs/{run}")).status_code for server in servers for run in runs
            ]

        await until(statuses, lambda seen: seen == [200, 404, 404, 200])
        for it in (one, two):
            assert "is taken: set" not in it.log.read_text(), "nobody had to start again for its port"


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """Settings with which no model is found or downloaded."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    environ = {"HTTPS_PROXY": nowhere, "PIP_INDEX_URL": nowhere, "PIP_RETRIES": "0"}
    return environ | {"BACKCAST_MODEL__PORT": str(free_port()), "BACKCAST_MODEL__CACHE": str(tmp_path / "cache")}


async def test_while_the_model_can_not_be_had_casts_wait_and_other_tasks_run(
    tmp_path: Path, offline: dict[str, str], model: dict[str, str]
) -> None:
    async with up(tmp_path, **offline, BACKCAST_TASKS="tests.support.sample_tasks") as it:
        await it.prints("backcast is up")
        await it.prints("model │ The embedded model's file can't be had")
        cast = await it.submit("create_structured_output", data="31 chairs", target="int")
        waiting = await it.run(cast, lambda run: run["state"] == "queued")
        assert (waiting["attempts"], waiting["error"]) == (0, None)
        assert [(it["name"], it["by"]) for it in (await it.get("/v1/pauses"))["items"]] == [
            ("create_structured_output", "backcast up")
        ]
        other = await it.submit("nap", seconds=0)
        assert (await it.run(other, has_ended))["state"] == "completed"
        it.process.send_signal(signal.SIGINT)
        assert await it.ended() == 0
    async with up(tmp_path, **model) as it:  # with a model, and no pause any more
        await it.prints("backcast is up(?s:.*)backcast is up")
        assert (await it.run(cast, has_ended))["state"] == "completed"
        assert (await it.get("/v1/pauses"))["items"] == []


async def test_a_file_of_the_model_that_is_named_is_not_downloaded(tmp_path: Path, offline: dict[str, str]) -> None:
    async with up(tmp_path, **offline, BACKCAST_MODEL__WEIGHTS="/dev/null") as it:
        log = it.data / "log" / "model.log"

        async def look() -> str:
            return log.read_text()

        await until(look, lambda text: "loading /dev/null" in text)


def test_postgres_survives_the_kill_of_its_server(tmp_path: Path) -> None:
    with postgres.running(tmp_path / "data") as server, psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("create table kept as select 31 as number")
        os.kill(server.pid, signal.SIGKILL)
    with postgres.running(tmp_path / "data") as server, psycopg.connect(server.url()) as connection:
        assert connection.execute("select number from kept").fetchall() == [(31,)]
        assert not server.url("x").startswith("postgresql://localhost")
    assert provisioning.why_not_ready(server.url()) is not None


def test_postgres_is_not_fooled_by_a_pid_that_someone_else_has_now(tmp_path: Path) -> None:
    with postgres.running(tmp_path / "data"):
        pass
    (tmp_path / "data" / "postmaster.pid").write_text(f"{os.getpid()}\n{tmp_path}/data\n")
    with postgres.running(tmp_path / "data") as server:
        assert provisioning.why_not_ready(server.url()) is None


async def test_postgres_is_reached_whatever_server_the_shell_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = {"PGHOST": "elsewhere.example.org", "PGPORT": "5433", "PGUSER": "nobody", "PGDATABASE": "none"}
    for name, value in elsewhere.items():
        monkeypatch.setenv(name, value)
    with postgres.running(tmp_path / "data") as server:
        psycopg.connect(server.url()).close()
        await (await asyncpg.connect(server.url())).close()
        engine = create_async_engine(server.url().replace(":", "+asyncpg:", 1))  # as Prefect's server does
        async with engine.connect() as connection:
            assert await connection.scalar(text("select current_user")) == "postgres"
        await engine.dispose()


def test_postgres_takes_long_and_odd_paths_and_every_driver(tmp_path: Path) -> None:
    with postgres.running(tmp_path / ("a long name, 50% of it spaces " * 4) / "data") as server:
        provisioning.create_database(server.url(), "other")
        provisioning.create_database(server.url(), "other")
        with psycopg.connect(server.url("other")) as connection:
            collation = "select datlocprovider, pg_encoding_to_char(encoding) from pg_database where datname = 'other'"
            assert connection.execute(collation).fetchone() == ("b", "UTF8")
            connection.execute("create extension pg_trgm")
