"""The prompt of the embedded model, and the grammar of its answers."""

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backcast.llm import compact
from backcast.llm.answers import bounded

LABELS = {"type": "string", "enum": ["low", "high"]}
DATE = {"type": "string", "format": "date"}


def fields(**properties: Any) -> compact.Schema:
    return {"type": "object", "properties": properties}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer"}, "the number, as an integer"),
        (DATE, "the date as YYYY-MM-DD"),
        ({"type": "array", "items": {"type": "number"}}, "a list of numbers"),
        ({"type": "array", "items": LABELS}, "a list of one of: low, high"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "the number, as an integer or null"),
        ({"type": ["integer", "null"]}, "the number, as an integer or null"),
        ({"type": "number", "description": "price in euro"}, "price in euro; the number"),
        ({"type": "string", "pattern": "^[A-Z]+$"}, "a string like ^[A-Z]+$"),
        (fields(a={"type": "string"}, p=LABELS), "JSON with a, p (one of: low, high)"),
        (fields(a={"description": "the name"}), "JSON with a (the name)"),
        (fields(a={"description": "birth", **DATE}), "JSON with a (birth, the date as YYYY-MM-DD)"),
        (fields(a=True), "JSON with a"),
        (fields(a=fields(b={"type": "string"}, c=LABELS)), "JSON with a (b, c (one of: low, high))"),
        (fields(a={"type": "array", "items": LABELS}), "JSON with a (list of one of: low, high)"),
        (fields(a={"anyOf": [LABELS, {"type": "null"}]}), "JSON with a (one of: low, high)"),
        ({}, "JSON"),
    ],
)
def test_a_schema_in_words(schema: compact.Schema, words: str) -> None:
    assert compact.wanted(schema) == words


def test_a_label_is_asked_for_by_name() -> None:
    prompt = compact.cast("Just a typo", {"enum": ["low", 2, None]}, "how urgent?")
    assert prompt.question == "Text: Just a typo\nLabels: low, 2, null\nhow urgent?\n"


def test_instructions_replace_or_precede_the_shape() -> None:
    strings = {"type": "array", "items": {"type": "string"}}
    assert compact.cast("x", strings, "the cities").question == "Text: x\nWanted: the cities\n"
    number = compact.cast("x", {"type": "integer"}, "the age")
    assert number.question == "Text: x\nWanted: the age; the number, as an integer\n"


def test_examples_fit_the_schema() -> None:
    for schema in (
        {"type": "boolean"},
        {"type": "integer"},
        {"type": "number"},
        {"type": "string"},
        DATE,
        {"type": "array", "items": {"type": "string"}},
    ):
        examples = compact.cast("x", schema, None).examples
        assert examples
        for _, answer in examples:
            jsonschema.validate(answer, schema)


@given(st.text(), st.text())
def test_callers_text_can_not_start_a_line_of_the_prompt(data: str, instructions: str) -> None:
    question = compact.cast(data, {"type": "integer"}, instructions).question
    ours = [line for line in question.split("\n") if not line.startswith("  ")]
    assert [line.split(":")[0] for line in ours] == ["Text", "Wanted", ""]


def test_control_tokens_are_broken_up() -> None:
    assert "<|im_end|>" not in compact.cast("a<|im_end|>b", {"type": "integer"}, "<|im_start|>").question


def test_the_grammar_ends() -> None:
    grammar = bounded(
        {
            "type": "object",
            "properties": {
                "type": {"type": "string"},  # a field may be named like a keyword
                "tags": {"type": "array", "items": {"type": "string"}},
                "code": {"type": "string", "maxLength": 9},
                "any": True,
                "kind": {"enum": ["string", {"type": "string"}]},
                "either": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "additionalProperties": False,
        },
        length=400,
    )
    assert grammar["properties"] == {
        "type": {"type": "string", "maxLength": 400},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 400}, "maxItems": 40},
        "code": {"type": "string", "maxLength": 9},
        "any": {},
        "kind": {"enum": ["string", {"type": "string"}]},
        "either": {"anyOf": [{"type": "string", "maxLength": 400}, {"type": "null"}]},
    }
    assert grammar["additionalProperties"] is False


def test_a_list_that_must_be_long_may_be() -> None:
    assert bounded({"type": "array", "minItems": 60}, length=400)["maxItems"] == 60
    assert bounded({"type": "array", "maxItems": 3}, length=400)["maxItems"] == 3
