"""Helm and Kubernetes accept every scenario under `ci`; together the scenarios use all of the chart."""

import re
from collections import Counter

import helm_python
import kubernetes_validate
import pytest
import yaml

from tests.chart.rendering import KEDA, MONITORING, NAMESPACE, SCENARIOS, render, scenario
from tests.support import chart
from tests.support.chart import CHART

OLDEST = re.findall(r"\d+\.\d+", yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"])[0]
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
LONGEST = "x" * 53
"""Helm's own limit."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_helm_lints_it(name: str) -> None:
    report = helm_python.lint(CHART, dict(SCENARIOS[name]), strict=True, kube_version=f"v{OLDEST}.0")
    assert not report["errors"]
    assert [found["error"] for found in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version().removesuffix("-local")])
@pytest.mark.parametrize("name", SCENARIOS)
def test_kubernetes_knows_every_field(name: str, version: str) -> None:
    for each in scenario(name).objects:
        if each["apiVersion"] not in (KEDA, MONITORING):
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("release", ["demo", "backcast", "a.dotted.name", LONGEST, f"{LONGEST[:44]}-backcast"])
@pytest.mark.parametrize("name", ["keda", "everything"])
def test_names_and_labels_fit(name: str, release: str) -> None:
    pools = {"pools": {"p" * 20: {"tasks": ["module"], "autoscaling": {"mode": "keda"}}}}
    values = dict(SCENARIOS[name])
    values["workers"] = {**values["workers"], "pools": {**values["workers"]["pools"], **pools["pools"]}}
    objects = render(values, name=release, revision=10_000).objects
    names = Counter((each["kind"], each["metadata"]["name"]) for each in objects)
    assert set(names.values()) == {1}
    for kind, called in names:
        # A StatefulSet's pods carry its name and a hash of eleven in a label.
        assert len(called) <= (52 if kind == "StatefulSet" else 63), f"{kind} {called}"
        called = called.removeprefix(f"{NAMESPACE}.") if kind.startswith("ValidatingAdmission") else called
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", called), f"{kind} {called}"
    for labels in _labels(objects):
        assert all(LABEL.fullmatch(value) for value in labels.values()), labels


def _labels(node: object) -> list[dict[str, str]]:
    if isinstance(node, list):
        return [found for item in node for found in _labels(item)]
    if not isinstance(node, dict):
        return []
    own = [node[key] for key in ("labels", "matchLabels") if key in node]
    return own + [found for item in node.values() for found in _labels(item)]


def test_two_releases_share_no_name() -> None:
    one, other = (
        {(each["kind"], each["metadata"]["name"]) for each in render({}, name=name).objects}
        for name in (LONGEST[:-1] + "1", LONGEST[:-1] + "2")
    )
    assert not one & other


def test_every_template_is_shown_by_some_scenario() -> None:
    empty = {
        path
        for path in scenario("defaults").files
        if not any(list(filter(None, yaml.safe_load_all(scenario(name).files[path]))) for name in SCENARIOS)
    }
    assert empty == {"requirements.yaml"}


@pytest.mark.parametrize("key", chart.read((CHART / "values.yaml").read_text()), ids=lambda key: key.path)
def test_every_value_has_a_reader(key: chart.Key) -> None:
    text = "".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
    unread = [each.path for each in (key, *key.below) if not re.search(rf"[.\"]{each.name}\b", text)]
    assert not unread


@pytest.mark.parametrize("path", chart.files(), ids=lambda path: path.name)
def test_generated_files_are_current(path: chart.Path) -> None:
    assert path.read_text() == chart.files()[path], "run `make gen` and commit it"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("key: 1\n", "key in values.yaml has no comment"),
        ("# What.\nkey:\n  inner: 1\n", "key.inner in values.yaml has no comment"),
        ("# What.\nkey: {}\n", "key in values.yaml is an empty map"),
        ("# What.\nkey: []\n", "key in values.yaml is a list"),
    ],
)
def test_the_generator_names_missing_comments_and_marks(values: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        chart.read(values)
