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
