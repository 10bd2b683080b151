"""Writes the embedded model's prompt, in place of Marvin's: some 60 tokens and worked examples, not 400 and rules.

Decides wording only. Text that comes from callers can't end its paragraph or forge another (its lines are indented, the
model's control tokens are broken up); it can still lead the model to a wrong answer, which then has the right shape.
"""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from backcast.llm.figures import plain_dates, plain_numbers
from backcast.models import JSON

Schema = dict[str, Any]

_FORMATS = {
    "date": "the date as YYYY-MM-DD",
    "date-time": "the date and time as YYYY-MM-DDTHH:MM:SS",
    "time": "the time as HH:MM:SS, 24 hours",
    "duration": "the duration, ISO 8601",
    "email": "the email address",
    "uri": "the URL",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A system message, worked examples as question and answer, and the question."""

    system: str
    examples: tuple[tuple[str, JSON], ...]
    question: str


def cast(data: JSON, schema: Schema, instructions: str | None) -> Prompt:
    """The prompt for casting `data` to a (self-contained) JSON Schema."""
    schema = _unrolled(schema)
    text, hints = _quote(_plain(data, schema, instructions or "")), _quote(instructions or "")
    if labels := _labels(schema):
        listed = ", ".join(labels)
        return Prompt(
            "Choose the label that best describes the text.",
            (
                ("Text: The soup was cold and bland.\nLabels: travel, food, money\n", "food"),
                ("Text: The report has twelve pages.\nLabels: good, bad, neutral\n", "neutral"),
            ),
            f"Text: {text}\nLabels: {listed}\n" + (f"{hints}\n" if hints else ""),
        )
    shape = wanted(schema)
    if not hints:
        asked = shape
    elif schema.get("type") in ("string", "array", "boolean") and not _is_special(schema):
        asked = hints  # "the cities" is enough; the grammar knows that it is a list
    else:
        asked = f"{hints}; {shape}"
    return Prompt(
        "Convert the text to the wanted value. Copy facts exactly from the text; never invent."
        + (" Answer null for what the text does not say." if _has({"null"}, schema) else ""),
        tuple((_question(about, ask or shape), answer) for about, ask, answer in _examples(schema)),
        _question(text, asked),
    )


def _plain(data: JSON, schema: Schema, instructions: str) -> JSON:
    """The data as text, with figures as a small model knows them, where they are asked for."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    written = json.dumps(schema)
    if '"format": "date' in written:
        text = plain_dates(text, instructions)
    return plain_numbers(text) if isinstance(data, str) and _has({"integer", "number"}, schema) else text


def _unrolled(schema: Schema) -> Schema:
    """The schema with each definition in the place of its first reference, level by level: a tree is described by its
    first nodes. Each is used once, as definitions that refer to each other have more paths than anyone can walk."""
    definitions = dict[str, Schema](schema.get("$defs", {}))
    root = copy.deepcopy({key: value for key, value in schema.items() if key != "$defs"})
    level: list[Any] = [root]
    while level:
        for node in level:
            while isinstance(node, dict) and isinstance(reference := node.get("$ref"), str):
                beside = {key: value for key, value in node.items() if key != "$ref"}
                node.clear()
                node.update(copy.deepcopy(definitions.pop(reference.removeprefix("#/$defs/"), {})) | beside)
        inside = (node.values() if isinstance(node, dict) else node for node in level)
        level = [each for values in inside for each in values if isinstance(each, dict | list)]
    return root


def wanted(schema: Schema, plural: bool = False) -> str:
    """A schema in words, short enough for a small model."""
    shape = _shape(schema, plural)
    return f"{_quote(schema['description'])}; {shape}" if schema.get("description") else shape


def _shape(schema: Schema, plural: bool) -> str:
    kind, form = schema.get("type"), schema.get("format")
    if labels := _labels(schema):
        return f"one of: {', '.join(labels)}"
    if isinstance(kind, list):
        return " or ".join(wanted({**schema, "type": one}, plural) for one in kind)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(wanted(one, plural) for one in schema[union])
    if form in _FORMATS:
        return _FORMATS[form]
    if kind == "string" and "pattern" in schema:
        return f"a string like {schema['pattern']}"
    match kind:
        case "integer":
            return "all numbers, as integers" if plural else "the number, as an integer"
        case "number":
            return "all numbers" if plural else "the number"
        case "boolean":
            return "true if the text says yes, agrees or is positive; false if it says no, refuses or is negative"
        case "string":
            return "a string"
        case "null":
            return "null"
        case "array":
            items = schema.get("items")
            return "a list of " + wanted(items if isinstance(items, dict) else {}, plural=True).removeprefix("all ")
        case _:
            fields = ", ".join(_fields(schema.get("properties", {})))
            return f"JSON with {fields}" if fields else "JSON"


def _fields(properties: dict[str, Any]) -> Iterator[str]:
    for name, schema in properties.items():
        if not isinstance(schema, dict):
            yield name
        elif about := ", ".join(part for part in (_quote(schema.get("description", "")), _field_shape(schema)) if part):
            yield f"{name} ({about})"
        else:
            yield name


def _field_shape(schema: Schema) -> str:
    """The rest of the shape, which neither the field's name nor the grammar expresses."""
    if _labels(schema) or _is_special(schema):
        return _shape(schema, plural=False)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            shapes = [_field_shape(one) for one in schema[union] if one != _NULL]
            nothing = ["null if not given"] if _NULL in schema[union] else []
            return " or ".join([*filter(None, shapes), *nothing])
    match schema:
        case {"properties": dict(properties)}:
            return ", ".join(_fields(properties))
        case {"items": dict(items)} if shape := _field_shape(items):
            return f"list of {shape}"
        case _:
            return ""


_NULL = {"type": "null"}


def _has(kinds: set[str], schema: Any) -> bool:
    """Whether one of these types is somewhere in a schema."""
    match schema:
        case {"type": str(kind)} if kind in kinds:
            return True
        case {"type": [*several]} if kinds & {*several}:
            return True
        case dict() | list():
            return any(_has(kinds, each) for each in (schema.values() if isinstance(schema, dict) else schema))
        case _:
            return False


def _is_special(schema: Schema) -> bool:
    return schema.get("format") in _FORMATS or "pattern" in schema


def _labels(schema: Schema) -> list[str]:
    values = [schema["const"]] if "const" in schema else schema.get("enum", [])
    return [value if isinstance(value, str) else json.dumps(value) for value in values]


def _question(text: str, ask: str) -> str:
    return f"Text: {text}\nWanted: {ask}\n"


def _examples(schema: Schema) -> list[tuple[str, str | None, JSON]]:
    """Text, wanted value (None: the schema in words), answer. Examples steady a tiny model more than any rule does."""
    match schema:
        case {"anyOf": [dict(wanted), {"type": "null"}] | [{"type": "null"}, dict(wanted)]}:
            return _examples_or_null(wanted)
        case {"type": "boolean"}:
            return [
                ("Yep, that works.", None, True),
                ("I won't do it.", None, False),
                ("The door is closed.", "Is the door open?", False),
                ("Never!", None, False),
            ]
        case {"type": "integer"}:
            return [("Around ninety-one people came.", None, 91), ("2050 likes", None, 2050)]
        case {"type": "number"}:
            return [("2 euros 25 cents", None, 2.25), ("It fell by -0.8 points", None, -0.8)]
        case {"type": "string", "format": "date"}:
            return [
                ("7 Jun 1988", None, "1988-06-07"),
                ("October 31st, 2011", None, "2011-10-31"),
            ]
        case {"type": "string"} if "format" not in schema and "pattern" not in schema:
            return [
                ("Ticket T-55 was closed by Sam Hall.", "who closed the ticket", "Sam Hall"),
                ("Ticket T-55 was closed by Sam Hall.", "the ticket number", "T-55"),
                ("good morning", "convert to title case", "Good Morning"),
            ]
        case {"type": "array", "items": {"type": "string"}}:
            return [("Shapes: circle, square & cone", None, ["circle", "square", "cone"])]
        case {"type": "object"} if _has({"null", "number"}, schema):
            return [_EXAMPLE_OF_FIELDS]
        case _:
            return []


_EXAMPLE_OF_FIELDS: tuple[str, str, JSON] = (
    "Purchase by Kim Ode (kim@ode.example): one desk, 1149.50 EUR",
    f"JSON with item, buyer, price, mail ({_FORMATS['email']} or null if not given), comment (null if not given)",
    {"item": "desk", "buyer": "Kim Ode", "price": 1149.5, "mail": "kim@ode.example", "comment": None},
)


def _examples_or_null(schema: Schema) -> list[tuple[str, str | None, JSON]]:
    match schema:
        case {"type": "integer" | "number"}:
            given: JSON = 6
            about, absent = "the number of wheels", "The truck is red and rather old."
            text = "The truck has 6 wheels."
        case {"type": "string", "format": "date"}:
            given, about, absent = "2016-08-24", "the day of the move", "The move has been put off, there is no date."
            text = "The move is on 24 August 2016."
        case {"type": "string"} if "format" not in schema:
            given, about, absent, text = "Sam Hall", "the driver", "The bus was late.", "The bus of Sam Hall was late."
        case _:
            return []
    ask = f"{about}; {wanted(schema)} or null"
    return [(text, ask, given), (absent, ask, None), ("Nothing is known about it yet.", ask, None)]


def _quote(value: JSON) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "\n  ".join(re.sub(r"<\|(?=\w)", "< |", text.strip()).splitlines())
