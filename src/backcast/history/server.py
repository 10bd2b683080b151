"""The calls of the Prefect server's HTTP interface that we use. Which runs they are about is decided elsewhere."""

import asyncio
import logging
from datetime import datetime
from typing import Any
from uuid import UUID

import httpx

from backcast.settings import Prefect

log = logging.getLogger("backcast.history")

TIMEOUT = 30.0
"""Seconds for an answer."""
PAGE = 200
"""Runs in one query, which is the server's limit."""
AT_ONCE = 8
"""Concurrent deletions; the server has no route that deletes several runs."""


class PrefectServer:
    def __init__(self, settings: Prefect) -> None:
        auth = settings.auth_string.get_secret_value().partition(":") if settings.auth_string else None
        self._client = httpx.AsyncClient(
            base_url=(settings.api_url or "").rstrip("/"),
            auth=(auth[0], auth[2]) if auth else None,
            headers={"content-type": "application/json"}
            | ({"authorization": f"Bearer {settings.api_key.get_secret_value()}"} if settings.api_key else {}),
            timeout=TIMEOUT,
            limits=httpx.Limits(max_keepalive_connections=0),  # it closes kept ones after an error of its own, unasked
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def post(self, path: str, batch: list[bytes], *, within: float) -> None:
        """Post a list of JSON texts, and wait for the answer for so many seconds.

        Raises:
            httpx.HTTPError: the server is away, or refuses it.
        """
        response = await self._client.post(path, content=b"[" + b",".join(batch) + b"]", timeout=within)
        response.raise_for_status()

    async def count(self, ids: list[UUID], state_type: str) -> int:
        """The number of these runs (up to 1,000) that the server has in this state; costs a thirtieth of `states`.

        Raises:
            httpx.HTTPError: the server is away.
        """
        wanted = {"id": {"any_": [str(one) for one in ids]}, "state": {"type": {"any_": [state_type]}}}
        response = await self._client.post("/task_runs/count", json={"task_runs": wanted})
        response.raise_for_status()
        return int(response.json())

    async def states(self, ids: list[UUID]) -> dict[UUID, str | None]:
        """The state types (COMPLETED, …) of these runs as the server has them; None where it has no such run.

        Raises:
            httpx.HTTPError: the server is away.
        """
        known: dict[UUID, str | None] = dict.fromkeys(ids)
        for start in range(0, len(ids), PAGE):
            asked = [str(one) for one in ids[start : start + PAGE]]
            for run in await self._filter({"id": {"any_": asked}}, limit=len(asked)):
                known[UUID(run["id"])] = run["state_type"]
        return known

    async def delete_ended(self, tag: str, before: datetime, limit: int) -> int:
        """Delete up to `limit` task runs that have this tag and ended before this time; return how many.

        The server removes their logs a moment later. Its route deletes one run at a time.

        Raises:
            httpx.HTTPError: the server is away.
        """
        deleted = 0
        old = {"end_time": {"before_": before.isoformat()}, "tags": {"all_": [tag]}}
        gate = asyncio.Semaphore(AT_ONCE)

        async def delete(run_id: str) -> None:
            async with gate:
                response = await self._client.delete(f"/task_runs/{run_id}")
                if response.status_code != 404:  # 404: it is already gone
                    response.raise_for_status()

        while deleted < limit:
            runs = await self._filter(old, limit=min(PAGE, limit - deleted))
            await asyncio.gather(*[delete(run["id"]) for run in runs])
            deleted += len(runs)
            if not runs:
                break
        return deleted

    async def _filter(self, wanted: dict[str, Any], *, limit: int) -> list[dict[str, Any]]:
        # This order has an index, and the filter by end uses it too.
        query = {"task_runs": wanted, "limit": limit, "sort": "END_TIME_DESC"}
        response = await self._client.post("/task_runs/filter", json=query)
        response.raise_for_status()
        return list(response.json())
