"""The built package, installed as users install it: bare beside the newest FastAPI, and with single extras. It asks the
package index, and is skipped where there is none.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.stack import ROOT, free_port, stack

HEAVY = {
    "alembic", "asyncpg", "botocore", "fastapi", "fsspec", "jsonschema", "marvin", "openai", "prefect",
    "prometheus_client", "psycopg", "pydantic_ai", "pydantic_settings", "s3fs", "sqlalchemy", "starlette", "uvicorn",
    "uvloop", "yaml",
}  # fmt: skip

APPLICATION = """
import sys
from contextlib import asynccontextmanager
import uvicorn
from backcast.client import AsyncClient
from fastapi import FastAPI, Request
from pydantic import BaseModel

@asynccontextmanager
async def lifespan(app):
    async with AsyncClient(sys.argv[1]) as app.state.backcast:
        yield

class Order(BaseModel):
    value: int

app = FastAPI(lifespan=lifespan)

@app.post("/orders")
async def order(order: Order, request: Request):
    backcast = request.app.state.backcast
    run = await backcast.submit("echo", order.model_dump(), owner="shop")
    run = await backcast.wait(run.id)
    return {"run": run, "result": await backcast.result(run.id)}

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""


def uv(*arguments: str | Path) -> str:
    """The answer of uv; the test is skipped when it can't reach an index."""
    program = shutil.which("uv") or ROOT / ".tools/bin/uv"
    done = subprocess.run([program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500)
    if done.returncode and any(why in done.stderr for why in ("dns error", "error sending request", "client error")):
        pytest.skip(f"no package index: {done.stderr[-500:]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Installation:
    python: Path

    def run(self, *command: str | Path, **env: str) -> "subprocess.CompletedProcess[str]":
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.python.parents[2]), **env}
        command = (self.python, *command)
        return subprocess.run(command, env=environment, cwd=self.python.parents[2], capture_output=True, text=True)

    def says(self, *command: str, **env: str) -> str:
        done = self.run(*command, **env)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--quiet", "--wheel", "--out-dir", folder)
    [wheel] = folder.glob("*.whl")
    return wheel


def installed(folder: Path, *requirements: str) -> Installation:
    python = folder / "venv/bin/python"
    uv("venv", "--quiet", "--python", sys.executable, folder / "venv")
    uv("pip", "install", "--quiet", "--no-config", "--python", python, *requirements)
    return Installation(python)


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """`pip install backcast`, beside the application's own newest FastAPI."""
    return installed(tmp_path_factory.mktemp("bare"), str(wheel), "fastapi", "uvicorn")


@pytest.fixture(scope="module")
def service(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """`pip install backcast[api]`, with the newest of everything."""
    return installed(tmp_path_factory.mktemp("api"), f"{wheel}[api]")


def test_the_bare_install_is_small(bare: Installation) -> None:
    names = json.loads(uv("pip", "list", "--format", "json", "--python", bare.python))
    brought = {one["name"].replace("-", "_") for one in names}
    assert not brought & (HEAVY - {"fastapi", "starlette", "uvicorn"}), "the application's own are allowed"


def test_the_client_and_the_command_line_import_nothing_heavy(bare: Installation) -> None:
    code = "import sys, backcast, backcast.client, backcast.cli.main, backcast.testing; print(*sys.modules)"
    assert not {name.split(".")[0] for name in bare.says("-c", code).split()} & HEAVY


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("up", "local"),
        ("api", "api"),
        ("worker", "worker"),
        ("steward", "api"),
        ("model", "llm"),
        ("setup", "api"),
        ("check", "api"),
        ("await-database", "api"),
    ],
)
def test_a_command_without_its_extra_names_it(bare: Installation, command: str, extra: str) -> None:
    done = bare.run("-m", "backcast", command)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"pip install 'backcast[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1, "a sentence and no traceback"


@pytest.mark.parametrize(("command", "extra"), [("worker", "worker"), ("model", "llm"), ("up", "local")])
def test_the_extra_of_another_command_is_not_enough(
    service: Installation, database: str, command: str, extra: str
) -> None:
    done = service.run("-m", "backcast", command, BACKCAST_DATABASE__URL=database, BACKCAST_MODEL__WEIGHTS="/dev/null")
    assert done.returncode == 2
    assert f"pip install 'backcast[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_api_is_enough_to_provision_and_for_the_steward(service: Installation, tmp_path: Path, database: str) -> None:
    settings = {"BACKCAST_DATABASE__URL": database, "BACKCAST_STORE__URL": f"file://{tmp_path}/store"}
    service.says("-m", "backcast", "setup", **settings)
    assert "FAILED" not in service.says("-m", "backcast", "check", **settings)
    service.says("-c", "import backcast.steward.main, backcast.store.bucket, s3fs, backcast.api.main")


async def test_a_current_fastapi_application_uses_a_service(
    bare: Installation, service: Installation, tmp_path: Path, database: str
) -> None:
    """The application and the command line have the bare install, the API the newest of `backcast[api]`."""
    async with stack(database, tmp_path) as running:
        port, shop = free_port(), free_port()
        command = [str(service.python), "-m", "backcast", "api"]
        api = running.spawn("api", command, f"http://127.0.0.1:{port}", PYTHONPATH="", BACKCAST_API__PORT=str(port))
        worker = running.start("worker")
        await api.ready()
        await worker.ready()
        (tmp_path / "shop.py").write_text(APPLICATION)
        application = running.spawn(
            "shop",
            [str(bare.python), str(tmp_path / "shop.py"), api.url, str(shop)],
            f"http://127.0.0.1:{shop}",
            PYTHONPATH="",
        )
        await application.ready("/openapi.json")
        answer = (await running.http.post(f"{application.url}/orders", json={"value": 7})).json()
        assert (answer["run"]["owner"], answer["result"]) == ("shop", 7)

        def backcast(*arguments: str) -> Any:
            return json.loads(bare.says("-m", "backcast", *arguments, "--json", BACKCAST_URL=api.url))

        assert backcast("get", answer["run"]["id"])["state"] == "completed"
        assert backcast("submit", "echo", "value=8", "--wait") == 8
        assert len(backcast("list")) == 2
        assert "echo" in [task["name"] for task in backcast("tasks")]
        assert backcast("lane", "gpu", "--max-running", "1")["max_running"] == 1
