"""What the HTTP interface takes and refuses: names, numbers, times, query parameters, HEAD. Nothing here is a 500."""

import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import pytest

from backcast.api.app import create_app
from backcast.client import Client
from backcast.errors import InvalidInput
from backcast.ledger import fleet
from backcast.ledger.connection import Ledger
from backcast.models import TaskType, uuid7
from backcast.settings import Api
from backcast.settings import Store as StoreSettings
from backcast.store import open_store

NAMES = [
    "openai/gpt-4o",
    "invoices/extract",
    "می‌خواهم",  # with a zero-width non-joiner
    "👩‍👩‍👧‍👦",  # with zero-width joiners
    "a b+c&d=e?f#g%2Fh%",
    "..hidden",
    "/",
    "//",
    "\\",
    "\u00e9",
    "e\u0301",  # another name
    '"quoted", and: more;',
    "x" * 200,
    "語" * 200,
]
NO_NAMES = [
    "",
    ".",
    "..",
    "../",
    "./",
    "a/../b",
    "/..",
    " ",
    " \u3000",
    "a\x00",
    "\x00",
    "a\nb",
    "\x7f",
    "\x85",
    "\u2028",
    "x" * 201,
]


def task(name: str) -> TaskType:
    return TaskType(name=name, pool="default", input_schema={"type": "object"})


@pytest.fixture
async def api(ledger: Ledger, folder: str) -> AsyncIterator[httpx.AsyncClient]:
    store = open_store(StoreSettings(url=folder))
    await store.ensure()
    tasks = [task("echo"), *map(task, NAMES)]
    await fleet.register(ledger, uuid7(), pool="default", host="h", version="1", slots=10, tasks=tasks)
    transport = httpx.ASGITransport(create_app(ledger, store, Api()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    await store.aclose()


async def submit(api: httpx.AsyncClient, **submission: Any) -> httpx.Response:
    text = json.dumps({"input": {}} | submission)
    return await api.post("/v1/tasks/echo/runs", content=text, headers={"content-type": "application/json"})


def problem(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    assert answer.status_code in statuses, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return dict(answer.json())


async def test_a_name_may_hold_any_character_on_every_route(api: httpx.AsyncClient) -> None:
    for name in NAMES:
        path = quote(name, safe="")
        limited = await api.put(f"/v1/lanes/{path}", json={"max_running": 1})
        assert (limited.status_code, limited.json()["name"]) == (200, name)
        assert (await api.get(f"/v1/lanes/{path}")).json()["max_running"] == 1
        assert (await api.get(f"/v1/tasks/{path}")).json()["name"] == name
        run = (await api.post(f"/v1/tasks/{path}/runs", json={"input": {}, "owner": name, "lane": name})).json()
        assert (run["task"], run["owner"], run["lane"]) == (name, name, name)
        line = json.dumps({"task": name, "owner": name, "lane": name})
        batch = await api.post("/v1/batches", content=line, headers={"content-type": "application/jsonl"})
        assert batch.json()["owner"] == name
        listed = (await api.get("/v1/runs", params={"task": name, "owner": name})).json()["items"]
        assert len(listed) == 2
        assert (await api.delete(f"/v1/lanes/{path}")).status_code == 204


async def test_all_else_is_no_name(api: httpx.AsyncClient) -> None:
    for name in NO_NAMES:
        path = quote(name, safe="")
        if name not in ("", ".", ".."):  # which a client takes out of the path
            for method, where in (
                ("GET", f"/v1/tasks/{path}"),
                ("POST", f"/v1/tasks/{path}/runs"),
                ("GET", f"/v1/lanes/{path}"),
                ("PUT", f"/v1/lanes/{path}"),
                ("DELETE", f"/v1/lanes/{path}"),
            ):
                assert (
                    "a name has 1 to 200 characters"
                    in problem(await api.request(method, where, json={}), 422)["detail"]
                )
        for field in ("owner", "lane"):
            assert problem(await submit(api, **{field: name}), 422)["errors"][0]["pointer"] == f"/{field}"
        problem(await api.get("/v1/runs", params={"owner": name}), 422)
        with pytest.raises(InvalidInput, match="a name has 1 to 200"):
            Client().lane(name)


_A_NAME_THAT_IS_NOT_UTF_8 = ["/v1/tasks/%FF", "/v1/tasks/%ED%A0%80", "/v1/lanes/%C0%AF", "/v1/tasks/%80/runs"]


async def test_a_name_that_is_not_utf_8(api: httpx.AsyncClient) -> None:
    for path in _A_NAME_THAT_IS_NOT_UTF_8:
        problem(await api.request("POST" if path.endswith("runs") else "GET", path, json={}), 422)


_EVERY_SPELLING_OF_A_PATH = ["/v1/%74asks", "/%761/tasks/%65cho", "/livez", "/v1/tasks/ech%6F"]


async def test_every_spelling_of_a_path_finds_its_route(api: httpx.AsyncClient) -> None:
    for path in _EVERY_SPELLING_OF_A_PATH:
        assert (await api.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("limits", "ok"),
    [
        ('{"max_running": 2147483648}', False),
        ('{"max_running": 2147483647}', False),
        ('{"max_running": 1000000}', True),
        ('{"max_running": -1}', False),
        ('{"max_running": 1e400}', False),
        ('{"max_running": 99999999999999999999999999}', False),
        ('{"max_running": 1.5}', False),
        ('{"max_per_minute": 1e-300}', False),
        ('{"max_per_minute": 5e-324}', False),
        ('{"max_per_minute": 1e400}', False),
        ('{"max_per_minute": 1e308}', False),
        ('{"max_per_minute": 0.000001}', True),
        ('{"max_per_minute": 1000000}', True),
        ('{"max_per_minute": 0}', False),
        ("{}", False),
    ],
)
async def test_limits_of_lanes_are_bounded(api: httpx.AsyncClient, ledger: Ledger, limits: str, ok: bool) -> None:
    await submit(api, lane="x")
    answer = await api.put("/v1/lanes/x", content=limits, headers={"content-type": "application/json"})
    if ok:
        assert answer.status_code == 200, answer.text
        assert (await api.get("/v1/lanes")).json()["items"][0]["name"] == "x"
    else:
        problem(answer, 422)
        assert (await api.get("/v1/lanes")).json()["items"] == [], "a refusal stores nothing"


async def test_lanes_beyond_the_bounds_can_still_be_read_and_lifted(api: httpx.AsyncClient, ledger: Ledger) -> None:
    await ledger.execute("insert into lanes (name, max_running, max_per_minute) values ('old', 2147483647, 1e-300)")
    assert (await api.get("/v1/lanes")).json()["items"][0]["max_running"] == 2147483647
    assert (await api.delete("/v1/lanes/old")).status_code == 204


_NUMBERS_THAT_JSON_CAN_NO = [
    ('{"x": 1e400}', "/input/x"),
    ('{"x": -1e999}', "/input/x"),
    ('{"a": [0, {"b": 1e309}]}', "/input/a/1/b"),
    ('{"x": ' + "9" * 5000 + "}", ""),
]


async def test_numbers_that_json_can_not_carry_back_are_refused(api: httpx.AsyncClient) -> None:
    for text, pointer in _NUMBERS_THAT_JSON_CAN_NO:
        sent = f'{{"input": {text}}}'
        answer = await api.post("/v1/tasks/echo/runs", content=sent, headers={"content-type": "application/json"})
        found = problem(answer, 400, 422)
        if pointer:
            assert found["errors"][0]["pointer"] == pointer
        line = f'{{"task": "echo", "input": {text}}}'
        problem(await api.post("/v1/batches", content=line, headers={"content-type": "application/jsonl"}), 400, 422)
        if pointer == "/input/x":
            schema = f'{{"payload": {text}, "target_type": "int"}}'
            problem(await api.post("/tasks", content=schema, headers={"content-type": "application/json"}), 404, 422)


_OTHER_NUMBERS_ARRIVE_AS = ["9007199254740993", "-" + "9" * 400, "0.1", "1e308", "1.0", "-0.0"]


async def test_other_numbers_arrive_as_they_were_sent(api: httpx.AsyncClient, ledger: Ledger) -> None:
    for number in _OTHER_NUMBERS_ARRIVE_AS:
        text = f'{{"input": {{"x": {number}}}}}'
        run = await api.post("/v1/tasks/echo/runs", content=text, headers={"content-type": "application/json"})
        row = await ledger.fetchrow("select input from all_runs where id = $1", run.json()["id"])
        assert row is not None
        assert json.loads(row["input"]) == {"x": json.loads(number)}


_A_TIME_IS_RFC_3339_WITH_FIELD = ["run_at", "deadline"]
_A_TIME_IS_RFC_3339_WITH_TIME = [
    253402300799,
    1893456000,
    1893456000000,
    0,
    -1,
    1e12,
    True,
    "1893456000",
    "253402300799",
    "2050-01-31",
    "2050-01-31T08:00:00",
    "tomorrow",
    "",
    "PT1H",
    "9999-12-31T23:59:59-12:00",
    "0001-01-01T00:00:00+14:00",
    "10000-01-01T00:00:00Z",
    {},
    [],
]


async def test_a_time_is_rfc_3339_with_an_offset(api: httpx.AsyncClient) -> None:
    for field in _A_TIME_IS_RFC_3339_WITH_FIELD:
        for time in _A_TIME_IS_RFC_3339_WITH_TIME:
            found = problem(await submit(api, **{field: time}), 422)
            assert found["errors"][0]["pointer"] == f"/{field}"


@pytest.mark.parametrize(
    "time",
    [
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59Z",
        "9999-12-31T23:59:59.999999Z",
        "2050-01-31T08:00:00.123456789+02:00",
        "2050-01-31t08:00:00z",
    ],
)
async def test_a_time_comes_back_with_its_zone(api: httpx.AsyncClient, ledger: Ledger, time: str) -> None:
    run = (await submit(api, run_at=time)).json()
    for seen in (run, (await api.get(f"/v1/runs/{run['id']}")).json(), (await api.get("/v1/runs")).json()["items"][0]):
        came = datetime.fromisoformat(seen["run_at"])
        assert came.tzinfo is not None
        assert abs(came - datetime.fromisoformat(time.upper())) < timedelta(seconds=1)
    await ledger.fetch("select * from backlog")  # which an autoscaler reads: no age is beyond all bounds


async def test_a_deadline_lies_in_the_future_and_after_run_at(api: httpx.AsyncClient) -> None:
    def after(hours: float) -> str:
        return (datetime.now(UTC) + timedelta(hours=hours)).isoformat()

    for wrong in (
        {"deadline": after(-1)},
        {"deadline": "0001-01-01T00:00:00Z"},
        {"run_at": after(2), "deadline": after(1)},
        {"run_at": "2050-01-01T00:00:00Z", "deadline": "2050-01-01T00:00:00Z"},
        {"run_at": after(-2), "deadline": after(-1)},
    ):
        assert problem(await submit(api, **wrong), 422)["errors"][0]["pointer"] == "/deadline"
        line = json.dumps({"task": "echo"} | wrong)
        batch = await api.post("/v1/batches", content=line, headers={"content-type": "application/jsonl"})
        assert problem(batch, 422)["errors"][0]["pointer"] == "/0/deadline"
    assert (await submit(api, run_at=after(1), deadline=after(2))).status_code == 202


async def test_a_submission_that_is_sent_again_after_its_deadline_is_still_the_same_run(
    api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = {"task": "echo", "deadline": (datetime.now(UTC) + timedelta(seconds=3)).isoformat()}
    alone = {"path": "/v1/tasks/echo/runs", "json": {"deadline": soon["deadline"]}, "kind": "application/json"}
    batch = {"path": "/v1/batches", "json": soon, "kind": "application/jsonl"}
    first = [await _keyed(api, **alone), await _keyed(api, **batch)]
    assert [answer.status_code for answer in first] == [202, 202]
    while datetime.now(UTC) <= datetime.fromisoformat(soon["deadline"]):
        await api.get("/livez")
    again = [await _keyed(api, **alone), await _keyed(api, **batch)]
    assert [answer.json()["id"] for answer in again] == [answer.json()["id"] for answer in first]
    problem(await _keyed(api, **alone, key="other"), 422)
    problem(await _keyed(api, **batch, key="other"), 422)


async def _keyed(
    api: httpx.AsyncClient, *, path: str, json: dict[str, str], kind: str, key: str = "k"
) -> httpx.Response:
    request = api.build_request("POST", path, json=json, headers={"Idempotency-Key": key})
    request.headers["content-type"] = kind
    return await api.send(request)


async def test_metadata_is_bounded_in_all(api: httpx.AsyncClient) -> None:
    for metadata in ({"a": "x" * 17_000}, {str(n): "é" * 300 for n in range(32)}, {"x" * 17_000: ""}):
        assert problem(await submit(api, metadata=metadata), 422)["errors"][0]["pointer"] == "/metadata"
    kept = {str(n): "x" * 400 for n in range(32)} | {"0": "\x00 é 👩‍👧"}
    run = (await submit(api, metadata=kept)).json()
    assert (await api.get(f"/v1/runs/{run['id']}")).json()["metadata"] == kept


READS = [
    "/v1/tasks",
    "/v1/tasks/echo",
    "/v1/runs",
    "/v1/runs/{run}",
    "/v1/batches/{batch}",
    "/v1/batches/{batch}/results",
    "/v1/lanes",
    "/v1/lanes/x",
    "/tasks/{run}/status",
    "/livez",
    "/readyz",
    "/problems/not_found",
    "/docs",
    "/openapi.json",
]


@pytest.fixture
async def reads(api: httpx.AsyncClient) -> list[str]:
    await api.put("/v1/lanes/x", json={"max_running": 1})
    line = b'{"task": "echo"}'
    batch = (await api.post("/v1/batches", content=line, headers={"content-type": "application/jsonl"})).json()["id"]
    run = (await submit(api)).json()["id"]
    return [path.format(run=run, batch=batch) for path in READS]


async def test_head_is_answered_like_get_without_a_body(api: httpx.AsyncClient, reads: list[str]) -> None:
    for path in reads:
        got, headed = await api.get(path), await api.head(path)
        assert (headed.status_code, headed.content) == (200, b""), path
        lengths = [answer.headers.get("content-length") for answer in (got, headed)]
        if "oldest_age_seconds" in got.text:  # an age may have another digit by now
            assert abs(int(lengths[0]) - int(lengths[1])) < 20, path
        else:
            assert lengths[0] == lengths[1], path
    assert (await api.head("/v1/runs/nothing")).status_code == 404
    assert (await api.head("/v1/tasks/echo/runs")).status_code == 405


async def test_unknown_query_parameters_are_refused(api: httpx.AsyncClient, reads: list[str]) -> None:
    for path in reads:
        assert "onwer" in problem(await api.get(f"{path}?onwer=x"), 422)["detail"], path
    for method, path in (
        ("POST", "/v1/tasks/echo/runs"),
        ("POST", "/tasks"),
        ("POST", "/v1/batches"),
        ("PUT", "/v1/lanes/x"),
        ("DELETE", "/v1/lanes/x"),
        ("POST", f"/v1/runs/{uuid4()}/cancel"),
        ("POST", f"/v1/batches/{uuid4()}/cancel"),
        ("GET", f"/v1/runs/{uuid4()}/result"),
    ):
        problem(await api.request(method, f"{path}?wait=1", json={}), 422)
    assert "more than once" in problem(await api.get("/v1/runs?owner=a&owner=b"), 422)["detail"]


_FILTERS_ARE_BOUNDED = [
    "cursor=" + "f" * 400,
    "cursor=1",
    "limit=99999999999999999999",
    "limit=1e1",
    "batch=x",
    "task=%00",
    "owner=",
]


async def test_filters_are_bounded(api: httpx.AsyncClient) -> None:
    for query in _FILTERS_ARE_BOUNDED:
        problem(await api.get(f"/v1/runs?{query}"), 422)
        assert (await api.get(f"/v1/runs?cursor={'f' * 8}-ffff-ffff-ffff-{'f' * 12}")).json()["items"] == []


_FORMS_IN_ANY_CHARSET = ["utf-7", "undefined", "idna", "punycode", "unicode_escape", "hex", "nonsense", ""]


async def test_forms_in_any_charset(api: httpx.AsyncClient) -> None:
    for charset in _FORMS_IN_ANY_CHARSET:
        kind = f"multipart/form-data; boundary=x; charset={charset}"
        body = b'--x\r\nContent-Disposition: form-data; name="payload"\r\n\r\n\\ud800\xff\x00\r\n--x--\r\n'
        problem(await api.post("/tasks", content=body, headers={"content-type": kind}), 400, 415, 422)
        kind = f"application/x-www-form-urlencoded; charset={charset}"
        problem(
            await api.post("/tasks", content=b"payload=%ED%A0%80%00", headers={"content-type": kind}), 400, 415, 422
        )


_BROKEN_FORMS_BODY = [
    b"",
    b"--x",
    b"--x\r\n\r\n",
    b"--y\r\n",
    b"--x\r\nContent-Disposition: form-data\r\n\r\nx\r\n--x--\r\n",
]
_BROKEN_FORMS_KIND = ["multipart/form-data", "multipart/form-data; boundary=x", "multipart/form-data; boundary="]


async def test_broken_forms(api: httpx.AsyncClient) -> None:
    for body in _BROKEN_FORMS_BODY:
        for kind in _BROKEN_FORMS_KIND:
            problem(await api.post("/tasks", content=body, headers={"content-type": kind}), 400, 422)


async def test_a_length_may_have_any_number_of_digits(api: httpx.AsyncClient) -> None:
    body = b'{"input": {}}'
    for length, status in ((b"0" * 5000 + b"13", 202), (b"9" * 5000, 413), (b"0" * 5000, 202)):
        headers = {b"content-type": b"application/json", b"content-length": length}
        answer = await api.post("/v1/tasks/echo/runs", content=body, headers=headers)
        assert answer.status_code == status, answer.text


async def test_a_file_of_the_documentation_is_only_read(api: httpx.AsyncClient) -> None:
    for path in ("/docs/static/x", "/docs/static/docs/static/x", "/docs/static/v1/runs"):
        answer = await api.post(path)
        problem(answer, 405)
        assert answer.headers["allow"] == "GET, HEAD"


async def test_the_documentation_needs_no_network(api: httpx.AsyncClient) -> None:
    page = (await api.get("/docs")).text
    urls = re.findall(r"""(?:src|href|url)\s*[=:]\s*["'](.+?)["']""", page)
    assert len(urls) == 4
    for url in urls:
        assert not re.match(r"/|\w+:", url), "relative, for a proxy that adds a prefix"
        assert (await api.get(f"/{url}")).status_code == 200, url
    assert '"validatorUrl": null' in page
    assert "//" not in re.sub(r"<!--.*?-->|// .*", "", page)
