"""Chooses the cluster that the tests run on: a given one, or one of our own by the kit or by kind. Installs the add-ons
that the chart counts on (an Ingress controller, metrics, KEDA). All calls of the cluster's API go through it.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import urllib3
from kubernetes import client as kubernetes
from kubernetes import config as kubeconfig
from kubernetes.client.exceptions import ApiException

from tests.e2e.programs import Done, missing, run, run_aloud
from tests.support.stack import ROOT
from tests.support.waiting import until

log = logging.getLogger("e2e")

INGRESS = os.environ.get("E2E_INGRESS", "http://127.0.0.1:8080")
"""The address of the cluster's Ingress controller, as seen from here."""
KIT = Path(os.environ.get("KIND_KIT", ROOT.parent / "shared" / "kind" / "kit"))
"""A program that makes a cluster with kind where no image registry can be reached; stock kind without it."""
KIND_NAME = "backcast-e2e"
OURS = "backcast-e2e"
"""The label of every namespace that the tests make, so that the next session finds what this one left."""

_KIND = f"""
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
name: {KIND_NAME}
nodes:
- role: control-plane
  extraPortMappings:
  - {{containerPort: 80, hostPort: {httpx.URL(INGRESS).port or 80}, listenAddress: 127.0.0.1}}
"""
# The add-ons that a bare kind cluster lacks: name, repository of charts, namespace, values.
_ADDONS = (
    ("traefik", "https://traefik.github.io/charts", "traefik",
     ["ports.web.hostPort=80", "service.enabled=false", "ingressClass.isDefaultClass=true"]),
    ("metrics-server", "https://kubernetes-sigs.github.io/metrics-server", "kube-system",
     ["args={--kubelet-insecure-tls}"]),
    ("keda", "https://kedacore.github.io/charts", "keda", []),
)  # fmt: skip


@dataclass
class Cluster:
    """A running cluster. `asking` raises an OSError whenever its API is away for a moment; on an OSError `until` looks
    again."""

    kind_name: str | None
    """None when kind did not make it: the images must then be in it, or within its reach."""
    api: kubernetes.ApiClient = field(default_factory=kubernetes.ApiClient)

    def __post_init__(self) -> None:
        self.core = kubernetes.CoreV1Api(self.api)
        self.apps = kubernetes.AppsV1Api(self.api)
        self.batch = kubernetes.BatchV1Api(self.api)
        self.network = kubernetes.NetworkingV1Api(self.api)
        self.scaling = kubernetes.AutoscalingV2Api(self.api)
        self.custom = kubernetes.CustomObjectsApi(self.api)

    def asking(self, call: Callable[..., Any], *given: Any, **named: Any) -> Any:
        try:
            return call(*given, _request_timeout=20, **named)
        except urllib3.exceptions.HTTPError as error:
            raise OSError(f"the cluster does not answer: {error}") from None
        except ApiException as error:
            if error.status is None or error.status >= 500 or error.status == 429:
                raise OSError(f"the cluster answered {error.status} {error.reason}") from None
            raise

    def nodes(self) -> list[str]:
        return [node.metadata.name for node in self.asking(self.core.list_node).items]

    def groups(self) -> set[str]:
        """The API groups that the cluster knows."""
        return {group.name for group in self.asking(kubernetes.ApisApi(self.api).get_api_versions).groups}

    # -- namespaces -------------------------------------------------------------------------------------------------

    async def make_namespace(self, name: str) -> None:
        """A namespace that admits only pods of the restricted standard: so every pod that runs there meets it."""
        labels = {OURS: "true", **{f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}}
        body = {"metadata": {"name": name, "labels": labels}}
        try:
            self.asking(self.core.create_namespace, body)
        except ApiException as error:
            if error.status != 409:
                raise

        async def accounts() -> list[Any]:
            return self.asking(self.core.list_namespaced_service_account, name).items

        await until(accounts)  # a controller makes the first one; a pod that comes before it is refused

    async def clear(self, *, wait: bool = True) -> None:
        """Remove the namespaces that tests have made, with their contents."""

        async def look() -> list[str]:
            found = self.asking(self.core.list_namespace, label_selector=f"{OURS}=true").items
            return [namespace.metadata.name for namespace in found]

        names = await look()
        for name in names:  # with no grace for its pods: a namespace would wait for it twice
            self.asking(self.core.delete_collection_namespaced_pod, name, grace_period_seconds=0)
            self.asking(self.core.delete_namespace, name)
        if names and wait:
            log.info("removing %s, which an earlier session left", ", ".join(names))
            await until(look, lambda left: not left, timeout=300, every=1)

    # -- pods -------------------------------------------------------------------------------------------------------

    def pods(self, namespace: str, selector: str = "", *, leaving: bool = False) -> list[Any]:
        """Pods that have not ended; those that are being deleted too if asked."""
        found = self.asking(self.core.list_namespaced_pod, namespace, label_selector=selector).items
        return [
            pod
            for pod in found
            if pod.status.phase in ("Pending", "Running") and (leaving or pod.metadata.deletion_timestamp is None)
        ]

    def delete_pod(self, namespace: str, name: str, *, grace: int | None = None) -> None:
        """With a grace of 0 its processes are killed at once, as by a node that dies."""
        self.asking(self.core.delete_namespaced_pod, name, namespace, grace_period_seconds=grace)

    def log(self, namespace: str, pod: str, **named: Any) -> str:
        return self.asking(self.core.read_namespaced_pod_log, pod, namespace, **named)

    async def execute(
        self, namespace: str, target: str, *command: str, timeout: float = 60, check: bool = True
    ) -> Done:
        """Run a command in a pod's main container."""
        return await run("kubectl", "exec", "-n", namespace, target, "--", *command, timeout=timeout, check=check)

    async def apply(self, namespace: str, *objects: dict[str, Any]) -> None:
        body = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        await run("kubectl", "apply", "-n", namespace, "-f", "-", stdin=body)

    async def pod_ready(self, namespace: str, name: str, *, timeout: float = 90) -> Any:
        async def look() -> Any:
            return self.asking(self.core.read_namespaced_pod_status, name, namespace)

        return await until(look, is_ready, timeout=timeout, every=0.5)

    # -- images -----------------------------------------------------------------------------------------------------

    async def load(self, images: dict[str, str]) -> None:
        """Copy images (name to id) from the host's docker into the nodes that lack them."""
        if self.kind_name is None:
            log.info("this cluster was not made by kind: it must have or find %s", ", ".join(images))
            return
        has = await asyncio.gather(*(self._images_of(node, images) for node in self.nodes()))
        wanted = sorted(name for name, identity in images.items() if any(of.get(name) != identity for of in has))
        # In batches, because a program may name a file after all its arguments; the images of a batch share layers.
        for names in (wanted[start : start + 6] for start in range(0, len(wanted), 6)):
            if KIT.is_file():
                env = {**os.environ, "KIND_KIT_NAME": self.kind_name}
                await run_aloud(str(KIT), "load", *names, timeout=900, env=env)
            else:
                await run_aloud("kind", "load", "docker-image", "--name", self.kind_name, *names, timeout=900)

    async def _images_of(self, node: str, images: Iterable[str]) -> dict[str, str]:
        """The images of a node, with their ids, which are the digests of their configurations."""
        ctr = ("docker", "exec", node, "ctr", "--namespace", "k8s.io")
        listed = [line.split() for line in (await run(*ctr, "images", "list")).out.splitlines()[1:]]
        digests = {short(name): digest for name, _, digest, *_ in listed}

        async def identity(name: str) -> str:
            manifest = json.loads((await run(*ctr, "content", "get", digests[short(name)])).out)
            return str(manifest.get("config", {}).get("digest"))

        there = [name for name in images if short(name) in digests]
        return dict(zip(there, await asyncio.gather(*map(identity, there)), strict=True))


def short(image: str) -> str:
    """An image's name as docker lists it."""
    return image.removeprefix("docker.io/").removeprefix("library/")


def is_ready(pod: Any) -> bool:
    conditions = pod.status.conditions or []
    return any(condition.type == "Ready" and condition.status == "True" for condition in conditions)


# -- which one --------------------------------------------------------------------------------------------------------


async def find_tools() -> None:
    """Docker and the programs, by the kit where there is one; PATH is set for every program that is called."""
    if KIT.is_file():
        await run_aloud(str(KIT), "deps", timeout=600)
        await run_aloud(str(KIT), "build", timeout=2400)
        folder, _ = await _kit_env()
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
    lacking = missing("docker", "helm", "kubectl", *(() if os.environ.get("E2E_KUBECONFIG") else ("kind",)))
    if lacking:
        pytest.exit(f"The end-to-end tests need {', '.join(lacking)} on the PATH.", returncode=1)
    if (done := await run("docker", "info", check=False)).code != 0:
        why = done.err.strip().splitlines()[-1] if done.err.strip() else "no answer"
        pytest.exit(f"The end-to-end tests need Docker, and it does not answer: {why}", returncode=1)


async def connect() -> Cluster:
    """The cluster of this session. KUBECONFIG is set for every program that is called."""
    given = os.environ.get("E2E_KUBECONFIG")
    if given:
        os.environ["KUBECONFIG"] = given
        if not await _answers():
            pytest.exit(f"No cluster answers by E2E_KUBECONFIG={given}: correct or unset it.", returncode=1)
    # KUBECONFIG alone may name a cluster that is in use: the tests accept only a cluster that kind has made.
    elif not (os.environ.get("KUBECONFIG") and await _kind_name() and await _answers()):
        await (_kit_up() if KIT.is_file() else _kind_up())
    kubeconfig.load_kube_config(os.environ["KUBECONFIG"])  # by itself it reads the variable when it is imported
    configuration = kubernetes.Configuration.get_default_copy()
    configuration.proxy = None
    cluster = Cluster(await _kind_name(), kubernetes.ApiClient(configuration))
    await _ingress_answers()
    return cluster


async def _answers() -> bool:
    return (await run("kubectl", "version", "--request-timeout=5s", check=False)).code == 0


async def _kind_name() -> str | None:
    done = await run("kubectl", "config", "current-context", check=False)
    return done.out.strip().removeprefix("kind-") if done.out.startswith("kind-") else None


async def _kit_env() -> tuple[str, str]:
    """The folder of its programs, and its cluster's KUBECONFIG."""
    exports = (await run(str(KIT), "env")).out
    [found] = re.findall(r"PATH=(.*?):\$PATH KUBECONFIG=(\S+)", exports)
    return found


async def _kit_up() -> None:
    await run_aloud(str(KIT), "up", timeout=600)
    _, os.environ["KUBECONFIG"] = await _kit_env()


async def _kind_up() -> None:
    folder = ROOT / ".backcast" / "e2e"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["KUBECONFIG"] = str(folder / "kubeconfig")
    if KIND_NAME not in (await run("kind", "get", "clusters")).out.split():
        (folder / "kind.yaml").write_text(_KIND)
        await run_aloud("kind", "create", "cluster", "--config", str(folder / "kind.yaml"), timeout=600)
    await run("kind", "export", "kubeconfig", "--name", KIND_NAME)
    for name, charts, namespace, values in _ADDONS:
        sets = [word for value in values for word in ("--set", value)]
        command = ("helm", "upgrade", "--install", name, name, "--repo", charts, "--namespace", namespace)
        await run_aloud(*command, "--create-namespace", "--wait", *sets, timeout=400)


async def _ingress_answers() -> None:
    async def look() -> int:
        async with httpx.AsyncClient(trust_env=False, timeout=3) as client:
            return (await client.get(INGRESS)).status_code

    try:
        await until(look, timeout=60, every=1)
    except AssertionError as error:
        pytest.exit(f"No Ingress controller answers at {INGRESS} (set E2E_INGRESS): {error}", returncode=1)


def needs(cluster: Cluster, group: str, what: str) -> None:
    """Skip, loudly, where the cluster has no such API."""
    if group not in cluster.groups():
        pytest.skip(f"this cluster has no {what} ({group})")
