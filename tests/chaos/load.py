"""Submits work during the storm and knows what must come of it. The client repeats a request with the same
Idempotency-Key until it has the answer, and only then counts the run as accepted.
"""

import asyncio
import contextlib
import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from tests.chaos.readers import WORDS, Readers
from tests.chaos.world import GONE, NARROW, World

UNFINISHED = 400
"""Runs that wait or run at once, at most: the load limits itself."""
PATIENCE = 4.0
"""Seconds for which the client waits for an answer before it asks again, perhaps another API."""
IN_FLIGHT = 64
"""Requests at once, at most: fewer than the client has connections. Its pool looks at every request that waits for one,
for each that comes or goes; with hundreds of them this process, which has the proxies too, does nothing else."""


@dataclass
class Case:
    """A wanted run, with the outcome that it must have."""

    task: str
    input: dict[str, Any]
    value: Any = None
    """Its result, when it is completed."""
    ends: str = "completed"
    code: str | None = None
    """The code of its error, when it fails."""
    options: dict[str, Any] = field(default_factory=dict)
    may_expire: bool = False
    may_cancel: bool = False
    """It was cancelled, together with others."""
    again_after: float | None = None
    """It is repeated so many seconds after its end."""
    retry_of: str | None = None
    cancel_after: float | None = None
    key: str = ""
    id: str = ""
    """Set once it is accepted."""
    cancelled: str | None = None
    """The state in the answer to the cancellation."""


def _add(dice: random.Random, key: str) -> Case:
    a, b = dice.randrange(1000), dice.randrange(1000)
    return Case("add", {"key": key, "a": a, "b": b}, [key, a + b])


def _reverse(dice: random.Random, key: str) -> Case:
    text = f"{dice.random()} äöü \x00 \u2028"
    return Case("reverse", {"key": key, "text": text}, [key, text[::-1]])


def _doze(dice: random.Random, key: str) -> Case:
    seconds = round(dice.uniform(1, 4), 3)
    return Case("doze", {"key": key, "seconds": seconds}, [key, seconds])


def _cancelled(dice: random.Random, key: str) -> Case:
    case = _doze(dice, key)
    case.cancel_after = dice.uniform(0, 4)
    return case


def _stumble(dice: random.Random, key: str) -> Case:
    fails = dice.randint(1, 4)
    return Case("stumble", {"key": key, "fails": fails}, [key, fails])


def _refuse(dice: random.Random, key: str) -> Case:
    kind, code = dice.choice([("usage", "unusable_input"), ("fatal", "task_failed"), ("plain", "task_failed")])
    return Case("refuse", {"key": key, "kind": kind}, ends="failed", code=code)


def _square(dice: random.Random, _: str) -> Case:
    number = dice.randrange(12)
    return Case("square", {"key": f"square-{number}", "number": number}, [f"square-{number}", number * number])


def _measure(dice: random.Random, key: str) -> Case:
    text = dice.choice("abcö") * dice.randint(66_000, 120_000)
    value = [key, len(text), hashlib.sha256(text.encode()).hexdigest()]
    return Case("measure", {"key": key, "text": text}, value)


def _enlarge(dice: random.Random, key: str) -> Case:
    word, times = dice.choice(["cast", "wörd"]), dice.randint(9_000, 20_000)
    return Case("enlarge", {"key": key, "word": word, "times": times}, [key, word * times])


def _chant(dice: random.Random, key: str) -> Case:
    return Case("chant", {"key": key, "fails": dice.choice([0, 0, 1, 2]), "words": WORDS}, [key, WORDS])


def _dawdle(_: random.Random, key: str) -> Case:
    return Case("dawdle", {"key": key}, ends="failed", code="timeout")


def _offend(dice: random.Random, key: str) -> Case:
    kind = dice.choice(["block", "crash", "kill", "exit"])
    return Case("offend", {"key": key, "kind": kind}, [key, kind])


def _later(dice: random.Random, key: str) -> Case:
    case = _add(dice, key)
    case.options["run_at"] = (datetime.now(UTC) + timedelta(seconds=dice.uniform(0.5, 6))).isoformat()
    return case


def _narrow(dice: random.Random, key: str) -> Case:
    seconds = round(dice.uniform(0.05, 0.4), 3)
    return Case("doze", {"key": key, "seconds": seconds}, [key, seconds], options={"lane": NARROW[0]})


def _urgent(dice: random.Random, key: str) -> Case:
    case = _narrow(dice, key) if dice.random() < 0.5 else _doze(dice, key)
    case.options["deadline"] = (datetime.now(UTC) + timedelta(seconds=dice.uniform(0, 5))).isoformat()
    case.may_expire = True
    return case


MIX: list[tuple[int, Callable[[random.Random, str], Case]]] = [
    (30, _add),
    (15, _reverse),
    (10, _doze),
    (10, _cancelled),
    (8, _stumble),
    (5, _refuse),
    (10, _square),
    (3, _measure),
    (3, _enlarge),
    (6, _chant),
    (3, _dawdle),
    (1, _offend),
    (5, _later),
    (6, _narrow),
    (5, _urgent),
]
"""Weight and maker of each kind of run: the place to add lanes, deadlines and other options of a run."""


def _case(dice: random.Random, number: int) -> Case:
    [make] = dice.choices([make for _, make in MIX], [weight for weight, _ in MIX])
    key = f"{make.__name__.strip('_')}-{number}"
    case = make(dice, key)
    case.key = key
    if dice.random() < 0.08:
        case.again_after = dice.uniform(0, 2)
    case.options |= {"owner": f"owner-{dice.randrange(5)}", "priority": dice.choice([0, 0, 0, 5, -5])}
    return case


@dataclass
class Load:
    world: World
    seed: int
    rate: float
    """Runs per second, at most."""
    readers: Readers
    cases: list[Case] = field(default_factory=list)
    finished: int = 0
    longest_gap: float = 0.0
    """Seconds in which work waited and none was finished."""
    repeated: int = 0
    """Requests that were sent again."""
    refused: list[str] = field(default_factory=list)
    """Answers that blame the request, although none is at fault."""
    late: set[str] = field(default_factory=set)
    """Keys of requests that were refused because their deadline had passed."""
    _unfinished: int = 0
    _unanswered: int = 0
    _few: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(IN_FLIGHT), init=False)

    async def flow(self, over: asyncio.Event) -> None:
        """Submit (and cancel) until it is over; returns when every request has had its answer."""
        dice, numbers = random.Random(self.seed), itertools.count()
        async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as client, asyncio.TaskGroup() as requests:
            while not over.is_set():
                if self._unfinished + self._unanswered < UNFINISHED:
                    case = _case(dice, next(numbers))  # a case may be removed, and its key must not come again
                    self.cases.append(case)
                    self._unanswered += 1
                    requests.create_task(self._see_through(client, case, random.Random(dice.random())))
                await asyncio.sleep(dice.expovariate(self.rate))

    async def _see_through(self, client: httpx.AsyncClient, case: Case, dice: random.Random) -> None:
        body = {"input": case.input, **case.options}
        path = f"/v1/tasks/{case.task}/runs"
        answer = await self.ask(client, dice, path, {"Idempotency-Key": case.key}, json=body)
        case.id = answer.get("id", "refused")
        self._unanswered -= 1
        if answer.get("status") == 422:  # its deadline passed before any request for it was accepted
            self.cases.remove(case)
            self.late.add(case.key)
            return
        if case.id == "refused":
            return
        if dice.random() < (0.5 if case.task == "chant" else 0.05):
            self.readers.follow(case.id, dice)
        if case.cancel_after is not None:
            await asyncio.sleep(case.cancel_after)
            case.cancelled = (await self.ask(client, dice, f"/v1/runs/{case.id}/cancel", {})).get("state")
        if case.again_after is not None:
            await self._again(client, case, dice)

    async def _again(self, client: httpx.AsyncClient, case: Case, dice: random.Random) -> None:
        """Repeat it once it has ended."""
        while True:
            run = await self.ask(client, dice, f"/v1/runs/{case.id}", {}, method="GET")
            if run["finished_at"] is not None:
                break
            await asyncio.sleep(0.5)
        await asyncio.sleep(case.again_after or 0)
        again = Case(case.task, case.input, case.value, case.ends, case.code, key=f"{case.key}-again", retry_of=case.id)
        path = f"/v1/runs/{case.id}/retry"
        again.id = (await self.ask(client, dice, path, {"Idempotency-Key": again.key})).get("id", "refused")
        self.cases.append(again)

    async def ask(
        self,
        client: httpx.AsyncClient,
        dice: random.Random,
        path: str,
        headers: dict[str, str],
        *,
        method: str = "POST",
        **body: Any,
    ) -> dict[str, Any]:
        """The answer, however often the request must be repeated."""
        while True:
            with contextlib.suppress(httpx.TransportError):
                async with self._few:
                    answer = await client.request(method, dice.choice(self.world.apis) + path, headers=headers, **body)
                if answer.is_success:
                    return dict(answer.json())
                if answer.status_code == 422 and "the deadline has passed" in answer.text:
                    return dict(answer.json())
                if answer.status_code < 500 and answer.status_code != 429:
                    self.refused.append(f"{path} {headers}: {answer.status_code} {answer.text[:500]}")
                    return {}
            self.repeated += 1
            await asyncio.sleep(dice.uniform(0.1, 1))

    async def watch(self) -> None:
        """Count unfinished and finished runs, for ever."""
        last = self.world.now
        while True:
            with contextlib.suppress(*GONE, OSError, TimeoutError):
                [row] = await self.world.sql(
                    """select count(*) filter (where finished_at is null) as unfinished,
                              count(*) filter (where finished_at is not null) as finished from backcast.all_runs"""
                )
                if row["finished"] > self.finished or self._unfinished == 0:
                    last = self.world.now
                self._unfinished, self.finished = row["unfinished"], row["finished"]
            self.longest_gap = max(self.longest_gap, self.world.now - last)
            await asyncio.sleep(0.5)
