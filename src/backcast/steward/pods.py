"""Sets the deletion cost of worker pods, so that scaling down removes idle pods first. Knows the one call to the API
server that this takes. Nothing depends on it: a busy pod that is removed drains like any other.
"""

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from backcast.errors import ConfigurationError
from backcast.ledger import fleet
from backcast.ledger.connection import Ledger

_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_COST = "controller.kubernetes.io/pod-deletion-cost"


@dataclass
class Pods:
    """The pods of this namespace, as this pod's service account may see them."""

    account: Path = _ACCOUNT
    server: str = "https://kubernetes.default.svc"
    _marked: dict[str, int] = field(default_factory=dict[str, int], init=False)

    def __post_init__(self) -> None:
        if not (self.account / "token").exists():
            raise ConfigurationError(
                "BACKCAST_STEWARD__DELETION_COST needs a Kubernetes service account: mount one, or switch it off."
            )

    async def mark(self, ledger: Ledger) -> None:
        """Set the deletion cost of each worker's pod to the number of its busy slots; only changed costs are sent.

        Raises:
            httpx.HTTPError: the API server is away, or the account may not patch pods.
        """
        busy = await fleet.busy(ledger)
        self._marked = {host: cost for host, cost in self._marked.items() if host in busy}
        changed = {host: cost for host, cost in busy.items() if self._marked.get(host) != cost}
        if not changed:
            return
        token, namespace = ((self.account / name).read_text().strip() for name in ("token", "namespace"))
        # A new client each time: the kubelet renews the token, and the pods of a quiet fleet do not change.
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/merge-patch+json"}
        async with httpx.AsyncClient(
            base_url=f"{self.server}/api/v1/namespaces/{namespace}/pods",
            headers=headers,
            verify=ssl.create_default_context(cafile=self.account / "ca.crt")
            if self.server.startswith("https")
            else False,
            trust_env=False,
            timeout=5,
        ) as http:
            for host, cost in changed.items():
                answer = await http.patch(f"/{host}", json={"metadata": {"annotations": {_COST: str(cost)}}})
                # 404: not a pod of this namespace, or gone. 422: for the chart's policy, no worker of this release.
                if answer.status_code not in (404, 422):
                    answer.raise_for_status()
                self._marked[host] = cost
