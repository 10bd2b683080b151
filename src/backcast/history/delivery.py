"""Posts batches, and finds the item for which the server refuses one. Decides whether a refusal is about an item or
about everything, as while the server's own database is away.
"""

import asyncio
from collections.abc import Sequence

import httpx

from backcast.history.server import PrefectServer

SERVERS_OWN = {401, 403, 404, 405, 407, 408, 421, 423, 425, 426, 429}
"""Client errors that are rarely about one item: a wrong key or address, a limit."""
PATIENCE = 3
"""Batches refused by such an error, or by the server's own (5xx), before an item is suspected."""
NONE_TAKEN = 3
"""Items suspected one after another, while none was taken, before it is the server after all."""

Refused = tuple[bytes, str]
"""An item, and the server's words."""


class Undelivered(Exception):
    """The server takes nothing now. `rest` should be sent again, in this order; `refused` never."""

    def __init__(self, rest: list[bytes], refused: list[Refused]) -> None:
        super().__init__()
        self.rest, self.refused = rest, refused


class Delivery:
    """The way to one path of the server."""

    def __init__(self, server: PrefectServer, path: str) -> None:
        self._server, self._path = server, path
        self._failures = 0

    async def send(self, batch: Sequence[bytes]) -> list[Refused]:
        """Post these JSON texts, and return those that the server refuses for their own sake: it has taken others, or
        its answer leaves no doubt.

        Raises:
            Undelivered: the server is away; the cause is an `httpx.HTTPError`.
        """
        parts, taken = [list(batch)] if batch else [], False
        suspects, refused = list[bytes](), list[Refused]()
        try:
            while parts:
                part = parts[-1]
                try:
                    await self._server.post(self._path, part)
                    taken = True
                except httpx.HTTPError as error:
                    if not (certain := _is_certain(error)) and not self._is_suspicious(error):
                        raise
                    if len(part) > 1:
                        middle = len(part) // 2
                        parts[-1:] = [part[middle:], part[:middle]]
                        continue
                    if certain:
                        refused.append((part[0], _words(error)))
                    else:
                        suspects.append(part[0])
                        if not taken and (len(suspects) == NONE_TAKEN or len(parts) == 1):
                            parts.pop()
                            raise
                parts.pop()
            while suspects:  # the server may have come back in between: only now is it about the item
                try:
                    await self._server.post(self._path, suspects[-1:])
                except httpx.HTTPError as error:
                    if not self._is_suspicious(error):
                        raise
                    refused.append((suspects[-1], _words(error)))
                suspects.pop()
        except (httpx.HTTPError, asyncio.CancelledError) as error:
            self._failures += not isinstance(error, httpx.ConnectError)
            raise Undelivered([item for part in reversed(parts) for item in part] + suspects, refused) from error
        self._failures = 0
        return refused

    def _is_suspicious(self, error: httpx.HTTPError) -> bool:
        return self._failures >= PATIENCE and not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)


def _is_certain(error: httpx.HTTPError) -> bool:
    if not isinstance(error, httpx.HTTPStatusError):
        return False
    return 400 <= error.response.status_code < 500 and error.response.status_code not in SERVERS_OWN


def _words(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.response.status_code} {error.response.text[:200]}".strip()
    return type(error).__name__
