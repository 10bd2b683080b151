"""The one rule for texts that are stored or sent: UTF-8 has no lone surrogates, PostgreSQL's text no NUL."""

import re

_NOT_STORABLE = re.compile("[\\x00\\ud800-\\udfff]")


def storable(text: str) -> str:
    """The text with a replacement character for each that can't be stored."""
    return _NOT_STORABLE.sub("\N{REPLACEMENT CHARACTER}", text)
