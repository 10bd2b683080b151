"""Keeps results and large inputs in a folder or an S3 bucket; an object is there whole or not at all.

Decides whether an object is missing or the store is away, and never confuses the two. Knows nothing of runs.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from backcast import settings
from backcast.errors import ConfigurationError, StoreUnavailable
from backcast.store.bucket import Bucket
from backcast.store.folder import Folder
from backcast.store.objects import CHUNK, PAGE, Missing, Object

__all__ = ["CHUNK", "PAGE", "Missing", "Object", "Store", "open_store"]

T = TypeVar("T")

_CLOCK = "ledger/clock"
"""An object that is put to learn the store's time."""
Measured = Callable[[str, float, bool], object]
"""Called after each call to a store: with its kind, the seconds that it took, and whether the store was away."""
_BATCH = 16
"""Objects deleted at the same time."""


def _ignored(_kind: str, _seconds: float, _is_away: bool) -> None:
    pass


def open_store(settings: settings.Store, measured: Measured = _ignored) -> "Store":
    """The store that the settings name; nothing is opened before the first use. Calls to the fallback are not
    measured."""
    older = settings.fallback
    if older.url is None:
        return Store(_place(settings, "BACKCAST_STORE__URL"), settings.timeout.total_seconds(), measured=measured)
    there = settings.model_copy(update={"public_endpoint": None, **older.model_dump(exclude={"create"})})
    fallback = Store(_place(there, "BACKCAST_STORE__FALLBACK__URL"), settings.timeout.total_seconds())
    return Store(_place(settings, "BACKCAST_STORE__URL"), settings.timeout.total_seconds(), fallback, measured)


def _place(settings: settings.Store, variable: str) -> Folder | Bucket:
    scheme, _, rest = settings.url.partition("://")
    if scheme == "file" and rest:
        return Folder(Path(rest).expanduser().absolute())
    bucket, _, prefix = rest.partition("/")
    if scheme == "s3" and bucket:
        return Bucket(settings, bucket, prefix.strip("/"))
    raise ConfigurationError(f"{variable} must be `file:///folder` or `s3://bucket/prefix`.")


class Store:
    """Objects by key, such as `results/<run id>/<fence>.json`. Every method may raise `StoreUnavailable`.

    What a `fallback` holds can be read too; all else concerns the store itself.
    """

    def __init__(
        self,
        place: Folder | Bucket,
        timeout: float,
        fallback: "Store | None" = None,
        measured: Measured = _ignored,
    ) -> None:
        self._place = place
        self._timeout = timeout
        self.fallback = fallback
        self._measured = measured

    async def put(self, key: str, body: bytes, *, is_copied: bool = False) -> None:
        """Store an object, or replace it; when this returns, it can be read. `is_copied`: the ledger will hold a
        durable copy, so a folder need not wait for its disk, which takes longer than all the rest of a short run."""
        await self._within("write", self._place.write(_checked(key), body, is_copied))

    async def create(self, key: str, body: bytes) -> bool:
        """Store an object unless there is one already: of any number of callers at once, one does. Whether it was this
        one."""
        return await self._within("write", self._place.create(_checked(key), body))

    async def get(self, key: str) -> bytes:
        """The whole object. Raises `Missing`."""
        return b"".join([chunk async for chunk in await self.stream(key)])

    async def stream(self, key: str, start: int = 0) -> AsyncIterator[bytes]:
        """The object from this byte on, in chunks, the first of which is read before this returns. There is none if the
        object has no such byte. Raises `Missing`."""
        try:
            first, size = await self._within("read", self._place.read(_checked(key), start))
        except Missing:
            if self.fallback is None:
                raise
            return await self.fallback.stream(key, start)

        async def chunks() -> AsyncIterator[bytes]:
            chunk, at = first, start
            while chunk:
                yield chunk
                at += len(chunk)
                if at >= size:
                    return
                chunk, _ = await self._within("read", self._place.read(key, at))
            if at < size:
                raise self._unavailable(f"no longer has all of {key}")

        return chunks()

    async def link(self, key: str) -> str | None:
        """A URL that lets its bearer read the object for five minutes, where callers can reach the store themselves;
        None where they can't, and where the fallback may have it. Raises `Missing`."""
        try:
            return await self._within("link", self._place.link(_checked(key)))
        except Missing:
            if self.fallback is None:
                raise
            return None

    async def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there, or can't be, are no error."""
        left = [key for key in keys if _is_key(key)]
        for at in range(0, len(left), _BATCH):
            await self._within("remove", self._place.remove(left[at : at + _BATCH]))

    async def pages(self, kind: str) -> AsyncIterator[list[Object]]:
        """The objects whose keys begin with `<kind>/`. Objects that come or go meanwhile may be among them or not."""
        async with contextlib.aclosing(self._place.pages(_checked(kind))) as pages:
            while (page := await self._within("list", anext(pages, None))) is not None:
                yield page

    async def now(self) -> datetime:
        """The time by the clock that sets `Object.changed`; ours, or the database's, may differ from it by hours."""
        await self.put(_CLOCK, b"1", is_copied=True)
        seen = [
            each.changed async for page in self.pages(_CLOCK.partition("/")[0]) for each in page if each.key == _CLOCK
        ]
        if not seen:
            raise self._unavailable("does not list an object that was just put")
        return seen[0]

    async def check(self) -> None:
        """Readiness: the folder or bucket is there and lets us in."""
        await self._within("check", self._place.check())

    async def ensure(self) -> None:
        """Create the folder or bucket if it is not there. No other method does: it might replace an unmounted one."""
        await self._within("check", self._place.ensure())

    async def aclose(self) -> None:
        await self._place.aclose()
        if self.fallback is not None:
            await self.fallback.aclose()

    async def _within(self, kind: str, work: Awaitable[T]) -> T:
        began, is_away = time.monotonic(), False
        try:
            async with asyncio.timeout(self._timeout):
                return await work
        except StoreUnavailable:
            is_away = True
            raise
        except TimeoutError:
            is_away = True
            raise self._unavailable(f"did not answer within {self._timeout:g} s") from None
        except self._place.failures as error:  # not chained: the causes may contain keys
            is_away = True
            raise self._unavailable(self._place.explain(error)) from None
        finally:
            self._measured(kind, time.monotonic() - began, is_away)

    def _unavailable(self, why: str) -> StoreUnavailable:
        return StoreUnavailable(f"{self._place} {why}.", reason=self._place.address)


def _checked(key: str) -> str:
    if not _is_key(key):
        raise ValueError(f"{key[:200]!r} can't be the key of an object.")
    return key


def _is_key(key: str) -> bool:
    """Whether it means the same in a folder and in a bucket."""
    dotted = any(part[:1] in ("", ".") for part in key.split("/"))
    return not dotted and "~" not in key and key.isprintable() and len(key.encode()) <= 250
