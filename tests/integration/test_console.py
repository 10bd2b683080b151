"""The console over HTTP: its pages, what they escape, who may see them, and what their forms do."""

import contextlib
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote
from uuid import UUID

import httpx
import pytest
from pydantic import SecretStr

from backcast.api.app import create_app
from backcast.ledger import claims, fleet, settlement
from backcast.ledger.connection import Ledger
from backcast.ledger.settlement import Settlement
from backcast.models import CAST, Problem, State, TaskType, log_key, uuid7
from backcast.settings import Api
from backcast.store import Store
from tests.integration.test_ledger import LEASE
from tests.support.waiting import until

HOSTILE = "<script>alert(1)</script>\"'&"
KEY = "a-key-of-some-length"
OWN = {"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"}
SCHEMA = {
    "type": "object",
    "properties": {"words": {"type": "string", "description": HOSTILE}, "many": {"type": "integer"}},
    "required": ["words"],
}
LINES = {"Content-Type": "application/jsonl"}
PAGES = ("/", "/?within=day", "/runs", "/try", "/tasks", "/lanes", "/pools", "/batches", "/many/retry", "/many/cancel")


@contextlib.asynccontextmanager
async def over(ledger: Ledger, store: Store, **api: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(ledger, store, Api(**api)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=OWN) as client:
        yield client


@pytest.fixture
async def web(ledger: Ledger, store: Store) -> AsyncIterator[httpx.AsyncClient]:
    async with over(ledger, store) as client:
        yield client


async def register(ledger: Ledger, *names: str) -> UUID:
    worker = uuid7()
    types = [TaskType(name=name, pool="default", input_schema=SCHEMA, description=HOSTILE) for name in names]
    await fleet.register(ledger, worker, pool="default", host=HOSTILE, version=HOSTILE, slots=4, tasks=types)
    return worker


async def submit(web: httpx.AsyncClient, task: str, **more: Any) -> str:
    answer = await web.post(f"/v1/tasks/{quote(task, safe='')}/runs", json={"input": {"words": "a"}} | more)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def page(web: httpx.AsyncClient, path: str, status: int = 200) -> str:
    answer = await web.get(f"/console{path}")
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer.text


async def post(web: httpx.AsyncClient, path: str, **form: str) -> str:
    """The place that the form leads to."""
    answer = await web.post(f"/console{path}", data=form)
    assert answer.status_code == 303, answer.text
    return str(answer.headers["location"])


async def claim(ledger: Ledger, worker: UUID, run_id: str) -> claims.Claim:
    """Of the only run that is ready."""

    async def look() -> list[claims.Claim]:
        return await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=worker, lease=LEASE)

    found = await until(look)
    assert [str(each.id) for each in found] == [run_id]
    return found[0]


async def test_a_read_key_sees_every_page_and_no_buttons(ledger: Ledger, store: Store) -> None:
    keys = {"keys": [SecretStr(KEY)], "read_keys": [SecretStr("a-key-that-only-looks")]}
    async with over(ledger, store, **keys) as web:
        await register(ledger, CAST, "echo")
        api = {"Authorization": f"Bearer {KEY}"}
        ended, open_run = [
            (await web.post("/v1/tasks/echo/runs", json={"input": {"words": "a"}}, headers=api)).json()["id"]
            for _ in range(2)
        ]
        assert (await web.post(f"/v1/runs/{ended}/cancel", headers=api)).status_code == 200
        assert (await web.put("/v1/lanes/slow", json={"max_running": 1}, headers=api)).status_code == 200
        assert (await web.post("/v1/tasks/echo/pause", json={}, headers=api)).status_code == 200
        lines = json.dumps({"task": "echo", "input": {"words": "a"}})
        batch = (await web.post("/v1/batches", content=lines, headers=api | LINES)).json()["id"]
        places = (f"/runs/{ended}", f"/runs/{open_run}", "/tasks/echo", f"/tasks/{CAST}", f"/batches/{batch}")
        shown = ("/", "/runs", "/try", "/tasks", "/lanes", "/pools", "/batches", *places)

        async def forms() -> list[str]:
            found = [await page(web, path) for path in shown]
            return [form for text in found for form in re.findall(r'method="post" action="/console/([^"]+)"', text)]

        await post(web, "/login", key=KEY)
        assert {form.split("/")[0] for form in await forms()} >= {"runs", "lanes", "pause", "resume", "tasks", "try"}
        await post(web, "/login", key="a-key-that-only-looks")
        assert set(await forms()) == {"logout"}
        for text in [await page(web, path) for path in shown]:
            assert "/many/" not in text
        refused = await web.post("/console/pause", data={"kind": "pool", "name": "default"})
        assert refused.status_code == 403
        assert "nothing be changed" in refused.text


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_is_complete_before_anything_has_happened(web: httpx.AsyncClient, path: str) -> None:
    text = await page(web, path)
    assert "<h1" in text
    assert text.rstrip().endswith("</html>")


async def test_a_page_runs_no_script_of_its_own(web: httpx.AsyncClient, ledger: Ledger) -> None:
    await register(ledger, "plain")
    run = await submit(web, "plain")
    for path in (*PAGES, f"/runs/{run}", "/tasks/plain", "/login", "/missing"):
        answer = await web.get(f"/console{path}")
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert not re.search(
            r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:|https?://(?!localhost)", answer.text
        )


async def test_everything_that_callers_control_is_escaped(web: httpx.AsyncClient, ledger: Ledger, store: Store) -> None:
    worker = await register(ledger, HOSTILE, CAST)
    given = {"owner": HOSTILE, "lane": HOSTILE, "metadata": {HOSTILE: HOSTILE}, "input": {"words": HOSTILE}}
    failed = await submit(web, HOSTILE, **given)
    had = await claim(ledger, worker, failed)
    problem = Problem(code=HOSTILE, title=HOSTILE, detail=HOSTILE)
    usage = {"model": HOSTILE, "input_tokens": 3}
    await settlement.settle(
        ledger,
        worker,
        [Settlement(id=had.id, fence=had.fence, state="failed", error=problem, traceback=HOSTILE, usage=usage)],
    )
    line = {"at": "2026-01-01T00:00:00Z", "level": HOSTILE, "logger": HOSTILE, "message": HOSTILE, "attempt": 1}
    await store.put(log_key(had.id, had.fence), json.dumps(line).encode())
    running = await submit(web, HOSTILE, **given)
    await claim(ledger, worker, running)
    progress = {"fraction": 0.5, "message": HOSTILE, "at": line["at"], "attempt": 1}
    await ledger.execute("update runs set progress = $2 where id = $1", UUID(running), json.dumps(progress))
    waiting = await submit(web, HOSTILE, **given)
    cast = await submit(web, CAST, input={"words": HOSTILE, "data": HOSTILE, "target": HOSTILE})
    for kind, name in (("lane", HOSTILE), ("pool", "default"), ("task", HOSTILE)):
        await post(web, "/pause", kind=kind, name=name, reason=HOSTILE)
    params = {"task": HOSTILE, "owner": HOSTILE}
    batch = await web.post("/v1/batches", params=params, content=b'{"input": {"words": "a"}}', headers=LINES)
    task = f"/tasks/{quote(HOSTILE, safe='')}"
    asked = "task=<script>&owner=<script>&label=<script>=<script>&text=<script>&error=<script>"
    everywhere = (
        *PAGES,
        *(f"/runs/{run}" for run in (failed, running, waiting)),
        f"/try?run={cast}&shape=<script>",
        task,
        f"/batches/{batch.json()['id']}",
        f"/runs?{asked}",
        f"/many/retry?{asked}",
        "/<script>",
    )
    answers = {path: await web.get(f"/console{path}") for path in everywhere}
    answers["shape"] = await web.post("/console/try/shape", data={"shape": "<script>,b"})
    for path, answer in answers.items():
        assert answer.status_code in (200, 404), (path, answer.text)
        assert not re.search(r"<script>|<[^>]*=\"[^\"]*<", answer.text), path
    shown = await page(web, f"/runs/{failed}")
    # task, owner, lane, label and its value, input, error, traceback, log, model, why
    assert shown.count("&lt;script&gt;") >= 16
    for path in ("/", "/runs", "/tasks", "/lanes", "/pools", "/batches", task, f"/runs/{running}", f"/try?run={cast}"):
        assert "&lt;script&gt;" in await page(web, path), path


# Signing in


async def test_with_keys_nothing_is_shown_before_signing_in(ledger: Ledger, store: Store) -> None:
    async with over(ledger, store, keys=[SecretStr(KEY)]) as web:
        for path in (*PAGES, "/runs/0199c7a0-0000-7000-8000-000000000000/events", "/missing"):
            answer = await web.get(f"/console{path}")
            assert (answer.status_code, answer.text) == (303, "")
            assert answer.headers["location"].startswith("/console/login")
        assert (await web.post("/console/pause", data={"kind": "pool", "name": "default"})).status_code == 303
        assert (await web.get("/v1/pauses", headers={"Authorization": f"Bearer {KEY}"})).json() == {"items": []}
        old = await web.get("/console/runs", headers={"HX-Request": "true"})
        assert (old.status_code, old.headers["hx-refresh"]) == (204, "true")
        assert (await web.get("/console/static/console.css")).status_code == 200


async def test_a_key_signs_in_until_it_is_removed(ledger: Ledger, store: Store) -> None:
    other = "another-key-of-some-length"
    async with over(ledger, store, keys=[SecretStr(other), SecretStr(KEY)]) as web:
        wrong = await web.post("/console/login", data={"key": "wrong"})
        assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
        assert "This is not a key" in wrong.text
        entered = await web.post("/console/login", data={"key": KEY, "to": "/runs"})
        assert (entered.status_code, entered.headers["location"]) == (303, "/console/runs")
        cookie = entered.headers["set-cookie"]
        assert {"HttpOnly", "Path=/console", "SameSite=strict", "Max-Age=43200"} <= set(cookie.split("; "))
        assert "Secure" not in cookie
        assert KEY not in cookie
        assert "Sign out" in await page(web, "/runs")
        assert (await web.get("/console/login")).headers["location"] == "/console/"
        assert (await web.get("/v1/runs", headers={"Cookie": cookie.partition(";")[0]})).status_code == 401
        session = dict(web.cookies)
        assert await post(web, "/logout") == "/console/login"
        assert not web.cookies
    for keys, status in (([KEY], 200), ([other], 303)):  # another process; and the key is removed
        async with over(ledger, store, keys=list(map(SecretStr, keys))) as web:
            web.cookies.update(session)
            assert (await web.get("/console/runs")).status_code == status


@pytest.mark.parametrize("charset", ["undefined", "idna", "utf-8"])
async def test_a_form_that_no_page_sends_is_refused(web: httpx.AsyncClient, charset: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="key"\r\n\r\n\xff\r\n--x--\r\n'
    for path in ("/login", "/pause", "/lanes"):
        kind = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
        assert (await web.post(f"/console{path}", content=body, headers=kind)).status_code == 415, path


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://localhost"}, {"X-Forwarded-Proto": "https", "Origin": "http://localhost"}], ids=str
)
async def test_the_cookie_of_a_page_by_https_is_secure(ledger: Ledger, store: Store, headers: dict[str, str]) -> None:
    async with over(ledger, store, keys=[SecretStr(KEY)]) as web:
        entered = await web.post("/console/login", data={"key": KEY}, headers=headers)
    assert "Secure" in entered.headers["set-cookie"]


async def test_a_link_from_elsewhere_asks_again_with_the_cookie(ledger: Ledger, store: Store) -> None:
    async with over(ledger, store, keys=[SecretStr(KEY)]) as web:
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document", "Origin": ""}
        answer = await web.get("/console/runs", headers=link)
    assert answer.status_code == 200
    assert '<meta http-equiv="refresh" content="0">' in answer.text


@pytest.mark.parametrize("keys", [[], [KEY]], ids=["open", "keys"])
@pytest.mark.parametrize(
    "foreign", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site", "Origin": ""}], ids=str
)
async def test_a_foreign_page_changes_nothing(
    ledger: Ledger, store: Store, keys: list[str], foreign: dict[str, str]
) -> None:
    await register(ledger, "plain")
    async with over(ledger, store, keys=list(map(SecretStr, keys))) as web:
        if keys:
            await web.post("/console/login", data={"key": KEY})
        answer = await web.post("/console/pause", data={"kind": "pool", "name": "default"}, headers=foreign)
        assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")
        assert "Resume" not in await page(web, "/pools")


async def test_people_are_led_to_the_console_and_programs_are_not(web: httpx.AsyncClient) -> None:
    person = await web.get("/", headers={"Accept": "text/html,*/*"})
    assert (person.status_code, person.headers["location"]) == (303, "/console/try")
    program = await web.get("/")
    assert (program.status_code, program.json()["code"]) == (404, "not_found")
    assert (await web.get("/console")).headers["location"] == "/console/"


async def test_behind_a_prefix_every_link_has_it(ledger: Ledger, store: Store) -> None:
    await register(ledger, "plain")
    async with over(ledger, store, prefix="/jobs", keys=[SecretStr(KEY)], prefect_ui="https://prefect.example/") as web:
        entered = await web.post("/jobs/console/login", data={"key": KEY})
        assert entered.headers["location"] == "/jobs/console/"
        assert "Path=/jobs/console" in entered.headers["set-cookie"]
        for path in ("/", "/runs", "/tasks/plain", "/try"):
            text = (await web.get(f"/jobs/console{path}")).text
            places = re.findall(r'(?:href|src|action|hx-get|sse-connect)="(?!#)([^"]*)"', text)
            assert len(places) > 5
            assert all(place.startswith("/jobs/console") for place in places), places
        made = await web.post(
            "/v1/tasks/plain/runs", json={"input": {"words": "a"}}, headers={"Authorization": f"Bearer {KEY}"}
        )
        run_id = made.json()["id"]
        shown = (await web.get(f"/jobs/console/runs/{run_id}")).text
        assert f'href="https://prefect.example/runs/task-run/{run_id}"' in shown


# What the pages do


async def test_a_run_is_shown_with_all_that_is_known_of_it(web: httpx.AsyncClient, ledger: Ledger) -> None:
    worker = await register(ledger, "plain")
    run_id = await submit(web, "plain", owner="shop", metadata={"customer": "acme"})
    had = await claim(ledger, worker, run_id)
    assert "hx-get" in await page(web, f"/runs/{run_id}")  # it goes on
    done = Settlement(
        id=had.id,
        fence=had.fence,
        state="completed",
        result='{"total": 1234}',
        result_key="k",
        usage={"input_tokens": 9876},
    )
    await settlement.settle(ledger, worker, [done])
    text = await page(web, f"/runs/{run_id}")
    for part in (
        "&#34;total&#34;: 1234",
        "&#34;words&#34;: &#34;a&#34;",
        "9\u2009876",
        "acme",
        "attempt 1",
        "It has completed",
    ):
        assert part in text, part
    assert "hx-trigger" not in text
    assert (await web.get(f"/console/runs/{run_id}/result")).json() == {"total": 1234}
    assert (await web.get(f"/console/runs/{run_id}/input")).json() == {"words": "a"}
    events = await web.get(f"/console/runs/{run_id}/events")
    assert events.headers["content-type"].startswith("text/event-stream")
    assert re.findall("event: (.*)", events.text) == ["queued", "started", "ended"]
    last = re.findall("id: (.*)", events.text)[-1]
    assert (await web.get(f"/console/runs/{run_id}/events", headers={"Last-Event-ID": last})).status_code == 204


async def test_a_run_is_cancelled_and_repeated_with_another_input(web: httpx.AsyncClient, ledger: Ledger) -> None:
    await register(ledger, "plain")
    run_id = await submit(web, "plain")
    assert await post(web, f"/runs/{run_id}/cancel") == f"/console/runs/{run_id}"
    await until(lambda: page(web, f"/runs/{run_id}"), lambda text: "Retry with a changed input" in text)
    wrong = await web.post(f"/console/runs/{run_id}/retry", data={"input": "{"})
    assert (wrong.status_code, "This is not JSON" in wrong.text) == (422, True)
    refused = await web.post(f"/console/runs/{run_id}/retry", data={"input": '{"words": 1}'})
    assert (refused.status_code, "{&#34;words&#34;: 1}</textarea>" in refused.text) == (422, True)
    again = (await post(web, f"/runs/{run_id}/retry", input='{"words": "other"}')).rpartition("/")[2]
    assert (await web.get(f"/v1/runs/{again}/input")).json() == {"words": "other"}
    assert (await web.get(f"/v1/runs/{again}")).json()["retry_of"] == run_id
    same = (await post(web, f"/runs/{run_id}/retry")).rpartition("/")[2]
    assert (await web.get(f"/v1/runs/{same}/input")).json() == {"words": "a"}
    assert again in await page(web, f"/runs/{run_id}")


async def test_runs_are_filtered_and_paged(web: httpx.AsyncClient, ledger: Ledger) -> None:
    await register(ledger, "plain", "other")
    first = await submit(web, "plain", owner="shop", metadata={"customer": "acme"})
    for _ in range(50):
        await submit(web, "other")
    newest = await page(web, "/runs")
    assert (newest.count('class="mono" href="/console/runs/'), first in newest) == (50, False)
    older = re.search(r'href="/console(/runs\?cursor=[^"]*)">Older', newest)
    assert older
    assert first in await page(web, older[1])
    for query in ("task=plain", "owner=shop", "label=customer%3Dacme", "state=queued&task=plain&since=hour"):
        text = await page(web, f"/runs?{query}")
        assert (text.count('class="mono" href="/console/runs/'), first in text) == (1, True)
    assert "No run matches" in await page(web, "/runs?owner=nobody")
    assert "A label is written as" in await page(web, "/runs?label=nonsense", 422)
    assert 'role="alert"' in await page(web, "/runs?state=nonsense", 422)


async def test_many_runs_are_counted_before_they_are_cancelled(web: httpx.AsyncClient, ledger: Ledger) -> None:
    await register(ledger, "plain")
    mine = [await submit(web, "plain", owner="shop") for _ in range(3)]
    other = await submit(web, "plain")
    text = await page(web, "/many/cancel?owner=shop")
    assert '<b id="matched">3</b>' in text
    assert "There is nothing to retry" in await page(web, "/many/retry?owner=shop&state=queued")
    form = dict(re.findall(r'type="hidden" name="([^"]*)" value="([^"]*)"', text))
    place = await post(web, "/many/cancel", **form)
    assert await post(web, "/many/cancel", **form) == place  # sent twice: one operation
    operation = (await web.get(f"/v1/operations/{place.rpartition('/')[2]}")).json()
    assert (operation["kind"], operation["filter"]["owner"]) == ("cancel", "shop")
    assert "Stop" in await page(web, place.removeprefix("/console"))
    await post(web, f"{place.removeprefix('/console')}/stop")
    assert "cancelled" in await page(web, place.removeprefix("/console"))
    await page(web, "/many/delete", 404)
    refused = await web.post("/console/many/cancel", data={"key": "k"})
    assert refused.status_code == 422
    assert len({*mine, other}) == 4


async def test_levers_are_pulled(web: httpx.AsyncClient, ledger: Ledger) -> None:
    worker = await register(ledger, "plain")
    assert await post(web, "/lanes", name="openai", max_running="4", max_per_minute="600") == "/console/lanes"
    assert "4 at once, 600 per minute" in await page(web, "/lanes")
    wrong = await web.post("/console/lanes", data={"name": "openai", "max_running": "-1"})
    assert (wrong.status_code, 'role="alert"' in wrong.text) == (422, True)
    await post(web, "/lanes", name="openai")
    assert "No lane has limits" in await page(web, "/lanes")
    for kind, name in (("task", "plain"), ("lane", "openai"), ("pool", "default")):
        assert (
            await post(web, "/pause", kind=kind, name=name, reason="for a while", minutes="15") == f"/console/{kind}s"
        )
        assert "Resume" in await page(web, f"/{kind}s")
    pauses = (await web.get("/v1/pauses")).json()["items"]
    assert {(each["kind"], each["reason"], each["by"]) for each in pauses} == {
        (kind, "for a while", "console") for kind in ("task", "lane", "pool")
    }
    assert all(each["until"] for each in pauses)
    assert (await page(web, "/")).count("for a while") == 3
    for wrong in (
        {"reason": "x" * 301},
        {"reason": "\x00"},
        *({"minutes": minutes} for minutes in ("1e10", "null", "a", "NaN", "-1")),
    ):
        assert (await web.post("/console/pause", data={"kind": "lane", "name": "a"} | wrong)).status_code == 422, wrong
    for kind, name in (("task", "plain"), ("lane", "openai"), ("pool", "default")):
        await post(web, "/resume", kind=kind, name=name)
    assert (await web.get("/v1/pauses")).json() == {"items": []}
    assert "Drain…" in await page(web, "/pools")
    await post(web, f"/workers/{worker}/drain")
    assert "draining" in await page(web, "/pools")


async def test_a_task_is_started_by_its_form(web: httpx.AsyncClient, ledger: Ledger) -> None:
    await register(ledger, "plain/with a slash")
    place = "/tasks/plain%2Fwith%20a%20slash"
    assert 'name="input.words"' in await page(web, place)
    started = (await post(web, place, **{"input.words": "a rose", "input.many": "3"})).rpartition("/")[2]
    assert (await web.get(f"/v1/runs/{started}/input")).json() == {"words": "a rose", "many": 3}
    wrong = await web.post(f"/console{place}", data={"input.words": "a rose", "input.many": "three"})
    assert (wrong.status_code, "a rose</textarea>" in wrong.text, "many: This is not JSON" in wrong.text) == (
        422,
        True,
        True,
    )
    await page(web, "/tasks/unknown", 404)


async def test_a_cast_is_tried(web: httpx.AsyncClient, ledger: Ledger) -> None:
    worker = uuid7()
    cast = TaskType(name=CAST, pool="default", input_schema={"type": "object"})
    await fleet.register(ledger, worker, pool="default", host="h", version="1", slots=1, tasks=[cast])
    assert "press Cast" in (await page(web, "/try")).replace("Press", "press")
    place = await post(web, "/try", data="Anna, 34", shape="name, age", instructions="  ")
    run_id = re.search("run=([0-9a-f-]+)", place)
    assert run_id
    sent = (await web.get(f"/v1/runs/{run_id[1]}/input")).json()
    assert sent["data"] == "Anna, 34"
    assert (list(sent["target"]["properties"]), "instructions" in sent) == (["name", "age"], False)
    assert sent["stream"] is True
    had = await claim(ledger, worker, run_id[1])
    assert f'sse-connect="/console/runs/{run_id[1]}/events"' in await page(web, place.removeprefix("/console"))
    done = Settlement(id=had.id, fence=had.fence, state="completed", result='{"name": "Anna"}', result_key="k")
    await settlement.settle(ledger, worker, [done])
    for path in (place.removeprefix("/console"), "/try"):  # the latest cast is there at once
        text = await page(web, path)
        assert "&#34;name&#34;: &#34;Anna&#34;" in text
        assert "Anna, 34</textarea>" in text
    assert "name, age</textarea>" in await page(web, place.removeprefix("/console"))
    wrong = await web.post("/console/try", data={"data": "kept", "shape": "a: nonsense"})
    assert (wrong.status_code, "kept</textarea>" in wrong.text, "no type" in wrong.text) == (422, True, True)
    assert "&#34;integer&#34;" in await shape_of(web, "name,age")
    schema = {"type": "object", "properties": {f"field_{n}": {"type": "string"} for n in range(2000)}}
    place = await post(web, "/try", data="long", shape=json.dumps(schema))
    assert len(place) < 100
    assert "field_1999" in await page(web, place.removeprefix("/console"))
    assert "field_1000" in await shape_of(web, json.dumps(schema))


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"a": ' + "[" * 9000, '{"a": NaN}'], ids=lambda text: text[:9])
async def test_what_is_no_json_is_refused_on_its_page(web: httpx.AsyncClient, ledger: Ledger, text: str) -> None:
    await register(ledger, "plain", CAST)
    assert "not JSON" in await shape_of(web, text)
    run = await submit(web, "plain")
    forms: dict[str, dict[str, str]] = {
        "/try": {"data": "a", "shape": text},
        "/tasks/plain": {"input.words": "a", "input.many": text},
        f"/runs/{run}/retry": {"input": text},
        "/lanes": {"name": "a", "max_running": text},
    }
    for path, form in forms.items():
        answer = await web.post(f"/console{path}", data=form)
        assert (answer.status_code, "not JSON" in answer.text) == (422, True), path


async def shape_of(web: httpx.AsyncClient, text: str) -> str:
    return (await web.post("/console/try/shape", data={"shape": text})).text


async def test_a_batch_is_found_cancelled_and_repeated(web: httpx.AsyncClient, ledger: Ledger) -> None:
    worker = await register(ledger, "plain")
    lines = b'{"input": {"words": "a"}}\n{"input": {"words": "b"}}\n'
    first = (await web.post("/v1/batches?task=plain", content=lines, headers=LINES)).json()["id"]
    second = (await web.post("/v1/batches?task=plain", content=lines, headers=LINES)).json()["id"]
    assert [each["id"] for each in (await web.get("/v1/batches")).json()["items"]] == [second, first]
    text = await page(web, "/batches")
    assert text.index(second) < text.index(first)
    assert [each["states"] for each in (await web.get("/v1/batches")).json()["items"]] == [{"queued": 2}, {"queued": 2}]
    await ledger.execute("update batches set size = 99999 where id = $1", UUID(first))  # too many to be counted
    assert [each["states"] for each in (await web.get("/v1/batches")).json()["items"]] == [{"queued": 2}, {}]
    assert "Open it to count them" in await page(web, "/batches")
    await ledger.execute("update batches set size = 2 where id = $1", UUID(first))
    assert (await web.get(f"/console/batches?id={first}")).headers["location"] == f"/console/batches/{first}"
    await page(web, "/batches?id=nonsense", 422)
    assert "Cancel 2" in await page(web, f"/batches/{first}")
    await post(web, f"/batches/{first}/cancel")

    async def states() -> dict[str, int]:
        return dict((await web.get(f"/v1/batches/{first}")).json()["states"])

    await until(states, lambda states: states == {State.CANCELLED: 2})
    assert len((await web.get(f"/console/batches/{first}/results")).text.splitlines()) == 2

    async def look() -> list[claims.Claim]:
        return await claims.claim(ledger, pool="default", cursor=0, limit=1, worker_id=worker, lease=LEASE)

    had = (await until(look))[0]
    problem = Problem(code="wrong", title="Wrong", detail="It is wrong.")
    await settlement.settle(ledger, worker, [Settlement(id=had.id, fence=had.fence, state="failed", error=problem)])
    assert "Retry 1 that failed" in await page(web, f"/batches/{second}")
    place = await post(web, f"/batches/{second}/retry")
    assert place.startswith("/console/operations/")
    assert "Retry of many runs" in await page(web, place.removeprefix("/console"))


async def test_the_overview_names_what_needs_a_look(web: httpx.AsyncClient, ledger: Ledger) -> None:
    worker = await register(ledger, "plain")
    assert "Nothing needs a look" in await page(web, "/")
    await submit(web, "plain")
    await ledger.execute("update workers set heartbeat_at = now() - interval '1 hour' where id = $1", worker)
    text = await page(web, "/")
    assert "Pool default has no live worker: 1 run waits for one." in text
    assert "is silent" not in text  # the pool's warning is enough
    await register(ledger, "other")
    assert "is silent for 1 h" in await page(web, "/")


async def test_a_lane_that_lets_nothing_start_is_named_with_its_limit(web: httpx.AsyncClient, ledger: Ledger) -> None:
    await register(ledger, "plain")
    for name, limits in (
        ("shut", {"max_running": 0}),
        ("slow", {"max_per_minute": 0.01}),
        ("fine", {"max_running": 1}),
    ):
        (await web.put(f"/v1/lanes/{name}", json=limits)).raise_for_status()
        for _ in range(2):
            await submit(web, "plain", lane=name)
    await ledger.execute("update runs set state = 'held', run_at = now() - interval '2 minutes' where lane = 'slow'")
    text = await page(web, "/")
    assert "Lane shut runs nothing, and 2 runs wait: its limit is 0 at once." in text
    assert "Lane slow runs nothing, and 2 runs wait: its limit is 0.01 per minute." in text
    assert "Lane fine" not in text


async def test_a_task_that_fails_mostly_is_named_until_it_is_paused(web: httpx.AsyncClient, ledger: Ledger) -> None:
    worker = await register(ledger, "poison", "sound")
    problem = Problem(code="wrong", title="Wrong", detail="It is wrong.")
    for _ in range(3):
        had = await claim(ledger, worker, await submit(web, "poison"))
        await settlement.settle(ledger, worker, [Settlement(id=had.id, fence=had.fence, state="failed", error=problem)])

    async def overview() -> str:
        return await page(web, "/")

    await until(overview, lambda text: "All 3 runs of the task poison that ended lately have failed." in text)
    await post(web, "/pause", kind="task", name="poison")
    text = await page(web, "/")
    assert "have failed" not in text
    assert "The task poison is paused" in text


async def test_each_request_of_a_browser_is_one_line_of_the_log(
    ledger: Ledger, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "backcast.access")
    await register(ledger, "plain")
    async with over(ledger, store, keys=[SecretStr(KEY)]) as web:
        await web.post("/console/login", data={"key": KEY})
        api = {"Authorization": f"Bearer {KEY}"}
        made = await web.post("/v1/tasks/plain/runs", json={"input": {"words": "a"}}, headers=api)
        run = made.json()["id"]
        for path in ("/", "/runs", f"/runs/{run}", "/nothing"):
            await web.get(f"/console{path}")
        await web.post(f"/console/runs/{run}/cancel")
        await web.post("/console/pause", data={"kind": "lane", "name": "private"})
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "backcast.access"]
    assert [(line["method"], line["route"], line["status"], line["run"]) for line in lines] == [
        ("POST", "/console/login", 303, None),
        ("POST", "/v1/tasks/{name}/runs", 202, run),
        ("GET", "/console/", 200, None),
        ("GET", "/console/runs", 200, None),
        ("GET", "/console/runs/{run_id:uuid}", 200, run),
        ("GET", "/console", 404, None),
        ("POST", "/console/runs/{run_id:uuid}/cancel", 303, run),
        ("POST", "/console/pause", 303, None),
    ]
    assert {line["key"] for line in lines[1:] if line["status"] != 404} == {lines[1]["key"]}
    assert "private" not in caplog.text


@pytest.mark.parametrize(
    "path", ["/console/runs/0199c7a0-0000-7000-8000-000000000000", "/console/nothing", "/console/runs/x"]
)
async def test_a_page_that_is_not_there(web: httpx.AsyncClient, path: str) -> None:
    answer = await web.get(path)
    assert (answer.status_code, "<h1>There is no such" in answer.text) == (404, True)
