"""Keys: the routes that need one, and the open ones. The database is away, so a request with a key gets a 503."""

from collections.abc import AsyncIterator

import httpx
import pytest

from backcast.api.app import create_app
from backcast.errors import ConfigurationError
from backcast.ledger.connection import Ledger
from backcast.settings import Api, load
from backcast.settings import Store as StoreSettings
from backcast.store import open_store

OLD, NEW = "an-old-key-of-ours", "a-new-key-of-ours"


@pytest.fixture
async def api() -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Ledger("postgresql://127.0.0.1:1/none"), open_store(StoreSettings()), Api(keys=f"{OLD},{NEW}"))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        yield client


ROUTES = [
    ("GET", "/v1/tasks"),
    ("POST", "/v1/tasks/echo/runs"),
    ("GET", "/v1/runs"),
    ("POST", "/tasks"),
    ("GET", "/nothing"),
    ("GET", "/livezz"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "shown",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {OLD}", OLD, f"Bearer {OLD}x", f"Bearer {OLD},{NEW}"],
)
async def test_without_a_key_nothing_is_answered(
    api: httpx.AsyncClient, method: str, path: str, shown: str | None
) -> None:
    headers = {} if shown is None else {"Authorization": shown}
    answer = await api.request(method, path, headers=headers, content=b"\xff" * 2_000_000)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "unauthorized"
    assert "Bearer KEY" in answer.json()["detail"]
    assert OLD not in answer.text


@pytest.mark.parametrize("shown", [f"Bearer {OLD}", f"bearer  {NEW}"])
async def test_each_key_opens(api: httpx.AsyncClient, shown: str) -> None:
    assert (await api.get("/v1/tasks", headers={"Authorization": shown})).status_code == 503


async def test_probes_and_documentation_are_open(api: httpx.AsyncClient) -> None:
    assert (await api.get("/livez")).status_code == 200
    assert (await api.get("/readyz")).status_code == 503
    assert (await api.get("/docs")).status_code == 200
    assert (await api.get("/problems/unauthorized")).json()["seen_in"] == "HTTP 401"
    document = (await api.get("/openapi.json")).json()
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}


@pytest.mark.parametrize("key", ["hunter2", "пароль-пароль-пароль", "hunter2\nhunter2\nhunter2"], ids=repr)
def test_a_key_that_can_be_guessed_or_not_be_sent_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("BACKCAST_API__KEYS", f"{OLD}, {key}")
    with pytest.raises(ConfigurationError, match=r"BACKCAST_API__KEYS.*16 characters.*printable ASCII") as refused:
        load()
    assert key not in str(refused.value)


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKCAST_API__KEYS", f" {OLD} ,{NEW},")
    assert [key.get_secret_value() for key in load().api.keys] == [OLD, NEW]


LOOKING = "a-key-that-only-looks"


async def test_a_read_key_looks_and_changes_nothing() -> None:
    limits = Api(keys=OLD, read_keys=LOOKING)  # type: ignore[arg-type]
    app = create_app(Ledger("postgresql://127.0.0.1:1/none"), open_store(StoreSettings()), limits)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api") as client:
        paths: dict[str, dict[str, object]] = (await client.get("/openapi.json")).json()["paths"]
        changes = [(method.upper(), path) for path, methods in paths.items() for method in methods if method != "get"]
        assert len(changes) > 15
        headers = {"Authorization": f"Bearer {LOOKING}"}
        for method, path in changes:
            answer = await client.request(method, path.replace("{", "").replace("}", ""), headers=headers, json={})
            assert (answer.status_code, answer.json()["code"]) == (403, "read_only_key"), path
        assert (await client.get("/v1/tasks", headers=headers)).status_code == 503
        answer = await client.post("/v1/pools/x/pause", headers={"Authorization": f"Bearer {OLD}"}, json={})
        assert answer.status_code != 403


@pytest.mark.parametrize(("keys", "why"), [("", "need keys"), (LOOKING, "not in both")])
def test_read_keys_are_keys_of_their_own(monkeypatch: pytest.MonkeyPatch, keys: str, why: str) -> None:
    monkeypatch.setenv("BACKCAST_API__KEYS", keys)
    monkeypatch.setenv("BACKCAST_API__READ_KEYS", LOOKING)
    with pytest.raises(ConfigurationError, match=why) as refused:
        load()
    assert LOOKING not in str(refused.value)
