"""Requests that arrive slowly, over raw sockets: each part has a deadline, and what is fast enough is served."""

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from backcast.api.server import protocol
from backcast.settings import Api
from tests.support.stack import Stack, stack
from tests.support.waiting import PATIENCE, until

POST = b"POST /v1/tasks/echo/runs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def deadlines() -> dict[str, str]:
    return {"BACKCAST_API__HEADER_TIMEOUT": "1", "BACKCAST_API__BODY_TIMEOUT": "1"}


@pytest.fixture
async def served(database: str, deadlines: dict[str, str], tmp_path: Path) -> AsyncIterator[Stack]:
    async with stack(database, tmp_path, **deadlines) as running:
        await running.up("api")
        yield running


async def answer(served: Stack, *, first: bytes, then: bytes = b"x") -> tuple[int, bytes]:
    """Send `first`, then `then` again and again until the connection is closed: the last status, and all that came."""
    url, loop, got = served.http.base_url, asyncio.get_running_loop(), b""
    with socket.create_connection((url.host, url.port)) as connection:  # a stream forgets what came before a reset
        connection.setblocking(False)

        async def dribble() -> None:
            while True:
                await loop.sock_sendall(connection, then)
                await asyncio.sleep(0.05)  # the pace of the client, far below each deadline

        async with asyncio.timeout(PATIENCE):
            await loop.sock_sendall(connection, first)
            dribbling = asyncio.create_task(dribble())
            with contextlib.suppress(ConnectionError):
                while piece := await loop.sock_recv(connection, 65_536):
                    got += piece
            dribbling.cancel()
            await asyncio.gather(dribbling, return_exceptions=True)
    statuses = re.findall(rb"HTTP/1\.1 (\d+) ", got)
    return int(statuses[-1]) if statuses else 0, got


async def test_a_request_that_arrives_slowly_is_ended(served: Stack) -> None:
    for first, status in (
        (GET + b"X-Long: ", 408),
        (GET + b"\r\n" + GET + b"X-Long: ", 408),  # the second one on its connection
        (POST + b"Content-Length: 1000\r\n\r\n{", 408),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n", 415),  # refused unread
        (b"POST /tasks HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 1000\r\n\r\n", 403),
    ):
        assert (await answer(served, first=first))[0] == status, first
    closed, _ = await answer(served, first=b"", then=b"\r\n")
    assert closed == 408, "empty lines are no request"


async def test_the_refusal_is_a_problem_document(served: Stack) -> None:
    _, got = await answer(served, first=POST + b"Content-Length: 1000\r\n\r\n{")
    head, _, body = got.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert json.loads(body)["code"] == "request_too_slow"


async def test_a_head_is_bounded(served: Stack) -> None:
    status, got = await answer(served, first=GET + b"X-Long: " + b"x" * 100_000, then=b"x" * 10_000)
    assert (status, b"head_too_large" in got) == (431, True)


async def test_the_time_in_which_the_server_does_not_read_is_not_the_clients() -> None:
    """A body fills the server's buffer, and the application reads on only after the body's deadline."""
    body, read_on = b"x" * 4_000_000, asyncio.Event()

    async def app(_: Any, receive: Any, send: Any) -> None:
        await read_on.wait()
        length, more = 0, True
        while more:
            message = await receive()
            length, more = length + len(message.get("body", b"")), message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(length).encode()})

    limits = Api(body_timeout=timedelta(seconds=2))
    config = uvicorn.Config(app, http=protocol(limits, slowest=1 << 60), lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await asyncio.sleep(4)  # twice the deadline
        read_on.set()
        async with asyncio.timeout(PATIENCE):
            got = await reader.read()
        writer.close()
        server.should_exit = True
        await serving
    assert got.startswith(b"HTTP/1.1 200 "), got
    assert b"4000000" in got


@pytest.mark.parametrize("size", [60_000, 50_000_000], ids=["small", "large"])
@pytest.mark.parametrize("then", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
async def test_a_reader_that_takes_nothing_of_an_answer_is_cut_off(size: int, then: bytes) -> None:
    asked = asyncio.Event()

    async def app(_: Any, __: Any, send: Any) -> None:
        asked.set()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2):
            await send({"type": "http.response.body", "body": b"x" * size, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(app, http=protocol(Api(), stuck=0.5), lifespan="off", log_config=None, timeout_keep_alive=1)
    server = uvicorn.Server(config)

    async def connections() -> int:
        return len(server.server_state.connections)

    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as stuck:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        stuck.connect(listening.getsockname())
        stuck.sendall(GET + then + b"\r\n")
        await asked.wait()
        await until(connections, lambda left: not left)
        with contextlib.suppress(ConnectionResetError):
            got = sum(iter(lambda: len(stuck.recv(65_536)), 0))
            assert got < 2 * size
        server.should_exit = True
        await serving


async def test_a_reader_that_takes_an_answer_slowly_gets_all_of_it() -> None:
    """The server's own buffer empties a megabyte at a time, which takes this reader more than two looks."""
    size = 6_000_000

    async def app(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": b"x" * size})

    server = uvicorn.Server(uvicorn.Config(app, http=protocol(Api(), stuck=1), lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        slow.setblocking(False)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        loop, got = asyncio.get_running_loop(), 0
        await loop.sock_connect(slow, listening.getsockname())
        await loop.sock_sendall(slow, GET + b"\r\n")
        while got < size:
            piece = await loop.sock_recv(slow, 32_768)
            assert piece, f"cut off after {got} bytes"
            got += len(piece)
            await asyncio.sleep(0.06)
        server.should_exit = True
        await serving


async def test_what_is_not_http_gets_a_problem_document(served: Stack) -> None:
    connect = [
        b"CONNECT %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % to for to in (b"localhost:1", b"/v1/runs", b"/livez")
    ]
    for first in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET\r\n\r\n", GET + b"no colon\r\n\r\n", *connect):
        status, got = await answer(served, first=first, then=b"")
        assert (status, b"application/problem+json" in got, b"malformed_request" in got) == (400, True, True), first
        assert got.count(b"HTTP/1.1 ") == 1


async def test_a_body_that_comes_steadily_has_the_time_it_needs(served: Stack) -> None:
    url = served.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    body = b'{"input": {}}' + b" " * 900_000
    writer.write(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
    began = time.monotonic()
    for start in range(0, len(body), 30_000):
        writer.write(body[start : start + 30_000])
        await writer.drain()
        await asyncio.sleep(0.1)
    assert time.monotonic() - began > 2, "twice as long as a small body may take"
    async with asyncio.timeout(PATIENCE):
        got = await reader.read()
    writer.close()
    assert got.startswith((b"HTTP/1.1 503 ", b"HTTP/1.1 404 ")), got  # it was read; no worker has the task


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
"""As Java's client sends it with each request."""


@pytest.mark.parametrize(
    "pieces",
    [
        (POST + OFFER + b"Content-Length: 13\r\n\r\n", b'{"input": {}}'),
        (POST + OFFER + b"Content-Length: 13\r\n\r\n" + b'{"input": {}}',),
        (POST + OFFER + b"Transfer-Encoding: chunked\r\n\r\nd\r\n", b'{"input": {}}\r\n0\r\n\r\n'),
        ((POST + OFFER + b"Content-Length: 13\r\n\r\n" + b'{"input": {}}') * 3,),
        (GET + OFFER + b"\r\n" + POST + b"Content-Length: 13\r\n\r\n", b'{"input": {}}'),
        (GET + OFFER.replace(b"h2c", b"websocket") + b"\r\n", POST + b"Content-Length: 13\r\n\r\n" + b'{"input": {}}'),
    ],
)
async def test_a_request_that_offers_another_protocol_is_served_in_this_one(
    served: Stack, pieces: tuple[bytes, ...]
) -> None:
    url = served.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    writer.write(GET + b"Connection: close\r\n\r\n")
    async with asyncio.timeout(PATIENCE):
        got = await reader.read()
    writer.close()
    posted = [503] * b"".join(pieces).count(POST)  # they were read; no worker has the task
    expected = [*posted, 200] if pieces[0].startswith(POST) else [200, *posted, 200]
    assert [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", got)] == expected, got
