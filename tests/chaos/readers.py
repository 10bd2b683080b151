"""Readers of streams: early and late ones, which hang up and go on at another API process. They check what they saw."""

import asyncio
import contextlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

from backcast.client.events import Event, Following
from backcast.client.wire import to_httpx
from backcast.errors import ClientError, TooManyWaiting, Unavailable
from tests.chaos.world import World

WORDS = 6
"""Outputs of an attempt of the task `chant`."""
_STATES = ("queued", "started", "retrying", "ended")


@dataclass
class Reader:
    of: str
    """The id of its run or batch."""
    noun: str
    is_late: bool
    seen: list[Event] = field(default_factory=list)
    connections: int = 0

    @property
    def name(self) -> str:
        return f"{self.of}: a {'late' if self.is_late else 'prompt'} reader with {self.connections} connections"


@dataclass
class Readers:
    world: World
    all: list[Reader] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def follow(self, of: str, dice: random.Random, *, noun: str = "runs") -> None:
        """Two of them: one at once, the other after a while."""
        for is_late in (False, True):
            reader = Reader(of, noun, is_late)
            self.all.append(reader)
            self._tasks.append(asyncio.create_task(self._read(reader, random.Random(dice.random()))))

    async def ended(self, *, timeout: float) -> list[str]:
        """Every stream comes to its end in this time."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)
        waiting = [reader.name for task, reader in zip(self._tasks, self.all, strict=True) if not task.done()]
        for task in self._tasks:
            task.cancel()
        failed = [each for each in await asyncio.gather(*self._tasks, return_exceptions=True) if each is not None]
        wrong = [f"{name} still waits for the end" for name in waiting]
        return wrong + [repr(each) for each in failed if not isinstance(each, asyncio.CancelledError)] + self.refused

    async def _read(self, reader: Reader, dice: random.Random) -> None:
        following = Following(reader.noun, reader.of)
        await asyncio.sleep(dice.uniform(2, 10) if reader.is_late else 0)
        async with httpx.AsyncClient(trust_env=False) as client:
            while not following.is_over:
                hang_up = dice.choice([None, dice.uniform(0.1, 5)])
                with contextlib.suppress(httpx.TransportError, TimeoutError):
                    async with asyncio.timeout(hang_up):
                        await self._connect(client, dice.choice(self.world.apis), following, reader)
                await asyncio.sleep(dice.uniform(0, 1))

    async def _connect(self, client: httpx.AsyncClient, api: str, following: Following, reader: Reader) -> None:
        ask = following.ask()
        reader.connections += 1
        async with client.stream(**to_httpx(ask._replace(url=api + ask.url, timeout=20.0))) as answer:
            if answer.status_code != 200:
                await answer.aread()
            try:
                following.opened(answer)
            except (Unavailable, TooManyWaiting):
                return
            except ClientError as error:
                self.refused.append(f"{reader.name}: {error!r}")
                following.is_over = True
                return
            async for line in answer.aiter_lines():
                if (event := following.line(line)) is not None:
                    reader.seen.append(event)

    def saw(self, ledger: dict[str, dict[str, Any]]) -> list[str]:
        """Each has seen each state once and in order, all that was emitted, and the end that the ledger has."""
        wrong = list[str]()
        for reader in self.all:
            check = _run if reader.noun == "runs" else _batch
            wrong += [f"{reader.name}: {why}" for why in check(reader, ledger)]
        outputs = dict[str, list[Any]]()
        for reader in self.all:
            emitted = [event.data for event in reader.seen if event.name in ("output", "dropped")]
            if outputs.setdefault(reader.of, emitted) != emitted:
                wrong.append(f"{reader.name}: saw {emitted}, and another one saw {outputs[reader.of]}")
        return wrong


def _run(reader: Reader, ledger: dict[str, dict[str, Any]]) -> Iterable[str]:
    states = [(event.name, event.data.get("attempt")) for event in reader.seen if event.name in _STATES]
    starts = [attempt for name, attempt in states if name == "started"]
    must = [("queued", None)]
    for attempt in range(1, len(starts) + 1):
        must += [("started", attempt), ("retrying", attempt)]
    # Between the last start and the end, a wait for another attempt may have been seen.
    if states[:-1] not in (must, must[:-1] if starts else must) or states[-1:] != [("ended", None)]:
        yield f"saw {states}"
        return
    run, row = reader.seen[-1].data["run"], ledger[reader.of]
    if run["state"] != row["state"]:
        yield f"saw it end as {run['state']}, not {row['state']}"
    # An attempt that was started and did not count is the last one only if the run was ended while it waited.
    if len(starts) not in (row["attempts_used"], row["attempts_used"] + 1):
        yield f"saw {len(starts)} attempts of {row['attempts_used']}"
    if row["task"] == "chant" and row["state"] == "completed":
        last = [
            each.data["data"] for each in reader.seen if each.name == "output" and each.data["attempt"] == len(starts)
        ]
        # The worker of the attempt before may have stored the value and then been lost: this one took that value.
        is_left_behind = not last and row["lost_fence"] == row["fence"] - 1
        if last[-WORDS:] != [*range(WORDS)] and not is_left_behind:
            yield f"saw the outputs {last} of attempt {len(starts)}"


def _batch(reader: Reader, ledger: dict[str, dict[str, Any]]) -> Iterable[str]:
    ended = [(run["id"], run["state"]) for each in reader.seen if each.name == "runs" for run in each.data["items"]]
    must = {(i, row["state"]) for i, row in ledger.items() if row["batch_id"] == reader.of}
    if len(ended) != len(set(ended)):
        yield "saw the end of a run twice"
    if {*ended} != must:
        yield f"saw {len({*ended})} ends of {len(must)}, and not {sorted(must - {*ended})[:3]}"
    if not reader.seen or reader.seen[-1].name != "ended" or sum(each.name == "ended" for each in reader.seen) > 1:
        yield f"saw {[each.name for each in reader.seen]}"
