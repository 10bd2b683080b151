"""The store: the same behaviour over a folder and a real S3 server; then the faults that only one of them can have."""

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from backcast import settings
from backcast.errors import ConfigurationError, StoreUnavailable
from backcast.models import uuid7
from backcast.store import CHUNK, PAGE, Missing, Object, Store, copying, open_store
from tests.support.s3 import S3Server, free_ports, s3_server
from tests.support.waiting import PATIENCE, until

LARGE = os.urandom(1 << 20) * 20
Opening = Callable[..., Store]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
async def opened(s3: S3Server) -> AsyncIterator[Opening]:
    """Opens stores, by default in the test server's, and closes them."""
    stores: list[Store] = []

    def open_(url: str = "s3://bucket", **changed: Any) -> Store:
        s3_settings = {"endpoint": s3.url, "access_key": s3.access_key, "secret_key": s3.secret_key}
        patient = {"timeout": timedelta(seconds=PATIENCE)}
        stores.append(open_store(settings.Store(**{"url": url, **s3_settings, **patient, **changed})))
        return stores[-1]

    yield open_
    for store in stores:
        await store.aclose()


@dataclass
class Place:
    """A store, and a way to take its folder or bucket away."""

    store: Store
    take_away: Callable[[], None]
    name: str


@pytest.fixture(params=["folder", "bucket"])
async def place(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server, opened: Opening) -> Place:
    if request.param == "folder":
        folder = tmp_path / "store"
        made = Place(opened(f"file://{folder}"), lambda: folder.rename(tmp_path / "gone"), str(folder))
    else:
        name = f"test-{os.urandom(4).hex()}"
        made = Place(opened(f"s3://{name}/some/prefix"), lambda: s3.client().delete_bucket(Bucket=name), name)
    await made.store.ensure()
    return made


@pytest.fixture
def store(place: Place) -> Store:
    return place.store


async def unavailable(work: Awaitable[object]) -> str:
    """The sentence of the error, which must not show secrets."""
    with pytest.raises(StoreUnavailable) as caught:
        await work
    assert "test-secret" not in str(caught.value)
    assert "test-access" not in str(caught.value)
    assert caught.value.__cause__ is None
    return str(caught.value)


# -- both ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"{}", b"", b"\x00\xff" * 1000, b"x" * CHUNK, b"x" * (CHUNK + 1)], ids=len)
async def test_get_returns_the_bytes_that_were_put(store: Store, body: bytes) -> None:
    await store.put("results/a/1.json", body)
    assert await store.get("results/a/1.json") == body
    assert b"".join([chunk async for chunk in await store.stream("results/a/1.json")]) == body


async def listed(store: Store, kind: str) -> list[Object]:
    return [each async for page in store.pages(kind) for each in page]


async def test_objects_are_listed_by_kind(store: Store) -> None:
    assert await listed(store, "results") == [], "none of its kind yet"
    for key in ("results/a/1.json", "results/a/2.json", "results/b/1.json", "inputs/a.json", "resultsx/a.json"):
        await store.put(key, b"1")
    objects = await listed(store, "results")
    assert sorted(each.key for each in objects) == ["results/a/1.json", "results/a/2.json", "results/b/1.json"]
    assert all(abs((datetime.now(UTC) - each.changed).total_seconds()) < 60 for each in objects)
    assert [each.key for each in await listed(store, "inputs")] == ["inputs/a.json"]


async def test_a_long_list_comes_in_pages_that_may_be_deleted(store: Store) -> None:
    keys = {f"cache/{n}" for n in range(2 * PAGE + 10)}
    gate = asyncio.Semaphore(50)

    async def put(key: str) -> None:
        async with gate:
            await store.put(key, b"1")

    await asyncio.gather(*map(put, keys))
    found: list[str] = []
    async for page in store.pages("cache"):
        assert len(page) <= PAGE
        found += [each.key for each in page]
        await store.delete(each.key for each in page)
    assert sorted(found) == sorted(keys)
    assert await listed(store, "cache") == []


async def test_a_list_may_be_left_early(store: Store) -> None:
    for n in range(3):
        await store.put(f"cache/{n}", b"1")
    async for page in store.pages("cache"):
        assert len(page) == 3
        break


async def test_a_second_put_replaces_the_first(store: Store) -> None:
    await store.put("results/a/1.json", b"a longer one")
    await store.put("results/a/1.json", b"two")
    assert await store.get("results/a/1.json") == b"two"


async def test_of_many_that_create_an_object_one_does(store: Store) -> None:
    bodies = [str(n).encode() for n in range(20)]
    created = await asyncio.gather(*[store.create("ledger/id", body) for body in bodies])
    assert created.count(True) == 1
    winner = bodies[created.index(True)]
    assert await store.get("ledger/id") == winner
    assert not await store.create("ledger/id", b"late")
    assert await store.get("ledger/id") == winner
    assert [each.key async for page in store.pages("ledger") for each in page] == ["ledger/id"], "nothing else is left"


async def test_keys_do_not_mix(store: Store) -> None:
    keys = [
        "plain",
        "a/b",
        "a/c/b",
        "a/b c",
        "a/b%20c",
        "a/b+c",
        "a/é/ü",
        "a/日本",
        "a/b?x=1#y",
        "a/b&c;d",
        "a/-rf",
        "a/*",
    ]
    for key in keys:
        await store.put(key, key.encode())
    assert [await store.get(key) for key in keys] == [key.encode() for key in keys]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "/a",
        "a/",
        "a//b",
        "..",
        "../a",
        "a/../b",
        "a/./b",
        ".drafts/x",
        "a\x00",
        "a\n",
        "\ud800",
        "a~b",
        "é" * 126,
    ],
)
async def test_a_key_that_could_mean_something_else_is_refused(store: Store, key: str) -> None:
    await store.delete([key])  # as one that is not there
    for work in (store.put(key, b""), store.get(key), store.stream(key)):
        with pytest.raises(ValueError, match="can't be the key"):
            await work


async def test_an_absent_object_is_missing(store: Store) -> None:
    for key in ("results/none/1.json", "none"):
        with pytest.raises(Missing):
            await store.get(key)
        with pytest.raises(Missing):
            await store.stream(key)


async def test_delete(store: Store) -> None:
    keys = [f"results/{n}/1.json" for n in range(40)]
    await asyncio.gather(*(store.put(key, b"x") for key in keys))
    await store.delete([*keys[1:], "results/none/1.json", "none"])
    await store.delete(keys[1:])
    await store.delete([])
    assert await store.get(keys[0]) == b"x"
    for key in keys[1:]:
        with pytest.raises(Missing):
            await store.get(key)


async def test_a_store_that_was_taken_away_is_unavailable_and_nothing_is_missing(place: Place) -> None:
    store = place.store
    await store.put("results/a/1.json", LARGE)
    chunks = await store.stream("results/a/1.json")
    assert len(await anext(chunks)) == CHUNK
    place.take_away()
    for work in (
        store.get("results/a/1.json"),
        store.stream("results/none/1.json"),
        store.put("results/a/2.json", b"x"),
        store.check(),
        listed(store, "results"),
        anext(chunks),
    ):
        assert place.name in await unavailable(work)
    with contextlib.suppress(StoreUnavailable):  # SeaweedFS deletes nothing out of nothing without complaint
        await store.delete(["results/a/1.json"])
    await unavailable(store.check())

    await store.ensure()
    await store.check()
    with pytest.raises(Missing):
        await store.get("results/a/1.json")


async def test_many_may_make_sure_at_the_same_time(place: Place) -> None:
    place.take_away()
    await asyncio.gather(*(place.store.ensure() for _ in range(10)))
    await place.store.check()


async def test_without_a_thread_a_folder_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(settings.Store(url=f"file://{tmp_path}/store"))

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as limit:
        limit.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StoreUnavailable, match="can't start new thread"):
            await store.check()
    await store.ensure()
    await store.put("a/b", b"1")
    assert await store.get("a/b") == b"1"
    await store.aclose()


async def test_many_puts_at_the_same_time(store: Store) -> None:
    await asyncio.gather(*(store.put(f"results/{n}/1.json", b"%d" % n * 500) for n in range(50)))
    got = await asyncio.gather(*(store.get(f"results/{n}/1.json") for n in range(50)))
    assert got == [b"%d" % n * 500 for n in range(50)]


async def test_a_large_object_comes_in_chunks(store: Store) -> None:
    await store.put("results/a/1.json", LARGE)
    chunks = [chunk async for chunk in await store.stream("results/a/1.json")]
    for start in (0, 5, CHUNK, len(LARGE) - 1, len(LARGE), len(LARGE) + 5):
        rest = [chunk async for chunk in await store.stream("results/a/1.json", start)]
        assert b"".join(rest) == LARGE[start:]
    assert [len(chunk) for chunk in chunks] == [CHUNK] * 5
    assert b"".join(chunks) == LARGE


async def test_a_stream_of_an_object_that_shrinks_or_goes_ends_with_an_error(store: Store) -> None:
    await store.put("results/a/1.json", LARGE)
    chunks = await store.stream("results/a/1.json")
    await anext(chunks)
    await store.put("results/a/1.json", b"short")
    assert "no longer" in await unavailable(anext(chunks))

    await store.put("results/a/1.json", LARGE)
    chunks = await store.stream("results/a/1.json")
    await anext(chunks)
    await store.delete(["results/a/1.json"])
    with pytest.raises(Missing):
        await anext(chunks)


async def test_the_loop_goes_on_during_a_large_put(store: Store) -> None:
    turns = 0
    put = asyncio.create_task(store.put("results/a/1.json", LARGE * 3))
    while not put.done():
        await asyncio.sleep(0)
        turns += 1
    await put
    assert turns > 5


# -- a bucket ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"access_key": "test-access-other"}, {"secret_key": "test-secret-other"}])
async def test_wrong_keys(opened: Opening, wrong: dict[str, str]) -> None:
    store = opened(**wrong)
    for work in (store.check(), store.get("a"), store.put("a", b"x"), store.delete(["a"]), store.ensure()):
        assert "look at the access key" in await unavailable(work)


async def test_no_keys(opened: Opening, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "look at the access key" in await unavailable(opened(access_key=None, secret_key=None).check())


async def test_the_ambient_identity(s3: S3Server, opened: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    store = opened("s3://ambient", access_key=None, secret_key=None, region="eu-central-1")
    await store.ensure()
    await store.put("a", b"x")
    assert await store.get("a") == b"x"


async def test_no_server_listens(opened: Opening) -> None:
    sentence = await unavailable(opened(endpoint=f"http://127.0.0.1:{free_ports(1)[0]}").put("a", b"x"))
    assert "BACKCAST_STORE__ENDPOINT" in sentence
    assert "127.0.0.1" in sentence


async def test_a_server_that_never_answers(opened: Opening) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = opened(endpoint=endpoint, timeout=timedelta(seconds=2))
        for work in (store.check, store.ensure, lambda: store.get("a"), lambda: store.put("a", LARGE)):
            assert "did not answer within 2 s" in await unavailable(work())


async def test_a_password_in_the_endpoint_is_not_shown(opened: Opening) -> None:
    assert "at s3.invalid:80)" in await unavailable(opened(endpoint="http://me:test-secret@s3.invalid:80").check())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", "the error 500"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf", "can't be reached"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "can't be reached"),
        (b"", "can't be reached"),
    ],
    ids=["500", "half a body", "not HTTP", "hangs up"],
)
async def test_a_server_that_answers_badly(opened: Opening, answer: bytes, words: str) -> None:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert words in await unavailable(opened(endpoint=f"http://127.0.0.1:{port}").get("a"))


async def test_a_link_is_for_one_object_and_at_the_public_address(s3: S3Server, opened: Opening) -> None:
    public = s3.url.replace("127.0.0.1", "localhost")
    store = opened("s3://linked/some/prefix", public_endpoint=public)
    await store.ensure()
    await store.put("results/a/1.json", b"[1]")
    await store.put("results/b/1.json", b"[2]")
    link = await store.link("results/a/1.json")
    assert link is not None
    assert link.startswith(f"{public}/linked/some/prefix/results/a/1.json?")
    assert "X-Amz-Expires=300" in link
    assert s3.secret_key not in link
    async with httpx.AsyncClient() as stranger:
        answer = await stranger.get(link)
        assert (answer.status_code, answer.content) == (200, b"[1]")
        assert answer.headers["content-type"] == "application/json"
        assert (await stranger.get(link.replace("/a/", "/b/"))).status_code == 403
        assert (await stranger.delete(link)).status_code == 403
    with pytest.raises(Missing):
        await store.link("results/c/1.json")
    gone = opened("s3://no-such-bucket", public_endpoint=public)
    assert "create it" in await unavailable(gone.link("results/a/1.json"))


async def test_without_a_public_address_there_are_no_links(store: Store) -> None:
    await store.put("results/a/1.json", b"[1]")
    assert await store.link("results/a/1.json") is None


@pytest.mark.parametrize("size", [100_000, len(LARGE)])
async def test_a_put_that_is_tried_again_sends_the_whole_body(s3: S3Server, opened: Opening, size: int) -> None:
    connections = 0

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        if connections == 1:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await reader.readexactly(50_000)
            writer.transport.abort()
            return
        host, port = s3.url.removeprefix("http://").split(":")
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))

    await opened("s3://bucket").ensure()
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as cutting:
        store = opened(endpoint=f"http://127.0.0.1:{cutting.sockets[0].getsockname()[1]}")
        await store.put("whole", LARGE[:size])
        await store.aclose()
    assert connections == 2
    assert await opened().get("whole") == LARGE[:size]


async def test_a_server_that_comes_back_is_used_again(tmp_path: Path, opened: Opening) -> None:
    with s3_server(tmp_path) as server:
        store = opened("s3://bucket", endpoint=server.url)
        await store.ensure()
        await asyncio.gather(*(store.put(f"results/{n}/1.json", b"x") for n in range(20)))
        server.stop()
        await unavailable(store.put("results/a/1.json", b"x"))
        await unavailable(store.get("results/1/1.json"))
        await asyncio.to_thread(server.start)

        async def stored() -> bytes:
            try:
                await store.put("results/a/1.json", b"y")
                return await store.get("results/1/1.json")
            except StoreUnavailable as error:
                raise AssertionError(str(error)) from error

        assert await until(stored) == b"x"


# -- a folder --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def folder(tmp_path: Path, opened: Opening) -> Store:
    store = opened(f"file://{tmp_path}/store")
    await store.ensure()
    return store


async def test_only_ensure_makes_the_folder(tmp_path: Path, opened: Opening) -> None:
    store = opened(f"file://{tmp_path}/store")
    for work in (store.check(), store.get("a/b"), store.put("a/b", b"x"), store.delete(["a/b"])):
        assert "BACKCAST_STORE__URL" in await unavailable(work)
    assert not (tmp_path / "store").exists()


async def test_an_empty_folder_in_its_place_is_not_the_store(tmp_path: Path, folder: Store) -> None:
    """As when a volume is not mounted: writing would fill the wrong disk, and every result would seem to be lost."""
    await folder.put("results/a/1.json", b"x")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    (tmp_path / "store").mkdir()
    for work in (folder.check(), folder.get("results/a/1.json"), folder.put("results/a/2.json", b"x")):
        assert "not mounted" in await unavailable(work)
    assert not list((tmp_path / "store").iterdir())


async def test_a_file_in_its_place(tmp_path: Path, opened: Opening) -> None:
    (tmp_path / "store").write_text("")
    store = opened(f"file://{tmp_path}/store")
    for work in (store.check(), store.get("a"), store.put("a/b", b"x"), store.delete(["a"]), store.ensure()):
        assert f"{tmp_path}/store" in await unavailable(work)


async def test_a_folder_that_may_not_be_written(opened: Opening) -> None:
    assert "can't be used" in await unavailable(opened("file:///proc/backcast").ensure())


async def test_no_space_left(tmp_path: Path, folder: Store) -> None:
    """The limit on file sizes stands in for a full disk: a write stops half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        assert "File too large" in await unavailable(folder.put("results/a/1.json", LARGE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(Missing):
        await folder.get("results/a/1.json")
    assert [path.name for path in (tmp_path / "store").rglob("*")] == [".drafts"]


async def test_a_disk_that_hangs(tmp_path: Path, opened: Opening) -> None:
    store = opened(f"file://{tmp_path}/store", timeout=timedelta(seconds=5))
    await store.ensure()
    await store.put("a", b"x")
    os.mkfifo(tmp_path / "store" / "b")  # opening it waits for a writer
    assert "did not answer within 5 s" in await unavailable(store.get("b"))
    assert await store.get("a") == b"x"
    os.close(os.open(tmp_path / "store" / "b", os.O_WRONLY | os.O_NONBLOCK))


async def test_a_writer_killed_at_any_moment_leaves_whole_objects_only(tmp_path: Path, folder: Store) -> None:
    program = f"""
import asyncio, itertools
from backcast import settings, store
async def write():
    folder = store.open_store(settings.Store(url="file://{tmp_path}/store"))
    for n in itertools.cycle(b"abc"):
        await folder.put("results/a/1.json", bytes([n]) * 4_000_000)
asyncio.run(write())
"""
    object_ = tmp_path / "store" / "results" / "a~1.json"

    async def written() -> bool:
        return object_.exists()

    for _ in range(3):
        object_.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", program]) as writer:
            try:
                await until(written)
            finally:
                writer.kill()
        body = await folder.get("results/a/1.json")
        assert len(body) == 4_000_000
        assert len(set(body)) == 1


async def test_abandoned_drafts_are_removed(tmp_path: Path, folder: Store) -> None:
    old, new = (tmp_path / "store" / ".drafts" / name for name in ("old", "new"))
    old.touch()
    new.touch()
    os.utime(old, (time.time() - 100_000,) * 2)
    await folder.ensure()
    assert not old.exists()
    assert new.exists()


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "store", "/store", "file://", "s3://", "s3:///prefix", "http://x/y", "memory://x"])
def test_any_other_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError, match="BACKCAST_STORE__URL"):
        open_store(settings.Store(url=url))


async def test_a_relative_folder_stays_where_the_process_began(
    tmp_path: Path, opened: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = opened("file://./some/store")
    monkeypatch.chdir("/")
    await store.ensure()
    assert (tmp_path / "some" / "store").is_dir()


async def test_an_object_and_its_name_are_on_the_disk_before_put_returns(
    tmp_path: Path, opened: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(f"file://{tmp_path}/store")
    await store.ensure()
    synced: list[tuple[int, bool]] = []
    sync = os.fsync

    def record(descriptor: int) -> None:
        placed = (tmp_path / "store" / "results" / "run~1.json").exists()
        synced.append((os.fstat(descriptor).st_ino, placed))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    await store.put("results/run/1.json", b"1")
    folder = tmp_path / "store" / "results"
    assert synced[0] == ((folder / "run~1.json").stat().st_ino, False), "its bytes, before it has its name"
    assert synced[-1] == (folder.stat().st_ino, True), "its name"
    synced.clear()
    await store.put("results/run/1.json", b"1", is_copied=True)
    assert not synced, "the ledger has a durable copy"


async def test_a_fallback_is_read_and_never_written(s3: S3Server, opened: Opening, tmp_path: Path) -> None:
    older = opened(f"file://{tmp_path}/older")
    store = opened("s3://newer", fallback={"url": f"file://{tmp_path}/older"}, public_endpoint=s3.url)
    await older.ensure()
    await store.ensure()
    await older.put("results/a/1.json", LARGE)
    assert await store.get("results/a/1.json") == LARGE
    assert b"".join([chunk async for chunk in await store.stream("results/a/1.json")]) == LARGE
    assert await store.link("results/a/1.json") is None, "callers can't reach it there"
    with pytest.raises(Missing):
        await store.get("results/a/2.json")
    await store.put("results/b/1.json", b"1")
    assert await store.link("results/b/1.json")
    await store.delete(["results/a/1.json"])
    assert [each.key async for page in store.pages("results") for each in page] == ["results/b/1.json"]
    assert [each.key async for page in older.pages("results") for each in page] == ["results/a/1.json"]
    (tmp_path / "older").rename(tmp_path / "away")
    with pytest.raises(StoreUnavailable):
        await store.get("results/a/1.json")
    assert await store.get("results/b/1.json") == b"1"
    await store.check()


async def test_the_objects_of_a_fallback_are_copied(s3: S3Server, opened: Opening, tmp_path: Path) -> None:
    older = opened(f"file://{tmp_path}/older")
    store = opened("s3://copy", fallback={"url": f"file://{tmp_path}/older"})
    await older.ensure()
    await store.ensure()
    runs = [uuid7() for _ in range(9)]
    for number, run in enumerate(runs):
        await older.put(f"inputs/{run}.json", f"{number}".encode())
    await older.put("inputs/of-another.txt", b"not ours")
    await older.put("ledger/id", b"somebody")
    await store.put(f"inputs/{runs[0]}.json", b"newer")
    assert await copying.copy(store) == (8, 1)
    assert await copying.copy(store) == (0, 9)
    alone = opened("s3://copy")
    assert [await alone.get(f"inputs/{run}.json") for run in runs] == [b"newer", *b"1 2 3 4 5 6 7 8".split()]
    with pytest.raises(Missing):
        await alone.get("ledger/id")
    with pytest.raises(ConfigurationError):
        await copying.copy(alone)
