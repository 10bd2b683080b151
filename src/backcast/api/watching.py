"""The one connection of an API process that listens, for all requests that wait. Opened when it is needed."""

import asyncio
import contextlib

from backcast.errors import LedgerUnavailable
from backcast.ledger import watching
from backcast.ledger.connection import Ledger
from backcast.process import background

_LINGER = 30.0
"""Seconds without a wait after which the connection is closed."""


class Watching:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.looks = list[watching.Look]()
        """Complete before the first `ask`."""

    def ask(self) -> None:
        """Look for what is new, and then for all, for as long as anything is wanted."""
        self._asked.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(background.keep("watch runs", self._watch))

    async def _watch(self) -> None:
        """An outage of the database ends no wait."""
        while True:
            with contextlib.suppress(LedgerUnavailable):
                return await watching.watch(self._ledger, self.looks, self._asked, idle=_LINGER)
            await asyncio.sleep(1)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
