"""Writes files of the chart from `values.yaml` and its comments: `values.schema.json`, `defaults.json` and `README.md`.

The comment above a key is its documentation. A line `# @schema …` in it states what the default can't show:

    enum:a,b  min:1  max:9       what a value may be, besides being of the default's type
    items:string,name            what a list holds: types, or names of `_KINDS`
    values:string                a map with free keys, and what they hold
    is:host                      what a text is: a name of `_KINDS`
    k8s:ResourceRequirements     a structure of Kubernetes' own
    k8s-items:Volume             a list of them
    env                          environment variables, as a map or as a list
    open                         a map that lets unknown keys through; all others refuse them
    image                        a map that may have `registry`, `repository`, `tag`, `digest`
    shared                       a key at the top that each part takes too
    part                         a map that takes the keys that are `shared`
    like:workers.defaults        a map with free keys that hold what that path holds; null takes one away
    settings                     the tree of `backcast.settings.Settings`
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from backcast.settings import Settings
from tests.support import kubernetes_schema

CHART = Path(__file__).parents[2] / "charts" / "backcast"
Schema = dict[str, Any]

_TYPES: dict[type, str] = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}
_LEAVES = {"env", "image", "k8s", "like", "settings", "values"}
_DNS = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_KINDS: dict[str, Schema] = {
    "host": {
        "pattern": rf"^((\*\.)?{_DNS}(\.{_DNS})*)?$",
        "not": {"pattern": "^[0-9]+([.][0-9]+){3}$"},
        "maxLength": 253,
    },
    "path": {"pattern": "^/([A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*)?$"},
    "url": {"pattern": "^(https?://[^/ ]+(/[^ ]*)?)?$"},
    "database": {"pattern": "^(postgres(ql)?([+]asyncpg)?://[^ ]+)?$"},
    "cidr": {"pattern": "^[0-9a-fA-F.:]+/[0-9]{1,3}$"},
    "label": {"pattern": "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"},
    "digest": {"pattern": "^(sha256:[0-9a-f]{64})?$"},
    "tag": {"pattern": "^([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?$"},
    "quantity": {"pattern": kubernetes_schema.QUANTITY["pattern"]},
}
_IMAGE = {"registry": {}, "repository": {}, "tag": _KINDS["tag"], "digest": _KINDS["digest"]}
_ALSO = "It also takes the keys of [every pod](#every-pod)."


@dataclass(frozen=True)
class Key:
    """A key of values.yaml and the comment above it."""

    path: str
    default: Any
    comment: str
    marks: dict[str, str]
    keys: list["Key"] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def below(self) -> Iterator["Key"]:
        for key in self.keys:
            yield key
            yield from key.below


def files() -> dict[Path, str]:
    """The generated files by path, each with the text that it should hold."""
    text = (CHART / "values.yaml").read_text()
    keys = read(text)
    return {
        CHART / "defaults.json": json.dumps(yaml.safe_load(text), indent=1) + "\n",
        CHART / "values.schema.json": json.dumps(schema(keys), indent=1, ensure_ascii=False) + "\n",
        CHART / "README.md": readme(keys, (CHART / "README.md.tmpl").read_text()),
    }


# The values


def read(text: str) -> list[Key]:
    """The keys of a values file, in its order.

    Raises:
        ValueError: a key has no comment, or no mark states what it may hold.
    """
    return list(_keys(yaml.compose(text), yaml.safe_load(text), "", text.splitlines()))


def _keys(node: yaml.MappingNode, defaults: dict[str, Any], above: str, lines: list[str]) -> Iterator[Key]:
    for name, value in node.value:
        path, default = above + name.value, defaults[name.value]
        comment, marks = _comment(lines, name.start_mark.line, name.start_mark.column)
        if not comment:
            raise ValueError(f"{path} in values.yaml has no comment.")
        key = Key(path, default, comment, marks)
        if isinstance(value, yaml.MappingNode) and not _LEAVES & marks.keys():
            key.keys.extend(_keys(value, default, f"{path}.", lines))
            if not key.keys:
                raise ValueError(f"{path} in values.yaml is an empty map: describe what it holds.")
        if isinstance(value, yaml.SequenceNode) and not {"items", "k8s-items"} & marks.keys():
            raise ValueError(f"{path} in values.yaml is a list: describe what it holds.")
        yield key


def _comment(lines: list[str], line: int, column: int) -> tuple[str, dict[str, str]]:
    """The words of the comment that ends above that line, and its marks."""
    start, words, marks = " " * column + "#", list[str](), dict[str, str]()
    while line > 0 and lines[line - 1].startswith(start):
        line -= 1
        text = lines[line].removeprefix(start).strip()
        if text.startswith("@schema "):
            marks |= dict(mark.partition(":")[::2] for mark in text.split()[1:])
        else:
            words.insert(0, text)
    return " ".join(words), marks


# The schema


def schema(keys: list[Key]) -> Schema:
    """In draft 7, which every version of Helm knows."""
    settings = _settings()
    shared = {key.name: _schema(key, {}, {}) for key in keys if "shared" in key.marks}
    everything = [each for key in keys for each in (key, *key.below)]
    models = {key.marks["like"] for key in everything if "like" in key.marks}
    definitions = {key.path: _schema(key, shared, settings) for key in everything if key.path in models}
    found: Schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$comment": "Generated from values.yaml and src/backcast/settings.py by `make gen`.",
        "type": "object",
        "properties": {key.name: _schema(key, shared, settings) for key in keys},
        "additionalProperties": False,
    }
    found["definitions"] = settings.pop("$defs") | {
        path: found | {"type": ["object", "null"]} for path, found in definitions.items()
    }
    found["definitions"] |= kubernetes_schema.definitions(found)
    return found


def _schema(key: Key, shared: Schema, settings: Schema) -> Schema:
    marks, found = key.marks, {"description": key.comment, "type": _TYPES[type(key.default)]}
    if "settings" in marks:
        found |= {name: settings[name] for name in ("properties", "additionalProperties")}
    elif "image" in marks:
        properties = {name: {"type": "string", **kind} for name, kind in _IMAGE.items()}
        found |= {"properties": properties, "additionalProperties": False}
    elif "like" in marks:
        found["additionalProperties"] = {"$ref": f"#/definitions/{marks['like']}"}
    elif "env" in marks:
        del found["type"]
        source = {"type": "object", "properties": {"valueFrom": kubernetes_schema.reference("EnvVarSource")}}
        of_object = {**source, "additionalProperties": False}
        value = {"if": {"type": "object"}, "then": of_object, "else": _any_of("string,number,boolean,null")}
        listed = {"type": "array", "items": kubernetes_schema.reference("EnvVar")}
        found |= {"if": {"type": "array"}, "then": listed, "else": {"type": "object", "additionalProperties": value}}
    elif "k8s" in marks:
        found |= kubernetes_schema.definition(marks["k8s"])
    elif "k8s-items" in marks:
        found["items"] = kubernetes_schema.reference(marks["k8s-items"])
    elif "is" in marks:
        found |= _KINDS[marks["is"]]
    elif "values" in marks:
        found["additionalProperties"] = _any_of(marks["values"])
    elif "items" in marks:
        found["items"] = _any_of(marks["items"])
    elif key.keys:
        own = {inner.name: _schema(inner, shared, settings) for inner in key.keys}
        found["properties"] = shared | own if "part" in marks else own
        found["additionalProperties"] = "open" in marks
    if "enum" in marks:
        found["enum"] = marks["enum"].split(",")
    for mark, word in (("min", "minimum"), ("max", "maximum")):
        if mark in marks:
            found[word] = int(marks[mark])
    return found


def _any_of(names: str) -> Schema:
    if names in _KINDS:
        return {"type": "string", **_KINDS[names]}
    if names == "string,name":
        named = {"required": ["name"], "properties": {"name": {"type": "string"}}, "additionalProperties": False}
        return {"type": ["string", "object"], **named}
    return {"type": names.split(",")} if "," in names else {"type": names}


def _settings() -> Schema:
    """The settings' own schema, without their defaults; durations may be seconds too."""

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(item) for item in node]
        if isinstance(node, str):
            return node.replace("#/$defs/", "#/definitions/")
        if not isinstance(node, dict):
            return node
        made = {
            word: {name: plain(inner) for name, inner in value.items()} if word == "properties" else plain(value)
            for word, value in node.items()
            if word not in ("default", "title", "writeOnly")
        }
        if made.get("format") == "duration":
            made["type"] = ["string", "number"]
            return {word: value for word, value in made.items() if word not in ("ge", "gt", "le", "lt")}
        return made

    return plain(Settings.model_json_schema())


# The README


def readme(keys: list[Key], template: str) -> str:
    """The template with all values in place of its word VALUES: a section for each map at the top."""
    sections: list[str] = []
    plain: list[Key] = []
    for key in keys:
        if "shared" in key.marks:
            continue
        if not key.keys:
            plain.append(key)
            continue
        sections.append("\n".join([f"### `{key.path}`", "", _described(key), "", *_table(key.below)]))
    every = [
        "### Every pod",
        "",
        "These keys apply to all pods. Each part, and each pool, takes them too: its",
    ]
    every += ["variables, volumes, mounts, annotations and labels add to those here, the rest replaces them.", ""]
    every += _table(key for key in keys if "shared" in key.marks)
    return template.replace("VALUES", "\n\n".join(["\n".join(_table(plain)), *sections, "\n".join(every)]))


def _table(keys: Iterator[Key] | list[Key]) -> list[str]:
    return [
        "| key | default | |",
        "|---|---|---|",
        *(f"| `{key.path}` | {_shown(key)} | {_described(key)} |" for key in keys),
    ]


def _shown(key: Key) -> str:
    if key.keys or key.default in ("", {}, []):
        return ""
    return f"`{key.default if isinstance(key.default, str) else json.dumps(key.default, ensure_ascii=False)}`"


def _described(key: Key) -> str:
    return f"{key.comment} {_ALSO}" if "part" in key.marks else key.comment
