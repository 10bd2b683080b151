"""Requests that arrive slowly, over raw sockets: each part has a deadline, and what is fast enough is served."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.stack import Stack, stack
from tests.support.waiting import PATIENCE

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
    url = served.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)

    async def dribble() -> None:
        while True:
            writer.write(then)
            await writer.drain()
            await asyncio.sleep(0.05)  # the pace of the client, far below each deadline

    try:
        async with asyncio.timeout(PATIENCE):
            writer.write(first)
            dribbling = asyncio.create_task(dribble())
            try:
                got = await reader.read()
            except ConnectionError:
                got = b""
            dribbling.cancel()
            await asyncio.gather(dribbling, return_exceptions=True)
    finally:
        writer.close()
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
