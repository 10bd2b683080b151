"""Inputs are accepted by a compiled validator and refused in the words of jsonschema: the two must agree."""

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from backcast.input_schemas import InputSchema
from tests.unit.test_targets import _definitions, _leaves, _schemas, _values

ROWS = {"type": "object", "properties": {"rows": {"type": "array", "items": {"required": ["a"]}}}}
NESTED = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=st.recursive(_leaves, _schemas, max_leaves=8).filter(lambda s: isinstance(s, dict)), data=st.data())
def test_agrees_with_jsonschema(schema: dict[str, Any], data: st.DataObject) -> None:
    whole = schema | {"$defs": data.draw(_definitions)}
    value = data.draw(_values)
    stock, ours = Draft202012Validator(whole), InputSchema(whole)
    assert ours.accepts(value) == stock.is_valid(value)
    assert [error.message for error in ours.errors(value)] == [error.message for error in stock.iter_errors(value)]


@pytest.mark.parametrize("number", [2**63, 10**400, -(10**30), 1.0, 1.5, 1e300, True])
def test_numbers(number: float) -> None:
    for schema in ({"type": "integer"}, {"type": "number", "minimum": 1}, {"multipleOf": 1}, {}):
        assert InputSchema(schema).accepts(number) == Draft202012Validator(schema).is_valid(number)


def test_an_integer_that_jsonschema_can_not_divide() -> None:
    assert InputSchema({"multipleOf": 0.5}).accepts(10**400)
    with pytest.raises(OverflowError):
        InputSchema({"multipleOf": 1.5}).accepts(10**400)


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [("^\\d+$", "٣", True), ("^\\d+$", "x", False), ("^(?=a)", "ab", True), ("a\\Z", "a", True), ("^a$", "a\n", True)],
)
def test_patterns_mean_what_python_means(pattern: str, text: str, fits: bool) -> None:
    assert InputSchema({"pattern": pattern}).accepts(text) == fits


def test_text_that_is_no_unicode() -> None:
    assert InputSchema({"type": "string"}).accepts("\ud800")


@pytest.mark.parametrize("schema", [{"$ref": "http://127.0.0.1:1/schema.json"}, {"type": "nothing"}, {"pattern": "("}])
def test_a_schema_that_can_not_be_compiled_is_left_to_jsonschema(schema: dict[str, Any]) -> None:
    assert InputSchema(schema)._compiled is None


def test_deep_values_end_no_process() -> None:
    """The stack of a process is finite, and an overflow ends all of its requests."""
    program = f"""
from backcast.input_schemas import InputSchema
for levels in (250, 260, 3_000, 1_000_000):
    value = []
    for _ in range(levels):
        value = [value]
    for schema in ({{}}, {NESTED!r}):
        try:
            assert InputSchema(schema).accepts(value)
        except RecursionError:
            assert levels > 250
    while value:  # or its own end would be as deep
        value = value[0]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
