"""Saves the cluster's state after a failure in a folder: pods, events, and the logs of every container. The test's
report gets its last lines."""

import json
import os
import re
import subprocess
from pathlib import Path

from tests.e2e.cluster import OURS
from tests.support.stack import ROOT

FOLDER = Path(os.environ.get("E2E_DUMPS", ROOT / ".backcast" / "e2e" / "dumps"))


def dump(test: str) -> str:
    folder = FOLDER / re.sub(r"[^\w.-]+", "_", test)[-120:]
    report = [f"everything is in {folder}"]
    found = _kubectl("get", "namespaces", "-l", f"{OURS}=true", "-o", "name")
    for line in found.splitlines():
        if line.startswith("namespace/"):
            report += _namespace(name := line.removeprefix("namespace/"), folder / name)
        else:  # what is wrong with the cluster
            report.append(line)
    return "\n".join(report)


def _namespace(namespace: str, folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    here = ("-n", namespace)
    found = _kubectl("get", "pods", *here, "-o", "json")
    pods = json.loads(found)["items"] if found.startswith("{") else []
    things = "pods,deployments,statefulsets,jobs,ingresses,hpa,pvc"
    table = _kubectl("get", things, *here, "-o", "wide")
    events = _kubectl("get", "events", *here, "--sort-by=.lastTimestamp")
    (folder / "objects.txt").write_text(table)
    (folder / "events.txt").write_text(events)
    (folder / "describe.txt").write_text(_kubectl("describe", "pods", *here))
    report = [f"--- {namespace}", _kubectl("get", "pods", *here), "--- latest events", *events.splitlines()[-25:]]
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        log = _kubectl("logs", *here, name, "--all-containers", "--prefix", "--tail=2000")
        (folder / f"{name}.log").write_text(log)
        containers = status.get("containerStatuses", [])
        if any(container.get("restartCount") for container in containers):
            before = _kubectl("logs", *here, name, "--all-containers", "--prefix", "--previous", "--tail=500")
            (folder / f"{name}.previous.log").write_text(before)
        if status.get("phase") != "Succeeded" and not all(container.get("ready") for container in containers):
            report += [f"--- end of the log of {name}", *log.splitlines()[-15:]]
    return report


def _kubectl(*arguments: str) -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"kubectl {' '.join(arguments)}: {error}"
    return done.stdout or done.stderr
