"""Draws faults from a shuffled deck, so that each kind happens in every round, and inflicts them on the world. Does not
know what the product must make of them.
"""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime

import asyncpg
import httpx

from tests.chaos.process import Process
from tests.chaos.proxy import CLEAR, Weather
from tests.chaos.world import LEASE, NARROW, World

_DRAIN = 120.0
"""Seconds after SIGTERM in which a process must have ended: far more than its grace and its last requests to servers
that are away."""


@dataclass(frozen=True)
class Fault:
    kind: str
    on: str
    touches: frozenset[str]
    """Names that no other fault may touch at the same time."""
    shape: Callable[[], AbstractAsyncContextManager[None]]
    """The fault lasts while this is entered."""
    lasts: tuple[float, float] = (1, 4)


@contextlib.asynccontextmanager
async def _killed(process: Process) -> AsyncIterator[None]:
    process.kill()
    yield
    process.start()


@contextlib.asynccontextmanager
async def _terminated(world: World, process: Process) -> AsyncIterator[None]:
    if not await process.terminate(timeout=_DRAIN):
        world.died.append(f"{process.name} had not ended {_DRAIN:g} s after SIGTERM, at {world.now:.1f} s")
    yield
    process.start()


@contextlib.asynccontextmanager
async def _stopped(process: Process) -> AsyncIterator[None]:
    process.send(signal.SIGSTOP)
    yield
    process.send(signal.SIGCONT)


@contextlib.asynccontextmanager
async def _under(world: World, links: Iterable[str], weather: Weather) -> AsyncIterator[None]:
    for link in links:
        world.links[link].become(weather)
    yield
    for link in links:
        world.links[link].become(CLEAR)


@contextlib.asynccontextmanager
async def _slow_commits(world: World) -> AsyncIterator[None]:
    """Each commit waits 2 ms, as on a cloud disk."""
    for name, value in (("commit_delay", 2000), ("commit_siblings", 0)):
        await world.insist(f"alter system set {name} = {value}")
    await world.insist("select pg_reload_conf()")
    yield
    await world.insist("alter system reset all")
    await world.insist("select pg_reload_conf()")


@contextlib.asynccontextmanager
async def _snapshot(world: World) -> AsyncIterator[None]:
    """No row that dies meanwhile can be vacuumed."""
    holder: asyncpg.Connection | None = None
    with contextlib.suppress(asyncpg.PostgresError, OSError, TimeoutError):
        holder = opened = await asyncpg.connect(world.database, timeout=5)
        await opened.execute("begin isolation level repeatable read; select count(*) from backcast.all_runs")
    yield
    if holder is not None:
        holder.terminate()


@contextlib.asynccontextmanager
async def _paused(world: World, kind: str, name: str, dice: random.Random) -> AsyncIterator[None]:
    """No run of it may begin: see `checks.paused`. Times are the database's, after the answer and before the resume."""
    await _ask(world, f"/v1/{kind}s/{name}/pause", dice)
    since = await _clock(world)
    yield
    until = await _clock(world)
    world.pauses.append((kind, name, since, until))
    await _ask(world, f"/v1/{kind}s/{name}/resume", dice)


async def _ask(world: World, path: str, dice: random.Random) -> None:
    """Ask until it is answered."""
    async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = await client.post(dice.choice(world.apis) + path)
                if answer.status_code < 500:
                    assert answer.is_success, answer.text
                    return
            await asyncio.sleep(dice.uniform(0.1, 0.5))


async def _clock(world: World) -> datetime:
    while True:
        with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
            [row] = await world.sql("select clock_timestamp() as at")
            return row["at"]
        await asyncio.sleep(0.1)


def _deck(world: World, dice: random.Random) -> list[Fault]:
    one = {kind: dice.choice(world.of(kind)) for kind in ("api", "worker", "steward", "prefect", "postgres", "s3")}
    cards = [
        Fault("kill", process.name, frozenset({process.name}), lambda p=process: _killed(p)) for process in one.values()
    ]
    patient, hurried = dice.choice(world.of("worker")[:-1]), world.of("worker")[-1]
    for process in (dice.choice(world.of("api")), patient, hurried, dice.choice(world.of("steward"))):
        kind = "drain in a hurry" if process is hurried else "drain"
        cards.append(
            Fault(kind, process.name, frozenset({process.name}), lambda p=process: _terminated(world, p), (0.5, 2))
        )
    for kind in ("api", "worker", "steward", "prefect", "s3"):
        process = dice.choice(world.of(kind))
        lasts = (LEASE + 1, LEASE + 4)
        cards.append(Fault("stop", process.name, frozenset({process.name}), lambda p=process: _stopped(p), lasts))

    bad = {
        "cut": Weather(cut=True),
        "hang": Weather(hang=True),
        "slow": Weather(latency=0.05, jitter=0.15),
        "throttle": Weather(rate=32 * 1024),
    }

    def disturb(kind: str, on: str, links: list[str], lasts: tuple[float, float] = (1, 6)) -> None:
        cards.append(Fault(kind, on, frozenset(links), lambda: _under(world, links, bad[kind]), lasts))

    for kind in bad:
        disturb(kind, link := dice.choice(list(world.links)), [link])
    for server in ("postgres", "s3", "prefect"):
        kind = dice.choice(list(bad))
        disturb(kind, f"all>{server}", world.links_to(server))
    for kind in ("cut", "hang"):
        disturb(kind, "all>postgres", world.links_to("postgres"))
    alone = dice.choice(world.of("worker")).name
    disturb("hang", f"{alone}>all", [link for link in world.links if link.startswith(alone)], (LEASE + 1, LEASE + 5))

    for kind, name in (("task", dice.choice(["add", "doze"])), ("lane", NARROW[0])):
        touches = frozenset({f"pause of {name}"})
        cards.append(Fault("pause", name, touches, lambda k=kind, n=name: _paused(world, k, n, dice), (1, 6)))
    cards.append(Fault("slow commits", "postgres", frozenset({"commits"}), lambda: _slow_commits(world), (4, 8)))
    dice.shuffle(cards)
    long = Fault("held snapshot", "postgres", frozenset({"snapshot"}), lambda: _snapshot(world), (20, 20))
    return [long, *cards]  # the long one first, or a short run would wait for it at its end


@dataclass
class Storm:
    """Faults for `seconds`, at most two at a time, with calm between; the first deck is always played to its end."""

    world: World
    seed: int
    seconds: float
    calm: float
    """Seconds between two faults of a player, at most."""
    log: list[dict[str, object]] = field(default_factory=list)
    _touched: set[str] = field(default_factory=set)
    _deck: list[Fault] = field(default_factory=list)
    _decks: int = 0

    async def rage(self) -> None:
        async with asyncio.TaskGroup() as players:
            for number in (0, 1):
                players.create_task(self._play(random.Random(self.seed * 1000 + number)))

    def _draw(self, dice: random.Random) -> Fault | None:
        """The next fault that touches none of the names in use; None when the storm is over."""
        over = self.world.now > self.seconds
        if not self._deck and not (over and self._decks):
            self._deck, self._decks = _deck(self.world, dice), self._decks + 1
        if over and self._decks > 1:
            return None
        card = next((card for card in self._deck if not card.touches & self._touched), None)
        if card is not None:
            self._deck.remove(card)
        return card

    async def _play(self, dice: random.Random) -> None:
        while fault := self._draw(dice):
            lasts = dice.uniform(*fault.lasts)
            entry: dict[str, object] = {"at": round(self.world.now, 1), "kind": fault.kind, "on": fault.on}
            self.log.append(entry)
            self._touched |= fault.touches
            async with fault.shape():
                await asyncio.sleep(lasts)
            self._touched -= fault.touches
            entry["until"] = round(self.world.now, 1)
            await asyncio.sleep(dice.uniform(0.2, self.calm))
