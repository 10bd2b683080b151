"""The client against a small stand-in for the API over real HTTP; both of its forms keep every promise."""

import asyncio
import inspect
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import httpx
import pytest
from pydantic import BaseModel

from backcast import delay, delay_async
from backcast.client import AsyncClient, Client, Filters, WaitTimeout, raise_for_state
from backcast.errors import (
    ClientError,
    ConfigurationError,
    IdempotencyConflict,
    InvalidInput,
    NoResult,
    NotFinished,
    RunError,
    TooManyWaiting,
    Unavailable,
    UnknownLane,
    UnknownRun,
    UnknownTask,
)
from backcast.models import Batch, Limits, Run, Selection, State, Submission, uuid7

DROP = 0
"""A status that closes the connection without an answer."""


@dataclass
class Seen:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


@dataclass
class Service:
    """A run advances by one state with every look. `troubles` are answered first, in order."""

    states: tuple[str, ...] = ("queued", "running", "completed")
    result: Any = 31
    error: dict[str, str] | None = None
    troubles: deque[int | tuple[int, str, Any]] = field(default_factory=deque)
    seen: list[Seen] = field(default_factory=list)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    keys: dict[str, tuple[Any, str]] = field(default_factory=dict)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict)
    lanes: dict[str, dict[str, Any]] = field(default_factory=dict)
    streams: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _route(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add_run(self, task: str = "add", **fields: Any) -> str:
        run_id = str(uuid7())
        moment = "2030-01-31T08:00:00Z"
        run = {"id": run_id, "task": task, "state": self.states[0], "owner": "default", "priority": 0, "attempts": 0}
        self.runs[run_id] = run | {"created_at": moment, "run_at": moment, "news": {"from": "a newer version"}} | fields
        return run_id

    def answer(self, seen: Seen) -> tuple[int, Any]:
        match seen.method, seen.path.split("/")[2:]:
            case "POST", ["tasks", name, "runs"]:
                return self._submit(name, seen)
            case "GET", ["tasks"]:
                return 200, {"items": [_TASK]}
            case "GET", ["tasks", "add"]:
                return 200, _TASK
            case "GET", ["runs"]:
                return self._page(seen.query)
            case "GET", ["runs", run_id] if run_id in self.runs:
                return 200, self._advance(run_id)
            case "GET", ["runs", run_id, "result"] if run_id in self.runs:
                match self.runs[run_id]["state"]:
                    case "completed":
                        return 200, self.result
                    case "failed":
                        return _problem(409, "no_result", "The run is failed.")
                    case _:
                        return _problem(409, "not_finished", "The run is queued.")
            case "GET", ["runs", run_id, "input"] if run_id in self.runs:
                return 200, {"a": 1}
            case "GET", ["runs", run_id, "attempts"] if run_id in self.runs:
                failed = {
                    "number": 1,
                    "fence": 1,
                    "outcome": "retrying",
                    "host": "h",
                    "traceback": "Traceback\nValueError",
                }
                failed |= {"error": {"code": "task_failed", "title": "t", "detail": "d"}}
                return 200, {"items": [failed, {"number": 2, "fence": 2, "outcome": "succeeded"}], "left_out": 0}
            case "GET", ["runs", run_id, "why"] if run_id in self.runs:
                return 200, {"code": "scheduled", "sentence": "It waits for its time.", "news": 1}
            case "GET", ["runs", run_id, "logs"] if run_id in self.runs:
                line = {
                    "at": "2030-01-31T08:00:00Z",
                    "level": "INFO",
                    "logger": "mine",
                    "message": "hello",
                    "attempt": 1,
                }
                printed = line | {"logger": "stdout", "message": "printed"}
                return 200, f"{json.dumps(line)}\n{json.dumps(printed)}\n".encode()
            case "POST", ["runs", kind] if kind in ("retry", "cancel"):
                if seen.body.get("dry_run"):
                    return 200, {"runs": 5, "more": False}
                return 202, _operation(kind, seen.body)
            case "POST", ["batches", batch_id, "retry"]:
                return 202, _operation("retry", {"batch": batch_id})
            case _, ["operations", _, *_]:
                return 200, _operation("retry", {"task": "add"}) | {"state": "completed"}
            case "GET", ["batches", _, "errors"]:
                return 200, b'{"line": 3, "code": "invalid_input"}\n'
            case "POST", ["runs", run_id, "retry"] if run_id in self.runs:
                return 202, self.runs[self.add_run(retry_of=run_id, **seen.body)]
            case "GET", ["runs" | "batches", noun_id, "events"] if noun_id in self.runs | self.batches:
                return 200, (self.streams.pop(0) if self.streams else "").encode()
            case "GET", ["batches", batch_id, "results"]:
                ids = [str(uuid7()) for _ in range(self.batches[batch_id]["size"])]
                wrong = {"code": "task_failed", "title": "t", "detail": "wrong row"}
                ends = [
                    {"state": "failed", "error": wrong},
                    *[{"state": "completed", "result": n} for n in range(1, 200)],
                ]
                return 200, "".join(
                    json.dumps({"id": run, **end}) + "\n" for run, end in zip(ids, ends, strict=False)
                ).encode()
            case "POST", ["runs", run_id, "cancel"] if run_id in self.runs:
                self.runs[run_id]["state"] = "cancelled"
                return 200, self.runs[run_id]
            case "POST", ["batches"]:
                if any(each.get("input", {}).get("data") == "refused" for each in seen.body):
                    return _problem(422, "invalid_input", "Line 1 is wrong: /input/data: too deep")
                batch = {"id": str(uuid7()), "owner": "default", "size": len(seen.body)}
                batch["states"] = {"completed": len(seen.body)}
                self.batches[batch["id"]] = batch | {"created_at": "2030-01-31T08:00:00Z"}
                return 202, self.batches[batch["id"]]
            case "GET", ["batches", batch_id]:
                return 200, self.batches[batch_id]
            case "POST", ["batches", batch_id, "cancel"]:
                return 200, self.batches[batch_id] | {"states": {"cancelled": 2}}
            case "GET", ["counts"]:
                flow = {"at": "2030-01-31T08:00:00Z", "submitted": 2, "ended": {"failed": 1}}
                counted = {"submitted": 2, "states": {"failed": 1, "queued": 1}}
                return 200, counted | {
                    "since": "2030-01-31T07:00:00Z",
                    "until": "2030-01-31T08:00:00Z",
                    "approximate": seen.query["within"] == "day",
                    "tasks": [counted | {"task": "add"}],
                    "errors": [{"task": "add", "code": "task_failed", "runs": 1}],
                    "flow": [flow],
                }
            case "GET", ["lanes"]:
                return 200, {"items": list(self.lanes.values())}
            case "PUT", ["lanes", name]:
                self.lanes[name] = {"name": name, "running": 0, "queued": 1, "held": 3, **seen.body}
                return 200, self.lanes[name]
            case "GET", ["lanes", name] if name in self.lanes:
                return 200, self.lanes[name]
            case "DELETE", ["lanes", name] if name in self.lanes:
                del self.lanes[name]
                return 204, None
            case "POST", [kind, name, "pause"]:
                return 200, {
                    "kind": kind[:-1],
                    "name": name,
                    "since": "2030-01-31T08:00:00Z",
                    "until": None,
                    "reason": "",
                    "by": "",
                    "running": "continue",
                    **seen.body,
                }
            case "POST", [_, _, "resume"]:
                return 204, None
            case "GET", ["pauses"]:
                pause = {"kind": "task", "name": "add", "reason": "why", "by": "", "running": "continue", "until": None}
                return 200, {"items": [pause | {"since": "2030-01-31T08:00:00Z"}]}
            case "POST", ["workers", _, "drain"]:
                return 202, None
            case _, ["lanes", *_]:
                return _problem(404, "unknown_lane", "This lane has no limits.")
            case _, ["runs", *_]:
                return _problem(404, "unknown_run", "There is no such run.")
            case _:
                return _problem(404, "unknown_task", "No worker has registered this task.")

    def _submit(self, name: str, seen: Seen) -> tuple[int, Any]:
        if name not in ("add", "create_structured_output"):
            return _problem(404, "unknown_task", f"No worker has registered {name}.")
        if seen.body.get("input", {}).get("a") == "wrong":
            fields = [{"pointer": "/input/a", "detail": "not a number"}, {"pointer": "/input/b", "detail": "missing"}]
            return _problem(422, "invalid_input", "/input/a: not a number.", errors=fields)
        before = self.keys.setdefault(seen.headers["idempotency-key"], (seen.body, ""))
        if before[0] != seen.body:
            return _problem(422, "idempotency_key_reused", "Use another key.")
        run_id = before[1] or self.add_run(name, owner=seen.body.get("owner", "default"))
        self.keys[seen.headers["idempotency-key"]] = (seen.body, run_id)
        return 202, self.runs[run_id]

    def _advance(self, run_id: str) -> dict[str, Any]:
        run = self.runs[run_id]
        at = self.states.index(run["state"])
        run["state"] = self.states[min(at + 1, len(self.states) - 1)]
        if run["state"] == "failed" and self.error:
            run["error"] = self.error
        return run

    def _page(self, query: dict[str, str]) -> tuple[int, Any]:
        start, size = int(query.get("cursor", 0)), int(query["limit"])
        found = [run for run in self.runs.values() if query.get("owner", run["owner"]) == run["owner"]]
        end = start + size
        return 200, {"items": found[start:end], "next_cursor": str(end) if end < len(found) else None}


_TASK = {
    "name": "add",
    "pool": "default",
    "description": "Add two numbers.\nSlowly.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "number"}, "note": {"type": "string"}},
        "required": ["a", "b"],
    },
    "timeout": "PT90S",
    "colour": "a newer version's",
}


def _problem(status: int, code: str, detail: str, **more: Any) -> tuple[int, Any]:
    return status, {"type": "about:blank", "title": code, "status": status, "code": code, "detail": detail, **more}


def _operation(kind: str, chosen: dict[str, Any]) -> dict[str, Any]:
    counts = {"done": 1, "skipped": 0, "failed": 0, "batch_id": str(uuid7())}
    moment = {"created_at": "2030-01-31T08:00:00Z"}
    return {"id": str(uuid7()), "kind": kind, "state": "running", "filter": chosen, **counts, **moment}


def _route(service: Service) -> type[BaseHTTPRequestHandler]:
    class Route(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            texts = body.splitlines() if headers.get("content-type") == "application/jsonl" else None
            parsed = json.loads(body or b"null") if texts is None else [json.loads(text) for text in texts]
            seen = Seen(self.command, url.path, query, headers, parsed)
            service.seen.append(seen)
            kind = "text/event-stream" if url.path.endswith("/events") else "application/json"
            match service.troubles.popleft() if service.troubles else None:
                case None:
                    status, document = service.answer(seen)
                case 0:
                    return
                case int(status):
                    status, document = _problem(status, "ledger_unavailable", "The database can't be reached.")
                case status, kind, document:
                    pass
            text = document if isinstance(document, bytes) or kind == "text/html" else json.dumps(document)
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "1")
            self.send_header("Content-Type", kind)
            self.end_headers()
            if status != 204:
                self.wfile.write(text if isinstance(text, bytes) else text.encode())

        do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # the names are the base class's

        def log_message(self, *_: object) -> None:
            pass

    return Route


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as running:
        yield running


Call = Callable[..., Any]
_MANY = ("list", "stream", "cast_many", "follow_logs")


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, service: Service) -> Call:
    """`call("get", run_id)` is that method of a new client of the service; `options` are the client's."""

    def sync_call(method: str, *given: Any, options: dict[str, Any] | None = None, **named: Any) -> Any:
        with Client(**({"url": service.url} | (options or {}))) as client:
            answer = getattr(client, method)(*given, **named)
            return list(answer) if method in _MANY else answer

    async def async_call(method: str, *given: Any, options: dict[str, Any] | None = None, **named: Any) -> Any:
        async with AsyncClient(**({"url": service.url} | (options or {}))) as client:
            answer = getattr(client, method)(*given, **named)
            return [each async for each in answer] if method in _MANY else await answer

    return sync_call if request.param == "sync" else lambda *a, **k: asyncio.run(async_call(*a, **k))


def test_a_submission_is_sent_as_it_is_and_with_a_key_of_its_own(call: Call, service: Service) -> None:
    first = call("submit", "add", {"a": 1, "b": 2.5})
    second = call("submit", "add", Submission(input={"a": 1, "b": 2.5}, owner="ana", priority=5))
    assert isinstance(first, Run)
    assert (first.state, second.owner) == (State.QUEUED, "ana")
    assert first.id != second.id
    assert [seen.body for seen in service.seen] == [
        {"input": {"a": 1, "b": 2.5}},
        {"input": {"a": 1, "b": 2.5}, "owner": "ana", "priority": 5},
    ]


def test_the_same_key_is_the_same_run(call: Call) -> None:
    first = call("submit", "add", {"a": 1}, key="order 7")
    assert call("submit", "add", {"a": 1}, key="order 7").id == first.id
    with pytest.raises(IdempotencyConflict, match="another key"):
        call("submit", "add", {"a": 2}, key="order 7")


def test_a_submission_survives_an_outage_and_is_made_once(call: Call, service: Service) -> None:
    service.troubles.extend([503, DROP, 429])
    run = call("submit", "add", {"a": 1})
    assert list(service.runs) == [str(run.id)]
    assert len({seen.headers["idempotency-key"] for seen in service.seen}) == 1
    assert len(service.seen) == 4


def test_options_are_fields_of_the_submission(call: Call, service: Service) -> None:
    call("submit", "add", {"a": 1}, lane="gpu", owner="ana", deadline=datetime(2030, 1, 31, tzinfo=UTC))
    call("submit", "add", Submission(input={"a": 1}, owner="bob", priority=1), lane="gpu")
    assert [seen.body for seen in service.seen] == [
        {"input": {"a": 1}, "owner": "ana", "lane": "gpu", "deadline": "2030-01-31T00:00:00Z"},
        {"input": {"a": 1}, "owner": "bob", "lane": "gpu", "priority": 1},
    ]
    with pytest.raises(InvalidInput, match="priority: "):
        call("submit", "add", {}, priority=1000)


@pytest.mark.parametrize(
    ("method", "given", "wrong", "meant"),
    [
        ("cast", ("data", int), "timout", "timeout"),
        ("cast", ("data", int), "instruction", "instructions"),
        ("wait", (uuid7(),), "progres", "progress"),
        ("submit", ("add", {}), "prioriti", "priority"),
        ("submit", ("add", Submission()), "keys", "key"),
        ("submit_many", ("add", []), "run_it", "run_at"),
        ("list", (), "onwer", "owner"),
    ],
)
def test_an_unknown_option_is_refused_before_anything_is_sent(
    call: Call, service: Service, method: str, given: Any, wrong: str, meant: str
) -> None:
    with pytest.raises(TypeError, match=rf"{method}\(\) takes no option '{wrong}'. Did you mean {meant}\?"):
        call(method, *given, **{wrong: 3})
    assert service.seen == []


@pytest.mark.parametrize("form", [Client, AsyncClient])
def test_an_unknown_option_of_a_client_is_refused(form: type[Client] | type[AsyncClient]) -> None:
    with pytest.raises(TypeError, match=r"Client\(\) takes no option 'pateince'. Did you mean patience\?"):
        form(pateince=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'api_key'\. It takes headers, patience"):
        form(api_key="k")  # type: ignore[arg-type]


def test_both_clients_have_the_same_methods() -> None:
    def methods(form: type) -> dict[str, list[str]]:
        public = [name for name in dir(form) if not name.startswith("_") and name not in ("close", "aclose")]
        return {name: list(inspect.signature(getattr(form, name)).parameters) for name in public}

    assert methods(Client) == methods(AsyncClient)
    assert methods(Client)["retry"] == ["self", "run_id", "key", "changes"]
    assert inspect.signature(Client.retry).return_annotation is Run
    assert all(getattr(Client, name).__doc__ for name in methods(Client))


def test_many_are_one_request(call: Call, service: Service) -> None:
    service.troubles.append(503)
    batch = call("submit_many", "add", [{"a": 1}, Submission(input={"a": 2}, priority=3)], owner="ana")
    assert isinstance(batch, Batch)
    assert batch.size == 2
    sent = service.seen[-1]
    assert sent.query == {"task": "add"}
    assert sent.body == [{"input": {"a": 1}, "owner": "ana"}, {"input": {"a": 2}, "owner": "ana", "priority": 3}]
    assert len({seen.headers["idempotency-key"] for seen in service.seen}) == 1
    assert call("batch", batch.id) == batch
    assert call("cancel_batch", batch.id).states == {State.CANCELLED: 2}
    call("list", batch=batch.id)
    assert service.seen[-1].query == {"batch": str(batch.id), "limit": "100"}


def test_counts(call: Call, service: Service) -> None:
    found = call("counts")
    assert (found.submitted, found.states, found.approximate) == (2, {State.FAILED: 1, State.QUEUED: 1}, False)
    assert (found.tasks[0].task, found.errors[0].code, found.flow[0].submitted) == ("add", "task_failed", 2)
    assert call("counts", "day").approximate
    assert [seen.query["within"] for seen in service.seen] == ["hour", "day"]


def test_lanes(call: Call, service: Service) -> None:
    assert call("lanes") == []
    lane = call("limit_lane", "a/b", Limits(max_running=2))
    assert service.seen[-1].body == {"max_running": 2, "max_per_minute": None}
    assert (lane.name, lane.max_running, lane.held) == ("a%2Fb", 2, 3)
    assert call("lane", "a/b") == lane
    assert call("lanes") == [lane]
    assert call("lift_lane", "a/b") is None
    with pytest.raises(UnknownLane):
        call("lane", "a/b")


def test_a_run_is_repeated_with_changes(call: Call, service: Service) -> None:
    run_id = service.add_run()
    assert call("input", run_id) == {"a": 1}
    run = call("retry", run_id, key="mine", input={"a": 2}, priority=5)
    assert (str(run.retry_of), run.priority) == (run_id, 5)
    assert service.seen[-1].body == {"input": {"a": 2}, "priority": 5}
    assert service.seen[-1].headers["idempotency-key"] == "mine"
    with pytest.raises(TypeError, match="Did you mean priority"):
        call("retry", run_id, prioritty=5)
    with pytest.raises(InvalidInput, match="priority"):
        call("retry", run_id, priority=1000)
    first, second = call("attempts", run_id).items
    assert (first.outcome, first.error.code, second.outcome) == ("retrying", "task_failed", "succeeded")


def _sent(*events: tuple[str, str, Any]) -> str:
    return "".join(f"id: {id_}\nevent: {name}\ndata: {json.dumps(data)}\n\n" for id_, name, data in events)


def test_a_stream_goes_on_where_it_was_cut_off(call: Call, service: Service) -> None:
    run_id = service.add_run()
    whole = [("1", "queued", {}), ("2", "started", {"attempt": 1}), ("3", "ended", {"run": {"state": "completed"}})]
    cut = ": hello\nretry: 10\n\n" + _sent(*whole[:1]) + "id: 2\nevent: started\ndata: {"
    service.streams += [cut, "", _sent(*whole[1:])]
    assert [(event.name, event.data) for event in call("stream", run_id)] == [(name, data) for _, name, data in whole]
    lasts = [seen.headers.get("last-event-id") for seen in service.seen if seen.path.endswith("/events")]
    assert lasts == [None, "1", "1"]
    with pytest.raises(UnknownRun):
        call("stream", uuid7())


def test_a_log_that_is_followed_has_each_line_once(call: Call, service: Service) -> None:
    run_id = service.add_run()
    line = {"at": "2030-01-31T08:00:00Z", "level": "INFO", "logger": "mine", "message": "1", "attempt": 1}
    first, second = ("1~1.5", "log", line), ("1~1.9", "log", line | {"message": "2", "colour": "a newer version's"})
    ended = ("end", "ended", {"run": {"state": "completed"}})
    service.streams += ["retry: 10\n\n" + _sent(("1", "started", {"attempt": 1}), first), _sent(second, ended)]
    assert [found.message for found in call("follow_logs", run_id)] == ["1", "2"]
    asked = [(seen.query, seen.headers.get("last-event-id")) for seen in service.seen if seen.path.endswith("/events")]
    assert asked == [({"logs": "true"}, None), ({"logs": "true"}, "1~1.5")]


def test_many_rows_are_cast_in_their_order_and_one_that_fails_ends_no_other(call: Call, service: Service) -> None:
    rows = (f"row {n}" for n in range(250))
    looks = list[tuple[int, int]]()
    results = call("cast_many", rows, int, "count", owner="ana", progress=lambda *look: looks.append(look))
    assert [result.value for result in results[:3]] == [None, 1, 2]
    assert [len([r for r in results if r.error]), len(results)] == [10, 250]
    assert "wrong row" in str(results[0].error)
    sent = [seen.body for seen in service.seen if seen.method == "POST"]
    assert [len(body) for body in sent] == [25] * 10
    assert (looks[0], looks[9], looks[-1]) == ((0, 25), (0, 250), (250, 250))
    assert looks == sorted(looks)
    assert sent[0][0]["owner"] == "ana"
    assert sent[0][0]["input"] == {"data": "row 0", "target": {"type": "integer"}, "instructions": "count"}
    with pytest.raises(TypeError, match="Did you mean owner"):
        call("cast_many", [1], int, ownr="ana")


def test_a_row_that_is_no_json_or_is_refused_ends_no_other(call: Call) -> None:
    rows = [{"n": n} for n in range(60)] + ["refused", {"n": math.nan}, {"n": b"bytes"}, {"n": 63}]
    results = call("cast_many", iter(rows), int)
    assert [place for place, result in enumerate(results) if result.id is None] == [60, 61, 62]
    assert len(results) == len(rows)
    assert {result.error.code for result in results[60:63]} == {"invalid_input"}
    assert "too deep" in str(results[60].error)
    assert "not plain JSON" in str(results[61].error)
    with pytest.raises(InvalidInput, match="too deep"):
        call("cast_many", ["refused"] * 30, int)


def test_a_page_in_the_place_of_a_stream_is_refused(call: Call, service: Service) -> None:
    service.troubles.append((200, "text/html", b"<html>Sign in</html>"))
    with pytest.raises(ConfigurationError, match="no stream of events"):
        call("stream", service.add_run())


def test_delay_is_called_as_the_task_is(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCAST_URL", service.url)
    monkeypatch.setenv("BACKCAST_API_KEY", "the-key")

    def add(a: int, b: date | None = None, **rest: int) -> int:
        raise AssertionError

    future = delay(add, 1, b=date(2030, 1, 31), c=3)
    assert service.seen[-1].body == {"input": {"a": 1, "b": "2030-01-31", "c": 3}}
    assert service.seen[-1].headers["authorization"] == "Bearer the-key"
    assert (future.wait(timeout=60).state, future.result(timeout=60)) == (State.COMPLETED, service.result)
    again = asyncio.run(delay_async("add", a=1))
    assert asyncio.run(again.result_async()) == service.result
    assert again.task_run_id != future.task_run_id
    for wrong in (lambda: delay(add, 1, 2, 3), lambda: delay(add), lambda: delay("add", 1)):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(UnknownTask):
        delay("nope")
    service.states, service.error = ("failed",), {"code": "task_failed", "title": "t", "detail": "no"}
    failed = delay(add, 2)
    with pytest.raises(RunError, match="no"):
        failed.result()
    assert failed.result(raise_on_failure=False) is None


def test_why_and_logs(call: Call, service: Service) -> None:
    run_id = service.add_run()
    assert call("why", run_id).sentence == "It waits for its time."
    assert [(line.logger, line.message) for line in call("logs", run_id)] == [("mine", "hello"), ("stdout", "printed")]


def test_many_runs_at_once(call: Call, service: Service) -> None:
    assert call("retry_many", key="k", task="add", state="failed").kind == "retry"
    assert service.seen[-1].body == {"task": "add", "state": "failed"}
    assert service.seen[-1].headers["idempotency-key"] == "k"
    assert call("cancel_many", batch=uuid7()).kind == "cancel"
    assert (call("count_to_retry", task="add").runs, call("count_to_cancel", owner="ana").runs) == (5, 5)
    assert service.seen[-1].body == {"owner": "ana", "dry_run": True}
    assert call("operation", uuid7()).done == 1
    assert call("stop_operation", uuid7()).done == 1
    assert call("retry_batch", uuid7()).batch_id
    assert call("batch_errors", uuid7()) == [{"line": 3, "code": "invalid_input"}]
    assert call("submit_lines", b'{"a": 1}\n', task="add", on_error="skip").size == 1
    assert service.seen[-1].query == {"task": "add", "on_error": "skip"}
    with pytest.raises(TypeError, match="Did you mean owner"):
        call("retry_many", ownr="ana")


def test_levers(call: Call, service: Service) -> None:
    [paused] = call("pauses")
    assert (paused.kind, paused.name, paused.reason) == ("task", "add", "why")
    pause = call("pause", "lane", "a/b", reason="why", running="release")
    assert (pause.kind, pause.reason) == ("lane", "why")
    assert service.seen[-1].body == {"reason": "why", "running": "release"}
    assert call("resume", "pool", "default") is None
    assert call("drain", uuid7()) is None
    with pytest.raises(TypeError, match="Did you mean reason"):
        call("pause", "lane", "a", reson="why")
    with pytest.raises(ValueError, match="tasks"):
        call("pause", "tasks", "a")


def test_a_full_queue_is_waited_for_and_then_raised(call: Call, service: Service) -> None:
    full = (429, "application/problem+json", {"code": "too_many_waiting", "title": "Full", "detail": "Ask again."})
    service.troubles.append(full)
    assert call("submit", "add", {"a": 1}).state is State.QUEUED
    service.troubles.append(full)
    with pytest.raises(TooManyWaiting, match="Ask again") as caught:
        call("submit", "add", {"a": 1}, options={"patience": 0})
    assert caught.value.retry_after.total_seconds() == 1


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (503, "The database can't be reached."),
        (429, "The database can't be reached."),
        (500, "The database can't be reached."),
        (DROP, "can't be reached .*: is the service running there"),
        ((502, "text/html", "<h1>Bad gateway</h1>"), "answered 502 Bad Gateway"),
    ],
)
def test_patience_has_an_end(call: Call, service: Service, trouble: Any, sentence: str) -> None:
    service.troubles.append(trouble)
    with pytest.raises(Unavailable, match=sentence):
        call("get", uuid7(), options={"patience": 0})


def test_no_service_at_the_url(call: Call) -> None:
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:1 can't be reached"):
        call("tasks", options={"url": "http://127.0.0.1:1", "patience": 0.2})


def test_waiting_reports_every_look_and_survives_an_outage(call: Call, service: Service) -> None:
    run_id, looks = service.add_run(), []
    service.troubles.extend([503, DROP])
    run = call("wait", run_id, progress=lambda run: looks.append((run.state, service.troubles.append(503))[0]))
    assert run.state is State.COMPLETED
    assert looks == [State.RUNNING, State.COMPLETED]
    assert service.seen[0].headers["prefer"] == "wait=2"


def test_without_progress_the_service_holds_the_poll(call: Call, service: Service) -> None:
    call("wait", service.add_run())
    assert service.seen[0].headers["prefer"] == "wait=20"


def test_waiting_has_an_end(call: Call, service: Service) -> None:
    service.states = ("running",)
    run_id, began = service.add_run(), time.monotonic()
    with pytest.raises(WaitTimeout, match=f"Run {run_id} is still running after 0.3 s"):
        call("wait", run_id, timeout=0.3)
    looks, took = len(service.seen), time.monotonic() - began
    assert 1 <= looks <= 2 + took / 0.25, "four looks per second, and one at the end"


def test_a_result(call: Call, service: Service) -> None:
    run_id = service.add_run()
    with pytest.raises(NotFinished):
        call("result", run_id)
    call("wait", run_id)
    assert call("result", run_id) == 31


def test_there_will_be_no_result(call: Call, service: Service) -> None:
    with pytest.raises(NoResult):
        call("result", service.add_run(state="failed"))


def test_cancel(call: Call, service: Service) -> None:
    run = call("cancel", service.add_run())
    assert run.state is State.CANCELLED
    with pytest.raises(RunError, match="was cancelled"):
        raise_for_state(run)


def test_tasks(call: Call) -> None:
    (task,) = call("tasks")
    assert task == call("task", "add")
    assert task.timeout.total_seconds() == 90
    with pytest.raises(UnknownTask):
        call("task", "a/b?c")


@pytest.mark.parametrize(("limit", "pages"), [(None, 3), (150, 2), (100, 1), (1, 1), (0, 0)])
def test_a_list_is_read_page_by_page(call: Call, service: Service, limit: int | None, pages: int) -> None:
    ids = [service.add_run() for _ in range(250)]
    assert [str(run.id) for run in call("list", limit=limit)] == ids[:limit]
    assert len(service.seen) == pages


def test_a_list_can_be_narrowed(call: Call, service: Service) -> None:
    service.add_run()
    ours = service.add_run(owner="ana")
    assert [str(run.id) for run in call("list", owner="ana", state=State.QUEUED, task=None)] == [ours]
    assert service.seen[0].query == {"owner": "ana", "state": "queued", "limit": "100"}
    call("list", **_FILTERS)
    assert service.seen[-1].query == {**_QUERY, "metadata.team": "a", "metadata.x y": "", "limit": "100"}


_MOMENT = datetime(2030, 1, 31, 8, tzinfo=timezone(timedelta(hours=2)))
_WRITTEN = {"task": "add", "owner": "ana", "batch": str(UUID(int=1)), "lane": "gpu", "worker": str(UUID(int=2))}
_WRITTEN |= {"error": "timeout", "text": "too long", "state": "failed"}
_TIMES = ("created_after", "created_before", "ended_after", "ended_before")
_FILTERS: dict[str, Any] = {**_WRITTEN, "batch": UUID(int=1), **dict.fromkeys(_TIMES, _MOMENT)}
_FILTERS |= {"metadata": {"team": "a", "x y": ""}}
_QUERY = {**_WRITTEN, **dict.fromkeys(_TIMES, "2030-01-31T06:00:00Z")}


def test_many_runs_are_chosen_by_the_filters_of_the_list(call: Call, service: Service) -> None:
    assert set(_FILTERS) == set(Filters.__annotations__) == set(Selection.model_fields)
    for method in ("retry_many", "count_to_retry"):
        call(method, **_FILTERS)
        assert service.seen[-1].body == {**_QUERY, "metadata": _FILTERS["metadata"]} | (
            {"dry_run": True} if method == "count_to_retry" else {}
        )
    call("cancel_many", lane="gpu", created_before=datetime(2030, 1, 31), owner=None)
    sent = service.seen[-1].body
    assert (sent.pop("created_before"), sent) == (
        datetime(2030, 1, 31).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        {"lane": "gpu"},
    )
    with pytest.raises(TypeError, match="no option 'ended_after'"):
        call("cancel_many", ended_after=_MOMENT)
    with pytest.raises(InvalidInput, match="state: "):
        call("retry_many", state="running")


class Box(BaseModel):
    size: int
    broken: bool = False


@pytest.mark.parametrize(
    ("target", "answer", "value"),
    [
        ("int", 31, 31),
        ({"type": "integer"}, 31, 31),
        (int, 31, 31),
        (list[str], ["a"], ["a"]),
        (tuple[int, int], [1, 2], (1, 2)),
        (Box, {"size": 3, "broken": True}, Box(size=3, broken=True)),
        (list[Box], [{"size": 3}], [Box(size=3)]),
    ],
)
def test_cast_to_a_name_a_schema_or_a_python_type(
    call: Call, service: Service, target: Any, answer: Any, value: Any
) -> None:
    service.result = answer
    assert call("cast", "twelve boxes", target, "count them") == value
    sent = service.seen[0].body["input"]
    assert (sent["data"], sent["instructions"]) == ("twelve boxes", "count them")
    if target is Box:
        assert sent["target"]["required"] == ["size"]


def test_a_failed_cast_shows_why(call: Call, service: Service) -> None:
    service.states = ("queued", "failed")
    service.error = {"code": "unusable_input", "title": "No", "detail": "there is no number", "hint": "newer"}
    with pytest.raises(RunError, match="failed: there is no number") as caught:
        call("cast", "nothing", int)
    assert caught.value.code == "unusable_input"


def test_a_refusal_is_the_error_it_was(call: Call, service: Service) -> None:
    with pytest.raises(UnknownRun):
        call("get", "not a run/at all")
    with pytest.raises(InvalidInput) as caught:
        call("submit", "add", {"a": "wrong"})
    assert [field.pointer for field in caught.value.errors] == ["/input/a", "/input/b"]


def test_an_unknown_refusal_keeps_its_code(call: Call, service: Service) -> None:
    document = {"title": "I'm a teapot", "code": "teapot", "detail": "Short and stout."}
    service.troubles.append((418, "application/problem+json", document))
    with pytest.raises(ClientError, match="Short and stout") as caught:
        call("tasks")
    assert (caught.value.code, caught.value.status) == ("teapot", 418)


@pytest.mark.parametrize(
    "answer",
    [
        (200, "text/html", "<h1>It works!</h1>"),
        (404, "text/html", "<h1>Not found</h1>"),
        (404, "application/json", {"detail": "Not Found"}),
        (200, "application/json", {"items": [{"name": "add"}]}),
        (200, "application/json", []),
    ],
)
def test_another_service_at_the_url(call: Call, service: Service, answer: Any) -> None:
    service.troubles.append(answer)
    with pytest.raises(ConfigurationError, match=r"does not answer as backcast does .*: check the URL"):
        call("tasks")


@pytest.mark.parametrize("url", ["localhost:8000", "/v1", "ftp://host", "http://", "http://host:port", "http://[::1"])
def test_a_wrong_url(call: Call, url: str) -> None:
    with pytest.raises(ConfigurationError, match="write it as http://host:port"):
        call("tasks", options={"url": url})


@pytest.mark.parametrize("value", [math.nan, object(), "\ud800"])
def test_only_json_is_sent(call: Call, service: Service, value: Any) -> None:
    with pytest.raises(InvalidInput, match="not plain JSON"):
        call("submit", "add", {"a": value})
    assert service.seen == []


@pytest.mark.parametrize("key", ["", "zwölf", "a\nb"])
def test_a_key_that_is_no_header(call: Call, service: Service, key: str) -> None:
    with pytest.raises(InvalidInput, match="printable ASCII"):
        call("submit", "add", {}, key=key)


@pytest.mark.parametrize("value", ["Bearer a\nb", "Bearer ключ"])
def test_a_header_that_can_not_be_sent_is_named_and_not_shown(call: Call, service: Service, value: str) -> None:
    with pytest.raises(ConfigurationError, match="The header Authorization can't be sent") as caught:
        call("tasks", options={"headers": {"Authorization": value}})
    assert value not in str(caught.value)
    assert service.seen == []


def test_headers_go_along_and_a_prefix_is_kept(call: Call, service: Service) -> None:
    with pytest.raises(UnknownTask):
        call("get", UUID(int=0), options={"url": f"{service.url}/prefix/", "headers": {"Authorization": "Bearer x"}})
    assert service.seen[0].headers["authorization"] == "Bearer x"
    assert service.seen[0].path.startswith("/prefix/v1/runs/")


def test_loopback_is_never_reached_through_a_proxy(
    call: Call, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    assert call("tasks", options={"patience": 0})


async def test_a_call_waits_for_a_connection_as_long_as_it_takes() -> None:
    """With 300 that wait for long runs, the last has its turn after two minutes: the service is not silent."""

    limits = list[float | None]()

    class Answering(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            limits.append(request.extensions["timeout"]["pool"])
            return httpx.Response(404, json={"code": "unknown_run", "title": "t", "detail": "d"})

    async with AsyncClient("http://backcast.example", transport=Answering()) as client:
        for call in (client.get(uuid7()), client.wait(uuid7()), client.wait(uuid7(), timeout=5)):
            with pytest.raises(UnknownRun):
                await call
    assert limits[:2] == [None, None]
    assert limits[2] is not None, "its own time is over first"
