"""The API's answers, byte for byte as they were recorded: what the ledger keeps, and where, must not show in them.

`python -m tests.integration.test_answers` records them anew; the difference is to be read before it is committed.
"""

import asyncio
import json
import re
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from backcast.local import postgres
from tests.support import databases
from tests.support.stack import Stack, stack

RECORD = Path(__file__).with_name("answers.txt")
_SHOWN = ("content-type", "location", "retry-after", "preference-applied", "link", "etag", "cache-control")
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")
_FIGURE = re.compile(r'(?<="oldest_age_seconds":)[0-9.e-]+|(?<="per_minute":)[0-9.e-]+')
_CURSOR = re.compile(r'(?<=cursor":")[^"]+|(?<=cursor=)[^&"> ]+')


class Recorder:
    """Sends requests, and writes down the answers with names in the place of what differs each time."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._names = dict[str, str]()
        self.lines = list[str]()

    async def __call__(self, method: str, path: str, **request: Any) -> Any:
        answer = await self._http.request(method, path, **request)
        shown = [f"{name}: {value}" for name in _SHOWN if (value := answer.headers.get(name))]
        body = answer.text if len(answer.text) < 3000 else f"{answer.text[:100]}… {len(answer.text)} characters"
        sent = [json.dumps(request["json"])[:300]] if "json" in request else []
        headers = [f"{name}: {value}" for name, value in request.get("headers", {}).items()]
        text = "\n".join([f"> {method} {path}", *headers, *sent, f"< {answer.status_code}", *shown, body, ""])
        self.lines.append(self._named(text))
        return answer.json() if answer.headers.get("content-type", "").endswith("json") else None

    def _named(self, text: str) -> str:
        text = _ID.sub(lambda found: self._names.setdefault(found[0], f"<id {len(self._names) + 1}>"), text)
        return _CURSOR.sub("<cursor>", _TIME.sub("<time>", _FIGURE.sub("<figure>", text)))


async def _scenario(product: Stack) -> str:
    await product.up("api", "worker", "steward")
    ask = Recorder(product.http)
    later = (datetime.now(UTC) + timedelta(days=2)).isoformat()

    async def submit(task: str, given: Any, **how: Any) -> str:
        headers = how.pop("headers", {})
        made = await ask("POST", f"/v1/tasks/{task}/runs", json={"input": given, **how}, headers=headers)
        return str(made["id"])

    async def look(run: str, *, ended: bool = True) -> None:
        if ended:
            await product.ended(run)
        await ask("GET", f"/v1/runs/{run}")
        await ask("GET", f"/v1/runs/{run}/result")
        await ask("GET", f"/tasks/{run}/status")

    one = await submit("echo", {"value": [1, {"ü": None}]}, owner="ann", metadata={"order": "7"}, priority=3)
    await look(one)
    await look(await submit("echo", {"value": "r" * 40_000}, owner="ann"))  # its result is in the store only
    await look(await submit("echo", {"value": "i" * 70_000}, owner="bob"))  # so is its input
    await look(await submit("fail", {"kind": "fatal"}, owner="bob"))
    await look(await submit("too_slow", {}))
    waits = await submit("echo", {"value": 1}, run_at=later, owner="ann")
    await look(waits, ended=False)
    await ask("POST", f"/v1/runs/{waits}/cancel")
    await look(waits)
    await look(await submit("echo", {"value": 1}, run_at=later, owner="ann", metadata={"a": "b"}), ended=False)
    await ask("PUT", "/v1/lanes/narrow", json={"max_running": 1})
    running = await submit("linger", {"name": "first"}, lane="narrow")
    await product.state(running, "running")
    late = await submit("echo", {"value": 1}, lane="narrow", deadline=later)
    held = await submit("echo", {"value": 2}, lane="narrow")
    await look(running, ended=False)
    await look(held, ended=False)
    admin = await asyncpg.connect(product.database)
    await admin.execute("update backcast.runs set deadline = now() where id = $1", late)
    await admin.close()
    await look(late)
    await ask("GET", "/v1/lanes/narrow")
    await ask("POST", f"/v1/runs/{running}/cancel")
    await look(running)
    await look(held)
    await ask("POST", f"/v1/runs/{one}/cancel")  # it has ended before
    keyed = {"Idempotency-Key": "k-1"}
    again = await submit("echo", {"value": "once"}, owner="ann", headers=keyed)
    await look(again)
    await submit("echo", {"value": "once"}, owner="ann", headers=keyed)
    await ask("POST", "/v1/tasks/echo/runs", json={"input": {"value": "other"}, "owner": "ann"}, headers=keyed)
    await ask("POST", "/v1/tasks/echo/runs", json={"input": {"value": 5}}, headers={"Prefer": "wait=20"})
    inputs = [("echo", {"value": 0}), ("echo", {"value": 1}), ("fail", {"kind": "fatal"})]
    batch = "".join(json.dumps({"task": task, "input": given}) + "\n" for task, given in inputs)
    keyed = {"Idempotency-Key": "b-1", "Content-Type": "application/jsonl"}
    made = await ask("POST", "/v1/batches", content=batch, headers=keyed)
    for line in (await product.http.get(f"/v1/batches/{made['id']}/results")).text.splitlines():
        await product.ended(json.loads(line)["id"])
    await ask("POST", "/v1/batches", content=batch, headers=keyed)
    await ask("GET", f"/v1/batches/{made['id']}")
    await ask("GET", f"/v1/batches/{made['id']}/results")
    await ask("POST", f"/v1/batches/{made['id']}/cancel")
    for filters in ("", "state=completed", "state=queued", "owner=ann", "owner=ann&state=completed", "task=fail"):
        page = await ask("GET", f"/v1/runs?limit=3&{filters}")
        while page["next_cursor"]:
            page = await ask("GET", f"/v1/runs?limit=3&{filters}&cursor={page['next_cursor']}")
    for path in (
        "/v1/runs?limit=0",
        "/v1/runs?cursor=x",
        f"/v1/runs/{'0' * 8}-0000-7000-8000-{'0' * 12}",
        "/v1/runs/x",
    ):
        await ask("GET", path)
    return "\n".join(ask.lines)


async def test_the_answers_are_as_recorded(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path, BACKCAST_BUILTIN_TASKS="false") as product:
        assert await _scenario(product) == RECORD.read_text()


async def _record() -> None:
    with tempfile.TemporaryDirectory() as folder, postgres.running(Path(folder) / "pg") as server:
        database = databases.create(server)
        async with stack(database, Path(folder), BACKCAST_BUILTIN_TASKS="false") as product:
            RECORD.write_text(await _scenario(product))


if __name__ == "__main__":
    asyncio.run(_record())
