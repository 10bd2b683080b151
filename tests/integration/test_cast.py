"""The main job through the whole product, with a scripted model: messy data and a shape in, the typed value out."""

import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from backcast.testing import Reply, ScriptedModel
from tests.support.stack import Stack, free_port, stack
from tests.support.streams import Sent, all_of, events
from tests.support.waiting import PATIENCE, until

KEY = "sk-very-secret-key"
CHAIRS = {"payload": "We put 31 chairs in the hall", "instructions": "how many chairs", "target_type": "int"}


@pytest.fixture
def model() -> Iterator[ScriptedModel]:
    with ScriptedModel() as model:
        yield model


@pytest.fixture
async def product(database: str, tmp_path: Path, model: ScriptedModel) -> AsyncIterator[Stack]:
    env = {"BACKCAST_MODEL__BASE_URL": model.url, "BACKCAST_MODEL__API_KEY": KEY, "BACKCAST_MODEL__NAME": "scripted"}
    async with stack(database, tmp_path, **env) as running:
        await running.up("api", "worker")
        yield running


async def cast(product: Stack, **body: object) -> dict[str, object]:
    """The answer of the example's status route, once it is not pending."""
    answer = await product.http.post("/tasks", json=body)
    assert answer.status_code == 202, answer.text
    await product.ended(answer.json()["task_run_id"])
    return dict((await product.http.get(answer.headers["location"])).json())


async def test_the_example(product: Stack) -> None:
    status = await cast(product, **CHAIRS)
    assert (status["status"], status["result"]) == ("completed", 31)
    run = await product.run(str(status["task_run_id"]))
    assert run["usage"]["model"] == "scripted"
    assert run["usage"]["output_tokens"] > 0


async def test_the_answer_is_shown_as_it_grows_to_those_who_ask(database: str, tmp_path: Path) -> None:
    text, go = "one two three " * 20, threading.Event()

    def break_off(sent: str) -> None:
        if len(sent) > 100:
            raise OSError

    def hold(sent: str) -> None:
        assert len(sent) < 100 or go.wait(PATIENCE)

    replies = [Reply(text, before_piece=break_off), Reply(text, before_piece=hold)]
    with ScriptedModel(replies) as model:
        env = {"BACKCAST_MODEL__BASE_URL": model.url, "BACKCAST_MODEL__API_KEY": KEY}
        async with stack(database, tmp_path, **env) as product:
            await product.up("api", "worker")
            asked = {"payload": text, "instructions": "repeat it", "target_type": "str"}
            made = await product.http.post("/tasks", data=asked | {"stream": "true"})
            run_id = made.json()["task_run_id"]
            sent = list[Sent]()
            async for each in events(product.http, f"/v1/runs/{run_id}/events"):
                assert isinstance(each, Sent)
                sent.append(each)
                if each.name == "output" and each.data["attempt"] == 2 and not go.is_set():
                    assert (await product.run(run_id))["state"] == "running"
                    go.set()
            parts = [
                (each.data["attempt"], each.data["kind"], each.data["data"]) for each in sent if each.name == "output"
            ]
            quiet = await cast(product, **asked | {"payload": f"another {text}"})
            quiet_sent = await all_of(product.http, f"/v1/runs/{quiet['task_run_id']}/events")
            runs = [await product.run(one) for one in (run_id, str(quiet["task_run_id"]))]
    assert {attempt for attempt, _, _ in parts} == {1, 2}
    assert {kind for _, kind, _ in parts} == {"partial"}
    assert all(part and text.startswith(part) for _, _, part in parts)
    assert (sent[-1].name, sent[-1].data["result"]) == ("ended", text)
    assert [each.name for each in quiet_sent] == ["queued", "started", "ended"]
    assert [request.body["stream"] for request in model.requests] == [True, True, False]
    assert runs[0]["usage"]["output_tokens"] == runs[1]["usage"]["output_tokens"]


async def test_the_tokens_of_failed_attempts_are_counted_and_the_log_names_the_run(
    database: str, tmp_path: Path
) -> None:
    cut = Reply(raw='{"result": 12}', finish="length")
    with ScriptedModel([cut, cut, Reply(finish="error"), Reply("many"), Reply("many")]) as model:
        env = {"BACKCAST_MODEL__BASE_URL": model.url, "BACKCAST_MODEL__API_KEY": KEY}
        async with stack(database, tmp_path, **env) as product:
            await product.up("api", "worker")
            cast_of_cut = await cast(product, **CHAIRS)
            status = await cast(product, **CHAIRS | {"payload": "other chairs"})
            cut_run, run = [await product.run(str(one["task_run_id"])) for one in (cast_of_cut, status)]
    assert cut_run["error"]["code"] == "model_answer_too_long"
    assert cut_run["usage"]["output_tokens"] > 0
    assert (run["error"]["code"], run["attempts"]) == ("model_answer_invalid", 2)
    one = cut_run["usage"]["input_tokens"] / 2
    assert one * 2.5 < run["usage"]["input_tokens"] < one * 4, (
        "three answers: one of the first attempt, two of the last"
    )
    assert "'many' is not of type 'integer'" in str(status["message"])
    log = product.parts[1].text
    assert f"the run has failed: model_answer_invalid run={run['id']} task=create_structured_output" in log
    lines = [line for line in log.splitlines() if f"run={run['id']} task=create_structured_output worker=" in line]
    assert any("Task run failed" in line for line in lines), "Prefect's own line, before the retry"
    assert "Failed to write result" not in log


async def test_without_a_model_a_cast_fails_at_once(database: str, tmp_path: Path) -> None:
    async with stack(database, tmp_path, BACKCAST_MODEL__BACKEND="none") as product:
        await product.up("api", "worker")
        run = await product.run(str((await cast(product, **CHAIRS))["task_run_id"]))
    assert (run["error"]["code"], run["attempts"]) == ("model_not_set_up", 1)
    assert "BACKCAST_MODEL__API_KEY" in run["error"]["detail"]


async def test_shapes(product: Stack) -> None:
    order = {
        "type": "object",
        "properties": {"lines": {"type": "array", "items": {"$ref": "#/$defs/line"}, "maxItems": 3}},
        "required": ["lines"],
        "$defs": {"line": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
    }
    tree = {"type": "object", "properties": {"n": {"type": "integer"}, "sub": {"items": {"$ref": "#"}}}}
    nullable = {"type": "string", "nullable": True, "format": "colour"}
    for target in (
        tree,
        nullable,
        "list[str]",
        "builtins.float",
        "typing.List[int]",
        "date",
        order,
        {"enum": ["a", "b"]},
    ):
        status = await cast(product, payload="2024-05-01: 12 boxes", instructions="what", target_type=target)
        assert status["status"] == "completed", status


async def test_targets_are_checked_before_a_run_is_accepted(product: Stack) -> None:
    """By the real task's registered schema, not by a copy of it in a test."""
    for body, place in (
        ({"payload": "x", "target_type": "str"}, "/instructions"),
        ({"payload": "x", "target_type": {"type": "string"}, "instructions": " "}, "/instructions"),
    ):
        answer = await product.http.post("/tasks", json=body)
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, place)
    given = {"input": {"data": "x", "target": "str", "instructions": None}}
    answer = await product.http.post("/v1/tasks/create_structured_output/runs", json=given)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/input/instructions")
    for target in ("subprocess.Popen", "os", {"$ref": "#"}):
        for path, body, place in (
            ("/tasks", {"payload": "x", "target_type": target}, "/target_type"),
            (
                "/v1/tasks/create_structured_output/runs",
                {"input": {"data": "x", "target": target}},
                "/input/target",
            ),
        ):
            answer = await product.http.post(path, json=body)
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_target")
            assert answer.json()["errors"][0]["pointer"].startswith(place)


async def test_tasks_that_can_not_be_run_as_in_prefect_are_listed_with_the_reason(product: Stack) -> None:
    listed = {each["name"]: each["warnings"] for each in (await product.http.get("/v1/tasks")).json()["items"]}
    assert listed["echo"] == []
    for name, words in (("stream", "generator"), ("over_a_lock", "'lock'")):
        assert words in listed[name][0]
        refused = await product.http.post(f"/v1/tasks/{name}/runs", json={"input": {"length": 3}})
        assert (refused.status_code, words in refused.json()["detail"]) == (422, True)
        assert f"task {name}: {listed[name][0]}" in product.parts[1].text
    assert [words in warning for words, warning in zip(["default", "gpu"], listed["tagged"], strict=True)] == [True] * 2
    assert await product.result(await product.submit("tagged")) is True


async def test_a_task_that_takes_a_type_takes_a_target(product: Stack) -> None:
    line = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for data, target, wanted in (
        ("7", "int", 7),
        ({"n": 1}, line, {"n": 1}),
        (["2024-05-01"], "list[date]", ["2024-05-01"]),
    ):
        assert await product.result(await product.submit("shaped", data=data, target=target)) == wanted
    failed = await product.ended(await product.submit("shaped", data={"n": "one"}, target=line))
    assert "/n: 'one' is not of type 'integer'" in failed["error"]["detail"]
    refused = await product.http.post("/v1/tasks/shaped/runs", json={"input": {"data": 1, "target": "os.system"}})
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_target")


async def test_the_same_question_asks_the_model_once(product: Stack, model: ScriptedModel) -> None:
    first, second = await cast(product, **CHAIRS), await cast(product, **CHAIRS)
    assert first["result"] == second["result"] == 31
    assert first["task_run_id"] != second["task_run_id"]
    assert len(model.requests) == 1


async def test_a_model_that_is_away_is_waited_for(database: str, tmp_path: Path) -> None:
    port = free_port()
    env = {"BACKCAST_MODEL__BASE_URL": f"http://127.0.0.1:{port}/v1", "BACKCAST_MODEL__API_KEY": KEY}
    async with stack(database, tmp_path, **env) as product:
        await product.up("api", "worker")
        answer = await product.http.post("/tasks", json=CHAIRS)
        run_id = answer.json()["task_run_id"]

        run = await until(
            lambda: product.run(run_id), lambda run: run["error"] is not None and run["state"] == "queued"
        )
        assert run["error"]["code"] == "model_unavailable"
        with ScriptedModel([Reply(status=429, retry_after=1), Reply(31)], port=port):
            assert await product.result(run_id) == 31


async def test_a_refused_key_fails_at_once_and_is_not_repeated_anywhere(database: str, tmp_path: Path) -> None:
    with ScriptedModel([Reply(status=401, message=f"Incorrect API key provided: {KEY}")]) as model:
        env = {"BACKCAST_MODEL__BASE_URL": model.url, "BACKCAST_MODEL__API_KEY": KEY}
        async with stack(database, tmp_path, **env) as product:
            await product.up("api", "worker")
            status = await cast(product, **CHAIRS)
            run = await product.run(str(status["task_run_id"]))
            assert (run["state"], run["error"]["code"], run["attempts"]) == ("failed", "model_refused_key", 1)
            assert len(model.requests) == 1
            everything = f"{status} {run} " + " ".join(part.text for part in product.parts)
            assert KEY not in everything
            for path in tmp_path.rglob("*"):
                assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


async def test_marvin_leaves_no_data_on_the_disk(product: Stack) -> None:
    await cast(product, **{**CHAIRS, "payload": "31 chairs and a canary"})
    left = [path for path in product.folder.rglob("*") if path.is_file() and b"canary" in path.read_bytes()]
    assert left == [], "only the database and the result know the data"
