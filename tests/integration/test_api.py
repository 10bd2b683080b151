"""The HTTP interface, over the real database and a real folder; above all its answers to bad input."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from backcast.api.app import create_app
from backcast.api.server import protocol
from backcast.ledger import claims, fleet, runs, settlement, submissions
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Settlement
from backcast.models import Problem, TaskType, uuid7
from backcast.settings import Api
from backcast.store import Store
from tests.integration.test_ledger import LEASE
from tests.support.stack import stack

ECHO = TaskType(
    name="echo",
    pool="default",
    input_schema={
        "type": "object",
        "properties": {"value": {}, "n": {"type": "integer", "minimum": 0}},
        "required": ["value"],
        "additionalProperties": False,
    },
)
CAST = TaskType(
    name="create_structured_output",
    pool="default",
    input_schema={
        "type": "object",
        "properties": {"data": {}, "target": {"format": "target"}, "instructions": {"type": ["string", "null"]}},
        "required": ["data", "target"],
        "additionalProperties": False,
    },
)
MAX_BODY = 300_000


@pytest.fixture
async def worker(ledger: Ledger) -> UUID:
    worker = uuid7()
    await fleet.register(ledger, worker, pool="default", host="h", version="1", slots=10, tasks=[ECHO, CAST])
    return worker


@pytest.fixture
async def api(ledger: Ledger, store: Store, worker: UUID) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(ledger, store, Api(max_body=MAX_BODY))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


async def end(ledger: Ledger, store: Store, worker: UUID, text: str) -> None:
    """Complete every queued run with this JSON, as a worker does."""
    for claim in await claims.claim(ledger, pool="default", cursor=0, limit=10, worker_id=worker, lease=LEASE):
        key = f"results/{claim.id}/{claim.fence}.json"
        await store.put(key, text.encode())
        inline = text if len(text) <= settlement.INLINE_RESULT else None
        done = Settlement(id=claim.id, fence=claim.fence, state="completed", result=inline, result_key=key)
        assert (await settlement.settle(ledger, worker, [done])).accepted


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, object]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (body["status"], body["code"], body["type"]) == (status, code, f"/problems/{code}")
    assert len(body["title"]) > 5
    assert len(body["detail"]) > 10
    return dict(body)


async def test_submit_look_and_fetch(api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID) -> None:
    answer = await api.post("/v1/tasks/echo/runs", json={"input": {"value": "é\x00"}, "metadata": {"a": "b"}})
    assert answer.status_code == 202
    run = answer.json()
    assert answer.headers["location"] == f"/v1/runs/{run['id']}"
    assert answer.headers["retry-after"] == "1"
    assert (run["state"], run["task"], run["owner"], run["metadata"]) == ("queued", "echo", "default", {"a": "b"})
    problem(await api.get(f"/v1/runs/{run['id']}/result"), 409, "not_finished")
    await end(ledger, store, worker, '{"x":"é"}')
    result = await api.get(f"/v1/runs/{run['id']}/result")
    assert (result.status_code, result.json(), result.headers["content-type"]) == (
        200,
        {"x": "é"},
        "application/json",
    )
    assert (await api.get(f"/v1/runs/{run['id']}")).json()["state"] == "completed"


async def test_the_example_of_prefect_works_unchanged(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    body = {"payload": "We put 31 chairs in the hall", "instructions": "how many chairs", "target_type": "int"}
    for kwargs in ({"json": body}, {"data": body}):
        answer = await api.post("/tasks", **kwargs)  # type: ignore[arg-type]
        assert answer.status_code == 202
        assert list(answer.json()) == ["task_run_id"]
        status = answer.headers["location"]
        assert status == f"/tasks/{answer.json()['task_run_id']}/status"
        pending = (await api.get(status)).json()
        assert (pending["status"], pending["task_run_id"]) == ("pending", answer.json()["task_run_id"])
        await end(ledger, store, worker, "31")
        assert (await api.get(status)).json() == {**answer.json(), "status": "completed", "result": 31}


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        ('{"a": 1}', {"a": 1}),
        ("[1, 2]", [1, 2]),
        ("twelve boxes", "twelve boxes"),
        ("12", 12),
        ('{"a": NaN}', '{"a": NaN}'),
        ("", ""),
    ],
)
async def test_a_form_payload_is_text_or_json(
    api: httpx.AsyncClient, ledger: Ledger, worker: UUID, sent: str, stored: object
) -> None:
    answer = await api.post("/tasks", data={"payload": sent, "instructions": "", "target_type": "list[int]"})
    assert answer.status_code == 202, answer.text
    [claim] = await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=worker, lease=LEASE)
    assert claim.input is not None
    assert json.loads(claim.input) == {"data": stored, "target": "list[int]", "instructions": None}


async def test_a_form_may_send_a_schema(api: httpx.AsyncClient) -> None:
    schema = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
    assert (await api.post("/tasks", data={"payload": "x", "target_type": schema})).status_code == 202
    assert (await api.post("/tasks", files={"payload": (None, "x"), "target_type": (None, "int")})).status_code == 202


@pytest.mark.parametrize(
    "target",
    [
        "subprocess.Popen",
        "this.x",
        "os",
        "",
        "__import__('os')",
        "int\x00",
        5,
        None,
        [],
        {"type": "objekt"},
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "#"},
        {"type": "object", "properties": {f"p{n}": {"type": "string", "title": "x" * 50} for n in range(2000)}},
    ],
    ids=lambda target: str(target)[:40],
)
async def test_hostile_targets_are_refused_by_name(api: httpx.AsyncClient, target: object) -> None:
    example = await api.post("/tasks", json={"payload": "x", "target_type": target})
    assert example.status_code == 422
    full = await api.post("/v1/tasks/create_structured_output/runs", json={"input": {"data": "x", "target": target}})
    assert full.status_code == 422
    for answer, place in ((example, "/target_type"), (full, "/input/target")):
        errors = answer.json()["errors"]
        assert errors[0]["pointer"].startswith(place), errors


async def test_nothing_is_imported_for_a_target(api: httpx.AsyncClient) -> None:
    await api.post("/tasks", json={"payload": "x", "target_type": "this.x"})
    await api.post("/tasks", json={"payload": "x", "target_type": "antigravity.geohash"})
    assert "this" not in sys.modules
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"input": NaN}',
        b'{"input": {"value": "\\ud800"}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"input": {"value": 1}, "input": {"value": 2}}',
        b'{"input": {"value": [{"a": 1, "\\u0061": 2}]}}',
    ],
    ids=["empty", "cut", "word", "nan", "lone surrogate", "not utf-8", "nested", "key twice", "key twice inside"],
)
async def test_malformed_json(api: httpx.AsyncClient, body: bytes) -> None:
    answer = await api.post("/v1/tasks/echo/runs", content=body, headers={"content-type": "application/json"})
    problem(answer, 400, "malformed_body")
    problem(await api.post("/tasks", content=body, headers={"content-type": "application/json"}), 400, "malformed_body")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ([], ""),
        ("x", ""),
        ({"inputs": {}}, "/inputs"),
        ({"input": 1}, "/input"),
        ({"input": {}}, "/input"),
        ({"input": {"value": 1, "n": "one"}}, "/input/n"),
        ({"input": {"value": 1, "n": -1}}, "/input/n"),
        ({"input": {"value": 1, "other": 1}}, "/input"),
        ({"input": {"value": 1}, "priority": 1000}, "/priority"),
        ({"input": {"value": 1}, "owner": ""}, "/owner"),
        ({"input": {"value": 1}, "owner": "a\x00b"}, "/owner"),
        ({"input": {"value": 1}, "owner": "x" * 201}, "/owner"),
        ({"input": {"value": 1}, "metadata": {"a": 1}}, "/metadata/a"),
        ({"input": {"value": 1}, "metadata": {str(n): "" for n in range(33)}}, "/metadata"),
        ({"input": {"value": 1}, "run_at": "yesterday"}, "/run_at"),
        ({"input": {"value": 1}, "run_at": "2030-01-01T00:00:00"}, "/run_at"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_wrong_fields_are_named(api: httpx.AsyncClient, body: object, pointer: str) -> None:
    found = problem(await api.post("/v1/tasks/echo/runs", json=body), 422, "invalid_input")
    assert [error["pointer"] for error in found["errors"]] == [pointer]  # type: ignore[attr-defined]


async def test_a_time_without_an_offset_is_refused_for_that(api: httpx.AsyncClient) -> None:
    body: dict[str, object] = {"input": {"value": 1}}
    for time, why in (("2030-01-01T00:00:00", "offset"), (1893456000, "a number may mean")):
        found = problem(await api.post("/v1/tasks/echo/runs", json=body | {"run_at": time}), 422, "invalid_input")
        assert why in str(found["detail"])


async def test_deep_input_is_kept_or_refused_but_never_an_error_of_ours(api: httpx.AsyncClient) -> None:
    for depth in (50, 150, 250, 1000, 5000):
        nested = b"[" * depth + b"]" * depth
        answer = await api.post(
            "/v1/tasks/echo/runs",
            content=b'{"input": {"value": ' + nested + b"}}",
            headers={"content-type": "application/json"},
        )
        assert answer.status_code in (202, 400, 422), answer.text


async def test_large_bodies(api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID) -> None:
    problem(await api.post("/v1/tasks/echo/runs", json={"input": {"value": "x" * MAX_BODY}}), 413, "body_too_large")

    async def chunks() -> AsyncIterator[bytes]:  # no content-length: the bytes are counted as they come
        for _ in range(100):
            yield b" " * 10_000

    json_header = {"content-type": "application/json"}
    problem(await api.post("/tasks", content=chunks(), headers=json_header), 413, "body_too_large")
    large = "x" * (submissions.INLINE_INPUT + 1)
    answer = await api.post("/v1/tasks/echo/runs", json={"input": {"value": large}})
    assert answer.status_code == 202
    [claim] = await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=worker, lease=LEASE)
    assert claim.input is None
    assert claim.input_key is not None
    assert json.loads(await store.get(claim.input_key)) == {"value": large}


async def test_a_large_result_is_streamed_from_the_store(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    run = (await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}})).json()
    text = json.dumps(["x" * 1000] * 2000)
    await end(ledger, store, worker, text)
    assert (await api.get(f"/v1/runs/{run['id']}/result")).text == text
    status = (await api.get(f"/tasks/{run['id']}/status")).json()
    assert status == {"task_run_id": run["id"], "status": "completed", "result": json.loads(text)}
    found = await runs.result(ledger, UUID(run["id"]))
    assert found.key is not None
    await store.delete([found.key])
    problem(await api.get(f"/v1/runs/{run['id']}/result"), 410, "result_gone")


async def test_unknown_things(api: httpx.AsyncClient) -> None:
    problem(await api.post("/v1/tasks/none/runs", json={"input": {}}), 404, "unknown_task")
    problem(await api.get("/v1/tasks/none"), 404, "unknown_task")
    for path in ("/v1/runs/{}", "/v1/runs/{}/result", "/tasks/{}/status"):
        problem(await api.get(path.format(uuid4())), 404, "unknown_run")
        problem(await api.get(path.format("42")), 404, "unknown_run")
        problem(await api.get(path.format("%00")), 404, "unknown_run")
    problem(await api.post(f"/v1/runs/{uuid4()}/cancel"), 404, "unknown_run")
    problem(await api.get("/nothing"), 404, "not_found")
    assert (await api.delete("/v1/tasks")).status_code == 405
    problem(await api.post("/tasks", content="x", headers={"content-type": "text/plain"}), 415, "unsupported_body")


async def test_before_the_first_worker_came_a_task_is_not_unknown_but_not_there_yet(
    ledger: Ledger, store: Store
) -> None:
    app = create_app(ledger, store, Api(max_body=MAX_BODY))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as api:
        answer = await api.post("/tasks", json={"payload": "x", "target_type": "int"})
        problem(answer, 503, "no_worker_yet")
        assert int(answer.headers["retry-after"]) >= 1


async def test_idempotency(api: httpx.AsyncClient) -> None:
    async def post(value: object, key: str) -> httpx.Response:
        return await api.post("/v1/tasks/echo/runs", json={"input": {"value": value}}, headers={"Idempotency-Key": key})

    answers = await asyncio.gather(*[post(1, "k") for _ in range(20)])
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert (await post(1, '"k"')).json()["id"] == answers[0].json()["id"], "the quoted form of the draft"
    problem(await post(2, "k"), 422, "idempotency_key_reused")
    problem(await post(1, " "), 422, "invalid_input")
    problem(await post(1, "x" * 201), 422, "invalid_input")
    large = "x" * (submissions.INLINE_INPUT + 1)
    assert (await post(large, "l")).json()["id"] == (await post(large, "l")).json()["id"]


async def test_cancel(api: httpx.AsyncClient) -> None:
    run = (await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}})).json()
    assert (await api.post(f"/v1/runs/{run['id']}/cancel")).json()["state"] == "cancelled"
    assert (await api.post(f"/v1/runs/{run['id']}/cancel")).json()["state"] == "cancelled"
    problem(await api.get(f"/v1/runs/{run['id']}/result"), 409, "no_result")
    status = (await api.get(f"/tasks/{run['id']}/status")).json()
    assert status["status"] == "error"
    assert "cancelled" in status["message"]


async def test_listing(api: httpx.AsyncClient) -> None:
    made = [(await api.post("/v1/tasks/echo/runs", json={"input": {"value": n}})).json()["id"] for n in range(7)]
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = (await api.get("/v1/runs", params={"limit": 3} | ({"cursor": cursor} if cursor else {}))).json()
        seen += [run["id"] for run in page["items"]]
        cursor = page["next_cursor"]
    assert seen == made[::-1]
    assert (await api.get("/v1/runs?state=failed&owner=x&task=y")).json() == {"items": [], "next_cursor": None}
    for query in ("limit=0", "limit=1000", "state=none", "cursor=x", "owner=%00", "task=%ff", "%ff=1", "owner=%c3"):
        problem(await api.get(f"/v1/runs?{query}"), 422, "invalid_input")


async def test_waiting_for_the_end(api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID) -> None:
    run = (await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}})).json()
    short = await api.get(f"/v1/runs/{run['id']}", headers={"Prefer": "wait=0"})
    assert (short.json()["state"], short.headers["preference-applied"]) == ("queued", "wait=0")
    waiting = asyncio.create_task(api.get(f"/v1/runs/{run['id']}", headers={"Prefer": "respond-async, wait=20"}))
    looked = await api.get(f"/v1/runs/{run['id']}")  # and so has the one before
    assert looked.json()["state"] == "queued"
    await end(ledger, store, worker, "1")
    assert (await waiting).json()["state"] == "completed"


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        ("WAIT=0", "wait=0"),
        ('respond-async , wait = "0" ; why=x', "wait=0"),
        ("wait=1e400", None),
        ("wait=0.5", None),
        ("wait=-1", None),
        ("wait=", None),
        ("nowait=0", None),
        ('why="wait=0"', None),
    ],
)
async def test_only_a_number_of_seconds_is_waited_for(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID, prefer: str, applied: str | None
) -> None:
    run = (await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}})).json()
    got = await api.get(f"/v1/runs/{run['id']}", headers={"Prefer": prefer})
    assert got.headers.get("preference-applied") == applied


async def test_tasks_are_listed_with_their_schemas(api: httpx.AsyncClient) -> None:
    names = {task["name"]: task for task in (await api.get("/v1/tasks")).json()["items"]}
    assert names["echo"]["input_schema"] == ECHO.input_schema
    assert (await api.get("/v1/tasks/echo")).json() | {"load": None} == names["echo"]


async def test_every_problem_links_to_its_explanation(api: httpx.AsyncClient) -> None:
    found = problem(await api.get("/v1/tasks/none"), 404, "unknown_task")
    about = (await api.get(str(found["type"]))).json()
    assert about["code"] == "unknown_task"
    problem(await api.get("/problems/none"), 404, "not_found")


async def test_probes(api: httpx.AsyncClient, store: Store, tmp_path: Path) -> None:
    assert (await api.get("/livez")).status_code == 200
    assert (await api.get("/readyz")).status_code == 200
    (tmp_path / "store").rename(tmp_path / "gone")
    problem(await api.get("/readyz"), 503, "store_unavailable")
    assert (await api.get("/livez")).status_code == 200


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
async def test_a_process_that_listens_on_all_addresses_answers_on_both_families(database: str, tmp_path: Path) -> None:
    hosts = dict.fromkeys(("BACKCAST_API__HOST", "BACKCAST_API__METRICS_HOST", "BACKCAST_STEWARD__HOST"), "::")
    async with stack(database, tmp_path, **hosts) as product:
        await product.up("api", "steward")  # on 127.0.0.1
        for part in product.parts:
            for url in (f"{part.url}/readyz", part.metrics_url):
                for address in ("127.0.0.1", "[::1]"):
                    answer = await product.http.get(url.replace("127.0.0.1", address))
                    assert answer.status_code == 200, (url, address)


async def test_a_store_that_is_away_is_503_not_no_result(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID, tmp_path: Path
) -> None:
    run = (await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}})).json()
    await end(ledger, store, worker, json.dumps("x" * 100_000))
    (tmp_path / "store").rename(tmp_path / "gone")
    answer = await api.get(f"/v1/runs/{run['id']}/result")
    problem(answer, 503, "store_unavailable")
    assert str(tmp_path) not in answer.text, "our files are nothing to callers"
    assert int(answer.headers["retry-after"]) >= 1
    problem(await api.post("/v1/tasks/echo/runs", json={"input": {"value": "x" * 100_000}}), 503, "store_unavailable")
    (tmp_path / "gone").rename(tmp_path / "store")
    assert (await api.get(f"/v1/runs/{run['id']}/result")).status_code == 200


async def test_a_database_that_is_away_is_503(store: Store) -> None:
    with socket.socket() as silent:  # bound, not listening: it refuses at once
        silent.bind(("127.0.0.1", 0))
        ledger = Ledger(f"postgresql://x:secret-password@127.0.0.1:{silent.getsockname()[1]}/x")
        app = create_app(ledger, store, Api(max_body=MAX_BODY))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as api:
            for answer in (
                await api.get(f"/v1/runs/{uuid4()}"),
                await api.post("/v1/tasks/echo/runs", json={"input": {}}),
                await api.post("/tasks", json={"payload": "x", "target_type": "int"}),
                await api.get("/readyz"),
            ):
                assert "secret-password" not in answer.text
                problem(answer, 503, "ledger_unavailable")
                assert int(answer.headers["retry-after"]) >= 1
        await ledger.aclose()


def test_http_is_read_by_the_fast_parser() -> None:
    assert issubclass(protocol(Api()), HttpToolsProtocol)


def test_the_api_never_imports_prefect_marvin_or_the_workers_side() -> None:
    script = "import sys, backcast.api.main, backcast.cli.main; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    for name in ("prefect", "marvin", "pydantic_ai", "openai", "xllamacpp", "backcast.executor", "backcast.worker"):
        assert name not in loaded


async def test_one_line_a_request_names_route_status_run_and_key(
    ledger: Ledger, store: Store, worker: UUID, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "backcast.access")
    app = create_app(ledger, store, Api(keys=["a-secret-key-of-ours"]))  # type: ignore[list-item]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        with_key = {"Authorization": "Bearer a-secret-key-of-ours"}
        body = {"input": {"value": "private"}}
        run = (await client.post("/v1/tasks/echo/runs", json=body, headers=with_key)).json()
        await client.get(f"/v1/runs/{run['id']}", headers=with_key)
        await client.get("/v1/tasks/somebody%2Fprivate", headers=with_key)
        await client.get("/v1/runs")
        await client.get("/nowhere/private", headers=with_key)
        await client.get("/livez")
        await client.get("/readyz")
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "backcast.access"]
    keys = {line["key"] for line in lines}
    assert [(line["method"], line["route"], line["status"], line["run"]) for line in lines] == [
        ("POST", "/v1/tasks/{name}/runs", 202, run["id"]),
        ("GET", "/v1/runs/{run_id}", 200, run["id"]),
        ("GET", "/v1/tasks/{name}", 404, None),
        ("GET", "(no route)", 401, None),
        ("GET", "(no route)", 404, None),
    ]
    assert all(line["ms"] > 0 for line in lines)
    assert keys == {lines[0]["key"], None}
    assert len(lines[0]["key"]) == 8
    assert "secret" not in caplog.text
    assert "private" not in caplog.text


async def test_lists_are_filtered_by_everything_that_a_run_shows(
    api: httpx.AsyncClient, ledger: Ledger, worker: UUID
) -> None:
    async def make(**fields: object) -> str:
        run = await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}, **fields})
        return run.json()["id"]

    async def found(query: str) -> list[str]:
        answer = await api.get(f"/v1/runs?{query}")
        assert answer.status_code == 200, answer.text
        return [run["id"] for run in answer.json()["items"]]

    failed = await make(lane="gpu", metadata={"customer": "A&B", "kind": "bill"})
    [claim] = await claims.claim(ledger, pool="default", cursor=0, limit=10, worker_id=worker, lease=LEASE)
    error = Problem(code="task_failed", title="t", detail="No such Invoice: 100% wrong_")
    await settlement.settle(ledger, worker, [Settlement(id=claim.id, fence=1, state="failed", error=error)])
    await asyncio.sleep(0.002)  # ids have milliseconds
    cut = datetime.now(UTC)
    live = await make(lane="gpu", metadata={"customer": "A&B"}, owner="ana")
    other = await make(metadata={"customer": "C", "strange": "a\u2028b"})
    await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=worker, lease=LEASE)
    at = quote(cut.isoformat())
    assert await found("lane=gpu") == [live, failed]
    assert await found("metadata.customer=A%26B") == [live, failed]
    assert await found("metadata.customer=A%26B&metadata.kind=bill") == [failed]
    assert await found("metadata.strange=a%E2%80%A8b&metadata.customer=C") == [other]
    assert await found("metadata.nothing=1") == []
    assert await found("error=task_failed&state=failed") == [failed]
    assert await found("text=no%20SUCH%20invoice") == [failed]
    assert await found("text=100%25%20wrong_") == [failed]
    assert await found("text=100_") == []
    assert await found(f"created_after={at}") == [other, live]
    assert await found(f"created_before={at}") == [failed]
    assert await found(f"created_before={at}&lane=gpu&owner=default") == [failed]
    assert await found(f"ended_before={at}") == [failed]
    assert await found(f"ended_after={at}") == []
    assert failed in await found(f"worker={worker}")
    for wrong in (
        "metadata=1", "metadat.a=1", "created_after=5", "text=", "text=%00", "error=", "error=a%00", "worker=me",
        "metadata.a%00=1",
        "&".join(f"metadata.{n}=1" for n in range(6)), "metadata.a=1&metadata.a=2",
    ):  # fmt: skip
        problem(await api.get(f"/v1/runs?{wrong}"), 422, "invalid_input")
    problem(await api.get("/v1/tasks?metadata.a=1"), 422, "invalid_input")


async def test_a_label_with_a_null_character_spoils_no_list(api: httpx.AsyncClient, ledger: Ledger) -> None:
    run = (await api.post("/v1/tasks/echo/runs", json={"input": {"value": 1}})).json()["id"]
    await ledger.execute("""update runs set metadata = '{"a": "\\u0000"}', error = '{"code": "\\u0000"}'""")
    for query in ("metadata.a=1", "error=x", "text=x"):
        assert (await api.get(f"/v1/runs?{query}")).json()["items"] == []
    assert [each["id"] for each in (await api.get("/v1/runs")).json()["items"]] == [run]
