"""Inputs are checked against whatever schema a task has: in no long time, and without an error of ours."""

import time
from typing import Any

import pytest

from backcast.targets.inputs import MOST, Inputs


def of(**schema: Any) -> Inputs:
    return Inputs({"type": "object", "properties": {"x": schema}})


@pytest.mark.parametrize("pattern", [r"^([a-z]+\.?)+@x$", r"^(a+)+$", r"^(?=(a+)+$)a*$"])
@pytest.mark.parametrize("keyword", ["pattern", "patternProperties", "additionalProperties"])
def test_no_pattern_takes_long(pattern: str, keyword: str) -> None:
    text = "a" * 40 + "!"
    if keyword == "pattern":
        inputs, given = of(pattern=pattern), {"x": text}
    else:
        named = {"patternProperties": {pattern: {"type": "string"}}} | (
            {"additionalProperties": False} if keyword == "additionalProperties" else {}
        )
        inputs, given = of(**named), {"x": {text: "t"}}
    began = time.process_time()
    assert inputs.fits(given) == (keyword == "patternProperties")
    assert time.process_time() - began < 5, "with Python's own engine it takes years"


def test_patterns_are_those_of_pydantic() -> None:
    assert of(pattern=r"^\p{L}+$").fits({"x": "Ünal"})
    assert not of(pattern=r"^\p{L}+$").fits({"x": "U2"})


def chain(kind: str, leaf: object) -> object:
    for _ in range(60):
        leaf = {"child": leaf, "kind": kind}
    return leaf


@pytest.mark.parametrize("keyword", ["anyOf", "oneOf"])
@pytest.mark.parametrize(("kind", "leaf", "fits"), [("b", None, True), ("b", "five", False), ("c", None, False)])
def test_no_depth_takes_long(keyword: str, kind: str, leaf: object, *, fits: bool) -> None:
    some = {keyword: [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}, {"type": "null"}]}
    named = {kind: {"type": "object", "properties": {"child": some, "kind": {"const": kind}}} for kind in ("a", "b")}
    assert Inputs({"$defs": named, "properties": {"x": some}}).fits({"x": chain(kind, leaf)}) == fits


@pytest.mark.parametrize("rule", [{"uniqueItems": True}, {"items": {"type": "integer"}}, {"unevaluatedItems": False}])
def test_no_length_takes_long(rule: dict[str, Any]) -> None:
    began = time.process_time()
    of(contains={"type": "integer"}, **rule).misfits({"x": [*range(1_000_000), "a"]})
    assert time.process_time() - began < 5, "it is left to the task's own process"


@pytest.mark.parametrize(
    ("items", "unique"),
    [
        ([1, 1.0], False),
        ([0, -0.0], False),
        ([1, True, "1", None, [1], [True], {"1": 1}, {"1": True}], True),
        ([{"a": [1], "b": 2}, {"b": 2.0, "a": [1.0]}], False),
        ([2**53 + 1, 2.0**53], True),
        ([10**400, "a", 10**400], False),
    ],
)
def test_items_are_the_same_as_in_json(items: list[Any], *, unique: bool) -> None:
    assert of(uniqueItems=True).fits({"x": items}) == unique


def test_an_error_found_again_has_its_place() -> None:
    part = {"$ref": "#/$defs/part"}
    named = {"part": {"properties": {"n": {"type": "integer"}}}}
    schema = {"$defs": named, "properties": {"x": {"if": {"not": {"items": part}}, "then": {"items": part}}}}
    (error,) = Inputs(schema).misfits({"x": [{}, {"n": "one"}]})
    assert list(error.absolute_path) == ["x", 1, "n"]
    assert error.message == "'one' is not of type 'integer'"


def test_the_first_errors_are_enough() -> None:
    found = of(type="array", items={"type": "string"}).misfits({"x": [{}] * 1_000_000})
    assert [list(error.absolute_path) for error in found] == [["x", n] for n in range(MOST)]


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": r"(a)\1"},
        {"pattern": "("},
        {"type": "nonsense"},
        {"minimum": "three"},
        {"$ref": "https://example.org/schema"},
        {"$ref": "#/$defs/none"},
    ],
)
def test_a_schema_that_can_not_be_applied_refuses_nothing(schema: dict[str, Any]) -> None:
    assert of(**schema).misfits({"x": "aa"} if "pattern" in schema else {"x": 3}) == []


def test_numbers_beyond_floats() -> None:
    assert of(multipleOf=0.5).fits({"x": 10**400})
    with pytest.raises(OverflowError):
        of(multipleOf=0.5).misfits({"x": 10**400})
