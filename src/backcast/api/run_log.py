"""Reads the log of a run from a place on: the objects of its attempts, which only grow, one after the other."""

import re
from collections.abc import AsyncGenerator
from uuid import UUID

from backcast.models import LOGS_KEPT, log_key
from backcast.store import Missing, Store

PIECE = 64 * 1024
"""Bytes of whole lines that are given at a time, unless one line has more: a slow reader takes them within seconds."""
_PLACE = re.compile(r"(\d{1,18})\.(\d{1,18})")


class RunLog:
    def __init__(self, store: Store, run_id: UUID, place: str = "") -> None:
        """`place`: the one at which an earlier reader was; any other text means the start."""
        self._store, self._run_id = store, run_id
        found = _PLACE.fullmatch(place)
        self.fence, self.at = (int(found[1]), int(found[2])) if found else (0, 0)
        """Its place: the attempt, and the number of bytes of its log that were given."""

    async def lines(self, fence: int) -> AsyncGenerator[bytes]:
        """The lines from its place on that are stored, up to the attempt with this fence, in pieces.

        Raises:
            StoreUnavailable: it can be called again.
        """
        for number in range(max(1, self.fence, fence - LOGS_KEPT + 1), fence + 1):
            if number != self.fence:
                self.fence, self.at = number, 0
            try:
                chunks = await self._store.stream(log_key(self._run_id, number), self.at)
            except Missing:  # it has logged nothing
                continue
            left = b""
            async for chunk in chunks:
                left += chunk
                while end := left.rfind(b"\n", 0, PIECE) + 1 or left.find(b"\n", PIECE) + 1:
                    self.at += end
                    yield left[:end]
                    left = left[end:]
