"""Submits runs over HTTP and waits for their ends. Knows nothing of how the API was started or how it is reached."""

from typing import Any

import httpx

from tests.support.waiting import PATIENCE, until

FINAL = {"completed", "failed", "cancelled", "expired"}


class Runs:
    """A base for classes that keep a client of the API in `http`."""

    http: httpx.AsyncClient
    every = 0.05
    """Seconds between two looks at a run."""

    async def submit(self, task: str, **given: Any) -> str:
        answer = await self.http.post(f"/v1/tasks/{task}/runs", json={"input": given})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    async def run(self, run_id: str) -> dict[str, Any]:
        answer = await self.http.get(f"/v1/runs/{run_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def ended(self, run_id: str, *, timeout: float = PATIENCE) -> dict[str, Any]:
        """The run, once it is in a final state."""
        return await until(
            lambda: self.run(run_id), lambda run: run["state"] in FINAL, timeout=timeout, every=self.every
        )

    async def result(self, run_id: str, *, timeout: float = PATIENCE) -> Any:
        run = await self.ended(run_id, timeout=timeout)
        assert run["state"] == "completed", run
        answer = await self.http.get(f"/v1/runs/{run_id}/result")
        assert answer.status_code == 200, answer.text
        return answer.json()
