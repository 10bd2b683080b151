"""Publishing how busy each worker is to Kubernetes. This API server is a stand-in; tests/e2e use a real one."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from backcast.errors import ConfigurationError
from backcast.ledger import fleet
from backcast.ledger.connection import Ledger
from backcast.models import uuid7
from backcast.steward.pods import Pods


class Cluster(ThreadingHTTPServer):
    """The pods of a namespace, their costs, and the names in the requests."""

    pods: dict[str, str | None]
    asked: list[str]
    allows = True


class _Answer(BaseHTTPRequestHandler):
    server: Cluster

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        folder, _, name = self.path.rpartition("/")
        assert folder == "/api/v1/namespaces/ours/pods"
        assert self.headers["authorization"] == "Bearer t0ken"
        assert self.headers["content-type"] == "application/merge-patch+json"
        self.server.asked.append(name)
        status = 403 if not self.server.allows else 200 if name in self.server.pods else 404
        if status == 200:
            self.server.pods[name] = body["metadata"]["annotations"]["controller.kubernetes.io/pod-deletion-cost"]
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(("127.0.0.1", 0), _Answer) as server:
        server.pods, server.asked = {}, []
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield server
        server.shutdown()
        serving.join()


@pytest.fixture
def pods(cluster: Cluster, tmp_path: Path) -> Pods:
    (tmp_path / "token").write_text("t0ken\n")
    (tmp_path / "namespace").write_text("ours\n")
    return Pods(tmp_path, f"http://127.0.0.1:{cluster.server_port}")


async def worker(ledger: Ledger, host: str, busy: int, known: UUID | None = None) -> UUID:
    worker = known or uuid7()
    await fleet.register(ledger, worker, pool="default", host=host, version="1", slots=10, tasks=[])
    async with ledger.session() as connection:
        await fleet.beat(connection, worker, busy=busy, draining=False, settled=0)
    await ledger.execute(
        "update workers set heartbeat_at = now() + interval '1 hour'"
    )  # no worker goes silent by itself
    return worker


async def test_only_changes_are_published(ledger: Ledger, cluster: Cluster, pods: Pods) -> None:
    cluster.pods = {"w-1": "7", "w-2": None}
    await worker(ledger, "w-1", 0)
    two = await worker(ledger, "w-2", 3)
    await worker(ledger, "not-a-pod", 1)
    await pods.mark(ledger)
    assert cluster.pods == {"w-1": "0", "w-2": "3"}, "also an idle one: the last leader may have marked it"
    cluster.asked.clear()
    await pods.mark(ledger)
    assert cluster.asked == []
    await worker(ledger, "w-2", 1, two)
    await pods.mark(ledger)
    assert cluster.asked == ["w-2"]
    assert cluster.pods["w-2"] == "1"


async def test_a_refused_change_is_published_again_later(ledger: Ledger, cluster: Cluster, pods: Pods) -> None:
    cluster.pods = {"w-1": None}
    await worker(ledger, "w-1", 2)
    cluster.allows = False
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        await pods.mark(ledger)
    cluster.allows = True
    await pods.mark(ledger)
    assert cluster.pods == {"w-1": "2"}


async def test_a_worker_that_comes_back_is_marked_again(ledger: Ledger, cluster: Cluster, pods: Pods) -> None:
    cluster.pods = {"w-1": None}
    await worker(ledger, "w-1", 2)
    await pods.mark(ledger)
    await ledger.execute("update workers set heartbeat_at = now() - interval '1 minute'")
    await pods.mark(ledger)
    await ledger.execute("update workers set heartbeat_at = now() + interval '1 hour'")
    await pods.mark(ledger)
    assert cluster.asked == ["w-1", "w-1"]


def test_outside_of_a_cluster_it_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="DELETION_COST needs a Kubernetes service account"):
        Pods(tmp_path)
