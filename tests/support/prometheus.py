"""A real Prometheus, which scrapes the parts of a stack each second and evaluates the chart's rules as often."""

import re
import shutil
import time
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from tests.support.chart import CHART
from tests.support.stack import Stack, free_port
from tests.support.waiting import PATIENCE

RULES = CHART / "monitoring" / "rules.yaml"
RATE_INTERVAL = "5s"
"""What Grafana makes of a scrape each second."""
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are not there: install Debian's package prometheus",
)


class Prometheus:
    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._since = time.time()

    @classmethod
    async def start(cls, product: Stack, namespace: str) -> Self:
        """One over the parts that are up; it ends with the stack."""
        every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        targets = [
            {"targets": [urlsplit(part.metrics_url).netloc], "labels": {"namespace": namespace, "pod": part.name}}
            for part in product.parts
        ]
        jobs = [{"job_name": "backcast", "static_configs": targets}]
        file = product.folder / "prometheus.yaml"
        file.write_text(yaml.safe_dump({"global": every, "rule_files": [str(RULES)], "scrape_configs": jobs}))
        address = f"127.0.0.1:{free_port()}"
        command = [
            *("prometheus", f"--config.file={file}", f"--web.listen-address={address}", "--log.level=warn"),
            f"--storage.tsdb.path={product.folder / 'prometheus'}",
        ]
        url = f"http://{address}"
        await product.spawn("prometheus", command, url).ready("/-/ready")
        return cls(httpx.AsyncClient(base_url=f"{url}/api/v1", timeout=PATIENCE))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def numbers(self, query: str, **variables: str) -> list[float]:
        """The numbers of a panel's query since the start, as Grafana asks for it; a quotient of nothing is none."""
        for name, value in {"__rate_interval": RATE_INTERVAL, **variables}.items():
            query = query.replace(f"${name}", value)
        assert "$" not in query, f"no value for a variable: {query}"
        found = await self._asked("/query_range", query=query, start=self._since, end=time.time(), step=1)
        numbers = [float(value) for series in found["result"] for _, value in series["values"]]
        return [number for number in numbers if number == number]

    async def label_values(self, query: str, **variables: str) -> set[str]:
        """The values from which a reader of a dashboard chooses, by the query of its variable."""
        for name, value in variables.items():
            query = query.replace(f"${name}", value)
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert found, query
        return set(await self._asked(f"/label/{found[2]}/values", **{"match[]": found[1]}))

    async def rules(self) -> list[dict[str, Any]]:
        """Each rule, with its health."""
        return [rule for group in (await self._asked("/rules"))["groups"] for rule in group["rules"]]

    async def _asked(self, path: str, **params: Any) -> Any:
        answer = (await self._http.get(path, params=params)).json()
        assert answer["status"] == "success", answer
        return answer["data"]
