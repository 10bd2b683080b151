"""Batches that are repeated or cancelled as a whole: each of their runs once, and no other."""

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.chaos.load import PATIENCE, Case, Load
from tests.chaos.readers import Readers

SIZE = 12
_FINAL = ("completed", "failed", "cancelled", "expired")


@dataclass
class Wave:
    """A batch, and what was done with it once all of its runs had ended, or at once."""

    label: str
    kind: str
    """`retry batch`: those that failed. `retry`: the completed ones, by a filter. `cancel`: all, by a filter."""
    batch: str = ""
    retried: str | None = None
    """The batch of the new runs."""
    operation: dict[str, Any] = field(default_factory=dict)


@dataclass
class Waves:
    load: Load
    readers: Readers
    all: list[Wave] = field(default_factory=list)

    async def flow(self, over: asyncio.Event) -> None:
        """Until it is over, and every wave has been dealt with."""
        dice = random.Random(self.load.seed + 1_000_000)
        async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False) as client, asyncio.TaskGroup() as waves:
            while not over.is_set():
                kind = dice.choice(["retry batch", "retry", "cancel"])
                self.all.append(wave := Wave(f"wave-{len(self.all)}", kind))
                waves.create_task(self._see_through(client, wave, random.Random(dice.random())))
                await asyncio.sleep(dice.uniform(1, 4 * SIZE / self.load.rate))

    async def _see_through(self, client: httpx.AsyncClient, wave: Wave, dice: random.Random) -> None:
        lines = "".join(json.dumps(_line(wave, number, dice)) + "\n" for number in range(SIZE))
        keyed = {"Idempotency-Key": wave.label}
        jsonl = keyed | {"Content-Type": "application/jsonl"}
        wave.batch = (await self.load.ask(client, dice, "/v1/batches", jsonl, content=lines))["id"]
        if dice.random() < 0.5:
            self.readers.follow(wave.batch, dice, noun="batches")
        chosen: dict[str, Any] = {"metadata": {"wave": wave.label}}
        match wave.kind:
            case "cancel":
                await asyncio.sleep(dice.uniform(0, 3))
                found = await self.load.ask(client, dice, "/v1/runs/cancel", keyed, json=chosen)
            case "retry":
                await self._ended(client, dice, wave.batch)
                chosen["state"] = "completed"
                found = await self.load.ask(client, dice, "/v1/runs/retry", keyed, json=chosen)
            case _:
                await self._ended(client, dice, wave.batch)
                found = await self.load.ask(client, dice, f"/v1/batches/{wave.batch}/retry", keyed)
                wave.retried = found["batch_id"]
        while found["state"] == "running":
            await asyncio.sleep(0.5)
            found = await self.load.ask(client, dice, f"/v1/operations/{found['id']}", {}, method="GET")
        wave.operation = found

    async def _ended(self, client: httpx.AsyncClient, dice: random.Random, batch: str) -> None:
        while True:
            states = (await self.load.ask(client, dice, f"/v1/batches/{batch}", {}, method="GET"))["states"]
            if all(state in _FINAL for state in states):
                return
            await asyncio.sleep(0.5)

    def cases(self, ledger: dict[str, dict[str, Any]]) -> list[Case]:
        """The outcomes that all of their runs must have."""
        runs = [(i, row) for i, row in ledger.items() if row["wave"] is not None]
        return [_case(i, row["task"], json.loads(row["input"]), row) for i, row in runs]

    def wrong(self, ledger: dict[str, dict[str, Any]]) -> list[str]:
        """What was asked for was done with every run that was meant, once, and with no other."""
        found = list[str]()
        for wave in self.all:
            runs = {i: row for i, row in ledger.items() if row["wave"] == wave.label}
            first = {i: row for i, row in runs.items() if row["retry_of"] is None}
            again = Counter(row["retry_of"] for row in runs.values() if row["retry_of"] is not None)
            of = f"{wave.label} ({wave.kind} {wave.batch})"
            if len(first) != SIZE or any(row["batch_id"] != wave.batch for row in first.values()):
                found.append(f"{of}: has {len(first)} runs of {SIZE}")
            must = {"retry batch": ("failed",), "retry": ("completed",), "cancel": ()}[wave.kind]
            meant = Counter(i for i, row in first.items() if row["state"] in must)
            found += [f"{i}: was not repeated by {of}" for i in meant - again]
            found += [f"{i}: was repeated {again[i]} times by {of}" for i in again - meant]
            if wave.kind != "cancel" and wave.operation.get("done") != meant.total():
                found.append(f"{of}: counted {wave.operation}, not {meant.total()}")
            batches = {row["batch_id"] for row in runs.values() if row["retry_of"] is not None}
            if again and batches != {wave.retried}:
                found.append(f"{of}: its new runs are in {batches}, not {wave.retried}")
        return found


def _line(wave: Wave, number: int, dice: random.Random) -> dict[str, Any]:
    key = f"{wave.label}-{number}"
    line: dict[str, Any] = {"task": "add", "input": {"key": key, "a": number, "b": dice.randrange(1000)}}
    if wave.kind == "cancel":
        line = {"task": "doze", "input": {"key": key, "seconds": round(dice.uniform(0.1, 3), 3)}}
    elif dice.random() < 0.4:
        line = {"task": "refuse", "input": {"key": key, "kind": "fatal"}}
    return line | {"owner": "owner-0", "metadata": {"wave": wave.label}}


def _case(run: str, task: str, given: dict[str, Any], row: dict[str, Any]) -> Case:
    case = Case(task, given, id=run, may_cancel=row["cancel_requested_at"] is not None)
    match task:
        case "add":
            case.value = [given["key"], given["a"] + given["b"]]
        case "doze":
            case.value = [given["key"], given["seconds"]]
        case _:
            case.ends, case.code = "failed", "task_failed"
    return case
