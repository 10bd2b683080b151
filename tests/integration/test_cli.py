"""The command line and the client against the real API, worker and database; the model is scripted."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import BaseModel

from backcast.client import AsyncClient, raise_for_state
from backcast.errors import InvalidInput, InvalidTarget, NoResult, NotFinished, RunError, UnknownRun, UnknownTask
from backcast.models import Limits, State, uuid7
from backcast.testing import ScriptedModel
from tests.support.stack import Stack, stack
from tests.support.waiting import PATIENCE


@pytest.fixture
async def product(database: str, tmp_path: Path) -> AsyncIterator[Stack]:
    with ScriptedModel() as model:
        provider = {"BACKCAST_MODEL__BASE_URL": model.url, "BACKCAST_MODEL__API_KEY": "any"}
        async with stack(database, tmp_path, **provider) as running:
            await running.up("api", "worker")
            yield running


@dataclass
class Ended:
    code: int
    out: str
    err: str


async def backcast(product: Stack, *arguments: str, stdin: str = "") -> Ended:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "backcast", *arguments),
        env=product.environment(BACKCAST_URL=str(product.http.base_url)),
        cwd=product.folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def test_a_session_at_the_command_line(product: Stack) -> None:
    cast = await backcast(product, "cast", "-", "--to", "int", stdin="twelve boxes, 2 broken")
    assert cast == Ended(0, "2\n", "")

    run_id = (await backcast(product, "submit", "echo", 'value=["é", 1]', "--owner", "ana")).out.strip()
    waited = await backcast(product, "wait", run_id, "--timeout", str(PATIENCE), "--json")
    assert json.loads(waited.out)["state"] == "completed"
    assert json.loads((await backcast(product, "get", run_id, "--result", "--json")).out) == ["é", 1]
    listed = json.loads((await backcast(product, "list", "--owner", "ana", "--json")).out)
    assert [run["id"] for run in listed] == [run_id]

    tasks = {task["name"] for task in json.loads((await backcast(product, "tasks", "--json")).out)}
    assert {"create_structured_output", "echo"} <= tasks

    failed = await backcast(product, "submit", "fail", "kind=usage", "--wait")
    assert (failed.code, failed.out) == (1, "")
    assert "as asked" in failed.err

    later = await backcast(product, "submit", "echo", "value=1", "--run-at", "2100-01-01T00:00Z")
    assert f"{later.out.strip()} is cancelled" in (await backcast(product, "cancel", later.out.strip())).out


async def test_a_wrong_target_is_refused_before_it_is_queued(product: Stack) -> None:
    wrong = await backcast(product, "cast", "x", "--to", "os.system")
    assert (wrong.code, wrong.out) == (2, "")
    assert "'os.system' is not a target" in wrong.err
    async with AsyncClient(str(product.http.base_url)) as client:
        with pytest.raises(InvalidTarget):
            await client.cast("x", "os.system")


class Boxes(BaseModel):
    whole: int
    broken: int


async def test_the_client_speaks_the_real_interface(product: Stack) -> None:
    async with AsyncClient(str(product.http.base_url)) as client:
        assert await client.cast("12 boxes, 2 broken", Boxes) == Boxes(whole=12, broken=2)
        assert await client.cast("a b", list[str], timeout=PATIENCE)

        run = await client.submit("linger", {"name": "a"})
        with pytest.raises(NotFinished):
            await client.result(run.id)
        product.release("a")
        looks = [run.state]
        run = await client.wait(run.id, timeout=PATIENCE, progress=lambda run: looks.append(run.state))
        assert (run.state, looks[0], looks[-1]) == (State.COMPLETED, State.QUEUED, State.COMPLETED)
        assert await client.result(run.id) == "a"
        assert (await client.submit("echo", {"value": 1}, key="k")).id == (
            await client.submit("echo", {"value": 1}, key="k")
        ).id

        failed = await client.wait((await client.submit("fail", {"kind": "fatal"})).id, timeout=PATIENCE)
        with pytest.raises(RunError, match="as asked"):
            raise_for_state(failed)
        with pytest.raises(NoResult):
            await client.result(failed.id)

        lane = "naps/\u200c\N{WOMAN}\u200d\N{GIRL}"
        assert (await client.limit_lane(lane, Limits(max_running=1))).max_running == 1
        batch = await client.submit_many("nap", [{"seconds": 0.01}] * 3, lane=lane)
        runs = [run.id async for run in client.list(batch=batch.id)]
        assert (batch.size, len(runs)) == (3, 3)
        for run_id in runs:
            assert (await client.wait(run_id, timeout=PATIENCE)).lane == lane
        assert (await client.batch(batch.id)).states == {State.COMPLETED: 3}
        assert lane in (await backcast(product, "lane", lane)).out
        assert (await backcast(product, "submit", "nap", "seconds=0", "--owner", lane, "--lane", lane)).code == 0
        assert lane in (await backcast(product, "list", "--owner", lane)).out
        assert (await backcast(product, "lane", "..")).code == 2
        await client.lift_lane(lane)
        assert await client.lanes() == []

        with pytest.raises(UnknownRun):
            await client.get(uuid7())
        with pytest.raises(UnknownTask):
            await client.submit("nothing", {})
        with pytest.raises(InvalidInput):
            await client.submit("nap", {"seconds": "long"})

        assert (await client.counts()).states[State.FAILED] == 1
        seen = [run.id async for run in client.list()]
        assert seen[0] > seen[-1]
        assert [run.id async for run in client.list(task="fail", state=State.FAILED)] == [failed.id]


async def test_a_wait_survives_a_restart_of_the_api(product: Stack) -> None:
    (api,) = [part for part in product.parts if part.name == "api"]
    async with AsyncClient(api.url) as client:
        run = await client.submit("linger", {"name": "restart"})
        seen = asyncio.Event()
        waiting = asyncio.create_task(client.wait(run.id, timeout=PATIENCE, progress=lambda _: seen.set()))
        await asyncio.wait_for(seen.wait(), PATIENCE)
        api.kill()
        await product.start("api", port=int(api.url.rpartition(":")[2])).ready()
        product.release("restart")
        assert (await waiting).state is State.COMPLETED
