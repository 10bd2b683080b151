"""A node is drained: the disruption budgets allow it, one pod at a time, and no client notices."""

import pytest

from tests.e2e.load import load
from tests.e2e.programs import run
from tests.e2e.release import Release, merged


async def test_a_node_is_drained(shared: Release, shared_values: dict[str, object]) -> None:
    cluster = shared.cluster
    if len(cluster.nodes()) < 2:
        pytest.skip("a drain needs a second node (the kit makes one by KIND_KIT_NODES=2)")
    two = {"replicas": 2, "pdb": {"enabled": True}}
    pair = {"api": {**two, "autoscaling": {"enabled": False}}, "workers": {"pools": {"default": two}}}
    await shared.install(merged(shared_values, pair))
    await shared.settled()
    node = shared.pods("worker", "default")[0].spec.node_name
    assert {pod.spec.node_name for pod in shared.pods("worker", "default")} == set(cluster.nodes()), "spread"
    # A volume on a node's own disk can't move: its pod would wait for the node to come back.
    movable = f"{shared.selector()},app.kubernetes.io/component notin (postgres, store)"
    try:
        async with load(shared, "drain") as work:
            flags = ("--pod-selector", movable, "--delete-emptydir-data", "--timeout=240s")
            await run("kubectl", "drain", node, *flags, timeout=260)
            stayed = [pod for pod in shared.cluster.pods(shared.namespace, movable) if pod.spec.node_name == node]
            assert not stayed, [pod.metadata.name for pod in stayed]
            await shared.settled()
            await work.more(20)
        await work.verify()
    finally:
        await run("kubectl", "uncordon", node)
