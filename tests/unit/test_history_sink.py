"""The history sink against servers that refuse: what is sent, what is dropped, what is kept, with which credentials."""

import asyncio
import contextlib
import json
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prefect.events.schemas.events import Event

from backcast.history import sink as sink_module
from backcast.history.events import Change
from backcast.history.sink import BATCH, Sink
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


def names_in(body: bytes) -> list[str]:
    return [item.get("message") or item["resource"].get("prefect.resource.name", "probe") for item in json.loads(body)]


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
        names = names_in(body)
        self.posts += 1
        refused = self.for_all or any(name.startswith("bad") for name in names)
        if not refused:
            self.taken += [name for name in names if name != "probe"]
        await send({"type": "http.response.start", "status": self.status if refused else 204, "headers": []})
        await send({"type": "http.response.body", "body": b"because"})


def over(server: Refusing, *dropped: Callable[[str, int], object], **given: Any) -> Sink:
    sink = Sink(Prefect.model_validate({"api_url": "http://prefect/api", **given}), *dropped)
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
    return sink.dropped[why]


@pytest.mark.parametrize("bad", [{0}, {199}, {57, 58, 120}, {0, 1, 2, 3}, set(range(20))], ids=lambda bad: len(bad))
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
    await flushed(sink)
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
    assert server.posts < 50, "it is not asked about each item"
    assert sink.waiting == len(names)
    server.for_all = False
    await flushed(sink, 2)
    assert sorted(server.taken) == sorted([*names, *[f"line of {name}" for name in names]])
    assert dropped(sink, "refused") == 0


async def test_events_without_end_leave_a_turn_to_log_lines_and_come_together() -> None:
    """Each post takes longer than it is until the next event."""
    posts = list[tuple[str, int]]()

    def answer(request: httpx.Request) -> httpx.Response:
        posts.append((request.url.path, len(names_in(request.content))))
        sink.publish(change("while it is posted"))
        return httpx.Response(201)

    sink = over(Refusing(500))
    sink.server._client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://prefect/api")
    for n in range(BATCH + 50):
        sink.publish(change(f"event {n}"))
    sink.keep_log(line("hello"))
    async with asyncio.timeout(PATIENCE):
        await sink._flush()
    assert posts == [("/api/events", BATCH), ("/api/logs/", 1), ("/api/events", 52)]
    assert sink.waiting == 1, "what has come during the last post waits for the next time"


class _Closing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    taken: ClassVar[list[str]] = []

    def handle(self) -> None:
        self.handle_one_request()
        self.rfile.read(1)  # what comes next on this connection gets no answer

    def do_POST(self) -> None:
        names = names_in(self.rfile.read(int(self.headers["content-length"])))
        is_refused = any(name.startswith("bad") for name in names)
        if not is_refused:
            self.taken.extend(name for name in names if name != "probe")
        self.send_response(500 if is_refused else 201)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


async def test_a_server_that_closes_a_kept_connection_after_its_own_error_is_not_away() -> None:
    """As uvicorn does when the application raises."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Closing) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.02,))
        serving.start()
        sink = Sink(Prefect(api_url=f"http://127.0.0.1:{server.server_port}/api"))
        for name in ["good 1", "bad 2", "good 3"]:
            sink.keep_log(line(name))
        await flushed(sink)
        waiting = len(sink._logs)
        await sink.aclose(timeout=1)
        server.shutdown()
        serving.join()
    assert _Closing.taken == ["good 1", "good 3"]
    assert (dropped(sink, "refused"), waiting) == (1, 0)


@pytest.mark.parametrize("culprits", [{0}, {57}, {199}, {3, 150}], ids=str)
async def test_an_item_on_which_the_server_hangs_is_dropped_within_minutes(culprits: set[int]) -> None:
    """Nobody waits: the time that each post would have taken is added up."""
    taken, waited = list[str](), 0.0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal waited
        names = names_in(request.content)
        if any(f"line {n}" in names for n in culprits):
            waited += request.extensions["timeout"]["read"]
            raise httpx.ReadTimeout("", request=request)
        taken.extend(name for name in names if name != "probe")
        return httpx.Response(201)

    sink = over(Refusing(500))
    sink.server._client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://prefect/api")
    for n in range(200):
        sink.keep_log(line(f"line {n}"))
    await flushed(sink)
    assert sorted(taken) == sorted(f"line {n}" for n in range(200) if n not in culprits)
    assert dropped(sink, "refused") == len(culprits)
    assert waited < 240 * len(culprits), "seconds; a server that hangs for everything is known by the probe"


class Flapping:
    """A Prefect server on a real port that answers by a schedule: a status, 0 to reset the connection, or -1 to take
    the items and reset it. After the schedule it takes everything except the culprit."""

    def __init__(self, schedule: list[int], culprit: str | None) -> None:
        self.schedule, self.culprit = iter(schedule), culprit
        self.taken: list[str] = []
        self._connections: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await asyncio.gather(*self._connections)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.append(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
                names = names_in(await reader.readexactly(length))
                status = next(self.schedule, 201)
                if status in (-1, 201) and self.culprit in names:
                    status = 500
                if status in (-1, 201):
                    self.taken += names
                if status <= 0:
                    writer.transport.abort()
                    return
                writer.write(f"HTTP/1.1 {status} -\r\ncontent-length: 0\r\n\r\n".encode())


@example(pattern=[500, 503], times=20, culprit=None)
@example(pattern=[201, 500], times=200, culprit=None)
@example(pattern=[201, 500, 0, -1], times=50, culprit=17)
@given(
    pattern=st.lists(st.sampled_from([201, 500, 503, 0, -1]), min_size=1, max_size=40),
    times=st.integers(1, 12),
    culprit=st.none() | st.integers(0, 49),
)
@settings(max_examples=25, deadline=None, derandomize=True)
async def test_a_server_that_comes_and_goes_loses_no_good_line(
    pattern: list[int], times: int, culprit: int | None
) -> None:
    names = [f"line {n:02}" for n in range(50)]
    bad = None if culprit is None else names[culprit]
    async with Flapping(pattern * times, bad) as server:
        sink = Sink(Prefect.model_validate({"api_url": f"http://127.0.0.1:{server.port}/api"}))
        for name in names:
            sink.keep_log(line(name))
        tries = iter(range(len(pattern) * times + 3))
        while sink._logs and next(tries, None) is not None:
            await flushed(sink)
        assert not sink._logs, "nothing is tried for ever"
        await sink.aclose(timeout=PATIENCE)
        assert set(server.taken) - {"probe"} == {*names} - {bad}
        assert dropped(sink, "refused") == (bad is not None)


async def test_the_end_of_a_process_outlasts_a_server_that_comes_and_goes(caplog: pytest.LogCaptureFixture) -> None:
    async with Flapping([503, 0, 500, 503], culprit=None) as server:
        sink = Sink(Prefect.model_validate({"api_url": f"http://127.0.0.1:{server.port}/api"}))
        sink.publish(change("a run"))
        sink.keep_log(line("a line"))
        await sink.aclose(timeout=PATIENCE)
    assert {"a run", "a line"} <= set(server.taken)
    assert not caplog.records


async def test_only_what_is_lost_at_the_end_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    for lines in (0, 2):
        sink = Sink(Prefect(api_url="http://127.0.0.1:9/api"))
        sink.publish(change("the steward publishes its end"))
        for n in range(lines):
            sink.keep_log(line(f"line {n}"))
        await sink.aclose(timeout=PATIENCE)
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["2"]


async def test_refusals_are_seldom_reported(caplog: pytest.LogCaptureFixture) -> None:
    sink = over(Refusing(422))
    for n in range(10):
        sink.keep_log(line(f"bad {n}"))
        await flushed(sink)
    assert dropped(sink, "refused") == 10
    assert len(caplog.records) == 1
    assert "bad 0" in caplog.text


async def test_memory_and_disk_are_bounded_and_read_back_in_pieces() -> None:
    server = Refusing(503, for_all=True)
    reported = Counter[str]()
    sink = over(server, lambda why, count: reported.update({why: count}), spool=4 * 1024 * 1024)
    for n in range(12_000):
        sink.publish(change(f"item {n}", "x" * 3000))
        sink.keep_log(line("y" * 3000))
    assert sink._bytes <= sink_module.MEMORY
    assert sink._log_bytes <= sink_module.MEMORY
    assert 0 < sink._spool.size <= 4 * 1024 * 1024
    lost = dropped(sink, "no_room")
    assert sink.figures["spooled_bytes"] == sink._spool.size
    assert reported == sink.dropped == {"no_room": lost}
    assert lost > 0
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

    async def keep(path: str, batch: list[bytes], *, within: float) -> None:
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
