"""The prompt of the embedded model, and the grammar of its answers."""

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backcast.llm import compact
from backcast.llm.answers import bounded
from backcast.llm.figures import plain_dates, plain_numbers
from backcast.llm.grounding import grounded

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
        (fields(a={"anyOf": [LABELS, {"type": "null"}]}), "JSON with a (one of: low, high or null if not given)"),
        ({}, "JSON"),
    ],
)
def test_a_schema_in_words(schema: compact.Schema, words: str) -> None:
    assert compact.wanted(schema) == words


def test_a_tree_is_described_by_its_first_nodes() -> None:
    leaf = {"const": "leaf"}
    node = fields(kind=LABELS, sub={"anyOf": [{"$ref": "#/$defs/node"}, leaf]})
    schema = {**fields(root={"$ref": "#/$defs/node", "description": "the trunk"}), "$defs": {"node": node}}
    words = "JSON with root (the trunk, kind (one of: low, high), sub (one of: leaf))"
    assert compact.cast("x", schema, None).question == f"Text: x\nWanted: {words}\n"


def test_definitions_that_all_refer_to_each_other_make_no_long_prompt() -> None:
    """Twelve kinds of nodes of an expression: paths through them are counted by factorials."""
    names = [f"node{number}" for number in range(12)]
    any_node = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
    nodes = {name: fields(kind={"const": name}, left=any_node, right=any_node) for name in names}
    question = compact.cast("1 + 2", {**any_node, "$defs": nodes}, None).question
    assert all(question.count(f"one of: {name})") == 1 for name in names)
    assert len(question) < 2_000


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


def test_one_of_several_types_is_bounded_too() -> None:
    assert bounded({"type": ["string", "null"]}, length=400)["maxLength"] == 400
    assert bounded({"type": ["null", "array"]}, length=400)["maxItems"] == 40
    assert "pattern" in bounded({"type": ["string", "null"], "format": "time"}, length=400)


def test_a_list_that_must_be_long_may_be() -> None:
    assert bounded({"type": "array", "minItems": 60}, length=400)["maxItems"] == 60
    assert bounded({"type": "array", "maxItems": 3}, length=400)["maxItems"] == 3


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("1.250,40 €", "1250.40 €"),
        ("1,250.40", "1250.40"),
        ("1 250,40 and 1\u202f250,40", "1250.40 and 1250.40"),
        ("-3,5 Grad", "-3.5 Grad"),
        ("1.250.300 or 1,250", "1250300 or 1250"),
        ("1.250", "1.250"),  # either
        ("0,125 kg and 1234,567", "0.125 kg and 1234,567"),
        ("Rechnung 4711 250,00 EUR, on 3 March 2024 250,50", "Rechnung 4711 250.00 EUR, on 3 March 2024 250.50"),
        ("rooms 101 204 305", "rooms 101 204 305"),
        ("12, 45 and 78", "12, 45 and 78"),
        ("10.0.0.1, A-1,5, v1.2.3, 14:30,5 and 2024-05-01", "10.0.0.1, A-1,5, v1.2.3, 14:30,5 and 2024-05-01"),
    ],
)
def test_numbers_are_written_in_one_way(text: str, plain: str) -> None:
    assert plain_numbers(text) == plain


@pytest.mark.parametrize(
    ("text", "instructions", "plain"),
    [
        ("am 03.04.2025", "", "am 2025-04-03"),
        ("25/12/2024, 12/25/2024", "", "2024-12-25, 2024-12-25"),
        ("03/04/2025", "", "03/04/2025"),  # either
        ("03/04/2025 (day/month/year)", "", "2025-04-03 (day/month/year)"),
        ("03/04/2025", "mm/dd/yyyy", "2025-03-04"),
        ("03/04/2025", "jour/mois/année", "2025-04-03"),
        ("03-04-2025", "día-mes-año", "2025-04-03"),
        ("31.02.2025 and 1.2.3", "", "31.02.2025 and 1.2.3"),
    ],
)
def test_dates_in_figures_are_written_in_one_way_if_their_order_is_known(
    text: str, instructions: str, plain: str
) -> None:
    assert plain_dates(text, instructions) == plain


TEXT, EMAIL, NULL = {"type": "string"}, {"type": "string", "format": "email"}, {"type": "null"}


@pytest.mark.parametrize(
    ("value", "schema", "is_free", "kept"),
    [
        ("ann@x.org", {"anyOf": [EMAIL, NULL]}, False, None),
        ("ANN@y.org", {"anyOf": [NULL, EMAIL]}, True, "ANN@y.org"),
        ("ann@x.org", EMAIL, False, "ann@x.org"),
        ("555-0100", {"type": ["string", "null"]}, False, None),
        ("30", {"anyOf": [TEXT, NULL]}, False, "30"),
        ("Unknown", {"anyOf": [TEXT, NULL]}, False, None),
        ("Unknown", {"anyOf": [TEXT, NULL]}, True, "Unknown"),
        ("green", {"anyOf": [{"enum": ["green", "red"]}, NULL]}, False, "green"),
        ("2024-05-01", {"anyOf": [DATE, NULL]}, False, "2024-05-01"),
        (
            {"a": ["Bob", "Ann"], "n": 3},
            fields(a={"items": {"anyOf": [TEXT, NULL]}}),
            False,
            {"a": [None, "Ann"], "n": 3},
        ),
    ],
)
def test_an_invented_text_becomes_null_where_null_is_allowed(value: Any, schema: Any, is_free: bool, kept: Any) -> None:
    assert grounded(value, schema, "Ann (ann@y.org) has 30 chairs since 1 May 2024.", is_free=is_free) == kept


@pytest.mark.parametrize(
    ("value", "data", "is_kept"),
    [
        ("M", "T-shirt, size M, red", True),
        ("B", "blood type B", True),
        ("A", "blood type AB", False),
        ("C++", "I like C++", True),
        ("C++", "I like C", False),
        ("C#", "I like c#.", True),
        ("no", "I do not know", False),
        ("-", "T-shirt", False),
        ("", "T-shirt", False),
        ("王小明", "我叫王小明，住在北京。", True),
        ("王小明 先生", "我叫王小明，住在北京。", True),
        ("李", "我叫王小明，住在北京。", False),
        ("東京", "東京に住んでいます", True),
        ("大阪", "東京に住んでいます", False),
        ("서울", "저는 서울에 살아요", True),
        ("Ada", "Adaは東京に住んでいます", True),
        ("vi", "Tôi viết", False),
        ("Łódź", "Mieszkam w Łodzi, a nie w ŁÓDŹ.", True),
    ],
)
def test_a_text_that_is_in_the_data_is_not_invented(value: str, data: str, is_kept: bool) -> None:
    assert grounded(value, {"anyOf": [TEXT, NULL]}, data) == (value if is_kept else None)
