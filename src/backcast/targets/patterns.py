"""Regular expressions of strangers, which must not take long: Rust's engine is linear in the text. Patterns with
look-around, which it lacks, are matched by `regex` with a deadline, and a text that takes longer does not match.
"""

import functools
import re
from collections.abc import Callable

import regex
from pydantic_core import SchemaError, SchemaValidator, core_schema

PATTERNS = 16
"""Different patterns in one schema: compiled, each may take 10 MB."""
_PATIENCE = 0.1
"""Seconds for one text; an honest pattern needs less than a thousandth."""
LOOK_AROUND = re.compile(r"\(\?<?[=!]")
"""The start of a look-ahead or look-behind."""


class PatternError(Exception):
    """The pattern is none, or one that could take too long."""


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """A search for the pattern: unanchored, and `$` at the very end only, as JSON Schema has it."""
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, strict=True)).isinstance_python
    except SchemaError as error:
        if not LOOK_AROUND.search(pattern):
            why = str(error).strip().splitlines()[-1].split(": ", 1)[-1].rstrip(".")  # the rest is a drawing
            raise PatternError(f"it is not a linear-time regular expression: {why}") from None
    try:
        compiled = regex.compile(_only_at_the_end(pattern))
    except regex.error as error:
        raise PatternError(str(error)) from None

    def matches(text: str) -> bool:
        try:
            return compiled.search(text, timeout=_PATIENCE, concurrent=True) is not None
        except TimeoutError:
            return False

    return matches


compiled_pattern = functools.lru_cache(maxsize=4 * PATTERNS)(compile_pattern)


def _only_at_the_end(pattern: str) -> str:
    """`$` also matches before a last line break in Python, and not in JSON Schema."""
    return re.sub(
        r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\$", lambda m: r"\Z" if m[0] == "$" else m[0], pattern, flags=re.DOTALL
    )
