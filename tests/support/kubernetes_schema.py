"""Kubernetes' own schemas, for the values of the chart that are structures of Kubernetes. They come from a package, so
they are pinned and need no network. They refuse unknown keys, and know the fields of the newest version.
"""

import functools
import json
from pathlib import Path
from typing import Any

import kubernetes_validate

Schema = dict[str, Any]

QUANTITY: Schema = {
    "type": ["string", "number"],
    "pattern": r"^[0-9]+(\.[0-9]*)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][0-9]+)?$",
}
_CORE, _NETWORKING = "io.k8s.api.core.v1.", "io.k8s.api.networking.v1."
_OWN = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity": QUANTITY,
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"type": ["string", "integer"]},
}
_NAMED = ("SecretKeySelector", "ConfigMapKeySelector")
"""Their `name` is optional by the schema and required by the API server."""


@functools.cache
def _definitions() -> dict[str, Schema]:
    version = kubernetes_validate.latest_version().removesuffix("-local")
    file = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{version}-local-strict"
    return json.loads((file / "_definitions.json").read_text())["$defs"]


def reference(kind: str) -> Schema:
    """A reference to the definition of a kind, such as `Volume`."""
    group = _NETWORKING if kind.startswith("NetworkPolicy") else _CORE
    return {"$ref": f"#/definitions/{group}{kind}"}


def definition(kind: str) -> Schema:
    """The definition of a kind, for one place."""
    return {**_plain(_definitions()[_CORE + kind]), "type": "object"}


def definitions(used: Schema) -> dict[str, Schema]:
    """The definitions that a schema refers to, and those that they refer to."""
    found: dict[str, Schema] = {}
    wanted = _references(used)
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = _OWN.get(name) or _plain(_definitions()[name])
            if name.removeprefix(_CORE) in _NAMED:
                found[name] = {**found[name], "required": ["key", "name"]}
            wanted |= _references(found[name])
    return dict(sorted(found.items()))


def _references(node: Any) -> set[str]:
    if isinstance(node, list):
        return {name for item in node for name in _references(item)}
    if not isinstance(node, dict):
        return set()
    own = (
        {str(node["$ref"]).removeprefix("#/definitions/")}
        if str(node.get("$ref", "")).find("io.k8s.") > 0
        else set[str]()
    )
    return own | {name for item in node.values() for name in _references(item)}


def _plain(node: Any) -> Any:
    """Without descriptions, and with references into one file."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if isinstance(node, str):
        return node.replace("#/$defs/", "#/definitions/")
    if not isinstance(node, dict):
        return node
    return {
        word: {name: _plain(inner) for name, inner in value.items()} if word == "properties" else _plain(value)
        for word, value in node.items()
        if word not in ("description", "$schema") and not word.startswith("x-")
    }
