"""Runs that are made again: the input that is kept, and the retry of one run."""

from uuid import UUID

import httpx

from backcast.ledger import runs, submissions
from backcast.ledger.connection import Ledger
from backcast.store import Store
from tests.integration.test_api import api, end, problem, worker

__all__ = ["api", "worker"]

LARGE = "x" * (submissions.INLINE_INPUT + 1)


async def submitted(api: httpx.AsyncClient, value: object = 1, **fields: object) -> str:
    answer = await api.post("/v1/tasks/echo/runs", json={"input": {"value": value}, **fields})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def stored_key(ledger: Ledger, run: str) -> str:
    key = (await runs.kept_input(ledger, UUID(run))).key
    assert key is not None
    return key


# -- the input ---------------------------------------------------------------------------------------------------------


async def test_the_input_of_a_run_is_kept_before_and_after_its_end(
    api: httpx.AsyncClient, ledger: Ledger, store: Store, worker: UUID
) -> None:
    small, large = await submitted(api, {"é\x00": 0.5}), await submitted(api, LARGE)
    for _ in range(2):
        answer = await api.get(f"/v1/runs/{small}/input")
        assert (answer.status_code, answer.json()) == (200, {"value": {"é\x00": 0.5}})
        assert answer.headers["content-type"] == "application/json"
        assert (await api.get(f"/v1/runs/{large}/input")).json() == {"value": LARGE}
        await end(ledger, store, worker, "1")


async def test_an_input_that_is_gone_is_a_problem(api: httpx.AsyncClient, ledger: Ledger, store: Store) -> None:
    run = await submitted(api, LARGE)
    await store.delete([await stored_key(ledger, run)])
    problem(await api.get(f"/v1/runs/{run}/input"), 410, "input_gone")
    for unknown in ("018f0000-0000-7000-8000-000000000000", "42"):
        problem(await api.get(f"/v1/runs/{unknown}/input"), 404, "unknown_run")
