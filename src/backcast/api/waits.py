"""Holds requests until their run has ended: a bounded number at once, woken by the ledger, ended with their client."""

import asyncio
import contextlib
import re
from collections.abc import Sequence
from uuid import UUID

import asyncpg
from fastapi import Request

from backcast.api.watching import Watching
from backcast.errors import BackcastError, LedgerUnavailable
from backcast.ledger import runs
from backcast.ledger.connection import ENDED, Ledger
from backcast.models import Run

LONGEST = 50
"""The most seconds that `Prefer: wait` is honoured for: proxies cut a request off after 60."""
_PREFER = re.compile(r'\s*wait\s*=\s*("?)(\d{1,9})\1\s*', re.IGNORECASE)


def asked(request: Request) -> int | None:
    """The seconds of the request's `Prefer: wait=N` that are honoured; None: it has none, or N is no whole number."""
    for preference in ",".join(request.headers.getlist("prefer")).split(","):
        if found := _PREFER.fullmatch(preference.partition(";")[0]):
            return min(int(found[2]), LONGEST)
    return None


class Waits:
    """The waits of one process: at most `most` at once; a further one is answered without waiting."""

    channels: Sequence[str] = (ENDED,)

    def __init__(self, ledger: Ledger, watching: Watching, most: int) -> None:
        self._ledger, self._watching, self._most = ledger, watching, most
        self._held = 0
        self._waiting: dict[UUID, set[asyncio.Future[Run]]] = {}
        self._new = set[UUID]()
        self._stopped = False
        watching.looks.append(self)

    async def until_ended(self, request: Request, run: Run) -> tuple[Run, dict[str, str]]:
        """The run once it has ended, or as it is when the time that the request asks for is over; as it was, if the
        database is away by then. And the headers that tell so. Returns early when the client is gone, at a stop, and
        when too many wait."""
        seconds = asked(request)
        if seconds is None:
            return run, {}
        if seconds and not run.state.is_final:
            if self._held >= self._most or self._stopped:
                return run, {}
            ended = await self._ended(request, run.id, seconds)
            with contextlib.suppress(LedgerUnavailable):  # a submission is answered: nobody else knows its run's id
                run = ended or await runs.get(self._ledger, run.id)
        return run, {"Preference-Applied": f"wait={seconds}"}

    async def _ended(self, request: Request, run_id: UUID, seconds: int) -> Run | None:
        ended: asyncio.Future[Run] = asyncio.get_running_loop().create_future()
        self._held += 1
        self._waiting.setdefault(run_id, set()).add(ended)
        self._new.add(run_id)  # it may have ended since it was read
        self._watching.ask()
        left = asyncio.create_task(gone(request))
        try:
            await asyncio.wait({ended, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            self._held -= 1
            if not ended.done():
                ended.cancel()
            self._forget(run_id, ended)
        return None if ended.cancelled() else ended.result()

    def _forget(self, run_id: UUID, ended: "asyncio.Future[Run]") -> None:
        others = self._waiting.get(run_id, set())
        others.discard(ended)
        if not others:
            self._waiting.pop(run_id, None)

    @property
    def held(self) -> int:
        """Requests that wait now."""
        return self._held

    @property
    def is_wanted(self) -> bool:
        return bool(self._waiting)

    async def look(self, connection: asyncpg.Connection, *, for_all: bool) -> bool:
        ids = list(self._waiting if for_all else self._new)
        self._new.clear()
        for run in await runs.those_ended(connection, ids) if ids else ():
            for ended in self._waiting.pop(run.id, set()):
                if not ended.done():
                    ended.set_result(run)
        return bool(ids)

    def stop(self) -> None:
        """Answer all waits now, and hold no further ones."""
        self._stopped = True
        for waits in self._waiting.values():
            for ended in waits:
                ended.cancel()


async def gone(request: Request) -> None:
    """Returns when the client has closed its connection, or sends a body that is not wanted."""
    with contextlib.suppress(BackcastError):
        while (await request.receive())["type"] != "http.disconnect":
            pass
