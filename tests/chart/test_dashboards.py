"""Grafana's dashboards: promtool reads every query, panels do not overlap, and the sidecar finds them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.rendering import render, scenario
from tests.support import dashboards
from tests.support.prometheus import needs_prometheus

FILES = [json.loads(text) for text in dashboards.files().values()]


@pytest.mark.parametrize("path", dashboards.files(), ids=lambda path: path.name)
def test_the_files_are_current(path: Path) -> None:
    assert path.read_text() == dashboards.files()[path], "run `make gen` and commit it"


@needs_prometheus
def test_promtool_reads_every_query(tmp_path: Path) -> None:
    queries = [target["expr"] for board in FILES for panel in board["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(queries)
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("board", FILES, ids=lambda board: board["uid"])
def test_panels_have_a_place_of_their_own(board: dict[str, Any]) -> None:
    taken = list[tuple[int, int]]()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        taken += [(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
    assert len(set(taken)) == len(taken)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert len(board["uid"]) <= 40, "Grafana's limit"
    known = {variable["name"] for variable in board["templating"]["list"]}
    assert {"datasource", "namespace"} <= known
    assert ("$task" in json.dumps(board["panels"])) == ("task" in known)


def test_the_sidecar_finds_them() -> None:
    labelled = [each for each in scenario("everything").of("ConfigMap") if "labels" in each["metadata"]]
    found = {
        name: json.loads(text)
        for each in labelled
        if each["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name, text in each["data"].items()
    }
    assert sorted(found.values(), key=lambda board: board["uid"]) == sorted(FILES, key=lambda board: board["uid"])
    assert all(name.startswith("demo-casting-team-") for name in found), "a file of another release has another name"
    labels = {"monitoring": {"dashboards": {"enabled": True, "labels": {"mine": "yes"}}}}
    assert len([each for each in render(labels).of("ConfigMap") if each["metadata"]["labels"].get("mine")]) == 3
    assert not [each for each in scenario("defaults").of("ConfigMap") if "dashboard" in each["metadata"]["name"]]
