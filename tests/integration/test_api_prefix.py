"""The API below a prefix, as behind an Ingress that shares its host."""

import httpx

from backcast.api.app import create_app
from backcast.ledger.connection import Ledger
from backcast.settings import Api, Store
from backcast.store import open_store


async def test_links_begin_with_the_prefix_that_the_request_came_with(ledger: Ledger, folder: str) -> None:
    await ledger.execute("insert into task_types values ('echo', 'default', '', '1', '', '{}', '{}', 0, null, 1)")
    app = create_app(ledger, open_store(Store(url=folder)), Api(prefix="/casts", keys=["a-key-of-16-letters"]))
    headers = {"Authorization": "Bearer a-key-of-16-letters"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://h", headers=headers) as client:
        for prefix in ("/casts", ""):
            assert (await client.get(f"{prefix}/livez")).status_code == 200
            missing = (await client.get(f"{prefix}/v1/runs/none")).json()
            assert missing["type"] == f"{prefix}/problems/unknown_run"
            assert (await client.get(missing["type"])).json()["code"] == "unknown_run"
            document = (await client.get(f"{prefix}/openapi.json")).json()
            assert document.get("servers") == ([{"url": "/casts"}] if prefix else None)
            assert (await client.get(f"{prefix}/docs/static/swagger-ui.css")).status_code == 200
            assert (await client.get(f"{prefix}/v1/tasks/a%2Fb")).json()["code"] == "unknown_task"
            made = await client.post(f"{prefix}/v1/tasks/echo/runs", json={"input": {}})
            assert made.headers["Location"] == f"{prefix}/v1/runs/{made.json()['id']}"
        for other in ("/castsx/livez", "/v1/casts"):
            assert (await client.get(other)).status_code == 404
        without = await client.get("/casts/v1/runs", headers={"Authorization": ""})
        assert (without.status_code, without.json()["type"]) == (401, "/casts/problems/unauthorized")
