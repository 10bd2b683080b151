"""Targets: the names and schemas that are accepted, the place of a refusal, and the check of values by JSON Schema."""

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import (
    UUID4,
    AfterValidator,
    AnyUrl,
    Base64Bytes,
    BaseModel,
    ByteSize,
    EmailStr,
    Field,
    IPvAnyAddress,
    Json,
    JsonValue,
    SecretStr,
    TypeAdapter,
    WithJsonSchema,
    constr,
    create_model,
)
from typing_extensions import TypedDict

from backcast import targets
from backcast.errors import InvalidTarget
from backcast.executor.shapes import Shapes

INT, STR, NULL = {"type": "integer"}, {"type": "string"}, {"type": "null"}


def refused(target: Any) -> tuple[str, str]:
    """Place and sentence of the refusal."""
    with pytest.raises(InvalidTarget) as caught:
        targets.parse(target)
    (error,) = caught.value.errors
    assert caught.value.status == 422
    assert caught.value.detail == f"{error.pointer}: {error.detail}."
    assert len(error.detail) < 700
    return error.pointer.removeprefix("/target"), error.detail


def fits(target: Any, value: Any) -> bool:
    try:
        targets.parse(target).validate(value)
    except ValueError:
        return False
    return True


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("int", INT),
        ("float", {"type": "number"}),
        ("bool", {"type": "boolean"}),
        ("str", STR),
        ("date", {"type": "string", "format": "date"}),
        ("datetime", {"type": "string", "format": "date-time"}),
        ("time", {"type": "string", "format": "time"}),
        ("UUID", {"type": "string", "format": "uuid"}),
        ("list", {"type": "array"}),
        ("dict", {"type": "object"}),
        ("Any", {}),
        ("list[int]", {"type": "array", "items": INT}),
        ("list[list[str]]", {"type": "array", "items": {"type": "array", "items": STR}}),
        ("dict[str, int]", {"type": "object", "additionalProperties": INT}),
        ("int | None", {"anyOf": [INT, NULL]}),
        ("Optional[int]", {"anyOf": [INT, NULL]}),
        ("list[int | None]", {"type": "array", "items": {"anyOf": [INT, NULL]}}),
        ("Union[int, str]", {"anyOf": [INT, STR]}),
        ("  int  ", INT),
        ("builtins.float", {"type": "number"}),
        ("builtins.list[builtins.int]", {"type": "array", "items": INT}),
        ("typing.List[int]", {"type": "array", "items": INT}),
        ("List[int]", {"type": "array", "items": INT}),
        ("typing.Dict[str, typing.Any]", {"type": "object", "additionalProperties": {}}),
        ("typing.Optional[int]", {"anyOf": [INT, NULL]}),
        ("datetime.date", {"type": "string", "format": "date"}),
        ("datetime.datetime", {"type": "string", "format": "date-time"}),
        ("uuid.UUID", {"type": "string", "format": "uuid"}),
    ],
)
def test_a_name_is_short_for_a_schema(name: str, schema: dict[str, Any]) -> None:
    assert targets.parse(name).schema == schema
    assert targets.parse(name).name == name.strip()


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "in",
        "Int",
        "os",
        "os.system",
        "subprocess.Popen",
        "this.x",
        "__import__('os')",
        "builtins.eval",
        "builtins.object",
        "datetime.timedelta",
        "timedelta",
        "lambda: 1",
        "int()",
        "int or str",
        "int\x00",
        "\x00",
        "int\nstr",
        "list[",
        "list[]",
        "list[int",
        "list[int]]",
        "list[int, str]",
        "list[int,]",
        "int[str]",
        "[int]",
        "int |",
        "| int",
        "dict[int, str]",
        "dict[str]",
        "dict[str, int, int]",
        "dict[str | None, int]",
        "Optional",
        "Optional[int, str]",
        "Union[]",
        "int str",
        "ｉｎｔ",
        "\ud800",
        '"int"',
        "[1]",
    ],
)
def test_any_other_name_is_refused_with_the_names_that_work(name: str) -> None:
    place, sentence = refused(name)
    assert place == ""
    assert "list[…]" in sentence


@pytest.mark.parametrize("name", ["x" * 10_240, "list[" * 5_000, "int|" * 5_000, "." * 201], ids=lambda name: name[:5])
def test_a_long_name_is_refused(name: str) -> None:
    assert "up to 200 characters" in refused(name)[1]


@pytest.mark.parametrize("target", [None, 1, 1.5, True, [], ["int"], b"int", int])
def test_a_target_that_is_neither_text_nor_object_is_refused(target: Any) -> None:
    assert "a target is one of the names" in refused(target)[1]


# -- schemas -------------------------------------------------------------------------------------------------------

KEPT = {
    "type": "object",
    "title": "Order",
    "description": "what was ordered",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{2}-\\d+$", "minLength": 4, "maxLength": 12},
        "when": {"type": "string", "format": "date", "examples": ["2024-01-01"]},
        "lines": {
            "type": "array",
            "minItems": 1,
            "maxItems": 9,
            "uniqueItems": True,
            "items": {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]},
        },
        "pair": {"type": "array", "prefixItems": [INT, STR], "items": False},
        "state": {"enum": ["new", "paid", None]},
        "kind": {"const": "order"},
        "note": {"type": ["string", "null"], "default": None},
        "price": {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "multipleOf": 0.01}, NULL]},
        "__proto__": STR,
        "constructor": True,
        "a/b~c": STR,
        "$ref": STR,
        "": STR,
    },
    "required": ["id"],
    "additionalProperties": False,
    "propertyNames": {"maxLength": 20},
    "maxProperties": 20,
}


def test_a_schema_without_references_is_kept_as_it_is() -> None:
    assert targets.parse(KEPT).schema == KEPT
    assert list(targets.parse(KEPT).schema["properties"]) == list(KEPT["properties"])  # models answer in this order
    assert targets.parse(json.dumps(KEPT)).schema == KEPT
    assert targets.parse(KEPT).name == "object"


def test_any_json_is_a_target_too() -> None:
    assert targets.parse({}).schema == {}
    assert targets.parse({}).validate({"x": [1, None]}) == {"x": [1, None]}


def test_keywords_without_a_meaning_for_values_are_dropped() -> None:
    extras = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "x",
        "x-order": 1,
        "$defs": {"a": 1},
    }
    assert targets.parse(extras | INT).schema == INT


def test_references_are_written_out() -> None:
    schema = {
        "$defs": {"name": {"type": "string", "title": "Name"}, "a/b ~": {"$ref": "#/definitions/n"}},
        "definitions": {"n": {"type": "integer"}},
        "type": "object",
        "properties": {
            "a": {"$ref": "#/$defs/name"},
            "b": {"$ref": "#/$defs/name", "title": "Other", "description": "more"},
            "c": {"$ref": "#/$defs/name", "maxLength": 3},
            "d": {"$ref": "#/$defs/a~1b%20~0"},
            "e": {"$ref": "#/properties/f/anyOf/1"},
            "f": {"anyOf": [NULL, {"type": "boolean"}]},
            "g": {"items": {"$ref": "#/%24defs/name"}},
            "h": {"const": {"$ref": "#/$defs/name"}},
        },
    }
    assert targets.parse(schema).schema["properties"] == {
        "a": {"type": "string", "title": "Name"},
        "b": {"type": "string", "title": "Other", "description": "more"},
        "c": {"maxLength": 3, "allOf": [{"type": "string", "title": "Name"}]},
        "d": INT,
        "e": {"type": "boolean"},
        "f": {"anyOf": [NULL, {"type": "boolean"}]},
        "g": {"items": {"type": "string", "title": "Name"}},
        "h": {"const": {"$ref": "#/$defs/name"}},
    }


def test_pydantics_schemas_are_accepted() -> None:
    class Line(BaseModel):
        what: str
        due: date | None = None

    class Order(BaseModel):
        lines: list[Line]
        first: Line
        tags: dict[str, int] = {}

    target = targets.parse(Order.model_json_schema())
    assert "$ref" not in json.dumps(target.schema)
    order = {"lines": [{"what": "lamp", "due": "2024-05-01"}], "first": {"what": "lamp"}}
    assert target.validate(order) == order


TREE = {
    "$ref": "#/$defs/Node",
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"value": INT, "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
            "required": ["value"],
        }
    },
}
LIST = {"properties": {"value": INT, "next": {"anyOf": [{"$ref": "#"}, NULL]}}, "required": ["value"]}
MUTUAL = {
    "type": "object",
    "properties": {"b": {"$ref": "#/$defs/B"}},
    "$defs": {
        "A": {"type": "object", "properties": {"b": {"$ref": "#/$defs/B"}}, "required": ["b"]},
        "B": {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}, "n": INT}, "required": ["n"]},
    },
}


def needing(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"next": schema}, "required": ["next"]}


CLIQUE = {
    "$ref": "#/$defs/T0",
    "$defs": {
        f"T{i}": {
            "type": "object",
            "properties": {"k": {"const": i}, "x": {"anyOf": [{"$ref": f"#/$defs/T{j}"} for j in range(12)]}},
            "required": ["k"],
        }
        for i in range(12)
    },
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            TREE,
            [{"value": 1}, {"value": 1, "children": [{"value": 2, "children": []}]}],
            [{"value": 1, "children": [{}]}],
        ),
        (LIST, [{"value": 1, "next": {"value": 2, "next": None}}], [{"value": 1, "next": {"next": None}}]),
        ({"type": "array", "items": {"$ref": "#"}}, [[], [[], [[]]]], [[1], [[[1]]]]),
        (MUTUAL, [{"b": {"n": 1, "a": {"b": {"n": 2}}}}], [{"b": {"n": 1, "a": {"b": {}}}}]),
        (CLIQUE, [{"k": 0, "x": {"k": 11, "x": {"k": 3}}}], [{"k": 0, "x": {"k": 99}}]),
        ({"properties": {"x": {"items": {"$ref": "#/properties/x"}}}}, [{"x": [[[]]]}], []),
        (
            {"anyOf": [{"type": "integer"}, {"type": "object", "additionalProperties": {"$ref": "#"}}]},
            [3, {"a": {"b": 3}}],
            ["3", {"a": {"b": "3"}}],
        ),
        (needing({"anyOf": [{"$ref": "#"}, NULL]}), [{"next": {"next": None}}], [{"next": {}}]),
        (needing({"anyOf": [{"allOf": [{"$ref": "#"}]}, NULL]}), [{"next": {"next": None}}], [{"next": {}}]),
        (needing({"type": "array", "items": {"$ref": "#"}}), [{"next": [{"next": []}]}], [{"next": [{}]}]),
        (needing({"$ref": "#", "nullable": True}), [{"next": {"next": None}}], [{"next": {}}]),
        (needing({"$ref": "#"}) | {"type": ["object", "string"]}, [{"next": "end"}], [{"next": {}}]),
        ({"type": "array", "prefixItems": [INT, {"$ref": "#"}], "minItems": 1}, [[1], [1, [2]]], [[1, []]]),
        ({"type": "array", "prefixItems": [INT], "items": {"$ref": "#"}, "minItems": 1}, [[1, [2]]], [[1, []]]),
    ],
)
def test_a_schema_may_lead_back_to_itself(schema: Any, good: list[Any], bad: list[Any]) -> None:
    target = targets.parse(schema)
    Draft202012Validator.check_schema(target.schema)
    for value in good:
        assert target.validate(value) == value
        assert Draft202012Validator(target.schema).is_valid(value), "the plain schema says the same to anybody"
    for value in bad:
        assert not fits(schema, value)
        assert not Draft202012Validator(target.schema).is_valid(value)


def test_a_deep_value_of_a_schema_that_branches_into_itself_takes_no_time() -> None:
    either = {"type": "array", "items": {"$ref": "#"}}
    value: Any = "x"
    for _ in range(60):
        value = [value]
    with pytest.raises(ValueError, match="more than 20000 references"):
        targets.parse({"anyOf": [either, either, {"const": 1}]}).validate(value)


@pytest.mark.parametrize(
    ("schema", "plain"),
    [
        ({"type": "string", "nullable": True}, {"anyOf": [STR, NULL]}),
        ({"type": "string", "nullable": False}, STR),
        ({"enum": ["a"], "nullable": True, "title": "T"}, {"anyOf": [{"enum": ["a"]}, NULL], "title": "T"}),
        (
            {
                "properties": {"x": {"$ref": "#/components/schemas/N", "nullable": True}},
                "components": {"schemas": {"N": INT}},
            },
            {"properties": {"x": {"anyOf": [INT, NULL]}}},
        ),
        ({"allOf": [INT], "nullable": True}, {"anyOf": [{"allOf": [INT]}, NULL]}),
        ({"type": "integer", "format": "int64", "example": 3, "xml": {}}, {"type": "integer", "format": "int64"}),
        ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, {"type": "number", "exclusiveMinimum": 0}),
        ({"type": "number", "maximum": 9, "exclusiveMaximum": False}, {"type": "number", "maximum": 9}),
        ({"type": "array", "items": [INT, STR]}, {"type": "array", "prefixItems": [INT, STR]}),
        (
            {"type": "array", "items": [INT], "additionalItems": False},
            {"type": "array", "prefixItems": [INT], "items": False},
        ),
        ({"$id": "https://example.org/s", "type": "integer"}, INT),
        ({"type": "string", "format": "colour"}, {"type": "string", "format": "colour"}),
        (
            {"type": "string", "contentMediaType": "application/json", "contentSchema": {"$ref": "#"}},
            {"type": "string", "contentMediaType": "application/json"},
        ),
    ],
)
def test_the_spellings_of_openapi_and_of_older_drafts(schema: Any, plain: Any) -> None:
    assert targets.parse(schema).schema == plain


class Sort(Enum):
    ONE = "one"
    TWO = "two"


class Node(BaseModel):
    value: int
    children: list["Node"] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    owner: "Node | None" = None


@dataclass
class Point:
    x: int
    y: float = 0


class Row(TypedDict):
    a: int
    b: NotRequired[str]


class Pair(NamedTuple):
    a: int
    b: str


PYTHON: list[tuple[Any, list[Any], list[Any]]] = [
    (Decimal, ["12.50", 3, "-0.1"], [True, None]),
    (date, ["2024-02-29"], ["2024-02-30"]),
    (timedelta, ["P1DT2H"], ["2 hours"]),
    (UUID4, ["12345678-1234-4678-9234-567812345678"], ["12345678-1234-1678-9234-567812345678", "x"]),
    (Sort, ["one"], ["three"]),
    (Literal["a", 1, None], ["a", 1, None], ["b"]),
    (int | str | None, [1, "a", None], [1.5]),
    (
        Annotated[Cat | Dog, Field(discriminator="kind")],
        [{"kind": "cat", "lives": 9}, {"kind": "dog"}],
        [{"kind": "cow"}],
    ),
    (constr(pattern=r"^[a-z]+$", max_length=3), ["abc"], ["abcd", "A"]),
    (dict[str, Node], [{"a": {"value": 1, "children": [{"value": 2}]}}], [{"a": {"value": 1, "children": [{}]}}]),
    (dict[constr(pattern="^a"), int], [{"ab": 1}], [{"ab": "1"}]),  # type: ignore[misc]
    (tuple[int, str], [[1, "a"]], [["a", 1], [1], [1, "a", 2]]),
    (set[int], [[1, 2]], [[1, 1]]),
    (Node, [{"value": 1, "children": [{"value": 2}]}], [{"value": 1, "children": [{"value": "2"}]}]),
    (Point, [{"x": 1}], [{"y": 1}]),
    (Row, [{"a": 1}], [{"b": "x"}]),
    (Pair, [[1, "a"]], [[1]]),
    (Json[list[int]], ["[1]"], [[1]]),
    (SecretStr, ["x"], [1]),
    (bytes, ["x"], [1]),
    (Base64Bytes, ["eA=="], [1]),
    (IPv4Address, ["10.0.0.1"], ["10.0.0"]),
    (IPvAnyAddress, ["10.0.0.1"], [1]),
    (AnyUrl, ["https://example.org/"], ["example"]),
    (EmailStr, ["a@example.org"], ["a"]),
    (ByteSize, ["1 GB", 7], ["a lot"]),
    (Path, ["/tmp"], [1]),
    (re.Pattern, ["a+"], [1]),
    (JsonValue, [{"a": [1]}], []),
]


@pytest.mark.parametrize(("kind", "good", "bad"), PYTHON, ids=lambda each: getattr(each, "__name__", str(each))[:30])
def test_what_pydantic_makes_of_a_type_is_a_target(kind: Any, good: list[Any], bad: list[Any]) -> None:
    schema = TypeAdapter(kind).json_schema()
    assert [value for value in good if not fits(schema, value)] == []
    assert [value for value in bad if fits(schema, value)] == []


CHAIN = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(100)} | {"a100": INT}
LAUGHS = {f"a{i}": {"prefixItems": [{"$ref": f"#/$defs/a{i + 1}"}] * 10} for i in range(9)} | {"a9": STR}
LOUD = {"loud": {"type": "string", "description": "ha" * 10_000}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "place", "words"),
    [
        ({"type": "text"}, "/type", "array, boolean, integer"),
        ({"type": []}, "/type", "one or several"),
        ({"type": ["string", "string"]}, "/type", "one or several"),
        ({"type": [["string"]]}, "/type", "one or several"),
        ({"type": {}}, "/type", "one or several"),
        ({"properties": {"x": {"$ref": "#/$defs/none"}}}, "/properties/x/$ref", "leads to no schema"),
        ({"properties": {"a/b~": {"dependencies": {}}}}, "/properties/a~1b~0/dependencies", "is not supported"),
        ({"not": 1}, "/not", "must be a schema"),
        ({"properties": {"x": 1}}, "/properties/x", "must be a schema"),
        ({"properties": [1]}, "/properties", "must be an object"),
        ({"anyOf": []}, "/anyOf", "must be a list of schemas"),
        ({"anyOf": [{}, {"type": "x"}]}, "/anyOf/1/type", "must be one"),
        ({"anyOf": {"type": "string"}}, "/anyOf", "must be a list"),
        ({"items": [1]}, "/prefixItems/0", "must be a schema"),
        ({"items": "x"}, "/items", "must be a schema"),
        ({"enum": []}, "/enum", "at least one"),
        ({"enum": "a"}, "/enum", "at least one"),
        ({"required": "a"}, "/required", "different strings"),
        ({"required": ["a", "a"]}, "/required", "different strings"),
        ({"minLength": -1}, "/minLength", "whole number"),
        ({"minLength": True}, "/minLength", "whole number"),
        ({"minLength": 1.5}, "/minLength", "whole number"),
        ({"minimum": "1"}, "/minimum", "a number"),
        ({"minimum": math.nan}, "", "not plain JSON"),
        ('{"minimum": 1e999}', "/minimum", "a number"),
        ('{"const": 1e999}', "/const", "too large"),
        ({"multipleOf": 0}, "/multipleOf", "above 0"),
        ({"uniqueItems": "yes"}, "/uniqueItems", "true or false"),
        ({"title": 1}, "/title", "a string"),
        ({"exclusiveMinimum": True}, "/exclusiveMinimum", "a number"),
        ({"format": ["date"]}, "/format", "a string"),
        ({"pattern": "(?=a"}, "/pattern", "missing )"),
        ({"pattern": "(a)\\1"}, "/pattern", "backreferences are not supported"),
        ({"pattern": "("}, "/pattern", "unclosed group"),
        ({"pattern": "((a{1000}){1000}){1000}"}, "/pattern", "size limit"),
        ({"pattern": 1}, "/pattern", "a string"),
        ({"anyOf": [{"pattern": f"^{i}$"} for i in range(17)]}, "/anyOf/16/pattern", "more than 16"),
        ({"anyOf": [{"pattern": f"\\w{{150}}{i}"} for i in range(40)]}, "", "patterns"),
        ({"patternProperties": {"(": {}}}, "/patternProperties", "unclosed group"),
        ({"unevaluatedProperties": False}, "/unevaluatedProperties", "not supported"),
        ({"dependentRequired": {"a": "b"}}, "/dependentRequired", "lists of strings"),
        ({"items": {"$id": "https://example.org/s"}}, "/items/$id", "not supported"),
        ({"$anchor": "here"}, "/$anchor", "not supported"),
        ({"$dynamicRef": "#x"}, "/$dynamicRef", "not supported"),
        ({"$vocabulary": {}}, "/$vocabulary", "not supported"),
        ({"$ref": "https://example.org/schema.json"}, "/$ref", "only `#/…`"),
        ({"$ref": "file:///etc/passwd"}, "/$ref", "only `#/…`"),
        ({"$ref": "other.json#/a"}, "/$ref", "only `#/…`"),
        ({"$ref": "#here"}, "/$ref", "only `#/…`"),
        ({"$ref": ""}, "/$ref", "only `#/…`"),
        ({"$ref": 1}, "/$ref", "only `#/…`"),
        ({"$ref": {"$ref": "#"}}, "/$ref", "only `#/…`"),
        ({"$ref": "#"}, "/$ref", "without an end"),
        ({"anyOf": [{"$ref": "#"}, NULL]}, "/$ref", "without an end"),
        ({"properties": {"x": {"allOf": [{"$ref": "#/properties/x"}]}}}, "/properties/x/$ref", "without an end"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "/$defs/a/$ref", "without an end"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/%24defs/b"}, "b": {"not": {"$ref": "#/$defs/%61"}}}},
            "",
            "without an end",
        ),
        (needing({"$ref": "#"}), "/$ref", "without an end"),
        (needing({"$ref": "#/properties/next", "title": "it"}), "/properties/next/$ref", "without an end"),
        (needing({"allOf": [INT, needing({"$ref": "#"})]}), "/$ref", "without an end"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "/$ref", "without an end"),
        ({"type": "array", "prefixItems": [INT, {"$ref": "#"}], "minItems": 2}, "/$ref", "without an end"),
        ({"type": "array", "items": [INT, {"$ref": "#"}], "minItems": 2}, "/$ref", "without an end"),
        ({"type": "array", "contains": {"$ref": "#"}}, "/$ref", "without an end"),
        ({"type": "object", "required": 1, "properties": {"a": {"$ref": "#"}}}, "/required", "strings"),
        ({"type": "array", "minItems": "1", "items": {"$ref": "#"}}, "/minItems", "whole number"),
        ({"$ref": "#/"}, "/$ref", "no schema"),
        ({"$ref": "#/properties", "properties": {}}, "/$ref", "no schema"),
        ({"$ref": "#/enum/0", "enum": [{}]}, "/$ref", "no schema"),
        ({"$ref": "#/const", "const": {}}, "/$ref", "no schema"),
        ({"$ref": "#/x-mine", "x-mine": {}}, "/$ref", "no schema"),
        ({"$ref": "#/$defs/a/b", "$defs": {"a": {}}}, "/$ref", "no schema"),
        ({"$ref": "#/anyOf/-1", "anyOf": [{}]}, "/$ref", "no schema"),
        ({"$ref": "#/anyOf/01", "anyOf": [{}, {}]}, "/$ref", "no schema"),
        ({"$ref": "#/$defs/%ff", "$defs": {}}, "/$ref", "no schema"),
        ({"$ref": "#/$defs/a", "$defs": {"a": False}}, "/$ref", "no value fits"),
        ({"$ref": "#/$defs/a0", "$defs": CHAIN}, "", "32 deep"),
        ({"$ref": "#/$defs/a0", "$defs": LAUGHS}, "", "2000 schemas"),
        ({"prefixItems": [{"$ref": "#/$defs/loud"}] * 20, "$defs": LOUD}, "", "262144 characters"),
        (nested(33), "/items" * 33, "32 deep"),
        (nested(150), "/items" * 33, "32 deep"),
        (nested(900), "", "not plain JSON"),
        ({"anyOf": [{}] * 2_000}, "/anyOf/1999", "2000 schemas"),
        ({"description": "x" * 1_000_000}, "", "65536"),
        ({"enum": list(range(100_000))}, "", "65536"),
        ('{"a": ' * 1_000_000, "", "65536"),
        ('{"type": "string"', "", "not plain JSON"),
        ('{"type": NaN}', "", "not plain JSON"),
        ('{"const": "\\ud800"}', "", "not plain JSON"),
        ({"const": "\ud800"}, "", "not plain JSON"),
        ("{}\ud800", "", "not plain JSON"),
        ('{"const": ' + "[" * 10_000 + "]" * 10_000 + "}", "", "not plain JSON"),
        ({"type": "string", "nullable": "yes"}, "/nullable", "true or false"),
        ({"const": {1, 2}.__iter__}, "", "not plain JSON"),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused_where_it_is_wrong(schema: Any, place: str, words: str) -> None:
    where, sentence = refused(schema)
    assert words in sentence
    assert where == place or (place == "" and where.startswith("/"))


def test_the_pointer_of_the_caller_comes_first() -> None:
    with pytest.raises(InvalidTarget) as caught:
        targets.parse({"type": "x"}, pointer="/input/target")
    assert caught.value.errors[0].pointer == "/input/target/type"


def test_a_schema_as_deep_as_allowed_can_be_used() -> None:
    value: Any = 1
    for _ in range(32):
        value = [value]
    assert targets.parse(nested(32)).validate(value) == value


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "good", "bad"),
    [
        ("int", [0, -3, 3.0, 10**300], ["3", 3.5, True, None, [], math.inf, math.nan, 10**5000]),
        ("float", [1, 1.5, -0.0], ["1.5", False, math.nan, -math.inf, float("1e999")]),
        ("bool", [True, False], [0, 1, "true", None]),
        ("str", ["", "x", "\x00"], [1, None, "\ud800", b"\xff"]),
        ("date", ["2024-02-29"], ["2023-02-29", "20240229", "2024-W01-1", "2024-02-29T00:00", 0, ""]),
        (
            "datetime",
            ["2024-03-15T10:00:00Z", "2024-03-15 10:00", "2024-03-15T10:00:00.123456789+05:30"],
            ["2024-03-15", "1710000000", "2024-13-01T00:00:00Z", "2024-03-15T25:00:00Z", 1710000000],
        ),
        ("time", ["10:00", "23:59:59.5", "10:00:00Z"], ["24:61", "10", "1000", "10:00\n"]),
        ("UUID", ["12345678-1234-5678-1234-567812345678"], ["12345678123456781234567812345678", "{}", ""]),
        ("list[int]", [[], [1]], [["1"], {}, None, [None]]),
        ("dict[str, int]", [{}, {"a": 1}], [{"a": "1"}, []]),
        ("int | None", [None, 1], ["", False]),
        ({"format": "duration"}, ["P1D", "PT36H", "P1Y2M3DT4H5M6.5S", "P2W", 5], ["P", "PT", "1D", "P1DT", "P1H"]),
        ({"format": "email"}, ["a.b+c@example.org", "a@b"], ["a", "@b", "a@", "a@b@c", "a b@c.d", "a@-b.c", "a@b\n"]),
        (
            {"format": "uri"},
            ["https://example.org/x?y", "urn:x:y"],
            ["example.org", "http://", " http://a", "http://a b"],
        ),
        ({"format": "hostname"}, ["a.example.org"], ["a..b", "-a", "a_b", "a" * 64, ".".join(["a" * 60] * 5)]),
        ({"format": "ipv4"}, ["10.0.0.1"], ["10.0.0", "010.0.0.1", "256.0.0.1"]),
        ({"format": "ipv6"}, ["::1", "fe80::1"], ["fe80::1%eth0", ":::", "10.0.0.1"]),
        ({"format": "colour"}, ["red"], []),
        ({"format": "uuid4"}, ["12345678-1234-4678-9234-567812345678", 1], ["12345678-1234-5678-9234-567812345678"]),
        ({"pattern": "b+"}, ["abc", 1], ["ac"]),
        ({"pattern": r"^(?=.*[a-z])(?=.*\d).{8,}$"}, ["abcdefg1", 1], ["abcdefgh", "a1", "abcdefg1\n"]),
        ({"pattern": r"^(?!\.)[^@\]$]+@x$"}, ["a@x"], [".a@x", "a$@x", "a@x\n"]),
        ({"pattern": r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+D)?(T(?=\d)(\d+H)?)?)$"}, ["P1W", "P1DT2H"], ["P", "PT"]),
        ({"pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"}, ["12.50", "-0.1"], ["+", "1,5", "..", "12.5\n"]),  # Decimal
        ({"not": {"type": "string"}}, [1], ["a"]),
        ({"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"minimum": 2}}, ["ab", 2], ["a", 1]),
        ({"contains": {"const": 1}, "maxContains": 1}, [[1, 2]], [[2], [1, 1]]),
        ({"dependentRequired": {"a": ["b"]}}, [{}, {"a": 1, "b": 2}], [{"a": 1}]),
        ({"patternProperties": {"^x": INT}, "additionalProperties": False}, [{"xy": 1}], [{"y": 1}, {"xy": "1"}]),
        ({"patternProperties": {"^x": INT}, "additionalProperties": STR}, [{"xy": 1, "y": ""}], [{"y": 1}]),
        ({"pattern": "^a$"}, ["a"], ["a\n", "ba"]),
        ({"enum": ["a", 1, None]}, ["a", 1, None], ["b", True, "1"]),
        ({"multipleOf": 0.01}, [19.99, 7, True], [0.001]),
        ({"minimum": 10**400}, [10**401], [1e300]),
        ({"multipleOf": 0.5}, [1.5, 10**400], [1e-320]),
        ({"uniqueItems": True}, [[1, 2], [1, True]], [[1, 1.0], [{"a": 1}, {"a": 1}]]),
        ({"propertyNames": {"format": "date"}}, [{"2024-01-01": 1}], [{"x": 1}]),
        (
            {"properties": {"a": {"pattern": "^x"}}, "additionalProperties": False},
            [{}, {"a": "xy"}],
            [{"b": 1}, {"a": "y"}],
        ),
    ],
)
def test_values(target: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not fits(target, value)] == []
    assert [value for value in bad if fits(target, value)] == []


def test_python_values_come_out_as_plain_json() -> None:
    assert targets.parse("date").validate(date(2024, 3, 15)) == "2024-03-15"
    assert targets.parse("datetime").validate(datetime(2024, 3, 15, tzinfo=UTC)) == "2024-03-15T00:00:00Z"
    assert targets.parse("UUID").validate(UUID(int=1)) == "00000000-0000-0000-0000-000000000001"
    assert targets.parse("bool").validate(True) is True
    assert targets.parse("list[int]").validate((1, 2)) == [1, 2]


def test_the_refusal_of_a_value_has_place_and_reason() -> None:
    target = targets.parse({"type": "object", "properties": {"lines": {"items": {"properties": {"n": INT}}}}})
    with pytest.raises(ValueError, match=r"^/lines/1/n: 'two' is not of type 'integer'\.$"):
        target.validate({"lines": [{"n": 1}, {"n": "two"}]})
    with pytest.raises(ValueError, match=r"is not of type 'integer'") as caught:
        targets.parse("int").validate("x" * 100_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "^(a|aa)+$", "(.*a){12}$", r"^(\w+\s?)*$", r"\w{100}b", "^(?=(a+)+$)", "^(?!x)(a|aa)+$"]
)
def test_no_pattern_is_slow_on_a_long_text(pattern: str) -> None:
    """Python's own engine would never finish the first ones; the test's time-out is the assertion."""
    assert not fits({"pattern": pattern}, "a" * 100_000 + "!")


def test_a_deep_value_is_refused_and_does_not_crash() -> None:
    value: Any = 1
    for _ in range(10_000):
        value = [value]
    assert not fits({"uniqueItems": True}, value)
    assert not fits({}, value)


class _Answer(BaseModel):
    """The field that a model's answer is put into."""


def test_a_target_can_be_a_field_of_a_model() -> None:
    """The type that llm gives to Marvin: pydantic shows the schema in place, and the check is enforced."""
    target = targets.parse({"$defs": {"n": INT}, "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]})
    shaped = Annotated[Any, WithJsonSchema(target.schema), AfterValidator(target.validate)]
    model = create_model("Answer", __base__=_Answer, result=(shaped, ...))
    assert model.model_json_schema()["properties"]["result"] == {
        "title": "Result",
        "properties": {"n": INT},
        "required": ["n"],
    }
    assert model.model_validate_json('{"result": {"n": 1}}').model_dump() == {"result": {"n": 1}}
    with pytest.raises(ValueError, match="'n' is a required property"):
        model.model_validate_json('{"result": {}}')


# -- agreement with stock jsonschema ---------------------------------------------------------------------------------

_plain = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text("ab1", max_size=3)
_values = st.recursive(
    _plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)


def _schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(
        {},
        optional={
            "items": inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
            "additionalProperties": inner,
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "oneOf": st.lists(inner, min_size=1, max_size=2),
            "allOf": st.lists(inner, min_size=1, max_size=2),
            "propertyNames": inner,
            "$ref": st.sampled_from(["#/$defs/a", "#/%24defs/b"]),
        },
    )


_types = ["null", "boolean", "integer", "number", "string", "array", "object"]
_leaves = st.booleans() | st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(_types) | st.lists(st.sampled_from(_types), min_size=1, max_size=3, unique=True),
        "enum": st.lists(_values, min_size=1, max_size=3),
        "const": _values,
        "minimum": st.integers(-3, 3),
        "exclusiveMaximum": st.integers(-3, 3),
        "multipleOf": st.sampled_from([1, 2, 0.5]),
        "minLength": st.integers(0, 2),
        "maxItems": st.integers(0, 2),
        "uniqueItems": st.booleans(),
        "minProperties": st.integers(0, 2),
        "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
        "pattern": st.sampled_from(["a", "^b", "[ab]+$", "1{2,}"]),
        "title": st.just("t"),
    },
)
_definitions = st.fixed_dictionaries({"a": _leaves.filter(lambda leaf: leaf is not False), "b": st.just(INT)})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=st.recursive(_leaves, _schemas, max_leaves=8).filter(lambda s: isinstance(s, dict)), data=st.data())
def test_agrees_with_stock_jsonschema(schema: dict[str, Any], data: st.DataObject) -> None:
    whole = schema | {"$defs": data.draw(_definitions)}
    value = data.draw(_values)
    target = targets.parse(whole)
    Draft202012Validator.check_schema(target.schema)
    assert "$ref" not in target.schema
    assert fits(whole, value) == Draft202012Validator(whole).is_valid(value)


def test_a_schema_that_grows_when_it_is_written_out_is_a_type_too() -> None:
    words = {"enum": [f"{number}{'x' * 400}" for number in range(60)]}
    schema = {"type": "object", "properties": {name: {"$ref": "#/$defs/words"} for name in "abcd"}}
    assert len(json.dumps(targets.parse(schema | {"$defs": {"words": words}}).schema)) > targets.SIZE
    assert isinstance(Shapes().validate_python(schema | {"$defs": {"words": words}}), type)
    assert isinstance(Shapes().validate_python({"anyOf": [True, {"type": "null"}]}), type)
