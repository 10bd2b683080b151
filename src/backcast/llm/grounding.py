"""Takes out of the embedded model's answer what it has invented: a small model rather fills a field than leaves it out.

Only where null is allowed, and only texts, since a text that was found is in the data as it is. Decides nothing about
values that had to be put into another form, such as numbers and dates.
"""

import re
from typing import Any

from backcast.llm.schemas import Schema

_COPIED = {"email", "uri", "uuid", "hostname", "ipv4", "ipv6"}
"""Formats that are copied in one piece."""
_REWRITTEN = {"date", "date-time", "time", "duration"}
_LETTERS = r"0-9a-z_\u00aa-\u058f\u1e00-\u1fff"
"""Figures and the letters of scripts that put a space between two words: Latin to Armenian."""
_EDGE = rf"(?!(?<=[{_LETTERS}])[{_LETTERS}])"
"""Not inside a word of these; other scripts write words without spaces, or with particles."""


def grounded(value: Any, schema: Any, data: str, *, is_free: bool = False) -> Any:
    """The value, with null in place of texts that have nothing in common with the data. `is_free`: the instructions may
    ask for texts of another wording, so only formats that are copied are looked at."""
    match schema:
        case {"anyOf": [*members]} if {"type": "null"} in members and isinstance(value, str):
            shapes = [member for member in members if isinstance(member, dict) and member.get("type") == "string"]
            return None if shapes and all(_is_invented(value, shape, data, is_free) for shape in shapes) else value
        case {"type": ["string", "null"] | ["null", "string"]} if isinstance(value, str):
            return None if _is_invented(value, schema, data, is_free) else value
        case {"anyOf": [*members]}:
            for member in members:
                value = grounded(value, member, data, is_free=is_free)
            return value
        case {"properties": dict(fields)} if isinstance(value, dict):
            return {name: grounded(each, fields.get(name), data, is_free=is_free) for name, each in value.items()}
        case {"items": dict(items)} if isinstance(value, list):
            return [grounded(each, items, data, is_free=is_free) for each in value]
        case _:
            return value


def _is_invented(value: str, schema: Schema, data: str, is_free: bool) -> bool:
    form = schema.get("format")
    if form in _COPIED:
        return value.casefold() not in data.casefold()
    if is_free or form in _REWRITTEN or {"enum", "const"} & schema.keys():
        return False
    figures, words = re.findall(r"\d+", value), re.findall(r"[^\W\d]{2,}", value)
    if re.search(r"\w", value):
        words.append(value)
    is_strange = bool(figures) and not any(figure in data for figure in figures)
    return is_strange or (not figures and not any(_is_in(data, word) for word in words))


def _is_in(data: str, word: str) -> bool:
    return re.search(_EDGE + re.escape(word.casefold()) + _EDGE, data.casefold()) is not None
