"""The chart as Helm renders it: Helm's own library from a wheel, so neither a cluster nor a `helm` is needed."""

import contextlib
import functools
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import helm_python
import yaml

from tests.support.chart import CHART

Object = dict[str, Any]
Values = Mapping[str, Any]

SCENARIOS: dict[str, Values] = {"defaults": {}} | {
    path.stem: yaml.safe_load(path.read_text()) for path in sorted((CHART / "ci").glob("*.yaml"))
}
COMPONENT, POOL = "app.kubernetes.io/component", "backcast/pool"
RELEASE, NAMESPACE = "demo", "team"
KEDA, MONITORING = "keda.sh/v1alpha1", "monitoring.coreos.com/v1"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built


@dataclass(frozen=True)
class Pod:
    """A pod that a workload would start."""

    owner: Object
    metadata: Object
    spec: Object

    @property
    def name(self) -> str:
        return f"{self.owner['kind']} {self.owner['metadata']['name']}"

    @property
    def component(self) -> str:
        return self.metadata["labels"][COMPONENT]

    @property
    def main(self) -> Object:
        [container] = self.spec["containers"]
        return container

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), self.main]

    @property
    def runs_on(self) -> bool:
        """Whether it is to run for ever."""
        return self.owner["kind"] in ("Deployment", "StatefulSet")


@dataclass(frozen=True)
class Release:
    objects: list[Object]
    notes: str
    files: dict[str, str]

    def of(self, kind: str, component: str | None = None, pool: str | None = None) -> list[Object]:
        labels = {COMPONENT: component, POOL: pool}
        return [
            each
            for each in self.objects
            if each["kind"] == kind
            and all(each["metadata"].get("labels", {}).get(name) == value for name, value in labels.items() if value)
        ]

    def the(self, kind: str, component: str | None = None, pool: str | None = None) -> Object:
        [found] = self.of(kind, component, pool)
        return found

    @property
    def pods(self) -> list[Pod]:
        found = []
        for each in self.objects:
            if each["kind"] == "Pod":
                found.append(Pod(each, each["metadata"], each["spec"]))
            elif each["kind"] in ("Deployment", "StatefulSet", "Job"):
                template = each["spec"]["template"]
                found.append(Pod(each, template["metadata"], template["spec"]))
        return found

    def pod(self, component: str, pool: str | None = None) -> Pod:
        [found] = [
            pod for pod in self.pods if pod.component == component and pool in (None, pod.metadata["labels"].get(POOL))
        ]
        return found

    @property
    def config(self) -> Object:
        """The configuration file that the processes read."""
        [found] = [each for each in self.of("ConfigMap") if "backcast.yaml" in each["data"]]
        return yaml.safe_load(found["data"]["backcast.yaml"])


@functools.cache
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def render(values: Values, *, name: str = RELEASE, cluster: "Cluster | None" = None, revision: int = 1) -> Release:
    """The objects that Helm would install.

    Raises:
        helm_python.HelmError: it refuses the values, with a sentence.
    """
    given = {"name": name, "namespace": NAMESPACE, "revision": revision}
    if cluster is None:
        files = chart().render(dict(values), **given)
    else:
        with helm_python.Config(kubeconfig_content=cluster.kubeconfig, namespace=NAMESPACE) as config:
            files = config.render(chart(), dict(values), **given)
    files = {path.removeprefix("backcast/templates/"): text for path, text in files.items()}
    notes = files.pop("NOTES.txt")
    objects = [each for text in files.values() for each in yaml.load_all(text, Loader=_LOADER) if each]
    return Release(objects, notes, files)


@functools.cache
def scenario(name: str) -> Release:
    return render(SCENARIOS[name])


def refusal(values: Values, cluster: "Cluster | None" = None) -> str:
    """The sentence with which these values are refused."""
    try:
        render(values, cluster=cluster)
    except helm_python.HelmError as error:
        return str(error)
    raise AssertionError(f"{values} are not refused")


# A cluster that can be asked


@dataclass
class Cluster:
    """An API server that serves the given objects to a template's `lookup`."""

    objects: dict[str, Object] = field(default_factory=dict[str, Object])
    kubeconfig: str = ""

    def add(self, kind: str, name: str, **content: Any) -> None:
        version, resource = _RESOURCES[kind]
        root = "/api/v1" if version == "v1" else f"/apis/{version}"
        self.objects[f"{root}/namespaces/{NAMESPACE}/{resource}/{name}"] = {
            "apiVersion": version,
            "kind": kind,
            "metadata": {"name": name, "namespace": NAMESPACE},
            **content,
        }

    def listed(self, path: str) -> Object | None:
        items = [each for name, each in self.objects.items() if name.rpartition("/")[0] == path]
        return {**items[0], "kind": f"{items[0]['kind']}List", "metadata": {}, "items": items} if items else None


_RESOURCES = {
    "Secret": ("v1", "secrets"),
    "ConfigMap": ("v1", "configmaps"),
    "PersistentVolumeClaim": ("v1", "persistentvolumeclaims"),
    "Deployment": ("apps/v1", "deployments"),
    "StatefulSet": ("apps/v1", "statefulsets"),
}


def _resources(version: str) -> Object:
    found = [
        {"name": name, "kind": kind, "namespaced": True, "verbs": ["get", "list"]}
        for kind, (of, name) in _RESOURCES.items()
        if of == version
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": found}


_DISCOVERY = {"/api/v1": _resources("v1"), "/apis/apps/v1": _resources("apps/v1")}


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Serves while entered; by a ConfigMap in every namespace the chart knows that it can look up objects."""
    served = Cluster()
    served.add("ConfigMap", "kube-root-ca.crt")

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            found = _DISCOVERY.get(path) or served.objects.get(path) or served.listed(path)
            missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            body = json.dumps(found or missing).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        served.kubeconfig = json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "fake",
                "clusters": [{"name": "fake", "cluster": {"server": address}}],
                "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
                "users": [{"name": "fake", "user": {}}],
            }
        )
        yield served
        server.shutdown()
