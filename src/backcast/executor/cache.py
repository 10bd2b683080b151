"""Keeps the records of Prefect's cache policies in our store, as plain JSON."""

import asyncio
import hashlib
import json
import typing
from concurrent.futures import Future
from typing import Any, Literal, Self, TypeVar

from prefect.filesystems import WritableFileSystem
from prefect.serializers import Serializer
from pydantic import PrivateAttr

from backcast.executor.objects import Objects
from backcast.executor.values import to_json

T = TypeVar("T")


class PlainJSON(Serializer):
    """Writes Prefect's cache records as plain JSON. The stock serializer imports the classes that a record names."""

    type: Literal["plainjson"] = "plainjson"  # pyright: ignore[reportIncompatibleVariableOverride]  # Prefect's own way

    def dumps(self, obj: Any) -> bytes:
        return to_json(obj)

    def loads(self, blob: bytes) -> Any:
        return json.loads(blob)


class CacheStorage(WritableFileSystem):
    """Gives Prefect our store for the records of cache policies. Usable from any thread: each call runs on our loop."""

    _block_type_slug = "backcast-cache"
    _store: Objects = PrivateAttr()
    _loop: asyncio.AbstractEventLoop = PrivateAttr()

    @classmethod
    def over(cls, store: Objects, loop: asyncio.AbstractEventLoop) -> Self:
        storage = cls()
        storage._store, storage._loop = store, loop
        return storage

    async def aread_path(self, path: str) -> bytes:
        return await asyncio.wrap_future(self._on_loop(self._store.get(self._key(path))))

    async def awrite_path(self, path: str, content: bytes) -> None:
        await asyncio.wrap_future(self._on_loop(self._store.put(self._key(path), content)))

    # Prefect's base class has these names. Prefect calls them with `_sync=True` in the threads of sync tasks.
    def read_path(self, path: str, _sync: bool = True) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._from_thread(self._store.get(self._key(path)))

    def write_path(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, path: str, content: bytes, _sync: bool = True
    ) -> None:
        self._from_thread(self._store.put(self._key(path), content))

    def _resolve_path(self, path: str) -> str:
        return path

    def _key(self, path: str) -> str:
        return f"cache/{hashlib.sha256(path.encode()).hexdigest()}"  # a user's cache key may be any text

    def _on_loop(self, work: typing.Coroutine[Any, Any, T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _from_thread(self, work: typing.Coroutine[Any, Any, T]) -> T:
        if asyncio._get_running_loop() is self._loop:  # pyright: ignore[reportPrivateUsage]  # it does not raise
            work.close()
            raise RuntimeError("A sync task that an async task calls can't use the cache: it would wait for itself.")
        return self._on_loop(work).result()
