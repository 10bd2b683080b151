"""Submits work during a test, from outside of the cluster, and verifies afterwards that every accepted run has exactly
one outcome, the right one. It repeats a request with the same Idempotency-Key until it has the answer, and counts a run
as accepted only then. It has a thread and a loop of its own, so that no test delays it.
"""

import asyncio
import hashlib
import itertools
import logging
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.e2e.release import Release
from tests.support.runs import FINAL
from tests.support.waiting import until

log = logging.getLogger("e2e")

RATE = 6.0
"""Runs per second: two cores manage so many beside a cluster in turmoil."""
_UNANSWERED = 40
_numbers = itertools.count(1)


@dataclass
class Case:
    key: str
    task: str
    input: dict[str, Any]
    value: Any
    id: str = ""
    """Set once it is accepted."""


def _case(owner: str, number: int, dice: random.Random) -> Case:
    key = f"{owner}-{number}"
    match number % 20:
        case 0:
            text = dice.choice("abcö") * dice.randint(70_000, 90_000)
            return Case(key, "measure", {"key": key, "text": text}, [key, hashlib.sha256(text.encode()).hexdigest()])
        case 5 | 15:
            word, times = dice.choice(["cast", "wörd"]), dice.randint(9_000, 20_000)
            return Case(key, "enlarge", {"key": key, "word": word, "times": times}, [key, word * times])
        case n if n % 2:
            seconds = round(dice.uniform(0.2, 2), 3)
            return Case(key, "nap", {"key": key, "seconds": seconds}, [key, seconds])
        case _:
            a, b = dice.randrange(1000), dice.randrange(1000)
            return Case(key, "add", {"key": key, "a": a, "b": b}, [key, a + b])


@dataclass
class Load:
    release: Release
    owner: str
    rate: float
    cases: list[Case] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    """How often a request was answered in which way; those that are not 202 were repeated."""
    refused: list[str] = field(default_factory=list)
    """Answers that blame the request, although none is at fault."""

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._flow()), daemon=True, name="load")

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Returns when every request has had its answer."""
        self._over.set()
        await asyncio.to_thread(self._thread.join, 240)
        assert not self._thread.is_alive(), f"requests are still without an answer; so far: {dict(self.answers)}"
        log.info("load %s: %d accepted, answers %s", self.owner, len(self.accepted), dict(self.answers))

    @property
    def accepted(self) -> list[Case]:
        return [case for case in list(self.cases) if case.id]

    async def more(self, count: int, *, timeout: float = 180) -> None:
        """Wait until so many more runs are accepted than now: the API takes work (again)."""
        goal = len(self.accepted) + count

        async def look() -> str:
            return f"{len(self.accepted)} of {goal}, answers {dict(self.answers)}"

        await until(look, lambda _: len(self.accepted) >= goal, timeout=timeout, every=0.2)

    async def _flow(self) -> None:
        dice = random.Random(self.owner)
        base, headers = self.release.http.base_url, dict(self.release.http.headers)
        limits = httpx.Limits(max_connections=_UNANSWERED)
        async with (
            httpx.AsyncClient(base_url=base, headers=headers, timeout=10, trust_env=False, limits=limits) as client,
            asyncio.TaskGroup() as requests,
        ):
            while not self._over.is_set():
                if sum(not case.id for case in self.cases) - len(self.refused) < _UNANSWERED:
                    case = _case(self.owner, len(self.cases), dice)
                    self.cases.append(case)
                    requests.create_task(self._see_through(client, case, random.Random(case.key)))
                await asyncio.sleep(1 / self.rate)

    async def _see_through(self, client: httpx.AsyncClient, case: Case, dice: random.Random) -> None:
        body = {"input": case.input, "owner": self.owner}
        while True:
            try:
                path = f"/v1/tasks/{case.task}/runs"
                answer = await client.post(path, json=body, headers={"Idempotency-Key": case.key})
            except httpx.TransportError as error:
                self.answers[type(error).__name__] += 1
            else:
                self.answers[str(answer.status_code)] += 1
                if answer.is_success:
                    case.id = str(answer.json()["id"])
                    return
                # An Ingress controller may answer 404 while no pod of the API is ready; then it is no problem document.
                ours = answer.headers.get("Content-Type", "").startswith("application/problem+json")
                if ours and answer.status_code < 500 and answer.status_code != 429:
                    self.refused.append(f"{case.key}: {answer.status_code} {answer.text[:300]}")
                    return
            await asyncio.sleep(dice.uniform(0.2, 1))

    # -- afterwards -----------------------------------------------------------------------------------------------

    async def verify(self, *, timeout: float = 240) -> None:
        """Every accepted run has exactly one outcome, the right one; and there is no other run."""
        assert not self.refused, self.refused[:5]
        assert self.accepted, "nothing was accepted, so nothing could be lost"
        runs = await self._settled(timeout)
        cases = {case.id: case for case in self.accepted}
        assert len(cases) == len(self.cases), "two cases were given the same run"
        assert runs.keys() == cases.keys(), (
            f"lost: {sorted(cases.keys() - runs.keys())[:5]}; run twice: {sorted(runs.keys() - cases.keys())[:5]}"
        )
        bad = [run for run in runs.values() if run["state"] != "completed"]
        assert not bad, f"{len(bad)} runs did not complete: {bad[:3]}"
        ends = await self.release.sql(
            "select e.id, count(*) from e2e.ends e join backcast.all_runs r using (id) "
            f"where r.owner = '{self.owner}' group by e.id"
        )
        counted = {run_id: int(count) for run_id, count in ends}
        assert counted == dict.fromkeys(cases, 1), (
            f"not one end each: { {i: counted.get(i, 0) for i in cases if counted.get(i) != 1} }"
        )
        wrong = [sentence for sentence in await asyncio.gather(*self._values(cases)) if sentence]
        assert not wrong, f"{len(wrong)} wrong results: {wrong[:3]}"

    async def _settled(self, timeout: float) -> dict[str, dict[str, Any]]:
        async def look() -> dict[str, dict[str, Any]]:
            return {run["id"]: run async for run in self._listed()}

        def over(runs: dict[str, dict[str, Any]]) -> bool:
            return len(runs) >= len(self.accepted) and all(run["state"] in FINAL for run in runs.values())

        try:
            return await until(look, over, timeout=timeout, every=1)
        except AssertionError:
            runs = await look()
            open_ones = [run for run in runs.values() if run["state"] not in FINAL]
            raise AssertionError(
                f"after {timeout:g} s {len(open_ones)} of {len(runs)} runs have not ended: {open_ones[:3]}"
            ) from None

    async def _listed(self) -> AsyncIterator[dict[str, Any]]:
        cursor: dict[str, str] = {}
        while True:
            answer = await self.release.http.get("/v1/runs", params={"owner": self.owner, "limit": "200", **cursor})
            assert answer.status_code == 200, answer.text
            page = answer.json()
            for run in page["items"]:
                yield run
            if page["next_cursor"] is None:
                return
            cursor = {"cursor": page["next_cursor"]}

    def _values(self, cases: dict[str, Case]) -> list[Any]:
        gate = asyncio.Semaphore(8)

        async def check(case: Case) -> str | None:
            async with gate:
                answer = await self.release.http.get(f"/v1/runs/{case.id}/result")
            if answer.status_code == 200 and answer.json() == case.value:
                return None
            return f"{case.key} {case.id}: {answer.status_code} {answer.text[:200]}"

        return [check(case) for case in cases.values()]


@asynccontextmanager
async def load(release: Release, what: str, *, rate: float = RATE) -> AsyncIterator[Load]:
    """Submit throughout the block, which begins once runs are being accepted and some have ended."""
    working = Load(release, f"{what}-{next(_numbers)}", rate)
    for task in ("add", "nap", "enlarge", "measure"):
        await release.knows(task)
    working.start()
    try:
        await working.more(10)
        yield working
    finally:
        await working.stop()
