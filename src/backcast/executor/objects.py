"""Gives an executor the two calls to the store that its cache needs, through the supervisor: it has no credentials."""

import asyncio
import logging
from typing import Protocol
from uuid import uuid4

from backcast import protocol
from backcast.errors import BackcastError, StoreUnavailable
from backcast.process.channel import Channel, Message
from backcast.store import Missing

log = logging.getLogger("backcast.executor")


class CacheAway(BackcastError):
    """No `Unavailable`, which a task may raise as well: only this makes its run wait, whatever its retries are."""

    code, title = StoreUnavailable.code, StoreUnavailable.title


class Objects(Protocol):
    """What the cache needs of a store. Raises `CacheAway`."""

    async def get(self, key: str) -> bytes: ...

    async def put(self, key: str, body: bytes) -> None: ...


class RemoteObjects:
    def __init__(self, channel: Channel, *, largest: int) -> None:
        """A larger object than `largest` bytes is not stored."""
        self._channel, self._largest = channel, largest
        self._asked = dict[bytes, asyncio.Future[Message]]()

    async def get(self, key: str) -> bytes:
        return (await self._ask(protocol.GET, key, b"")).body

    async def put(self, key: str, body: bytes) -> None:
        if len(body) > self._largest:
            log.warning("a value is not cached, as its record has %d MiB", len(body) >> 20)
            return
        await self._ask(protocol.PUT, key, body)

    async def _ask(self, kind: int, key: str, body: bytes) -> Message:
        name, answered = uuid4().bytes, asyncio.get_running_loop().create_future()
        self._asked[name] = answered
        self._channel.send(Message(kind, name, meta=key.encode(), body=body))
        try:
            answer = await answered
        finally:
            del self._asked[name]
        if answer.number == protocol.MISSING:
            raise Missing(key)
        if answer.number == protocol.UNAVAILABLE:
            raise CacheAway(answer.body.decode())
        return answer

    def answered(self, answer: Message) -> None:
        waiting = self._asked.get(answer.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)
