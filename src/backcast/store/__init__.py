"""Keeps results and large inputs in a folder or an S3 bucket; an object is there whole or not at all.

Decides whether an object is missing or the store is away, and never confuses the two. Knows nothing of runs.
"""

import asyncio
import base64
import contextlib
import hashlib
import itertools
import os
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from backcast import settings
from backcast.errors import ConfigurationError, StoreUnavailable

T = TypeVar("T")

CHUNK = 4 * 1024 * 1024
"""Bytes read at a time: no connection or file stays open while a slow reader takes them."""
PAGE = 1000
"""Objects listed at a time, the most that S3 gives."""
_BATCH = 16
"""Objects deleted at the same time."""
_LINK_LASTS = 300
"""Seconds in which a link can be followed; a download that has begun by then may go on."""
_DRAFTS = ".drafts"
"""Where files of a folder are written before they are moved into place. Its presence distinguishes the folder from the
empty mount point that is there when the folder is not mounted."""
_ABANDONED = 24 * 3600
"""Seconds after which a draft can't be in use any more."""


class Missing(Exception):
    """There is no such object, in a store that is there."""


@dataclass(frozen=True, slots=True)
class Object:
    key: str
    changed: datetime
    """When it was put, by the store's clock."""


def open_store(settings: settings.Store) -> "Store":
    """The store that the settings name; nothing is opened before the first use."""
    scheme, _, rest = settings.url.partition("://")
    if scheme == "file" and rest:
        return Store(_Folder(Path(rest).expanduser().absolute()), settings.timeout.total_seconds())
    bucket, _, prefix = rest.partition("/")
    if scheme == "s3" and bucket:
        return Store(_Bucket(settings, bucket, prefix.strip("/")), settings.timeout.total_seconds())
    raise ConfigurationError("BACKCAST_STORE__URL must be `file:///folder` or `s3://bucket/prefix`.")


class Store:
    """Objects by key, such as `results/<run id>/<fence>.json`. Every method may raise `StoreUnavailable`."""

    def __init__(self, place: "_Folder | _Bucket", timeout: float) -> None:
        self._place = place
        self._timeout = timeout

    async def put(self, key: str, body: bytes, *, is_copied: bool = False) -> None:
        """Store an object, or replace it; when this returns, it can be read. `is_copied`: the ledger will hold a
        durable copy, so a folder need not wait for its disk, which takes longer than all the rest of a short run."""
        await self._within(self._place.write(_checked(key), body, is_copied))

    async def get(self, key: str) -> bytes:
        """The whole object. Raises `Missing`."""
        return b"".join([chunk async for chunk in await self.stream(key)])

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        """The object in chunks, the first of which is read before this returns. Raises `Missing`."""
        first, size = await self._within(self._place.read(_checked(key), 0))

        async def chunks() -> AsyncIterator[bytes]:
            chunk, at = first, 0
            while chunk:
                yield chunk
                at += len(chunk)
                if at >= size:
                    return
                chunk, _ = await self._within(self._place.read(key, at))
            if at < size:
                raise StoreUnavailable(f"{self._place} no longer has all of {key}.")

        return chunks()

    async def link(self, key: str) -> str | None:
        """A URL that lets its bearer read the object for five minutes, where callers can reach the store themselves;
        None where they can't. Raises `Missing`."""
        return await self._within(self._place.link(_checked(key)))

    async def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error."""
        left = [_checked(key) for key in keys]
        for at in range(0, len(left), _BATCH):
            await self._within(self._place.remove(left[at : at + _BATCH]))

    async def pages(self, kind: str) -> AsyncIterator[list[Object]]:
        """The objects whose keys begin with `<kind>/`. Objects that come or go meanwhile may be among them or not."""
        async with contextlib.aclosing(self._place.pages(_checked(kind))) as pages:
            while (page := await self._within(anext(pages, None))) is not None:
                yield page

    async def check(self) -> None:
        """Readiness: the folder or bucket is there and lets us in."""
        await self._within(self._place.check())

    async def ensure(self) -> None:
        """Create the folder or bucket if it is not there. Other methods don't: an unmounted folder is not created."""
        await self._within(self._place.ensure())

    async def aclose(self) -> None:
        await self._place.aclose()

    async def _within(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self._timeout):
                return await work
        except TimeoutError:
            raise StoreUnavailable(f"{self._place} did not answer within {self._timeout:g} s.") from None
        except self._place.failures as error:  # not chained: the causes may contain keys
            raise StoreUnavailable(f"{self._place} {self._place.explain(error)}.") from None


def _checked(key: str) -> str:
    """A key of ours, if it means the same in a folder and in a bucket; else `ValueError`."""
    dotted = any(part[:1] in ("", ".") for part in key.split("/"))
    if dotted or "~" in key or not key.isprintable() or len(key.encode()) > 250:
        raise ValueError(f"{key[:200]!r} can't be the key of an object.")
    return key


class _Folder:
    """A key is a file in the folder of its first part: a new folder for every run takes ext4 five times as long."""

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, root: Path) -> None:
        self._root = root
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="store")

    def __str__(self) -> str:
        return f"The folder {self._root}"

    def explain(self, error: Exception) -> str:
        return f"can't be used: {error.strerror if isinstance(error, OSError) else error}"

    async def read(self, key: str, start: int) -> tuple[bytes, int]:
        return await self._in_thread(lambda: self._read(key, start))

    async def write(self, key: str, body: bytes, is_copied: bool) -> None:
        await self._in_thread(lambda: self._write(key, body, is_copied))

    async def link(self, key: str) -> None:
        """None: callers can't read the folder."""

    async def remove(self, keys: list[str]) -> None:
        await self._in_thread(lambda: self._remove(keys))

    async def pages(self, kind: str) -> AsyncGenerator[list[Object]]:
        opened = contextlib.ExitStack()
        turn = threading.Lock()  # a page that took too long may still be read when the folder is to be closed

        def scan() -> Iterator[Object]:
            self._is_there()
            with contextlib.suppress(FileNotFoundError):  # none of its kind yet
                for entry in opened.enter_context(os.scandir(self._root / kind)):
                    with contextlib.suppress(FileNotFoundError):  # removed since
                        changed = datetime.fromtimestamp(entry.stat().st_mtime, UTC)
                        yield Object(f"{kind}/{entry.name.replace('~', '/')}", changed)

        def page() -> list[Object]:
            with turn:
                return list(itertools.islice(objects, PAGE))

        def close() -> None:
            with turn:
                opened.close()

        objects = scan()
        try:
            while found := await self._in_thread(page):
                yield found
        finally:
            self._threads.submit(close)

    async def check(self) -> None:
        await self._in_thread(self._check)

    async def ensure(self) -> None:
        await self._in_thread(self._ensure)

    async def aclose(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _place(self, key: str) -> str:
        kind, slash, rest = key.partition("/")
        return f"{self._root}/{kind}{slash}{rest.replace('/', '~')}"

    def _path(self, key: str) -> Path:
        return Path(self._place(key))

    def _read(self, key: str, start: int) -> tuple[bytes, int]:
        try:
            with self._path(key).open("rb") as file:
                file.seek(start)
                return file.read(CHUNK), os.fstat(file.fileno()).st_size
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._is_there()
            raise Missing(key) from None

    def _write(self, key: str, body: bytes, is_copied: bool) -> None:
        # Every result passes here: plain calls on strings cost half as much as pathlib and file objects.
        path, draft = self._place(key), f"{self._root}/{_DRAFTS}/{secrets.token_hex(12)}"
        try:
            file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                rest = memoryview(body)
                while rest:
                    rest = rest[os.write(file, rest) :]
                if not is_copied:
                    os.fsync(file)
            finally:
                os.close(file)
            try:
                os.replace(draft, path)  # noqa: PTH105
            except FileNotFoundError:  # the first of its kind
                self._path(key).parent.mkdir(exist_ok=True)
                os.replace(draft, path)  # noqa: PTH105
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(draft)  # noqa: PTH108
            self._is_there()
            raise

    def _remove(self, keys: list[str]) -> None:
        self._is_there()
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def _check(self) -> None:
        self._is_there()
        if not os.access(self._root / _DRAFTS, os.W_OK | os.X_OK):
            raise StoreUnavailable(f"{self} can't be written: look at its owner, its mode and its mount.")

    def _is_there(self) -> None:
        if not (self._root / _DRAFTS).is_dir():
            raise StoreUnavailable(f"{self} is not there, or not mounted: see BACKCAST_STORE__URL.")

    def _ensure(self) -> None:
        drafts = self._root / _DRAFTS
        drafts.mkdir(parents=True, exist_ok=True)
        for left in drafts.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - _ABANDONED:
                    left.unlink()


class _Bucket:
    def __init__(self, settings: settings.Store, bucket: str, prefix: str) -> None:
        from aiohttp import ClientError  # half a second of imports that a folder does not need
        from botocore.exceptions import BotoCoreError
        from s3fs import S3FileSystem

        self.failures: tuple[type[Exception], ...] = (OSError, BotoCoreError, ClientError)
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._region = settings.region
        self._host = urlsplit(settings.endpoint).netloc.rpartition("@")[2] if settings.endpoint else "AWS"
        seconds = settings.timeout.total_seconds()
        open_s3: Any = partial(
            S3FileSystem,
            asynchronous=True,
            skip_instance_cache=True,
            use_listings_cache=False,
            key=settings.access_key and settings.access_key.get_secret_value(),
            secret=settings.secret_key and settings.secret_key.get_secret_value(),
            client_kwargs={"region_name": settings.region, "verify": settings.ca_bundle and str(settings.ca_bundle)},
            config_kwargs={
                "connect_timeout": seconds,
                "read_timeout": seconds,
                "max_pool_connections": 50,
                "retries": {"total_max_attempts": 2, "mode": "standard"},
                "s3": {"addressing_style": "path" if settings.path_style else "virtual"},
                "request_checksum_calculation": "when_required",  # stores other than AWS trip over the newer ones
                "response_checksum_validation": "when_required",
                "signature_version": "s3v4",  # of links too
            },
        )
        self._s3: Any = open_s3(endpoint_url=settings.endpoint)
        self._s3.retries = 1  # botocore's are enough
        public = settings.public_endpoint
        self._public: Any = open_s3(endpoint_url=public) if public else None  # signs only, and sends no request

    def __str__(self) -> str:
        return f"The bucket {self._bucket} at {self._host}"

    def explain(self, error: Exception) -> str:
        match _code(error):
            case "NoSuchBucket" | "404":
                return "does not exist: create it, or correct BACKCAST_STORE__URL"
            case "":
                kind = type(error).__name__
                look = "the access key" if "Credentials" in kind else "BACKCAST_STORE__ENDPOINT and the network"
                return f"can't be reached ({kind}): look at {look}"
            case code if isinstance(error, PermissionError):
                return f"refuses us ({code}): look at the access key, and at its rights to read, write, delete and list"
            case code:
                return f"answered with the error {code}"

    async def read(self, key: str, start: int) -> tuple[bytes, int]:
        try:
            answer = await self._of(key, "get_object", Range=f"bytes={start}-{start + CHUNK - 1}")
        except OSError as error:
            if _code(error) == "InvalidRange":  # nothing from there on: an empty object
                return b"", start
            raise
        async with answer["Body"] as body:
            chunk: bytes = await body.read()
        return chunk, int(answer.get("ContentRange", f"/{len(chunk)}").rpartition("/")[2])

    async def link(self, key: str) -> str | None:
        if self._public is None:
            return None
        await self._of(key, "head_object")
        where = f"{self._bucket}/{self._prefix}{key}"
        return await self._public._url(where, expires=_LINK_LASTS, ResponseContentType="application/json")

    async def write(self, key: str, body: bytes, is_copied: bool) -> None:  # noqa: ARG002  # always durable
        # The digest: a store may take a request that ends after its headers for an empty object.
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        await self._call("put_object", Key=self._prefix + key, Body=body, ContentMD5=digest)

    async def remove(self, keys: list[str]) -> None:
        # One by one: not every store has the call that deletes many.
        await asyncio.gather(*(self._call("delete_object", Key=self._prefix + key) for key in keys))

    async def pages(self, kind: str) -> AsyncGenerator[list[Object]]:
        more: dict[str, str] = {}
        while True:
            answer = await self._call("list_objects_v2", Prefix=f"{self._prefix}{kind}/", MaxKeys=PAGE, **more)
            yield [
                Object(each["Key"].removeprefix(self._prefix), each["LastModified"])
                for each in answer.get("Contents", [])
            ]
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    async def check(self) -> None:
        await self._call("head_bucket")

    async def ensure(self) -> None:
        try:
            await self.check()
        except FileNotFoundError:
            elsewhere = self._region and self._region != "us-east-1"
            where = {"CreateBucketConfiguration": {"LocationConstraint": self._region}} if elsewhere else {}
            with contextlib.suppress(FileExistsError):
                await self._call("create_bucket", **where)

    async def aclose(self) -> None:
        for opened in (self._s3, self._public):
            if opened is not None and opened._s3 is not None:
                await opened._s3.close()

    async def _of(self, key: str, operation: str, **arguments: Any) -> Any:
        """Ask about one object. Raises `Missing`."""
        try:
            return await self._call(operation, Key=self._prefix + key, **arguments)
        except FileNotFoundError:
            await self.check()  # stores answer differently when the bucket is missing
            raise Missing(key) from None

    async def _call(self, operation: str, **arguments: Any) -> Any:
        return await self._s3._call_s3(operation, Bucket=self._bucket, **arguments)


def _code(error: Exception) -> str:
    """The store's own code for the error; s3fs keeps it in the cause. Empty when the store did not answer."""
    response: Any = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
