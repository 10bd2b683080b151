"""The store in a folder: a file per object, complete when it appears."""

import asyncio
import contextlib
import errno
import itertools
import os
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from backcast.errors import StoreUnavailable
from backcast.store.objects import CHUNK, PAGE, Missing, Object

T = TypeVar("T")

_DRAFTS = ".drafts"
"""Where files of a folder are written before they are moved into place. Its presence distinguishes the folder from the
empty mount point that is there when the folder is not mounted."""
_ABANDONED = 24 * 3600
"""Seconds after which a draft can't be in use any more."""


class Folder:
    """A key is a file in the folder of its first part: a new folder for every run takes ext4 five times as long."""

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, root: Path) -> None:
        self._root = root
        self.address = str(root)
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="store")
        self._drafts, self._draft_numbers = f"{root}/{_DRAFTS}/{secrets.token_hex(12)}", itertools.count()
        self._copied = dict[asyncio.Future[None], tuple[str, bytes]]()
        """To be written by the next `_write_copied`."""
        self._writing: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        return "The folder of the store"

    def explain(self, error: Exception) -> str:
        return f"can't be used: {error.strerror if isinstance(error, OSError) else error}"

    async def read(self, key: str, start: int) -> tuple[bytes, int]:
        return await self._in_thread(lambda: self._read(key, start))

    async def write(self, key: str, body: bytes, is_copied: bool) -> None:
        if not is_copied:
            return await self._in_thread(lambda: self._write(key, body, is_copied))
        written = asyncio.get_running_loop().create_future()
        self._copied[written] = key, body
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_copied())
        try:
            return await written
        finally:
            self._copied.pop(written, None)

    async def _write_copied(self) -> None:
        """Write what has come together, time and again: a thread for each small object would cost more than they do."""
        try:
            while self._copied:
                batch, self._copied = self._copied, {}
                try:
                    failures = await self._in_thread(lambda: [self._failure(*each) for each in batch.values()])  # noqa: B023
                except OSError as error:
                    failures = [error] * len(batch)
                for written, failure in zip(batch, failures, strict=True):
                    if written.done():  # nobody waits for it any more
                        continue
                    if failure is None:
                        written.set_result(None)
                    else:
                        written.set_exception(failure)
        finally:
            self._writing = None

    def _failure(self, key: str, body: bytes) -> Exception | None:
        try:
            self._write(key, body, is_copied=True)
        except Exception as error:  # noqa: BLE001  # each write has its own
            return error
        return None

    async def create(self, key: str, body: bytes) -> bool:
        return await self._in_thread(lambda: self._create(key, body))

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
        try:
            working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RuntimeError as error:  # can't start new thread
            raise OSError(errno.EAGAIN, str(error)) from None
        return await working

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

    def _write(self, key: str, body: bytes, is_copied: bool, place: Callable[[str, str], object] = os.replace) -> None:
        # Every result passes here: plain calls on strings cost half as much as pathlib and file objects.
        path, draft = self._place(key), f"{self._drafts}.{next(self._draft_numbers)}"
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
                place(draft, path)
            except FileNotFoundError:  # the first of its kind
                self._path(key).parent.mkdir(exist_ok=True)
                _sync(self._root)
                place(draft, path)
            if not is_copied:  # or a power cut takes the name away from the bytes
                _sync(self._path(key).parent)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(draft)  # noqa: PTH108
            self._is_there()
            raise

    def _create(self, key: str, body: bytes) -> bool:
        try:
            self._write(key, body, is_copied=False, place=_place_if_free)
        except FileExistsError:
            return False
        return True

    def _remove(self, keys: list[str]) -> None:
        self._is_there()
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def _check(self) -> None:
        self._is_there()
        if not os.access(self._root / _DRAFTS, os.W_OK | os.X_OK):
            raise self._unavailable("can't be written: look at its owner, its mode and its mount")

    def _is_there(self) -> None:
        if not (self._root / _DRAFTS).is_dir():
            raise self._unavailable("is not there, or not mounted: see BACKCAST_STORE__URL")

    def _unavailable(self, why: str) -> StoreUnavailable:
        return StoreUnavailable(f"{self} {why}.", reason=self.address)

    def _ensure(self) -> None:
        drafts = self._root / _DRAFTS
        drafts.mkdir(parents=True, exist_ok=True)
        for left in drafts.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - _ABANDONED:
                    left.unlink()


def _sync(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _place_if_free(draft: str, path: str) -> None:
    """`link` fails if the name is taken, where `replace` takes it over."""
    os.link(draft, path)
    os.unlink(draft)  # noqa: PTH108
