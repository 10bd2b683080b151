"""Watches, on one connection of a process, what all of its requests wait for: woken by notifications, guaranteed by a
poll. Decides how often it looks; knows nothing of what it looks for.
"""

import asyncio
import contextlib
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import asyncpg

from backcast.ledger.connection import Ledger

POLL = 1.0
"""Seconds after which it looks without a notification, because notifications may be lost."""
BURDEN = 10.0
"""Looking for all may keep the database busy for one tenth of the time. Each new one is looked for once, at once."""


class Look(Protocol):
    """Something that requests of this process wait for."""

    channels: Sequence[str]
    """The notifications after which it looks for all that is wanted."""

    @property
    def is_wanted(self) -> bool: ...

    async def look(self, connection: asyncpg.Connection, *, for_all: bool) -> bool:
        """Look for all, or for those only that are new; returns whether there was anything to look for."""
        ...


@dataclass(slots=True)
class _Turn:
    look: Look
    due: float
    is_reported: bool = True

    @property
    def is_due(self) -> bool:
        return self.is_reported or time.monotonic() >= self.due


async def watch(ledger: Ledger, looks: Collection[Look], asked: asyncio.Event, *, idle: float) -> None:
    """Look for what is new as soon as `asked` is set, for all when it is notified of a change, and at each poll.
    Returns after `idle` seconds in which nothing was wanted.

    Raises:
        LedgerUnavailable: the connection is lost.
    """
    turns = [_Turn(look, time.monotonic()) for look in looks]

    def report(turn: _Turn, *_: object) -> None:
        turn.is_reported = True
        asked.set()

    async with ledger.session() as connection:
        for turn in turns:
            for channel in turn.look.channels:
                await connection.add_listener(channel, partial(report, turn))
        needed = time.monotonic()
        while any(look.is_wanted for look in looks) or time.monotonic() - needed < idle:
            asked.clear()  # before the look: what changes from here on sets it again
            began, is_burden, is_idle = time.monotonic(), False, True
            for turn in turns:
                if for_all := turn.is_due:
                    turn.due, turn.is_reported = time.monotonic() + POLL, False
                if await turn.look.look(connection, for_all=for_all):
                    needed, is_idle = time.monotonic(), False
                    is_burden = is_burden or for_all
            if is_burden:
                await asyncio.sleep(max(0.005, BURDEN * (time.monotonic() - began)))
            elif is_idle:
                await connection.fetchval("select 1")  # a connection that is lost in silence is noticed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0, min(turn.due for turn in turns) - time.monotonic())):
                    await asked.wait()
