"""An office at work: a real stack with runs in every state, for the browser to look at."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from backcast.testing import Reply, Request, ScriptedModel, extract
from tests.support.stack import Part, Stack, stack
from tests.support.waiting import until

HOSTILE = "<script>document.title='taken'</script>"
INVOICE = {
    "data": "Anna Kowalska (34) moved from Poznań to Lisbon; write to anna@example.org.",
    "target": {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}},
}


@dataclass
class World:
    stack: Stack
    runs: dict[str, str]
    """Ids of runs by what they show."""
    batch: str

    @property
    def url(self) -> str:
        return str(self.stack.http.base_url).rstrip("/")

    def studio(self, tasks: str) -> Part:
        """Start a worker of the pool `studio` with the tasks of this module: a run that it loses once has failed."""
        names = {"BACKCAST_TASKS": tasks, "BACKCAST_BUILTIN_TASKS": "false", "BACKCAST_WORKER__POOL": "studio"}
        return self.stack.start("worker", **names, BACKCAST_MAX_ATTEMPTS="1")

    async def silence(self, pool: str) -> None:
        """Let a minute pass since the last heartbeat of the workers of a pool, all of which have been killed."""
        connection = await asyncpg.connect(self.stack.database)
        sql = "update backcast.workers set heartbeat_at = heartbeat_at - interval '1 minute' where pool = $1"
        await connection.execute(sql, pool)
        await connection.close()

    async def submit(self, task: str, given: Any, **options: Any) -> str:
        answer = await self.stack.http.post(f"/v1/tasks/{task}/runs", json={"input": given, **options})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])


def _read(request: Request) -> Reply:
    """As a model that can read answers about the office's own text."""
    return (
        Reply({"name": "Anna Kowalska", "age": 34}) if "Anna Kowalska (34)" in str(request.body) else extract(request)
    )


@contextlib.asynccontextmanager
async def world(database: str, folder: Path, key: str = "", odd: str = HOSTILE) -> AsyncIterator[World]:
    """Every process, and at least one run in each state, of which one has odd names."""
    with ScriptedModel(_read) as model:
        env = {
            "BACKCAST_MODEL__BASE_URL": model.url,
            "BACKCAST_MODEL__API_KEY": "any-key",
            "BACKCAST_MODEL__NAME": "scripted",
            "BACKCAST_TASKS": "tests.browser.office_tasks",
            "BACKCAST_API__KEYS": key,
        }
        async with stack(database, folder, **env) as running:
            if key:
                running.http.headers["Authorization"] = f"Bearer {key}"
            await running.up("api", "worker", "steward")
            yield await _fill(World(running, {}, ""), odd)


async def _fill(made: World, odd: str) -> World:
    http, runs = made.stack.http, made.runs

    async def listed() -> int:
        return len((await http.get("/v1/tasks")).json()["items"])

    await until(listed, lambda tasks: tasks >= 5)
    (await http.put("/v1/lanes/openai", json={"max_running": 4, "max_per_minute": 600})).raise_for_status()
    paused = {"reason": "the mail server moves", "by": "ops"}
    for number in range(12):
        document = f"inbox/2026-{number:03}.pdf"
        runs["completed"] = await made.submit("extract_invoice", {"document": document}, owner="billing")
    runs["failed"] = await made.submit("read_scan", {"pages": 3}, owner="archive", metadata={"customer": "acme"})
    runs["hostile"] = await made.submit(
        "read_scan", {"pages": 2, "sharp": False}, owner=odd, lane=odd, metadata={odd: odd}
    )
    runs["retrying"] = await made.submit("send_reminder", {"customer": "Acme GmbH & Co. KG"}, owner="billing")
    runs["running"] = await made.submit("transcribe", {"recording": "board-meeting.m4a", "release": "never"})
    runs["scheduled"] = await made.submit("extract_invoice", {"document": "a"}, run_at="2040-01-01T08:00:00Z")
    runs["cancelled"] = await made.submit("extract_invoice", {"document": "b"}, run_at="2040-01-01T08:00:00Z")
    (await http.post(f"/v1/runs/{runs['cancelled']}/cancel")).raise_for_status()
    runs["cast"] = await made.submit("create_structured_output", INVOICE)
    lines = '{"input": {"document": "c"}}\n' * 3 + '{"task": "read_scan", "input": {"pages": 1}}\n'
    answer = await http.post(
        "/v1/batches?task=extract_invoice", content=lines, headers={"content-type": "application/jsonl"}
    )
    made.batch = answer.json()["id"]
    for name in ("completed", "failed", "hostile", "cast"):
        await made.stack.ended(runs[name])
    await until(lambda: made.stack.run(runs["retrying"]), lambda run: run["attempts"] == 3 and run["state"] == "queued")
    await until(
        lambda: made.stack.run(runs["running"]),
        lambda run: (run["progress"] or {}).get("message", "")[:8] == "minute 5",
    )

    async def batch() -> dict[str, int]:
        return dict((await http.get(f"/v1/batches/{made.batch}")).json()["states"])

    await until(batch, lambda states: states == {"completed": 3, "failed": 1})
    (await http.post("/v1/lanes/letters/pause", json=paused)).raise_for_status()
    runs["paused"] = await made.submit("send_reminder", {"customer": "Wayne Ltd."}, owner="billing")
    await until(lambda: made.stack.run(runs["paused"]), lambda run: run["why"] == "paused")
    return made
