"""Foreign web pages: which hosts and origins the API answers. The database is away, so what is let in gets a 503."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from backcast.api.app import create_app
from backcast.errors import ConfigurationError
from backcast.ledger.connection import Ledger
from backcast.settings import Api, load
from backcast.settings import Store as StoreSettings
from backcast.store import open_store

KEY = "a-key-of-some-length"
PAGE = "https://app.example.org"
JSON = {"content-type": "application/json"}


@contextlib.asynccontextmanager
async def over(**api: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Ledger("postgresql://127.0.0.1:1/none"), open_store(StoreSettings()), Api(**api))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000") as client:
        yield client


LOCAL: dict[str, Any] = {}
NETWORK = {"host": "0.0.0.0"}
REQUESTS = [
    ("GET", "/v1/tasks", {}),
    ("HEAD", "/v1/tasks", {}),
    ("POST", "/v1/tasks/echo/runs", {"json": {"input": {}}}),
    ("POST", "/tasks", {"data": {"payload": "x", "target_type": "int"}}),
    ("POST", "/tasks", {"json": {"payload": "x", "target_type": "int"}}),
    ("POST", "/v1/batches", {"content": b'{"task": "echo"}\n', "headers": {"content-type": "application/jsonl"}}),
    ("GET", "/v1/runs/0199c7a0-0000-7000-8000-000000000000", {}),
    ("POST", "/v1/runs/0199c7a0-0000-7000-8000-000000000000/cancel", {}),
    ("GET", "/tasks/0199c7a0-0000-7000-8000-000000000000/status", {}),
    ("GET", "/docs", {}),
    ("GET", "/openapi.json", {}),
    ("DELETE", "/v1/lanes/x", {}),
    ("OPTIONS", "/v1/lanes/x", {}),
    ("GET", "/nothing", {}),
]


@pytest.mark.parametrize(("method", "path", "more"), REQUESTS)
@pytest.mark.parametrize(
    ("code", "headers"),
    [
        ("foreign_host", {"Host": "evil.example"}),
        ("foreign_host", {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}),
        ("foreign_host", {"Host": "localhost.evil.example"}),
        ("foreign_host", {"Host": "127.0.0.1.evil.example"}),
        ("foreign_host", {"Host": "127.0.0.1@evil.example"}),
        ("foreign_host", {"Host": "x@localhost"}),
        ("foreign_host", {"Host": ""}),
        ("foreign_host", {"Host": "10.0.0.1"}),
        ("foreign_origin", {"Origin": "http://evil.example"}),
        ("foreign_origin", {"Origin": "null"}),
        ("foreign_origin", {"Origin": "http://localhost:3000"}),
        ("foreign_origin", {"Origin": "http://localhost"}),
        ("foreign_origin", {"Origin": "http://localhost:8000.evil.example"}),
        ("foreign_origin", {"Origin": "chrome-extension://abcdef"}),
        ("foreign_origin", {"Sec-Fetch-Site": "cross-site"}),
        ("foreign_origin", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}),
    ],
    ids=str,
)
async def test_a_foreign_page_gets_no_answer(
    method: str, path: str, more: dict[str, Any], code: str, headers: dict[str, str]
) -> None:
    async with over() as api:
        answer = await api.request(method, path, **more | {"headers": more.get("headers", {}) | headers})
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert "access-control-allow-origin" not in answer.headers
    if method != "HEAD":
        assert answer.json()["code"] == code
        assert "BACKCAST_API__" in answer.json()["detail"], "the setting to change is named"


@pytest.mark.parametrize(
    ("settings", "headers"),
    [
        (LOCAL, {}),
        (LOCAL, {"Host": "LOCALHOST:1"}),
        (LOCAL, {"Host": "localhost."}),
        (LOCAL, {"Host": "127.0.0.1:8000"}),
        (LOCAL, {"Host": "[::1]:8000"}),
        (LOCAL, {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"}),
        (LOCAL, {"Sec-Fetch-Site": "none"}),
        (LOCAL, {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}),
        ({"host": "127.0.0.2"}, {"Host": "127.0.0.2:8000"}),
        ({"host": "Jobs.lan"}, {"Host": "jobs.lan:8000"}),
        ({"allowed_hosts": "jobs.example.org, x"}, {"Host": "jobs.example.org"}),
        ({"allowed_hosts": "*.example.org"}, {"Host": "a.b.example.org"}),
        ({"allowed_hosts": ["jobs.example.org"]}, {"Host": "Jobs.example.org", "Origin": "https://jobs.example.org"}),
        ({"allowed_hosts": "*"}, {"Host": "any.example"}),
        (NETWORK, {"Host": "10.1.2.3:8000"}),  # a probe of the kubelet, or a person
        (NETWORK, {"Host": "api:8000"}),  # another container
        (NETWORK, {"Host": "[fe80::1]"}),
        ({"cors_origins": PAGE}, {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}),
    ],
    ids=str,
)
async def test_our_own_names_and_pages_do(settings: dict[str, Any], headers: dict[str, str]) -> None:
    async with over(**settings) as api:
        assert (await api.get("/v1/tasks", headers=headers)).status_code == 503


@pytest.mark.parametrize(
    ("method", "referer", "status"),
    [
        ("POST", "http://evil.example/a?b", 403),
        ("POST", "http://localhost:8000.evil.example/", 403),
        ("POST", "http://localhost:3000/", 403),
        ("POST", "evil", 403),
        ("POST", "http://localhost:8000/docs", 503),
        ("POST", f"{PAGE}/form", 503),
        ("GET", "http://evil.example/", 503),  # a link
    ],
)
async def test_a_form_whose_only_origin_is_its_referer(method: str, referer: str, status: int) -> None:
    form = {"payload": "x", "target_type": "int"}
    async with over(cors_origins=PAGE) as api:
        path, more = ("/tasks", {"data": form}) if method == "POST" else ("/v1/tasks", {})
        assert (await api.request(method, path, headers={"Referer": referer}, **more)).status_code == status


@pytest.mark.parametrize("settings", [NETWORK, {"allowed_hosts": "*.example.org"}, {"allowed_hosts": "example.com"}])
@pytest.mark.parametrize("host", ["evil.example", "evilexample.org", "example.org.evil"])
async def test_a_name_that_may_be_a_pages_own_is_refused(settings: dict[str, Any], host: str) -> None:
    async with over(**settings) as api:
        assert (await api.get("/v1/tasks", headers={"Host": host})).json()["code"] == "foreign_host"


async def test_with_keys_any_host_and_any_page_that_has_one() -> None:
    async with over(keys=KEY) as api:
        headers = {"Host": "any.example", "Origin": "http://evil.example"}
        assert (await api.get("/v1/tasks", headers=headers)).status_code == 401
        headers["Authorization"] = f"Bearer {KEY}"
        answer = await api.get("/v1/tasks", headers=headers)
        assert answer.status_code == 503
        assert "access-control-allow-origin" not in answer.headers, "and yet no page can read it"
    async with over(keys=KEY, allowed_hosts="jobs.example.org") as api:
        assert (await api.get("/v1/tasks", headers=headers)).json()["code"] == "foreign_host"


@pytest.mark.parametrize("settings", [{"keys": KEY}, {}], ids=["keys", "no keys"])
async def test_a_page_of_an_allowed_origin(settings: dict[str, Any]) -> None:
    async with over(**settings, cors_origins=f"{PAGE}/,http://localhost:3000") as api:
        asked = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,idempotency-key,prefer",
        }
        preflight = await api.options("/v1/tasks/echo/runs", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert "Idempotency-Key" in preflight.headers["access-control-allow-headers"]
        answer = await api.post(
            "/v1/tasks/echo/runs", json={}, headers={"Origin": PAGE, "Authorization": f"Bearer {KEY}"}
        )
        assert answer.status_code == 503
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "Location" in answer.headers["access-control-expose-headers"]
        other = await api.options("/v1/tasks/echo/runs", headers=asked | {"Origin": "https://evil.example"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
    if settings:
        async with over(**settings, cors_origins="*") as api:
            assert (await api.get("/v1/tasks", headers={"Origin": PAGE})).headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "text/json", "nonsense"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/tasks"), ("POST", "/v1/tasks/echo/runs"), ("PUT", "/v1/lanes/x"), ("POST", "/v1/batches")],
)
async def test_a_body_states_that_it_is_json(method: str, path: str, kind: str | None) -> None:
    if path == "/tasks" and kind == "application/x-www-form-urlencoded":
        return
    async with over() as api:
        headers = {} if kind is None else {"content-type": kind}
        answer = await api.request(method, path, content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_body")
    assert "Content-Type: application/json" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/tasks", "/v1/tasks/echo/runs", "/v1/batches"])
async def test_a_compressed_body_is_refused_by_its_name(path: str) -> None:
    async with over() as api:
        kind = "application/jsonl" if path == "/v1/batches" else "application/json"
        answer = await api.post(path, content=b"\x1f\x8b", headers={"content-type": kind, "content-encoding": "gzip"})
    assert answer.status_code == 415
    assert "Content-Encoding: gzip" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALLOWED_HOSTS", "http://a.example.org"),
        ("ALLOWED_HOSTS", "a.example.org:80"),
        ("ALLOWED_HOSTS", "a*"),
        ("CORS_ORIGINS", "app.example.org"),
        ("CORS_ORIGINS", "https://app.example.org/path"),
        ("CORS_ORIGINS", "null"),
        ("CORS_ORIGINS", "*"),
    ],
)
def test_a_setting_that_can_not_be_meant_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(f"BACKCAST_API__{variable}", value)
    with pytest.raises(ConfigurationError, match="BACKCAST_API"):
        load()
