"""The facts of Prefect that prefect_engine.py, capture.py and sink.py rest on, one test each: when a pin moves, a
failing test names the broken fact. `make contract PREFECT=…` asks another version. No server runs: nothing listens at
`PREFECT_API_URL`."""

import asyncio
import collections
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect import task
from prefect.context import TaskRunContext
from prefect.events.schemas.events import Event
from prefect.events.worker import EventsWorker

from backcast.executor import cache, capture, registry
from backcast.executor import executor as subject
from backcast.history.events import Change
from backcast.history.sink import Sink
from backcast.models import AttemptResult, Failed, Retry, Succeeded
from backcast.settings import Prefect
from backcast.settings import Store as StoreSettings
from backcast.store import open_store
from tests.support import sample_tasks
from tests.support.waiting import until


@task
async def child() -> int:
    return 1


@task
async def parent() -> int:
    return await child()


@task
async def itself() -> dict[str, Any]:
    context = TaskRunContext.get()
    assert context
    run = context.task_run
    parts = (run, run.state, run.state and run.state.state_details, run.tags, run.labels, run.task_inputs)
    kept.append(parts)  # else Python would use an id again
    return {"ids": [id(one) for one in parts], "state": str(run.state and run.state.id), "count": run.run_count}


kept: list[Any] = []
ended: list[Any] = []


async def keep_result(task: Any, run: Any, state: Any) -> None:
    ended.append(await state.aresult())


@task(on_completion=[keep_result])
async def hooked() -> int:
    return 5


class Recorded(Sink):
    """A sink that also keeps its changes, events and log lines."""

    def __init__(self) -> None:
        super().__init__(Prefect(api_url="http://127.0.0.1:9/api"))
        self.events: list[Change] = []
        self.emitted: list[Event] = []
        self.lines: list[dict[str, Any]] = []

    def publish(self, change: Change) -> None:
        self.events.append(change)
        super().publish(change)

    def keep_event(self, key: str, event: Any) -> None:
        self.emitted.append(event)
        super().keep_event(key, event)

    def keep_log(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        super().keep_log(line)

    def states(self, run_id: object) -> list[str]:
        return [change.name for change in self.events if change.run == run_id]


@pytest.fixture
async def sink() -> AsyncIterator[Recorded]:
    sink = Recorded()
    capture.install(sink)
    yield sink
    EventsWorker.set_client_override(None)
    await sink.aclose(0)


@pytest.fixture
async def executor(tmp_path: Path, sink: Recorded, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[subject.Executor]:
    monkeypatch.chdir(tmp_path)
    store = open_store(StoreSettings(url=f"file://{tmp_path}/store"))
    await store.ensure()
    tasks = registry.discover([sample_tasks.__name__]) | {one.name: one for one in (parent, itself, hooked)}
    async with subject.Executor(
        tasks, pool="default", max_attempts=3, store=store, threads=4, publish=sink.publish
    ) as executor:
        yield executor
    await store.aclose()


async def run(
    executor: subject.Executor, task: str, retries: int = 0, *, run_id: Any = None, **given: Any
) -> AttemptResult:
    return await executor.execute(task, run_id or uuid4(), given, retries=retries)


async def test_no_http_call_is_on_the_hot_path(executor: subject.Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: collections.Counter[str] = collections.Counter()
    for client in (httpx.AsyncClient, httpx.Client):
        build = client.build_request

        def count(self: Any, method: str, url: Any, _build: Any = build, **rest: Any) -> Any:
            calls[f"{method} {url}"] += 1
            return _build(self, method, url, **rest)

        monkeypatch.setattr(client, "build_request", count)
    for _ in range(3):
        assert await run(executor, "echo", value=1) == Succeeded(b"1")
        assert await run(executor, "block", seconds=0) == Succeeded(b"0")
        assert isinstance(await run(executor, "flaky", name="x", fails=0), Succeeded)
    assert calls == {}


async def test_every_state_goes_through_set_state(executor: subject.Executor, sink: Recorded) -> None:
    for name, given in (("echo", {"value": 1}), ("block", {"seconds": 0})):
        run_id = uuid4()
        await run(executor, name, run_id=run_id, **given)
        assert sink.states(run_id) == ["Running", "Completed"]
    last = sink.events[-1]
    assert (last.label, last.type, list(last.parameters)) == ("block", "COMPLETED", ["seconds"])
    assert last.started_at
    assert last.ended_at


async def test_the_sink_keeps_the_last_state_of_each_run(executor: subject.Executor, sink: Recorded) -> None:
    for _ in range(5):
        await run(executor, "echo", value=1)
    assert sink.waiting == 5
    assert len(sink.events) == 10


async def test_our_runs_emit_no_events_and_the_tasks_they_call_do(executor: subject.Executor, sink: Recorded) -> None:
    """The engine publishes a run only in `set_state`; a called task still has Prefect's own."""
    await run(executor, "block", seconds=0)
    await run(executor, "fail", 3, kind="plain")
    assert sink.emitted == []
    run_id = uuid4()
    assert await run(executor, "parent", run_id=run_id) == Succeeded(b"1")
    assert [one.event for one in sink.emitted] == [
        f"prefect.task-run.{name}" for name in ("Pending", "Running", "Completed")
    ]
    assert sink.emitted[0].payload["task_run"]["task_inputs"]["__parents__"][0]["id"] == str(run_id)


async def test_logs_come_to_the_sink_with_their_run(executor: subject.Executor, sink: Recorded) -> None:
    run_id, failed = uuid4(), uuid4()
    await run(executor, "talk", run_id=run_id, words="hello")
    assert [line["message"] for line in sink.lines] == ["logged: hello", "printed: hello"]
    assert {line["task_run_id"] for line in sink.lines} == {str(run_id)}
    await run(executor, "fail", 3, run_id=failed, kind="plain")
    last = sink.lines[-1]["message"]
    assert "Retries are exhausted" in last, "the engine's own lines, which `use_run_logger` is for"
    assert last.endswith("ValueError: as asked � �"), "a line that is not text is kept"
    assert sink.lines[-1]["task_run_id"] == str(failed)


async def test_runs_share_no_mutable_state(executor: subject.Executor) -> None:
    """The models of Prefect's contexts are copies of one that was validated when the worker started."""
    first, second = [await run(executor, "itself") for _ in range(2)]
    assert isinstance(first, Succeeded)
    assert isinstance(second, Succeeded)
    one, other = json.loads(first.body), json.loads(second.body)
    assert not set(one["ids"]) & set(other["ids"])
    assert one["state"] != other["state"]
    assert one["count"] == other["count"] == 1


async def test_a_hook_can_ask_for_the_result(executor: subject.Executor) -> None:
    await run(executor, "hooked")
    assert ended == [5]


async def test_print_is_replaced_once(executor: subject.Executor) -> None:
    """Prefect replaces `print` around each run that logs prints; two overlapping runs would leave the second one's in
    place for ever."""
    before = print
    await asyncio.gather(*[run(executor, "talk", words=str(n)) for n in range(5)])
    assert print is before


async def test_an_attempt_parks_and_goes_on_as_the_same_run(executor: subject.Executor, sink: Recorded) -> None:
    run_id = uuid4()
    first = await run(executor, "flaky", run_id=run_id, name="p", fails=1)
    assert isinstance(first, Retry)
    assert 0 < first.delay <= 0.2
    assert (first.retries, first.problem.code) == (1, "temporarily_failed")
    second = await run(executor, "flaky", first.retries, run_id=run_id, name="p", fails=1)
    assert second == Succeeded(b"2")
    assert sink.states(run_id) == ["Running", "AwaitingRetry", "Running", "Completed"]
    assert sink.events[-1].attempts == 2, "Prefect shows one run with two attempts"


async def test_our_error_kinds_decide_about_retries(executor: subject.Executor) -> None:
    assert isinstance(await run(executor, "fail", kind="usage"), Failed)
    assert isinstance(await run(executor, "fail", kind="fatal"), Failed)
    assert isinstance(await run(executor, "fail", kind="plain"), Retry)
    assert isinstance(await run(executor, "fail", 3, kind="plain"), Failed)


async def test_a_value_that_is_not_json_fails_in_prefect_too(executor: subject.Executor, sink: Recorded) -> None:
    run_id = uuid4()
    assert isinstance(await run(executor, "unserialisable", run_id=run_id, kind="object"), Failed)
    assert sink.states(run_id)[-1] == "Failed"


async def test_a_message_that_is_not_text_does_not_lose_the_state(executor: subject.Executor, sink: Recorded) -> None:
    run_id = uuid4()
    failed = await run(executor, "fail", run_id=run_id, kind="usage")
    assert isinstance(failed, Failed)
    assert failed.problem.detail == "as asked � �"
    assert sink.states(run_id)[-1] == "Failed"


async def test_a_cached_value_is_by_name_json_and_shared(executor: subject.Executor, tmp_path: Path) -> None:
    payload = {"__class__": "subprocess.Popen", "data": ["touch", "pwned"]}
    for _ in range(2):
        assert await run(executor, "counted", name="c", payload=payload) == Succeeded(b"1")
    [record] = (tmp_path / "store" / "cache").rglob("*")
    assert json.loads(record.read_text())
    assert "prefect.serializers" not in record.read_text()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("reason", "state"), [("cancelled", "Cancelled"), ("released", "Released"), ("lost", "Running")]
)
async def test_a_stopped_execution_ends_at_once_and_publishes_why(
    executor: subject.Executor, sink: Recorded, reason: str, state: str
) -> None:
    run_id = uuid4()
    execution = asyncio.create_task(run(executor, "linger", run_id=run_id, name="for ever"))

    async def states() -> list[str]:
        return sink.states(run_id)

    await until(states, lambda seen: "Running" in seen)
    execution.cancel(reason)
    with pytest.raises(asyncio.CancelledError):
        await execution
    assert sink.states(run_id)[-1] == state


async def test_the_users_task_object_stays_as_it_was(tmp_path: Path) -> None:
    @task(tags={"a"}, result_storage_key="mine", retries=2)
    async def mine(x: int) -> int:
        return x

    before = dict(vars(mine))
    store = open_store(StoreSettings(url=f"file://{tmp_path}/store"))
    executor = subject.Executor({"mine": mine}, pool="default", max_attempts=3, store=store, threads=1)
    served = executor.registered["mine"]
    assert served.task.tags == set()
    assert vars(mine) == before
    assert mine.with_options(retries=5).retries == 5
    await store.aclose()


def test_names_route_runs_not_files_or_lines() -> None:
    source = "from prefect import task\n{}@task\ndef moved(x: int) -> int:\n    return x\n"
    names = []
    for text in (source.format(""), source.format("\n\n\n")):
        space: dict[str, Any] = {"__name__": "m"}
        exec(compile(text, f"{len(text)}.py", "exec"), space)
        names.append(space["moved"].name)
    assert names == ["moved", "moved"]


def test_discovery_names_the_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backcast.errors import ConfigurationError

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "clash_one.py").write_text("from prefect import task\n@task\ndef same(): ...\n")
    (tmp_path / "clash_two.py").write_text("from prefect import task\n@task\ndef same(): ...\n")
    (tmp_path / "broken_tasks.py").write_text("1 / 0")
    (tmp_path / "exiting_tasks.py").write_text("import sys; sys.exit('no licence')")
    with pytest.raises(ConfigurationError, match="Two tasks are named 'same'"):
        registry.discover(["clash_one", "clash_two"])
    with pytest.raises(ConfigurationError, match="ZeroDivisionError"):
        registry.discover(["broken_tasks"])
    with pytest.raises(ConfigurationError, match="SystemExit: no licence"):
        registry.discover(["exiting_tasks"])
    with pytest.raises(ConfigurationError, match="not_there"):
        registry.discover(["not_there"])
    assert list(registry.discover(["clash_one", "clash_one"])) == ["same"]


def test_the_examples_are_served_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    tasks = registry.discover(["shop_tasks"])
    assert set(tasks) == {"fetch_title", "word_frequencies", "reserve_stock"}
    served = {
        name: registry.prepare(one, pool="p", max_attempts=3, storage=cache.CacheStorage())
        for name, one in tasks.items()
    }
    assert served["reserve_stock"].type.retries == 4
    assert served["word_frequencies"].type.input_schema["properties"]["most"]["maximum"] == 1000
    assert served["fetch_title"].type.output_schema["properties"]["status"] == {"title": "Status", "type": "integer"}


async def test_events_wait_while_the_server_is_away_and_none_is_lost(tmp_path: Path) -> None:
    """Events beyond the limit of memory go to a file; a refused event does not hold up the others."""
    from backcast.history import sink as module

    posted: list[Any] = []
    answers = iter([503, 503])  # to the events, and to the probe

    async def post(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        events = json.loads(body)
        status = next(answers, 204)
        if any(event["event"] == "prefect.task-run.Bad" for event in events):
            status = 422
        if status == 204:
            posted.extend(event for event in events if event["event"] != "backcast.probe")
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body"})

    sink = module.Sink(Prefect(api_url="http://prefect/api"))
    sink.server._client = httpx.AsyncClient(transport=httpx.ASGITransport(post), base_url="http://prefect/api")
    total = module.IN_MEMORY + 50
    for n in range(total):
        kind = "Bad" if n == 7 else "Completed"
        resource = {"prefect.resource.id": f"prefect.task-run.{n}"}
        event = Event(event=f"prefect.task-run.{kind}", resource=resource, occurred=datetime.now(UTC))
        capture.Queue(sink).put(("event", event))
    assert sink._spool.count > 0
    assert sink.waiting == total
    with pytest.raises(httpx.HTTPStatusError):
        await sink._flush()
    await sink._flush()
    assert len({event["resource"]["prefect.resource.id"] for event in posted}) == total - 1
    await sink.aclose(1)
