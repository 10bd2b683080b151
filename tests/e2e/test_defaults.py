"""The first hour of a user who installs the chart with no values: install, cast, look, remove, install again."""

import logging
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.e2e.cluster import INGRESS, Cluster
from tests.e2e.conftest import NAME, NAMESPACE
from tests.e2e.programs import run
from tests.e2e.release import Release
from tests.support.waiting import until

log = logging.getLogger("e2e")

IDLE_MEMORY = 1.5 * 2**30
"""Bytes, of the whole release without the embedded model."""
_KINDS = (
    "all,configmaps,secrets,serviceaccounts,roles.rbac,rolebindings.rbac,ingresses.networking.k8s.io,"
    "networkpolicies,poddisruptionbudgets,horizontalpodautoscalers,persistentvolumeclaims"
)


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def release(cluster: Cluster) -> AsyncIterator[Release]:
    """Installed with no values. It is not removed at the end: the shared release takes its place."""
    release = Release(cluster, NAME, NAMESPACE)
    await release.first_install({})
    await release.watch_ends()
    yield release
    await release.http.aclose()


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def cast(release: Release) -> str:
    """The id of a cast that the embedded model has done."""
    await release.knows("create_structured_output")
    body = {"payload": "We put 31 chairs in the hall", "instructions": "how many chairs", "target_type": "int"}
    answer = await release.http.post("/tasks", json=body)
    assert answer.status_code == 202, answer.text
    run_id = str(answer.json()["task_run_id"])
    await release.ended(run_id, timeout=300)
    return run_id


async def test_installs_and_casts_with_no_values(release: Release, cast: str) -> None:
    status = (await release.http.get(f"/tasks/{cast}/status")).json()
    assert (status["status"], status["result"]) == ("completed", 31), status
    usage = (await release.run(cast))["usage"]
    assert usage["output_tokens"] > 0, "a model has answered"
    assert len(await release.stored(cast)) == 1, "the result is an object in MinIO"


async def test_nothing_crashed_on_the_way(release: Release, cast: str) -> None:
    restarts = {
        f"{pod.metadata.name}/{status.name}": status.restart_count
        for pod in release.pods()
        for status in pod.status.container_statuses
        if status.restart_count
    }
    assert not restarts


async def test_the_notes_have_commands_that_work(release: Release, tmp_path: Path) -> None:
    """The commands run unchanged; only the address of the Ingress is this cluster's."""
    notes = await release.notes()
    script = "\n".join(["set -e", *_commands(notes)])
    (tmp_path / ".curlrc").write_text(
        f'connect-to = "::{INGRESS.split("//")[1]}"\nnoproxy = "*"\nfail\nsilent\nshow-error\n'
    )
    done = await run("bash", "-c", script, env={**os.environ, "HOME": str(tmp_path), "CURL_HOME": str(tmp_path)})
    assert "task_run_id" in done.out or '"id"' in done.out, f"{script}\n{done.output}"


async def test_the_notes_lead_past_the_ingress(release: Release, tmp_path: Path) -> None:
    before, found, past = (await release.notes()).partition("go past it:")
    assert found
    key = [line for line in _commands(before) if line.startswith("KEY=")]
    forward = next(line.strip() for line in past.splitlines() if "port-forward" in line)
    script = "\n".join(["set -e", "trap 'kill $(jobs -p)' EXIT", *key, forward, *_commands(past)])
    (tmp_path / ".curlrc").write_text('noproxy = "*"\nfail\nretry = 30\nretry-delay = 1\nretry-connrefused\n')
    done = await run("bash", "-c", script, env={**os.environ, "HOME": str(tmp_path), "CURL_HOME": str(tmp_path)})
    assert "task_run_id" in done.out or '"id"' in done.out, f"{script}\n{done.output}"


def _commands(notes: str) -> list[str]:
    """The indented commands, up to and with the first curl."""
    found: list[str] = []
    for line in notes.splitlines():
        if re.match(r"\s+(export |[A-Za-z_]+=|curl )", line) or (found and found[-1].endswith("\\")):
            found.append(line.strip())
            if "curl" in "".join(found) and not line.endswith("\\"):
                break
    return found


async def test_helm_test_passes(release: Release) -> None:
    """The preflight makes the product's own calls and prints the result of each."""
    done = await run("helm", "test", release.name, "-n", release.namespace, "--logs", "--timeout", "3m", timeout=200)
    assert "Succeeded" in done.out, done.output
    for call in ("put", "get", "list", "delete"):
        assert re.search(rf"\b{call}\b", done.output), done.output
    # They are hooks, which helm does not remove.
    await run("kubectl", "delete", "pod", "-n", release.namespace, "-l", release.selector("test"))


async def test_idle_memory(release: Release, cast: str) -> None:
    if "metrics.k8s.io" not in release.cluster.groups():
        pytest.skip("this cluster has no metrics (metrics.k8s.io)")
    custom, ask = release.cluster.custom, release.cluster.asking

    async def look() -> dict[str, int]:
        found = ask(
            custom.list_namespaced_custom_object,
            "metrics.k8s.io",
            "v1beta1",
            release.namespace,
            "pods",
            label_selector=release.selector(),
        )
        return {
            pod["metadata"]["name"]: sum(_bytes(container["usage"]["memory"]) for container in pod["containers"])
            for pod in found["items"]
        }

    names = {pod.metadata.name for pod in release.pods()}
    used = await until(look, lambda used: names <= used.keys(), timeout=120, every=2)
    for pod, memory in sorted(used.items()):
        log.info("idle memory: %4.0f MiB %s", memory / 2**20, pod)
    models = {pod.metadata.name for pod in release.pods("llm")}
    total = sum(memory for pod, memory in used.items() if pod in names - models)
    log.info("idle memory: %4.0f MiB without the embedded model", total / 2**20)
    assert total < IDLE_MEMORY, used


def _bytes(quantity: str) -> int:
    [number, unit] = re.findall(r"^(\d+)(\w*)$", quantity)[0]
    return int(number) * {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}[unit]


async def _left(release: Release) -> set[str]:
    done = await run("kubectl", "get", _KINDS, "-n", release.namespace, "-o", "name")
    always = {"configmap/kube-root-ca.crt", "serviceaccount/default"}
    return set(done.out.split()) - always


async def test_uninstall_leaves_volumes_and_the_kept_secret(release: Release, cast: str) -> None:
    await release.uninstall()

    async def look() -> set[str]:
        return await _left(release)

    def only_what_is_kept(left: set[str]) -> bool:
        return {name.partition("/")[0] for name in left} == {"persistentvolumeclaim", "secret"}

    left = await until(look, only_what_is_kept, timeout=120, every=1)
    assert {name for name in left if name.startswith("secret/")} == {f"secret/{NAME}"}
    assert len(left) == 3, f"PostgreSQL's volume, the store's volume, the Secret: {left}"


async def test_reinstall_finds_what_was_kept(release: Release, cast: str, shared_values: dict[str, Any]) -> None:
    """On the old volumes, with the old passwords, the earlier cast is still there. This installs the release that the
    other tests share."""
    if await release.is_installed():
        await release.uninstall()
    key = release.secret["api-key"]
    await release.first_install(shared_values)
    assert release.secret["api-key"] == key
    assert await release.result(cast) == 31
    assert len(await release.stored(cast)) == 1
