"""Values that change how a release is reached and what it may reach, and a change of a setting."""

from typing import Any

import httpx

from tests.e2e.cluster import INGRESS
from tests.e2e.release import Release, merged
from tests.e2e.test_access import MODEL
from tests.support.waiting import until

HOST, OTHER = "shared.e2e.localhost", "other.e2e.localhost"
FOREIGN = "kube-dns.kube-system.svc.cluster.local:9153"
PRIVATE = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.169.254/32"]


def _pods(release: Release, component: str) -> set[str]:
    return {pod.metadata.uid for pod in release.pods(component)}


async def test_a_path_several_hosts_and_blocked_networks(shared: Release, shared_values: dict[str, Any]) -> None:
    await shared.knows("reach")
    values = {
        "ingress": {"path": "/casts", "hosts": [OTHER]},
        "networkPolicy": {"blockedCidrs": PRIVATE},
        "commonLabels": {"team": "casting"},
        "commonAnnotations": {"example.org/owner": "casting"},
        "extraEnv": [{"name": "E2E_FIRST", "value": "1"}, {"name": "E2E_SECOND", "value": "$(E2E_FIRST)2"}],
    }
    await shared.install(merged(shared_values, values), wait=False)
    await shared.settled()
    assert all(pod.metadata.labels.get("team") == "casting" for pod in shared.pods("worker", "default"))
    for host in (HOST, OTHER):
        headers = {"Host": host, "Authorization": shared.http.headers["Authorization"]}
        async with httpx.AsyncClient(base_url=INGRESS, headers=headers, trust_env=False, timeout=30) as client:

            async def submit(client: httpx.AsyncClient = client) -> httpx.Response:
                names = [f"{shared.named('postgres')}:5432", f"{shared.named('store')}:9000", MODEL, FOREIGN]
                body = {"input": {"places": names}}
                answer = await client.post("/casts/v1/tasks/reach/runs", json=body)
                assert answer.status_code == 202, answer.text
                return answer

            location = (await until(submit, timeout=90, every=1)).headers["Location"]
            assert location.startswith("/casts/v1/runs/")
            answer = await client.get(location, headers={"Prefer": "wait=40"})
            assert answer.json()["state"] == "completed", answer.text
            found = (await client.get(f"{location}/result")).json()
            assert found.pop(FOREIGN) == "no answer", "a private address, and no server of the release"
            assert set(found.values()) == {"open"}, found
            assert (await client.get("/v1/runs")).status_code == 404


async def test_a_setting_restarts_only_what_reads_it(shared: Release, shared_values: dict[str, Any]) -> None:
    before = {part: _pods(shared, part) for part in ("api", "worker", "steward")}
    await shared.install(merged(shared_values, {"config": {"api": {"max_batch": 5000}}}))
    await shared.settled()
    after = {part: _pods(shared, part) for part in before}
    assert {part for part in before if before[part] != after[part]} == {"api"}
