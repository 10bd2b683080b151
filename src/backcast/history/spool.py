"""Keeps on the disk the events that do not fit into memory, in pieces, up to a size; the oldest are dropped first."""

import logging
import tempfile
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO

log = logging.getLogger("backcast.history")

PIECE = 4 * 1024 * 1024
"""Bytes written to one file, and read back at once."""


@dataclass
class _Piece:
    file: IO[bytes]
    size: int = 0
    count: int = 0


class Spool:
    """Not for several threads at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: deque[_Piece] = deque()
        self.size = 0
        """Bytes on the disk."""
        self.count = 0

    def write(self, bodies: Iterable[bytes]) -> int:
        """Append these JSON texts; returns how many were dropped, of these or of the oldest, because there is no room.

        Raises nothing: a full disk drops them too.
        """
        dropped = 0
        for body in bodies:
            try:
                if not self._pieces or self._pieces[-1].size >= min(PIECE, self._limit / 4):
                    # Without a name: a process that is killed leaves no file.
                    self._pieces.append(_Piece(tempfile.TemporaryFile("w+b", 0, prefix="backcast-events-")))  # noqa: SIM115
                piece = self._pieces[-1]
                piece.file.write(body + b"\n")
            except OSError as error:
                log.debug("an event can't be spooled: %s", error)
                dropped += 1
                continue
            piece.size += len(body) + 1
            piece.count += 1
            self.size += len(body) + 1
            self.count += 1
            while self.size > self._limit:
                dropped += self._pop().count
        return dropped

    def read(self) -> list[bytes]:
        """Remove and return the oldest piece; nothing is left when it is empty."""
        if not self._pieces:
            return []
        piece = self._pop(closing=False)
        with piece.file as file:
            file.seek(0)
            return file.read().split(b"\n")[: piece.count]

    def close(self) -> None:
        while self._pieces:
            self._pop()

    def _pop(self, *, closing: bool = True) -> _Piece:
        piece = self._pieces.popleft()
        self.size -= piece.size
        self.count -= piece.count
        if closing:
            piece.file.close()
        return piece
