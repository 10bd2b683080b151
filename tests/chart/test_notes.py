"""The notes after an install: the address, a request that works, and the parts that are not for production."""

import re
from typing import Any

import pytest

from tests.chart.rendering import SCENARIOS, Values, render, scenario

OFF = {"enabled": False}
EXPOSURES: dict[str, tuple[Values, list[str]]] = {
    "the Ingress": (
        {},
        ["get ingress demo-backcast-api", "ADDRESS=${ADDRESS:-localhost}", "curl -s http://$ADDRESS/tasks "],
    ),
    "the Ingress by its name": (
        {"ingress": {"host": "b.example.org"}},
        ["\n  http://b.example.org\n", "curl -s http://b.example.org/tasks "],
    ),
    "the Ingress by TLS": (
        {"ingress": {"host": "b.example.org", "tls": {"enabled": True}}},
        ["curl -s https://b.example.org/tasks "],
    ),
    "a load balancer": (
        {"ingress": OFF, "api": {"service": {"type": "LoadBalancer"}}},
        ["get service demo-backcast-api", "curl -s http://$ADDRESS:8000/tasks "],
    ),
    "a port of the nodes": (
        {"ingress": OFF, "api": {"service": {"type": "NodePort"}}},
        ["{.spec.ports[0].nodePort}", "curl -s http://$ADDRESS/tasks "],
    ),
    "nothing": (
        {"ingress": OFF},
        ["port-forward service/demo-backcast-api 8000", "curl -s http://127.0.0.1:8000/tasks "],
    ),
}


@pytest.mark.parametrize("exposure", EXPOSURES)
def test_a_request_for_every_exposure(exposure: str) -> None:
    values, words = EXPOSURES[exposure]
    notes = render(values).notes
    assert all(word in notes for word in words), notes
    assert "KEY=$(kubectl -n team get secret demo-backcast -o jsonpath='{.data.api-key}' | base64 -d" in notes
    assert notes.count('-H "Authorization: Bearer $KEY"') == 2


def test_there_is_a_way_past_the_ingress() -> None:
    """Its controller may have another port than 80, and its host no DNS entry yet."""
    for ingress in ({}, {"host": "b.example.org", "path": "/casts"}):
        notes = render({"ingress": ingress}).notes
        assert "kubectl -n team port-forward service/demo-backcast-api 8000 &\n" in notes
        assert 'curl -s http://127.0.0.1:8000/tasks -H "Authorization: Bearer ${KEY}" -d target_type=int' in notes
    assert "curl -s http://b.example.org/casts/tasks " in notes


def test_the_key_of_others_and_no_key() -> None:
    assert "get secret theirs -o jsonpath='{.data.api-key}'" in render({"auth": {"existingSecret": "theirs"}}).notes
    notes = render({"auth": OFF}).notes
    assert "KEY" not in notes
    assert "The API asks for no key" in notes


def test_a_release_without_the_built_in_task_is_shown_its_tasks() -> None:
    pools = {"default": {"builtinTasks": False, "tasks": ["own"]}}
    assert "/v1/tasks " in render({"workers": {"pools": pools}}).notes


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_setup_job_by_its_name(name: str) -> None:
    release = scenario(name)
    assert f"kubectl -n team logs job/{release.the('Job')['metadata']['name']}\n" in release.notes
    assert not re.search(r"<no value>|%!|\n\n\n", release.notes)


@pytest.mark.parametrize(
    ("values", "words", "shown"),
    [
        ({}, "MinIO's free edition has ended", True),
        ({"store": {"bundled": {"kind": "seaweedfs"}}}, "MinIO", False),
        ({"store": {"mode": "external", "external": {"bucket": "b"}}}, "MinIO", False),
        ({}, "The embedded model: 0.5 billion parameters", True),
        ({"model": {"apiKey": "k"}}, "The embedded model", False),
        ({}, "PostgreSQL: one pod and one volume, no backups", True),
        ({"ingress": {"host": "h", "tls": {"enabled": True}}}, "names no certificate", False),
        ({}, "names no certificate", True),
    ],
)
def test_parts_that_are_not_for_production(values: dict[str, Any], words: str, shown: bool) -> None:
    assert (words in render(values).notes) is shown


def test_production_gets_no_warning() -> None:
    assert "Not for production" not in scenario("external").notes


def test_the_pages_of_prefect() -> None:
    assert "port-forward service/demo-backcast-prefect 4200" in scenario("defaults").notes
    assert "https://prefect.example.org" in scenario("everything").notes
    assert "https://p.example.org" in render({"prefectServer": {"publicUrl": "https://p.example.org"}}).notes
    assert "Prefect" not in render({"prefectServer": {"mode": "off"}}).notes


def test_monitors_need_a_way_in() -> None:
    sentence = "name its namespace in networkPolicy.monitoringNamespace"
    monitored = {"monitoring": {"monitors": "on"}}
    assert sentence in render(monitored).notes
    assert sentence not in render({}).notes
    for policy in ({"enabled": False}, {"monitoringNamespace": "monitoring"}):
        assert sentence not in render({**monitored, "networkPolicy": policy}).notes
