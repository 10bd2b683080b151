"""Reads streams of server-sent events."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Sent:
    id: str
    name: str
    data: Any


async def events(http: httpx.AsyncClient, path: str, *, last: str | None = None) -> AsyncIterator[Sent | str]:
    """The events of a stream, and its other lines as text, until it ends."""
    headers = {} if last is None else {"Last-Event-ID": last}
    async with http.stream("GET", path, headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields = dict[str, str]()
        async for line in answer.aiter_lines():
            name, found, value = line.partition(": ")
            if found and name in ("id", "event", "data"):
                fields[name] = value
            elif line:
                yield line
            elif fields:
                yield Sent(fields["id"], fields["event"], json.loads(fields["data"]))
                fields = {}


async def all_of(http: httpx.AsyncClient, path: str, *, last: str | None = None) -> list[Sent]:
    return [each async for each in events(http, path, last=last) if isinstance(each, Sent)]
