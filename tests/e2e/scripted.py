"""Runs a model's server that answers by script in the cluster. All releases but one ask it."""

from tests.e2e.cluster import Cluster
from tests.e2e.images import NOW, REGISTRY

NAMESPACE = "backcast-e2e-model"
PORT = 8080
MODEL = f"http://model.{NAMESPACE}.svc.cluster.local:{PORT}/v1"
RESTRICTED_POD = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "runAsGroup": 10001,
    "fsGroup": 10001,
    "seccompProfile": {"type": "RuntimeDefault"},
}
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


async def serve_model(cluster: Cluster) -> None:
    await cluster.make_namespace(NAMESPACE)
    container = {
        "name": "model",
        "image": f"{REGISTRY}/api:{NOW}",
        "command": ["python", "-m", "backcast.testing", str(PORT), "0.0.0.0"],
        "readinessProbe": {"httpGet": {"path": "/health", "port": PORT}, "periodSeconds": 1},
        "securityContext": RESTRICTED,
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "model", "labels": {"app": "model"}},
        "spec": {
            "securityContext": RESTRICTED_POD,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 1,
            "containers": [container],
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "model"},
        "spec": {"selector": {"app": "model"}, "ports": [{"port": PORT, "targetPort": PORT}]},
    }
    await cluster.apply(NAMESPACE, pod, service)
    await cluster.pod_ready(NAMESPACE, "model")
