"""The history sink against servers that refuse: what is sent, what is dropped, what is kept, with which credentials."""

import contextlib
import json
import tempfile
import threading
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx
import pytest
from prefect.events.schemas.events import Event
from prometheus_client import CollectorRegistry

from backcast.history import sink as sink_module
from backcast.history.events import Change
from backcast.history.sink import Sink
from backcast.models import uuid7
from backcast.settings import Prefect
from tests.support.waiting import PATIENCE


class _Server(BaseHTTPRequestHandler):
    shown: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.shown.append(self.headers["authorization"])
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("given", "shown"),
    [({}, None), ({"auth_string": "me:a:b"}, "Basic bWU6YTpi"), ({"api_key": "pnu_secret"}, "Bearer pnu_secret")],
)
async def test_credentials(given: dict[str, str], shown: str | None) -> None:
    _Server.shown.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.02,))
        serving.start()
        sink = Sink(Prefect.model_validate({"api_url": f"http://127.0.0.1:{server.server_port}/api", **given}))
        sink.keep_log({"message": "hello"})
        await sink.aclose(timeout=PATIENCE)
        server.shutdown()
        serving.join()
    assert _Server.shown == [shown]
    assert ("PREFECT_API_KEY" in Prefect.model_validate(given).environment()) == ("api_key" in given)


class Refusing:
    """A Prefect server that answers for bad items, or for all, with these statuses."""

    def __init__(self, status: int, *, for_all: bool = False) -> None:
        self.status, self.for_all = status, for_all
        self.taken: list[str] = []
        self.posts = 0

    async def __call__(self, _: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        names = [item.get("message") or item["resource"]["prefect.resource.name"] for item in json.loads(body)]
        self.posts += 1
        refused = self.for_all or any(name.startswith("bad") for name in names)
        if not refused:
            self.taken += names
        await send({"type": "http.response.start", "status": self.status if refused else 204, "headers": []})
        await send({"type": "http.response.body", "body": b"because"})


def over(server: Refusing, **given: Any) -> Sink:
    sink = Sink(Prefect.model_validate({"api_url": "http://prefect/api", **given}))
    sink.server._client = httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url="http://prefect/api")
    return sink


def line(message: str) -> dict[str, Any]:
    return {"name": "n", "level": 20, "message": message, "timestamp": datetime.now(UTC).isoformat()}


def change(label: str, message: str = "") -> Change:
    at = datetime.now(UTC)
    return Change(
        run=uuid7(), task="t", label=label, type="RUNNING", name="Running", message=message, at=at, attempts=1, due=at
    )


async def flushed(sink: Sink, tries: int = 1) -> None:
    for _ in range(tries):
        with contextlib.suppress(httpx.HTTPError):
            await sink._flush()


def dropped(sink: Sink, why: str) -> float:
    return sink.dropped.labels(why)._value.get()


@pytest.mark.parametrize("bad", [{0}, {199}, {57, 58, 120}, {0, 1, 2, 3}, set(range(100))], ids=lambda bad: len(bad))
@pytest.mark.parametrize("status", [400, 401, 403, 409, 413, 418, 422, 500, 503])
@pytest.mark.parametrize("kind", ["event", "line"])
async def test_only_the_item_that_is_refused_is_dropped(
    bad: set[int], status: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = Refusing(status)
    sink = over(server)
    for n in range(200):
        name = f"bad {n}" if n in bad else f"good {n}"
        sink.publish(change(name)) if kind == "event" else sink.keep_log(line(name))
    await flushed(sink, 12 + len(bad))
    assert sorted(server.taken) == sorted(f"good {n}" for n in range(200) if n not in bad), "each of the others, once"
    assert sink.waiting == 0
    assert dropped(sink, "refused") == len(bad)
    assert f"bad {min(bad)}" in caplog.text
    assert "because" in caplog.text


@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
async def test_a_server_that_takes_nothing_loses_nothing(status: int) -> None:
    server = Refusing(status, for_all=True)
    sink = over(server)
    names = [f"item {n}" for n in range(450)]
    for name in names:
        sink.publish(change(name))
        sink.keep_log(line(f"line of {name}"))
    await flushed(sink, 8)
    assert server.posts < 250, "it is not asked about each item"
    assert sink.waiting == len(names)
    server.for_all = False
    await flushed(sink, 2)
    assert sorted(server.taken) == sorted([*names, *[f"line of {name}" for name in names]])
    assert dropped(sink, "refused") == 0


async def test_memory_and_disk_are_bounded_and_read_back_in_pieces() -> None:
    server = Refusing(503, for_all=True)
    sink = over(server, spool=4 * 1024 * 1024)
    for n in range(12_000):
        sink.publish(change(f"item {n}", "x" * 3000))
        sink.keep_log(line("y" * 3000))
    assert sink._bytes <= sink_module.MEMORY
    assert sink._log_bytes <= sink_module.MEMORY
    assert 0 < sink._spool.size <= 4 * 1024 * 1024
    lost = dropped(sink, "no_room")
    registry = CollectorRegistry()
    sink.measure(registry)
    assert registry.get_sample_value("backcast_history_spooled_bytes") == sink._spool.size
    assert registry.get_sample_value("backcast_history_dropped_total", {"why": "no_room"}) == lost > 0
    server.for_all = False
    await flushed(sink)
    assert len(server.taken) == 24_000 - lost
    assert "item 11999" in server.taken, "the latest are kept"
    assert sink._spool.size == sink._bytes == sink._log_bytes == 0


async def test_a_disk_without_room_costs_history_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = over(Refusing(503, for_all=True))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: open("/dev/full", "wb", 0))  # noqa: PTH123, SIM115
    for n in range(sink_module.IN_MEMORY + 10):
        sink.publish(change(f"item {n}"))
    assert dropped(sink, "no_room") > 0
    assert sink._spool.size == 0
    await sink.aclose(timeout=0)


NASTY = ["\ud800", "\udfff\ud800", "a\x00b", "\x00", "\U0001f600", "x" * 500_000, "\ud800" * 20_000, "\\ud800", ""]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
async def test_what_is_sent_is_clean(text: str) -> None:
    posted: list[bytes] = []
    sink = over(Refusing(200))

    async def keep(path: str, batch: list[bytes]) -> None:
        posted.extend(batch)

    sink.server.post = keep  # type: ignore[method-assign]
    sink.publish(replace(change(text, text), task=text, version=text, name=text, parameters=[text]))
    sink.keep_log(line(text) | {"name": text, "level": 2**70})
    event = Event(
        event="prefect.task-run.Completed",
        resource={"prefect.resource.id": "prefect.task-run.1", "prefect.resource.name": text},
        payload={"task_run": {"name": text, "tags": [text], text: [text, float("nan"), 10**30]}},
        occurred=datetime.now(UTC),
    )
    sink.keep_event("1", event)
    await sink._flush()
    assert len(posted) == 3
    for body in posted:
        assert len(body) < 1_500_000
        loaded = json.loads(body, parse_constant=pytest.fail)
        plain = json.dumps(loaded, ensure_ascii=False)
        assert "\\u0000" not in plain
        plain.encode()
