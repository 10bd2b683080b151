"""Posts batches, and finds the item for which the server refuses one. Decides whether a refusal is about an item or
about everything, as while the server is away, or comes and goes: it posts a probe, which every server takes that works.
"""

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import comb
from uuid import uuid4

import httpx

from backcast.history.server import TIMEOUT, PrefectServer
from backcast.models import JSON

_NOW = datetime.now(UTC).isoformat()
PROBES: Mapping[str, JSON] = {
    "/events": {  # Prefect keeps one event of an id
        "id": str(uuid4()),
        "occurred": _NOW,
        "event": "backcast.probe",
        "resource": {"prefect.resource.id": "backcast.history"},
    },
    "/logs/": {"name": "backcast.history", "level": 10, "message": "probe", "timestamp": _NOW},
}
"""Items of no run, which no page of a run shows and which may be posted any number of times, by path."""

SERVERS_OWN = {401, 403, 404, 405, 407, 408, 421, 423, 425, 426, 429}
"""Client errors that are rarely about one item: a wrong key or address, a limit."""
CHANCE = 1e-9
"""An item is dropped when a server that refuses at random is less likely than this to have refused all its posts, and
so few probes: after 17 posts of each, if all probes were taken."""
MISSES = 3
"""Probes refused one after another, before the server is away."""
POSTS = 200
"""Posts after which an item that may be the refused one is left for later."""
HANGS = 3.0
"""Seconds within which each post of a batch has to be answered once one was not, although the probe was: an item on
which the server hangs is dropped after about two minutes."""
SLOWER = 10
"""An item may take so many times as long as the probe, whatever `HANGS` is: a slow server is not one that refuses."""

Refused = tuple[bytes, str]
"""An item, and the server's words."""


class Undelivered(Exception):
    """The server takes nothing now. `rest` should be sent again, in this order; `refused` never."""

    def __init__(self, rest: list[bytes], refused: list[Refused]) -> None:
        super().__init__()
        self.rest, self.refused = rest, refused


class Delivery:
    """The way to one path of the server."""

    def __init__(self, server: PrefectServer, path: str) -> None:
        self._server, self._path, self._probe = server, path, json.dumps(PROBES[path]).encode()

    async def send(self, batch: Sequence[bytes]) -> list[Refused]:
        """Post these JSON texts, and return those that the server refuses for their own sake.

        Raises:
            Undelivered: the server is away; the cause is an `httpx.HTTPError`.
        """
        parts, within = [list(batch)] if batch else [], TIMEOUT
        suspects, refused = list[bytes](), list[Refused]()
        try:
            while parts:
                part = parts[-1]
                try:
                    await self._post(part, within)
                except httpx.HTTPError as error:
                    began = time.monotonic()
                    await self._post([self._probe], TIMEOUT)
                    if isinstance(error, httpx.TimeoutException):
                        within = min(max(HANGS, SLOWER * (time.monotonic() - began)), TIMEOUT)
                    if len(part) > 1:
                        middle = len(part) // 2
                        parts[-1:] = [part[middle:], part[:middle]]
                        continue
                    if _is_certain(error):
                        refused.append((part[0], _words(error)))
                    else:
                        suspects += part
                parts.pop()
            while suspects:
                if (words := await self._try_alone(suspects[0], within)) is not None:
                    refused.append((suspects[0], words))
                suspects.pop(0)
        except (httpx.HTTPError, asyncio.CancelledError) as error:
            raise Undelivered([item for part in reversed(parts) for item in part] + suspects, refused) from error
        return refused

    async def _post(self, batch: list[bytes], within: float) -> None:
        await self._server.post(self._path, batch, within=within)

    async def _try_alone(self, item: bytes, within: float) -> str | None:
        """Post the item and the probe in a random order, which no rhythm of the server can follow, until the item was
        taken (None), or is proved to be refused for its own sake (the server's words).

        Raises:
            httpx.HTTPError: the server is away, or comes and goes so often that nothing is proved.
        """
        refusals, taken, missed, misses = list[httpx.HTTPError](), 0, 0, 0
        for post in range(POSTS):
            is_probe = random.random() < 0.5  # noqa: S311  # no secret
            try:
                await self._post([self._probe if is_probe else item], within)
            except httpx.HTTPError as error:
                if not is_probe:
                    refusals.append(error)
                    continue
                missed, misses = missed + 1, misses + 1
                if misses == MISSES:
                    raise
                continue
            if not is_probe:
                return None
            taken, misses = taken + 1, 0
            if comb(taken + missed, missed) < CHANCE * comb(post + 1, taken):
                return _words(refusals[-1])
        raise httpx.HTTPError("it comes and goes")


def _is_certain(error: httpx.HTTPError) -> bool:
    if not isinstance(error, httpx.HTTPStatusError):
        return False
    return 400 <= error.response.status_code < 500 and error.response.status_code not in SERVERS_OWN


def _words(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.response.status_code} {error.response.text[:200]}".strip()
    return type(error).__name__
